# SPDX-License-Identifier: Apache-2.0
"""How a layer of vector-quantize-pytorch with some of its options is made and called."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer and its calls. What is a function of the library gets `vector_quantize_pytorch` of upstream or of genperf."""

    name: str  # of the class
    options: dict[str, Any] | Callable[[Any], dict[str, Any]]  # of the constructor
    shape: tuple[int, ...]  # of the input
    # Options of forward: the same in each step, or a function of the step.
    call: dict[str, Any] | Callable[[int], dict[str, Any]] = dataclasses.field(default_factory=dict)
    arguments: Callable[[Any], Sequence[Any]] = lambda library: ()  # of a constructor with *arguments
    lr: float = 0.02
    # Why results are not compared with upstream's, such as noise that is drawn in another order. Those layers are trained, and
    # their shapes and state dicts are compared.
    unequal: str = ""
    # What upstream raises in training, in which case only genperf is trained.
    fails: type[Exception] | None = None

    def make(self, library: Any) -> nn.Module:
        return getattr(library, self.name)(*self.arguments(library), **self.options_of(library))

    def options_of(self, library: Any) -> dict[str, Any]:
        return self.options(library) if callable(self.options) else self.options

    def call_of(self, step: int) -> dict[str, Any]:
        return self.call(step) if callable(self.call) else self.call

    def covered(self, library: Any) -> set[str]:
        """The options of constructor and forward that the case gives, and "*" if it gives positional arguments."""
        return {*self.options_of(library), *self.call_of(0), *(["*"] if self.arguments(library) else [])}
