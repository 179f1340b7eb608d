# SPDX-License-Identifier: Apache-2.0
"""The classes that `genperf.patch` knows, by library."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .swap import Step, attributes_of, set_by_user


class UnsupportedError(Exception):
    """A quantizer cannot be replaced; the message is the reason."""


@dataclass(frozen=True)
class Adapter:
    """How the modules of an upstream class are replaced.

    Attributes:
        by: what computes in their place, for the report.
        steps: the modules to replace and their methods, given the module and the upstream class that was recognized; or raises
            UnsupportedError, or one of the exceptions that a constructor raises for its arguments.
        is_quantizer: whether what is below the module is part of a quantizer, and not a network around one.
    """

    by: str
    steps: Callable[[nn.Module, type], Sequence[Step]]
    is_quantizer: bool = True


def override(methods: type, by: str, needs: Sequence[str] = (), is_quantizer: bool = True) -> Adapter:
    """An adapter that only replaces methods, which read the attributes `needs` of the module."""

    def steps(module: nn.Module, upstream: type) -> list[Step]:
        require(module, needs)
        return [checked(Step(module, methods, {}), upstream)]

    return Adapter(by, steps, is_quantizer)


def has(module: nn.Module, name: str) -> bool:
    """`hasattr` that reads no property: Mimi's `embed` keeps the codes of when it was first read."""
    instance = (vars(module), module._parameters, module._buffers, module._modules)
    return hasattr(type(module), name) or any(name in names for names in instance)


def require(module: nn.Module, names: Sequence[str]) -> None:
    missing = [name for name in names if not has(module, name)]
    if missing:
        raise UnsupportedError(f"this version of the class has no attribute {missing[0]}")


def checked(step: Step, upstream: type) -> Step:
    """The step, if nothing overrides the methods that it replaces."""
    if reason := set_by_user(step, upstream):
        raise UnsupportedError(reason)
    return step


def from_template(module: nn.Module, upstream: type, template: nn.Module) -> Step:
    """Give a module the methods and options of `template`, a module of genperf.compat, and let it keep its tensors and children."""
    require(module, [*template._parameters, *template._buffers, *template._modules])
    attributes = {name: value for name, value in attributes_of(template).items() if not (_holds_tensors(value) and has(module, name))}
    if "_placed" in attributes:  # a tensor of `Placed` that tells where the layer is
        tensors = [*module.parameters(), *module.buffers()]
        placed = next(
            (t for t in tensors if t.is_floating_point()), torch.empty(0, device=tensors[0].device) if tensors else torch.empty(0)
        )
        attributes["_placed"] = torch.empty(0, dtype=placed.dtype, device=placed.device)
    return checked(Step(module, type(template), attributes), upstream)


def _holds_tensors(value: object) -> bool:
    return isinstance(value, torch.Tensor) or (isinstance(value, list | tuple) and any(isinstance(item, torch.Tensor) for item in value))


def constructed(cls: Callable[..., nn.Module], **arguments: Any) -> nn.Module:
    """A module of genperf.compat without memory for its tensors, which draws no random numbers."""
    with torch.device("meta"):
        return cls(**arguments)


def find(module: nn.Module) -> tuple[type, Adapter] | None:
    """The class that is known among those of a module, and its adapter."""
    from .libraries import LIBRARIES

    for cls in type(module).__mro__:
        library = LIBRARIES.get(cls.__module__.partition(".")[0])
        if library is not None and (adapter := library(cls)) is not None:
            return cls, adapter
    return None


def by_name(adapters: dict[str, Adapter]) -> Callable[[type], Adapter | None]:
    """The adapter of a class by its module and name, which recognizes it without an import."""
    return lambda cls: adapters.get(f"{cls.__module__}.{cls.__qualname__}")
