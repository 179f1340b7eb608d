# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from genperf.metrics.nearest_images import duplicate_rate, nearest_images


@pytest.mark.parametrize("shape", [(1, 6, 5), (3, 4, 4), (10,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_nearest_images_match_cdist(shape, dtype, device):
    samples, training = (torch.rand(n, *shape, device=device).to(dtype) for n in (23, 70))
    samples[3], samples[7] = training[61], training[0]
    found = nearest_images(samples, training)
    distances = torch.stack([(training.double() - sample.double()).flatten(1).norm(dim=1) for sample in samples])
    assert torch.equal(found.indices, distances.argmin(1))
    assert found.distances.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.distances.double(), distances.amin(1), rtol=1e-6, atol=0)
    assert (found.indices[3], found.distances[3], found.indices[7], found.distances[7]) == (61, 0, 0, 0)


def test_small_distances_of_large_values_are_accurate(device):
    training = 1000 + torch.arange(4, device=device).float().view(4, 1, 1, 1).expand(4, 1, 8, 8)
    found = nearest_images(training[2:3] + 0.125, training)
    assert (found.indices, found.distances) == (2, 0.125 * 8)


def test_many_samples_in_chunks():
    training = torch.randn(3, 2)
    samples = training.repeat(3000, 1)
    found = nearest_images(samples, training)
    assert torch.equal(found.indices, torch.arange(3).repeat(3000))
    assert not found.distances.any()


def test_duplicate_rate(device):
    training = torch.zeros(2, 1, 2, 2, device=device)
    training[1] = 1
    samples = torch.stack([training[0], training[1] + 0.25, training[1] + 0.5, training[0] - 2])  # distances 0, 0.5, 1, 4
    for threshold, rate in ((0, 0.25), (0.5, 0.5), (0.99, 0.5), (4, 1.0)):
        assert duplicate_rate(samples, training, threshold) == rate


def test_copies_have_a_high_duplicate_rate():
    training, held_out = torch.rand(50, 1, 4, 4), torch.rand(30, 1, 4, 4)
    usual = nearest_images(held_out, training).distances.quantile(0.01)
    samples = torch.cat([held_out, training[:10] + 0.001 * torch.randn(10, 1, 4, 4)])
    assert duplicate_rate(samples, training, float(usual) / 2) == 10 / 40


def test_nan_and_empty():
    samples = torch.zeros(2, 3)
    samples[1, 1] = torch.nan
    indices, distances = nearest_images(samples, torch.ones(4, 3))
    assert indices.tolist() == [0, 0]
    assert distances.isnan().tolist() == [False, True]
    assert [len(t) for t in nearest_images(torch.zeros(0, 1, 2, 2), torch.zeros(3, 1, 2, 2))] == [0, 0]


@pytest.mark.parametrize(
    ("samples", "training", "error", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(0, 3), ValueError, r"M at least 1, got \[2, 3\] and \[0, 3\]"),
        (torch.zeros(2, 3), torch.zeros(2, 4), ValueError, r"the same shape but for N and M, .* got \[2, 3\] and \[2, 4\]"),
        (torch.zeros(3), torch.zeros(3), ValueError, "the same shape but for N and M"),
        (torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(2, 3), TypeError, "nearest_images: samples must .* torch.uint8"),
        (torch.zeros(2, 3), torch.zeros(2, 3).double(), TypeError, "^nearest_images: training_images must .* got torch.float64"),
        (torch.zeros(2, 3).half(), torch.zeros(2, 3).bfloat16(), TypeError, "^nearest_images: training_images must"),
        (torch.zeros(2, 3), None, TypeError, "nearest_images: training_images must be a"),
    ],
)
def test_bad_input(samples, training, error, message):
    with pytest.raises(error, match=message):
        nearest_images(samples, training)


def test_bad_threshold():
    with pytest.raises(ValueError, match="duplicate_rate: threshold must be a finite number, at least 0, got -1"):
        duplicate_rate(torch.zeros(2, 3), torch.zeros(2, 3), -1)
