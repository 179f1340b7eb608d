"""Exact nearest-code search on CUDA: TF32 scores under a certified bound, then float64 on what is left.

`nearest_code_coarse_kernel` scores s = z.f - |f|^2 / 2 on the tensor cores, with z = x - c and f = code - c for the
codebook's mean c, and keeps only the maximum of each block of 32 codes: there is no [N, K] matrix, and the codes can be
split over programs without a reduction. Operands are rounded to TF32 before the product, so the product reads exactly the
values whose rounding errors are measured, and per query

    |s~ - s| <= |z - z~| max|f| + |z~| max|f - f~| + accumulation + rounding of the bias,

plus the rounding of the float64 distances, which have the last word.

`nearest_code_exact_kernel` visits the blocks whose maximum reaches the query's maximum less twice that bound and decides
in float64 on the original inputs, components in ascending order, lowest index first: the arithmetic of the reference.
Anything that is not finite makes the bound so, no block is then excluded, and float64 decides alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_CODES = 32  # codes to a maximum
TILES_PER_PROGRAM = 8  # tiles of codes that one program passes over
MAX_MAXIMA = 1 << 24  # block maxima held at a time: 64 MB


def nearest_code(x: Tensor, codebook: Tensor, mask: Tensor | None, cosine: bool) -> Tensor:
    """Indices [outer, inner] of the codes [K, D] nearest to x [outer, D, inner]; -1 where the mask is False."""
    outer, dim, inner = x.shape
    num_codes = codebook.shape[0]
    positions = outer * inner
    indices = torch.empty(outer, inner, dtype=torch.int64, device=x.device)
    if positions == 0:
        return indices
    mask = None if mask is None else mask.contiguous()
    float32 = {"dtype": torch.float32, "device": x.device}

    centre = torch.zeros(dim, **float32) if cosine else _finite_mean(codebook)
    values = torch.empty(num_codes, dim, **float32)
    bias, norm, residual = torch.empty(3, num_codes, **float32)
    block_d = min(max(triton.next_power_of_2(dim), 16), 32)
    nearest_code_prepare_kernel[(triton.cdiv(num_codes, 64),)](
        codebook,
        centre,
        values,
        bias,
        norm,
        residual,
        num_codes,
        dim,
        *codebook.stride(),
        COSINE=cosine,
        BLOCK_K=64,
        BLOCK_D=block_d,
        enable_fp_fusion=True,
    )
    finite_bias = torch.where(bias.isinf(), 0, bias)
    limits = torch.stack([norm.amax(), residual.amax(), finite_bias.amax()])

    blocks = triton.cdiv(num_codes, BLOCK_CODES)
    block_n, block_k = 64, 128
    rows = max(block_n, MAX_MAXIMA // blocks)
    maxima = torch.empty(min(rows, positions), blocks, **float32)
    bound = torch.empty(min(rows, positions), **float32)
    for first in range(0, positions, rows):
        count = min(rows, positions - first)
        grid = (triton.cdiv(count, block_n), triton.cdiv(num_codes, block_k * TILES_PER_PROGRAM))
        nearest_code_coarse_kernel[grid](
            x, centre, values, bias, limits, maxima, bound, first, count, inner, num_codes, blocks, dim, *x.stride(),
            COSINE=cosine, TILES=TILES_PER_PROGRAM, BLOCK_N=block_n, BLOCK_K=block_k, BLOCK_D=block_d, BLOCK_CODES=BLOCK_CODES,
            **coarse_options(x.device),
        )  # fmt: skip
        # Without fused multiply-adds: their results would differ from the reference's in the last bit.
        nearest_code_exact_kernel[(count,)](
            x, codebook, mask, maxima, bound, indices, first, inner, num_codes, blocks, dim, *x.stride(), *codebook.stride(),
            COSINE=cosine, HAS_MASK=mask is not None, BLOCK_CODES=BLOCK_CODES, BLOCK_B=64, num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
    return indices


def coarse_options(device: torch.device | int) -> dict[str, int | bool]:
    """Launch options of the coarse pass on a device, or for a compute capability's major number."""
    major = device if isinstance(device, int) else torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8
    # Two stages hide the loads; on sm_100 their registers would spill.
    return {"num_warps": 8, "num_stages": 2 if major < 10 else 1, "enable_fp_fusion": True}


def _finite_mean(codebook: Tensor) -> Tensor:
    """Mean of the finite codes; any centre gives a right answer, this one a fast one."""
    finite = codebook.isfinite().all(dim=1, keepdim=True)
    return torch.where(finite, codebook, 0).sum(0, dtype=torch.float32) / finite.sum().clamp(min=1)


@triton.jit
def _round_to_tf32(value):
    """The float32 value rounded to the 10 bits of mantissa that the tensor cores read."""
    bits = value.to(tl.int32, bitcast=True)
    return ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["num_codes"])
def nearest_code_prepare_kernel(
    codebook,  # [K, D]
    centre,  # [D]
    values,  # [K, D] f
    bias,  # [K] |f|^2 / 2, infinite for a code that is not finite
    norm,  # [K] |f|
    residual,  # [K] |f - tf32(f)|
    num_codes,
    dim,
    stride_k,
    stride_d,
    COSINE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    codes = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = codes < num_codes
    square = tl.zeros([BLOCK_K], tl.float64)
    for start in range(0, dim, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        keep = inside[:, None] & (d < dim)[None, :]
        code = tl.load(codebook + codes[:, None] * stride_k + d.to(tl.int64)[None, :] * stride_d, mask=keep, other=0).to(tl.float64)
        offset = tl.where(keep, code - tl.load(centre + d, mask=d < dim, other=0)[None, :], 0.0)
        square += tl.sum(offset * offset, axis=1)
    finite = square < float("inf")
    factor = tl.full([BLOCK_K], 1.0, tl.float64)
    if COSINE:
        factor = tl.where(square > 0, 1 / tl.sqrt(tl.where(square > 0, square, 1.0)), 0.0)
    error = tl.zeros([BLOCK_K], tl.float64)
    for start in range(0, dim, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        keep = inside[:, None] & (d < dim)[None, :]
        code = tl.load(codebook + codes[:, None] * stride_k + d.to(tl.int64)[None, :] * stride_d, mask=keep, other=0).to(tl.float64)
        offset = (code - tl.load(centre + d, mask=d < dim, other=0)[None, :]) * factor[:, None]
        value = tl.where(keep & finite[:, None], offset, 0.0).to(tl.float32)
        lost = (value - _round_to_tf32(value)).to(tl.float64)
        error += tl.sum(lost * lost, axis=1)
        tl.store(values + codes[:, None] * dim + d[None, :], value, mask=keep)
    length = tl.where(finite, tl.sqrt(square) * factor, 0.0)
    half_square = length * length / 2
    if COSINE:
        half_square = tl.zeros([BLOCK_K], tl.float64)
    tl.store(bias + codes, tl.where(finite, half_square, float("inf")).to(tl.float32), mask=inside)
    tl.store(norm + codes, length.to(tl.float32), mask=inside)
    tl.store(residual + codes, tl.sqrt(error).to(tl.float32), mask=inside)


@triton.jit
def _load_queries(x, base, d, dim, stride_d, centre, inside):
    keep = inside[:, None] & (d < dim)[None, :]
    value = tl.load(x + base[:, None] + d.to(tl.int64)[None, :] * stride_d, mask=keep, other=0).to(tl.float32)
    return tl.where(keep, value - tl.load(centre + d, mask=d < dim, other=0)[None, :], 0.0)


@triton.jit(do_not_specialize=["first", "count", "inner", "num_codes", "blocks"])
def nearest_code_coarse_kernel(
    x,  # [outer, D, inner]
    centre,  # [D]
    values,  # [K, D]
    bias,  # [K]
    limits,  # [3] largest |f|, |f - tf32(f)| and bias
    maxima,  # [count, blocks]
    bound,  # [count] twice the error bound of the scores
    first,
    count,
    inner,
    num_codes,
    blocks,
    dim,
    stride_outer,
    stride_d,
    stride_inner,
    COSINE: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_CODES: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < count
    position = rows.to(tl.int64) + first
    base = position // inner * stride_outer + position % inner * stride_inner

    if tl.program_id(1) == 0:
        square = tl.zeros([BLOCK_N], tl.float32)
        error = tl.zeros([BLOCK_N], tl.float32)
        for start in range(0, dim, BLOCK_D):
            z = _load_queries(x, base, start + tl.arange(0, BLOCK_D), dim, stride_d, centre, inside)
            lost = z - _round_to_tf32(z)
            square += tl.sum(z * z, axis=1)
            error += tl.sum(lost * lost, axis=1)
        longest = tl.load(limits)
        # Squares below 2^-126 are lost from the sums.
        lost_norm = tl.sqrt(dim.to(tl.float32)) * 2.168404344971009e-19
        length = tl.sqrt(square) + lost_norm
        reach = length * longest
        # 2^-21 a component: the tensor cores truncate, and may add in any order.
        accumulation = (dim + 16) * 4.76837158203125e-07 * (reach + tl.load(limits + 2))
        distance = length + longest
        last_word = (dim + 4) * 2.220446049250313e-16 * (reach if COSINE else distance * distance)
        residuals = (tl.sqrt(error) + lost_norm) * longest + 1.001 * length * tl.load(limits + 1)
        twice = 2.01 * (residuals + accumulation + last_word) * (1.0 + dim * 2.4e-7) + 1e-30
        tl.store(bound + rows, tl.where(reach < 1e30, twice, float("inf")), mask=inside)

    for tile in range(TILES):
        start_k = (tl.program_id(1) * TILES + tile) * BLOCK_K
        if start_k < num_codes:
            codes = start_k + tl.arange(0, BLOCK_K)
            score = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
            for start in range(0, dim, BLOCK_D):
                d = start + tl.arange(0, BLOCK_D)
                z = _load_queries(x, base, d, dim, stride_d, centre, inside)
                keep = (codes < num_codes)[None, :] & (d < dim)[:, None]
                f = tl.load(values + codes.to(tl.int64)[None, :] * dim + d[:, None], mask=keep, other=0.0)
                score = tl.dot(_round_to_tf32(z), _round_to_tf32(f), score, input_precision="tf32")
            score -= tl.load(bias + codes, mask=codes < num_codes, other=float("inf"))[None, :]
            best = tl.max(tl.reshape(score, [BLOCK_N, BLOCK_K // BLOCK_CODES, BLOCK_CODES]), axis=2)
            block = start_k // BLOCK_CODES + tl.arange(0, BLOCK_K // BLOCK_CODES)
            target = maxima + rows.to(tl.int64)[:, None] * blocks + block[None, :]
            tl.store(target, best, mask=inside[:, None] & (block < blocks)[None, :])


@triton.jit(do_not_specialize=["first", "inner", "num_codes", "blocks"])
def nearest_code_exact_kernel(
    x,  # [outer, D, inner]
    codebook,  # [K, D]
    mask,  # [outer, inner]
    maxima,  # [count, blocks]
    bound,  # [count]
    indices,  # [outer, inner]
    first,
    inner,
    num_codes,
    blocks,
    dim,
    stride_outer,
    stride_d,
    stride_inner,
    stride_k,
    stride_code_d,
    COSINE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_CODES: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    position = row + first
    base = position // inner * stride_outer + position % inner * stride_inner
    wanted = True
    if HAS_MASK:
        wanted = tl.load(mask + position) != 0
    if wanted:
        best = float("-inf")
        for start in range(0, blocks, BLOCK_B):
            block = start + tl.arange(0, BLOCK_B)
            best = tl.maximum(best, tl.max(tl.load(maxima + row * blocks + block, mask=block < blocks, other=float("-inf"))))
        threshold = best - tl.load(bound + row)

        nearest = tl.full([], 0, tl.int64)
        smallest = tl.full([], float("inf"), tl.float64)
        for start in range(0, blocks, BLOCK_B):
            block = start + tl.arange(0, BLOCK_B)
            maximum = tl.load(maxima + row * blocks + block, mask=block < blocks, other=float("-inf"))
            # Written so that a NaN on either side keeps the block.
            alive = (block < blocks) & ((maximum < threshold) == 0)
            current = tl.min(tl.where(alive, block, blocks))
            while current < blocks:
                codes = current.to(tl.int64) * BLOCK_CODES + tl.arange(0, BLOCK_CODES)
                inside = codes < num_codes
                distance = tl.zeros([BLOCK_CODES], tl.float64)
                norm = tl.zeros([BLOCK_CODES], tl.float64)
                query = x + base
                code = codebook + codes * stride_k
                for _ in range(dim):
                    a = tl.load(query).to(tl.float64)
                    b = tl.load(code, mask=inside, other=0).to(tl.float64)
                    query += stride_d
                    code += stride_code_d
                    if COSINE:
                        distance -= a * b
                        norm += b * b
                    else:
                        distance += (a - b) * (a - b)
                if COSINE:
                    distance *= tl.abs(distance) / tl.where(norm > 0, norm, 1.0)  # orders as the similarity does
                distance = tl.where(inside & (distance == distance), distance, float("inf"))
                local = tl.min(distance)
                index = tl.min(tl.where(distance == local, codes, codes + num_codes))
                nearest = tl.where(local < smallest, index, nearest)
                smallest = tl.minimum(local, smallest)
                current = tl.min(tl.where(alive & (block > current), block, blocks))
        tl.store(indices + position, nearest)
    else:
        tl.store(indices + position, tl.full([], -1, tl.int64))
