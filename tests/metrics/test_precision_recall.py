# SPDX-License-Identifier: Apache-2.0
import io

import pytest
import torch

from genperf.metrics import PrecisionRecall, precision_recall
from genperf.testing import largest_allocation


def square_distances(x, y):
    return (x.cpu().double()[:, None] - y.cpu().double()).square().sum(2)


def plain(real, fake, k):
    """The definition, with all pairwise distances in float64."""
    real_radius, fake_radius = (square_distances(x, x).fill_diagonal_(torch.inf).kthvalue(k).values for x in (real, fake))
    distance = square_distances(real, fake)
    in_real, in_fake = distance <= real_radius[:, None], distance <= fake_radius
    return [float(t.double().mean()) for t in (in_real.any(0), in_fake.any(1), in_real.double().sum(0) / k, in_real.any(1))]


def samples(kind, real, fake, dim, dtype, device):
    generator = torch.Generator().manual_seed(real)
    x, y = (torch.randn(n, dim, generator=generator) for n in (real, fake))
    if kind == "apart":
        y += 1.5
    elif kind == "tied":
        x, y = x.mul(1.5).round(), y.mul(1.5).round()
    elif kind == "copied":
        y[::2] = x[: len(y[::2])]
    elif kind == "offset":
        x, y = (t.to(dtype) + (1e6 if dtype == torch.float64 else 1e4) for t in (x, y))
    elif kind == "clusters":
        y *= 0.2
    elif kind == "collapsed":
        y[:] = x[0]
    return x.to(device, dtype), y.to(device, dtype)


KINDS = ("random", "apart", "tied", "copied", "offset", "clusters", "collapsed")


@pytest.fixture
def small_blocks(monkeypatch):
    """Small block sizes that do not divide the sizes of the tests."""
    monkeypatch.setitem(precision_recall.__globals__, "_BLOCK_ROWS", 32)
    monkeypatch.setitem(precision_recall.__globals__, "_BLOCK_COLUMNS", 50)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 3, 60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_scores_match_all_pairwise_distances(kind, k, dtype, small_blocks, device):
    real, fake = samples(kind, 131, 90, 3, dtype, device)
    found = precision_recall(real, fake, k=k)
    assert all(t.dtype == torch.float64 for t in found)
    assert [float(t) for t in found] == pytest.approx(plain(real, fake, k), abs=1e-12)


@pytest.mark.parametrize("kind", ["random", "tied", "offset"])
def test_many_dimensions(kind, device):
    real, fake = samples(kind, 300, 130, 64, torch.float32, device)
    expected = plain(real.double().sub(real.double().mean(0)), fake.double().sub(real.double().mean(0)), 3)
    assert [float(t) for t in precision_recall(real, fake)] == pytest.approx(expected, abs=1e-12)


def test_known_cases(device):
    real = torch.tensor([[0.0], [1], [2], [10]], device=device)
    fake = torch.tensor([[0.5], [3], [11], [40]], device=device)
    found = precision_recall(real, fake, k=1)  # real balls: [-1, 1], [0, 2], [1, 3], [2, 18]; fake: 2.5 wide, 2.5, 8, 29
    assert found.precision == 3 / 4
    assert found.recall == 4 / 4
    assert found.density == (2 + 2 + 1) / 4
    assert found.coverage == 4 / 4
    assert precision_recall(real, real) == (1, 1, *precision_recall(real, real)[2:])


def test_memory_is_less_than_the_distance_matrix(small_blocks):
    real, fake = samples("random", 300, 200, 2, torch.float64, "cpu")
    assert largest_allocation(lambda: precision_recall(real, fake)) < 300 * 200 * 8 / 10


def test_metric_in_batches(small_blocks, device):
    real, fake = samples("clusters", 131, 90, 3, torch.float32, device)
    metric = PrecisionRecall(k=5, reset_real=False)
    for x, is_real in ((real, True), (fake, False)):
        for batch in x.split(40):
            metric.update(batch, real=is_real)
    expected = pytest.approx(plain(real, fake, 5), abs=1e-12)
    assert [float(t) for t in metric.compute()] == expected
    file = io.BytesIO()
    torch.save(metric.state_dict(), file)
    file.seek(0)
    resumed = PrecisionRecall(k=5, device=device)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert [float(t) for t in resumed.compute()] == expected
    metric.reset()
    assert (metric.real.count, metric.fake.count) == (131, 0)
    halves = PrecisionRecall(k=5), PrecisionRecall(k=5)
    for i, half in enumerate(halves):
        half.update(real[i::2], real=True)
        half.update(fake[i::2], real=False)
    halves[0].merge(halves[1])
    assert [float(t) for t in halves[0].compute()] == expected


def test_bad_input():
    with pytest.raises(ValueError, match="k must be a whole number of at least 1, got 0"):
        PrecisionRecall(k=0)
    metric = PrecisionRecall()
    metric.update(torch.zeros(9, 2), real=True)
    metric.update(torch.zeros(3, 2), real=False)
    with pytest.raises(ValueError, match="the neighbor k=3 needs at least 4 generated samples, got 3"):
        metric.compute()
    with pytest.raises(ValueError, match="more than k=3 samples on each side, got 3 and 9"):
        precision_recall(torch.zeros(3, 2), torch.zeros(9, 2))
    with pytest.raises(ValueError, match=r"must have shape \[N, 2\]"):
        precision_recall(torch.zeros(9, 2), torch.zeros(9, 3))
    with pytest.raises(ValueError, match="NaN or infinity in 1 of 9 samples"):
        precision_recall(torch.zeros(9, 2), torch.zeros(9, 2).index_fill(0, torch.tensor([4]), torch.nan))
