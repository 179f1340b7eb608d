"""The penalty on the norms of a critic's gradients."""

import math

import torch
from torch import Tensor

from ._autograd import apply, differentiate
from ._dispatch import choose_impl, register_fake, streaming_unavailable
from ._layout import as_rows
from ._precision import accumulator_dtype
from ._validate import check_float, check_tensor


def gradient_norm_penalty(
    gradients: Tensor,  # [B, ...]
    *,
    center: float = 1.0,
    one_sided: bool = False,
    impl: str | None = None,
) -> Tensor:
    """Mean square of how far each sample's gradient norm lies from `center`; Gulrajani et al., "Improved Training of WGANs" (2017).

    Equivalent to:
        norm = torch.linalg.vector_norm(gradients.flatten(1), dim=1)
        excess = norm - center
        penalty = (excess.clamp(min=0) if one_sided else excess).square().mean()

    One pass forward and one backward. The norm runs over all dimensions but the first. Where a gradient is zero so is
    the derivative of its penalty, never NaN. With center=0 the penalty is the mean squared norm of R1 and R2 (Mescheder
    et al., "Which Training Methods for GANs do actually Converge?", 2018).

    Args:
        gradients: float32, bfloat16, float16 or float64, any strides; from torch.autograd.grad(..., create_graph=True).
        center: the norm without a penalty, >= 0.
        one_sided: leave norms below `center` alone (Petzka et al., "On the Regularization of Wasserstein GANs", 2017).
        impl: None picks; "native" and "reference" insist.

    Returns:
        penalty, a float32 scalar (float64 for float64); 0 for an empty batch. NaN and infinity propagate.
        Differentiable; the second derivative (create_graph=True) runs in plain PyTorch.

    Raises:
        ValueError, TypeError: a bad argument, as a sentence.
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
    (rows,) = as_rows([gradients])
    if torch.is_grad_enabled() and gradients.requires_grad:
        return apply(_GradientNormPenalty, rows, center, one_sided)[0]
    return torch.ops.genperf.gradient_norm_penalty(rows, center, one_sided)[0]


def unavailable(device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
    """Which implementations cannot run, and why; best first."""
    return streaming_unavailable("gradient_norm_penalty", device, dtype)


class _GradientNormPenalty(torch.autograd.Function):
    @staticmethod
    def forward(gradients, center, one_sided):
        return torch.ops.genperf.gradient_norm_penalty(gradients, center, one_sided)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        gradients, ctx.center, ctx.one_sided = inputs
        norms = outputs[1]
        ctx.mark_non_differentiable(norms)
        ctx.save_for_backward(gradients, norms)

    @staticmethod
    def backward(ctx, grad_penalty, _norms):
        gradients, norms = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: gradients that can be differentiated again
            penalty = gradient_norm_penalty_reference(gradients, ctx.center, ctx.one_sided)
            return (*differentiate([penalty], [grad_penalty], [gradients], [True]), None, None)
        return torch.ops.genperf.gradient_norm_penalty_backward(grad_penalty, gradients, norms, ctx.center, ctx.one_sided), None, None


def gradient_norm_penalty_reference(gradients: Tensor, center: float, one_sided: bool) -> Tensor:
    """The op in plain PyTorch, differentiated by autograd."""
    flat = gradients.to(accumulator_dtype(gradients.dtype)).reshape(gradients.shape[0], math.prod(gradients.shape[1:]))
    if center == 0:
        return flat.square().sum() / max(1, gradients.shape[0])
    # A norm of zero is kept out of the square root, whose derivative there is infinite.
    square = flat.square().sum(1)
    zero = square == 0
    norm = torch.where(zero, 0, torch.where(zero, 1, square).sqrt())
    excess = norm - center
    if one_sided:
        excess = excess.clamp(min=0)
    return excess.square().sum() / max(1, gradients.shape[0])


@register_fake("gradient_norm_penalty")
def _(gradients, center, one_sided) -> tuple[Tensor, Tensor]:
    return gradients.new_empty((), dtype=torch.float32), gradients.new_empty(gradients.shape[0], dtype=torch.float32)


@register_fake("gradient_norm_penalty_backward")
def _(grad_penalty, gradients, norms, center, one_sided) -> Tensor:
    return torch.empty_like(gradients)
