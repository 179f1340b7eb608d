# SPDX-License-Identifier: Apache-2.0
"""Triton kernels, one package per op with one launch function each."""
