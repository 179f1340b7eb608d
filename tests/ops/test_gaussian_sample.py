# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

import genperf
from genperf import testing

pytestmark = pytest.mark.compiled

# Enough samples that the largest error of plain PyTorch's KL is not small by chance.
SHAPES = [(7, 31), (5, 5, 33), (6, 3, 7, 5), (5, 2, 3, 5, 7), (33, 2), (9, 1000)]


def moments(shape, dtype, device, seed=0):
    """mean and logvar, some of which lie below the clamp."""
    generator = torch.Generator().manual_seed(seed)
    mean, logvar = torch.randn(2, *shape, generator=generator)
    logvar = torch.where(torch.rand(shape, generator=generator) < 0.05, logvar - 33, logvar * 2)
    return mean.to(dtype).to(device), logvar.to(dtype).to(device)


def packed(mean, logvar, dim=1):
    return torch.cat([mean, logvar], dim)


def sample(*inputs, seed=5, prior=None, impl=None, **options):
    """Outputs and gradients of a loss with a weight for every output element; inputs keep their layout."""
    count = len(inputs)
    leaves = [t.detach().requires_grad_() for t in (*inputs, *(prior or ()))]
    torch.manual_seed(seed)
    if prior is not None:
        options["prior"] = leaves[count] if len(prior) == 1 else tuple(leaves[count:])
    drawn, kl = genperf.gaussian_sample(*leaves[:count], impl=impl, **options)
    # Multiples of 1/64, which are exact in every dtype.
    weight = torch.linspace(-64, 64, drawn.numel(), device=drawn.device).round().div(64).reshape(drawn.shape).to(drawn.dtype)
    kl_weight = torch.linspace(0.5, 2, len(kl), device=kl.device).to(kl.dtype)
    gradients = torch.autograd.grad((drawn * weight).sum() + (kl * kl_weight).sum(), leaves)
    names = ("mean.grad", "logvar.grad")[:count] + ("prior.grad", "prior_logvar.grad")[: len(leaves) - count]
    return {"sample": drawn.detach(), "kl": kl.detach(), **dict(zip(names, gradients, strict=True))}


def assert_matches(*inputs, prior=None, noise=None, **options):
    """The native error against float64 is at most twice that of the reference in the inputs' dtype."""
    native = sample(*inputs, prior=prior, noise=noise, **options)
    plain = sample(*inputs, prior=prior, noise=noise, impl="reference", **options)
    exact_prior = None if prior is None else tuple(t.double() for t in prior)
    exact_options = {k: v for k, v in options.items() if k != "dtype"}
    exact_noise = None if noise is None else noise.double()
    exact = sample(*(t.double() for t in inputs), prior=exact_prior, noise=exact_noise, impl="reference", **exact_options)
    for name in native:
        testing.assert_accurate(f"{name} {[list(t.shape) for t in inputs]}", native[name], exact[name], plain[name])


@pytest.mark.parametrize("drawn", [True, False], ids=["drawn", "given"])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_accuracy(dtype, drawn, device):
    for shape in SHAPES:
        mean, logvar = moments(shape, dtype, device)
        noise = None if drawn else torch.randn(shape, device=device)
        assert_matches(mean, logvar, noise=noise)
        assert_matches(packed(mean, logvar), noise=noise)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_accuracy_with_a_prior(dtype, device):
    for shape in SHAPES:
        mean, logvar = moments(shape, dtype, device)
        prior = [t.clamp(-3, 3) for t in moments(shape, dtype, device, seed=1)]
        assert_matches(mean, logvar.clamp(-6, 6), prior=prior)
        assert_matches(packed(mean, logvar.clamp(-6, 6)), prior=[packed(*prior)])


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_accuracy_with_free_bits(dtype, device):
    for shape in SHAPES:
        mean, logvar = moments(shape, dtype, device)
        assert_matches(mean, logvar, free_bits=0.3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_samples_of_half_precision_moments(dtype, device):
    """Noise of 1/1000 around 4 is lost by rounding to bfloat16."""
    mean, logvar = torch.full((4, 500), 4.0, dtype=dtype, device=device), torch.full((4, 500), -13.8, dtype=dtype, device=device)
    assert_matches(mean, logvar, dtype=torch.float32)
    wide, _ = genperf.gaussian_sample(mean, logvar, dtype=torch.float32)
    assert wide.dtype == torch.float32
    assert 9e-4 < wide.std() < 1.1e-3
    assert genperf.gaussian_sample(mean, logvar)[0].dtype == dtype


def test_kl_equals_torch_distributions(device):
    mean, logvar = torch.randn(2, 5, 4, 3, dtype=torch.float64, device=device)
    prior_mean, prior_logvar = torch.randn(2, 5, 4, 3, dtype=torch.float64, device=device)
    normal = torch.distributions.Normal
    posterior = normal(mean, (logvar / 2).exp())
    others = {None: normal(torch.zeros_like(mean), 1), (prior_mean, prior_logvar): normal(prior_mean, (prior_logvar / 2).exp())}
    for prior, other in others.items():
        expected = torch.distributions.kl_divergence(posterior, other).sum((1, 2))
        torch.testing.assert_close(genperf.gaussian_sample(mean, logvar, prior=prior)[1], expected)
        single = None if prior is None else tuple(t.float() for t in prior)
        _, kl = genperf.gaussian_sample(mean.float(), logvar.float(), prior=single)
        torch.testing.assert_close(kl.double(), expected, rtol=1e-5, atol=1e-5)


def test_kl_is_accurate_near_variance_one(device):
    """One element per sample: the error is relative to the small log variance, not to the 1 that exp(logvar) - 1 subtracts."""
    logvar = torch.linspace(-1e-2, 1e-2, 4001, device=device)
    mean = torch.linspace(1e-3, -1e-3, 4001, device=device)
    _, kl = genperf.gaussian_sample(mean[:, None], logvar[:, None])
    small = logvar.double()
    exact = 0.5 * (mean.double().square() + torch.expm1(small) - small)
    assert ((kl - exact).abs() <= 2.0**-23 * (small.abs() + exact)).all()
    # Against a prior that is nearly equal.
    prior = (torch.full_like(mean[:, None], 3.0), torch.full_like(mean[:, None], 1.5))
    _, kl = genperf.gaussian_sample((3 + mean)[:, None], (1.5 + logvar)[:, None], prior=prior)
    ratio = (1.5 + logvar).double() - 1.5
    exact = 0.5 * (((3 + mean).double() - 3).square() * torch.exp(torch.tensor(-1.5, dtype=torch.float64)) + torch.expm1(ratio) - ratio)
    assert ((kl - exact).abs() <= 2.0**-23 * (ratio.abs() + 2 * exact)).all()


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 6), (2, 4, 6, 8), (2, 4, 2, 6, 8)], ids=str)
def test_packed_equals_two_tensors(shape, device):
    """Bitwise, packed along any dimension."""
    mean, logvar = moments(shape, torch.float32, device)
    two = sample(mean, logvar)
    for dim in (*range(1, len(shape)), -1):
        one = sample(packed(mean, logvar, dim), dim=dim)
        assert torch.equal(one["sample"], two["sample"])
        torch.testing.assert_close(one["kl"], two["kl"], rtol=1e-6, atol=0)
        assert torch.equal(one["mean.grad"], packed(two["mean.grad"], two["logvar.grad"], dim))


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 9), (2, 3, 7, 5), (2, 3, 2, 4, 5)], ids=str)
def test_layouts_agree(shape, device):
    mean, logvar = moments(shape, torch.float32, device)
    flat, joint = sample(mean, logvar), sample(packed(mean, logvar))
    means, logvars, both = testing.strided(mean), testing.strided(logvar), testing.strided(packed(mean, logvar))
    for name in means:
        found = {"two": sample(means[name], logvars[name]), "mixed": sample(means[name], logvar), "packed": sample(both[name])}
        for kind, result in found.items():
            for key, value in result.items():
                expected = joint[key] if kind == "packed" else flat[key]
                torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6, msg=lambda text, n=name, k=kind: f"{n} {k}: {text}")
    for name in ("backwards", "spaced"):
        noise = torch.randn(shape, device=device)
        expected = sample(mean, logvar, noise=noise)
        for key, value in sample(means[name], logvars[name], noise=testing.strided(noise)[name]).items():
            torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-6)


def test_expanded_inputs(device):
    mean, logvar = torch.randn(1, 5, 1, device=device).expand(3, 5, 7), torch.randn(3, 1, 7, device=device).expand(3, 5, 7)
    expected = sample(mean.contiguous(), logvar.contiguous())
    for name, value in sample(mean, logvar).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6)


def test_prior_with_dimensions_of_size_one(device):
    mean, logvar = moments((3, 5, 7), torch.float32, device)
    for small in ((1, 5, 1), (1, 1, 1), (3, 1, 7)):
        prior = [torch.randn(small, device=device) for _ in range(2)]
        expected = sample(mean, logvar, prior=[t.expand(3, 5, 7).contiguous() for t in prior])
        joint = sample(mean, logvar, prior=[torch.cat(prior, 1)])
        found = sample(mean, logvar, prior=prior)
        sums = tuple(d for d in range(3) if small[d] == 1)
        for name in ("prior.grad", "prior_logvar.grad"):
            expected[name] = expected[name].sum(sums, keepdim=True)
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(joint["prior.grad"], torch.cat([expected["prior.grad"], expected["prior_logvar.grad"]], 1))
        torch.testing.assert_close(found["kl"], expected["kl"])
        torch.testing.assert_close(joint["kl"], expected["kl"])


@pytest.mark.parametrize("impl", [None, "reference"])
def test_gradient_of_the_clamp(impl, device):
    """The log variance has no gradient outside [-30, 20], and has one on the bounds."""
    logvar = torch.tensor([[-100.0, -30.5, -30.0, 0.0, 20.0, 20.5, 100.0]], device=device)
    inside = (logvar >= -30) & (logvar <= 20)
    for prior in (None, (torch.ones_like(logvar), torch.ones_like(logvar))):
        result = sample(torch.ones_like(logvar), logvar, prior=prior, impl=impl)
        assert (result["logvar.grad"][~inside] == 0).all()
        assert (result["logvar.grad"][inside & (logvar != 0)] != 0).all()
        assert result["kl"].isfinite().all()
    result = sample(torch.ones_like(logvar), torch.ones_like(logvar), prior=(torch.zeros_like(logvar), logvar), impl=impl)
    assert (result["prior_logvar.grad"][~inside] == 0).all()
    assert (result["prior_logvar.grad"][:, 2:5] != 0).all()


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_accuracy_over_the_whole_range(dtype, device):
    """One element per sample, over the range of the clamp: KL, sample and gradients are within a few roundings."""
    logvar = torch.linspace(-40, 30, 1401, device=device).to(dtype)[:, None]
    mean, noise = torch.full_like(logvar, 0.5), torch.full_like(logvar, 0.75)
    for prior in (None, (mean * 3, logvar.flip(0).clamp(-10, 10))):
        native = sample(mean, logvar, noise=noise, prior=prior)
        exact_prior = None if prior is None else tuple(t.double() for t in prior)
        exact = sample(mean.double(), logvar.double(), noise=noise.double(), prior=exact_prior, impl="reference")
        for name, value in native.items():
            # exp(logvar - prior) amplifies the rounding of the difference, of up to 40.
            eps = (4 if prior is None else 32) * torch.finfo(torch.float32).eps + (torch.finfo(dtype).eps if value.dtype == dtype else 0)
            fits = exact[name].abs() < torch.finfo(value.dtype).max  # float16's largest is 65504
            assert ((value - exact[name]).abs() <= eps * exact[name].abs() + 1e-6)[fits].all(), name
            assert value[~fits].isinf().all(), name


@pytest.mark.parametrize("impl", [None, "reference"])
def test_free_bits(impl, device):
    mean = torch.tensor([[0.0, 0.5, 3.0]], device=device, requires_grad=True)
    logvar = torch.zeros(1, 3, device=device)
    _, kl = genperf.gaussian_sample(mean, logvar, free_bits=0.25, impl=impl)
    torch.testing.assert_close(kl, torch.tensor([0.25 + 0.25 + 4.5], device=device))
    torch.testing.assert_close(torch.autograd.grad(kl.sum(), mean)[0], torch.tensor([[0.0, 0.0, 3.0]], device=device))


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("shape", [(0, 4), (0, 4, 3, 3), (3, 0), (3, 4, 0), (0, 0)], ids=str)
def test_empty(shape, impl, device):
    empty = torch.empty(shape, device=device)
    for result in (
        sample(empty, empty, impl=impl),
        sample(packed(empty, empty), impl=impl),
        sample(empty, empty, prior=(empty, empty), impl=impl),
        sample(empty, empty, noise=empty, impl=impl),
    ):
        assert result["sample"].shape == shape
        assert result["mean.grad"].shape == (shape if "logvar.grad" in result else packed(empty, empty).shape)
        assert torch.equal(result["kl"], torch.zeros(shape[0], device=device))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_values_stay_within_their_sample(bad, device):
    mean, logvar = (t.clamp(-3, 3) for t in moments((5, 3, 7), torch.float32, device))
    clean = sample(mean, logvar)
    for which in (0, 1):
        inputs = [mean.clone(), logvar.clone()]
        inputs[which][2, 1, 4] = bad
        found = sample(*inputs)
        for name, value in found.items():
            assert torch.equal(value[[0, 1, 3, 4]], clean[name][[0, 1, 3, 4]]), name
            if name in ("sample", "mean.grad"):
                others = torch.ones(3, 7, dtype=torch.bool, device=device)
                others[1, 4] = False
                assert torch.equal(value[2][others], clean[name][2][others]), name
        plain = sample(*inputs, impl="reference")
        for name, value in found.items():
            assert torch.equal(value.isnan(), plain[name].isnan()), name
            assert torch.equal(value.isinf(), plain[name].isinf()), name
        assert not found["kl"][2].isfinite() or which == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_never_nan(dtype, device):
    mean = torch.tensor([[60000.0, -60000.0, 0.0, 60000.0]], dtype=dtype, device=device)
    logvar = torch.tensor([[60000.0, -60000.0, 19.0, -29.0]], dtype=dtype, device=device)
    for free_bits in (0.0, 0.5):
        for name, value in sample(mean, logvar, free_bits=free_bits).items():
            assert not value.isnan().any(), name
        assert genperf.gaussian_sample(mean, logvar)[1].isfinite().all()


# The weights that `sample` uses for inputs of shape [4, 6].
WEIGHTS = (torch.linspace(-64, 64, 24).round().div(64).view(4, 6), torch.linspace(0.5, 2, 4))


def test_unused_outputs(device):
    mean, logvar = moments((4, 6), torch.float32, device)
    both = sample(mean, logvar)
    for inputs in ((mean, logvar), (packed(mean, logvar),)):
        leaves = [t.detach().requires_grad_() for t in inputs]
        parts = []
        for index, weight in enumerate(WEIGHTS):
            weight = weight.to(device)
            torch.manual_seed(5)
            output = genperf.gaussian_sample(*leaves)[index]
            parts.append(torch.autograd.grad(output, leaves, weight))
        sums = [a + b for a, b in zip(*parts, strict=True)]
        sums = sums[0].chunk(2, 1) if len(sums) == 1 else sums
        torch.testing.assert_close(sums[0], both["mean.grad"])
        torch.testing.assert_close(sums[1], both["logvar.grad"])


def test_frozen_inputs(device):
    mean, logvar = moments((4, 6), torch.float32, device)
    prior = (torch.randn(4, 6, device=device), torch.randn(4, 6, device=device))
    every = sample(mean, logvar, prior=prior)
    names = ("mean.grad", "logvar.grad", "prior.grad", "prior_logvar.grad")
    for learns in range(1, 16):
        leaves = [t.detach().requires_grad_(bool(learns >> i & 1)) for i, t in enumerate((mean, logvar, *prior))]
        torch.manual_seed(5)
        drawn, kl = genperf.gaussian_sample(*leaves[:2], prior=tuple(leaves[2:]))
        loss = (drawn * WEIGHTS[0].to(device)).sum() + (kl * WEIGHTS[1].to(device)).sum()
        loss.backward()
        for leaf, name in zip(leaves, names, strict=True):
            assert (leaf.grad is not None) == leaf.requires_grad
            if leaf.requires_grad:
                torch.testing.assert_close(leaf.grad, every[name])
    assert not genperf.gaussian_sample(mean, logvar)[0].requires_grad
    with torch.no_grad():
        assert not genperf.gaussian_sample(mean.detach().requires_grad_(), logvar)[0].requires_grad


def test_output_gradients_of_any_strides(device):
    mean, logvar = moments((3, 4, 5, 6), torch.float32, device)
    for inputs in ((mean, logvar), (packed(mean, logvar),)):
        leaves = [t.detach().requires_grad_() for t in inputs]
        for upstream in (
            torch.ones((), device=device).expand(3, 4, 5, 6),
            torch.randn(3, 1, 1, 6, device=device).expand(3, 4, 5, 6),
            *testing.strided(torch.randn(3, 4, 5, 6, device=device)).values(),
        ):
            found, expected = [], []
            for gradient, into in ((upstream, found), (upstream.contiguous(), expected)):
                torch.manual_seed(5)
                drawn, kl = genperf.gaussian_sample(*leaves)
                grad_kl = torch.full((), 2.0, device=device).expand(3)
                into.extend(torch.autograd.grad((drawn, kl), leaves, (gradient, grad_kl if into is found else grad_kl.contiguous())))
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.once
@pytest.mark.parametrize("free_bits", [0.0, 0.2])
@pytest.mark.parametrize("form", ["two", "packed", "prior"])
def test_derivatives_of_both_orders(form, free_bits, device):
    tensors = [torch.randn(3, 4, 2, dtype=torch.float64, device=device, requires_grad=True) for _ in range(4 if form == "prior" else 2)]
    noise = torch.randn(3, 4 // (2 if form == "packed" else 1), 2, dtype=torch.float64, device=device)

    def function(first, second, *prior):
        if form == "packed":
            return genperf.gaussian_sample(first * second, noise=noise, free_bits=free_bits)
        return genperf.gaussian_sample(first, second, noise=noise, prior=prior or None, free_bits=free_bits)

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["two", "packed", "prior"])
def test_second_derivatives_of_the_kernels(form, dtype, device):
    """create_graph=True through the compiled forward, compared with the reference."""
    shape = (3, 4, 6)
    mean, logvar = (t.clamp(-3, 3) for t in moments(shape, dtype, device))
    inputs = [packed(mean, logvar)] if form == "packed" else [mean, logvar]
    prior = [torch.randn(shape, device=device).to(dtype) for _ in range(2)] if form == "prior" else []
    results = []
    for impl in (None, "reference"):
        leaves = [t.detach().requires_grad_() for t in (*inputs, *prior)]
        torch.manual_seed(5)
        drawn, kl = genperf.gaussian_sample(*leaves[: len(inputs)], prior=tuple(leaves[len(inputs) :]) or None, impl=impl)
        slopes = torch.autograd.grad(drawn.float().sin().sum() + kl.square().sum(), leaves, create_graph=True)
        results.append(torch.autograd.grad(sum(slope.float().square().sum() for slope in slopes), leaves))
    for native, reference in zip(*results, strict=True):
        torch.testing.assert_close(native, reference, rtol=1e-4 if dtype == torch.float32 else 0.05, atol=1e-3)


def test_functional_gradient(device):
    mean, logvar = moments((4, 6), torch.float32, device)
    noise = torch.randn(4, 6, device=device)

    def loss(mean):
        drawn, kl = genperf.gaussian_sample(mean, logvar, noise=noise)
        return drawn.square().sum() + kl.sum()

    found = torch.func.grad(loss)(mean)
    leaf = mean.detach().requires_grad_()
    torch.testing.assert_close(found, torch.autograd.grad(loss(leaf), leaf)[0])


def test_noise_with_a_gradient_runs_the_reference(device):
    mean, logvar = moments((4, 6), torch.float32, device)
    noise = torch.randn(4, 6, device=device, requires_grad=True)
    drawn, _ = genperf.gaussian_sample(mean, logvar, noise=noise)
    (gradient,) = torch.autograd.grad(drawn.sum(), noise)
    torch.testing.assert_close(gradient, (logvar.clamp(-30, 20) / 2).exp())
    with pytest.raises(NotImplementedError, match="noise requires a gradient"):
        genperf.gaussian_sample(mean, logvar, noise=noise, impl="native")


def test_randomness(device):
    mean, logvar = moments((3, 4, 5), torch.float32, device)
    testing.check_randomness(lambda generator: genperf.gaussian_sample(mean, logvar, generator=generator)[0], device)
    drawn = genperf.gaussian_sample(torch.zeros(64, 64, device=device), torch.zeros(64, 64, device=device))[0]
    assert len(drawn.unique()) == drawn.numel()  # the samples of a batch do not share noise
    testing.check_checkpoint(lambda x: torch.stack([out.square().sum() for out in genperf.gaussian_sample(x * 2, x)]).sum(), mean)


def test_bitwise_equal_for_any_number_of_threads(device, set_threads):
    inputs = moments((5, 3, 700), torch.float32, device)
    expected = sample(*inputs)
    for count in (1, 2, 3):
        set_threads(count)
        for name, value in sample(*inputs).items():
            assert torch.equal(value, expected[name]), name


def test_cuda_graph(device):
    if device == "cpu":
        pytest.skip("CUDA graphs need a GPU")
    mean, logvar = moments((3, 4, 5), torch.float32, device)
    testing.check_cuda_graph(lambda: genperf.gaussian_sample(mean, logvar)[0])


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_only_the_moments_and_a_seed_are_saved(dtype, device):
    x = torch.randn(4, 6, 5, 5, device=device).to(dtype).requires_grad_()
    mean, logvar = (torch.randn(4, 6, 5, 5, device=device).to(dtype).requires_grad_() for _ in range(2))
    assert testing.saved_bytes(lambda: genperf.gaussian_sample(x)) == x.numel() * x.element_size() + 8
    assert testing.saved_bytes(lambda: genperf.gaussian_sample(mean, logvar)) == 2 * x.numel() * x.element_size() + 8


def test_poisoned_memory(device):
    inputs = moments((5, 3, 21), torch.float32, device)
    for arguments in (inputs, (packed(*inputs),)):
        for prior in (None, [t.clamp(-3, 3) for t in inputs]):
            clean = sample(*arguments, prior=prior)
            with testing.poisoned_memory():
                for name, value in sample(*arguments, prior=prior).items():
                    assert torch.equal(value, clean[name]), name


@pytest.mark.once
def test_contract(device):
    mean, logvar, noise, prior = torch.randn(4, 2, 3, 35, device=device)
    channels_last = torch.randn(2, 35, 3, device=device).transpose(1, 2)
    seed = torch.tensor(77, device=device)
    half = mean.bfloat16()
    testing.check_op(
        "gaussian_sample",
        [
            (mean, logvar, None, None, None, seed, 3, 0.0, False),
            (channels_last, channels_last, prior, prior, noise, None, 0, 0.1, False),
            (half, half, None, None, noise, None, 0, 0.0, True),
        ],
    )
    grads = [torch.empty(2, 3, 35, device=device) for _ in range(4)]
    testing.check_op(
        "gaussian_sample_backward",
        [
            (grads[0], grads[1], None, None, noise, torch.ones(2, device=device), mean, logvar, None, None, None, seed, 3, 0.0),
            (*grads, None, torch.ones(2, device=device), mean, logvar, prior, prior, noise, None, 0, 0.1),
            (grads[0], grads[1], None, None, noise, None, mean, logvar, None, None, None, seed, 3, 0.0),
        ],
    )
    if device == "cpu":
        both = torch.cat([mean, logvar], 1)
        testing.check_op("gaussian_sample_packed", [(both, None, seed, 3, 1, 0.0, False), (both.half(), noise, None, 0, 1, 0.1, True)])
        kl_grad = torch.ones(2)
        backward = [(noise, kl_grad, both, None, seed, 3, 1, 0.0), (None, kl_grad, both, noise, None, 0, 1, 0.1)]
        testing.check_op("gaussian_sample_packed_backward", backward)


@pytest.mark.once
def test_compiles(device):
    sizes = [tuple(torch.randn(3, b, 8, h, 3, device=device)) for b, h in [(2, 5), (3, 7)]]
    testing.check_compile(lambda mean, logvar, noise: genperf.gaussian_sample(mean, logvar, noise=noise.detach()), *sizes)
    sizes = [(torch.randn(b, 8, h, 3, device=device), torch.randn(b, 4, h, 3, device=device)) for b, h in [(2, 5), (3, 7)]]
    testing.check_compile(lambda x, noise: genperf.gaussian_sample(x, noise=noise.detach(), free_bits=0.1), *sizes)


@pytest.mark.once
def test_compiled_noise(device):
    torch._dynamo.reset()
    compiled = torch.compile(lambda mean, logvar: genperf.gaussian_sample(mean, logvar), fullgraph=True)
    mean = torch.zeros(64, 1024, device=device, requires_grad=True)
    logvar = torch.zeros(64, 1024, device=device)
    first, _ = compiled(mean, logvar)
    with torch._dynamo.config.patch(error_on_recompile=True):
        second, _ = compiled(mean, logvar)
    assert not torch.equal(first, second)
    for drawn in (first, second):
        assert abs(drawn.mean().item()) < 4.5 / 256
        assert abs(drawn.var().item() - 1) < 4.5 * 2**0.5 / 256
    # Backward draws the noise of its forward: d(sample^2 / 2) / d logvar = sample * noise / 2, and sample = noise here.
    logvar.requires_grad_()
    drawn, _ = compiled(mean, logvar)
    torch.testing.assert_close(torch.autograd.grad(drawn.square().sum() / 2, logvar)[0], drawn.detach().square() / 2)


GOOD = torch.zeros(4, 6)


@pytest.mark.parametrize(
    ("message", "error", "arguments", "options"),
    [
        ("mean must be a tensor, got list", TypeError, ([1.0],), {}),
        ("mean must be float32", TypeError, (GOOD.int(),), {}),
        ("mean must have a batch dimension", ValueError, (torch.tensor(1.0),), {}),
        ("dim must be a dimension of mean other than the batch, got dim=0", ValueError, (GOOD,), {"dim": 0}),
        ("dim must be a dimension of mean other than the batch, got dim=-2", ValueError, (GOOD,), {"dim": -2}),
        ("dim must be a dimension of mean", ValueError, (GOOD,), {"dim": 2}),
        ("must have an even size along dim=1", ValueError, (torch.zeros(4, 5),), {}),
        ("logvar must have the shape of mean", ValueError, (GOOD, torch.zeros(4, 5)), {}),
        ("logvar must have the dtype and device of mean", TypeError, (GOOD, GOOD.double()), {}),
        ("logvar must be a tensor", TypeError, (GOOD, 0.0), {}),
        ("prior must be a tensor", TypeError, (GOOD, GOOD), {"prior": 1.0}),
        ("prior must have the dtype and device", TypeError, (GOOD, GOOD), {"prior": (GOOD.double(), GOOD.double())}),
        ("prior must have or expand to the shape", ValueError, (GOOD, GOOD), {"prior": (GOOD[:2], GOOD[:2])}),
        ("the prior's logvar must have the shape of prior", ValueError, (GOOD, GOOD), {"prior": (GOOD, GOOD[:2])}),
        ("free_bits must not be negative", ValueError, (GOOD,), {"free_bits": -1.0}),
        ("free_bits must not be negative", ValueError, (GOOD,), {"free_bits": float("nan")}),
        ("noise must have shape", ValueError, (GOOD,), {"noise": GOOD}),
        ("noise must be float32 or have the dtype", TypeError, (GOOD, GOOD), {"noise": GOOD.double()}),
        ("noise and mean must be on one device", ValueError, (GOOD, GOOD), {"noise": GOOD.to("meta")}),
        ("dtype must be None", TypeError, (GOOD,), {"dtype": torch.float64}),
        ("generator must be a torch.Generator", TypeError, (GOOD,), {"generator": 3}),
        ("impl='triton' cannot run here", NotImplementedError, (GOOD,), {"impl": "triton"}),
        ("impl='native' cannot run here", NotImplementedError, (GOOD.double(),), {"impl": "native"}),
        ("impl must be None or one of", ValueError, (GOOD,), {"impl": "fast"}),
    ],
)
def test_bad_input(message, error, arguments, options):
    with pytest.raises(error, match="gaussian_sample: .*" + message):
        genperf.gaussian_sample(*arguments, **options)


def test_forward_mode_runs_the_reference(device):
    moments, tangent = torch.randn(2, 3, 8, device=device)
    noise = torch.randn(3, 4, device=device)
    found = torch.func.jvp(lambda x: genperf.gaussian_sample(x, noise=noise), (moments,), (tangent,))[1]
    expected = torch.func.jvp(lambda x: genperf.gaussian_sample(x, noise=noise, impl="reference"), (moments,), (tangent,))[1]
    for value, want in zip(found, expected, strict=True):
        assert want.any()
        torch.testing.assert_close(value, want)


def test_prior_with_unusual_strides(device):
    """Gradients that cannot be viewed as rows are contiguous instead."""
    mean = torch.randn(1, 1, 33, 17, 4, device=device).expand(1, 2, 33, 17, 4).detach().requires_grad_()
    prior = [torch.randn(68, device=device).as_strided((1, 1, 1, 17, 4), (68, 1, 68, 4, 1)).requires_grad_() for _ in range(2)]
    noise = torch.randn(mean.shape, device=device)

    def gradients(impl):
        sample, kl = genperf.gaussian_sample(mean, mean.detach(), prior=tuple(prior), noise=noise, impl=impl)
        return torch.autograd.grad(sample.sum() + kl.sum(), (mean, *prior))

    for value, want in zip(gradients(None), gradients("reference"), strict=True):
        torch.testing.assert_close(value, want)


def test_unused_kl_does_not_affect_the_gradient(device):
    """Its derivative may be infinite and must not be multiplied by zero."""
    mean = torch.tensor([[1e30, 1.0]], device=device, requires_grad=True)
    sample, _ = genperf.gaussian_sample(mean, torch.zeros_like(mean), prior=(torch.zeros_like(mean), torch.full_like(mean, -30)))
    assert torch.equal(torch.autograd.grad(sample.sum(), mean)[0], torch.ones_like(mean))
