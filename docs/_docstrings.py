"""An extension of griffe: indented code of docstrings, such as that of "Equivalent to:", is set as code, and choices are spelled out."""

import re
import textwrap
from pathlib import Path

import griffe

ROOT = Path(__file__).parents[1]

SECTIONS = re.compile(r"(Args|Attributes|Returns|Raises|Yields|Shape|Example|Examples):$")


def fence_code(text: str) -> str:
    lines = text.expandtabs().splitlines()
    fenced: list[str] = []
    place = 0
    while place < len(lines):
        line = lines[place]
        fenced.append(line)
        place += 1
        if not line.endswith(":") or line.startswith(" ") or SECTIONS.match(line):
            continue
        end = place
        while end < len(lines) and (not lines[end].strip() or lines[end].startswith("    ")):
            end += 1
        block = textwrap.dedent("\n".join(lines[place:end])).strip("\n")
        if block:
            # A colon at the end of a line that a block follows would make it a section.
            fenced[-1] = line + "<!-- -->"
            fenced += ["", "```python", block, "```", ""]
            place = end
    return "\n".join(fenced)


# The types of keyword arguments that choose, under the names that the sources use.
CHOICES = dict(re.findall(r"^(\w+) = (Literal\[.+\])$", (ROOT / "genperf" / "_choices.py").read_text(), re.MULTILINE))


def spelled_out(annotation: str | griffe.Expr | None) -> str | griffe.Expr | None:
    """The annotation with the values that can be chosen in place of the name of their type."""
    words = set(re.findall(r"\w+", str(annotation)))
    return re.sub(r"\w+", lambda word: CHOICES.get(word[0], word[0]), str(annotation)) if words & CHOICES.keys() else annotation


class Reference(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring:
            obj.docstring.value = fence_code(obj.docstring.value)
        if isinstance(obj, griffe.Function):
            for parameter in obj.parameters:
                parameter.annotation = spelled_out(parameter.annotation)
        if isinstance(obj, griffe.Attribute):
            obj.annotation = spelled_out(obj.annotation)
