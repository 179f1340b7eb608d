# SPDX-License-Identifier: Apache-2.0
"""Gradient penalties for critics."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .._choices import Penalty
from ..ops._autograd import transformed
from ..ops.gaussian_sample import gaussian_sample
from ..ops.gradient_norm_penalty import gradient_norm_penalty
from ..ops.interpolate import interpolate, perturb

# Target norm of each kind; None where the penalty has no target.
CENTERS: dict[str, float | None] = {
    "wgan-gp": 1.0,
    "one-sided": 1.0,
    "zero-centered": 0.0,
    "dragan": 1.0,
    "r1": 0.0,
    "r2": 0.0,
    "r1+r2": 0.0,
    "finite-difference": None,
}
INTERPOLATING = ("wgan-gp", "one-sided", "zero-centered")
NEED_FAKE = (*INTERPOLATING, "r2", "r1+r2")


def gradient_penalty(
    critic: Callable[..., Any],
    real: Tensor,  # [B, ...]
    fake: Tensor | None = None,  # [B, ...]
    *,
    kind: Penalty = "wgan-gp",
    weight: float | Tensor = 10.0,
    center: float | None = None,
    condition: Any = None,
    step: float = 0.01,
    scaler: "torch.amp.GradScaler | None" = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Penalty on the distance of a critic's gradient norms from `center`, to be added to the critic's loss.

    Equivalent to (kind="wgan-gp"):
        points = genperf.interpolate(real.detach(), fake.detach()).requires_grad_()
        (gradients,) = torch.autograd.grad(critic(points).sum(), points, create_graph=True)
        norm = torch.linalg.vector_norm(gradients.flatten(1), dim=1)
        loss = weight * (norm - 1).square().mean()

    kind                points                                  penalty of a sample     paper
    "wgan-gp"           genperf.interpolate(real, fake)         (|g| - 1)^2             Gulrajani et al. 2017
    "one-sided"         genperf.interpolate(real, fake)         max(0, |g| - 1)^2       Petzka et al. 2017
    "zero-centered"     genperf.interpolate(real, fake)         |g|^2                   Thanh-Tung et al. 2019
    "dragan"            genperf.perturb(real)                   (|g| - 1)^2             Kodali et al. 2017
    "r1"                real                                    |g|^2                   Mescheder et al. 2018
    "r2"                fake                                    |g|^2                   Mescheder et al. 2018
    "r1+r2"             real, and separately fake               |g|^2, summed           Huang et al. (R3GAN) 2024
    "finite-difference" real                                    estimates |g|^2         Lin et al. (APT) 2025

    g is the gradient of the sum of the critic's outputs. Norms are taken over all dimensions of a sample, each sample has
    one interpolation weight, and the mean is over samples. The loss is `weight` times that mean: where a paper writes
    gamma / 2 * E|g|^2 (R1, R2, R3GAN), pass weight=gamma / 2. The derivative of a zero norm is zero, not NaN.

    The function neither calls backward nor writes a `.grad`, so the critic may be wrapped in DistributedDataParallel: add the
    penalty to the loss of the training step. Only the critic's parameters get a gradient; real and fake are detached.

    If the critic's outputs depend on other samples of the batch (batch normalization, minibatch discrimination), the
    penalty is on the gradient of the sum over the batch, not on the gradients of single samples.

    **Without double backward.** All other kinds differentiate a gradient, which torch.compile, fused attention and
    some forms of gradient checkpointing do not support. "finite-difference" compares two forward passes,

        v = torch.randn_like(real)
        slope = (critic(real + step * v) - critic(real)).flatten(1).sum(1) / step
        loss = weight * slope.square().mean()

    whose expectation over v is |g|^2 + O(step^2), the penalty of R1; it is exact for a linear critic. The variance of one
    draw is 2 |g|^4. It works under torch.compile(fullgraph=True), with scaled_dot_product_attention and with
    torch.utils.checkpoint(use_reentrant=False). The critic must be deterministic: with dropout, the difference between the
    two passes counts as slope. Rounding of the output adds about (eps * |output| / step)^2, so half-precision critics need a
    larger step, about 0.1, and real in float32. The approximate R1 of the paper does not divide by the step: its lambda is
    weight / step^2. For R2, pass generated samples as `real`.

    **Mixed precision.** Call critic and penalty under autocast, as in the training step. With `scaler`, the critic's output
    is scaled for the inner backward about as in scaler.scale(output.mean()), and the gradients are unscaled in float32
    before the norm, without a device synchronization. If the scale overflows half precision, the penalty and the gradients of
    scaler.scale(loss).backward() are inf or NaN: scaler.step skips the step and scaler.update lowers the scale, as
    for any loss. The returned loss is not scaled.

    Args:
        critic: called as critic(points), or with a condition. It returns a tensor of any shape, or a tuple, list or dict of
            tensors, possibly nested, as multi-scale critics do. All outputs are summed: if a critic also returns features,
            pass `lambda x: critic(x)[0]`. For "finite-difference" the first dimension of each output must be the batch.
        real: float32, bfloat16, float16 or float64.
        fake: required by the kinds that use it in the table, ignored by the others; converted to real's dtype. Kinds that
            interpolate need real's shape; for "r2" and "r1+r2" the batch size may differ.
        kind: a row of the table.
        weight: factor of the loss, >= 0; the value of a tensor is not checked.
        center: target norm in place of the kind's 0 or 1; not for "finite-difference".
        condition: passed to a conditional critic: a tuple as further positional arguments, a mapping as keyword arguments,
            anything else as one further argument. A real and a fake sample that are interpolated share their condition.
        step: standard deviation of the perturbation of "finite-difference", in units of real.
        scaler: the torch.amp.GradScaler of the training step; "finite-difference" ignores it.
        generator: random generator of all noise; None for torch's default generator.

    Returns:
        A float32 scalar (float64 for float64), differentiable in the critic's parameters; 0 for an empty batch.

    Raises:
        ValueError: arguments out of range or of shapes that do not match, or a critic whose output does not depend on its input.
        TypeError: samples or outputs that are not floating-point tensors.
        RuntimeError: a call under torch.no_grad, except for "finite-difference".
    """
    op = "gradient_penalty"
    _check_arguments(op, real, fake, kind, weight, center, step)
    real, fake, weight, condition = _without_inference_tensors((real, fake, weight, condition))
    real = real.detach()
    if fake is not None:
        fake = fake.detach().to(real.dtype)

    if kind == "finite-difference":
        return weight * _squared_slope(op, critic, real, condition, step, generator)
    if not torch.is_grad_enabled():
        raise RuntimeError(f"{op}: kind={kind!r} differentiates the critic, got a call under torch.no_grad or inference_mode.")
    target = CENTERS[kind] if center is None else center
    assert target is not None
    penalties = [
        gradient_norm_penalty(_gradients(op, critic, points, condition, scaler), center=target, one_sided=kind == "one-sided")
        for points in _points(kind, real, fake, generator)
    ]
    return weight * sum(penalties[1:], penalties[0])


def _points(kind: Penalty, real: Tensor, fake: Tensor | None, generator: torch.Generator | None) -> list[Tensor]:
    """The batches of points where `kind` penalizes the gradient."""
    if kind == "r1":
        return [real]
    if kind == "dragan":
        return [perturb(real, generator=generator)]
    assert fake is not None
    if kind in INTERPOLATING:
        return [interpolate(real, fake, generator=generator)]
    return [fake] if kind == "r2" else [real, fake]


def _check_arguments(
    op: str, real: Tensor, fake: Tensor | None, kind: Penalty, weight: float | Tensor, center: float | None, step: float
) -> None:
    if kind not in CENTERS:
        raise ValueError(f"{op}: kind must be one of {', '.join(CENTERS)}, got {kind!r}.")
    for name, samples in (("real", real), ("fake", fake)):
        if samples is None and (name == "real" or kind in NEED_FAKE):
            raise ValueError(f"{op}: kind={kind!r} needs {name} samples, got None.")
        if samples is None:
            continue
        if not isinstance(samples, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(samples).__name__}.")
        if not samples.is_floating_point():
            raise TypeError(f"{op}: {name} must be of a floating dtype, got {samples.dtype}.")
        if samples.dim() == 0:
            raise ValueError(f"{op}: {name} must have a batch dimension, got a scalar.")
    if kind in INTERPOLATING and fake is not None and fake.shape != real.shape:
        raise ValueError(
            f"{op}: kind={kind!r} interpolates between real and fake samples, so they must have the same shape, "
            f"got {list(real.shape)} and {list(fake.shape)}."
        )
    if not isinstance(weight, Tensor) and not 0 <= weight < math.inf:
        raise ValueError(f"{op}: weight must be a finite number, at least 0, got {weight!r}.")
    if center is not None and CENTERS[kind] is None:
        raise ValueError(f"{op}: kind={kind!r} estimates the squared norm, which has no center, got center={center!r}.")
    if not 0 < step < math.inf:
        raise ValueError(f"{op}: step must be a finite number above 0, got {step!r}.")


def _gradients(op: str, critic: Callable[..., Any], points: Tensor, condition: Any, scaler: Any) -> Tensor:
    """Unscaled gradients of the critic's outputs at the points, differentiable in its parameters."""
    scale = torch.ones((), device=points.device)
    if scaler is not None:
        # Divided by the batch size as in the mean of an ordinary loss: the scaler's initial 2^16 overflows float16. By a power
        # of two, which half precision represents exactly.
        scale = scaler.scale(scale) / (1 << max(0, points.shape[0] - 1).bit_length())

    def seeds_of(outputs: list[Tensor]) -> list[Tensor]:
        return [scale.to(out.dtype).expand_as(out) for out in outputs]

    gradients = None
    if transformed():  # where requires_grad_ is not allowed
        outputs, pull_back, *_ = torch.func.vjp(lambda x: _tensors(op, _call(critic, x, condition)), points)
        (gradients,) = pull_back(seeds_of(outputs))
    else:
        points = points.detach().requires_grad_()
        outputs = [out for out in _tensors(op, _call(critic, points, condition)) if out.requires_grad]
        if outputs:
            (gradients,) = torch.autograd.grad(outputs, points, seeds_of(outputs), create_graph=True, allow_unused=True)
    if gradients is None:
        raise ValueError(
            f"{op}: the critic's output must depend on its input, got an output without a gradient to the points "
            f"of shape {list(points.shape)}."
        )
    if scaler is None:
        return gradients
    # In float32, since unscaled gradients may underflow half precision.
    return gradients.to(torch.promote_types(gradients.dtype, torch.float32)) / scale


def _without_inference_tensors(value: Any) -> Any:
    """`value`, a tensor or a nesting of tensors, with copies of those made in inference mode, which autograd cannot save."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return value
    return tree_map_only(Tensor, lambda t: t.clone() if t.is_inference() else t, value)


def _squared_slope(
    op: str, critic: Callable[..., Any], points: Tensor, condition: Any, step: float, generator: torch.Generator | None
) -> Tensor:
    """Mean over samples of the squared slope of the critic along a random direction."""
    count = points.shape[0]
    logvar = points.new_full((), 2 * math.log(step)).expand(points.shape)
    moved, _ = gaussian_sample(points, logvar, generator=generator)
    here, there = (_tensors(op, _call(critic, p, condition)) for p in (points, moved))
    dtype = torch.float64 if points.dtype == torch.float64 else torch.float32
    rise = torch.zeros(count, dtype=dtype, device=points.device)
    for low, high in zip(here, there, strict=True):
        if low.dim() == 0 or low.shape[0] != count:
            raise ValueError(
                f"{op}: kind='finite-difference' needs outputs whose first dimension is the batch of {count}, got shape {list(low.shape)}."
            )
        # Subtracted before summing over outputs: a difference of two sums would cancel.
        rise = rise + (high.to(dtype) - low.to(dtype)).unsqueeze(1).flatten(1).sum(1)
    return (rise / step).square().sum() / max(1, count)


def _call(critic: Callable[..., Any], points: Tensor, condition: Any) -> Any:
    if condition is None:
        return critic(points)
    if isinstance(condition, Mapping):
        return critic(points, **condition)
    return critic(points, *condition) if isinstance(condition, tuple) else critic(points, condition)


def _tensors(op: str, output: Any) -> list[Tensor]:
    found = list(_flatten(output))
    for value in found:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = f"a {value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{op}: the critic must return floating tensors, or a tuple, list or dict of them, got {got}.")
    return found


def _flatten(output: Any) -> Iterator[Any]:
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, tuple | list):
        for part in output:
            yield from _flatten(part)
    else:
        yield output
