"""Averaged weights."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


@torch.no_grad()
def update_average(average: AveragedModel, module: nn.Module, decay: float) -> None:
    """Let the module's present parameters into their exponential moving average; buffers are copied.

    What torch's `average.update_parameters(module)` does, without its two waits for a GPU. The first steps weigh more, so
    that the weights of the start are soon forgotten: after `count` updates the decay is (1 + count) / (10 + count) at
    most, and the first update copies.
    """
    count = average.n_averaged
    weight = torch.where(count > 0, 1 - ((1 + count) / (10 + count)).clamp(max=decay), 1.0)
    for mean, value in zip(average.module.parameters(), module.parameters(), strict=True):
        mean.lerp_(value, weight.to(mean.dtype))
    for copy, value in zip(average.module.buffers(), module.buffers(), strict=True):
        copy.copy_(value)
    count.add_(1)
