"""What every op of the library does the same way: choose an implementation and see a tensor as positions and channels."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

log = logging.getLogger("genperf")

IMPLEMENTATIONS = ("reference", "native", "triton", "eigen", "polar")
HALF_DTYPES = (torch.bfloat16, torch.float16)


_only_reference = False


@contextmanager
def reference_ops() -> Iterator[None]:
    """Within this context every op without an `impl` of its own runs its reference, in plain PyTorch, in layers and losses too.

    For comparisons, and to find out whether a kernel is to blame. It holds for the whole process, all threads.
    """
    global _only_reference
    before, _only_reference = _only_reference, True
    try:
        yield
    finally:
        _only_reference = before


def choose_impl(op: str, impl: str | None, refusals: dict[str, str | None]) -> str:
    """Name the implementation to run.

    `refusals` maps each implementation, best first, to None where it can run and to a sentence that says why not
    where it cannot. A named `impl` that cannot run raises that sentence; it never falls back.
    """
    if impl is None:
        chosen = "reference" if _only_reference else next(name for name, refusal in refusals.items() if refusal is None)
        if not torch.compiler.is_compiling() and log.isEnabledFor(logging.DEBUG):
            passed_over = "".join(f"; not {name}: {refusal}" for name, refusal in refusals.items() if refusal is not None)
            log.debug("%s runs %s%s", op, chosen, passed_over)
        return chosen
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"{op}: impl must be None or one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}.")
    if refusals.get(impl, "") is not None:
        reason = refusals.get(impl) or "this op has no such implementation."
        raise NotImplementedError(f"{op}: impl={impl!r} cannot run here: {reason}")
    return impl


def native_refusal(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the compiled kernel of `op` cannot run on this device and dtype, or None."""
    from genperf import _library

    if device.type == "cpu":
        return _library.cpu_failure
    if device.type == "cuda":
        if dtype == torch.float64:
            return "the CUDA kernels take float32, bfloat16 and float16."
        return _library.cuda_failure
    return f"no compiled kernel for device {device.type!r}."


def streaming_refusals(op: str, device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
    """Refusals of an op whose kernels, on every device, take float32, bfloat16 and float16 only."""
    native = native_refusal(op, device, dtype)
    if native is None and dtype == torch.float64:
        native = "the kernels take float32, bfloat16 and float16."
    return {"native": native, "reference": None}


def refuse_forward_mode(refusals: dict[str, str | None], *inputs: object) -> None:
    """Leave inputs with a forward-mode tangent to the reference: compiled kernels would drop it in silence."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in inputs):
        for name in refusals.keys() - {"reference"}:
            refusals[name] = refusals[name] or "forward-mode gradients are computed by the reference only."


def check_tensor(op: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}.")


def check_channel_dim(op: str, x: Tensor, channel_dim: int) -> int:
    """The channel dimension as a non-negative number."""
    if x.dim() == 0 or not -x.dim() <= channel_dim < x.dim():
        raise ValueError(f"{op}: channel_dim must be a dimension of x, got channel_dim={channel_dim} for x of shape {list(x.shape)}.")
    return channel_dim % x.dim()


def check_positions(op: str, name: str, value: Tensor, x: Tensor, channel: int) -> None:
    """`value` must hold one entry for each position of x."""
    expected = positions_shape(x, channel)
    if list(value.shape) != expected:
        raise ValueError(f"{op}: {name} must have the shape of x without its channel dimension, {expected}, got {list(value.shape)}.")
    if value.device != x.device:
        raise ValueError(f"{op}: {name} and x must be on one device, got {value.device} and {x.device}.")


def check_vectors(op: str, x: Tensor, codebook: Tensor, channel_dim: int) -> int:
    """Check x against the codebook; the channel dimension as a non-negative number."""
    check_tensor(op, "x", x)
    check_tensor(op, "codebook", codebook)
    channel = check_channel_dim(op, x, channel_dim)
    if codebook.dim() != 2:
        raise ValueError(f"{op}: codebook must have shape [K, D], got {list(codebook.shape)}.")
    if codebook.shape[0] == 0 or codebook.shape[1] == 0:
        raise ValueError(f"{op}: codebook must hold at least one code of at least one dimension, got shape {list(codebook.shape)}.")
    if x.shape[channel] != codebook.shape[1]:
        raise ValueError(
            f"{op}: the channel dimension of x must be as long as a code, got {x.shape[channel]} channels "
            f"(x {list(x.shape)}, channel_dim={channel_dim}) and codes of {codebook.shape[1]}."
        )
    check_float(op, "x", x)
    if codebook.dtype != x.dtype and not (codebook.dtype == torch.float32 and x.dtype in HALF_DTYPES):
        raise TypeError(f"{op}: codebook must have the dtype of x, or float32 with a half-precision x, got {codebook.dtype} and {x.dtype}.")
    if codebook.device != x.device:
        raise ValueError(f"{op}: x and codebook must be on one device, got {x.device} and {codebook.device}.")
    return channel


def check_float(op: str, name: str, value: Tensor) -> None:
    if value.dtype not in (torch.float32, torch.float64, *HALF_DTYPES):
        raise TypeError(f"{op}: {name} must be float32, bfloat16, float16 or float64, got {value.dtype}.")


def check_noise(op: str, noise: Tensor, name: str, x: Tensor, shape: Sequence[int]) -> None:
    """`noise` must have `shape`, be on x's device, and be float32 or of x's dtype."""
    check_tensor(op, "noise", noise)
    if noise.shape != shape:
        raise ValueError(f"{op}: noise must have shape {list(shape)}, got {list(noise.shape)}.")
    if noise.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"{op}: noise must be float32 or have the dtype of {name}, {x.dtype}, got {noise.dtype}.")
    if noise.device != x.device:
        raise ValueError(f"{op}: noise and {name} must be on one device, got {noise.device} and {x.device}.")


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of losses and sums over tensors of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def normalized(x: Tensor, dim: int) -> Tensor:
    """Unit vectors in the direction of x's, in the dtype of sums over x.

    A norm that x's dtype cannot hold as a normal number counts as the least that it can: gradients by a zero vector fit in it.
    """
    return F.normalize(x.to(accumulator_dtype(x.dtype)), dim=dim, eps=max(1e-12, torch.finfo(x.dtype).tiny))


def positions_shape(x: Tensor, channel: int) -> list[int]:
    """Shape of x without its channel dimension."""
    return [*x.shape[:channel], *x.shape[channel + 1 :]]


def as_positions(x: Tensor, channel: int) -> Tensor:
    """View x as [outer, D, inner]; a copy only where no such view exists.

    outer * inner counts the positions in row-major order of the other dimensions. Channels-last tensors have inner = 1;
    channels-first tensors, permuted ones among them, have their pixels in `inner`.
    """
    sizes = positions_shape(x, channel)
    strides = [*x.stride()[:channel], *x.stride()[channel + 1 :]]
    for split in (channel, *range(len(sizes) + 1)):
        if _collapses(sizes[:split], strides[:split]) and _collapses(sizes[split:], strides[split:]):
            moved = x.movedim(channel, split)
            return moved.reshape(math.prod(sizes[:split]), x.shape[channel], math.prod(sizes[split:]))
    return x.reshape(math.prod(sizes[:channel]), x.shape[channel], math.prod(sizes[channel:]))


def like_positions(t: Tensor, positions: Tensor, x: Tensor, channel: int) -> Tensor:
    """View t, of x's shape, as [outer, D, inner] with the outer and inner of x's `positions`; a copy where it must be."""
    split = position_split(positions, x, channel)
    return t.movedim(channel, split).reshape(positions.shape)


def from_positions(y: Tensor, x: Tensor, channel: int) -> Tensor:
    """Undo `as_positions`: y [outer, D, inner] in the shape of x, but for its D."""
    sizes = positions_shape(x, channel)
    split = position_split(y, x, channel)
    return y.reshape(*sizes[:split], y.shape[1], *sizes[split:]).movedim(split, channel)


def position_split(positions: Tensor, x: Tensor, channel: int) -> int:
    sizes = positions_shape(x, channel)
    split = 0
    while math.prod(sizes[:split]) != positions.shape[0] or math.prod(sizes[split:]) != positions.shape[2]:
        split += 1
    return split


def as_rows(read: Sequence[Tensor | None], written: Sequence[Tensor | None] = ()) -> list[Tensor | None]:
    """View tensors of one shape [B, ...] as [B, rows, columns], elements in row-major order.

    Where no one view fits all, what is only read is copied; what is written must be dense.
    """
    tensors = [t for t in (*read, *written) if t is not None]
    shape = tensors[0].shape
    if all(t.is_contiguous() for t in tensors):
        sizes = (shape[0], 1, math.prod(shape[1:]))
        return [None if t is None else t.view(sizes) for t in (*read, *written)]
    split = _row_split(shape, tensors) or _row_split(shape, [t for t in written if t is not None]) or 1
    sizes = (shape[0], math.prod(shape[1:split]), math.prod(shape[split:]))
    views = [None if t is None else t.reshape(sizes) for t in read]
    return views + [None if t is None else t.view(sizes) for t in written]


def rows_fit(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors of one shape [B, ...] can be viewed as [B, rows, columns] together."""
    return _row_split(tensors[0].shape, tensors) is not None


def _row_split(shape: Sequence[int], tensors: Sequence[Tensor]) -> int | None:
    """The dimension at which the columns start in a view of all the tensors as [B, rows, columns]."""
    for split in range(1, max(2, len(shape))):
        if all(_collapses(shape[1:split], t.stride()[1:split]) and _collapses(shape[split:], t.stride()[split:]) for t in tensors):
            return split
    return None


def _collapses(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether dimensions of these sizes and strides are one strided dimension."""
    kept = [(size, stride) for size, stride in zip(sizes, strides, strict=True) if size != 1]
    return all(outer[1] == inner[0] * inner[1] for outer, inner in pairwise(kept))


def apply(function: type[torch.autograd.Function], *arguments: object) -> tuple[Tensor, ...]:
    """function.apply(*arguments) without its inspection of forward's signature, which takes longer than a small kernel."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    return super(torch.autograd.Function, function).apply(*arguments)


def differentiate(
    outputs: Sequence[Tensor], gradients: Sequence[Tensor | None], inputs: Sequence[Tensor | None], needed: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of the needed inputs that can be differentiated again; None where there is no path."""
    wanted = [t for t, need in zip(inputs, needed, strict=True) if need]
    pairs = [(out, grad) for out, grad in zip(outputs, gradients, strict=True) if grad is not None and out.requires_grad]
    if not pairs or not wanted:
        return [None] * len(inputs)
    outputs, upstream = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, wanted, upstream, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needed]


class ValueOf(torch.autograd.Function):
    """The value of one tensor with the gradient of another, without the rounding of a + (b - a)."""

    @staticmethod
    def forward(value, carrier):
        return value.clone()

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        pass

    @staticmethod
    def backward(ctx, grad):
        return None, grad


@contextmanager
def full_float32() -> Iterator[None]:
    """Products of float32 tensors in float32, whatever the caller allows for its own."""
    places = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    reduced = [(place, place.fp32_precision) for place in places if place.fp32_precision not in ("ieee", "none")]
    try:
        for place, _ in reduced:
            place.fp32_precision = "ieee"
        yield
    finally:
        for place, precision in reduced:
            place.fp32_precision = "none"
            if place.fp32_precision != precision:  # else it is inherited, and stays so
                place.fp32_precision = precision


def register_fake(op: str) -> Callable[[Callable], Callable]:
    """Decorator: shapes, dtypes and strides of the compiled `op` without its data, for torch.compile and FakeTensors."""
    from genperf import _library

    if _library.cpu_failure is not None:
        return lambda function: function
    return torch.library.register_fake(f"genperf::{op}")


def implement_on_cuda(op: str) -> Callable[[Callable], Callable]:
    """Decorator: a Python launcher as the CUDA implementation of `op`, for ops whose kernel is Triton."""
    from genperf import _library

    if _library.cpu_failure is not None:
        return lambda function: function
    return torch.library.impl(f"genperf::{op}", "CUDA")
