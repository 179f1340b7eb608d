# SPDX-License-Identifier: Apache-2.0
"""Entropy of the softmax over the codes, per sample and of the batch mean."""

import torch
from torch import Tensor

from .._choices import Impl, Logits
from ._code_softmax import check_arguments, code_softmax, unavailable

__all__ = ["code_entropy", "unavailable"]

_TINY = torch.finfo(torch.float32).tiny


def code_entropy(
    x: Tensor,  # [..., D, ...]
    codebook: Tensor,  # [K, D], or [heads, K, D]
    *,
    temperature: float = 1.0,
    logits: Logits = "distance",
    channel_dim: int = -1,
    mask: Tensor | None = None,  # [...]
    epsilon: float = 0.0,
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor]:
    """Per-sample entropy of the code softmax, and entropy of its batch mean: the terms of entropy and diversity losses.

    Equivalent to (channel_dim=-1, no mask):
        x = x.reshape(-1, D)
        squared = (x[:, None] - codebook).square().sum(-1)                      # [N, K]
        logits = -squared.clamp(min=1e-8).sqrt()                                # "distance"
        logits = -squared                                                       # "squared_distance"
        logits = x @ codebook.T                                                 # "dot"
        p = (logits / temperature).softmax(-1)
        mean = p.mean(0)
        sample_entropy = -(p * p.log()).sum(-1).mean()
        batch_entropy = -(mean * mean.clamp(min=epsilon).log()).sum()

    without the [N, K] tensors: forward and backward compute them in chunks of a fixed size. Distances are computed relative to the mean
    of the codebook, and products in full float32 precision whatever torch.backends allows.

    `sample_entropy - batch_entropy` is the entropy loss of LFQ (Yu et al., "Language Model Beats Diffusion", 2023), IBQ and Open-MAGVIT2.
    The diversity loss of vector-quantize-pytorch is `-batch_entropy` with temperature = 1 / codebook_diversity_temperature (1 / 100) and
    epsilon=1e-5, with logits="dot" on unit vectors if use_cosine_sim. It averages p over the batch for each position of a sequence and
    the loss over the positions. For x [B, T, D] that is
        -code_entropy(x.movedim(1, 0), codebook.expand(T, -1, -1), temperature=1 / 100, epsilon=1e-5)[1].mean()
    which stores [T, K] float64 sums and, if the codebook requires a gradient, that gradient as [T, K, D].

    Args:
        x: float32, bfloat16, float16 or float64; any strides.
        codebook: K >= 1 codes in x's dtype, or float32 with a half-precision x. With [heads, K, D], dimension 0 of x is the heads, each
            with its own codebook, as in `nearest_code`.
        temperature: positive.
        logits: "distance", "squared_distance" or "dot".
        channel_dim: the dimension of x that holds the D channels; the heads count as a dimension of x.
        mask: bool, x's shape without channel_dim; vectors where it is False are excluded.
        epsilon: the mean probabilities are clamped to at least this before the logarithm; 0 stands for the smallest normal number.
        impl: "native", "reference", or None to choose automatically.

    Returns:
        sample_entropy and batch_entropy, in nats: scalars, or [heads] each; float32 (float64 for a float64 x); 0 without vectors. NaN in a
        vector that is not masked makes both NaN. Deterministic. Differentiable in x and codebook; a distance below 1e-4 has the gradient 0.
        Second derivatives (create_graph=True) run in plain PyTorch, with [N, K] tensors.

    Raises:
        ValueError, TypeError: as `nearest_code`, or an invalid mask, temperature, epsilon or logits.
        NotImplementedError: an `impl` that cannot run here.
    """
    op = "code_entropy"
    channel = check_arguments(op, x, codebook, temperature, logits, channel_dim, mask)
    if not 0 <= epsilon < 1:
        raise ValueError(f"{op}: epsilon must lie in [0, 1), got {epsilon!r}.")
    floor = max(float(epsilon), _TINY)
    return code_softmax(op, x, codebook, channel, mask, None, logits, temperature, floor, impl)
