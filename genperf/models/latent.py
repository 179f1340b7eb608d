# SPDX-License-Identifier: Apache-2.0
"""Interpolation and attribute vectors in a latent space."""

import torch
from torch import Tensor

from .._choices import Interpolation
from ..ops._validate import check_float, check_tensor


def lerp(
    a: Tensor,  # [B, ...]
    b: Tensor,  # [B, ...]
    weights: float | Tensor,  # scalar or [B]
) -> Tensor:  # [B, ...]
    """Linear interpolation: a at weight 0, b at weight 1.

    Equivalent to:
        torch.lerp(a, b, weights.view(B, 1, ...))

    Args:
        a, b: latent codes of the same shape and floating dtype.
        weights: one for all samples or one for each; weights outside of [0, 1] extrapolate.

    Raises:
        ValueError: shapes that do not match.
        TypeError: codes that are not floating-point tensors of the same dtype.
    """
    return torch.lerp(a, b, _per_sample("lerp", a, b, weights).to(a.dtype))


def slerp(
    a: Tensor,  # [B, ...]
    b: Tensor,  # [B, ...]
    weights: float | Tensor,  # scalar or [B]
) -> Tensor:  # [B, ...]
    """Spherical linear interpolation; Shoemake, "Animating Rotation with Quaternion Curves" (1985).

    Equivalent to (one sample; u and v are a and b, flattened and normalized):
        angle = acos(u @ v)
        (sin((1 - weight) * angle) * a + sin(weight * angle) * b) / sin(angle)

    If a and b have the same norm, so do all points in between: interpolations of Gaussian codes keep the typical norm of
    samples, unlike linear interpolations (White, "Sampling Generative Networks", 2016). The angle is between whole samples. If
    it is 0 or pi, or a or b is zero, the interpolation is linear. Computed in at least float32; differentiable.

    Args:
        a, b: latent codes of the same shape and floating dtype.
        weights: one for all samples or one for each.

    Raises:
        ValueError: shapes that do not match.
        TypeError: codes that are not floating-point tensors of the same dtype.
    """
    weights = _per_sample("slerp", a, b, weights)
    x, y = (t.to(weights.dtype) for t in (a, b))
    length_x, length_y = _length(x), _length(y)
    u, v = x / torch.where(length_x > 0, length_x, 1), y / torch.where(length_y > 0, length_y, 1)
    # Kahan's formula, accurate near 0 and pi, where acos is not.
    angle = 2 * torch.atan2(_length(u - v), _length(u + v))
    sine = angle.sin()
    is_arc = (sine > torch.finfo(sine.dtype).eps ** 0.5) & (length_x > 0) & (length_y > 0)
    sine = torch.where(is_arc, sine, 1.0)
    of_a = torch.where(is_arc, torch.sin((1 - weights) * angle) / sine, 1 - weights)
    of_b = torch.where(is_arc, torch.sin(weights * angle) / sine, weights)
    return (of_a * x + of_b * y).to(a.dtype)


INTERPOLATIONS = {"lerp": lerp, "slerp": slerp}


def interpolations(
    a: Tensor,  # [B, ...]
    b: Tensor,  # [B, ...]
    steps: int,
    kind: Interpolation = "slerp",
) -> Tensor:  # [B, steps, ...]
    """Evenly spaced points from a to b, both included.

    Equivalent to:
        torch.stack([slerp(a, b, weight) for weight in torch.linspace(0, 1, steps)], 1)

    Decode all points:
        images = system.decode(interpolations(a, b, 8).flatten(0, 1)).unflatten(0, (-1, 8))

    Args:
        a, b: latent codes of the same shape and floating dtype.
        steps: at least 2.
        kind: "slerp", for codes with a Gaussian prior, or "lerp".

    Raises:
        ValueError: shapes that do not match, fewer than 2 steps, or an unknown kind.
        TypeError: codes that are not floating-point tensors of the same dtype.
    """
    if steps < 2:
        raise ValueError(f"interpolations: steps must be at least 2, got {steps}.")
    if kind not in INTERPOLATIONS:
        raise ValueError(f"interpolations: kind must be one of {', '.join(INTERPOLATIONS)}, got {kind!r}.")
    return torch.stack([INTERPOLATIONS[kind](a, b, step / (steps - 1)) for step in range(steps)], 1)


def attribute_vector(
    codes_with: Tensor,  # [M, ...]
    codes_without: Tensor,  # [N, ...]
) -> Tensor:  # [...]
    """The latent direction of an attribute; Larsen et al., "Autoencoding beyond pixels using a learned similarity metric" (2016).

    Equivalent to:
        codes_with.mean(0) - codes_without.mean(0)

    `codes + strength * attribute_vector(...)` adds the attribute, a negative strength removes it. Means are computed in at least
    float32.

    Args:
        codes_with, codes_without: codes of samples with and without the attribute; M and N may differ.

    Raises:
        ValueError: shapes that do not match, or no samples with or without the attribute.
        TypeError: codes that are not floating-point tensors of the same dtype.
    """
    op = "attribute_vector"
    _check_pair(op, codes_with, codes_without, "codes_with", "codes_without")
    if codes_with.shape[1:] != codes_without.shape[1:] or not len(codes_with) or not len(codes_without):
        got = f"{list(codes_with.shape)} and {list(codes_without.shape)}"
        raise ValueError(f"{op}: codes_with and codes_without must be samples of the same shape, at least one each, got {got}.")
    working = torch.promote_types(codes_with.dtype, torch.float32)
    return (codes_with.mean(0, dtype=working) - codes_without.mean(0, dtype=working)).to(codes_with.dtype)


def _per_sample(op: str, a: Tensor, b: Tensor, weights: float | Tensor) -> Tensor:
    """Check a, b and the weights, and return the weights as [1 or B, 1, ...] in at least float32."""
    _check_pair(op, a, b, "a", "b")
    if a.shape != b.shape:
        raise ValueError(f"{op}: a and b must have the same shape, got {list(a.shape)} and {list(b.shape)}.")
    weights = torch.as_tensor(weights, device=a.device, dtype=torch.promote_types(a.dtype, torch.float32))
    if weights.shape not in ((), a.shape[:1]):
        raise ValueError(f"{op}: weights must be a scalar or have shape {list(a.shape[:1])}, got {list(weights.shape)}.")
    return weights.reshape(-1, *[1] * (a.dim() - 1))


def _check_pair(op: str, a: Tensor, b: Tensor, name_a: str, name_b: str) -> None:
    for name, tensor in ((name_a, a), (name_b, b)):
        check_tensor(op, name, tensor)
        check_float(op, name, tensor)
        if tensor.dim() == 0:
            raise ValueError(f"{op}: {name} must have a batch dimension, got a scalar.")
    if a.dtype != b.dtype:
        raise TypeError(f"{op}: {name_a} and {name_b} must have the same dtype, got {a.dtype} and {b.dtype}.")


def _length(x: Tensor) -> Tensor:
    """The norm of each sample of x [B, ...], as [B, 1, ...]."""
    return torch.linalg.vector_norm(x.unsqueeze(-1).flatten(1), dim=1).reshape(-1, *[1] * (x.dim() - 1))
