"""What autoencoders of codes share, whose priors learn beside them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .system import System


class CodeAutoencoder(System):
    """Its player "model" learns from every batch; each other player is the prior of that name, which learns from one in `prior_every`."""

    def check_prior_every(self) -> None:
        """Raise ValueError unless the priors ever learn."""
        if self.config.prior_every < 1:
            raise ValueError(f"{self.name}: prior_every must be at least 1, got {self.config.prior_every}.")

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        priors = {player: list(getattr(self, player).parameters()) for player in self.players if player != "model"}
        others = {id(p) for parameters in priors.values() for p in parameters}
        optimizers = {"model": torch.optim.Adam([p for p in self.parameters() if id(p) not in others], lr=self.config.lr)}
        return optimizers | {player: torch.optim.Adam(parameters, lr=self.config.lr_prior) for player, parameters in priors.items()}

    def players_at(self, step: int) -> Sequence[str]:
        return self.players if step % self.config.prior_every == 0 else ("model",)

    def reconstruct(self, images: Tensor) -> Tensor:
        return self.decode(self.encode(images))
