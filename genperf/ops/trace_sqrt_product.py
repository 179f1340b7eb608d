# SPDX-License-Identifier: Apache-2.0
"""The trace of the square root of a product of two covariances, the cross term of the Frechet distance."""

from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor

from .._choices import Impl, Precision
from ._autograd import Function, ValueOf, apply, differentiate, need_graph, requires_grad, saved_tensors
from ._device_rates import has_fast_double, is_capturing
from ._dispatch import Reasons, choose_impl
from ._nuclear import Side, eigen_route, polar_route
from ._validate import check_float, check_tensor
from .covariance_factor import check_covariance, working_dtype

PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@overload
def trace_sqrt_product(
    cov1: Tensor | None,
    cov2: Tensor | None,
    *,
    factor1: Tensor | None = None,
    factor2: Tensor | None = None,
    precision: Precision = "float64",
    return_error: Literal[False] = False,
    impl: Impl | None = None,
) -> Tensor: ...
@overload
def trace_sqrt_product(
    cov1: Tensor | None,
    cov2: Tensor | None,
    *,
    factor1: Tensor | None = None,
    factor2: Tensor | None = None,
    precision: Precision = "float64",
    return_error: Literal[True],
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor]: ...
def trace_sqrt_product(
    cov1: Tensor | None,  # [..., d, d]
    cov2: Tensor | None,  # [..., d, d]
    *,
    factor1: Tensor | None = None,  # [..., d, r1]
    factor2: Tensor | None = None,  # [..., d, r2]
    precision: Precision = "float64",
    return_error: bool = False,
    impl: Impl | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute tr (cov1 cov2)^(1/2), the fidelity of two covariances.

    Equivalent to:
        values, vectors = torch.linalg.eigh(cov1)
        root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
        torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()

    With cov1 = F1 F1' and cov2 = F2 F2' the trace is the nuclear norm of F1' F2 and its gradient is the polar factor, which needs no
    square root and no inverse and stays finite for singular covariances (Bhatia, Jain and Lim, "On the Bures-Wasserstein distance between
    positive definite matrices", 2019). Each side is either a covariance or, with None in its place, a factor: the result of
    `covariance_factor`, or n centered features, (x - x.mean(0)).T / (n - 1) ** 0.5. A factor saves the factorization, and with n < d no
    d x d matrix is decomposed.

    Args:
        cov1, cov2: symmetric positive semi-definite, float32, float64, bfloat16 or float16, of any scale. Leading dimensions are batch
            dimensions. For a matrix that is far from positive semi-definite, "eigen" uses the positive part and warns; "polar", which
            cannot synchronize to check, uses the diagonal.
        factor1, factor2: any number of columns.
        precision: of the polar iterations: "float64", or "mixed" (float32, on tensor cores from half-precision parts, with some
            half-precision steps). "mixed" has a relative error of about 1e-6 for network features, and 1e-4 where singular values decay to
            1e-8 of the largest; its gradient in a covariance, about 1e-6 times the root of the condition number.
        return_error: also return a bound of the absolute error of polar iterations that have not converged, computed from their residual.
            It excludes rounding, and is 0 for the other implementations.
        impl: None chooses. "eigen": symmetric eigenvalues, fastest on a CPU; synchronizes with the device. "polar": matrix products and
            triangular solves without synchronization, for GPUs. "reference": the lines above. None means "polar" on a GPU, but "eigen" for
            float64 on a GPU with slow float64 (RTX cards and others), unless a CUDA graph is being captured.

    Returns:
        trace [...], float64 if any input is float64, else float32; with return_error, (trace, error). Computed in float64 (float32 on
        devices without float64). NaN and infinity give NaN. Differentiable in all inputs. At a singular covariance, where the trace is not
        differentiable, the gradient is finite, and a subgradient in the factors. Second derivatives (create_graph=True) are those of the
        reference, which are not finite there.

    Raises:
        ValueError, TypeError: an invalid argument.
        NotImplementedError: an `impl` that cannot run here.
    """
    op = "trace_sqrt_product"
    sides = (check_side(op, 1, cov1, factor1), check_side(op, 2, cov2, factor2))
    check_sides(op, sides)
    check_precision(op, precision)
    chosen = choose_impl(op, impl, unavailable(sides[0].tensor.device, precision=precision), cov1, cov2, factor1, factor2)
    trace, error = trace_of_sides(sides, precision, return_error, chosen)
    return (trace, error) if return_error else trace


def check_side(op: str, number: int, cov: Tensor | None, factor: Tensor | None) -> Side:
    if cov is not None and factor is None:
        check_covariance(op, f"cov{number}", cov, batched=True)
        return Side(cov, False)
    if cov is not None or factor is None:
        given = "both" if factor is not None else "neither"
        raise ValueError(f"{op}: side {number} must be given either by cov{number} or by factor{number}, got {given}.")
    check_tensor(op, f"factor{number}", factor)
    check_float(op, f"factor{number}", factor)
    if factor.dim() < 2:
        raise ValueError(f"{op}: factor{number} must have shape [..., d, r], got {list(factor.shape)}.")
    return Side(factor, True)


def check_sides(op: str, sides: tuple[Side, Side]) -> None:
    first, second = (side.tensor for side in sides)
    if first.shape[:-2] != second.shape[:-2] or first.shape[-2] != second.shape[-2]:
        raise ValueError(f"{op}: both sides must have the same d and batch, got shapes {list(first.shape)} and {list(second.shape)}.")
    if first.device != second.device:
        raise ValueError(f"{op}: both sides must be on one device, got {first.device} and {second.device}.")


def check_precision(op: str, precision: Precision) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"{op}: precision must be one of {', '.join(PRECISIONS)}, got {precision!r}.")


def unavailable(device: torch.device, dtype: torch.dtype | None = None, precision: Precision = "float64") -> Reasons:
    """Why each implementation cannot run on this device, or None; best first. All of them support every dtype.

    Where float64 is slow, the many float64 products of "polar" take longer than the few of "eigen", unless "eigen" would break the capture
    of a CUDA graph.
    """
    polar = device.type == "cuda" and (precision == "mixed" or has_fast_double(device) or is_capturing(device))
    return dict.fromkeys(("polar", "eigen", "reference") if polar else ("eigen", "polar", "reference"))


def result_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is float64, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def trace_of_sides(sides: tuple[Side, Side], precision: Precision, with_error: bool, impl: Impl) -> tuple[Tensor, Tensor]:
    """The op on validated sides: (trace, error) [...], differentiable."""
    first, second = sides
    dtype = result_dtype(first.tensor, second.tensor)
    if first.tensor.dim() > 2:
        pairs = zip(first.tensor.flatten(0, -3), second.tensor.flatten(0, -3), strict=True)
        found = [trace_of_sides((Side(a, first.is_factor), Side(b, second.is_factor)), precision, with_error, impl) for a, b in pairs]
        batch = first.tensor.shape[:-2]
        if not found:
            zeros = first.tensor.new_zeros(batch, dtype=dtype)
            return zeros, zeros.clone()
        traces, errors = zip(*found, strict=True)
        return torch.stack(traces).reshape(batch), torch.stack(errors).reshape(batch)
    working = working_dtype(first.tensor.device)
    with torch.autocast(first.tensor.device.type, enabled=False):
        tensors = [side.tensor.to(working) for side in sides]
        if impl == "reference":
            trace = trace_sqrt_product_reference(tensors[0], tensors[1], first.is_factor, second.is_factor)
            error = torch.zeros_like(trace)
        else:
            needed = map(requires_grad, tensors)
            trace, error, _, _ = apply(_TraceSqrtProduct, *tensors, first.is_factor, second.is_factor, *needed, precision, with_error, impl)
    return trace.to(dtype), error.to(dtype)


def trace_sqrt_product_reference(first: Tensor, second: Tensor, first_is_factor: bool, second_is_factor: bool) -> Tensor:
    """The op in plain PyTorch, differentiated by autograd. Its derivative is infinite at a singular covariance."""
    cov1, cov2 = (t @ t.mT if is_factor else t for t, is_factor in ((first, first_is_factor), (second, second_is_factor)))
    values, vectors = torch.linalg.eigh(cov1)
    root = (vectors * values.clamp(min=0).sqrt()[..., None, :]) @ vectors.mT
    return torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum(-1)


class _TraceSqrtProduct(Function):
    """Forward computes the gradients as well, from the same decomposition; backward scales them."""

    @staticmethod
    def forward(
        first: Tensor,
        second: Tensor,
        first_is_factor: bool,
        second_is_factor: bool,
        need_first: bool,
        need_second: bool,
        precision: Precision,
        with_error: bool,
        impl: Impl,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        compute = torch.ops.genperf.trace_sqrt_product if torch.compiler.is_compiling() else _compute
        return compute(first, second, first_is_factor, second_is_factor, need_first, need_second, precision, with_error, impl)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
        first, second, *ctx.are_factors, ctx.need_first, ctx.need_second, _precision, _with_error, _impl = inputs
        _trace, error, grad_first, grad_second = outputs
        ctx.mark_non_differentiable(error, grad_first, grad_second)
        ctx.save_for_backward(first, second, grad_first, grad_second)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _error: Tensor, _grad_first: Tensor, _grad_second: Tensor) -> tuple[Tensor | None, ...]:
        first, second, grad_first, grad_second = saved_tensors(ctx)
        needed = (ctx.need_first, ctx.need_second)
        with torch.no_grad():
            found = [grad * g if need else None for g, need in zip((grad_first, grad_second), needed, strict=True)]
        if need_graph((grad,), (first, second)):

            def reference(first: Tensor, second: Tensor) -> tuple[Tensor]:
                return (trace_sqrt_product_reference(first, second, *ctx.are_factors),)

            again = differentiate(reference, (grad,), (first, second), needed)
            found = [None if g is None else ValueOf.apply(g, carrier) for g, carrier in zip(found, again, strict=True)]
        return (*found, *[None] * 7)


# An op, whose schema is read from the annotations: they know no Literal.
def _compute(
    first: Tensor,
    second: Tensor,
    first_is_factor: bool,
    second_is_factor: bool,
    need_first: bool,
    need_second: bool,
    precision: str,
    with_error: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Trace, error bound, and the gradient in each side, empty if it is not needed."""
    sides = (Side(first, first_is_factor), Side(second, second_is_factor))
    needed = (need_first, need_second)
    trace, error, gradients = polar_route(sides, needed, precision, with_error) if impl == "polar" else eigen_route(sides, needed)
    grad_first, grad_second = (first.new_empty(0) if gradient is None else gradient.contiguous() for gradient in gradients)
    return trace, error, grad_first, grad_second


torch.library.custom_op("genperf::trace_sqrt_product", _compute, mutates_args=())


@torch.library.register_fake("genperf::trace_sqrt_product")
def _(
    first: Tensor,
    second: Tensor,
    first_is_factor: bool,
    second_is_factor: bool,
    need_first: bool,
    need_second: bool,
    precision: str,
    with_error: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_first, grad_second = (t.new_empty(t.shape if need else 0) for t, need in ((first, need_first), (second, need_second)))
    return first.new_empty(()), first.new_empty(()), grad_first, grad_second
