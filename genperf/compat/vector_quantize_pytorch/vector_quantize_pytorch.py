# SPDX-License-Identifier: Apache-2.0
"""vector-quantize-pytorch's VectorQuantize over genperf's search and quantizer.

Above 400 lines: upstream has 40 arguments, and the differences from it are listed here.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._distributed import all_reduce_sum, world_size
from ..._pickled import vector_quantize_state
from ..._typing import signature_of
from ...nn._channels import channels_to
from ...nn._codebook_losses import orthogonal_loss
from ...nn._ema import CodeWeights, normalize_codes, saved_copy
from ...nn._recompute import Step, StepMemory
from ...nn._sharded import check_gathered, writable_codes
from ...nn._vectors import check_decoded, look_up, merge_heads, merge_indices, split_heads, split_indices
from ...ops._autograd import ValueOf
from ...ops._dispatch import choose_impl
from ...ops._layout import Positions, fold_codebooks, for_inductor
from ...ops._noise import first_sample
from ...ops._precision import accumulator_dtype, normalized
from ...ops._validate import check, check_layer_input
from ...ops.vector_quantize import quantize, unavailable
from ._assignment import CodebookAssignment, TransformedAssignment, codes_at
from ._codebook import Codebook

__all__ = ["Codebook", "LossBreakdown", "VectorQuantize"]


class LossBreakdown(NamedTuple):
    """The terms of the loss before their weights; scalars."""

    commitment: Tensor
    codebook_diversity: Tensor
    orthogonal_reg: Tensor
    inplace_optimize: Tensor


def loss_to_differentiate(loss: Tensor) -> Tensor:
    """The loss of a training step. As in upstream, its backward raises no error if nothing requires a gradient."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not loss.requires_grad:
        loss.requires_grad_()
    return loss


def _same(t: Tensor) -> Tensor:
    return t


class VectorQuantize(nn.Module):
    """Replaces every vector by its nearest code; by default the codes learn by EMA.

    Equal to vector-quantize-pytorch 1.32 in the arguments of constructor and forward, the returned values, the names and shapes
    of the state_dict (it loads both ways), the initial codes of a seed, and what a training step does to x's gradient, codes
    and averages. `genperf.nn.VectorQuantizer` documents the algorithm.

    Differences from upstream, where upstream is at fault:
      - The commitment loss with a mask compares codes with what was quantized (projected, normalized, by head). Upstream
        compares with the input, which fails where a projection or heads change its shape. It is 0, not NaN, if no vector
        is valid.
      - The diversity loss takes the mean distribution over all valid vectors of a codebook. Upstream averages over the batch
        for each position of a sequence, across codebooks, and counts padding (for x [B, D] or [B, 1, D] they are equal).
        Likewise, a code with only padding assigned to it is not active in the orthogonal loss, to which a code of zeros adds
        nothing. Upstream subtracts 1 for it.
      - Index -1 means no code: zeros in get_codes_from_indices, no effect in update_indices. Upstream takes it as the last
        code in the former and as the first in the latter.
      - get_codes_from_indices joins the codes of heads that share a codebook; get_output_from_indices projects channels
        in any dimension.
      - Diversity and cross-entropy losses, and the softmax of straight_through, are differentiated at the codes that they were
        computed from; upstream, with EMA, at the codes after the update.
      - A step without a valid vector leaves the averages unchanged, and a code that k-means assigns no vector to stays in place.
        Upstream decays the averages, and moves the code to the origin.
      - A function given as `ema_update_weight` receives the accumulated statistics, not only those of the last batch.
      - The gradient reaches project_in even if x needs none.
      - `lens` also works for channels-first sequences; masks work for images, volumes and single vectors.
      - Setting `codebook` works for a learnable one.
      - With use_cosine_sim and an orthogonal loss, where the optimizer changes the codes, they are normalized before they are
        searched and returned.
      - float64 is not cast to float32. The nearest code is exact, and quantized equals the code bitwise.
      - With `indices`, quantized is projected and has the same layout as without.
      - Indices are decoded as forward quantizes: through vq_bridge, and with the statistics of affine_param. Upstream decodes
        with the parameter `codebook` itself. Dead codes of affine_param are replaced by what maps to vectors of the batch.
      - With torch.distributed, in_place_codebook_optimizer averages the gradients over the ranks that are there at each step. It
        steps under torch.no_grad() too, and its loss reaches no module but the codebook.

    Differences by design: synchronization over ranks is decided at each step, not by whether torch.distributed was initialized
    before the constructor (sync_codebook=None means True), and k-means is synchronized whenever the codebook is
    (sync_kmeans=False would leave ranks with different codes). Replacements of dead codes, the vectors that k-means starts from,
    and the noise of sample_codebook_temp are drawn with different random numbers.

    torch.compile(fullgraph=True) needs initialized codes: with kmeans_init, run the first step without it.

    Raises:
        ValueError: an invalid argument, or arguments that exclude each other.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        heads: int = 1,
        separate_codebook_per_head: bool = False,
        decay: float = 0.8,
        eps: float = 1e-5,
        freeze_codebook: bool = False,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        sync_kmeans: bool = True,
        use_cosine_sim: bool = False,
        layernorm_after_project_in: bool = False,
        threshold_ema_dead_code: float = 0,
        channel_last: bool = True,
        accept_image_fmap: bool = False,
        accept_3d_fmap: bool = False,
        commitment_weight: float = 1.0,
        commitment_use_cross_entropy_loss: bool = False,
        orthogonal_reg_weight: float = 0.0,
        orthogonal_reg_active_codes_only: bool = False,
        orthogonal_reg_max_codes: int | None = None,
        codebook_diversity_loss_weight: float = 0.0,
        codebook_diversity_temperature: float = 100.0,
        stochastic_sample_codes: bool = False,
        sample_codebook_temp: float = 1.0,
        straight_through: bool = False,
        rotation_trick: bool | None = None,
        directional_reparam: bool = False,
        directional_reparam_variance: float = 5e-3,
        sync_codebook: bool | None = None,
        sync_affine_param: bool = False,
        ema_update: bool | None = None,
        vq_bridge: nn.Module | None = None,
        manual_ema_update: bool = False,
        learnable_codebook: bool | None = None,
        in_place_codebook_optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        manual_in_place_optimizer_update: bool = False,
        affine_param: bool = False,
        affine_param_batch_decay: float = 0.99,
        affine_param_codebook_decay: float = 0.9,
        sync_update_v: float = 0.0,
        return_zeros_for_masked_padding: bool = True,
        route_gradients_to_input: bool = True,
    ) -> None:
        super().__init__()
        learns = directional_reparam or vq_bridge is not None
        ema_update = not learns if ema_update is None else ema_update
        learnable_codebook = learns if learnable_codebook is None else learnable_codebook
        rotation_trick = not directional_reparam and dim > 1 if rotation_trick is None else rotation_trick
        for rule, holds in (
            (
                "straight_through, rotation_trick (on by default) and directional_reparam exclude each other",
                straight_through + rotation_trick + directional_reparam <= 1,
            ),
            ("directional_reparam needs a threshold_ema_dead_code", not directional_reparam or threshold_ema_dead_code > 0),
            ("learnable_codebook needs ema_update=False", not (learnable_codebook and ema_update)),
            ("learnable_codebook and use_cosine_sim exclude each other", not (learnable_codebook and use_cosine_sim)),
            ("learnable_codebook and straight_through exclude each other", not (learnable_codebook and straight_through)),
            ("vq_bridge needs a learnable_codebook", vq_bridge is None or learnable_codebook),
            ("affine_param and use_cosine_sim exclude each other", not (affine_param and use_cosine_sim)),
            (
                "in_place_codebook_optimizer needs a learnable_codebook",
                in_place_codebook_optimizer is None or learnable_codebook or orthogonal_reg_weight > 0,
            ),
            ("sync_update_v must lie in [0, 1], and needs a learnable codebook", 0 <= sync_update_v <= bool(learnable_codebook)),
        ):
            if not holds:
                raise ValueError(f"VectorQuantize: {rule}.")
        codebook_dim = dim if codebook_dim is None else codebook_dim
        for rule, value, holds in (
            ("dim must be at least 1", dim, dim >= 1),
            ("heads must be at least 1", heads, heads >= 1),
            ("codebook_size must be at least 1", codebook_size, codebook_size >= 1),
            ("codebook_dim must be at least 1", codebook_dim, codebook_dim >= 1),
            ("decay must lie in [0, 1]", decay, 0 <= decay <= 1),
            ("eps must be positive", eps, eps > 0),
            ("kmeans_iters must not be negative", kmeans_iters, kmeans_iters >= 0),
            ("threshold_ema_dead_code must not be negative", threshold_ema_dead_code, threshold_ema_dead_code >= 0),
            ("commitment_weight must not be negative", commitment_weight, commitment_weight >= 0),
            ("codebook_diversity_loss_weight must not be negative", codebook_diversity_loss_weight, codebook_diversity_loss_weight >= 0),
            ("codebook_diversity_temperature must be positive", codebook_diversity_temperature, codebook_diversity_temperature > 0),
            ("orthogonal_reg_weight must not be negative", orthogonal_reg_weight, orthogonal_reg_weight >= 0),
            ("orthogonal_reg_max_codes must be at least 2", orthogonal_reg_max_codes, (orthogonal_reg_max_codes or 2) >= 2),
            ("sample_codebook_temp must not be negative", sample_codebook_temp, sample_codebook_temp >= 0),
        ):
            check("VectorQuantize", rule, value, holds)
        self.dim = dim
        self.heads = heads
        self.separate_codebook_per_head = separate_codebook_per_head
        self.codebook_size = codebook_size
        inner = codebook_dim * heads
        self.has_projections = inner != dim
        self.project_in = nn.Linear(dim, inner) if self.has_projections else nn.Identity()
        if self.has_projections and layernorm_after_project_in:
            self.project_in = nn.Sequential(self.project_in, nn.LayerNorm(inner))
        self.project_out = nn.Linear(inner, dim) if self.has_projections else nn.Identity()
        self._codebook = Codebook(
            heads if separate_codebook_per_head else 1,
            codebook_size,
            codebook_dim,
            learnable=learnable_codebook or orthogonal_reg_weight > 0,
            ema_update=ema_update,
            manual_ema_update=manual_ema_update,
            decay=decay,
            eps=eps,
            kmeans_init=kmeans_init,
            kmeans_iters=kmeans_iters,
            use_cosine_sim=use_cosine_sim,
            threshold_ema_dead_code=threshold_ema_dead_code,
            synchronized=sync_codebook is None or sync_codebook,
            vq_bridge=vq_bridge,
            affine_param=affine_param,
            sync_affine_param=sync_affine_param,
            affine_param_batch_decay=affine_param_batch_decay,
            affine_param_codebook_decay=affine_param_codebook_decay,
        )
        make_optimizer = in_place_codebook_optimizer
        self.in_place_codebook_optimizer = None if make_optimizer is None else make_optimizer(self._codebook.parameters())
        self.manual_in_place_optimizer_update = manual_in_place_optimizer_update
        self.use_cosine_sim = use_cosine_sim
        self.learnable_codebook = learnable_codebook
        self.rotation_trick = rotation_trick
        self.directional_reparam = directional_reparam
        self.directional_reparam_variance = directional_reparam_variance
        self.commitment_weight = commitment_weight
        self.commitment_use_cross_entropy_loss = commitment_use_cross_entropy_loss
        self.codebook_diversity_loss_weight = codebook_diversity_loss_weight
        self.codebook_diversity_temperature = codebook_diversity_temperature
        self.orthogonal_reg_weight = orthogonal_reg_weight
        self.orthogonal_reg_active_codes_only = orthogonal_reg_active_codes_only
        self.orthogonal_reg_max_codes = orthogonal_reg_max_codes
        self.stochastic_sample_codes = stochastic_sample_codes
        self.sample_codebook_temp = sample_codebook_temp
        self.straight_through = straight_through
        self.sync_update_v = sync_update_v
        self.route_gradients_to_input = route_gradients_to_input
        self.accept_image_fmap = accept_image_fmap
        self.accept_3d_fmap = accept_3d_fmap
        self.channel_last = channel_last
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.freeze_codebook = freeze_codebook
        self._steps = StepMemory()

    def __setstate__(self, state: dict[str, Any]) -> None:
        added = {"straight_through": False, "in_place_codebook_optimizer": None, "manual_in_place_optimizer_update": False}
        super().__setstate__(added | vector_quantize_state(state))

    @property
    def ema_update(self) -> bool:
        return self._codebook.ema_update

    @ema_update.setter
    def ema_update(self, value: bool) -> None:
        self._codebook.ema_update = value

    @property
    def eps(self) -> float:
        return self._codebook.eps

    @eps.setter
    def eps(self, value: float) -> None:
        self._codebook.eps = value

    @property
    def has_commitment_loss(self) -> bool:
        return self.commitment_weight > 0 and not self.directional_reparam

    @property
    def has_codebook_orthogonal_loss(self) -> bool:
        return self.orthogonal_reg_weight > 0

    @property
    def has_codebook_diversity_loss(self) -> bool:
        return self.codebook_diversity_loss_weight > 0

    @property
    def codebook(self) -> Tensor:
        """[K, d], or with separate_codebook_per_head [heads, K, d]."""
        codes = self._codebook.embed
        if self.separate_codebook_per_head:
            return codes
        check_gathered("VectorQuantize.codebook", codes)
        return codes.squeeze(0)

    @codebook.setter
    @torch.no_grad()
    def codebook(self, codes: Tensor) -> None:
        written, store = writable_codes(self._codebook, "embed")
        written.copy_(codes if self.separate_codebook_per_head else codes.unsqueeze(0))
        store()

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes of indices as forward returns them, before project_out, in the layout of x; zeros for -1."""
        return self.like_input(self._look_up(indices))

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The quantized that forward returns for these indices; zeros for -1."""
        output = self.project_out(self._look_up(indices))
        if self.has_projections:
            present = indices if self.heads == 1 else indices[..., 0]
            output = torch.where((present >= 0).unsqueeze(-1), output, 0)
        return self.like_input(output)

    def update_in_place_optimizer(self) -> None:
        """Step in_place_codebook_optimizer, with gradients averaged over ranks, and clear them; for manual_in_place_optimizer_update."""
        optimizer = self.in_place_codebook_optimizer
        if optimizer is None:
            return
        ranks = world_size() if self._codebook.synchronized else 1
        for p in self._codebook.parameters():
            if p.grad is not None and ranks > 1:
                p.grad = all_reduce_sum(p.grad) / ranks
        optimizer.step()
        optimizer.zero_grad()

    def expire_codes_(self, x: Tensor) -> None:
        """In training, replace dead codes by vectors of x [..., heads * d], as they are after project_in."""
        _, vectors, _ = self._to_vectors(x, None)
        self._codebook.expire_codes_(self._unit(vectors).movedim(2, -1))

    @torch.no_grad()
    def update_indices(self, x: Tensor, indices: Tensor, mask: Tensor | None = None) -> None:
        """Update averages and codes as a training step that assigns these indices to x."""
        codebook = self._codebook
        if codebook.has_ema:
            _, vectors, valid = self._to_vectors(self.project_in(self.channels_last(x)), mask)
            found = self._split_indices(indices, vectors)
            check_decoded("VectorQuantize.update_indices", found, self.codebook_size)
            codebook.gather(self._unit(vectors), found if valid is None else torch.where(valid, found, -1))
            codebook.apply_update(None, writes_codebook=codebook.ema_update and not codebook.manual_ema_update)

    update_ema_indices = update_indices

    @overload
    def forward(
        self,
        x: Tensor,
        indices: None = None,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        topk: int | None = None,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool | None = None,
        return_loss_breakdown: Literal[False] = False,
        codebook_transform_fn: Callable[[Tensor], Tensor] | None = None,
        ema_update_weight: CodeWeights | None = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]: ...
    @overload
    def forward(
        self,
        x: Tensor,
        indices: Tensor | None = None,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        topk: int | None = None,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool | None = None,
        return_loss_breakdown: bool = False,
        codebook_transform_fn: Callable[[Tensor], Tensor] | None = None,
        ema_update_weight: CodeWeights | None = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ) -> tuple[Any, ...]: ...
    def forward(
        self,
        x: Tensor,
        indices: Tensor | None = None,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        topk: int | None = None,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool | None = None,
        return_loss_breakdown: bool = False,
        codebook_transform_fn: Callable[[Tensor], Tensor] | None = None,
        ema_update_weight: CodeWeights | None = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ) -> tuple[Any, ...]:
        """Quantize x.

        Args:
            x: [..., dim], or [B, dim, ...] with accept_image_fmap, accept_3d_fmap or channel_last=False.
            indices: codes whose cross-entropy under softmax(-distance) is returned instead of the loss.
            mask: bool, x's shape without channels; False for padding. lens: int64 [B], lengths instead of a mask.
            ema_update_weight: [K] or [h, K], factors of each code's EMA step; or a function of the sums and counts that returns them.
            accum_ema_update: keep the statistics of this batch for the next step that updates.
            topk: quantize with each of the nearest codes, without an update of the codebook; for one head.
            codebook_transform_fn: a function of the codes [h, K, d] that returns codes [h, B, N, K, d] for each vector of x [B, N, dim].
            sample_codebook_temp, freeze_codebook, ema_update: override the constructor's.

        Returns:
            quantized, indices and loss, with return_loss_breakdown also `LossBreakdown`; with `indices`, quantized and loss.
            Padding is 0 in quantized (x with return_zeros_for_masked_padding=False) and -1 in the indices.
            With topk, quantized, indices and the commitment loss, that of each vector, have another dimension: of quantized
            [..., topk, dim] or [B, dim, ..., topk], otherwise the last one.
        """
        codebook = self._codebook
        x = self.channels_last(x)
        if lens is not None:
            check("VectorQuantize", "only one of mask and lens can be given", "both", mask is None)
            mask = torch.arange(x.shape[1], device=x.device) < lens.unsqueeze(1)
        codebook.check_code_weights(ema_update_weight)
        check_gathered("VectorQuantize", codebook.embed)
        topk = None if topk is None else self._check_topk(topk)
        separate = self.heads in (1, codebook.num_codebooks)
        check("VectorQuantize", "codebook_transform_fn needs one or separate heads", self.heads, codebook_transform_fn is None or separate)

        # Padding may be NaN, which must not reach the gradients of the projection.
        projected = self.project_in(torch.where(mask.unsqueeze(-1), x, 0) if mask is not None and self.has_projections else x)
        positions, vectors, valid = self._to_vectors(projected, mask)
        starts = codebook.needs_init
        if starts:
            from ...nn._outside_compile import init_in_first_step

            init_in_first_step(codebook, self._unit(vectors.detach()), valid)

        frozen = self.freeze_codebook if freeze_codebook is None else freeze_codebook
        ema_update = codebook.ema_update if ema_update is None else ema_update
        again = self._steps.recall(vectors) if self.training else None
        trains = self.training and not frozen and again is None
        updates = trains and topk is None and (ema_update or codebook.threshold_ema_dead_code > 0)
        in_place = trains and self.in_place_codebook_optimizer is not None
        soft_temperature = self.sample_codebook_temp if sample_codebook_temp is None else sample_codebook_temp
        temperature = soft_temperature if self.training and self.stochastic_sample_codes else 0.0
        if valid is not None and not (topk is None and codebook_transform_fn is None):
            vectors = torch.where(valid.unsqueeze(2), vectors, 0)  # what follows is in plain PyTorch
        queries, vectors = vectors, self._unit(vectors)
        first = self._first_vector(vectors, projected) if temperature > 0 else 0

        def assign(copy: bool) -> tuple[CodebookAssignment | TransformedAssignment, Tensor]:
            if codebook.affine_param and again is None:
                codebook.update_affine(vectors, valid)
            codes = codebook.search_codes(projected.dtype, copy=copy)
            codes = codes if again is None else ValueOf.apply(again.codebook, codes)
            if codebook_transform_fn is None:
                choice = CodebookAssignment(codes, codebook.metric)
            else:
                choice = TransformedAssignment(codebook_transform_fn, codes, codebook.metric)
            return choice, choice.assign(queries, vectors, valid, temperature, first, topk) if again is None else again.indices

        def update(found: Tensor) -> None:
            codebook.gather(vectors, found, waits=accum_ema_update)
            if not accum_ema_update:
                codebook.apply_update(ema_update_weight, writes_codebook=ema_update and not codebook.manual_ema_update)

        in_place_loss = zero = torch.zeros((), dtype=accumulator_dtype(projected.dtype), device=x.device)
        if in_place:
            # Without hooks of gradient checkpointing, whose second run takes no step.
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_same, _same):
                choice, found = assign(copy=True)
                if updates:
                    update(found)
                in_place_loss = self._optimize_in_place(*choice.table(vectors.detach(), found))
            updates = False
        # FSDP2 may gather initial codes for backward before they are written, and `update_indices` may follow a step with topk.
        choice, found = assign(copy=updates or starts or (trains and topk is not None and codebook.has_ema))
        if updates or in_place or (self.training and (temperature > 0 or codebook.affine_param or topk is not None)):
            self._steps.record(queries, Step(choice.codes.detach(), found))
        moves_codes = self.learnable_codebook and not frozen
        tokens = vectors
        if topk is not None:
            vectors, found = vectors.unsqueeze(-1).expand(*vectors.shape, topk).flatten(-2), found.flatten(-2)
        folded, codes, numbered = choice.table(vectors, found)
        soft = None
        if self.training and self.straight_through and soft_temperature > 0 and topk is None and not self._routes_to(folded):
            soft = fold_codebooks(choice.soft_codes(tokens, valid, soft_temperature))
        quantized, commitment = self._quantize(folded, codes, numbered, moves_codes, soft)
        sizes = positions.sizes
        if topk is not None:
            sizes = [*sizes, topk]
            commitment = self._errors(folded, codes if moves_codes else codes.detach(), numbered).reshape(sizes)

        has_commitment = self.has_commitment_loss if self.training else topk is not None
        if has_commitment and self.commitment_use_cross_entropy_loss and topk is None:
            commitment = choice.cross_entropy(tokens, found)
        commitment = commitment if has_commitment else zero
        diversity = zero
        if self.training and self.has_codebook_diversity_loss:
            diversity = choice.diversity(tokens, valid, self.codebook_diversity_temperature)
        if updates:
            update(found)
        orthogonal = self._orthogonality(found) if self.training and self.has_codebook_orthogonal_loss else zero

        if topk is None:
            quantized = self._mask_output(self.project_out(positions.restore(merge_heads(quantized, self.heads))), mask, x)
        else:
            quantized = self.project_out(quantized.unflatten(-1, (-1, topk)).movedim(1, -1).reshape(*sizes, folded.shape[1]))
            quantized = self._mask_output(quantized, None if mask is None else mask.unsqueeze(-1), x.unsqueeze(-2))
        quantized = self.like_input(quantized) if x.dim() > 2 else quantized
        if indices is not None:
            return quantized, choice.cross_entropy(tokens, self._split_indices(indices, tokens))
        loss = commitment * (self.commitment_weight if self.has_commitment_loss else 1.0)
        if self.training and self.has_codebook_diversity_loss:
            loss = loss + self.codebook_diversity_loss_weight * diversity
        if self.training and self.has_codebook_orthogonal_loss:
            loss = loss + self.orthogonal_reg_weight * orthogonal
        loss = loss_to_differentiate(loss) if self.training else loss
        outputs = quantized, merge_indices(found, sizes, self.heads), loss
        return (*outputs, LossBreakdown(commitment, diversity, orthogonal, in_place_loss)) if return_loss_breakdown else outputs

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self) -> None: ...

    def _to_vectors(self, x: Tensor, mask: Tensor | None) -> tuple[Positions, Tensor, Tensor | None]:
        """Projected x [..., heads * d] as vectors [h, outer, d, inner], and which are valid, [h, outer, inner]."""
        dim = self.heads * self._codebook.dim
        channel = check_layer_input("VectorQuantize", x, mask, dim=dim, channel_dim=-1, dtype=x.dtype, is_option=False)
        if mask is not None and self.use_cosine_sim:
            x = torch.where(mask.unsqueeze(-1), x, 0)  # otherwise a masked NaN could reach the gradients
        positions = Positions(x, channel)
        vectors, valid = positions.vectors, positions.view_mask(mask)
        if self.heads > 1 and vectors.stride(1) == 1:  # then splitting heads needs no copy
            vectors = vectors.transpose(1, 2).flatten(0, 1).unsqueeze(2)
            valid = None if valid is None else valid.reshape(-1, 1)
        vectors, valid = split_heads(vectors, valid, self.heads, self._codebook.num_codebooks)
        return positions, vectors, valid

    def _unit(self, vectors: Tensor) -> Tensor:
        """For the cosine similarity, vectors [h, outer, d, inner] divided by their norms."""
        return normalized(vectors, 2).to(vectors.dtype) if self.use_cosine_sim else vectors

    def _split_indices(self, indices: Tensor, vectors: Tensor) -> Tensor:
        """Indices as forward returns them, as [h, outer, inner]."""
        outer = vectors.shape[0] * vectors.shape[1] // self.heads
        indices = indices.long().reshape(outer, vectors.shape[3], self.heads)
        return split_indices(indices, self.heads, self._codebook.num_codebooks).contiguous()

    def _look_up(self, indices: Tensor) -> Tensor:
        """The codes [..., heads * d] of indices as forward returns them; zeros for -1."""
        indices = indices.long()
        check_decoded("VectorQuantize", indices, self.codebook_size)
        check_gathered("VectorQuantize.get_codes_from_indices", self._codebook.embed)
        codes = self._codebook.search_codes(self._codebook.embed.dtype).to(self._codebook.embed.dtype)
        return look_up(codes, indices.unsqueeze(-1) if self.heads == 1 else indices)

    def _check_topk(self, topk: int) -> int:
        for rule, holds in (
            ("topk must be at least 1", topk >= 1),
            ("topk needs heads=1", self.heads == 1),
            (
                "topk and commitment_use_cross_entropy_loss exclude each other",
                not (self.training and self.commitment_use_cross_entropy_loss),
            ),
            ("topk and in_place_codebook_optimizer exclude each other", not self.training or self.in_place_codebook_optimizer is None),
        ):
            if not holds:
                raise ValueError(f"VectorQuantize: {rule}, got topk={topk}.")
        return min(topk, self.codebook_size)

    def _optimize_in_place(self, x: Tensor, codes: Tensor, indices: Tensor) -> Tensor:
        """Step the optimizer of the codebook towards the vectors x [outer, d, inner] of codes [M, d]; returns the loss."""
        impl = choose_impl("vector_quantize", None, unavailable(x.device, x.dtype), x, codes)
        _, loss = quantize(x, codes, indices, 1.0, 0.0, "straight_through", impl)
        parameters = [p for p in self._codebook.parameters() if p.requires_grad]
        # Not backward(), after which DistributedDataParallel would expect no other gradient of the step.
        for p, grad in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
            if grad is not None:
                p.grad = grad if p.grad is None else p.grad + grad
        if not self.manual_in_place_optimizer_update:
            self.update_in_place_optimizer()
        return loss.detach()

    def _errors(self, x: Tensor, codes: Tensor, indices: Tensor) -> Tensor:  # [outer, d, inner], [M, d], [outer, inner]
        """The mean squared error of each vector; 0 where an index is -1."""
        errors = (codes_at(codes, indices).to(x.dtype) - x).square().mean(1)
        return torch.where(indices >= 0, errors, 0)

    def _routes_to(self, x: Tensor) -> bool:
        """Whether the gradient of quantized goes to x past the assignment."""
        return self.training and self.route_gradients_to_input and x.requires_grad

    def _first_vector(self, vectors: Tensor, x: Tensor) -> int:
        """Position, in each codebook, of the first vector of the batch's first sample (see `genperf.sample_offset`)."""
        batch = 0 if x.dim() == 1 else x.shape[0]
        return first_sample() * (vectors.shape[1] * vectors.shape[3] // batch) if batch > 0 else 0

    def _quantize(self, x: Tensor, codes: Tensor, indices: Tensor, moves_codes: bool, soft: Tensor | None) -> tuple[Tensor, Tensor]:
        """The codes of x [outer, d, inner], and the mean squared error; with `moves_codes` its gradient reaches the codes too.

        If it is not routed to x, the gradient of the codes also goes to the `soft` ones.
        """
        routed = self._routes_to(x)
        x = x if self.training else x.detach()
        impl = choose_impl("vector_quantize", None, unavailable(x.device, x.dtype), x, codes)
        gradient = "rotation" if self.rotation_trick else "straight_through"
        quantized, error = quantize(x, codes if moves_codes else codes.detach(), indices, float(moves_codes), 1.0, gradient, impl)
        error = error - error.detach() / 2 if moves_codes else error
        if routed and self.directional_reparam:
            valid = (indices >= 0).unsqueeze(1)
            x = torch.where(valid, x, 0)  # padding may be NaN, and passes no gradient
            offset = codes_at(codes, indices) - x
            direction = offset + self.directional_reparam_variance**0.5 * torch.randn_like(offset)
            quantized = x + F.normalize(direction, dim=1, eps=1e-6).detach() * offset.norm(dim=1, keepdim=True)
            quantized = torch.where(valid, quantized, 0)
        elif not routed:
            quantized = codes_at(codes, indices).to(x.dtype) if codes.requires_grad else quantized.detach()
            if soft is not None:
                soft = torch.where((indices >= 0).unsqueeze(1), soft, 0).to(x.dtype)
                quantized = quantized + (soft - soft.detach())
        if self.training and self.sync_update_v > 0:
            quantized = quantized + self.sync_update_v * (quantized - quantized.detach())
        return quantized, error

    def _orthogonality(self, indices: Tensor) -> Tensor:
        codes = saved_copy(self._codebook.embed)
        codes = normalize_codes(codes) if self.use_cosine_sim else codes
        active, at_most = self.orthogonal_reg_active_codes_only, self.orthogonal_reg_max_codes
        return orthogonal_loss(codes, indices, used_only=active, max_codes=at_most)

    def _mask_output(self, quantized: Tensor, mask: Tensor | None, x: Tensor) -> Tensor:
        """Zeros, or x, at padding."""
        if mask is not None and not self.return_zeros_for_masked_padding:
            return torch.where(mask.unsqueeze(-1), quantized, x)
        if mask is not None and self.has_projections:
            return torch.where(mask.unsqueeze(-1), quantized, 0)
        return quantized

    def channels_last(self, x: Tensor) -> Tensor:
        """View x, an input or quantized, with its channels in the last dimension."""
        return x.movedim(1, -1) if self._channels_first and x.dim() > 2 else x

    def like_input(self, t: Tensor) -> Tensor:
        """View t with its channels where x has them."""
        return for_inductor(channels_to(t, 1)) if self._channels_first and t.dim() > 2 else t

    @property
    def _channels_first(self) -> bool:
        return self.accept_image_fmap or self.accept_3d_fmap or not self.channel_last
