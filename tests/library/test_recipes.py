# SPDX-License-Identifier: Apache-2.0
"""The recipes for conda and for the Hugging Face Hub name what the sources have."""

import ast
import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    runpy.run_path(str(RECIPES / "huggingface" / "assemble.py"))["assemble"](folder)
    return folder


def test_kernel_of_the_hub_imports_only_what_it_may(project):
    package = project / "torch-ext" / "genperf"
    allowed = {*sys.stdlib_module_names, "torch", "triton"}
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.partition(".")[0] for alias in node.names} <= allowed, path
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert (node.module or "").partition(".")[0] in allowed, path
            elif isinstance(node, ast.ImportFrom) and node.module not in (None, "_ops"):  # kernel-builder writes _ops
                inside = path.parents[node.level - 1].joinpath(*node.module.split("."))
                assert inside.is_dir() or inside.with_suffix(".py").exists(), f"{path} imports {node.module}"


def test_kernel_of_the_hub_names_no_fixed_namespace(project):
    for path in (project / "torch-ext").rglob("*.py"):
        code = ast.unparse(ast.parse(path.read_text()))
        assert not re.search(r"ops\.genperf|genperf::", re.sub(r"'''.*?'''|\"\"\".*?\"\"\"", "", code, flags=re.DOTALL)), path
    for path in (project / "csrc").rglob("*.*"):
        assert '"genperf::' not in path.read_text(), path


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_build_file_names_every_source(project):
    import tomllib

    config = tomllib.loads((project / "build.toml").read_text())
    named = [*config["torch"]["src"], *(source for kernel in config["kernel"].values() for source in kernel["src"])]
    sources = [path for path in (project / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu")]
    assert set(named) == {str(path.relative_to(project)) for path in sources} | {"torch-ext/torch_binding.cpp"}
