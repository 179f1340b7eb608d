# SPDX-License-Identifier: Apache-2.0
"""README.md and docs/: code blocks run, links lead to files, and what is public is on a page."""

import ast
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import genperf

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))

# A fenced block; `kind` is what follows the opening backquotes.
BLOCK = re.compile(r"^```(?P<kind>[^\n]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
LICENSE = re.compile(r"(#!.*\n)?(#|//) SPDX-License-Identifier: Apache-2\.0\n")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def python_blocks(page, kind):
    """Code objects of the page's blocks of a kind, compiled so that a traceback names the line of the page."""
    text = page.read_text()
    for match in BLOCK.finditer(text):
        if match["kind"] == kind:
            lines_above = text[: match.start("code")].count("\n")
            yield compile("\n" * lines_above + match["code"], str(page), "exec")


def shell_commands(page):
    for match in BLOCK.finditer(page.read_text()):
        if match["kind"] == "sh":
            for line in match["code"].replace("\\\n", " ").splitlines():
                yield from line.split("&&")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for block in python_blocks(page, "python"):
        exec(block, namespace)
    assert all(python_blocks(page, "python no-run"))  # they compile


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_example_runs(example, tmp_path):
    result = subprocess.run([sys.executable, example], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_have_these_options(page):
    from genperf.cli.main import _parser

    for command in shell_commands(page):
        words = shlex.split(command, comments=True)
        if "genperf" in words and words[0] in ("genperf", "torchrun", "python"):
            _parser().parse_args(words[words.index("genperf") + 1 :])


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_lead_to_files(page):
    text = re.sub(r"`[^`\n]*`", "", BLOCK.sub("", page.read_text()))
    links = [link.split("#") for link in LINK.findall(text) if "://" not in link]
    targets = [(page.parent / path if path else page, anchor) for path, *anchor in links]
    missing = [path for path, _ in targets if not path.exists()]
    assert not missing
    without_heading = [(path.name, *anchor) for path, anchor in targets if anchor and anchor[0] not in anchors(path)]
    assert not without_heading


def anchors(page):
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= 120


def code_of(page):
    text = page.read_text()
    return [match["code"] for match in BLOCK.finditer(text)] + re.findall(r"`([^`\n]+)`", BLOCK.sub("", text))


def test_every_public_name_is_on_a_page():
    mentioned = set(re.findall(r"\w+", "\n".join(code for page in PAGES for code in code_of(page))))
    modules = (genperf, genperf.nn, genperf.losses, genperf.metrics, genperf.models)
    names = [(module.__name__, name) for module in modules for name in module.__all__ if not name.startswith("__")]
    # systems.md explains once that XConfig is the configuration of X.
    missing = [f"{module}.{name}" for module, name in names if name.removesuffix("Config") not in mentioned]
    assert not missing


def variables_read(path):
    """Names of the environment variables that a source file reads."""
    if path.suffix != ".py":
        return set(re.findall(r'getenv\("(\w+)"\)', path.read_text()))
    text = path.read_text()
    if "environ" not in text and "getenv" not in text:
        return set()
    names = set()
    for node in ast.walk(ast.parse(text)):
        name = None
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("os.environ.get", "os.environ.setdefault", "os.getenv"):
            name = node.args[0]
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load) and ast.unparse(node.value) == "os.environ":
            name = node.slice
        elif isinstance(node, ast.Compare) and ast.unparse(node.comparators[0]) == "os.environ":
            name = node.left
        if name is not None:
            assert isinstance(name, ast.Constant), f"{path}:{node.lineno} reads a variable whose name is not a literal"
            names.add(name.value)
    return names


def sources(*folders):
    return [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".cpp", ".h", ".cu")]


def test_every_environment_variable_is_on_its_page():
    read = set().union(*map(variables_read, [ROOT / "setup.py", *sources("genperf", "kernels", "benchmarks", "csrc")]))
    rows = re.findall(r"^\| (`.+?) \|", (ROOT / "docs" / "environment.md").read_text(), re.MULTILINE)
    listed = [name for row in rows for name in re.findall(r"\w+", row)]
    assert len(listed) == len(set(listed))
    assert read == set(listed)


def test_every_source_file_names_the_license():
    paths = [ROOT / "setup.py", *sources("genperf", "kernels", "benchmarks", "csrc", "tests")]
    without = [str(path.relative_to(ROOT)) for path in paths if not LICENSE.match(path.read_text())]
    assert len(paths) > 400
    assert not without


@pytest.mark.parametrize("layer", [name for name in genperf.nn.__all__ if name.endswith("Quantizer")])
def test_every_option_of_a_quantizer_is_on_a_page(layer):
    mentioned = set(re.findall(r"\w+", "\n".join(code_of(ROOT / "docs" / "quantization.md") + code_of(ROOT / "docs" / "sampling.md"))))
    usual = {"dim", "num_codes", "num_bits", "levels"}  # their shapes are in every example
    assert set(inspect.signature(getattr(genperf.nn, layer)).parameters) - usual <= mentioned
