# SPDX-License-Identifier: Apache-2.0
"""vector-quantize-pytorch's ResidualVQ and GroupedResidualVQ over the drop-in VectorQuantize.

Above 400 lines: upstream has many arguments, and the differences from it are listed here.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._typing import signature_of
from ...nn._channels import channels_to
from ...nn._ema import apply_updates, normalize_codes, saved_copy
from ...nn._recompute import StepMemory
from ...nn._sharded import check_gathered
from ...ops._dispatch import choose_impl
from ...ops._layout import Positions, for_inductor
from ...ops._precision import accumulator_dtype
from ...ops._validate import check_mask
from ...ops.residual_vector_quantize import ResidualOptions, finite_residual_statistics, quantize_residual, unavailable
from ._beam_search import beam_search
from ._implicit_codebook import MLP, Conditioned
from ._quantize_dropout import common_seed, quantizers_to_run
from .vector_quantize_pytorch import VectorQuantize, loss_to_differentiate

__all__ = ["MLP", "GroupedResidualVQ", "ResidualVQ"]


class ResidualStep(NamedTuple):
    """What gradient checkpointing needs to run a training step again."""

    codes: Tensor | None
    """The codes from before the update; None where the quantizers ran one by one, and keep theirs."""
    used: int
    """The number of quantizers."""


class ResidualVQ(nn.Module):
    """Quantizes each vector, then its residual, quantizer by quantizer; Zeghidour et al., "SoundStream" (2021).

    Equal to vector-quantize-pytorch 1.32 in arguments, returned values, state_dict, the initial codes of a seed, and for each
    quantizer in what `VectorQuantize` does.

    Differences from upstream, where upstream is at fault:
      - accept_image_fmap with `indices` works; upstream raises an error. The cross-entropies are of each quantizer's residual.
      - freeze_codebook=True in the constructor takes effect; upstream overrides it by forward's default. A frozen shared
        codebook is not updated at the end either.
      - In half precision, the residual stays float32 between quantizers that are fused into one op, as they are unless an
        option requires running them one by one.
      - diveq adds noise in training only; upstream also in evaluation.
      - Indices of fewer quantizers can be decoded with or without quantize_dropout.
      - quantize_dropout draws the number of quantizers on the host. This synchronizes with the device only under
        torch.distributed, where the ranks have to agree. Such a step does not compile with fullgraph=True
        (`nn.ResidualVectorQuantizer` with quantizer_dropout does).
      - channel_last=False, accept_3d_fmap and beams of images work, as does a beam search without a commitment loss, which scores
        squared errors. Upstream raises errors.
      - A frozen codebook is not updated after a beam search.
      - A shared codebook with in_place_codebook_optimizer takes one step for all quantizers. Upstream gathers its gradients, and
        leaves the step to the caller.
      - The network of an implicit neural codebook runs in chunks, and with a gradient for the chosen codes only, unless a loss needs
        the distances of all codes. Upstream stores its activations for every code of every vector.

    Raises:
        ValueError: an invalid argument, or arguments that exclude each other.
    """

    layers: Sequence[VectorQuantize]  # an nn.ModuleList

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
        mlp_kwargs: dict[str, Any] | None = None,
        beam_size: int | None = None,
        eval_beam_size: int | None = None,
        beam_score_quantizer_weights: list[float] | None = None,
        quant_grad_frac: float = 0.0,
        return_zeros_for_masked_padding: bool = True,
        **vq_kwargs: Any,
    ) -> None:
        super().__init__()
        sizes = codebook_size if isinstance(codebook_size, tuple) else (codebook_size,) * (num_quantizers or 0)
        num_quantizers = len(sizes) if num_quantizers is None else num_quantizers
        for rule, holds in (
            ("heads must be 1", heads == 1),
            ("there must be num_quantizers, or a tuple of as many codebook sizes", 0 < num_quantizers == len(sizes)),
            ("a shared codebook needs one codebook size", not shared_codebook or len(set(sizes)) == 1),
            ("quantize_dropout_cutoff_index must not be negative", quantize_dropout_cutoff_index >= 0),
            ("eval_beam_size needs a beam_size", eval_beam_size is None or beam_size is not None),
            ("beam_score_quantizer_weights must be num_quantizers", len(beam_score_quantizer_weights or sizes) == len(sizes)),
        ):
            if not holds:
                raise ValueError(f"ResidualVQ: {rule}.")
        codebook_dim = dim if codebook_dim is None else codebook_dim
        self.codebook_dim = codebook_dim
        self.has_projections = codebook_dim != dim
        self.project_in = nn.Linear(dim, codebook_dim) if self.has_projections else nn.Identity()
        self.project_out = nn.Linear(codebook_dim, dim) if self.has_projections else nn.Identity()
        self.accept_image_fmap = accept_image_fmap
        # The quantizers see channels in the last dimension.
        self.channels_first = channels_first(accept_image_fmap, vq_kwargs)
        vq_kwargs = {name: value for name, value in vq_kwargs.items() if name not in ("channel_last", "accept_3d_fmap")}
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
            vq_kwargs |= {"manual_ema_update": True, "manual_in_place_optimizer_update": True}
        if implicit_neural_codebook:
            vq_kwargs |= {"learnable_codebook": True, "ema_update": False}
        if diveq:
            vq_kwargs |= {"ema_update": False, "learnable_codebook": True, "route_gradients_to_input": False, "commitment_weight": 0.0}
        self._steps = StepMemory[ResidualStep]()
        layers = (VectorQuantize(codebook_dim, size, **vq_kwargs) for size in sizes)
        self.layers = nn.ModuleList(layers)  # pyright: ignore[reportAttributeAccessIssue]
        if shared_codebook:
            for layer in self.layers[1:]:
                layer._codebook = self.layers[0]._codebook
                layer.in_place_codebook_optimizer = self.layers[0].in_place_codebook_optimizer
        self.beam_size = beam_size
        self.eval_beam_size = beam_size if eval_beam_size is None else eval_beam_size
        self.beam_score_quantizer_weights = beam_score_quantizer_weights or [1.0] * num_quantizers
        self.implicit_neural_codebook = implicit_neural_codebook
        self.mlps: Sequence[MLP | None] = (None,) * (num_quantizers - 1)
        if implicit_neural_codebook:
            unit, others = self.layers[0].use_cosine_sim, mlp_kwargs or {}
            mlps = (MLP(codebook_dim, l2norm_output=unit, **others) for _ in range(num_quantizers - 1))
            self.mlps = nn.ModuleList(mlps)  # pyright: ignore[reportAttributeAccessIssue]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Earlier releases kept no steps, and had neither beams nor implicit codebooks."""
        if "beam_size" not in state:
            number = state["num_quantizers"]
            added = {"beam_size": None, "eval_beam_size": None, "beam_score_quantizer_weights": [1.0] * number}
            added |= {"implicit_neural_codebook": False, "mlps": (None,) * (number - 1), "channels_first": state["accept_image_fmap"]}
            state = {"_steps": StepMemory(), **state, **added}
        super().__setstate__(state)

    @property
    def vq_is_ema_updating(self) -> bool:
        return self.layers[0].ema_update

    @property
    def beam_score_weights(self) -> Tensor:
        return torch.tensor(self.beam_score_quantizer_weights)

    @property
    def codebook_size(self) -> int:
        return self.layers[0].codebook_size

    @property
    def codebooks(self) -> Tensor | tuple[Tensor, ...]:
        """[num_quantizers, K, d], or for unequal codebook sizes a tuple of [K, d]."""
        codebooks = tuple(layer.codebook for layer in self.layers)
        return torch.stack(codebooks) if self.uniform_codebook_size else codebooks

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes [num_quantizers, ..., d] of indices [..., q] of the first q quantizers; zeros for -1 and the remaining quantizers."""
        codes = list(self._codes(indices))
        return torch.stack(codes + [torch.zeros_like(codes[0])] * (self.num_quantizers - len(codes)))

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The quantized that forward returns for the indices [..., q] of the first q quantizers, with channels last."""
        return self.project_out(sum(self._codes(indices)))

    def _codes(self, indices: Tensor) -> Iterator[Tensor]:
        """The codes [..., d] of the first q quantizers, of indices [..., q]."""
        total = None
        for number, index in enumerate(self._checked(indices).unbind(-1)):
            layer = self.layers[number]
            codes = layer.channels_last(layer.get_codes_from_indices(index))
            if self.implicit_neural_codebook:
                mlp = self.mlps[number - 1] if number > 0 else None
                if mlp is not None and total is not None:
                    codes = torch.where((index >= 0).unsqueeze(-1), mlp.transform(codes, total), 0)
                total = codes if total is None else total + codes
            yield codes

    def _checked(self, indices: Tensor) -> Tensor:
        if indices.shape[-1] > self.num_quantizers:
            raise ValueError(f"ResidualVQ: there are {self.num_quantizers} quantizers, got indices of {indices.shape[-1]}.")
        return indices

    @overload
    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        indices: None = None,
        return_all_codes: Literal[False] = False,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool = False,
        beam_size: int | None = None,
        rand_quantize_dropout_fixed_seed: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]: ...
    @overload
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
    ) -> tuple[Tensor, ...]: ...
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
        """Quantize x [..., dim], with accept_image_fmap, accept_3d_fmap or channel_last=False [B, dim, ...].

        Returns:
            quantized, of x's shape; indices [..., num_quantizers], -1 for quantizers that were dropped and at padding; losses
            [num_quantizers]; with return_all_codes also the codes [num_quantizers, ..., d]. With `indices` [..., num_quantizers]:
            quantized and the sum of the quantizers' cross-entropies.
        """
        x = x.movedim(1, -1) if self.channels_first else x
        if beam_size is None:
            beam_size = self.beam_size if self.training else self.eval_beam_size
        frozen = freeze_codebook or self.layers[0].freeze_codebook
        targets = (None,) * self.num_quantizers
        if indices is not None:
            targets = (torch.stack(indices) if isinstance(indices, list) else indices).unbind(-1)
        # Padding may be NaN, which must not reach the gradients.
        clean = x
        if mask is not None and (self.has_projections or self.diveq):
            clean = torch.where(mask.unsqueeze(-1), x, 0)
        projected = self.project_in(clean)
        again = self._steps.recall(projected) if self.training else None
        used = self.num_quantizers
        if again is not None:
            used = again.used
        elif self.training and self.quantize_dropout and indices is None:
            cutoff, multiple = self.quantize_dropout_cutoff_index, self.quantize_dropout_multiple_of
            used = quantizers_to_run(self.num_quantizers, cutoff, multiple, rand_quantize_dropout_fixed_seed)
        codes = None
        options = {"sample_codebook_temp": sample_codebook_temp, "freeze_codebook": frozen}
        if indices is None and beam_size is not None and beam_size > 1:
            quantized_out, found, losses = self._beams(projected, mask, used, beam_size, options, updates=again is None)
        elif indices is None and (self._can_fuse() if again is None else again.codes is not None):
            quantized_out, found, losses, codes = self._fused(projected, mask, used, frozen, again)
        else:
            quantized_out, found, losses = self._one_by_one(projected, targets[:used], {"mask": mask, **options}, updates=again is None)
        if self.training and again is None:
            self._steps.record(projected, ResidualStep(codes, used))

        if self.diveq and self.training:
            offset = quantized_out - projected
            direction = F.normalize(offset + 5e-3**0.5 * torch.randn_like(offset), dim=-1, eps=1e-6).detach()
            quantized_out = projected + direction * offset.norm(dim=-1, keepdim=True)
        quantized_out = self.project_out(quantized_out)
        if mask is not None:
            padding = 0 if self.return_zeros_for_masked_padding else x
            quantized_out = torch.where(mask.unsqueeze(-1), quantized_out, padding)
        quantized_out = for_inductor(channels_to(quantized_out, 1)) if self.channels_first else quantized_out
        if indices is not None:
            return quantized_out, losses.sum()

        assert found is not None  # as no indices are given
        dropped = self.num_quantizers - used
        all_indices, all_losses = F.pad(found, (0, dropped), value=-1), F.pad(losses, (0, dropped))
        if not return_all_codes:
            return quantized_out, all_indices, all_losses
        return quantized_out, all_indices, all_losses, self.get_codes_from_indices(all_indices)

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self) -> None: ...

    def _one_by_one(
        self, x: Tensor, targets: Sequence[Tensor | None], options: dict[str, Any], *, updates: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The sum of the codes of as many quantizers as there are targets; their indices, None where targets are given; losses."""
        residual, quantized_out = x, torch.zeros_like(x)
        inputs, found, losses = [], [], []
        for number, (layer, target) in enumerate(zip(self.layers, targets, strict=False)):
            inputs.append(residual.detach())
            transform = self._transform(number, quantized_out)
            quantized, *index, loss = layer(layer.like_input(residual), indices=target, codebook_transform_fn=transform, **options)
            quantized = layer.channels_last(quantized)
            residual = self._next_residual(residual, quantized)
            quantized_out = quantized_out + quantized
            found += index
            losses.append(loss)
        if updates and not options["freeze_codebook"]:
            self._update_shared(inputs, options["mask"])
        return quantized_out, torch.stack(found, -1) if found else None, torch.stack(losses)

    def _beams(
        self, x: Tensor, mask: Tensor | None, used: int, beam_size: int, options: dict[str, Any], *, updates: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`_one_by_one` by beam search over the first `used` quantizers."""
        layers = self.layers[:used]
        weights = self.beam_score_quantizer_weights
        best = beam_search(layers, x, mask, beam_size, weights, self._next_residual, self._transform, options)
        losses = best.losses.flatten(0, -2)
        losses = losses.sum(0) / (max(len(losses), 1) if mask is None else mask.sum().clamp(min=1))
        if self.training and updates and not options["freeze_codebook"]:
            inputs = [t.detach() for t in best.inputs]
            for layer, vectors, index in zip(layers, inputs, best.indices.unbind(-1), strict=True):
                layer.update_indices(layer.like_input(vectors), index, mask)
            self._update_shared(inputs, mask)
        return best.quantized, best.indices, losses

    def _next_residual(self, residual: Tensor, quantized: Tensor) -> Tensor:
        passed = quantized if self.quant_grad_frac == 1 else quantized.detach()
        if 0 < self.quant_grad_frac < 1:
            passed = torch.lerp(passed, quantized, self.quant_grad_frac)
        return residual - passed

    def _transform(self, number: int, quantized: Tensor) -> Callable[[Tensor], Tensor] | None:
        """What makes the codes of a quantizer from its codebook, given the sum of codes before it; None if the codebook holds them."""
        mlp = self.mlps[number - 1] if number > 0 else None
        return None if mlp is None else Conditioned(mlp, quantized)

    @torch.no_grad()
    def _update_shared(self, inputs: list[Tensor], mask: Tensor | None) -> None:
        """End a training step of a shared codebook, which the quantizers have gathered statistics or gradients for."""
        if not (self.training and self.shared_codebook):
            return
        first = self.layers[0]._codebook
        if first.ema_update:
            first.update_ema()
        self.layers[0].update_in_place_optimizer()
        if first.threshold_ema_dead_code > 0:
            samples = torch.stack(inputs, -2).flatten(0, -2).unsqueeze(0)
            valid = None if mask is None else mask.unsqueeze(-1).expand(*mask.shape, len(inputs)).reshape(1, -1)
            first.expire_codes_(normalize_codes(samples) if first.metric == "cosine" else samples, valid)

    def _can_fuse(self) -> bool:
        """Whether each quantizer only takes the nearest code, with an EMA and a commitment loss."""
        layer, codebook = self.layers[0], self.layers[0]._codebook
        needs_one_by_one = (
            any(not self._like_first(other) for other in self.layers),
            self.shared_codebook or self.quant_grad_frac > 0 or not self.uniform_codebook_size,
            layer.use_cosine_sim or codebook.threshold_ema_dead_code > 0 or layer.stochastic_sample_codes,
            layer.learnable_codebook or layer.has_codebook_diversity_loss or layer.has_codebook_orthogonal_loss,
            not layer.route_gradients_to_input or layer.directional_reparam or layer.commitment_use_cross_entropy_loss,
            layer.straight_through or codebook.vq_bridge is not None or codebook.affine_param or self.implicit_neural_codebook,
            layer.in_place_codebook_optimizer is not None,
            any(layer._codebook.needs_init for layer in self.layers),
        )
        return not any(needs_one_by_one)

    def _like_first(self, layer: VectorQuantize) -> bool:
        """Whether a layer has the options of the first one and the mode of this module, and no hooks."""
        codebook, first = layer._codebook, self.layers[0]._codebook
        same = all(
            getattr(layer, name) == getattr(self.layers[0], name)
            for name in ("commitment_weight", "rotation_trick", "route_gradients_to_input")
        )
        same = same and all(getattr(codebook, name) == getattr(first, name) for name in ("ema_update", "manual_ema_update", "decay", "eps"))
        modes = layer.training == codebook.training == self.training
        return modes and same and not (layer._forward_hooks or layer._forward_pre_hooks)

    def _fused(
        self, x: Tensor, mask: Tensor | None, used: int, frozen: bool, again: ResidualStep | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`_one_by_one` in one op, and one update of all codebooks; returns the codes as well."""
        check_mask("ResidualVQ", mask, x, x.dim() - 1)
        layer, codebooks = self.layers[0], [layer._codebook for layer in self.layers[:used]]
        for codebook in codebooks:
            check_gathered("ResidualVQ", codebook.embed)
        codes = again.codes if again is not None and again.codes is not None else torch.cat([codebook.embed for codebook in codebooks])
        updates = self.training and layer.ema_update and not frozen and again is None
        # Compiled code would join the codes again in backward, after an update has overwritten them.
        codes = (saved_copy(codes) if updates else codes).to(accumulator_dtype(x.dtype))
        x = x if self.training else x.detach()
        positions = Positions(x, x.dim() - 1)
        impl = choose_impl("residual_vector_quantize", None, unavailable(x.device, x.dtype), x, codes)
        options = ResidualOptions(0.0, layer.commitment_weight, layer.rotation_trick, per_quantizer=True)
        valid = positions.view_mask(mask)
        quantized, indices, losses = quantize_residual(positions.vectors, codes, valid, None, "euclidean", options, impl)
        if updates:
            counts_and_sums = finite_residual_statistics(positions.vectors, codes, indices, impl)[:2]
            for codebook, counts, sums in zip(codebooks, *counts_and_sums, strict=True):
                codebook.add_statistics(counts.unsqueeze(0), sums.unsqueeze(0))
            updates = [codebook.take_update() for codebook in codebooks]
            for update in updates:
                update.writes_codebook = not codebooks[0].manual_ema_update
            apply_updates(updates, None, codebooks[0].synchronized)
        quantized, indices = positions.restore(quantized), positions.restore_indices(indices, used)
        return quantized, indices, loss_to_differentiate(losses) if self.training else torch.zeros_like(losses), codes


class GroupedResidualVQ(nn.Module):
    """A `ResidualVQ` for each of the groups that the channels are split into; Yang et al., "HiFi-Codec" (2023).

    Takes `dim`, `groups` and the arguments of `ResidualVQ`, and returns the same, by group: indices [groups, ..., num_quantizers],
    losses [groups, num_quantizers], codes as a tuple over the groups. `indices` of forward are a list or tensor over the groups.
    """

    rvqs: Sequence[ResidualVQ]  # an nn.ModuleList

    def __init__(self, *, dim: int, groups: int = 1, accept_image_fmap: bool = False, **kwargs: Any) -> None:
        super().__init__()
        if dim % groups:
            raise ValueError(f"GroupedResidualVQ: dim must be divisible by groups, got {dim} and {groups}.")
        self.dim = dim
        self.groups = groups
        self.accept_image_fmap = accept_image_fmap
        self.channels_first = channels_first(accept_image_fmap, kwargs)
        rvqs = (ResidualVQ(dim=dim // groups, accept_image_fmap=accept_image_fmap, **kwargs) for _ in range(groups))
        self.rvqs = nn.ModuleList(rvqs)  # pyright: ignore[reportAttributeAccessIssue]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Earlier releases split images only."""
        super().__setstate__({"channels_first": state["accept_image_fmap"], **state})

    @property
    def split_dim(self) -> int:
        return 1 if self.channels_first else -1

    @property
    def codebooks(self) -> Tensor:
        """[groups, num_quantizers, K, d]"""
        return torch.stack([cast(Tensor, rvq.codebooks) for rvq in self.rvqs])

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
    ) -> tuple[Any, ...]:
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
        all_indices, all_losses, *codes = others
        return quantized, torch.stack(all_indices), torch.stack(all_losses), *codes

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self) -> None: ...


def channels_first(accept_image_fmap: bool, vq_kwargs: dict[str, Any]) -> bool:
    return accept_image_fmap or vq_kwargs.get("accept_3d_fmap", False) or not vq_kwargs.get("channel_last", True)
