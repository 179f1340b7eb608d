# SPDX-License-Identifier: Apache-2.0
"""Random points between real and fake samples, and around real samples, for gradient penalties."""

import math
from typing import Any

import torch
from torch import Tensor

from .._choices import Impl
from ._autograd import Function, ValueOf, apply, call, need_function, need_graph, requires_grad, saved_tensors
from ._dispatch import Reasons, also_not_native, choose_impl, register_fake, remembered, streaming_unavailable
from ._layout import as_rows, for_inductor
from ._noise import draw_seed, first_sample, uniform_noise, uniform_weights
from ._precision import accumulator_dtype
from ._validate import check_float, check_tensor


def interpolate(
    real: Tensor,  # [B, ...]
    fake: Tensor,  # [B, ...]
    *,
    weight: Tensor | None = None,  # [B]
    generator: torch.Generator | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """Mix real and fake samples with one random weight per sample; Gulrajani et al., "Improved Training of WGANs" (2017).

    Equivalent to:
        weight = torch.rand(len(real)).view(-1, *[1] * (real.dim() - 1))
        mixed = weight * real + (1 - weight) * fake

    One pass, which also draws the weights; backward draws them again from the seed. Half-precision samples are computed in float32.

    Args:
        real, fake: float32, bfloat16, float16 or float64, of the same shape and dtype, any strides.
        weight: weights to use instead, in float32 or real's dtype.
        generator: the generator that the seed of the weights is drawn from; None for torch's default generator of real's device. A seed
            gives the same weights on every device.
        impl: "native", "reference", or None to choose automatically.

    Returns:
        mixed, real's shape, dtype and memory format. NaN and infinity propagate within their element.
        Differentiable in real, fake and weight; second derivatives (create_graph=True) run in plain PyTorch.

    Raises:
        ValueError, TypeError: an invalid argument.
        NotImplementedError: an `impl` that cannot run here.
    """
    op = "interpolate"
    _check_samples(op, real)
    check_tensor(op, "fake", fake)
    if fake.shape != real.shape:
        raise ValueError(f"{op}: real and fake must have the same shape, got {list(real.shape)} and {list(fake.shape)}.")
    if fake.dtype != real.dtype or fake.device != real.device:
        raise TypeError(
            f"{op}: real and fake must have the same dtype and device, got {real.dtype} on {real.device} and {fake.dtype} on {fake.device}."
        )
    return _mix(op, real, fake, None, weight, generator, impl)


def perturb(
    real: Tensor,  # [B, ...]
    *,
    scale: float | Tensor = 0.5,
    weight: Tensor | None = None,  # [B]
    generator: torch.Generator | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """Move each sample a random fraction of the way to a noisy copy; Kodali et al., "On Convergence and Stability of GANs" (2017).

    Equivalent to:
        noisy = real + scale * real.std() * torch.rand_like(real)
        mixed = interpolate(real, noisy)

    with no gradient through the standard deviation. The pass over real also draws the noise.

    Args:
        real: float32, bfloat16, float16 or float64, any strides.
        scale: of the noise, in standard deviations of the batch; a number or a tensor of one element.
        weight, generator, impl: as in `interpolate`.

    Returns:
        mixed, real's shape, dtype and memory format. Its gradient is passed to real unchanged.

    Raises:
        ValueError, TypeError, NotImplementedError: as `interpolate`.
    """
    op = "perturb"
    _check_samples(op, real)
    if isinstance(scale, Tensor) and scale.numel() != 1:
        raise ValueError(f"{op}: scale must be a number or a tensor of one element, got shape {list(scale.shape)}.")
    dtype = accumulator_dtype(real.dtype)
    # The std of fewer than two elements is NaN; 0 leaves them unchanged.
    spread = real.detach().to(dtype).std() if real.numel() > 1 else torch.zeros((), dtype=dtype, device=real.device)
    spread = (scale.detach() * spread).to(dtype).reshape(()) if isinstance(scale, Tensor) else scale * spread
    return _mix(op, real, None, spread, weight, generator, impl)


@remembered
def unavailable(device: torch.device, dtype: torch.dtype) -> Reasons:
    """Why each implementation cannot run on this device and dtype, or None; best first."""
    return streaming_unavailable("interpolate", device, dtype)


def _check_samples(op: str, real: Tensor) -> None:
    check_tensor(op, "real", real)
    check_float(op, "real", real)
    if real.dim() == 0:
        raise ValueError(f"{op}: real must have a batch dimension, got a scalar.")


def _mix(
    op: str,
    real: Tensor,
    fake: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    generator: torch.Generator | None,
    impl: Impl | None,
) -> Tensor:
    if weight is not None:
        check_tensor(op, "weight", weight)
        if list(weight.shape) != [real.shape[0]]:
            raise ValueError(f"{op}: weight must have one element per sample, [{real.shape[0]}], got {list(weight.shape)}.")
        if weight.dtype not in (torch.float32, real.dtype) or weight.device != real.device:
            raise TypeError(
                f"{op}: weight must be float32 or have real's dtype {real.dtype}, on {real.device}, got {weight.dtype} on {weight.device}."
            )
    reasons = unavailable(real.device, real.dtype)
    if fake is None and requires_grad(weight):
        reasons = also_not_native(reasons, "weight requires a gradient, which the kernel does not compute for noise.")
    chosen = choose_impl(op, impl, reasons, real, fake, weight)
    # A perturbation needs a seed for its noise even if the weight is given.
    seed = draw_seed(op, real.device, generator, by_value=True) if weight is None or fake is None else None
    first = first_sample()
    if chosen == "reference":
        return interpolate_reference(real, fake, scale, weight, seed, first)
    if weight is not None:
        weight = weight.float()
    if fake is None:
        mixed = for_inductor(call(_forward, real.detach(), None, scale, weight, seed, first))
        return ValueOf.apply(mixed, real) if need_function(real) else mixed
    if need_function(real, fake, weight):
        return for_inductor(apply(_Interpolate, real, fake, weight, seed, first))
    return for_inductor(_forward(real, fake, None, weight, seed, first))


def _forward(real: Tensor, fake: Tensor | None, scale: Tensor | None, weight: Tensor | None, seed: Tensor | None, first: int) -> Tensor:
    rows = as_rows([real, fake])
    return torch.ops.genperf.interpolate(*rows, scale, weight, seed, first).view(*real.shape)


class _Interpolate(Function):
    @staticmethod
    def forward(real: Tensor, fake: Tensor, weight: Tensor | None, seed: Tensor | None, first: int) -> Tensor:
        # Autograd forbids to modify a view in place that a Function returns, unless it is detached.
        return _forward(real, fake, None, weight, seed, first).detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: Tensor) -> None:
        real, fake, weight, seed, ctx.first = inputs
        # Only the gradient of the weight depends on the samples.
        samples = (real, fake) if weight is not None and weight.requires_grad else (None, None)
        ctx.save_for_backward(*samples, weight, seed)

    @staticmethod
    def backward(ctx: Any, grad_mixed: Tensor) -> tuple[Tensor | None, ...]:
        real, fake, weight, seed = saved_tensors(ctx)
        if need_graph((grad_mixed,), (real, fake, weight)):
            of_real = uniform_weights(seed, grad_mixed.shape[0], ctx.first, grad_mixed.device) if weight is None else weight
            of_real = of_real.reshape(-1, *[1] * (grad_mixed.dim() - 1))
            grad_real, grad_fake = ((share * grad_mixed).to(grad_mixed.dtype) for share in (of_real, 1 - of_real))
            grad_weight = None
            if weight is not None and ctx.needs_input_grad[2]:
                difference = real.to(weight.dtype) - fake.to(weight.dtype)
                grad_weight = (grad_mixed * difference).reshape(grad_mixed.shape[0], math.prod(grad_mixed.shape[1:])).sum(1)
            return grad_real, grad_fake, grad_weight, None, None
        rows = as_rows([grad_mixed, real, fake])
        grad_real, grad_fake, grad_weight = torch.ops.genperf.interpolate_backward(*rows, weight, seed, ctx.first)
        needed, shape = ctx.needs_input_grad, grad_mixed.shape
        grad_real = grad_real.view(*shape) if needed[0] else None
        grad_fake = grad_fake.view(*shape) if needed[1] else None
        return grad_real, grad_fake, grad_weight if needed[2] else None, None, None


def interpolate_reference(
    real: Tensor, fake: Tensor | None, scale: Tensor | None, weight: Tensor | None, seed: Tensor | None, first: int
) -> Tensor:
    """The op in plain PyTorch, differentiated by autograd. Without `fake`, real is perturbed by uniform noise times `scale`."""
    dtype = accumulator_dtype(real.dtype)
    if weight is None:
        assert seed is not None
        weight = uniform_weights(seed, real.shape[0], first, real.device)
    weight = weight.to(dtype).reshape(-1, *[1] * (real.dim() - 1))
    wide = real.to(dtype)
    if fake is None:
        assert seed is not None
        assert scale is not None
        noise = uniform_noise(seed, real.shape[0], math.prod(real.shape[1:]), dtype, first, real.device).reshape(real.shape)
        mixed = wide + (1 - weight) * scale * noise
    else:
        mixed = weight * wide + (1 - weight) * fake.to(dtype)
    return mixed.to(real.dtype)


@register_fake("interpolate")
def _(real: Tensor, fake: Tensor | None, scale: Tensor | None, weight: Tensor | None, seed: Tensor | None, first: int) -> Tensor:
    return torch.empty_like(real)


@register_fake("interpolate_backward")
def _(
    grad_mixed: Tensor, real: Tensor | None, fake: Tensor | None, weight: Tensor | None, seed: Tensor | None, first: int
) -> tuple[Tensor, Tensor, Tensor]:
    samples = 0 if real is None else grad_mixed.shape[0]
    return torch.empty_like(grad_mixed), torch.empty_like(grad_mixed), grad_mixed.new_empty(samples, dtype=torch.float32)
