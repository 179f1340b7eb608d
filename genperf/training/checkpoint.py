"""Checkpoints of training runs: complete, written atomically, loaded without executing code."""

import os
from pathlib import Path
from typing import Any

import torch

from .._errors import UserError


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Replace the file in one step, so that at any moment a whole checkpoint lies there."""
    temporary = path.with_suffix(".partial")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The saved state with its tensors on the CPU."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of whatever kind broken bytes raise
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(f"the checkpoint {str(path)!r} cannot be read: {reason}.") from error


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """State of the default generators that a run on `device` draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
