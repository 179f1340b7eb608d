"""vector-quantize-pytorch's ResidualVQ and GroupedResidualVQ over its VectorQuantize here."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._distributed import sum_over_processes, world_size
from ...nn._codebooks import _update, copied
from ...ops._precision import accumulator_dtype
from ...ops.residual_vector_quantize import quantize_residual, residual_code_statistics
from .vector_quantize import VectorQuantize, loss_to_differentiate, refuse


class ResidualVQ(nn.Module):
    """Quantizes a vector, then what is left of it, level by level; Zeghidour et al., "SoundStream" (2021).

    The same as in vector-quantize-pytorch 1.32: arguments, returned values, state_dict, first codes of a seed, and, level by
    level, what `VectorQuantize` does.

    What differs, since there it is a fault:
      - accept_image_fmap and `indices` work: theirs stops with an error. The cross-entropies are those of each level's
        residual.
      - freeze_codebook=True in the constructor counts; theirs is overridden by forward's default. A frozen shared codebook is
        not updated at the end either.
      - Half precision: the residual is float32 from level to level where all levels run in one op, which they do unless an
        option needs them one by one.
      - diveq adds noise in training alone; theirs in evaluation too.
      - Indices of fewer levels can be decoded whether or not there is a quantize_dropout.
      - The level at which quantize_dropout stops is drawn on the host; only several processes, which join it, wait for it.
        A step with it does not compile with fullgraph=True (`nn.ResidualVectorQuantizer` with level_dropout does).

    Not supported (NotImplementedError): implicit_neural_codebook, mlp_kwargs, beam_size, eval_beam_size,
    beam_score_quantizer_weights, channel_last=False and accept_3d_fmap, which fail there too, and what `VectorQuantize`
    does not support.

    Raises:
        ValueError: arguments that do not fit together.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int | None = None,
        codebook_size: int | tuple[int, ...],
        codebook_dim: int | None = None,
        shared_codebook: bool = False,
        diveq: bool = False,
        heads: int = 1,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        accept_image_fmap: bool = False,
        implicit_neural_codebook: bool = False,
        mlp_kwargs: dict | None = None,
        beam_size: int | None = None,
        eval_beam_size: int | None = None,
        beam_score_quantizer_weights: list[float] | None = None,
        quant_grad_frac: float = 0.0,
        return_zeros_for_masked_padding: bool = True,
        **vq_kwargs,
    ) -> None:
        super().__init__()
        refuse(
            "ResidualVQ",
            implicit_neural_codebook=(implicit_neural_codebook, False),
            mlp_kwargs=(mlp_kwargs or None, None),
            beam_size=(beam_size, None),
            eval_beam_size=(eval_beam_size, None),
            beam_score_quantizer_weights=(beam_score_quantizer_weights, None),
            channel_last=(vq_kwargs.get("channel_last", True), True),
            accept_3d_fmap=(vq_kwargs.get("accept_3d_fmap", False), False),
        )
        sizes = codebook_size if isinstance(codebook_size, tuple) else (codebook_size,) * (num_quantizers or 0)
        num_quantizers = len(sizes) if num_quantizers is None else num_quantizers
        for rule, holds in (
            ("heads must be 1", heads == 1),
            ("there must be num_quantizers, or a tuple of as many codebook sizes", 0 < num_quantizers == len(sizes)),
            ("a shared codebook needs one codebook size", not shared_codebook or len(set(sizes)) == 1),
            ("quantize_dropout_cutoff_index must not be negative", quantize_dropout_cutoff_index >= 0),
        ):
            if not holds:
                raise ValueError(f"ResidualVQ: {rule}.")
        codebook_dim = dim if codebook_dim is None else codebook_dim
        self.codebook_dim = codebook_dim
        self.has_projections = codebook_dim != dim
        self.project_in = nn.Linear(dim, codebook_dim) if self.has_projections else nn.Identity()
        self.project_out = nn.Linear(codebook_dim, dim) if self.has_projections else nn.Identity()
        self.accept_image_fmap = accept_image_fmap
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.num_quantizers = num_quantizers
        self.codebook_sizes = sizes
        self.uniform_codebook_size = len(set(sizes)) == 1
        self.quantize_dropout = quantize_dropout and num_quantizers > 1
        self.quantize_dropout_cutoff_index = quantize_dropout_cutoff_index
        self.quantize_dropout_multiple_of = quantize_dropout_multiple_of
        self.shared_codebook = shared_codebook
        self.diveq = diveq
        self.quant_grad_frac = 1.0 if diveq else quant_grad_frac
        if shared_codebook:
            vq_kwargs |= {"manual_ema_update": True}
        if diveq:
            vq_kwargs |= {"ema_update": False, "learnable_codebook": True, "route_gradients_to_input": False, "commitment_weight": 0.0}
        self.layers = nn.ModuleList(VectorQuantize(codebook_dim, size, **vq_kwargs) for size in sizes)
        if shared_codebook:
            for layer in self.layers[1:]:
                layer._codebook = self.layers[0]._codebook

    @property
    def codebook_size(self) -> int:
        return self.layers[0].codebook_size

    @property
    def codebooks(self) -> Tensor | tuple[Tensor, ...]:
        """[levels, K, d], or for unequal codebook sizes a tuple of [K, d]."""
        codebooks = tuple(layer.codebook for layer in self.layers)
        return torch.stack(codebooks) if self.uniform_codebook_size else codebooks

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes [levels, ..., d] of indices [..., q] of the first q levels; zeros for -1 and for the other levels."""
        indices = F.pad(self._checked(indices), (0, self.num_quantizers - indices.shape[-1]), value=-1)
        return torch.stack([layer.get_codes_from_indices(i) for layer, i in zip(self.layers, indices.unbind(-1), strict=True)])

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What forward returns as quantized for the indices [..., q] of the first q levels, with channels last."""
        codes = (layer.get_codes_from_indices(i) for layer, i in zip(self.layers, self._checked(indices).unbind(-1), strict=False))
        return self.project_out(sum(codes))

    def _checked(self, indices: Tensor) -> Tensor:
        if indices.shape[-1] > self.num_quantizers:
            raise ValueError(f"ResidualVQ: there are {self.num_quantizers} levels, got indices of {indices.shape[-1]}.")
        return indices

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        indices: Tensor | list[Tensor] | None = None,
        return_all_codes: bool = False,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool = False,
        beam_size: int | None = None,
        rand_quantize_dropout_fixed_seed: int | None = None,
    ) -> tuple[Tensor, ...]:
        """Quantize x [..., dim], with accept_image_fmap [B, dim, H, W].

        Returns:
            quantized, of x's shape; indices [..., levels], -1 at levels that were dropped and at padding; losses [levels]; with
            return_all_codes also the codes [levels, ..., d]. With `indices` [..., levels]: quantized and the sum of the levels'
            cross-entropies.
        """
        refuse("ResidualVQ", beam_size=(beam_size, None))
        x = x.movedim(1, -1) if self.accept_image_fmap else x
        frozen = freeze_codebook or self.layers[0].freeze_codebook
        targets = (None,) * self.num_quantizers
        if indices is not None:
            targets = (torch.stack(indices) if isinstance(indices, list) else indices).unbind(-1)
        levels = self.num_quantizers
        if self.training and self.quantize_dropout and indices is None:
            levels = self._kept_levels(rand_quantize_dropout_fixed_seed)
        # Padding may hold anything: it must not make gradients NaN.
        valid = mask is not None and (self.has_projections or self.diveq)
        projected = self.project_in(torch.where(mask.unsqueeze(-1), x, 0) if valid else x)
        if indices is None and self._fits_one_op():
            quantized_out, found, losses = self._all_levels(projected, mask, levels, frozen)
        else:
            options = {"mask": mask, "sample_codebook_temp": sample_codebook_temp, "freeze_codebook": frozen}
            quantized_out, found, losses = self._level_by_level(projected, targets[:levels], options)

        if self.diveq and self.training:
            offset = quantized_out - projected
            direction = F.normalize(offset + 5e-3**0.5 * torch.randn_like(offset), dim=-1, eps=1e-6).detach()
            quantized_out = projected + direction * offset.norm(dim=-1, keepdim=True)
        quantized_out = self.project_out(quantized_out)
        if mask is not None:
            padding = 0 if self.return_zeros_for_masked_padding else x
            quantized_out = torch.where(mask.unsqueeze(-1), quantized_out, padding)
        quantized_out = quantized_out.movedim(-1, 1) if self.accept_image_fmap else quantized_out
        if indices is not None:
            return quantized_out, losses.sum()

        dropped = self.num_quantizers - levels
        all_indices, all_losses = F.pad(found, (0, dropped), value=-1), F.pad(losses, (0, dropped))
        if not return_all_codes:
            return quantized_out, all_indices, all_losses
        return quantized_out, all_indices, all_losses, self.get_codes_from_indices(all_indices)

    def _level_by_level(self, x: Tensor, targets: Sequence[Tensor | None], options: dict) -> tuple[Tensor, Tensor | None, Tensor]:
        """The sum of the codes of as many levels as there are targets; their indices, None where targets are given; losses."""
        first = self.layers[0]._codebook
        shares = self.training and self.shared_codebook and not options["freeze_codebook"]
        residual, quantized_out = x, torch.zeros_like(x)
        residuals, found, losses = [], [], []
        for layer, target in zip(self.layers, targets, strict=False):
            if shares and first.revive_below > 0:
                residuals.append(residual.detach())
            quantized, *level, loss = layer(residual, indices=target, **options)
            passed = quantized if self.quant_grad_frac == 1 else quantized.detach()
            if 0 < self.quant_grad_frac < 1:
                passed = torch.lerp(passed, quantized, self.quant_grad_frac)
            residual = residual - passed
            quantized_out = quantized_out + quantized
            found += level
            losses.append(loss)
        if shares and first.ema_update:
            first.update_ema()
        if residuals:
            mask = options["mask"]
            samples = torch.stack(residuals, -2).flatten(0, -2).unsqueeze(0)
            valid = None if mask is None else mask.unsqueeze(-1).expand(*mask.shape, len(residuals)).reshape(1, -1)
            first.expire_codes_(first._normalized(samples), valid)
        return quantized_out, torch.stack(found, -1) if found else None, torch.stack(losses)

    def _fits_one_op(self) -> bool:
        """Whether the levels do nothing but take the nearest code, with moving averages and a commitment loss."""
        layer, codebook = self.layers[0], self.layers[0]._codebook
        others = (
            any(not self._like_first(other) for other in self.layers),
            self.shared_codebook or self.quant_grad_frac > 0 or not self.uniform_codebook_size,
            codebook.metric != "euclidean" or codebook.revive_below > 0 or layer.stochastic_sample_codes,
            codebook.learnable_codebook or codebook.diversity_weight > 0 or codebook.orthogonal_weight > 0,
            not codebook.route_gradients or codebook.directional_variance is not None or codebook.commits_by_cross_entropy,
            any(layer._codebook._awaits_data for layer in self.layers),
        )
        return not any(others)

    def _like_first(self, layer: VectorQuantize) -> bool:
        """Whether a layer is as the first one and as this module, and nothing waits for its calls."""
        codebook, first = layer._codebook, self.layers[0]._codebook
        same = ("commitment_weight", "gradient", "ema_update", "manual_ema_update", "route_gradients", "decay", "eps")
        modes = layer.training == codebook.training == self.training
        hooks = layer._forward_hooks or layer._forward_pre_hooks
        return modes and not hooks and all(getattr(codebook, name) == getattr(first, name) for name in same)

    def _all_levels(self, x: Tensor, mask: Tensor | None, levels: int, frozen: bool) -> tuple[Tensor, Tensor, Tensor]:
        """`_level_by_level` in one op, and one update of all codebooks."""
        codebooks = [layer._codebook for layer in self.layers[:levels]]
        first = codebooks[0]
        # Backward still needs these codes after the update has written the new ones in place.
        codes = copied(torch.cat([codebook.embed for codebook in codebooks])).to(accumulator_dtype(x.dtype))
        quantized, found, losses = quantize_residual(
            x if self.training else x.detach(),
            codes,
            codebook_weight=0.0,
            commitment_weight=first.commitment_weight,
            gradient=first.gradient,
            mask=mask,
            per_level=True,
        )
        if not self.training:
            return quantized, found, torch.zeros_like(losses)
        if first.ema_update and not frozen:
            statistics = residual_code_statistics(x.detach(), codes, found)
            for codebook, counts, sums in zip(codebooks, *statistics, strict=True):
                codebook.gather_statistics(counts.unsqueeze(0), sums.unsqueeze(0), x, found)
            _update(codebooks, None, write=not first.manual_ema_update)
        return quantized, found, loss_to_differentiate(losses)

    def _kept_levels(self, seed: int | None) -> int:
        """How many levels a training step quantizes with; the same on all processes."""
        seed = common_seed() if seed is None else seed
        last = random.Random(seed).randrange(self.quantize_dropout_cutoff_index, self.num_quantizers)
        multiple = self.quantize_dropout_multiple_of
        return min(-(-(last + 1) // multiple) * multiple, self.num_quantizers)


class GroupedResidualVQ(nn.Module):
    """A `ResidualVQ` for each of the groups that the channels are cut into; Yang et al., "HiFi-Codec" (2023).

    Takes `dim`, `groups` and the arguments of `ResidualVQ`, and returns what it does: indices [groups, ..., levels], losses
    [groups, levels], codes as a tuple over the groups. `indices` of forward are a list or tensor over the groups.
    """

    def __init__(self, *, dim: int, groups: int = 1, accept_image_fmap: bool = False, **kwargs) -> None:
        super().__init__()
        if dim % groups:
            raise ValueError(f"GroupedResidualVQ: dim must be divisible by groups, got {dim} and {groups}.")
        self.dim = dim
        self.groups = groups
        self.accept_image_fmap = accept_image_fmap
        self.rvqs = nn.ModuleList(ResidualVQ(dim=dim // groups, accept_image_fmap=accept_image_fmap, **kwargs) for _ in range(groups))

    @property
    def split_dim(self) -> int:
        return 1 if self.accept_image_fmap else -1

    @property
    def codebooks(self) -> Tensor:
        """[groups, levels, K, d]"""
        return torch.stack([rvq.codebooks for rvq in self.rvqs])

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        return torch.stack([rvq.get_codes_from_indices(i) for rvq, i in zip(self.rvqs, indices, strict=True)])

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """With channels last."""
        return torch.cat([rvq.get_output_from_indices(i) for rvq, i in zip(self.rvqs, indices, strict=True)], -1)

    def forward(
        self,
        x: Tensor,
        indices: Tensor | list[Tensor] | None = None,
        return_all_codes: bool = False,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool = False,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        if x.shape[self.split_dim] != self.dim:
            raise ValueError(f"GroupedResidualVQ: x must have {self.dim} channels in dimension {self.split_dim}, got {list(x.shape)}.")
        options = {
            "mask": mask,
            "return_all_codes": return_all_codes,
            "sample_codebook_temp": sample_codebook_temp,
            "freeze_codebook": freeze_codebook,
            "rand_quantize_dropout_fixed_seed": common_seed() if self.training and self.rvqs[0].quantize_dropout else None,
        }
        targets = (None,) * self.groups if indices is None or len(indices) == 0 else indices
        chunks = x.chunk(self.groups, self.split_dim)
        parts = [rvq(chunk, indices=i, **options) for rvq, chunk, i in zip(self.rvqs, chunks, targets, strict=True)]
        quantized, *others = zip(*parts, strict=True)
        quantized = torch.cat(quantized, self.split_dim)
        if targets[0] is not None:
            return quantized, sum(others[0])
        indices, losses, *codes = others
        return quantized, torch.stack(indices), torch.stack(losses), *codes


def common_seed() -> int:
    """A seed from torch's default generator, the same on all processes."""
    seed = torch.randint(0, 10_000, ())
    return int(sum_over_processes(seed, None) if world_size() > 1 else seed)
