# SPDX-License-Identifier: Apache-2.0
"""What `genperf.patch` has replaced and what it has left."""

import re
from dataclasses import dataclass, field
from typing import NamedTuple


class Replaced(NamedTuple):
    """A module whose methods are replaced: its qualified name ("" for the model itself), its class, and what computes in its place."""

    name: str
    cls: str
    by: str


class Left(NamedTuple):
    """A quantizer that is left as it is: its qualified name, its class, and the reason."""

    name: str
    cls: str
    reason: str


@dataclass
class PatchReport:
    """The quantizers of a model. `print(report)` shows them as a table.

    Attributes:
        replaced: in the order of `model.named_modules()`.
        left: quantizers that stay as they are, with the reason.
        dry_run: whether nothing was changed.
    """

    replaced: list[Replaced] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    dry_run: bool = False

    def __str__(self) -> str:
        done = "would be replaced" if self.dry_run else "replaced"
        rows = [(name, cls, f"{done} by {by}") for name, cls, by in self.replaced]
        rows += [(name, cls, f"left: {reason}") for name, cls, reason in self.left]
        if not rows:
            return "no quantizer found"
        # Modules whose names differ in numbers only are one row.
        groups: dict[tuple[str, str, str], list[str]] = {}
        for name, cls, text in rows:
            groups.setdefault((re.sub(r"\d+", "*", name), cls, text), []).append(name or "(the model)")
        lines = [
            (names[0] if len(names) == 1 else f"{pattern} ({len(names)})", cls, text) for (pattern, cls, text), names in groups.items()
        ]
        widths = [max(len(line[column]) for line in lines) for column in range(2)]
        return "\n".join(f"{name:{widths[0]}}  {cls:{widths[1]}}  {text}" for name, cls, text in lines)
