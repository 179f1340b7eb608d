# SPDX-License-Identifier: Apache-2.0
"""Old names of arguments and attributes, which work with a DeprecationWarning until the next release."""

import functools
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def renamed_arguments(owner: str, **new_names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: accept keywords under their old names, given as old="new"."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            for old, new in new_names.items():
                if old in kwargs:
                    if new in kwargs:
                        raise TypeError(f"{owner}: {old} is the old name of {new}; give only {new}.")
                    _warn(owner, old, new, stacklevel=3)
                    kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return wrapper

    return decorate


class RenamedAttribute:
    """Descriptor: read and write an attribute under its old name."""

    def __init__(self, new: str) -> None:
        self.new = new

    def __set_name__(self, owner: type, old: str) -> None:
        self.owner, self.old = owner.__name__, old

    def __get__(self, instance: object, owner: type) -> object:
        if instance is None:
            return self
        _warn(self.owner, self.old, self.new, stacklevel=3)
        return getattr(instance, self.new)

    def __set__(self, instance: object, value: object) -> None:
        _warn(self.owner, self.old, self.new, stacklevel=3)
        setattr(instance, self.new, value)


def _warn(owner: str, old: str, new: str, stacklevel: int) -> None:
    warnings.warn(f"{owner}: {old} is deprecated, use {new}.", DeprecationWarning, stacklevel=stacklevel)
