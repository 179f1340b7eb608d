"""What `genperf.patch` has replaced and what it has left."""

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
        rows = [("module", "class", ""), *((name or "(the model)", cls, f"{done} by {by}") for name, cls, by in self.replaced)]
        rows += [(name or "(the model)", cls, f"left: {reason}") for name, cls, reason in self.left]
        if len(rows) == 1:
            return "no quantizer found"
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        return "\n".join(f"{name:{widths[0]}}  {cls:{widths[1]}}  {text}".rstrip() for name, cls, text in rows)
