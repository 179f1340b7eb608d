"""Initialization from data, which torch.compile leaves to Python.

Imported only when it is needed: it loads torch._dynamo, which takes a second.
"""

from typing import Protocol

import torch
from torch import Tensor

_REASON = "codes start from data: call init_codes, or take the first training step, without torch.compile"


class StartsFromData(Protocol):
    """A layer that sets its codes from the vectors of its first training step."""

    def init_in_first_step(self, vectors: Tensor, valid: Tensor | None) -> None: ...


@torch.compiler.disable(reason=_REASON)
def init_in_first_step(layer: StartsFromData, vectors: Tensor, valid: Tensor | None) -> None:
    layer.init_in_first_step(vectors, valid)
