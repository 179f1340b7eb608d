"""Exact nearest-code search on CUDA: bfloat16 scores with a certified error bound, then float32 and float64 on the candidates.

The nearest code has the largest score s = z.f - |f|^2 / 2, where z = x - c and f = code - c. The center c is the mean of a
sample of the codes, or zero if that mean is small beside their spread, which keeps bfloat16 inputs exact.

1. prepare.py rounds the codes to bfloat16 and stores -|f|^2 / 2, the bias, in three bfloat16 columns of its own.
2. coarse.py computes the scores on the tensor cores. It keeps only the maximum over each block of codes, so no [N, K] matrix
   exists, and the codes can be split over programs.
3. exact.py rescores the blocks whose maximum is within twice the error bound (bound.py) of the row's maximum. Float32
   decides most rows; where two codes are too close to tell apart, float64 does, in the arithmetic of the reference.

shape.py chooses the tiles and launch options.
"""

import torch
import triton
from torch import Tensor

from .coarse import nearest_code_coarse_kernel, nearest_code_stream_kernel
from .exact import nearest_code_float64_kernel, nearest_code_rescore_kernel
from .prepare import nearest_code_center_kernel, nearest_code_prepare_codes_kernel, nearest_code_prepare_queries_kernel
from .shape import BIAS_DEPTH, CENTER_OPTIONS, PREPARE_QUERIES_OPTIONS, Shape

MAX_MAXIMA = 1 << 23  # block maxima per chunk of queries: 32 MB, which stays in the L2 cache


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
    float32 = {"dtype": torch.float32, "device": device}

    shape = Shape(dim, num_codes, device)
    # CPU tensors only come here under Triton's interpreter, which multiplies bfloat16 wrongly; float32 holds the rounded values.
    operand = {"dtype": torch.bfloat16 if x.is_cuda else torch.float32, "device": device}
    center = torch.empty(heads, dim, **float32)
    codes = torch.empty(heads, shape.padded, shape.depth, **operand)
    bias = torch.empty(heads, shape.padded if shape.bias_depth else 0, BIAS_DEPTH, **operand)
    max_norms = torch.empty(heads, 4, dtype=torch.int32, device=device)
    nearest_code_center_kernel[(heads,)](
        codebook, center, max_norms, num_codes, dim, *codebook.stride(),
        COSINE=cosine, **CENTER_OPTIONS,
    )  # fmt: skip
    nearest_code_prepare_codes_kernel[(triton.cdiv(shape.padded, 32), heads)](
        codebook, center, codes, bias, max_norms, num_codes, shape.padded, dim, shape.depth, *codebook.stride(),
        COSINE=cosine, **shape.prepare_codes_options(),
    )  # fmt: skip

    rows = max(shape.block_n, MAX_MAXIMA // (shape.blocks * heads) // shape.block_n * shape.block_n)
    rows = min(rows, positions)
    splits, tiles = shape.split(rows, heads)
    maxima = torch.empty(heads, shape.blocks // 4, rows, 4, **float32)
    best = torch.empty(heads, splits, rows, **float32)
    margin = torch.empty(heads, rows, **float32)
    queries = torch.empty(heads, rows, shape.depth, **operand) if shape.streams else None
    planar = inner > 1 and x.stride(3) == 1 and x.stride(2) != 1
    for first in range(0, positions, rows):
        count = min(rows, positions - first)
        start = divmod(first, inner)
        grid = (triton.cdiv(count, shape.block_n), splits, heads)
        if shape.streams:
            nearest_code_prepare_queries_kernel[(triton.cdiv(count, 32), heads)](
                x, center, max_norms, queries, margin, *start, count, rows, inner, dim, shape.depth, *x.stride(),
                COSINE=cosine, PLANAR=planar, **PREPARE_QUERIES_OPTIONS,
            )  # fmt: skip
            nearest_code_stream_kernel[grid](
                queries, codes, bias, maxima, best, count, rows, shape.padded, tiles, shape.blocks, shape.depth,
                **shape.coarse_options(),
            )  # fmt: skip
        else:
            nearest_code_coarse_kernel[grid](
                x, center, codes, bias, max_norms, maxima, best, margin, *start, count, rows, inner, shape.padded, tiles,
                shape.blocks, dim, *x.stride(), COSINE=cosine, PLANAR=planar, **shape.coarse_options(),
            )  # fmt: skip
        sizes = (first, *start, count, rows, positions, inner, num_codes, shape.blocks, splits, dim, *x.stride(), *codebook.stride())
        options = shape.rescore_options()
        nearest_code_rescore_kernel[(triton.cdiv(count, options["BLOCK_N"]), heads)](
            x, codebook, mask, maxima, best, margin, indices, *sizes, COSINE=cosine, PLANAR=planar, HAS_MASK=mask is not None, **options
        )
        options = shape.float64_options()
        nearest_code_float64_kernel[(triton.cdiv(count, options["BLOCK_N"]), heads)](
            x, codebook, maxima, best, margin, indices, *sizes, COSINE=cosine, **options
        )
    return indices
