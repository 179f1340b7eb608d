# SPDX-License-Identifier: Apache-2.0
"""Lookup-free quantization layer: codes are signs, and an entropy loss favors confident assignments and full codebook use."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .._distributed import global_sum, world_size
from .._typing import signature_of
from ..ops._precision import accumulator_dtype, normalized
from ..ops._validate import check
from ..ops.lookup_free_entropy import check_group, code_mass, entropy_of, soft_code_entropies
from ..ops.lookup_free_quantize import check_bits, check_scale, code_size, lookup_free_decode, lookup_free_quantize
from ._channels import check_input, codebooks_last, decode_codebooks, join_codebooks, linear, parameter_dtype, split_codebooks


class LookupFreeQuantizer(nn.Module):
    """Quantizes each channel to its sign: LFQ, Yu et al. (arXiv 2310.05737); BSQ, Zhao et al. (arXiv 2406.07548).

    Equivalent to (dim=None, one codebook, training):
        x = scale * F.normalize(x, dim=channel_dim)                         # spherical only
        quantized, indices = genperf.lookup_free_quantize(x, scale=size)    # size: scale, or scale / num_bits**0.5
        sample_entropy, codebook_entropy = genperf.lookup_free_entropy(x, scale=size, ...)
        loss = entropy_weight * (sample_entropy - diversity * codebook_entropy)
        loss = loss + commitment_weight * F.mse_loss(x, quantized.detach())

    Neither a codebook nor a tensor of size positions x codes is allocated. In training mode under torch.distributed, the
    codebook entropy is that of the global batch, so every rank must take part in every step, even with an empty or fully
    masked batch. Gradients averaged by DistributedDataParallel equal those of one process on the global batch if every rank
    has the same number of vectors.

    Args:
        num_bits: D, 1 to 63: the codebook has 2^D codes.
        dim: number of channels of x; None for num_bits * num_codebooks. If they differ, linear layers project x to the
            quantized channels and back.
        num_codebooks: number of groups of D channels, each with its own index; losses are means over them.
        scale: magnitude of the codes, as in `genperf.lookup_free_quantize`.
        spherical: normalize vectors and codes to length `scale`, as in BSQ.
        entropy_weight: weight of sample_entropy - diversity * codebook_entropy.
        diversity: weight of the codebook entropy in the entropy loss.
        commitment_weight: weight of the squared distance between vectors and codes.
        inv_temperature, group_size: as in `genperf.lookup_free_entropy`. More than 24 bits need a group_size, or
            entropy_weight=0.
        channel_dim: the channel dimension of x; 1 for images [B, D, H, W], which are not permuted.
        bias: whether the linear layers have a bias.

    Attributes:
        project_in, project_out: Linear layers, or Identity.

    Raises:
        ValueError: an argument outside its range.
    """

    def __init__(
        self,
        num_bits: int,
        dim: int | None = None,
        *,
        num_codebooks: int = 1,
        scale: float = 1.0,
        spherical: bool = False,
        entropy_weight: float = 0.1,
        diversity: float = 1.0,
        commitment_weight: float = 0.25,
        inv_temperature: float = 100.0,
        group_size: int | None = None,
        channel_dim: int = -1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        check_bits("LookupFreeQuantizer", num_bits)
        check_scale("LookupFreeQuantizer", scale)
        quantized = num_bits * num_codebooks
        self.dim = quantized if dim is None else dim
        check("LookupFreeQuantizer", "num_codebooks must be at least 1", num_codebooks, num_codebooks >= 1)
        check("LookupFreeQuantizer", "dim must be at least 1", dim, self.dim >= 1)
        check("LookupFreeQuantizer", "entropy_weight must not be negative", entropy_weight, entropy_weight >= 0)
        check("LookupFreeQuantizer", "diversity must not be negative", diversity, diversity >= 0)
        check("LookupFreeQuantizer", "commitment_weight must not be negative", commitment_weight, commitment_weight >= 0)
        check("LookupFreeQuantizer", "inv_temperature must be positive", inv_temperature, inv_temperature > 0)
        self.group_size = check_group("LookupFreeQuantizer", group_size, num_bits) if entropy_weight > 0 else group_size
        self.num_bits = num_bits
        self.num_codebooks = num_codebooks
        self.scale = scale
        self.spherical = spherical
        self.entropy_weight = entropy_weight
        self.diversity = diversity
        self.commitment_weight = commitment_weight
        self.inv_temperature = inv_temperature
        self.channel_dim = channel_dim
        projects = self.dim != quantized
        self.project_in = nn.Linear(self.dim, quantized, bias=bias) if projects else nn.Identity()
        self.project_out = nn.Linear(quantized, self.dim, bias=bias) if projects else nn.Identity()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize x.

        Args:
            x: [..., dim, ...], float32, bfloat16, float16 or float64.
            mask: bool, x's shape without channel_dim; where False, quantized is 0, the index is -1, and the vector has no
                effect on loss and gradients.

        Returns:
            quantized, of x's shape; indices, int64, of x's shape without channel_dim, with a last dimension of
            num_codebooks if there are several; loss, a float32 scalar (float64 for float64), 0 in evaluation mode.
        """
        channel = check_input(type(self).__name__, x, self.channel_dim, mask)
        if mask is not None:
            x = torch.where(mask.unsqueeze(channel), x, 0)
        bits = split_codebooks(linear(self.project_in, x, channel), channel, self.num_codebooks)
        dtype = bits.dtype
        if self.spherical:
            bits = self.scale * normalized(bits, channel + 1)
        size = code_size(self.scale, self.spherical, self.num_bits)
        codes, indices = lookup_free_quantize(bits, scale=size, channel_dim=channel + 1)
        bits, codes = join_codebooks(bits, channel), join_codebooks(codes, channel)
        loss = self._loss(bits, codes, size, channel, mask) if self.training else None
        quantized = linear(self.project_out, codes.to(dtype), channel)
        indices = codebooks_last(indices, channel)
        if mask is not None:
            quantized = torch.where(mask.unsqueeze(channel), quantized, 0)
            indices = torch.where(mask.unsqueeze(-1) if self.num_codebooks > 1 else mask, indices, -1)
        return quantized, indices, x.new_zeros((), dtype=accumulator_dtype(x.dtype)) if loss is None else loss

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self) -> None: ...

    def _loss(self, bits: Tensor, codes: Tensor, size: float, channel: int, mask: Tensor | None) -> Tensor:
        loss = bits.new_zeros((), dtype=accumulator_dtype(bits.dtype))
        if self.entropy_weight > 0:
            assert self.group_size is not None  # `check_group` sets it
            sharpness = 4 * self.inv_temperature * size
            sample, codebook = mean_entropies(bits, channel, self.num_codebooks, sharpness, self.group_size, mask)
            loss = loss + self.entropy_weight * (sample - self.diversity * codebook)
        if self.commitment_weight > 0:
            loss = loss + self.commitment_weight * commitment(bits, codes, channel, mask)
        return loss

    def encode(self, x: Tensor) -> Tensor:
        """Indices of the codes of x, as returned by `forward`, without gradients."""
        channel = check_input(type(self).__name__, x, self.channel_dim, None)
        with torch.no_grad():
            bits = split_codebooks(linear(self.project_in, x, channel), channel, self.num_codebooks)
            return codebooks_last(lookup_free_quantize(bits, channel_dim=channel + 1)[1], channel)

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
            lambda i: lookup_free_decode(i, self.num_bits, scale=self.scale, spherical=self.spherical, dtype=dtype),
            self.project_out,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.num_bits}, {self.dim}, num_codebooks={self.num_codebooks}, spherical={self.spherical}, channel_dim={self.channel_dim}"
        )


def mean_entropies(
    bits: Tensor,
    channel: int,
    codebooks: int,
    sharpness: float,
    group: int,
    mask: Tensor | None,
    floor: float | None = None,
    synchronized: bool = True,
) -> tuple[Tensor, Tensor]:
    """The two entropies of `genperf.lookup_free_entropy`, each the mean over codebooks.

    The codebook entropy is that of the global batch, or of this rank's batch if not `synchronized`. `floor` is a lower bound on
    the argument of the logarithm in it.
    """
    op = "lookup_free_entropy"
    if not synchronized or world_size() == 1:
        sample, entropy = soft_code_entropies(op, bits, channel, mask, sharpness, group, floor)
        return (sample, entropy) if codebooks == 1 else (sample / codebooks, entropy / codebooks)
    entropy, mass, count = code_mass(op, bits, channel, mask, sharpness, group)
    return entropy / (count.clamp(min=1) * codebooks), entropy_of(global_sum(mass), floor).sum() / codebooks


def commitment(bits: Tensor, codes: Tensor, channel: int, mask: Tensor | None) -> Tensor:
    """The mean squared distance between bits and codes, over the vectors where the mask is True."""
    dtype = accumulator_dtype(bits.dtype)
    distance = (bits.to(dtype) - codes.detach().to(dtype)).square()
    if mask is None:
        return distance.sum() / max(1, bits.numel())
    return torch.where(mask.unsqueeze(channel), distance, 0).sum() / (mask.sum() * bits.shape[channel]).clamp(min=1)
