# SPDX-License-Identifier: Apache-2.0
"""vector-quantize-pytorch's HierarchicalVQ over the drop-in VectorQuantize."""

import itertools
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._typing import signature_of
from ...ops._validate import check
from ._quantize_dropout import common_seed
from .vector_quantize_pytorch import VectorQuantize


class _Phi(nn.Module):
    """A residual convolution of upsampled codes."""

    def __init__(self, dim: int, spatial_dims: int, ratio: float) -> None:
        super().__init__()
        self.conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial_dims - 1](dim, dim, 3, padding=1)
        self.resi_ratio = float(abs(ratio))

    def forward(self, x: Tensor) -> Tensor:
        return x.lerp(self.conv(x), self.resi_ratio) if self.resi_ratio > 1e-8 else x


class HierarchicalVQ(nn.Module):
    """Residual quantization over scales; Tian et al., "Visual Autoregressive Modeling" (2024).

    Equivalent to (one dimension, channels first, no mask):
        for scale in scales:
            quantized, index, loss = vq(F.adaptive_avg_pool1d(residual, scale).mT)
            quantized = phi(F.interpolate(quantized.mT, N, mode="linear"))              # a residual convolution
            residual, output = residual - quantized, output + quantized

    Equal to vector-quantize-pytorch 1.32 in arguments, returned values, and state_dict. The quantizers and the differences are those of
    `VectorQuantize`; padding may be NaN.

    Args:
        scales: the size of each level, coarsest first: a number for all spatial dimensions, or one number for each.
        shared_codebook: one quantizer for all levels.
        channel_first: x is [B, dim, ...], otherwise [B, ..., dim].
        quant_resi: the weight of the convolution after upsampling.
        share_quant_resi: the number of convolutions; 0 for one per level.
        nested_dropout: probability with which a training step returns the output of the first levels only, a random number of them.
        nested_dropout_min_levels: at least so many.
        accept_image_fmap, accept_3d_fmap: x has two or three spatial dimensions, otherwise one.
        others: of `VectorQuantize`.

    Raises:
        ValueError: an invalid argument, or arguments that exclude each other.
    """

    phi_shared: _Phi | None
    phi_levels: Sequence[_Phi] | None
    vq: VectorQuantize | None
    vqs: Sequence[VectorQuantize] | None

    def __init__(
        self,
        *,
        dim: int,
        codebook_size: int | tuple[int, ...],
        scales: Sequence[int | Sequence[int]],
        shared_codebook: bool = True,
        channel_first: bool = True,
        sync_codebook: bool | None = None,
        decay: float = 0.99,
        commitment_weight: float = 1.0,
        rotation_trick: bool = False,
        kmeans_init: bool = True,
        kmeans_iters: int = 10,
        threshold_ema_dead_code: float = 2,
        stochastic_sample_codes: bool = False,
        sample_codebook_temp: float = 0.1,
        orthogonal_reg_weight: float = 0.0,
        orthogonal_reg_max_codes: int | None = 128,
        orthogonal_reg_active_codes_only: bool = False,
        quant_resi: float = 0.5,
        share_quant_resi: int = 1,
        nested_dropout: float = 0.0,
        nested_dropout_min_levels: int = 1,
        accept_image_fmap: bool = False,
        accept_3d_fmap: bool = False,
    ) -> None:
        super().__init__()
        name = "HierarchicalVQ"
        flags = (accept_image_fmap, accept_3d_fmap)
        check(name, "accept_image_fmap and accept_3d_fmap exclude each other", flags, not all(flags))
        check(name, "nested_dropout must lie in [0, 1]", nested_dropout, 0 <= nested_dropout <= 1)
        check(name, "nested_dropout_min_levels must be at least 1", nested_dropout_min_levels, nested_dropout_min_levels >= 1)
        spatial_dims = 2 if accept_image_fmap else 3 if accept_3d_fmap else 1
        level_shapes = tuple(self._shape(scale, spatial_dims) for scale in scales)
        num_levels = len(level_shapes)
        positive = all(size > 0 for shape in level_shapes for size in shape)
        check(name, "scales must be positive, at least one", list(scales), num_levels > 0 and positive)
        grows = all(a <= b for low, high in itertools.pairwise(level_shapes) for a, b in zip(low, high, strict=True))
        check(name, "scales must not decrease", list(scales), grows)
        sizes = (codebook_size,) * num_levels if isinstance(codebook_size, int) else tuple(codebook_size)
        check(name, "there must be one codebook size, or one for each scale", codebook_size, len(sizes) == num_levels)
        check(name, "a shared codebook needs one codebook size", codebook_size, not shared_codebook or len(set(sizes)) == 1)
        self.dim = dim
        self.spatial_dims = spatial_dims
        self.channel_first = channel_first
        self.scales = tuple(scales)
        self.level_shapes = level_shapes
        self.num_levels = num_levels
        self.codebook_sizes = sizes
        self.nested_dropout = nested_dropout
        self.nested_dropout_min_levels = nested_dropout_min_levels
        options: dict[str, Any] = {
            "decay": decay,
            "commitment_weight": commitment_weight,
            "rotation_trick": rotation_trick,
            "kmeans_init": kmeans_init,
            "kmeans_iters": kmeans_iters,
            "threshold_ema_dead_code": threshold_ema_dead_code,
            "stochastic_sample_codes": stochastic_sample_codes,
            "sample_codebook_temp": sample_codebook_temp,
            "orthogonal_reg_weight": orthogonal_reg_weight,
            "orthogonal_reg_max_codes": orthogonal_reg_max_codes,
            "orthogonal_reg_active_codes_only": orthogonal_reg_active_codes_only,
            "sync_codebook": sync_codebook,
        }
        self.vq = VectorQuantize(dim, sizes[0], **options) if shared_codebook else None
        self.vqs = None if shared_codebook else nn.ModuleList([VectorQuantize(dim, size, **options) for size in sizes])  # pyright: ignore[reportAttributeAccessIssue]
        shares = share_quant_resi == 1
        self.phi_shared = _Phi(dim, spatial_dims, quant_resi) if shares else None
        phis = num_levels if share_quant_resi <= 0 else min(num_levels, int(share_quant_resi))
        self.phi_levels = None if shares else nn.ModuleList([_Phi(dim, spatial_dims, quant_resi) for _ in range(phis)])  # pyright: ignore[reportAttributeAccessIssue]

    def get_vq(self, level_index: int) -> VectorQuantize:
        return self.vqs[level_index] if self.vqs is not None else self.vq  # pyright: ignore[reportReturnType]

    def choose_phi(self, level_index: int) -> _Phi:
        if self.phi_levels is None:
            return self.phi_shared  # pyright: ignore[reportReturnType]
        position = level_index / max(self.num_levels - 1, 1)
        return self.phi_levels[round(position * (len(self.phi_levels) - 1))]

    @overload
    def forward(
        self,
        x: Tensor,
        indices: None = None,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        sample_codebook_temp: float | None = None,
        return_cutoff: Literal[False] = False,
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor]: ...
    @overload
    def forward(
        self,
        x: Tensor,
        indices: None = None,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        sample_codebook_temp: float | None = None,
        return_cutoff: bool = False,
    ) -> tuple[Any, ...]: ...
    def forward(
        self,
        x: Tensor,
        indices: None = None,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        sample_codebook_temp: float | None = None,
        return_cutoff: bool = False,
    ) -> tuple[Any, ...]:
        """Quantize x [B, dim, ...], or [B, ..., dim] with channel_first=False.

        Args:
            indices: must be None, as in upstream.
            mask: bool, [B, ...]; False for padding. lens: int64 [B], lengths of sequences instead of a mask.

        Returns:
            quantized, of x's shape, 0 at padding; the indices of each level, int64 [B, *scale], -1 where a level sees padding only; the
            mean loss of the levels; with return_cutoff also the last level of the output if nested_dropout has left some out, or None.
        """
        name = "HierarchicalVQ"
        if indices is not None:
            raise NotImplementedError(f"{name}: forward takes no indices; get_output_from_indices decodes them.")
        x = x if self.channel_first else x.movedim(-1, 1)
        fits = x.dim() == 2 + self.spatial_dims and x.shape[1] == self.dim
        check(name, f"x must have {self.dim} channels and {self.spatial_dims} spatial dimensions", list(x.shape), fits)
        if lens is not None:
            check(name, "only one of mask and lens can be given", "both", mask is None)
            check(name, "lens needs one spatial dimension", list(x.shape), self.spatial_dims == 1)
            mask = torch.arange(x.shape[2], device=x.device) < lens.unsqueeze(1)
        if mask is not None:
            check(name, "mask must have x's shape without channels", list(mask.shape), mask.shape == x.shape[:1] + x.shape[2:])
            x = torch.where(mask.unsqueeze(1), x, 0)

        residual, output = x, torch.zeros_like(x)
        outputs, found, losses = [], [], []
        for level, shape in enumerate(self.level_shapes):
            pooled, valid = self.pool_residual(residual, shape, mask)
            valid = None if valid is None else valid.flatten(1)
            quantized, index, loss = self.get_vq(level)(pooled.flatten(2).mT, mask=valid, sample_codebook_temp=sample_codebook_temp)
            quantized = self.upsample_to_full(quantized.mT.unflatten(2, shape), x.shape[2:], level)
            residual, output = residual - quantized, output + quantized
            outputs.append(output)
            found.append(index.unflatten(1, shape))
            losses.append(loss)
        cutoff = self.sample_nested_cutoff(x.device)
        if cutoff is not None:
            output, losses = outputs[cutoff], losses[: cutoff + 1]
        output = output if mask is None else torch.where(mask.unsqueeze(1), output, 0)
        results = self._restore(output), tuple(found), torch.stack(losses).mean()
        return (*results, cutoff) if return_cutoff else results

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self) -> None: ...

    def get_output_from_indices(self, indices: Sequence[Tensor], full_shape: int | Sequence[int] | None = None) -> Tensor:
        """The quantized of the indices of each level, by default in the shape of the last level; zeros for -1."""
        check("HierarchicalVQ", "there must be indices for each level", len(indices), len(indices) == self.num_levels)
        shape = self.level_shapes[-1] if full_shape is None else self._shape(full_shape, self.spatial_dims)
        total = None
        for level, index in enumerate(indices):
            codes = self.get_vq(level).get_output_from_indices(index.flatten(1))
            codes = self.upsample_to_full(codes.mT.unflatten(2, self.level_shapes[level]), shape, level)
            total = codes if total is None else total + codes
        assert total is not None  # as there is a level
        return self._restore(total)

    def pool_residual(self, t: Tensor, level_shape: tuple[int, ...], mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Means of t [B, dim, ...] over the cells of a level, and which cells have a valid element."""
        pool: Callable[..., Tensor] = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[self.spatial_dims - 1]
        if mask is None:
            return pool(t, level_shape), None
        share = pool(mask.unsqueeze(1).to(t.dtype), level_shape)
        pooled = pool(torch.where(mask.unsqueeze(1), t, 0), level_shape)
        return pooled / share.clamp(min=1e-6), share.squeeze(1) > 0

    def upsample_to_full(self, q: Tensor, full_shape: Sequence[int], level_index: int) -> Tensor:
        """The codes [B, dim, ...] of a level in a shape, after the convolution of the level."""
        if tuple(q.shape[2:]) != tuple(full_shape):
            mode = ("linear", "bilinear", "trilinear")[self.spatial_dims - 1]
            q = F.interpolate(q, size=tuple(full_shape), mode=mode, align_corners=False)
        return self.choose_phi(level_index)(q)

    def sample_nested_cutoff(self, device: torch.device | None = None) -> int | None:
        """The last level of the output of a training step, the same on all ranks; None for all. It is drawn on the host."""
        least = self.nested_dropout_min_levels
        if not self.training or self.nested_dropout == 0 or least >= self.num_levels:
            return None
        generator = random.Random(common_seed())
        return None if generator.random() >= self.nested_dropout else generator.randrange(least - 1, self.num_levels - 1)

    def _restore(self, x: Tensor) -> Tensor:
        return x if self.channel_first else x.movedim(1, -1)

    @staticmethod
    def _shape(scale: int | Sequence[int], spatial_dims: int) -> tuple[int, ...]:
        shape = (scale,) * spatial_dims if isinstance(scale, int) else tuple(scale)
        check("HierarchicalVQ", f"a scale must be a number, or {spatial_dims}", scale, len(shape) == spatial_dims)
        return shape
