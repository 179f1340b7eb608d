# SPDX-License-Identifier: Apache-2.0
"""Beam search over the quantizers of a ResidualVQ: the best sums of codes, instead of the nearest code of each residual."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .vector_quantize_pytorch import VectorQuantize


class Beam(NamedTuple):
    """What the best beam of each vector chose."""

    quantized: Tensor
    """[..., d], the sum of the codes."""
    indices: Tensor
    """[..., quantizers]"""
    losses: Tensor
    """[..., quantizers], the commitment loss of each vector."""
    inputs: list[Tensor]
    """[..., d] for each quantizer."""


def beam_search(
    layers: Sequence[VectorQuantize],
    x: Tensor,  # [..., d]
    mask: Tensor | None,  # [...]
    beam_size: int,
    score_weights: Sequence[float],
    next_residual: Callable[[Tensor, Tensor], Tensor],
    transform: Callable[[int, Tensor], Callable[[Tensor], Tensor] | None],
    options: dict[str, Any],
) -> Beam:
    """Keep, after each quantizer, the `beam_size` sums of codes with the least weighted sum of commitment losses.

    Args:
        next_residual: a function of residual and quantized.
        transform: of the number of a quantizer and the sum of codes before it, its codebook_transform_fn or None.
        options: of the quantizers' forward.
    """
    scores = x.new_zeros(*x.shape[:-1], 1)  # [..., beams]
    residual, quantized = x.unsqueeze(-2), torch.zeros_like(x).unsqueeze(-2)  # [..., beams, d]
    indices: list[Tensor] = []  # [..., beams] each
    losses: list[Tensor] = []
    inputs: list[Tensor] = []  # [..., beams, d] each
    for number, layer in enumerate(layers):
        beams = residual.shape[-2]
        masked = None if mask is None else mask.unsqueeze(-1).expand(*mask.shape, beams)
        transformed = transform(number, quantized)
        # [..., beams, k, d], and [..., beams, k] twice
        codes, found, loss = layer(layer.like_input(residual), None, masked, topk=beam_size, codebook_transform_fn=transformed, **options)
        codes = layer.channels_last(codes)
        error = loss
        if loss.dim() == 0:  # without a commitment loss
            error = (codes.detach() - residual.detach().unsqueeze(-2)).square().mean(-1)
            error = error if masked is None else torch.where(masked.unsqueeze(-1), error, 0)
            loss = loss.expand_as(error)
        scores = (scores.unsqueeze(-1) - score_weights[number] * error).flatten(-2)
        kept = 1 if number == len(layers) - 1 else min(beam_size, scores.shape[-1])
        scores, picked = scores.topk(kept)
        parent = picked // found.shape[-1]

        inputs = [_pick(t, parent) for t in (*inputs, residual)]
        indices = [*(t.gather(-1, parent) for t in indices), found.flatten(-2).gather(-1, picked)]
        losses = [*(t.gather(-1, parent) for t in losses), loss.flatten(-2).gather(-1, picked)]
        codes = _pick(codes.flatten(-3, -2), picked)
        residual = next_residual(inputs[-1], codes)
        quantized = _pick(quantized, parent) + codes
    best_indices, best_losses = (torch.stack([t[..., 0] for t in each], -1) for each in (indices, losses))
    return Beam(quantized[..., 0, :], best_indices, best_losses, [t[..., 0, :] for t in inputs])


def _pick(t: Tensor, chosen: Tensor) -> Tensor:  # [..., beams, d], [..., kept]
    return t.gather(-2, chosen.unsqueeze(-1).expand(*chosen.shape, t.shape[-1]))
