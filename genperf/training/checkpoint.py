# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: written atomically, loaded without executing code."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .._errors import UserError, is_out_of_memory, reason
from .._files import write_atomically
from .._version import __version__


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write the checkpoint and replace the previous one atomically: `path` is a complete checkpoint at all times.

    Raises:
        OSError: the file cannot be written; nothing is left of it.
    """

    def write(file: BinaryIO) -> None:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch's writer, after an OSError of the file
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise

    write_atomically(path, write, temporary=f"{path.stem}.partial")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint with its tensors on the CPU.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise exceptions of many classes
        raise UserError(f"the checkpoint {str(path)!r} cannot be read: {reason(error)}.") from error


@contextmanager
def using_checkpoint(path: Path) -> Iterator[None]:
    """Re-raise what the content of a checkpoint of another version, or of a damaged one, causes as a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        shown = message if len(message) <= 300 else f"{message[:300]} ..."
        raise UserError(f"the checkpoint {str(path)!r} is not one that genperf {__version__} can use: {shown.rstrip('.')}.") from error


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """State of the default generators that a run on `device` uses."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Set the default generators to a state from `random_state`."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
