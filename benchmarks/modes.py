# SPDX-License-Identifier: Apache-2.0
"""What --in-turn, --compare and --accuracy of `genperf bench` share: which rows run, and the page they print and write."""

import argparse
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from genperf._errors import UserError, reason
from genperf._files import write_text_atomically
from genperf.cli.streams import print_result

_TOKEN = re.compile(r"[()]|[^\s()]+")


def selected(names: Iterable[str], expression: str | None) -> list[str]:
    """The names that match an expression of words, `and`, `or`, `not` and parentheses, as pytest's -k; all of them for None.

    Raises:
        UserError: nothing matches, or the expression is none.
    """
    names = list(names)
    if not expression:
        return names

    def matches(name: str) -> bool:
        tokens = _TOKEN.findall(expression)
        return eval(" ".join(t if t in ("(", ")", "and", "or", "not") else str(t.lower() in name.lower()) for t in tokens))

    try:
        found = [name for name in names if matches(name)]
    except (SyntaxError, TypeError) as error:
        raise UserError(f"-k must be words joined by and, or and not, got {expression!r}.") from error
    if not found:
        raise UserError(f"no row matches -k {expression!r}; the rows are {'; '.join(names)}.")
    return found


def command(arguments: argparse.Namespace, *mode: str) -> str:
    """The command that a page names: the mode, and the options that choose what it measures."""
    chosen = [*mode, *(["-k", arguments.k] if arguments.k else []), *(["--quick"] if arguments.quick else [])]
    return f"`genperf bench {shlex.join(chosen)}`"


def write(page: str, arguments: argparse.Namespace, name: str) -> int:
    """Print a page, and write it to NAME.md in the folder that --out names; returns the exit code of printing.

    Raises:
        UserError: the file cannot be written; the page is printed.
    """
    path = Path(arguments.out, f"{arguments.name or name}.md")
    try:
        write_text_atomically(path, page)
    except OSError as error:
        print_result(page)
        raise UserError(f"{str(path)!r} cannot be written: {reason(error)}.") from error
    return print_result(f"{page}\nwritten: {path}")
