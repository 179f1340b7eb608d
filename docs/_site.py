"""Hooks of mkdocs: pages of the API reference, one for each public package, and the Markdown files outside of docs/."""

import ast
import functools
import json
import logging
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
log = logging.getLogger("mkdocs.plugins.genperf")  # a warning of mkdocs' loggers is an error of a strict build
PACKAGES = {
    "genperf.ops": ("Ops", ""),
    "genperf.nn": ("Layers", ""),
    "genperf.losses": ("Losses", ""),
    "genperf.metrics": ("Metrics", ""),
    "genperf.models": ("Models", ""),
    "genperf.clustering": ("Clustering", "[Guide](../clustering.md)."),
    "genperf._patch": ("Patching", "`genperf.patch` and `genperf.unpatch`. [Guide](../patch.md)."),
    "genperf.compat.vector_quantize_pytorch": ("vector-quantize-pytorch", "[What works, and what differs](../drop-ins.md)."),
    "genperf.compat.taming": ("taming-transformers", "[What works, and what differs](../drop-ins.md)."),
    "genperf.compat.diffusers": ("diffusers", "[What works, and what differs](../drop-ins.md)."),
    "genperf.compat.pytorch_fid": ("pytorch-fid", "[What works, and what differs](../drop-ins.md)."),
    "genperf.compat.torcheval": ("torcheval", "[What works, and what differs](../drop-ins.md)."),
    "genperf.compat.torchmetrics": ("torchmetrics", "[What works, and what differs](../drop-ins.md)."),
}
# A name of the library is looked for more often than the model or the drop-in that mentions it.
SEARCH_BOOSTS = {"nn": 4, "ops": 2, "losses": 2, "metrics": 2}
OUTSIDE = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "recipes/*/README.md",
    "benchmarks/results/*.md",
    "benchmarks/results/**/*.png",
)


def example_page(path: Path) -> str:
    """An example program as a page, below the first sentence of its docstring."""
    text = path.read_text()
    title = (ast.get_docstring(ast.parse(text)) or path.stem).partition("\n")[0].rstrip(".")
    return f"# {title}\n\n```python\n{text}```\n"


@functools.cache
def syntax_of(module: str) -> ast.Module:
    folder = ROOT / module.replace(".", "/")
    return ast.parse((folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")).read_text())


def public_names(module: str) -> list[str]:
    """`__all__` of a module, without an import."""
    tree = syntax_of(module)
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return [node.name for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_")]


def imported_from(module: str) -> str:
    return "genperf" if module in ("genperf.ops", "genperf._patch") else module


def first_line(module: str, name: str) -> str:
    """The first line of the docstring of a name that the module defines or imports from a module of its package."""
    is_package = (ROOT / module.replace(".", "/")).is_dir()
    for node in reversed(syntax_of(module).body):  # overloads, which have no docstring, come first
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
            return (ast.get_docstring(node) or "").partition("\n")[0]
        if isinstance(node, ast.ImportFrom) and node.level and name in [alias.name for alias in node.names]:
            above = node.level - is_package
            package = module.split(".")[: -above if above else None]
            return first_line(".".join([*package, *(node.module or "").split(".")]), name)
    return ""


def identifier(module: str, name: str) -> str:
    # In a package, a name may be that of the module that defines it.
    defined_in = f"{module}.{name}" if (ROOT / module.replace(".", "/") / f"{name}.py").exists() else module
    return f"{defined_in}.{name}"


def summary(module: str) -> str:
    """A table of the entries, each with what it is."""
    rows = (f"| [`{name}`][{identifier(module, name)}] | {first_line(module, name)} |" for name in public_names(module))
    return "\n".join(["| | |", "|---|---|", *rows]) + "\n\n"


def entry(module: str, name: str) -> str:
    """An entry of the reference, under the name that users import."""
    return f"::: {identifier(module, name)}\n    options:\n      heading: {imported_from(module)}.{name}\n      toc_label: {name}\n\n"


def notebook_page(path: Path) -> str:
    """The cells of a notebook as Markdown, with a link to the notebook below the title."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    title, _, rest = parts[0].partition("\n")
    return "\n\n".join([title, f"[Open as a notebook]({path.name})", rest.strip(), *parts[1:]])


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for module, (title, text) in PACKAGES.items():
        entries = "".join(entry(module, name) for name in public_names(module))
        page = f"api/{module.removeprefix('genperf.').replace('.', '-')}.md"
        files.append(File.generated(config, page, content=f"# {title}: `{imported_from(module)}`\n\n{text}\n\n{summary(module)}{entries}"))
    for path in sorted(ROOT.glob("docs/tutorials/*.ipynb")):
        files.append(File.generated(config, f"tutorials/{path.stem}.md", content=notebook_page(path)))
    for path in sorted(ROOT.glob("docs/examples/*.py")):
        files.append(File.generated(config, f"examples/{path.stem}.md", content=example_page(path)))
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, str(path.relative_to(ROOT)), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links out of docs/ lead to the copies; links into docs/ from them lose their folder; fences name only their language.

    Links to notebooks and examples lead to their pages.
    """
    markdown = re.sub(r"^(```\w+) no-run$", r"\1", markdown, flags=re.MULTILINE)  # what the tests of the pages do not run
    if page.file.src_uri.startswith("benchmarks/"):
        page.meta["search"] = {"exclude": True}  # tables of numbers under the names of all ops
    elif page.file.src_uri.startswith("api/"):
        page.meta["search"] = {"boost": SEARCH_BOOSTS.get(page.file.name, 0.5)}
    markdown = re.sub(r"(\]\((?:\.\./)*(?:docs/)?tutorials/[\w-]+)\.ipynb\)", r"\1.md)", markdown)
    markdown = re.sub(r"(\]\(examples/\w+)\.py\)", r"\1.md)", markdown)
    if page.is_homepage:
        page.meta["hide"] = ["navigation"]  # the tabs lead on
    outside = page.file.abs_src_path is not None and not page.file.abs_src_path.startswith(config.docs_dir)
    if outside:
        up = "../" * page.file.src_uri.count("/")
        return re.sub(r"\]\((\.\./)*docs/", f"]({up}", markdown)
    return markdown.replace("](../", "](") if page.file.src_uri.count("/") == 0 else markdown


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> None:
    if re.search(r"<p>```|<p>\|", html):
        log.warning(f"{page.file.src_uri} has a code block or a table that is read as text.")
