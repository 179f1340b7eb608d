# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

import genperf
from genperf import testing
from genperf.ops._noise import uniform_weights

pytestmark = pytest.mark.compiled

SHAPES = [(33,), (7, 31), (5, 3, 33), (6, 3, 7, 5), (5, 2, 3, 5, 7), (9, 5000)]


def mix(real, fake, weight=None, *, seed=5, impl=None):
    """The output and the gradients of a loss with a weight for every element; inputs keep their layout."""
    leaves = [t.detach().requires_grad_() for t in (real, fake, weight) if t is not None]
    torch.manual_seed(seed)
    mixed = genperf.interpolate(*leaves[:2], weight=None if weight is None else leaves[2], impl=impl)
    # Multiples of 1/64, which are exact in every dtype.
    upstream = torch.linspace(-64, 64, mixed.numel(), device=mixed.device).round().div(64).reshape(mixed.shape).to(mixed.dtype)
    gradients = torch.autograd.grad(mixed, leaves, upstream)
    names = ("real.grad", "fake.grad", "weight.grad")[: len(leaves)]
    return {"mixed": mixed.detach(), **dict(zip(names, gradients, strict=True))}


def assert_matches(real, fake, weight=None):
    """The native error against float64 is at most twice that of the reference in the inputs' dtype."""
    native, plain = mix(real, fake, weight), mix(real, fake, weight, impl="reference")
    exact = mix(real.double(), fake.double(), None if weight is None else weight.double(), impl="reference")
    for name in native:
        testing.assert_accurate(f"{name} {list(real.shape)}", native[name], exact[name], plain[name])


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_accuracy(dtype, device):
    for shape in SHAPES:
        real, fake = torch.randn(2, *shape, device=device).to(dtype)
        assert_matches(real, fake)
        assert_matches(real + 100, fake + 100)
        assert_matches(real, fake, torch.rand(shape[0], device=device))
        assert_matches(real, fake, torch.rand(shape[0], device=device).to(dtype))


@pytest.mark.parametrize("dtype", [*testing.DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("impl", [None, "reference"])
def test_weights_zero_and_one_give_the_samples(impl, dtype, device):
    if dtype == torch.float64:
        impl = "reference"
    real, fake = torch.randn(2, 4, 3, 5, device=device).to(dtype)
    for share, expected in ((1.0, real), (0.0, fake)):
        weight = torch.full((4,), share, device=device)
        assert torch.equal(genperf.interpolate(real, fake, weight=weight, impl=impl), expected)


def test_one_weight_per_sample(device):
    """Not one per batch, element or channel; weights are uniform."""
    real, fake = torch.ones(5000, 3, 4, 5, device=device), torch.zeros(5000, 3, 4, 5, device=device)
    mixed = genperf.interpolate(real, fake)
    weight = mixed[:, :1, :1, :1]
    assert torch.equal(mixed, weight.expand_as(mixed))
    assert len(weight.unique()) >= 4998
    assert abs(weight.mean() - 0.5) < 4.5 * math.sqrt(1 / 12 / 5000)
    assert weight.min() >= 0
    assert weight.max() < 1


@pytest.mark.parametrize("first", [0, 2**32 - 20])
def test_drawn_weights_of_many_samples(first, device):
    real, fake = torch.ones(75, 1, device=device), torch.zeros(75, 1, device=device)
    torch.manual_seed(6)
    with genperf.sample_offset(first):
        mixed = genperf.interpolate(real, fake)
    torch.manual_seed(6)
    seed = torch.randint(torch.iinfo(torch.int64).max, (), dtype=torch.int64, device=device)
    assert torch.equal(mixed[:, 0], uniform_weights(seed, 75, first))


def test_gradients_are_the_weights(device):
    """Backward draws the weights of its own forward."""
    real, fake = torch.zeros(50, 7, device=device, requires_grad=True), torch.ones(50, 7, device=device, requires_grad=True)
    first, second = genperf.interpolate(real, fake), genperf.interpolate(real, fake)
    for mixed in (second, first):
        grad_real, grad_fake = torch.autograd.grad(mixed, (real, fake), torch.ones_like(mixed))
        torch.testing.assert_close(grad_fake, mixed.detach())
        torch.testing.assert_close(grad_real, 1 - mixed.detach())


@pytest.mark.parametrize("shape", [(5,), (3, 5), (3, 5, 9), (2, 3, 7, 5), (2, 3, 2, 4, 5)], ids=str)
def test_layouts_agree(shape, device):
    real, fake = torch.randn(2, *shape, device=device)
    weight = torch.rand(shape[0], device=device)
    for given in (None, weight):
        expected = mix(real, fake, given)
        for name, laid_out in testing.strided(real).items():
            for other in (fake, testing.strided(fake)[name]):
                for key, value in mix(laid_out, other, given).items():
                    message = f"{key} of {name}: "
                    torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-6, msg=lambda text, m=message: m + text)
    spaced = torch.rand(2 * shape[0], device=device)[::2]
    torch.testing.assert_close(genperf.interpolate(real, fake, weight=spaced), genperf.interpolate(real, fake, weight=spaced.contiguous()))


def test_expanded_samples(device):
    real, fake = torch.randn(1, 5, 1, device=device).expand(3, 5, 7), torch.randn(3, 1, 7, device=device).expand(3, 5, 7)
    expected = mix(real.contiguous(), fake.contiguous())
    for name, value in mix(real, fake).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("function", ["interpolate", "perturb"])
def test_memory_format_is_kept(function, device):
    """The memory format of real, whatever that of fake is."""
    for memory_format, shape in ((torch.channels_last, (2, 3, 6, 5)), (torch.channels_last_3d, (2, 3, 4, 6, 5))):
        contiguous = torch.randn(shape, device=device)
        real = contiguous.to(memory_format=memory_format)
        if function == "perturb":
            assert genperf.perturb(real).is_contiguous(memory_format=memory_format)
            continue
        for fake in (contiguous, real):
            assert genperf.interpolate(real, fake).is_contiguous(memory_format=memory_format)
        assert genperf.interpolate(contiguous, real).is_contiguous()


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("shape", [(0,), (0, 4), (0, 4, 3, 3), (3, 0), (3, 4, 0)], ids=str)
def test_empty(shape, impl, device):
    empty = torch.empty(shape, device=device)
    for weight in (None, torch.rand(shape[0], device=device)):
        for name, value in mix(empty, empty, weight, impl=impl).items():
            assert value.shape == (shape[:1] if name == "weight.grad" else shape), name
            assert (value == 0).all()
    assert genperf.perturb(empty, impl=impl).shape == shape


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_values_stay_at_their_element(bad, device):
    real, fake = torch.randn(2, 5, 3, 7, device=device)
    clean = mix(real, fake)
    real[2, 1, 4] = bad
    found = mix(real, fake)
    assert not found["mixed"][2, 1, 4].isfinite()
    found["mixed"][2, 1, 4] = clean["mixed"][2, 1, 4]
    for name, value in found.items():
        assert torch.equal(value, clean[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_never_nan(dtype, device):
    real = torch.full((9, 7), 65000.0, device=device).to(dtype)
    for name, value in mix(real, -real).items():
        assert value.isfinite().all(), name
    assert genperf.interpolate(real, real).isfinite().all()


def test_frozen_inputs(device):
    real, fake = torch.randn(2, 4, 6, device=device)
    weight = torch.rand(4, device=device)
    every, drawn = mix(real, fake, weight), mix(real, fake)
    upstream = torch.linspace(-64, 64, 24, device=device).round().div(64).view(4, 6)
    for learns in range(1, 8):
        leaves = [t.detach().requires_grad_(bool(learns >> i & 1)) for i, t in enumerate((real, fake, weight))]
        genperf.interpolate(*leaves[:2], weight=leaves[2]).backward(upstream)
        for leaf, name in zip(leaves, ("real.grad", "fake.grad", "weight.grad"), strict=True):
            assert (leaf.grad is not None) == leaf.requires_grad
            if leaf.requires_grad:
                torch.testing.assert_close(leaf.grad, every[name])
    for learns in (1, 2):
        leaves = [t.detach().requires_grad_(bool(learns >> i & 1)) for i, t in enumerate((real, fake))]
        torch.manual_seed(5)
        genperf.interpolate(*leaves).backward(upstream)
        for leaf, name in zip(leaves, ("real.grad", "fake.grad"), strict=True):
            if leaf.requires_grad:
                torch.testing.assert_close(leaf.grad, drawn[name])
    assert not genperf.interpolate(real, fake).requires_grad
    with torch.no_grad():
        assert not genperf.interpolate(real.requires_grad_(), fake).requires_grad


def test_output_gradients_of_any_strides(device):
    real, fake = torch.randn(2, 3, 4, 5, 6, device=device)
    weight = torch.rand(3, device=device)
    leaves = [t.requires_grad_() for t in (real, fake, weight)]
    for upstream in (
        torch.ones((), device=device).expand(3, 4, 5, 6),
        torch.randn(3, 1, 1, 6, device=device).expand(3, 4, 5, 6),
        *testing.strided(torch.randn(3, 4, 5, 6, device=device)).values(),
    ):
        mixed = genperf.interpolate(real, fake, weight=weight)
        found, expected = (torch.autograd.grad(mixed, leaves, g, retain_graph=True) for g in (upstream, upstream.contiguous()))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.once
@pytest.mark.parametrize("given", [False, True], ids=["drawn", "given"])
def test_derivatives_of_both_orders(given, device):
    real, fake = (torch.randn(3, 4, 2, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2))
    inputs = (real, fake, torch.rand(3, dtype=torch.float64, device=device, requires_grad=True)) if given else (real, fake)

    def function(real, fake, weight=None):
        torch.manual_seed(5)
        return genperf.interpolate(real, fake, weight=weight)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["drawn", "given"])
def test_second_derivatives_of_the_kernels(given, dtype, device):
    """create_graph=True through the compiled forward, compared with the reference."""
    inputs = [torch.randn(3, 4, 6, device=device).to(dtype).requires_grad_() for _ in range(2)]
    if given:
        inputs.append(torch.rand(3, device=device).requires_grad_())
    results = []
    for impl in (None, "reference"):
        torch.manual_seed(5)
        mixed = genperf.interpolate(*inputs[:2], weight=inputs[2] if given else None, impl=impl)
        slopes = torch.autograd.grad(mixed.float().sin().sum(), inputs, create_graph=True)
        results.append(torch.autograd.grad(sum(slope.float().square().sum() for slope in slopes), inputs))
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for native, reference in zip(*results, strict=True):
        torch.testing.assert_close(native, reference, rtol=tolerance, atol=tolerance)


def test_through_a_gradient_penalty(device):
    """The gradient of the penalty in fake flows through the mixed samples, as in plain PyTorch."""
    critic = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 1)).to(device)
    real, fake = torch.randn(5, 6, device=device), torch.randn(5, 6, device=device, requires_grad=True)
    weight = torch.rand(5, device=device)
    results = []
    for mixed in (genperf.interpolate(real, fake, weight=weight), torch.lerp(fake, real, weight[:, None])):
        (gradients,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
        value = (gradients.norm(dim=1) - 1).square().mean()
        results.append(torch.autograd.grad(value, (fake, critic[0].weight)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_functional_gradient(device):
    real, fake = torch.randn(2, 4, 6, device=device)
    weight = torch.rand(4, device=device)
    found = torch.func.grad(lambda real: genperf.interpolate(real, fake, weight=weight).square().sum())(real)
    mixed = genperf.interpolate(real, fake, weight=weight)
    torch.testing.assert_close(found, 2 * mixed * weight[:, None])


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_perturb_accuracy(dtype, device):
    for shape in SHAPES:
        real = (3 + 2 * torch.randn(shape, device=device)).to(dtype)
        for options in ({}, {"scale": 2.0}, {"scale": torch.tensor(0.25, device=device)}, {"weight": torch.rand(shape[0], device=device)}):
            results = []
            for x, impl in ((real, None), (real.double(), "reference"), (real, "reference")):
                torch.manual_seed(5)
                results.append(genperf.perturb(x, impl=impl, **options))
            testing.assert_accurate(f"perturb {shape}", *results)


@pytest.mark.parametrize("impl", [None, "reference"])
def test_perturb_equals_its_definition(impl, device):
    real = torch.randn(400, 1000, device=device) * 3 + 1
    half = torch.full((400,), 0.5, device=device)
    shift = 2 * (genperf.perturb(real, weight=half, impl=impl) - real) / (0.5 * real.std())
    assert shift.min() > -1e-4
    assert shift.max() < 1 + 1e-4
    assert abs(shift.mean() - 0.5) < 4.5 * math.sqrt(1 / 12 / shift.numel()) + 1e-5
    # With drawn weights each sample moves a different fraction of the way.
    moved = (genperf.perturb(real, impl=impl) - real).mean(1) / (0.5 * real.std()) * 2
    assert abs(moved.mean() - 0.5) < 4.5 * math.sqrt(1 / 12 / 400)
    assert moved.std() > 0.2
    assert torch.equal(genperf.perturb(real, scale=0.0, impl=impl), real)
    alone = torch.randn(1, device=device)
    assert torch.equal(genperf.perturb(alone, impl=impl), alone)


@pytest.mark.parametrize("impl", [None, "reference"])
def test_perturb_passes_the_gradient_unchanged(impl, device):
    for dtype in testing.DTYPES:
        real = torch.randn(4, 6, device=device).to(dtype).requires_grad_()
        upstream = torch.randn(4, 6, device=device).to(dtype)
        assert torch.equal(torch.autograd.grad(genperf.perturb(real, impl=impl), real, upstream)[0], upstream)
    (slope,) = torch.autograd.grad(genperf.perturb(real, impl=impl).float().sin().sum(), real, create_graph=True)
    assert torch.autograd.grad(slope.float().sum(), real)[0].isfinite().all()


def test_randomness(device):
    real, fake = torch.randn(2, 6, 5, 4, device=device)
    testing.check_randomness(lambda generator: genperf.interpolate(real, fake, generator=generator), device)
    testing.check_randomness(lambda generator: genperf.perturb(real, generator=generator), device)
    testing.check_checkpoint(lambda real, fake: genperf.interpolate(real * 2, fake).square().sum(), real, fake)
    testing.check_checkpoint(lambda real: genperf.perturb(real * 2).square().sum(), real)


def test_bitwise_equal_for_any_number_of_threads(device, set_threads):
    real, fake = torch.randn(2, 7, 3, 5000, device=device)
    weight = torch.rand(7, device=device)
    expected = mix(real, fake, weight)
    for count in (1, 2, 3):
        set_threads(count)
        for name, value in mix(real, fake, weight).items():
            assert torch.equal(value, expected[name]), name


def test_cuda_graph(device):
    if device == "cpu":
        pytest.skip("CUDA graphs need a GPU")
    real, fake = torch.randn(2, 6, 5, 4, device=device)
    testing.check_cuda_graph(lambda: genperf.interpolate(real, fake))
    testing.check_cuda_graph(lambda: genperf.perturb(real))


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_only_a_seed_is_saved(dtype, device):
    real, fake = (torch.randn(6, 3, 8, 8, device=device).to(dtype).requires_grad_() for _ in range(2))
    weight = torch.rand(6, device=device)
    assert testing.saved_bytes(lambda: genperf.interpolate(real, fake)) == 8
    assert testing.saved_bytes(lambda: genperf.interpolate(real, fake, weight=weight)) == 6 * 4
    assert testing.saved_bytes(lambda: genperf.perturb(real)) == 0
    learns = testing.saved_bytes(lambda: genperf.interpolate(real, fake, weight=weight.requires_grad_()))
    assert learns == 2 * real.numel() * real.element_size() + 6 * 4


def test_poisoned_memory(device):
    real, fake = torch.randn(2, 7, 3, 21, device=device)
    for weight in (None, torch.rand(7, device=device)):
        clean = mix(real, fake, weight)
        with testing.poisoned_memory():
            for name, value in mix(real, fake, weight).items():
                assert torch.equal(value, clean[name]), name


@pytest.mark.once
def test_contract(device):
    real, fake = torch.randn(2, 4, 3, 35, device=device)
    channels_last = torch.randn(4, 35, 3, device=device).transpose(1, 2)
    weight, scale, seed = torch.rand(4, device=device), torch.tensor(0.5, device=device), torch.tensor(77, device=device)
    testing.check_op(
        "interpolate",
        [
            (real, fake, None, None, seed, 3),
            (channels_last, channels_last, None, weight, None, 0),
            (real.bfloat16(), None, scale, None, seed, 3),
            (real, None, scale, weight, seed, 0),
        ],
    )
    testing.check_op(
        "interpolate_backward",
        [(real, None, None, None, seed, 3), (real, fake, channels_last, weight, None, 0), (channels_last, None, None, weight, None, 0)],
    )


@pytest.mark.once
def test_compiles(device):
    sizes = [(*torch.randn(2, b, 5, h, device=device), torch.rand(b, device=device)) for b, h in ((6, 4), (9, 7))]
    testing.check_compile(lambda real, fake, weight: (genperf.interpolate(real, fake, weight=weight),), *sizes)


@pytest.mark.once
def test_compiled_noise(device):
    torch._dynamo.reset()
    compiled = torch.compile(lambda real, fake: (genperf.interpolate(real, fake), genperf.perturb(real)), fullgraph=True)
    real, fake = torch.ones(4000, 3, device=device, requires_grad=True), torch.zeros(4000, 3, device=device)
    first, _ = compiled(real, fake)
    with torch._dynamo.config.patch(error_on_recompile=True):
        second, perturbed = compiled(real, fake)
    assert not torch.equal(first, second)
    assert torch.equal(perturbed, real)  # the standard deviation of ones is 0
    for mixed in (first, second):
        assert abs(mixed[:, 0].mean().item() - 0.5) < 4.5 * math.sqrt(1 / 12 / 4000)
    assert torch.equal(torch.autograd.grad(second.sum(), real)[0], second.detach())


GOOD = torch.zeros(4, 6)


@pytest.mark.parametrize(
    ("message", "error", "arguments", "options"),
    [
        ("real must be a tensor, got list", TypeError, ([1.0], GOOD), {}),
        ("real must be float32", TypeError, (GOOD.int(), GOOD), {}),
        ("real must have a batch dimension", ValueError, (torch.tensor(1.0), GOOD), {}),
        ("fake must be a tensor", TypeError, (GOOD, 3.0), {}),
        ("real and fake must have the same shape", ValueError, (GOOD, GOOD[:3]), {}),
        ("real and fake must have the same dtype", TypeError, (GOOD, GOOD.double()), {}),
        ("weight must be a tensor", TypeError, (GOOD, GOOD), {"weight": 0.5}),
        ("weight must have one element per sample", ValueError, (GOOD, GOOD), {"weight": torch.zeros(3)}),
        ("weight must have one element per sample", ValueError, (GOOD, GOOD), {"weight": torch.zeros(4, 1)}),
        ("weight must be float32", TypeError, (GOOD, GOOD), {"weight": torch.zeros(4, dtype=torch.float64)}),
        ("generator must be a torch.Generator", TypeError, (GOOD, GOOD), {"generator": 3}),
        ("impl='triton' cannot run here", NotImplementedError, (GOOD, GOOD), {"impl": "triton"}),
        ("impl='native' cannot run here", NotImplementedError, (GOOD.double(), GOOD.double()), {"impl": "native"}),
        ("impl must be None or one of", ValueError, (GOOD, GOOD), {"impl": "fast"}),
    ],
)
def test_bad_input(message, error, arguments, options):
    with pytest.raises(error, match="interpolate: .*" + message):
        genperf.interpolate(*arguments, **options)


def test_bad_input_of_perturb():
    with pytest.raises(ValueError, match="perturb: scale must be a number or a tensor of one element"):
        genperf.perturb(GOOD, scale=torch.ones(2))
    with pytest.raises(TypeError, match="perturb: real must be float32"):
        genperf.perturb(GOOD.int())
    with pytest.raises(ValueError, match="perturb: real must have a batch dimension"):
        genperf.perturb(torch.tensor(1.0))
    with pytest.raises(NotImplementedError, match="weight requires a gradient"):
        genperf.perturb(GOOD, weight=torch.ones(4, requires_grad=True), impl="native")


def test_forward_mode_runs_the_reference(device):
    real, fake, tangent = torch.randn(3, 4, 5, device=device)
    weight = torch.rand(4, device=device)
    found = torch.func.jvp(lambda x: genperf.interpolate(x, fake, weight=weight), (real,), (tangent,))[1]
    torch.testing.assert_close(found, weight[:, None] * tangent)


def test_second_derivative_of_samples_of_one_element(device):
    real, fake = torch.randn(2, 3, device=device)
    real.requires_grad_()
    weight = torch.rand(3, device=device, requires_grad=True)
    mixed = genperf.interpolate(real, fake, weight=weight)
    (slope,) = torch.autograd.grad(mixed.square().sum(), weight, create_graph=True)
    (found,) = torch.autograd.grad(slope.sum(), weight)
    torch.testing.assert_close(found, 2 * (real.detach() - fake).square())
