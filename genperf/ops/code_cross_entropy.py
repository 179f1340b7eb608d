# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy of target codes under the softmax over the codebook."""

from torch import Tensor

from .._choices import Impl, Logits
from ._code_softmax import check_arguments, code_softmax, unavailable
from .code_statistics import check_indices

__all__ = ["code_cross_entropy", "unavailable"]


def code_cross_entropy(
    x: Tensor,  # [..., D, ...]
    codebook: Tensor,  # [K, D], or [heads, K, D]
    indices: Tensor,  # [...]
    *,
    temperature: float = 1.0,
    logits: Logits = "distance",
    channel_dim: int = -1,
    mask: Tensor | None = None,  # [...]
    impl: Impl | None = None,
) -> Tensor:
    """Cross-entropy between the softmax over all codes, as in `code_entropy`, and target indices.

    Equivalent to (channel_dim=-1, no mask; x [N, D], and the logits [N, K] of `code_entropy`):
        loss = F.cross_entropy(logits / temperature, indices, ignore_index=-1)

    without the [N, K] tensors: forward and backward compute them in chunks of a fixed size.

    The cross-entropy losses of vector-quantize-pytorch (`indices=` in its forward, and commitment_use_cross_entropy_loss) are this op with
    temperature=1, with logits="dot" on unit vectors if use_cosine_sim.

    Args:
        indices: int64, x's shape without channel_dim; vectors with the index -1 are excluded.
        x, codebook, temperature, logits, channel_dim, mask, impl: as in `code_entropy`.

    Returns:
        loss, in nats: a scalar, or [heads]; float32 (float64 for a float64 x); 0 without vectors. NaN in a vector that is not excluded
        makes it NaN. Differentiable in x and codebook; a distance below 1e-4 has the gradient 0. Second derivatives (create_graph=True)
        run in plain PyTorch, with [N, K] tensors.

    Raises:
        ValueError, TypeError, NotImplementedError: as `code_entropy`, or indices of the wrong shape or dtype.
        IndexError: an index outside -1 ... K - 1. On CUDA, where checking would synchronize, gather fails with a device assertion instead.
    """
    op = "code_cross_entropy"
    channel = check_arguments(op, x, codebook, temperature, logits, channel_dim, mask)
    check_indices(op, indices, x, channel, None)
    return code_softmax(op, x, codebook, channel, mask, indices, logits, temperature, 0.0, impl)[0]
