# SPDX-License-Identifier: Apache-2.0
"""Nearest-neighbor search in a codebook, exact in float64."""

import math
from typing import get_args

import torch
from torch import Tensor

from .. import _library
from .._choices import Impl, Metric
from ._autograd import call
from ._dispatch import Reasons, choose_impl, exporting_to_onnx, implement_on_cuda, native_unavailable, register_fake, remembered
from ._layout import Positions, positions_shape
from ._validate import check_channel_dim, check_codes, check_tensor, check_vectors

METRICS: tuple[Metric, ...] = get_args(Metric)

# Elements of the float64 distance matrix that the reference holds at a time.
_REFERENCE_CHUNK = 1 << 22


def nearest_code(
    x: Tensor,  # [..., D, ...]
    codebook: Tensor,  # [K, D], or [heads, K, D]
    *,
    metric: Metric = "euclidean",
    channel_dim: int = -1,
    impl: Impl | None = None,
) -> Tensor:
    """Index of the nearest code for every vector of x, exact in float64 whatever the dtype of the inputs.

    Equivalent to:
        x = x.movedim(channel_dim, -1).double()
        distance = (x.unsqueeze(-2) - codebook.double()).square().sum(-1)          # euclidean
        distance = -(x @ F.normalize(codebook.double(), dim=-1).T)                 # cosine
        return distance.argmin(-1)

    without storing the [..., K] distances: a low-precision pass with a proven error bound finds the few codes that can be
    nearest, and float64 decides between them. The result therefore does not depend on device, instruction set, layout or batch
    split, and data far from the origin costs no accuracy.

    With a codebook [heads, K, D], dimension 0 of x and of the result is the heads, each with its own codebook, all searched in
    one call. Equivalent to (channel_dim=-1):
        torch.stack([nearest_code(x[i], codebook[i], metric=metric) for i in range(heads)])

    A multi-head layer can view its tensor this way without a copy: x [B, heads * D, H, W] as
    `x.unflatten(1, (heads, D)).movedim(1, 0)` with channel_dim=2, x [B, T, heads * D] as
    `x.unflatten(-1, (heads, D)).movedim(-2, 0)`.

    Args:
        x: float32, bfloat16, float16 or float64; any strides, read in place.
        codebook: K >= 1 codes, or K >= 1 for each of at least one head; of x's dtype, or float32 with a half-precision x.
        metric: "euclidean", or "cosine" (a code of zeros has similarity 0 to everything).
        channel_dim: the dimension of x that holds a vector; 1 for images [B, D, H, W]. Heads count as a dimension of x.
        impl: "native" (CPU), "triton" (CUDA), "reference", or None to choose automatically.

    Returns:
        int64 indices of x's shape without channel_dim. The lowest index wins a tie. A NaN distance counts as infinite: a
        vector with a NaN gets index 0, and a code with a NaN is never nearer than another. Not differentiable.

    Raises:
        ValueError, TypeError: an invalid argument.
        NotImplementedError: an `impl` that cannot run here.
    """
    op = "nearest_code"
    channel = _check_search(op, x, codebook, channel_dim)
    check_metric(op, metric)
    chosen = choose_impl(op, impl, unavailable(x.device, x.dtype))
    x, codebook = x.detach(), codebook.detach()
    if codebook.dim() == 2:
        positions = Positions(x, channel)
        return positions.restore_indices(search(positions.vectors, codebook, None, metric, chosen))
    return search(_as_head_positions(x, channel), codebook, None, metric, chosen).reshape(positions_shape(x, channel))


def search(x: Tensor, codebook: Tensor, mask: Tensor | None, metric: Metric, impl: Impl) -> Tensor:
    """Indices [outer, inner] for x [outer, D, inner], -1 where the mask is False; arguments already checked.

    With a codebook [heads, K, D], x, mask and indices have a first dimension of heads too.
    """
    if impl == "reference":
        indices = nearest_code_reference(x.transpose(-2, -1), codebook, metric)
        return indices if mask is None else indices.masked_fill(~mask, -1)
    return call(torch.ops.genperf.nearest_code, x, codebook, mask, metric == "cosine")


def _check_search(op: str, x: Tensor, codebook: Tensor, channel_dim: int) -> int:
    """Check x against a codebook of one or several heads. Returns the channel dimension as a non-negative number."""
    check_tensor(op, "x", x)
    check_tensor(op, "codebook", codebook)
    if codebook.dim() == 2:
        return check_vectors(op, x, codebook, channel_dim)
    if codebook.dim() != 3:
        raise ValueError(f"{op}: codebook must have shape [K, D] or [heads, K, D], got {list(codebook.shape)}.")
    if codebook.shape[0] == 0:
        raise ValueError(f"{op}: codebook must hold at least one head, got shape {list(codebook.shape)}.")
    channel = check_channel_dim(op, x, channel_dim)
    if channel == 0:
        raise ValueError(
            f"{op}: with a codebook [heads, K, D], dimension 0 of x is the heads and cannot be the channels, "
            f"got channel_dim={channel_dim} for x of shape {list(x.shape)}."
        )
    if x.shape[0] != codebook.shape[0]:
        raise ValueError(
            f"{op}: x must have as many heads (dimension 0) as the codebook, got x {list(x.shape)} and codebook {list(codebook.shape)}."
        )
    return check_codes(op, x, codebook, channel_dim)


def _as_head_positions(x: Tensor, channel: int) -> Tensor:
    """View x [heads, ..., D, ...] as [heads, outer, D, inner]; a copy only where no such view exists."""
    head = Positions(x.select(0, 0), channel - 1)
    return x.movedim(channel, head.split + 1).reshape(x.shape[0], *head.vectors.shape)


def check_metric(op: str, metric: Metric) -> None:
    if metric not in METRICS:
        raise ValueError(f"{op}: metric must be one of {', '.join(METRICS)}, got {metric!r}.")


@remembered
def unavailable(device: torch.device, dtype: torch.dtype) -> Reasons:
    """Why each implementation cannot run on this device and dtype, or None; best first."""
    native = native_unavailable("nearest_code", device, dtype) if device.type != "cuda" else "on CUDA the search is a Triton kernel."
    return {"native": native, "triton": _triton_unavailable(device, dtype), "reference": None}


def _triton_unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"the Triton kernel runs on CUDA, not on {device.type!r}."
    if dtype == torch.float64:
        return "the Triton kernel takes float32, bfloat16 and float16."
    return _library.triton_failure or _library.triton_device_failures.get(device.index)


def nearest_code_reference(x: Tensor, codebook: Tensor, metric: Metric = "euclidean") -> Tensor:
    """The search in plain PyTorch: x [..., D], codebook [K, D] -> [...], or x [heads, ..., D], codebook [heads, K, D].

    Components are added in order, so that the sums, and the result of every near-tie, equal those of the kernels.
    """
    if codebook.dim() == 3:
        return torch.stack([nearest_code_reference(head, codes, metric) for head, codes in zip(x, codebook, strict=True)])
    codes = codebook.double()
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).double()
    if exporting_to_onnx():
        return _nearest_by_matmul(rows, codes, metric).reshape(x.shape[:-1])
    chunk = max(1, _REFERENCE_CHUNK // codes.shape[0])
    found = [_nearest_in_order(part, codes, metric) for part in rows.split(chunk)]
    return torch.cat(found).reshape(x.shape[:-1])


def _nearest_in_order(rows: Tensor, codes: Tensor, metric: Metric) -> Tensor:
    return distances_in_order(rows, codes, metric).argmin(-1)


def distances_in_order(rows: Tensor, codes: Tensor, metric: Metric) -> Tensor:
    """What the search compares, [n, K] for float64 rows [n, D] and codes [K, D]; infinite in place of NaN.

    "euclidean": squared distances. "cosine": minus the signed square of the similarity times the squared length of the row.
    """

    def term(d: int) -> Tensor:  # [n, K]
        if metric == "euclidean":
            return (rows[:, d, None] - codes[:, d]).square()
        return -rows[:, d, None] * codes[:, d]

    distance, norm = term(0), codes[:, 0].square()
    for d in range(1, codes.shape[1]):
        distance += term(d)
        norm += codes[:, d].square()
    if metric == "cosine":
        # The signed square has the order of the similarity and, unlike a square root, is the same on every device.
        distance *= distance.abs() / torch.where(norm > 0, norm, 1.0)
    return distance.nan_to_num_(nan=float("inf"), posinf=float("inf"), neginf=float("-inf"))


def _nearest_by_matmul(rows: Tensor, codes: Tensor, metric: Metric) -> Tensor:
    return distances_by_matmul(rows, codes, metric).argmin(-1)


def distances_by_matmul(rows: Tensor, codes: Tensor, metric: Metric) -> Tensor:
    """`distances_in_order` as a graph of a few nodes for any number of rows, for "euclidean" up to a constant of each row.

    Near-ties closer than float64 resolves may differ.
    """
    if metric == "euclidean":
        # The difference of two floats is usually exact in float64, and small where the data is far from the origin.
        shift = torch.where(codes[:1].isfinite(), codes[:1], 0)
        rows, codes = rows - shift, codes - shift
        distance = codes.square().sum(-1) - 2 * (rows @ codes.T)  # plus the squared norm of the row
        return distance.nan_to_num(nan=float("inf"), posinf=float("inf"), neginf=float("inf"))
    similarity = rows @ codes.T
    norm = codes.square().sum(-1)
    similarity = similarity * similarity.abs() / torch.where(norm > 0, norm, 1.0)
    return (-similarity).nan_to_num(nan=float("inf"), posinf=float("inf"), neginf=float("-inf"))


@implement_on_cuda("nearest_code", "(Tensor x, Tensor codebook, Tensor? mask, bool cosine) -> Tensor")
def _launch_search(x: Tensor, codebook: Tensor, mask: Tensor | None, cosine: bool) -> Tensor:
    # A checkout has these files in kernels/.
    from genperf.kernels.nearest_code import nearest_code as launch  # pyright: ignore[reportMissingImports]

    with torch.cuda.device_of(x):
        return launch(x, codebook, mask, cosine)


@register_fake("nearest_code")
def _(x: Tensor, codebook: Tensor, mask: Tensor | None, cosine: bool) -> Tensor:
    return x.new_empty(*x.shape[:-2], x.shape[-1], dtype=torch.int64)
