# SPDX-License-Identifier: Apache-2.0
"""Entry point of the command line."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from .._errors import UserError, is_out_of_memory, reason
from .._messages import log_on_stderr
from .._program import exit_on_interrupt, restore_interrupt
from .._version import __version__
from . import bench, evaluate, fid, info, kmeans, sample, systems, train
from .streams import close_stdout, prepare_streams, stdout_failed

# Each module has HELP, add_arguments(parser) and run(arguments) -> exit code.
SUBCOMMANDS = {
    "info": info,
    "systems": systems,
    "train": train,
    "sample": sample,
    "evaluate": evaluate,
    "fid": fid,
    "kmeans": kmeans,
    "bench": bench,
}

_EPILOG = """\
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
        restore_interrupt()
        arguments = _parser().parse_args(argv)
        with log_on_stderr():
            return arguments.run(arguments)
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


class _Parser(argparse.ArgumentParser):
    """A parser that reports unknown arguments with its own usage; argparse leaves those of a command to the parser of all commands."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        arguments, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return arguments, unknown


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="genperf",
        description="Compiled kernels for generative models; without a command: info.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"genperf {__version__}")
    parser.set_defaults(run=info.run)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, module in SUBCOMMANDS.items():
        command = commands.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser
