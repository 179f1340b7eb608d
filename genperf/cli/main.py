"""Entry point of the command line."""

import argparse
import sys
from collections.abc import Sequence

from .._errors import UserError
from .._version import __version__
from . import bench, evaluate, fid, info, sample, systems, train

# Each module has HELP, add_arguments(parser) and run(arguments) -> exit code.
SUBCOMMANDS = {
    "info": info,
    "systems": systems,
    "train": train,
    "sample": sample,
    "evaluate": evaluate,
    "fid": fid,
    "bench": bench,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 2 after a UserError, 130 after Ctrl-C."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except UserError as error:
        print(f"genperf: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("genperf: interrupted.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="genperf", description="Compiled kernels for generative models; without a command: info.")
    parser.add_argument("--version", action="version", version=f"genperf {__version__}")
    parser.set_defaults(run=info.run)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, module in SUBCOMMANDS.items():
        command = commands.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser
