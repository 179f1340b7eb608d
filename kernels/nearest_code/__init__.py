"""Exact nearest-code search on CUDA: bfloat16 scores under a certified bound, then float32 and float64 on what is left.

The nearest code has the largest score s = z.f - |f|^2 / 2, with z = x - c, f = code - c and a center c: the mean of some
codes, or zero where that mean is small beside their spread, so that bfloat16 inputs stay exact.

1. `nearest_code_prepare_kernel` rounds the codes to bfloat16, with -|f|^2 / 2 in three bfloat16 columns of their own.
2. `nearest_code_coarse_kernel` multiplies them by the queries and by ones on the tensor cores. The epilogue is only a
   maximum over each block of codes: there is no [N, K] matrix, and codes can be split over programs. Codes are stored
   in such an order that the maxima stay within a thread: in the accumulators of the tensor cores a thread holds columns
   8i + 2j and 8i + 2j + 1 of a row, so those are the codes of one block, for each j of 4.
3. `nearest_code_exact_kernel` visits the blocks whose maximum reaches the row's maximum less twice the bound: first in
   float32, as sums of squared differences (of small relative error wherever the data lie), then, where two codes are
   still too close to tell, in float64 on the original inputs, components in ascending order, lowest index first: the
   arithmetic of the reference. A row whose bound is not finite, or that keeps many blocks, is searched wholly in float64.

The bound. With z~, f~ for the rounded operands and l(.) for their low parts (below),
    |s~ - s| <= |z - z~| max|f| + |z~| max|f - f~| + max|l(f)| |l(z)| + accumulation,
from the residual norms as they are. Products of bfloat16 are exact in float32. The tensor cores add k >= 2 of them at a
time to the running sum, each addend and the result truncated at 2^-23 of the largest, in any order: for n columns at
most n (k + 2) / k 2^-23 <= n 2^-22 times the sum of magnitudes, |z||f| + |f|^2 / 2. The rounding of x - c, of the three
parts of |f|^2 / 2 and of the float64 distances themselves, which have the last word, is added to that.

Regimes, by D alone:
- D <= 9: the depth of the tensor cores (16 at least) would be wasted, so the operands are split in two, x = xh + xl:
  columns [xh, xl, xh] . [eh, eh, el] have nearly the accuracy of float32, and fit a depth of 16 (D <= 4) or 32 together
  with the bias. A score costs one max (64 a clock and multiprocessor), as long as a depth of 32 on the tensor cores.
- D <= 128: plain bfloat16. A program holds its queries, read and rounded once, and passes over the codes.
- D > 128: queries are rounded by a kernel of their own, and both operands stream through shared memory.
At D >= 64 the tensor cores are the limit, below it the epilogue.

Codes to a block, B: a row reads K / B maxima (4 bytes) and rescores about 1.5 B D components (4 bytes), so B is near
sqrt(K / 1.5 D); 8, 32 and 128 are enough, as the costs are flat around the best.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_MAXIMA = 1 << 23  # block maxima held at a time: 32 MB, which stays in the L2 cache
PROGRAMS = 264  # of a coarse pass at least: two for each multiprocessor of an H200
TAIL = 16  # columns of the bias where it does not fit among the others
BLOCK_D = 64  # columns at a time where queries stream
CENTER_OPTIONS = {"SAMPLE": 64, "BLOCK_D": 64, "num_warps": 8, "enable_fp_fusion": True}
ROUND_OPTIONS = {"BLOCK_N": 32, "BLOCK_D": BLOCK_D, "num_warps": 4, "enable_fp_fusion": True}
MANY_BLOCKS = tl.constexpr(64)  # a row with more is searched wholly
NONE = tl.constexpr(0x7FFFFFFF)  # no block
SEARCH_BLOCKS = tl.constexpr(-2)  # in place of an index: float64 has to decide between the codes of the blocks that are left
SEARCH_ALL = tl.constexpr(-3)  # ... between all codes


def nearest_code(x: Tensor, codebook: Tensor, mask: Tensor | None, cosine: bool) -> Tensor:
    """Indices [outer, inner] of the codes [K, D] nearest to x [outer, D, inner]; -1 where the mask is False.

    With codes [heads, K, D], x, mask and indices have a first dimension of heads too.
    """
    if codebook.dim() == 2:
        mask = None if mask is None else mask.unsqueeze(0)
        return nearest_code(x.unsqueeze(0), codebook.unsqueeze(0), mask, cosine).squeeze(0)
    if x.shape[3] >= 1 << 31:
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
    # The interpreter, the only one to run on the CPU, multiplies bfloat16 wrongly; float32 holds the rounded values.
    operand = {"dtype": torch.bfloat16 if x.is_cuda else torch.float32, "device": device}
    center = torch.empty(heads, dim, **float32)
    codes = torch.empty(heads, shape.padded, shape.depth, **operand)
    tail = torch.empty(heads, shape.padded if shape.tail else 0, TAIL, **operand)
    limits = torch.empty(heads, 4, dtype=torch.int32, device=device)
    nearest_code_center_kernel[(heads,)](
        codebook, center, limits, num_codes, dim, *codebook.stride(),
        COSINE=cosine, **CENTER_OPTIONS,
    )  # fmt: skip
    nearest_code_prepare_kernel[(triton.cdiv(shape.padded, 32), heads)](
        codebook, center, codes, tail, limits, num_codes, shape.padded, dim, shape.depth, *codebook.stride(),
        COSINE=cosine, **shape.prepare_options(),
    )  # fmt: skip

    rows = max(shape.block_n, MAX_MAXIMA // (shape.blocks * heads) // shape.block_n * shape.block_n)
    rows = min(rows, positions)
    splits, tiles = shape.split(rows, heads)
    maxima = torch.empty(heads, shape.blocks // 4, rows, 4, **float32)
    best = torch.empty(heads, splits, rows, **float32)
    bound = torch.empty(heads, rows, **float32)
    queries = torch.empty(heads, rows, shape.depth, **operand) if shape.streams else None
    planar = inner > 1 and x.stride(3) == 1 and x.stride(2) != 1
    for first in range(0, positions, rows):
        count = min(rows, positions - first)
        start = divmod(first, inner)
        grid = (triton.cdiv(count, shape.block_n), splits, heads)
        if shape.streams:
            nearest_code_round_kernel[(triton.cdiv(count, 32), heads)](
                x, center, limits, queries, bound, *start, count, rows, inner, dim, shape.depth, *x.stride(),
                COSINE=cosine, PLANAR=planar, **ROUND_OPTIONS,
            )  # fmt: skip
            nearest_code_stream_kernel[grid](
                queries, codes, tail, maxima, best, count, rows, shape.padded, tiles, shape.blocks, shape.depth,
                **shape.coarse_options(),
            )  # fmt: skip
        else:
            nearest_code_coarse_kernel[grid](
                x, center, codes, tail, limits, maxima, best, bound, *start, count, rows, inner, shape.padded, tiles, shape.blocks,
                dim, *x.stride(), COSINE=cosine, PLANAR=planar, **shape.coarse_options(),
            )  # fmt: skip
        sizes = (first, *start, count, rows, positions, inner, num_codes, shape.blocks, splits, dim, *x.stride(), *codebook.stride())
        options = shape.exact_options()
        nearest_code_exact_kernel[(triton.cdiv(count, options["BLOCK_N"]), heads)](
            x, codebook, mask, maxima, best, bound, indices, *sizes, COSINE=cosine, PLANAR=planar, HAS_MASK=mask is not None, **options
        )
        options = shape.settle_options()
        nearest_code_settle_kernel[(triton.cdiv(count, options["BLOCK_N"]), heads)](
            x, codebook, maxima, best, bound, indices, *sizes, COSINE=cosine, **options
        )
    return indices


class Shape:
    """Block shapes of a search and the launch options that go with them, for D dimensions and K codes on a device.

    `device` may also be a compute capability's major number.
    """

    def __init__(self, dim: int, num_codes: int, device: torch.device | int) -> None:
        major, shared_memory = _architecture(device)
        self.dim = dim
        self.split_operands = dim <= 9
        self.streams = dim > 128
        width = (3 * dim if self.split_operands else dim) + 3
        if self.streams:
            self.depth = triton.cdiv(dim, BLOCK_D) * BLOCK_D
        else:
            self.depth = max(16, triton.next_power_of_2(width if self.split_operands else dim))
        self.tail = TAIL if width > self.depth else 0
        self.block_codes = codes_to_a_block(dim, num_codes)
        self.block_n = 128
        # Streaming, a tile of 256 codes keeps the traffic below what L2 delivers; on other architectures its registers spill.
        self.block_k = 256 if self.streams and major == 9 else 128
        columns = BLOCK_D if self.streams else self.depth
        held = 0 if self.streams else self.block_n * (columns + self.tail) * 2
        stage = self.block_k * (columns + self.tail) * 2 + (self.block_n * columns * 2 if self.streams else 0)
        self.stages = min(max((shared_memory - held - (8 << 10)) // stage, 1), 3)
        chunk = max(self.block_k, 4 * self.block_codes)
        self.padded = triton.cdiv(num_codes, chunk) * chunk
        self.blocks = self.padded // self.block_codes

    def split(self, rows: int, heads: int) -> tuple[int, int]:
        """Programs over the codes, and tiles of codes for each."""
        tiles = self.padded // self.block_k
        together = max(1, 4 * self.block_codes // self.block_k)
        splits = triton.cdiv(PROGRAMS, triton.cdiv(rows, self.block_n) * heads)
        each = triton.cdiv(triton.cdiv(tiles, splits), together) * together
        return triton.cdiv(tiles, each), each

    def prepare_options(self) -> dict:
        return {
            "SPLIT": self.split_operands, "TAIL": self.tail, "BLOCK_CODES": self.block_codes,
            "BLOCK_K": 32, "BLOCK_D": min(self.depth, 32), "num_warps": 4, "enable_fp_fusion": True,
        }  # fmt: skip

    def coarse_options(self) -> dict:
        options = {
            "BLOCK_CODES": self.block_codes, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k, "num_warps": 8,
            "num_stages": self.stages, "enable_fp_fusion": True,
        }  # fmt: skip
        if self.streams:
            return {**options, "TAIL": self.tail, "BLOCK_D": BLOCK_D}
        return {**options, "TAIL": self.tail, "SPLIT": self.split_operands, "DEPTH": self.depth}

    def exact_options(self) -> dict:
        """One warp to a program, as it waits for memory most of the time and then needs no barriers; 512 components at a time."""
        tile = 512
        block_d = min(triton.next_power_of_2(self.dim), 32, max(tile // self.block_codes, 4))
        rows = max(tile // (self.block_codes * block_d), 1)
        return {
            "BLOCK_CODES": self.block_codes, "BLOCK_N": rows, "BLOCK_C": min(tile // (4 * rows), 32), "BLOCK_D": block_d, "num_warps": 1,
            "enable_fp_fusion": True,
        }  # fmt: skip

    def settle_options(self) -> dict:
        """No fused multiply-adds: they would differ from the reference's arithmetic in the last bit."""
        return {"BLOCK_CODES": self.block_codes, "BLOCK_N": 32, "num_warps": 4, "enable_fp_fusion": False}


def _architecture(device: torch.device | int) -> tuple[int, int]:
    """Major number of the compute capability, and bytes of shared memory that a program can have."""
    if isinstance(device, torch.device) and device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return properties.major, properties.shared_memory_per_block_optin
    major = device if isinstance(device, int) else 9
    return major, 163 << 10 if major == 8 else 227 << 10


def codes_to_a_block(dim: int, num_codes: int) -> int:
    ratio = num_codes / (1.5 * dim)
    return 8 if ratio < 16**2 else 32 if ratio < 64**2 else 128


@triton.jit
def _round_to_bfloat16(value):
    """The float32 value rounded to the 8 bits of bfloat16, ties to even."""
    bits = value.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["num_codes", "stride_head"])
def nearest_code_center_kernel(
    codebook,  # [heads, K, D]
    center,  # [heads, D]
    limits,  # [heads, 4] set to zero
    num_codes,
    dim,
    stride_head,
    stride_k,
    stride_d,
    COSINE: tl.constexpr,
    SAMPLE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The mean of some codes, spread over the codebook; any center gives a right answer, this one a fast one."""
    head = tl.program_id(0).to(tl.int64)
    center += head * dim
    tl.store(limits + head * 4 + tl.arange(0, 4), tl.zeros([4], tl.int32))
    codes = codebook + head * stride_head + tl.arange(0, SAMPLE).to(tl.int64) * num_codes // SAMPLE * stride_k
    square_of_mean = 0.0
    mean_of_square = 0.0
    for start in range(0, dim, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        mean = tl.zeros([BLOCK_D], tl.float32)
        if not COSINE:
            value = tl.load(codes[:, None] + d.to(tl.int64)[None, :] * stride_d, mask=(d < dim)[None, :], other=0).to(tl.float32)
            usable = tl.abs(value) < 1e18
            value = tl.where(usable, value, 0.0)
            count = tl.maximum(tl.sum(usable.to(tl.float32), axis=0), 1.0)
            mean = tl.sum(value, axis=0) / count
            square_of_mean += tl.sum(mean * mean)
            mean_of_square += tl.sum(tl.sum(value * value, axis=0) / count)
        tl.store(center + d, mean, mask=d < dim)
    if square_of_mean * 16 <= mean_of_square:
        # Other threads may have written what this one replaces.
        tl.debug_barrier()
        for start in range(0, dim, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            tl.store(center + d, tl.zeros([BLOCK_D], tl.float32), mask=d < dim)


@triton.jit
def _raise_limit(limit, value):
    """Raise a limit to the value, which is not negative: then the bits order as the values do, and no order of the programs
    changes the result."""
    bits = value.to(tl.float32).to(tl.int32, bitcast=True)
    if bits > tl.load(limit):
        tl.atomic_max(limit, bits)


@triton.jit(do_not_specialize=["num_codes", "padded", "stride_head"])
def nearest_code_prepare_kernel(
    codebook,  # [heads, K, D]
    center,  # [heads, D]
    operand,  # [heads, padded, depth] rounded columns, codes in the order of the accumulators
    tail,  # [heads, padded, TAIL] bias columns
    limits,  # [heads, 4] largest |f|, |f - f~|, |l(f)| and bias, as bits
    num_codes,
    padded,
    dim,
    depth,
    stride_head,
    stride_k,
    stride_d,
    COSINE: tl.constexpr,
    SPLIT: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_CODES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    codebook += head * stride_head
    center += head * dim
    operand += head * padded * depth
    tail += head * padded * TAIL
    limits += head * 4
    codes = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = codes < num_codes

    square = tl.zeros([BLOCK_K], tl.float64)
    for start in range(0, dim, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        keep = inside[:, None] & (d < dim)[None, :]
        offset = tl.load(codebook + codes[:, None] * stride_k + d.to(tl.int64)[None, :] * stride_d, mask=keep, other=0).to(tl.float64)
        offset = tl.where(keep, offset - tl.load(center + d, mask=d < dim, other=0)[None, :], 0.0)
        square += tl.sum(offset * offset, axis=1)
    finite = inside & (square < float("inf"))
    factor = tl.full([BLOCK_K], 1.0, tl.float64)
    if COSINE:
        factor = tl.where(square > 0, 1 / tl.sqrt(tl.where(square > 0, square, 1.0)), 0.0)
    length = tl.where(finite, tl.sqrt(square) * factor, 0.0)
    half_square = length * length / 2
    if COSINE:
        half_square = tl.zeros([BLOCK_K], tl.float64)
    # A code this long makes the bound infinite, unless the queries are very short: then it is not the nearest.
    possible = finite & (half_square < 1e38)
    bias = tl.where(possible, -half_square, 0.0).to(tl.float32)
    bias_high = _round_to_bfloat16(bias)
    bias_middle = _round_to_bfloat16(bias - bias_high)
    bias_low = _round_to_bfloat16(bias - bias_high - bias_middle)
    bias_high = tl.where(possible, bias_high, float("-inf"))

    # Code u of block j of its four goes to column 8 (u / 2) + 2 j + u % 2.
    within = codes % (4 * BLOCK_CODES)
    u = within % BLOCK_CODES
    place = codes - within + u // 2 * 8 + within // BLOCK_CODES * 2 + u % 2
    stored = codes < padded

    width = dim
    if SPLIT:
        width = 3 * dim
    error = tl.zeros([BLOCK_K], tl.float64)
    low_square = tl.zeros([BLOCK_K], tl.float64)
    for start in range(0, depth, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        valid = column < width
        d = column % dim
        keep = finite[:, None] & valid[None, :]
        code = tl.load(codebook + codes[:, None] * stride_k + d.to(tl.int64)[None, :] * stride_d, mask=keep, other=0).to(tl.float64)
        code -= tl.load(center + d, mask=valid, other=0)[None, :]
        offset = tl.where(keep, code * factor[:, None], 0.0)
        value = offset.to(tl.float32)
        high = _round_to_bfloat16(value)
        lost = offset - high
        if SPLIT:
            low = _round_to_bfloat16(value - high)
            once = tl.where((column < dim)[None, :], low, 0.0).to(tl.float64)
            low_square += tl.sum(once * once, axis=1)
            lost -= low
            high = tl.where((column >= 2 * dim)[None, :], low, high)
        lost = tl.where((column < dim)[None, :], lost, 0.0)
        error += tl.sum(lost * lost, axis=1)
        if TAIL == 0:
            high = tl.where((column == width)[None, :], bias_high[:, None], high)
            high = tl.where((column == width + 1)[None, :], bias_middle[:, None], high)
            high = tl.where((column == width + 2)[None, :], bias_low[:, None], high)
        high = high.to(operand.dtype.element_ty)
        tl.store(operand + place[:, None] * depth + column[None, :], high, mask=stored[:, None] & (column < depth)[None, :])
    if TAIL > 0:
        column = tl.arange(0, TAIL)
        high = tl.where((column == 0)[None, :], bias_high[:, None], 0.0)
        high = tl.where((column == 1)[None, :], bias_middle[:, None], high)
        high = tl.where((column == 2)[None, :], bias_low[:, None], high)
        tl.store(tail + place[:, None] * TAIL + column[None, :], high.to(operand.dtype.element_ty), mask=stored[:, None])

    _raise_limit(limits, tl.max(length))
    _raise_limit(limits + 1, tl.sqrt(tl.max(error)))
    _raise_limit(limits + 2, tl.sqrt(tl.max(low_square)))
    _raise_limit(limits + 3, tl.max(-bias))


@triton.jit
def _offsets(row, first_outer, first_inner, inner, stride_outer, stride_inner):
    """Where the vectors begin that come `row` positions after the first one."""
    size = inner.to(tl.uint32)
    within = (row + first_inner).to(tl.uint32)
    return (first_outer + within // size).to(tl.int64) * stride_outer + (within % size).to(tl.int64) * stride_inner


@triton.jit
def _load_rows(x, base, inside, d, valid, stride_d, PLANAR: tl.constexpr):
    """x [rows, d] in float32; where rows are what lies together in memory, threads go along them."""
    if PLANAR:
        value = tl.trans(tl.load(x + base[None, :] + d.to(tl.int64)[:, None] * stride_d, mask=inside[None, :] & valid[:, None], other=0))
    else:
        value = tl.load(x + base[:, None] + d.to(tl.int64)[None, :] * stride_d, mask=inside[:, None] & valid[None, :], other=0)
    return value.to(tl.float32)


@triton.jit
def _twice_the_bound(square, error, low_square, limits, dim, columns, COSINE: tl.constexpr):
    """Twice the bound on a score's error, from the squared norms of z, z - z~ and l(z)."""
    longest = tl.load(limits).to(tl.float32, bitcast=True)
    residual = tl.load(limits + 1).to(tl.float32, bitcast=True)
    lowest = tl.load(limits + 2).to(tl.float32, bitcast=True)
    bias = tl.load(limits + 3).to(tl.float32, bitcast=True)
    # Squares below 2^-126 are lost from the sums.
    lost = tl.sqrt(dim.to(tl.float32)) * 2.168404344971009e-19
    length = tl.sqrt(square) + lost
    reach = length * longest
    accumulation = (columns + 32) * 2.384185791015625e-07 * (1.03 * reach + bias)
    distance = length + longest
    last_word = (dim + 4) * 2.220446049250313e-16 * (reach if COSINE else distance * distance)
    residuals = (tl.sqrt(error) + lost) * longest + 1.01 * length * residual + (tl.sqrt(low_square) + lost) * lowest
    twice = 2.01 * (residuals + accumulation + last_word) * (1.0 + dim * 2.4e-7) + 1e-30
    return tl.where((reach < 1e30) & (twice == twice), twice, float("inf"))


@triton.jit
def _block_maxima(score, BLOCK_CODES: tl.constexpr):
    """Maxima [N, groups, 4] of scores [N, K]: of blocks of codes, or of the parts of larger blocks that lie in the tile."""
    n: tl.constexpr = score.shape[0]
    k: tl.constexpr = score.shape[1]
    part: tl.constexpr = min(BLOCK_CODES, k // 4)
    pairs = tl.max(tl.reshape(score, [n, k // (4 * part), part // 2, 4, 2]), axis=4)
    return tl.max(pairs, axis=2)


@triton.jit
def _store_maxima(maxima, tile, group, row, inside, rows, TILES: tl.constexpr):
    """Store maxima [N, groups, 4] of a tile, once the last of the tiles that its blocks spread over has gone into them."""
    groups: tl.constexpr = group.shape[1]
    chunk = tile // TILES * groups + tl.arange(0, groups)
    place = chunk.to(tl.int64)[None, :, None] * rows + row[:, None, None]
    last = tile % TILES == TILES - 1
    tl.store(maxima + place * 4 + tl.arange(0, 4)[None, None, :], group, mask=inside[:, None, None] & last)


@triton.jit(
    do_not_specialize=[
        "first_outer",
        "first_inner",
        "count",
        "rows",
        "inner",
        "padded",
        "tiles",
        "blocks",
        "dim",
        "stride_head",
        "stride_outer",
    ]
)
def nearest_code_coarse_kernel(
    x,  # [heads, outer, D, inner]
    center,  # [heads, D]
    operand,  # [heads, padded, DEPTH]
    tail,  # [heads, padded, TAIL]
    limits,  # [heads, 4]
    maxima,  # [heads, blocks / 4, rows, 4]
    best,  # [heads, splits, rows] largest score
    bound,  # [heads, rows] twice the error bound of the scores
    first_outer,
    first_inner,
    count,
    rows,
    inner,
    padded,
    tiles,
    blocks,
    dim,
    stride_head,
    stride_outer,
    stride_d,
    stride_inner,
    COSINE: tl.constexpr,
    PLANAR: tl.constexpr,
    SPLIT: tl.constexpr,
    TAIL: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_CODES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    head = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < count
    base = head * stride_head + _offsets(row, first_outer, first_inner, inner, stride_outer, stride_inner)
    operand += head * padded * DEPTH
    tail += head * padded * TAIL
    maxima += head * blocks * rows
    best += (head * tl.num_programs(1) + tl.program_id(1)) * rows

    width = dim
    if SPLIT:
        width = 3 * dim
    column = tl.arange(0, DEPTH)
    valid = column < width
    d = column % dim
    z = _load_rows(x, base, inside, d, valid, stride_d, PLANAR) - tl.load(center + head * dim + d, mask=valid, other=0)[None, :]
    z = tl.where(valid[None, :] & inside[:, None], z, 0.0)
    high = _round_to_bfloat16(z)
    once = (column < dim)[None, :]
    lost = z - high
    low_square = tl.zeros([BLOCK_N], tl.float32)
    if SPLIT:
        low = _round_to_bfloat16(lost)
        lost -= low
        low_square = tl.sum(tl.where(once, low * low, 0.0), axis=1)
        high = tl.where(((column >= dim) & (column < 2 * dim))[None, :], low, high)
    if tl.program_id(1) == 0:
        square = tl.sum(tl.where(once, z * z, 0.0), axis=1)
        error = tl.sum(tl.where(once, lost * lost, 0.0), axis=1)
        twice = _twice_the_bound(square, error, low_square, limits + head * 4, dim, DEPTH + TAIL, COSINE)
        tl.store(bound + head * rows + row, twice, mask=inside)
    if TAIL == 0:
        high = tl.where(((column >= width) & (column < width + 3))[None, :], 1.0, high)
    queries = high.to(operand.dtype.element_ty)
    if TAIL > 0:
        tail_column = tl.arange(0, TAIL)
        ones = tl.where((tail_column < 3)[None, :] & (row >= 0)[:, None], 1.0, 0.0).to(operand.dtype.element_ty)

    TILES: tl.constexpr = max(4 * BLOCK_CODES // BLOCK_K, 1)  # that a block spreads over
    part: tl.constexpr = min(BLOCK_CODES, BLOCK_K // 4)
    group = tl.full([BLOCK_N, BLOCK_K // (4 * part), 4], float("-inf"), tl.float32)
    largest = group
    begin = tl.program_id(1) * tiles
    end = tl.minimum(begin + tiles, padded // BLOCK_K)
    for tile in range(begin, end):
        code = tile * BLOCK_K + tl.arange(0, BLOCK_K).to(tl.int64)
        columns = tl.load(operand + code[:, None] * DEPTH + column[None, :])
        score = tl.dot(queries, tl.trans(columns))
        if TAIL > 0:
            score = tl.dot(ones, tl.trans(tl.load(tail + code[:, None] * TAIL + tail_column[None, :])), score)
        found = _block_maxima(score, BLOCK_CODES)
        group = tl.where(tile % TILES == 0, found, tl.maximum(group, found))
        largest = tl.maximum(largest, found)
        _store_maxima(maxima, tile, group, row, inside, rows, TILES)
    tl.store(best + row, tl.max(tl.max(largest, axis=2), axis=1), mask=inside)


@triton.jit(do_not_specialize=["first_outer", "first_inner", "count", "rows", "inner", "dim", "stride_head", "stride_outer"])
def nearest_code_round_kernel(
    x,  # [heads, outer, D, inner]
    center,  # [heads, D]
    limits,  # [heads, 4]
    queries,  # [heads, rows, depth]
    bound,  # [heads, rows]
    first_outer,
    first_inner,
    count,
    rows,
    inner,
    dim,
    depth,
    stride_head,
    stride_outer,
    stride_d,
    stride_inner,
    COSINE: tl.constexpr,
    PLANAR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < count
    base = head * stride_head + _offsets(row, first_outer, first_inner, inner, stride_outer, stride_inner)
    target = queries + (head * rows + row)[:, None] * depth
    square = tl.zeros([BLOCK_N], tl.float32)
    error = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, depth, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        valid = d < dim
        z = _load_rows(x, base, inside, d, valid, stride_d, PLANAR) - tl.load(center + head * dim + d, mask=valid, other=0)[None, :]
        z = tl.where(valid[None, :] & inside[:, None], z, 0.0)
        high = _round_to_bfloat16(z)
        square += tl.sum(z * z, axis=1)
        error += tl.sum((z - high) * (z - high), axis=1)
        if depth >= dim + 3:
            high = tl.where(((d >= dim) & (d < dim + 3))[None, :], 1.0, high)
        tl.store(target + d[None, :], high.to(queries.dtype.element_ty), mask=inside[:, None])
    twice = _twice_the_bound(square, error, tl.zeros([BLOCK_N], tl.float32), limits + head * 4, dim, depth + 16, COSINE)
    tl.store(bound + head * rows + row, twice, mask=inside)


@triton.jit(do_not_specialize=["count", "rows", "padded", "tiles", "blocks"])
def nearest_code_stream_kernel(
    queries,  # [heads, rows, depth]
    operand,  # [heads, padded, depth]
    tail,  # [heads, padded, TAIL]
    maxima,  # [heads, blocks / 4, rows, 4]
    best,  # [heads, splits, rows]
    count,
    rows,
    padded,
    tiles,
    blocks,
    depth,
    TAIL: tl.constexpr,
    BLOCK_CODES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < count
    maxima += head * blocks * rows
    best += (head * tl.num_programs(1) + tl.program_id(1)) * rows
    operand += head * padded * depth
    tail += head * padded * TAIL
    queries += (head * rows + tl.minimum(row, count - 1))[:, None] * depth
    d = tl.arange(0, BLOCK_D)
    if TAIL > 0:
        tail_column = tl.arange(0, TAIL)
        ones = tl.where((tail_column < 3)[None, :] & (row >= 0)[:, None], 1.0, 0.0).to(operand.dtype.element_ty)

    TILES: tl.constexpr = max(4 * BLOCK_CODES // BLOCK_K, 1)  # that a block spreads over
    part: tl.constexpr = min(BLOCK_CODES, BLOCK_K // 4)
    group = tl.full([BLOCK_N, BLOCK_K // (4 * part), 4], float("-inf"), tl.float32)
    largest = group
    begin = tl.program_id(1) * tiles
    end = tl.minimum(begin + tiles, padded // BLOCK_K)
    for tile in range(begin, end):
        code = tile * BLOCK_K + tl.arange(0, BLOCK_K).to(tl.int64)
        columns = operand + code[:, None] * depth
        score = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for start in range(0, depth, BLOCK_D):
            a = tl.load(queries + (start + d)[None, :])
            b = tl.load(columns + (start + d)[None, :])
            score = tl.dot(a, tl.trans(b), score)
        if TAIL > 0:
            score = tl.dot(ones, tl.trans(tl.load(tail + code[:, None] * TAIL + tail_column[None, :])), score)
        found = _block_maxima(score, BLOCK_CODES)
        group = tl.where(tile % TILES == 0, found, tl.maximum(group, found))
        largest = tl.maximum(largest, found)
        _store_maxima(maxima, tile, group, row, inside, rows, TILES)
    tl.store(best + row, tl.max(tl.max(largest, axis=2), axis=1), mask=inside)


@triton.jit
def _alive_blocks(maxima, wanted, threshold, last, row, rows, blocks, BLOCK_C: tl.constexpr):
    """For each row and remainder j of 4: the first two blocks 4 c + j after the last one that reach the threshold, and how
    many do. All arguments by row and have 4 entries to a row, one for each j."""
    lane = tl.arange(0, threshold.shape[0]) % 4
    first = tl.full(threshold.shape, NONE, tl.int32)
    second = first
    total = tl.zeros(threshold.shape, tl.int32)
    for start in range(0, blocks // 4, BLOCK_C):
        chunk = start + tl.arange(0, BLOCK_C)
        block = chunk[:, None] * 4 + lane[None, :]
        keep = (block < blocks) & (block > last[None, :]) & wanted[None, :]
        place = (chunk.to(tl.int64)[:, None] * rows + row[None, :]) * 4 + lane[None, :]
        maximum = tl.load(maxima + place, mask=keep, other=float("-inf"))
        alive = keep & (maximum >= threshold[None, :])
        total += tl.sum(alive.to(tl.int32), axis=0)
        nearer = tl.min(tl.where(alive, block, NONE), axis=0)
        further = tl.min(tl.where(alive & (block != nearer[None, :]), block, NONE), axis=0)
        second = tl.where(first == NONE, further, tl.minimum(second, nearer))
        first = tl.minimum(first, nearer)
    return first, second, total


@triton.jit
def _search_in_order(x, base, codebook, codes, inside, dim, stride_d, stride_k, stride_code_d, COSINE: tl.constexpr):
    """The smallest of the distances from one row to some codes, in the arithmetic of the reference, and the first to have it."""
    distance = tl.zeros(codes.shape, tl.float64)
    norm = tl.zeros(codes.shape, tl.float64)
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
    smallest = tl.min(distance)
    return smallest, tl.min(tl.where(distance == smallest, codes, 0x7FFFFFFFFFFFFFFF))


@triton.jit(
    do_not_specialize=[
        "first", "first_outer", "first_inner", "count", "rows", "positions", "inner", "num_codes", "blocks",
        "splits", "dim", "stride_head", "stride_outer", "stride_codebook",
    ]
)  # fmt: skip
def nearest_code_exact_kernel(
    x,  # [heads, outer, D, inner]
    codebook,  # [heads, K, D]
    mask,  # [heads, outer, inner]
    maxima,  # [heads, blocks / 4, rows, 4]
    best,  # [heads, splits, rows]
    bound,  # [heads, rows]
    indices,  # [heads, outer, inner]
    first,
    first_outer,
    first_inner,
    count,
    rows,
    positions,
    inner,
    num_codes,
    blocks,
    splits,
    dim,
    stride_head,
    stride_outer,
    stride_d,
    stride_inner,
    stride_codebook,
    stride_k,
    stride_code_d,
    COSINE: tl.constexpr,
    PLANAR: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_CODES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    x += head * stride_head
    codebook += head * stride_codebook
    maxima += head * blocks * rows
    best += head * splits * rows
    bound += head * rows
    indices += head * positions
    start_row = tl.program_id(0) * BLOCK_N

    # The maxima of a row's four blocks lie together, so they are read with four entries to a row.
    row4 = start_row + tl.arange(0, 4 * BLOCK_N) // 4
    wanted4 = row4 < count
    if HAS_MASK:
        wanted4 &= tl.load(mask + head * positions + first + row4, mask=wanted4, other=0) != 0
    bound4 = tl.load(bound + row4, mask=wanted4, other=0)
    top4 = tl.full([4 * BLOCK_N], float("-inf"), tl.float32)
    for split in range(splits):
        top4 = tl.maximum(top4, tl.load(best + split * rows + row4, mask=wanted4, other=float("-inf")))
    threshold4 = top4 - bound4
    wanted4 &= (bound4 < float("inf")) & (threshold4 > float("-inf"))
    last4 = tl.full([4 * BLOCK_N], -1, tl.int32)

    row = start_row + tl.arange(0, BLOCK_N)
    inside = row < count
    position = row.to(tl.int64) + first
    base = _offsets(row, first_outer, first_inner, inner, stride_outer, stride_inner)
    searched = tl.max(tl.reshape(wanted4.to(tl.int32), [BLOCK_N, 4]), axis=1) > 0
    wide = inside & (searched == 0)
    nearest = tl.zeros([BLOCK_N], tl.int32)
    smallest = tl.full([BLOCK_N], float("inf"), tl.float32)
    runner_up = smallest
    unsure = inside & (inside == 0)
    margin = tl.zeros([BLOCK_N], tl.float32)

    more = tl.max(wanted4.to(tl.int32))
    while more > 0:
        nearer, further, total = _alive_blocks(maxima, wanted4, threshold4, last4, row4, rows, blocks, BLOCK_C)
        nearer = tl.reshape(nearer, [BLOCK_N, 4])
        block = tl.min(nearer, axis=1)
        further = tl.min(tl.where(nearer == block[:, None], tl.reshape(further, [BLOCK_N, 4]), nearer), axis=1)
        left = tl.sum(tl.reshape(total, [BLOCK_N, 4]), axis=1)
        many = left > MANY_BLOCKS
        wide |= many
        block = tl.where(many, NONE, block)
        further = tl.where(many, NONE, further)
        last = tl.where((left > 2) & (many == 0), further, NONE)
        while tl.min(block) != NONE:
            alive = block != NONE
            code = tl.where(alive, block, 0).to(tl.int64)[:, None] * BLOCK_CODES + tl.arange(0, BLOCK_CODES)[None, :]
            keep = alive[:, None] & (code < num_codes)
            total_3d = tl.zeros([BLOCK_N, BLOCK_CODES, BLOCK_D], tl.float32)
            norm_3d = total_3d
            square = tl.zeros([BLOCK_N], tl.float32)
            for start in range(0, dim, BLOCK_D):
                d = start + tl.arange(0, BLOCK_D)
                valid = d < dim
                a = _load_rows(x, base, alive, d, valid, stride_d, PLANAR)
                place = codebook + code[:, :, None] * stride_k + d.to(tl.int64)[None, None, :] * stride_code_d
                b = tl.load(place, mask=keep[:, :, None] & valid[None, None, :], other=0).to(tl.float32)
                if COSINE:
                    square += tl.sum(a * a, axis=1)
                    norm_3d += b * b
                    total_3d += a[:, None, :] * b
                else:
                    difference = tl.where(keep[:, :, None], a[:, None, :] - b, 0.0)
                    total_3d += difference * difference
            distance = tl.sum(total_3d, axis=2)
            if COSINE:
                norm = tl.sum(norm_3d, axis=2)
                # Neither lost to underflow nor to overflow; float64 looks at the others.
                usual = (norm > 1e-30) & (norm < 1e30)
                unsure |= tl.max((keep & (usual == 0)).to(tl.int32), axis=1) > 0
                distance = -distance / tl.sqrt(tl.where(usual, norm, 1.0))
                keep &= usual
                length = tl.sqrt(square) + tl.sqrt(dim.to(tl.float32)) * 2.168404344971009e-19
                margin = tl.maximum(margin, (2 * dim + 24) * 1.1920928955078125e-07 * length + dim * 2e-23)
            distance = tl.where(keep & (distance == distance), distance, float("inf"))
            lowest = tl.min(distance, axis=1)
            index = tl.min(tl.where(distance == lowest[:, None], code, NONE), axis=1).to(tl.int32)
            second = tl.min(tl.where(code == index[:, None], float("inf"), distance), axis=1)
            runner_up = tl.minimum(tl.maximum(smallest, lowest), tl.minimum(runner_up, second))
            nearest = tl.where(lowest < smallest, index, nearest)
            smallest = tl.minimum(smallest, lowest)
            block = further
            further = tl.full([BLOCK_N], NONE, tl.int32)
        last4 = tl.reshape(tl.broadcast_to(last[:, None], [BLOCK_N, 4]), [4 * BLOCK_N])
        wanted4 &= last4 != NONE
        more = tl.max(wanted4.to(tl.int32))

    if not COSINE:
        # A sum of D squared differences errs by (D + 2) 2^-24 of itself, in any order; squares may underflow.
        margin = smallest * ((2 * dim + 24) * 5.960464477539063e-08) + 1e-34
    limit = smallest + margin
    unsure |= (runner_up > limit) == 0
    wanted = inside
    if HAS_MASK:
        wanted &= tl.load(mask + head * positions + position, mask=inside, other=0) != 0
    nearest = tl.where(wide, SEARCH_ALL, tl.where(unsure, SEARCH_BLOCKS, nearest))
    tl.store(indices + position, tl.where(wanted, nearest, -1).to(tl.int64), mask=inside)


@triton.jit(
    do_not_specialize=[
        "first", "first_outer", "first_inner", "count", "rows", "positions", "inner", "num_codes", "blocks",
        "splits", "dim", "stride_head", "stride_outer", "stride_codebook",
    ]
)  # fmt: skip
def nearest_code_settle_kernel(
    x,  # [heads, outer, D, inner]
    codebook,  # [heads, K, D]
    maxima,  # [heads, blocks / 4, rows, 4]
    best,  # [heads, splits, rows]
    bound,  # [heads, rows]
    indices,  # [heads, outer, inner]
    first,
    first_outer,
    first_inner,
    count,
    rows,
    positions,
    inner,
    num_codes,
    blocks,
    splits,
    dim,
    stride_head,
    stride_outer,
    stride_d,
    stride_inner,
    stride_codebook,
    stride_k,
    stride_code_d,
    COSINE: tl.constexpr,
    BLOCK_CODES: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    x += head * stride_head
    codebook += head * stride_codebook
    maxima += head * blocks * rows
    best += head * splits * rows
    bound += head * rows
    indices += head * positions + first
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    bases = _offsets(row, first_outer, first_inner, inner, stride_outer, stride_inner)
    found = tl.load(indices + row, mask=row < count, other=0)
    current = tl.min(tl.where(found <= SEARCH_BLOCKS, row, NONE))
    while current != NONE:
        base = tl.sum(tl.where(row == current, bases, 0))
        answer = tl.full([], 0, tl.int64)
        closest = tl.full([], float("inf"), tl.float64)
        if tl.min(tl.where(row == current, found, 0)) == SEARCH_ALL:
            for start in range(0, num_codes, 256):
                code = start + tl.arange(0, 256).to(tl.int64)
                inside = code < num_codes
                local, index = _search_in_order(x, base, codebook, code, inside, dim, stride_d, stride_k, stride_code_d, COSINE)
                answer = tl.where(local < closest, index, answer)
                closest = tl.minimum(local, closest)
        else:
            threshold = float("-inf")
            for split in range(splits):
                threshold = tl.maximum(threshold, tl.load(best + split * rows + current))
            threshold -= tl.load(bound + current)
            for start in range(0, blocks, 256):
                block = start + tl.arange(0, 256)
                place = ((block // 4).to(tl.int64) * rows + current) * 4 + block % 4
                maximum = tl.load(maxima + place, mask=block < blocks, other=float("-inf"))
                alive = (maximum >= threshold) & (block < blocks)
                visited = tl.min(tl.where(alive, block, NONE))
                while visited != NONE:
                    code = visited.to(tl.int64) * BLOCK_CODES + tl.arange(0, BLOCK_CODES)
                    inside = code < num_codes
                    local, index = _search_in_order(x, base, codebook, code, inside, dim, stride_d, stride_k, stride_code_d, COSINE)
                    answer = tl.where(local < closest, index, answer)
                    closest = tl.minimum(local, closest)
                    visited = tl.min(tl.where(alive & (block > visited), block, NONE))
        tl.store(indices + current, answer)
        current = tl.min(tl.where((found <= SEARCH_BLOCKS) & (row > current), row, NONE))
