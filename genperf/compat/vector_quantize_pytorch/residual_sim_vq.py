# SPDX-License-Identifier: Apache-2.0
"""vector-quantize-pytorch's ResidualSimVQ over genperf.residual_vector_quantize."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._typing import signature_of
from ...ops._dispatch import choose_impl
from ...ops._layout import Positions
from ...ops._precision import accumulator_dtype
from ...ops._validate import check_vectors
from ...ops.residual_vector_quantize import ResidualOptions, quantize_residual, unavailable
from ._quantize_dropout import quantizers_to_run
from .sim_vq import SimVQ


class ResidualSimVQ(nn.Module):
    """Quantizes each vector, then its residual, by a `SimVQ` each: learned transforms of frozen codes.

    Equivalent to (no dropout):
        for layer in layers:
            quantized, index, loss = layer(residual)
            residual, output = residual - quantized.detach(), output + quantized

    in one op, which keeps the residual in float32. Equal to vector-quantize-pytorch 1.32 in arguments, returned values, state_dict,
    losses and gradients.

    Differences from upstream, where upstream is at fault:
      - quantize_dropout works for images with channels last.
      - Indices of fewer quantizers can be decoded with or without quantize_dropout.
      - A quantizer that is dropped runs no transform. The number of quantizers is drawn on the host.
      - codebook_dim is the dimension of a code. Upstream's raises an AttributeError.

    Raises:
        ValueError: an invalid argument.
    """

    layers: Sequence[SimVQ]  # an nn.ModuleList

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int,
        codebook_size: int,
        heads: int = 1,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        channel_first: bool = False,
        rotation_trick: bool = True,
        **sim_vq_kwargs: Any,
    ) -> None:
        super().__init__()
        for rule, holds in (
            ("heads must be 1", heads == 1),
            ("num_quantizers must be at least 1", num_quantizers >= 1),
            ("quantize_dropout_cutoff_index must not be negative", quantize_dropout_cutoff_index >= 0),
        ):
            if not holds:
                raise ValueError(f"ResidualSimVQ: {rule}.")
        self.codebook_dim = dim
        self.channel_first = channel_first
        self.num_quantizers = num_quantizers
        options = {"rotation_trick": rotation_trick, "channel_first": channel_first, **sim_vq_kwargs}
        layers = (SimVQ(dim, codebook_size, **options) for _ in range(num_quantizers))
        self.layers = nn.ModuleList(layers)  # pyright: ignore[reportAttributeAccessIssue]
        self.quantize_dropout = quantize_dropout and num_quantizers > 1
        self.quantize_dropout_cutoff_index = quantize_dropout_cutoff_index
        self.quantize_dropout_multiple_of = quantize_dropout_multiple_of

    @property
    def codebook_size(self) -> int:
        return self.layers[0].codebook_size

    @property
    def codebooks(self) -> Tensor:
        """[num_quantizers, K, dim]"""
        return torch.stack([layer.codebook for layer in self.layers])

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes [num_quantizers, ..., dim] of indices [..., q] of the first q quantizers, in the layout of x; zeros for -1 and the
        remaining quantizers."""
        if indices.shape[-1] > self.num_quantizers:
            raise ValueError(f"ResidualSimVQ: there are {self.num_quantizers} quantizers, got indices of {indices.shape[-1]}.")
        indices = F.pad(indices, (0, self.num_quantizers - indices.shape[-1]), value=-1).movedim(-1, 0)
        first = torch.arange(self.num_quantizers, device=indices.device).view(-1, *[1] * (indices.dim() - 1)) * self.codebook_size
        codes = F.embedding(indices.clamp(min=0) + first, self.codebooks.flatten(0, 1))
        codes = torch.where((indices >= 0).unsqueeze(-1), codes, 0)
        return codes.movedim(-1, 2) if self.channel_first else codes

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The quantized that forward returns for the indices [..., q] of the first q quantizers."""
        return self.get_codes_from_indices(indices).sum(0)

    @overload
    def forward(
        self, x: Tensor, return_all_codes: Literal[False] = False, rand_quantize_dropout_fixed_seed: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]: ...
    @overload
    def forward(
        self, x: Tensor, return_all_codes: bool = False, rand_quantize_dropout_fixed_seed: int | None = None
    ) -> tuple[Tensor, ...]: ...
    def forward(self, x: Tensor, return_all_codes: bool = False, rand_quantize_dropout_fixed_seed: int | None = None) -> tuple[Tensor, ...]:
        """Quantize x [B, ..., dim], with channel_first [B, dim, ...].

        Returns:
            quantized, of x's shape; indices [B, ..., num_quantizers], -1 for quantizers that were dropped; losses [num_quantizers];
            with return_all_codes also the codes of `get_codes_from_indices`.
        """
        used = self.num_quantizers
        if self.training and self.quantize_dropout:
            cutoff, multiple = self.quantize_dropout_cutoff_index, self.quantize_dropout_multiple_of
            used = quantizers_to_run(self.num_quantizers, cutoff, multiple, rand_quantize_dropout_fixed_seed)
        codes = torch.stack([layer.codebook for layer in self.layers[:used]]).to(accumulator_dtype(x.dtype))
        channel = check_vectors("ResidualSimVQ", x, codes[0], 1 if self.channel_first else -1)
        positions = Positions(x, channel)
        layer = self.layers[0]
        weight = layer.commitment_weight
        options = ResidualOptions(weight, weight * layer.input_to_quantize_commit_loss_weight, layer.rotation_trick, per_quantizer=True)
        impl = choose_impl("residual_vector_quantize", None, unavailable(x.device, x.dtype), x, codes)
        quantized, indices, losses = quantize_residual(positions.vectors, codes, None, None, "euclidean", options, impl)
        quantized, indices = positions.restore(quantized), positions.restore_indices(indices, used)
        dropped = (0, self.num_quantizers - used)
        indices, losses = F.pad(indices, dropped, value=-1), F.pad(losses, dropped)
        outputs = quantized, indices, losses
        return (*outputs, self.get_codes_from_indices(indices)) if return_all_codes else outputs

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self) -> None: ...
