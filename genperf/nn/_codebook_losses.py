# SPDX-License-Identifier: Apache-2.0
"""Loss terms of a codebook besides the quantization error: diversity and orthogonality."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .._choices import Metric
from ..ops._precision import accumulator_dtype
from ..ops.code_entropy import code_entropy


def diversity_loss(
    vectors: Tensor,  # [codebooks, outer, D, inner]
    codebook: Tensor,  # [codebooks, K, D]
    valid: Tensor | None,  # [codebooks, outer, inner]
    *,
    inverse_temperature: float,
    metric: Metric,
    epsilon: float = 0.0,
) -> Tensor:
    """Negative entropy, in nats, of the batch mean of softmax(-inverse_temperature * distance) over the codes.

    The distance is Euclidean, or minus the cosine of unit vectors.
    """
    _, entropy = code_entropy(
        vectors,
        codebook,
        temperature=1 / inverse_temperature,
        logits="dot" if metric == "cosine" else "distance",
        channel_dim=2,
        mask=valid,
        epsilon=epsilon,
    )
    return -entropy.mean()


def orthogonal_loss(
    codebook: Tensor,  # [codebooks, K, D]
    indices: Tensor,  # [codebooks, outer, inner]
    *,
    used_only: bool,
    max_codes: int | None,
) -> Tensor:
    """Mean squared cosine between two codes; Shin et al., "Translation-equivariant Image Quantizer" (2021).

    The squares are summed over the D x D Gram matrix, so that no K x K matrix exists.

    Args:
        used_only: count only the codes among `indices`.
        max_codes: count at most this many codes, drawn at random; None for all.
    """
    codebook = codebook.to(accumulator_dtype(codebook.dtype))
    counted = codebook.new_ones(codebook.shape[:2])
    if used_only:
        # Slot 0 is for the index -1 of masked vectors.
        counted = F.pad(torch.zeros_like(counted), (1, 0)).scatter(1, indices.flatten(1) + 1, 1.0)[:, 1:]
    if max_codes is not None and max_codes < codebook.shape[1]:
        keys = torch.rand_like(counted) * counted
        counted = counted * (keys >= keys.topk(max_codes, dim=1).values[:, -1:])
    codes = F.normalize(codebook, dim=-1, eps=1e-6) * counted.unsqueeze(-1)
    number = counted.sum(1)
    with torch.autocast(codebook.device.type, enabled=False):  # sums of up to K squares exceed float16
        gram = codes.transpose(1, 2) @ codes
    # Without the cosine of each code with itself: 1, or 0 for a code of zeros.
    squares = gram.square().sum((1, 2)) - codes.detach().square().sum(2).square().sum(1)
    return (squares / number.clamp(min=1).square()).mean()
