# SPDX-License-Identifier: Apache-2.0
"""`genperf info`: versions, hardware, and the implementation that each op selects."""

import argparse
import importlib
import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .. import _library
from .._version import __version__
from ..ops import OPS
from .streams import print_page


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="write the page as JSON")


def run(arguments: argparse.Namespace) -> int:
    if getattr(arguments, "json", False):  # which `genperf` without a command lacks
        devices = _devices()
        content = {"genperf": __version__, **_facts(), "ops": {op: _choices(op, devices) for op in OPS}}
        return print_page(json.dumps(content, indent=2))
    return print_page("\n".join(info_lines()))


def info_lines() -> list[str]:
    """The info page, line by line."""
    lines = [f"genperf {__version__}"]
    lines += [f"  {name:<12} {value}" for name, value in _facts().items()]
    lines += ["", "implementation for float32; a reason against another one is given once"]
    width = max(map(len, OPS))
    devices = _devices()
    said: set[tuple[str, str]] = set()
    for op in OPS:
        for device, choice in _choices(op, devices).items():
            lines.append(f"  {op:<{width}} {device:<4} {choice['implementation']}")
            reasons = [each for each in choice["unavailable"].items() if each not in said]
            lines += [f"{'':{width + 8}}not {name}: {reason}" for name, reason in reasons]
            said.update(reasons)
    return lines


def _facts() -> dict[str, str]:
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "triton": _triton_version(),
        "processor": _processor(),
        **_build(),
        "gpu": _gpus(),
    }


def _devices() -> list[torch.device]:
    return [torch.device("cpu"), torch.device(f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cuda")]


def _choices(op: str, devices: list[torch.device]) -> dict[str, dict[str, Any]]:
    """For each type of device the implementation that the op selects, and why it does not select others."""
    # importlib, because `genperf.ops.<op>` names the function.
    module = importlib.import_module(f"genperf.ops.{op}")
    choices = {}
    for device in devices:
        unavailable = module.unavailable(device, torch.float32)
        choices[device.type] = {
            "implementation": next(name for name, reason in unavailable.items() if reason is None),
            "unavailable": {name: reason for name, reason in unavailable.items() if reason is not None},
        }
    return choices


def _build() -> dict[str, str]:
    built = _library.build_info
    if not built or built["cpu_omission"]:
        return {"compiled": f"no: {_library.cpu_failure}"}
    loaded = f"{_library.isa} loaded, of {', '.join(_library.runnable_isas())} supported here"
    return {
        "cpu kernels": f"unavailable: {_library.cpu_failure}" if _library.cpu_failure else loaded,
        "cuda kernels": f"unavailable: {_library.cuda_failure}" if _library.cuda_failure else f"built for {', '.join(_library.cuda_archs)}",
        "built with": ", ".join(f"{name} {built[name]}" for name in ("compiler", "torch") if built.get(name)),
    }


def _processor() -> str:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = models[0] if models else name
    supported = [feature for feature, has in _library.cpu_features().items() if has]
    return f"{name} ({', '.join(supported)})" if supported else name


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none available to torch"
    return ", ".join(map(_gpu, range(torch.cuda.device_count())))


def _gpu(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"{torch.cuda.get_device_name(index)} ({major}.{minor})"


def _triton_version() -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "not installed"
