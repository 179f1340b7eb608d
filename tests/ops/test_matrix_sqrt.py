# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

import genperf
from genperf import testing

ROUTES = ["eigen", "polar"]
IMPLS = [*ROUTES, "reference"]


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def covariance(*shape, columns=None, device="cpu"):
    """Symmetric [..., d, d] of rank min(d, columns); by default regular with eigenvalues close to 1."""
    columns = columns or 4 * shape[-1]
    root = randn(*shape, columns).to(device) / math.sqrt(columns)
    product = root @ root.mT
    return (product + product.mT) / 2


def gradient(a, weight, **options):
    leaf = a.detach().requires_grad_()
    root = genperf.matrix_sqrt(leaf, **options)
    return root.detach(), torch.autograd.grad(root, leaf, weight)[0]


def sylvester(root, right):
    """The solution X of root X + X root = right, from the Kronecker sum."""
    identity = torch.eye(len(root), dtype=root.dtype, device=root.device)
    system = torch.kron(root, identity) + torch.kron(identity, root)
    return torch.linalg.solve(system, right.reshape(-1)).reshape(right.shape)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("d", [1, 2, 3, 33, 64, 130])
def test_square_of_the_root_is_the_matrix(d, impl, device):
    basis = torch.linalg.qr(randn(d, d)).Q.to(device)
    roots = torch.logspace(-1, 1, d, dtype=torch.float64, device=device)
    a = (basis * roots.square()) @ basis.T
    root = genperf.matrix_sqrt(a, impl=impl)
    torch.testing.assert_close(root, (basis * roots) @ basis.T, rtol=0, atol=1e-9)
    torch.testing.assert_close(root @ root, a, rtol=0, atol=1e-8)
    torch.testing.assert_close(root, root.T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(40, 7), (40, 39), (64, 1), (2, 1)], ids=str)
def test_singular(shape, impl, device):
    d, rank = shape
    basis = torch.linalg.qr(randn(d, rank)).Q.to(device)
    roots = torch.linspace(0.5, 1.5, rank, dtype=torch.float64, device=device)
    root = genperf.matrix_sqrt((basis * roots.square()) @ basis.T, impl=impl)
    torch.testing.assert_close(root, (basis * roots) @ basis.T, rtol=0, atol=2e-6)
    assert torch.linalg.eigvalsh((root + root.T) / 2)[0] > -1e-7


@pytest.mark.parametrize("impl", IMPLS)
def test_ill_conditioned(impl, device):
    """Errors stay below the root of the rounding error of the matrix, for "polar" below the root of 1e-12 of it."""
    basis = torch.linalg.qr(randn(48, 48)).Q.to(device)
    roots = torch.logspace(0, -7, 48, dtype=torch.float64, device=device)
    root = genperf.matrix_sqrt((basis * roots.square()) @ basis.T, impl=impl)
    torch.testing.assert_close(root, (basis * roots) @ basis.T, rtol=0, atol=2e-6 if impl == "polar" else 1e-7)


@pytest.mark.parametrize("impl", IMPLS)
def test_diagonal_zero_and_empty(impl, device):
    entries = torch.tensor([4.0, 0.0, 9.0, 0.25], dtype=torch.float64, device=device)
    torch.testing.assert_close(genperf.matrix_sqrt(entries.diag(), impl=impl), entries.sqrt().diag(), rtol=0, atol=1e-9)
    for shape in ((3, 3), (1, 1), (2, 5, 5), (0, 0), (0, 4, 4), (2, 0, 4, 4), (3, 0, 0)):
        root = genperf.matrix_sqrt(torch.zeros(shape, device=device), impl=impl)
        assert root.shape == shape
        assert (root == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_negative_eigenvalues_count_as_zero(impl, device):
    """Negative eigenvalues of the size that rounding produces."""
    basis = torch.linalg.qr(randn(24, 24)).Q.to(device)
    values = torch.linspace(0, 2, 24, dtype=torch.float64, device=device)
    values[:3] = torch.tensor([-1e-9, -3e-12, -1e-15])
    root = genperf.matrix_sqrt((basis * values) @ basis.T, impl=impl)
    torch.testing.assert_close(root, (basis * values.clamp(min=0).sqrt()) @ basis.T, rtol=0, atol=1e-4)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e-20, 1e20, 1e200, 1e300])
def test_any_scale(scale, impl, device):
    a = covariance(16, device=device)
    root = genperf.matrix_sqrt(a * scale, impl=impl)
    torch.testing.assert_close(root / math.sqrt(scale), genperf.matrix_sqrt(a, impl="reference"), rtol=0, atol=1e-9)
    if impl != "reference":
        weight = randn(16, 16).to(device)
        slope = gradient(a * scale, weight, impl=impl)[1] * math.sqrt(scale)
        torch.testing.assert_close(slope, gradient(a, weight, impl=impl)[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("impl", IMPLS)
def test_batch_equals_single_calls(impl, device):
    a = covariance(2, 3, 10, device=device) * torch.logspace(-8, 8, 6, dtype=torch.float64, device=device).view(2, 3, 1, 1)
    weight = randn(2, 3, 10, 10).to(device)
    roots, slopes = gradient(a, weight, impl=impl)
    for i in range(2):
        for j in range(3):
            root, slope = gradient(a[i, j], weight[i, j], impl=impl)
            torch.testing.assert_close(roots[i, j], root, rtol=0, atol=1e-9 * float(root.abs().max()))
            torch.testing.assert_close(slopes[i, j], slope, rtol=0, atol=1e-7 * float(slope.abs().max()))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_dtypes(dtype, impl, device):
    a = covariance(24, device=device).to(dtype)
    root = genperf.matrix_sqrt(a, impl=impl)
    assert root.dtype == torch.float32
    assert genperf.matrix_sqrt(a.double(), impl=impl).dtype == torch.float64
    torch.testing.assert_close(root, genperf.matrix_sqrt(a.double(), impl=impl).float(), rtol=0, atol=1e-7)
    assert gradient(a, torch.ones_like(root), impl=impl)[1].dtype == dtype


@pytest.mark.parametrize("impl", IMPLS)
def test_layouts_agree_and_the_input_is_unchanged(impl, device):
    a, weight = covariance(3, 12, device=device), randn(3, 12, 12).to(device)
    expected = gradient(a, weight, impl=impl)
    for name, laid_out in testing.strided(a).items():
        copy = laid_out.clone()
        for found, known in zip(gradient(laid_out, weight, impl=impl), expected, strict=True):
            torch.testing.assert_close(found, known, rtol=0, atol=1e-9, msg=name)
        assert torch.equal(laid_out, copy), name


@pytest.mark.parametrize("impl", ROUTES)
def test_derivative(impl, device):
    """In symmetric directions, for single matrices and a batch, including equal eigenvalues."""
    a = covariance(2, 4, device=device)
    a[1] = 2 * torch.eye(4)

    def function(x):
        return genperf.matrix_sqrt((x + x.mT) / 2, impl=impl)

    assert torch.autograd.gradcheck(function, a.requires_grad_(), eps=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", ROUTES)
@pytest.mark.parametrize("d", [1, 5, 24])
def test_derivative_solves_the_sylvester_equation(d, impl, device):
    a, weight = covariance(d, device=device), randn(d, d).to(device)
    root, slope = gradient(a, weight, impl=impl)
    torch.testing.assert_close(slope, sylvester(root, (weight + weight.T) / 2), rtol=0, atol=1e-7)


@pytest.mark.parametrize("impl", ROUTES)
def test_gradient_of_a_singular_matrix_is_finite(impl, device):
    """It is correct where it exists, for weights within the range."""
    basis = torch.linalg.qr(randn(16, 16)).Q.to(device)
    values = torch.linspace(1, 2, 16, dtype=torch.float64, device=device)
    values[:5] = 0
    a = (basis * values) @ basis.T
    for matrix in (a, torch.zeros_like(a), torch.ones_like(a), values.diag()):
        assert gradient(matrix, randn(16, 16).to(device), impl=impl)[1].isfinite().all()
    inside = basis[:, 5:] @ randn(11, 11).to(device) @ basis[:, 5:].T
    _, slope = gradient(a, inside, impl=impl)
    roots = values[5:].sqrt()
    symmetric = basis[:, 5:].T @ (inside + inside.T) @ basis[:, 5:] / 2
    expected = basis[:, 5:] @ (symmetric / (roots[:, None] + roots)) @ basis[:, 5:].T
    torch.testing.assert_close(slope, expected, rtol=0, atol=1e-5)


def test_second_derivative(device):
    a = covariance(4, device=device) + torch.arange(4.0, dtype=torch.float64, device=device).diag()

    def function(x):
        return genperf.matrix_sqrt((x + x.T) / 2)

    assert torch.autograd.gradgradcheck(function, a.requires_grad_(), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("impl", ROUTES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_values_give_nan_in_their_matrix(bad, impl, device):
    a = covariance(3, 6, device=device)
    expected = genperf.matrix_sqrt(a, impl=impl)
    a[1, 2, 2] = bad
    root, _ = gradient(a, torch.ones_like(a), impl=impl)
    assert root[1].isnan().all()
    torch.testing.assert_close(root[::2], expected[::2], rtol=0, atol=1e-9)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_has_no_effect(impl, device):
    a, weight = covariance(24, device=device).float(), torch.randn(24, 24, device=device)
    expected = gradient(a, weight, impl=impl)
    with torch.autocast(device, torch.bfloat16):
        assert all(map(torch.equal, gradient(a, weight, impl=impl), expected))


@pytest.mark.parametrize("impl", IMPLS)
def test_frozen_input_and_functional_derivatives(impl, device):
    a = covariance(5, device=device)
    assert not genperf.matrix_sqrt(a, impl=impl).requires_grad
    with torch.no_grad():
        assert not genperf.matrix_sqrt(a.clone().requires_grad_(), impl=impl).requires_grad
    slope = torch.func.grad(lambda x: genperf.matrix_sqrt(x, impl=impl).trace())(a)
    torch.testing.assert_close((slope + slope.T) / 2, torch.linalg.inv(genperf.matrix_sqrt(a)) / 2, rtol=1e-7, atol=1e-7)
    if impl == "reference":
        _, tangent = torch.func.jvp(genperf.matrix_sqrt, (a,), (a,))
        torch.testing.assert_close(tangent, genperf.matrix_sqrt(a) / 2)


@pytest.mark.parametrize("impl", ROUTES)
def test_compile(impl, device):
    """Without code generation, which would take a minute for the iterations."""
    compiled = torch.compile(lambda a: genperf.matrix_sqrt(a, impl=impl), fullgraph=True, dynamic=True, backend="aot_eager")
    for d in (5, 8):
        a, weight = covariance(d, device=device).requires_grad_(), randn(d, d).to(device)
        results = []
        for function in (compiled, lambda a: genperf.matrix_sqrt(a, impl=impl)):
            root = function(a)
            results.append([root, torch.autograd.grad(root, a, weight)[0]])
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected)


GOOD = torch.eye(4)


@pytest.mark.parametrize(
    ("message", "error", "a", "options"),
    [
        ("a must be a tensor, got float", TypeError, 1.0, {}),
        ("a must be float32", TypeError, GOOD.int(), {}),
        ("a must be float32", TypeError, GOOD.to(torch.complex64), {}),
        (r"a must be square, \[..., d, d\], got shape \[4, 3\]", ValueError, GOOD[:, :3], {}),
        (r"a must be square, .*got shape \[4\]", ValueError, GOOD[0], {}),
        ("impl must be None or one of", ValueError, GOOD, {"impl": "schur"}),
        ("impl='native' cannot run here", NotImplementedError, GOOD, {"impl": "native"}),
    ],
)
def test_bad_input(message, error, a, options):
    with pytest.raises(error, match="matrix_sqrt: .*" + message):
        genperf.matrix_sqrt(a, **options)


@pytest.mark.parametrize("impl", ROUTES)
@pytest.mark.parametrize(("size", "rank"), [(20, 5), (20, 19)])
def test_gradient_through_a_factor_of_a_singular_matrix(size, rank, impl, device):
    """The root of b b' is differentiable in b at full column rank: (b b')^(1/2) = b (b' b)^(-1/2) b'."""
    b, weight = randn(size, rank).to(device).requires_grad_(), randn(size, size).to(device)
    values, vectors = torch.linalg.eigh(b.T @ b)
    (expected,) = torch.autograd.grad((b @ (vectors * values.rsqrt()) @ vectors.T @ b.T * weight).sum(), b)
    product = b @ b.T
    root = genperf.matrix_sqrt(product, impl=impl)
    slope, found = torch.autograd.grad((root * weight).sum(), (product, b))
    torch.testing.assert_close(found, expected, rtol=0, atol=(1e-8 if impl == "eigen" else 1e-3) * float(expected.norm()))
    if impl == "eigen":
        assert slope.abs().max() < 1e3
