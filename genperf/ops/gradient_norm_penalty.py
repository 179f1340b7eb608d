# SPDX-License-Identifier: Apache-2.0
"""The penalty on the gradient norms of a critic."""

import math
from typing import Any

import torch
from torch import Tensor

from .._choices import Impl
from ._autograd import Function, apply, differentiate, need_function, need_graph, saved_tensors
from ._dispatch import Reasons, choose_impl, register_fake, remembered, streaming_unavailable
from ._layout import as_rows
from ._precision import accumulator_dtype
from ._validate import check_float, check_tensor


def gradient_norm_penalty(
    gradients: Tensor,  # [B, ...]
    *,
    center: float = 1.0,
    one_sided: bool = False,
    impl: Impl | None = None,
) -> Tensor:
    """Mean squared difference between each sample's gradient norm and `center`; Gulrajani et al., "Improved Training of WGANs" (2017).

    Equivalent to:
        norm = torch.linalg.vector_norm(gradients.flatten(1), dim=1)
        excess = norm - center
        penalty = (excess.clamp(min=0) if one_sided else excess).square().mean()

    Forward and backward take one pass each. The norm is taken over all dimensions but the first. The derivative at a gradient of zero is
    0, not NaN. With center=0 this is the mean squared norm of R1 and R2 (Mescheder et al., "Which Training Methods for GANs do actually
    Converge?", 2018).

    Args:
        gradients: float32, bfloat16, float16 or float64, any strides; from torch.autograd.grad(..., create_graph=True).
        center: the norm that has no penalty, >= 0.
        one_sided: penalize only norms above `center` (Petzka et al., "On the Regularization of Wasserstein GANs", 2017).
        impl: "native", "reference", or None to choose automatically.

    Returns:
        penalty, a float32 scalar (float64 for float64 gradients); 0 for an empty batch. NaN and infinity propagate.
        Differentiable; second derivatives (create_graph=True) run in plain PyTorch.

    Raises:
        ValueError, TypeError: an invalid argument.
        NotImplementedError: an `impl` that cannot run here.
    """
    op = "gradient_norm_penalty"
    check_tensor(op, "gradients", gradients)
    check_float(op, "gradients", gradients)
    if gradients.dim() == 0:
        raise ValueError(f"{op}: gradients must have a batch dimension, got a scalar.")
    if not 0 <= center < math.inf:
        raise ValueError(f"{op}: center must be a norm, at least 0 and finite, got {center!r}.")
    chosen = choose_impl(op, impl, unavailable(gradients.device, gradients.dtype), gradients)
    if chosen == "reference":
        return gradient_norm_penalty_reference(gradients, center, one_sided)
    if need_function(gradients):
        return apply(_GradientNormPenalty, gradients, center, one_sided)[0]
    return _forward(gradients, center, one_sided)[0]


@remembered
def unavailable(device: torch.device, dtype: torch.dtype) -> Reasons:
    """Why each implementation cannot run on this device and dtype, or None; best first."""
    return streaming_unavailable("gradient_norm_penalty", device, dtype)


def _forward(gradients: Tensor, center: float, one_sided: bool) -> tuple[Tensor, Tensor]:
    (rows,) = as_rows([gradients])
    return torch.ops.genperf.gradient_norm_penalty(rows, center, one_sided)


class _GradientNormPenalty(Function):
    @staticmethod
    def forward(gradients: Tensor, center: float, one_sided: bool) -> tuple[Tensor, Tensor]:
        return _forward(gradients, center, one_sided)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
        gradients, ctx.center, ctx.one_sided = inputs
        norms = outputs[1]
        ctx.mark_non_differentiable(norms)
        ctx.save_for_backward(gradients, norms)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_penalty: Tensor | None, _norms: None) -> tuple[Tensor | None, ...]:
        gradients, norms = saved_tensors(ctx)
        if grad_penalty is None:
            return None, None, None
        if need_graph((grad_penalty,), (gradients,)):

            def reference(gradients: Tensor) -> tuple[Tensor]:
                return (gradient_norm_penalty_reference(gradients, ctx.center, ctx.one_sided),)

            return (*differentiate(reference, (grad_penalty,), (gradients,), (True,)), None, None)
        (rows,) = as_rows([gradients])
        found = torch.ops.genperf.gradient_norm_penalty_backward(grad_penalty, rows, norms, ctx.center, ctx.one_sided)
        return found.view(*gradients.shape), None, None


def gradient_norm_penalty_reference(gradients: Tensor, center: float, one_sided: bool) -> Tensor:
    """The op in plain PyTorch, differentiated by autograd."""
    flat = gradients.to(accumulator_dtype(gradients.dtype)).reshape(gradients.shape[0], math.prod(gradients.shape[1:]))
    if center == 0:
        return flat.square().sum() / max(1, gradients.shape[0])
    # The derivative of the square root is infinite at 0.
    square = flat.square().sum(1)
    zero = square == 0
    norm = torch.where(zero, 0, torch.where(zero, 1, square).sqrt())
    excess = norm - center
    if one_sided:
        excess = excess.clamp(min=0)
    return excess.square().sum() / max(1, gradients.shape[0])


@register_fake("gradient_norm_penalty")
def _(gradients: Tensor, center: float, one_sided: bool) -> tuple[Tensor, Tensor]:
    return gradients.new_empty((), dtype=torch.float32), gradients.new_empty(gradients.shape[0], dtype=torch.float32)


@register_fake("gradient_norm_penalty_backward")
def _(grad_penalty: Tensor, gradients: Tensor, norms: Tensor, center: float, one_sided: bool) -> Tensor:
    return torch.empty_like(gradients)
