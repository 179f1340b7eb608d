# SPDX-License-Identifier: Apache-2.0
"""Sampling codes from the softmax over the codebook."""

import math

import torch
from torch import Tensor

from .._choices import Impl, Logits
from ._autograd import call
from ._code_softmax import by_head, check_arguments, is_small, logits_reference, unavailable
from ._code_softmax_chunks import FORMS
from ._dispatch import choose_impl
from ._layout import positions_shape
from ._noise import draw_seed, first_sample, gumbel_noise
from ._precision import accumulator_dtype
from .nearest_code import nearest_code

__all__ = ["sample_code", "unavailable"]


def sample_code(
    x: Tensor,  # [..., D, ...]
    codebook: Tensor,  # [K, D], or [heads, K, D]
    *,
    temperature: float = 1.0,
    logits: Logits = "distance",
    channel_dim: int = -1,
    mask: Tensor | None = None,  # [...]
    generator: torch.Generator | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """Sample a code for every vector of x from the softmax over all codes: the stochastic counterpart of `nearest_code`.

    Equivalent to (channel_dim=-1, no mask; x [N, D], and the logits [N, K] of `code_entropy`):
        noise = -torch.empty_like(logits).exponential_().log()
        indices = (logits + temperature * noise).argmax(-1)                     # drawn from softmax(logits / temperature)

    without the [N, K] logits and noise, which are computed in chunks of a fixed size. The noise is a function of a seed and a position, so
    the result depends neither on the chunks nor on the layout of x.

    Args:
        temperature: at least 0; with 0 the result is that of `nearest_code`, or the code with the largest dot product.
        mask: bool, x's shape without channel_dim; where it is False the index is -1.
        generator: the generator that the seed of the noise is drawn from; None for torch's default generator of x's device.
        x, codebook, logits, channel_dim, impl: as in `code_entropy`.

    Returns:
        indices, int64, x's shape without channel_dim. Ties give the lowest index. Codes with a NaN logit are never chosen, and a vector
        with a NaN gets index 0. Not differentiable.

    Raises:
        ValueError, TypeError, NotImplementedError: as `code_entropy`, or an invalid generator.
    """
    return draw_codes(x, codebook, temperature, logits, channel_dim, mask, generator, impl)


def draw_codes(
    x: Tensor,
    codebook: Tensor,
    temperature: float,
    logits: Logits,
    channel_dim: int,
    mask: Tensor | None,
    generator: torch.Generator | None = None,
    impl: Impl | None = None,
    first: int | None = None,
) -> Tensor:
    """`sample_code` with, if `first` is given, the noise of the vectors first, first + 1, ... of a larger batch in each head."""
    op = "sample_code"
    channel = check_arguments(op, x, codebook, temperature, logits, channel_dim, mask)
    chosen = choose_impl(op, impl, unavailable(x.device, x.dtype))
    x, codebook = x.detach(), codebook.detach()
    if temperature == 0 and logits != "dot":
        indices = nearest_code(x, codebook, channel_dim=channel, impl="reference" if chosen == "reference" else None)
        return indices if mask is None else indices.masked_fill(~mask, -1)
    if first is None:
        batch = codebook.dim() - 2
        first = first_sample() * math.prod(positions_shape(x, channel)[batch + 1 :]) if channel != batch else 0
    seed = draw_seed(op, x.device, generator) if temperature > 0 else None
    if chosen != "reference" and is_small(x, codebook, mask):
        return call(torch.ops.genperf.small_sample_code, x, codebook, mask, seed, first, FORMS[logits], float(temperature), channel)
    positions, codes, of_positions, _ = by_head(x, codebook, mask, None, channel)
    arguments = (positions, codes, of_positions, seed, first, logits, float(temperature))
    found = sample_code_reference(*arguments) if chosen == "reference" else call(torch.ops.genperf.sample_code, *arguments)
    return found.reshape(positions_shape(x, channel))


def sample_code_reference(
    x: Tensor,  # [heads, outer, D, inner]
    codebook: Tensor,  # [heads, K, D]
    mask: Tensor | None,  # [heads, outer, inner]
    seed: Tensor | None,
    first: int,
    logits: Logits,
    temperature: float,
) -> Tensor:
    """The op in plain PyTorch."""
    heads, outer, _, inner = x.shape
    perturbed = logits_reference(x, codebook, None, logits)  # [heads, N, K]
    if seed is not None:
        dtype = accumulator_dtype(x.dtype)
        noise = [gumbel_noise(seed + head, outer * inner, codebook.shape[1], dtype, first) for head in range(heads)]
        perturbed = perturbed + temperature * torch.stack(noise)
    indices = perturbed.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf).argmax(-1).reshape(heads, outer, inner)
    return indices if mask is None else indices.masked_fill(~mask, -1)
