"""Historical averaging: keeps a player near the mean of its past."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class HistoricalAveraging(nn.Module):
    """Squared distance of parameters from their mean over time; Salimans et al. (2016), section 3.3.

    Equivalent to:
        loss = sum((p - mean).square().sum() for p, mean in zip(parameters, means))     # 0 before the first update
        for p, mean in zip(parameters, means):                                          # update, t = 1, 2, ...
            mean.lerp_(p, 1 / t)

    Add the loss, weighted, to that of the player whose parameters these are, and call `update` after its step. The
    parameters stay those of their owner: they are neither in this module's parameters() nor in its state_dict; the
    means are buffers, mean_0, mean_1, ... in the parameters' order. The mean starts at the first update
    and is kept in at least float32, in which half precision would soon stand still.

    Args:
        parameters: of one player, as `module.parameters()` gives them.

    Attributes:
        updates: number of updates, a buffer.

    Raises:
        ValueError, TypeError: no parameters, or anything else than tensors of a floating dtype.
    """

    updates: Tensor

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__()
        if isinstance(parameters, nn.Module | Tensor):
            raise TypeError(f"HistoricalAveraging: parameters must be an iterable of tensors, got {type(parameters).__name__}.")
        self._parameters_of_player = list(parameters)
        if not self._parameters_of_player:
            raise ValueError("HistoricalAveraging: there must be at least one parameter, got none.")
        for i, p in enumerate(self._parameters_of_player):
            if not isinstance(p, Tensor) or not p.is_floating_point():
                got = p.dtype if isinstance(p, Tensor) else type(p).__name__
                raise TypeError(f"HistoricalAveraging: parameters must be tensors of a floating dtype, got {got}.")
            mean = torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32), requires_grad=False)
            self.register_buffer(f"mean_{i}", mean)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64, device=self._parameters_of_player[0].device))

    @property
    def means(self) -> list[Tensor]:
        """The means, in the parameters' order."""
        return [getattr(self, f"mean_{i}") for i in range(len(self._parameters_of_player))]

    def forward(self) -> Tensor:
        """The squared distance, a scalar that is differentiable in the parameters; 0 with gradient 0 before the first update."""
        total = sum((p - mean).square().sum() for p, mean in zip(self._parameters_of_player, self.means, strict=True))
        return total * (self.updates > 0)

    @torch.no_grad()
    def update(self) -> None:
        """Let the parameters' present values into their means."""
        self.updates.add_(1)
        for p, mean in zip(self._parameters_of_player, self.means, strict=True):
            mean.add_((p - mean) / self.updates)
