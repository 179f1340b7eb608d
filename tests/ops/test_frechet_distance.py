# SPDX-License-Identifier: Apache-2.0
import math
import sys
from pathlib import Path

import pytest
import torch

import genperf
from genperf import testing

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from frechet_cases import make_cases

CASES = make_cases(64)
ROUTES = ["eigen", "polar"]
IMPLS = [*ROUTES, "reference"]
FORMS = {"covariances": (False, False), "factors": (True, True), "mixed": (False, True)}


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def given(form, mean1, factor1, mean2, factor2):
    """mean1, side 1, mean2, side 2; a side is the factor or its covariance, depending on the form."""
    side1, side2 = (f if is_factor else f @ f.mT for f, is_factor in zip((factor1, factor2), FORMS[form], strict=True))
    return mean1, side1, mean2, side2


def distance(form, mean1, side1, mean2, side2, **options):
    first_is_factor, second_is_factor = FORMS[form]
    factors = {"factor1": side1 if first_is_factor else None, "factor2": side2 if second_is_factor else None}
    return genperf.frechet_distance(
        mean1, None if first_is_factor else side1, mean2, None if second_is_factor else side2, **factors, **options
    )


def gradients(form, inputs, **options):
    leaves = [t.detach().requires_grad_() for t in inputs]
    value = distance(form, *leaves, **options)
    return value.detach(), torch.autograd.grad(value.sum(), leaves)


def exactly(mean1, factor1, mean2, factor2):
    squares = (mean1 - mean2).square().sum(-1) + factor1.square().sum((-2, -1)) + factor2.square().sum((-2, -1))
    return squares - 2 * torch.linalg.svdvals(factor1.mT @ factor2).sum(-1)


def gaussians(d, columns1, columns2, device):
    return [t.to(device) for t in (randn(d), randn(d, columns1), randn(d) + 0.3, 1.5 * randn(d, columns2))]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(1, 3, 4), (2, 5, 5), (33, 80, 70), (64, 20, 200), (64, 200, 9), (64, 7, 8), (270, 300, 280)], ids=str)
def test_value(shape, form, impl, device):
    moments = gaussians(*shape, device)
    expected = exactly(*moments)
    torch.testing.assert_close(distance(form, *given(form, *moments), impl=impl), expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_closed_forms(impl, device):
    """One dimension, commuting covariances, a translation, a dilation."""
    one = [torch.tensor(x, dtype=torch.float64, device=device) for x in ([1.0], [[4.0]], [3.0], [[0.25]])]
    torch.testing.assert_close(genperf.frechet_distance(*one, impl=impl).item(), (1 - 3) ** 2 + (2 - 0.5) ** 2)
    basis = torch.linalg.qr(randn(20, 20)).Q.to(device)
    roots = torch.rand(2, 20, dtype=torch.float64, device=device) + 0.1
    cov1, cov2 = (basis * roots.square()[:, None]) @ basis.T
    zero, mean = torch.zeros(20, dtype=torch.float64, device=device), randn(20).to(device)
    for found, expected in (
        (genperf.frechet_distance(zero, cov1, zero, cov2, impl=impl), (roots[0] - roots[1]).square().sum()),
        (genperf.frechet_distance(mean, cov1, zero, cov1, impl=impl), mean.square().sum()),
        (genperf.frechet_distance(zero, cov1, zero, 9 * cov1, impl=impl), 4 * cov1.trace()),
        (genperf.frechet_distance(zero, cov1, zero, 0 * cov1, impl=impl), cov1.trace()),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_agrees_with_other_packages(impl, device):
    """Those that are installed, on covariances that they support."""
    inputs = given("covariances", *gaussians(48, 200, 150, device))
    found = genperf.frechet_distance(*inputs, impl=impl)
    fid = pytest.importorskip("torchmetrics.image.fid")
    torch.testing.assert_close(found, fid._compute_fid(*inputs), rtol=1e-9, atol=0)


@pytest.mark.parametrize("impl", ROUTES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_difficult_cases(name, form, impl, device):
    """Within 1e-6 of the terms that are subtracted, never negative, with finite gradients."""
    case = CASES[name]
    value, slopes = gradients(form, [t.to(device) for t in given(form, *case)], impl=impl)
    assert abs(float(value) - case.distance()) <= 1e-6 * case.scale()
    assert value >= 0
    assert all(slope.isfinite().all() for slope in slopes)


@pytest.mark.parametrize("impl", ROUTES)
@pytest.mark.parametrize("name", [name for name in CASES if name not in ("all samples equal", "disjoint supports")])
def test_gradient_of_difficult_cases(name, impl, device):
    """In a factor, where it is unique except for null directions, given directly or through the covariance."""
    case = CASES[name]
    mean1, factor1, mean2, factor2 = (t.to(device) for t in case)
    scale = 2 * (factor1.norm() + factor2.norm())
    for form in ("mixed", "factors"):
        leaf = factor1.clone().requires_grad_()
        value = distance(form, *given(form, mean1, leaf, mean2, factor2), impl=impl)
        (slope,) = torch.autograd.grad(value, leaf)
        tolerance = 2e-3 if name == "condition 1e12" else 1e-5
        assert (slope - case.gradient().to(device)).norm() <= tolerance * scale, form


@pytest.mark.parametrize("impl", ROUTES)
@pytest.mark.parametrize("form", FORMS)
def test_identical(form, impl, device):
    """Distance and gradient are zero: for full rank, for few samples, for samples that are all equal."""
    for columns in (100, 8, 0):
        mean, factor = randn(24).to(device), randn(24, columns).to(device)
        inputs = given(form, mean, factor, mean, factor)
        value, slopes = gradients(form, inputs, impl=impl)
        assert 0 <= value <= 1e-6 * factor.square().sum()
        assert all(slope.isfinite().all() for slope in slopes)
        if columns == 100:
            assert all(slope.norm() < 1e-6 * (1 + t.norm()) for slope, t in zip(slopes, inputs, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_never_negative(impl, device):
    """For pairs so close that rounding would determine the sign."""
    for seed in range(20):
        torch.manual_seed(seed)
        mean, factor = randn(16).to(device), randn(16, 40).to(device)
        near = factor * (1 + 1e-9 * randn(16, 1).to(device))
        inputs = mean, factor @ factor.T, mean, near @ near.T
        for dtype in (torch.float64, torch.float32):
            assert 0 <= genperf.frechet_distance(*(t.to(dtype) for t in inputs), impl=impl) < 1e-6


@pytest.mark.parametrize("impl", ROUTES)
@pytest.mark.parametrize("form", FORMS)
def test_derivatives(form, impl, device):
    inputs = [t.requires_grad_() for t in given(form, *gaussians(5, 8, 9, device))]

    def function(mean1, side1, mean2, side2):
        sides = (t if is_factor else (t + t.T) / 2 for t, is_factor in zip((side1, side2), FORMS[form], strict=True))
        return distance(form, mean1, next(sides), mean2, next(sides), impl=impl)

    assert torch.autograd.gradcheck(function, inputs, eps=1e-4, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("impl", ROUTES)
@pytest.mark.parametrize("n", [4, 7, 20])
def test_derivatives_in_features(n, impl, device):
    """As in training: through the mean and through centered features, or through their covariance."""
    mean2, cov2 = randn(7).to(device), (lambda f: f @ f.T)(randn(7, 9)).to(device)
    features = randn(n, 7).to(device).requires_grad_()

    def by_factor(x):
        mean = x.mean(0)
        return genperf.frechet_distance(mean, None, mean2, cov2, factor1=(x - mean).T / (len(x) - 1) ** 0.5, impl=impl)

    def by_covariance(x):
        return genperf.frechet_distance(x.mean(0), x.T.cov(), mean2, cov2, impl=impl)

    assert torch.autograd.gradcheck(by_factor, features, eps=1e-4, atol=2e-3, rtol=1e-3)
    slopes = [torch.autograd.grad(function(features), features)[0] for function in (by_factor, by_covariance)]
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", ROUTES)
def test_training_recovers_from_collapsed_features(impl, device):
    """Training starts from nearly equal samples and reaches the reference; the gradient of eigenvalues would be lost there."""
    reference = (randn(200, 8) * torch.linspace(0.5, 2, 8, dtype=torch.float64) + 1).to(device)
    mean2, cov2 = reference.mean(0), reference.T.cov()
    features = (torch.ones(12, 8, dtype=torch.float64) + 1e-12 * randn(12, 8)).to(device).requires_grad_()
    optimizer = torch.optim.SGD([features], lr=2.0)
    for _ in range(60):
        optimizer.zero_grad()
        mean = features.mean(0)
        value = genperf.frechet_distance(mean, None, mean2, cov2, factor1=(features - mean).T / 11**0.5, impl=impl)
        value.backward()
        optimizer.step()
    assert value < 1e-3 * cov2.trace()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_dtypes(dtype, form, impl, device):
    """Returned as float32, rounded once after the subtraction in float64."""
    mean, factor = randn(24) * 30, randn(24, 60)
    near = factor * (1 + 1e-2 * randn(24, 1))
    inputs = [t.to(dtype).to(device) for t in given(form, mean, factor, mean, near)]
    value = distance(form, *inputs, impl=impl)
    assert value.dtype == torch.float32
    wide = distance(form, *(t.double() for t in inputs), impl=impl)
    assert wide.dtype == torch.float64
    torch.testing.assert_close(value, wide.float(), rtol=1e-6, atol=0)
    for i in range(4):
        assert distance(form, *inputs[:i], inputs[i].double(), *inputs[i + 1 :], impl=impl).dtype == torch.float64
    if impl != "reference":
        for t, slope in zip(inputs, gradients(form, inputs, impl=impl)[1], strict=True):
            assert (slope.dtype, slope.shape) == (dtype, t.shape)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", FORMS)
def test_batch_equals_single_calls(form, impl, device):
    moments = [t.to(device) for t in (randn(2, 3, 12), randn(2, 3, 12, 20), randn(2, 3, 12), randn(2, 3, 12, 15))]
    inputs = given(form, *moments)
    values, slopes = gradients(form, inputs, impl=impl)
    torch.testing.assert_close(values, exactly(*moments), rtol=1e-9, atol=0)
    pair, pair_slopes = gradients(form, [t[1, 2] for t in inputs], impl=impl)
    torch.testing.assert_close(values[1, 2], pair, rtol=1e-12, atol=0)
    for slope, pair_slope in zip(slopes, pair_slopes, strict=True):
        torch.testing.assert_close(slope[1, 2], pair_slope, rtol=1e-8, atol=1e-9)
    assert distance(form, *(t[:, :0] for t in inputs), impl=impl).shape == (2, 0)


@pytest.mark.parametrize("impl", IMPLS)
def test_layouts_agree_and_inputs_are_unchanged(impl, device):
    inputs = given("covariances", *gaussians(24, 40, 50, device))
    value, slopes = gradients("covariances", inputs, impl=impl)
    laid_out = [testing.strided(t) for t in inputs]
    for name in laid_out[1]:
        tensors = [t.get(name, t["spaced"]) for t in laid_out]
        copies = [t.clone() for t in tensors]
        found, found_slopes = gradients("covariances", tensors, impl=impl)
        torch.testing.assert_close(found, value, rtol=1e-10, atol=0)
        for slope, expected in zip(found_slopes, slopes, strict=True):
            torch.testing.assert_close(slope, expected, rtol=1e-8, atol=1e-9)
        assert all(map(torch.equal, tensors, copies))


@pytest.mark.parametrize("impl", ROUTES)
@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_values_give_nan(bad, which, impl, device):
    """Also for an infinite mean or covariance, since a distance of infinity would look like a result."""
    for form in FORMS:
        inputs = [t.clone() for t in given(form, *gaussians(6, 9, 9, device))]
        inputs[which].view(-1)[0] = bad
        value, _ = gradients(form, inputs, impl=impl)
        assert not value.isfinite()
        if math.isnan(bad) or which % 2 == 1:
            assert value.isnan()


def test_error_and_precision(device):
    for form in FORMS:
        inputs = given(form, *gaussians(48, 200, 150, device))
        expected = distance(form, *inputs)
        for precision, tolerance, bound in (("float64", 1e-9, 1e-9), ("mixed", 1e-4, 0.05)):
            value, error = distance(form, *inputs, impl="polar", precision=precision, return_error=True)
            torch.testing.assert_close(value, expected, rtol=tolerance, atol=0)
            assert 0 <= error <= bound * value
            assert error.shape == value.shape == ()
            assert error.dtype == value.dtype
        assert distance(form, *inputs, impl="eigen", return_error=True)[1] == 0


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_has_no_effect(impl, device):
    inputs = [t.float() for t in given("covariances", *gaussians(24, 60, 50, device))]
    expected, slopes = gradients("covariances", inputs, impl=impl)
    with torch.autocast(device, torch.bfloat16):
        found, found_slopes = gradients("covariances", inputs, impl=impl)
    assert torch.equal(found, expected)
    assert all(map(torch.equal, found_slopes, slopes))


def test_frozen_inputs(device):
    inputs = [t.requires_grad_() for t in given("covariances", *gaussians(6, 9, 9, device))]
    with torch.no_grad():
        assert not genperf.frechet_distance(*inputs).requires_grad
    for i in range(4):
        alone = [t.detach().requires_grad_(i == j) for j, t in enumerate(inputs)]
        slope = torch.autograd.grad(genperf.frechet_distance(*alone), alone[i])[0]
        torch.testing.assert_close(slope, torch.autograd.grad(genperf.frechet_distance(*inputs), inputs[i])[0], rtol=1e-7, atol=1e-9)


def test_second_derivatives(device):
    inputs = [t.requires_grad_() for t in given("factors", *gaussians(3, 5, 6, device))]
    assert torch.autograd.gradgradcheck(lambda *tensors: distance("factors", *tensors), inputs, atol=1e-4, rtol=1e-3)


def test_compile(device):
    def function(mean1, cov1, mean2, factor2):
        return (genperf.frechet_distance(mean1, cov1, mean2, None, factor2=factor2),)

    sizes = [[t.to(device) for t in given("mixed", *gaussians(d, 2 * d, d + 3, "cpu"))] for d in (5, 8)]
    testing.check_compile(function, *sizes)


MEAN, COV = torch.zeros(4), torch.eye(4)


@pytest.mark.parametrize(
    ("message", "error", "inputs", "options"),
    [
        ("mean1 must be a tensor, got list", TypeError, ([0.0] * 4, COV, MEAN, COV), {}),
        ("mean2 must be float32", TypeError, (MEAN, COV, MEAN.int(), COV), {}),
        (r"mean1 must have shape \[4\], got \[5\]", ValueError, (torch.zeros(5), COV, MEAN, COV), {}),
        (r"mean2 must have shape \[4\], got \[1, 4\]", ValueError, (MEAN, COV, MEAN[None], COV), {}),
        (r"mean1 must have shape \[2, 4\], got \[4\]", ValueError, (MEAN, COV.expand(2, 4, 4), MEAN, COV.expand(2, 4, 4)), {}),
        ("mean2 must be on the device", ValueError, (MEAN, COV, MEAN.to("meta"), COV), {}),
        ("cov1 must be a tensor", TypeError, (MEAN, 1.0, MEAN, COV), {}),
        (r"cov2 must be square, .*got shape \[4, 3\]", ValueError, (MEAN, COV, MEAN, COV[:, :3]), {}),
        ("same d and batch", ValueError, (MEAN, COV, torch.zeros(5), torch.eye(5)), {}),
        ("side 1 must be given either by cov1 or by factor1, got neither", ValueError, (MEAN, None, MEAN, COV), {}),
        ("side 2 must be given either by cov2 or by factor2, got both", ValueError, (MEAN, COV, MEAN, COV), {"factor2": COV}),
        ("precision must be one of", ValueError, (MEAN, COV, MEAN, COV), {"precision": "float16"}),
        ("impl must be None or one of", ValueError, (MEAN, COV, MEAN, COV), {"impl": "scipy"}),
        ("impl='triton' cannot run here", NotImplementedError, (MEAN, COV, MEAN, COV), {"impl": "triton"}),
    ],
)
def test_bad_input(message, error, inputs, options):
    with pytest.raises(error, match="frechet_distance: .*" + message):
        genperf.frechet_distance(*inputs, **options)
