# SPDX-License-Identifier: Apache-2.0
"""Base class of autoencoders with discrete codes and priors over them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._convolutional import DOWNSAMPLING
from .index_prior import IndexPrior
from .system import System, SystemConfig, option


@dataclass(frozen=True, kw_only=True)
class CodeAutoencoderConfig(SystemConfig):
    """Options of the training of priors. Those of their size are fields of each system."""

    class_conditional: bool = option(False, "condition the prior on the labels of the data, to draw samples of a class")
    num_classes: int = 0
    """Number of classes with `class_conditional`, otherwise 0."""
    prior_only: float = option(0.0, "last share of the steps, in which the prior trains, alone and on codes that no longer change")
    prior_shift: int = option(0, "the prior trains on images shifted by up to this many pixels")
    prior_dropout: float = option(0.0, "dropout of the prior")
    sample_temperature: float = option(1.0, "temperature of the prior's samples; below 1 favors likely codes")


class CodeAutoencoder(System):
    """The player "model" trains on every batch. The other players are priors, which train on one in `prior_every` batches.

    With `prior_only`, the model trains on the first part of the steps, and the priors on each batch of the rest.
    """

    config: Any
    downsampling = DOWNSAMPLING

    def check_prior_options(self) -> None:
        """Raise ValueError for invalid options of the priors."""
        config = self.config
        for holds, rule, name in (
            (config.prior_every >= 1, "at least 1", "prior_every"),
            (0 <= config.prior_only < 1, "in [0, 1)", "prior_only"),
            (config.prior_shift >= 0, "at least 0", "prior_shift"),
            (config.prior_only == 0 or config.prior_width, "0 without a prior", "prior_only"),
            (0 < config.sample_temperature < math.inf, "a finite number above 0", "sample_temperature"),
            (bool(config.num_classes) == config.class_conditional, "at least 1 with class_conditional and 0 without it", "num_classes"),
        ):
            if not holds:
                raise ValueError(f"{self.name}: {name} must be {rule}, got {getattr(config, name)!r}.")

    def make_prior(self, num_conditions: int = 0) -> IndexPrior:
        config = self.config
        return IndexPrior(
            config.num_codes,
            width=config.prior_width,
            layers=config.prior_layers,
            num_conditions=num_conditions,
            num_classes=config.num_classes,
            dropout=config.prior_dropout,
        )

    def prior_labels(self, labels: Tensor | None) -> Tensor | None:
        """Those of the labels of a batch that the priors take."""
        return labels if self.config.class_conditional else None

    def sample_labels(self, n: int, labels: Tensor | None) -> Tensor | None:
        """Labels of n samples: the given ones, or those of all classes in turn; None for an unconditional system.

        Raises:
            ValueError: n below 1, or labels for an unconditional system.
        """
        conditional = self.config.class_conditional
        self.check_sample(n, None if conditional else labels)
        return torch.arange(n) % self.config.num_classes if conditional and labels is None else labels

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        priors = {player: list(getattr(self, player).parameters()) for player in self.players if player != "model"}
        others = {id(p) for parameters in priors.values() for p in parameters}
        optimizers: dict[str, torch.optim.Optimizer] = {
            "model": torch.optim.Adam([p for p in self.parameters() if id(p) not in others], lr=self.config.lr)
        }
        return optimizers | {player: torch.optim.Adam(parameters, lr=self.config.lr_prior) for player, parameters in priors.items()}

    def players_at(self, step: int) -> Sequence[str]:
        if self.config.prior_only:
            return ("model",) if self.model_progress < 1 else self.players[1:]
        return self.players if step % self.config.prior_every == 0 else ("model",)

    @property
    def model_progress(self) -> float:
        """Fraction of the steps of the player "model" that are done."""
        return min(1.0, self.progress / (1 - self.config.prior_only))

    def encode(self, images: Tensor) -> Any:
        raise NotImplementedError

    def decode(self, codes: Any) -> Tensor:
        raise NotImplementedError

    def reconstruct(self, images: Tensor) -> Tensor:
        return self.decode(self.encode(images))
