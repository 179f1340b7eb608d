"""Cross-entropy of given codes under the softmax over the codebook."""

import torch
from torch import Tensor

from ._code_softmax import check_arguments, code_softmax, unavailable
from .code_statistics import check_indices

__all__ = ["code_cross_entropy", "unavailable"]


def code_cross_entropy(
    x: Tensor,  # [..., D, ...]
    codebook: Tensor,  # [K, D], or [heads, K, D]
    indices: Tensor,  # [...]
    *,
    temperature: float = 1.0,
    logits: str = "distance",
    channel_dim: int = -1,
    mask: Tensor | None = None,  # [...]
    impl: str | None = None,
) -> Tensor:
    """The mean of -log p of the given codes, p being the softmax over all codes that `code_entropy` describes.

    Equivalent to (channel_dim=-1, no mask; x is [N, D], and logits [N, K] those of `code_entropy`):
        loss = F.cross_entropy(logits / temperature, indices, ignore_index=-1)

    without the [N, K] tensors: chunks of them, of a fixed size, are computed in forward and again in backward.

    The cross-entropy losses of vector-quantize-pytorch (`indices=` in its forward, and commitment_use_cross_entropy_loss) are this
    with temperature=1, and logits="dot" for unit vectors where it has use_cosine_sim.

    Args:
        indices: int64, x's shape without channel_dim; -1 leaves a vector out.
        x, codebook, temperature, logits, channel_dim, mask, impl: as in `code_entropy`.

    Returns:
        In nats: a scalar, or [heads]; float32, float64 for a float64 x; 0 where no vector counts. NaN in a vector that counts makes
        it NaN. Differentiable in x and codebook; a distance below 1e-4 passes no gradient. The second derivative
        (create_graph=True) runs in plain PyTorch, with tensors of size [N, K].

    Raises:
        ValueError, TypeError, NotImplementedError: as `code_entropy`, and for indices that do not fit.
        IndexError: an index outside -1 ... K - 1 (on CUDA the error is that of a gather out of bounds: looking would synchronize).
    """
    op = "code_cross_entropy"
    channel = check_arguments(op, x, codebook, temperature, logits, channel_dim, mask)
    check_indices(op, indices, x, channel, codebook.shape[-2])
    value, _, count = code_softmax(op, x, codebook, channel, mask, indices, logits, temperature, impl)
    loss = (value.sum((1, 2), dtype=torch.float64) / count).to(value.dtype)
    return loss if codebook.dim() == 3 else loss.squeeze(0)
