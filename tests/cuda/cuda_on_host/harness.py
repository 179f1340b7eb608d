# SPDX-License-Identifier: Apache-2.0
"""Builds CUDA kernels for the CPU, and runs checks of them under sanitizers and a detector of races between threads and blocks.

The sanitizers must be loaded before Python, so the checks run in a child process: a test file runs itself as a program.
"""

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "csrc"

KERNEL = r"genperf::(?:\(anonymous namespace\)::)?(\w+_kernel(?:<.*>)?\([^{\n]*\))"  # among the symbols, but no lambda in it

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def compile_on_host(sources: list[Path], output: Path, *flags: str) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("the emulation needs g++, which is not on PATH.")
    if not all(os.path.isabs(path) for path in preloads()):
        pytest.skip("g++ has no shared libasan and libubsan.")
    language = "-std=c++20 -O1 -g1 -fPIC -Wall -Wextra -Werror -Wno-unknown-pragmas -DGENPERF_CUDA_ON_HOST"
    options = [compiler, "-c", *language.split(), f"-I{HERE.parent}", f"-I{CSRC}", f"-I{CSRC / 'cuda'}"]
    # Without checks that AddressSanitizer repeats, which take an eighth of the time.
    sanitizers = "-fsanitize=thread,undefined -fno-sanitize=null,object-size,vptr -fno-sanitize-recover=all"
    calls = "--param tsan-instrument-func-entry-exit=0"
    objects = output.with_suffix(".objects")
    objects.mkdir()
    subprocess.run([*options, "-O2", HERE / "races.cpp"], check=True, cwd=objects)
    subprocess.run([*options, *sanitizers.split(), *calls.split(), "-x", "c++", *sources], check=True, cwd=objects)
    subprocess.run([compiler, "-fsanitize=address,undefined", *flags, *objects.iterdir(), "-o", output], check=True)
    return output


def kernels(launchers: Path) -> list[Path]:
    """The .cu files of the headers that a file of launchers includes."""
    headers = re.findall(r'^#include "(\w+)\.h"', launchers.read_text(), re.MULTILINE)
    return [path for header in headers if (path := CSRC / "cuda" / f"{header}.cu").exists()]


def compile_kernels(launchers: str, folder: Path) -> Path:
    return compile_on_host([*kernels(HERE / launchers), HERE / launchers], folder / "kernels.so", "-shared")


def preloads() -> list[str]:
    # libstdc++ too, because the sanitizer looks up the function that throws when it starts.
    names = ("libasan.so", "libubsan.so", "libstdc++.so")
    return [subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip() for name in names]


def run_in_child(test_file: str, library: Path, checks: list[str]) -> str:
    """Return the output of the child: a line for each check that passed, tracebacks, and the sanitizer's report."""
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(preloads()),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, test_file, str(library), *checks]
    output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
    ran = {int(address, 16) for address in re.findall(r"^address (.*)", output, re.MULTILINE)}
    names = subprocess.run(["nm", "--demangle", library], capture_output=True, text=True, check=True).stdout
    compiled = re.findall(rf"^(\w+) [tW] (?:void )?{KERNEL}$", names, re.MULTILINE)
    return output + "".join(f"{'ran' if int(address, 16) in ran else 'never ran'} {kernel}\n" for address, kernel in compiled)


def run_checks(checks: dict[str, Callable]) -> None:
    """Run the checks in the child, whose arguments are the library and the names of the checks.

    Then say which barriers of the kernels they need, and run them again without one.
    """
    torch.set_num_threads(1)
    library = ctypes.CDLL(sys.argv[1])
    library.cuda_on_host_barriers.restype = library.cuda_on_host_kernels.restype = ctypes.c_char_p
    failed = False
    for check in sys.argv[2:]:
        try:
            run_check(library, checks[check])
            print(check, "passed", flush=True)
        except Exception:
            traceback.print_exc()
            failed = True
    if failed:
        return
    for address in library.cuda_on_host_kernels().decode().split():
        print("address", address)
    barriers = [line.rsplit(":", 2) for line in library.cuda_on_host_barriers().decode().split()]
    for file, line, needed in barriers:
        print("needed" if needed == "1" else "not needed", "barrier", f"{file}:{line}", flush=True)
    # The order of the threads alone has to show one of them; to look for all would take long.
    for file, line, _ in barriers:
        if fails_without(library, file, line, [checks[name] for name in sys.argv[2:]]):
            print("wrong results without", f"{file}:{line}", flush=True)
            break


# Serves kernels that differ in which of its barriers they need.
SHARED_BY_ALL = "last_block.h"


def assert_each_kernel_runs(output: str) -> None:
    """Every instantiation of the kernels, so all dtypes."""
    assert "never ran" not in output, output


def assert_each_barrier_is_needed(output: str) -> None:
    """Without any one of the barriers there would be a race, and without one of them the results are wrong."""
    barriers = re.findall(r"^(needed|not needed) barrier (.*):", output, re.MULTILINE)
    assert barriers, output
    assert not [file for needed, file in barriers if needed == "not needed" and Path(file).name != SHARED_BY_ALL], output
    assert "wrong results without" in output, output


def run_check(library: ctypes.CDLL, check: Callable) -> None:
    torch.manual_seed(0)
    library.cuda_on_host_seed(ctypes.c_uint64(0))
    check(library)


def fails_without(library: ctypes.CDLL, file: str, line: str, checks: list[Callable]) -> bool:
    """Whether a check fails without the barrier, where races are not reported, in a process of its own that may crash."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        library.cuda_on_host_omit(file.encode(), int(line))
        library.cuda_on_host_detect_races(False)
        signal.alarm(120)
        try:
            for check in checks:
                run_check(library, check)
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    return status != 0 and not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM)


class Strides(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("outer", "channel", "inner")]

    @classmethod
    def of(cls, tensor: Tensor) -> "Strides":
        return cls(*tensor.stride())


class SampleTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        *((f"{name}_stride", ctypes.c_int64) for name in ("batch", "row", "column")),
        ("float32", ctypes.c_bool),
        ("vectorizable", ctypes.c_bool),
    ]

    @classmethod
    def of(cls, tensor: Tensor) -> "SampleTensor":
        return cls(tensor.data_ptr() if tensor.numel() else None, *tensor.stride(), tensor.dtype == torch.float32, False)


class Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "rows", "columns")]


def structure(*fields: tuple[str, type]) -> type[ctypes.Structure]:
    """A C++ struct with the given members, in order."""

    class Params(ctypes.Structure):
        _fields_ = [(name, kind) for names, kind in fields for name in names.split()]

    return Params


def fill(params: type[ctypes.Structure], **fields: object) -> ctypes.Structure:
    """Fill the struct, passing tensors as pointers with their strides or as SampleTensors; None leaves a member null."""
    filled, kinds = params(), dict(params._fields_)
    for name, value in fields.items():
        if isinstance(value, Tensor):
            filled._tensors = (*getattr(filled, "_tensors", ()), value)  # keeps them alive as long as the struct
            if f"{name}_strides" in kinds:
                setattr(filled, f"{name}_strides", Strides.of(value))
            value = SampleTensor.of(value) if kinds[name] is SampleTensor else value.data_ptr() if value.numel() else None
        if value is not None:
            setattr(filled, name, value)
    return filled


def nan_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.full_like(x, float("nan"), dtype=dtype)


def nans(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def assert_close(name: str, actual: Tensor, exact: Tensor, scale: Tensor, tolerance: float = 2e-6) -> None:
    """The error is at most one rounding to the result's dtype plus `tolerance` times the magnitude of the summands."""
    assert actual.shape == exact.shape, name
    assert not actual.isnan().any(), f"{name}: unwritten elements"
    error = torch.where(actual == exact.to(actual.dtype), 0, (actual.double() - exact).abs())  # 0 too where both overflow
    bound = torch.finfo(actual.dtype).eps * exact.abs() + torch.finfo(actual.dtype).tiny + tolerance * scale
    assert (error <= bound).all(), f"{name}: error {(error - bound).max()} above the bound"


def philox(words: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox 4x32-10 of counters [..., 4], 32-bit values in uint64."""
    low = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = (words[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        high0, high1 = p0 >> np.uint64(32), p1 >> np.uint64(32)
        c0, c1, c2, c3 = high1 ^ c1 ^ np.uint64(k0), p1 & low, high0 ^ c3 ^ np.uint64(k1), p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], -1)


def words_of(seed: int, rows: int, count: int, first_quad: int = 0) -> np.ndarray:
    """The first `count` random words of each row, from quad `first_quad` on."""
    quads = -(-count // 4)
    counter = np.zeros((rows, quads, 4), dtype=np.uint64)
    counter[..., 0] = np.arange(quads) + (first_quad & 0xFFFFFFFF)
    counter[..., 1] = first_quad >> 32
    counter[..., 2] = np.arange(rows)[:, None]
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))
    return words.reshape(rows, 4 * quads)


def exponentials(words: np.ndarray) -> np.ndarray:
    return -np.log((words + 0.5) * 2.0**-32)


def normal_noise(seed: int, rows: int, count: int) -> Tensor:
    words = words_of(seed, rows, count)
    radius = np.sqrt(2 * exponentials(words[:, 0::2]))
    angle = 2 * np.pi * words[:, 1::2] * 2.0**-32
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1)
    return torch.from_numpy(pairs.reshape(words.shape)[:, :count].copy())


def gumbel_noise(seed: int, rows: int, count: int) -> Tensor:
    return torch.from_numpy(-np.log(exponentials(words_of(seed, rows, count)))[:, :count].copy())


def uniform_noise(seed: int, rows: int, count: int, first_quad: int = 0) -> Tensor:
    words = words_of(seed, rows, count, first_quad)[:, :count]
    return torch.from_numpy((words >> np.uint64(8)) * 2.0**-24)
