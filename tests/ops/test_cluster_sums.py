# SPDX-License-Identifier: Apache-2.0
"""The sums and distances behind k-means: exact, and independent of how the vectors are split."""

import math
from fractions import Fraction

import pytest
import torch

from genperf import testing

pytestmark = pytest.mark.compiled

ops = torch.ops.genperf


def sums(x, indices, codes, weights=None, scale=None, total=None):
    """[2, K, D + 1] of x [outer, D, inner]."""
    bound = x.double().abs().amax() * (1 if weights is None else weights.amax()) * (1 if scale is None else scale.amax())
    limits = torch.stack([bound.double(), torch.tensor(1.0).double() if weights is None else weights.amax().double()])
    return ops.cluster_sums(x, indices, codes, weights, scale, limits, total or indices.numel())


def wide_range(*shape):
    """Numbers of many magnitudes, whose sum depends on the order."""
    return torch.randn(shape) * 2.0 ** torch.randint(-12, 12, shape)


@pytest.mark.parametrize("dtype", [torch.float64, *testing.DTYPES], ids=str)
def test_sums_do_not_depend_on_the_split(dtype):
    count, dim, codes = 1000, 19, 7
    x, indices = wide_range(count, dim, 1).to(dtype), torch.randint(-1, codes, (count, 1))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for weights, scale in ((None, None), (torch.rand(count, 1, dtype=wide), None), (torch.rand(count, 1, dtype=wide),) * 2):
        whole = sums(x, indices, codes, weights, scale)
        limits = torch.tensor([float(x.double().abs().max()), 1.0], dtype=torch.float64)
        of_range = [
            ops.cluster_sums(part, index, codes, mass, factor, limits, count)
            for part, index, mass, factor in zip(
                *(t.split(137) if t is not None else [None] * 8 for t in (x, indices, weights, scale)), strict=True
            )
        ]
        again = ops.cluster_sums(x, indices, codes, weights, scale, limits, count)
        assert torch.equal(sum(of_range), again), "chunks"
        order = torch.randperm(count)
        shuffled = [None if t is None else t[order] for t in (x, indices, weights, scale)]
        assert torch.equal(ops.cluster_sums(shuffled[0], shuffled[1], codes, *shuffled[2:], limits, count), again), "order"
        image = [
            None if t is None else t.squeeze(-1).T.contiguous().unsqueeze(0) if t.dim() == 3 else t.T for t in (x, indices, weights, scale)
        ]
        image[1] = image[1].contiguous()
        assert torch.equal(ops.cluster_sums(image[0], image[1], codes, *image[2:], limits, count), again), "layout"
        valid = indices[:, 0] >= 0
        mass = torch.ones(count, dtype=torch.float64) if weights is None else weights[:, 0].double()
        factor = mass if scale is None else mass * scale[:, 0].double()
        rows = torch.cat([x[..., 0].double() * factor[:, None], mass[:, None]], 1)[valid]
        expected = torch.zeros(codes, dim + 1, dtype=torch.float64).index_add(0, indices[valid, 0], rows)
        torch.testing.assert_close(whole.sum(0), expected, rtol=1e-12, atol=1e-10)
        with testing.poisoned_memory():
            assert torch.equal(ops.cluster_sums(x, indices, codes, weights, scale, limits, count), again)


def test_sums_of_float32_are_exact():
    """All of these numbers lie on the two grids, so that only the final rounding is left."""
    x, indices = wide_range(500, 3, 1), torch.randint(4, (500, 1))
    high, low = sums(x, indices, 4)
    for code in range(4):
        for d in range(3):
            exact = sum(Fraction(float(v)) for v in x[indices[:, 0] == code, d, 0])
            assert Fraction(float(high[code, d])) + Fraction(float(low[code, d])) == exact


@pytest.mark.parametrize("dtype", [torch.float64, *testing.DTYPES], ids=str)
def test_moved_vectors_change_the_sums_as_if_added_anew(dtype):
    count, dim, codes = 600, 19, 7
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, limits = wide_range(count, dim, 1).to(dtype), torch.tensor([2.0**15, 1.0], dtype=torch.float64)
    for factors in ((None, None), (torch.rand(count, 1, dtype=wide), torch.rand(count, 1, dtype=wide))):
        for image in (False, True):
            vectors = x.squeeze(-1).T.contiguous().unsqueeze(0) if image else x
            weights, scale = (None if t is None else t.T if image else t for t in factors)
            before, found = None, torch.zeros(2, codes, dim + 1, dtype=torch.float64)
            for share in (1, 0.5, 0.01, 0):  # of the vectors that move
                indices = torch.randint(-1, codes, (1, count) if image else (count, 1))
                if before is not None:
                    indices = torch.where(torch.rand(indices.shape) < share, indices, before)
                ops.cluster_sums_add(found, vectors, indices, before, weights, scale, limits, count)
                before = indices
                assert torch.equal(found, ops.cluster_sums(vectors, indices, codes, weights, scale, limits, count))


def test_means():
    found = torch.randn(2, 5, 4, dtype=torch.float64)
    found[:, 3, 3] = 0
    totals = found.sum(0)
    for dtype in (torch.float32, torch.float64):
        otherwise = torch.randn(5, 3, dtype=dtype)
        expected = torch.where(totals[:, 3:] == 0, otherwise, (totals[:, :3] / totals[:, 3:]).to(dtype))
        assert torch.equal(ops.cluster_means(found, otherwise), expected)


def test_sums_of_extreme_values():
    for value in (0.0, 1e-45, 3e38):
        x = torch.full((8, 2, 1), value)
        found = sums(x, torch.zeros(8, 1, dtype=torch.int64), 1).sum(0)
        torch.testing.assert_close(found[0, :2], x[0, :, 0].double() * 8, rtol=1e-15, atol=0)
    x = torch.randn(10, 2, 1)
    x[3, 0] = math.nan
    x[4, 1] = math.inf
    limits = torch.tensor([4.0, 1.0], dtype=torch.float64)
    found = ops.cluster_sums(x, (torch.arange(10) % 5)[:, None], 5, None, None, limits, 10).sum(0)
    assert found[3, 0].isnan()
    assert not found[4, 1].isfinite()
    found[3, 0] = found[4, 1] = 0
    assert found.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, *testing.DTYPES], ids=str)
def test_distances(dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for dim in (1, 3, 16, 37):
        x, codebook = torch.randn(50, dim, 1).to(dtype), torch.randn(9, dim, dtype=wide)
        indices, scale = torch.randint(9, (50, 1)), torch.rand(50, 1, dtype=wide)
        scale[7] = 0
        for factor in (None, scale):
            found = ops.cluster_distances(x, codebook, indices, factor)
            rows = x.double()[..., 0] if factor is None else (x.to(wide) * factor[..., None]).double()[..., 0]
            expected = (rows - codebook.double()[indices[:, 0]]).square().sum(1)
            if factor is not None:
                expected[7] = 0  # a vector without direction
            torch.testing.assert_close(found[:, 0], expected.to(wide), rtol=1e-6, atol=0)
            for split in (x.split(7), x.split(1)):
                parts = [
                    ops.cluster_distances(part, codebook, index, None if factor is None else f)
                    for part, index, f in zip(split, indices.split(len(split[0])), scale.split(len(split[0])), strict=True)
                ]
                assert torch.equal(torch.cat(parts), found)
            image = x.squeeze(-1).T.contiguous().unsqueeze(0)
            by_channel = ops.cluster_distances(image, codebook, indices.T.contiguous(), None if factor is None else factor.T)
            assert torch.equal(by_channel.T, found)
        mask = torch.rand(50, 1) < 0.5
        masked = ops.cluster_distances(x, codebook, indices, None, mask)
        assert torch.equal(masked, torch.where(mask, ops.cluster_distances(x, codebook, indices, None), math.inf))
        norms = ops.cluster_distances(x, None, None, None)
        torch.testing.assert_close(norms[:, 0], x.double().norm(dim=1)[:, 0].to(wide), rtol=1e-6, atol=0)


@pytest.mark.once
@pytest.mark.parametrize(("index", "message"), [(9, "indices"), (-1, "every vector needs a code")])
def test_bad_indices(index, message):
    with pytest.raises(RuntimeError, match=message):
        ops.cluster_distances(torch.zeros(2, 3, 1), torch.zeros(9, 3), torch.full((2, 1), index), None)


@pytest.mark.once
def test_bad_sums():
    x, indices, limits = torch.zeros(2, 3, 1), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="sums must be"):
        ops.cluster_sums_add(torch.zeros(2, 9, 3, dtype=torch.float64), x, indices, None, None, None, limits, 2)
    found = torch.zeros(2, 9, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="indices must be in"):
        ops.cluster_sums_add(found, x, indices, indices + 9, None, None, limits, 2)
    assert not found.any()
    with pytest.raises(RuntimeError, match="otherwise must be"):
        ops.cluster_means(found, torch.zeros(9, 4))
    with pytest.raises(RuntimeError, match="mask must be"):
        ops.cluster_distances(x, torch.zeros(9, 3), indices, None, torch.ones(3, 1, dtype=torch.bool))
