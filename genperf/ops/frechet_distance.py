# SPDX-License-Identifier: Apache-2.0
"""The Frechet distance of two Gaussians."""

from typing import Literal, overload

from torch import Tensor

from .._choices import Impl, Precision
from ._dispatch import choose_impl
from ._validate import check_float, check_tensor
from .covariance_factor import working_dtype
from .trace_sqrt_product import Side, check_precision, check_side, check_sides, result_dtype, trace_of_sides, unavailable


@overload
def frechet_distance(
    mean1: Tensor,
    cov1: Tensor | None,
    mean2: Tensor,
    cov2: Tensor | None,
    *,
    factor1: Tensor | None = None,
    factor2: Tensor | None = None,
    precision: Precision = "float64",
    return_error: Literal[False] = False,
    impl: Impl | None = None,
) -> Tensor: ...
@overload
def frechet_distance(
    mean1: Tensor,
    cov1: Tensor | None,
    mean2: Tensor,
    cov2: Tensor | None,
    *,
    factor1: Tensor | None = None,
    factor2: Tensor | None = None,
    precision: Precision = "float64",
    return_error: Literal[True],
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor]: ...
def frechet_distance(
    mean1: Tensor,  # [..., d]
    cov1: Tensor | None,  # [..., d, d]
    mean2: Tensor,  # [..., d]
    cov2: Tensor | None,  # [..., d, d]
    *,
    factor1: Tensor | None = None,  # [..., d, r1]
    factor2: Tensor | None = None,  # [..., d, r2]
    precision: Precision = "float64",
    return_error: bool = False,
    impl: Impl | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians: FID, if they are fitted to Inception features.

    Equivalent to:
        root = scipy.linalg.sqrtm(cov1 @ cov2).real
        distance = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * root.trace()

    Dowson and Landau, "The Frechet distance between multivariate normal distributions" (1982); Heusel et al., "GANs Trained by a
    Two Time-Scale Update Rule Converge to a Local Nash Equilibrium" (2017). The matrix square root is never computed: see
    `trace_sqrt_product`, which also describes covariances given as factors, such as centered features.

    Args:
        mean1, mean2: float32, float64, bfloat16 or float16. Leading dimensions are batch dimensions.
        cov1, cov2, factor1, factor2, precision, return_error, impl: as in `trace_sqrt_product`.

    Returns:
        distance [...], at least 0, float64 if any input is float64, else float32; with return_error, (distance, error), where error is
        twice that of the trace. NaN and infinity give NaN. Differentiable in all inputs, with a finite gradient at singular covariances
        and at distance 0; second derivatives as in `trace_sqrt_product`.

    Raises:
        ValueError, TypeError: an invalid argument.
        NotImplementedError: an `impl` that cannot run here.
    """
    op = "frechet_distance"
    sides = (check_side(op, 1, cov1, factor1), check_side(op, 2, cov2, factor2))
    check_sides(op, sides)
    _check_mean(op, 1, mean1, sides[0])
    _check_mean(op, 2, mean2, sides[1])
    check_precision(op, precision)
    chosen = choose_impl(op, impl, unavailable(mean1.device, precision=precision), mean1, mean2, cov1, cov2, factor1, factor2)
    dtype = result_dtype(mean1, mean2, *(side.tensor for side in sides))
    working = working_dtype(mean1.device)
    # All terms in the working dtype: they nearly cancel if the distance is small.
    first, second = (Side(side.tensor.to(working), side.is_factor) for side in sides)
    trace, error = trace_of_sides((first, second), precision, return_error, chosen)
    between_means = (mean1.to(working) - mean2.to(working)).square().sum(-1)
    distance = (between_means + _trace(first) + _trace(second) - 2 * trace).clamp(min=0)
    return (distance.to(dtype), (2 * error).to(dtype)) if return_error else distance.to(dtype)


def _check_mean(op: str, number: int, mean: Tensor, side: Side) -> None:
    check_tensor(op, f"mean{number}", mean)
    check_float(op, f"mean{number}", mean)
    if mean.shape != side.tensor.shape[:-1]:
        raise ValueError(f"{op}: mean{number} must have shape {list(side.tensor.shape[:-1])}, got {list(mean.shape)}.")
    if mean.device != side.tensor.device:
        raise ValueError(f"{op}: mean{number} must be on the device of side {number}, {side.tensor.device}, got {mean.device}.")


def _trace(side: Side) -> Tensor:
    """The trace [...] of the covariance."""
    if side.is_factor:
        return side.tensor.square().sum((-2, -1))
    return side.tensor.diagonal(dim1=-2, dim2=-1).sum(-1)
