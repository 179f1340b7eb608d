"""Nearest-neighbour search in a codebook, exact in float64."""

import torch
from torch import Tensor

from ._common import (
    as_positions,
    check_vectors,
    choose_impl,
    implement_on_cuda,
    native_refusal,
    positions_shape,
    register_fake,
)

METRICS = ("euclidean", "cosine")

# Elements of the float64 distance matrix that the reference holds at a time.
_REFERENCE_CHUNK = 1 << 22


def nearest_code(
    x: Tensor,  # [..., D, ...]
    codebook: Tensor,  # [K, D]
    *,
    metric: str = "euclidean",
    channel_dim: int = -1,
    impl: str | None = None,
) -> Tensor:
    """Index of the nearest code for every vector of x, exact in float64 whatever the dtype of the inputs.

    Equivalent to:
        x = x.movedim(channel_dim, -1).double()
        distance = (x.unsqueeze(-2) - codebook.double()).square().sum(-1)          # euclidean
        distance = -(x @ F.normalize(codebook.double(), dim=-1).T)                 # cosine
        return distance.argmin(-1)

    without the [..., K] distances: a pass in low precision finds, under a proven error bound, the few codes that can
    be nearest, and float64 decides between them. So the result does not depend on device, instruction set, layout or
    the split into batches, and data far from the origin costs no accuracy.

    Args:
        x: float32, bfloat16, float16 or float64; any strides, read where it lies.
        codebook: K >= 1 codes, of x's dtype, or float32 with a half-precision x.
        metric: "euclidean", or "cosine" (a code of zeros has similarity 0 to everything).
        channel_dim: the dimension of x that holds a vector; 1 for images [B, D, H, W].
        impl: None picks; "native" (CPU), "triton" (CUDA) and "reference" insist.

    Returns:
        int64 indices of x's shape without channel_dim. The lowest index wins a tie. A distance that is NaN counts as
        infinite: a vector with a NaN gets index 0, a code with a NaN is never preferred. Not differentiable.

    Raises:
        ValueError: shapes that do not fit, an empty codebook, tensors on two devices, an unknown metric or impl.
        TypeError: an unsupported dtype.
        NotImplementedError: an `impl` that cannot run here.
    """
    channel = check_vectors("nearest_code", x, codebook, channel_dim)
    check_metric("nearest_code", metric)
    chosen = choose_impl("nearest_code", impl, refusals(x.device, x.dtype))
    x, codebook = x.detach(), codebook.detach()
    return search(as_positions(x, channel), codebook, None, metric, chosen).reshape(positions_shape(x, channel))


def search(x: Tensor, codebook: Tensor, mask: Tensor | None, metric: str, impl: str) -> Tensor:
    """Indices [outer, inner] for x [outer, D, inner], -1 where the mask is False; arguments already checked."""
    if impl == "reference":
        indices = nearest_code_reference(x.transpose(1, 2), codebook, metric)
        return indices if mask is None else indices.masked_fill(~mask, -1)
    return torch.ops.genperf.nearest_code(x, codebook, mask, metric == "cosine")


def check_metric(op: str, metric: str) -> None:
    if metric not in METRICS:
        raise ValueError(f"{op}: metric must be one of {', '.join(METRICS)}, got {metric!r}.")


def refusals(device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
    """Implementations of the search, best first, and why each cannot run on this device and dtype."""
    native = native_refusal("nearest_code", device, dtype) if device.type != "cuda" else "on CUDA the search is a Triton kernel."
    return {"native": native, "triton": _triton_refusal(device, dtype), "reference": None}


def _triton_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    from genperf import _library

    if device.type != "cuda":
        return f"the Triton kernel runs on CUDA, not on {device.type!r}."
    if dtype == torch.float64:
        return "the Triton kernel takes float32, bfloat16 and float16."
    return _library.triton_failure


def nearest_code_reference(x: Tensor, codebook: Tensor, metric: str = "euclidean") -> Tensor:
    """The search in plain PyTorch: x [..., D], codebook [K, D] -> [...].

    Components are added one after the other, so that the sums, and with them every near-tie, are those of the kernels.
    """
    codes = codebook.double()
    rows = x.reshape(-1, x.shape[-1]).double()
    chunk = max(1, _REFERENCE_CHUNK // codes.shape[0])
    found = [_nearest_in_order(part, codes, metric) for part in rows.split(chunk)]
    return torch.cat(found).reshape(x.shape[:-1])


def _nearest_in_order(rows: Tensor, codes: Tensor, metric: str) -> Tensor:
    distance = rows.new_zeros(rows.shape[0], codes.shape[0])  # [n, K]
    norm = codes.new_zeros(codes.shape[0])
    for d in range(codes.shape[1]):
        if metric == "euclidean":
            distance += (rows[:, d, None] - codes[:, d]).square()
        else:
            distance -= rows[:, d, None] * codes[:, d]
            norm += codes[:, d].square()
    if metric == "cosine":
        # The signed square orders as the similarity does, and is the same everywhere: square roots are not.
        distance *= distance.abs() / torch.where(norm > 0, norm, 1.0)
    return distance.nan_to_num_(nan=float("inf"), posinf=float("inf"), neginf=float("-inf")).argmin(-1)


@register_fake("nearest_code")
def _(x: Tensor, codebook: Tensor, mask: Tensor | None, cosine: bool) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[2], dtype=torch.int64)


@implement_on_cuda("nearest_code")
def _(x: Tensor, codebook: Tensor, mask: Tensor | None, cosine: bool) -> Tensor:
    from genperf.kernels.nearest_code import nearest_code as launch

    with torch.cuda.device_of(x):
        return launch(x, codebook, mask, cosine)
