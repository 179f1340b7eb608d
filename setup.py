"""Builds the compiled libraries with one ninja run: one CPU library per instruction set, the CUDA library, the probe."""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
DEFAULT_CUDA_ARCHS = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"
X86 = platform.machine() in ("x86_64", "AMD64")
ISAS = os.environ.get("GENPERF_BUILD_ISAS", "x86-64 x86-64-v3 x86-64-v4").split() if X86 else ["native"]

if "sdist" not in sys.argv:
    try:
        import ninja
        import pybind11
        import torch
        from ninja.ninja_syntax import Writer
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError as error:
        sys.exit(
            f"genperf compiles against the torch that will run it, and {error.name!r} cannot be imported by this build: install "
            "torch>=2.11, setuptools, ninja and pybind11 first, then run `pip install --no-build-isolation .`."
        )


def find_nvcc() -> str | None:
    return shutil.which("nvcc", path=f"{home}/bin" if (home := os.environ.get("CUDA_HOME")) else None)


def wants_cuda() -> bool:
    choice = os.environ.get("GENPERF_CUDA", "auto")
    if choice not in ("0", "1", "auto"):
        sys.exit(f"genperf: GENPERF_CUDA must be 0, 1 or auto, got {choice!r}.")
    if choice == "1" and not find_nvcc():
        sys.exit("genperf: GENPERF_CUDA=1 needs nvcc, and there is none in CUDA_HOME/bin or on PATH.")
    return choice == "1" or (choice == "auto" and torch.version.cuda is not None and find_nvcc() is not None)


def cuda_archs() -> list[str]:
    chosen = os.environ.get("TORCH_CUDA_ARCH_LIST")
    archs = re.split(r"[; ]+", (chosen or DEFAULT_CUDA_ARCHS).strip("; "))
    if unknown := [arch for arch in archs if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch)]:
        sys.exit(f"genperf: TORCH_CUDA_ARCH_LIST must list architectures such as 9.0 or 9.0+PTX, got {unknown[0]!r}.")
    known = subprocess.run([find_nvcc(), "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    return [arch for arch in archs if chosen or f"compute_{arch.removesuffix('+PTX').replace('.', '')}" in known]


def gencode_flags(archs: list[str]) -> str:
    numbers = [(arch.removesuffix("+PTX").replace(".", ""), arch.endswith("+PTX")) for arch in archs]
    machine_code = [f"-gencode arch=compute_{number},code=sm_{number}" for number, _ in numbers]
    return " ".join(machine_code + [f"-gencode arch=compute_{number},code=compute_{number}" for number, ptx in numbers if ptx])


def libraries() -> list[Extension]:
    def library(name: str, *patterns: str) -> Extension:
        sources = [str(path.relative_to(ROOT)) for pattern in patterns for path in sorted(ROOT.glob(pattern))]
        return Extension(f"genperf._{name}", sources)

    cpu = [library(f"cpu_{isa.replace('-', '_')}", "csrc/library.cpp", "csrc/cpu/**/*.cpp") for isa in ISAS]
    cuda = [library("cuda", "csrc/cuda/*.cpp", "csrc/cuda/*.cu")] if wants_cuda() else []
    return [library("probe", "csrc/probe.cpp"), *cpu, *cuda]


class NinjaBuild(build_ext):
    def get_ext_filename(self, name: str) -> str:
        filename = super().get_ext_filename(name)
        return filename if name.endswith("_probe") else filename.replace(sysconfig.get_config_var("EXT_SUFFIX"), ".so")

    def run(self) -> None:
        cxx = os.environ.get("CXX", "g++")
        if not shutil.which(shlex.split(cxx)[0]):
            sys.exit(f"genperf: no C++ compiler: {cxx!r} is not on PATH; install one or name it in CXX.")
        build = ROOT / "build" / "editable" if self.editable_mode else Path(self.build_temp).resolve()  # pip's folder is new each time
        build.mkdir(parents=True, exist_ok=True)
        optimize = "-O3 -DNDEBUG" if os.environ.get("DEBUG", "0") in ("", "0") else "-O0 -g"
        common = f"-std=c++20 {optimize} -fPIC -I{shlex.quote(str(ROOT / 'csrc'))} -DTORCH_TARGET_VERSION=0x020b000000000000"
        torch_headers = " ".join(f"-isystem {shlex.quote(path)}" for path in include_paths())
        warnings = f"-Wall -Wextra -fvisibility=hidden -ffp-contract=off {os.environ.get('CXXFLAGS', '')}"
        # libtorch leads to torch's CUDA library where there is one, though nothing in it is named at link time.
        torch_libraries = " ".join(f"-L{shlex.quote(path)}" for path in library_paths()) + " -Xlinker --no-as-needed -ltorch -ltorch_cpu"
        built = f'-DGENPERF_ISAS=\\"{",".join(ISAS)}\\" -DGENPERF_TORCH=\\"{torch.__version__}\\"'
        built += f' -DGENPERF_CUDA_ARCHS=\\"{",".join(cuda_archs()) if wants_cuda() else ""}\\"'
        built += f" -isystem {shlex.quote(sysconfig.get_path('include'))} -isystem {shlex.quote(pybind11.get_include())}"

        with open(build / "build.ninja", "w") as file:
            graph = Writer(file, width=1000)
            depends = {"depfile": "$out.d", "deps": "gcc"}
            graph.rule("cxx", f"{cxx} -MMD -MF $out.d {common} {warnings} $flags -c $in -o $out", description="$out", **depends)
            graph.rule("link", f"{cxx} -shared $in -o $out $libraries {os.environ.get('LDFLAGS', '')}", description="$out")
            if wants_cuda():
                nvcc = f"{find_nvcc()} -MMD -MF $out.d {common.replace('-fPIC', '-Xcompiler -fPIC')} {gencode_flags(cuda_archs())}"
                graph.rule("nvcc", f"{nvcc} -ccbin {shlex.split(cxx)[-1]} -c $in -o $out", description="$out", **depends)
                graph.rule("nvlink", f"{find_nvcc()} -ccbin {shlex.split(cxx)[-1]} -shared $in -o $out $libraries", description="$out")
            for extension in self.extensions:
                name = extension.name.removeprefix("genperf._")
                isa = name.removeprefix("cpu_").replace("_v", "-v").replace("x86_64", "x86-64")
                flags = built if name == "probe" else torch_headers
                flags += f" -march={isa}" if X86 and name.startswith("cpu_") else ""
                objects = {source: str(build / name / f"{source}.o") for source in extension.sources}
                for source, target in objects.items():
                    graph.build(target, "nvcc" if source.endswith(".cu") else "cxx", str(ROOT / source), variables={"flags": flags})
                target = str(Path(self.get_ext_fullpath(extension.name)).resolve())
                rule, used = "nvlink" if name == "cuda" else "link", "" if name == "probe" else torch_libraries
                graph.build(target, rule, list(objects.values()), variables={"libraries": used})
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        if subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", build, *jobs]).returncode:
            sys.exit("genperf: the build failed; the compiler's message is above.")


setup(ext_modules=[] if "sdist" in sys.argv else libraries(), cmdclass={"build_ext": NinjaBuild})
