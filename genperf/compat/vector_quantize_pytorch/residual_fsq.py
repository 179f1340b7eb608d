# SPDX-License-Identifier: Apache-2.0
"""ResidualFSQ and GroupedResidualFSQ of vector-quantize-pytorch over the drop-in FSQ; the package need not be installed.

The arguments of constructor and forward, the returned values, the state_dict and the methods are those of upstream. Values agree up
to rounding.

Differences from upstream:
  - With orthogonal_rotation, codes of indices are those that `forward` adds up; upstream leaves out the rotation.
  - With is_channel_first, indices are decoded as `forward` returns them, [B, num_quantizers, ...], to [B, dim, ...], and
    return_all_codes works, as in releases after 1.32. Four-dimensional inputs work without it too.
  - GroupedResidualFSQ with accept_image_fmap passes is_channel_first to its parts; upstream needs both.
  - Indices of fewer quantizers can be decoded with or without quantize_dropout.
  - quantize_dropout draws the number of quantizers on the host, and GroupedResidualFSQ draws a seed only with quantize_dropout.
    Such a step does not compile with fullgraph=True.
  - The residual is float32 in half precision on every device.
  - `scales`, `codebooks` and `soft_clamp_input_value` are computed when they are read; upstream stores buffers.
  - What `FSQ` lists. Invalid arguments raise ValueError instead of AssertionError.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._typing import signature_of
from ...nn._channels import channels_to, linear, parameter_dtype
from ...ops._layout import for_inductor
from ...ops._precision import accumulator_dtype
from ...ops._validate import check
from ...ops.finite_scalar_quantize import check_levels, numbers_like
from .._placed import Placed
from ._quantize_dropout import common_seed, quantizers_to_run
from .finite_scalar_quantization import FSQ


class ResidualFSQ(Placed):
    """Quantizes each vector with FSQ, then its residual on a finer scale, quantizer by quantizer.

    Equivalent to (levels L, no projection, evaluation mode):
        x = (x / clamp).tanh() * clamp                                     # clamp: 1 + 1 / (L - 1)
        quantized = 0
        for n in range(num_quantizers):
            codes, indices = FSQ(levels, preserve_symmetry=True, bound_hard_clamp=True)((x - quantized) * L**n)
            quantized = quantized + codes / L**n

    Args:
        levels: number of levels of each channel, at least 2.
        num_quantizers: number of stages.
        dim: number of channels of x; None for len(levels). If they differ, linear layers project x to the quantized channels and back.
        is_channel_first: whether x is [B, dim, ...], and indices [B, num_quantizers, ...].
        quantize_dropout: in training mode, run only the first quantizers, a random number of them.
        quantize_dropout_cutoff_index: the lowest index of the last quantizer that runs.
        quantize_dropout_multiple_of: round the number of quantizers up to a multiple.
        soft_clamp_input_value: bound of the channels, or a bound for each, applied by tanh; excludes bound_hard_clamp, whose bound
            is 1 + 1 / (levels - 1).
        bound_hard_clamp: whether each quantizer bounds channels with a clamp instead of tanh.
        **kwargs: arguments of `FSQ`.

    Raises:
        ValueError: an argument out of range.
    """

    layers: Sequence[FSQ]  # an nn.ModuleList

    def __init__(
        self,
        *,
        levels: list[int],
        num_quantizers: int,
        dim: int | None = None,
        is_channel_first: bool = False,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        soft_clamp_input_value: float | list[float] | Tensor | None = None,
        bound_hard_clamp: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        name, counts = "ResidualFSQ", check_levels("ResidualFSQ", levels)
        check(name, "num_quantizers must be at least 1", num_quantizers, num_quantizers >= 1)
        check(name, "quantize_dropout_cutoff_index must not be negative", quantize_dropout_cutoff_index, quantize_dropout_cutoff_index >= 0)
        given = soft_clamp_input_value is not None
        check(name, "soft_clamp_input_value excludes bound_hard_clamp", soft_clamp_input_value, not (given and bound_hard_clamp))
        self.dim = len(counts) if dim is None else dim
        self.has_projections = self.dim != len(counts)
        self.project_in = nn.Linear(self.dim, len(counts)) if self.has_projections else nn.Identity()
        self.project_out = nn.Linear(len(counts), self.dim) if self.has_projections else nn.Identity()
        self.is_channel_first = is_channel_first
        self.num_quantizers = num_quantizers
        self.levels = levels
        layers = [
            FSQ(levels=levels, dim=len(counts), preserve_symmetry=True, bound_hard_clamp=bound_hard_clamp, **kwargs)
            for _ in range(num_quantizers)
        ]
        self.layers = nn.ModuleList(layers)  # pyright: ignore[reportAttributeAccessIssue]
        check(name, "num_codebooks must be 1", layers[0].num_codebooks, not layers[0].has_projections)
        self.codebook_size = layers[0].codebook_size
        self.quantize_dropout = quantize_dropout and num_quantizers > 1
        self.quantize_dropout_cutoff_index = quantize_dropout_cutoff_index
        self.quantize_dropout_multiple_of = quantize_dropout_multiple_of
        clamp = soft_clamp_input_value
        if bound_hard_clamp:
            clamp = [1 + 1 / (count - 1) for count in counts]
        # Numbers, not a tensor: a buffer that is not in the state dict would be lost by a load from the meta device.
        self._soft_clamp: float | list[float] | None = clamp.tolist() if isinstance(clamp, Tensor) else clamp
        self._scales = [[float(count) ** -n for count in counts] for n in range(num_quantizers)]

    @property
    def soft_clamp_input_value(self) -> Tensor | None:
        return None if self._soft_clamp is None else self._placed.new_tensor(self._soft_clamp)

    @property
    def scales(self) -> Tensor:
        """What the codes of each quantizer are multiplied with [num_quantizers, len(levels)]."""
        return self._placed.new_tensor(self._scales)

    @property
    def codebooks(self) -> Tensor:
        """All codes of each quantizer, not scaled [num_quantizers, codebook_size, len(levels)]."""
        return torch.stack([layer.implicit_codebook for layer in self.layers])

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes [num_quantizers, ..., len(levels)] of indices as `forward` returns them, or of the first quantizers alone.

        They are zeros for -1 and for quantizers that are left out.
        """
        return self._codes_of(indices.movedim(1, -1) if self.is_channel_first else indices)

    def _codes_of(self, indices: Tensor) -> Tensor:
        """Of indices [..., quantizers]."""
        left_out = self.num_quantizers - indices.shape[-1]
        check("ResidualFSQ", f"indices must be of at most {self.num_quantizers} quantizers", list(indices.shape), left_out >= 0)
        indices = F.pad(indices, (0, left_out), value=-1)
        codes = [
            layer._quantized_codes(index) * numbers_like(scale, self._placed)
            for layer, scale, index in zip(self.layers, self._scales, indices.unbind(-1), strict=True)
        ]
        return torch.stack(codes).to(self._placed.dtype)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The output of `forward` with these indices."""
        summed = self.get_codes_from_indices(indices).sum(0)
        output = self.project_out(summed.to(parameter_dtype(self.project_out) or summed.dtype))
        return for_inductor(channels_to(output, 1)) if self.is_channel_first else output

    @overload
    def forward(
        self, x: Tensor, return_all_codes: Literal[False] = False, rand_quantize_dropout_fixed_seed: int | None = None
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(
        self, x: Tensor, return_all_codes: bool = False, rand_quantize_dropout_fixed_seed: int | None = None
    ) -> tuple[Tensor, ...]: ...
    def forward(self, x: Tensor, return_all_codes: bool = False, rand_quantize_dropout_fixed_seed: int | None = None) -> tuple[Tensor, ...]:
        """Quantize x.

        Args:
            x: [..., dim]; [B, dim, ...] with is_channel_first.
            return_all_codes: whether to return the codes of each quantizer too.
            rand_quantize_dropout_fixed_seed: what the number of quantizers follows from with quantize_dropout; None for a random seed.

        Returns:
            quantized, of x's shape; indices, int32, of x's shape with num_quantizers in place of the channels, -1 (int64) for
            quantizers that are left out. With return_all_codes also the codes [num_quantizers, ..., len(levels)].
        """
        channel = 1 if self.is_channel_first else x.dim() - 1
        check("ResidualFSQ", f"the channels of x must be {self.dim}", list(x.shape), x.shape[channel] == self.dim)
        x = linear(self.project_in, x, channel).movedim(channel, -1)
        sizes = x.shape[:-1]
        dtype = torch.promote_types(x.dtype, self._placed.dtype)
        # FSQ takes 4 dimensions for an image.
        residual = (x.flatten(1, -2) if x.dim() > 3 else x).to(accumulator_dtype(x.dtype))
        used = self.num_quantizers
        if self.training and self.quantize_dropout and torch.is_grad_enabled():
            cutoff, multiple = self.quantize_dropout_cutoff_index, self.quantize_dropout_multiple_of
            used = quantizers_to_run(used, cutoff, multiple, rand_quantize_dropout_fixed_seed)
        with torch.autocast(x.device.type, enabled=False):
            if self._soft_clamp is not None:
                clamp = numbers_like(self._soft_clamp, residual)
                residual = (residual / clamp).tanh() * clamp
            quantized_out, found = torch.zeros_like(residual), []
            for layer, numbers in zip(self.layers[:used], self._scales[:used], strict=True):
                scale = numbers_like(numbers, residual)
                quantized, indices = layer(residual / scale)
                quantized = quantized * scale
                residual = residual - quantized.detach()
                quantized_out = quantized_out + quantized
                found.append(indices)
        indices = torch.stack(found, -1)
        if used < self.num_quantizers:
            indices = F.pad(indices.long(), (0, self.num_quantizers - used), value=-1)
        indices = indices.reshape(*sizes, *indices.shape[residual.dim() - 1 :])
        codes = [self._codes_of(indices)] if return_all_codes else []
        quantized_out = self.project_out(quantized_out.to(dtype).reshape(*sizes, residual.shape[-1]))
        if self.is_channel_first:
            quantized_out, indices = for_inductor(channels_to(quantized_out, 1)), channels_to(indices, 1)
        return quantized_out, indices, *codes

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self) -> None: ...


class GroupedResidualFSQ(nn.Module):
    """A `ResidualFSQ` for each of the groups that the channels are split into.

    Takes `dim`, `groups` and the arguments of `ResidualFSQ`, and returns the same, by group: indices [groups, ..., num_quantizers],
    codes as a tuple over the groups. With accept_image_fmap, x is [B, dim, ...].
    """

    rvqs: Sequence[ResidualFSQ]  # an nn.ModuleList

    def __init__(self, *, dim: int, groups: int = 1, accept_image_fmap: bool = False, **kwargs: Any) -> None:
        super().__init__()
        check("GroupedResidualFSQ", f"dim must be divisible by the {groups} groups", dim, dim % groups == 0)
        self.dim = dim
        self.groups = groups
        self.accept_image_fmap = accept_image_fmap
        kwargs = {"is_channel_first": accept_image_fmap, **kwargs}
        rvqs = [ResidualFSQ(dim=dim // groups, **kwargs) for _ in range(groups)]
        self.rvqs = nn.ModuleList(rvqs)  # pyright: ignore[reportAttributeAccessIssue]
        self.codebook_size = rvqs[0].codebook_size

    @property
    def codebooks(self) -> Tensor:
        """[groups, num_quantizers, codebook_size, len(levels)]"""
        return torch.stack([rvq.codebooks for rvq in self.rvqs])

    @property
    def split_dim(self) -> int:
        return 1 if self.accept_image_fmap else -1

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        return torch.stack([rvq.get_codes_from_indices(i) for rvq, i in zip(self.rvqs, indices, strict=True)])

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The output of `forward` with these indices."""
        return torch.cat([rvq.get_output_from_indices(i) for rvq, i in zip(self.rvqs, indices, strict=True)], self.split_dim)

    def forward(self, x: Tensor, return_all_codes: bool = False) -> tuple[Any, ...]:
        check("GroupedResidualFSQ", f"the channels of x must be {self.dim}", list(x.shape), x.shape[self.split_dim] == self.dim)
        # One seed, so that every group runs as many quantizers.
        seed = common_seed() if self.training and self.rvqs[0].quantize_dropout else None
        chunks = x.chunk(self.groups, self.split_dim)
        parts = [rvq(chunk, return_all_codes, seed) for rvq, chunk in zip(self.rvqs, chunks, strict=True)]
        quantized, indices, *codes = zip(*parts, strict=True)
        return torch.cat(quantized, self.split_dim), torch.stack(indices), *codes

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self) -> None: ...
