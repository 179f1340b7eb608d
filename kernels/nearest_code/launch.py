"""Exact nearest-code search on CUDA: float16 scores with a certified error bound, and float64 where they leave a doubt.

The nearest code has the largest score s = z.f - |f|^2 / 2, where z = x - c and f = code - c. The center c is the mean of a
sample of the codes, or zero if that mean is small beside their lengths, which keeps half-precision inputs exact.

1. prepare.py rounds the codes to float16, and finds the norms that the bound (bound.py) needs.
2. scan.py computes the scores on the tensor cores and keeps for each row what tells its nearest code, or the few that may be it.
3. settle.py stores the indices of the rows that this decides, decides between two or a few codes in float64, and lists the rest.
4. search.py searches the listed rows.

No host synchronization; 4 launches whatever the sizes; memory beside the operands of 12 to 24 bytes a row. shape.py chooses the
tiles and launch options.
"""

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .prepare import nearest_code_prepare_kernel
from .scan import nearest_code_scan_kernel
from .search import nearest_code_search_kernel
from .settle import nearest_code_settle_kernel
from .shape import MAX_PROGRAMS, SEARCH_PROGRAMS, SEARCH_ROWS, Shape

_TABLE_COLUMNS = 4


def nearest_code(x: Tensor, codebook: Tensor, mask: Tensor | None, cosine: bool) -> Tensor:
    """Return the indices [outer, inner] of the codes [K, D] nearest to x [outer, D, inner], or -1 where the mask is False.

    With a codebook [heads, K, D], x, mask and indices have a leading dimension of heads too.
    """
    if codebook.dim() == 2:
        mask = None if mask is None else mask.unsqueeze(0)
        return nearest_code(x.unsqueeze(0), codebook.unsqueeze(0), mask, cosine).squeeze(0)
    if x.shape[3] >= 1 << 31:  # the kernels index inner positions with int32
        indices = nearest_code(
            x.transpose(2, 3).reshape(x.shape[0], -1, x.shape[2], 1),
            codebook,
            None if mask is None else mask.reshape(x.shape[0], -1, 1),
            cosine,
        )
        return indices.reshape(x.shape[0], x.shape[1], x.shape[3])
    heads, outer, dim, inner = x.shape
    num_codes = codebook.shape[1]
    positions = outer * inner
    device = x.device
    indices = torch.empty(heads, outer, inner, dtype=torch.int64, device=device)
    if positions == 0:
        return indices
    mask = None if mask is None else mask.contiguous()

    shape = Shape(dim, num_codes, device)
    splits, tiles_per_program = shape.split(positions, heads)

    def new(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device=device)

    center = new(heads, dim + 1)
    codes = new(heads, shape.tiles * shape.block_k, shape.depth, dtype=torch.float16)
    bias = new(heads, shape.tiles * shape.block_k)
    table = new(heads, shape.tiles, _TABLE_COLUMNS)
    nearest_code_prepare_kernel[(shape.tiles, heads)](
        codebook, center, codes, bias, table, num_codes, shape.tiles, dim, shape.depth, *codebook.stride(),
        COSINE=cosine, **shape.prepare_options(),
    )  # fmt: skip

    operand = TensorDescriptor.from_tensor(codes.flatten(0, 1), [shape.block_k, shape.columns]) if shape.tma else codes
    programs = triton.cdiv(SEARCH_PROGRAMS, heads)
    blocks = min(triton.cdiv(positions, shape.block_n), triton.cdiv(MAX_PROGRAMS, splits * heads))
    scratch = max(splits * blocks * shape.block_n, programs * SEARCH_ROWS)
    queries = new(heads, scratch, shape.depth, dtype=torch.float16)
    lower = new(heads, splits, positions)
    upper = new(heads, splits, positions) if splits > 1 else lower
    first = new(heads, splits, positions, dtype=torch.int32)
    last = new(heads, splits, positions, dtype=torch.int32)
    rows = new(heads, positions, dtype=torch.int64)
    counts = new(heads, 1 + programs, dtype=torch.int32)
    part_distance = new(heads, programs, SEARCH_ROWS, dtype=torch.float64)
    part_index = new(heads, programs, SEARCH_ROWS, dtype=torch.int64)
    # Strides of one element count as divisible by 16, so that what is aligned is loaded 16 bytes at a time.
    strides = [0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)]
    strides[2] = x.stride(2)
    planar = inner > 1 and x.stride(3) == 1 and x.stride(2) != 1
    nearest_code_scan_kernel[(blocks, splits, heads)](
        x, center, operand, bias, table, queries, lower, upper, first, last, counts, counts.shape[1], positions, inner, shape.tiles,
        tiles_per_program, dim, shape.depth, *strides, COSINE=cosine, PLANAR=planar, SPLITS=splits > 1, **shape.scan_options(),
    )  # fmt: skip
    options = shape.settle_options()
    nearest_code_settle_kernel[(triton.cdiv(positions, options["BLOCK_N"]), heads)](
        x, codebook, mask, lower, upper, first, last, indices, rows, counts, counts.shape[1], positions, inner, num_codes, splits, dim,
        *strides, *codebook.stride(), COSINE=cosine, HAS_MASK=mask is not None, SPLITS=splits > 1, **options,
    )  # fmt: skip
    nearest_code_search_kernel[(programs, heads)](
        x, codebook, center, operand, bias, table, queries, lower, indices, rows, counts, part_distance, part_index, counts.shape[1],
        positions, inner, num_codes, shape.tiles, splits, dim, shape.depth, *strides, *codebook.stride(),
        COSINE=cosine, **shape.search_options(),
    )  # fmt: skip
    return indices
