"""Reparameterized samples of diagonal Gaussians with their KL divergence."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._autograd import apply, differentiate
from ._dispatch import choose_impl, register_fake, streaming_unavailable
from ._layout import as_rows, rows_fit
from ._noise import draw_seed, first_sample, normal_noise
from ._precision import HALF_DTYPES, accumulator_dtype
from ._validate import check_float, check_noise, check_tensor

LOGVAR_RANGE = (-30.0, 20.0)


def gaussian_sample(
    mean: Tensor,  # [B, ...], or [B, ..., 2 * D, ...] packed
    logvar: Tensor | None = None,  # [B, ...]
    *,
    dim: int = 1,
    prior: Tensor | tuple[Tensor, Tensor] | None = None,
    free_bits: float = 0.0,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,  # [B, ...]
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample a diagonal Gaussian and measure its KL divergence; Kingma and Welling, "Auto-Encoding Variational Bayes" (2013).

    Equivalent to:
        mean, logvar = moments.chunk(2, dim)                                # of one packed tensor (logvar=None)
        logvar = logvar.clamp(-30, 20)
        sample = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)

    One pass reads the moments, draws the noise and writes the sample; one pass backward draws the noise again and writes
    the (packed) gradient. Besides the moments only a seed is kept for it. Arithmetic is float32 for half-precision
    moments, and the KL does not cancel where the variance is near 1.

    Args:
        mean: float32, bfloat16, float16 or float64, any strides; with logvar=None mean and log variance packed along
            `dim`, mean first.
        logvar: log variance, of mean's shape and dtype. Clamped to [-30, 20]; its gradient is zero beyond.
        dim: the dimension that holds both halves of a packed tensor, not the batch; unused with two tensors.
        prior: packed like mean, or a pair (mean, logvar): the Gaussian that the KL is measured against in place of
            N(0, 1), of mean's shape (dimensions of size 1 expand) and dtype. Its log variance is clamped as well.
        free_bits: floor, in nats, of each element's KL before the sum; below it the KL has no gradient. Kingma et al.,
            "Improving Variational Inference with Inverse Autoregressive Flow" (2016).
        dtype: of the sample; None for mean's. torch.float32 with half-precision moments keeps noise that rounding to
            them would lose (bfloat16 near 4 has steps of 0.03).
        generator: the seed of the noise is drawn from it, or from torch's default generator of mean's device. One seed
            gives the same noise on every device and in every memory layout, up to the rounding of log, sin and cos.
        noise: used in place of drawn noise, of mean's shape, in mean's dtype or float32.
        impl: None picks; "native" and "reference" insist.

    Returns:
        sample, of mean's shape (of one half of a packed tensor);
        kl, float32 [B] (float64 for float64): in nats, summed over all dimensions but the first.
        NaN and infinity propagate, within their sample.
        Differentiable in mean, logvar and prior; the second derivative (create_graph=True) runs in plain PyTorch.

    Raises:
        ValueError, TypeError: tensors that do not fit each other, as a sentence.
        NotImplementedError: an `impl` that cannot run here.
    """
    op = "gaussian_sample"
    check_tensor(op, "mean", mean)
    check_float(op, "mean", mean)
    shape = _check_moments(op, "mean", mean, "logvar", logvar, dim)
    dim %= mean.dim()
    prior_mean, prior_logvar = _check_prior(op, prior, mean, shape, dim)
    if noise is not None:
        check_noise(op, noise, "mean", mean, shape)
    if not free_bits >= 0:
        raise ValueError(f"{op}: free_bits must not be negative, got {free_bits!r}.")
    if dtype not in (None, mean.dtype) and not (dtype == torch.float32 and mean.dtype in HALF_DTYPES):
        raise TypeError(f"{op}: dtype must be None, mean's, or float32 with half-precision moments, got {dtype} for {mean.dtype}.")
    reasons = unavailable(mean.device, mean.dtype)
    if noise is not None and noise.requires_grad and torch.is_grad_enabled():
        reasons["native"] = reasons["native"] or "noise requires a gradient, which the kernels do not compute."
    chosen = choose_impl(op, impl, reasons, mean, logvar, prior_mean, prior_logvar, noise)

    seed = draw_seed(op, mean.device, generator) if noise is None else None
    if seed is not None and first_sample():
        noise = normal_noise(seed, shape[0], math.prod(shape[1:]), accumulator_dtype(mean.dtype), first_sample()).reshape(shape)
    inputs = (mean, logvar, prior_mean, prior_logvar)
    wide = dtype == torch.float32 and mean.dtype != torch.float32
    if chosen == "reference":
        return gaussian_sample_reference(*inputs, noise, seed, dim, free_bits, wide)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return apply(_GaussianSample, *inputs, noise, seed, dim, free_bits, wide)
    return _forward(*inputs, noise, seed, dim, free_bits, wide)


def unavailable(device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
    """Which implementations cannot run, and why; best first."""
    return streaming_unavailable("gaussian_sample", device, dtype)


def _check_moments(op: str, name: str, mean: Tensor, logvar_name: str, logvar: Tensor | None, dim: int) -> torch.Size:
    """The shape of one half."""
    if mean.dim() == 0:
        raise ValueError(f"{op}: {name} must have a batch dimension, got a scalar.")
    if logvar is None:
        if not -mean.dim() <= dim < mean.dim() or dim % mean.dim() == 0:
            raise ValueError(f"{op}: dim must be a dimension of {name} other than the batch, got dim={dim} for shape {list(mean.shape)}.")
        if mean.shape[dim] % 2:
            raise ValueError(f"{op}: packed moments must have an even size along dim={dim}, got {list(mean.shape)}.")
        shape = list(mean.shape)
        shape[dim] //= 2
        return torch.Size(shape)
    check_tensor(op, logvar_name, logvar)
    if logvar.shape != mean.shape:
        raise ValueError(f"{op}: {logvar_name} must have the shape of {name}, {list(mean.shape)}, got {list(logvar.shape)}.")
    if logvar.dtype != mean.dtype or logvar.device != mean.device:
        raise TypeError(
            f"{op}: {logvar_name} must have the dtype and device of {name}, {mean.dtype} on {mean.device}, "
            f"got {logvar.dtype} on {logvar.device}."
        )
    return mean.shape


def _check_prior(
    op: str, prior: Tensor | tuple[Tensor, Tensor] | None, mean: Tensor, shape: torch.Size, dim: int
) -> tuple[Tensor | None, Tensor | None]:
    if prior is None:
        return None, None
    prior_mean, prior_logvar = prior if isinstance(prior, tuple | list) else (prior, None)
    check_tensor(op, "prior", prior_mean)
    if prior_mean.dtype != mean.dtype or prior_mean.device != mean.device:
        raise TypeError(
            f"{op}: prior must have the dtype and device of mean, {mean.dtype} on {mean.device}, "
            f"got {prior_mean.dtype} on {prior_mean.device}."
        )
    half = _check_moments(op, "prior", prior_mean, "the prior's logvar", prior_logvar, dim)
    if half != shape:
        if len(half) != len(shape) or any(have not in (1, want) for have, want in zip(half, shape, strict=True)):
            raise ValueError(f"{op}: prior must have or expand to the shape of the sample, {list(shape)}, got {list(half)}.")
        # Two tensors, whose gradients autograd sums over what was expanded.
        prior_mean, prior_logvar = (t.expand(shape) for t in _halves(prior_mean, prior_logvar, dim))
    return prior_mean, prior_logvar


def _halves(mean: Tensor, logvar: Tensor | None, dim: int) -> tuple[Tensor, Tensor]:
    return mean.chunk(2, dim) if logvar is None else (mean, logvar)


def _all_halves(inputs: Sequence[Tensor | None], dim: int) -> list[Tensor | None]:
    """mean, logvar and those of the prior, unpacked."""
    mean, logvar, prior_mean, prior_logvar = inputs
    prior = (None, None) if prior_mean is None else _halves(prior_mean, prior_logvar, dim)
    return [*_halves(mean, logvar, dim), *prior]


def _rows(
    inputs: Sequence[Tensor | None], extra: Sequence[Tensor | None], written: Sequence[Tensor | None], dim: int
) -> list[Tensor | None]:
    """`as_rows` of the halves of `inputs`, of `extra`, and of the halves of `written`."""
    # What nearly every encoder gives: one view of each packed tensor, and its halves. Inductor (torch 2.13) loses what is
    # written through them when sizes are dynamic.
    packed = inputs[1] is None and not torch.compiler.is_compiling()
    if packed and all(t is None or t.is_contiguous() for t in (*inputs, *extra, *written)):
        shape = inputs[0].shape
        rows = math.prod(shape[1:dim])
        columns = math.prod(shape[dim:]) // 2

        def halves(mean: Tensor | None, logvar: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
            if mean is not None and logvar is None:
                return mean.view(shape[0], rows, 2, columns).unbind(2)
            return view(mean), view(logvar)

        def view(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.view(shape[0], rows, columns)

        written_halves = (*halves(*written[:2]), *halves(*written[2:])) if written else ()
        return [*halves(*inputs[:2]), *halves(*inputs[2:]), *map(view, extra), *written_halves]
    return as_rows([*_all_halves(inputs, dim), *extra], _all_halves(written, dim) if written else ())


def _forward(mean, logvar, prior_mean, prior_logvar, noise, seed, dim, free_bits, wide) -> tuple[Tensor, Tensor]:
    rows = _rows((mean, logvar, prior_mean, prior_logvar), (noise,), (), dim)
    sample, kl = torch.ops.genperf.gaussian_sample(*rows, seed, free_bits, wide)
    shape = list(mean.shape)
    if logvar is None:
        shape[dim] //= 2
    return sample.view(shape), kl


class _GaussianSample(torch.autograd.Function):
    @staticmethod
    def forward(mean, logvar, prior_mean, prior_logvar, noise, seed, dim, free_bits, wide):
        return _forward(mean, logvar, prior_mean, prior_logvar, noise, seed, dim, free_bits, wide)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        *tensors, ctx.dim, ctx.free_bits, ctx.wide = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_sample, grad_kl):
        *inputs, noise, seed = ctx.saved_tensors
        if grad_sample is None and grad_kl is None:
            return (None,) * 9
        if torch.is_grad_enabled():  # create_graph=True: gradients that can be differentiated again
            outputs = gaussian_sample_reference(*inputs, noise, seed, ctx.dim, ctx.free_bits, ctx.wide)
            return (*differentiate(outputs, (grad_sample, grad_kl), inputs, ctx.needs_input_grad[:4]), *(None,) * 5)
        gradients = [None if t is None else torch.empty_like(t) for t in inputs]
        if not _follows(gradients, ctx.dim):  # no memory format that the kernel can write
            gradients = [None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs]
        rows = _rows(inputs, (noise, grad_sample), gradients, ctx.dim)
        torch.ops.genperf.gaussian_sample_backward(*rows[6:], rows[5], grad_kl, *rows[:5], seed, ctx.free_bits)
        return (*gradients, *(None,) * 5)


def _follows(tensors: Sequence[Tensor | None], dim: int) -> bool:
    """Whether the kernel can see the halves of all the tensors as rows."""
    if all(t is None or t.is_contiguous() for t in tensors):
        return True
    return rows_fit([t for t in _all_halves(tensors, dim) if t is not None])


def gaussian_sample_reference(
    mean: Tensor,
    logvar: Tensor | None,
    prior_mean: Tensor | None,
    prior_logvar: Tensor | None,
    noise: Tensor | None,
    seed: Tensor | None,
    dim: int,
    free_bits: float,
    wide: bool,
) -> tuple[Tensor, Tensor]:
    """The op in plain PyTorch, differentiated by autograd."""
    dtype = accumulator_dtype(mean.dtype)
    sample_dtype = dtype if wide else mean.dtype
    tensors = [None if t is None else t.to(dtype) for t in _all_halves((mean, logvar, prior_mean, prior_logvar), dim)]
    mean, logvar, prior_mean, prior_logvar = tensors
    logvar = logvar.clamp(*LOGVAR_RANGE)
    if noise is None:
        noise = normal_noise(seed, mean.shape[0], math.prod(mean.shape[1:]), dtype).reshape(mean.shape)
    sample = mean + torch.exp(0.5 * logvar) * noise.to(dtype)
    if prior_mean is None:
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar)
    else:
        prior_logvar = prior_logvar.clamp(*LOGVAR_RANGE)
        ratio = logvar - prior_logvar
        kl = 0.5 * ((mean - prior_mean).square() * torch.exp(-prior_logvar) + ratio.exp() - 1 - ratio)
    if free_bits > 0:
        kl = kl.clamp(min=free_bits)
    return sample.to(sample_dtype), kl.reshape(kl.shape[0], math.prod(kl.shape[1:])).sum(1)


@register_fake("gaussian_sample")
def _(mean, logvar, prior_mean, prior_logvar, noise, seed, free_bits, float32_sample):
    sample = torch.empty_like(mean, dtype=torch.float32 if float32_sample else mean.dtype)
    return sample, mean.new_empty(mean.shape[0], dtype=torch.float32)


@register_fake("gaussian_sample_backward")
def _(*tensors_and_free_bits) -> None:
    pass
