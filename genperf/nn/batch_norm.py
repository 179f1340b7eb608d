# SPDX-License-Identifier: Apache-2.0
"""Batch normalization by the statistics of the global batch."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from .._distributed import global_mean, world_size
from .._typing import signature_of
from ..ops._validate import check
from ._recompute import StepMemory


class BatchNorm(_BatchNorm):
    """Normalizes each channel over the batch; Ioffe and Szegedy, "Batch Normalization" (2015).

    Equivalent to (training):
        var, mean = torch.var_mean(x, (0, 2, ...), correction=0)
        y = (x - mean) / torch.sqrt(var + eps) * weight + bias
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * n / (n - 1), momentum)                      # n = x.numel() / C

    and in evaluation mode y with the running mean and variance. On one rank this is torch.nn.BatchNorm1d, 2d and 3d in
    one class, computed by torch and with the same state_dict. A step that gradient checkpointing runs twice counts once, which
    torch's layers count twice.

    Under torch.distributed, the mean and variance in training are those of the global batch, on any device and with double
    backward (torch.nn.SyncBatchNorm supports neither CPU nor double backward). Every rank must call the layer with
    an equal share of the batch. Evaluation mode does not communicate.

    The gradient of a sample's output passes through the other samples, so a gradient penalty on a network with this layer
    penalizes the batch, not single samples; see `VirtualBatchNorm` for a layer without this dependence.

    Args:
        num_features: C, the size of dimension 1.
        eps: added to the variance.
        momentum: weight of a new batch in the running statistics.
        affine: whether to learn weight and bias [C].

    Raises:
        ValueError: an argument outside its range.
    """

    momentum: float
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, num_features: int, *, eps: float = 1e-5, momentum: float = 0.1, affine: bool = True) -> None:
        check("BatchNorm", "num_features must be at least 1", num_features, num_features >= 1)
        check("BatchNorm", "eps must not be negative", eps, eps >= 0)
        check("BatchNorm", "momentum must lie in [0, 1]", momentum, 0 <= momentum <= 1)
        super().__init__(num_features, eps, momentum, affine)
        self._steps = StepMemory[bool]()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Earlier releases kept no steps."""
        super().__setstate__({"_steps": StepMemory(), **state})

    def forward(self, x: Tensor) -> Tensor:
        """Normalize.

        Args:
            x: [B, C, ...], of the dtype of the parameters, or half precision (normalized in float32).

        Returns:
            A tensor of x's shape and dtype.

        Raises:
            ValueError: x of another shape, or in training fewer than two values per channel.
        """
        self._check_input_dim(x)
        # The second run of a step under gradient checkpointing.
        again = self.training and self._steps.recall(x) is not None
        if self.training and not again:
            self._steps.record(x, True)
        if again and world_size() == 1:
            copies = self.running_mean.clone(), self.running_var.clone()
            return F.batch_norm(x, *copies, self.weight, self.bias, True, self.momentum, self.eps)
        if not self.training or world_size() == 1:
            return super().forward(x)
        count = x.numel() // self.num_features * world_size()
        if count == 0:
            raise ValueError(f"BatchNorm: a training batch must have at least one value per channel, got {list(x.shape)}.")
        dims = (0, *range(2, x.dim()))
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        var, mean = torch.var_mean(values, dims, correction=0)
        # The variance is taken around the global mean; E[x^2] - E[x]^2 would cancel.
        local_mean, mean = mean, global_mean(mean.unsqueeze(0))
        var = global_mean((var + (local_mean - mean).square()).unsqueeze(0))
        if not again:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                self.running_var.lerp_((var * (count / (count - 1))).to(self.running_var.dtype), self.momentum)
        scale = torch.rsqrt(var + self.eps)
        if self.affine:
            scale = scale * self.weight
        shape = (-1, *[1] * (x.dim() - 2))
        y = (values - mean.view(shape)) * scale.view(shape)
        if self.affine:
            y = y + self.bias.view(shape)
        return y.to(x.dtype)

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self) -> None: ...

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2 or x.shape[1] != self.num_features:
            raise ValueError(f"BatchNorm: x must be [B, {self.num_features}, ...], got {list(x.shape)}.")
