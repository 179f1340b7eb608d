"""vector-quantize-pytorch's VectorQuantize over genperf's search and quantizer."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._distributed import sum_over_processes, world_size
from ...nn._codebooks import Weights, _offsets, _update, copied
from ...nn.vector_quantizer import VectorQuantizer, _fold
from ...ops._dispatch import choose_impl
from ...ops._precision import accumulator_dtype
from ...ops.code_cross_entropy import code_cross_entropy
from ...ops.vector_quantize import quantize, unavailable


class LossBreakdown(NamedTuple):
    """The terms of the loss before their weights; scalars."""

    commitment: Tensor
    codebook_diversity: Tensor
    orthogonal_reg: Tensor
    inplace_optimize: Tensor


class Codebook(VectorQuantizer):
    """The codes of a `VectorQuantize` and all that happens to vectors after the projection; names as in vector-quantize-pytorch.

    Attributes:
        embed: [h, K, d], a parameter where gradients reach it, otherwise a buffer.
        cluster_size, embed_avg: [h, K] and [h, K, d], moving averages of the vectors of each code; buffers.
        initted: a buffer; False until k-means has set the codes.
    """

    follows = True
    _diversity_epsilon = 1e-5

    codebook = property(lambda self: self.embed)
    counts = property(lambda self: self.cluster_size)
    sums = property(lambda self: self.embed_avg)
    _no_codes = property(lambda self: ~self.initted)

    def __init__(
        self,
        codebook_size: int,
        codebook_dim: int,
        *,
        ema_update: bool,
        manual_ema_update: bool,
        learnable_codebook: bool,
        decay: float,
        synchronized: bool,
        route_gradients: bool,
        commits_by_cross_entropy: bool,
        directional_variance: float | None,
        sync_update_v: float,
        **options,
    ) -> None:
        size = options["heads"] * codebook_dim
        smoothing = {"decay": decay if ema_update else None, "usage_decay": decay}
        super().__init__(codebook_size, size, code_dim=codebook_dim, **smoothing, **options)
        codes = self._parameters.pop("codebook", None)
        codes = self._buffers.pop("codebook") if codes is None else codes.detach()
        self._buffers.pop("_no_codes", None)
        self.register_buffer("initted", torch.tensor(not self._awaits_data))
        self.register_buffer("cluster_size", self._buffers.pop("counts"))
        self.register_buffer("embed_avg", self._buffers.pop("sums"))
        if learnable_codebook or self.orthogonal_weight > 0:
            self.embed = nn.Parameter(codes)
        else:
            self.register_buffer("embed", codes)
        if self.revive_below > 0:  # there is no such name in a state_dict of theirs
            self.register_buffer("num_updates", self._buffers.pop("num_updates"), persistent=False)
        self.ema_update = ema_update
        self.manual_ema_update = manual_ema_update
        self.learnable_codebook = learnable_codebook
        self.synchronized = synchronized
        self.route_gradients = route_gradients
        self.commits_by_cross_entropy = commits_by_cross_entropy
        self.directional_variance = directional_variance
        self.sync_update_v = sync_update_v

    @property
    def codebook_size(self) -> int:
        return self.num_codes

    @property
    def threshold_ema_dead_code(self) -> float:
        return self.revive_below

    @property
    def revives(self) -> bool:
        return self.training and self.revive_below > 0

    def _first_codes(self, books: int | None) -> Tensor:
        shape = books or 1, self.num_codes, self.code_dim
        return torch.zeros(shape) if self.init == "kmeans" else nn.init.kaiming_uniform_(torch.empty(shape))

    def _has_codes(self) -> None:
        super()._has_codes()
        self.initted.fill_(True)

    def _check_dtype(self, x: Tensor) -> None:
        pass  # the codes are converted

    def update_ema(self) -> None:
        """Set the codes to what the moving averages say."""
        self._take_averages()

    @torch.no_grad()
    def expire_codes_(self, batch_samples: Tensor, seq_mask: Tensor | None = None) -> None:  # [h, ..., d], [h, ...]
        """In training, put vectors of the batch in the place of the codes whose cluster_size is below the threshold."""
        if not (self.training and self.revive_below > 0):
            return
        vectors = batch_samples.detach().flatten(1, -2).unsqueeze(-1)
        valid = vectors.new_ones(vectors.shape[:2], dtype=torch.bool) if seq_mask is None else seq_mask.flatten(1)
        pending, self._vectors = self._vectors, (vectors, valid.long().unsqueeze(-1) - 1)
        joint = self.synchronized and world_size() > 1
        candidates = self._candidates(*_offsets([self.number_of_vectors()], joint)[0])
        self._revive(sum_over_processes(candidates, None) if joint else candidates)
        self._vectors = pending

    def forward(
        self,
        x: Tensor,  # [..., heads * d]
        mask: Tensor | None,  # [...]
        indices: Tensor | None,  # [...], or [..., heads]
        temperature: float,
        frozen: bool,
        code_weights: Weights | None,
        accumulate: bool,
        ema_update: bool,
    ) -> tuple[Tensor, Tensor, Tensor, LossBreakdown]:
        """Quantized, of x's shape and dtype; indices; the loss, that of `indices` where they are given; its terms."""
        self.check_code_weights(code_weights)
        vectors, valid = self._split(x, mask)
        if self._awaits_data:
            self._start_from(vectors, valid)
        updates = self.training and not frozen and (ema_update or self.revive_below > 0)
        # Backward still needs these codes after the update has written the new ones in place.
        books = self._books_in_use(copied(self.embed) if updates else self.embed).to(accumulator_dtype(x.dtype))
        assigned = self._assign(vectors, books, valid, temperature if self.training else 0.0, self._first_vector(vectors, x))
        folded, numbered = _fold(vectors), _fold(self._numbered(assigned))
        quantized, error = self._quantize(folded, books, numbered, self.learnable_codebook and not frozen)

        zero = books.new_zeros(())
        commits = self.training and self.commitment_weight > 0 and self.directional_variance is None
        if commits and self.commits_by_cross_entropy:
            error = self._cross_entropy(vectors, books, assigned)
        commitment, diversity = error if commits else zero, self._diversity(vectors, books, valid)
        if updates:
            self.observe(folded, numbered, vectors, assigned, "accumulate")
            if not accumulate:
                _update([self], code_weights, write=ema_update and not self.manual_ema_update)
        orthogonal = self._orthogonality(self._books_in_use(copied(self.embed)), assigned) if self.orthogonal_weight > 0 else zero
        if indices is None:
            loss = self.commitment_weight * commitment if commits else zero
            loss = loss + self.diversity_weight * diversity + self.orthogonal_weight * orthogonal
        else:
            loss = self._cross_entropy(vectors, books, self._as_assigned(indices, vectors))
        terms = LossBreakdown(commitment, diversity, orthogonal, zero)
        return self._merged(quantized, x, mask), self._positions_of(assigned, x), loss, terms

    @torch.no_grad()
    def update_indices(self, x: Tensor, indices: Tensor, mask: Tensor | None) -> None:
        """Update the moving averages and codes as a training step does that gives x [..., heads * d] these indices."""
        if not self.ema_update and self.revive_below == 0:
            return
        vectors, valid = self._split(x, mask)
        assigned = self._as_assigned(indices, vectors)
        assigned = assigned if valid is None else torch.where(valid, assigned, -1)
        self.observe(_fold(vectors), _fold(self._numbered(assigned)), vectors, assigned, "accumulate")
        _update([self], None, write=self.ema_update and not self.manual_ema_update)

    def _quantize(self, x: Tensor, books: Tensor, indices: Tensor, moves: bool) -> tuple[Tensor, Tensor]:
        """The codes of x [outer, D, inner], and the mean squared difference; with `moves` its gradient reaches the codes too."""
        codes = books.flatten(0, 1)
        routed = self.training and self.route_gradients and x.requires_grad
        x = x if self.training else x.detach()
        impl = choose_impl("vector_quantize", None, unavailable(x.device, x.dtype), x, codes)
        quantized, error = quantize(x, codes if moves else codes.detach(), indices, float(moves), 1.0, self.gradient, impl)
        error = error - error.detach() / 2 if moves else error
        if routed and self.directional_variance is not None:
            valid = (indices >= 0).unsqueeze(1)
            x = torch.where(valid, x, 0)  # of padding, which may hold anything, no gradient may come
            offset = _looked_up(codes, indices) - x
            direction = offset + self.directional_variance**0.5 * torch.randn_like(offset)
            quantized = x + F.normalize(direction, dim=1, eps=1e-6).detach() * offset.norm(dim=1, keepdim=True)
            quantized = torch.where(valid, quantized, 0)
        elif not routed:
            quantized = _looked_up(codes, indices).to(x.dtype) if codes.requires_grad else quantized.detach()
        if self.training and self.sync_update_v > 0:
            quantized = quantized + self.sync_update_v * (quantized - quantized.detach())
        return quantized, error

    def _cross_entropy(self, vectors: Tensor, books: Tensor, assigned: Tensor) -> Tensor:
        """Of the codes given to the vectors, the logits being minus their distances, or their cosines."""
        logits = "dot" if self.metric == "cosine" else "distance"
        losses = code_cross_entropy(vectors, books, assigned, logits=logits, channel_dim=2)
        counted = (assigned >= 0).flatten(1).sum(1)
        return (losses * counted).sum() / counted.sum().clamp(min=1)

    def _as_assigned(self, indices: Tensor, vectors: Tensor) -> Tensor:
        """What `_positions_of` would make `indices` of: [books, outer, inner]."""
        outer = vectors.shape[0] * vectors.shape[1] // self.heads
        by_position = indices.long().reshape(outer, vectors.shape[3], self.heads)
        return self._by_book(by_position.transpose(1, 2).flatten(0, 1))

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "embed" in state_dict:
            self._awaits_data = self.init == "kmeans" and not self.initted
            self._pending = self._vectors = None


def _looked_up(codes: Tensor, indices: Tensor) -> Tensor:
    """codes[indices] as [outer, D, inner], differentiable; zeros where an index is -1."""
    found = F.embedding(indices.clamp(min=0), codes).transpose(1, 2)
    return torch.where((indices >= 0).unsqueeze(1), found, 0)


def refuse(name: str, **options: tuple[object, object]) -> None:
    """Refuse options, each with its value and its default, that have another value than that."""
    for option, (value, default) in options.items():
        if value is not default and value != default:
            raise NotImplementedError(f"{name}: {option} is not supported, got {option}={value!r}.")


def loss_to_differentiate(loss: Tensor) -> Tensor:
    """The loss of a training step; as there, backward is no error where nothing learns from it."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not loss.requires_grad:
        loss.requires_grad_()
    return loss


def _held_by_codebook(name: str) -> property:
    return property(lambda self: getattr(self._codebook, name), lambda self, value: setattr(self._codebook, name, value))


class VectorQuantize(nn.Module):
    """Replaces every vector by its nearest code; the codes follow moving averages of their vectors.

    What is the same as in vector-quantize-pytorch 1.32: the arguments of constructor and forward, the returned values, the
    names and shapes in the state_dict (it loads both ways), the first codes of a seed, and what a training step does to x's
    gradient, codes and averages. `genperf.nn.VectorQuantizer` describes how.

    What differs, since there it is a fault:
      - The commitment loss with a mask is taken between code and what was quantized: projected, normalized, by head. Theirs
        compares with the input as it came, which fails where a projection or heads change its shape. It is 0, not NaN, where
        nothing is valid.
      - The diversity loss takes the mean distribution over all valid vectors of a codebook. Theirs takes one mean over the
        batch for each position of a sequence, over different codebooks too, and counts padding (for x [B, D] or [B, 1, D]
        they are equal). So do codes count as active for the orthogonal loss if padding alone is nearest to them.
      - Index -1 stands for no code: zeros in get_codes_from_indices, no part in update_indices. Theirs: the last code, the first.
      - get_codes_from_indices joins the codes of heads that share a codebook; get_output_from_indices projects channels
        wherever they lie.
      - Diversity and cross-entropy losses are differentiated at the codes that they were computed from; theirs, with moving
        averages, at the codes after the update.
      - A step without a valid vector leaves the averages as they are, and a code that k-means gives no vector stays
        where it is; theirs decays the averages, and moves the code to the origin.
      - Weights that are a function of `ema_update_weight` see the accumulated statistics, not those of the last batch alone.
      - Where x needs no gradient, the gradient still reaches project_in.
      - `lens` counts positions for channels-first sequences too; masks work for images, volumes and single vectors.
      - Setting `codebook` works for a learnable one.
      - use_cosine_sim with an orthogonal loss: the codes, which the optimizer then moves, are normalized before they are
        searched and returned; theirs are not.
      - float64 is not cut to float32. Nearest is meant exactly, and quantized equals the code bit for bit.
      - With `indices`, quantized is projected and laid out as without.

    What differs by design: whether processes are joined is seen at each step, whether torch.distributed was in use before
    the constructor or not (sync_codebook=None is True), and k-means joins them whenever the codebook does (sync_kmeans=False
    leaves processes with different codes). The vectors that replace dead codes, those that k-means starts from, and the
    noise of sample_codebook_temp are other random ones.

    torch.compile(fullgraph=True) needs codes: with kmeans_init take the first step without it.

    Not supported (NotImplementedError): straight_through, vq_bridge, in_place_codebook_optimizer,
    manual_in_place_optimizer_update, affine_param and sync_affine_param; in forward, topk and codebook_transform_fn.

    Raises:
        ValueError: arguments outside their range or that exclude each other.
    """

    commitment_weight = _held_by_codebook("commitment_weight")
    orthogonal_reg_weight = _held_by_codebook("orthogonal_weight")
    codebook_diversity_loss_weight = _held_by_codebook("diversity_weight")
    codebook_diversity_temperature = _held_by_codebook("diversity_temperature")
    sync_update_v = _held_by_codebook("sync_update_v")
    learnable_codebook = _held_by_codebook("learnable_codebook")
    ema_update = _held_by_codebook("ema_update")
    eps = _held_by_codebook("eps")
    commitment_use_cross_entropy_loss = _held_by_codebook("commits_by_cross_entropy")
    orthogonal_reg_active_codes_only = _held_by_codebook("orthogonal_used_only")
    orthogonal_reg_max_codes = _held_by_codebook("orthogonal_max_codes")
    route_gradients_to_input = _held_by_codebook("route_gradients")
    has_commitment_loss = property(lambda self: self.commitment_weight > 0 and not self.directional_reparam)
    has_codebook_orthogonal_loss = property(lambda self: self.orthogonal_reg_weight > 0)
    has_codebook_diversity_loss = property(lambda self: self.codebook_diversity_loss_weight > 0)
    directional_reparam = property(lambda self: self._codebook.directional_variance is not None)
    use_cosine_sim = property(lambda self: self._codebook.metric == "cosine")

    def __init__(
        self,
        dim,
        codebook_size,
        codebook_dim=None,
        heads=1,
        separate_codebook_per_head=False,
        decay=0.8,
        eps=1e-5,
        freeze_codebook=False,
        kmeans_init=False,
        kmeans_iters=10,
        sync_kmeans=True,
        use_cosine_sim=False,
        layernorm_after_project_in=False,
        threshold_ema_dead_code=0,
        channel_last=True,
        accept_image_fmap=False,
        accept_3d_fmap=False,
        commitment_weight=1.0,
        commitment_use_cross_entropy_loss=False,
        orthogonal_reg_weight=0.0,
        orthogonal_reg_active_codes_only=False,
        orthogonal_reg_max_codes=None,
        codebook_diversity_loss_weight=0.0,
        codebook_diversity_temperature=100.0,
        stochastic_sample_codes=False,
        sample_codebook_temp=1.0,
        straight_through=False,
        rotation_trick=None,
        directional_reparam=False,
        directional_reparam_variance=5e-3,
        sync_codebook=None,
        sync_affine_param=False,
        ema_update=None,
        vq_bridge=None,
        manual_ema_update=False,
        learnable_codebook=None,
        in_place_codebook_optimizer=None,
        manual_in_place_optimizer_update=False,
        affine_param=False,
        affine_param_batch_decay=0.99,
        affine_param_codebook_decay=0.9,
        sync_update_v=0.0,
        return_zeros_for_masked_padding=True,
        route_gradients_to_input=True,
    ) -> None:
        super().__init__()
        refuse(
            "VectorQuantize",
            straight_through=(straight_through, False),
            sync_affine_param=(sync_affine_param, False),
            vq_bridge=(vq_bridge, None),
            in_place_codebook_optimizer=(in_place_codebook_optimizer, None),
            manual_in_place_optimizer_update=(manual_in_place_optimizer_update, False),
            affine_param=(affine_param, False),
        )
        ema_update = not directional_reparam if ema_update is None else ema_update
        learnable_codebook = directional_reparam if learnable_codebook is None else learnable_codebook
        rotation_trick = not directional_reparam and dim > 1 if rotation_trick is None else rotation_trick
        for rule, holds in (
            ("rotation_trick and directional_reparam exclude each other", not (rotation_trick and directional_reparam)),
            ("directional_reparam needs a threshold_ema_dead_code", not directional_reparam or threshold_ema_dead_code > 0),
            ("learnable_codebook needs ema_update=False", not (learnable_codebook and ema_update)),
            ("learnable_codebook and use_cosine_sim exclude each other", not (learnable_codebook and use_cosine_sim)),
            ("sync_update_v must lie in [0, 1], and needs a learnable codebook", 0 <= sync_update_v <= bool(learnable_codebook)),
        ):
            if not holds:
                raise ValueError(f"VectorQuantize: {rule}.")
        self.dim = dim
        self.heads = heads
        self.separate_codebook_per_head = separate_codebook_per_head
        self.codebook_size = codebook_size
        codebook_dim = dim if codebook_dim is None else codebook_dim
        inner = codebook_dim * heads
        self.has_projections = inner != dim
        self.project_in = nn.Linear(dim, inner) if self.has_projections else nn.Identity()
        if self.has_projections and layernorm_after_project_in:
            self.project_in = nn.Sequential(self.project_in, nn.LayerNorm(inner))
        self.project_out = nn.Linear(inner, dim) if self.has_projections else nn.Identity()
        self._codebook = Codebook(
            codebook_size,
            codebook_dim,
            heads=heads,
            separate_codebooks=separate_codebook_per_head,
            decay=decay,
            eps=eps,
            commitment_weight=commitment_weight,
            diversity_weight=codebook_diversity_loss_weight,
            diversity_temperature=codebook_diversity_temperature,
            orthogonal_weight=orthogonal_reg_weight,
            orthogonal_used_only=orthogonal_reg_active_codes_only,
            orthogonal_max_codes=orthogonal_reg_max_codes,
            gradient="rotation" if rotation_trick else "straight_through",
            metric="cosine" if use_cosine_sim else "euclidean",
            init="kmeans" if kmeans_init else "uniform",
            init_iterations=kmeans_iters,
            revive_below=threshold_ema_dead_code,
            sample_temperature=sample_codebook_temp if stochastic_sample_codes else 0.0,
            ema_update=ema_update,
            manual_ema_update=manual_ema_update,
            learnable_codebook=learnable_codebook,
            synchronized=sync_codebook is None or sync_codebook,
            route_gradients=route_gradients_to_input,
            commits_by_cross_entropy=commitment_use_cross_entropy_loss,
            directional_variance=directional_reparam_variance if directional_reparam else None,
            sync_update_v=sync_update_v,
        )
        self.stochastic_sample_codes = stochastic_sample_codes
        self.accept_image_fmap = accept_image_fmap
        self.accept_3d_fmap = accept_3d_fmap
        self.channel_last = channel_last
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.freeze_codebook = freeze_codebook

    @property
    def rotation_trick(self) -> bool:
        return self._codebook.gradient == "rotation"

    @rotation_trick.setter
    def rotation_trick(self, value: bool) -> None:
        self._codebook.gradient = "rotation" if value else "straight_through"

    @property
    def codebook(self) -> Tensor:
        """[K, d], or with separate_codebook_per_head [heads, K, d]."""
        return self._codebook.embed if self.separate_codebook_per_head else self._codebook.embed.squeeze(0)

    @codebook.setter
    @torch.no_grad()
    def codebook(self, codes: Tensor) -> None:
        self._codebook.embed.copy_(codes if self.separate_codebook_per_head else codes.unsqueeze(0))

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes of indices as forward returns them, before project_out, channels where x has them; zeros for -1."""
        return self._restored(self._codebook.codes_of(indices.long()))

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What forward returns as quantized for these indices; zeros for -1."""
        indices = indices.long()
        output = self.project_out(self._codebook.codes_of(indices))
        if self.has_projections:
            present = indices if self.heads == 1 else indices[..., 0]
            output = torch.where((present >= 0).unsqueeze(-1), output, 0)
        return self._restored(output)

    def expire_codes_(self, x: Tensor) -> None:
        """In training, put vectors of x [..., heads * d], as they are after project_in, in the place of dead codes."""
        vectors, _ = self._codebook._split(x, None)
        self._codebook.expire_codes_(vectors.movedim(2, -1))

    def update_indices(self, x: Tensor, indices: Tensor, mask: Tensor | None = None) -> None:
        """Update the moving averages and codes as a training step does in which x has these indices."""
        self._codebook.update_indices(self.project_in(self._channels_last(x)), indices, mask)

    update_ema_indices = update_indices

    def forward(
        self,
        x: Tensor,
        indices: Tensor | None = None,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        topk=None,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool | None = None,
        return_loss_breakdown: bool = False,
        codebook_transform_fn=None,
        ema_update_weight: Weights | None = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, LossBreakdown]:
        """Quantize x.

        Args:
            x: [..., dim], or [B, dim, ...] with accept_image_fmap, accept_3d_fmap or channel_last=False.
            indices: codes whose cross-entropy under softmax(-distance) is wanted in place of the loss.
            mask: bool, x's shape without channels; False for padding. lens: int64 [B], lengths in place of a mask.
            ema_update_weight: [K] or [h, K], of each code's step in the moving averages; or a function of the sums and counts.
            accum_ema_update: keep the statistics of this batch for the next step that updates.
            sample_codebook_temp, freeze_codebook, ema_update: in place of the constructor's.

        Returns:
            quantized, indices and loss, with return_loss_breakdown also `LossBreakdown`; with `indices`, quantized and loss.
            Padding is 0 in quantized (x with return_zeros_for_masked_padding=False) and -1 in the indices.
        """
        refuse("VectorQuantize", topk=(topk, None), codebook_transform_fn=(codebook_transform_fn, None))
        codebook = self._codebook
        x = self._channels_last(x)
        if lens is not None:
            codebook.check("only one of mask and lens can be given", "both", mask is None)
            mask = torch.arange(x.shape[1], device=x.device) < lens.unsqueeze(1)
        # Padding may hold anything: it must not make gradients of the projection NaN.
        vectors = self.project_in(torch.where(mask.unsqueeze(-1), x, 0) if mask is not None and self.has_projections else x)
        codebook._checked_mask(vectors, mask, None)
        temperature = codebook.sample_temperature
        if sample_codebook_temp is not None and self.stochastic_sample_codes:
            temperature = sample_codebook_temp
        quantized, found, loss, terms = codebook(
            vectors,
            mask,
            indices,
            temperature,
            self.freeze_codebook if freeze_codebook is None else freeze_codebook,
            ema_update_weight,
            accum_ema_update,
            codebook.ema_update if ema_update is None else ema_update,
        )
        quantized = self.project_out(quantized)
        if mask is not None and not self.return_zeros_for_masked_padding:
            quantized = torch.where(mask.unsqueeze(-1), quantized, x)
        elif mask is not None and self.has_projections:
            quantized = torch.where(mask.unsqueeze(-1), quantized, 0)
        quantized = self._restored(quantized)
        if indices is not None:
            return quantized, loss
        loss = loss_to_differentiate(loss) if self.training else loss
        return (quantized, found, loss, terms) if return_loss_breakdown else (quantized, found, loss)

    def _channels_last(self, x: Tensor) -> Tensor:
        """View x with its channels in the last dimension."""
        return x.movedim(1, -1) if self._channels_first and x.dim() > 2 else x

    def _restored(self, t: Tensor) -> Tensor:
        return t.movedim(-1, 1) if self._channels_first and t.dim() > 2 else t

    @property
    def _channels_first(self) -> bool:
        return self.accept_image_fmap or self.accept_3d_fmap or not self.channel_last
