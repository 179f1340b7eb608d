# SPDX-License-Identifier: Apache-2.0
"""Launches of several kernels that share a workspace, planned once for all calls with inputs of the same kind.

A launch through Triton binds the arguments and examines each of them for what the compiled kernel is specialized for, which takes 20 to
40 us of host time. A plan does so in its first call. Later calls put addresses into lists of arguments and launch the kernels that were
compiled. A plan holds no device memory and nothing that depends on the values of the inputs, so its launches may be captured in a graph.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

_ALIGNMENT = 256  # bytes, of each buffer in the workspace
_ELEMENT = torch.int32.itemsize  # of the workspace

# Releases of Triton whose compiled kernels are launched by CompiledKernel.run with the arguments that `Plan._bind_to` makes. With others
# every launch goes through Triton.
_KNOWN = ((3, 6), (3, 7), (3, 8), (3, 9))
_COMPILED_IS_KNOWN = tuple(map(int, triton.__version__.split(".")[:2])) in _KNOWN

# Addresses for which the arguments of the launches are kept: an allocator that caches memory gives the same ones again.
_MAX_ADDRESSES = 64


class Input(NamedTuple):
    """An argument that is given to every call."""

    number: int


class Buffer(NamedTuple):
    """An array in the workspace."""

    dtype: torch.dtype
    sizes: tuple[int, ...]
    offset: int  # bytes

    def view(self, workspace: Tensor) -> Tensor:
        first = self.offset // _ELEMENT
        elements = math.prod(self.sizes)
        return workspace[first : first + _rounded_up(elements * self.dtype.itemsize)].view(self.dtype)[:elements].view(self.sizes)


class Descriptor(NamedTuple):
    """A tensor descriptor of a buffer as a matrix, which loads blocks through the TMA unit."""

    buffer: Buffer
    block: tuple[int, int]

    def view(self, workspace: Tensor) -> TensorDescriptor:
        return self._of(self.buffer.view(workspace))

    def at(self, address: int) -> TensorDescriptor:
        return self._of(_Address(address, self.buffer.dtype))

    def _of(self, base: Any) -> TensorDescriptor:
        *rows, columns = self.buffer.sizes
        return TensorDescriptor(base, [math.prod(rows), columns], [columns, 1], list(self.block))


class _Address(NamedTuple):
    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


class _Launch(NamedTuple):
    kernel: Any
    grid: tuple[int, int, int]
    arguments: list[Any]  # in the order of the kernel's parameters
    options: dict[str, Any]


class Plan:
    """Buffers and launches, added in the order in which they run.

    Args:
        device: of the inputs and the workspace.
        inputs: names of the tensors that are given to every call.
    """

    def __init__(self, device: torch.device, inputs: Sequence[str]) -> None:
        self._device = device
        self._named: dict[str, Any] = {name: Input(i) for i, name in enumerate(inputs)}
        self._size = 0
        self._launches: list[_Launch] = []
        self._compiled: dict[tuple[bool, ...], list[Any]] = {}  # by which addresses are aligned
        self._bind = lru_cache(_MAX_ADDRESSES)(self._bind_to)

    def buffer(self, name: str, dtype: torch.dtype, *sizes: int) -> Buffer:
        """Reserve an array that is not initialized."""
        buffer = self._named[name] = Buffer(dtype, sizes, self._size * _ELEMENT)
        self._size += _rounded_up(math.prod(sizes) * dtype.itemsize)
        return buffer

    def launch(self, kernel: Any, grid: tuple[int, int, int], arguments: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        """Add a launch.

        A parameter of the kernel gets the value of its name in `options` or `arguments`, or is the input or the buffer of its name.
        `arguments` may hold more; `options` that are no parameters are those of the launch, such as num_warps.
        """
        named = {**self._named, **arguments, **options}
        bound = [named[name] for name in kernel.arg_names]
        others = {name: value for name, value in options.items() if name not in kernel.arg_names}
        self._launches.append(_Launch(kernel, grid, bound, others))

    def run(self, *inputs: Tensor | None) -> None:
        """Launch the kernels on the current stream of the device, which is the current device."""
        workspace = torch.empty(self._size, dtype=torch.int32, device=self._device)
        addresses = (workspace.data_ptr(), *[None if tensor is None else tensor.data_ptr() for tensor in inputs])
        calls = None
        if self._compiled and not (knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls):
            stream = driver.active.get_current_stream(self._device.index)  # pyright: ignore[reportAttributeAccessIssue]
            with contextlib.suppress(KeyError):  # not yet compiled for what is aligned
                calls = self._bind(stream, *addresses)
        if calls is None:
            compiled = list(self._launch_through_triton(workspace, inputs))  # of None if interpreted
            if _COMPILED_IS_KNOWN and None not in compiled:
                self._compiled[_aligned(addresses)] = compiled
            return
        for function, arguments in calls:
            function(*arguments)

    def _launch_through_triton(self, workspace: Tensor, inputs: Sequence[Tensor | None]) -> Iterator[Any]:
        for kernel, grid, arguments, options in self._launches:
            values = [
                inputs[value.number]
                if isinstance(value, Input)
                else value.view(workspace)
                if isinstance(value, (Buffer, Descriptor))
                else value
                for value in arguments
            ]
            yield kernel[grid](*values, **options)

    def _bind_to(self, stream: int, workspace: int, *inputs: int | None) -> list[tuple[Callable[..., None], list[Any]]]:
        """Functions that launch the kernels, with their arguments."""

        def value_of(argument: Any) -> Any:
            if isinstance(argument, Input):
                return inputs[argument.number]
            if isinstance(argument, Buffer):
                return workspace + argument.offset
            if isinstance(argument, Descriptor):
                return argument.at(workspace + argument.buffer.offset)
            return argument

        calls = []
        for kernel, launch in zip(self._compiled[_aligned((workspace, *inputs))], self._launches, strict=True):
            no_hooks = (None, None, None)
            values = map(value_of, launch.arguments)
            calls.append((kernel.run, [*launch.grid, stream, kernel.function, kernel.packed_metadata, *no_hooks, *values]))
        return calls


def _aligned(addresses: Sequence[int | None]) -> tuple[bool, ...]:
    """What Triton specializes a kernel for. The type, value and divisibility of every other argument are those of the plan."""
    return tuple(address is None or address % 16 == 0 for address in addresses)


def _rounded_up(size: int) -> int:
    """Elements of the workspace that hold `size` bytes, a multiple of the alignment."""
    return -(-size // _ALIGNMENT) * (_ALIGNMENT // _ELEMENT)
