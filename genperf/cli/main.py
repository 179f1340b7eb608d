# SPDX-License-Identifier: Apache-2.0
"""Entry point of the command line."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from .._errors import UserError, is_out_of_memory, reason
from .._messages import log_on_stderr
from .._program import exit_on_interrupt, restore_interrupt
from .._version import __version__
from .streams import close_stdout, prepare_streams, stdout_failed

# Each is a module of this package with add_arguments(parser) and run(arguments) -> exit code. Only that of the given command is
# imported, since most import torch, which takes a second or more.
SUBCOMMANDS = {
    "info": "show versions, hardware, and the implementation that each op selects",
    "systems": "list the systems that can be trained, with their methods and options",
    "train": "train a system on images",
    "sample": "draw samples from a trained system",
    "evaluate": "score a trained system on held-out images",
    "fid": "Frechet distance (FID) between images, features or statistics",
    "kmeans": "cluster vectors into identifiers of one or more codes",
    "bench": "measure every op beside plain PyTorch and its rivals, and write a report",
}

_EPILOG = """\
`genperf COMMAND --help` shows the options of a command, with their defaults in parentheses.

exit codes: 0; 1 from bench, see there; 2 after an error, with a sentence on stderr; 130 after Ctrl-C; 141 if the reader of stdout is gone.
A result that cannot be written to stdout is written to stderr.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code, see `_EPILOG`.

    Without `argv` the arguments are those of the program, whose standard streams are then prepared for all that may happen to them.
    """
    if argv is not None:
        return _run(argv)
    prepare_streams()
    try:
        code = _run(sys.argv[1:])
    except SystemExit as exit:  # of argparse, after --help or an invalid option
        code = int(exit.code or 0)
    exit_on_interrupt()
    return close_stdout(code)


def _run(argv: Sequence[str]) -> int:
    try:
        arguments = _parser().parse_args(argv)
        command = _module(arguments.command or "info")
        restore_interrupt()
        with log_on_stderr():
            return command.run(arguments)
    except UserError as error:
        return _failed(str(error))
    except BrokenPipeError as error:
        return stdout_failed(error)
    except KeyboardInterrupt:
        print("genperf: interrupted.", file=sys.stderr)
        return 130
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return _failed(f"there is not enough memory: {reason(error)}.")


def _failed(sentence: str) -> int:
    print(f"genperf: {sentence}", file=sys.stderr)
    return 2


def _module(command: str) -> Any:
    importlib.import_module("genperf._public")  # loads the libraries, which modules of the package rely on
    return importlib.import_module(f".{command}", __package__)


class _Parser(argparse.ArgumentParser):
    """A parser that reports unknown arguments with its own usage; argparse leaves those of a command to the parser of all commands."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        arguments, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return arguments, unknown


class _CommandParser(_Parser):
    """The parser of a command, which gets its arguments when it parses; None for the parser of a subcommand of it."""

    def __init__(self, *args: Any, command: str | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self._command = command

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._command is not None:
            _module(self._command).add_arguments(self)
            self._command = None
        return super().parse_known_args(args, namespace)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="genperf",
        description="Compiled kernels for generative models; without a command: info.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"genperf {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", parser_class=_CommandParser)
    for name, meaning in SUBCOMMANDS.items():
        commands.add_parser(name, command=name, help=meaning, description=f"{meaning[0].upper()}{meaning[1:]}.")
    return parser
