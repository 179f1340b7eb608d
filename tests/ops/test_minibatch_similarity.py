# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

import genperf
from genperf import testing

pytestmark = pytest.mark.compiled

SHAPES = [(2, 3, 4), (7, 31, 5), (33, 5, 16), (65, 3, 1), (31, 1, 33), (130, 7, 3), (17, 1, 200)]


def similarity(features, impl=None):
    """The output and the gradient of a loss with a weight for every element; the input keeps its layout."""
    leaf = features.detach().requires_grad_()
    output = genperf.minibatch_similarity(leaf, impl)
    # Multiples of 1/64, which are exact in every dtype.
    weight = torch.linspace(-64, 64, output.numel(), device=output.device).round().div(64).reshape(output.shape).to(output.dtype)
    return {"similarity": output.detach(), "grad": torch.autograd.grad(output, leaf, weight)[0]}


def features_of(shape, dtype, device, scale=1.0):
    """Distances are about `scale`."""
    return (scale / max(1, shape[2]) * torch.randn(shape, device=device)).to(dtype)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_accuracy(dtype, device):
    for shape in SHAPES:
        for scale in (0.03, 1.0, 10.0):
            features = features_of(shape, dtype, device, scale)
            native, plain, exact = similarity(features), similarity(features, "reference"), similarity(features.double(), "reference")
            for name in native:
                testing.assert_accurate(f"{name} {shape}", native[name], exact[name], plain[name])


def test_equivalent_to_the_plain_lines(device):
    features = torch.randn(9, 4, 3, dtype=torch.float64, device=device, requires_grad=True)
    distance = (features.unsqueeze(0) - features.unsqueeze(1)).abs().sum(3)
    expected = torch.exp(-distance).sum(1) - 1
    found = genperf.minibatch_similarity(features)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn(9, 4, dtype=torch.float64, device=device)
    torch.testing.assert_close(*(torch.autograd.grad(out, features, upstream)[0] for out in (found, expected)))


@pytest.mark.parametrize("impl", [None, "reference"])
def test_similarity_of_distant_samples_is_zero(impl, device):
    """Exactly: subtracting the similarity of a sample to itself, 1, from a rounded sum would leave an error."""
    features = torch.arange(5, device=device).float()[:, None, None] * 20
    found = genperf.minibatch_similarity(features.expand(5, 2, 1), impl)
    expected = torch.exp(-torch.tensor(20.0, device=device)) * torch.tensor([1.0, 2.0, 2.0, 2.0, 1.0], device=device)
    torch.testing.assert_close(found, expected[:, None].expand(5, 2), rtol=1e-5, atol=0)
    for far in (100.0, 1e4, 1e30):
        result = similarity(features * far, impl)
        assert (result["similarity"].abs() < 1e-37).all()
        assert (result["grad"].abs() < 1e-37).all()


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_equal_samples(dtype, impl, device):
    """The similarity is the number of other samples, and the gradient between equal features is zero."""
    result = similarity(torch.ones(9, 3, 4, device=device, dtype=dtype), impl)
    assert (result["similarity"] == 8).all()
    assert (result["grad"] == 0).all()
    features = torch.tensor([1.0, 1.0, 1.5], device=device).to(dtype)[:, None, None]
    leaf = features.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(genperf.minibatch_similarity(leaf, impl)[2].sum(), leaf)
    pull = torch.exp(torch.tensor(-0.5, device=device))
    torch.testing.assert_close(gradient.flatten().float(), torch.stack([pull, pull, -2 * pull]), rtol=0.01, atol=0)


def test_layouts_agree(device):
    features = features_of((33, 7, 5), torch.float32, device)
    expected = similarity(features)
    for name, laid_out in testing.strided(features).items():
        for key, value in similarity(laid_out).items():
            assert torch.equal(value, expected[key]), (name, key)
    small = features[:, :1].expand(33, 7, 5)
    for key, value in similarity(small).items():
        assert torch.equal(value, similarity(small.contiguous())[key])


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("shape", [(0, 3, 4), (1, 3, 4), (5, 0, 4), (5, 3, 0), (0, 0, 0)], ids=str)
def test_empty_and_single(shape, impl, device):
    result = similarity(torch.randn(shape, device=device), impl)
    assert result["grad"].shape == shape
    assert (result["grad"] == 0).all()
    # Without features all samples are equal.
    assert torch.equal(result["similarity"], torch.full(shape[:2], 4.0 if shape[2] == 0 and shape[0] else 0.0, device=device))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_values_stay_within_their_kernel(bad, device):
    features = features_of((33, 7, 5), torch.float32, device)
    clean = similarity(features)
    features[4, 2, 3] = bad
    found, plain = similarity(features), similarity(features, "reference")
    others = [0, 1, 3, 4, 5, 6]
    for name, value in found.items():
        assert torch.equal(value[:, others], clean[name][:, others]), name
        if bad != bad:
            assert value[:, 2].isnan().all()
    torch.testing.assert_close(found["similarity"], plain["similarity"], equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_never_nan(dtype, device):
    features = torch.tensor([60000.0, -60000.0, 60000.0, 0.0], device=device).to(dtype)[:, None, None].expand(4, 3, 8)
    for name, value in similarity(features).items():
        assert value.isfinite().all(), name


def test_output_gradients_of_any_strides(device):
    leaf = features_of((9, 7, 5), torch.float32, device).requires_grad_()
    for upstream in (
        torch.ones((), device=device).expand(9, 7),
        torch.randn(9, 1, device=device).expand(9, 7),
        *testing.strided(torch.randn(9, 7, device=device)).values(),
    ):
        found, expected = (
            torch.autograd.grad(genperf.minibatch_similarity(leaf), leaf, gradient)[0] for gradient in (upstream, upstream.contiguous())
        )
        assert torch.equal(found, expected)


def test_frozen_input(device):
    features = torch.randn(5, 3, 2, device=device)
    assert not genperf.minibatch_similarity(features).requires_grad
    with torch.no_grad():
        assert not genperf.minibatch_similarity(features.requires_grad_()).requires_grad


@pytest.mark.once
def test_derivatives_of_both_orders(device):
    features = torch.randn(5, 3, 2, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(genperf.minibatch_similarity, features)
    assert torch.autograd.gradgradcheck(genperf.minibatch_similarity, features)


def test_second_derivatives_of_the_kernels(device):
    """create_graph=True through the compiled forward, compared with the reference."""
    leaf = torch.randn(9, 3, 4, device=device, requires_grad=True)
    results = []
    for impl in (None, "reference"):
        (slope,) = torch.autograd.grad(genperf.minibatch_similarity(leaf, impl).square().sum(), leaf, create_graph=True)
        results.append(torch.autograd.grad(slope.square().sum(), leaf)[0])
    torch.testing.assert_close(*results)


def test_functional_gradient(device):
    features = torch.randn(9, 3, 4, device=device)
    leaf = features.detach().requires_grad_()
    expected = torch.autograd.grad(genperf.minibatch_similarity(leaf).square().sum(), leaf)[0]
    torch.testing.assert_close(torch.func.grad(lambda x: genperf.minibatch_similarity(x).square().sum())(features), expected)


def test_bitwise_equal_in_every_run_and_for_any_number_of_threads(device, set_threads):
    features = features_of((65, 7, 5), torch.float32, device)
    expected = similarity(features)
    for count in (1, 2, 3):
        set_threads(count)
        for name, value in similarity(features).items():
            assert torch.equal(value, expected[name]), name


def test_only_the_features_are_saved(device):
    features = torch.randn(33, 7, 5, device=device, requires_grad=True)
    assert testing.saved_bytes(lambda: genperf.minibatch_similarity(features)) == 4 * features.numel()


def test_no_tensor_of_size_samples_squared(device):
    """The largest allocation of forward and backward is far below N x N x B."""
    if device != "cpu":
        pytest.skip("the profiler's allocation events are read on the CPU")
    features = torch.randn(512, 8, 4, requires_grad=True)
    largest = testing.largest_allocation(lambda: genperf.minibatch_similarity(features).sum().backward())
    assert largest <= 4 * features.numel() * features.element_size() < 512 * 512 * 8


def test_poisoned_memory(device):
    features = torch.randn(33, 7, 5, device=device)
    clean = similarity(features)
    with testing.poisoned_memory():
        for name, value in similarity(features).items():
            assert torch.equal(value, clean[name]), name


@pytest.mark.once
def test_contract(device):
    features = torch.randn(9, 3, 4, device=device)
    testing.check_op("minibatch_similarity", [(features,), (features.bfloat16(),), (features[:0],)])
    testing.check_op("minibatch_similarity_backward", [(torch.randn(9, 3, device=device), features)])
    sizes = [(torch.randn(n, 5, 3, device=device),) for n in (6, 9)]
    testing.check_compile(lambda x: (genperf.minibatch_similarity(x),), *sizes)


@pytest.mark.parametrize(
    ("message", "error", "features", "impl"),
    [
        ("features must be a tensor, got list", TypeError, [1.0], None),
        ("features must be float32", TypeError, torch.zeros(2, 3, 4, dtype=torch.int32), None),
        (r"features must be \[N, B, C\], got shape \[2, 3\]", ValueError, torch.zeros(2, 3), None),
        ("impl='triton' cannot run here", NotImplementedError, torch.zeros(2, 3, 4), "triton"),
        ("impl='native' cannot run here", NotImplementedError, torch.zeros(2, 3, 4, dtype=torch.float64), "native"),
        ("impl must be None or one of", ValueError, torch.zeros(2, 3, 4), "fast"),
    ],
)
def test_bad_input(message, error, features, impl):
    with pytest.raises(error, match="minibatch_similarity: .*" + message):
        genperf.minibatch_similarity(features, impl)


def test_forward_mode_runs_the_reference(device):
    features, tangent = torch.randn(2, 5, 3, 2, device=device)
    found = torch.func.jvp(genperf.minibatch_similarity, (features,), (tangent,))[1]
    expected = torch.func.jvp(lambda x: genperf.minibatch_similarity(x, impl="reference"), (features,), (tangent,))[1]
    assert expected.any()
    torch.testing.assert_close(found, expected)
