# SPDX-License-Identifier: Apache-2.0
"""Nearest-code search in Triton; launch.py explains how it works."""

from .launch import nearest_code

__all__ = ["nearest_code"]
