# SPDX-License-Identifier: Apache-2.0
"""Historical averaging: a penalty on the distance of parameters from their mean over time."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .._typing import signature_of


class HistoricalAveraging(nn.Module):
    """Squared distance of parameters from their mean over past steps; Salimans et al. (2016), section 3.3.

    Equivalent to:
        loss = sum((p - mean).square().sum() for p, mean in zip(parameters, means))     # 0 before the first update
        for p, mean in zip(parameters, means):                                          # update, t = 1, 2, ...
            mean.lerp_(p, 1 / t)

    Add the loss, weighted, to the loss that trains the parameters, and call `update` after each optimizer step. The
    parameters are neither in this module's parameters() nor in its state_dict; the means are buffers mean_0, mean_1, ... in
    the order of the parameters. Means are at least float32: half precision would round small updates off. Under FSDP2 pass
    the parameters after `fully_shard`, which replaces them; the means are sharded in the same way.

    Args:
        parameters: an iterable, such as `module.parameters()`.

    Attributes:
        updates: number of updates, a buffer.

    Raises:
        ValueError: no parameters.
        TypeError: parameters that are not floating-point tensors.
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
        """The means, in the order of the parameters."""
        return [getattr(self, f"mean_{i}") for i in range(len(self._parameters_of_player))]

    def forward(self) -> Tensor:
        """The squared distance, a scalar, differentiable in the parameters; 0 with gradient 0 before the first update."""
        distances = [_whole((p - mean).square().sum()) for p, mean in zip(self._parameters_of_player, self.means, strict=True)]
        return sum(distances[1:], distances[0]) * (self.updates > 0)

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self) -> None: ...

    @torch.no_grad()
    def update(self) -> None:
        """Update the means with the current parameters."""
        self.updates.add_(1)
        for p, mean in zip(self._parameters_of_player, self.means, strict=True):
            mean.add_((p - mean) / self.updates)


def _whole(distance: Tensor) -> Tensor:
    """A distance of sharded parameters, summed over the ranks."""
    return distance.full_tensor() if hasattr(distance, "full_tensor") else distance  # pyright: ignore[reportAttributeAccessIssue]
