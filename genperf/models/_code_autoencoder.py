# SPDX-License-Identifier: Apache-2.0
"""Base class of autoencoders with discrete codes and priors over them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .system import System


class CodeAutoencoder(System):
    """The player "model" trains on every batch. The other players are priors, which train on one in `prior_every` batches."""

    def check_prior_every(self) -> None:
        """Raise ValueError unless prior_every is at least 1."""
        if self.config.prior_every < 1:
            raise ValueError(f"{self.name}: prior_every must be at least 1, got {self.config.prior_every}.")

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        priors = {player: list(getattr(self, player).parameters()) for player in self.players if player != "model"}
        others = {id(p) for parameters in priors.values() for p in parameters}
        optimizers: dict[str, torch.optim.Optimizer] = {
            "model": torch.optim.Adam([p for p in self.parameters() if id(p) not in others], lr=self.config.lr)
        }
        return optimizers | {player: torch.optim.Adam(parameters, lr=self.config.lr_prior) for player, parameters in priors.items()}

    def players_at(self, step: int) -> Sequence[str]:
        return self.players if step % self.config.prior_every == 0 else ("model",)

    def encode(self, images: Tensor) -> Any:
        raise NotImplementedError

    def decode(self, codes: Any) -> Tensor:
        raise NotImplementedError

    def reconstruct(self, images: Tensor) -> Tensor:
        return self.decode(self.encode(images))
