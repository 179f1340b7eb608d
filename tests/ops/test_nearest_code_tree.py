# SPDX-License-Identifier: Apache-2.0
"""Adversarial inputs for the search in a tree of codes, which 1,024 vectors of at most 8 dimensions take if there are enough codes."""

import itertools

import pytest
import torch

import genperf

pytestmark = [pytest.mark.compiled, pytest.mark.search]

ROWS = 1024
CODES = {1: 512, 2: 1024, 3: 1024, 4: 2048, 5: 2048, 6: 4096, 7: 4096, 8: 8192}  # from which on there is a tree


def check(x, codebook):
    expected = genperf.nearest_code(x, codebook, impl="reference")
    wrong = (genperf.nearest_code(x, codebook) != expected).nonzero().flatten().tolist()
    assert not wrong, f"{len(wrong)} of {len(expected)} rows wrong, such as {wrong[0]}"


def normal(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def shuffled(codebook, seed=0):
    return codebook[torch.randperm(len(codebook), generator=torch.Generator().manual_seed(seed))]


@pytest.mark.parametrize("dim", CODES)
def test_dimensions(dim, device):
    """Numbers of codes that fill no leaf, and no branch, of the last ones; repeated codes."""
    x, codebook = normal(ROWS + 3, dim).to(device), normal(CODES[dim] + 257 + dim, dim, seed=1).to(device)
    codebook[CODES[dim] :: 3] = codebook[: len(codebook[CODES[dim] :: 3])]
    check(x, codebook)


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)], ids=str
)
def test_half_precision(dtypes, device):
    """Few different numbers, so many ties."""
    check(normal(ROWS, 2).to(device, dtypes[0]), normal(CODES[2], 2, seed=1).to(device, dtypes[1]))


@pytest.mark.parametrize("offset", [0.0, 0.5, 0.25])
@pytest.mark.parametrize("shift", [0, 10**6])
def test_lattice(shift, offset, device):
    """Every vector is at the same distance from up to eight codes, in several leaves and branches, and each code is there twice."""
    axis = torch.arange(11.0)
    codebook = shuffled(torch.cartesian_prod(axis, axis, axis).repeat(2, 1))
    x = codebook[:ROWS] + torch.tensor([offset, 0.5, offset])
    check((x + shift).to(device), (codebook + shift).to(device))


@pytest.mark.parametrize("dim", [3, 4])
def test_equal_distances_with_different_roundings(dim, device):
    """Around each of some points, codes whose components are those of one vector in every order and with every sign. Their distances
    to the point are equal, but not the sums in float32."""
    signs = torch.cartesian_prod(*[torch.tensor([1.0, -1.0])] * dim)
    orders = torch.tensor(list(itertools.permutations(range(dim))))
    points = 8 * torch.randint(-40, 41, (CODES[dim] // (len(signs) * len(orders)) + 1, dim), generator=torch.Generator().manual_seed(dim))
    codebook = []
    for i, point in enumerate(points):
        vector = torch.randint(2**13, 2**14, (dim,), generator=torch.Generator().manual_seed(i)) * 2.0**-14
        codebook.append(point + (vector[orders][:, None] * signs).reshape(-1, dim))
    codebook = torch.cat(codebook)
    assert len(codebook) >= CODES[dim]
    x = points.float().repeat(ROWS // len(points) + 1, 1)
    for seed in range(3):
        check(x.to(device), shuffled(codebook, seed).to(device))


@pytest.mark.parametrize("dim", [2, 4])
def test_as_far_from_all_codes(dim, device):
    """The search in the tree then stops: codes on a sphere, vectors near its center, before others and behind them."""
    codebook = normal(CODES[dim], dim)
    codebook /= codebook.norm(dim=1, keepdim=True)
    easy, hard = normal(ROWS, dim, seed=1), 1e-4 * normal(ROWS, dim, seed=2)
    check(torch.cat([easy, hard, easy]).to(device), codebook.to(device))
    check(hard.to(device), codebook.to(device))


@pytest.mark.parametrize("spread", [1.0, 1e3, 1e6])
def test_uneven_codes(spread, device):
    """Most codes near each other or equal, a few far away; vectors at the borders of boxes and outside all of them."""
    codebook = normal(CODES[3], 3)
    codebook[::5] *= spread
    codebook[1::5] = codebook[1]
    codebook[2::5, 1] = 0.0
    x = torch.cat([codebook[:500], codebook[:500].nextafter(codebook[1:501]), codebook[:ROWS] * 1.5, spread * normal(ROWS, 3, seed=1)])
    check(x.to(device), codebook.to(device))


def test_values_that_overflow_or_vanish(device):
    x, codebook = normal(ROWS, 3).to(device), normal(CODES[3], 3, seed=1).to(device)
    for factor in (1e-42, 1e-30, 1e-18, 1e18, 1e25, 1e38):
        check(x * factor, codebook * factor)
    check(x[:64].repeat(ROWS // 64, 1) * 1e25, codebook)
    x[3], x[4, 2], x[6, 1], x[8, 0] = 0, float("nan"), float("inf"), -float("inf")
    codebook[10], codebook[11, 2], codebook[12, 1], codebook[0, 0] = 0, float("nan"), float("inf"), -float("inf")
    check(x, codebook)
    codebook[40:] = float("nan")
    check(x, codebook)
    check(x, torch.full_like(codebook, float("inf")))


def test_layouts_masks_heads_and_threads_have_no_effect(device, set_threads):
    x, codebook = normal(2, 3, 24, 32).to(device), normal(CODES[3], 3, seed=1).to(device)
    mask = torch.rand(2, 24, 32, generator=torch.Generator().manual_seed(2)).to(device) < 0.7
    rows = x.movedim(1, -1).reshape(-1, 3)
    expected = genperf.nearest_code(rows, codebook, impl="reference")
    for count in (1, 2, 5):
        set_threads(count)
        assert torch.equal(genperf.nearest_code(rows, codebook), expected)
    assert torch.equal(genperf.nearest_code(x, codebook, channel_dim=1).flatten(), expected)
    assert torch.equal(genperf.nearest_code(x.contiguous(memory_format=torch.channels_last), codebook, channel_dim=1).flatten(), expected)
    for part in (rows[:200], rows[200:]):  # too few for a tree, and the others
        assert torch.equal(genperf.nearest_code(part, codebook), expected[:200] if len(part) == 200 else expected[200:])
    quantized, indices, _ = genperf.vector_quantize(x, codebook, channel_dim=1, mask=mask)
    assert torch.equal(indices.flatten(), torch.where(mask.flatten(), expected, -1))
    assert torch.equal(quantized.movedim(1, -1)[mask], codebook[expected.view_as(mask)[mask]])
