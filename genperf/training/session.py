# SPDX-License-Identifier: Apache-2.0
"""A run of `genperf train`, from its options to the files in its folder."""

import csv
import dataclasses
import io
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .._errors import UserError, reason, value_error_as_user_error
from .._files import write_atomically
from .._messages import log
from ..models import SYSTEMS
from .checkpoint import save_checkpoint, using_checkpoint
from .data import LabeledImages, load_images, split_held_out, takes_size, usual_size
from .evaluation import evaluate, normal_images
from .pictures import write_pictures
from .runs import CHECKPOINT, EVALUATION, FORMAT, Settings, build_system, check_fingerprint, data_fingerprint, load_state, merge_options
from .timing import StepTimes, time_steps
from .trainer import Training, make_fabric

_LEAST_STEPS = 500


class TrainingResults(NamedTuple):
    """Results of a finished run."""

    metrics: dict[str, Any]  # the content of metrics.json
    written: list[Path]
    failure: str | None = None  # a sentence, if the results could not be written


class TrainingSession:
    """A new run, or one resumed from the checkpoint in its folder.

    The constructor loads the data, builds or restores the system and writes the first checkpoint; `run` trains.

    Args:
        name: of the system, as in `genperf.models.SYSTEMS`.
        settings, config: fields of `Settings` and of the system's configuration. The others have their defaults, or on resuming the
            values of the run.
        overwrite: whether to replace a run in the folder.

    Raises:
        UserError: the options, the data or the checkpoint are invalid, or the folder cannot be written to.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        settings: dict[str, Any],
        config: dict[str, Any],
        *,
        device: torch.device,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.folder = folder
        state = load_state(folder, "--resume") if resume else None
        if state is None and (folder / CHECKPOINT).exists() and not overwrite:
            raise UserError(
                f"--out must be a folder without a run, got {str(folder)!r}; --resume continues that run, --overwrite replaces it."
            )
        with nullcontext() if state is None else using_checkpoint(folder / CHECKPOINT):
            self.settings, config = merge_options(name, settings, config, state)
            self.fabric = make_fabric(device, self.settings.precision)
            data = load_images(self.settings.data, self.settings.size, choose_size=None if resume else self._size_chooser(name, config))
            if state is not None:
                check_fingerprint(data, state, "--resume")
            images, self.held_out = split_held_out(data)
            if state is None and "epochs" not in settings:
                self.settings = dataclasses.replace(self.settings, epochs=_default_epochs(self.settings, len(images.images)))

            # cuDNN's default algorithms are not deterministic.
            torch.backends.cudnn.deterministic = True
            self._check_sides(name, config, data)
            self.system = build_system(name, self.settings, config, data)
            with value_error_as_user_error():
                images = LabeledImages(*self.system.prepare(*images))
            self.training = Training(self.fabric, self.system, images, self.settings)
            if state is None:
                self.system.initialize(images.images[self.training.batches()[0]].to(self.fabric.device))
            else:
                self.training.restore(state["training"])
        self._header = {
            "format": FORMAT,
            "system": name,
            "settings": dataclasses.asdict(self.settings),
            "config": config,
            "data": data_fingerprint(name, config, data),
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._save()
            (folder / EVALUATION).unlink(missing_ok=True)  # of the replaced weights
        except OSError as error:
            raise UserError(f"--out must be a folder that can be written to, got {str(folder)!r}: {reason(error)}.") from error

    def _size_chooser(self, name: str, config: dict[str, Any]) -> Callable[[list[int]], int]:
        """For `load_images`: records the size of images that have several, and says it."""
        system_class = SYSTEMS[name]

        def choose(sides: list[int]) -> int:
            least = system_class.least_side(system_class.Config(**config))
            size = usual_size(sides, least=least, multiple=system_class.downsampling)
            self.settings = dataclasses.replace(self.settings, size=size)
            if self.is_global_zero:
                log.warning("the images have several sizes; each is scaled and cropped at the center to %dx%d (--size).", size, size)
            return size

        return choose

    def _check_sides(self, name: str, config: dict[str, Any], data: LabeledImages) -> None:
        """Raise UserError where --size would give images the sides that the system needs, which its own error does not know."""
        system_class, (height, width) = SYSTEMS[name], data.images.shape[2:]
        multiple = system_class.downsampling
        if self.settings.size is not None or not takes_size(self.settings.data) or not (height % multiple or width % multiple):
            return
        size = usual_size([min(height, width)], least=system_class.least_side(system_class.Config(**config)), multiple=multiple)
        raise UserError(
            f"{name} needs images whose sides are divisible by {multiple}, got {width}x{height}; --size {size} scales and crops them to "
            f"{size}x{size}."
        )

    def run(self) -> TrainingResults | None:
        """Train, evaluate on the held-out images and write the results; None on ranks other than 0.

        Raises:
            UserError: a loss becomes NaN or infinite, or a checkpoint cannot be written during training; the last one stays whole.
            KeyboardInterrupt: after Ctrl-C; the run can be resumed.
        """
        with value_error_as_user_error():
            try:
                self.training.run(self.settings.epochs, self._save)
            except OSError as error:
                raise UserError(
                    f"the checkpoint in {str(self.folder)!r} cannot be written: {reason(error)}; the last one is whole, and --resume "
                    "continues from it."
                ) from error
            batch = self.training.local_batch(self.training.batches()[0])
            times = time_steps(self.system, *batch, autocast=self.fabric.autocast)
            self.system.progress = 1.0
            self.system.eval()
            self.system.finish(normal_images(self.system, self.held_out).to(self.fabric.device))
            return self._write_results(times) if self.is_global_zero else None

    @property
    def is_global_zero(self) -> bool:
        """Whether this is rank 0, which writes files and messages."""
        return self.fabric.is_global_zero

    def _save(self) -> None:
        if self.is_global_zero:
            save_checkpoint(self.folder / CHECKPOINT, {**self._header, "training": self.training.state()})

    def _write_results(self, times: StepTimes) -> TrainingResults:
        training, system = self.training, self.system
        images_seen = training.epoch * training.steps_per_epoch * training.batch_size
        metrics = {
            "scores": evaluate(system, training.images, self.held_out, samples=0),
            "held_out_images": len(self.held_out.images),
            "training_seconds": training.seconds,
            "images_per_second": images_seen / training.seconds,
            "processes": self.fabric.world_size,
            "step_ms": times._asdict(),
            "settings": dataclasses.asdict(self.settings),
            "config": dataclasses.asdict(system.config),
            "history": training.history,
        }
        written = [self.folder / name for name in ("metrics.json", "metrics.csv", CHECKPOINT)]
        try:
            self._save()
            write_atomically(written[0], lambda file: file.write(f"{json.dumps(metrics, indent=2)}\n".encode()))
            write_atomically(written[1], lambda file: file.write(_history_table(training.history).encode()))
            pictures = write_pictures(self.folder, system, self.held_out, history=training.history)
        except OSError as error:
            return TrainingResults(metrics, [], f"the results cannot be written to {str(self.folder)!r}: {reason(error)}.")
        return TrainingResults(metrics, [*pictures, *written])


def _default_epochs(settings: Settings, images: int) -> int:
    """Epochs of a run that does not name them: more for few images, whose epochs have few steps."""
    steps_per_epoch = images // min(settings.batch_size, images)
    return max(settings.epochs, -(-_LEAST_STEPS // steps_per_epoch))


def _history_table(history: list[dict[str, float]]) -> str:
    """The losses as CSV, one row per epoch."""
    text = io.StringIO()
    table = csv.DictWriter(text, ["epoch", *dict.fromkeys(name for losses in history for name in losses)])
    table.writeheader()
    table.writerows({"epoch": epoch, **losses} for epoch, losses in enumerate(history, start=1))
    return text.getvalue()
