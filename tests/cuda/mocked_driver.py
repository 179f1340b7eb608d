# SPDX-License-Identifier: Apache-2.0
"""A mock of the driver of an NVIDIA GPU, which records what is compiled and launched.

The tensors are on the CPU, and no kernel runs. The Python of Triton's own launcher does, so that its time counts.
"""

import contextlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import triton
from genperf.kernels.nearest_code import launch, residual_launch, shape, top_k
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia

SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}


class Compiled:
    """Has of a compiled kernel what a launch takes."""

    packed_metadata = (4, 1, 0)

    def __init__(self, source: Any, function: int) -> None:
        descriptors = sum(isinstance(kind, str) and kind.startswith("tensordesc") for kind in source.signature.values())
        of_descriptor = {"swizzle": 3, "elem_size": 2, "elem_type": 6, "block_size": [128, 64], "fp4_padded": False}
        metadata = SimpleNamespace(
            tensordesc_meta=[of_descriptor] * descriptors, global_scratch_size=0, global_scratch_align=1, profile_scratch_size=0,
            profile_scratch_align=1, launch_cooperative_grid=False, launch_pdl=False, num_ctas=1,
        )  # fmt: skip
        self.run = nvidia.CudaLauncher(source, metadata)
        self.function = function

    def launch_metadata(self, *arguments: Any) -> None:
        return None


class Driver:
    """Active in the place of Triton's, for one architecture.

    Attributes:
        sources: (ASTSource, options) of each kernel that was compiled.
        launches: the arguments of each launch as the driver's C function gets them.
    """

    launcher_cls = nvidia.CudaLauncher

    def __init__(self, arch: int) -> None:
        self.arch = arch
        self.sources: list[tuple[Any, dict[str, Any]]] = []
        self.launches: list[tuple[Any, ...]] = []
        self.utils = SimpleNamespace(
            launch=self.launch, build_signature_metadata=list, fill_tma_descriptor=lambda *a: a, fill_tma_descriptor_tiled=lambda *a: a
        )

    def launch(self, *arguments: Any) -> None:
        self.launches.append(arguments)

    def get_current_device(self) -> int:
        return self.arch  # compiled kernels are kept by device

    def get_current_stream(self, device: Any) -> int:
        return 7

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def allocate_default_profile_scratch(self, size: int, alignment: int, stream: int) -> None:
        assert size == 0

    def compile(self, source: Any, target: GPUTarget, options: dict[str, Any], **_: Any) -> Compiled:
        self.sources.append((source, options))
        return Compiled(source, function=len(self.sources))


@contextlib.contextmanager
def mocked_driver(arch: int) -> Iterator[Driver]:
    """Within this context the search launches on tensors of the CPU as on a GPU of the architecture."""
    driver = Driver(arch)
    kernels = [
        kernel
        for name in ("prepare", "scan", "settle", "search", "residual", "candidates")
        for kernel in vars(sys.modules[f"genperf.kernels.nearest_code.{name}"]).values()
        if isinstance(kernel, triton.JITFunction)
    ]

    def forget() -> None:
        launch._plan.cache_clear()
        residual_launch._plan.cache_clear()
        top_k._plan.cache_clear()
        for kernel in kernels:
            kernel.device_caches.pop(arch, None)

    with contextlib.ExitStack() as stack:
        before = triton.runtime.driver._active
        stack.callback(triton.runtime.driver.set_active, before)
        triton.runtime.driver.set_active(driver)  # pyright: ignore[reportArgumentType]
        stack.enter_context(mock.patch("triton.compiler.compile", driver.compile))
        stack.enter_context(mock.patch.object(shape, "_architecture", return_value=(arch // 10, SHARED_MEMORY[arch])))
        # Triton 3.6 compiles a launcher in C++ for each signature; 3.9 has one, which takes a description of the signature.
        launcher = SimpleNamespace(launch=driver.launch)
        for name, result in {"PyKernelArg": None, "make_launcher": "", "library_dirs": [], "compile_module_from_src": launcher}.items():
            stack.enter_context(mock.patch.object(nvidia, name, mock.Mock(return_value=result), create=True))
        forget()
        stack.callback(forget)
        yield driver
