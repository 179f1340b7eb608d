# SPDX-License-Identifier: Apache-2.0
import contextlib
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import genperf
from genperf import testing

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from frechet_cases import make_cases

CASES = make_cases(64)
ROUTES = ["eigen", "polar"]
IMPLS = [*ROUTES, "reference"]
FORMS = {"covariances": (False, False), "factors": (True, True), "mixed": (False, True), "mixed the other way": (True, False)}

# Of finite differences: computed zero eigenvalues are about 1e-16, so the trace of a rank-deficient matrix is accurate to 1e-8.
EPS = 1e-4


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def given(form, factor1, factor2):
    """The arguments of the two sides: the factors or their covariances, depending on the form."""
    return tuple(f if is_factor else f @ f.mT for f, is_factor in zip((factor1, factor2), FORMS[form], strict=True))


def trace(form, first, second, **options):
    first_is_factor, second_is_factor = FORMS[form]
    covs = None if first_is_factor else first, None if second_is_factor else second
    factors = {"factor1": first if first_is_factor else None, "factor2": second if second_is_factor else None}
    return genperf.trace_sqrt_product(*covs, **factors, **options)


def symmetric(t):
    return (t + t.mT) / 2


def exactly(factor1, factor2):
    return torch.linalg.svdvals(factor1.mT @ factor2).sum(-1)


def gradients(form, sides, **options):
    leaves = [t.detach().requires_grad_() for t in sides]
    value = trace(form, *leaves, **options)
    return value.detach(), torch.autograd.grad(value.sum(), leaves)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_nuclear_norm_of_the_product_of_factors(form, impl, device):
    for d in (1, 2, 33, 64, 270):
        factor1, factor2 = randn(d, 2 * d + 1).to(device), randn(d, 2 * d + 1).to(device)
        torch.testing.assert_close(trace(form, *given(form, factor1, factor2), impl=impl), exactly(factor1, factor2), rtol=1e-9, atol=0)


@pytest.mark.parametrize("impl", ROUTES)
def test_at_the_width_of_real_features(impl, device):
    factor1, factor2 = randn(512, 600).to(device), randn(512, 300).to(device)
    for form in ("mixed the other way", "factors"):
        torch.testing.assert_close(trace(form, *given(form, factor1, factor2), impl=impl), exactly(factor1, factor2), rtol=1e-9, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(40, 7, 100), (40, 100, 7), (40, 7, 9), (300, 5, 3), (40, 1, 40), (40, 1, 1), (1, 3, 2), (1, 1, 1)])
def test_any_number_of_columns(shape, form, impl, device):
    d, columns1, columns2 = shape
    factor1, factor2 = randn(d, columns1).to(device), randn(d, columns2).to(device)
    torch.testing.assert_close(trace(form, *given(form, factor1, factor2), impl=impl), exactly(factor1, factor2), rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(5, 0, 7), (5, 7, 0), (5, 0, 0), (0, 3, 3), (0, 0, 0)])
def test_rank_zero_and_no_features(shape, form, impl, device):
    d, columns1, columns2 = shape
    value, slopes = gradients(form, given(form, randn(d, columns1).to(device), randn(d, columns2).to(device)), impl=impl if d else None)
    assert value == 0
    if impl != "reference":
        assert all(slope.isfinite().all() for slope in slopes)


@pytest.mark.parametrize("impl", ROUTES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_difficult_cases(name, form, impl, device):
    """Within 1e-6 of the trace, with a finite gradient."""
    case = CASES[name]
    sides = [t.to(device) for t in given(form, case.factor1, case.factor2)]
    value, slopes = gradients(form, sides, impl=impl)
    largest = float(case.factor1.norm() * case.factor2.norm())  # the largest trace that such covariances can have
    tolerance = 1e-6 * case.trace() if case.trace() > 1e-6 * largest else 1e-8 * largest
    assert abs(float(value) - case.trace()) <= tolerance
    assert value >= 0
    assert all(slope.isfinite().all() for slope in slopes)


@pytest.mark.parametrize("impl", ROUTES)
@pytest.mark.parametrize("form", FORMS)
def test_orthogonal_ranges(form, impl, device):
    """No entry is zero, but the trace is."""
    basis = torch.linalg.qr(randn(48, 48)).Q.to(device)
    factor1, factor2 = basis[:, :20] @ randn(20, 30).to(device), basis[:, 20:] @ randn(28, 40).to(device)
    value, slopes = gradients(form, given(form, factor1, factor2), impl=impl)
    assert 0 <= value <= 1e-6 * factor1.norm() * factor2.norm()
    assert all(slope.isfinite().all() for slope in slopes)


@pytest.mark.parametrize("impl", ROUTES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scales", [(1e-120, 1e-120), (1e140, 1e140), (1e-140, 1e140), (1e-30, 1.0)])
def test_any_scale(scales, form, impl, device):
    """Scales of the covariances whose product overflows or underflows in float64, while its root does not."""
    factor1, factor2 = randn(20, 30).to(device), randn(20, 30).to(device)
    scaled = factor1 * math.sqrt(scales[0]), factor2 * math.sqrt(scales[1])
    value, slopes = gradients(form, given(form, *scaled), impl=impl)
    plain, plain_slopes = gradients(form, given(form, factor1, factor2), impl=impl)
    root = math.sqrt(scales[0]) * math.sqrt(scales[1])
    torch.testing.assert_close(value / root, plain, rtol=1e-9, atol=0)
    for slope, plain_slope, is_factor, scale in zip(slopes, plain_slopes, FORMS[form], scales, strict=True):
        torch.testing.assert_close(slope / root * (math.sqrt(scale) if is_factor else scale), plain_slope, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("impl", ROUTES)
def test_the_sides_can_be_exchanged(impl, device):
    factor1, factor2 = randn(24, 9).to(device), randn(24, 50).to(device)
    for form, other in (("covariances", "covariances"), ("factors", "factors"), ("mixed", "mixed the other way")):
        value, (of_first, of_second) = gradients(form, given(form, factor1, factor2), impl=impl)
        exchanged, (of_second_too, of_first_too) = gradients(other, given(other, factor2, factor1), impl=impl)
        torch.testing.assert_close(value, exchanged, rtol=1e-7, atol=0)
        for is_factor, pair in zip(FORMS[form], ((of_first, of_first_too), (of_second, of_second_too)), strict=True):
            if is_factor:
                torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_dtypes(dtype, form, impl, device):
    """Computed in float64 from the given values, and returned as float32."""
    sides = [t.to(dtype).to(device) for t in given(form, randn(24, 60), randn(24, 60))]
    value = trace(form, *sides, impl=impl)
    assert value.dtype == torch.float32
    wide = trace(form, *(t.double() for t in sides), impl=impl)
    assert wide.dtype == torch.float64
    assert value == wide.float()
    assert trace(form, sides[0], sides[1].double(), impl=impl).dtype == torch.float64
    if impl != "reference":
        for side, slope in zip(sides, gradients(form, sides, impl=impl)[1], strict=True):
            assert slope.dtype == dtype
            assert slope.shape == side.shape


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", FORMS)
def test_batch_equals_single_calls(form, impl, device):
    sides = given(form, randn(2, 3, 12, 20).to(device), randn(2, 3, 12, 20).to(device))
    values, slopes = gradients(form, sides, impl=impl)
    assert values.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            value, pair_slopes = gradients(form, [t[i, j] for t in sides], impl=impl)
            torch.testing.assert_close(values[i, j], value, rtol=1e-12, atol=0)
            for slope, pair_slope in zip(slopes, pair_slopes, strict=True):
                torch.testing.assert_close(slope[i, j], pair_slope, rtol=1e-9, atol=1e-10)
    empty = trace(form, *(t[:, :0] for t in sides), impl=impl, return_error=True)
    assert [t.shape for t in empty] == [(2, 0), (2, 0)]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", FORMS)
def test_layouts_agree_and_inputs_are_unchanged(form, impl, device):
    sides = given(form, randn(24, 40).to(device), randn(24, 40).to(device))
    value, slopes = gradients(form, sides, impl=impl)
    laid_out = [testing.strided(t) for t in sides]
    for name in laid_out[0]:
        copies = [t[name].clone() for t in laid_out]
        found, found_slopes = gradients(form, [t[name] for t in laid_out], impl=impl)
        torch.testing.assert_close(found, value, rtol=1e-12, atol=0)
        for slope, expected in zip(found_slopes, slopes, strict=True):
            torch.testing.assert_close(slope, expected, rtol=1e-9, atol=1e-10)
        assert all(torch.equal(t[name], copy) for t, copy in zip(laid_out, copies, strict=True))


@pytest.mark.parametrize("impl", ROUTES)
@pytest.mark.parametrize(
    ("form", "columns"),
    [(form, columns) for form in FORMS for columns in [(9, 11), (3, 8), (8, 3), (3, 2)] if form == "factors" or max(columns) > 6]
    + [("mixed", (3, 2)), ("mixed the other way", (3, 2))],
)
def test_derivatives(form, columns, impl, device):
    """In a covariance only if it is regular, so that it remains positive definite after a small change."""
    sides = given(form, *(randn(6, n).to(device) for n in columns))
    regular = [is_factor or n > 6 for n, is_factor in zip(columns, FORMS[form], strict=True)]
    leaves = [t.requires_grad_(wanted) for t, wanted in zip(sides, regular, strict=True)]

    def function(*tensors):
        return trace(form, *(t if is_factor else symmetric(t) for t, is_factor in zip(tensors, FORMS[form], strict=True)), impl=impl)

    assert torch.autograd.gradcheck(function, leaves, eps=EPS, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("impl", ROUTES)
def test_derivatives_in_features(impl, device):
    """Fewer features than dimensions, and more. The derivative also passes through the mean."""
    cov = symmetric(given("covariances", randn(7, 9), randn(7, 9))[0]).to(device)
    for n in (4, 12):
        features = randn(n, 7).to(device).requires_grad_()

        def function(x):
            return genperf.trace_sqrt_product(None, cov, factor1=(x - x.mean(0)).T / (len(x) - 1) ** 0.5, impl=impl)

        assert torch.autograd.gradcheck(function, features, eps=EPS, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("impl", ROUTES)
@pytest.mark.parametrize("form", FORMS)
def test_derivatives_agree_with_the_derivatives_of_eigenvalues(form, impl, device):
    for d, columns in ((64, 200), (270, 300)):
        sides = given(form, randn(d, columns).to(device), randn(d, columns).to(device))
        _, slopes = gradients(form, sides, impl=impl)
        _, expected = gradients(form, sides, impl="reference")
        for is_factor, slope, exact in zip(FORMS[form], slopes, expected, strict=True):
            if not is_factor:
                slope, exact = symmetric(slope), symmetric(exact)
            assert (slope - exact).norm() < 1e-7 * exact.norm()


@pytest.mark.parametrize("impl", ROUTES)
@pytest.mark.parametrize("form", ["factors", "mixed the other way"])
@pytest.mark.parametrize("name", CASES)
def test_gradient_in_a_factor_is_a_subgradient(name, form, impl, device):
    """The nuclear norm is convex, so it is never below its tangent, and its gradient is no longer than the other factor."""
    factor1, factor2 = (t.to(device) for t in (CASES[name].factor1, CASES[name].factor2))
    value, (slope, _) = gradients(form, given(form, factor1, factor2), impl=impl)
    size = float(factor1.norm() * factor2.norm()) or float(factor2.norm())
    assert torch.linalg.matrix_norm(slope, 2) <= (1 + 1e-6) * torch.linalg.matrix_norm(factor2, 2)
    torch.testing.assert_close((slope * factor1).sum(), value, rtol=1e-5, atol=1e-8 * size)
    for length in (1e-3, 1.0):
        step = randn(*factor1.shape).to(device)
        step *= length * (factor1.norm() or 1) / step.norm()
        assert exactly(factor1 + step, factor2) >= value + (slope * step).sum() - 1e-6 * size


@pytest.mark.parametrize("impl", ROUTES)
@pytest.mark.parametrize("form", FORMS)
def test_finite_gradients_of_degenerate_features(form, impl, device):
    """Where the gradients of eigenvalues are NaN: constant features, duplicated samples, equal samples, equal sides."""
    features, other = randn(40, 16).relu(), randn(40, 16)
    dead = features.clone()
    dead[:, ::3] = 0
    equal = features[:1].repeat(40, 1)
    kinds = {
        "dead": (dead, other), "dead in both": (dead, dead.flip(0) * 2),
        "few": (features[:5], other), "few of both": (features[:5], other[:4]), "one": (features[:1], other),
        "duplicated": (features[:8].repeat(5, 1), other), "equal": (equal, other), "equal in both": (equal, other[:1].repeat(40, 1)),
        "same": (features, features), "same and few": (other[:5], other[:5]),
    }  # fmt: skip
    for name, pair in kinds.items():
        factors = [((x - x.mean(0)).T / max(1, len(x) - 1) ** 0.5).to(device) for x in pair]
        value, slopes = gradients(form, given(form, *factors), impl=impl)
        torch.testing.assert_close(value, exactly(*factors), rtol=1e-6, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")
        assert all(slope.isfinite().all() for slope in slopes), name


@pytest.mark.parametrize("impl", ROUTES)
@pytest.mark.parametrize("wide", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("counts", [(20, 30), (20, 300), (64, 300)], ids=str)
def test_covariances_accumulated_in_float32(counts, wide, impl, device):
    """They have slightly negative eigenvalues, in whatever dtype they are passed."""
    features = [torch.randn(n, 64).relu() for n in counts]
    covs = [x.T.cov().to(device) for x in features]
    assert torch.linalg.eigvalsh(covs[0].double())[0] < 0
    factors = [(x.double() - x.double().mean(0)).T / (len(x) - 1) ** 0.5 for x in features]
    value, slopes = gradients("covariances", [cov.double() if wide else cov for cov in covs], impl=impl)
    assert abs(float(value / exactly(*factors)) - 1) < 1e-3
    # The gradient along an eigenvector whose eigenvalue is rounding error is at most the root of the inverse eigenvalue.
    assert all(slope.abs().max() < 1e5 for slope in slopes)


@pytest.mark.parametrize("form", FORMS)
def test_second_derivatives(form, device):
    sides = [t.to(device).requires_grad_() for t in given(form, randn(3, 5), randn(3, 5))]

    def function(*tensors):
        return trace(form, *(t if is_factor else symmetric(t) for t, is_factor in zip(tensors, FORMS[form], strict=True)))

    assert torch.autograd.gradgradcheck(function, sides, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("impl", IMPLS)
def test_frozen_inputs(impl, device):
    cov = torch.eye(4, device=device)
    assert not genperf.trace_sqrt_product(cov, cov, impl=impl).requires_grad
    leaf = cov.clone().requires_grad_()
    with torch.no_grad():
        assert not genperf.trace_sqrt_product(leaf, cov, impl=impl).requires_grad
    value = genperf.trace_sqrt_product(cov, leaf, impl=impl)
    torch.testing.assert_close(torch.autograd.grad(value, leaf)[0], cov / 2)


@pytest.mark.parametrize("impl", IMPLS)
def test_functional_gradient_and_forward_mode(impl, device):
    cov1, cov2 = (t.to(device) for t in given("covariances", randn(6, 9), randn(6, 9)))
    slope = torch.func.grad(lambda a: genperf.trace_sqrt_product(a, cov2, impl=impl))(cov1)
    direction = symmetric(randn(6, 6)).to(device)
    torch.testing.assert_close(slope, gradients("covariances", (cov1, cov2), impl="reference")[1][0], rtol=1e-6, atol=1e-8)
    if impl == "reference":
        _, tangent = torch.func.jvp(lambda a: genperf.trace_sqrt_product(a, cov2), (cov1,), (direction,))
        torch.testing.assert_close(tangent, (slope * direction).sum())


@pytest.mark.parametrize("impl", ROUTES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("form", FORMS)
def test_nonfinite_values_give_nan(form, bad, impl, device):
    for side in (0, 1):
        sides = [t.clone() for t in given(form, randn(3, 6, 9).to(device), randn(3, 6, 9).to(device))]
        sides[side][1, 2, 2] = bad
        values, _ = gradients(form, sides, impl=impl)
        assert values.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("form", FORMS)
def test_error_bound_of_the_iterations(form, device):
    for name, case in CASES.items():
        sides = [t.to(device) for t in given(form, case.factor1, case.factor2)]
        for impl in IMPLS:
            value, error = trace(form, *sides, impl=impl, return_error=True)
            assert error.shape == value.shape
            assert error.dtype == value.dtype
            assert not error.requires_grad
            if impl == "polar":
                rounding = 1e-8 * float(case.factor1.norm() * case.factor2.norm())
                assert abs(float(value) - case.trace()) <= 3 * float(error) + rounding, name
                if name in ("full rank", "n = 2 d", "identical"):
                    assert error <= 1e-9 * value, name
            else:
                assert error == 0, name
    leaves = [t.detach().requires_grad_() for t in sides]
    assert not trace(form, *leaves, impl="polar", return_error=True)[1].requires_grad


@pytest.mark.parametrize("form", FORMS)
def test_mixed_precision(form, device):
    """The value, and the gradient, whose error is first order in that of the factor."""
    for name in ("full rank", "n = 2 d", "n = d / 2", "rank 1", "identical", "tiny, 1e-20", "huge, 1e20", "dead features"):
        case = CASES[name]
        sides = [t.to(device) for t in given(form, case.factor1, case.factor2)]
        value = trace(form, *sides, impl="polar", precision="mixed")
        assert abs(float(value) / case.trace() - 1) < 1e-5, name
        with_slopes, slopes = gradients(form, sides, impl="polar", precision="mixed")
        torch.testing.assert_close(with_slopes, value, rtol=1e-5, atol=0)
        assert all(slope.isfinite().all() for slope in slopes), name
        if name in ("full rank", "n = 2 d"):
            for slope, exact in zip(slopes, gradients(form, sides, impl="eigen")[1], strict=True):
                assert (slope - exact).norm() < 1e-3 * exact.norm(), name


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_has_no_effect(impl, device):
    sides = [t.float().to(device) for t in given("covariances", randn(24, 40), randn(24, 40))]
    expected, slopes = gradients("covariances", sides, impl=impl)
    with torch.autocast(device, torch.bfloat16):
        found, found_slopes = gradients("covariances", sides, impl=impl)
    assert torch.equal(found, expected)
    assert all(map(torch.equal, found_slopes, slopes))


def test_contract(device):
    factor, other = randn(6, 9).to(device), randn(9, 6).to(device).T
    for impl in ROUTES:
        for form, needed in (("covariances", (True, True)), ("factors", (True, True)), ("mixed", (True, False)), ("mixed", (False, False))):
            testing.check_op("trace_sqrt_product", [(*given(form, factor, other), *FORMS[form], *needed, "float64", True, impl)])

    def function(first, second):
        return (
            genperf.trace_sqrt_product(first @ first.T, second @ second.T, impl="eigen"),
            genperf.trace_sqrt_product(first @ first.T, None, factor2=second, impl="polar"),
            genperf.trace_sqrt_product(None, None, factor1=first, factor2=second),
        )

    testing.check_compile(function, (randn(6, 9).to(device), randn(6, 8).to(device)), (randn(7, 12).to(device), randn(7, 10).to(device)))


GOOD = torch.eye(4)


@pytest.mark.parametrize(
    ("message", "error", "sides", "options"),
    [
        ("cov1 must be a tensor, got list", TypeError, ([[1.0]], GOOD), {}),
        ("cov2 must be float32", TypeError, (GOOD, GOOD.int()), {}),
        (r"cov2 must be square, .*got shape \[4, 3\]", ValueError, (GOOD, GOOD[:, :3]), {}),
        (r"cov1 must be square, .*got shape \[4\]", ValueError, (GOOD[0], GOOD), {}),
        (r"factor1 must have shape .*got \[4\]", ValueError, (None, GOOD), {"factor1": GOOD[0]}),
        ("factor2 must be a tensor", TypeError, (GOOD, None), {"factor2": 3.0}),
        ("factor2 must be float32", TypeError, (GOOD, None), {"factor2": GOOD.long()}),
        ("factor2 must be float32", TypeError, (GOOD, None), {"factor2": GOOD.to(torch.complex64)}),
        ("side 1 must be given either by cov1 or by factor1, got neither", ValueError, (None, GOOD), {}),
        ("side 2 must be given either by cov2 or by factor2, got both", ValueError, (GOOD, GOOD), {"factor2": GOOD}),
        (r"same d and batch, got shapes \[4, 4\] and \[5, 5\]", ValueError, (GOOD, torch.eye(5)), {}),
        ("same d and batch", ValueError, (GOOD, None), {"factor2": torch.zeros(3, 4)}),
        ("same d and batch", ValueError, (GOOD, GOOD[None]), {}),
        ("on one device", ValueError, (GOOD, GOOD.to("meta")), {}),
        ("precision must be one of float64, mixed, got 'half'", ValueError, (GOOD, GOOD), {"precision": "half"}),
        ("impl must be None or one of", ValueError, (GOOD, GOOD), {"impl": "fast"}),
        ("impl='native' cannot run here", NotImplementedError, (GOOD, GOOD), {"impl": "native"}),
    ],
)
def test_bad_input(message, error, sides, options):
    with pytest.raises(error, match="trace_sqrt_product: .*" + message):
        genperf.trace_sqrt_product(*sides, **options)


def test_polar_does_not_synchronize():
    """Fake tensors have no data, so reading a value, as a host synchronization does, raises."""
    with FakeTensorMode():
        cov, factor = torch.empty(8, 8, dtype=torch.float64), torch.empty(8, 5, dtype=torch.float64)
        cov.requires_grad_()
        factor.requires_grad_()
        forms = (
            ((cov, cov.detach()), {}),
            ((cov, None), {"factor2": factor}),
            ((None, None), {"factor1": factor, "factor2": factor}),
        )
        for precision in ("float64", "mixed"):
            for covariances, factors in forms:
                genperf.trace_sqrt_product(*covariances, **factors, precision=precision, impl="polar").backward()
        genperf.matrix_sqrt(cov, impl="polar").sum().backward()
        with pytest.raises(DataDependentOutputException):
            genperf.trace_sqrt_product(cov, None, factor2=factor, impl="eigen")


@pytest.mark.parametrize("impl", ROUTES)
def test_indefinite_covariances(impl, device):
    """The positive part is used, on either side and for any gradient; "eigen" warns if a covariance is far from positive semi-definite."""
    values = torch.cat([torch.ones(1), torch.full((200,), 4e-3), torch.tensor([-2e-2])]).double()
    indefinite, identity = torch.diag(values).to(device), torch.eye(202, dtype=torch.float64, device=device)
    expected = values.clamp(min=0).sqrt().sum()
    for sides in ((indefinite, identity), (identity, indefinite)):
        for wanted in ((), (0,), (1,)):
            inputs = [side.clone().requires_grad_(index in wanted) for index, side in enumerate(sides)]
            with pytest.warns(UserWarning, match="positive part") if impl == "eigen" else contextlib.nullcontext() as caught:
                found = genperf.trace_sqrt_product(*inputs, impl=impl)
            assert not caught or {warning.filename for warning in caught} == {__file__}
            torch.testing.assert_close(found.cpu(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", ROUTES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_covariances_rounded_to_half_precision(dtype, impl, device):
    x, y = (torch.randn(count, 128, generator=torch.Generator().manual_seed(count)).relu().T.cov() for count in (90, 400))
    exact = genperf.trace_sqrt_product(x.double(), y.double())
    found = genperf.trace_sqrt_product(x.to(dtype).to(device), y.to(device), impl=impl)
    assert abs(found.double().cpu() - exact) < 1e-2 * exact


def test_second_derivatives_of_one_tensor_on_both_sides(device):
    x = torch.randn(4, 6, dtype=torch.float64, device=device, requires_grad=True)  # the trace is |x|^2
    (slope,) = torch.autograd.grad(genperf.trace_sqrt_product(None, None, factor1=x, factor2=x), x, create_graph=True)
    torch.testing.assert_close(slope, 2 * x)
    torch.testing.assert_close(torch.autograd.grad(slope.sum(), x)[0], torch.full_like(x, 2))


def test_float32_precision_settings_are_restored(device):
    code = """
import torch, genperf
{setting}
before = torch.backends.cuda.matmul.fp32_precision
genperf.trace_sqrt_product(torch.eye(4), torch.eye(4), precision="mixed", impl="polar")
assert torch.backends.cuda.matmul.fp32_precision == before
{after}
"""
    settings = (
        {"setting": 'torch.backends.cuda.matmul.fp32_precision = "tf32"', "after": ""},
        {"setting": 'torch.set_float32_matmul_precision("medium")', "after": "torch.get_float32_matmul_precision()"},
    )
    for setting in settings:
        subprocess.run([sys.executable, "-c", code.format(**setting)], check=True)
