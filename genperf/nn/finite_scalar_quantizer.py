# SPDX-License-Identifier: Apache-2.0
"""Finite scalar quantization layer: a product of small grids in place of a learned codebook."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .._typing import signature_of
from ..ops.finite_scalar_quantize import check_levels, finite_scalar_decode, finite_scalar_quantize
from ._channels import check_input, codebooks_last, decode_codebooks, join_codebooks, linear, parameter_dtype, split_codebooks


class FiniteScalarQuantizer(nn.Module):
    """Rounds each channel to its own grid; Mentzer et al., "Finite Scalar Quantization: VQ-VAE Made Simple" (2023).

    Equivalent to (dim=None, one codebook):
        quantized, indices = genperf.finite_scalar_quantize(x, levels, channel_dim=channel_dim)

    Only the projections are learned, and there is no loss. Level choices from the paper: [8, 6, 5] (240 codes),
    [8, 5, 5, 5] (1000), [7, 5, 5, 5, 5] (4375), [8, 8, 8, 6, 5] (15,360), [8, 8, 8, 5, 5, 5] (64,000).

    Args:
        levels: number of levels of each channel, as in `genperf.finite_scalar_quantize`. len(levels) * num_codebooks
            channels are quantized.
        dim: number of channels of x; None for the number of quantized channels. If they differ, linear layers project x to
            the quantized channels and back.
        num_codebooks: number of groups of channels, each with its own index.
        symmetric, hard_clamp: as in `genperf.finite_scalar_quantize`.
        channel_dim: the channel dimension of x; 1 for images [B, D, H, W], which are not permuted.
        bias: whether the linear layers have a bias.

    Attributes:
        project_in, project_out: Linear layers, or Identity.
        num_codes: number of codes in each codebook.

    Raises:
        ValueError: an argument outside its range.
    """

    def __init__(
        self,
        levels: Sequence[int],
        dim: int | None = None,
        *,
        num_codebooks: int = 1,
        symmetric: bool = False,
        hard_clamp: bool = False,
        channel_dim: int = -1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.levels = check_levels("FiniteScalarQuantizer", levels)
        if num_codebooks < 1:
            raise ValueError(f"FiniteScalarQuantizer: num_codebooks must be at least 1, got {num_codebooks!r}.")
        quantized = len(self.levels) * num_codebooks
        self.dim = quantized if dim is None else dim
        if self.dim < 1:
            raise ValueError(f"FiniteScalarQuantizer: dim must be at least 1, got {dim!r}.")
        self.num_codes = math.prod(self.levels)
        self.num_codebooks = num_codebooks
        self.symmetric = symmetric
        self.hard_clamp = hard_clamp
        self.channel_dim = channel_dim
        projects = self.dim != quantized
        self.project_in = nn.Linear(self.dim, quantized, bias=bias) if projects else nn.Identity()
        self.project_out = nn.Linear(quantized, self.dim, bias=bias) if projects else nn.Identity()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Quantize x.

        Args:
            x: [..., dim, ...], float32, bfloat16, float16 or float64.
            mask: bool, x's shape without channel_dim; where False, quantized and its gradient are 0 and the index is -1.

        Returns:
            quantized, of x's shape; indices, int64, of x's shape without channel_dim, with a last dimension of
            num_codebooks if there are several.
        """
        channel = check_input(type(self).__name__, x, self.channel_dim, mask)
        if mask is not None:
            x = torch.where(mask.unsqueeze(channel), x, 0)
        codes = split_codebooks(linear(self.project_in, x, channel), channel, self.num_codebooks)
        codes, indices = finite_scalar_quantize(
            codes, self.levels, symmetric=self.symmetric, hard_clamp=self.hard_clamp, channel_dim=channel + 1
        )
        quantized = linear(self.project_out, join_codebooks(codes, channel), channel)
        indices = codebooks_last(indices, channel)
        if mask is not None:
            quantized = torch.where(mask.unsqueeze(channel), quantized, 0)
            indices = torch.where(mask.unsqueeze(-1) if self.num_codebooks > 1 else mask, indices, -1)
        return quantized, indices

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self) -> None: ...

    def encode(self, x: Tensor) -> Tensor:
        """Indices of the codes of x, as returned by `forward`, without gradients."""
        with torch.no_grad():
            return self(x)[1]

    def decode(self, indices: Tensor) -> Tensor:
        """The quantized vectors of indices from `forward`, in the dtype of the parameters; zeros where an index is -1.

        Raises:
            TypeError: indices that are not integers.
        """
        dtype = parameter_dtype(self.project_out)
        return decode_codebooks(
            indices,
            self.num_codebooks,
            self.channel_dim,
            lambda i: finite_scalar_decode(i, self.levels, symmetric=self.symmetric, dtype=dtype),
            self.project_out,
        )

    def extra_repr(self) -> str:
        return f"{self.levels}, {self.dim}, num_codebooks={self.num_codebooks}, channel_dim={self.channel_dim}"
