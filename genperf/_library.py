"""Loads the compiled libraries: the best CPU library for this processor and, if built, the CUDA one."""

import ctypes
import importlib
import os
import warnings
from pathlib import Path
from typing import Any

import torch

_probe: Any = None  # the extension module that reads the processor's features; None if genperf is not compiled
_probe_error: ImportError | None = None
try:
    _probe = importlib.import_module(f"{__package__}._probe")
except ImportError as error:
    _probe_error = error

# Instruction sets, best first. "amx" is the x86-64-v4 library with its AMX kernels enabled.
ISAS = ("amx", "x86-64-v4", "x86-64-v3", "x86-64", "native")

# Why the CPU library, the CUDA library or Triton is not available, or None.
cpu_failure: str | None = None
cuda_failure: str | None = None
triton_failure: str | None = None
isa: str | None = None  # the instruction set of the loaded CPU library


def library_path(name: str) -> Path:
    return Path(__file__).parent / f"_{name}.so"


def runnable_isas() -> list[str]:
    """The instruction sets that this build contains and this processor supports, best first."""
    features = _probe.cpu_features()
    supported = {
        "amx": features["x86-64-v4"] and features["amx-bf16"],
        "x86-64-v4": features["x86-64-v4"],
        "x86-64-v3": features["x86-64-v3"],
        "x86-64": features["x86-64"],
        "native": True,
    }
    return [name for name in ISAS if supported[name] and _isa_library(name).exists()]


def load() -> None:
    """Load the libraries and set `isa` and the `*_failure` variables."""
    global cpu_failure, cuda_failure, triton_failure
    if _probe is None:
        reason = f"genperf is not compiled here ({_probe_error}); install it with `pip install --no-build-isolation .`."
        cpu_failure = cuda_failure = triton_failure = reason
        warnings.warn(f"{reason} Until then only the PyTorch reference implementations run.", RuntimeWarning, stacklevel=3)
        return
    _load_cpu()
    cuda_failure = _load_cuda()
    triton_failure = _find_triton()


def _isa_library(name: str) -> Path:
    base = "x86-64-v4" if name == "amx" else name
    return library_path("cpu_" + base.replace("-", "_"))


def _load_cpu() -> None:
    global isa
    runnable = runnable_isas()
    wanted = os.environ.get("GENPERF_ISA")
    if wanted and wanted not in runnable:
        raise ImportError(f"GENPERF_ISA={wanted} cannot run here; this build and processor support {', '.join(runnable)}.")
    if not runnable:
        raise ImportError("genperf was compiled without a CPU library for this processor; reinstall it from source on this machine.")
    isa = wanted or runnable[0]
    path = _isa_library(isa)
    torch.ops.load_library(path)
    if isa == "amx":
        ctypes.CDLL(str(path)).genperf_allow_amx()


def _load_cuda() -> str | None:
    path = library_path("cuda")
    if not path.exists():
        return "genperf was built without CUDA; rebuild with GENPERF_CUDA=1."
    torch.ops.load_library(path)
    return None


def _find_triton() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported ({error})."
    return None
