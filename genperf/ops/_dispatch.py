# SPDX-License-Identifier: Apache-2.0
"""Choice of an implementation: which ones an op has, why one cannot run here, and which one is used."""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, get_args

import torch
import torch._C._functorch as _functorch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _library
from .._choices import Impl
from .._messages import warn_caller
from ._autograd import transformed

log = logging.getLogger("genperf")
IMPLEMENTATIONS: tuple[Impl, ...] = get_args(Impl)
_only_reference = False
_warned = False  # that a library is missing

# A Python function that stands in for a compiled op.
Implementation = TypeVar("Implementation", bound=Callable[..., object])

# For each implementation, best first, a sentence that says why it cannot run, or None where it can.
Reasons = dict[Impl, str | None]


@contextmanager
def reference_ops() -> Iterator[None]:
    """Within this context, every op called without `impl` runs its reference in plain PyTorch, also inside layers and losses.

    For comparisons, and to find out whether a kernel is the cause of a problem. It applies to all threads of the process.
    """
    global _only_reference
    before, _only_reference = _only_reference, True
    try:
        yield
    finally:
        _only_reference = before


def choose_impl(op: str, impl: Impl | None, unavailable: Reasons, *inputs: object) -> Impl:
    """The name of the implementation to run.

    Args:
        unavailable: each implementation, best first, with None where it can run and otherwise a sentence that says why not.
        inputs: arguments that may carry a forward-mode tangent, which only the reference propagates.

    Raises:
        ValueError: an unknown `impl`.
        NotImplementedError: a named `impl` that cannot run; it never falls back.
    """
    if impl is None and not (
        _only_reference
        or forward_ad._current_level >= 0
        or torch.compiler.is_compiling()
        or torch.compiler.is_exporting()
        or torch._C._is_tracing()
        or log.isEnabledFor(logging.DEBUG)
    ):
        for name, reason in unavailable.items():
            if reason is None:
                if name != "reference":
                    return name
                break
    reference_only = None
    if exporting_to_onnx():
        reference_only = "an ONNX graph holds operators of PyTorch only."
    elif _has_tangent(inputs):
        reference_only = "forward-mode gradients are computed by the reference only."
    if reference_only is not None:
        unavailable = {name: reason if name == "reference" else reason or reference_only for name, reason in unavailable.items()}
    if impl is None:
        chosen: Impl = "reference" if _only_reference else next(name for name, reason in unavailable.items() if reason is None)
        if not torch.compiler.is_compiling() and log.isEnabledFor(logging.DEBUG):
            passed_over = "".join(f"; not {name}: {reason}" for name, reason in unavailable.items() if reason is not None)
            log.debug("%s runs %s%s", op, chosen, passed_over)
        if chosen == "reference" and not _only_reference:
            _warn_missing_library(op, unavailable)
        return chosen
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"{op}: impl must be None or one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}.")
    if unavailable.get(impl, "") is not None:
        reason = unavailable.get(impl) or "this op has no such implementation."
        raise NotImplementedError(f"{op}: impl={impl!r} cannot run here: {reason}")
    return impl


def _warn_missing_library(op: str, unavailable: Reasons) -> None:
    """Warn once in a process if an op runs its reference on a GPU because something is not installed or not built."""
    global _warned
    if _warned or torch.compiler.is_compiling():
        return
    missing = {_library.cuda_failure, _library.triton_failure, *_library.cuda_device_failures.values()} - {None, _library.cpu_failure}
    reason = next((reason for reason in unavailable.values() if reason in missing), None)
    if reason is not None:
        _warned = True
        warn_caller(f"{op} runs its slower PyTorch reference on CUDA: {reason} See `genperf info`.", RuntimeWarning)


def exporting_to_onnx() -> bool:
    """Whether torch.onnx.export traces the call. torch.export and AOTInductor keep the compiled kernels."""
    tracing = torch.compiler.is_exporting() or torch.jit.is_tracing()  # `is_in_onnx_export` takes longer
    return tracing and torch.onnx.is_in_onnx_export()


def _has_tangent(inputs: tuple[object, ...]) -> bool:
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    # A tangent is hidden if torch.func.jvp is not the innermost transform.
    if transformed() and any(level.key() == _functorch.TransformType.Jvp for level in _functorch.get_interpreter_stack()):
        return True
    return any(isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in inputs)


def remembered(unavailable: Callable[[torch.device, torch.dtype], Reasons]) -> Callable[[torch.device, torch.dtype], Reasons]:
    """Decorator: evaluate the reasons of an op once for each device and dtype. Callers must not change what they get."""
    known: dict[object, Reasons] = {}

    @functools.wraps(unavailable)
    def recall(device: torch.device, dtype: torch.dtype) -> Reasons:
        # The failures of a GPU are known when torch has initialized CUDA, which can be later than the first call.
        if torch.compiler.is_compiling() or _library.cuda_device_failures or _library.triton_device_failures:
            return unavailable(device, dtype)
        key = device, dtype, _library.cpu_failure, _library.cuda_failure, _library.triton_failure
        found = known.get(key)
        if found is None:
            found = known[key] = unavailable(device, dtype)
        return found

    return recall


def also_not_native(reasons: Reasons, reason: str) -> Reasons:
    """The reasons, with one why the compiled kernel cannot run for these arguments."""
    return {**reasons, "native": reasons["native"] or reason}


def native_unavailable(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the compiled kernel of `op` cannot run on this device and dtype, or None."""
    if device.type == "cpu":
        return _library.cpu_failure
    if device.type == "cuda":
        if dtype == torch.float64:
            return "the CUDA kernels take float32, bfloat16 and float16."
        return _library.cuda_failure or _library.cuda_device_failures.get(device.index)
    return f"no compiled kernel for device {device.type!r}."


def streaming_unavailable(op: str, device: torch.device, dtype: torch.dtype) -> Reasons:
    """Implementations of an op whose kernels, on every device, take float32, bfloat16 and float16 only."""
    native = native_unavailable(op, device, dtype)
    if native is None and dtype == torch.float64:
        native = "the kernels take float32, bfloat16 and float16."
    return {"native": native, "reference": None}


def register_fake(op: str) -> Callable[[Implementation], Implementation]:
    """Decorator: shapes, dtypes and strides of the compiled `op` without its data, for torch.compile and FakeTensors."""

    def decorate(function: Implementation) -> Implementation:
        if hasattr(torch.ops.genperf, op):
            torch.library.register_fake(f"genperf::{op}", function)
        return function

    return decorate


def implement_on_cuda(op: str, schema: str | None = None) -> Callable[[Implementation], Implementation]:
    """Decorator: a Python function as the CUDA implementation of `op`.

    An op with a `schema`, that of library.cpp, exists without the compiled libraries too.
    """

    def decorate(function: Implementation) -> Implementation:
        if schema is not None and not hasattr(torch.ops.genperf, op):
            torch.library.define(f"genperf::{op}", schema)
        if hasattr(torch.ops.genperf, op):
            torch.library.impl(f"genperf::{op}", "CUDA")(function)
        return function

    return decorate
