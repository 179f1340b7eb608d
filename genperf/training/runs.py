# SPDX-License-Identifier: Apache-2.0
"""Runs of `genperf train`: settings, checkpoint, and the trained system."""

import dataclasses
import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from .._choices import TrainingPrecision
from .._errors import UserError, value_error_as_user_error
from ..models import SYSTEMS, System
from .checkpoint import load_checkpoint, using_checkpoint
from .data import LabeledImages, fingerprint, load_images, split_held_out

FORMAT = "genperf train, 1"
CHECKPOINT = "checkpoint.pt"
EVALUATION = "evaluation.json"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings that determine the result of a run, together with the system's configuration."""

    data: str | None = None
    size: int | None = None
    seed: int = 0
    epochs: int = 10
    batch_size: int = 64
    lr_decay: float = 0.0
    precision: TrainingPrecision = "32"
    impl: Literal["reference"] | None = None


class Run(NamedTuple):
    """A trained system and its data."""

    name: str  # of the system, as in genperf.models.SYSTEMS
    system: System
    settings: Settings
    training: LabeledImages
    held_out: LabeledImages


def build_system(name: str, settings: Settings, config: dict[str, Any], images: LabeledImages) -> System:
    """Build a system for these images, with the options `config` and weights initialized from the seed."""
    system_class = SYSTEMS[name]
    from_data: dict[str, Any] = {"image_shape": tuple(images.images.shape[1:])}
    if _takes_labels(system_class, config):
        if images.labels is None:
            raise UserError(
                f"{name} needs labels: a folder with one folder of images for each class, or an .npz with an array 'labels', got images "
                "without labels."
            )
        from_data["num_classes"] = images.num_classes
    for field, value in config.items():
        if field.startswith("lr") and value is not None and value <= 0:
            raise UserError(f"{_flag(field)} must be above 0, got {value}.")
    torch.manual_seed(settings.seed)
    with value_error_as_user_error():
        return system_class(system_class.Config(**{**from_data, **config}))


def _takes_labels(system_class: type[System], config: dict[str, Any]) -> bool:
    """Whether a system with these options is conditioned on labels, or learns them."""
    options = {field.name: field.default for field in dataclasses.fields(system_class.Config)} | config
    return "num_classes" in options and bool(options.get("class_conditional", True))


def load_state(folder: Path, purpose: str) -> dict[str, Any]:
    """Load the checkpoint of the run in the folder; error messages start with `purpose`, which needs it."""
    path = folder / CHECKPOINT
    if not os.path.isfile(path):
        raise UserError(f"{purpose} needs the checkpoint of an earlier run, got {str(path)!r}, which does not exist.")
    state = load_checkpoint(path)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{purpose} needs a checkpoint of `genperf train`, got another kind of file, {str(path)!r}.")
    with using_checkpoint(path):
        missing = [part for part in ("system", "settings", "config", "data", "training") if part not in state]
        if missing:
            raise UserError(f"{purpose} needs a whole checkpoint, got {str(path)!r} without {', '.join(missing)}.")
        if state["system"] not in SYSTEMS:
            raise UserError(f"{purpose} needs a run of a system that genperf.models.SYSTEMS names, got one of {state['system']!r}.")
        known = [field.name for options in (Settings, SYSTEMS[state["system"]].Config) for field in dataclasses.fields(options)]
        unknown = {*state["settings"], *state["config"]}.difference(known)
        if unknown:
            raise UserError(f"{purpose} needs a run whose options are known, got one with {', '.join(sorted(unknown))}.")
    return state


def load_run(folder: Path, device: torch.device, *, data: str | None = None) -> Run:
    """Load the trained system of a run, in evaluation mode on the device, with its training and held-out images.

    Args:
        data: location of the images, if it has changed since training.

    Raises:
        UserError: the folder holds no run, or one of another version of genperf, or the images are not those of the run.
    """
    state = load_state(folder, str(folder))
    with using_checkpoint(folder / CHECKPOINT):
        settings = Settings(**state["settings"])
        images = load_images(data if data is not None else settings.data, settings.size)
        check_fingerprint(images, state, "--data")
        system = build_system(state["system"], settings, state["config"], images)
        system.load_state_dict(state["training"]["model"])
    return Run(state["system"], system.to(device).eval(), settings, *split_held_out(images))


def data_fingerprint(name: str, config: dict[str, Any], data: LabeledImages) -> dict[str, str | None]:
    """Fingerprints of the images, and of the labels if the system with these options uses them."""
    system_class = SYSTEMS[name]
    uses_labels = _takes_labels(system_class, config) or any(f.name == "normal_class" for f in dataclasses.fields(system_class.Config))
    labels = data.labels if uses_labels else None
    return {"images": fingerprint(data.images), "labels": None if labels is None else fingerprint(labels)}


def check_fingerprint(data: LabeledImages, state: dict[str, Any], option: str) -> None:
    """Raise UserError unless the data are those of the checkpoint; `option` names the option that gave them."""
    for what, found in data_fingerprint(state["system"], state["config"], data).items():
        expected = state["data"][what]
        if found != expected:
            raise UserError(f"{option} needs the {what} that the run began with, {expected}, got {found} (shape and checksum).")


def merge_options(
    name: str, settings: dict[str, Any], config: dict[str, Any], state: dict[str, Any] | None
) -> tuple[Settings, dict[str, Any]]:
    """Settings and configuration from the given options and the checkpoint of a resumed run, if any.

    Raises:
        UserError: an option differs from that of the run and is not one that may change, --data or --epochs.
    """
    if state is None:
        return Settings(**settings), config
    if state["system"] != name:
        raise UserError(f"--resume needs a run of {name}, got one of {state['system']}.")
    defaults = {field.name: field.default for field in dataclasses.fields(SYSTEMS[name].Config)}
    current = {**defaults, **state["config"], **state["settings"]}
    for field, value in {**settings, **config}.items():
        if field not in ("data", "epochs") and value != current[field]:
            raise UserError(f"{_flag(field)} must have the value that the run began with, {current[field]}, got {value}.")
    finished = state["training"]["epoch"]
    if settings.get("epochs", finished) < finished:
        raise UserError(f"--epochs must not be less than the {finished} that the run has finished, got {settings['epochs']}.")
    return Settings(**{**state["settings"], **settings}), state["config"]


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")
