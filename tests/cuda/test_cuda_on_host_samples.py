# SPDX-License-Identifier: Apache-2.0
"""The ops over samples [B, rows, columns] for CUDA, run on the CPU by cuda_on_host.h."""

import ctypes
import itertools
from pathlib import Path

import pytest
import torch
from cuda_on_host.harness import (
    DTYPES,
    SampleTensor,
    Shape,
    assert_close,
    assert_each_barrier_is_needed,
    assert_each_kernel_runs,
    compile_kernels,
    fill,
    nan_like,
    nans,
    normal_noise,
    run_checks,
    run_in_child,
    structure,
    uniform_noise,
)
from cuda_on_host.launches import run_op
from torch import Tensor

SEED = 0x7654321089ABCDE
FIRST = 3  # the row of noise of the first sample
LAYOUTS = ("contiguous", "packed", "channels_last", "columns_apart", "sliced")

# (B, rows, columns): one element, teams of 1 to 256 threads, samples in several parts, units that cross rows, rows shorter
# than a unit, full units only, empty tensors.
SHAPES = [
    (1, 1, 1),
    (300, 1, 3),
    (2, 5, 7),
    (3, 33, 49),
    (2, 7, 3),
    (5, 8, 12),
    (2, 64, 64),
    (1, 3, 1401),
    (2, 257, 1),
    (0, 3, 4),
    (3, 0, 4),
]

POINTER, FLOAT = ctypes.c_void_p, ctypes.c_float
Seed = structure(("data", POINTER), ("value first", ctypes.c_int64))
GaussianSampleParams = structure(
    ("mean logvar prior_mean prior_logvar noise", SampleTensor),
    ("seed", Seed),
    ("sample", SampleTensor),
    ("partials ticket kl", POINTER),
    ("shape", Shape),
    ("free_bits", FLOAT),
)
GaussianSampleBackwardParams = structure(
    ("grad_sample", SampleTensor),
    ("grad_kl", POINTER),
    ("mean logvar prior_mean prior_logvar noise", SampleTensor),
    ("seed", Seed),
    ("grad_mean grad_logvar grad_prior_mean grad_prior_logvar", SampleTensor),
    ("shape", Shape),
    ("free_bits", FLOAT),
)
InterpolateParams = structure(
    ("real fake", SampleTensor),
    ("scale weight", POINTER),
    ("seed", Seed),
    ("mixed", SampleTensor),
    ("shape", Shape),
)
InterpolateBackwardParams = structure(
    ("grad_mixed real fake", SampleTensor),
    ("weight", POINTER),
    ("seed", Seed),
    ("grad_real grad_fake", SampleTensor),
    ("partials ticket grad_weight", POINTER),
    ("shape", Shape),
)
GradientNormPenaltyParams = structure(
    ("gradients", SampleTensor),
    ("partials ticket norms penalty", POINTER),
    ("shape", Shape),
    ("center", FLOAT),
    ("one_sided", ctypes.c_bool),
)
GradientNormPenaltyBackwardParams = structure(
    ("grad_penalty", POINTER),
    ("gradients", SampleTensor),
    ("norms", POINTER),
    ("grad_gradients", SampleTensor),
    ("shape", Shape),
    ("center", FLOAT),
    ("one_sided", ctypes.c_bool),
)


def lay_out(x: Tensor, layout: str) -> Tensor:
    """x [B, rows, columns] in a layout."""
    batch, rows, columns = x.shape
    if layout == "packed":
        return torch.empty(batch, 2 * rows, columns, dtype=x.dtype)[:, rows:].copy_(x)
    if layout == "channels_last":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "columns_apart":
        return torch.empty(batch, rows, 2 * columns, dtype=x.dtype)[:, :, columns:].copy_(x)
    if layout == "sliced":
        return torch.empty(batch, rows + 1, 2 * columns + 3, dtype=x.dtype)[:, 1:, 3 : 3 + 2 * columns : 2].copy_(x)
    return x.contiguous()


def cases(shapes=SHAPES):
    """(name, number, function that returns a random tensor of the case, dtype, shape)."""
    numbered = enumerate(itertools.product(DTYPES, LAYOUTS, shapes))
    # The numbers of these stand for drawn noise and no prior.
    plain = [(number, (dtype, "contiguous", (5, 8, 12))) for number, dtype in zip((1000, 1004, 1012), DTYPES, strict=True)]
    for number, (dtype, layout, shape) in itertools.chain(numbered, plain):
        if dtype != torch.float32 and number < 1000 and (number + number // len(shapes)) % 2:
            continue
        generator = torch.Generator().manual_seed(number)

        def make(scale=1.0, to=None, layout=layout, dtype=dtype, shape=shape, generator=generator):
            return lay_out((scale * torch.randn(shape, generator=generator)).to(to or dtype), layout)

        yield f"{dtype} {layout} {shape}", number, make, dtype, shape


def normal_like(x: Tensor) -> Tensor:
    return normal_noise(SEED, FIRST + x.shape[0], x[0].numel() if x.shape[0] else 0)[FIRST:].reshape(x.shape)


SEED_IN_MEMORY, TICKET = torch.tensor(SEED), torch.zeros((), dtype=torch.int32)
SEEDS = itertools.cycle([Seed(SEED_IN_MEMORY.data_ptr(), -1, FIRST), Seed(None, SEED, FIRST)])


def run(library: ctypes.CDLL, op: str, params: ctypes.Structure, dtype: torch.dtype) -> None:
    """Run an op, whose last block leaves the ticket as it was."""
    if "ticket" in dict(params._fields_):
        params.ticket = TICKET.data_ptr()
    run_op(library, op, params, DTYPES[dtype], empty=0 in (params.shape.batch, params.shape.rows, params.shape.columns))
    assert TICKET == 0


def gaussian_exact(mean, logvar, prior, noise, free_bits) -> tuple[Tensor, Tensor]:
    """Sample and KL of each element, in float64."""
    logvar = logvar.clamp(-30, 20)
    sample = mean + torch.exp(0.5 * logvar) * noise
    if prior is None:
        kl = 0.5 * (mean.square() + torch.expm1(logvar) - logvar)
    else:
        prior_logvar = prior[1].clamp(-30, 20)
        ratio = logvar - prior_logvar
        kl = 0.5 * ((mean - prior[0]).square() * torch.exp(-prior_logvar) + torch.expm1(ratio) - ratio)
    return sample, kl.clamp(min=free_bits) if free_bits > 0 else kl


def run_gaussian(library, mean, logvar, prior, noise, free_bits, wide) -> tuple[Tensor, Tensor]:
    sample, kl = nan_like(mean, torch.float32 if wide else mean.dtype), nans(mean.shape[0])
    prior = prior or (None, None)
    params = fill(
        GaussianSampleParams,
        mean=mean,
        logvar=logvar,
        prior_mean=prior[0],
        prior_logvar=prior[1],
        noise=noise,
        seed=next(SEEDS) if noise is None else None,
        sample=sample,
        kl=kl,
        shape=Shape(*mean.shape),
        free_bits=free_bits,
    )
    partials = nans(library.gaussian_sample_partials(ctypes.byref(params), DTYPES[mean.dtype]), dtype=torch.float64)
    params.partials = partials.data_ptr()
    run(library, "gaussian_sample", params, mean.dtype)
    return sample, kl


def gaussian_cases():
    for name, number, make, dtype, _ in cases():
        mean, logvar = make(), make(3.0)
        if logvar.numel():
            logvar[0, 0, 0] = 25
            logvar[-1, -1, -1] = -31
        prior = (make(), make().mul_(2)) if number % 3 == 0 else None
        if prior is not None and number % 2:
            prior = tuple(t[:, :1, :1].clone().expand_as(t) for t in prior)
        noise = (None, make(), make(to=torch.float32))[number % 3 if number % 4 else 0]
        free_bits = 0.3 if number % 5 == 0 else 0.0
        yield name, number, make, dtype, (mean, logvar, prior, noise, free_bits)


def widen(arguments: tuple) -> list:
    mean, logvar, prior, noise, free_bits = arguments
    prior = None if prior is None else tuple(t.double() for t in prior)
    return [mean.double(), logvar.double(), prior, normal_like(mean) if noise is None else noise.double(), free_bits]


def check_gaussian_sample(library: ctypes.CDLL) -> None:
    for name, number, _, _, arguments in gaussian_cases():
        sample, kl = run_gaussian(library, *arguments, wide=number % 7 == 0)
        assert sample.stride() == torch.empty_like(arguments[0]).stride()
        wide = widen(arguments)
        exact, exact_kl = gaussian_exact(*wide)
        magnitude = wide[0].abs() + torch.exp(0.5 * wide[1].clamp(-30, 20)) * wide[3].abs().clamp(min=1)
        assert_close(f"{name} sample", sample, exact, magnitude)
        exact_kl = exact_kl.flatten(1).sum(1) if exact_kl.numel() else torch.zeros(len(kl), dtype=torch.float64)
        assert_close(f"{name} kl", kl, exact_kl, exact_kl)


def check_gaussian_sample_backward(library: ctypes.CDLL) -> None:
    for name, number, make, dtype, arguments in gaussian_cases():
        mean, logvar, prior, noise, free_bits = arguments
        grad_sample = None if number % 4 == 1 else make(to=torch.float32 if number % 3 == 1 else dtype)
        grad_kl = None if number % 4 == 2 else torch.randn(mean.shape[0], generator=torch.Generator().manual_seed(number))
        inputs = [mean, logvar, *(prior or ())]
        # The first two gradients share a packed tensor.
        packed = nan_like(torch.cat([mean, mean], 1))
        gradients = [packed[:, : mean.shape[1]], packed[:, mean.shape[1] :], *(nan_like(t) for t in prior or ())]
        padded = [*gradients, None, None][:4]
        params = fill(
            GaussianSampleBackwardParams,
            grad_sample=grad_sample,
            grad_kl=grad_kl,
            mean=mean,
            logvar=logvar,
            prior_mean=None if prior is None else prior[0],
            prior_logvar=None if prior is None else prior[1],
            noise=noise,
            seed=next(SEEDS) if noise is None else None,
            grad_mean=padded[0],
            grad_logvar=padded[1],
            grad_prior_mean=padded[2],
            grad_prior_logvar=padded[3],
            shape=Shape(*mean.shape),
            free_bits=free_bits,
        )
        run(library, "gaussian_sample_backward", params, dtype)

        leaves = [t.double().requires_grad_() for t in inputs]
        wide = widen(arguments)
        sample, kl = gaussian_exact(*leaves[:2], tuple(leaves[2:]) or None, *wide[3:])
        zero = 0 * sum(leaf.sum() for leaf in leaves)
        from_sample = zero if grad_sample is None else zero + (sample * grad_sample.double()).sum()
        from_kl = zero if grad_kl is None else zero + (kl * grad_kl.double()[:, None, None]).sum()
        parts = [torch.autograd.grad(total, leaves, retain_graph=True) for total in (from_sample, from_kl)]
        for actual, first, second in zip(gradients, *parts, strict=True):
            # Noise near zero has the absolute error of a number near one, and so does a KL near zero.
            magnitude = first.abs() + second.abs() + (0 if grad_kl is None else grad_kl.double().abs()[:, None, None] * (second != 0))
            if grad_sample is not None:
                magnitude = magnitude + grad_sample.double().abs() * torch.exp(0.5 * wide[1].clamp(-30, 20)) * (first != 0)
            assert_close(name, actual, first + second, magnitude)


def check_gaussian_nan(library: ctypes.CDLL) -> None:
    for bad, dtype in itertools.product(range(3), DTYPES):
        mean, logvar, noise = (torch.zeros(3, 1, 9, dtype=dtype) for _ in range(3))
        (mean, logvar, noise)[bad][1, 0, 4] = float("nan")
        sample, kl = run_gaussian(library, mean, logvar, None, noise, 0.1, False)
        assert sample.isnan().nonzero().tolist() == [[1, 0, 4]]
        assert kl.isnan().tolist() == [False, bad < 2, False]


def check_gaussian_small_kl(library: ctypes.CDLL) -> None:
    """A KL so small that its terms nearly cancel."""
    mean, logvar = torch.zeros(2, 1, 4001), torch.full((2, 1, 4001), 0.01)
    sample, kl = run_gaussian(library, mean, logvar, None, torch.zeros_like(mean), 0.0, False)
    assert (sample == 0).all()
    exact = 4001 * 0.5 * (torch.expm1(logvar[0, 0, 0].double()) - logvar[0, 0, 0].double())
    assert ((kl - exact).abs() <= 2e-5 * exact).all()


def weights_of(number: int, batch: int) -> tuple[Tensor | None, Tensor]:
    """The weights to pass, or None to draw them, and their values."""
    if number % 3 == 0:
        return None, uniform_noise(SEED, FIRST + batch, 1, first_quad=1 << 63)[FIRST:, 0]
    weight = torch.rand(batch, generator=torch.Generator().manual_seed(number))
    weight[1:2], weight[2:3] = 0, 1
    return weight, weight.double()


def check_interpolate(library: ctypes.CDLL) -> None:
    for name, number, make, dtype, shape in cases():
        real, fake = make(), None if number % 4 == 1 else make()
        weight, exact_weight = weights_of(number, shape[0])
        mixed, scale, seed = nan_like(real), torch.tensor(0.7), next(SEEDS)
        params = fill(InterpolateParams, real=real, fake=fake, scale=scale, weight=weight, seed=seed, mixed=mixed, shape=Shape(*shape))
        run(library, "interpolate", params, dtype)
        exact_weight = exact_weight[:, None, None]
        if fake is None:
            noise = uniform_noise(SEED, FIRST + shape[0], shape[1] * shape[2])[FIRST:].reshape(shape)
            exact = real.double() + (1 - exact_weight) * 0.7 * noise
        else:
            exact = exact_weight * real.double() + (1 - exact_weight) * fake.double()
        if fake is not None and weight is not None:
            assert torch.equal(mixed[1:2], fake[1:2])
            assert torch.equal(mixed[2:3], real[2:3])
        assert_close(name, mixed, exact, real.double().abs() + (1 if fake is None else fake.double().abs()), 1e-6)


def check_interpolate_backward(library: ctypes.CDLL) -> None:
    for name, number, make, dtype, shape in cases():
        grad, learns = make(), number % 4 != 1
        real, fake = (make(), make()) if learns else (None, None)
        weight, exact_weight = weights_of(number, shape[0])
        grad_real, grad_fake, grad_weight = nan_like(grad), nan_like(grad), nans(shape[0])
        params = fill(
            InterpolateBackwardParams,
            grad_mixed=grad,
            real=real,
            fake=fake,
            weight=weight,
            seed=next(SEEDS),
            grad_real=grad_real,
            grad_fake=grad_fake,
            grad_weight=grad_weight if learns else None,
            shape=Shape(*shape),
        )
        partials = nans(library.interpolate_backward_partials(ctypes.byref(params), DTYPES[dtype]), dtype=torch.float64)
        params.partials = partials.data_ptr()
        run(library, "interpolate_backward", params, dtype)
        exact_weight, wide = exact_weight[:, None, None], grad.double()
        assert_close(f"{name} real", grad_real, exact_weight * wide, wide.abs(), 1e-7)
        assert_close(f"{name} fake", grad_fake, (1 - exact_weight) * wide, wide.abs(), 1e-7)
        if learns:
            terms = wide * (real.double() - fake.double())
            assert_close(f"{name} weight", grad_weight, terms.sum((1, 2)), terms.abs().sum((1, 2)), 1e-6)


def run_penalty(library, gradients, center=1.0, one_sided=False) -> tuple[Tensor, Tensor]:
    norms, penalty = nans(gradients.shape[0]), nans()
    fields = {"shape": Shape(*gradients.shape), "center": center, "one_sided": one_sided}
    params = fill(GradientNormPenaltyParams, gradients=gradients, norms=norms, penalty=penalty, **fields)
    count = library.gradient_norm_penalty_partials(ctypes.byref(params), DTYPES[gradients.dtype])
    partials = nans(count, dtype=torch.float64)
    params.partials = partials.data_ptr()
    run(library, "gradient_norm_penalty", params, gradients.dtype)
    return penalty, norms


def run_penalty_backward(library, grad_penalty, gradients, norms, center=1.0, one_sided=False) -> Tensor:
    result = nan_like(gradients)
    fields = {"shape": Shape(*gradients.shape), "center": center, "one_sided": one_sided}
    params = fill(
        GradientNormPenaltyBackwardParams, grad_penalty=grad_penalty, gradients=gradients, norms=norms, grad_gradients=result, **fields
    )
    run(library, "gradient_norm_penalty_backward", params, gradients.dtype)
    return result


def check_gradient_norm_penalty(library: ctypes.CDLL) -> None:
    for name, number, make, _, shape in cases():
        gradients = make((1.0, 1e-3, 0.2)[number % 3])
        center, one_sided = (1.0, 0.0, 0.5)[number // 2 % 3], number % 5 < 2
        penalty, norms = run_penalty(library, gradients, center, one_sided)
        leaf = gradients.double().requires_grad_()
        exact_norms = torch.linalg.vector_norm(leaf.flatten(1) if leaf.numel() else leaf.new_zeros(shape[0], 1), dim=1)
        assert_close(f"{name} norms", norms, exact_norms.detach(), exact_norms.detach(), 1e-6)
        distance = (exact_norms - center).clamp(min=0) if one_sided else exact_norms - center
        exact = distance.square().sum() / max(1, shape[0])
        assert_close(f"{name} penalty", penalty, exact.detach(), exact.detach() + 1e-6 * (1 + exact_norms.detach().sum()), 2e-6)
        if not leaf.numel():
            continue
        (grad,) = torch.autograd.grad(3 * exact, leaf)
        result = run_penalty_backward(library, torch.tensor(3.0), gradients, norms, center, one_sided)
        scale = 6 / shape[0] * (leaf.detach().abs() + center * leaf.detach().abs() / exact_norms.detach()[:, None, None].clamp(min=1e-30))
        assert_close(f"{name} gradient", result, grad, scale * (grad != 0), 1e-6)


def check_gradient_norm_extremes(library: ctypes.CDLL) -> None:
    """Norms neither overflow nor underflow; a zero norm gives no NaN, and a NaN gradient does."""
    for dtype, scale in ((torch.float32, 1e30), (torch.float32, 1e-30), (torch.float32, 1e-42), (torch.bfloat16, 1e30)):
        gradients = (torch.randn(3, 5, 700) * scale).to(dtype)
        gradients[1] = 0
        penalty, norms = run_penalty(library, gradients)
        exact = torch.linalg.vector_norm(gradients.double().flatten(1), dim=1)
        assert ((norms - exact).abs() <= 1e-6 * exact + 1e-45).all()
        result = run_penalty_backward(library, torch.tensor(1.0), gradients, norms)
        assert result.isfinite().all()
        assert (result[1] == 0).all()
        expected = 2 / 3 * (exact - 1)[:, None, None] * gradients.double() / exact[:, None, None].clamp(min=1e-50)
        assert_close(f"{dtype} {scale}", result, expected, expected.abs(), 1e-5 if scale > 1e-40 else 1e-2)
    gradients = torch.randn(3, 5, 7)
    gradients[1, 2, 3] = float("nan")
    for one_sided in (False, True):
        penalty, norms = run_penalty(library, gradients, 1.0, one_sided)
        assert penalty.isnan()
        assert norms.isnan().tolist() == [False, True, False]
        result = run_penalty_backward(library, torch.tensor(1.0), gradients, norms, 1.0, one_sided)
        assert torch.equal(result.isnan(), norms.isnan()[:, None, None].expand_as(result))


def check_many_units(library: ctypes.CDLL) -> None:
    """Samples so large that a thread processes several units and that the last block adds up many parts."""
    gradients = torch.randn(5, 1, 460001)
    penalty, norms = run_penalty(library, gradients)
    exact = torch.linalg.vector_norm(gradients[:, 0].double(), dim=1)
    assert_close("norms", norms, exact, exact, 1e-6)
    assert_close("penalty", penalty, (exact - 1).square().mean(), exact.square().mean(), 1e-6)


def check_many_samples_of_parts(library: ctypes.CDLL) -> None:
    """More samples of several parts than the last block has warps: the sums are the same in every order of the blocks."""
    mean, logvar = torch.randn(2, 11, 1, 2100)
    _, kl = run_gaussian(library, mean, logvar, None, None, 0.0, False)
    exact = gaussian_exact(mean.double(), logvar.double(), None, torch.zeros(()), 0.0)[1].sum((1, 2))
    assert_close("kl", kl, exact, exact)
    assert torch.equal(kl, run_gaussian(library, mean, logvar, None, None, 0.0, False)[1])
    penalty, norms = run_penalty(library, mean)
    again = run_penalty(library, mean)
    assert torch.equal(penalty, again[0])
    assert torch.equal(norms, again[1])


def check_random_words(library: ctypes.CDLL) -> None:
    """The published test vector of Philox."""
    counter = torch.tensor([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], dtype=torch.uint32)
    words = torch.zeros(4, dtype=torch.uint32)
    library.random_words(POINTER(counter.data_ptr()), ctypes.c_uint64(0x299F31D0A4093822), POINTER(words.data_ptr()))
    assert [hex(word) for word in words.tolist()] == ["0xd16cfe09", "0x94fdcceb", "0x5001e420", "0x24126ea1"]


CHECKS = [name for name in dir() if name.startswith("check_")]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> str:
    library: Path = compile_kernels("sample_launchers.cpp", tmp_path_factory.mktemp("kernels"))
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
