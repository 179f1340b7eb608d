"""Errors of the command line that are printed as one sentence instead of a traceback."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


class UserError(Exception):
    """An invalid input or option. The message is a full sentence; the command line prints it and exits with code 2."""


@contextmanager
def value_error_as_user_error() -> Iterator[None]:
    """Re-raise ValueError as UserError."""
    try:
        yield
    except ValueError as error:  # torch's messages do not end with a period
        raise UserError(f"{str(error).rstrip('.')}.") from error


def import_extra(module: str, package: str, extra: str) -> ModuleType:
    """Import `module`, which the optional dependencies `extra` install.

    Raises:
        UserError: `package` is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"this command needs the package {package} ({error}); install it with `pip install 'genperf[{extra}]'`.") from error
