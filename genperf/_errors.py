"""Mistakes of the user, which end a command with a sentence instead of a traceback."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


class UserError(Exception):
    """A sentence for the user; `main` prints it and exits with code 2."""


@contextmanager
def sentences() -> Iterator[None]:
    """Within this context a ValueError, with which genperf and torch refuse what was asked for, is a mistake of the user."""
    try:
        yield
    except ValueError as error:  # torch's own sentences have no full stop
        raise UserError(f"{str(error).rstrip('.')}.") from error


def import_extra(module: str, package: str, extra: str) -> ModuleType:
    """Import a module that only the optional dependencies `extra` install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"this command needs the package {package} ({error}); install it with `pip install 'genperf[{extra}]'`.") from error
