# SPDX-License-Identifier: Apache-2.0
"""gumbel_sample for CUDA, run on the CPU by cuda_on_host.h."""

import ctypes
import itertools
import math

import pytest
import torch
from cuda_on_host.harness import (
    DTYPES,
    Strides,
    assert_close,
    assert_each_barrier_is_needed,
    assert_each_kernel_runs,
    compile_kernels,
    fill,
    gumbel_noise,
    nan_like,
    nans,
    run_checks,
    run_in_child,
    structure,
)
from cuda_on_host.launches import run_op
from torch import Tensor

SEED = 0x7654321089ABCDE
LAYOUTS = ("channels_first", "channels_last", "sliced")

# (outer, K, inner): one class, one position, teams within and beyond a warp in both layouts, partial tiles.
SHAPES = [
    *[(1, 1, 3), (2, 5, 37), (3, 4, 1), (5, 70, 7), (1, 1030, 33), (2, 1500, 3), (0, 5, 4), (2, 8, 40), (300, 8, 1)],
    # Classes that fill the registers of a thread, of several, of a warp and of a block, and more than fit.
    *[(1, 16, 33), (3, 128, 5), (2, 512, 2), (1, 8192, 1), (1, 8200, 2)],
]

POINTER = ctypes.c_void_p
FIRST = 5  # the row of noise of the first position
Seed = structure(("data", POINTER), ("value first", ctypes.c_int64))
SEED_IN_MEMORY = torch.tensor(SEED)
SEEDS = itertools.cycle([Seed(SEED_IN_MEMORY.data_ptr(), -1, FIRST), Seed(None, SEED, FIRST)])
SIZES = ("outer classes inner", ctypes.c_int64)
GumbelSampleParams = structure(
    ("logits noise temperature sample indices kl statistics", POINTER),
    SIZES,
    ("logits_strides noise_strides sample_strides", Strides),
    ("seed", Seed),
    ("tau", ctypes.c_float),
    ("float32_noise hard", ctypes.c_bool),
)
GumbelSampleBackwardParams = structure(
    ("grad_sample grad_kl logits noise temperature statistics grad_logits", POINTER),
    SIZES,
    ("grad_sample_strides logits_strides noise_strides grad_logits_strides", Strides),
    ("seed", Seed),
    ("tau", ctypes.c_float),
    ("float32_noise", ctypes.c_bool),
)


def lay_out(x: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "sliced":
        outer, classes, inner = x.shape
        return torch.empty(outer, classes + 1, 2 * inner + 3, dtype=x.dtype)[:, 1:, 3 : 3 + 2 * inner : 2].copy_(x)
    return x.contiguous()


def common_fields(logits: Tensor, tau: float | Tensor, noise: Tensor | None) -> dict:
    return {
        "logits": logits,
        "noise": noise,
        "seed": next(SEEDS),
        "temperature": tau if isinstance(tau, Tensor) else None,
        "outer": logits.shape[0],
        "classes": logits.shape[1],
        "inner": logits.shape[2],
        "tau": 0.0 if isinstance(tau, Tensor) else tau,
        "float32_noise": noise is not None and noise.dtype == torch.float32,
    }


def run(library, logits, tau=1.0, noise=None, hard=False, dense=True) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    outer, _, inner = logits.shape
    sample = nan_like(logits) if dense else None
    indices, kl, statistics = torch.full((outer, inner), -7), nans(outer, inner), nans(4, outer, inner)
    fields = common_fields(logits, tau, noise)
    params = fill(GumbelSampleParams, sample=sample, indices=indices, kl=kl, statistics=statistics, hard=hard, **fields)
    run_op(library, "gumbel_sample", params, DTYPES[logits.dtype], empty=logits.numel() == 0)
    return sample, indices, kl, statistics


def run_backward(library, grad_sample, grad_kl, logits, statistics, tau=1.0, noise=None) -> Tensor:
    grad = nan_like(logits)
    fields = common_fields(logits, tau, noise)
    params = fill(GumbelSampleBackwardParams, grad_sample=grad_sample, grad_kl=grad_kl, statistics=statistics, grad_logits=grad, **fields)
    run_op(library, "gumbel_sample_backward", params, DTYPES[logits.dtype], empty=logits.numel() == 0)
    return grad


def exact_noise(logits: Tensor, noise: Tensor | None) -> Tensor:
    if noise is not None:
        return noise.double()
    outer, classes, inner = logits.shape
    drawn = gumbel_noise(SEED, FIRST + outer * inner, classes)[FIRST:]
    return drawn.reshape(outer, inner, classes).transpose(1, 2)


def soft_and_kl(logits: Tensor, noise: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    log_q = logits.log_softmax(1)
    q = log_q.exp()
    kl = (q * (log_q.clamp(min=-1e4) + math.log(logits.shape[1]))).sum(1)
    return ((logits + noise) / tau).softmax(1), kl


def cases():
    numbered = enumerate(itertools.product(DTYPES, LAYOUTS, SHAPES))
    # The numbers of these stand for drawn noise and both gradients.
    plain = [(number, (dtype, "channels_first", (30, 64, 1))) for number, dtype in zip((1008, 1032, 1056), DTYPES, strict=True)]
    for number, (dtype, layout, shape) in itertools.chain(numbered, plain):
        if dtype != torch.float32 and number < 1000 and (number + number // len(SHAPES)) % 2:
            continue
        generator = torch.Generator().manual_seed(number)
        logits = lay_out((2 * torch.randn(shape, generator=generator)).to(dtype), layout)
        if shape[1] > 4 and logits.numel():
            logits[0, 1, 0], logits[0, 2, 0] = -math.inf, -90
        noise = torch.randn(shape, generator=generator)
        noise = (None, lay_out(noise, LAYOUTS[number % 3]), lay_out(noise.to(dtype), layout))[number % 3 if number % 2 else 0]
        tau = (1.0, torch.tensor([0.3]), 0.7)[number % 3]
        yield f"{dtype} {layout} {shape}", number, logits, noise, tau, generator


def check_sample(library: ctypes.CDLL) -> None:
    for name, number, logits, noise, tau, _ in cases():
        gumbel = exact_noise(logits, noise)
        perturbed = logits.double() + gumbel
        hard, dense = number % 4 == 1, number % 5 != 0
        sample, indices, kl, statistics = run(library, logits, tau, noise, hard, dense)
        chosen = perturbed.gather(1, indices.unsqueeze(1)).squeeze(1) if indices.numel() else perturbed.sum(1)
        largest = perturbed.amax(1)
        assert (chosen >= largest - 3e-6 * (1 + largest.abs())).all(), name
        soft, exact_kl = soft_and_kl(logits.double(), gumbel, float(tau))
        if sample is not None:
            assert sample.stride() == torch.empty_like(logits).stride()
            if hard:
                assert torch.equal(sample, torch.zeros_like(logits).scatter_(1, indices.unsqueeze(1), 1)), name
            else:
                assert_close(
                    f"{name} sample", sample, soft, soft * (1 + perturbed.abs().clamp(max=100) + largest.abs().unsqueeze(1)) / float(tau)
                )
        scale = 1 + math.log(logits.shape[1]) + exact_kl
        assert_close(f"{name} kl", kl, exact_kl, scale)
        expected = [logits.double().amax(1), None, largest, None]
        expected[1] = (logits.double() - expected[0].unsqueeze(1)).exp().sum(1).log()
        expected[3] = ((perturbed - largest.unsqueeze(1)) / float(tau)).exp().sum(1).log()
        for row, exact in zip(statistics, expected, strict=True):
            assert_close(f"{name} statistics", row, exact, 1 + exact.abs() + largest.abs() / float(tau))


def check_backward(library: ctypes.CDLL) -> None:
    for name, number, logits, noise, tau, generator in cases():
        statistics = run(library, logits, tau, noise, dense=False)[3]
        grad = torch.randn(logits.shape, generator=generator).to(logits.dtype)
        grad = None if number % 4 == 1 else lay_out(grad, LAYOUTS[number % 3])
        grad_kl = None if number % 4 == 2 else torch.randn(logits.shape[0], logits.shape[2], generator=generator)
        actual = run_backward(library, grad, grad_kl, logits, statistics, tau, noise)
        leaf = logits.double().requires_grad_()
        # Clamped, because the gradient of -inf is NaN in autograd.
        soft, kl = soft_and_kl(leaf.clamp(min=-1e3), exact_noise(logits, noise), float(tau))
        total = 0 * leaf.clamp(min=0).sum()
        if grad is not None:
            total = total + (soft * grad.double()).sum()
        if grad_kl is not None:
            total = total + (kl * grad_kl.double()).sum()
        (exact,) = torch.autograd.grad(total, leaf)
        scale = 30 * soft.detach() / float(tau) if grad is not None else 0
        if grad_kl is not None:
            scale = scale + grad_kl.double().abs().unsqueeze(1) * logits.double().softmax(1) * 30
        assert_close(name, actual, exact, scale)


def check_drawn_and_given_noise(library: ctypes.CDLL) -> None:
    """The kernel that keeps the perturbed logits and that for given noise agree, with NaN, infinity and ties of whole rows."""
    for classes, layout in itertools.product((16, 100, 1024), LAYOUTS):
        logits = torch.randn(2, classes, 3)
        logits[0, 3, 0], logits[1, :, 1], logits[1, 5:, 2] = math.nan, -math.inf, -math.inf
        logits = lay_out(logits, layout)
        noise = exact_noise(logits, None).float()
        for hard in (False, True):
            drawn, given = (run(library, logits, 0.7, values, hard) for values in (None, noise))
            assert torch.equal(drawn[1], given[1])
            for name, one, other in zip(("sample", "kl"), drawn[::2], given[::2], strict=True):
                torch.testing.assert_close(one, other, rtol=2e-5, atol=1e-6, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}")


def check_nan_and_infinity(library: ctypes.CDLL) -> None:
    """NaN and infinity are ordered as in torch.argmax; the KL is NaN for a row with NaN or without a finite logit."""
    for layout, noise_dtype in itertools.product(LAYOUTS, (torch.float32, torch.float16)):
        logits = torch.zeros(3, 600, 5)
        logits[0, 400:, 1] = math.nan
        logits[1, :, 2] = -math.inf
        logits[2, :, 3] = torch.arange(600) % 7
        logits = lay_out(logits.half(), layout)
        sample, indices, kl, _ = run(library, logits, 0.5, torch.zeros(3, 600, 5, dtype=noise_dtype))
        assert torch.equal(indices, logits.float().argmax(1))
        assert kl.isnan().nonzero().tolist() == [[0, 1], [1, 2]]
        assert torch.isnan(sample).any(1).nonzero().tolist() == [[0, 1], [1, 2]]


def check_tau_of_zero(library: ctypes.CDLL) -> None:
    for dtype, tau in itertools.product(DTYPES, (0.0, torch.zeros(()), torch.tensor(-1.0), torch.tensor(math.nan), 1e-42, 1e-8)):
        logits = lay_out(60000 * torch.randn(2, 37, 5), "channels_last").clamp(-60000, 60000).to(dtype)
        logits[:, 3:] *= 0.1
        sample, indices, _, statistics = run(library, logits, tau, torch.zeros(2, 37, 5))
        # The largest logits share the mass if they tie, except at tau = 0, where the lowest index gets all of it.
        largest = (logits == logits.amax(1, keepdim=True)).float()
        if not tau > 0:
            largest = torch.zeros_like(largest).scatter_(1, largest.argmax(1, keepdim=True), 1)
        assert_close(f"{dtype} {tau}", sample, (largest / largest.sum(1, keepdim=True)).double(), torch.ones(()))
        assert torch.equal(indices, logits.float().argmax(1))
        fields = (logits, statistics, tau, torch.zeros(2, 37, 5))
        grad_sample = torch.randn(2, 37, 5).to(dtype)
        assert not run_backward(library, grad_sample, torch.randn(2, 5), *fields).isnan().any()
        assert (run_backward(library, grad_sample, None, *fields)[sample == 0] == 0).all()
        if not tau > 0:
            assert (run_backward(library, grad_sample, None, *fields) == 0).all()


CHECKS = [name for name in dir() if name.startswith("check_")]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> str:
    library = compile_kernels("gumbel_launchers.cpp", tmp_path_factory.mktemp("kernels"))
    return run_in_child(__file__, library, CHECKS)


@pytest.mark.parametrize("check", CHECKS)
def test_kernels(outcome: str, check: str) -> None:
    assert f"{check} passed" in outcome, outcome


def test_each_kernel_runs(outcome: str) -> None:
    assert_each_kernel_runs(outcome)


def test_each_barrier_is_needed(outcome: str) -> None:
    assert_each_barrier_is_needed(outcome)


if __name__ == "__main__":
    run_checks(globals())
