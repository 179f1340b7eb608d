# SPDX-License-Identifier: Apache-2.0
"""Moments of diagonal Gaussians, in two tensors or packed in one, as the halves and rows that the kernels take."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._autograd import transformed
from ._layout import as_rows, rows_fit

Moments = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]  # mean, logvar, and those of the prior; packed where logvar is None


def halves(mean: Tensor, logvar: Tensor | None, dim: int) -> tuple[Tensor, Tensor]:
    if logvar is not None:
        return mean, logvar
    first, second = mean.chunk(2, dim)
    return first, second


def all_halves(moments: Moments, dim: int) -> list[Tensor | None]:
    """mean, logvar and those of the prior, unpacked."""
    mean, logvar, prior_mean, prior_logvar = moments
    prior = (None, None) if prior_mean is None else halves(prior_mean, prior_logvar, dim)
    return [*halves(mean, logvar, dim), *prior]


def rows_of(inputs: Moments, extra: Sequence[Tensor | None], written: Moments | None, dim: int) -> list[Tensor | None]:
    """`as_rows` of the halves of `inputs`, of `extra`, and of the halves of `written`."""
    # The common case, contiguous packed moments. Not under torch.compile, since Inductor (torch 2.13) loses writes through such views if
    # sizes are dynamic, nor under a transform of torch.func, where the storage is that of a batch.
    if inputs[1] is None and not torch.compiler.is_compiling() and not transformed():
        for t in (*inputs, *extra, *(written or ())):
            if t is not None and not t.is_contiguous():
                break
        else:
            shape = tuple(inputs[0].shape)
            sizes = shape[0], math.prod(shape[1:dim]), math.prod(shape[dim:]) // 2
            found = _contiguous_halves(inputs, sizes)
            found += [None if t is None else t.view(*sizes) for t in extra]
            return found if written is None else found + _contiguous_halves(written, sizes)
    return as_rows([*all_halves(inputs, dim), *extra], all_halves(written, dim) if written else ())


def _contiguous_halves(moments: Moments, sizes: tuple[int, int, int]) -> list[Tensor | None]:
    """Contiguous mean, logvar and those of the prior, unpacked and viewed as [B, rows, columns]; halves of a row alternate in memory."""
    mean, logvar, prior_mean, prior_logvar = moments
    return [
        *_contiguous_pair(mean, logvar, *sizes),
        *((None, None) if prior_mean is None else _contiguous_pair(prior_mean, prior_logvar, *sizes)),
    ]


def _contiguous_pair(mean: Tensor, logvar: Tensor | None, batch: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    if logvar is not None:
        return mean.view(batch, rows, columns), logvar.view(batch, rows, columns)
    # Faster than chunk and a view.
    sizes, strides, start = (batch, rows, columns), (2 * rows * columns, 2 * columns, 1), mean.storage_offset()
    return mean.as_strided(sizes, strides, start), mean.as_strided(sizes, strides, start + columns)


def empty_moments(moments: Moments, memory_format: torch.memory_format) -> Moments:
    def empty(t: Tensor | None) -> Tensor | None:
        return None if t is None else torch.empty_like(t, memory_format=memory_format)

    mean, logvar, prior_mean, prior_logvar = moments
    return torch.empty_like(mean, memory_format=memory_format), empty(logvar), empty(prior_mean), empty(prior_logvar)


def moments_fit(moments: Moments, dim: int) -> bool:
    """Whether the kernel can view the halves of all the tensors as rows."""
    if all(t is None or t.is_contiguous() for t in moments):
        return True
    return rows_fit([t for t in all_halves(moments, dim) if t is not None])
