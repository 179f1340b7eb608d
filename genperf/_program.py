# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C while the command line imports its modules or exits."""

import os
import signal
import sys
from contextlib import suppress
from types import FrameType


def exit_on_interrupt() -> None:
    """Let Ctrl-C exit with code 130 and without a traceback until `restore_interrupt`, unless it is ignored or has a handler."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit)


def restore_interrupt() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _exit:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def is_program() -> bool:
    """Whether this process runs `genperf` or `python -m genperf`, as opposed to a program that imports genperf."""
    if sys.argv[:1] == ["-m"]:  # python -m still looks for the module, whose name stands before the arguments
        return sys.orig_argv[-len(sys.argv)] in ("genperf", "-mgenperf")
    return bool(sys.argv) and os.path.basename(sys.argv[0]) in ("genperf", "genperf.exe")


def _exit(number: int, frame: FrameType | None) -> None:
    with suppress(OSError):
        os.write(2, b"genperf: interrupted.\n")
    os._exit(130)
