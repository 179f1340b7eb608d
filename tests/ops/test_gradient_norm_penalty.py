# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

import genperf
from genperf import testing

pytestmark = pytest.mark.compiled

SHAPES = [(1, 1), (7, 31), (5, 3, 33), (6, 3, 7, 5), (5, 2, 3, 5, 7), (33, 2), (9, 5000), (4000,)]
OPTIONS = [{}, {"center": 0.0}, {"center": 2.5}, {"one_sided": True}, {"center": 0.0, "one_sided": True}]


def penalty(gradients, impl=None, **options):
    """The value and its gradient; the input keeps its layout."""
    leaf = gradients.detach().requires_grad_()
    value = genperf.gradient_norm_penalty(leaf, impl=impl, **options)
    return {"penalty": value.detach(), "grad": torch.autograd.grad(value, leaf, torch.full_like(value, 3.0))[0]}


def gradients_of(shape, dtype, device):
    """Norms from about 0.2 to 5, on either side of the centers."""
    norms = torch.linspace(0.2, 5, shape[0], device=device).reshape(-1, *[1] * (len(shape) - 1))
    return (norms * torch.randn(shape, device=device) / math.sqrt(math.prod(shape[1:]))).to(dtype)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_accuracy(dtype, options, device):
    for shape in SHAPES:
        gradients = gradients_of(shape, dtype, device)
        native, exact = penalty(gradients, **options), penalty(gradients.double(), "reference", **options)
        plain = penalty(gradients, "reference", **options)
        for name in native:
            testing.assert_accurate(f"{name} {shape}", native[name], exact[name], plain[name])


@pytest.mark.parametrize("impl", [None, "reference"])
def test_one_norm_per_sample_over_all_its_dimensions(impl, device):
    """Errors of published penalties: a norm along one dimension, a norm over the batch, a sum instead of a mean."""
    gradients = torch.zeros(64, 3, 4, 5, device=device)
    gradients[:, 1, 2, 3] = 0.6
    gradients[:, 2, 0, 1] = 0.8
    assert genperf.gradient_norm_penalty(gradients, impl=impl) < 1e-12
    torch.testing.assert_close(genperf.gradient_norm_penalty(3 * gradients, impl=impl), torch.tensor(4.0, device=device))
    torch.testing.assert_close(genperf.gradient_norm_penalty(3 * gradients, center=0.0, impl=impl), torch.tensor(9.0, device=device))
    half = gradients * (torch.arange(64, device=device) % 2).view(-1, 1, 1, 1) * 3
    torch.testing.assert_close(genperf.gradient_norm_penalty(half, impl=impl), torch.tensor((4.0 + 1.0) / 2, device=device))
    torch.testing.assert_close(genperf.gradient_norm_penalty(half, one_sided=True, impl=impl), torch.tensor(2.0, device=device))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equivalent_to_the_plain_lines(options, device):
    gradients = gradients_of((6, 3, 5), torch.float64, device).requires_grad_()
    norm = torch.linalg.vector_norm(gradients.flatten(1), dim=1)
    excess = norm - options.get("center", 1.0)
    expected = (excess.clamp(min=0) if options.get("one_sided") else excess).square().mean()
    found = genperf.gradient_norm_penalty(gradients, **options)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(out, gradients)[0] for out in (found, expected)))


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [*testing.DTYPES, torch.float64], ids=str)
def test_derivative_at_a_zero_gradient_is_zero(dtype, options, impl, device):
    """Of both orders, never NaN; the derivatives of other samples are not affected."""
    gradients = gradients_of((5, 3, 7), dtype, device)
    gradients[2] = 0
    found = penalty(gradients, impl if dtype != torch.float64 else "reference", **options)
    assert (found["grad"][2] == 0).all()
    assert found["grad"].isfinite().all()
    assert (found["grad"][4] != 0).all()
    leaf = gradients.detach().requires_grad_()
    (slope,) = torch.autograd.grad(genperf.gradient_norm_penalty(leaf, impl=impl, **options), leaf, create_graph=True)
    assert torch.autograd.grad(slope.float().square().sum(), leaf)[0].isfinite().all()


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 9), (2, 3, 7, 5), (2, 3, 2, 4, 5)], ids=str)
def test_layouts_agree(shape, device):
    gradients = gradients_of(shape, torch.float32, device)
    for options in OPTIONS:
        expected = penalty(gradients, **options)
        for name, laid_out in testing.strided(gradients).items():
            for key, value in penalty(laid_out, **options).items():
                message = f"{key} of {name}: "
                torch.testing.assert_close(value, expected[key], rtol=2e-6, atol=1e-7, msg=lambda text, m=message: m + text)


def test_expanded_gradients(device):
    """As from a critic whose last operation is a sum or a mean."""
    gradients = torch.randn(4, 1, 1, device=device).expand(4, 6, 5)
    for key, value in penalty(gradients).items():
        torch.testing.assert_close(value, penalty(gradients.contiguous())[key])
    constant = torch.tensor(0.5, device=device).expand(3, 4)
    torch.testing.assert_close(genperf.gradient_norm_penalty(constant, center=0.0), torch.tensor(1.0, device=device))


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_empty(options, impl, device):
    for shape in ((0, 4), (0, 3, 2, 2), (0,)):
        found = penalty(torch.empty(shape, device=device), impl, **options)
        assert found["penalty"] == 0
        assert found["grad"].shape == shape
    found = penalty(torch.empty(3, 0, device=device), impl, **options)  # norms of empty samples are zero
    expected = 0.0 if options.get("one_sided") else options.get("center", 1.0) ** 2
    torch.testing.assert_close(found["penalty"], torch.tensor(expected, device=device))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_values_reach_the_penalty(bad, options, device):
    gradients = gradients_of((5, 3, 7), torch.float32, device)
    clean = penalty(gradients, **options)
    gradients[1, 2, 3] = bad
    found, plain = penalty(gradients, **options), penalty(gradients, "reference", **options)
    assert not found["penalty"].isfinite()
    assert torch.equal(found["penalty"].isnan(), plain["penalty"].isnan())
    others = [0, 2, 3, 4]
    assert torch.equal(found["grad"][others], clean["grad"][others])
    assert torch.equal(found["grad"].isnan(), plain["grad"].isnan())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_accumulates_in_float32(dtype, device):
    """Squares of 60000 overflow in float16, those of 1e-4 underflow."""
    for value in (60000.0, 1e-4):
        gradients = torch.full((3, 1000), value, device=device).to(dtype)
        found = genperf.gradient_norm_penalty(gradients, center=0.0)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, gradients.float().square().sum() / 3)
        assert not penalty(gradients)["grad"].isnan().any()


def test_frozen_input(device):
    gradients = torch.randn(5, 3, device=device)
    assert not genperf.gradient_norm_penalty(gradients).requires_grad
    with torch.no_grad():
        assert not genperf.gradient_norm_penalty(gradients.requires_grad_()).requires_grad


@pytest.mark.once
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_derivatives_of_both_orders(options, device):
    gradients = gradients_of((5, 3, 2), torch.float64, device).requires_grad_()

    def function(x):
        return genperf.gradient_norm_penalty(x, **options)

    assert torch.autograd.gradcheck(function, gradients)
    assert torch.autograd.gradgradcheck(function, gradients)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_second_derivatives_of_the_kernels(options, device):
    """create_graph=True through the compiled forward, compared with the reference."""
    leaf = gradients_of((6, 3, 7), torch.float32, device).requires_grad_()
    results = []
    for impl in (None, "reference"):
        value = genperf.gradient_norm_penalty(leaf, impl=impl, **options)
        (slope,) = torch.autograd.grad(value.square(), leaf, create_graph=True)
        results.append(torch.autograd.grad(slope.square().sum(), leaf)[0])
    torch.testing.assert_close(*results)


def test_through_a_critic(device):
    """The gradient of the penalty reaches the critic's weights as in plain PyTorch."""
    critic = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 1)).to(device)
    images = torch.randn(6, 3, 8, 8, device=device, requires_grad=True)
    results = []
    for native in (True, False):
        (gradients,) = torch.autograd.grad(critic(images).sum(), images, create_graph=True)
        if native:
            value = genperf.gradient_norm_penalty(gradients)
        else:
            value = (torch.linalg.vector_norm(gradients.flatten(1), dim=1) - 1).square().mean()
        results.append([value, *torch.autograd.grad(value, [p for p in critic.parameters() if p.dim() > 1])])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_functional_gradient(device):
    gradients = gradients_of((6, 5), torch.float32, device)
    expected = penalty(gradients)["grad"] / 3
    torch.testing.assert_close(torch.func.grad(genperf.gradient_norm_penalty)(gradients), expected)


def test_bitwise_equal_in_every_run_and_for_any_number_of_threads(device, set_threads):
    gradients = gradients_of((7, 3, 5000), torch.float32, device)
    expected = penalty(gradients)
    for count in (1, 2, 3):
        set_threads(count)
        for name, value in penalty(gradients).items():
            assert torch.equal(value, expected[name]), name


def test_only_the_gradients_and_their_norms_are_saved(device):
    for dtype in testing.DTYPES:
        gradients = torch.randn(6, 3, 8, 8, device=device).to(dtype).requires_grad_()
        expected = gradients.numel() * gradients.element_size() + 6 * 4
        assert testing.saved_bytes(lambda x=gradients: genperf.gradient_norm_penalty(x)) == expected


def test_poisoned_memory(device):
    gradients = gradients_of((7, 3, 21), torch.float32, device)
    for options in OPTIONS:
        clean = penalty(gradients, **options)
        with testing.poisoned_memory():
            for name, value in penalty(gradients, **options).items():
                assert torch.equal(value, clean[name]), name


@pytest.mark.once
def test_contract(device):
    gradients = torch.randn(4, 3, 35, device=device)
    channels_last = torch.randn(4, 35, 3, device=device).transpose(1, 2)
    testing.check_op("gradient_norm_penalty", [(gradients, 1.0, False), (channels_last, 0.0, True), (gradients.bfloat16(), 2.0, False)])
    norms = gradients.flatten(1).norm(dim=1)
    upstream = torch.tensor(2.0, device=device)
    testing.check_op(
        "gradient_norm_penalty_backward", [(upstream, gradients, norms, 1.0, False), (upstream, channels_last, norms, 0.0, True)]
    )
    sizes = [(torch.randn(b, 5, h, device=device),) for b, h in ((6, 4), (9, 7))]
    testing.check_compile(lambda x: (genperf.gradient_norm_penalty(x),), *sizes)


GOOD = torch.zeros(4, 6)


@pytest.mark.parametrize(
    ("message", "error", "gradients", "options"),
    [
        ("gradients must be a tensor, got list", TypeError, [1.0], {}),
        ("gradients must be float32", TypeError, GOOD.int(), {}),
        ("gradients must have a batch dimension", ValueError, torch.tensor(1.0), {}),
        ("center must be a norm, at least 0 and finite, got -1.0", ValueError, GOOD, {"center": -1.0}),
        ("center must be a norm", ValueError, GOOD, {"center": math.inf}),
        ("center must be a norm", ValueError, GOOD, {"center": math.nan}),
        ("impl='triton' cannot run here", NotImplementedError, GOOD, {"impl": "triton"}),
        ("impl='native' cannot run here", NotImplementedError, GOOD.double(), {"impl": "native"}),
        ("impl must be None or one of", ValueError, GOOD, {"impl": "fast"}),
    ],
)
def test_bad_input(message, error, gradients, options):
    with pytest.raises(error, match="gradient_norm_penalty: .*" + message):
        genperf.gradient_norm_penalty(gradients, **options)


def test_forward_mode_runs_the_reference(device):
    gradients, tangent = torch.randn(2, 3, 8, device=device)
    found = torch.func.jvp(genperf.gradient_norm_penalty, (gradients,), (tangent,))[1]
    expected = torch.func.jvp(lambda x: genperf.gradient_norm_penalty(x, impl="reference"), (gradients,), (tangent,))[1]
    assert expected != 0
    torch.testing.assert_close(found, expected)


def test_a_norm_without_a_float32_inverse(device):
    gradients = torch.tensor([[2e-39, 0.0], [0.0, -3e-39], [3.0, 4.0]], device=device, requires_grad=True)
    penalty = genperf.gradient_norm_penalty(gradients)
    (found,) = torch.autograd.grad(penalty, gradients)
    expected = torch.tensor([[-1.0, 0.0], [0.0, 1.0], [4 * 0.6, 4 * 0.8]], device=device) * 2 / 3
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
