# SPDX-License-Identifier: Apache-2.0
"""Perplexity and dead codes of a codebook."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops._validate import check_index_range, check_tensor


class CodeUsage(NamedTuple):
    """How a set of indices uses a codebook; scalars on the device of the indices."""

    perplexity: Tensor
    """exp of the entropy of the codes' frequencies; 0 without indices."""
    used: Tensor
    """Number of codes that occur."""
    dead: Tensor
    """Share of the codes that do not occur."""


def code_usage(indices: Tensor, num_codes: int) -> CodeUsage:
    """Perplexity, number of used codes, and share of dead codes.

    Equivalent to:
        frequency = torch.bincount(indices.flatten(), minlength=num_codes) / indices.numel()
        perplexity, used = torch.special.entr(frequency).sum().exp(), (frequency > 0).sum()
        dead = 1 - used / num_codes

    Args:
        indices: int64 of any shape, -1 ... num_codes - 1; -1 (a masked vector) is left out.
        num_codes: K.

    Returns:
        perplexity, float64; used, int64; dead, float32.

    Raises:
        TypeError: indices that are not an int64 tensor.
        ValueError: no code.
        IndexError: an index below -1, or num_codes or above (on the CPU).
    """
    check_tensor("code_usage", "indices", indices)
    if indices.dtype != torch.int64:
        raise TypeError(f"code_usage: indices must be int64, got {indices.dtype}.")
    if num_codes < 1:
        raise ValueError(f"code_usage: num_codes must be at least 1, got {num_codes}.")
    check_index_range("code_usage", indices, num_codes)
    flat = indices.reshape(-1)
    # Slot 0 is for the index -1. Not bincount, which synchronizes with the device to size its result.
    counts = torch.zeros(num_codes + 1, dtype=torch.float64, device=indices.device)
    counts = counts.scatter_add(0, flat + 1, counts.new_ones(flat.shape))[1:]
    return usage_from_counts(counts, 1)


def usage_from_counts(counts: Tensor, least: float) -> CodeUsage:
    """The usage for float64 counts [K]; a code is used where its count is at least `least`."""
    total = counts.sum()
    entropy = torch.special.entr(counts / total.clamp(min=torch.finfo(torch.float64).tiny)).sum()
    used = (counts >= least).sum()
    return CodeUsage(torch.where(total > 0, entropy.exp(), 0), used, 1 - used / counts.numel())
