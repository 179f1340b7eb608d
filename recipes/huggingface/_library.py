# SPDX-License-Identifier: Apache-2.0
"""Stands for genperf's loader in a kernel of the Hub, whose one library `_ops` has loaded: what it has, and why not more."""

import importlib.util

import torch

from ._ops import add_op_namespace_prefix

_ANY_OP = add_op_namespace_prefix("code_statistics")


def _failure(backend: str) -> str | None:
    if torch._C._dispatch_has_kernel_for_dispatch_key(_ANY_OP, backend):
        return None
    return f"this build variant of the kernel has no {backend} kernels; the Python package genperf has both."


cpu_failure = _failure("CPU")
cuda_failure = _failure("CUDA")
triton_failure = None if importlib.util.find_spec("triton") else "triton is not installed."
cuda_device_failures: dict[int | None, str] = {}
triton_device_failures: dict[int | None, str] = {}
isa = None if cpu_failure else "x86-64-v3"
