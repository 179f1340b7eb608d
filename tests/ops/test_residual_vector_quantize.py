# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

import genperf
from genperf import testing
from genperf.ops._layout import Positions
from genperf.ops.residual_vector_quantize import ResidualOptions, quantize_residual

pytestmark = [pytest.mark.compiled, pytest.mark.search]

GRADIENTS = ("straight_through", "rotation")


def case(n, k, d, q, dtype=torch.float32, device="cpu", kind="random"):
    """x [N, D] and codebooks [Q, K, D], each with smaller codes than the one before."""
    x, _ = testing.vectors(kind, n, 1, d, dtype, device)
    _, codes = testing.vectors("random", 1, q * k, d, torch.float32, "cpu", seed=1)
    codebooks = codes.view(q, k, d) * 0.7 ** torch.arange(q).view(-1, 1, 1)
    if kind == "offset":
        codebooks[0] += 1000
    return x, codebooks.to(x)


def chain(x, codebooks, impl="reference"):
    """The quantizers one after another, as in the docstring: the sum of the codes, and indices [N, Q]."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    residual, total, found = x.detach().to(dtype), None, []
    for codebook in codebooks.detach().to(dtype):
        index = genperf.nearest_code(residual, codebook, impl=impl)
        residual = residual - codebook[index]
        total = codebook[index] if total is None else total + codebook[index]
        found.append(index)
    return total.to(x.dtype), torch.stack(found, -1)


def plain(x, codebooks, indices, dtype, codebook_weight=1.0, commitment_weight=0.25, gradient="straight_through", per_quantizer=False):
    """Losses of given indices, and gradients of a weighted sum of all outputs by autograd, in `dtype`."""
    x, codebooks = x.detach().to(dtype).requires_grad_(), codebooks.detach().to(dtype).requires_grad_()
    valid = (indices[..., :1] >= 0).to(dtype)
    elements = (valid.sum() * x.shape[1]).clamp(min=1)
    residual, total, passed, losses = x, 0, 0, []
    for q, codebook in enumerate(codebooks):
        run = (indices[:, q, None] >= 0).to(dtype)
        code = codebook[indices[:, q].clamp(min=0)] * run
        both = ((residual.detach() - code).square() * run).sum() / elements, ((residual - code.detach()).square() * run).sum() / elements
        losses.append(codebook_weight * both[0] + commitment_weight * both[1])
        passed = passed + run * carried(residual, code.detach(), gradient)
        residual, total = residual - code.detach(), total + code.detach()
    passed = valid * (passed if per_quantizer else carried(x, total, gradient))
    losses = torch.stack(losses)
    grads = torch.autograd.grad((passed * weights_like(x)).sum() + (losses * slopes(losses)).sum(), (x, codebooks))
    return {"losses": losses.detach(), "x.grad": grads[0], "codebooks.grad": grads[1]}


def carried(x, code, gradient):
    """x after the rotation and scaling that map it to its code; the rotation is two reflections."""
    if gradient == "straight_through":
        return x
    usable = (x.detach() != 0).any(1, keepdim=True) & (code != 0).any(1, keepdim=True)
    source, target = torch.where(usable, x.detach(), 1), torch.where(usable, code, 1)
    a, b = source / source.norm(dim=1, keepdim=True), target / target.norm(dim=1, keepdim=True)
    half = torch.nn.functional.normalize(a + b, dim=1)
    turned = x - 2 * half * (half * x).sum(1, keepdim=True) + 2 * b * (a * x).sum(1, keepdim=True)
    return torch.where(usable, turned * target.norm(dim=1, keepdim=True) / source.norm(dim=1, keepdim=True), x)


def weights_like(x):
    return torch.linspace(-1, 1, x.numel(), device=x.device).reshape(x.shape).to(x.dtype)


def slopes(losses):
    return torch.linspace(1, 3, len(losses), device=losses.device).to(losses.dtype)


def quantize(x, codebooks, *, per_quantizer=False, gradient="straight_through", impl=None, channel_dim=-1, mask=None, **options):
    """The op, or with per_quantizer its variant for layers that passes the gradient through each quantizer."""
    if not per_quantizer:
        return genperf.residual_vector_quantize(x, codebooks, gradient=gradient, impl=impl, channel_dim=channel_dim, mask=mask, **options)
    positions = Positions(x, channel_dim % x.dim())
    weights = options.pop("codebook_weight", 1.0), options.pop("commitment_weight", 0.25)
    residual_options = ResidualOptions(*weights, gradient == "rotation", per_quantizer=True)
    metric, num_quantizers = options.pop("metric", "euclidean"), options.pop("num_quantizers", None)
    assert not options
    valid = positions.view_mask(mask)
    found = quantize_residual(positions.vectors, codebooks, valid, num_quantizers, metric, residual_options, impl or "native")
    return positions.restore(found[0]), positions.restore_indices(found[1], len(codebooks)), found[2]


def run(x, codebooks, **options):
    x, codebooks = x.detach().clone().requires_grad_(), codebooks.detach().clone().requires_grad_()
    quantized, indices, losses = quantize(x, codebooks, **options)
    grads = torch.autograd.grad((quantized * weights_like(x)).sum() + (losses * slopes(losses)).sum(), (x, codebooks))
    return {"quantized": quantized.detach(), "indices": indices, "losses": losses.detach(), "x.grad": grads[0], "codebooks.grad": grads[1]}


@pytest.mark.parametrize("per_quantizer", [False, True])
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_accuracy(dtype, gradient, per_quantizer, device):
    for kind, n, k, d, q in [
        ("random", 1, 1, 2, 1),
        ("random", 70, 31, 33, 3),
        ("offset", 300, 40, 16, 4),
        ("clustered", 33, 7, 130, 2),
    ]:
        x, codebooks = case(n, k, d, q, dtype, device, kind)
        found = run(x, codebooks, gradient=gradient, per_quantizer=per_quantizer)
        total, indices = chain(x, codebooks)
        assert torch.equal(found["indices"], indices)
        assert torch.equal(found["quantized"], total)
        exact = plain(x, codebooks, indices, torch.float64, gradient=gradient, per_quantizer=per_quantizer)
        usual = plain(x, codebooks, indices, torch.float32, gradient=gradient, per_quantizer=per_quantizer)
        for name, value in exact.items():
            expected = usual[name] if name == "losses" else usual[name].to(dtype)
            testing.assert_accurate(name, found[name], value, expected)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("per_quantizer", [False, True])
def test_implementations_agree_in_float64(gradient, per_quantizer, device):
    x, codebooks = case(65, 20, 5, 4, torch.float64, device)
    mask = torch.arange(65, device=device) % 4 > 0
    for options in ({}, {"mask": mask, "num_quantizers": 2}, {"num_quantizers": torch.tensor(3, device=device), "metric": "cosine"}):
        options |= {"gradient": gradient, "per_quantizer": per_quantizer, "codebook_weight": 0.5}
        native, reference = run(x, codebooks, **options), run(x, codebooks, impl="reference", **options)
        for name, value in native.items():
            torch.testing.assert_close(value, reference[name])


def test_gradient_of_the_losses_is_their_derivative(device):
    """gradcheck in float64, one loss term at a time, since each detaches one of its sides."""
    x, codebooks = case(9, 5, 3, 3, torch.float64, device)
    x.requires_grad_()
    codebooks.requires_grad_()

    def losses(x, codebooks, **weights):
        return genperf.residual_vector_quantize(x, codebooks, **weights)[2]

    assert torch.autograd.gradcheck(lambda x: losses(x, codebooks.detach(), codebook_weight=0.0, commitment_weight=0.7), x)
    # Only the loss of the last quantizer, for which earlier residuals are constants.
    last = codebooks[2:].detach().requires_grad_()
    fixed = codebooks[:2].detach()
    assert torch.autograd.gradcheck(
        lambda last: losses(x.detach(), torch.cat([fixed, last]), codebook_weight=0.7, commitment_weight=0.0)[2], last
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_layouts_agree(gradient, masked, device):
    x, codebooks = case(256, 40, 33, 3, device=device)
    mask = torch.rand(256, device=device) > 0.3 if masked else None
    x.requires_grad_()
    flat = genperf.residual_vector_quantize(x, codebooks, gradient=gradient, mask=mask)
    upstream = torch.randn(256, 33, device=device)
    (flat_grad,) = torch.autograd.grad((flat[0] * upstream).sum() + flat[2].sum(), x)
    statistics = genperf.residual_code_statistics(x, codebooks, flat[1])
    for name, (laid_out, channel_dim) in testing.layouts(x.detach()).items():
        laid_out.requires_grad_()
        shape = list(laid_out.shape)
        shape.pop(channel_dim)
        found = genperf.residual_vector_quantize(
            laid_out, codebooks, gradient=gradient, channel_dim=channel_dim, mask=None if mask is None else mask.reshape(shape)
        )
        assert list(found[1].shape) == [*shape, 3]
        assert torch.equal(found[1].reshape(256, 3), flat[1]), name
        assert torch.equal(found[0].movedim(channel_dim, -1).reshape(256, 33), flat[0]), name
        assert torch.equal(found[2], flat[2]), name
        given = testing.layouts(upstream)[name][0]
        (grad,) = torch.autograd.grad((found[0] * given).sum() + found[2].sum(), laid_out)
        torch.testing.assert_close(grad.movedim(channel_dim, -1).reshape(256, 33), flat_grad)
        for found_statistics, flat_statistics in zip(
            genperf.residual_code_statistics(laid_out, codebooks, found[1], channel_dim=channel_dim), statistics, strict=True
        ):
            assert torch.equal(found_statistics, flat_statistics), name


def test_straight_through_passes_the_gradient_once(device):
    x, codebooks = case(50, 9, 4, 3, device=device)
    upstream = torch.randn(50, 4, device=device)
    x.requires_grad_()
    quantized, _, _ = genperf.residual_vector_quantize(x, codebooks)
    assert torch.equal(torch.autograd.grad(quantized, x, upstream)[0], upstream)
    quantized, _, _ = quantize(x, codebooks, per_quantizer=True)
    assert torch.equal(torch.autograd.grad(quantized, x, upstream)[0], 3 * upstream)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_per_quantizer_is_a_chain_of_quantizers(gradient, device):
    x, codebooks = case(60, 9, 6, 3, torch.float64, device)
    x.requires_grad_()
    residual, total, losses = x, 0, []
    for codebook in codebooks:
        quantized, _, loss = genperf.vector_quantize(residual, codebook, gradient=gradient)
        residual, total = residual - quantized.detach(), total + quantized
        losses.append(loss)
    upstream = torch.randn_like(total)
    (expected,) = torch.autograd.grad((total * upstream).sum() + sum(losses), x)
    quantized, _, found = quantize(x, codebooks, gradient=gradient, per_quantizer=True)
    torch.testing.assert_close(found, torch.stack(losses))
    torch.testing.assert_close(torch.autograd.grad((quantized * upstream).sum() + found.sum(), x)[0], expected)


@pytest.mark.parametrize("impl", [None, "reference"])
def test_fewer_quantizers_than_codebooks(impl, device):
    x, codebooks = case(80, 20, 7, 5, device=device)
    for options in ({"num_quantizers": 2}, {"num_quantizers": torch.tensor(2, device=device)}):
        found = run(x, codebooks, impl=impl, **options)
        short = run(x, codebooks[:2], impl=impl)
        assert (found["indices"][:, 2:] == -1).all()
        assert (found["losses"][2:] == 0).all()
        assert (found["codebooks.grad"][2:] == 0).all()
        assert torch.equal(found["indices"][:, :2], short["indices"])
        for name in ("quantized", "losses"):
            assert torch.equal(found[name][:2], short[name][:2])
    assert torch.equal(genperf.residual_vector_quantize(x, codebooks)[1][:, :2], short["indices"])


def test_codebooks_too_large_to_stay_packed(device):
    """One quantizer after another over all positions, instead of all quantizers block by block."""
    x, codebooks = case(150, 6000, 256, 5, device=device)
    mask = torch.arange(150, device=device) % 7 > 0
    found = genperf.residual_vector_quantize(x, codebooks, mask=mask)
    total, indices = chain(x[mask], codebooks, impl=None)
    assert torch.equal(found[1][mask], indices)
    assert torch.equal(found[0][mask], total)
    assert (found[1][~mask] == -1).all()
    parts = [genperf.residual_vector_quantize(x[i : i + 50], codebooks, mask=mask[i : i + 50])[1] for i in (0, 50, 100)]
    assert torch.equal(torch.cat(parts), found[1])


def test_shared_codebook(device):
    x, codebooks = case(70, 30, 8, 1, device=device)
    shared = codebooks[0].requires_grad_()
    expanded = shared.expand(4, -1, -1)
    total, indices = chain(x, expanded)
    quantized, found, losses = genperf.residual_vector_quantize(x, expanded)
    assert torch.equal(found, indices)
    assert torch.equal(quantized, total)
    (grad,) = torch.autograd.grad(losses.sum(), shared)
    copies = expanded.detach().clone().requires_grad_()
    (separate,) = torch.autograd.grad(genperf.residual_vector_quantize(x, copies)[2].sum(), copies)
    torch.testing.assert_close(grad, separate.sum(0))


@pytest.mark.parametrize("impl", [None, "reference"])
def test_masked_positions_are_excluded(impl, device):
    x, codebooks = case(60, 9, 4, 3, device=device)
    mask = torch.arange(60, device=device) % 3 > 0
    x[~mask] = torch.nan
    masked = run(x, codebooks, mask=mask, impl=impl)
    kept = run(x[mask], codebooks, impl=impl)
    assert (masked["indices"][~mask] == -1).all()
    assert (masked["quantized"][~mask] == 0).all()
    assert (masked["x.grad"][~mask] == 0).all()
    assert torch.equal(masked["indices"][mask], kept["indices"])
    torch.testing.assert_close(masked["losses"], kept["losses"])
    torch.testing.assert_close(masked["codebooks.grad"], kept["codebooks.grad"])
    nothing = run(x, codebooks, mask=torch.zeros_like(mask), impl=impl)
    assert (nothing["losses"] == 0).all()
    assert (nothing["codebooks.grad"] == 0).all()


@pytest.mark.parametrize("impl", [None, "reference"])
def test_empty_batch(impl, device):
    result = run(torch.empty(0, 4, device=device), torch.randn(3, 9, 4, device=device), impl=impl)
    assert (result["losses"] == 0).all()
    assert result["indices"].shape == (0, 3)
    assert (result["codebooks.grad"] == 0).all()


def test_nonfinite_values_reach_the_losses(device):
    x, codebooks = case(20, 9, 4, 3, device=device)
    x[3, 1] = torch.nan
    result = run(x, codebooks)
    assert result["losses"].isnan().all()
    assert (result["indices"][3] == 0).all()
    assert result["x.grad"][3].isnan().any()


@pytest.mark.parametrize("bad", [-2, 5])
def test_statistics_of_an_index_outside_of_the_codebook(bad):
    x, codebooks = torch.randn(7, 3), torch.randn(2, 5, 3)
    with pytest.raises(IndexError, match="residual_code_statistics: indices must lie between -1 and 4"):
        genperf.residual_code_statistics(x, codebooks, torch.full((7, 2), bad))


@pytest.mark.parametrize("impl", [None, "reference"])
def test_statistics_of_every_quantizer(impl, device):
    x, codebooks = case(300, 12, 7, 3, torch.bfloat16, device)
    mask = torch.rand(300, device=device) > 0.2
    _, indices, _ = genperf.residual_vector_quantize(x, codebooks, mask=mask)
    counts, sums = genperf.residual_code_statistics(x, codebooks, indices, impl=impl)
    residual = x.float()
    for q in range(3):
        expected = genperf.code_statistics(residual, indices[:, q], 12)
        assert torch.equal(counts[q], expected[0])
        assert torch.equal(sums[q], expected[1])
        residual = residual - codebooks[q].float()[indices[:, q].clamp(min=0)]


def test_threads_have_no_effect(device, set_threads):
    if device != "cpu":
        pytest.skip("threads of the CPU")
    x, codebooks = case(700, 60, 24, 3)
    results = []
    for number in (1, 2):
        set_threads(number)
        results.append(run(x, codebooks, gradient="rotation"))
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


def test_second_derivatives(device):
    x, codebooks = case(7, 4, 3, 2, torch.float64, device)
    x.requires_grad_()
    codebooks.requires_grad_()

    def penalty(impl, gradient):
        quantized, _, losses = genperf.residual_vector_quantize(x, codebooks, gradient=gradient, impl=impl)
        (slope,) = torch.autograd.grad(quantized.sin().sum() + losses.square().sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), (x, codebooks))

    for gradient in GRADIENTS:
        for native, reference in zip(penalty(None, gradient), penalty("reference", gradient), strict=True):
            torch.testing.assert_close(native, reference)


def test_poisoned_memory(device):
    x, codebooks = case(130, 17, 21, 3, device=device)
    options = {"mask": torch.arange(130, device=device) % 3 > 0, "num_quantizers": torch.tensor(2, device=device)}
    clean = run(x, codebooks, **options)
    with testing.poisoned_memory():
        for name, value in run(x, codebooks, **options).items():
            assert torch.equal(value, clean[name]), name


def test_residuals_are_not_stored(device):
    """The largest allocation is a quarter of positions x Q x D."""
    if device != "cpu":
        pytest.skip("the profiler's allocation events are read on the CPU")
    x, codebooks = case(4096, 64, 64, 8)
    x.requires_grad_()
    codebooks.requires_grad_()

    def step():
        quantized, indices, losses = genperf.residual_vector_quantize(x, codebooks)
        (quantized.sum() + losses.sum()).backward()
        genperf.residual_code_statistics(x, codebooks, indices)

    assert testing.largest_allocation(step) <= 2 * x.numel() * x.element_size()


@pytest.mark.once
def test_contract(device):
    x, codebooks = torch.randn(2, 6, 35, device=device), torch.randn(3, 9, 6, device=device)
    permuted = x.transpose(1, 2).contiguous().transpose(1, 2)
    mask, num_quantizers = torch.rand(2, 35, device=device) > 0.5, torch.tensor(2, device=device)
    testing.check_op("residual_vector_quantize", [(x, codebooks, None, None, False), (permuted, codebooks, mask, num_quantizers, True)])
    _, indices, mse, valid = torch.ops.genperf.residual_vector_quantize(x, codebooks, mask, num_quantizers, False)
    testing.check_op(
        "residual_vector_quantize_backward",
        [
            (x, torch.ones_like(mse), permuted, codebooks, indices, valid, 0.25, True, False),
            (None, None, x, codebooks, indices, valid, 0.25, False, True),
        ],
    )
    testing.check_op("residual_code_statistics", [(x, codebooks, indices, False), (permuted, codebooks, indices, True)])


@pytest.mark.once
def test_compile(device):
    sizes = [(torch.randn(b, 8, h, 3, device=device), torch.randn(q, k, 8, device=device)) for b, h, q, k in [(2, 5, 3, 9), (3, 7, 4, 20)]]
    testing.check_compile(lambda x, codebooks: genperf.residual_vector_quantize(x, codebooks, channel_dim=1, gradient="rotation"), *sizes)


@pytest.mark.parametrize(
    ("message", "error", "options"),
    [
        ("codebooks must have shape", ValueError, {"codebooks": torch.zeros(5, 3)}),
        ("codebooks must be a tensor", TypeError, {"codebooks": [torch.zeros(5, 3)]}),
        ("as long as a code", ValueError, {"codebooks": torch.zeros(2, 5, 4)}),
        ("gradient must be one of", ValueError, {"gradient": "reinforce"}),
        ("metric must be one of", ValueError, {"metric": "manhattan"}),
        ("mask must be bool", TypeError, {"mask": torch.ones(4)}),
        ("mask must have the shape of x without", ValueError, {"mask": torch.ones(4, 3, dtype=torch.bool)}),
        ("num_quantizers must lie in 1 ... 2", ValueError, {"num_quantizers": 3}),
        ("num_quantizers must lie in 1 ... 2", ValueError, {"num_quantizers": 0}),
        ("tensor of num_quantizers must be int64", ValueError, {"num_quantizers": torch.tensor([1.0])}),
        ("num_quantizers and x must be on one device", ValueError, {"num_quantizers": torch.tensor(1, device="meta")}),
        ("impl='triton' cannot run here", NotImplementedError, {"impl": "triton"}),
    ],
)
def test_bad_input(message, error, options):
    arguments = {"x": torch.zeros(4, 3), "codebooks": torch.zeros(2, 5, 3)} | options
    with pytest.raises(error, match="residual_vector_quantize: .*" + message):
        genperf.residual_vector_quantize(**arguments)
    with pytest.raises(ValueError, match="residual_code_statistics: indices must have shape"):
        genperf.residual_code_statistics(torch.zeros(4, 3), torch.zeros(2, 5, 3), torch.zeros(4, dtype=torch.int64))
