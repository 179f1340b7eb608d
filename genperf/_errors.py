# SPDX-License-Identifier: Apache-2.0
"""Errors of the command line that are printed as one sentence instead of a traceback."""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


class UserError(Exception):
    """An invalid input or option. The message is a full sentence; the command line prints it and exits with code 2."""


def reason(error: BaseException, *, with_class: bool = False) -> str:
    """Why an operation failed: the first line of the exception's message, shortened and without a period, or else the name of its class.

    The name of the class comes first if asked for, and of a KeyError, whose message is the key alone.
    """
    name = type(error).__name__
    line = ((error.strerror if isinstance(error, OSError) else None) or str(error).strip() or name).splitlines()[0].rstrip(".")
    if (with_class or isinstance(error, KeyError)) and line != name:
        line = f"{name}: {line}"
    return line if len(line) <= 300 else f"{line[:300]} ..."


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, or was too large to be tried. torch raises RuntimeError on the CPU."""
    sentences = (
        "can't allocate memory",
        "not enough memory",
        "Storage size calculation overflowed",
        "numel: integer multiplication overflow",
    )
    torch = sys.modules.get("torch")
    kinds = (MemoryError,) if torch is None else (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or any(sentence in str(error) for sentence in sentences)


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


def is_installed(module: str) -> bool:
    """Whether a module can be imported."""
    return importlib.util.find_spec(module) is not None
