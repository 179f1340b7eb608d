# SPDX-License-Identifier: Apache-2.0
"""What a CUDA device multiplies fast, from its compute capability: no measurement, and the same decision on every machine."""

import torch

# Devices whose float64 runs at half the rate of float32 (CUDA C++ Programming Guide, arithmetic throughput). All others, among them RTX
# cards, L40S and B300, run it at 1/32 or 1/64.
FAST_DOUBLE = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}
# Devices whose products of half-precision matrices, summed in float32, are at least eight times as fast as those of float32 matrices.
FAST_HALF = {(7, 0), (8, 0), (9, 0), (10, 0), (10, 3)}


def has_fast_double(device: torch.device) -> bool:
    """Whether float64 products are not much slower than float32 products. True on a CPU, and where the device cannot be asked."""
    return torch.version.hip is not None or _capability(device) in FAST_DOUBLE | {None}


# As torch.compiler.assume_constant_result marks it, which imports torch._dynamo for that: more than a second.
has_fast_double._dynamo_marked_constant = True


def has_fast_half(device: torch.device) -> bool:
    """Whether a float32 product is faster as a few products of half-precision matrices."""
    return torch.version.hip is None and _capability(device) in FAST_HALF


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, in which nothing may synchronize."""
    if device.type != "cuda" or torch.compiler.is_compiling() or not torch.cuda.is_available():
        return False
    return torch.cuda.is_current_stream_capturing()


def _capability(device: torch.device) -> tuple[int, int] | None:
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)
