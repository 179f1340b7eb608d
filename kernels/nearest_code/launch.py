# SPDX-License-Identifier: Apache-2.0
"""Exact nearest-code search on CUDA: float16 scores with a certified error bound, and float64 where they leave a doubt.

The nearest code has the largest score s = z.f - |f|^2 / 2, where z = x - c and f = code - c. The center c is the mean of a
sample of the codes, or zero if that mean is small beside their lengths, which keeps half-precision inputs exact.

1. prepare.py rounds the codes to float16, finds the norms that the bound (bound.py) needs, and leaves out repeated codes.
2. scan.py computes the scores on the tensor cores and keeps for each row what tells its nearest code, or the few that may be it.
3. settle.py stores the indices of the rows that this decides, decides between two or a few codes in float64, and lists the rest.
4. search.py searches the listed rows: it collects the codes in doubt again, and compares with all of them only in float32 first.

No host synchronization; 4 launches whatever the sizes, planned once for each kind of inputs (plan.py); memory beside the operands of
12 to 24 bytes a row. shape.py chooses the tiles and launch options.
"""

import functools

import torch
import triton
from torch import Tensor

from .layout import vector_layout
from .plan import Descriptor, Plan
from .prepare import nearest_code_prepare_kernel, reserve_prepared
from .scan import nearest_code_scan_kernel
from .search import nearest_code_search_kernel
from .settle import nearest_code_settle_kernel
from .shape import MAX_PROGRAMS, SEARCH_PROGRAMS, SEARCH_ROWS, Shape

_MAX_PLANS = 256


def nearest_code(x: Tensor, codebook: Tensor, mask: Tensor | None, cosine: bool) -> Tensor:
    """Return the indices [outer, inner] of the codes [K, D] nearest to x [outer, D, inner], or -1 where the mask is False.

    With a codebook [heads, K, D], x, mask and indices have a leading dimension of heads too.
    """
    sizes = x.shape
    if sizes[-1] >= 1 << 31:  # the kernels index inner positions with int32
        moved = x.transpose(-2, -1).flatten(-3, -2).unsqueeze(-1)
        mask = None if mask is None else mask.flatten(-2, -1).unsqueeze(-1)
        return nearest_code(moved, codebook, mask, cosine).unflatten(-2, (sizes[-3], sizes[-1])).squeeze(-1)
    indices = torch.empty(sizes[:-2] + sizes[-1:], dtype=torch.int64, device=x.device)
    if indices.numel() == 0:
        return indices
    mask = None if mask is None else mask.contiguous()
    plan = _plan(
        Shape, x.device, x.dtype, sizes, x.stride(), codebook.dtype, codebook.shape, codebook.stride(), mask is not None, cosine
    )  # fmt: skip
    plan.run(x, codebook, mask, indices)
    return indices


@functools.lru_cache(maxsize=_MAX_PLANS)
def _plan(
    make_shape: type[Shape],
    device: torch.device,
    dtype: torch.dtype,
    x_sizes: tuple[int, ...],  # [heads, outer, D, inner], or without heads
    x_strides: tuple[int, ...],
    codebook_dtype: torch.dtype,
    codebook_sizes: tuple[int, ...],  # [heads, K, D], or without heads
    codebook_strides: tuple[int, ...],
    has_mask: bool,
    cosine: bool,
) -> Plan:
    """Buffers, sizes and options of the four launches. The dtypes are there because compiled kernels depend on them."""
    if len(x_sizes) == 3:
        x_sizes, x_strides = (1, *x_sizes), (0, *x_strides)
        codebook_sizes, codebook_strides = (1, *codebook_sizes), (0, *codebook_strides)
    heads, outer, dim, inner = x_sizes
    num_codes = codebook_sizes[1]
    positions = outer * inner
    shape = make_shape(dim, num_codes, device)
    splits, tiles_per_program = shape.split(positions, heads)
    programs = triton.cdiv(SEARCH_PROGRAMS, heads)
    blocks = min(triton.cdiv(positions, shape.block_n), triton.cdiv(MAX_PROGRAMS, splits * heads))
    scratch = max(splits * blocks * shape.block_n, programs * SEARCH_ROWS)

    plan = Plan(device, inputs=("x", "codebook", "mask", "indices"))
    codes, of_codes = reserve_prepared(plan, shape, heads, num_codes)
    plan.buffer("queries", torch.float16, heads, scratch, shape.depth)
    lower = plan.buffer("lower", torch.float32, heads, splits, positions)
    upper = plan.buffer("upper", torch.float32, heads, splits, positions) if splits > 1 else lower
    plan.buffer("first", torch.int32, heads, splits, positions)
    plan.buffer("last", torch.int32, heads, splits, positions)
    plan.buffer("rows", torch.int64, heads, positions)
    plan.buffer("counts", torch.int32, heads, 1 + programs)
    plan.buffer("part_distance", torch.float64, heads, programs, SEARCH_ROWS)
    plan.buffer("part_index", torch.int32, heads, programs, SEARCH_ROWS)

    stride_head = 0 if heads == 1 else x_strides[0]
    stride_outer, stride_d, stride_inner, planar = vector_layout(x_sizes[1:], x_strides[1:])
    stride_codebook, stride_k, stride_code_d = codebook_strides
    common = {
        **of_codes, "positions": positions, "inner": inner, "splits": splits, "tiles_per_program": tiles_per_program,
        "num_counts": 1 + programs, "upper": upper,
        "stride_head": stride_head, "stride_outer": stride_outer, "stride_d": stride_d, "stride_inner": stride_inner,
        "stride_codebook": stride_codebook, "stride_k": stride_k, "stride_code_d": stride_code_d,
        "COSINE": cosine, "PLANAR": planar, "SPLITS": splits > 1, "HAS_MASK": has_mask,
    }  # fmt: skip
    scanned = common | {"codes": Descriptor(codes, (shape.block_k, shape.columns)) if shape.tma else codes}

    of_codebook = common | {"stride_head": stride_codebook, "stride_d": stride_code_d}
    settle_options = shape.settle_options()
    settle_blocks = triton.cdiv(positions, settle_options["BLOCK_N"])
    # In every call: nothing on the host tells whether a codebook is unchanged, and to compare it with a copy on the device takes a
    # launch too, and reads 8 bytes for each component where this reads and writes 6.
    plan.launch(nearest_code_prepare_kernel, (shape.tiles, heads, 1), of_codebook, shape.prepare_options(drop_repeated=True))
    plan.launch(nearest_code_scan_kernel, (blocks, splits, heads), scanned, shape.scan_options())
    plan.launch(nearest_code_settle_kernel, (settle_blocks, heads, 1), common, settle_options)
    plan.launch(nearest_code_search_kernel, (programs, heads, 1), scanned, shape.search_options())
    return plan
