# SPDX-License-Identifier: Apache-2.0
"""Counts and sums of the vectors assigned to each code."""

import math

import torch
from torch import Tensor

from .._choices import Impl
from ._autograd import call
from ._dispatch import Reasons, choose_impl, native_unavailable, register_fake, remembered
from ._layout import as_one_codebook, as_positions
from ._precision import accumulator_dtype
from ._validate import can_branch_on, check_channel_dim, check_float, check_index_range, check_positions, check_tensor


def code_statistics(
    x: Tensor,  # [..., D, ...]
    indices: Tensor,  # [...]
    num_codes: int,
    *,
    channel_dim: int = -1,
    weights: Tensor | None = None,  # [...]
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor]:  # [K], [K, D]
    """Number and sum of the vectors assigned to each code, from which EMA codebooks and k-means are updated.

    Equivalent to:
        one_hot = F.one_hot(indices, num_codes).to(x.dtype)                 # without the [N, K] matrix
        counts, sums = one_hot.sum(0), one_hot.T @ x

    Sums are accumulated in float64 in the order of the positions, so they are the same for every run, layout and number of
    threads.

    Args:
        x: float32, bfloat16, float16 or float64; any strides.
        indices: int64, x's shape without channel_dim, as returned by `nearest_code`; -1 excludes a vector.
        num_codes: K.
        weights: of x's shape without channel_dim, a floating dtype; each vector and its count are multiplied by it.
        channel_dim: the dimension of x that holds a vector.
        impl: "native", "reference", or None to choose automatically.

    Returns:
        counts [K] and sums [K, D], float32 (float64 for a float64 x). NaN in x or weights affects only the codes
        that it is assigned to. Not differentiable.

    Raises:
        ValueError, TypeError: an invalid argument.
        NotImplementedError: an `impl` that cannot run here.
        IndexError: an index outside -1 ... num_codes - 1 (on CUDA such a vector is excluded, since a check would synchronize).
    """
    op = "code_statistics"
    check_tensor(op, "x", x)
    channel = check_channel_dim(op, x, channel_dim)
    check_float(op, "x", x)
    if num_codes < 1:
        raise ValueError(f"{op}: num_codes must be at least 1, got {num_codes}.")
    check_indices(op, indices, x, channel, num_codes)
    if weights is not None:
        check_tensor(op, "weights", weights)
        check_float(op, "weights", weights)
        check_positions(op, "weights", weights, x, channel)
    chosen = choose_impl(op, impl, unavailable(x.device, x.dtype))
    positions = as_positions(x.detach(), channel)
    shape = (positions.shape[0], positions.shape[2])
    indices = indices.reshape(shape).contiguous()
    if weights is not None:
        weights = weights.detach().reshape(shape).to(accumulator_dtype(x.dtype))
    return statistics(positions, indices, num_codes, weights, None, chosen)


def statistics(
    x: Tensor,  # [outer, D, inner]
    indices: Tensor,  # [outer, inner]
    num_codes: int,
    weights: Tensor | None,  # [outer, inner]
    origins: Tensor | None,  # [K, D]
    impl: Impl,
) -> tuple[Tensor, Tensor]:
    """`code_statistics` of checked arguments; with `origins`, the sums are of x - origins[indices]."""
    if impl == "reference":
        return code_statistics_reference(x.transpose(1, 2), indices, num_codes, weights, origins)
    return call(torch.ops.genperf.code_statistics, x, indices, num_codes, weights, origins)


def codebook_statistics(
    x: Tensor,  # [codebooks, outer, D, inner]
    indices: Tensor,  # [codebooks, outer, inner]
    num_codes: int,
) -> tuple[Tensor, Tensor, Tensor]:  # [codebooks, K], [codebooks, K, D], [codebooks, outer, inner]
    """`code_statistics` of checked arguments for several codebooks, without vectors that are not finite.

    Also returns the indices, with -1 for those vectors.
    """
    impl = choose_impl("code_statistics", None, unavailable(x.device, x.dtype))
    x, codebooks = x.detach(), x.shape[0]  # so that no gradient is recorded below

    def compute(indices: Tensor) -> tuple[Tensor, Tensor]:
        counts, sums = statistics(*as_one_codebook(x, indices, num_codes), codebooks * num_codes, None, None, impl)
        if codebooks == 1:
            return counts.unsqueeze(0), sums.unsqueeze(0)
        return counts.reshape(codebooks, num_codes), sums.reshape(codebooks, num_codes, sums.shape[1])

    if can_branch_on(x):  # where the sums tell, which costs less than a look at every vector
        counts, sums = compute(indices)
        if math.isfinite(sums.sum().item()):  # faster than a look at each; a sum that overflows only takes the longer way
            return counts, sums, indices
    indices = torch.where(is_finite(x, 2), indices, -1)
    return (*compute(indices), indices)


def is_finite(x: Tensor, dim: int) -> Tensor:
    """Whether all elements along a dimension are finite, in one pass over x."""
    return torch.linalg.vector_norm(x, math.inf, dim).isfinite()


def check_indices(op: str, indices: Tensor, x: Tensor, channel: int, num_codes: int | None) -> None:
    """`indices` must hold a code, or -1, for each position of x; on CUDA, and without num_codes, the values are not checked."""
    check_tensor(op, "indices", indices)
    if indices.dtype != torch.int64:
        raise TypeError(f"{op}: indices must be int64, got {indices.dtype}.")
    check_positions(op, "indices", indices, x, channel)
    if num_codes is not None:
        check_index_range(op, indices, num_codes)


@remembered
def unavailable(device: torch.device, dtype: torch.dtype) -> Reasons:
    """Why each implementation cannot run on this device and dtype, or None; best first."""
    return {"native": native_unavailable("code_statistics", device, dtype), "reference": None}


def code_statistics_reference(
    x: Tensor, indices: Tensor, num_codes: int, weights: Tensor | None = None, origins: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The statistics in plain PyTorch: x [..., D], indices [...] -> counts [K], sums [K, D]."""
    dtype = accumulator_dtype(x.dtype)
    assigned = indices.flatten()
    valid = assigned >= 0
    assigned = assigned.clamp(min=0)
    rows = x.reshape(assigned.shape[0], x.shape[-1]).double()
    if origins is not None:
        rows = rows - origins.double()[assigned]
    mass = valid.double()
    if weights is not None:
        mass = torch.where(valid, weights.flatten().double(), 0)
    rows = torch.where(valid[:, None], rows * mass[:, None], 0)
    counts = mass.new_zeros(num_codes).index_add(0, assigned, mass)
    sums = rows.new_zeros(num_codes, x.shape[-1]).index_add(0, assigned, rows)
    return counts.to(dtype), sums.to(dtype)


@register_fake("code_statistics")
def _(x: Tensor, indices: Tensor, num_codes: int, weights: Tensor | None, origins: Tensor | None) -> tuple[Tensor, Tensor]:
    dtype = accumulator_dtype(x.dtype)
    return x.new_empty(num_codes, dtype=dtype), x.new_empty(num_codes, x.shape[1], dtype=dtype)
