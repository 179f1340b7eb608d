# SPDX-License-Identifier: Apache-2.0
"""Methods in place of those that most codecs share: searches in a codebook, and residual quantization."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._choices import Metric
from ..ops.nearest_code import nearest_code
from ..ops.residual_vector_quantize import residual_vector_quantize
from .swap import is_replaced

# With fewer vectors, joining the codebooks takes longer than the fused op saves.
_FUSED_FROM = 64


def nearest(x: Tensor, codebook: Tensor, channel_dim: int = -1, metric: Metric = "euclidean") -> Tensor:
    """`nearest_code`, also for a float32 x and codes in half precision."""
    codebook = codebook if codebook.dtype == x.dtype else codebook.to(torch.promote_types(x.dtype, codebook.dtype))
    return nearest_code(x, codebook, channel_dim=channel_dim, metric=metric)


def residual_indices(
    x: Tensor,  # [B, D, T]
    layers: Sequence[nn.Module],
    codebooks: Sequence[Tensor],  # Q times [K, D]
) -> Tensor | None:  # [Q, B, T]
    """The indices of Q quantizers, each of which quantizes what the previous ones have left; None where the loop of upstream must run.

    `codebooks` are what `layers`, whose projections are identities, search.
    """
    # In half precision the residual of upstream is rounded in each step, and that of the op is not.
    fits = x.dtype in (torch.float32, torch.float64) and x.dim() == 3 and x.shape[0] * x.shape[2] >= _FUSED_FROM
    first = codebooks[0]
    alike = all(codes.shape == first.shape and codes.dtype == first.dtype and codes.device == x.device for codes in codebooks)
    # A layer that is not replaced has methods of the user.
    if not (fits and alike and all(is_replaced(layer) for layer in layers)):
        return None
    with torch.no_grad():
        dtype = torch.promote_types(x.dtype, first.dtype)
        indices = residual_vector_quantize(x.detach(), torch.stack(list(codebooks)).to(dtype), channel_dim=1)[1]
    return indices.movedim(-1, 0).contiguous()


class EmbeddingSearch:
    """`quantize` of a Euclidean codebook with the codes `embed`."""

    def quantize(self: Any, hidden_states: Tensor) -> Tensor:  # [N, D] -> [N]
        return nearest(hidden_states, self.embed)


class NormalizedSearch:
    """`decode_latents` of a factorized, normalized quantizer, whose codes are the weight of `codebook`."""

    def decode_latents(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:  # [B, D, T] -> [B, D, T], [B, T]
        # The weight is read by no forward of its module, before which accelerate would load it.
        hook = getattr(self.codebook, "_hf_hook", None)
        if hook is not None:
            hook.pre_forward(self.codebook)
        indices = nearest(hidden_states, self.codebook.weight, channel_dim=1, metric="cosine")
        codes = self.codebook(indices).transpose(1, 2)
        if hook is not None:
            hook.post_forward(self.codebook, ())
        return codes, indices
