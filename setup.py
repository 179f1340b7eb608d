# SPDX-License-Identifier: Apache-2.0
"""Builds the compiled libraries with one ninja run: one CPU library per instruction set, the CUDA libraries, the probe.

They need torch's headers and libraries, but the build does not import torch. Where it, a compiler or a supported system is missing,
the Python package is installed alone, and says so when it is imported.
"""

import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib.machinery import PathFinder
from pathlib import Path
from typing import NamedTuple, TextIO

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
MIN_TORCH = (2, 11)
DEFAULT_CUDA_ARCHS = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")  # those that nvcc knows, and PTX of the last of them
CUDA_HOME = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
CUDA_HOMES = [home for home in os.environ.get("GENPERF_CUDA_HOMES", "").split(os.pathsep) if home]
CXX = os.environ.get("CXX", "g++")


def target_machine() -> str:
    """The processor that the compiler makes code for, which a cross compiler names."""
    command = shlex.split(CXX)
    if shutil.which(command[0]):
        stated = subprocess.run([*command, "-dumpmachine"], capture_output=True, text=True).stdout.split("-")[0]
        if stated in ("x86_64", "aarch64"):
            return stated
    return platform.machine()


MACHINE = target_machine()
CROSS = platform.machine() != MACHINE
X86 = MACHINE in ("x86_64", "AMD64")
if X86:
    ISAS = os.environ.get("GENPERF_BUILD_ISAS", "x86-64 x86-64-v3 x86-64-v4").split()
else:
    ISAS = ["aarch64" if MACHINE == "aarch64" else "native"]


class Torch(NamedTuple):
    folder: Path
    version: str
    cuda: str | None


def find_torch() -> Torch | None:
    """The torch of this interpreter, or if pip isolates the build, of the environment that pip installs into."""
    installed_into = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    spec = PathFinder.find_spec("torch") or PathFinder.find_spec("torch", installed_into)
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    stated = runpy.run_path(str(folder / "version.py"))
    return Torch(folder, str(stated["__version__"]), stated["cuda"])


def cpu_omission() -> str | None:
    """Why this build leaves out all compiled libraries, or None."""
    choice = os.environ.get("GENPERF_COMPILE", "auto")
    if choice not in ("0", "1", "auto"):
        sys.exit(f"genperf: GENPERF_COMPILE must be 0, 1 or auto, got {choice!r}.")
    reason = None
    if choice == "0":
        reason = "GENPERF_COMPILE=0 was set"
    elif sys.platform != "linux":
        reason = f"there are no compiled libraries for {sys.platform}"
    elif TORCH is None:
        reason = "no torch was found when it was built; install torch, then genperf again"
    elif tuple(map(int, re.findall(r"\d+", TORCH.version)[:2])) < MIN_TORCH:
        reason = f"it needs torch 2.11 or newer and found {TORCH.version}; upgrade torch, then install genperf again"
    elif not shutil.which(shlex.split(CXX)[0]):
        reason = f"no C++ compiler: {CXX!r} is not on PATH; install g++ 10 or newer or name it in CXX, then install genperf again"
    if reason and choice == "1":
        sys.exit(f"genperf: GENPERF_COMPILE=1 cannot be met: {reason}.")
    return reason


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME or CUDA_PATH; if neither is set, of PATH or of the system."""
    if CUDA_HOME:
        return shutil.which("nvcc", path=f"{CUDA_HOME}/bin")
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def cuda_release(nvcc: str) -> tuple[str, str] | None:
    """The major and minor version of nvcc."""
    found = re.search(r"release (\d+)\.(\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    return (found[1], found[2]) if found else None


def cuda_omission(nvcc: str | None) -> str | None:
    """Why this build leaves out the CUDA kernels, or None."""
    choice = os.environ.get("GENPERF_CUDA", "auto")
    if choice not in ("0", "1", "auto"):
        sys.exit(f"genperf: GENPERF_CUDA must be 0, 1 or auto, got {choice!r}.")
    if choice == "0":
        return "GENPERF_CUDA=0 was set"
    if CROSS:
        return f"it was cross-compiled for {MACHINE}"
    if CUDA_HOMES:  # each gives the version that it is for, so torch's does not matter
        return None
    if choice == "auto" and TORCH.cuda is None:
        return f"torch {TORCH.version} has no CUDA"
    wanted = (TORCH.cuda or "").split(".")[0]  # with a torch without CUDA, any toolkit
    toolkit = f"CUDA toolkit {wanted}" if wanted else "a CUDA toolkit"
    if nvcc is None:
        searched = f"in {CUDA_HOME}/bin" if CUDA_HOME else "on PATH or in /usr/local/cuda/bin"
        reason = f"no nvcc {searched}; install {toolkit} or name its folder in CUDA_HOME"
    else:
        release = cuda_release(nvcc)
        if release is None:
            reason = f"`{nvcc} --version` names no release; name the folder of {toolkit} in CUDA_HOME"
        elif wanted not in ("", release[0]):
            reason = f"nvcc {'.'.join(release)} does not match torch's CUDA {TORCH.cuda}; name the folder of {toolkit} in CUDA_HOME"
        else:
            return None
    if choice == "1":
        sys.exit(f"genperf: GENPERF_CUDA=1 cannot be met: {reason}.")
    return reason


def cuda_compilers() -> dict[str, str]:
    """The nvcc of each CUDA library: cuda for the toolkit that is found, or such as cuda12 and cuda13 for those of GENPERF_CUDA_HOMES."""
    if not CUDA_HOMES:
        return {"cuda": NVCC}
    compilers = {}
    for home in CUDA_HOMES:
        nvcc = shutil.which("nvcc", path=f"{home}/bin")
        release = cuda_release(nvcc) if nvcc else None
        if release is None:
            sys.exit(f"genperf: GENPERF_CUDA_HOMES must list folders of CUDA toolkits, and there is no nvcc in {home}/bin.")
        if f"cuda{release[0]}" in compilers:
            sys.exit(f"genperf: GENPERF_CUDA_HOMES must list one CUDA toolkit of each major version, got two of {release[0]}.")
        compilers[f"cuda{release[0]}"] = nvcc
    return compilers


def cuda_archs(nvcc: str) -> list[str]:
    if chosen := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        archs = re.split(r"[; ]+", chosen.strip("; "))
        if unknown := [arch for arch in archs if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch)]:
            sys.exit(f"genperf: TORCH_CUDA_ARCH_LIST must list architectures such as 9.0 or 9.0+PTX, got {unknown[0]!r}.")
        return archs
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    archs = [arch for arch in DEFAULT_CUDA_ARCHS if f"compute_{arch.replace('.', '')}" in known]
    if not archs:
        sys.exit(f"genperf: {nvcc} knows none of {', '.join(DEFAULT_CUDA_ARCHS)}; name architectures in TORCH_CUDA_ARCH_LIST.")
    return [*archs[:-1], f"{archs[-1]}+PTX"]


def gencode_flags(archs: list[str]) -> str:
    numbers = [(arch.removesuffix("+PTX").replace(".", ""), arch.endswith("+PTX")) for arch in archs]
    machine_code = [f"-gencode arch=compute_{number},code=sm_{number}" for number, _ in numbers]
    return " ".join(machine_code + [f"-gencode arch=compute_{number},code=compute_{number}" for number, ptx in numbers if ptx])


def libraries() -> list[Extension]:
    def library(name: str, *patterns: str) -> Extension:
        sources = [str(path.relative_to(ROOT)) for pattern in patterns for path in sorted(ROOT.glob(pattern))]
        return Extension(f"genperf._{name}", sources)

    cpu = [library(f"cpu_{isa.replace('-', '_')}", "csrc/library.cpp", "csrc/cpu/**/*.cpp") for isa in ISAS]
    cuda = [library(name, "csrc/cuda/*.cpp", "csrc/cuda/*.cu") for name in CUDA_COMPILERS]
    return [library("probe", "csrc/probe.cpp"), *cpu, *cuda]


def compiler_version() -> str:
    name = shlex.split(CXX)[-1]
    stated = subprocess.run([*shlex.split(CXX), "--version"], capture_output=True, text=True).stdout.splitlines()
    return stated[0] if stated else name


def find_ninja() -> str:
    """The program of the package ninja, or where that is not from PyPI, the one on PATH."""
    try:
        from ninja import BIN_DIR

        return str(Path(BIN_DIR) / "ninja")
    except ImportError:
        if found := shutil.which("ninja"):
            return found
        sys.exit("genperf: the build needs ninja: `pip install ninja`, or build without --no-build-isolation.")


class Graph:
    """Writes a file for ninja."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def _write(self, first_line: str, variables: dict[str, str]) -> None:
        self.file.write(f"{first_line}\n" + "".join(f"  {name} = {value}\n" for name, value in variables.items()))

    def rule(self, name: str, command: str, **variables: str) -> None:
        self._write(f"rule {name}", {"command": command, **variables})

    def build(self, target: str, rule: str, inputs: list[str], variables: dict[str, str]) -> None:
        target, *inputs = (re.sub(r"([$ :])", r"$\1", path) for path in (target, *inputs))
        self._write(f"build {target}: {rule} {' '.join(inputs)}", variables)


class NinjaBuild(build_ext):
    def get_ext_filename(self, name: str) -> str:
        return super().get_ext_filename(name).replace(sysconfig.get_config_var("EXT_SUFFIX"), ".so")

    def run(self) -> None:
        package = Path(self.get_ext_fullpath("genperf._probe")).resolve().parent
        package.mkdir(parents=True, exist_ok=True)
        # Read at import; the libraries themselves do not tell.
        build_info = {
            "cpu_omission": CPU_OMISSION, "isas": [] if CPU_OMISSION else ISAS, "cuda_omission": CUDA_OMISSION, "cuda_archs": CUDA_ARCHS,
            "torch": TORCH and TORCH.version, "compiler": None if CPU_OMISSION else compiler_version(),
        }  # fmt: skip
        (package / "_build_info.json").write_text(json.dumps(build_info, indent=1) + "\n")
        if not self.editable_mode and not self.inplace:  # a folder of an earlier build may hold libraries that this one leaves out
            built = [] if CPU_OMISSION else [self.get_ext_filename(extension.name.split(".")[-1]) for extension in self.extensions]
            for library in package.glob("_*.so"):
                if library.name not in built:
                    library.unlink()
        if CPU_OMISSION:
            print(f"genperf: installed without compiled kernels: {CPU_OMISSION}.", file=sys.stderr)
            return
        ninja = find_ninja()
        build = ROOT / "build" / "editable" if self.editable_mode else Path(self.build_temp).resolve()  # pip's folder is new each time
        build.mkdir(parents=True, exist_ok=True)
        optimize = "-O3 -DNDEBUG" if os.environ.get("DEBUG", "0") in ("", "0") else "-O0 -g"
        common = f"-std=c++20 {optimize} -fPIC -I{shlex.quote(str(ROOT / 'csrc'))} -DTORCH_TARGET_VERSION=0x020b000000000000"
        torch_headers = f"-isystem {shlex.quote(str(TORCH.folder / 'include'))}"
        warnings = f"-Wall -Wextra -fvisibility=hidden -ffp-contract=off {os.environ.get('CXXFLAGS', '')}"
        # libtorch leads to torch's CUDA library where there is one, though nothing in it is named at link time.
        lib = build / "lib" if CROSS else TORCH.folder / "lib"
        torch_libraries = f"-L{shlex.quote(str(lib))} -Xlinker --no-as-needed -ltorch -ltorch_cpu"
        if CROSS:  # torch here is of another processor: libraries without symbols lead to the one of the target
            lib.mkdir(exist_ok=True)
            for name in ("libtorch.so", "libtorch_cpu.so"):
                stub = [*shlex.split(CXX), "-shared", f"-Wl,-soname,{name}", "-x", "c++", os.devnull, "-o", str(lib / name)]
                subprocess.run(stub, check=True)

        with open(build / "build.ninja", "w") as file:
            graph = Graph(file)
            depends = {"depfile": "$out.d", "deps": "gcc"}
            graph.rule("cxx", f"{CXX} -MMD -MF $out.d {common} {warnings} $flags -c $in -o $out", description="$out", **depends)
            graph.rule("link", f"{CXX} -shared $in -o $out $libraries {os.environ.get('LDFLAGS', '')}", description="$out")
            if CUDA_COMPILERS:
                nvcc = f"$nvcc -MMD -MF $out.d {common.replace('-fPIC', '-Xcompiler -fPIC')} $gencode"
                graph.rule("nvcc", f"{nvcc} -ccbin {shlex.split(CXX)[-1]} -c $in -o $out", description="$out", **depends)
                # A wheel uses the CUDA runtime of torch: the static one needs glibc 2.34 from the system that links it.
                runtime = " -cudart shared" if CUDA_HOMES else ""
                nvlink = f"$nvcc -ccbin {shlex.split(CXX)[-1]} -shared{runtime} $in -o $out $libraries"
                graph.rule("nvlink", nvlink, description="$out")
            for extension in self.extensions:
                name = extension.name.removeprefix("genperf._")
                isa = name.removeprefix("cpu_").replace("_v", "-v").replace("x86_64", "x86-64")
                flags = "" if name == "probe" else torch_headers
                flags += f" -march={isa}" if X86 and name.startswith("cpu_") else ""
                objects = {source: str(build / name / f"{source}.o") for source in extension.sources}
                nvcc = CUDA_COMPILERS.get(name)
                variables = {"flags": flags}
                if nvcc:
                    variables.update(nvcc=shlex.quote(nvcc), gencode=gencode_flags(CUDA_ARCHS[name]))
                for source, target in objects.items():
                    graph.build(target, "nvcc" if source.endswith(".cu") else "cxx", [str(ROOT / source)], variables=variables)
                target = str(Path(self.get_ext_fullpath(extension.name)).resolve())
                variables["libraries"] = "" if name == "probe" else torch_libraries
                graph.build(target, "nvlink" if nvcc else "link", list(objects.values()), variables=variables)
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        if subprocess.run([ninja, "-C", build, *jobs]).returncode:
            sys.exit("genperf: the build failed; the compiler's message is above.")
        cuda = f"without CUDA kernels: {CUDA_OMISSION}" if CUDA_OMISSION else "with CUDA kernels for "
        cuda += "; ".join(f"{', '.join(archs)}{f' in {name}' if CUDA_HOMES else ''}" for name, archs in CUDA_ARCHS.items())
        print(f"genperf: built with CPU kernels for {', '.join(ISAS)}; {cuda}.", file=sys.stderr)


class PlatformWheel(bdist_wheel):
    """One wheel for every Python: nothing in the libraries depends on it."""

    def get_tag(self) -> tuple[str, str, str]:
        platform_tag = f"linux_{MACHINE}" if CROSS else super().get_tag()[2]
        return ("py3", "none", "any" if CPU_OMISSION else platform_tag)


TORCH = find_torch()
CPU_OMISSION = cpu_omission()
NVCC = None if CPU_OMISSION else find_nvcc()
CUDA_OMISSION = CPU_OMISSION or cuda_omission(NVCC)
CUDA_COMPILERS = {} if CUDA_OMISSION else cuda_compilers()
CUDA_ARCHS = {name: cuda_archs(nvcc) for name, nvcc in CUDA_COMPILERS.items()}

setup(ext_modules=libraries(), cmdclass={"build_ext": NinjaBuild, "bdist_wheel": PlatformWheel})
