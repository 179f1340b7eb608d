"""An extension of griffe: indented lines of code in docstrings, such as those of "Equivalent to:", are code blocks."""

import re
import textwrap

import griffe

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


class Code(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring:
            obj.docstring.value = fence_code(obj.docstring.value)
