# SPDX-License-Identifier: Apache-2.0
"""A build that cannot succeed stops with one sentence that says what to do."""

import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from genperf import _library

ROOT = Path(__file__).parents[2]
HOPPER = {"GENPERF_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "8.0;Hopper"}
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


@pytest.mark.parametrize(
    ("sentence", "arguments", "environment"),
    [
        (
            "GENPERF_COMPILE=1 cannot be met: no C++ compiler: 'no-such-compiler' is not on PATH",
            ["setup.py", "build"],
            {"CXX": "no-such-compiler", "GENPERF_COMPILE": "1"},
        ),
        ("GENPERF_COMPILE must be 0, 1 or auto, got 'yes'", ["setup.py", "build"], {"GENPERF_COMPILE": "yes"}),
        ("GENPERF_CUDA=1 cannot be met: no nvcc in /no/such/bin", ["setup.py", "build"], {"GENPERF_CUDA": "1", "CUDA_HOME": "/no/such"}),
        pytest.param("architectures such as 9.0 or 9.0+PTX, got 'Hopper'", ["setup.py", "build"], HOPPER, marks=needs_nvcc),
        ("GENPERF_CUDA must be 0, 1 or auto, got 'yes'", ["setup.py", "build"], {"GENPERF_CUDA": "yes"}),
        (
            "the build failed; the compiler's message is above",
            ["setup.py", "build", "--build-temp", "{tmp}"],
            {"CXXFLAGS": "--no-such-flag"},
        ),
    ],
)
def test_failure_is_one_sentence(sentence, arguments, environment, tmp_path):
    command = [sys.executable, *(argument.format(tmp=tmp_path) for argument in arguments), "--build-lib", str(tmp_path)]
    environment = {**os.environ, "GENPERF_CUDA": "0", **environment}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode != 0
    assert sentence in run.stderr
    assert "Traceback" not in run.stderr


def test_wheels_are_built_beside_the_first_of_several_torches(tmp_path):
    several = "torch==2.13.0 torch==2.11.0 torch"
    command = ["make", "-n", "wheels", f"VENV={tmp_path / 'venv'}", f"TORCH={several}", "PYTHONS=python3.10 python3.13"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.findall(r"pip install -q '(torch.*?)'", run.stdout) == ["torch==2.13.0"]
    assert ".ci/wheels python3.10 python3.13" in run.stdout


NVCC = """#!/bin/sh
case $1 in
  --version) echo Cuda compilation tools, release {release}, V{release}.1 ;;
  --list-gpu-arch) echo {knows} ;;
esac
"""
KNOWS = "compute_75 compute_80 compute_90 compute_100 compute_120"


def add_toolkit(folder, release, knows=KNOWS):
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(NVCC.format(release=release, knows=knows))
    nvcc.chmod(0o755)


@pytest.fixture
def cuda_build(tmp_path, monkeypatch):
    """What setup.py decides with a torch and an nvcc: the reason for leaving CUDA out, the architectures and the nvcc of each library."""

    def decide(torch_cuda, release="13.0", knows=KNOWS, **environment):
        if release:
            add_toolkit(tmp_path / "toolkit", release, knows)
        for name in ("TORCH_CUDA_ARCH_LIST", "GENPERF_CUDA", "GENPERF_CUDA_HOMES", "CUDA_PATH"):
            monkeypatch.delenv(name, raising=False)
        for name, value in {"CUDA_HOME": str(tmp_path / "toolkit"), **environment}.items():
            monkeypatch.setenv(name, value)
        torch = tmp_path / "site" / "torch"
        torch.mkdir(parents=True)
        (torch / "__init__.py").touch()
        (torch / "version.py").write_text(f"__version__ = '2.13.0'\ncuda = {torch_cuda!r}\n")
        monkeypatch.syspath_prepend(tmp_path / "site")
        monkeypatch.setattr("setuptools.setup", lambda **_: None)
        decided = runpy.run_path(str(ROOT / "setup.py"))
        return decided["CUDA_OMISSION"], decided["CUDA_ARCHS"], decided["CUDA_COMPILERS"]

    return decide


@pytest.mark.parametrize(
    ("torch_cuda", "release", "environment", "omission"),
    [
        (None, "13.0", {}, "has no CUDA"),
        ("13.0", "13.2", {"GENPERF_CUDA": "0"}, "GENPERF_CUDA=0 was set"),
        ("13.0", None, {}, "toolkit/bin; install CUDA toolkit 13 or name its folder in CUDA_HOME"),
        ("12.6", "13.0", {}, "nvcc 13.0 does not match torch's CUDA 12.6; name the folder of CUDA toolkit 12 in CUDA_HOME"),
        ("13.0", "13.2", {}, None),
        (None, "12.8", {"GENPERF_CUDA": "1"}, None),
    ],
)
def test_cuda_is_built_or_a_reason_is_kept(torch_cuda, release, environment, omission, cuda_build):
    reason, archs, compilers = cuda_build(torch_cuda, release, **environment)
    assert (reason is None) == (omission is None) == (list(archs) == ["cuda"]) == (list(compilers) == ["cuda"])
    assert omission is None or reason.endswith(omission)


def test_cuda_that_was_asked_for_and_does_not_match_is_an_error(cuda_build):
    with pytest.raises(SystemExit, match=r"GENPERF_CUDA=1 cannot be met: nvcc 13.0 does not match torch's CUDA 12.6"):
        cuda_build("12.6", "13.0", GENPERF_CUDA="1")


@pytest.mark.parametrize(
    ("knows", "archs"),
    [
        ("compute_75 compute_80 compute_86 compute_89 compute_90", ["7.5", "8.0", "8.6", "8.9", "9.0+PTX"]),  # before 12.8
        ("compute_75 compute_80 compute_90 compute_100 compute_120", ["7.5", "8.0", "9.0", "10.0", "12.0+PTX"]),
    ],
)
def test_ptx_of_the_highest_known_architecture_is_built(knows, archs, cuda_build):
    assert cuda_build("13.0", knows=knows)[1] == {"cuda": archs}


@pytest.mark.parametrize("torch_cuda", [None, "12.6"])
def test_a_wheel_has_a_library_for_each_toolkit_with_the_architectures_that_it_knows(torch_cuda, cuda_build, tmp_path):
    add_toolkit(tmp_path / "first", "12.6", "compute_75 compute_80 compute_90")
    add_toolkit(tmp_path / "second", "13.0")
    reason, archs, compilers = cuda_build(torch_cuda, GENPERF_CUDA_HOMES=f"{tmp_path / 'first'}:{tmp_path / 'second'}")
    assert reason is None
    assert archs == {"cuda12": ["7.5", "8.0", "9.0+PTX"], "cuda13": ["7.5", "8.0", "9.0", "10.0", "12.0+PTX"]}
    assert compilers == {"cuda12": str(tmp_path / "first" / "bin" / "nvcc"), "cuda13": str(tmp_path / "second" / "bin" / "nvcc")}


@pytest.mark.parametrize(
    ("releases", "sentence"),
    [(["13.0", "13.2"], "one CUDA toolkit of each major version, got two of 13"), ([None], "there is no nvcc in .*/0/bin")],
)
def test_toolkits_that_make_no_wheel_are_an_error(releases, sentence, cuda_build, tmp_path):
    for index, release in enumerate(releases):
        if release:
            add_toolkit(tmp_path / str(index), release)
    with pytest.raises(SystemExit, match=f"GENPERF_CUDA_HOMES must list .*{sentence}"):
        cuda_build(None, GENPERF_CUDA_HOMES=":".join(str(tmp_path / str(index)) for index in range(len(releases))))


def test_each_library_of_a_wheel_is_built_by_its_toolkit_and_uses_the_runtime_of_torch(tmp_path):
    compiler = tmp_path / "g++"
    compiler.write_text(f"#!/bin/sh\n[ $1 = -dumpmachine ] && echo {platform.machine()}-linux-gnu\n")
    compiler.chmod(0o755)
    for release in ("12.6", "13.0"):
        add_toolkit(tmp_path / release, release, "compute_80 compute_90" if release == "12.6" else KNOWS)
    homes = ":".join(str(tmp_path / release) for release in ("12.6", "13.0"))
    build = [sys.executable, "setup.py", "build", "--build-temp", str(tmp_path), "--build-lib", str(tmp_path / "lib")]
    environment = {name: value for name, value in os.environ.items() if name not in ("TORCH_CUDA_ARCH_LIST", "GENPERF_CUDA")}
    run = subprocess.run(
        build, cwd=ROOT, env={**environment, "CXX": str(compiler), "GENPERF_CUDA_HOMES": homes}, capture_output=True, text=True
    )
    assert "the build failed" in run.stderr  # the compiler makes nothing
    graph = (tmp_path / "build.ninja").read_text()
    assert re.search(r"rule nvlink\n  command = \$nvcc .* -shared -cudart shared ", graph)
    for library, release, archs in (("cuda12", "12.6", [80, 90]), ("cuda13", "13.0", [75, 80, 90, 100, 120])):
        variables = re.search(rf"^build \S+/_{library}\.so: nvlink .*\n((?:  .*\n)+)", graph, re.MULTILINE)[1]
        assert f"nvcc = {tmp_path / release / 'bin' / 'nvcc'}\n" in variables
        assert [int(number) for number in re.findall(r"code=sm_(\d+)", variables)] == archs


WHEEL = {"cuda12": ["9.0+PTX"], "cuda13": ["12.0+PTX"]}


@pytest.mark.parametrize(
    ("libraries", "torch_cuda", "chosen"),
    [
        (["cuda"], "12.8", "cuda"),
        (["cuda"], None, "cuda"),  # built beside a torch without CUDA, for tracing
        ([], "13.0", "cuda"),
        (WHEEL, "12.8", "cuda12"),
        (WHEEL, "13.2", "cuda13"),
        (WHEEL, "14.0", None),
        (WHEEL, None, None),
        (["cuda13"], "12.8", None),
        (["cuda13"], "13.0", "cuda13"),
    ],
)
def test_the_cuda_library_is_that_of_the_major_version_of_torch(libraries, torch_cuda, chosen, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    assert _library._cuda_library(libraries) == chosen


@pytest.mark.parametrize(
    ("torch_cuda", "reason"),
    [
        (None, r"torch \S+ has no CUDA, and .* are for torch with CUDA 12 and 13"),
        ("14.0", "CUDA 12 and 13, and torch .* has CUDA 14.0; re"),
    ],
)
def test_a_wheel_without_a_library_for_the_cuda_of_torch_says_so(torch_cuda, reason, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setitem(_library.build_info, "cuda_archs", WHEEL)
    monkeypatch.setattr(_library, "_load", lambda path: pytest.fail(f"{path} was loaded"))
    assert re.search(reason, _library._load_cuda())


def test_a_wheel_loads_the_library_for_the_cuda_of_torch(monkeypatch, tmp_path):
    loaded = []
    for name in WHEEL:
        (tmp_path / f"_{name}.so").touch()
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setitem(_library.build_info, "cuda_archs", WHEEL)
    monkeypatch.setattr(_library, "library_path", lambda name: tmp_path / f"_{name}.so")
    monkeypatch.setattr(_library, "_load", loaded.append)
    monkeypatch.setattr(_library, "cuda_archs", [])
    assert _library._load_cuda() is None
    assert _library.cuda_archs == ["9.0+PTX"]
    assert [path.name for path in loaded] == ["_cuda12.so"]


def test_listed_architectures_are_built_as_listed(cuda_build):
    assert cuda_build("13.0", TORCH_CUDA_ARCH_LIST="8.6;9.0a")[1] == {"cuda": ["8.6", "9.0a"]}


def test_a_cross_compiler_builds_for_its_target_without_cuda(tmp_path, monkeypatch):
    target = "x86_64" if platform.machine() == "aarch64" else "aarch64"
    compiler = tmp_path / "cross-g++"
    compiler.write_text(f"#!/bin/sh\necho {target}-linux-gnu\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.delenv("GENPERF_BUILD_ISAS", raising=False)
    monkeypatch.setenv("GENPERF_CUDA", "auto")
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    decided = runpy.run_path(str(ROOT / "setup.py"))
    assert decided["ISAS"] == (["aarch64"] if target == "aarch64" else ["x86-64", "x86-64-v3", "x86-64-v4"])
    assert decided["CUDA_OMISSION"] == f"it was cross-compiled for {target}"


def test_no_torch_is_a_reason_to_install_without_compiled_libraries(monkeypatch):
    monkeypatch.setattr("importlib.machinery.PathFinder.find_spec", lambda *_: None)
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    decided = runpy.run_path(str(ROOT / "setup.py"))
    assert decided["CPU_OMISSION"] == "no torch was found when it was built; install torch, then genperf again"


def test_package_without_compiler_installs_and_says_why(tmp_path):
    (tmp_path / "lib" / "genperf").mkdir(parents=True)
    (tmp_path / "lib" / "genperf" / "_cpu_x86_64.so").touch()  # of an earlier build
    build = [sys.executable, "setup.py", "build", "--build-base", str(tmp_path / "build"), "--build-lib", str(tmp_path / "lib")]
    run = subprocess.run(build, cwd=ROOT, env={**os.environ, "CXX": "no-such-compiler"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    reason = "no C++ compiler: 'no-such-compiler' is not on PATH; install g++ 10 or newer or name it in CXX, then install genperf again"
    assert f"genperf: installed without compiled kernels: {reason}." in run.stderr
    assert not list(tmp_path.rglob("*.so"))
    use = "import torch, genperf; print(genperf.nearest_code(torch.eye(3), torch.eye(3)).tolist())"
    run = subprocess.run([sys.executable, "-W", "default", "-c", use], cwd=tmp_path / "lib", capture_output=True, text=True)
    assert run.stdout == "[0, 1, 2]\n", run.stderr
    assert f"genperf is installed without its compiled libraries: {reason}." in run.stderr


NEWER = """
#include <cmath>
#include <iostream>
#include <memory>
__asm__(".globl _ZSt21ios_base_library_initv");  // what <iostream> of GCC 13 and newer has
std::shared_ptr<double[]> logarithms(const std::shared_ptr<int>& n, double x) {
  const std::shared_ptr<int> kept = n;  // counted
  return std::shared_ptr<double[]>(new double[*kept]{std::log(x), std::log2(x), std::exp2(x)});
}
"""


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++") or not shutil.which("nm"), reason="needs g++ and nm, on Linux")
def test_a_wheel_needs_no_newer_system_than_its_tag_says(tmp_path):
    (tmp_path / "newer.cpp").write_text(NEWER)
    header = ["-include", str(ROOT / "csrc" / "glibc_2_28.h")]
    build = ["g++", "-std=c++20", "-shared", "-fPIC", *header, "newer.cpp", "-Wl,-z,defs", "-o", "newer.so"]
    subprocess.run(build, cwd=tmp_path, check=True)
    symbols = subprocess.run(["nm", "--undefined-only", "newer.so"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    newest = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11)}  # those of manylinux_2_28
    needed = re.findall(r"(\w+)@(GLIBC|GLIBCXX|CXXABI)_([\d.]+)", symbols)
    assert "ios_base_library_init" not in symbols
    assert {"log", "log2", "exp2"} <= {name for name, _, _ in needed}
    assert not [name for name, library, version in needed if tuple(map(int, version.split("."))) > newest[library]]
