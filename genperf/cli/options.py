"""Parsers of option values, each of which names its rule."""

import argparse
import math
from collections.abc import Callable

import torch

from .errors import UserError


def number(kind: type, low: float, *, exclusive: bool = False) -> Callable[[str], int | float]:
    """Parser of an int or float of at least (or, if exclusive, above) `low`."""
    rule = f"{'a whole number' if kind is int else 'a number'} {'above' if exclusive else 'of at least'} {low}"

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value < math.inf or (value == low and not exclusive)):
            raise argparse.ArgumentTypeError(f"must be {rule}, got {text!r}")
        return value

    return parse


def decay(text: str) -> float | None:
    """Decay of moving averages, or "none"."""
    if text == "none":
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be none or lie in [0, 1), got {text!r}")
    return value


def device(name: str | None) -> torch.device:
    """The named device, which must be present; None is the first GPU, or the CPU where there is none."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(name)
        if found.type not in ("cpu", "cuda"):
            raise RuntimeError(f"{found.type} is none of them")
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"--device must be cpu, cuda or cuda:N, and present here, got {name!r}: {reason}.") from error
    return found
