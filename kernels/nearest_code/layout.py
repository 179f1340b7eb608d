# SPDX-License-Identifier: Apache-2.0
"""How vectors lie in memory, as the kernels are told."""

from collections.abc import Sequence


def vector_layout(sizes: Sequence[int], strides: Sequence[int]) -> tuple[int, int, int, bool]:
    """Strides over the dimensions of [outer, D, inner], and whether the vectors are planar: adjacent in memory, not their components.

    Strides of one element count as divisible by 16, so that what is aligned is loaded 16 bytes at a time.
    """
    stride_outer, _, stride_inner = (0 if size == 1 else stride for size, stride in zip(sizes, strides, strict=True))
    stride_d = strides[1]
    return stride_outer, stride_d, stride_inner, sizes[2] > 1 and stride_inner == 1 and stride_d != 1
