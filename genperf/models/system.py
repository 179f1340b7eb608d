"""What every generative system has in common: the interface between a model and whoever trains, samples or scores it."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from .._distributed import world_size
from .._modes import evaluating as evaluating
from .._modes import frozen as frozen
from ..ops.gaussian_sample import gaussian_sample


def option(default: Any, meaning: str, *, choices: Sequence[Any] | None = None) -> Any:
    """A field of a configuration that the command line offers as an option of the same name."""
    return dataclasses.field(default=default, metadata={"help": meaning, "choices": choices})


@dataclasses.dataclass(frozen=True)
class SystemConfig:
    """What a system is built from. Fields that are no `option` come from the data."""

    image_shape: tuple[int, int, int] = (1, 28, 28)
    """C, H, W"""


class System(nn.Module):
    """A generative model that knows how it is trained.

    Images are [B, C, H, W] with pixels in [0, 1] on every way in and out; labels are int64 [B]. A training step of each
    player (a group of parameters with an optimizer of its own: one for most systems, two for a GAN):

        optimizers = system.optimizers()
        for player in system.players_at(step):
            losses = system.training_step(images, labels, player=player)
            system.zero_grad(set_to_none=True)
            losses["loss"].backward()
            optimizers[player].step()
            system.step_done(player)

    Beside these, a system has the methods that make sense for it, by these names:
        sample(n, labels=None) -> images                        in evaluation mode; labels where the system is conditional
        encode(images) -> codes, decode(codes) -> images
        reconstruct(images) -> images
        negative_elbo(images) -> [B], nats
        anomaly_score(images) -> [B]                            the higher, the less usual
        classify(images) -> logits [B, num_classes]

    Attributes:
        config: an instance of the class's `Config`, a frozen dataclass.
        progress: share of the training that is done, 0 ... 1, set by the training loop; schedules depend on it.
    """

    Config: ClassVar[type[SystemConfig]] = SystemConfig
    players: ClassVar[tuple[str, ...]] = ("model",)

    def __init__(self, config: SystemConfig | None = None) -> None:
        super().__init__()
        self.config = config if config is not None else self.Config()
        self.progress = 0.0

    def training_step(self, images: Tensor, labels: Tensor | None = None, *, player: str = "model") -> dict[str, Tensor]:
        """The player's losses of a batch by name; "loss" is the one to differentiate, the others are detached."""
        raise NotImplementedError

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """The optimizer of each player, as published where there is a paper."""
        return {"model": torch.optim.Adam(self.parameters(), lr=self.config.lr)}

    def players_at(self, step: int) -> Sequence[str]:
        """The players that learn from the batch of this step, counted from 0, in their order."""
        return self.players

    def step_done(self, player: str) -> None:
        """What follows an optimizer's step: clipped weights, moving averages."""

    def prepare(self, images: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What of a training set the system learns from, before the first step; itself unless a system says otherwise."""
        return images, labels

    def initialize(self, images: Tensor) -> None:
        """Take from the first batch, all of it in every process, what a new system starts from: codes, a reference batch."""

    def finish(self, held_out: Tensor) -> None:
        """Take from usual images that were held out what follows the training: thresholds."""

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def name(self) -> str:
        """What errors call the system."""
        return type(self).__name__

    def check_images(self, images: Tensor) -> None:
        """Raise ValueError unless the images have the shape that the system was built for."""
        if list(images.shape[1:]) != list(self.config.image_shape):
            expected = _listed(self.config.image_shape)
            raise ValueError(f"{self.name}: images must have shape [B, {expected}], got {list(images.shape)}.")

    def check_player(self, player: str) -> None:
        """Raise ValueError unless the system has the player."""
        if player not in self.players:
            raise ValueError(f"{self.name}: player must be one of {', '.join(self.players)}, got {player!r}.")

    def check_sample(self, n: int, labels: Tensor | None = None) -> None:
        """Raise ValueError unless n samples can be drawn, of a system that has no use for labels."""
        if n < 1:
            raise ValueError(f"{self.name}: n must be at least 1, got {n!r}.")
        if labels is not None:
            raise ValueError(f"{self.name}: labels must be None, since samples are unconditional, got {list(labels.shape)}.")


def share(batch: Tensor) -> Tensor:
    """This process's rows of a batch that every process has whole."""
    processes = world_size()
    return batch if processes == 1 else batch.tensor_split(processes)[dist.get_rank()]


def standard_normal(*shape: int, device: torch.device) -> Tensor:
    """Standard normal noise [B, ...], float32; `genperf.sample_offset` applies."""
    zeros = torch.zeros(shape, device=device)
    return gaussian_sample(zeros, zeros)[0]


def check_divisible(owner: str, image_shape: tuple[int, int, int], step: int) -> None:
    """Raise ValueError unless height and width can be halved as often as the networks do."""
    channels, height, width = image_shape
    if channels < 1 or height < 1 or width < 1 or height % step or width % step:
        rule = f"divisible by {step}" if step > 1 else "of at least 1"
        raise ValueError(f"{owner}: images must have at least 1 channel and sides {rule}, got [{_listed(image_shape)}].")


def check_labels(owner: str, labels: Tensor, num_classes: int) -> None:
    """Raise ValueError unless labels are [B] and in range; the range only on the CPU, since looking would wait for a GPU."""
    got = None
    if labels.dim() != 1:
        got = f"shape {list(labels.shape)}"
    elif labels.device.type == "cpu" and labels.numel() and not 0 <= labels.min() <= labels.max() < num_classes:
        got = f"{labels.min()} ... {labels.max()}"
    if got is not None:
        raise ValueError(f"{owner}: labels must be [B] with values 0 ... {num_classes - 1}, got {got}.")


def _listed(shape: Sequence[int]) -> str:
    return ", ".join(map(str, shape))
