# SPDX-License-Identifier: Apache-2.0
"""LFQ of vector-quantize-pytorch, implemented with genperf.lookup_free_quantize; the package need not be installed.

The arguments of constructor and forward, the returned values, the state_dict and the methods are those of upstream. Values agree up
to rounding; without a mask, `frac_per_sample_entropy` selects the same vectors.

Differences from upstream:
  - No tensor of size vectors x codes is allocated; upstream needs 28 bytes per pair. `codebook` is computed when it is read.
  - The per-sample entropy is exact. Upstream clamps probabilities in the logarithm to 1e-5, which lowers it by up to 3.7e-6 nats
    per code: negligible at the default inv_temperature, but not for distributions over more than 1e5 codes. The
    codebook entropy is that of upstream, with the clamp.
  - With a mask, the codebook entropy is that of the remaining vectors. Upstream returns the per-sample entropy in its place, since
    it treats each vector as a codebook.
  - Under torch.distributed, the codebook entropy is that of the global batch. Upstream discards the result of its all-reduce and
    divides the local mean by the number of ranks. With entropy_loss_weight=0, the breakdown is that of each rank alone.
  - Indices are exact up to 2^63 codes (upstream: 2^31). An entropy loss over more than 2^24 codes raises NotImplementedError.
  - The mask may have x's shape without channels for images too; upstream takes [B, positions] or [B].
  - `frac_per_sample_entropy` selects at least one vector; upstream returns NaN for a fraction below one vector.
  - NaN inputs give NaN in evaluation mode too, and a mask that is False everywhere gives losses of 0, not NaN.
  - Half precision is always computed in float32 without a copy, for any `force_quantization_f32`.
  - Images are not permuted, and nothing synchronizes with the device. Inputs of two dimensions are supported.
  - Invalid arguments raise ValueError instead of AssertionError.

For new code, see `genperf.nn.LookupFreeQuantizer`, which computes entropies over groups of bits for codebooks of any size.
"""

import math
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._typing import signature_of
from ...nn._channels import channels_to, codebooks_last, join_codebooks, linear, project, split_codebooks
from ...nn.lookup_free_quantizer import commitment, mean_entropies
from ...ops._autograd import ValueOf
from ...ops._layout import for_inductor
from ...ops._precision import normalized
from ...ops._validate import check
from ...ops.lookup_free_entropy import MAX_GROUP
from ...ops.lookup_free_quantize import check_bits, code_size, lookup_free_decode, lookup_free_quantize
from .._placed import Placed

LOG_FLOOR = 1e-5


class Return(NamedTuple):
    """What `LFQ` returns."""

    quantized: Tensor
    indices: Tensor
    entropy_aux_loss: Tensor


class LossBreakdown(NamedTuple):
    """The terms of the loss before their weights; scalars."""

    per_sample_entropy: Tensor
    batch_entropy: Tensor
    commitment: Tensor


class CosineSimLinear(nn.Module):
    """Cosine similarities of vectors and the columns of a weight [dim_in, dim_out], times a scale."""

    def __init__(self, dim_in: int, dim_out: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.randn(dim_in, dim_out))

    def forward(self, x: Tensor, channel: int = -1) -> Tensor:
        directions = normalized(x, channel).to(x.dtype)
        return project(directions, channel, F.normalize(self.weight, dim=0).T) * self.scale

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self) -> None: ...


class LFQ(Placed):
    """Lookup-free quantization; Yu et al. (arXiv 2310.05737), with spherical=True Zhao et al. (arXiv 2406.07548).

    Args:
        dim: number of channels of x; None for log2(codebook_size) * num_codebooks, the number of quantized channels.
        codebook_size: a power of 2; None for 2 ** dim.
        entropy_loss_weight: weight of per-sample entropy minus diversity_gamma * codebook entropy.
        commitment_loss_weight: weight of the squared distance between vectors and codes.
        straight_through_activation: activation through which the straight-through gradient flows.
        num_codebooks, keep_num_codebooks_dim: as in `FSQ`.
        codebook_scale: magnitude of the codes.
        frac_per_sample_entropy: fraction of the vectors, chosen at random in each step, to compute entropies from.
        has_projections: whether there are linear layers before and after quantization; None for if dim differs from the
            number of quantized channels.
        projection_has_bias: whether these have a bias.
        soft_clamp_input_value: bound of the quantized channels, applied by tanh; at least codebook_scale.
        cosine_sim_project_in, cosine_sim_project_in_scale: whether the first projection computes cosine similarities, and
            their scale.
        channel_first: whether x is [B, dim, ...]; None for if it has four or more dimensions.
        experimental_softplus_entropy_loss, entropy_loss_offset: whether to apply a softplus to the entropy loss, and its offset.
        spherical: whether to normalize vectors and codes.
        force_quantization_f32: stored as an attribute; quantization is always in at least float32.
        orthogonal_rotation: whether to quantize in a random orthogonal basis, a buffer.

    Raises:
        ValueError: an argument out of range.
    """

    mask: Tensor
    orthogonal_rot: Tensor

    def __init__(
        self,
        *,
        dim: int | None = None,
        codebook_size: int | None = None,
        entropy_loss_weight: float = 0.1,
        commitment_loss_weight: float = 0.0,
        diversity_gamma: float = 1.0,
        straight_through_activation: nn.Module = nn.Identity(),  # noqa: B008 (without parameters)
        num_codebooks: int = 1,
        keep_num_codebooks_dim: bool | None = None,
        codebook_scale: float = 1.0,
        frac_per_sample_entropy: float = 1.0,
        has_projections: bool | None = None,
        projection_has_bias: bool = True,
        soft_clamp_input_value: float | None = None,
        cosine_sim_project_in: bool = False,
        cosine_sim_project_in_scale: float | None = None,
        channel_first: bool | None = None,
        experimental_softplus_entropy_loss: bool = False,
        entropy_loss_offset: float = 5.0,
        spherical: bool = False,
        force_quantization_f32: bool = True,
        orthogonal_rotation: bool = False,
    ) -> None:
        super().__init__()
        if codebook_size is None:
            if dim is None:
                raise ValueError("LFQ: dim or codebook_size must be given, got None.")
            codebook_size = 1 << dim
        suggested = 2 ** math.ceil(math.log2(max(2, codebook_size)))
        check("LFQ", f"codebook_size must be a power of 2, such as {suggested}", codebook_size, suggested == codebook_size)
        bits = codebook_size.bit_length() - 1
        check_bits("LFQ", bits)
        check("LFQ", "num_codebooks must be at least 1", num_codebooks, num_codebooks >= 1)
        keep = num_codebooks > 1 if keep_num_codebooks_dim is None else keep_num_codebooks_dim
        check("LFQ", "several codebooks need keep_num_codebooks_dim", keep, keep or num_codebooks == 1)
        check("LFQ", "frac_per_sample_entropy must lie in (0, 1]", frac_per_sample_entropy, 0 < frac_per_sample_entropy <= 1)
        check(
            "LFQ",
            "soft_clamp_input_value must be at least codebook_scale",
            soft_clamp_input_value,
            soft_clamp_input_value is None or soft_clamp_input_value >= codebook_scale,
        )
        self.codebook_size = codebook_size
        self.codebook_dim = bits
        self.num_codebooks = num_codebooks
        self.keep_num_codebooks_dim = keep
        channels = bits * num_codebooks
        self.dim = channels if dim is None else dim
        self.has_projections = self.dim != channels if has_projections is None else has_projections
        self.project_in = self.project_out = nn.Identity()
        if self.has_projections:
            if cosine_sim_project_in:
                scale = codebook_scale if cosine_sim_project_in_scale is None else cosine_sim_project_in_scale
                self.project_in = CosineSimLinear(self.dim, channels, scale=scale)
            else:
                self.project_in = nn.Linear(self.dim, channels, bias=projection_has_bias)
            self.project_out = nn.Linear(channels, self.dim, bias=projection_has_bias)
        self.channel_first = channel_first
        self.activation = straight_through_activation
        self.spherical = spherical
        self.orthogonal_rotation = orthogonal_rotation
        if orthogonal_rotation:
            self.register_buffer("orthogonal_rot", nn.init.orthogonal_(torch.empty(bits, bits)))
        self.frac_per_sample_entropy = frac_per_sample_entropy
        self.diversity_gamma = diversity_gamma
        self.entropy_loss_weight = entropy_loss_weight
        self.codebook_scale = codebook_scale
        self.commitment_loss_weight = commitment_loss_weight
        self.soft_clamp_input_value = soft_clamp_input_value
        self.entropy_loss_offset = entropy_loss_offset
        self.experimental_softplus_entropy_loss = experimental_softplus_entropy_loss
        self.register_buffer("mask", 2 ** torch.arange(bits - 1, -1, -1))
        self.force_quantization_f32 = force_quantization_f32

    @property
    def codebook(self) -> Tensor:
        """All codes [codebook_size, log2(codebook_size)], not normalized."""
        return self._codes(torch.arange(self.codebook_size, device=self._placed.device), False)

    @property
    def dtype(self) -> torch.dtype:
        return self._placed.dtype

    @property
    def zero(self) -> Tensor:
        return self._placed.new_zeros(())

    def bits_to_codes(self, bits: Tensor) -> Tensor:
        return bits * self.codebook_scale * 2 - self.codebook_scale

    def maybe_l2norm(self, t: Tensor, dim: int = -1) -> Tensor:
        return normalized(t, dim) * self.codebook_scale if self.spherical else t

    def _codes(self, indices: Tensor, spherical: bool) -> Tensor:
        return lookup_free_decode(indices, self.codebook_dim, scale=self.codebook_scale, spherical=spherical, dtype=self.dtype)

    def _quantized_codes(self, indices: Tensor) -> Tensor:
        """The codes that `forward` projects out; zeros for negative indices."""
        codes = self._codes(indices, self.spherical)
        return codes @ self.orthogonal_rot.T.to(codes.dtype) if self.orthogonal_rotation else codes

    def indices_to_codes(self, indices: Tensor, project_out: bool = True) -> Tensor:
        """The quantized vectors that `forward` returns with these indices; with project_out=False, the codes before the projection."""
        channel_first = indices.ndim >= 3 + self.keep_num_codebooks_dim if self.channel_first is None else self.channel_first
        codes = self._quantized_codes(indices)
        if self.keep_num_codebooks_dim:
            codes = codes.flatten(-2)
        if project_out:
            codes = self.project_out(codes)
        return for_inductor(channels_to(codes, 1)) if channel_first else codes

    @overload
    def forward(
        self, x: Tensor, inv_temperature: float = 100.0, return_loss_breakdown: Literal[False] = False, mask: Tensor | None = None
    ) -> Return: ...
    @overload
    def forward(
        self, x: Tensor, inv_temperature: float = 100.0, *, return_loss_breakdown: Literal[True], mask: Tensor | None = None
    ) -> tuple[Return, LossBreakdown]: ...
    @overload
    def forward(
        self, x: Tensor, inv_temperature: float = 100.0, return_loss_breakdown: bool = False, mask: Tensor | None = None
    ) -> tuple[Any, ...]: ...
    def forward(
        self, x: Tensor, inv_temperature: float = 100.0, return_loss_breakdown: bool = False, mask: Tensor | None = None
    ) -> tuple[Any, ...]:
        """Quantize x.

        Args:
            x: [B, ..., dim]; [B, dim, ...] with channel_first or four or more dimensions.
            inv_temperature: inverse temperature of the code softmax whose entropies are computed.
            return_loss_breakdown: whether to return the terms of the loss too.
            mask: bool, of x's shape without channels, [B, positions] or [B]; vectors where it is False are left out of the losses.

        Returns:
            (quantized, indices, entropy_aux_loss): quantized, of x's shape and dtype; indices, int64, of x's shape without
            channels, with a last dimension for the codebooks if keep_num_codebooks_dim; the weighted sum of the losses, 0 in
            evaluation mode. With return_loss_breakdown also (per_sample_entropy, batch_entropy, commitment).
        """
        channel_first = x.ndim >= 4 if self.channel_first is None else self.channel_first
        channel = 1 if channel_first else x.ndim - 1
        check("LFQ", f"the channels of x must be {self.dim}", list(x.shape), x.shape[channel] == self.dim)
        if mask is not None:
            mask = mask_of_positions(mask, x, channel)
        x = self.project_in(x, channel) if isinstance(self.project_in, CosineSimLinear) else linear(self.project_in, x, channel)
        if self.soft_clamp_input_value is not None:
            x = (x / self.soft_clamp_input_value).tanh() * self.soft_clamp_input_value
        x = split_codebooks(x, channel, self.num_codebooks)
        if self.orthogonal_rotation:
            x = project(x, channel + 1, self.orthogonal_rot.T.to(x.dtype))
        dtype = x.dtype
        x = self.maybe_l2norm(x, channel + 1)

        size = code_size(self.codebook_scale, self.spherical, self.codebook_dim)
        straight = self.training and isinstance(self.activation, nn.Identity)
        codes, indices = lookup_free_quantize(x if straight else x.detach(), scale=size, channel_dim=channel + 1)
        quantized = codes if straight or not self.training else ValueOf.apply(codes, self.activation(x))
        quantized = quantized.to(dtype)
        bits = join_codebooks(x, channel)
        entropies, entropy_loss = self._entropies(bits, size, channel, mask, inv_temperature, return_loss_breakdown)
        commit_loss = x.new_zeros((), dtype=self.dtype)
        if self.training and self.commitment_loss_weight > 0:
            commit_loss = commitment(bits, join_codebooks(codes, channel), channel, mask)
        aux_loss = entropy_loss * self.entropy_loss_weight + commit_loss * self.commitment_loss_weight

        if self.orthogonal_rotation:
            quantized = project(quantized, channel + 1, self.orthogonal_rot.to(quantized.dtype))
        quantized = linear(self.project_out, join_codebooks(quantized, channel), channel)
        indices = indices.movedim(channel, -1) if self.keep_num_codebooks_dim else codebooks_last(indices, channel)
        result = Return(quantized, indices, aux_loss)
        return (result, LossBreakdown(*entropies, commit_loss)) if return_loss_breakdown else result

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self) -> None: ...

    def _entropies(
        self, bits: Tensor, size: float, channel: int, mask: Tensor | None, inv_temperature: float, wanted: bool
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """(per-sample entropy, codebook entropy) and the entropy loss."""
        if not self.training or (self.entropy_loss_weight == 0 and not wanted):
            zero = bits.new_zeros((), dtype=self.dtype)
            return (zero, zero), zero
        if self.codebook_dim > MAX_GROUP:
            raise NotImplementedError(
                f"LFQ: entropy_loss_weight over more than 2^{MAX_GROUP} codes is not supported, got 2^{self.codebook_dim}; set it to 0, "
                "or use genperf.nn.LookupFreeQuantizer with a group_size."
            )
        if self.frac_per_sample_entropy < 1:
            mask = self._random_subset(bits, channel, mask)
        sharpness = 4 * inv_temperature * size
        # With weight 0 each call decides whether to compute entropies, and ranks that disagree would hang in an all-reduce.
        synchronized = self.entropy_loss_weight != 0
        entropies = mean_entropies(bits, channel, self.num_codebooks, sharpness, self.codebook_dim, mask, LOG_FLOOR, synchronized)
        loss = entropies[0] - self.diversity_gamma * entropies[1]
        if self.experimental_softplus_entropy_loss:
            loss = F.softplus(loss + self.entropy_loss_offset)
        return entropies, loss

    def _random_subset(self, bits: Tensor, channel: int, mask: Tensor | None) -> Tensor:
        """A mask of a random fraction of the vectors, at least one, or of those where `mask` is True."""
        shape = [*bits.shape[:channel], *bits.shape[channel + 1 :]]
        vectors = bits.numel() // bits.shape[channel]
        keys = torch.randn(vectors, device=bits.device)
        if mask is None:
            return (keys.argsort() < max(1, int(vectors * self.frac_per_sample_entropy))).reshape(shape)
        rank = keys.masked_fill(~mask.flatten(), torch.inf).argsort().argsort()
        chosen = rank < (mask.sum() * self.frac_per_sample_entropy).floor().clamp(min=1)
        return chosen.reshape(shape) & mask


def mask_of_positions(mask: Tensor, x: Tensor, channel: int) -> Tensor:
    """A mask of positions, flattened positions or samples as one of x's shape without its channels."""
    if mask.dtype != torch.bool:
        raise TypeError(f"LFQ: mask must be bool, got {mask.dtype}.")
    positions = [*x.shape[:channel], *x.shape[channel + 1 :]]
    shape = list(mask.shape)
    if shape == positions[:1]:
        return mask.reshape(-1, *[1] * (len(positions) - 1)).expand(positions)
    check(
        "LFQ",
        f"mask must have the shape {positions} of x without its channels, [B, positions] or [B]",
        shape,
        shape == positions or shape == [positions[0], math.prod(positions[1:])],
    )
    return mask.reshape(positions)
