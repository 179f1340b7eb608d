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
DEFAULT_CUDA_ARCHS = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")  # those that nvcc knows, and PTX of the last of them
CUDA_HOME = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
X86 = platform.machine() in ("x86_64", "AMD64")
ISAS = os.environ.get("GENPERF_BUILD_ISAS", "x86-64 x86-64-v3 x86-64-v4").split() if X86 else ["native"]

if "sdist" not in sys.argv:
    try:
        import ninja
        import pybind11
        import torch
        from ninja.ninja_syntax import Writer
        from torch.utils import cpp_extension
    except ImportError as error:
        sys.exit(
            f"genperf compiles against the torch that will run it, and {error.name!r} cannot be imported by this build: install "
            "torch>=2.11, setuptools, ninja and pybind11 first, then run `pip install --no-build-isolation .`."
        )


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME or CUDA_PATH; if neither is set, of PATH, or of the toolkit that torch or the system has."""
    if CUDA_HOME:
        return shutil.which("nvcc", path=f"{CUDA_HOME}/bin")
    homes = [home for home in (cpp_extension.CUDA_HOME, "/usr/local/cuda") if home]
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(f"{home}/bin" for home in homes))


def cuda_omission(nvcc: str | None) -> str | None:
    """Why this build leaves out the CUDA kernels, or None."""
    choice = os.environ.get("GENPERF_CUDA", "auto")
    if choice not in ("0", "1", "auto"):
        sys.exit(f"genperf: GENPERF_CUDA must be 0, 1 or auto, got {choice!r}.")
    if choice == "0":
        return "GENPERF_CUDA=0 was set"
    if choice == "auto" and torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    wanted = (torch.version.cuda or "").split(".")[0]  # with a torch without CUDA, any toolkit
    toolkit = f"CUDA toolkit {wanted}" if wanted else "a CUDA toolkit"
    if nvcc is None:
        searched = f"in {CUDA_HOME}/bin" if CUDA_HOME else "on PATH or in /usr/local/cuda/bin"
        reason = f"no nvcc {searched}; install {toolkit} or name its folder in CUDA_HOME"
    else:
        found = re.search(r"release (\d+)\.(\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
        if not found:
            reason = f"`{nvcc} --version` names no release; name the folder of {toolkit} in CUDA_HOME"
        elif wanted not in ("", found[1]):
            reason = (
                f"nvcc {found[1]}.{found[2]} does not match torch's CUDA {torch.version.cuda}; name the folder of {toolkit} in CUDA_HOME"
            )
        else:
            return None
    if choice == "1":
        sys.exit(f"genperf: GENPERF_CUDA=1 cannot be met: {reason}.")
    return reason


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
    cuda = [] if CUDA_OMISSION else [library("cuda", "csrc/cuda/*.cpp", "csrc/cuda/*.cu")]
    return [library("probe", "csrc/probe.cpp"), *cpu, *cuda]


def definition(name: str, value: str) -> str:
    return shlex.quote(f'-D{name}="{value}"')


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
        torch_headers = " ".join(f"-isystem {shlex.quote(path)}" for path in cpp_extension.include_paths())
        torch_folders = " ".join(f"-L{shlex.quote(path)}" for path in cpp_extension.library_paths())
        warnings = f"-Wall -Wextra -fvisibility=hidden -ffp-contract=off {os.environ.get('CXXFLAGS', '')}"
        # libtorch leads to torch's CUDA library where there is one, though nothing in it is named at link time.
        torch_libraries = f"{torch_folders} -Xlinker --no-as-needed -ltorch -ltorch_cpu"
        built = f"{definition('GENPERF_ISAS', ','.join(ISAS))} {definition('GENPERF_TORCH', torch.__version__)}"
        built += f" {definition('GENPERF_CUDA_ARCHS', ','.join(CUDA_ARCHS))} {definition('GENPERF_CUDA_OMISSION', CUDA_OMISSION or '')}"
        built += f" -isystem {shlex.quote(sysconfig.get_path('include'))} -isystem {shlex.quote(pybind11.get_include())}"

        with open(build / "build.ninja", "w") as file:
            graph = Writer(file, width=1000)
            depends = {"depfile": "$out.d", "deps": "gcc"}
            graph.rule("cxx", f"{cxx} -MMD -MF $out.d {common} {warnings} $flags -c $in -o $out", description="$out", **depends)
            graph.rule("link", f"{cxx} -shared $in -o $out $libraries {os.environ.get('LDFLAGS', '')}", description="$out")
            if not CUDA_OMISSION:
                nvcc = f"{NVCC} -MMD -MF $out.d {common.replace('-fPIC', '-Xcompiler -fPIC')} {gencode_flags(CUDA_ARCHS)}"
                graph.rule("nvcc", f"{nvcc} -ccbin {shlex.split(cxx)[-1]} -c $in -o $out", description="$out", **depends)
                graph.rule("nvlink", f"{NVCC} -ccbin {shlex.split(cxx)[-1]} -shared $in -o $out $libraries", description="$out")
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
        cuda = f"without CUDA kernels: {CUDA_OMISSION}" if CUDA_OMISSION else f"with CUDA kernels for {', '.join(CUDA_ARCHS)}"
        print(f"genperf: built with CPU kernels for {', '.join(ISAS)}; {cuda}.", file=sys.stderr)


if "sdist" not in sys.argv:
    NVCC = find_nvcc()
    CUDA_OMISSION = cuda_omission(NVCC)
    CUDA_ARCHS = cuda_archs(NVCC) if NVCC and not CUDA_OMISSION else []

setup(ext_modules=[] if "sdist" in sys.argv else libraries(), cmdclass={"build_ext": NinjaBuild})
