# SPDX-License-Identifier: Apache-2.0
"""Ops under the transforms of torch.func, with a loop over the samples as the oracle; and under other callers of backward."""

from functools import partial

import pytest
import torch
from torch.func import grad, jacfwd, jacrev, jvp, vjp
from torch.utils.checkpoint import checkpoint

import genperf

# `perturb` draws a seed even if its noise has no effect.
vmap = partial(torch.vmap, randomness="same")

IMPLS = (None, "reference")
LEVELS = (8, 5, 5)


def spd(a):
    return a @ a.mT + 0.1 * torch.eye(a.shape[-2], dtype=a.dtype)


# name: (function of the inputs and impl, shapes of the inputs). It returns the differentiable outputs.
DIFFERENTIABLE = {
    "gaussian_sample": (lambda m, impl: genperf.gaussian_sample(m, noise=torch.ones(5, 3), free_bits=0.1, impl=impl), [(5, 6)]),
    "gaussian_sample, two tensors": (lambda m, v, impl: genperf.gaussian_sample(m, v, noise=torch.ones(5, 3), impl=impl), [(5, 3), (5, 3)]),
    "gaussian_sample, prior": (
        lambda m, p, impl: genperf.gaussian_sample(m, prior=p, noise=torch.ones(5, 3), impl=impl),
        [(5, 6), (1, 6)],
    ),
    "gumbel_sample": (lambda x, impl: genperf.gumbel_sample(x, noise=torch.zeros(5, 6), impl=impl)[::2], [(5, 6)]),
    "gumbel_sample, dim": (lambda x, impl: genperf.gumbel_sample(x, noise=torch.zeros(2, 4, 3), dim=1, impl=impl)[::2], [(2, 4, 3)]),
    "gumbel_sample, codebook": (
        lambda x, c, impl: genperf.gumbel_sample(x, c, noise=torch.zeros(5, 6), impl=impl)[::2],
        [(5, 6), (6, 3)],
    ),
    "gumbel_sample, hard": (
        lambda x, c, impl: genperf.gumbel_sample(x, c, hard=True, noise=torch.zeros(5, 6), impl=impl)[::2],
        [(5, 6), (6, 3)],
    ),
    "interpolate": (lambda a, b, w, impl: (genperf.interpolate(a, b, weight=w, impl=impl),), [(4, 3), (4, 3), (4,)]),
    "gradient_norm_penalty": (lambda x, impl: (genperf.gradient_norm_penalty(x, impl=impl),), [(4, 3)]),
    "minibatch_similarity": (lambda x, impl: (genperf.minibatch_similarity(x, impl=impl),), [(5, 3, 2)]),
    "vector_quantize": (lambda x, c, impl: genperf.vector_quantize(x, c, impl=impl)[::2], [(7, 3), (6, 3)]),
    "vector_quantize, rotation": (
        lambda x, c, impl: genperf.vector_quantize(x, c, gradient="rotation", channel_dim=1, impl=impl)[::2],
        [(2, 3, 4), (6, 3)],
    ),
    "residual_vector_quantize": (lambda x, c, impl: genperf.residual_vector_quantize(x, c, impl=impl)[::2], [(7, 3), (2, 6, 3)]),
    "residual_vector_quantize, rotation": (
        lambda x, c, impl: genperf.residual_vector_quantize(x, c, gradient="rotation", num_quantizers=1, impl=impl)[::2],
        [(7, 3), (2, 6, 3)],
    ),
    "finite_scalar_quantize": (lambda x, impl: genperf.finite_scalar_quantize(x, LEVELS, impl=impl)[:1], [(7, 3)]),
    "finite_scalar_quantize, symmetric": (
        lambda x, impl: genperf.finite_scalar_quantize(x, LEVELS, symmetric=True, impl=impl)[:1],
        [(7, 3)],
    ),
    "lookup_free_quantize": (lambda x, impl: genperf.lookup_free_quantize(x, impl=impl)[:1], [(7, 3)]),
    "lookup_free_quantize, spherical": (lambda x, impl: genperf.lookup_free_quantize(x, spherical=True, impl=impl)[:1], [(7, 3)]),
    "lookup_free_entropy": (lambda x, impl: genperf.lookup_free_entropy(x, inv_temperature=0.7, impl=impl), [(7, 4)]),
    "lookup_free_entropy, mask": (
        lambda x, impl: genperf.lookup_free_entropy(x, inv_temperature=0.7, group_size=2, mask=torch.arange(7) < 5, impl=impl),
        [(7, 4)],
    ),
    "code_entropy": (lambda x, c, impl: genperf.code_entropy(x, c, impl=impl), [(7, 3), (6, 3)]),
    "code_entropy, heads": (
        lambda x, c, impl: genperf.code_entropy(x, c, mask=torch.arange(14).view(2, 7) != 4, impl=impl),
        [(2, 7, 3), (2, 6, 3)],
    ),
    "code_cross_entropy": (lambda x, c, impl: (genperf.code_cross_entropy(x, c, torch.arange(7) % 6, impl=impl),), [(7, 3), (6, 3)]),
    "matrix_sqrt": (lambda a, impl: (genperf.matrix_sqrt(spd(a), impl=impl),), [(3, 4)]),
    "matrix_sqrt, polar": (lambda a, impl: (genperf.matrix_sqrt(spd(a), impl=impl or "polar"),), [(3, 4)]),
    "trace_sqrt_product": (lambda a, b, impl: (genperf.trace_sqrt_product(spd(a), spd(b), impl=impl),), [(3, 4), (3, 4)]),
    "trace_sqrt_product, polar": (
        lambda a, b, impl: (genperf.trace_sqrt_product(spd(a), spd(b), impl=impl or "polar"),),
        [(3, 4), (3, 4)],
    ),
    "frechet_distance": (
        lambda m, a, b, impl: (genperf.frechet_distance(m, spd(a), 0 * m, None, factor2=b, impl=impl),),
        [(3,), (3, 4), (3, 5)],
    ),
    "perturb": (lambda x, impl: (genperf.perturb(x, scale=0.0, weight=torch.full((4,), 0.3), impl=impl),), [(4, 3)]),
}
# A straight-through value has no tangent in forward mode.
STRAIGHT_THROUGH = ("quantize", "hard")


@pytest.fixture(params=DIFFERENTIABLE)
def case(request):
    """The name of an op, and the sum of its weighted outputs as a function of the inputs and impl, with inputs of a batch of 3."""
    function, shapes = DIFFERENTIABLE[request.param]
    inputs = [torch.randn(3, *shape) for shape in shapes]

    def weighted(impl, function=function):
        def total(*tensors):
            outputs = function(*tensors, impl=impl)
            return sum((out.double() * (1 + torch.arange(out.numel()).reshape(out.shape).cos())).square().sum() for out in outputs)

        return total

    return request.param, function, weighted, inputs


def by_loop(total, inputs):
    """Gradients of the sum over the samples in all inputs, by autograd."""
    leaves = [t.clone().requires_grad_() for t in inputs]
    return torch.autograd.grad(sum(total(*sample) for sample in zip(*leaves, strict=True)), leaves)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients(case, impl):
    """grad, vjp and jacrev of a sample; vjp also within grad, where its result is differentiated again."""
    _, _, weighted, inputs = case
    total, sample = weighted(impl), [t[0] for t in inputs]
    places = tuple(range(len(inputs)))
    expected = [t[0] for t in by_loop(total, [t[:1] for t in inputs])]
    assert all(t.abs().max() > 0 for t in expected)
    one = torch.ones((), dtype=torch.float64)
    assert_close(list(grad(total, places)(*sample)), expected)
    assert_close(list(vjp(total, *sample)[1](one)), expected)
    assert_close(list(jacrev(total, places)(*sample)), expected)
    twice = grad(lambda *t: sum(g.square().sum() for g in vjp(total, *t)[1](one)), places)(*sample)
    leaves = [t.clone().requires_grad_() for t in sample]
    square = sum(g.square().sum() for g in torch.autograd.grad(total(*leaves), leaves, create_graph=True))
    # None by autograd and zeros by torch.func where a straight-through gradient is constant
    slopes = torch.autograd.grad(square, leaves, allow_unused=True) if square.requires_grad else [None] * len(leaves)
    assert_close(list(twice), [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, slopes, strict=True)])


@pytest.mark.parametrize("impl", IMPLS)
def test_vmap(case, impl):
    """vmap, and gradients within it, through it and by autograd around it, equal a loop over the samples."""
    _, function, weighted, inputs = case
    total = weighted(impl)
    for found, expected in zip(
        vmap(lambda *t: function(*t, impl=impl))(*inputs),
        zip(*(function(*t, impl=impl) for t in zip(*inputs, strict=True)), strict=True),
        strict=True,
    ):
        assert_close(found, torch.stack(expected))
    expected = list(by_loop(total, inputs))
    places = tuple(range(len(inputs)))
    assert_close(list(vmap(grad(total, places))(*inputs)), expected)
    assert_close(list(grad(lambda *t: vmap(total)(*t).sum(), places)(*inputs)), expected)
    assert_close(list(vmap(lambda *t: vjp(total, *t)[1](torch.ones((), dtype=torch.float64)))(*inputs)), expected)
    leaves = [t.clone().requires_grad_() for t in inputs]
    assert_close(list(torch.autograd.grad(vmap(total)(*leaves).sum(), leaves)), expected)
    nested = [t.unsqueeze(0) for t in inputs]
    assert_close([t.squeeze(0) for t in vmap(vmap(grad(total, places)))(*nested)], expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_vmap_over_one_input(case, impl):
    """Inputs that are the same for all samples, whose gradients add up, and a batch that is not dimension 0."""
    _, _, weighted, inputs = case
    total = weighted(impl)
    for mapped in range(len(inputs)):
        tensors = [t if place == mapped else t[0] for place, t in enumerate(inputs)]
        expected = by_loop(total, [t if place == mapped else t[:1].expand_as(t) for place, t in enumerate(inputs)])
        expected = [t if place == mapped else t.sum(0) for place, t in enumerate(expected)]
        leaves = [t.clone().requires_grad_() for t in tensors]
        moved = [t.movedim(0, -1) if place == mapped else t for place, t in enumerate(leaves)]
        found = vmap(total, tuple(-1 if place == mapped else None for place in range(len(inputs))))(*moved).sum()
        assert_close(list(torch.autograd.grad(found, leaves)), expected)


def test_vmap_over_no_samples(case):
    """The native ops; torch cannot reduce a tensor to a scalar within vmap over no samples, so references and some ops raise its error."""
    name, function, _, inputs = case
    if any(word in name for word in ("mask", "frechet", "perturb")):
        pytest.skip("computes a sum in plain PyTorch")
    leaves = [t[:0].clone().requires_grad_() for t in inputs]
    outputs = vmap(lambda *t: function(*t, impl=None))(*leaves)
    for out, expected in zip(outputs, function(*(t[0] for t in inputs), impl=None), strict=True):
        assert out.shape == (0, *expected.shape)
        assert out.dtype == expected.dtype
    for slope, leaf in zip(torch.autograd.grad(sum(out.double().sum() for out in outputs), leaves), leaves, strict=True):
        assert slope.shape == leaf.shape


@pytest.mark.parametrize("impl", IMPLS)
def test_batched_gradients(case, impl):
    """Of torch.autograd.grad(is_grads_batched=True), and jacrev of the outputs."""
    _, function, _, inputs = case
    leaves = [t[0].clone().requires_grad_() for t in inputs]
    for place, out in enumerate(function(*leaves, impl=impl)):
        upstream = torch.randn(4, *out.shape, dtype=out.dtype)
        rows = [torch.autograd.grad(out, leaves, row, retain_graph=True, allow_unused=True) for row in upstream]
        found = torch.autograd.grad(out, leaves, upstream, is_grads_batched=True, retain_graph=True, allow_unused=True)
        jacobians = jacrev(lambda *t, place=place: function(*t, impl=impl)[place], tuple(range(len(leaves))))(*(t.detach() for t in leaves))
        for slope, expected, jacobian, leaf in zip(found, zip(*rows, strict=True), jacobians, leaves, strict=True):
            expected = torch.stack([torch.zeros_like(leaf) if row is None else row for row in expected])
            assert_close(torch.zeros_like(expected) if slope is None else slope, expected)
            assert_close(torch.tensordot(upstream.reshape(4, -1).to(leaf.dtype), jacobian.reshape(out.numel(), *leaf.shape), 1), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_second_derivatives(case, impl):
    name, _, weighted, inputs = case
    total, sample = weighted(impl), [t[0] for t in inputs]
    expected = torch.autograd.functional.hessian(total, tuple(sample))[0][0]
    assert_close(jacrev(jacrev(total))(*sample), expected)
    assert_close(vmap(jacrev(grad(total)))(*inputs)[0], expected)
    tangent = torch.randn_like(sample[0])
    if any(word in name for word in STRAIGHT_THROUGH):
        with pytest.raises(NotImplementedError, match="forward mode"):
            jvp(lambda x: total(x, *sample[1:]), (sample[0],), (tangent,))
    elif impl is None and "polar" in name:
        with pytest.raises(NotImplementedError, match="forward-mode gradients are computed by the reference only"):
            jacfwd(jacrev(total), randomness="same")(*sample)
    else:
        assert_close(jacfwd(jacrev(total), randomness="same")(*sample), expected)
        slope = jvp(lambda x: vmap(lambda x: total(x, *sample[1:]))(x.unsqueeze(0)).sum(), (sample[0],), (tangent,))[1]
        assert_close(slope, (grad(total)(*sample) * tangent).sum().double())


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_of_a_checkpoint_can_be_differentiated(case, impl):
    """Non-reentrant checkpointing lets backward read each saved tensor once."""
    _, _, weighted, inputs = case
    results = []
    for run in (lambda *t: weighted(impl)(*t), lambda *t: checkpoint(weighted(impl), *t, use_reentrant=False)):
        leaves = [t[0].clone().requires_grad_() for t in inputs]
        slopes = torch.autograd.grad(run(*leaves), leaves, create_graph=True)
        square = sum(t.square().sum() for t in slopes)
        results.append([*slopes, *(torch.autograd.grad(square, leaves, allow_unused=True) if square.requires_grad else ())])
    for plain, recomputed in zip(*results, strict=True):
        assert (plain is None) == (recomputed is None)
        assert plain is None or torch.equal(plain, recomputed)


def test_inputs_computed_from_each_other():
    """The second derivative in an input leaves out the path through another input that was computed from it."""
    x = torch.randn(5, 3, dtype=torch.float64)
    noise = torch.randn(5, 3, dtype=torch.float64)

    def slope(impl, x):
        sample, kl = genperf.gaussian_sample(x, 2 * x, noise=noise.to(x), impl=impl)
        return torch.autograd.grad(sample.square().sum() + kl.sum(), x, create_graph=True)[0]

    expected = slope("reference", x.requires_grad_())
    torch.testing.assert_close(slope(None, x.detach().float().requires_grad_()), expected.float(), rtol=1e-4, atol=1e-4)


OTHER = {
    "nearest_code": (lambda x, c, impl: (genperf.nearest_code(x, c, impl=impl),), [(7, 3), (6, 3)]),
    "nearest_code, cosine": (lambda x, c, impl: (genperf.nearest_code(x, c, metric="cosine", impl=impl),), [(7, 3), (6, 3)]),
    "nearest_code, heads": (lambda x, c, impl: (genperf.nearest_code(x, c, impl=impl),), [(2, 7, 3), (2, 6, 3)]),
    "nearest_codes": (lambda x, c, impl: genperf.nearest_codes(x, c, 3, return_distances=True, impl=impl), [(7, 3), (6, 3)]),
    "code_statistics": (lambda x, w, impl: genperf.code_statistics(x, torch.arange(7) % 5 - 1, 4, weights=w, impl=impl), [(7, 3), (7,)]),
    "residual_code_statistics": (
        lambda x, c, impl: genperf.residual_code_statistics(x, c, torch.arange(14).view(7, 2) % 7 - 1, impl=impl),
        [(7, 3), (2, 6, 3)],
    ),
    "sample_code": (lambda x, c, impl: (genperf.sample_code(x, c, temperature=0.0, logits="dot", impl=impl),), [(7, 3), (6, 3)]),
    "kmeans": (lambda x, c, impl: genperf.kmeans(x, 4, init=c, iterations=3, impl=impl), [(9, 3), (4, 3)]),
    "kmeans, empty codes": (lambda x, c, impl: genperf.kmeans(x, 4, init=c * 0, iterations=3, impl=impl), [(9, 3), (4, 3)]),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", OTHER)
def test_vmap_of_ops_without_a_gradient(name, impl):
    function, shapes = OTHER[name]
    inputs = [torch.randn(3, *shape) for shape in shapes]
    for in_dims in [(0, 0), (0, None), (None, 0)]:
        samples = [t if dim == 0 else t[0] for t, dim in zip(inputs, in_dims, strict=True)]
        loop = [t if dim == 0 else t[:1].expand_as(t) for t, dim in zip(inputs, in_dims, strict=True)]
        expected = [torch.stack(parts) for parts in zip(*(function(*t, impl=impl) for t in zip(*loop, strict=True)), strict=True)]
        found = list(vmap(lambda *t: tuple(function(*t, impl=impl)), in_dims)(*samples))
        torch.testing.assert_close(found, expected)

        def first(*t, in_dims=in_dims):
            return vmap(lambda *sample: function(*sample, impl=impl)[0], in_dims)(*t)

        slopes = grad(lambda x, other, first=first: first(x, other).sum() + x.sum())(*samples)
        assert torch.equal(slopes, torch.ones_like(samples[0]))


def test_vmap_of_decoding():
    indices = torch.randint(200, (3, 7))
    for decode in (lambda i: genperf.finite_scalar_decode(i, LEVELS), lambda i: genperf.lookup_free_decode(i, 8)):
        assert torch.equal(vmap(decode)(indices), torch.stack([decode(row) for row in indices]))
        with pytest.raises(IndexError, match="indices must be at most"):
            vmap(decode)(indices + 200)


def test_vmap_checks_indices():
    x, codebook = torch.randn(3, 7, 3), torch.randn(6, 3)
    indices = torch.randint(-1, 6, (3, 7))
    expected = torch.stack([genperf.vector_quantize(*t, indices=i)[2] for *t, i in zip(x, [codebook] * 3, indices, strict=True)])
    torch.testing.assert_close(vmap(lambda x, i: genperf.vector_quantize(x, codebook, indices=i)[2])(x, indices), expected)
    for function in (
        lambda x, i: genperf.vector_quantize(x, codebook, indices=i)[2],
        lambda x, i: genperf.code_statistics(x, i, 6)[0],
        lambda x, i: genperf.code_cross_entropy(x, codebook, i),
    ):
        with pytest.raises(IndexError, match=r"indices must lie between -1 and 5, got .* 6"):
            vmap(function)(x, torch.full((3, 7), 6))


@pytest.mark.parametrize("impl", IMPLS)
def test_drawn_noise_follows_the_randomness_of_vmap(impl):
    x, codebook = torch.zeros(3, 8, 6), torch.randn(6, 2)
    for draw in (
        lambda x: genperf.gaussian_sample(x, impl=impl)[0],
        lambda x: genperf.gumbel_sample(x, impl=impl)[0],
        lambda x: genperf.sample_code(x[:, :2], codebook, impl=impl),
        lambda x: genperf.interpolate(x, x + 1, impl=impl),
        lambda x: genperf.perturb(x + torch.arange(6), impl=impl),
    ):
        with pytest.raises(RuntimeError, match="randomness"):
            torch.vmap(draw)(x)
        same, different = (torch.vmap(draw, randomness=mode)(x) for mode in ("same", "different"))
        assert torch.equal(same[0], same[1])
        assert not torch.equal(different[0], different[1])


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_of_tau_noise_and_weights(impl):
    """Of arguments whose gradients the kernels do not compute, within and around vmap."""
    logits, noise, tau = torch.randn(3, 5, 4), torch.randn(3, 5, 4), torch.rand(3) + 0.5

    def gumbel(noise, tau, logits):
        return (genperf.gumbel_sample(logits, noise=noise, tau=tau, impl=impl)[0] * torch.arange(4)).sum()

    def gaussian(noise, tau, logits):
        return (genperf.gaussian_sample(logits, noise=noise[:, :2], impl=impl)[0] * tau).sum()

    def perturb(noise, tau, logits):
        torch.manual_seed(0)
        return (genperf.perturb(logits, scale=tau, weight=noise[:, 0], impl=impl) * logits).sum()

    for function in (gumbel, gaussian):
        leaves = [t.clone().requires_grad_() for t in (noise, tau)]
        expected = torch.autograd.grad(sum(map(function, *leaves, logits)), leaves)
        assert_close(vmap(grad(function, (0, 1)))(noise, tau, logits), expected)
        assert_close(grad(lambda n, t, function=function: vmap(function)(n, t, logits).sum(), (0, 1))(noise, tau), expected)
    leaf = noise.clone().requires_grad_()
    found = grad(lambda n: sum(perturb(n[i], tau[i], logits[i]) for i in range(3)))(noise)
    assert_close(found, torch.autograd.grad(sum(map(perturb, leaf, tau, logits)), leaf)[0])


def test_reference_ops_under_vmap():
    x, codebook = torch.randn(3, 7, 3), torch.randn(6, 3)

    def loss(x):
        return genperf.vector_quantize(x, codebook)[2]

    expected = vmap(grad(loss))(x)
    with genperf.reference_ops():
        torch.testing.assert_close(vmap(grad(loss))(x), expected)


def test_covariance_factor_names_vmap():
    with pytest.raises(NotImplementedError, match=r"covariance_factor: .* torch\.vmap cannot run it"):
        vmap(genperf.covariance_factor)(torch.eye(3).expand(2, 3, 3))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_layer_within_functional_call(impl):
    """Per-sample gradients of parameters, and gradients of a compiled function that calls a transform."""
    linear = torch.nn.Linear(4, 6)
    x, parameters = torch.randn(3, 5, 4), dict(linear.named_parameters())

    def loss(parameters, x):
        sample, kl = genperf.gaussian_sample(torch.func.functional_call(linear, parameters, (x,)), noise=torch.ones(5, 3), impl=impl)
        return sample.square().sum() + kl.sum()

    found = vmap(grad(loss), (None, 0))(parameters, x)
    for i in range(3):
        expected = torch.autograd.grad(loss(parameters, x[i]), parameters.values())
        assert_close([t[i] for t in found.values()], list(expected))
