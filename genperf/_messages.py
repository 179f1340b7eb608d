# SPDX-License-Identifier: Apache-2.0
"""Warnings that point at the line that called genperf, and messages, which the logger "genperf" takes."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger("genperf")


def warn_caller(message: str, category: type[Warning]) -> None:
    """`warnings.warn` at the innermost frame outside of genperf and torch, at any depth of a call or of an import."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("genperf", "torch", "importlib"):
        frame = frame.f_back
        level += "importlib._bootstrap" not in frame.f_code.co_filename  # frames that `warn` does not count
    warnings.warn(message, category, stacklevel=level + 1)


class _StandardError(logging.Handler):
    """Writes to what `sys.stderr` is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"genperf: {record.getMessage()}", file=sys.stderr)


@contextmanager
def log_on_stderr() -> Iterator[None]:
    """Within this context, as in the commands of genperf, messages of level WARNING and above are lines on stderr."""
    handler = _StandardError(logging.WARNING)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
