"""Checkpoints: written atomically, loaded without executing code."""

import os
from pathlib import Path
from typing import Any

import torch

from .._errors import UserError


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write the checkpoint and replace the previous one atomically: `path` is a complete checkpoint at all times."""
    temporary = path.with_suffix(".partial")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint with its tensors on the CPU.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise exceptions of many classes
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(f"the checkpoint {str(path)!r} cannot be read: {reason}.") from error


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
