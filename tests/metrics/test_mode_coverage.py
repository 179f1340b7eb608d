# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from torch.nn import functional as F

from genperf.metrics.mode_coverage import mode_coverage


def test_known_shares(device):
    found = mode_coverage(torch.tensor([0, 0, 3, 0, 1, 1, 3, 0], device=device), 5)
    assert found.shares.tolist() == [0.5, 0.25, 0, 0.25, 0]
    assert found.modes == 3
    assert float(found.kl) == pytest.approx(math.log(5) - (0.5 * math.log(2) + 2 * 0.25 * math.log(4)))
    assert (found.modes.dtype, found.shares.dtype) == (torch.int64, torch.float64)


def test_extremes_of_the_divergence(device):
    even = mode_coverage(torch.arange(1000, device=device).repeat(26), 1000)  # stacked MNIST, all modes
    assert (even.modes, float(even.kl)) == (1000, pytest.approx(0, abs=1e-12))
    assert even.kl >= 0
    collapsed = mode_coverage(torch.full((50,), 7, device=device), 1000)
    assert (collapsed.modes, float(collapsed.kl)) == (1, pytest.approx(math.log(1000)))


def test_divergence_from_expected_shares(device):
    classes = torch.randint(4, (500,), device=device)
    data = torch.tensor([10, 20, 30, 40], device=device)
    found = mode_coverage(classes, 4, expected=data)
    shares = torch.bincount(classes, minlength=4).double() / 500
    torch.testing.assert_close(found.kl, F.kl_div((data / 100).double().log(), shares, reduction="sum"))
    torch.testing.assert_close(mode_coverage(classes, 4, expected=data / 7).kl, found.kl, rtol=1e-6, atol=0)
    assert mode_coverage(torch.arange(4, device=device).repeat_interleave(data), 4, expected=data).kl < 1e-12
    assert mode_coverage(classes, 4, expected=data.clone().index_fill(0, torch.tensor([1], device=device), 0)).kl == math.inf
    assert mode_coverage(classes.clamp(min=1), 4, expected=data.index_fill(0, torch.tensor([0], device=device), 0)).kl.isfinite()


@pytest.mark.parametrize(("min_share", "modes"), [(0.0, 3), (0.01, 3), (0.011, 2), (0.29, 2), (0.31, 1), (0.69, 1), (1.0, 0)])
def test_min_share_ignores_rare_classes(min_share, modes):
    classes = torch.tensor([0] * 69 + [1] * 30 + [2])
    assert mode_coverage(classes, 4, min_share=min_share).modes == modes


def test_samples_without_class_are_ignored():
    classes = torch.tensor([0, -1, 2, 2, -1])
    for actual, expected in zip(mode_coverage(classes, 3), mode_coverage(classes[classes >= 0], 3), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_largest_score_is_the_class(dtype, device):
    scores = torch.randn(40, 6, device=device).to(dtype)
    for given in (scores, scores.softmax(1)):
        for actual, expected in zip(mode_coverage(given, 6), mode_coverage(scores.argmax(1), 6), strict=True):
            torch.testing.assert_close(actual, expected)


CLASSES = torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_classes": 0}, ValueError, "num_classes must be a whole number of at least 1, got 0"),
        ({"num_classes": 2}, ValueError, r"classes must lie between -1 and 1, got 0 \.\.\. 2"),
        ({"predictions": CLASSES - 2}, ValueError, r"between -1 and 2, got -2 \.\.\. 0"),
        ({"predictions": CLASSES.int()}, TypeError, "int64 classes or floating scores, got torch.int32"),
        ({"predictions": [0, 1]}, TypeError, "predictions must be a"),
        ({"predictions": CLASSES[None]}, ValueError, r"classes must have shape \[N\], got \[1, 3\]"),
        ({"predictions": torch.zeros(4, 2)}, ValueError, r"scores must have shape \[N, 3\], got \[4, 2\]"),
        ({"predictions": torch.full((4, 3), torch.nan)}, ValueError, "NaN in 4 of 4"),
        ({"predictions": CLASSES[:0]}, ValueError, "at least one sample of a class, got 0 samples"),
        ({"predictions": CLASSES * 0 - 1}, ValueError, "got 3 samples and none of a class"),
        ({"min_share": 1.5}, ValueError, r"min_share must lie in \[0, 1\], got 1.5"),
        ({"expected": torch.ones(2)}, ValueError, r"expected must have shape \[3\], got \[2\]"),
        ({"expected": torch.tensor([1.0, -1, 2])}, ValueError, r"expected must hold finite numbers .* got -1 \.\.\. 2"),
        ({"expected": torch.zeros(3)}, ValueError, "not all 0"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match="^mode_coverage: .*" + message):
        mode_coverage(**{"predictions": CLASSES, "num_classes": 3, **arguments})
