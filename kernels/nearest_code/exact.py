"""Exact pass: rescoring of the blocks that the coarse pass could not rule out.

Float32 sums of squared differences have a small relative error wherever the data lie, so they decide between most candidates.
Float64, in the arithmetic of the reference, decides between the rest.
"""

import triton
import triton.language as tl

from .rows import load_rows, row_offsets

MAX_CANDIDATE_BLOCKS = tl.constexpr(64)  # a row with more is searched over all codes
NO_BLOCK = tl.constexpr(0x7FFFFFFF)
# In place of an index, for nearest_code_float64_kernel:
SEARCH_BLOCKS = tl.constexpr(-2)  # search the codes of the candidate blocks
SEARCH_ALL = tl.constexpr(-3)  # search all codes


@triton.jit
def _candidate_blocks(maxima, active, threshold, last, row, rows, blocks, BLOCK_C: tl.constexpr):
    """For each row and j of 4: the first two blocks 4 c + j after block `last` whose maximum reaches the threshold, and the
    number of such blocks. All arguments by row have four entries per row, one for each j."""
    lane = tl.arange(0, threshold.shape[0]) % 4
    first = tl.full(threshold.shape, NO_BLOCK, tl.int32)
    second = first
    total = tl.zeros(threshold.shape, tl.int32)
    for start in range(0, blocks // 4, BLOCK_C):
        group = start + tl.arange(0, BLOCK_C)
        block = group[:, None] * 4 + lane[None, :]
        keep = (block < blocks) & (block > last[None, :]) & active[None, :]
        place = (group.to(tl.int64)[:, None] * rows + row[None, :]) * 4 + lane[None, :]
        maximum = tl.load(maxima + place, mask=keep, other=float("-inf"))
        candidate = keep & (maximum >= threshold[None, :])
        total += tl.sum(candidate.to(tl.int32), axis=0)
        nearer = tl.min(tl.where(candidate, block, NO_BLOCK), axis=0)
        further = tl.min(tl.where(candidate & (block != nearer[None, :]), block, NO_BLOCK), axis=0)
        second = tl.where(first == NO_BLOCK, further, tl.minimum(second, nearer))
        first = tl.minimum(first, nearer)
    return first, second, total


@triton.jit
def _nearest_in_order(x, base, codebook, k, inside, dim, stride_d, stride_k, stride_code_d, COSINE: tl.constexpr):
    """The smallest distance from one row to the codes k, in the arithmetic of the reference, and the lowest index that has it."""
    distance = tl.zeros(k.shape, tl.float64)
    norm = tl.zeros(k.shape, tl.float64)
    query = x + base
    code = codebook + k * stride_k
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
        distance *= tl.abs(distance) / tl.where(norm > 0, norm, 1.0)  # has the order of the similarity
    distance = tl.where(inside & (distance == distance), distance, float("inf"))
    smallest = tl.min(distance)
    return smallest, tl.min(tl.where(distance == smallest, k, 0x7FFFFFFFFFFFFFFF))


@triton.jit(
    do_not_specialize=[
        "first", "first_outer", "first_inner", "count", "rows", "positions", "inner", "num_codes", "blocks",
        "splits", "dim", "stride_head", "stride_outer", "stride_codebook",
    ]
)  # fmt: skip
def nearest_code_rescore_kernel(
    x,  # [heads, outer, D, inner]
    codebook,  # [heads, K, D]
    mask,  # [heads, outer, inner]
    maxima,  # [heads, blocks / 4, rows, 4]
    best,  # [heads, splits, rows]
    margin,  # [heads, rows]
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
    """Rescore the candidate blocks in float32. Rows that this leaves undecided get SEARCH_BLOCKS or SEARCH_ALL for an index."""
    head = tl.program_id(1).to(tl.int64)
    x += head * stride_head
    codebook += head * stride_codebook
    maxima += head * blocks * rows
    best += head * splits * rows
    margin += head * rows
    indices += head * positions
    start_row = tl.program_id(0) * BLOCK_N

    # The maxima of a group of four blocks are adjacent in memory, so they are read with four entries per row.
    row4 = start_row + tl.arange(0, 4 * BLOCK_N) // 4
    active4 = row4 < count
    if HAS_MASK:
        active4 &= tl.load(mask + head * positions + first + row4, mask=active4, other=0) != 0
    margin4 = tl.load(margin + row4, mask=active4, other=0)
    best4 = tl.full([4 * BLOCK_N], float("-inf"), tl.float32)
    for split in range(splits):
        best4 = tl.maximum(best4, tl.load(best + split * rows + row4, mask=active4, other=float("-inf")))
    threshold4 = best4 - margin4
    active4 &= (margin4 < float("inf")) & (threshold4 > float("-inf"))
    last4 = tl.full([4 * BLOCK_N], -1, tl.int32)

    row = start_row + tl.arange(0, BLOCK_N)
    inside = row < count
    position = row.to(tl.int64) + first
    base = row_offsets(row, first_outer, first_inner, inner, stride_outer, stride_inner)
    active = tl.max(tl.reshape(active4.to(tl.int32), [BLOCK_N, 4]), axis=1) > 0
    search_all = inside & (active == 0)
    nearest = tl.zeros([BLOCK_N], tl.int32)
    smallest = tl.full([BLOCK_N], float("inf"), tl.float32)
    runner_up = smallest
    undecided = inside & (inside == 0)
    tolerance = tl.zeros([BLOCK_N], tl.float32)

    more = tl.max(active4.to(tl.int32))
    while more > 0:
        nearer, further, total = _candidate_blocks(maxima, active4, threshold4, last4, row4, rows, blocks, BLOCK_C)
        nearer = tl.reshape(nearer, [BLOCK_N, 4])
        block = tl.min(nearer, axis=1)
        further = tl.min(tl.where(nearer == block[:, None], tl.reshape(further, [BLOCK_N, 4]), nearer), axis=1)
        left = tl.sum(tl.reshape(total, [BLOCK_N, 4]), axis=1)
        too_many = left > MAX_CANDIDATE_BLOCKS
        search_all |= too_many
        block = tl.where(too_many, NO_BLOCK, block)
        further = tl.where(too_many, NO_BLOCK, further)
        last = tl.where((left > 2) & (too_many == 0), further, NO_BLOCK)
        while tl.min(block) != NO_BLOCK:
            present = block != NO_BLOCK
            code = tl.where(present, block, 0).to(tl.int64)[:, None] * BLOCK_CODES + tl.arange(0, BLOCK_CODES)[None, :]
            keep = present[:, None] & (code < num_codes)
            distance_3d = tl.zeros([BLOCK_N, BLOCK_CODES, BLOCK_D], tl.float32)
            norm_3d = distance_3d
            square = tl.zeros([BLOCK_N], tl.float32)
            for start in range(0, dim, BLOCK_D):
                d = start + tl.arange(0, BLOCK_D)
                valid = d < dim
                a = load_rows(x, base, present, d, valid, stride_d, PLANAR)
                place = codebook + code[:, :, None] * stride_k + d.to(tl.int64)[None, None, :] * stride_code_d
                b = tl.load(place, mask=keep[:, :, None] & valid[None, None, :], other=0).to(tl.float32)
                if COSINE:
                    square += tl.sum(a * a, axis=1)
                    norm_3d += b * b
                    distance_3d += a[:, None, :] * b
                else:
                    difference = tl.where(keep[:, :, None], a[:, None, :] - b, 0.0)
                    distance_3d += difference * difference
            distance = tl.sum(distance_3d, axis=2)
            if COSINE:
                norm = tl.sum(norm_3d, axis=2)
                # Float64 decides where the squared norm may have underflowed or overflowed.
                usual = (norm > 1e-30) & (norm < 1e30)
                undecided |= tl.max((keep & (usual == 0)).to(tl.int32), axis=1) > 0
                distance = -distance / tl.sqrt(tl.where(usual, norm, 1.0))
                keep &= usual
                length = tl.sqrt(square) + tl.sqrt(dim.to(tl.float32)) * 2.168404344971009e-19
                tolerance = tl.maximum(tolerance, (2 * dim + 24) * 1.1920928955078125e-07 * length + dim * 2e-23)
            distance = tl.where(keep & (distance == distance), distance, float("inf"))
            lowest = tl.min(distance, axis=1)
            index = tl.min(tl.where(distance == lowest[:, None], code, NO_BLOCK), axis=1).to(tl.int32)
            second = tl.min(tl.where(code == index[:, None], float("inf"), distance), axis=1)
            runner_up = tl.minimum(tl.maximum(smallest, lowest), tl.minimum(runner_up, second))
            nearest = tl.where(lowest < smallest, index, nearest)
            smallest = tl.minimum(smallest, lowest)
            block = further
            further = tl.full([BLOCK_N], NO_BLOCK, tl.int32)
        last4 = tl.reshape(tl.broadcast_to(last[:, None], [BLOCK_N, 4]), [4 * BLOCK_N])
        active4 &= last4 != NO_BLOCK
        more = tl.max(active4.to(tl.int32))

    if not COSINE:
        # The relative error of a sum of D squared differences is at most (D + 2) 2^-24, in any order; squares may underflow.
        tolerance = smallest * ((2 * dim + 24) * 5.960464477539063e-08) + 1e-34
    limit = smallest + tolerance
    undecided |= (runner_up > limit) == 0
    unmasked = inside
    if HAS_MASK:
        unmasked &= tl.load(mask + head * positions + position, mask=inside, other=0) != 0
    nearest = tl.where(search_all, SEARCH_ALL, tl.where(undecided, SEARCH_BLOCKS, nearest))
    tl.store(indices + position, tl.where(unmasked, nearest, -1).to(tl.int64), mask=inside)


@triton.jit(
    do_not_specialize=[
        "first", "first_outer", "first_inner", "count", "rows", "positions", "inner", "num_codes", "blocks",
        "splits", "dim", "stride_head", "stride_outer", "stride_codebook",
    ]
)  # fmt: skip
def nearest_code_float64_kernel(
    x,  # [heads, outer, D, inner]
    codebook,  # [heads, K, D]
    maxima,  # [heads, blocks / 4, rows, 4]
    best,  # [heads, splits, rows]
    margin,  # [heads, rows]
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
    """Search the undecided rows in float64, one row at a time."""
    head = tl.program_id(1).to(tl.int64)
    x += head * stride_head
    codebook += head * stride_codebook
    maxima += head * blocks * rows
    best += head * splits * rows
    margin += head * rows
    indices += head * positions + first
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    bases = row_offsets(row, first_outer, first_inner, inner, stride_outer, stride_inner)
    found = tl.load(indices + row, mask=row < count, other=0)
    current = tl.min(tl.where(found <= SEARCH_BLOCKS, row, NO_BLOCK))
    while current != NO_BLOCK:
        base = tl.sum(tl.where(row == current, bases, 0))
        nearest = tl.full([], 0, tl.int64)
        smallest = tl.full([], float("inf"), tl.float64)
        if tl.min(tl.where(row == current, found, 0)) == SEARCH_ALL:
            for start in range(0, num_codes, 256):
                k = start + tl.arange(0, 256).to(tl.int64)
                distance, index = _nearest_in_order(
                    x, base, codebook, k, k < num_codes, dim, stride_d, stride_k, stride_code_d, COSINE
                )  # fmt: skip
                nearest = tl.where(distance < smallest, index, nearest)
                smallest = tl.minimum(distance, smallest)
        else:
            threshold = float("-inf")
            for split in range(splits):
                threshold = tl.maximum(threshold, tl.load(best + split * rows + current))
            threshold -= tl.load(margin + current)
            for start in range(0, blocks, 256):
                block = start + tl.arange(0, 256)
                place = ((block // 4).to(tl.int64) * rows + current) * 4 + block % 4
                maximum = tl.load(maxima + place, mask=block < blocks, other=float("-inf"))
                candidate = (maximum >= threshold) & (block < blocks)
                visited = tl.min(tl.where(candidate, block, NO_BLOCK))
                while visited != NO_BLOCK:
                    k = visited.to(tl.int64) * BLOCK_CODES + tl.arange(0, BLOCK_CODES)
                    distance, index = _nearest_in_order(
                        x, base, codebook, k, k < num_codes, dim, stride_d, stride_k, stride_code_d, COSINE
                    )  # fmt: skip
                    nearest = tl.where(distance < smallest, index, nearest)
                    smallest = tl.minimum(distance, smallest)
                    visited = tl.min(tl.where(candidate & (block > visited), block, NO_BLOCK))
        tl.store(indices + current, nearest)
        current = tl.min(tl.where((found <= SEARCH_BLOCKS) & (row > current), row, NO_BLOCK))
