# SPDX-License-Identifier: Apache-2.0
"""The k nearest codes of each vector, exact in float64."""

import math
from typing import Literal, overload

import torch
from torch import Tensor

from .._choices import Impl, Metric
from ._autograd import call
from ._dispatch import Reasons, choose_impl, exporting_to_onnx, implement_on_cuda, native_unavailable, register_fake, remembered
from ._layout import as_positions, positions_shape
from ._precision import accumulator_dtype
from .nearest_code import (
    _as_head_positions,
    _check_search,
    _triton_unavailable,
    check_metric,
    distances_by_matmul,
    distances_in_order,
)

MAX_K = 64

# Elements of the float64 distance matrix that the reference holds at a time.
_REFERENCE_CHUNK = 1 << 22


@overload
def nearest_codes(
    x: Tensor,
    codebook: Tensor,
    k: int,
    *,
    metric: Metric = "euclidean",
    channel_dim: int = -1,
    return_distances: Literal[False] = False,
    impl: Impl | None = None,
) -> Tensor: ...
@overload
def nearest_codes(
    x: Tensor,
    codebook: Tensor,
    k: int,
    *,
    metric: Metric = "euclidean",
    channel_dim: int = -1,
    return_distances: Literal[True],
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor]: ...
def nearest_codes(
    x: Tensor,  # [..., D, ...]
    codebook: Tensor,  # [K, D], or [heads, K, D]
    k: int,
    *,
    metric: Metric = "euclidean",
    channel_dim: int = -1,
    return_distances: bool = False,
    impl: Impl | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Indices of the k nearest codes for every vector of x, nearest first, exact in float64 whatever the dtype of the inputs.

    Equivalent to:
        x = x.movedim(channel_dim, -1).double()
        distance = (x.unsqueeze(-2) - codebook.double()).square().sum(-1)                            # euclidean
        distance = 1 - F.normalize(x, dim=-1) @ F.normalize(codebook.double(), dim=-1).T             # cosine
        distance, indices = distance.sort(-1, stable=True)
        return indices[..., :k]                                                                      # distance[..., :k].float()

    without storing the [..., K] distances, by the search of `nearest_code`: of two codes at the same distance, the one with the lower
    index comes first, and the result does not depend on device, instruction set, layout or batch split. Column 0 is the result of
    `nearest_code`.

    Args:
        x, codebook, metric, channel_dim, impl: as in `nearest_code`. With a codebook [heads, K, D], dimension 0 of x and of the results
            is the heads.
        k: how many codes, from 1 to the smaller of K and 64.
        return_distances: also return the distances.

    Returns:
        int64 indices of x's shape without channel_dim, with k as the last dimension. With `return_distances`, a tuple of these and the
        distances of the same shape, computed in float64 and rounded to float32 (not rounded for a float64 x): the squares for "euclidean",
        1 minus the similarity for "cosine", which is 0 for a vector of zeros. A NaN distance counts as infinite and is returned as
        infinity, so a vector with a NaN gets the indices 0 to k - 1.

        Not differentiable. The distances as a function of x and the codebook (channel_dim=-1):
            (x.unsqueeze(-2) - codebook[indices]).square().sum(-1)

    Raises:
        ValueError, TypeError: an invalid argument, such as k > K.
        NotImplementedError: an `impl` that cannot run here.
    """
    op = "nearest_codes"
    channel = _check_search(op, x, codebook, channel_dim)
    check_metric(op, metric)
    num_codes = codebook.shape[-2]
    if not 1 <= k <= MAX_K:
        raise ValueError(f"{op}: k must lie between 1 and {MAX_K}, got {k}.")
    if k > num_codes:
        raise ValueError(f"{op}: k must be at most the number of codes, got k={k} and a codebook {list(codebook.shape)}.")
    chosen = choose_impl(op, impl, unavailable(x.device, x.dtype))
    x, codebook = x.detach(), codebook.detach()
    vectors = as_positions(x, channel) if codebook.dim() == 2 else _as_head_positions(x, channel)
    if chosen == "reference":
        indices, distances = nearest_codes_reference(vectors.transpose(-2, -1), codebook, k, metric)
    else:
        indices, distances = call(torch.ops.genperf.nearest_codes, vectors, codebook, k, metric == "cosine", return_distances)
    shape = [*positions_shape(x, channel), k]
    return (indices.reshape(shape), distances.reshape(shape)) if return_distances else indices.reshape(shape)


@remembered
def unavailable(device: torch.device, dtype: torch.dtype) -> Reasons:
    """Why each implementation cannot run on this device and dtype, or None; best first."""
    native = native_unavailable("nearest_codes", device, dtype) if device.type != "cuda" else "on CUDA the search is a Triton kernel."
    return {"native": native, "triton": _triton_unavailable(device, dtype), "reference": None}


def nearest_codes_reference(x: Tensor, codebook: Tensor, k: int, metric: Metric = "euclidean") -> tuple[Tensor, Tensor]:
    """Indices and distances [..., k] in plain PyTorch: x [..., D], codebook [K, D], or x [heads, ..., D], codebook [heads, K, D].

    Components are added in order, as in `nearest_code_reference`.
    """
    if codebook.dim() == 3:
        found = [nearest_codes_reference(head, codes, k, metric) for head, codes in zip(x, codebook, strict=True)]
        indices, distances = zip(*found, strict=True)
        return torch.stack(indices), torch.stack(distances)
    codes = codebook.double()
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).double()
    if exporting_to_onnx():
        distances, indices = distances_by_matmul(rows, codes, metric).topk(k, largest=False)
        if metric == "euclidean":
            distances = (rows.unsqueeze(1) - codes[indices]).square().sum(-1)
    else:
        chunk = max(1, _REFERENCE_CHUNK // codes.shape[0])
        found = [distances_in_order(part, codes, metric).sort(dim=-1, stable=True) for part in rows.split(chunk)]
        distances = torch.cat([part.values[:, :k] for part in found])
        indices = torch.cat([part.indices[:, :k] for part in found])
    if metric == "cosine":
        distances = _cosine_distance(distances, rows)
    shape = (*x.shape[:-1], k)
    return indices.reshape(shape), distances.to(accumulator_dtype(x.dtype)).reshape(shape)


def _cosine_distance(order: Tensor, rows: Tensor) -> Tensor:
    """From minus the signed square of the similarity times the squared length of the row, [n, k], and the rows [n, D]."""
    square = rows[:, :1].square()
    for d in range(1, rows.shape[1]):
        square = square + rows[:, d : d + 1].square()
    similarity = torch.where(square > 0, (order.abs() / square).sqrt(), 0.0)
    distance = torch.where(order == torch.inf, order, torch.where(order < 0, 1 - similarity, 1 + similarity))
    return distance.nan_to_num(nan=torch.inf, posinf=torch.inf)


@implement_on_cuda(
    "nearest_codes", "(Tensor x, Tensor codebook, SymInt k, bool cosine, bool with_distances) -> (Tensor indices, Tensor distances)"
)
def _launch_search(x: Tensor, codebook: Tensor, k: int, cosine: bool, with_distances: bool) -> tuple[Tensor, Tensor]:
    # A checkout has these files in kernels/.
    from genperf.kernels.nearest_code.top_k import nearest_codes as launch  # pyright: ignore[reportMissingImports]

    with torch.cuda.device_of(x):
        return launch(x, codebook, k, cosine, with_distances)


@register_fake("nearest_codes")
def _(x: Tensor, codebook: Tensor, k: int, cosine: bool, with_distances: bool) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-2], x.shape[-1], k)
    indices = x.new_empty(shape, dtype=torch.int64)
    return indices, x.new_empty(shape if with_distances else (0,), dtype=accumulator_dtype(x.dtype))
