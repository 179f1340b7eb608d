# SPDX-License-Identifier: Apache-2.0
"""Feature matching: a generator loss that compares mean features."""

import torch
from torch import Tensor

from .._distributed import global_mean


def feature_matching(real_features: Tensor, fake_features: Tensor) -> Tensor:
    """Squared distance between the mean features of real and generated samples; Salimans et al. (2016), section 3.1.

    Equivalent to (on one rank):
        loss = (real_features.detach().mean(0) - fake_features.mean(0)).square().sum()

    Under torch.distributed the means are those of the global batch, and every rank returns the same loss.

    Args:
        real_features: [B, ...], from a hidden layer of the discriminator; they are detached.
        fake_features: [B', ...], from the same layer.

    Returns:
        A scalar, float32 (float64 for float64), differentiable in fake_features.

    Raises:
        ValueError: shapes that do not match, or an empty batch.
        TypeError: features that are not floating-point tensors.
    """
    op = "feature_matching"
    for name, features in (("real_features", real_features), ("fake_features", fake_features)):
        if not isinstance(features, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(features).__name__}.")
        if not features.is_floating_point():
            raise TypeError(f"{op}: {name} must be of a floating dtype, got {features.dtype}.")
        if features.dim() == 0 or features.shape[0] == 0:
            raise ValueError(f"{op}: {name} must be a batch of at least one sample, got shape {list(features.shape)}.")
    if real_features.shape[1:] != fake_features.shape[1:]:
        raise ValueError(
            f"{op}: features must have the same shape but for the batch, got {list(real_features.shape)} and {list(fake_features.shape)}."
        )
    real, fake = (f.to(torch.promote_types(f.dtype, torch.float32)) for f in (real_features.detach(), fake_features))
    return (global_mean(real) - global_mean(fake)).square().sum()
