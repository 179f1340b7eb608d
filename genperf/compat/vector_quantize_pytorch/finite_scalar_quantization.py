# SPDX-License-Identifier: Apache-2.0
"""FSQ of vector-quantize-pytorch, implemented with genperf.finite_scalar_quantize; the package need not be installed.

The arguments of constructor and forward, the returned values, the state_dict and the methods are those of upstream. Values agree up
to rounding, for channels-last inputs including the noise of `noise_dropout`.

Differences from upstream:
  - Indices are exact for any codebook: int32 as upstream, or int64 for more than 2^31 - 1 codes. Upstream sums them in float32,
    which is wrong beyond 2^24 codes, and converts them to int32.
  - `implicit_codebook` is computed when it is read; upstream stores it in a buffer, which takes 32 GB for [4] * 16.
  - For channels with more than 1000 levels, upstream can return indices outside of the codebook.
  - Half precision is always computed in float32, and float64 in float64, for any `force_quantization_f32` and `allowed_dtypes`.
  - Images are not permuted. Inputs of two dimensions are supported.
  - Invalid arguments raise ValueError instead of AssertionError.

For new code, see `genperf.nn.FiniteScalarQuantizer`, which supports masks and any channel dimension.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..._typing import signature_of
from ...nn._channels import channels_to, codebooks_last, join_codebooks, linear, parameter_dtype, project, split_codebooks
from ...ops._layout import for_inductor
from ...ops._validate import check
from ...ops.finite_scalar_quantize import basis_of, check_levels, finite_scalar_decode, quantize_levels
from .._placed import Placed


class FSQ(Placed):
    """Finite scalar quantization; Mentzer et al. (arXiv 2309.15505).

    Equivalent to (no projection, channels last):
        codes, indices = genperf.finite_scalar_quantize(z, levels, symmetric=preserve_symmetry, hard_clamp=bound_hard_clamp)

    Args:
        levels: number of levels of each channel, at least 2; 2 only with preserve_symmetry.
        dim: number of channels of z; None for len(levels) * num_codebooks. If they differ, linear layers project z to the
            quantized channels and back.
        num_codebooks: number of groups of channels, each with its own index.
        keep_num_codebooks_dim: whether indices have a last dimension for the codebooks; None for num_codebooks > 1.
        scale: stored as an attribute; as upstream, it has no effect.
        allowed_dtypes, force_quantization_f32: stored as attributes; quantization is always in at least float32.
        channel_first: whether z is [B, dim, ...]; inputs of four or more dimensions always are.
        projection_has_bias: whether the linear layers have a bias.
        return_indices: False returns None in place of indices, and allows more than 2^63 - 1 codes.
        preserve_symmetry: whether to use the symmetric form of Parker et al. (arXiv 2411.19842).
        noise_dropout: in training mode, the fraction of codes with added uniform noise in +-0.5; needs preserve_symmetry.
        bound_hard_clamp: whether to bound channels with a clamp instead of tanh.
        orthogonal_rotation: whether to quantize in a random orthogonal basis, a buffer.

    Raises:
        ValueError: an argument out of range.
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
        counts = check_levels("FSQ", levels)
        check("FSQ", "a level of 2 needs preserve_symmetry", counts, 2 not in counts or preserve_symmetry)
        check("FSQ", "noise_dropout needs preserve_symmetry", noise_dropout, not noise_dropout > 0 or preserve_symmetry)
        check("FSQ", "num_codebooks must be at least 1", num_codebooks, num_codebooks >= 1)
        keep = num_codebooks > 1 if keep_num_codebooks_dim is None else keep_num_codebooks_dim
        check("FSQ", "several codebooks need keep_num_codebooks_dim", keep, keep or num_codebooks == 1)
        codes = math.prod(counts)
        check("FSQ", "the product of levels must be at most 2^63 - 1 for indices", codes, codes < 2**63 or not return_indices)

        self.scale = scale
        self.preserve_symmetry = preserve_symmetry
        self.noise_dropout = noise_dropout
        self.codebook_dim = len(counts)
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
        self.allowed_dtypes = allowed_dtypes
        self.force_quantization_f32 = force_quantization_f32
        self.bound_hard_clamp = bound_hard_clamp
        self.orthogonal_rotation = orthogonal_rotation
        if orthogonal_rotation:
            self.register_buffer("orthogonal_rot", nn.init.orthogonal_(torch.empty(self.codebook_dim, self.codebook_dim)))
        self._counts = counts

    @property
    def implicit_codebook(self) -> Tensor:
        """All codes [codebook_size, len(levels)]."""
        return self._indices_to_codes(torch.arange(self.codebook_size, device=self._placed.device))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """Quantize z.

        Args:
            z: [B, ..., dim]; [B, dim, ...] with channel_first or four or more dimensions.

        Returns:
            codes, of z's shape and dtype; indices, of z's shape without channels, with a last dimension for the codebooks if
            keep_num_codebooks_dim; or None.
        """
        channel = 1 if self.channel_first or z.ndim >= 4 else z.ndim - 1
        check("FSQ", f"the channels of z must be {self.dim}", list(z.shape), z.shape[channel] == self.dim)
        z = split_codebooks(linear(self.project_in, z, channel), channel, self.num_codebooks)
        if self.orthogonal_rotation:
            z = project(z, channel + 1, self.orthogonal_rot.T.to(z.dtype))
        codes, indices = self._quantize(z, channel + 1, self.return_indices)
        codes = self.maybe_apply_noise(codes)
        if self.orthogonal_rotation:
            codes = project(codes, channel + 1, self.orthogonal_rot.to(codes.dtype))
        out = linear(self.project_out, join_codebooks(codes, channel), channel)
        if indices is not None:
            indices = self._narrow(indices.movedim(channel, -1) if self.keep_num_codebooks_dim else codebooks_last(indices, channel))
        return out, indices

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self) -> None: ...

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
        """In training mode, add uniform noise in +-0.5 to a fraction `noise_dropout` of the codes, clamped to [-1, 1]."""
        if not self.training or self.noise_dropout == 0:
            return bounded_z
        has_noise = torch.full_like(bounded_z, self.noise_dropout).bernoulli_().bool()
        offset = torch.rand_like(bounded_z) - 0.5
        return torch.where(has_noise, bounded_z + offset, bounded_z).clamp(-1, 1)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """The codes that `forward` returns with these indices in evaluation mode."""
        channel_first = self.channel_first or indices.ndim >= 3 + self.keep_num_codebooks_dim
        codes = self._quantized_codes(indices)
        if self.keep_num_codebooks_dim:
            codes = codes.flatten(-2)
        codes = self.project_out(codes)
        return for_inductor(channels_to(codes, 1)) if channel_first else codes

    def _quantized_codes(self, indices: Tensor) -> Tensor:
        """The codes that `forward` projects out; zeros for negative indices."""
        codes = self._indices_to_codes(indices)
        return codes @ self.orthogonal_rot.T.to(codes.dtype) if self.orthogonal_rotation else codes

    def _indices_to_codes(self, indices: Tensor) -> Tensor:
        dtype = parameter_dtype(self.project_out) or torch.float32
        return finite_scalar_decode(indices, self._counts, symmetric=self.preserve_symmetry, dtype=dtype)

    def indices_to_level_indices(self, indices: Tensor) -> Tensor:
        """The level of each channel [..., len(levels)] of indices [...]."""
        levels = zip(self._counts, basis_of(self._counts), strict=True)
        return torch.stack([indices // basis % count for count, basis in levels], -1)

    def codes_to_indices(self, zhat: Tensor) -> Tensor:
        """The indices [...] of codes [..., len(levels)]."""
        check("FSQ", f"codes must have {self.codebook_dim} channels", list(zhat.shape), zhat.shape[-1] == self.codebook_dim)
        indices = zhat.new_zeros(zhat.shape[:-1], dtype=torch.int64)
        for code, count, basis in zip(zhat.unbind(-1), self._counts, basis_of(self._counts), strict=True):
            middle = (count - 1) / 2 if self.preserve_symmetry else count // 2
            indices = indices + (code * middle + middle).round().long() * basis
        return self._narrow(indices)

    def _narrow(self, indices: Tensor) -> Tensor:
        return indices.to(torch.int32) if math.prod(self._counts) < 2**31 else indices
