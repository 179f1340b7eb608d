# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

import genperf
from genperf import testing

pytestmark = [pytest.mark.compiled, pytest.mark.search]


def quantize(x, codebook, impl=None, **options):
    """Outputs and gradients of a loss with a weight for every output element."""
    x, codebook = x.detach().clone().requires_grad_(), codebook.detach().clone().requires_grad_()
    quantized, indices, loss = genperf.vector_quantize(x, codebook, impl=impl, **options)
    weight = torch.linspace(-1, 1, quantized.numel(), device=x.device).reshape(quantized.shape).to(x.dtype)
    grad_x, grad_codebook = torch.autograd.grad((quantized * weight).sum() + 3 * loss, (x, codebook))
    return {"quantized": quantized.detach(), "indices": indices, "loss": loss.detach(), "x.grad": grad_x, "codebook.grad": grad_codebook}


def assert_matches(x, codebook, **options):
    """The native error against float64 is at most twice that of the reference in x's dtype."""
    native = quantize(x, codebook, **options)
    plain = quantize(x, codebook, impl="reference", **options)
    exact = quantize(x.double(), codebook.double(), impl="reference", **options)
    assert torch.equal(native["indices"], exact["indices"])
    assert torch.equal(native["quantized"], plain["quantized"])
    for name in ("loss", "x.grad", "codebook.grad"):
        testing.assert_accurate(name, native[name], exact[name], plain[name])


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_accuracy(dtype, gradient, device):
    for kind in ("random", "clustered", "offset"):
        for n, k, d in [(1, 1, 1), (7, 31, 33), (1000, 7, 31), (33, 300, 7), (31, 33, 1000)]:
            x, codebook = testing.vectors(kind, n, k, d, dtype, device)
            assert_matches(x, codebook, gradient=gradient)


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_float32_codebook_with_half_input(gradient, device):
    x, _ = testing.vectors("random", 200, 1, 33, torch.bfloat16, device)
    _, codebook = testing.vectors("random", 1, 50, 33, torch.float32, device)
    result = quantize(x, codebook, gradient=gradient)
    assert torch.equal(result["quantized"], codebook[result["indices"]].bfloat16())
    assert result["codebook.grad"].dtype == torch.float32
    assert_matches(x, codebook, gradient=gradient)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_layouts_agree(gradient, masked, device):
    x, codebook = testing.vectors("random", 256, 40, 33, torch.float32, device)
    mask = torch.rand(256, device=device) > 0.3 if masked else None
    flat = quantize(x, codebook, gradient=gradient, mask=mask)
    for name, (laid_out, channel_dim) in testing.layouts(x).items():
        shape = list(laid_out.shape)
        shape.pop(channel_dim)
        found = quantize(laid_out, codebook, gradient=gradient, channel_dim=channel_dim, mask=None if mask is None else mask.reshape(shape))
        assert found["quantized"].shape == laid_out.shape
        assert torch.equal(found["quantized"].movedim(channel_dim, -1).reshape(256, 33), flat["quantized"]), name
        assert torch.equal(found["indices"].flatten(), flat["indices"]), name


@pytest.mark.parametrize("dtype", [*testing.DTYPES, torch.float64], ids=str)
def test_images_equal_their_rows(dtype, device):
    """Components are transposed in blocks, which end at the end of an image, of a vector and of the tensor."""
    for images, dim, pixels in [(5, 3, 8), (2, 20, 49), (1, 16, 70), (3, 33, 1), (1, 1, 40), (2, 8, 530)]:
        rows, codebook = testing.vectors("random", images * pixels, 11, dim, dtype, device)
        indices = torch.randint(-1, 11, (images * pixels,), device=device)
        upstream = torch.randn_like(rows)

        def image(t, size=(images, pixels)):
            return t.unflatten(0, size).movedim(-1, 1).contiguous() if t.dim() > 1 else t.view(size)

        for gradient in ("straight_through", "rotation"):
            found = []
            for laid_out, codes, grad in ((rows, indices, upstream), (image(rows), image(indices), image(upstream))):
                leaves = laid_out.clone().requires_grad_(), codebook.clone().requires_grad_()
                quantized, _, loss = genperf.vector_quantize(*leaves, indices=codes, channel_dim=1, gradient=gradient)
                found.append((quantized, loss, *torch.autograd.grad((quantized, loss), leaves, (grad, torch.ones_like(loss)))))
            (quantized, loss, grad_x, grad_codebook), images_found = found
            assert torch.equal(image(quantized), images_found[0])
            assert torch.equal(image(grad_x), images_found[2])
            assert torch.equal(grad_codebook, images_found[3])
            torch.testing.assert_close(loss, images_found[1], rtol=2e-7, atol=0)


def test_memory_format_is_kept(device):
    x = torch.randn(2, 16, 6, 5, device=device).to(memory_format=torch.channels_last)
    quantized, _, _ = genperf.vector_quantize(x, torch.randn(9, 16, device=device), channel_dim=1)
    assert quantized.is_contiguous(memory_format=torch.channels_last)


def test_quantized_is_bitwise_the_code(device):
    x, codebook = testing.vectors("offset", 100, 30, 7, torch.float32, device)
    x.requires_grad_()
    quantized, indices, _ = genperf.vector_quantize(x, codebook)
    assert torch.equal(quantized, codebook[indices])


def test_gradient_of_the_loss_is_its_derivative(device):
    """gradcheck in float64, which the compiled kernels support, with one weight at a time since the other side is detached."""
    x = torch.randn(11, 5, dtype=torch.float64, device=device, requires_grad=True)
    codebook = torch.randn(6, 5, dtype=torch.float64, device=device, requires_grad=True)

    def loss(codebook_weight, commitment_weight):
        return lambda x, codebook: genperf.vector_quantize(
            x, codebook, codebook_weight=codebook_weight, commitment_weight=commitment_weight
        )[2]

    assert torch.autograd.gradcheck(lambda x: loss(0.0, 0.7)(x, codebook.detach()), x)
    assert torch.autograd.gradcheck(lambda codebook: loss(0.7, 0.0)(x.detach(), codebook), codebook)


def test_losses_reach_only_their_side(device):
    x, codebook = testing.vectors("random", 50, 9, 4, torch.float32, device)
    x.requires_grad_()
    codebook.requires_grad_()
    only_codes = torch.autograd.grad(genperf.vector_quantize(x, codebook, commitment_weight=0.0)[2], (x, codebook))
    assert (only_codes[0] == 0).all()
    assert (only_codes[1] != 0).any()
    only_x = torch.autograd.grad(genperf.vector_quantize(x, codebook, codebook_weight=0.0)[2], (x, codebook))
    assert (only_x[0] != 0).any()
    assert (only_x[1] == 0).all()


def test_straight_through_passes_the_gradient_unchanged(device):
    x, codebook = testing.vectors("random", 50, 9, 4, torch.float32, device)
    upstream = torch.randn(50, 4, device=device)
    x.requires_grad_()
    quantized, _, _ = genperf.vector_quantize(x, codebook)
    assert torch.equal(torch.autograd.grad(quantized, x, upstream)[0], upstream)


def test_rotation_keeps_the_angle_and_scales_the_length(device):
    x = torch.randn(40, 6, device=device, dtype=torch.float64, requires_grad=True)
    codebook = torch.randn(5, 6, device=device, dtype=torch.float64)
    quantized, indices, _ = genperf.vector_quantize(x, codebook, gradient="rotation")
    (gradient,) = torch.autograd.grad(quantized, x, codebook[indices])
    # The output gradient points along the code, so the rotated one must point along x.
    ratio = codebook[indices].norm(dim=1) / x.norm(dim=1)
    expected = x.detach() / x.norm(dim=1, keepdim=True) * (codebook[indices].norm(dim=1) * ratio)[:, None]
    torch.testing.assert_close(gradient, expected)


def test_rotation_without_a_direction_is_straight_through(device):
    codebook = torch.tensor([[0.0, 0.0], [5.0, 0.0]], device=device)
    x = torch.tensor([[0.1, 0.1], [0.0, 0.0]], device=device, requires_grad=True)
    quantized, indices, _ = genperf.vector_quantize(x, codebook, gradient="rotation")
    assert (indices == 0).all()
    upstream = torch.randn(2, 2, device=device)
    assert torch.equal(torch.autograd.grad(quantized, x, upstream)[0], upstream)
    opposite = torch.tensor([[-1.0, 0.0]], device=device, requires_grad=True)
    quantized, _, _ = genperf.vector_quantize(opposite, codebook[1:], gradient="rotation")
    assert torch.equal(torch.autograd.grad(quantized, opposite, upstream[:1])[0], upstream[:1])


@pytest.mark.parametrize("impl", [None, "reference"])
def test_masked_positions_are_excluded(impl, device):
    x, codebook = testing.vectors("random", 60, 9, 4, torch.float32, device)
    mask = torch.arange(60, device=device) % 3 > 0
    x[~mask] = torch.nan
    masked = quantize(x, codebook, impl, mask=mask)
    kept = quantize(x[mask], codebook, impl)
    assert (masked["indices"][~mask] == -1).all()
    assert (masked["quantized"][~mask] == 0).all()
    assert torch.equal(masked["indices"][mask], kept["indices"])
    torch.testing.assert_close(masked["loss"], kept["loss"])
    torch.testing.assert_close(masked["codebook.grad"], kept["codebook.grad"])
    assert (masked["x.grad"][~mask] == 0).all()
    nothing = quantize(x, codebook, impl, mask=torch.zeros(60, dtype=torch.bool, device=device))
    assert nothing["loss"] == 0
    assert (nothing["codebook.grad"] == 0).all()


@pytest.mark.parametrize("impl", [None, "reference"])
def test_empty_batch(impl, device):
    result = quantize(torch.empty(0, 4, device=device), torch.randn(9, 4, device=device), impl)
    assert result["loss"] == 0
    assert result["indices"].shape == (0,)
    assert (result["codebook.grad"] == 0).all()


def test_nonfinite_values_reach_the_loss(device):
    x, codebook = testing.vectors("random", 20, 9, 4, torch.float32, device)
    x[3, 1] = torch.nan
    result = quantize(x, codebook)
    assert result["loss"].isnan()
    assert result["indices"][3] == 0
    assert result["x.grad"][3].isnan().any()


def test_unused_outputs_and_frozen_inputs(device):
    x, codebook = testing.vectors("random", 20, 9, 4, torch.float32, device)
    x.requires_grad_()
    _, _, loss = genperf.vector_quantize(x, codebook)
    loss.backward()
    assert x.grad.shape == x.shape
    frozen = genperf.vector_quantize(x.detach(), codebook)
    assert not frozen[0].requires_grad
    with torch.no_grad():
        assert not genperf.vector_quantize(x, codebook)[0].requires_grad


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_second_derivatives(gradient, device):
    """Of the loss with gradgradcheck; through the quantized vectors compared with the reference."""
    x = torch.randn(7, 3, dtype=torch.float64, device=device, requires_grad=True)
    codebook = torch.randn(4, 3, dtype=torch.float64, device=device, requires_grad=True)

    def commitment(x):
        return genperf.vector_quantize(x, codebook.detach(), codebook_weight=0.0, gradient=gradient)[2]

    assert torch.autograd.gradgradcheck(commitment, x)

    def penalty(impl):
        quantized, _, loss = genperf.vector_quantize(x, codebook, gradient=gradient, impl=impl)
        (slope,) = torch.autograd.grad(quantized.sin().sum() + loss.square(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), (x, codebook))

    for native, reference in zip(penalty(None), penalty("reference"), strict=True):
        torch.testing.assert_close(native, reference)


def test_second_derivative_of_one_side(device):
    x, codebook = testing.vectors("random", 8, 5, 4, torch.float32, device)
    codebook.requires_grad_()
    quantized, _, loss = genperf.vector_quantize(x, codebook)
    assert torch.autograd.grad(quantized.sum(), codebook, create_graph=True, allow_unused=True, retain_graph=True) == (None,)
    assert torch.autograd.grad(loss, codebook, create_graph=True)[0].requires_grad


def test_functional_gradient(device):
    x, codebook = testing.vectors("random", 8, 5, 4, torch.float32, device)
    found = torch.func.grad(lambda x: genperf.vector_quantize(x, codebook)[2])(x)
    x.requires_grad_()
    torch.testing.assert_close(found, torch.autograd.grad(genperf.vector_quantize(x, codebook)[2], x)[0])


def test_poisoned_memory(device):
    x, codebook = testing.vectors("random", 130, 17, 21, torch.float32, device)
    clean = quantize(x, codebook)
    with testing.poisoned_memory():
        for name, value in quantize(x, codebook).items():
            assert torch.equal(value, clean[name]), name


def test_no_tensor_of_size_positions_times_codes(device):
    """The largest allocation of forward, backward and statistics is a copy of x, far below N x K."""
    if device != "cpu":
        pytest.skip("the profiler's allocation events are read on the CPU")
    x = torch.randn(4096, 8, requires_grad=True)
    codebook = torch.randn(4096, 8, requires_grad=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        quantized, indices, loss = genperf.vector_quantize(x, codebook)
        (quantized.sum() + loss).backward()
        genperf.code_statistics(x, indices, 4096)
    allocated = [event.cpu_memory_usage for event in profile.events() if event.cpu_memory_usage > 0]
    assert allocated, "the profiler saw no allocation"
    assert max(allocated) <= 4 * x.numel() * x.element_size()


@pytest.mark.once
@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_contract(gradient, device):
    x, codebook = torch.randn(2, 6, 35, device=device), torch.randn(9, 6, device=device)
    permuted = x.transpose(1, 2).contiguous().transpose(1, 2)
    indices, valid = torch.randint(-1, 9, (2, 35), device=device), torch.tensor(50, device=device)
    testing.check_op("vector_quantize", [(x, codebook, indices), (permuted, codebook, indices)])
    rotation = gradient == "rotation"
    testing.check_op(
        "vector_quantize_backward",
        [
            (x, torch.tensor(2.0, device=device), permuted, codebook, indices, valid, 0.25, rotation),
            (None, None, x, codebook, indices, valid, 0.25, rotation),
        ],
    )
    sizes = [(torch.randn(b, 8, h, 3, device=device), torch.randn(k, 8, device=device)) for b, h, k in [(2, 5, 9), (3, 7, 20)]]
    testing.check_compile(lambda x, codebook: genperf.vector_quantize(x, codebook, channel_dim=1, gradient=gradient), *sizes)


GOOD = (torch.zeros(4, 3), torch.zeros(5, 3))


@pytest.mark.parametrize(
    ("message", "error", "options"),
    [
        ("gradient must be one of", ValueError, {"gradient": "reinforce"}),
        ("metric must be one of", ValueError, {"metric": "manhattan"}),
        ("mask must be bool", TypeError, {"mask": torch.ones(4)}),
        ("mask must have the shape of x without", ValueError, {"mask": torch.ones(4, 3, dtype=torch.bool)}),
        ("mask and x must be on one device", ValueError, {"mask": torch.ones(4, dtype=torch.bool, device="meta")}),
        ("mask must be a tensor", TypeError, {"mask": [True] * 4}),
        ("impl='triton' cannot run here", NotImplementedError, {"impl": "triton"}),
        ("channel_dim must be a dimension", ValueError, {"channel_dim": 5}),
    ],
)
def test_bad_input(message, error, options):
    with pytest.raises(error, match="vector_quantize: .*" + message):
        genperf.vector_quantize(*GOOD, **options)


def test_forward_mode_is_unsupported(device):
    """It raises, since a straight-through value has no tangent."""
    x, codebook = testing.vectors("random", 8, 5, 4, torch.float32, device)
    with pytest.raises(NotImplementedError, match="forward mode"):
        torch.func.jvp(lambda x: genperf.vector_quantize(x, codebook)[2], (x,), (torch.ones_like(x),))
