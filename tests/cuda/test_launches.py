# SPDX-License-Identifier: Apache-2.0
"""What runs on the device for a call: the operators of PyTorch around each op, which are the same on every device.

The launches of each op's kernels are counted by test_cuda_on_host*.py, where the kernels run on the CPU.
"""

import sys
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import genperf
from genperf import _library
from genperf.ops.code_statistics import codebook_statistics
from genperf.ops.residual_vector_quantize import ResidualOptions, quantize_residual, residual_code_statistics, residual_statistics
from genperf.ops.residual_vector_quantize import unavailable as residual_unavailable
from genperf.ops.vector_quantize import quantize_codebooks, unavailable

pytestmark = pytest.mark.skipif(_library.cpu_failure is not None, reason=f"no compiled ops: {_library.cpu_failure}")


class Operators(TorchDispatchMode):
    """Counts the operators that compute: neither views nor allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function._schema.name.split("::")[1]
        is_view = any(result.alias_info is not None and not result.alias_info.is_write for result in function._schema.returns)
        checks = ("aminmax", "_local_scalar_dense")  # of indices on the CPU
        if not is_view and name not in ("empty", "empty_like", "new_empty", "detach", "_unsafe_view", *checks):
            self.found[name] += 1
        return function(*arguments, **(keywords or {}))


def count(function):
    with Operators() as operators:
        result = function()
    return result, dict(operators.found)


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
@pytest.mark.parametrize("channel_dim", [-1, 1])
def test_vector_quantize(gradient, channel_dim):
    x = torch.randn(2, 5, 6, 8) if channel_dim == -1 else torch.randn(2, 8, 5, 6)
    x.requires_grad_()
    codebook = torch.randn(9, 8, requires_grad=True)

    def forward():
        return genperf.vector_quantize(x, codebook, channel_dim=channel_dim, gradient=gradient)

    (quantized, _, loss), operators = count(forward)
    assert operators == {"nearest_code": 1, "vector_quantize": 1}
    slopes = [torch.ones_like(quantized), torch.ones_like(loss)]
    outputs = [quantized, loss]
    _, operators = count(lambda: torch.autograd.grad(outputs, (x, codebook), slopes))
    assert operators == {"vector_quantize_backward": 1, "vector_quantize_backward_codebook": 1}
    codebook.requires_grad_(False)  # an EMA codebook
    quantized, _, loss = forward()
    _, operators = count(lambda: torch.autograd.grad([quantized, loss], x, slopes))
    assert operators == {"vector_quantize_backward": 1}
    with torch.no_grad():
        assert count(forward)[1] == {"nearest_code": 1, "vector_quantize": 1}


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
@pytest.mark.parametrize("num_quantizers", [None, torch.tensor(2)], ids=["all", "some"])
def test_residual_vector_quantize(gradient, num_quantizers):
    x, codebooks = torch.randn(2, 8, 30, requires_grad=True), torch.randn(3, 9, 8, requires_grad=True)
    mask = torch.ones(2, 30, dtype=torch.bool)

    def forward():
        return genperf.residual_vector_quantize(
            x, codebooks, channel_dim=1, mask=mask, num_quantizers=num_quantizers, gradient=gradient, commitment_weight=0.0
        )

    (quantized, indices, losses), operators = count(forward)
    assert operators == {"residual_vector_quantize": 1, "mul": 1}  # the losses are multiplied by their weight
    slopes = [torch.ones_like(quantized), torch.ones_like(losses)]
    _, operators = count(lambda: torch.autograd.grad([quantized, losses], (x, codebooks), slopes))
    assert operators == {"residual_vector_quantize_backward": 1, "residual_vector_quantize_backward_codebooks": 1}
    statistics = count(lambda: residual_code_statistics(x, codebooks, indices, channel_dim=1))[1]
    assert statistics == {"residual_code_statistics": 1}


def test_code_statistics():
    x, indices = torch.randn(2, 8, 30), torch.randint(9, (2, 30))
    assert count(lambda: genperf.code_statistics(x, indices, 9, channel_dim=1))[1] == {"code_statistics": 1}


def test_statistics_of_finite_vectors_read_x_twice(monkeypatch):
    """Without a look at the values, which would wait for the device: x is reduced once, and summed once."""
    x, indices = torch.randn(1, 2, 8, 30), torch.randint(9, (1, 2, 30))
    x[0, 0, 3, 4], x[0, 1, 0, 0] = torch.nan, -torch.inf
    monkeypatch.setattr(sys.modules["genperf.ops.code_statistics"], "can_branch_on", lambda x: False)
    (counts, _, kept), operators = count(lambda: codebook_statistics(x, indices, 9))
    assert operators.pop("code_statistics") == 1
    assert operators.pop("linalg_vector_norm") == 1
    # Of the size of the indices.
    assert set(operators) <= {"abs", "ne", "eq", "mul", "where", "scalar_tensor", "isfinite"}
    assert counts.sum() == 58
    assert kept[0, 0, 4] == kept[0, 1, 0] == -1


# Each op's kernel is one launch, see cuda_on_host/launches.py. The seed is that of the CPU: on CUDA its computation launches nothing.
SEED = {"randint": 1}
IMAGES, CODES = (4, 6, 5, 5), (6, 3)
SAMPLING = {
    "gaussian_sample": (lambda x, _: genperf.gaussian_sample(x)[:2], SEED, 1),
    "gumbel_sample": (lambda x, _: genperf.gumbel_sample(x, dim=1)[::2], SEED, 1),
    "interpolate": (lambda x, y: [genperf.interpolate(x, y)], SEED, 1),
    "gradient_norm_penalty": (lambda x, _: [genperf.gradient_norm_penalty(x)], {}, 1),
    "finite_scalar_quantize": (lambda x, _: [genperf.finite_scalar_quantize(x, [5] * 6, channel_dim=1)[0]], {}, 1),
    "lookup_free_quantize": (lambda x, _: [genperf.lookup_free_quantize(x, spherical=True, channel_dim=1)[0]], {}, 1),
    "minibatch_similarity": (lambda x, _: [genperf.minibatch_similarity(x.flatten(2))], {}, 1),
}


@pytest.mark.parametrize("op", SAMPLING)
@pytest.mark.parametrize("first", [0, 3])
def test_sampling_and_penalties(op, first, monkeypatch):
    monkeypatch.setattr(sys.modules["genperf.ops.gaussian_sample"], "_is_packed", lambda *_: False)  # an op of the CPU alone
    call, others, backward = SAMPLING[op]
    x, y = torch.randn(2, *IMAGES, requires_grad=True)
    with genperf.sample_offset(first):
        outputs, operators = count(lambda: call(x, y))
    assert operators == {op: 1, **others}
    slopes = [torch.ones_like(output) for output in outputs]
    assert count(lambda: torch.autograd.grad(outputs, x, slopes))[1] == {f"{op}_backward": backward}


@pytest.mark.parametrize("hard", [False, True])
def test_gumbel_sample_with_a_codebook(hard):
    logits, codebook = torch.randn(IMAGES, requires_grad=True), torch.randn(CODES, requires_grad=True)
    (sample, _, kl), operators = count(lambda: genperf.gumbel_sample(logits, codebook, dim=1, hard=hard))
    assert operators == {"gumbel_sample": 1, **SEED, "embedding" if hard else "bmm": 1}
    slopes = [torch.ones_like(sample), torch.ones_like(kl)]
    _, operators = count(lambda: torch.autograd.grad([sample, kl], (logits, codebook), slopes))
    # The gradient of the codebook sums the gradients of each code, or is that of a product with the sample drawn again.
    of_codebook = {"code_statistics": 1, "bmm": 1} if hard else {"gumbel_sample": 1, "bmm": 2, "sum": 1}
    assert operators == {"gumbel_sample_backward": 1, **of_codebook}


@pytest.mark.parametrize("of", [unavailable, residual_unavailable])
def test_the_triton_search_serves_without_the_library(of, monkeypatch):
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(_library, "triton_failure", None)
    monkeypatch.setattr(_library, "cuda_failure", "no kernels.")
    assert of(cuda, torch.float32) == {"native": "no kernels.", "triton": None, "reference": None}
    assert of(cuda, torch.float64)["triton"] is not None
    monkeypatch.setattr(_library, "cuda_failure", None)
    monkeypatch.setattr(_library, "triton_failure", "no triton.")
    assert of(cuda, torch.float32) == {"native": "no triton.", "triton": "no triton.", "reference": None}
    assert of(torch.device("cpu"), torch.float32)["triton"] is not None


def test_the_search_with_the_rest_in_pytorch_equals_the_kernels(monkeypatch):
    """Here the search of the CPU stands for that of Triton."""
    mask = torch.rand(1, 2, 30) > 0.2
    x, codebooks = torch.randn(1, 2, 8, 30, requires_grad=True), torch.randn(3, 9, 8, requires_grad=True)
    limit, options = torch.tensor(2), ResidualOptions(0.5, 0.25, True)

    def results(impl):
        module = sys.modules["genperf.ops.vector_quantize"]
        monkeypatch.setattr(module, "unavailable", lambda *_: {impl: None})
        one = quantize_codebooks(x, codebooks[:1], mask, None, 0.5, 0.25, "rotation", "euclidean")
        several = quantize_residual(x[0], codebooks, mask[0], limit, "euclidean", options, impl)
        gradients = torch.autograd.grad(sum(out.sum() for out in (one[0], one[2], several[0], several[2])), (x, codebooks))
        return *one, *several, *gradients, *residual_statistics(x[0], codebooks, several[1], impl)

    for found, expected in zip(results("triton"), results("native"), strict=True):
        torch.testing.assert_close(found, expected)
