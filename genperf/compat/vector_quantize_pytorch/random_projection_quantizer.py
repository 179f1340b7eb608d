# SPDX-License-Identifier: Apache-2.0
"""vector-quantize-pytorch's RandomProjectionQuantizer over the drop-in VectorQuantize."""

from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn

from ..._typing import signature_of
from .vector_quantize_pytorch import VectorQuantize


class RandomProjectionQuantizer(nn.Module):
    """Targets for self-supervised learning: codes of frozen random projections; Chiu et al., "Self-supervised Learning with
    Random-projection Quantizer for Speech Recognition" (2022).

    Equivalent to:
        projected = LayerNorm(dim, elementwise_affine=False)(x) @ rand_projs               # [B, N, num_codebooks * codebook_dim]
        vq.eval()
        return vq(projected)[1] if indices is None else vq(projected, indices=indices)[1]

    Equal to vector-quantize-pytorch 1.32 in arguments, returned values, and state_dict. x may have any number of dimensions.

    Args:
        dim: channels of x.
        codebook_dim: channels of each projection.
        num_codebooks: the number of projections, each of which has a codebook.
        norm: whether to normalize x.
        kwargs: of the `VectorQuantize`, which has use_cosine_sim and separate_codebook_per_head.
    """

    rand_projs: Tensor

    def __init__(
        self, *, dim: int, codebook_size: int, codebook_dim: int, num_codebooks: int = 1, norm: bool = True, **kwargs: Any
    ) -> None:
        super().__init__()
        self.num_codebooks = num_codebooks
        self.register_buffer("rand_projs", nn.init.xavier_normal_(torch.empty(num_codebooks, dim, codebook_dim)))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False) if norm else nn.Identity()
        fixed = {"heads": num_codebooks, "use_cosine_sim": True, "separate_codebook_per_head": True}
        self.vq = VectorQuantize(codebook_dim * num_codebooks, codebook_size, **fixed, **kwargs)

    @overload
    def forward(self, x: Tensor, indices: None = None) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, indices: Tensor | None = None) -> Tensor: ...
    def forward(self, x: Tensor, indices: Tensor | None = None) -> Tensor:
        """The indices of x [B, ..., dim]; with `indices`, their cross-entropy.

        Indices are int64, [B, ...], with several codebooks [B, ..., num_codebooks].
        """
        projected = self.norm(x) @ self.rand_projs.movedim(0, 1).flatten(1)
        self.vq.eval()
        return self.vq(projected, indices=indices)[1]

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self) -> None: ...
