# SPDX-License-Identifier: Apache-2.0
"""Loads the compiled libraries: the best CPU library for this processor and, if built, a CUDA one."""

import ctypes
import importlib
import importlib.util
import json
import os
import platform
import struct
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from ._messages import warn_caller

# What setup.py built or left out; empty if it never ran here.
build_info: dict[str, Any] = {}

# Instruction sets, best first. "amx" and "avx512-vnni" are the x86-64-v4 library with these kernels enabled.
ISAS = ("amx", "avx512-vnni", "x86-64-v4", "x86-64-v3", "x86-64", "aarch64", "native")

# Why the CPU library, the CUDA library or Triton is not available, or None.
cpu_failure: str | None = None
cuda_failure: str | None = None
triton_failure: str | None = None
# Why the CUDA library or Triton has no kernels for a GPU, by its index. Filled when torch initializes CUDA.
cuda_device_failures: dict[int | None, str] = {}
triton_device_failures: dict[int | None, str] = {}
isa: str | None = None  # the instruction set of the loaded CPU library
cuda_archs: list[str] = []  # the architectures of the loaded CUDA library

MIN_TRITON_CAPABILITY = (8, 0)


def library_path(name: str) -> Path:
    return Path(__file__).parent / f"_{name}.so"


def cpu_features() -> dict[str, bool]:
    """The levels of instruction sets that this processor and kernel allow."""
    names = ("x86-64", "x86-64-v3", "x86-64-v4", "avx512-bf16", "amx-bf16", "avx512-vnni")
    path = library_path("probe")
    bits = ctypes.CDLL(str(path)).genperf_cpu_features() if path.exists() else 0
    return {name: bool(bits >> place & 1) for place, name in enumerate(names)}


def runnable_isas() -> list[str]:
    """The instruction sets that this build contains and this processor supports, best first."""
    features = cpu_features()
    supported = {
        **features,
        "amx": features["x86-64-v4"] and features["amx-bf16"],
        "aarch64": platform.machine() == "aarch64",
        "native": True,
    }
    return [name for name in ISAS if supported[name] and _isa_library(name).exists()]


def load() -> None:
    """Load the libraries and set `isa` and the `*_failure` variables. A library that does not load is a warning."""
    global cpu_failure, cuda_failure, triton_failure
    triton_failure = _find_triton()
    _read_build_info()
    cpu_failure = _load_cpu()
    if cpu_failure is not None:  # the CUDA library has kernels only; the schemas are in the CPU library
        cuda_failure = cpu_failure
        warn_caller(f"{cpu_failure} Until then only the PyTorch references and the Triton search run.", RuntimeWarning)
    else:
        cuda_failure = _load_cuda()
    if torch.version.cuda is not None:
        torch.cuda._lazy_call(_check_devices)


def _read_build_info() -> None:
    path = Path(__file__).parent / "_build_info.json"
    if path.exists():
        build_info.update(json.loads(path.read_text()))


def built_isa(name: str) -> str:
    """The instruction set under which setup.py builds the library of `name`."""
    return "x86-64-v4" if name in ("amx", "avx512-vnni") else name


def _isa_library(name: str) -> Path:
    return library_path("cpu_" + built_isa(name).replace("-", "_"))


def _load(path: Path) -> None:
    """Load a library of ops. An OSError for a file that is cut short, which the dynamic loader would crash on."""
    with open(path, "rb") as file:
        header = file.read(64)
    if header[:5] == b"\x7fELF\x02":  # 64 bits; the table of sections is at the end of the file
        offset, size, count = struct.unpack_from("=40xQ10xHH", header) if len(header) == 64 else (1, 1, 1)
        if path.stat().st_size < offset + size * count:
            raise OSError(f"{path}: file is cut short")
    torch.ops.load_library(path)


def _load_cpu() -> str | None:
    global isa
    if not build_info:
        return (
            f"{Path(__file__).parent} is a source tree of genperf without compiled libraries. If genperf is installed, start Python in "
            "another folder; if not, install it with `pip install .`."
        )
    if build_info["cpu_omission"]:
        return f"genperf is installed without its compiled libraries: {build_info['cpu_omission']}."
    runnable = runnable_isas()
    wanted = os.environ.get("GENPERF_ISA")
    if wanted and wanted not in runnable:
        raise ImportError(f"GENPERF_ISA={wanted} cannot run here; this build and processor support {', '.join(runnable) or 'none'}.")
    if not runnable:
        return "genperf was built without a CPU library for this processor; reinstall it from source on this machine."
    selected = wanted or runnable[0]
    path = _isa_library(selected)
    try:
        _load(path)
    except OSError as error:
        return f"The CPU library does not load ({error}); reinstall genperf from source."
    isa = selected
    if isa == "amx":
        ctypes.CDLL(str(path)).genperf_allow_amx()
    elif isa == "avx512-vnni":
        ctypes.CDLL(str(path)).genperf_allow_vnni()
    return None


def _cuda_library(libraries: Collection[str]) -> str | None:
    """The CUDA library for this torch of those that were built.

    A build beside a torch makes one, "cuda". A wheel has one for each major version of CUDA, such as "cuda12" and "cuda13"; None if none
    of them is for this torch.
    """
    if all(name == "cuda" for name in libraries):
        return "cuda"
    name = f"cuda{str(torch.version.cuda).split('.')[0]}"
    return name if name in libraries else None


def _load_cuda() -> str | None:
    global cuda_archs
    libraries = build_info["cuda_archs"]
    name = _cuda_library(libraries)
    if name is None:
        built_for = " and ".join(library.removeprefix("cuda") for library in libraries)
        if torch.version.cuda is None:
            return f"torch {torch.__version__} has no CUDA, and the CUDA kernels of this genperf are for torch with CUDA {built_for}."
        return (
            f"the CUDA kernels of this genperf are for torch with CUDA {built_for}, and torch {torch.__version__} has CUDA "
            f"{torch.version.cuda}; reinstall genperf from source to add them."
        )
    path = library_path(name)
    if not path.exists():
        omission = build_info["cuda_omission"] or "its CUDA library is gone"
        return f"genperf was built without CUDA kernels ({omission}); reinstall it from source to add them."
    try:
        _load(path)
    except OSError as error:
        failure = f"The CUDA library does not load ({error}); reinstall genperf from source."
        warn_caller(f"{failure} Until then the PyTorch references run on CUDA.", RuntimeWarning)
        return failure
    cuda_archs = dict(libraries).get(name, [])  # none is known of a library that an earlier build left
    return None


def _check_devices() -> None:
    """Fill the failures of every GPU that this build or Triton has no kernels for."""
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        number = ".".join(map(str, capability))
        if cuda_archs and not any(_runs_on(arch, capability) for arch in cuda_archs):
            cuda_device_failures[index] = (
                f"the CUDA kernels were built for {', '.join(cuda_archs)}, and GPU {index} has compute capability {number}; "
                f"reinstall genperf from source with TORCH_CUDA_ARCH_LIST={number}."
            )
        if capability < MIN_TRITON_CAPABILITY:
            triton_device_failures[index] = f"Triton needs compute capability 8.0, and GPU {index} has {number}."


def _runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether code for an architecture such as 8.6, 9.0a or 12.0+PTX runs on a device of this compute capability."""
    number, _, ptx = arch.partition("+")
    version = tuple(map(int, number.rstrip("af").split(".")))
    if number.endswith("a"):
        return version == capability
    if ptx and not number.endswith("f") and version <= capability:
        return True
    return version[0] == capability[0] and version <= capability


def _find_triton() -> str | None:
    try:
        if torch.version.cuda is None:  # nothing will run on it here, and an import takes half a second
            if importlib.util.find_spec("triton") is None:
                raise ImportError("No module named 'triton'")
        else:
            importlib.import_module("triton")
    except ImportError as error:
        return f"triton cannot be imported ({error}); a torch with CUDA brings it, and `pip install triton` adds it."
    return None
