# SPDX-License-Identifier: Apache-2.0
"""The standard streams of the command line: closed, full, without a reader, or with an encoding that lacks the characters of a path."""

import errno
import io
import os
import sys
from typing import Any

from .._errors import reason

BROKEN_PIPE = 141  # as shells report a program that SIGPIPE ends


class _Absent(io.RawIOBase):
    """Standard output that was closed before the program started."""

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        raise OSError(errno.EBADF, "it is closed")


class _Lossy(io.FileIO):
    """Standard error that may be closed, full or without a reader. What cannot be written is dropped: no work is lost to a message."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def prepare_streams() -> None:
    """Replace closed streams, and let the others print every character: as an escape where their encoding lacks it."""
    for number in range(3):  # or else the next file that is opened would be a standard stream
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stdout is None:
        sys.stdout = io.TextIOWrapper(io.BufferedWriter(_Absent()), encoding="utf-8")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    encoding = "utf-8" if sys.stderr is None else sys.stderr.encoding
    raw = io.BufferedWriter(_Lossy(2, "w", closefd=False))
    sys.stderr = io.TextIOWrapper(raw, encoding=encoding, errors="backslashreplace", line_buffering=True)


def print_page(text: str) -> int:
    """Print to stdout; returns the exit code, which is not 0 if stdout fails."""
    try:
        print(text, flush=True)
    except OSError as error:
        return stdout_failed(error)
    return 0


def print_result(text: str) -> int:
    """Print the result of long work to stdout, or to stderr if stdout fails; returns the exit code."""
    code = print_page(text)
    if code:
        print(text, file=sys.stderr)
    return code


def stdout_failed(error: OSError) -> int:
    """Say on stderr that stdout failed; returns the exit code."""
    if isinstance(error, BrokenPipeError):
        return BROKEN_PIPE
    print(f"genperf: stdout cannot be written to: {reason(error)}.", file=sys.stderr)
    return 2


def close_stdout(code: int) -> int:
    """Flush stdout at the end of the program; returns the exit code, which is `code` if that is not 0."""
    try:
        sys.stdout.flush()
    except OSError as error:
        code = code or stdout_failed(error)
        # What is left in the buffer would fail again when the interpreter exits.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        os.dup2(sys.stdout.fileno(), 1)
    return code
