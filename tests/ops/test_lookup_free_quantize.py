# SPDX-License-Identifier: Apache-2.0
"""lookup_free_quantize and lookup_free_entropy."""

import importlib
import math

import pytest
import torch
from torch.nn import functional as F

import genperf
from genperf import testing

pytestmark = pytest.mark.compiled


def quantize(x, impl=None, **options):
    x = x.detach().requires_grad_()
    quantized, indices = genperf.lookup_free_quantize(x, impl=impl, **options)
    weight = torch.linspace(-1, 1, quantized.numel(), device=x.device).reshape(quantized.shape).to(x.dtype)
    return quantized.detach(), indices, torch.autograd.grad((quantized * weight).sum(), x)[0]


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_accuracy(dtype, spherical, device):
    for bits in (1, 5, 18, 33, 63):
        x = torch.randn(333, bits, device=device).to(dtype)
        options = {"scale": 0.7, "spherical": spherical}
        exact, plain, found = (quantize(t, impl, **options) for t, impl in ((x.double(), "reference"), (x, "reference"), (x, None)))
        size = torch.tensor(0.7 / bits**0.5 if spherical else 0.7).to(dtype).to(device)
        assert torch.equal(found[0], torch.where(x > 0, size, -size))
        assert torch.equal(found[0], plain[0])
        assert torch.equal(found[1], exact[1])
        expected = [sum(int(value > 0) << (bits - 1 - d) for d, value in enumerate(row)) for row in x[:40].tolist()]
        assert found[1][:40].tolist() == expected
        testing.assert_accurate("x.grad", found[2], exact[2], plain[2])
        codes = genperf.lookup_free_decode(found[1], bits, **options, dtype=dtype)
        assert torch.equal(codes, found[0])
    assert (genperf.lookup_free_decode(torch.tensor([-1], device=device), 5) == 0).all()


@pytest.mark.parametrize("spherical", [False, True])
def test_layouts_agree(spherical, device):
    x, weight = torch.randn(2, 192, 5, device=device)
    flat = genperf.lookup_free_quantize(x, spherical=spherical)
    for (name, (laid_out, dim)), (upstream, _) in zip(testing.layouts(x).items(), testing.layouts(weight).values(), strict=True):
        leaf = laid_out.detach().requires_grad_()
        quantized, indices = genperf.lookup_free_quantize(leaf, spherical=spherical, channel_dim=dim)
        assert torch.equal(quantized.movedim(dim, -1).reshape(192, 5), flat[0]), name
        assert torch.equal(indices.flatten(), flat[1]), name
        assert torch.equal(genperf.lookup_free_decode(indices, 5, spherical=spherical, channel_dim=dim), quantized), name
        (gradient,) = torch.autograd.grad(quantized, leaf, upstream)
        (expected,) = torch.autograd.grad(F.normalize(leaf, dim=dim) if spherical else leaf.clone(), leaf, upstream)
        torch.testing.assert_close(gradient, expected, msg=name)


@pytest.mark.parametrize("impl", [None, "reference"])
def test_special_values(impl, device):
    x = torch.tensor([[0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-45]], device=device)
    quantized, indices, gradient = quantize(x, impl)
    assert quantized[0].tolist()[:2] + quantized[0].tolist()[3:] == [-1, -1, 1, -1, 1]
    assert quantized[0, 2].isnan()
    assert indices.item() == 0b000101
    assert gradient.isfinite().all()
    zero = torch.zeros(1, 3, device=device, requires_grad=True)
    (gradient,) = torch.autograd.grad(genperf.lookup_free_quantize(zero, spherical=True, impl=impl)[0].sum(), zero)
    torch.testing.assert_close(gradient, torch.full_like(gradient, 1e12))  # as F.normalize


def test_second_derivative(device):
    x = torch.randn(5, 4, device=device, requires_grad=True)

    def penalty(impl):
        quantized, _ = genperf.lookup_free_quantize(x, spherical=True, impl=impl)
        (slope,) = torch.autograd.grad(quantized[:, 0].sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), x)[0]

    torch.testing.assert_close(penalty(None), penalty("reference"))


def entropies(x, impl=None, **options):
    x = x.detach().requires_grad_()
    sample, codebook = genperf.lookup_free_entropy(x, impl=impl, **options)
    return sample.detach(), codebook.detach(), torch.autograd.grad(0.7 * sample - codebook, x)[0]


@pytest.mark.parametrize("group_size", [None, 3, 1])
@pytest.mark.parametrize("inv_temperature", [0.1, 2.0, 100.0])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_entropy_accuracy(dtype, inv_temperature, group_size, device, monkeypatch):
    module = importlib.import_module("genperf.ops.lookup_free_entropy")
    monkeypatch.setattr(module, "CHUNK", {"cpu": 2**12, "cuda": 2**12})  # several chunks
    x = torch.randn(500, 9, device=device).to(dtype)
    options = {"inv_temperature": inv_temperature, "group_size": group_size, "scale": 0.8}
    exact, plain = (entropies(t, "reference", **options) for t in (x.double(), x))
    for kernel in ("of small inputs", "of chunks"):
        if kernel == "of chunks":
            monkeypatch.setattr(module, "MAX_SMALL", 0)
        found = entropies(x, None, **options)
        for name, value, of_double, of_reference in zip(("sample", "codebook", "x.grad"), found, exact, plain, strict=True):
            testing.assert_accurate(f"{name}, kernel {kernel}", value, of_double, of_reference)


def test_entropy_equals_its_definition(device):
    """Compared with the softmax over all decoded codes."""
    x = torch.randn(70, 6, dtype=torch.float64, device=device)
    codes = genperf.lookup_free_decode(torch.arange(64, device=device), 6, spherical=True, scale=1.5, dtype=torch.float64)
    p = (2 * 3.0 * 1.5 * F.normalize(x, dim=-1) @ codes.T).softmax(-1)
    sample, codebook = genperf.lookup_free_entropy(x, scale=1.5, spherical=True, inv_temperature=3.0)
    torch.testing.assert_close(sample, torch.special.entr(p).sum(-1).mean())
    torch.testing.assert_close(codebook, torch.special.entr(p.mean(0)).sum())
    parts = p.mean(0).reshape(8, 8)
    _, grouped = genperf.lookup_free_entropy(x, scale=1.5, spherical=True, inv_temperature=3.0, group_size=3)
    torch.testing.assert_close(grouped, torch.special.entr(parts.sum(0)).sum() + torch.special.entr(parts.sum(1)).sum())


@pytest.mark.parametrize("group_size", [None, 2])
def test_entropy_gradient(group_size, device):
    x = torch.randn(7, 4, dtype=torch.float64, device=device, requires_grad=True)
    mask = torch.arange(7, device=device) != 2

    def function(x):
        return genperf.lookup_free_entropy(x, inv_temperature=0.5, group_size=group_size, mask=mask)

    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize("impl", [None, "reference"])
def test_entropy_of_masked_layouts(impl, device):
    x = torch.randn(96, 6, device=device)
    mask = torch.rand(96, device=device) > 0.4
    x[~mask] = torch.nan
    expected = genperf.lookup_free_entropy(x[mask], inv_temperature=1.0)
    for name, (laid_out, dim) in testing.layouts(x).items():
        shape = list(laid_out.shape)
        shape.pop(dim)
        leaf = laid_out.detach().requires_grad_()
        found = genperf.lookup_free_entropy(leaf, inv_temperature=1.0, channel_dim=dim, mask=mask.reshape(shape), impl=impl)
        torch.testing.assert_close(found, expected, msg=lambda text, name=name: f"{name}: {text}")
        (gradient,) = torch.autograd.grad(sum(found), leaf)
        assert (gradient.movedim(dim, -1).reshape(96, 6)[~mask] == 0).all(), name
    nothing = entropies(x, impl, mask=torch.zeros_like(mask))
    assert nothing[0] == nothing[1] == 0
    assert (nothing[2] == 0).all()
    assert sum(genperf.lookup_free_entropy(x[:0], impl=impl)) == 0


def test_entropy_of_certain_and_undecided_vectors(device):
    """Infinity is certain; two vectors at 2^-10 use the codes evenly; NaN propagates."""
    x = torch.tensor([[torch.inf, -torch.inf], [-50.0, 50.0]], device=device)
    sample, codebook, gradient = entropies(x)
    assert sample == 0
    torch.testing.assert_close(codebook, torch.tensor(math.log(2.0), device=device))
    assert (gradient == 0).all()
    sample, codebook = genperf.lookup_free_entropy(torch.zeros(5, 12, device=device))
    torch.testing.assert_close(torch.stack([sample, codebook]), torch.full((2,), 12 * math.log(2.0), device=device))
    x[0, 0] = torch.nan
    assert all(value.isnan() for value in genperf.lookup_free_entropy(x))


def test_entropy_under_autocast(device):
    """The matrix products stay in float32."""
    x = torch.randn(300, 8, device=device)
    plain = entropies(x, inv_temperature=1.0)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        for value, expected in zip(entropies(x, inv_temperature=1.0), plain, strict=True):
            torch.testing.assert_close(value, expected)


def test_reduced_matmul_precision_has_no_effect_on_the_entropy(device):
    x = torch.randn(500, 12, device=device)

    def results():
        leaf = x.clone().requires_grad_()
        entropies = genperf.lookup_free_entropy(leaf, inv_temperature=0.5)
        return *entropies, *torch.autograd.grad(sum(entropies), leaf)

    expected, before = results(), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        found = results()
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_entropy_memory_does_not_grow_with_positions_times_codes(device):
    if device != "cpu":
        pytest.skip("the profiler's allocation events are read on the CPU")
    x = torch.randn(8192, 16, requires_grad=True)
    assert testing.saved_bytes(lambda: genperf.lookup_free_entropy(x)) <= 4 * (x.numel() + 5 * 2**16)
    largest = testing.largest_allocation(lambda: sum(genperf.lookup_free_entropy(x)).backward())
    assert largest <= 4 * 2**20  # the positions x codes matrix: 2 GB


@pytest.mark.once
def test_contract(device):
    x = torch.randn(2, 4, 35, device=device)
    permuted = x.transpose(1, 2).contiguous().transpose(1, 2)
    mask = torch.rand(2, 35, device=device) > 0.5
    testing.check_op("lookup_free_quantize", [(permuted, 0.5, True)])
    testing.check_op("lookup_free_quantize_backward", [(x, permuted, 0.5)])
    testing.check_op("lookup_free_mass", [(permuted, mask, 3.0, 2)])
    one, mass = torch.tensor(1.0, device=device), torch.randn(2, 4, device=device)
    testing.check_op("lookup_free_mass_backward", [(one, mass, permuted, mask, 3.0, 2)])
    if device == "cpu":
        testing.check_op("small_lookup_free_entropy", [(x, mask, 3.0, 2, 1e-3, 1)])
        testing.check_op("small_lookup_free_entropy_backward", [(one, one, mass, x, mask, 3.0, 2, 1e-3, 1)])


@pytest.mark.once
def test_compiles_as_one_graph(device):
    def function(x):
        quantized, indices = genperf.lookup_free_quantize(x, spherical=True, channel_dim=1)
        entropies = genperf.lookup_free_entropy(x, inv_temperature=1.0, channel_dim=1)
        return quantized, indices, *entropies

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 4, 5, 6), (3, 4, 7, 5)):
        x = torch.randn(shape, device=device)
        results = []
        for call in (function, compiled):
            leaf = x.clone().requires_grad_()
            quantized, indices, *entropies = call(leaf)
            results.append([quantized, indices, *entropies, *torch.autograd.grad(quantized.sum() + sum(entropies), leaf)])
        torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize(
    ("message", "error", "x", "options"),
    [
        ("must be 1 to 63, got 64", ValueError, torch.zeros(2, 64), {}),
        ("scale must be positive, got 0", ValueError, torch.zeros(2, 4), {"scale": 0}),
        ("channel_dim must be a dimension", ValueError, torch.zeros(2, 4), {"channel_dim": 4}),
        ("x must be a tensor", TypeError, [1.0], {}),
        ("impl='triton' cannot run here", NotImplementedError, torch.zeros(2, 4), {"impl": "triton"}),
    ],
)
@pytest.mark.parametrize("op", [genperf.lookup_free_quantize, genperf.lookup_free_entropy])
def test_bad_input(op, message, error, x, options):
    with pytest.raises(error, match=f"{op.__name__}: .*" + message):
        op(x, **options)


def test_an_index_past_the_last_code():
    with pytest.raises(IndexError, match=r"lookup_free_decode: indices must be at most 15, got -1 \.\.\. 16"):
        genperf.lookup_free_decode(torch.tensor([16, -1]), 4)
    largest = torch.tensor([2**63 - 1])
    assert genperf.lookup_free_decode(largest, 63).tolist() == [[1.0] * 63]


@pytest.mark.parametrize(
    ("message", "error", "bits", "options"),
    [
        ("must divide the 25 bits and be at most 24, got 25", ValueError, 25, {}),
        ("must divide the 8 bits and be at most 24, got 3", ValueError, 8, {"group_size": 3}),
        ("inv_temperature must be positive, got 0", ValueError, 8, {"inv_temperature": 0}),
        ("mask must be bool", TypeError, 8, {"mask": torch.ones(2)}),
        ("mask must have the shape of x without", ValueError, 8, {"mask": torch.ones(3, dtype=torch.bool)}),
    ],
)
def test_bad_entropy_arguments(message, error, bits, options):
    with pytest.raises(error, match="lookup_free_entropy: .*" + message):
        genperf.lookup_free_entropy(torch.zeros(2, bits), **options)
