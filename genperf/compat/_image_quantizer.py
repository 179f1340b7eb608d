# SPDX-License-Identifier: Apache-2.0
"""The image quantizer behind VectorQuantizer2 of taming-transformers and VectorQuantizer of diffusers."""

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

from .._typing import signature_of
from ..ops.vector_quantize import vector_quantize
from ._used_codes import UnknownIndex, UsedCodes


class ImageQuantizer(UsedCodes):
    """Quantizes images with a codebook trained by gradient; van den Oord et al. (2017), Esser et al. (2021).

    Equivalent to (no remap):
        z_q, indices, loss = genperf.vector_quantize(
            z, self.embedding.weight, codebook_weight=beta if legacy else 1, commitment_weight=1 if legacy else beta, channel_dim=1
        )
        return z_q, loss, (None, None, indices.flatten())

    Args:
        n_e: K, the number of codes.
        dim: D, the length of a code.
        beta: weight of the codebook loss, or with legacy=False of the commitment loss; the other one has weight 1.
        remap: the indices of the used codes, or the path of a .npy file with them; returned indices are positions among them.
        unknown_index: index of unused codes with remap: "random", "extra" (one past the last) or an int.
        sane_index_shape: whether to return indices [B, H, W] instead of flat ones.
        legacy: see beta.

    Attributes:
        embedding: Embedding(n_e, dim).
        used, re_embed: with remap, the used indices, a buffer, and the number of indices after remapping.

    Raises:
        ValueError: a remap that is not a list of indices, or an invalid unknown_index.
    """

    def __init__(
        self,
        n_e: int,
        dim: int,
        beta: float,
        remap: str | np.ndarray | Tensor | None = None,
        unknown_index: UnknownIndex = "random",
        sane_index_shape: bool = False,
        legacy: bool = True,
    ) -> None:
        super().__init__()
        self.n_e = n_e
        self.beta = beta
        self.legacy = legacy
        self.sane_index_shape = sane_index_shape
        self.embedding = nn.Embedding(n_e, dim)
        nn.init.uniform_(self.embedding.weight, -1 / n_e, 1 / n_e)
        self.set_remap(n_e, remap, unknown_index)

    def quantize(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z_q, the loss, and the indices [B, H, W] before remapping."""
        if z.dim() != 4 or z.shape[1] != self.embedding.embedding_dim:
            raise ValueError(f"{type(self).__name__}: z must be [B, {self.embedding.embedding_dim}, H, W], got {list(z.shape)}.")
        codebook_weight, commitment_weight = (self.beta, 1.0) if self.legacy else (1.0, self.beta)
        z_q, indices, loss = vector_quantize(
            z, self.embedding.weight, codebook_weight=codebook_weight, commitment_weight=commitment_weight, channel_dim=1
        )
        return z_q, loss, indices

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor | None, None, Tensor]]:
        """Quantize z [B, D, H, W].

        Returns:
            z_q, of z's shape; the loss, a scalar; (None, None, indices), int64 [B * H * W], with remap [B * H * W, 1], with
            sane_index_shape [B, H, W].
        """
        z_q, loss, indices = self.quantize(z)
        shape = indices.shape if self.sane_index_shape else (-1,) if self.remap is None else (-1, 1)
        if self.remap is not None:
            indices = self.remap_to_used(indices)
        return z_q, loss, (None, None, indices.reshape(shape))

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self) -> None: ...

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, int, int, int] | None) -> Tensor:
        """Codes [B, D, H, W] of indices, given shape (B, H, W, D); with shape=None, codes [..., D] of indices [...]."""
        if self.remap is not None:
            indices = self.unmap_to_all(indices)
        codes = F.embedding(indices if shape is None else indices.reshape(tuple(shape)[:-1]), self.embedding.weight)
        return codes if shape is None else codes.permute(0, 3, 1, 2).contiguous()
