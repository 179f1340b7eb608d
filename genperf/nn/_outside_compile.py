# SPDX-License-Identifier: Apache-2.0
"""What torch.compile leaves to Python: initialization from data, writing to a sharded codebook, losses with a history.

Imported only when it is needed: it loads torch._dynamo, which takes a second.
"""

from collections.abc import Callable
from typing import Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from . import _sharded

_REASON = "codes start from data: call init_codes, or take the first training step, without torch.compile"


Result = TypeVar("Result")


class StartsFromData(Protocol):
    """A layer that sets its codes from the vectors of its first training step."""

    def init_in_first_step(self, vectors: Tensor, valid: Tensor | None) -> None: ...


@torch.compiler.disable(reason=_REASON)
def init_in_first_step(layer: StartsFromData, vectors: Tensor, valid: Tensor | None) -> None:
    layer.init_in_first_step(vectors, valid)


@torch.compiler.disable(reason="FSDP2 shards the codebook, which this step writes to")
def writable_sharded_codes(layer: nn.Module, name: str) -> tuple[Tensor, Callable[[], None]]:
    codes, store = _sharded.writable_codes(layer, name)
    return codes, cast("Callable[[], None]", torch.compiler.disable(store))


@torch.compiler.disable(reason="a loss in training mode keeps its history outside of graphs")
def without_compile(function: Callable[..., Result], *arguments: object) -> Result:
    return function(*arguments)
