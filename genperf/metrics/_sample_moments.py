# SPDX-License-Identifier: Apache-2.0
"""Differentiable mean and covariance of samples."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops._autograd import Function
from ..ops._blocks import gram


class Moments(NamedTuple):
    mean: Tensor  # [d]
    cov: Tensor | None = None  # [d, d]
    factor: Tensor | None = None  # [d, r], in place of cov = factor @ factor.T


def sample_moments(name: str, rows: Tensor, unbiased: bool) -> Moments:
    """Moments of rows [N, d]: with a factor if there are few samples, else with a covariance."""
    count, d = rows.shape
    if count <= 0.9 * d:  # above, products with the factor cost more than the smaller decomposition saves
        mean, factor = centered_factor(name, rows, unbiased)
        return Moments(mean, factor=factor)
    mean, cov = population_moments(rows)
    return Moments(mean, cov * (count / (count - 1)) if unbiased else cov)


def population_moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [d] and covariance [d, d] of rows [N, d], divided by N."""
    return _PopulationMoments.apply(rows)


class _PopulationMoments(Function):
    """Forward computes half of a symmetric product; backward needs one product, autograd's two; centered rows are not saved."""

    @staticmethod
    def forward(rows: Tensor) -> tuple[Tensor, Tensor]:
        mean = rows.mean(0)
        return mean, gram((rows - mean).T, mirror=True).div_(len(rows))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], outputs: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, outputs[0])

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_cov: Tensor) -> Tensor:
        rows, mean = ctx.saved_tensors
        slope = (grad_cov + grad_cov.T) / len(rows)
        return torch.addmm(grad_mean / len(rows) - mean @ slope, rows, slope)


def centered_factor(name: str, rows: Tensor, unbiased: bool) -> tuple[Tensor, Tensor]:
    """Mean [d] of rows [N, d] and a factor [d, N - 1] of their covariance, differentiable."""
    count = len(rows)
    needed = 2 if unbiased else 1
    if count < needed:
        raise ValueError(f"{name}: a{'n unbiased' * unbiased} covariance needs at least {needed} samples, got {count}.")
    mean = rows.mean(0)
    centered = rows - mean
    if count == 1:
        return mean, centered.T
    # Centered rows sum to zero. A Householder reflection that maps the vector of ones to the first axis makes the first row zero, which
    # is dropped: otherwise every distance would contain the square root of an eigenvalue that is zero but for rounding.
    independent = centered[1:] + centered[0] / (count**0.5 - 1)
    return mean, independent.T / (count - unbiased) ** 0.5
