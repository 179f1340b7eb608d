# SPDX-License-Identifier: Apache-2.0
"""Divergences between discrete distributions, and the Wasserstein distance between scalar samples."""

import torch
from torch import Tensor

from ..ops.covariance_factor import working_dtype


def kl_divergence(p: Tensor, q: Tensor, *, dim: int = -1, normalize: bool = False) -> Tensor:
    """Kullback-Leibler divergence of probability vectors, in nats.

    Equivalent to (p, q > 0):
        kl = (p * (p / q).log()).sum(dim)

    An element with p = 0 contributes 0 for any q; an element with q = 0 and p > 0 makes the divergence infinite.

    Args:
        p, q: non-negative, of shapes that broadcast; half precision is computed in float32. Signs and sums are not checked,
            which would synchronize with the device.
        dim: the dimension of the probability vectors.
        normalize: whether to divide p and q by their sums first, for counts and unnormalized densities.

    Returns:
        A tensor of the broadcast shape without `dim`, float32 (float64 for float64). Differentiable; the gradient is 0
        where p = 0.

    Raises:
        ValueError: shapes that do not broadcast, or a dim out of range.
        TypeError: p or q that is not a floating-point tensor.
    """
    p, q = _probabilities("kl_divergence", p, q, dim, normalize)
    return _relative_entropy(p, q).sum(dim)


def js_divergence(p: Tensor, q: Tensor, *, dim: int = -1, normalize: bool = False) -> Tensor:
    """Jensen-Shannon divergence of probability vectors, in nats, from 0 (equal) to log 2 (disjoint supports); Lin (1991).

    Equivalent to:
        m = (p + q) / 2
        js = (kl_divergence(p, m) + kl_divergence(q, m)) / 2

    Clamped at 0, so that its square root, the Jensen-Shannon distance, is not NaN. The value of the GAN game for the optimal
    discriminator is 2 js - log 4 (Goodfellow et al. 2014, theorem 1).

    Args, Returns and Raises: as for `kl_divergence`. Where one of p and q is 0 and the other is positive, the derivative with
    respect to the former is infinite; the gradient returned there is that of the other's term alone, -1/2.
    """
    p, q = _probabilities("js_divergence", p, q, dim, normalize)
    middle = (p + q) / 2
    # Non-negative by convexity, but for rounding.
    return ((_relative_entropy(p, middle) + _relative_entropy(q, middle)) / 2).sum(dim).clamp(min=0)


def wasserstein_1d(x: Tensor, y: Tensor, x_weights: Tensor | None = None, y_weights: Tensor | None = None, *, p: float = 1.0) -> Tensor:
    """Exact Wasserstein distance of order p between scalar samples; the numbers of samples may differ.

    Equivalent to (N = M, no weights):
        distance = (x.sort().values - y.sort().values).abs().pow(p).mean(-1).pow(1 / p)

    In general the p-norm of the difference of the quantile functions:
        W_p = (integral_0^1 |F_x^-1(u) - F_y^-1(u)|^p du)^(1/p)

    Args:
        x: [..., N], N >= 1; half precision is computed in float32.
        y: [..., M], M >= 1, with the same leading dimensions.
        x_weights, y_weights: of x's and y's shape, non-negative with a positive sum (not checked); divided by their sum.
            None for uniform weights.
        p: order, >= 1 and finite.

    Returns:
        [...], float32 (float64 for float64). Differentiable in samples and weights, except where steps of the two
        distribution functions coincide; the gradient of a distance of 0 is 0.

    Raises:
        ValueError: shapes that do not match, no samples, or a p out of range.
        TypeError: an argument that is not a floating-point tensor.
    """
    op = "wasserstein_1d"
    for name, samples, weights in (("x", x, x_weights), ("y", y, y_weights)):
        _check_floating(op, name, samples)
        if samples.dim() == 0 or samples.shape[-1] == 0:
            raise ValueError(f"{op}: {name} must have at least one sample, got shape {list(samples.shape)}.")
        if weights is not None:
            _check_floating(op, f"{name}_weights", weights)
            if weights.shape != samples.shape:
                raise ValueError(f"{op}: {name}_weights must have the shape of {name}, {list(samples.shape)}, got {list(weights.shape)}.")
    if x.shape[:-1] != y.shape[:-1]:
        raise ValueError(f"{op}: x and y must agree but for the last dimension, got {list(x.shape)} and {list(y.shape)}.")
    if not 1 <= p < float("inf"):
        raise ValueError(f"{op}: p must be a finite number, at least 1, got {p!r}.")
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    x_steps, x = _sorted_steps(x.to(dtype), x_weights)
    y_steps, y = _sorted_steps(y.to(dtype), y_weights)
    steps = torch.cat([x_steps, y_steps], -1).sort(-1).values
    lengths = torch.diff(steps, dim=-1, prepend=torch.zeros_like(steps[..., :1]))
    distance = (_quantiles(x_steps, x, steps) - _quantiles(y_steps, y, steps)).abs()
    if p == 1:
        return (lengths.to(dtype) * distance).sum(-1)
    # Scaled to at most 1, so that powers do not overflow. Steps of length 0 may have larger distances, hence the clamp.
    scale = torch.where(lengths > 0, distance, 0).detach().amax(-1, keepdim=True)
    scale = torch.where(scale == 0, 1, scale)
    total = (lengths.to(dtype) * (distance / scale).clamp(max=1).pow(p)).sum(-1)
    # The derivative of the root at 0 is infinite.
    return torch.where(total == 0, 0, torch.where(total == 0, 1, total).pow(1 / p)) * scale.squeeze(-1)


def _relative_entropy(p: Tensor, q: Tensor) -> Tensor:
    """p log(p / q) of each element; 0 at p = 0."""
    empty = p == 0
    return p * (torch.where(empty, 1, p).log() - torch.where(empty, 1, q).log())


def _probabilities(op: str, p: Tensor, q: Tensor, dim: int, normalize: bool) -> tuple[Tensor, Tensor]:
    for name, values in (("p", p), ("q", q)):
        _check_floating(op, name, values)
    try:
        shape = torch.broadcast_shapes(p.shape, q.shape)
    except RuntimeError:
        raise ValueError(f"{op}: p and q must have shapes that broadcast, got {list(p.shape)} and {list(q.shape)}.") from None
    if not -len(shape) <= dim < len(shape):
        raise ValueError(f"{op}: dim must be a dimension of p and q, got dim={dim} for shape {list(shape)}.")
    dtype = torch.promote_types(torch.promote_types(p.dtype, q.dtype), torch.float32)
    p, q = (t.to(dtype).expand(shape) for t in (p, q))
    return (p / p.sum(dim, keepdim=True), q / q.sum(dim, keepdim=True)) if normalize else (p, q)


def _sorted_steps(samples: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """The cumulative probability at each sorted sample, in float64 (float32 on MPS), and the sorted samples."""
    samples, order = samples.sort(-1)
    wide = working_dtype(samples.device)
    if weights is None:
        count = samples.shape[-1]
        steps = torch.arange(1, count + 1, dtype=wide, device=samples.device) / count
        return steps.expand(samples.shape), samples
    cumulative = weights.to(wide).gather(-1, order).cumsum(-1)
    return cumulative / cumulative[..., -1:], samples


def _quantiles(steps: Tensor, samples: Tensor, at: Tensor) -> Tensor:
    """Quantiles at the probabilities `at`: for each, the first sample whose cumulative probability reaches it."""
    index = torch.searchsorted(steps.detach().contiguous(), at.detach().contiguous())
    return samples.gather(-1, index)


def _check_floating(op: str, name: str, values: Tensor) -> None:
    if not isinstance(values, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(values).__name__}.")
    if not values.is_floating_point():
        raise TypeError(f"{op}: {name} must be of a floating dtype, got {values.dtype}.")
