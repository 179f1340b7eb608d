# SPDX-License-Identifier: Apache-2.0
"""Give a module other methods without making another module.

The class of the module becomes a subclass of itself, with genperf's methods before upstream's. The module stays the same object,
with its parameters, buffers, hooks and children, so optimizers, references to it, state dicts and `isinstance` see no change. The
subclass has the name and the module of the class, by which libraries choose what to shard. A method that is set on the instance
would not be copied by DataParallel, and would be bound to the wrong module.
"""

import copyreg
import functools
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

# The attribute of a subclass that names the class with genperf's methods, and the attribute of a module for `undo`.
_METHODS, _BEFORE = "_genperf_methods", "_genperf_before"
_INTERNAL = frozenset(vars(nn.Module()))
_SCALARS = (bool, int, float, str, type(None))


class Step(NamedTuple):
    """What replaces one module's methods.

    Attributes:
        methods: a class whose methods come before those of the module's class.
        attributes: values that the methods need, set on the module; no tensors of the state, and no modules.
    """

    module: nn.Module
    methods: type
    attributes: dict[str, Any]


class _Before(NamedTuple):
    """Attributes of a module before `apply`: the values that it changed or removed, and the names that it added."""

    values: dict[str, Any]
    added: frozenset[str]


@functools.cache
def joined(methods: type, upstream: type) -> type:
    """The subclass of `upstream` with `methods` before its own."""
    namespace = {
        "__module__": upstream.__module__,
        "__qualname__": upstream.__qualname__,
        "__doc__": upstream.__doc__,
        "__reduce_ex__": _reduce_ex,
        _METHODS: methods,
    }
    return types.new_class(upstream.__name__, (methods, upstream), exec_body=lambda body: body.update(namespace))


def joined_class(cls: type) -> type | None:
    """The class that `joined` has made among the bases of `cls`."""
    return next((base for base in cls.__mro__ if _METHODS in vars(base)), None)


def is_replaced(module: nn.Module) -> bool:
    """Whether genperf's methods are among those of a module; also within a compiled graph."""
    return hasattr(module, _METHODS)


def attributes_of(template: nn.Module) -> dict[str, Any]:
    """The attributes of a module that are no tensors of its state, no children and no hooks."""
    return {name: value for name, value in vars(template).items() if name not in _INTERNAL}


def apply(step: Step) -> None:
    """Replace the methods of a module."""
    values, methods = vars(step.module), step.methods
    hidden = {name for name in values if name not in _INTERNAL and name not in step.attributes and _is_method(methods, name)}
    before = {name: values[name] for name in values if name in hidden or name in step.attributes}
    if before or step.attributes:
        values[_BEFORE] = _Before(before, frozenset(step.attributes) - frozenset(before))
    for name in hidden:
        del values[name]
    values.update(step.attributes)
    step.module.__class__ = joined(methods, type(step.module))


def undo(module: nn.Module) -> None:
    """Undo `apply`. Numbers, strings and booleans that were set since are kept.

    Raises:
        ValueError: the class of the module was changed since, as by fully_shard or a parametrization.
    """
    cls = type(module)
    if _METHODS not in vars(cls):
        raise ValueError(f"{cls.__name__} was sharded or parametrized after patch, which must be undone first")
    values = vars(module)
    before, added = values.pop(_BEFORE, _Before({}, frozenset()))
    own = {name: value for name, value in values.items() if name not in _INTERNAL and name not in added} | before
    options = {name: _number(getattr(module, name, value)) for name, value in own.items() if isinstance(value, _SCALARS)}
    for name in added:
        values.pop(name, None)
    values.update(before)
    values.update({name: value for name, value in options.items() if isinstance(value, _SCALARS)})
    module.__class__ = cls.__bases__[1]


def _number(value: Any) -> Any:
    """An option that genperf holds in a tensor, as a number."""
    return value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value


def set_by_user(step: Step, upstream: type) -> str | None:
    """Why the methods of a step cannot take the place of those of `upstream`: they were overridden, or set on the instance."""
    for name in _method_names(step.methods):
        own = next((base for base in type(step.module).__mro__ if name in vars(base)), None)
        # FSDPModule of torch has methods of the module's own, which come after those of genperf.
        if own is not None and not issubclass(upstream, own) and own.__module__.partition(".")[0] != "torch":
            return f"a class derived from {upstream.__name__} overrides {name}"
        # Constructors of upstream set methods too; only those of classes that have attributes of genperf in their place.
        if name in vars(step.module) and (name == "forward" or not step.attributes):
            return f"its {name} is set on the instance, as hooks of accelerate do; patch the model before"
    return None


def _method_names(methods: type) -> Iterator[str]:
    for base in methods.__mro__:
        if base.__module__.partition(".")[0] == "genperf":
            yield from (name for name, value in vars(base).items() if isinstance(value, types.FunctionType) and not name.startswith("__"))


def _is_method(methods: type, name: str) -> bool:
    return name in set(_method_names(methods))


def _reduce_ex(self: nn.Module, protocol: Any) -> Any:
    """Copies and pickles name the class of upstream, since the subclass cannot be imported."""
    own = joined_class(type(self))
    assert own is not None
    constructor, arguments, *rest = super(own, self).__reduce_ex__(protocol)
    if constructor is copyreg.__newobj__ and arguments[0] is own:  # pyright: ignore[reportAttributeAccessIssue]
        return restored, (vars(own)[_METHODS], own.__bases__[1]), *rest
    return constructor, arguments, *rest


def restored(methods: type, upstream: type) -> Any:
    """A module without state, which unpickling fills."""
    return object.__new__(joined(methods, upstream))
