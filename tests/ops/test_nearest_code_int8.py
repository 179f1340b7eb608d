# SPDX-License-Identifier: Apache-2.0
"""Adversarial inputs for the first pass of the search in 8 bits: with AVX-512 VNNI, at least 32 codes of 32 dimensions, or 128 of 16."""

import pytest
import torch

import genperf

pytestmark = [pytest.mark.compiled, pytest.mark.search]

ROWS, CODES = 64, 256


def check(x, codebook, metric="euclidean", k=3):
    """The k nearest codes, and of them the nearest."""
    expected = genperf.nearest_codes(x, codebook, k, metric=metric, impl="reference")
    for count in (1, k):
        wrong = (genperf.nearest_codes(x, codebook, count, metric=metric) != expected[:, :count]).any(-1).nonzero().flatten().tolist()
        assert not wrong, f"{len(wrong)} of {len(expected)} rows of {count} codes wrong"
    wrong = (genperf.nearest_code(x, codebook, metric=metric) != expected[:, 0]).nonzero().flatten().tolist()
    assert not wrong, f"{len(wrong)} of {len(expected)} rows wrong"


def pairs_around(first, second, codes, generator):
    """A codebook of `first`, `second`, their negatives, and pairs of short codes, so that its mean is exactly zero."""
    short = torch.randint(-1, 2, (codes // 2 - 2, len(first)), generator=generator) / 8
    return torch.cat([torch.stack([first, second, -first, -second]), short, -short])


def rounded_queries(dim, gap, generator):
    """Integers plus 0.49 times the signs of `direction`, times direction just above `gap`: rounding hides all of the rests."""
    direction = torch.randn(dim, generator=generator).sign()
    direction[0] = 1
    whole = torch.randint(-20, 21, (ROWS, dim), generator=generator).float()
    whole[:, 0] = 0
    signs = direction.clone()
    signs[0] = 0
    target = -int(0.49 * (dim - 1) - gap)  # what the products of the whole parts add up to
    for row in whole:
        while (missing := int(target - row @ signs)) != 0:
            at = torch.randperm(dim - 1, generator=generator)[: abs(missing)] + 1
            row[at] += signs[at] * (1 if missing > 0 else -1)
            row.clamp_(-60, 60)
    whole[:, 0] = 127
    return whole + 0.49 * signs, direction


@pytest.mark.parametrize("dim", [16, 20, 33, 64, 257])
@pytest.mark.parametrize("gap", [0.05, 0.5, 2.0, -0.5])
def test_rests_of_queries_that_all_point_to_one_code(gap, dim, device):
    """Two codes of components 1 and -1 that differ in sign but for the first. In 8 bits, queries are nearer to the second by nearly
    the whole bound, and exactly nearer to the first by `gap`."""
    generator = torch.Generator().manual_seed(dim)
    x, first = rounded_queries(dim, gap, generator)
    second = -first
    second[0] = 1
    codebook = pairs_around(first, second, CODES, generator)
    check(x.to(device), codebook.to(device))
    check(x.to(device), codebook.flip(0).to(device))


@pytest.mark.parametrize("dim", [16, 20, 33, 64, 257])
def test_rests_of_codes_that_all_point_to_one_query(dim, device):
    """Queries of components 1 and -1, and two codes whose rests of 0.49 steps 8 bits leave out, in favor of the farther one."""
    generator = torch.Generator().manual_seed(dim)
    x = torch.randn(ROWS, dim, generator=generator).sign()
    x[:, 1:] = x[:1, 1:]  # the same in all but the first component, in which the codes are equal
    sign = x[0].clone()
    sign[0] = 0
    base = torch.randint(0, 21, (dim,), generator=generator) * sign
    base[0] = 0
    codes = []
    for rest, step in ((0.49, 0), (-0.49, 1)):
        # The whole parts of the second are closer to the query by nearly the rests of both.
        code = base + step * sign * (torch.arange(dim) % 50 < 48) + rest * sign
        code[0] = 127
        codes.append(code)
    codebook = pairs_around(*codes, CODES, generator)
    for scale in (1.0, 90.0, 127.0):
        check((x * scale).to(device), codebook.to(device))
        check((x * scale).to(device), codebook.to(device), "cosine")


def clusters(count, radius, dim, generator):
    """Codes in two clusters far from each other. Their center is in the middle, so that 8 bits tell no two codes of one apart."""
    side = torch.arange(count) % 2 * 2 - 1.0
    return side[:, None] * 100 + radius * torch.randn(count, dim, generator=generator)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("radius", [1.0, 1e-2, 1e-5])
def test_more_candidates_than_are_worth_it(radius, metric, device):
    """Chunks that have not been searched are then searched in float32."""
    generator = torch.Generator().manual_seed(1)
    check(clusters(3000, radius, 32, generator).to(device), clusters(200, radius, 32, generator).to(device), metric)


def test_candidates_that_change_from_chunk_to_chunk(device):
    """Easy rows before hard ones and after them."""
    generator = torch.Generator().manual_seed(2)
    codebook = clusters(256, 1e-3, 24, generator)
    easy, hard = 300 * torch.randn(1500, 24, generator=generator), clusters(1500, 1e-3, 24, generator)
    check(torch.cat([easy, hard, easy]).to(device), codebook.to(device))


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_components_and_lengths_that_differ_much(metric, device):
    generator = torch.Generator().manual_seed(3)
    x, codebook = torch.randn(ROWS, 48, generator=generator), torch.randn(CODES, 48, generator=generator)
    for dims in (1, 5, 40):
        scale = torch.ones(48)
        scale[:dims] = 1000
        check((x * scale).to(device), (codebook * scale).to(device), metric)
    lengths = torch.exp(4 * torch.randn(CODES, 1, generator=generator))
    check(x.to(device), (codebook * lengths).to(device), metric)
    check((x * lengths[:ROWS]).to(device), codebook.to(device), metric)
    check((x + 1e4).to(device), (codebook + 1e4).to(device), metric)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_values_that_overflow_or_vanish(metric, device):
    generator = torch.Generator().manual_seed(4)
    x, codebook = torch.randn(ROWS, 40, generator=generator), torch.randn(CODES, 40, generator=generator)
    for factor in (1e-38, 1e-30, 1e-18, 1e18, 1e30):
        check((x * factor).to(device), codebook.to(device), metric)
        check(x.to(device), (codebook * factor).to(device), metric)
        check((x * factor).to(device), (codebook * factor).to(device), metric)
    x[3], x[4, 5], x[6, 7], x[8, 9] = 0, float("nan"), float("inf"), -float("inf")
    codebook[10], codebook[11, 3], codebook[12, 4] = 0, float("nan"), float("inf")
    check(x.to(device), codebook.to(device), metric)
    check(x.to(device), torch.full_like(codebook, float("nan")).to(device), metric)
    check(torch.zeros_like(x).to(device), torch.zeros_like(codebook).to(device), metric)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_lists_of_many_candidates(metric, device):
    """Components with heavy tails, of which 8 bits leave so much that a list is full of candidates: their scores leave out the others."""
    generator = torch.Generator().manual_seed(6)
    codebook = torch.randn(1500, 700, generator=generator).exp().to(device)
    check(codebook[:40] * 1.01, codebook, metric, 5)
    check(codebook[:33] + 0.5, codebook.flip(0), metric, 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("rows", "codes", "dim"), [(32, 128, 16), (33, 129, 17), (100, 145, 63), (257, 1000, 65), (40, 4099, 18), (65, 37, 47)]
)
def test_shapes(rows, codes, dim, dtype, device):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, dim, generator=generator).to(device, dtype)
    codebook = torch.randn(codes, dim, generator=generator).to(device, dtype)
    codebook[codes // 2] = codebook[3]
    for metric in ("euclidean", "cosine"):
        check(x, codebook, metric)


def test_parts_of_a_codebook(device):
    """A codebook of more than 28 MB in 8 bits is searched in parts, with ties across their borders."""
    generator = torch.Generator().manual_seed(5)
    codebook = torch.randint(-100, 101, (7500, 4096), generator=generator, dtype=torch.int8).to(device, torch.bfloat16)
    codebook[7400:] = codebook[:100]
    rows = torch.cat([torch.arange(0, 7400, 240), torch.arange(7400, 7410)])
    expected = torch.where(rows < 7400, rows, rows - 7400)
    assert torch.equal(genperf.nearest_code(codebook[rows], codebook).cpu(), expected)
