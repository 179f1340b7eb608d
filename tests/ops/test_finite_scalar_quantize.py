# SPDX-License-Identifier: Apache-2.0
import math

import numpy
import pytest
import torch

import genperf
from genperf import testing

pytestmark = pytest.mark.compiled

LEVELS = [[8, 5, 5, 5], [8, 6, 5], [3], [4] * 31, [2, 3, 1000, 4000]]
FORMS = [{"symmetric": symmetric, "hard_clamp": hard} for symmetric in (False, True) for hard in (False, True)]


def quantize(x, levels, impl=None, **options):
    """Outputs, and the gradient of a loss with a weight for every component."""
    x = x.detach().requires_grad_()
    quantized, indices = genperf.finite_scalar_quantize(x, levels, impl=impl, **options)
    weight = torch.linspace(-1, 1, quantized.numel(), device=x.device).reshape(quantized.shape).to(x.dtype)
    return quantized.detach(), indices, torch.autograd.grad((quantized * weight).sum(), x)[0]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_accuracy(dtype, form, device):
    for levels in LEVELS:
        x = torch.randn(777, len(levels), device=device).to(dtype)
        exact = quantize(x.double(), levels, impl="reference", **form)
        plain = quantize(x, levels, impl="reference", **form)
        for impl in (None, "reference"):
            found = quantize(x, levels, impl, **form)
            same = found[1] == exact[1]  # otherwise rounding to float32 crossed a tie
            assert same.float().mean() > 0.995
            assert torch.equal(found[0][same], exact[0][same].to(dtype))
            testing.assert_accurate("x.grad", found[2], exact[2], plain[2])
        codes = genperf.finite_scalar_decode(found[1], levels, symmetric=form["symmetric"], dtype=dtype)
        assert torch.equal(codes, found[0])


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_layouts_agree(form, device):
    levels = [8, 5, 5, 4, 6]
    x = torch.randn(192, 5, device=device)
    weight = torch.randn(192, 5, device=device)
    flat = genperf.finite_scalar_quantize(x, levels, **form)
    expected = None
    for (name, (laid_out, dim)), (upstream, _) in zip(testing.layouts(x).items(), testing.layouts(weight).values(), strict=True):
        leaf = laid_out.detach().requires_grad_()
        quantized, indices = genperf.finite_scalar_quantize(leaf, levels, channel_dim=dim, **form)
        assert quantized.shape == laid_out.shape
        assert torch.equal(quantized.movedim(dim, -1).reshape(192, 5), flat[0]), name
        assert torch.equal(indices.flatten(), flat[1]), name
        codes = genperf.finite_scalar_decode(indices, levels, symmetric=form["symmetric"], channel_dim=dim)
        assert torch.equal(codes, quantized), name
        (gradient,) = torch.autograd.grad(quantized, leaf, upstream)
        gradient = gradient.movedim(dim, -1).reshape(192, 5)
        expected = gradient if expected is None else expected
        assert torch.equal(gradient, expected), name
    image = torch.randn(2, 5, 6, 7, device=device).to(memory_format=torch.channels_last)
    assert genperf.finite_scalar_quantize(image, levels, channel_dim=1)[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("impl", [None, "reference"])
def test_ties(impl, device):
    """Ties round to even, in the symmetric form up."""
    place = torch.tensor([-1.5, -0.5, 0.5, 1.5], device=device)
    half = 4 * 1.001 / 2  # of five levels
    x = (place / half).unsqueeze(1)
    x = x[(x * torch.tensor(half, dtype=torch.float32)).flatten() == place]
    assert len(x) >= 2
    quantized, indices = genperf.finite_scalar_quantize(x, [5], hard_clamp=True, impl=impl)
    rounded = (x * half).round()
    assert torch.equal(quantized, rounded / 2)
    assert torch.equal(indices, (rounded + 2).long().flatten())
    x = torch.tensor([[-0.75], [-0.25], [0.25], [0.75]], device=device)
    quantized, indices = genperf.finite_scalar_quantize(x, [5], symmetric=True, hard_clamp=True, impl=impl)
    assert indices.tolist() == [1, 2, 3, 4]
    assert quantized.flatten().tolist() == [-0.5, 0.0, 0.5, 1.0]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("impl", [None, "reference"])
def test_special_values(impl, form, device):
    x = torch.tensor([[torch.nan, 0.3], [torch.inf, -torch.inf], [-torch.inf, torch.inf], [1e30, -1e30]], device=device)
    quantized, indices, gradient = quantize(x, [5, 2001], impl, **form)
    assert quantized[0].isnan().tolist() == [True, False]
    assert quantized[1:].tolist() == [[1, -1], [-1, 1], [1, -1]]
    assert indices[0] % 5 == 0
    assert indices[1:].tolist() == [4, 2000 * 5, 4]
    assert (gradient[0, 0] == 0) if form["hard_clamp"] else gradient[0, 0].isnan()
    assert (gradient[1:].abs() < 1e-6).all()


def test_every_code_once(device):
    """Decoding all indices and quantizing the codes returns the indices, with hard_clamp, where codes are fixed points."""
    levels = [4, 3, 5]
    indices = torch.arange(60, device=device)
    codes = genperf.finite_scalar_decode(indices, levels, symmetric=True)
    assert codes.unique(dim=0).shape == (60, 3)
    quantized, found = genperf.finite_scalar_quantize(codes, levels, symmetric=True, hard_clamp=True)
    assert torch.equal(found, indices)
    assert torch.equal(quantized, codes)
    assert (genperf.finite_scalar_decode(torch.tensor([-1], device=device), levels) == 0).all()


@pytest.mark.parametrize("levels", [[4] * 31, [2**20, 2**20, 2**20, 4], [3] * 39], ids=str)
def test_indices_beyond_float_arithmetic(levels, device):
    """Compared with Python integers."""
    x = 2 * torch.randn(200, len(levels), device=device)
    quantized, indices = genperf.finite_scalar_quantize(x, levels)
    assert indices.max() > 2**60
    for row, index in zip(quantized[:50].double().tolist(), indices.tolist(), strict=False):
        digits = [round(value * (count // 2)) + count // 2 for value, count in zip(row, levels, strict=True)]
        assert sum(digit * math.prod(levels[:d]) for d, digit in enumerate(digits)) == index
    assert torch.equal(genperf.finite_scalar_decode(indices, levels), quantized)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gradient_equals_that_of_the_bound(form, device):
    """The straight-through first derivative, which numerical differentiation cannot find, and gradgradcheck."""
    levels = [8, 5, 3]
    x = torch.randn(6, 3, dtype=torch.float64, device=device, requires_grad=True)
    for impl in (None, "reference"):
        (gradient,) = torch.autograd.grad(genperf.finite_scalar_quantize(x, levels, impl=impl, **form)[0].sum(), x)
        count = torch.tensor(levels, device=device)
        factor = 1 if form["symmetric"] else (count - 1) * 1.001 / 2 / (count // 2)
        if form["hard_clamp"]:
            shift = 0 if form["symmetric"] else torch.where(count % 2 == 0, 0.5, 0.0) / ((count - 1) * 1.001 / 2)
            expected = ((x + shift).abs() <= 1) * factor
        else:
            shift = 0 if form["symmetric"] else torch.atanh(torch.where(count % 2 == 0, 0.5, 0.0).double() / ((count - 1) * 1.001 / 2))
            expected = (1 - torch.tanh(x + shift) ** 2) * factor
        torch.testing.assert_close(gradient, expected.double(), rtol=1e-6, atol=1e-7)


def test_second_derivative(device):
    x = torch.randn(5, 2, device=device, requires_grad=True)

    def penalty(impl):
        (slope,) = torch.autograd.grad(genperf.finite_scalar_quantize(x, [8, 5], impl=impl)[0].sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), x)[0]

    assert (penalty(None) != 0).any()
    torch.testing.assert_close(penalty(None), penalty("reference"))


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("shape", [(0, 4), (3, 0, 4)])
def test_empty(shape, impl, device):
    quantized, indices, gradient = quantize(torch.empty(shape, device=device), [8, 5, 5, 5], impl)
    assert quantized.shape == gradient.shape == shape
    assert indices.shape == shape[:-1]
    assert indices.dtype == torch.int64


def test_poisoned_memory_and_saved_bytes(device):
    x = torch.randn(131, 3, device=device)
    clean = quantize(x, [8, 6, 5])
    with testing.poisoned_memory():
        for value, expected in zip(quantize(x, [8, 6, 5]), clean, strict=True):
            assert torch.equal(value, expected)
    leaf = x.requires_grad_()
    assert testing.saved_bytes(lambda: genperf.finite_scalar_quantize(leaf, [8, 6, 5])) == x.numel() * 4


@pytest.mark.once
def test_contract(device):
    x = torch.randn(2, 3, 35, device=device)
    permuted = x.transpose(1, 2).contiguous().transpose(1, 2)
    grid = [8, 6, 5]
    testing.check_op("finite_scalar_quantize", [(permuted, grid, False, False, True), (x[:0], grid, True, True, False)])
    testing.check_op("finite_scalar_quantize_backward", [(x, permuted, [8, 6, 5], False, False)])
    sizes = [(torch.randn(b, 3, h, 5, device=device),) for b, h in [(2, 4), (3, 7)]]
    testing.check_compile(lambda x: genperf.finite_scalar_quantize(x, [8, 6, 5], channel_dim=1), *sizes)


@pytest.mark.parametrize(
    ("message", "error", "arguments", "options"),
    [
        ("levels must be 1 to 64 integers", ValueError, (torch.zeros(4, 2), [8, 1]), {}),
        ("levels must be 1 to 64 integers", ValueError, (torch.zeros(4, 2), [8.0, 5]), {}),
        ("levels must be 1 to 64 integers", ValueError, (torch.zeros(4, 0), []), {}),
        ("the product of levels, the number of codes, must be at most", ValueError, (torch.zeros(4, 32), [4] * 32), {}),
        ("must have one channel for each of the 3 levels, got 2", ValueError, (torch.zeros(4, 2), [8, 5, 5]), {}),
        ("channel_dim must be a dimension of x", ValueError, (torch.zeros(4, 2), [8, 5]), {"channel_dim": 2}),
        ("x must be float32", TypeError, (torch.zeros(4, 2, dtype=torch.int64), [8, 5]), {}),
        ("impl='triton' cannot run here", NotImplementedError, (torch.zeros(4, 2), [8, 5]), {"impl": "triton"}),
    ],
)
def test_bad_input(message, error, arguments, options):
    with pytest.raises(error, match="finite_scalar_quantize: .*" + message):
        genperf.finite_scalar_quantize(*arguments, **options)


def test_bad_indices():
    with pytest.raises(TypeError, match=r"finite_scalar_decode: indices must be integers, got torch.float32"):
        genperf.finite_scalar_decode(torch.zeros(3), [8, 5])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_an_index_past_the_last_code(dtype):
    for bad in (100, 127):
        indices = torch.tensor([0, bad, 3], dtype=dtype)
        with pytest.raises(IndexError, match=rf"finite_scalar_decode: indices must be at most 99, got 0 \.\.\. {bad}"):
            genperf.finite_scalar_decode(indices, [5, 5, 4])
    assert genperf.finite_scalar_decode(torch.zeros(0, dtype=dtype), [5, 5, 4]).shape == (0, 3)


def test_decodes_narrow_integers(device):
    codes = genperf.finite_scalar_decode(torch.arange(100, device=device), [7, 5, 5])
    for dtype in (torch.int8, torch.uint8, torch.int16):
        narrow = torch.arange(100, dtype=dtype, device=device)
        assert torch.equal(genperf.finite_scalar_decode(narrow, numpy.array([7, 5, 5])), codes)


@pytest.mark.once
def test_forward_mode_is_unsupported(device):
    """It raises, since a straight-through value has no tangent."""
    x = torch.randn(20, 3, device=device)
    with pytest.raises(NotImplementedError, match="forward mode"):
        torch.func.jvp(lambda x: genperf.finite_scalar_quantize(x, [8, 5, 5])[0], (x,), (torch.ones_like(x),))
