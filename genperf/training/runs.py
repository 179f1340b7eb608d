"""The folder of a run: what decides its result, its checkpoint, and the system that comes out of it."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .._errors import UserError, sentences
from ..models import SYSTEMS, System
from .checkpoint import load_checkpoint
from .data import LabelledImages, fingerprint, load_images, split_held_out

FORMAT = "genperf train, 1"
CHECKPOINT = "checkpoint.pt"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the result of a run beside the system's own configuration."""

    data: str | None = None
    seed: int = 0
    epochs: int = 10
    batch_size: int = 64
    lr_decay: float = 0.0
    precision: str = "32"
    impl: str | None = None


class Run(NamedTuple):
    name: str
    system: System
    settings: Settings
    training: LabelledImages
    held_out: LabelledImages


def build_system(name: str, settings: Settings, config: dict[str, Any], images: LabelledImages) -> System:
    """A new system for these images, with the options `config`; its weights follow from the seed."""
    system_class = SYSTEMS[name]
    fields = {field.name for field in dataclasses.fields(system_class.Config)}
    from_data = {"image_shape": tuple(images.images.shape[1:])}
    if "num_classes" in fields:
        if images.labels is None:
            raise UserError(
                f"{name} needs labels: a folder with one folder of images for each class, or an .npz with an array 'labels', got images "
                "without any."
            )
        from_data["num_classes"] = images.num_classes
    for field, value in config.items():
        if field.startswith("lr") and value is not None and value <= 0:
            raise UserError(f"--{field.replace('_', '-')} must be above 0, got {value}.")
    torch.manual_seed(settings.seed)
    with sentences():
        return system_class(system_class.Config(**{**from_data, **config}))


def load_state(folder: Path, purpose: str) -> dict[str, Any]:
    """The checkpoint of the run in the folder; `purpose` names what needs it, for messages."""
    path = folder / CHECKPOINT
    if not path.is_file():
        raise UserError(f"{purpose} needs the checkpoint of an earlier run, got {str(path)!r}, which does not exist.")
    state = load_checkpoint(path)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{purpose} needs a checkpoint of `genperf train`, got another kind of file, {str(path)!r}.")
    if state["system"] not in SYSTEMS:
        raise UserError(f"{purpose} needs a run of a system that genperf.models.SYSTEMS names, got one of {state['system']!r}.")
    unknown = {*state["config"]} - {field.name for field in dataclasses.fields(SYSTEMS[state["system"]].Config)}
    if unknown:
        raise UserError(f"{purpose} needs a run whose options are known, got one with {', '.join(sorted(unknown))}.")
    return state


def load_run(folder: Path, device: torch.device, *, data: str | None = None) -> Run:
    """The trained system of a run, in evaluation mode on the device, with the images that it was trained on and those held out.

    Args:
        data: where the images lie now, if not where they lay.

    Raises:
        UserError: the folder holds no run, or the images are others.
    """
    state = load_state(folder, str(folder))
    settings = Settings(**state["settings"])
    images = load_images(data if data is not None else settings.data)
    check_fingerprint(images, state, "--data")
    system = build_system(state["system"], settings, state["config"], images)
    system.load_state_dict(state["training"]["model"])
    return Run(state["system"], system.to(device).eval(), settings, *split_held_out(images))


def data_fingerprint(name: str, data: LabelledImages) -> dict[str, str | None]:
    """Of all that the system learns from: the images, and their labels where it uses these."""
    uses_labels = {"num_classes", "normal_class"} & {field.name for field in dataclasses.fields(SYSTEMS[name].Config)}
    labels = data.labels if uses_labels else None
    return {"images": fingerprint(data.images), "labels": None if labels is None else fingerprint(labels)}


def check_fingerprint(data: LabelledImages, state: dict[str, Any], option: str) -> None:
    for what, found in data_fingerprint(state["system"], data).items():
        kept = state["data"][what]
        if found != kept:
            raise UserError(f"{option} needs the {what} that the run began with, {kept}, got {found} (shape and checksum).")
