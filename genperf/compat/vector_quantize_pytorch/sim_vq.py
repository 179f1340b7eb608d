# SPDX-License-Identifier: Apache-2.0
"""vector-quantize-pytorch's SimVQ over genperf.vector_quantize."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._typing import signature_of
from ...nn._channels import channels_to
from ...ops._layout import for_inductor
from ...ops._precision import accumulator_dtype
from ...ops.vector_quantize import vector_quantize


class SimVQ(nn.Module):
    """Quantization with a codebook that is a learned transform of frozen codes; Zhu et al., "Addressing Representation Collapse in
    Vector Quantized Models with One Linear Layer" (2024).

    Equivalent to:
        codebook = code_transform(frozen_codebook)
        quantized, indices, loss = vector_quantize(
            x,
            codebook,
            codebook_weight=commitment_weight,
            commitment_weight=commitment_weight * input_to_quantize_commit_loss_weight,
            gradient="rotation" if rotation_trick else "straight_through",
        )

    Equal to vector-quantize-pytorch 1.32 in arguments, returned values, state_dict, loss and gradients.

    Differences from upstream: the nearest code is exact, and quantized equals the code bitwise.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_transform: nn.Module | None = None,
        init_fn: Callable[[Tensor], Tensor] = lambda codes: codes,
        channel_first: bool = False,
        rotation_trick: bool = True,
        input_to_quantize_commit_loss_weight: float = 0.25,
        commitment_weight: float = 1.0,
        frozen_codebook_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.codebook_size = codebook_size
        self.channel_first = channel_first
        frozen_dim = dim if frozen_codebook_dim is None else frozen_codebook_dim
        codebook = init_fn(torch.randn(codebook_size, frozen_dim) * frozen_dim**-0.5)
        self.code_transform = nn.Linear(frozen_dim, dim, bias=False) if codebook_transform is None else codebook_transform
        self.register_buffer("frozen_codebook", codebook)
        self.rotation_trick = rotation_trick
        self.input_to_quantize_commit_loss_weight = input_to_quantize_commit_loss_weight
        self.commitment_weight = commitment_weight

    @property
    def codebook(self) -> Tensor:
        """[K, dim]"""
        return self.code_transform(self.frozen_codebook)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """The codes of indices as `forward` returns them."""
        quantized = F.embedding(indices, self.codebook)
        return for_inductor(channels_to(quantized, 1)) if self.channel_first else quantized

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [B, ..., dim], or [B, dim, ...]
        """Quantized, of x's shape and dtype; indices, int64, x's shape without channels; the loss, a scalar."""
        return vector_quantize(
            x,
            self.codebook.to(accumulator_dtype(x.dtype)),
            codebook_weight=self.commitment_weight,
            commitment_weight=self.commitment_weight * self.input_to_quantize_commit_loss_weight,
            gradient="rotation" if self.rotation_trick else "straight_through",
            channel_dim=1 if self.channel_first else -1,
        )

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self) -> None: ...
