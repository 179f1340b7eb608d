# SPDX-License-Identifier: Apache-2.0
"""The interface of a generative system to training, sampling and evaluation."""

import dataclasses
import typing
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from .._distributed import world_size
from .._modes import evaluating as evaluating
from .._modes import frozen as frozen
from ..ops.gaussian_sample import gaussian_sample


def option(default: Any, meaning: str, *, choices: Sequence[Any] | None = None) -> Any:
    """A field of a configuration that is also an option of the same name on the command line.

    Its value is one of `choices`, if they are given, or else of those of the field's Literal type, if it has one.
    """
    return dataclasses.field(default=default, metadata={"help": meaning, "choices": choices})


def choices_of(field: "dataclasses.Field[Any]") -> Sequence[Any] | None:
    """The values that an `option` of a configuration may have; None for any of its type."""
    given = field.metadata.get("choices")
    members = [field.type, *typing.get_args(field.type)]
    texts = [text for member in members if typing.get_origin(member) is typing.Literal for text in typing.get_args(member)]
    if given is not None or not texts:
        return given
    return [None, *texts] if type(None) in members else texts


@dataclasses.dataclass(frozen=True)
class SystemConfig:
    """Configuration of a system. Fields that are not an `option` are derived from the data."""

    image_shape: tuple[int, int, int] = (1, 28, 28)
    """C, H, W"""


class System(nn.Module):
    """A generative model with its training procedure.

    Images are [B, C, H, W] with pixels in [0, 1], as inputs and as outputs; labels are int64 [B]. A player is a group of
    parameters with its own optimizer: most systems have one, a GAN has two. A training step:

        optimizers = system.optimizers()
        for player in system.players_at(step):
            losses = system.training_step(images, labels, player=player)
            system.zero_grad(set_to_none=True)
            losses["loss"].backward()
            optimizers[player].step()
            system.step_done(player)

    A system also has those of the following methods that apply to it:
        sample(n, labels=None) -> images                        in evaluation mode; labels if the system is conditional
        encode(images) -> codes, decode(codes) -> images
        reconstruct(images) -> images
        negative_elbo(images) -> [B], nats
        anomaly_score(images) -> [B]                            higher for anomalies
        classify(images) -> logits [B, num_classes]

    Attributes:
        config: an instance of the class's `Config`, a frozen dataclass.
        downsampling: height and width of the images must be divisible by it.
        progress: fraction of the training that is done, 0 ... 1, set by the training loop; schedules depend on it.
    """

    Config: ClassVar[type[SystemConfig]] = SystemConfig
    config: Any
    players: tuple[str, ...] = ("model",)
    downsampling: ClassVar[int] = 1

    def __init__(self, config: SystemConfig | None = None) -> None:
        super().__init__()
        self.config = config if config is not None else self.Config()
        self.progress = 0.0
        for field in dataclasses.fields(self.config):
            choices, value = choices_of(field), getattr(self.config, field.name)
            if choices is not None and value not in choices:
                raise ValueError(f"{self.name}: {field.name} must be one of {', '.join(map(str, choices))}, got {value!r}.")

    @classmethod
    def least_side(cls, config: Any) -> int:
        """The least height and width of images in a system with this configuration."""
        return cls.downsampling

    def training_step(self, images: Tensor, labels: Tensor | None = None, *, player: str = "model") -> dict[str, Tensor]:
        """The losses of a player for a batch, by name; differentiate "loss", the others are detached."""
        raise NotImplementedError

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """The optimizer of each player, as in the paper if there is one."""
        return {"model": torch.optim.Adam(self.parameters(), lr=self.config.lr)}

    def players_at(self, step: int) -> Sequence[str]:
        """The players that train in this step, counted from 0, in order."""
        return self.players

    def step_done(self, player: str) -> None:
        """Called after the optimizer step of a player, for weight clipping and moving averages."""

    def prepare(self, images: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Select the training data from a training set, before the first step; by default all of it."""
        return images, labels

    def initialize(self, images: Tensor) -> None:
        """Initialize codes or a reference batch from the first global batch, which every rank gets whole."""

    def finish(self, held_out: Tensor) -> None:
        """Called after training with held-out normal images, to fit thresholds."""

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def name(self) -> str:
        """Name of the system in error messages."""
        return type(self).__name__

    def check_images(self, images: Tensor) -> None:
        """Raise ValueError unless the images have the shape in the configuration, and TypeError unless they are floats."""
        if list(images.shape[1:]) != list(self.config.image_shape):
            expected = _listed(self.config.image_shape)
            raise ValueError(f"{self.name}: images must have shape [B, {expected}], got {list(images.shape)}.")
        if not images.is_floating_point():
            raise TypeError(f"{self.name}: images must be floats in [0, 1], got {images.dtype}.")

    def check_player(self, player: str) -> None:
        """Raise ValueError unless the system has this player."""
        if player not in self.players:
            raise ValueError(f"{self.name}: player must be one of {', '.join(self.players)}, got {player!r}.")

    def check_sample(self, n: int, labels: Tensor | None = None) -> None:
        """Raise ValueError unless n >= 1 and labels is None, for an unconditional system."""
        if n < 1:
            raise ValueError(f"{self.name}: n must be at least 1, got {n!r}.")
        if labels is not None:
            raise ValueError(f"{self.name}: labels must be None, since samples are unconditional, got {list(labels.shape)}.")


def share(batch: Tensor) -> Tensor:
    """This rank's rows of a global batch that every rank has whole."""
    ranks = world_size()
    return batch if ranks == 1 else batch.tensor_split(ranks)[dist.get_rank()]


def standard_normal(*shape: int, device: torch.device) -> Tensor:
    """Standard normal noise [B, ...], float32; `genperf.sample_offset` applies."""
    zeros = torch.zeros(shape, device=device)
    return gaussian_sample(zeros, zeros)[0]


def shifted(images: Tensor, largest: int) -> Tensor:
    """Shift all images by the same random offset of up to `largest` pixels in each direction, with replication padding."""
    if largest == 0:
        return images
    down, right = torch.randint(2 * largest + 1, (2,)).tolist()
    height, width = images.shape[2:]
    return F.pad(images, [largest] * 4, mode="replicate")[:, :, down : down + height, right : right + width]


def check_divisible(owner: str, image_shape: tuple[int, int, int], step: int) -> None:
    """Raise ValueError unless height and width are divisible by `step`, the downsampling factor of the networks."""
    channels, height, width = image_shape
    if channels < 1 or height < 1 or width < 1 or height % step or width % step:
        rule = f"divisible by {step}" if step > 1 else "of at least 1"
        raise ValueError(f"{owner}: images must have at least 1 channel and sides {rule}, got [{_listed(image_shape)}].")


def check_labels(owner: str, labels: Tensor, num_classes: int) -> None:
    """Raise ValueError unless labels are [B] and in range. The range is checked on the CPU only, to avoid a device synchronization."""
    got = None
    if labels.dim() != 1:
        got = f"shape {list(labels.shape)}"
    elif labels.device.type == "cpu" and labels.numel() and not 0 <= labels.min() <= labels.max() < num_classes:
        got = f"{labels.min()} ... {labels.max()}"
    if got is not None:
        raise ValueError(f"{owner}: labels must be [B] with values 0 ... {num_classes - 1}, got {got}.")


def _listed(shape: Sequence[int]) -> str:
    return ", ".join(map(str, shape))
