"""The square root of a symmetric positive semi-definite matrix."""

import torch
from torch import Tensor

from . import _polar
from ._common import ValueOf, apply, choose_impl, differentiate, refuse_forward_mode
from .covariance_factor import check_covariance, working_dtype
from .trace_sqrt_product import refusals, result_dtype


def matrix_sqrt(a: Tensor, *, impl: str | None = None) -> Tensor:
    """The symmetric square root of symmetric positive semi-definite matrices.

    Equivalent to:
        values, vectors = torch.linalg.eigh(a)
        root = (vectors * values.clamp(min=0).sqrt().unsqueeze(-2)) @ vectors.mT

    The derivative X of the root in a direction G solves root X + X root = G; unlike eigh's own derivative it does not
    divide by differences of eigenvalues, which may coincide. (Lin and Maji, "Improved Bilinear Pooling with CNNs", 2017.)

    Args:
        a: [..., d, d], float32, float64, bfloat16 or float16, taken as symmetric. Negative eigenvalues, which rounding
            makes, count as zero.
        impl: None picks. "eigen": symmetric eigenvalues, best on a CPU. "polar": matrix products only, without a wait for the
            device, best on a GPU; eigenvalues below 1e-12 of the largest become too small, by at most their size.
            "reference": the lines above.

    Returns:
        root [..., d, d], in float64 if `a` is, else float32; computed in float64 (float32 on devices without it). NaN and
        infinity give NaN in their matrix. Differentiable, finite where `a` is singular: between null vectors, where the
        derivative is infinite, the gradient is 0 ("eigen") or large ("polar"). Second derivatives (create_graph=True) are the
        reference's, which are not finite where eigenvalues coincide.

    Raises:
        ValueError, TypeError: a bad argument, as a sentence.
        NotImplementedError: an `impl` that cannot run here.
    """
    op = "matrix_sqrt"
    check_covariance(op, "a", a, batched=True)
    reasons = refusals(a.device)
    refuse_forward_mode(reasons, a)
    chosen = choose_impl(op, impl, reasons)
    with torch.autocast(a.device.type, enabled=False):
        working = a.to(working_dtype(a.device))
        if chosen == "reference":
            root = matrix_sqrt_reference(working)
        elif torch.is_grad_enabled() and a.requires_grad:
            root = apply(_MatrixSqrt, working, chosen)[0]
        else:
            root = (_eigen_root if chosen == "eigen" else _polar_root)(working)[0]
    return root.to(result_dtype(a))


def matrix_sqrt_reference(a: Tensor) -> Tensor:
    """The op in plain PyTorch, differentiated by autograd."""
    values, vectors = torch.linalg.eigh(a)
    return (vectors * values.clamp(min=0).sqrt().unsqueeze(-2)) @ vectors.mT


class _MatrixSqrt(torch.autograd.Function):
    @staticmethod
    def forward(a, impl):
        return _eigen_root(a) if impl == "eigen" else _polar_root(a)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        a, ctx.impl = inputs
        root, roots, vectors = outputs
        ctx.mark_non_differentiable(roots, vectors)
        ctx.save_for_backward(a, root, roots, vectors)

    @staticmethod
    def backward(ctx, grad, _roots, _vectors):
        a, root, roots, vectors = ctx.saved_tensors
        with torch.no_grad():
            symmetric = (grad + grad.mT) / 2
            if ctx.impl == "polar":
                found = _polar.lyapunov(root, symmetric)
            else:
                sums = roots.unsqueeze(-1) + roots.unsqueeze(-2)
                found = vectors @ torch.where(sums > 0, (vectors.mT @ symmetric @ vectors) / sums, 0) @ vectors.mT
        if torch.is_grad_enabled():  # create_graph=True: gradients that can be differentiated again
            (again,) = differentiate([matrix_sqrt_reference(a)], [grad], [a], [True])
            found = ValueOf.apply(found, again)
        return found, None


def _eigen_root(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The root, and the eigenvalues and vectors of it."""
    finite = a.isfinite().all(-1).all(-1)[..., None, None]
    values, vectors = torch.linalg.eigh(torch.where(finite, a, 0))
    roots = values.clamp(min=0).sqrt()
    root = (vectors * roots.unsqueeze(-2)) @ vectors.mT
    return torch.where(finite, root, torch.nan), roots, vectors


def _polar_root(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _polar.sqrt((a + a.mT) / 2), a.new_empty(0), a.new_empty(0)
