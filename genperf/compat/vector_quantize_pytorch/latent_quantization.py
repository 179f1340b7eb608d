# SPDX-License-Identifier: Apache-2.0
"""LatentQuantize of vector-quantize-pytorch over genperf.nearest_code; the package need not be installed.

The arguments of constructor and forward, the returned values, the state_dict and the methods are those of upstream.

Differences from upstream:
  - Indices are those of the nearest values. Upstream computes them from the quantized values and truncates, which gives the level
    below where z + (value - z) is rounded down. They are exact for any codebook: int32, or int64 for more than 2^31 - 1 codes.
  - `indices_to_codes` gives the values that `forward` returns, in one dimension of channels for images too.
  - in_place_codebook_optimizer takes a step in each training forward before quantizing, on quantization_loss_weight times the mean
    squared distance of the values from z, as in releases after 1.32, which raises AttributeError in training.
  - Values that are not optimized follow the layer to another device. `implicit_codebook` is computed when it is read.
  - Half precision is computed in float32, and images are not permuted.
  - Invalid arguments raise ValueError instead of AssertionError.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from ..._typing import signature_of
from ...nn._channels import channels_to, codebooks_last, join_codebooks, linear, parameter_dtype, split_codebooks
from ...ops._autograd import ValueOf
from ...ops._precision import accumulator_dtype
from ...ops._validate import check
from ...ops.finite_scalar_quantize import basis_of, check_levels
from ...ops.nearest_code import nearest_code
from .._placed import Placed


class LatentQuantize(Placed):
    """Quantizes each channel to the nearest of its own values; Hsu et al., "Disentanglement via Latent Quantization" (2023).

    Equivalent to (no projection; z [N, D], values_per_latent: D tensors [L]):
        indices = [(z[:, d, None] - values).abs().argmin(-1) for d, values in enumerate(values_per_latent)]
        codes = torch.stack([values[index] for values, index in zip(values_per_latent, indices)], -1)
        loss = commitment_loss_weight * F.mse_loss(z.detach(), codes) + quantization_loss_weight * F.mse_loss(codes.detach(), z)

    Args:
        levels: number of values of each channel, at least 2; or one number for codebook_dim channels.
        dim: number of channels of z. If it is not the number of quantized channels, linear layers project z to them and back.
        commitment_loss_weight, quantization_loss_weight: of the mean squared distance between z and the output, with its gradient to the
            output and to z.
        num_codebooks, keep_num_codebooks_dim: as in `FSQ`.
        codebook_dim: number of channels of a codebook; -1 for len(levels).
        optimize_values: whether the values are parameters. The straight-through estimator gives them no gradient, so that
            DistributedDataParallel needs find_unused_parameters=True.
        in_place_codebook_optimizer: makes the optimizer that trains the values in forward, from a list of them.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        levels: list[int] | int,
        dim: int,
        commitment_loss_weight: float | None = 0.1,
        quantization_loss_weight: float | None = 0.1,
        num_codebooks: int = 1,
        codebook_dim: int = -1,
        keep_num_codebooks_dim: bool | None = None,
        optimize_values: bool | None = True,
        in_place_codebook_optimizer: Callable[..., Optimizer] | None = None,
    ) -> None:
        super().__init__()
        name = "LatentQuantize"
        check(name, "one number of levels needs codebook_dim", codebook_dim, not isinstance(levels, int) or codebook_dim > 0)
        self._counts = check_levels(name, [levels] * codebook_dim if isinstance(levels, int) else levels)
        self.codebook_size = math.prod(self._counts)
        check(name, "the product of levels must be at most 2^63 - 1", self.codebook_size, self.codebook_size < 2**63)
        self.codebook_dim = len(self._counts)
        check(
            name, f"codebook_dim must be the number of levels, {self.codebook_dim}", codebook_dim, codebook_dim in (-1, self.codebook_dim)
        )
        check(name, "num_codebooks must be at least 1", num_codebooks, num_codebooks >= 1)
        self.dim = dim
        self.commitment_loss_weight = commitment_loss_weight or 0.0
        self.quantization_loss_weight = quantization_loss_weight or 0.0
        self.num_codebooks = num_codebooks
        self.effective_codebook_dim = self.codebook_dim * num_codebooks
        self.keep_num_codebooks_dim = bool(keep_num_codebooks_dim) or num_codebooks > 1
        self.has_projections = dim != self.effective_codebook_dim
        self.project_in = nn.Linear(dim, self.effective_codebook_dim) if self.has_projections else nn.Identity()
        self.project_out = nn.Linear(self.effective_codebook_dim, dim) if self.has_projections else nn.Identity()
        self.in_place_codebook_optimizer = in_place_codebook_optimizer
        if optimize_values:
            self.values_per_latent = nn.ParameterList(nn.Parameter(initial_values(count)) for count in self._counts)
            if in_place_codebook_optimizer is not None:
                self.in_place_codebook_optimizer = in_place_codebook_optimizer(self.values_per_latent)
        else:
            self.values_per_latent = [initial_values(count, self._placed.device) for count in self._counts]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "LatentQuantize":
        super()._apply(fn, recurse)
        if isinstance(self.values_per_latent, list) and not self._placed.is_meta:
            self.values_per_latent = [values.to(self._placed) for values in self.values_per_latent]
        return self

    def _values(self, like: Tensor) -> list[Tensor]:
        """The values of each channel, on the device of `like` and in its dtype."""
        return [values.to(like) for values in self.values_per_latent]

    @property
    def implicit_codebook(self) -> Tensor:
        """All codes [codebook_size, codebook_dim]."""
        return self._codes(torch.arange(self.codebook_size, device=self._placed.device)).detach()

    def quantization_loss(self, z: Tensor, zhat: Tensor, reduce: Literal["mean", "sum", "none"] = "mean") -> Tensor:
        return F.mse_loss(zhat.detach(), z, reduction=reduce)

    def commitment_loss(self, z: Tensor, zhat: Tensor, reduce: Literal["mean", "sum", "none"] = "mean") -> Tensor:
        return F.mse_loss(z.detach(), zhat, reduction=reduce)

    def quantize(self, z: Tensor) -> Tensor:
        """The nearest values of z [..., codebook_dim], with a straight-through gradient."""
        return self._quantize(z, z.dim() - 1)[0]

    def _quantize(self, z: Tensor, channel: int) -> tuple[Tensor, Tensor]:
        """The nearest values, and the index of the code, of z with codebook_dim channels in a dimension."""
        wide = z.detach().to(accumulator_dtype(z.dtype))
        values = [each.detach() for each in self._values(wide)]
        levels = self._nearest(wide, values, channel)
        quantized = torch.stack([each[level] for each, level in zip(values, levels, strict=True)], channel).to(z.dtype)
        indices = sum(level * basis for level, basis in zip(levels, basis_of(self._counts), strict=True))
        return ValueOf.apply(quantized, z), self._narrow(cast(Tensor, indices))

    def _nearest(self, z: Tensor, values: Sequence[Tensor], channel: int) -> list[Tensor]:
        """For each channel of z, the positions of its nearest values."""
        channels = z.unbind(channel)
        return [nearest_code(x.unsqueeze(-1), each.unsqueeze(-1)) for x, each in zip(channels, values, strict=True)]

    def codes_to_indices(self, zhat: Tensor) -> Tensor:
        """The indices [...] of codes [..., codebook_dim]."""
        check("LatentQuantize", f"codes must have {self.codebook_dim} channels", list(zhat.shape), zhat.shape[-1] == self.codebook_dim)
        return self._quantize(zhat, zhat.dim() - 1)[1]

    def indices_to_codes(self, indices: Tensor, project_out: bool = True) -> Tensor:
        """What `forward` returns with these indices; with project_out=False, the codes before the projection."""
        codes = self._codes(indices)
        if self.keep_num_codebooks_dim:
            codes = codes.flatten(-2)
        # In the layout of `forward`, so that the projection rounds alike.
        codes = channels_to(codes, min(1, codes.dim() - 1)).contiguous()
        if not project_out:
            return codes
        return linear(self.project_out, codes.to(parameter_dtype(self.project_out) or codes.dtype), min(1, codes.dim() - 1))

    def _codes(self, indices: Tensor) -> Tensor:
        levels = zip(self._values(self._placed), self._counts, basis_of(self._counts), strict=True)
        return torch.stack([values[indices // basis % count] for values, count, basis in levels], -1)

    def _narrow(self, indices: Tensor) -> Tensor:
        return indices.to(torch.int32) if self.codebook_size < 2**31 else indices

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize z [B, dim, ...].

        Returns:
            quantized, of z's shape; indices, int32, of z's shape without channels, with a last dimension for the codebooks if
            keep_num_codebooks_dim; the loss, 0 in evaluation mode.
        """
        check("LatentQuantize", f"the channels of z must be {self.dim}", list(z.shape), z.dim() > 1 and z.shape[1] == self.dim)
        projected = split_codebooks(linear(self.project_in, z, 1), 1, self.num_codebooks)
        if self.training and isinstance(self.in_place_codebook_optimizer, Optimizer):
            self._train_values(projected.detach(), self.in_place_codebook_optimizer)
        codes, indices = self._quantize(projected, 2)
        out = linear(self.project_out, join_codebooks(codes, 1), 1)
        indices = indices.movedim(1, -1) if self.keep_num_codebooks_dim else codebooks_last(indices, 1)
        loss = z.new_zeros((), dtype=accumulator_dtype(z.dtype))
        if self.training and z.numel() > 0:
            wide_z, wide_out = z.to(loss.dtype), out.to(loss.dtype)
            if self.commitment_loss_weight:
                loss = loss + self.commitment_loss_weight * self.commitment_loss(wide_z, wide_out)
            if self.quantization_loss_weight:
                loss = loss + self.quantization_loss_weight * self.quantization_loss(wide_z, wide_out)
        return out, indices, loss

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self) -> None: ...

    @torch.enable_grad()
    def _train_values(self, z: Tensor, optimizer: Optimizer) -> None:
        """One step of the optimizer on the weighted distance of z [B, num_codebooks, codebook_dim, ...] from its nearest values."""
        z = z.to(accumulator_dtype(z.dtype))
        values = self._values(z)
        levels = self._nearest(z, [each.detach() for each in values], 2)
        chosen = torch.stack([each[level] for each, level in zip(values, levels, strict=True)], 2)
        parameters = [*self.values_per_latent]
        loss = self.quantization_loss_weight * F.mse_loss(chosen, z)
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad()


def initial_values(count: int, device: torch.device | str | None = None) -> Tensor:
    """Values in [-0.5, 0.5] with 0 in the middle; an even number of them ends before 0.5."""
    return torch.linspace(-0.5, 0.5, count, device=device) if count % 2 else torch.arange(count, device=device) / count - 0.5
