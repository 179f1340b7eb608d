"""Batch normalization by the statistics of the batch that all processes hold together."""

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from .._distributed import joint_mean, world_size


class BatchNorm(_BatchNorm):
    """Normalizes every channel over the batch; Ioffe and Szegedy, "Batch Normalization" (2015).

    Equivalent to (training):
        var, mean = torch.var_mean(x, (0, 2, ...), correction=0)
        y = (x - mean) / torch.sqrt(var + eps) * weight + bias
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * n / (n - 1), momentum)                      # n = x.numel() / C

    and in evaluation mode y with the running mean and variance. In one process this is torch.nn.BatchNorm1d, 2d and 3d
    in one, computed by torch and with the same state_dict.

    With several processes of torch.distributed mean and variance in training are those of the joined batch, on any
    device and for double backward too (torch.nn.SyncBatchNorm has neither CPU nor double backward). Each process must
    call the layer, with an equal share. Evaluation mode needs no other process.

    The gradient of a sample's output passes through the other samples. A gradient penalty on a network with this layer
    penalizes the batch, not the sample alone; see `VirtualBatchNorm` for a layer without that.

    Args:
        num_features: C, the size of dimension 1.
        eps: added to the variance.
        momentum: weight of a new batch in the running statistics.
        affine: learn weight and bias [C].

    Raises:
        ValueError: an argument outside its range.
    """

    def __init__(self, num_features: int, *, eps: float = 1e-5, momentum: float = 0.1, affine: bool = True) -> None:
        for rule, value, holds in (
            ("num_features must be at least 1", num_features, num_features >= 1),
            ("eps must not be negative", eps, eps >= 0),
            ("momentum must lie in [0, 1]", momentum, 0 <= momentum <= 1),
        ):
            if not holds:
                raise ValueError(f"BatchNorm: {rule}, got {value!r}.")
        super().__init__(num_features, eps, momentum, affine)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize.

        Args:
            x: [B, C, ...], of the dtype of the parameters, or half precision (normalized in float32).

        Returns:
            Of x's shape and dtype.

        Raises:
            ValueError: x of another shape, or in training fewer than two values per channel.
        """
        self._check_input_dim(x)
        if not self.training or world_size() == 1:
            return super().forward(x)
        count = x.numel() // self.num_features * world_size()
        if count == 0:
            raise ValueError(f"BatchNorm: a training batch must have at least one value per channel, got {list(x.shape)}.")
        dims = (0, *range(2, x.dim()))
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        var, mean = torch.var_mean(values, dims, correction=0)
        # Of the mean of the processes' means and the variance around it, nothing cancels.
        own_mean, mean = mean, joint_mean(mean.unsqueeze(0))
        var = joint_mean((var + (own_mean - mean).square()).unsqueeze(0))
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

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2 or x.shape[1] != self.num_features:
            raise ValueError(f"BatchNorm: x must be [B, {self.num_features}, ...], got {list(x.shape)}.")
