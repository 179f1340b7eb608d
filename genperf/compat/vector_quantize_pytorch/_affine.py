# SPDX-License-Identifier: Apache-2.0
"""Affine reparameterization of a codebook: codes follow the mean and variance of the batch; Huh et al., "Straightening Out the
Straight-Through Estimator" (2023).

The codes that are searched are (embed - codebook_mean) * batch_std / codebook_std + batch_mean. Mean and variance, [h, 1, d], are
moving averages, which a `Codebook` with affine_param holds as buffers.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..._distributed import all_reduce_sum, world_size
from ...ops._precision import accumulator_dtype

if TYPE_CHECKING:
    from ._codebook import Codebook

# Not in the state dict before the first batch.
_OF_BATCH = ("batch_mean", "batch_variance")


def register_buffers(codebook: "Codebook", num_codebooks: int, dim: int) -> None:
    for name in _OF_BATCH:
        codebook.register_buffer(name, None)
    for name in ("codebook_mean", "codebook_variance"):
        codebook.register_buffer(f"{name}_needs_init", torch.tensor(True))
        codebook.register_buffer(name, torch.zeros(num_codebooks, 1, dim))


@torch.no_grad()
def update(codebook: "Codebook", vectors: Tensor, valid: Tensor | None) -> None:
    """Move the averages towards the statistics of the codes (in training) and of the finite vectors of a batch [h, outer, d, inner]."""
    if codebook.training:
        variance, mean = torch.var_mean(codebook.embed, 1, correction=0, keepdim=True)
        for name, value in (("codebook_mean", mean), ("codebook_variance", variance)):
            average, needs_init = getattr(codebook, name), getattr(codebook, f"{name}_needs_init")
            value = value.to(average)
            average.copy_(torch.where(needs_init, value, average.lerp(value, 1 - codebook.affine_param_codebook_decay)))
            needs_init.fill_(False)
    dtype = accumulator_dtype(vectors.dtype)
    rows = vectors.movedim(2, -1).flatten(1, 2).to(dtype)  # [h, N, d]
    finite = rows.isfinite().all(-1)
    counted = (finite if valid is None else finite & valid.flatten(1)).to(dtype).unsqueeze(-1)
    rows = torch.where(counted > 0, rows, 0)
    sync = codebook.sync_affine_param and world_size() > 1

    def total(t: Tensor) -> Tensor:
        return all_reduce_sum(t) if sync else t

    number = total(counted.sum(1, keepdim=True))
    mean = total(rows.sum(1, keepdim=True)) / number
    variance = total(((rows - mean).square() * counted).sum(1, keepdim=True)) / number
    for name, value in zip(_OF_BATCH, (mean, variance), strict=True):
        average, value = getattr(codebook, name), value.to(codebook.codebook_mean)
        known = value.isfinite()  # neither without a vector, nor where the variance overflows
        if average is None:
            codebook.register_buffer(name, torch.where(known, value, float(name == "batch_variance")))
        else:
            average.copy_(torch.where(known, average.lerp(value, 1 - codebook.affine_param_batch_decay), average))


def to_batch(codebook: "Codebook", codes: Tensor) -> Tensor:  # [h, K, d]
    """Codes of the codebook as the batch sees them."""
    if codebook.batch_mean is None:
        return codes
    return (codes - codebook.codebook_mean) * (_std(codebook.batch_variance) / _std(codebook.codebook_variance)) + codebook.batch_mean


def to_codebook(codebook: "Codebook", sums: Tensor, counts: Tensor | float = 1.0) -> Tensor:  # [h, K, d], [h, K]
    """The inverse: sums of `counts` vectors of the batch, as sums of codes."""
    if codebook.batch_mean is None:
        return sums
    counts = counts.unsqueeze(-1).to(sums.dtype) if isinstance(counts, Tensor) else counts
    scale = _std(codebook.codebook_variance) / _std(codebook.batch_variance)
    return (sums - counts * codebook.batch_mean) * scale + counts * codebook.codebook_mean


def _std(variance: Tensor) -> Tensor:
    return variance.clamp(min=1e-5).sqrt()


def expect_batch_statistics(codebook: "Codebook", state_dict: dict[str, Any], prefix: str) -> None:
    """Have the statistics of the batch if, and only if, a state dict that is being loaded has them."""
    for name in _OF_BATCH:
        saved = state_dict.get(prefix + name)
        if (saved is None) != (getattr(codebook, name) is None):
            codebook.register_buffer(name, None if saved is None else torch.zeros_like(codebook.codebook_mean))
