# SPDX-License-Identifier: Apache-2.0
"""Exponential moving average of weights."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


@torch.no_grad()
def update_average(average: AveragedModel, module: nn.Module, decay: float) -> None:
    """Update the exponential moving average of the module's parameters, and copy its buffers.

    Like torch's `average.update_parameters(module)`, without its two device synchronizations. The decay warms up, so that
    initial weights are soon forgotten: after `count` updates it is at most (1 + count) / (10 + count), and the first
    update copies.
    """
    count = average.n_averaged
    weight = torch.where(count > 0, 1 - ((1 + count) / (10 + count)).clamp(max=decay), 1.0)
    for mean, value in zip(average.module.parameters(), module.parameters(), strict=True):
        mean.lerp_(value, weight.to(mean.dtype))
    for copy, value in zip(average.module.buffers(), module.buffers(), strict=True):
        copy.copy_(value)
    count.add_(1)
