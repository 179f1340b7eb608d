# SPDX-License-Identifier: Apache-2.0
"""Minibatch discrimination layer: similarities between the samples of a batch, as features for a critic."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .._typing import signature_of
from ..ops.minibatch_similarity import minibatch_similarity


class MinibatchDiscrimination(nn.Module):
    """Appends each sample's similarity to the rest of its batch; Salimans et al., "Improved Techniques for Training GANs" (2016).

    Equivalent to:
        m = torch.einsum("na,abc->nbc", x, weight)
        distance = (m.unsqueeze(0) - m.unsqueeze(1)).abs().sum(3)           # [N, N, B]
        similarity = torch.exp(-distance).sum(1) - 1                        # without the sample itself
        y = torch.cat([x, similarity], 1)

    without an N x N tensor. Pass real and generated samples in separate batches, as in the paper. Under torch.distributed the
    batch is that of the rank. A sample's output depends on the whole batch, and so does its gradient: a gradient penalty on a
    critic with this layer penalizes the batch, not single samples.

    Args:
        in_features: A, the length of a feature vector.
        num_kernels: B, the number of similarities for each sample.
        kernel_dim: C, the number of dimensions in which each similarity compares samples.
        concatenate: whether to append the similarities to the features; False returns the similarities alone.

    Attributes:
        weight: [A, B, C], the paper's T. Normal with standard deviation 1 / (C * sqrt(A)): the distance between features of
            unit variance is then about 1, where the similarity has a useful gradient.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, in_features: int, num_kernels: int, kernel_dim: int, *, concatenate: bool = True) -> None:
        super().__init__()
        for name, size in (("in_features", in_features), ("num_kernels", num_kernels), ("kernel_dim", kernel_dim)):
            if size < 1:
                raise ValueError(f"MinibatchDiscrimination: {name} must be at least 1, got {size!r}.")
        self.in_features = in_features
        self.num_kernels = num_kernels
        self.kernel_dim = kernel_dim
        self.concatenate = concatenate
        self.weight = nn.Parameter(torch.randn(in_features, num_kernels, kernel_dim) / (kernel_dim * in_features**0.5))

    @property
    def out_features(self) -> int:
        return self.num_kernels + (self.in_features if self.concatenate else 0)

    def forward(self, x: Tensor) -> Tensor:
        """Compute similarities.

        Args:
            x: [N, A], of the weight's dtype.

        Returns:
            [N, A + B], or [N, B] without concatenation. Differentiable twice; the second backward runs in plain PyTorch.

        Raises:
            ValueError: x of another shape.
        """
        if x.dim() != 2 or x.shape[1] != self.in_features:
            raise ValueError(f"MinibatchDiscrimination: x must be [N, {self.in_features}], got {list(x.shape)}.")
        features = x @ self.weight.flatten(1)
        similarity = minibatch_similarity(features.unflatten(1, (self.num_kernels, self.kernel_dim)))
        return torch.cat([x, similarity], 1) if self.concatenate else similarity

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self) -> None: ...

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.num_kernels}, {self.kernel_dim}, concatenate={self.concatenate}"
