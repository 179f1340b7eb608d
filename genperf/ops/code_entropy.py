"""Entropies of the distribution over the codes: of each position's, and of their mean."""

import torch
from torch import Tensor

from ._code_softmax import check_arguments, code_softmax, unavailable

__all__ = ["code_entropy", "unavailable"]


def code_entropy(
    x: Tensor,  # [..., D, ...]
    codebook: Tensor,  # [K, D], or [heads, K, D]
    *,
    temperature: float = 1.0,
    logits: str = "distance",
    channel_dim: int = -1,
    mask: Tensor | None = None,  # [...]
    epsilon: float = 0.0,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """How sure each vector is of its code, and how evenly all codes are used: what entropy and diversity losses are made of.

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

    without the [N, K] tensors: chunks of them, of a fixed size, are computed in forward and again in backward. Distances are
    computed relative to the mean of the codebook, in float32 whatever precision is allowed for products of torch's own.

    `sample_entropy - batch_entropy` is the loss of LFQ (Yu et al., "Language Model Beats Diffusion", 2023), IBQ and
    Open-MAGVIT2. The diversity loss of vector-quantize-pytorch is `-batch_entropy` with temperature=1 / its
    codebook_diversity_temperature (1 / 100), epsilon=1e-5, and logits="dot" of unit vectors where it has use_cosine_sim. It averages
    p over the batch alone, for each place of a sequence, and then the loss over the places: for x [B, T, D] it is
        -code_entropy(x.movedim(1, 0), codebook.expand(T, -1, -1), temperature=1 / 100, epsilon=1e-5)[1].mean()
    which holds [T, K] sums in float64 and, where the codebook learns, its gradient [T, K, D].

    Args:
        x: float32, bfloat16, float16 or float64; any strides.
        codebook: K >= 1 codes, of x's dtype, or float32 with a half-precision x. With [heads, K, D], dimension 0 of x is the
            heads, each with a codebook of its own, as in `nearest_code`.
        temperature: positive.
        logits: "distance", "squared_distance" or "dot".
        channel_dim: the dimension of x that holds a vector; heads count as a dimension of x.
        mask: bool, x's shape without channel_dim; where False a vector is left out.
        epsilon: smallest mean probability whose logarithm is taken; 0 is the smallest normal number.
        impl: None picks; "native" and "reference" insist.

    Returns:
        sample_entropy and batch_entropy, in nats: scalars, or [heads]; float32, float64 for a float64 x; 0 where no vector counts.
        NaN in a vector that counts makes both NaN. Sums are taken in a fixed order. Differentiable in x and codebook; a distance
        below 1e-4 passes no gradient. The second derivative (create_graph=True) runs in plain PyTorch, with tensors of size [N, K].

    Raises:
        ValueError, TypeError: as `nearest_code`, and for a mask, temperature, epsilon or logits that do not fit.
        NotImplementedError: an `impl` that cannot run here.
    """
    op = "code_entropy"
    channel = check_arguments(op, x, codebook, temperature, logits, channel_dim, mask)
    if not 0 <= epsilon < 1:
        raise ValueError(f"{op}: epsilon must lie in [0, 1), got {epsilon!r}.")
    entropy, usage, count = code_softmax(op, x, codebook, channel, mask, None, logits, temperature, impl)
    dtype = entropy.dtype
    mean = usage / (count.unsqueeze(1) if isinstance(count, Tensor) else count)
    batch = -(mean * mean.clamp(min=max(epsilon, torch.finfo(torch.float32).tiny)).log()).sum(1).to(dtype)
    sample = (entropy.sum((1, 2), dtype=torch.float64) / count).to(dtype)
    return (sample, batch) if codebook.dim() == 3 else (sample.squeeze(0), batch.squeeze(0))
