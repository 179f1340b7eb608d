# SPDX-License-Identifier: Apache-2.0
"""`genperf systems`: list the systems that can be trained."""

import argparse
import dataclasses
import inspect

from ..models import SYSTEMS, System
from ..models.system import choices_of
from .streams import print_page

# In the order of the list.
_METHODS = ("sample", "encode", "decode", "reconstruct", "denoise", "negative_elbo", "anomaly_score", "classify")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("system", nargs="?", choices=list(SYSTEMS), metavar="SYSTEM", help="show the options of this system")


def run(arguments: argparse.Namespace) -> int:
    if arguments.system is not None:
        return print_page("\n".join(_page(arguments.system, SYSTEMS[arguments.system])))
    width = max(map(len, SYSTEMS)) + 2
    lines = [f"{name:<{width}}{summary(system)}\n{'':<{width}}{abilities(system)}" for name, system in SYSTEMS.items()]
    return print_page("\n".join(lines))


def abilities(system: type[System]) -> str:
    """The methods of a system, apart from training."""
    methods = ", ".join(method.replace("_", " ") for method in _METHODS if hasattr(system, method))
    fields = {field.name for field in dataclasses.fields(system.Config)}
    if "class_conditional" in fields:
        return methods + "; --class-conditional needs labels"
    return methods + ("; needs labels" if "num_classes" in fields else "")


def summary(system: type[System]) -> str:
    """The first paragraph of a system's docstring, in one line."""
    return " ".join((inspect.getdoc(system) or "").partition("\n\n")[0].split())


def _page(name: str, system: type[System]) -> list[str]:
    lines = [f"{name}: {summary(system)}", f"can: {abilities(system)}", "", "options of `genperf train`:"]
    for field in dataclasses.fields(system.Config):
        if "help" in field.metadata:
            choices = choices_of(field)
            among = "" if choices is None else f"; of {', '.join(map(_shown, choices))}"
            lines.append(f"  --{field.name.replace('_', '-'):<24} {field.metadata['help']} ({_shown(field.default)}{among})")
    return lines


def _shown(value: object) -> str:
    """A value as given on the command line."""
    return "none" if value is None else str(value)
