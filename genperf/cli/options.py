# SPDX-License-Identifier: Apache-2.0
"""Parsers of option values, whose errors state the rule."""

import argparse
import dataclasses
import math
import os
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .._errors import UserError, reason
from ..models.system import choices_of

MOST = (1 << 31) - 1  # of whole numbers in general


def number(kind: type, low: float, high: float = MOST, *, exclusive: bool = False) -> Callable[[str], int | float]:
    """Parser of an int or float of at least `low`, or above it if exclusive, and at most `high`."""
    rule = f"{'a whole number' if kind is int else 'a number'} {'above' if exclusive else 'of at least'} {low}"

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value or (value == low and not exclusive)):  # NaN fails as well
            raise argparse.ArgumentTypeError(f"must be {rule}, got {text!r}")
        if value > high:
            raise argparse.ArgumentTypeError(f"must be {rule} and at most {high}, got {_shortened(text)}")
        return value

    return parse


def seed(text: str) -> int | float:
    """Parse a seed of torch's generators."""
    return number(int, 0, (1 << 64) - 1)(text)


def path_text(text: str) -> str:
    """Parse a path. An empty one, such as an unset variable of the shell gives, would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("must be the path of a file or folder, got ''")
    return text


def path(text: str) -> Path:
    return Path(path_text(text))


def fraction(text: str) -> float:
    """Parse a number in [0, 1]."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must lie in [0, 1], got {text!r}")
    return value


def one_of(*choices: str) -> Callable[[str], str]:
    """Parser of one of the given texts."""

    def parse(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"must be {' or '.join(choices)}, got {text!r}")
        return text

    return parse


def add_field(group: argparse._ArgumentGroup, flag: str, field: dataclasses.Field[typing.Any]) -> None:
    """Add an option for a field of a system's configuration, without a default; "none" is None if the field allows it.

    Raises:
        TypeError: the field's type is not supported.
    """
    kinds = _types_of(field.type)
    kind = next(t for t in kinds if t is not type(None))
    shown = "none" if field.default is None else {"True": "yes", "False": "no"}.get(str(field.default), str(field.default))
    meaning = f"{field.metadata['help']} ({shown})".replace("%", "%%")
    if kind is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=meaning)
        return
    choices = choices_of(field)
    if choices is not None:
        meaning = f"{field.metadata['help']}: {', '.join('none' if c is None else str(c) for c in choices)} ({shown})"
    parse = _value(kind, type(None) in kinds, choices)
    group.add_argument(flag, type=parse, default=argparse.SUPPRESS, help=meaning, metavar={int: "N", float: "X"}.get(kind, "NAME"))


def _types_of(annotation: object) -> tuple[typing.Any, ...]:
    """The types of a union; str for texts to choose from."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    members = typing.get_args(annotation) if union else (annotation,)
    return tuple(str if typing.get_origin(member) is typing.Literal else member for member in members)


def _value(kind: type, optional: bool, choices: Sequence[object] | None) -> Callable[[str], object]:
    rules = {int: "a whole number", float: "a finite number", str: "text"}
    if kind not in rules:
        raise TypeError(f"an option must be a bool, int, float or str, got {kind}.")

    def parse(text: str) -> object:
        if optional and text == "none":
            return None
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if kind is int and not abs(value) <= MOST and not math.isnan(value):
            raise argparse.ArgumentTypeError(f"must lie in {-MOST} ... {MOST}, got {_shortened(text)}")
        if value in (choices or (value,)) and not (isinstance(value, float) and not math.isfinite(value)):
            return value
        rule = ", ".join("none" if c is None else str(c) for c in choices) if choices else rules[kind] + (" or none" if optional else "")
        raise argparse.ArgumentTypeError(f"must be {'one of ' if choices else ''}{rule}, got {text!r}")

    return parse


def device(name: str | None) -> torch.device:
    """The device of that name, which must be available; None for the first GPU, or for the CPU if there is none.

    Under torchrun None is the GPU of the process's local rank.

    Raises:
        UserError: the name is invalid, or the device is not available.
    """
    if name is None:
        local_rank = os.environ.get("LOCAL_RANK")
        gpu = "cuda" if local_rank is None else f"cuda:{local_rank}"
        name = gpu if torch.cuda.is_available() else "cpu"
    try:
        selected = torch.device(name)
        if selected.type not in ("cpu", "cuda"):
            raise RuntimeError(f"{selected.type} is not supported")
        torch.empty(0, device=selected)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device must be cpu, cuda or cuda:N, and available, got {name!r}: {reason(error)}.") from error
    return selected


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")
