"""vector-quantize-pytorch's FSQ over genperf.finite_scalar_quantize; vector-quantize-pytorch itself is not needed.

What is the same: constructor and forward arguments, returned values, names in the state dict, methods, and values up to
rounding, the noise of `noise_dropout` included where channels are last.

What differs, since there it is a fault or a cost:
  - Indices are exact for every codebook: int32 as there, int64 where the codes are more than 2^31 - 1. Theirs are summed
    in float32, which is wrong beyond 2^24 codes, and pass through int32.
  - `implicit_codebook` is computed when it is read. Theirs is a buffer, 32 GB of it at [4] * 16.
  - In channels of more than 1000 levels theirs returns indices past the codebook; here the last level is the last.
  - Half precision is always computed in float32, whatever `force_quantization_f32` and `allowed_dtypes` say, and float64
    in float64.
  - Images are not permuted. Inputs of two dimensions are taken too.
  - Errors are ValueErrors with a sentence, not AssertionErrors.

For new code: `genperf.nn.FiniteScalarQuantizer`, which has masks and any channel dimension.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...nn._channels import codebooks_last, linear, project
from ...ops.finite_scalar_quantize import basis_of, check_levels, finite_scalar_decode, quantize_levels


class FSQ(nn.Module):
    """Finite scalar quantization; Mentzer et al. (arXiv 2309.15505).

    Equivalent to (no projection, channels last):
        codes, indices = genperf.finite_scalar_quantize(z, levels, symmetric=preserve_symmetry, hard_clamp=bound_hard_clamp)

    Args:
        levels: of each channel, at least 2; exactly 2 only with preserve_symmetry.
        dim: channels of z; None for len(levels) * num_codebooks. Where it differs, linear layers lead there and back.
        num_codebooks: groups of channels that are quantized each by itself.
        keep_num_codebooks_dim: whether indices have a last dimension for the codebooks; None for: if there are several.
        scale: kept as an attribute, as there; it has no effect.
        allowed_dtypes, force_quantization_f32: kept as attributes; the quantization is in float32 or better in any case.
        channel_first: z is [B, dim, ...]; inputs of four or more dimensions always are.
        projection_has_bias: of the linear layers.
        return_indices: False returns None for the indices, and allows more than 2^63 - 1 codes.
        preserve_symmetry: the form of Parker et al. (arXiv 2411.19842).
        noise_dropout: the share of codes that in training mode are moved by uniform noise in +-0.5; with preserve_symmetry.
        bound_hard_clamp: a clamp in place of the tanh.
        orthogonal_rotation: quantizes in randomly rotated axes, a buffer.

    Raises:
        ValueError: an argument outside its range.
    """

    orthogonal_rot: Tensor

    def __init__(
        self,
        levels: Sequence[int],
        dim: int | None = None,
        num_codebooks: int = 1,
        keep_num_codebooks_dim: bool | None = None,
        scale: float | None = None,
        allowed_dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64),
        channel_first: bool = False,
        projection_has_bias: bool = True,
        return_indices: bool = True,
        force_quantization_f32: bool = True,
        preserve_symmetry: bool = False,
        noise_dropout: float = 0.0,
        bound_hard_clamp: bool = False,
        orthogonal_rotation: bool = False,
    ) -> None:
        super().__init__()
        levels = check_levels("FSQ", levels)
        _check("a level of 2 needs preserve_symmetry", levels, 2 not in levels or preserve_symmetry)
        _check("noise_dropout needs preserve_symmetry", noise_dropout, not noise_dropout > 0 or preserve_symmetry)
        _check("num_codebooks must be at least 1", num_codebooks, num_codebooks >= 1)
        keep = num_codebooks > 1 if keep_num_codebooks_dim is None else keep_num_codebooks_dim
        _check("several codebooks need keep_num_codebooks_dim", keep, keep or num_codebooks == 1)
        codes = math.prod(levels)
        _check("the product of levels must be at most 2^63 - 1 for indices", codes, codes < 2**63 or not return_indices)

        self.scale = scale
        self.preserve_symmetry = preserve_symmetry
        self.noise_dropout = noise_dropout
        self.codebook_dim = len(levels)
        self.num_codebooks = num_codebooks
        self.effective_codebook_dim = self.codebook_dim * num_codebooks
        self.keep_num_codebooks_dim = keep
        self.dim = self.effective_codebook_dim if dim is None else dim
        self.channel_first = channel_first
        self.has_projections = self.dim != self.effective_codebook_dim
        if self.has_projections:
            self.project_in = nn.Linear(self.dim, self.effective_codebook_dim, bias=projection_has_bias)
            self.project_out = nn.Linear(self.effective_codebook_dim, self.dim, bias=projection_has_bias)
        else:
            self.project_in, self.project_out = nn.Identity(), nn.Identity()
        self.return_indices = return_indices
        if return_indices:
            self.codebook_size = codes
        if codes < 2**63:
            self.register_buffer("_basis", torch.tensor(basis_of(levels)), persistent=False)
        self.register_buffer("_levels", torch.tensor(levels, dtype=torch.int32), persistent=False)
        self.allowed_dtypes = allowed_dtypes
        self.force_quantization_f32 = force_quantization_f32
        self.bound_hard_clamp = bound_hard_clamp
        self.orthogonal_rotation = orthogonal_rotation
        if orthogonal_rotation:
            self.register_buffer("orthogonal_rot", nn.init.orthogonal_(torch.empty(self.codebook_dim, self.codebook_dim)))
        self._counts = levels

    @property
    def implicit_codebook(self) -> Tensor:
        """All codes [codebook_size, len(levels)]."""
        return self._indices_to_codes(torch.arange(self.codebook_size, device=self._levels.device))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """Quantize z.

        Args:
            z: [B, ..., dim], or [B, dim, ...] with channel_first and for four or more dimensions.

        Returns:
            codes, of z's shape and dtype; indices, z's shape without its channels (with a last dimension for the codebooks if
            keep_num_codebooks_dim), or None.
        """
        channel = 1 if self.channel_first or z.ndim >= 4 else z.ndim - 1
        _check(f"the channels of z must be {self.dim}", list(z.shape), z.shape[channel] == self.dim)
        z = linear(self.project_in, z, channel).unflatten(channel, (self.num_codebooks, self.codebook_dim))
        if self.orthogonal_rotation:
            z = project(z, channel + 1, self.orthogonal_rot.T.to(z.dtype))
        codes, indices = self._quantize(z, channel + 1, self.return_indices)
        codes = self.maybe_apply_noise(codes)
        if self.orthogonal_rotation:
            codes = project(codes, channel + 1, self.orthogonal_rot.to(codes.dtype))
        out = linear(self.project_out, codes.flatten(channel, channel + 1), channel)
        if indices is not None:
            indices = self._narrow(indices.movedim(channel, -1) if self.keep_num_codebooks_dim else codebooks_last(indices, channel))
        return out, indices

    def quantize(self, z: Tensor) -> Tensor:
        """The codes of vectors [..., len(levels)], without projection and rotation."""
        return self._quantize(z, z.ndim - 1, False)[0]

    def bound(self, z: Tensor, eps: float = 1e-3, hard_clamp: bool = False) -> Tensor:
        """`quantize` without preserve_symmetry. Another `eps` raises NotImplementedError."""
        if eps != 1e-3:
            raise NotImplementedError(f"FSQ: eps is not supported, got eps={eps!r}.")
        return quantize_levels("FSQ", z, self._counts, False, hard_clamp, z.ndim - 1, None, False)[0]

    def symmetry_preserving_bound(self, z: Tensor, hard_clamp: bool = False) -> Tensor:
        """`quantize` with preserve_symmetry."""
        return quantize_levels("FSQ", z, self._counts, True, hard_clamp, z.ndim - 1, None, False)[0]

    def _quantize(self, z: Tensor, channel: int, indexed: bool) -> tuple[Tensor, Tensor | None]:
        return quantize_levels("FSQ", z, self._counts, self.preserve_symmetry, self.bound_hard_clamp, channel, None, indexed)

    def maybe_apply_noise(self, bounded_z: Tensor) -> Tensor:
        """In training mode, codes of which the share `noise_dropout` is moved by uniform noise in +-0.5, kept in [-1, 1]."""
        if not self.training or self.noise_dropout == 0:
            return bounded_z
        moved = torch.full_like(bounded_z, self.noise_dropout).bernoulli_().bool()
        offset = torch.rand_like(bounded_z) - 0.5
        return torch.where(moved, bounded_z + offset, bounded_z).clamp(-1, 1)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """What `forward` returned as codes for these indices (in evaluation mode), laid out alike."""
        channel_first = self.channel_first or indices.ndim >= 3 + self.keep_num_codebooks_dim
        codes = self._indices_to_codes(indices)
        if self.orthogonal_rotation:
            codes = codes @ self.orthogonal_rot.T.to(codes.dtype)
        if self.keep_num_codebooks_dim:
            codes = codes.flatten(-2)
        codes = self.project_out(codes)
        return codes.movedim(-1, 1) if channel_first else codes

    def _indices_to_codes(self, indices: Tensor) -> Tensor:
        dtype = self.project_out.weight.dtype if self.has_projections else torch.float32
        return finite_scalar_decode(indices, self._counts, symmetric=self.preserve_symmetry, dtype=dtype)

    def indices_to_level_indices(self, indices: Tensor) -> Tensor:
        """The level of each channel [..., len(levels)] of indices [...]."""
        return indices.unsqueeze(-1) // self._basis % self._levels

    def codes_to_indices(self, zhat: Tensor) -> Tensor:
        """The indices [...] of codes [..., len(levels)]."""
        _check(f"codes must have {self.codebook_dim} channels", list(zhat.shape), zhat.shape[-1] == self.codebook_dim)
        middle = (self._levels - 1) / 2 if self.preserve_symmetry else self._levels // 2
        digits = (zhat * middle + middle).round().long()
        return self._narrow((digits * self._basis).sum(-1))

    def _narrow(self, indices: Tensor) -> Tensor:
        return indices.to(torch.int32) if math.prod(self._counts) < 2**31 else indices


def _check(rule: str, value: object, holds: bool) -> None:
    if not holds:
        raise ValueError(f"FSQ: {rule}, got {value!r}.")
