# SPDX-License-Identifier: Apache-2.0
"""Writes a project of Hugging Face's kernel-builder from the sources: python recipes/huggingface/assemble.py FOLDER [--build]

A kernel of the Hub is loaded from any path, beside other versions of itself. So its Python code has relative imports only, and its ops are
registered in a namespace of each build, which `_ops`, made by kernel-builder, names.
"""

import argparse
import ast
import json
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECIPE = Path(__file__).parent
# The macro changes the namespace of the ops and that of C++: each version of the kernel keeps its functions to itself.
CUDA_FLAGS = ("-std=c++20", "-Dgenperf=TORCH_EXTENSION_NAME")
CXX_FLAGS = (*CUDA_FLAGS, "-ffp-contract=off")
CPU_FLAGS = (*CXX_FLAGS, "-march=x86-64-v3")
BINDING = """// SPDX-License-Identifier: Apache-2.0
#include "registration.h"

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
"""
INIT = '''# SPDX-License-Identifier: Apache-2.0
"""Compiled kernels for VQ-VAEs, VAEs and GANs: the ops of genperf as a kernel of the Hugging Face Hub."""

import torch

if torch.version.cuda is None and not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
    raise ImportError("this kernel needs a processor with AVX2; the Python package genperf has kernels for others.")

from ._version import __version__  # noqa: E402
from .ops import *  # noqa: E402, F403

__all__ = {names!r}
'''


def portable(text: str, package: str) -> str:
    """A module of genperf with relative imports and the namespace of `_ops`; `package` leads up to the package's root ("..")."""
    text = re.sub(r"from genperf import _library", f"from {package} import _library", text)
    text = re.sub(r"from genperf\.kernels", f"from {package}kernels", text)
    text = re.sub(r'f"genperf::\{op\}"', "add_op_namespace_prefix(op)", text)
    text = re.sub(r'"genperf::(\w+)"', r'add_op_namespace_prefix("\1")', text)
    text = text.replace("torch.ops.genperf", "compiled_ops")
    imports = [f"from {package}_ops import ops as compiled_ops"] if "compiled_ops" in text else []
    imports += [f"from {package}_ops import add_op_namespace_prefix"] if "add_op_namespace_prefix(" in text else []
    if imports:
        text = re.sub(
            r"^import torch\n", lambda found: found[0] + "".join(f"{line}\n" for line in imports), text, count=1, flags=re.MULTILINE
        )
    return text


def imported(paths: list[Path], level: int) -> set[str]:
    """The modules at the root of the package that these modules import with so many dots."""
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text()))]
    return {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and node.level == level}


def needed_modules() -> set[str]:
    """The modules beside the ops that these need, and what those need."""
    needed, found = {"_version"}, imported(list((ROOT / "genperf" / "ops").glob("*.py")), 2)
    while found := {name for name in found if (ROOT / "genperf" / f"{name}.py").exists()} - needed - {"_library"}:
        needed |= found
        found = imported([ROOT / "genperf" / f"{name}.py" for name in found], 1)
    return needed


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def public_ops() -> list[str]:
    for node in ast.parse((ROOT / "genperf" / "ops" / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    raise AssertionError("genperf/ops/__init__.py has no __all__")


def toml(**values: object) -> str:
    """Lines of TOML; lists and strings are written as JSON has them."""
    return "".join(f"{name.replace('_', '-')} = {json.dumps(value, indent=2)}\n" for name, value in values.items())


def assemble(folder: Path) -> None:
    shutil.copytree(ROOT / "csrc", folder / "csrc", ignore=shutil.ignore_patterns("probe.cpp"))
    for source in (folder / "csrc").rglob("*.cpp"):
        text = source.read_text()
        if '"genperf::' in text:  # the name of an op, which the macro does not reach
            source.write_text(text.replace('"genperf::', 'C10_STRINGIZE(genperf) "::'))
    package = folder / "torch-ext" / "genperf"
    for name in needed_modules():
        write(package / f"{name}.py", (ROOT / "genperf" / f"{name}.py").read_text())
    for path in (ROOT / "genperf" / "ops").glob("*.py"):
        write(package / "ops" / path.name, portable(path.read_text(), ".."))
    for path in (ROOT / "kernels").rglob("*.py"):
        inside = path.relative_to(ROOT / "kernels")
        write(package / "kernels" / inside, portable(path.read_text(), "." * (len(inside.parts) + 1)))
    shutil.copy(RECIPE / "_library.py", package / "_library.py")
    write(package / "__init__.py", INIT.format(names=["__version__", *public_ops()]))
    write(folder / "torch-ext" / "torch_binding.cpp", BINDING)
    for path in (ROOT / "LICENSE", RECIPE / "flake.nix", RECIPE / "CARD.md"):
        shutil.copy(path, folder)

    def files(*patterns: str) -> list[str]:
        return sorted(str(path.relative_to(folder)) for pattern in patterns for path in folder.glob(pattern))

    shared = files("csrc/*.h")
    write(
        folder / "build.toml",
        "[general]\n"
        + toml(name="genperf", version=0, edition=5, license="Apache-2.0", backends=["cpu", "cuda"])
        + "\n[torch]\n"
        + toml(src=["csrc/library.cpp", "torch-ext/torch_binding.cpp"], include=["csrc"], cxx_flags=CXX_FLAGS)
        + "\n[torch.stable-abi]\n"
        + toml(cpu="2.11", cuda="2.11")
        + "\n[kernel.genperf_cpu]\n"
        + toml(backend="cpu", depends=["torch"], include=["csrc"], cxx_flags=CPU_FLAGS)
        + toml(src=[*shared, *files("csrc/cpu/**/*.h", "csrc/cpu/**/*.cpp")])
        + "\n[kernel.genperf_cuda]\n"
        + toml(backend="cuda", depends=["torch"], include=["csrc"], cxx_flags=CXX_FLAGS, cuda_flags=CUDA_FLAGS)
        + toml(src=[*shared, *files("csrc/cuda/*.h", "csrc/cuda/*.cpp", "csrc/cuda/*.cu")]),
    )


REGISTRATION = """#pragma once
#include <Python.h>
#define GENPERF_TEXT_(x) #x
#define GENPERF_TEXT(x) GENPERF_TEXT_(x)
#define GENPERF_INIT_(x) PyInit_##x
#define GENPERF_INIT(x) GENPERF_INIT_(x)
#define REGISTER_EXTENSION(NAME)                                                                 \\
  PyMODINIT_FUNC GENPERF_INIT(NAME)(void) {                                                      \\
    static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, GENPERF_TEXT(NAME), nullptr, 0};  \\
    return PyModule_Create(&module);                                                             \\
  }
"""
OPS = """import torch

from . import {name}

ops = torch.ops.{name}


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{name}::{{op_name}}"
"""


def build(folder: Path, unique: str, jobs: int) -> Path:
    """Build the variant of the CPU as kernel-builder does, with the compiler of this machine; returns its folder."""
    import torch

    name = f"_genperf_cpu_{unique}"
    work = folder / "work" / unique
    write(work / "registration.h", REGISTRATION)
    sources = [
        folder / "csrc" / "library.cpp",
        folder / "torch-ext" / "torch_binding.cpp",
        *sorted((folder / "csrc" / "cpu").rglob("*.cpp")),
    ]
    torch_folder = Path(torch.__file__).parent
    options = [f"-I{folder / 'csrc'}", f"-I{work}", f"-I{sysconfig.get_path('include')}", f"-isystem{torch_folder / 'include'}"]
    options += ["-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-DCPU_KERNEL", f"-DTORCH_EXTENSION_NAME={name}"]
    options += ["-DPy_LIMITED_API=0x03090000", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-include", f"{folder}/csrc/glibc_2_28.h"]
    variant = folder / "build" / unique / "genperf"
    shutil.copytree(folder / "torch-ext" / "genperf", variant)
    write(variant / "_ops.py", OPS.format(name=name))
    library = variant / f"{name}.abi3.so"
    rules = f"rule cxx\n  command = g++ {' '.join(options)} $flags -c $in -o $out\n  description = $out\n"
    rules += f"rule link\n  command = g++ -shared $in -o $out -L{torch_folder / 'lib'} -Xlinker --no-as-needed -ltorch -ltorch_cpu\n"
    objects = []
    for source in sources:
        objects.append(f"{source.relative_to(folder)}.o")
        flags = CPU_FLAGS if "cpu" in source.relative_to(folder).parts else CXX_FLAGS
        rules += f"build {objects[-1]}: cxx {source}\n  flags = {' '.join(flags)}\n"
    write(work / "build.ninja", f"{rules}build {library}: link {' '.join(objects)}\n")
    subprocess.run(["ninja", "-C", str(work), f"-j{jobs}"], check=True)
    return variant


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="must not exist")
    parser.add_argument("--build", nargs="+", metavar="ID", help="build the variant of the CPU here, once for each of these identifiers")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    if folder.exists():
        sys.exit(f"{folder} exists.")
    assemble(folder)
    for unique in arguments.build or ():
        print(build(folder, unique, arguments.jobs))


if __name__ == "__main__":
    main()
