"""Mean and covariance of samples, differentiable."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops._blocks import gram


class Moments(NamedTuple):
    mean: Tensor  # [d]
    cov: Tensor | None = None  # [d, d]
    factor: Tensor | None = None  # [d, r], in place of the covariance


def sample_moments(name: str, rows: Tensor, unbiased: bool) -> Moments:
    """Of rows [N, d], in the form that makes less work."""
    count, d = rows.shape
    if count <= 0.9 * d:  # nearer to d, products with the factor cost more than the smaller decomposition saves
        mean, factor = centered_factor(name, rows, unbiased)
        return Moments(mean, factor=factor)
    mean, cov = population_moments(rows)
    return Moments(mean, cov * (count / (count - 1)) if unbiased else cov)


def population_moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [d] and covariance [d, d] of rows [N, d], divided by N."""
    return _PopulationMoments.apply(rows)


class _PopulationMoments(torch.autograd.Function):
    """One product in forward, of which half is computed, and one in backward, where autograd takes two; centered rows are not kept."""

    @staticmethod
    def forward(rows):
        mean = rows.mean(0)
        return mean, gram((rows - mean).T, mirror=True).div_(len(rows))

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.save_for_backward(*inputs, outputs[0])

    @staticmethod
    def backward(ctx, grad_mean, grad_cov):
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
    # Centered rows sum to zero. A reflection that takes the vector of ones to the first row makes that row zero, and leaves it out:
    # else every distance would hold the square root of an eigenvalue that is zero but for rounding.
    independent = centered[1:] + centered[0] / (count**0.5 - 1)
    return mean, independent.T / (count - unbiased) ** 0.5
