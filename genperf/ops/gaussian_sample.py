# SPDX-License-Identifier: Apache-2.0
"""Reparameterized sampling from diagonal Gaussians, with the KL divergence."""

import math
from typing import Any

import torch
from torch import Tensor

from .._choices import Impl
from ._autograd import Function, apply, differentiate, need_function, need_graph, requires_grad, saved_tensors, transformed
from ._dispatch import Reasons, also_not_native, choose_impl, register_fake, remembered, streaming_unavailable
from ._layout import for_inductor
from ._moments import Moments, empty_moments, halves, moments_fit, rows_of
from ._noise import draw_seed, first_sample, normal_noise
from ._precision import HALF_DTYPES, accumulator_dtype, clamp
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
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample a diagonal Gaussian and compute its KL divergence; Kingma and Welling, "Auto-Encoding Variational Bayes" (2013).

    Equivalent to:
        mean, logvar = moments.chunk(2, dim)                                # if packed (logvar=None)
        logvar = logvar.clamp(-30, 20)
        sample = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)

    Forward reads the moments, draws the noise and writes the sample in one pass. Backward draws the noise again and writes the (packed)
    gradient in one pass; autograd saves nothing but the moments and a seed. Half-precision moments are computed in float32. The KL does
    not lose precision to cancellation where the variance is close to 1.

    Args:
        mean: float32, bfloat16, float16 or float64, any strides. With logvar=None, mean and log variance packed along `dim`, in this order.
        logvar: log variance, mean's shape and dtype. Clamped to [-30, 20], with the gradient 0 outside.
        dim: the dimension along which a packed tensor is split, not the batch dimension; unused with two tensors.
        prior: the Gaussian to compute the KL against, instead of N(0, 1): packed like mean, or a pair (mean, logvar). Must have mean's
            dtype and its shape, or dimensions of size 1, which are expanded. Its log variance is clamped as well.
        free_bits: lower bound, in nats, of each element's KL before the sum; below it the gradient is 0. Kingma et al., "Improving
            Variational Inference with Inverse Autoregressive Flow" (2016).
        dtype: of the sample; None for mean's dtype. torch.float32 with half-precision moments keeps noise that would be lost to rounding
            (bfloat16 has a spacing of 0.03 near 4).
        generator: the generator that the seed of the noise is drawn from; None for torch's default generator of mean's device. A seed gives
            the same noise on every device and in every memory layout, up to rounding in log, sin and cos.
        noise: noise to use instead, mean's shape, in mean's dtype or float32.
        impl: "native", "reference", or None to choose automatically.

    Returns:
        sample, mean's shape (that of one half of a packed tensor);
        kl, float32 (float64 for float64 moments) [B], in nats, summed over all dimensions but the first.
        NaN and infinity propagate within their sample.
        Differentiable in mean, logvar and prior; second derivatives (create_graph=True) run in plain PyTorch.

    Raises:
        ValueError, TypeError: an invalid argument.
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
        raise TypeError(f"{op}: dtype must be None, mean's dtype, or float32 with half-precision moments, got {dtype} for {mean.dtype}.")
    reasons = unavailable(mean.device, mean.dtype)
    if noise is not None and requires_grad(noise):
        reasons = also_not_native(reasons, "noise requires a gradient, which the kernels do not compute.")
    chosen = choose_impl(op, impl, reasons, mean, logvar, prior_mean, prior_logvar, noise)

    seed = draw_seed(op, mean.device, generator, by_value=True) if noise is None else None
    first = first_sample()
    inputs: Moments = (mean, logvar, prior_mean, prior_logvar)
    float32_sample = dtype == torch.float32 and mean.dtype != torch.float32
    if chosen == "reference":
        return gaussian_sample_reference(*inputs, noise, seed, first, dim, free_bits, float32_sample)
    if logvar is None and prior_mean is None and _is_packed(mean, noise):
        arguments = (mean, noise, seed, first, dim, float(free_bits), float32_sample)
        return apply(_PackedSample, *arguments) if need_function(mean) else torch.ops.genperf.gaussian_sample_packed(*arguments)
    if need_function(*inputs):
        sample, kl = apply(_GaussianSample, *inputs, noise, seed, first, dim, free_bits, float32_sample)
    else:
        sample, kl = _forward(*inputs, noise, seed, first, dim, free_bits, float32_sample)
    return for_inductor(sample), kl


@remembered
def unavailable(device: torch.device, dtype: torch.dtype) -> Reasons:
    """Why each implementation cannot run on this device and dtype, or None; best first."""
    return streaming_unavailable("gaussian_sample", device, dtype)


def _check_moments(op: str, name: str, mean: Tensor, logvar_name: str, logvar: Tensor | None, dim: int) -> torch.Size:
    """Check packed or separate moments. Returns the shape of one half."""
    dims = mean.dim()
    if dims == 0:
        raise ValueError(f"{op}: {name} must have a batch dimension, got a scalar.")
    if logvar is None:
        if not -dims <= dim < dims or dim % dims == 0:
            raise ValueError(f"{op}: dim must be a dimension of {name} other than the batch, got dim={dim} for shape {list(mean.shape)}.")
        shape = list(mean.shape)
        if shape[dim] % 2:
            raise ValueError(f"{op}: packed moments must have an even size along dim={dim}, got {shape}.")
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
        # As two tensors, since autograd sums their gradients over the expanded dimensions.
        prior_mean, prior_logvar = (t.expand(shape) for t in halves(prior_mean, prior_logvar, dim))
    return prior_mean, prior_logvar


def _forward(
    mean: Tensor,
    logvar: Tensor | None,
    prior_mean: Tensor | None,
    prior_logvar: Tensor | None,
    noise: Tensor | None,
    seed: Tensor | None,
    first: int,
    dim: int,
    free_bits: float,
    float32_sample: bool,
) -> tuple[Tensor, Tensor]:
    rows = rows_of((mean, logvar, prior_mean, prior_logvar), (noise,), None, dim)
    sample, kl = torch.ops.genperf.gaussian_sample(*rows, seed, first, free_bits, float32_sample)
    shape = list(mean.shape)
    if logvar is None:
        shape[dim] //= 2
    return sample.view(*shape), kl


class _GaussianSample(Function):
    @staticmethod
    def forward(
        mean: Tensor,
        logvar: Tensor | None,
        prior_mean: Tensor | None,
        prior_logvar: Tensor | None,
        noise: Tensor | None,
        seed: Tensor | None,
        first: int,
        dim: int,
        free_bits: float,
        float32_sample: bool,
    ) -> tuple[Tensor, Tensor]:
        sample, kl = _forward(mean, logvar, prior_mean, prior_logvar, noise, seed, first, dim, free_bits, float32_sample)
        # Autograd forbids to modify a view in place that a Function returns, unless it is detached.
        return sample.detach(), kl

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.first, ctx.dim, ctx.free_bits, ctx.float32_sample = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_sample: Tensor | None, grad_kl: Tensor | None) -> tuple[Tensor | None, ...]:
        mean, logvar, prior_mean, prior_logvar, noise, seed = saved_tensors(ctx)
        inputs: Moments = (mean, logvar, prior_mean, prior_logvar)
        if grad_sample is None and grad_kl is None:
            return (None,) * 10
        if need_graph((grad_sample, grad_kl), inputs):

            def reference(*moments: Any) -> tuple[Tensor, Tensor]:
                options = {"first": ctx.first, "dim": ctx.dim, "free_bits": ctx.free_bits, "float32_sample": ctx.float32_sample}
                return gaussian_sample_reference(*moments, noise=noise, seed=seed, **options)

            return (*differentiate(reference, (grad_sample, grad_kl), inputs, ctx.needs_input_grad[:4]), *(None,) * 6)
        gradients = _gradients(inputs, noise, seed, grad_sample, grad_kl, ctx.first, ctx.dim, ctx.free_bits)
        return (*gradients, *(None,) * 6)


def _gradients(
    inputs: Moments,
    noise: Tensor | None,
    seed: Tensor | None,
    grad_sample: Tensor | None,
    grad_kl: Tensor | None,
    first: int,
    dim: int,
    free_bits: float,
) -> Moments:
    gradients = empty_moments(inputs, torch.preserve_format)
    if not moments_fit(gradients, dim):  # a memory format that the kernel cannot write
        gradients = empty_moments(inputs, torch.contiguous_format)
    rows = rows_of(inputs, (noise, grad_sample), gradients, dim)
    torch.ops.genperf.gaussian_sample_backward(*rows[6:], rows[5], grad_kl, *rows[:5], seed, first, free_bits)
    return gradients


def _is_packed(moments: Tensor, noise: Tensor | None) -> bool:
    """Whether one op takes the packed moments as they are, which spares the views of their halves. Not where a graph or a batch is made."""
    if moments.device.type != "cpu" or torch.compiler.is_compiling() or transformed():
        return False
    return moments.is_contiguous() and (noise is None or noise.is_contiguous())


class _PackedSample(Function):
    @staticmethod
    def forward(
        moments: Tensor, noise: Tensor | None, seed: Tensor | None, first: int, dim: int, free_bits: float, float32_sample: bool
    ) -> tuple[Tensor, Tensor]:
        return torch.ops.genperf.gaussian_sample_packed(moments, noise, seed, first, dim, free_bits, float32_sample)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
        moments, noise, seed, *ctx.options = inputs
        ctx.save_for_backward(moments, noise, seed)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_sample: Tensor | None, grad_kl: Tensor | None) -> tuple[Tensor | None, ...]:
        moments, noise, seed = saved_tensors(ctx)
        first, dim, free_bits, float32_sample = ctx.options
        if grad_sample is None and grad_kl is None:
            gradient = None
        elif need_graph((grad_sample, grad_kl), (moments,)):

            def reference(moments: Tensor) -> tuple[Tensor, Tensor]:
                return gaussian_sample_reference(moments, None, None, None, noise, seed, first, dim, free_bits, float32_sample)

            (gradient,) = differentiate(reference, (grad_sample, grad_kl), (moments,), (True,))
        elif grad_sample is None or grad_sample.is_contiguous():
            gradient = torch.ops.genperf.gaussian_sample_packed_backward(grad_sample, grad_kl, moments, noise, seed, first, dim, free_bits)
        else:
            gradient, *_ = _gradients((moments, None, None, None), noise, seed, grad_sample, grad_kl, first, dim, free_bits)
        return gradient, None, None, None, None, None, None


def gaussian_sample_reference(
    mean: Tensor,
    logvar: Tensor | None,
    prior_mean: Tensor | None,
    prior_logvar: Tensor | None,
    noise: Tensor | None,
    seed: Tensor | None,
    first: int,
    dim: int,
    free_bits: float,
    float32_sample: bool,
) -> tuple[Tensor, Tensor]:
    """The op in plain PyTorch, differentiated by autograd."""
    dtype = accumulator_dtype(mean.dtype)
    sample_dtype = dtype if float32_sample else mean.dtype
    mean, logvar = (t.to(dtype) for t in halves(mean, logvar, dim))
    logvar = clamp(logvar, *LOGVAR_RANGE)
    if noise is None:
        assert seed is not None
        noise = normal_noise(seed, mean.shape[0], math.prod(mean.shape[1:]), dtype, first, mean.device).reshape(mean.shape)
    sample = mean + torch.exp(0.5 * logvar) * noise.to(dtype)
    if prior_mean is None:
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar)
    else:
        prior_mean, prior_logvar = (t.to(dtype) for t in halves(prior_mean, prior_logvar, dim))
        prior_logvar = clamp(prior_logvar, *LOGVAR_RANGE)
        ratio = logvar - prior_logvar
        kl = 0.5 * ((mean - prior_mean).square() * torch.exp(-prior_logvar) + ratio.exp() - 1 - ratio)
    if free_bits > 0:
        kl = clamp(kl, free_bits)
    return sample.to(sample_dtype), kl.reshape(kl.shape[0], math.prod(kl.shape[1:])).sum(1)


@register_fake("gaussian_sample")
def _(
    mean: Tensor,
    logvar: Tensor,
    prior_mean: Tensor | None,
    prior_logvar: Tensor | None,
    noise: Tensor | None,
    seed: Tensor | None,
    first: int,
    free_bits: float,
    float32_sample: bool,
) -> tuple[Tensor, Tensor]:
    sample = torch.empty_like(mean, dtype=torch.float32 if float32_sample else mean.dtype)
    return sample, mean.new_empty(mean.shape[0], dtype=torch.float32)


@register_fake("gaussian_sample_backward")
def _(*arguments: object) -> None:
    pass


@register_fake("gaussian_sample_packed")
def _(
    moments: Tensor, noise: Tensor | None, seed: Tensor | None, first: int, dim: int, free_bits: float, float32_sample: bool
) -> tuple[Tensor, Tensor]:
    shape = list(moments.shape)
    shape[dim] //= 2
    sample = moments.new_empty(shape, dtype=torch.float32 if float32_sample else moments.dtype)
    return sample, moments.new_empty(moments.shape[0], dtype=torch.float32)


@register_fake("gaussian_sample_packed_backward")
def _(
    grad_sample: Tensor | None,
    grad_kl: Tensor | None,
    moments: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    first: int,
    dim: int,
    free_bits: float,
) -> Tensor:
    return torch.empty_like(moments)
