# SPDX-License-Identifier: Apache-2.0
"""Exact search of the k nearest codes on CUDA, with the scores and bounds of the search of the nearest one (launch.py).

1. prepare.py rounds the codes to float16, and finds the norms that the bound needs.
2. The codes are divided into classes, by their place in a tile, of which each row keeps the largest lower bound of a score. The k-th
   largest of these is a threshold that the scores of k codes at least reach, and below which no code is among the k nearest.
3. A second pass over the codes lists those whose upper bound reaches the threshold. With 4 k classes that is about 1.2 k codes.
4. Their distances in float64 decide. A row that has no threshold, or whose list is too short for it, is compared with all codes.

No host synchronization; 4 launches whatever the sizes; memory beside the operands of about twice the indices.
"""

import functools

import torch
import triton
from torch import Tensor

from .candidates import nearest_codes_collect_kernel, nearest_codes_decide_kernel, nearest_codes_threshold_kernel
from .layout import vector_layout
from .plan import Descriptor, Plan
from .prepare import nearest_code_prepare_kernel, reserve_prepared
from .shape import MAX_PROGRAMS, Shape

_MAX_PLANS = 256


class TopKShape(Shape):
    """Tile sizes and launch options of a search for k codes.

    Attributes:
        classes: of the codes.
        slots: codes in the list of a row.
        rows: of a program that compares lists.
    """

    def __init__(self, dim: int, num_codes: int, k: int, device: torch.device | int) -> None:
        super().__init__(dim, num_codes, device)
        # The classes take as many registers as the scores.
        self.block_n, self.block_k, self.warps, self.max_registers = 64, 128, 4, 255
        self.fit(2 if self.depth <= 128 else 1)
        self.classes = min(max(16, triton.next_power_of_2(4 * k)), self.block_k)
        self.slots = max(32, triton.next_power_of_2(4 * k))
        self.rows = max(512 // self.slots, 1)

    def pass_options(self) -> dict:
        return {**self.scan_options(), "CLASSES": self.classes}

    def collect_options(self) -> dict:
        return {**self.pass_options(), "SLOTS": self.slots}

    def decide_options(self) -> dict:
        """Fused multiply-adds are off: they differ from the reference in the last bit."""
        return {"SLOTS": self.slots, "BLOCK_N": self.rows, "KEPT": 64, "num_warps": 4, "enable_fp_fusion": False}


def nearest_codes(x: Tensor, codebook: Tensor, k: int, cosine: bool, with_distances: bool) -> tuple[Tensor, Tensor]:
    """Return the indices and distances [outer, inner, k] of the codes [K, D] nearest to x [outer, D, inner].

    With a codebook [heads, K, D], x and the results have a leading dimension of heads too. Distances that are not wanted are empty.
    """
    sizes = x.shape
    if sizes[-1] >= 1 << 31:  # the kernels index inner positions with int32
        moved = x.transpose(-2, -1).flatten(-3, -2).unsqueeze(-1)
        found = nearest_codes(moved, codebook, k, cosine, with_distances)
        shape = (*sizes[:-2], sizes[-1], k)
        return found[0].view(shape), found[1].view(shape) if with_distances else found[1]
    indices = torch.empty((*sizes[:-2], sizes[-1], k), dtype=torch.int64, device=x.device)
    distances = torch.empty(indices.shape if with_distances else (0,), dtype=torch.float32, device=x.device)
    if indices.numel() > 0:
        plan = _plan(
            x.device, x.dtype, sizes, x.stride(), codebook.dtype, codebook.shape, codebook.stride(), k, cosine, with_distances
        )  # fmt: skip
        plan.run(x, codebook, indices, distances if with_distances else None)
    return indices, distances


@functools.lru_cache(maxsize=_MAX_PLANS)
def _plan(
    device: torch.device,
    dtype: torch.dtype,
    x_sizes: tuple[int, ...],  # [heads, outer, D, inner], or without heads
    x_strides: tuple[int, ...],
    codebook_dtype: torch.dtype,
    codebook_sizes: tuple[int, ...],  # [heads, K, D], or without heads
    codebook_strides: tuple[int, ...],
    k: int,
    cosine: bool,
    with_distances: bool,
) -> Plan:
    """Buffers, sizes and options of the four launches. The dtypes are there because compiled kernels depend on them."""
    if len(x_sizes) == 3:
        x_sizes, x_strides = (1, *x_sizes), (0, *x_strides)
        codebook_sizes, codebook_strides = (1, *codebook_sizes), (0, *codebook_strides)
    heads, outer, dim, inner = x_sizes
    num_codes = codebook_sizes[1]
    positions = outer * inner
    shape = TopKShape(dim, num_codes, k, device)
    splits, tiles_per_program = shape.split(positions, heads)
    blocks = min(triton.cdiv(positions, shape.block_n), triton.cdiv(MAX_PROGRAMS, splits * heads))
    programs = heads * splits * blocks

    plan = Plan(device, inputs=("x", "codebook", "indices", "distances"))
    codes, of_codes = reserve_prepared(plan, shape, heads, num_codes)
    plan.buffer("queries", torch.float16, programs, shape.block_n, shape.depth)
    plan.buffer("held", torch.float32, programs, 3, shape.block_n)
    plan.buffer("lower", torch.float32, heads, splits, positions, shape.classes if splits > 1 else 1)
    plan.buffer("listed", torch.int32, heads, splits, positions, shape.slots)
    plan.buffer("counts", torch.int32, heads, splits, positions)

    stride_head = 0 if heads == 1 else x_strides[0]
    stride_outer, stride_d, stride_inner, planar = vector_layout(x_sizes[1:], x_strides[1:])
    stride_codebook, stride_k, stride_code_d = codebook_strides
    common = {
        **of_codes, "positions": positions, "inner": inner, "k": k, "splits": splits, "tiles_per_program": tiles_per_program,
        "stride_head": stride_head, "stride_outer": stride_outer, "stride_d": stride_d, "stride_inner": stride_inner,
        "stride_codebook": stride_codebook, "stride_k": stride_k, "stride_code_d": stride_code_d, "COSINE": cosine,
        "PLANAR": planar, "SPLITS": splits > 1, "WITH_DISTANCES": with_distances,
    }  # fmt: skip
    scanned = common | {"codes": Descriptor(codes, (shape.block_k, shape.columns)) if shape.tma else codes}
    of_codebook = common | {"stride_head": stride_codebook, "stride_d": stride_code_d}
    decide_blocks = triton.cdiv(positions, shape.rows)
    plan.launch(nearest_code_prepare_kernel, (shape.tiles, heads, 1), of_codebook, shape.prepare_options())
    plan.launch(nearest_codes_threshold_kernel, (blocks, splits, heads), scanned, shape.pass_options())
    plan.launch(nearest_codes_collect_kernel, (blocks, splits, heads), scanned, shape.collect_options())
    plan.launch(nearest_codes_decide_kernel, (decide_blocks, heads, 1), common, shape.decide_options())
    return plan
