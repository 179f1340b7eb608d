# SPDX-License-Identifier: Apache-2.0
"""The square root of a symmetric positive semi-definite matrix."""

from typing import Any

import torch
from torch import Tensor

from .._choices import Impl
from . import _polar
from ._autograd import Function, ValueOf, apply, differentiate, need_graph, saved_tensors
from ._dispatch import choose_impl
from ._products import symmetric_product
from .covariance_factor import check_covariance, factor_without_sync, working_dtype
from .trace_sqrt_product import result_dtype, unavailable


def matrix_sqrt(a: Tensor, *, impl: Impl | None = None) -> Tensor:
    """Square root of symmetric positive semi-definite matrices.

    Equivalent to:
        values, vectors = torch.linalg.eigh(a)
        root = (vectors * values.clamp(min=0).sqrt().unsqueeze(-2)) @ vectors.mT

    The derivative X of the root in a direction G solves root X + X root = G. Unlike the derivative of eigh, it does not divide by
    differences of eigenvalues, which may coincide (Lin and Maji, "Improved Bilinear Pooling with CNNs", 2017).

    Args:
        a: [..., d, d], float32, float64, bfloat16 or float16, assumed symmetric. Negative eigenvalues, which come from rounding, count as
            zero.
        impl: None chooses. "eigen": symmetric eigenvalues, fastest on a CPU and on a GPU with slow float64. "polar": matrix products and
            Cholesky factorizations, without device synchronization, for other GPUs; it underestimates roots below 1e-7 of the largest.
            "reference": the lines above.

    Returns:
        root [..., d, d], float64 if `a` is float64, else float32; computed in float64 (float32 on devices without float64). NaN and
        infinity make their matrix NaN. Differentiable, with a finite gradient at a singular `a`: on the null space, where the derivative is
        infinite, the gradient is 0 ("eigen") or large ("polar"). Second derivatives (create_graph=True) are those of the reference, which
        are not finite where eigenvalues coincide.

    Raises:
        ValueError, TypeError: an invalid argument.
        NotImplementedError: an `impl` that cannot run here.
    """
    op = "matrix_sqrt"
    check_covariance(op, "a", a, batched=True)
    chosen = choose_impl(op, impl, unavailable(a.device), a)
    with torch.autocast(a.device.type, enabled=False):
        working = a.to(working_dtype(a.device))
        root = matrix_sqrt_reference(working) if chosen == "reference" else apply(_MatrixSqrt, working, chosen)[0]
    return root.to(result_dtype(a))


def matrix_sqrt_reference(a: Tensor) -> Tensor:
    """The op in plain PyTorch, differentiated by autograd."""
    values, vectors = torch.linalg.eigh(a)
    return (vectors * values.clamp(min=0).sqrt().unsqueeze(-2)) @ vectors.mT


class _MatrixSqrt(Function):
    @staticmethod
    def forward(a: Tensor, impl: Impl) -> tuple[Tensor, Tensor, Tensor]:
        return (torch.ops.genperf.matrix_sqrt if torch.compiler.is_compiling() else _forward)(a, impl)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor, Tensor]) -> None:
        a, ctx.impl = inputs
        root, roots, vectors = outputs
        ctx.mark_non_differentiable(roots, vectors)
        ctx.save_for_backward(a, root, roots, vectors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _roots: Tensor, _vectors: Tensor) -> tuple[Tensor, None]:
        a, root, roots, vectors = saved_tensors(ctx)
        backward = torch.ops.genperf.matrix_sqrt_backward if torch.compiler.is_compiling() else _backward
        with torch.no_grad():
            found = backward(grad, root, roots, vectors, ctx.impl)
        if need_graph((grad,), (a,)):
            (again,) = differentiate(lambda a: (matrix_sqrt_reference(a),), (grad,), (a,), (True,))
            found = ValueOf.apply(found, again)
        return found, None


# These are ops, whose schemas are read from the annotations: they know no Literal.
def _forward(a: Tensor, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    """The root, and its eigenvalues and eigenvectors, which backward needs, if impl is "eigen" (empty otherwise)."""
    if impl == "eigen":
        finite = a.isfinite().all(-1).all(-1)[..., None, None]
        values, vectors = torch.linalg.eigh(torch.where(finite, a, 0))
        roots = values.clamp(min=0).sqrt()
        root = (vectors * roots.unsqueeze(-2)) @ vectors.mT
        return torch.where(finite, root, torch.nan), roots, vectors.contiguous()
    if a.numel() == 0:
        return a.clone(), a.new_empty(0), a.new_empty(0)
    # With a = F F' and the polar decomposition F = H U, the root is H.
    largest = a.abs().amax((-2, -1), keepdim=True)
    largest = torch.where(largest == 0, 1, largest)
    factor = factor_without_sync((a / largest + a.mT / largest) / 2).factor
    root = symmetric_product(factor, _polar.polar(factor, precision="float64", accurate=True))
    return (root + root.mT) * (largest.sqrt() / 2), a.new_empty(0), a.new_empty(0)


def _backward(grad: Tensor, root: Tensor, roots: Tensor, vectors: Tensor, impl: str) -> Tensor:
    """The gradient in a."""
    grad = (grad + grad.mT) / 2
    if impl == "polar":
        return _polar.lyapunov(root, grad)
    if roots.numel():
        # The root of an eigenvalue that is only rounding error must not be divided by.
        roots = torch.where(roots > (roots.shape[-1] * torch.finfo(roots.dtype).eps) ** 0.5 * roots[..., -1:], roots, 0)
    sums = roots.unsqueeze(-1) + roots.unsqueeze(-2)
    return vectors @ torch.where(sums > 0, (vectors.mT @ grad @ vectors) / sums, 0) @ vectors.mT


torch.library.custom_op("genperf::matrix_sqrt", _forward, mutates_args=())
torch.library.custom_op("genperf::matrix_sqrt_backward", _backward, mutates_args=())


@torch.library.register_fake("genperf::matrix_sqrt")
def _(a: Tensor, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    eigen = impl == "eigen"
    return a.new_empty(a.shape), a.new_empty(a.shape[:-1] if eigen else 0), a.new_empty(a.shape if eigen else 0)


@torch.library.register_fake("genperf::matrix_sqrt_backward")
def _(grad: Tensor, root: Tensor, roots: Tensor, vectors: Tensor, impl: str) -> Tensor:
    return root.new_empty(root.shape)
