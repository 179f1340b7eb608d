# SPDX-License-Identifier: Apache-2.0
"""ResidualLFQ and GroupedResidualLFQ of vector-quantize-pytorch over the drop-in LFQ; the package need not be installed.

The arguments of constructor and forward, the returned values, the state_dict and the methods are those of upstream. Values agree up
to rounding.

Differences from upstream:
  - With spherical or orthogonal_rotation, `codebooks` and the codes of indices are those that `forward` adds up; upstream leaves out
    the normalization and the rotation.
  - Images [B, dim, ...] work with projections and with quantize_dropout. The output of their indices in GroupedResidualLFQ is
    channels-last; upstream joins the groups along the wrong dimension.
  - Indices of fewer quantizers can be decoded with or without quantize_dropout.
  - quantize_dropout draws the number of quantizers on the host, and GroupedResidualLFQ draws a seed only with quantize_dropout.
    Such a step does not compile with fullgraph=True.
  - The residual is float32 in half precision on every device.
  - What `LFQ` lists. Invalid arguments raise ValueError instead of AssertionError.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._typing import signature_of
from ...nn._channels import linear, parameter_dtype
from ...ops._precision import accumulator_dtype
from ...ops._validate import check
from ._quantize_dropout import common_seed, quantizers_to_run
from .lookup_free_quantization import LFQ


class ResidualLFQ(nn.Module):
    """Quantizes each vector with LFQ, then its residual with codes of half the size, quantizer by quantizer.

    Equivalent to (no projection, evaluation mode):
        quantized = 0
        for n in range(num_quantizers):
            quantized = quantized + torch.where(x - quantized > 0, 2.0**-n, -(2.0**-n))

    Args:
        dim: number of channels of x. If it is not log2(codebook_size), linear layers project x to the quantized channels and back.
        num_quantizers: number of stages.
        codebook_size: of each quantizer, a power of 2.
        quantize_dropout, quantize_dropout_cutoff_index, quantize_dropout_multiple_of: as in `ResidualFSQ`.
        soft_clamp_input_value: bound of the first quantizer's channels, applied by tanh; half of it for each next one.
        **kwargs: arguments of `LFQ`.

    Raises:
        ValueError: an argument out of range.
    """

    layers: Sequence[LFQ]  # an nn.ModuleList

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int,
        codebook_size: int,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        soft_clamp_input_value: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        name = "ResidualLFQ"
        check(name, "num_quantizers must be at least 1", num_quantizers, num_quantizers >= 1)
        check(name, "quantize_dropout_cutoff_index must not be negative", quantize_dropout_cutoff_index, quantize_dropout_cutoff_index >= 0)
        bits = codebook_size.bit_length() - 1
        check(name, "codebook_size must be a power of 2", codebook_size, codebook_size == 1 << max(bits, 0))
        self.dim = dim
        self.has_projections = dim != bits
        self.project_in = nn.Linear(dim, bits) if self.has_projections else nn.Identity()
        self.project_out = nn.Linear(bits, dim) if self.has_projections else nn.Identity()
        self.num_quantizers = num_quantizers
        clamp = soft_clamp_input_value
        layers = [
            LFQ(dim=bits, codebook_scale=2.0**-n, soft_clamp_input_value=None if clamp is None else clamp * 2.0**-n, **kwargs)
            for n in range(num_quantizers)
        ]
        self.layers = nn.ModuleList(layers)  # pyright: ignore[reportAttributeAccessIssue]
        check(name, "its quantizers must not have projections of their own", kwargs, not layers[0].has_projections)
        self.quantize_dropout = quantize_dropout and num_quantizers > 1
        self.quantize_dropout_cutoff_index = quantize_dropout_cutoff_index
        self.quantize_dropout_multiple_of = quantize_dropout_multiple_of

    @property
    def codebooks(self) -> Tensor:
        """All codes of each quantizer [num_quantizers, codebook_size, log2(codebook_size)]."""
        first = self.layers[0]
        every = torch.arange(first.codebook_size, device=first._placed.device)
        return torch.stack([layer._quantized_codes(every) for layer in self.layers])

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes [num_quantizers, ..., log2(codebook_size)] of indices [..., quantizers]; zeros for -1 and for quantizers left out."""
        given = indices.shape[-1]
        check(
            "ResidualLFQ", f"indices must be of at most {self.num_quantizers} quantizers", list(indices.shape), given <= self.num_quantizers
        )
        indices = F.pad(indices, (0, self.num_quantizers - given), value=-1)
        return torch.stack([layer._quantized_codes(index) for layer, index in zip(self.layers, indices.unbind(-1), strict=True)])

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The output of `forward` with these indices [..., quantizers], with channels last."""
        summed = self.get_codes_from_indices(indices).sum(0)
        return self.project_out(summed.to(parameter_dtype(self.project_out) or summed.dtype))

    @overload
    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        return_all_codes: Literal[False] = False,
        rand_quantize_dropout_fixed_seed: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]: ...
    @overload
    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        return_all_codes: bool = False,
        rand_quantize_dropout_fixed_seed: int | None = None,
    ) -> tuple[Tensor, ...]: ...
    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        return_all_codes: bool = False,
        rand_quantize_dropout_fixed_seed: int | None = None,
    ) -> tuple[Tensor, ...]:
        """Quantize x.

        Args:
            x: [B, ..., dim]; [B, dim, ...] of four or more dimensions.
            mask: as in `LFQ`.
            return_all_codes: whether to return the codes of each quantizer too.
            rand_quantize_dropout_fixed_seed: what the number of quantizers follows from with quantize_dropout; None for a random seed.

        Returns:
            quantized, of x's shape; indices, int64 [B, ..., num_quantizers], -1 for quantizers that are left out; losses
            [num_quantizers]. With return_all_codes also the codes [num_quantizers, B, ..., log2(codebook_size)].
        """
        first = self.layers[0].channel_first
        channel = 1 if (x.dim() >= 4 if first is None else first) else x.dim() - 1
        check("ResidualLFQ", f"the channels of x must be {self.dim}", list(x.shape), x.shape[channel] == self.dim)
        x = linear(self.project_in, x, channel)
        used = self.num_quantizers
        if self.training and self.quantize_dropout and torch.is_grad_enabled():
            cutoff, multiple = self.quantize_dropout_cutoff_index, self.quantize_dropout_multiple_of
            used = quantizers_to_run(used, cutoff, multiple, rand_quantize_dropout_fixed_seed)
        residual = x.to(accumulator_dtype(x.dtype))
        quantized_out, found, losses = torch.zeros_like(residual), [], []
        with torch.autocast(x.device.type, enabled=False):
            for layer in self.layers[:used]:
                quantized, indices, loss = layer(residual, mask=mask)
                residual = residual - quantized.detach()
                quantized_out = quantized_out + quantized
                found.append(indices)
                losses.append(loss)
        dropped = self.num_quantizers - used
        indices = F.pad(torch.stack(found, -1), (0, dropped), value=-1)
        codes = [self.get_codes_from_indices(indices)] if return_all_codes else []
        quantized_out = linear(self.project_out, quantized_out.to(x.dtype), channel)
        return quantized_out, indices, F.pad(torch.stack(losses), (0, dropped)), *codes

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self) -> None: ...


class GroupedResidualLFQ(nn.Module):
    """A `ResidualLFQ` for each of the groups that the channels are split into.

    Takes `dim`, `groups` and the arguments of `ResidualLFQ`, and returns the same, by group: indices [groups, ..., num_quantizers],
    losses [groups, num_quantizers], codes as a tuple over the groups. With accept_image_fmap, x is [B, dim, ...].
    """

    rvqs: Sequence[ResidualLFQ]  # an nn.ModuleList

    def __init__(self, *, dim: int, groups: int = 1, accept_image_fmap: bool = False, **kwargs: Any) -> None:
        super().__init__()
        check("GroupedResidualLFQ", f"dim must be divisible by the {groups} groups", dim, dim % groups == 0)
        self.dim = dim
        self.groups = groups
        self.accept_image_fmap = accept_image_fmap
        rvqs = [ResidualLFQ(dim=dim // groups, **kwargs) for _ in range(groups)]
        self.rvqs = nn.ModuleList(rvqs)  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def codebooks(self) -> Tensor:
        """[groups, num_quantizers, codebook_size, log2(codebook_size)]"""
        return torch.stack([rvq.codebooks for rvq in self.rvqs])

    @property
    def split_dim(self) -> int:
        return 1 if self.accept_image_fmap else -1

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        return torch.stack([rvq.get_codes_from_indices(i) for rvq, i in zip(self.rvqs, indices, strict=True)])

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The output [..., dim] of indices [groups, ..., quantizers]."""
        return torch.cat([rvq.get_output_from_indices(i) for rvq, i in zip(self.rvqs, indices, strict=True)], -1)

    def forward(self, x: Tensor, mask: Tensor | None = None, return_all_codes: bool = False) -> tuple[Any, ...]:
        check("GroupedResidualLFQ", f"the channels of x must be {self.dim}", list(x.shape), x.shape[self.split_dim] == self.dim)
        # One seed, so that every group runs as many quantizers.
        seed = common_seed() if self.training and self.rvqs[0].quantize_dropout else None
        chunks = x.chunk(self.groups, self.split_dim)
        parts = [rvq(chunk, mask, return_all_codes, seed) for rvq, chunk in zip(self.rvqs, chunks, strict=True)]
        quantized, indices, losses, *codes = zip(*parts, strict=True)
        return torch.cat(quantized, self.split_dim), torch.stack(indices), torch.stack(losses), *codes

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self) -> None: ...
