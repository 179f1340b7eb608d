# SPDX-License-Identifier: Apache-2.0
"""Adversarial inputs for the search, which computes coarse scores with an error bound and rescores the remaining candidates exactly."""

import math
import threading

import pytest
import torch
from torch.nn.functional import normalize

import genperf
from genperf import testing

pytestmark = [pytest.mark.compiled, pytest.mark.search]

DIMS = (1, 2, 3, 5, 8, 9, 10, 20, 32, 33, 64, 300)
METRICS = ("euclidean", "cosine")


def exact(x, codebook, metric="euclidean"):
    return genperf.nearest_code(x, codebook, metric=metric, impl="reference")


def check(x, codebook, metric="euclidean", message=""):
    found, expected = genperf.nearest_code(x, codebook, metric=metric), exact(x, codebook, metric)
    wrong = (found != expected).nonzero().flatten().tolist()
    assert not wrong, (
        f"{len(wrong)} of {len(expected)} rows wrong, {message} {metric}, D={codebook.shape[1]}: "
        f"row {wrong[0]} is {int(found[wrong[0]])}, exactly {int(expected[wrong[0]])}"
    )


# Where possible, the sizes keep queries x codes below 32768, so that the reference runs on one thread.


def seeded(*numbers):
    return torch.Generator().manual_seed(sum(n * 1009**i for i, n in enumerate(numbers)))


def randn(generator, *size):
    return torch.randn(*size, generator=generator)


def pick(generator, codebook, count):
    return codebook[torch.randint(len(codebook), (count,), generator=generator)]


def shuffled(generator, codebook):
    return codebook[torch.randperm(len(codebook), generator=generator)]


DOWN, UP = 1 + 2**-8 - 2**-17 - 2**-23, 1 + 2**-8 - 2**-17 + 2**-23
# Two components each of x and of f, just below and just above the middle between two numbers of a format, and the error
# of rounding them. "split" is a sum of two bfloat16 numbers; "split product" is wrong where low x low is left out.
MIDWAY = {
    "bfloat16": ((1 + 2**-8 - 2**-20, 1 + 2**-8 + 2**-20), (1 + 2**-8 - 2**-20, 1 + 2**-8 + 2**-20), 2**-8),
    "tf32": ((1 + 2**-11 - 2**-22, 1 + 2**-11 + 2**-22), (1 + 2**-11 - 2**-22, 1 + 2**-11 + 2**-22), 2**-11),
    "split": ((DOWN, UP), (DOWN, UP), 2**-17),
    "split product": ((DOWN, UP), (DOWN, 1 + 2**-8 + 2**-17 + 2**-23), 2**-16),
    "float32": ((1 + 2**-24 - 2**-40, 1 + 2**-24 + 2**-40), (1 + 2**-24 - 2**-40, 1 + 2**-24 + 2**-40), 2**-24),
}
GAPS = (0.0, 0.001, 0.01, 0.1, 0.3, 0.5, 0.9, 0.99, 1.0, 1.01, 1.5, 3.0)


def aligned_roundings(form, dim, codes, places, metric, generator):
    """Two codes +-f whose exact scores differ by `gap` bounds while every rounding, of x and of f, favors the wrong one.

    x.f is a sum of pairs p p' - q q' with p, p' just below and q, q' just above a midpoint: in the format, it is too
    small by the whole of |x - x~||f| + |x~||f - f~|. The last component of x sets the gap. For cosine, a component that
    x has not makes |f| a power of two, so that normalizing keeps the midpoints. The other codes lie farther away, in
    pairs +-u, so that the mean of the codebook is zero.
    """
    x_values, f_values, unit = MIDWAY[form]
    cosine = metric == "cosine"
    pairs = (dim - 1 - cosine) // 2
    sign = randn(generator, 2 * pairs).sign().double()
    half = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat_interleave(pairs)
    f, query = torch.zeros(2, dim, dtype=torch.float64)
    f[: 2 * pairs] = sign * half * torch.tensor(f_values, dtype=torch.float64).repeat_interleave(pairs)
    query[: 2 * pairs] = sign * torch.tensor(x_values, dtype=torch.float64).repeat_interleave(pairs)
    f[-1] = 1
    if cosine:
        f[-2] = (4.0 ** math.ceil(math.log(f.square().sum(), 4)) - f.square().sum()).sqrt()
    bound = 2 * unit * (2 * pairs + 1)
    x = query.repeat(len(GAPS), 1)
    x[:, -1] = torch.tensor(GAPS, dtype=torch.float64) * bound - query @ f
    x = torch.cat([x, -x, x / 64, x * 512])

    direction = normalize(query, dim=0)
    others = randn(generator, codes // 2 - 1, dim).double()
    others[:, -1] = 0
    others -= (others @ direction)[:, None] * direction
    others = normalize(others, dim=1) * f.norm() * 1.1
    if cosine:  # pairs +-u would be in the way, and no mean is subtracted
        others = torch.cat([others, others]) - f.norm() * direction
        x = x[x @ direction > 0]
    codebook = shuffled(generator, others if cosine else torch.cat([others, -others]))
    for place, code in sorted(zip(places, (f, -f), strict=True), key=lambda entry: entry[0]):
        codebook = torch.cat([codebook[:place], code[None], codebook[place:]])
    return (x, codebook) if form == "float32" else (x.float(), codebook.float())


@pytest.mark.parametrize("form", MIDWAY)
@pytest.mark.parametrize("dim", [3, 5, 8, 9, 10, 20, 32, 33, 64, 257])
def test_gaps_inside_and_outside_the_bound(form, dim, device):
    for places in [(0, 649), (15, 16), (32, 31), (511, 512), (600, 40)]:
        x, codebook = aligned_roundings(form, dim, 650, places, "euclidean", seeded(dim, *places))
        check(x.to(device), codebook.to(device), message=f"{form} {places}")


@pytest.mark.parametrize("form", MIDWAY)
@pytest.mark.parametrize("dim", [4, 16, 64, 254])
def test_gaps_of_cosine(form, dim, device):
    for places in [(0, 399), (40, 7), (399, 31)]:
        x, codebook = aligned_roundings(form, dim, 400, places, "cosine", seeded(dim, *places))
        check(x.to(device), codebook.to(device), "cosine", f"{form} {places}")


def rounded_additions(dim, generator):
    """Queries so short that each product is about half a unit in the last place of |f|^2 / 2, where a sum may have started.

    The winner's products lie just below the half and are lost one by one; a loser's, on a part of its components, just
    above, and count double.
    """
    winner = torch.full((dim,), math.sqrt(1.5 / dim), dtype=torch.float64)
    codes = [winner]
    for part in (0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9):
        count = max(1, int(part * dim))
        loser = winner * 0.51 / 0.49
        left = (1.5 - count * loser[0] ** 2).clamp(min=0)
        rest = dim - count
        loser[count:] = (left / max(rest // 2 * 2, 1)).sqrt() * torch.tensor([1.0, -1.0]).repeat(rest)[:rest]
        if rest % 2:
            loser[-1] = 0
        codes += [loser]
    codes = torch.stack(codes)
    far = normalize(randn(generator, 192, dim).double(), dim=1) * math.sqrt(1.5) * (1 + 2**-10)
    codebook = shuffled(generator, torch.cat([codes, -codes, far, -far]))
    product = torch.tensor([0.1, 0.3, 0.45, 0.49, 0.495, 0.499, 0.5, 0.501, 0.55, 0.9, 1.47, 3.43, 100.0], dtype=torch.float64)
    x = (product * 2**-24 / winner[0])[:, None] * torch.ones(dim)
    return torch.cat([x, -x]).float(), codebook.float()


def test_additions_that_all_round_the_wrong_way(device):
    for dim in DIMS[2:]:
        for seed in range(4):
            x, codebook = rounded_additions(dim, seeded(dim, seed))
            check(x.to(device), codebook.to(device))


def one_in_sixteen(codebook, long):
    """Puts a code of `long` after every 15 codes of the codebook, whose rest follows at the end."""
    count = min(len(codebook) // 15, len(long))
    mixed = torch.cat([codebook[: 15 * count].view(count, 15, -1), long[:count, None]], dim=1)
    return torch.cat([mixed.flatten(0, 1), codebook[15 * count :]])


def beside_long_codes(family, dim, where):
    """A family with codes 1000 times as long, in a block of their own or in all blocks, and near ties around some of these."""
    generator = seeded(dim)
    if family == "float32 roundings":
        x, codebook = aligned_roundings("float32", dim, 240, (15, 16), "euclidean", generator)
    else:
        x, codebook = {"rounded_additions": rounded_additions, **FAMILIES}[family](dim, generator)
    codebook = codebook[:2000]
    size = 1000 * codebook.abs().max()
    base = size * normalize(randn(generator, 4, dim), dim=1).to(x.dtype)
    steps = torch.tensor([0.0, 0.0, 1e-7, -1e-7, 3e-7, 1e-4], dtype=x.dtype)
    near = (base[:, None] + steps[:, None] * size * randn(generator, 4, 6, dim).sign()).flatten(0, 1)
    far = size * 10.0 ** torch.rand(120, 1, generator=generator) * normalize(randn(generator, 120, dim), dim=1)
    long = torch.cat([near, far.to(x.dtype)])
    x = torch.cat([x, base, near[2::6] * 0.5 + base * 0.5, base * (1 + 1e-6), 0.4995 * base, 0.501 * base])
    return x, torch.cat([codebook, long[:20]]) if where == "own block" else one_in_sixteen(codebook, long)


@pytest.mark.parametrize("where", ["own block", "all blocks"])
@pytest.mark.parametrize("family", ["float32 roundings", "rounded_additions", "rings", "one_bit", "equal_lengths", "zeros"])
def test_near_ties_beside_codes_much_longer(family, where, device):
    for dim in (5, 20, 64, 257):
        x, codebook = beside_long_codes(family, dim, where)
        check(x.to(device), codebook.to(device), message=where)
        # A code that is not finite leaves the bounds of its block and of the others.
        codebook[3, 0], codebook[40, -1], codebook[-2, 0] = math.nan, math.inf, -math.inf
        check(x.to(device), codebook.to(device), message=f"{where}, not finite")


def test_one_code_much_longer(device):
    """At every place of a block, whose codes and those of other blocks are near ties."""
    for dim in (3, 32, 80):
        x, codebook = equal_lengths(dim, seeded(dim))
        x = torch.cat([x, codebook[:16]])
        for place in (0, 15, 16, 200, 499):
            changed = codebook.clone()
            changed[place] *= 1e4
            check(torch.cat([x, changed[place, None]]).to(device), changed.to(device), message=f"{place}")


def rings(dim, generator):
    """Around each of 12 queries 60 codes whose distances differ by less and less, down to below the resolution of float32."""
    x = 20 * randn(generator, 12, dim)
    directions = normalize(randn(generator, 12, 60, dim), dim=-1)
    gap = 2.0 ** -(3 + 2 * torch.arange(12.0))[:, None, None]
    codes = x[:, None] + directions * (1 + gap * torch.rand(12, 60, 1, generator=generator))
    return x, shuffled(generator, codes.flatten(0, 1))


def one_bit(dim, generator):
    """Codes that differ in the last bit of one component, each of them twice."""
    base = randn(generator, 12, dim)
    codes = base.repeat(16, 1)
    place = torch.randint(dim, (192, 1), generator=generator)
    target = 10 * randn(generator, 192, 1)
    codes.scatter_(1, place, torch.nextafter(codes.gather(1, place), target))
    x = torch.cat([base, pick(generator, codes, 12), base + 0.1 * randn(generator, 12, dim), base * 4])
    return x, torch.cat([shuffled(generator, codes), base, shuffled(generator, codes)])


def copies(dim, generator):
    """A few distinct codes, each repeated many times at distant indices."""
    base = randn(generator, 7, dim)
    codebook = torch.cat([randn(generator, 37, dim) + 5, pick(generator, base, 1100)])
    return torch.cat([base, base + 0.2 * randn(generator, 7, dim), randn(generator, 14, dim)]), codebook


def permutations(dim, generator):
    """Codes with the same components in different orders: their distances are equal up to rounding in float64."""
    value = randn(generator, dim)
    codebook = torch.stack([value[torch.randperm(dim, generator=generator)] for _ in range(400)])
    level = torch.tensor([0.0, -0.0, 1.0, -3.7, 1e-3, 1e-8, 1e4, 1e9, 1e12, 1e20])
    spread = 1e-9 * randn(generator, 10, dim)
    return torch.cat([level[:, None].expand(-1, dim), spread, value[None]]), codebook


def sign_flips(dim, generator):
    """Codes that differ only in signs, and queries for which the signs make no or hardly any difference."""
    value = randn(generator, dim)
    flips = randn(generator, 300, dim).sign()
    x = torch.cat([torch.zeros(1, dim), randn(generator, 12, dim)])
    x[1:] *= 10.0 ** -torch.arange(12.0)[:, None]
    axes = torch.zeros(20, dim)
    axes[torch.arange(20), torch.randint(dim, (20,), generator=generator)] = 1.3
    return torch.cat([x, axes, -axes]), value * flips


def equal_lengths(dim, generator):
    """Lengths that differ in the last bits, so that for short queries the rounding of |f|^2 / 2 decides."""
    codebook = normalize(randn(generator, 500, dim).double(), dim=1).float()
    steps = torch.randint(-2, 3, codebook.shape, generator=generator)
    codebook = codebook * (1 + steps * 2**-24)
    x = normalize(randn(generator, 40, dim), dim=1) * 10.0 ** -torch.randint(4, 12, (40, 1), generator=generator).float()
    return torch.cat([torch.zeros(1, dim), x]), codebook


def offset_data(dim, generator, ratio, where):
    offset = {
        "both": ratio,
        "queries": ratio,
        "codes": ratio,
        "components": ratio * randn(generator, dim),
        "clusters": ratio * randn(generator, 2, dim)[torch.randint(2, (300,), generator=generator)],
    }[where]
    codebook = randn(generator, 300, dim)
    if where != "queries":
        codebook = codebook + offset
    x = pick(generator, codebook, 60) + 0.5 * randn(generator, 60, dim)
    if where == "queries":
        x = x + offset
    if where == "codes":
        x[:30] = randn(generator, 30, dim)
    return x, codebook


def outlier_code(dim, generator, size=1e6):
    codebook = 1e-3 * randn(generator, 300, dim)
    codebook[[0, 150]] = size * randn(generator, 2, dim)
    x = torch.cat([pick(generator, codebook, 40), 1e-3 * randn(generator, 40, dim)])
    return x, codebook


def outlier_component(dim, generator):
    """One component of every vector is far larger than the others, which decide."""
    codebook = randn(generator, 300, dim)
    x = torch.cat([randn(generator, 40, dim), pick(generator, codebook, 20)])
    codebook[:, dim // 2] = 3e7 * codebook[:, dim // 2].sign()
    x[:, dim // 2] *= torch.logspace(0, 12, 60)
    return x, codebook


def wide_range(dim, generator):
    codebook = randn(generator, 300, dim) * 10.0 ** (40 * torch.rand(300, 1, generator=generator) - 20)
    x = randn(generator, 60, dim) * 10.0 ** (40 * torch.rand(60, 1, generator=generator) - 20)
    return torch.cat([x, pick(generator, codebook, 20)]), codebook


def wide_range_components(dim, generator):
    codebook = randn(generator, 300, dim) * 10.0 ** (30 * torch.rand(300, dim, generator=generator) - 20)
    return torch.cat([pick(generator, codebook, 40), pick(generator, codebook, 20) * 1.01]), codebook


def denormals(dim, generator):
    tiny = torch.finfo(torch.float32).smallest_normal
    codebook = tiny * randn(generator, 200, dim) * torch.tensor([1.0, 1e-3, 1e-6, 4.0]).repeat(50)[:, None]
    x = torch.cat([pick(generator, codebook, 30), tiny * randn(generator, 30, dim), randn(generator, 10, dim), torch.zeros(1, dim)])
    return x, codebook


def ladder(dim, generator):
    """Codes that get closer to the queries by much, by less than the coarse pass resolves, and not at all; then the reverse."""
    query = randn(generator, dim)
    count = 400
    gaps = torch.tensor([0.5, 1e-2, 1e-3, 1e-4, 1e-6, 0.0])
    steps = torch.linspace(1, 0, count)
    parts = []
    for gap in gaps:
        radii = 0.2 + gap * steps
        parts += [query + normalize(randn(generator, count, dim), dim=1) * radii[:, None]]
    codebook = torch.cat([*parts[:3], parts[4].flip(0), parts[5], parts[3]])
    return torch.cat([query[None], query + 1e-4 * randn(generator, 8, dim), query + 0.1 * randn(generator, 3, dim)]), codebook


def zeros(dim, generator):
    """Zero vectors of both signs among codes close to zero, at the same distance on either side."""
    codebook = 1e-4 * randn(generator, 100, dim)
    codebook = torch.cat([codebook, -codebook, torch.full((20, dim), -0.0), torch.zeros(20, dim)])
    codebook = shuffled(generator, codebook)
    x = torch.cat([torch.zeros(3, dim), torch.full((3, dim), -0.0), 1e-4 * randn(generator, 30, dim), randn(generator, 10, dim)])
    return x, codebook


def far_queries(dim, generator):
    """Queries so far away that float64 distances to most codes are equal."""
    codebook = randn(generator, 300, dim)
    return normalize(randn(generator, 96, dim), dim=1) * torch.logspace(1, 24, 96)[:, None], codebook


def grid(dim, generator):
    """Multiples of one half, exact in every format, with many equal distances."""
    codebook = torch.randint(-2, 3, (300, dim), generator=generator) / 2.0
    return torch.randint(-4, 5, (50, dim), generator=generator) / 4.0, codebook


FAMILIES = {
    "rings": rings,
    "one_bit": one_bit,
    "copies": copies,
    "permutations": permutations,
    "sign_flips": sign_flips,
    "equal_lengths": equal_lengths,
    "outlier_code": outlier_code,
    "outlier_code_1e15": lambda dim, generator: outlier_code(dim, generator, 1e15),
    "outlier_code_1e38": lambda dim, generator: outlier_code(dim, generator, 5e37),
    "outlier_component": outlier_component,
    "wide_range": wide_range,
    "wide_range_components": wide_range_components,
    "denormals": denormals,
    "zeros": zeros,
    "far_queries": far_queries,
    "ladder": ladder,
    "grid": grid,
}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, metric, device):
    for dim in DIMS:
        x, codebook = FAMILIES[family](dim, seeded(dim))
        check(x.to(device), codebook.to(device), metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("family", ["rings", "one_bit", "permutations", "equal_lengths"])
def test_near_ties_at_every_scale(family, metric, device):
    """Near-ties scaled by powers of two, up to where squares overflow or underflow in float32."""
    for dim in (3, 9, 20, 64):
        x, codebook = (t[:200].to(device) for t in FAMILIES[family](dim, seeded(dim)))
        for a in (-140, -126, -100, -60, 60, 100):
            for b in {a, 0, -a // 2}:
                check(x * 2.0**a, codebook * 2.0**b, metric, f"2^{a}, 2^{b}")
                check(x * 2.0**b, codebook * 2.0**a, metric, f"2^{b}, 2^{a}")


def test_equal_codes_far_apart(device):
    """The lowest index wins across blocks of every size."""
    places = [0, 1, 15, 16, 31, 32, 63, 64, 255, 256, 511, 512, 1023, 1024, 4095, 4096, 8191, 8192, 12345, 16383, 16384, 19999]
    for dim in (2, 8, 20, 64, 300):
        generator = seeded(dim)
        codebook = randn(generator, 20000 if dim < 300 else 5000, dim)
        inside = [place for place in places if place < len(codebook)]
        for first in range(0, len(inside) - 1, 6):
            codebook[inside[first:]] = randn(generator, dim)
            for metric in METRICS:
                check(codebook[inside[first], None].to(device), codebook.to(device), metric)


def test_more_near_ties_than_the_candidate_lists_hold(device):
    for dim in (3, 9, 20, 64):
        generator = seeded(dim)
        query = randn(generator, dim)
        shell = query + normalize(randn(generator, 6000, dim), dim=1)
        value = randn(generator, dim)
        orders = torch.stack([value[torch.randperm(dim, generator=generator)] for _ in range(6000)])
        for x, codebook in (
            (query + 1e-8 * randn(generator, 4, dim), shell),
            (torch.tensor([[0.0], [1.0], [1e-3]]).expand(-1, dim), orders),
        ):
            check(x.to(device), codebook.to(device))


@pytest.mark.parametrize("ratio", [10.0, 100.0, 1000.0, 1e5])
@pytest.mark.parametrize("where", ["both", "queries", "codes", "components", "clusters"])
def test_offset_data(where, ratio, device):
    for dim in (1, 4, 9, 20, 33, 300):
        x, codebook = offset_data(dim, seeded(dim), ratio, where)
        check(x.to(device), codebook.to(device))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, metric, device):
    for dim in (1, 3, 8, 20, 33, 260):
        for family in ("grid", "rings", "permutations", "sign_flips", "zeros"):
            x, codebook = FAMILIES[family](dim, seeded(dim))
            x, codebook = x.clamp(-6e4, 6e4).to(device, dtype), codebook.to(device, dtype)
            check(x, codebook, metric, family)
            # float32 codes, close to the values that x can have.
            beside = codebook.float() * (1 + 2**-12 * randn(seeded(dim), *codebook.shape).to(device))
            check(x, beside, metric, family)
            check(x, torch.cat([codebook.float(), beside]), metric, family)


@pytest.mark.parametrize("step", [1e-7, 1e-8, 1e-9, 1e-12, 1e-15])
def test_float64_below_the_resolution_of_float32(step, device):
    for dim in (1, 3, 8, 20, 64, 300):
        generator = seeded(dim)
        base = randn(generator, 10, dim).double()
        codebook = shuffled(generator, base.repeat(30, 1))
        codebook = codebook * (1 + step * randn(generator, 300, dim))
        x = torch.cat([base, pick(generator, codebook, 20), base * (1 + step * randn(generator, 10, dim)), 3 * base])
        for metric in METRICS:
            check(x.to(device), codebook.to(device), metric)
        check((x + 1e4).to(device), (codebook + 1e4).to(device))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("family", ["rings", "one_bit", "permutations", "outlier_code_1e15", "far_queries"])
def test_nonfinite_values_among_near_ties(family, metric, device):
    for dim in (1, 4, 9, 20, 33, 300):
        generator = seeded(dim)
        x, codebook = FAMILIES[family](dim, generator)
        for value in (math.nan, math.inf, -math.inf):
            x[torch.randint(len(x), (2,), generator=generator), torch.randint(dim, (2,), generator=generator)] = value
            rows = torch.randint(len(codebook), (5,), generator=generator)
            codebook[rows, torch.randint(dim, (5,), generator=generator)] = value
        codebook[0, 0], codebook[-1, -1] = math.nan, math.inf
        check(x.to(device), codebook.to(device), metric)
        codebook[:], codebook[77] = math.nan, 1
        check(x.to(device), codebook.to(device), metric)


@pytest.mark.parametrize("dim", [3, 9, 20, 64, 260])
def test_threads_batches_and_layouts_have_no_effect(dim, device, set_threads):
    parts = [FAMILIES[name](dim, seeded(dim)) for name in ("rings", "one_bit", "permutations")]
    parts.append(offset_data(dim, seeded(dim), 1000.0, "clusters"))
    x, codebook = (torch.cat(tensors).to(device) for tensors in zip(*parts, strict=True))
    x = x[torch.randperm(len(x), generator=seeded(dim)).to(device)[:90]]
    expected = torch.cat([exact(part, codebook) for part in x.split(15)])
    for count in (1, 2):
        set_threads(count)
        assert torch.equal(genperf.nearest_code(x, codebook), expected), count
        for size, rows in ((1, 8), (31, len(x)), (64, len(x))):
            split = torch.cat([genperf.nearest_code(part, codebook) for part in x[-rows:].split(size)])
            assert torch.equal(split, expected[-rows:]), (count, size)
        for name, (laid_out, channel_dim) in testing.layouts(x).items():
            assert torch.equal(genperf.nearest_code(laid_out, codebook, channel_dim=channel_dim).flatten(), expected), (count, name)
        assert torch.equal(genperf.nearest_code(x, codebook.t().contiguous().t()), expected), count
    order = torch.randperm(len(x), generator=seeded(dim)).to(device)
    assert torch.equal(genperf.nearest_code(x[order], codebook), expected[order])


# The codebook changes between two calls: the second call must not use what the first one cached.


def swap(a, i, j):
    a[[i, j]] = a[[j, i]]


def step_of_optimizer(codebook):
    parameter = torch.nn.Parameter(codebook)
    with torch.no_grad():
        parameter[17] -= 5


def through_numpy(codebook):
    array = codebook.numpy()
    array[5] = -array[5]


def keep_sums(codebook):
    """Keeps the sum of all components and that of the column."""
    codebook[3, 0] += 4
    codebook[9, 0] -= 4


def flip_bit(codebook, k, d):
    codebook.view(torch.int32)[k, d] ^= 1


CHANGES = {
    "row": lambda c: c[3].add_(1),
    "all": lambda c: c.data.copy_(c.flip(0).roll(3, 0)),
    "slice of data": lambda c: c.data[10:20].neg_(),
    "transposed view": lambda c: c.t()[0, :20].neg_(),
    "flat view": lambda c: c.view(-1)[7 * c.shape[1]].add_(3),
    "detached": lambda c: c.detach()[11].mul_(-2),
    "numpy": through_numpy,
    "optimizer": step_of_optimizer,
    "rows swapped": lambda c: swap(c, 3, 19),
    "first and last row swapped": lambda c: swap(c, 0, len(c) - 1),
    "columns swapped": lambda c: swap(c[:20].t(), 0, c.shape[1] - 1),
    "rolled": lambda c: c.copy_(c.roll(1, 0)),
    "sums kept": keep_sums,
    "bit of the first component": lambda c: flip_bit(c, 0, 0),
    "bit of a component": lambda c: flip_bit(c, 18, -1),
    "bit of the last component": lambda c: flip_bit(c, -1, -1),
    "NaN": lambda c: c[13, -1].fill_(math.nan),
    "zeroed": lambda c: c.zero_(),
    "scaled": lambda c: c[: len(c) // 2].mul_(1.5),
}


@pytest.mark.parametrize(("codes", "dim"), [(64, 4), (300, 16), (700, 64), (200, 257)])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_codebook(change, codes, dim, device):
    if change == "numpy" and device != "cpu":
        pytest.skip("numpy sees the memory of the CPU only")
    half = randn(seeded(codes, dim), codes, dim)
    # Every code has a copy, which is closer once the first one has changed by a bit; the last query differs from the last code by a bit.
    codebook, x = torch.cat([half, half]).to(device), torch.cat([half, half[-1:]]).to(device)
    flip_bit(x, -1, -1)
    x = x[-21:] if change == "bit of the last component" else x[:21]
    before = exact(x, codebook)
    for _ in range(3):
        assert torch.equal(genperf.nearest_code(x, codebook), before)
    kept = codebook.clone()
    CHANGES[change](codebook)
    after = exact(x, codebook)
    assert not torch.equal(after, before)
    assert torch.equal(genperf.nearest_code(x, codebook), after)
    assert torch.equal(genperf.nearest_code(x, kept), before)
    codebook.copy_(kept)
    assert torch.equal(genperf.nearest_code(x, codebook), before)


def test_one_memory_with_different_views(device):
    """Codebooks at one address that differ only in dtype, shape, strides or metric; and equal codebooks at two addresses."""
    memory = randn(seeded(5), 96 * 96).to(device)
    square = memory.view(96, 96)
    readings = [
        square,
        square.t(),
        memory.view(192, 48),
        memory.view(48, 192),
        memory.view(48, 192).t(),
        square[:95],
        square[1:],
        square.flip(0),
    ]
    readings += [square[:, :40], square[:, 1:41], memory.as_strided((96, 40), (1, 96)), memory.as_strided((96, 96), (0, 1))]
    readings += [memory.as_strided((96, 96), (3, 1)), square.clone(), memory.view(torch.float64).view(48, 96)]
    halves = (memory.view(torch.int32) & 0x3FFF3FFF).view(torch.int16).view(192, 96)
    readings += [halves.view(torch.bfloat16), halves.view(torch.float16), halves.view(torch.float16).t(), halves.view(torch.float16)[:96]]
    cases = []
    for number, codebook in enumerate(readings):
        x = randn(seeded(number), 40, codebook.shape[1]).to(device, codebook.dtype)
        x[:20] = codebook[7:27] + 0.1 * x[:20]
        cases += [(x, codebook, metric, exact(x, codebook, metric)) for metric in METRICS]
    order = torch.randperm(4 * len(cases), generator=seeded(6)) % len(cases)
    for number in order.tolist():
        x, codebook, metric, expected = cases[number]
        assert torch.equal(genperf.nearest_code(x, codebook, metric=metric), expected), (codebook.dtype, codebook.shape, codebook.stride())


def test_different_codebooks_at_one_address(device):
    """New tensors of one shape at the address of earlier ones, as an allocator returns them, also with earlier contents."""
    place = torch.empty(200 * 24, device=device)
    contents = [randn(seeded(number), 200, 24).to(device) for number in range(12)]
    x = randn(seeded(13), 50, 24).to(device)
    expected = [exact(x, content) for content in contents]
    for number in [0, 1, 2, 1, 0, *range(12), *range(12), 3, 3, 11, 0]:
        place.copy_(contents[number].flatten())
        assert torch.equal(genperf.nearest_code(x, place.view(200, 24)), expected[number])
        codebook = contents[number].clone()
        assert torch.equal(genperf.nearest_code(x, codebook), expected[number])
        del codebook


def test_concurrent_calls(device):
    """Python threads that alternate between shared codebooks and one of their own, which they overwrite between calls."""
    sizes = [(300, 3), (300, 8), (300, 24), (300, 70)]
    contents = [[randn(seeded(number, dim), codes, dim).to(device) for number in range(6)] for codes, dim in sizes]
    queries = [randn(seeded(9, dim), 70, dim).to(device) for _, dim in sizes]
    expected = [[exact(x, codebook) for codebook in codebooks] for x, codebooks in zip(queries, contents, strict=True)]
    wrong = []

    def search(first):
        place = contents[2][0].clone()
        for turn in range(60):
            size, number = (first + turn) % len(sizes), (first * 5 + turn * 7) % 6
            if not torch.equal(genperf.nearest_code(queries[size], contents[size][number]), expected[size][number]):
                wrong.append((first, turn, "own"))
            place.copy_(contents[2][number])
            if not torch.equal(genperf.nearest_code(queries[2], place), expected[2][number]):
                wrong.append((first, turn, "overwritten"))

    threads = [threading.Thread(target=search, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
