"""`genperf systems`: what can be trained."""

import argparse
import dataclasses
import inspect

from ..models import SYSTEMS, System

HELP = "list the systems that can be trained, what they can do, and their options"

# In the order in which they are listed.
_METHODS = ("sample", "encode", "decode", "reconstruct", "denoise", "negative_elbo", "anomaly_score", "classify")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("system", nargs="?", choices=list(SYSTEMS), metavar="SYSTEM", help="show this one with its options")


def run(arguments: argparse.Namespace) -> int:
    if arguments.system is not None:
        print("\n".join(_page(arguments.system, SYSTEMS[arguments.system])))
        return 0
    width = max(map(len, SYSTEMS)) + 2
    for name, system in SYSTEMS.items():
        print(f"{name:<{width}}{summary(system)}")
        print(f"{'':<{width}}{abilities(system)}")
    return 0


def abilities(system: type[System]) -> str:
    """The methods that it has beside training."""
    found = ", ".join(method.replace("_", " ") for method in _METHODS if hasattr(system, method))
    conditional = any(field.name == "num_classes" for field in dataclasses.fields(system.Config))
    return found + ("; needs labels" if conditional else "")


def summary(system: type[System]) -> str:
    """The first paragraph of its documentation, in one line."""
    return " ".join((inspect.getdoc(system) or "").partition("\n\n")[0].split())


def _page(name: str, system: type[System]) -> list[str]:
    lines = [f"{name}: {summary(system)}", f"can: {abilities(system)}", "", "options of `genperf train`:"]
    for field in dataclasses.fields(system.Config):
        if "help" in field.metadata:
            choices = field.metadata["choices"]
            among = "" if choices is None else f"; of {', '.join(map(_shown, choices))}"
            lines.append(f"  --{field.name.replace('_', '-'):<24} {field.metadata['help']} ({_shown(field.default)}{among})")
    return lines


def _shown(value: object) -> str:
    """As it is given on the command line."""
    return "none" if value is None else str(value)
