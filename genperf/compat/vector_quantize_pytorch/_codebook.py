# SPDX-License-Identifier: Apache-2.0
"""The codes of a `VectorQuantize`: search, EMA, dead-code replacement and initialization, under upstream's buffer names."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..._choices import Metric
from ..._pickled import codebook_state
from ...nn._codebook_init import codes_from_data
from ...nn._ema import (
    CodebookUpdate,
    CodeWeights,
    apply_replacement,
    apply_updates,
    check_code_weights,
    codebook_from_ema,
    keep_precision_,
    normalize_codes,
    saved_copy,
    set_codes_,
)
from ...nn._pending import Pending, add_step, load_pending, moved, pop_pending, save_pending
from ...nn._sharded import writable_codes
from ...nn._vectors import rows_at
from ...ops._precision import accumulator_dtype
from ...ops.code_statistics import codebook_statistics
from . import _affine


class Codebook(nn.Module):
    """Upstream's EuclideanCodebook and CosineSimCodebook.

    Attributes:
        embed: [h, K, d], a parameter if the codes learn by gradient, otherwise a buffer.
        cluster_size, embed_avg: [h, K] and [h, K, d], averages of each code's count and sum; buffers.
        initted: a buffer; False until k-means has set the codes.
        vq_bridge: None, or a module that maps the parameter `embed` to the codes that are searched.
        batch_mean, batch_variance, codebook_mean, codebook_variance: with affine_param, moving averages (see `_affine`); buffers.
        pending: the statistics of steps with accum_ema_update, or None (see `genperf.nn.VectorQuantizer`).
    """

    embed: Tensor
    cluster_size: Tensor
    embed_avg: Tensor
    initted: Tensor
    batch_mean: Tensor | None
    batch_variance: Tensor
    codebook_mean: Tensor
    codebook_variance: Tensor

    # Read by `genperf.nn.update_codebooks`.
    update = "step"

    def __init__(
        self,
        num_codebooks: int,
        codebook_size: int,
        dim: int,
        *,
        learnable: bool,
        ema_update: bool,
        manual_ema_update: bool,
        decay: float,
        eps: float,
        kmeans_init: bool,
        kmeans_iters: int,
        use_cosine_sim: bool,
        threshold_ema_dead_code: float,
        synchronized: bool,
        vq_bridge: nn.Module | None = None,
        affine_param: bool = False,
        sync_affine_param: bool = False,
        affine_param_batch_decay: float = 0.99,
        affine_param_codebook_decay: float = 0.9,
    ) -> None:
        super().__init__()
        shape = (num_codebooks, codebook_size, dim)
        codes = torch.zeros(shape) if kmeans_init else nn.init.kaiming_uniform_(torch.empty(shape))
        codes = normalize_codes(codes) if use_cosine_sim else codes
        self.num_codebooks = num_codebooks
        self.codebook_size = codebook_size
        self.dim = dim
        self.ema_update = ema_update
        self.manual_ema_update = manual_ema_update
        self.decay = decay
        self.eps = eps
        self.kmeans_init = kmeans_init
        self.kmeans_iters = kmeans_iters
        self.metric: Metric = "cosine" if use_cosine_sim else "euclidean"
        self.threshold_ema_dead_code = threshold_ema_dead_code
        self.synchronized = synchronized

        self.register_buffer("initted", torch.tensor(not kmeans_init))
        dtype = accumulator_dtype(codes.dtype)
        self.register_buffer("cluster_size", torch.ones(shape[:2], dtype=dtype))
        self.register_buffer("embed_avg", codes.to(dtype, copy=True))
        if learnable:
            self.embed = nn.Parameter(codes)
        else:
            self.register_buffer("embed", codes)
        self.vq_bridge = vq_bridge
        self.affine_param = affine_param
        self.sync_affine_param = sync_affine_param
        self.affine_param_batch_decay = affine_param_batch_decay
        self.affine_param_codebook_decay = affine_param_codebook_decay
        if affine_param:
            _affine.register_buffers(self, num_codebooks, dim)
        # Read on the host, without a synchronization.
        self.needs_init = kmeans_init
        self.pending: Pending | None = None
        # The codes and their version when the layer last wrote them: other ones were set from outside.
        self._written: tuple[int, int] | None = None

    @property
    def has_ema(self) -> bool:
        """Whether training steps gather statistics: for codes that learn by EMA, or for dead-code replacement."""
        return self.ema_update or self.threshold_ema_dead_code > 0

    @torch.no_grad()
    def init_in_first_step(self, vectors: Tensor, valid: Tensor | None) -> None:
        """Set the codes by k-means, unless they are initialized; vectors [h, outer, d, inner], valid [h, outer, inner]."""
        if self.initted or self.embed.any():  # loaded, or set from outside
            self.needs_init = False
            self.initted.fill_(True)
            return
        options = {"init": "kmeans", "iterations": self.kmeans_iters, "metric": self.metric, "synchronized": self.synchronized}
        found = codes_from_data(vectors, valid, self.codebook_size, **options)
        if found is not None:
            codes, store = writable_codes(self, "embed")
            set_codes_(codes, self.cluster_size, self.embed_avg, *found, normalize=self.metric == "cosine")
            store()
            self.needs_init = False
            self.initted.fill_(True)

    def search_codes(self, dtype: torch.dtype, *, copy: bool = False) -> Tensor:
        """The codes to search for vectors of `dtype`, [h, K, d]; a copy for backward if an update follows."""
        codes = saved_copy(self.embed) if copy else self.embed
        codes = self.unit_codes(codes).to(accumulator_dtype(dtype))
        if self.vq_bridge is not None:
            with torch.autocast(codes.device.type, enabled=False):
                codes = self.vq_bridge(codes)
        return _affine.to_batch(self, codes) if self.affine_param else codes

    def update_affine(self, vectors: Tensor, valid: Tensor | None) -> None:
        """Move the averages of affine_param towards a batch; vectors [h, outer, d, inner], valid [h, outer, inner]."""
        _affine.update(self, vectors.detach(), valid)

    @property
    def learns(self) -> bool:
        """Whether the codes are a parameter; also where functional_call, a parametrization or a replica stands in for it."""
        return "embed" not in self._buffers

    def unit_codes(self, codes: Tensor) -> Tensor:
        """For the cosine similarity, unit vectors; a buffer holds them already."""
        return normalize_codes(codes) if self.metric == "cosine" and self.learns else codes

    def gather(self, vectors: Tensor, indices: Tensor, *, waits: bool = False) -> None:
        """Keep the statistics of a step for the next update; vectors [h, outer, d, inner], indices [h, outer, inner]."""
        counts, sums, indices = codebook_statistics(vectors, indices, self.codebook_size)
        sums = _affine.to_codebook(self, sums, counts) if self.affine_param else sums
        # An update that waits must not depend on what becomes of x.
        last = (vectors.detach().clone() if waits else vectors.detach(), indices) if self.threshold_ema_dead_code > 0 else ()
        self.pending = add_step(self.pending, counts, sums, last)

    def add_statistics(self, counts: Tensor, sums: Tensor) -> None:
        self.pending = add_step(self.pending, counts, sums)

    def apply_update(self, code_weights: CodeWeights | None, *, writes_codebook: bool) -> None:
        """Update averages and codes from the statistics gathered since the last update."""
        update = self.take_update()
        update.writes_codebook = writes_codebook
        apply_updates([update], code_weights, self.synchronized)

    def take_update(self) -> CodebookUpdate:
        """The update from the statistics gathered since the last one. Clears them."""
        pending, self.pending = self.pending, None
        return self._update_of(*pending) if pending is not None else self._update_of()

    def _update_of(
        self, counts: Tensor | None = None, sums: Tensor | None = None, vectors: Tensor | None = None, indices: Tensor | None = None
    ) -> CodebookUpdate:
        codes, store = writable_codes(self, "embed")
        replaces = self.training and self.threshold_ema_dead_code > 0
        return CodebookUpdate(
            codebook=codes,
            counts=self.cluster_size,
            sums=self.embed_avg,
            store=store,
            batch_counts=counts,
            batch_sums=sums,
            decay=self.decay,
            eps=self.eps,
            normalize=self.metric == "cosine",
            writes_codebook=self.ema_update,
            follows_codes=self.ema_update and not self.manual_ema_update and not self.learns and self._set_from_outside(),
            written=self._note_written,
            replace_below=self.threshold_ema_dead_code if replaces else 0.0,
            step=torch.randint(2**31, (), device=self.embed.device) if replaces else None,
            counts_steps=False,
            valid=None if indices is None else (indices >= 0).flatten(1),
            vectors_at=None if vectors is None else partial(self._replacements, vectors),
        )

    def _replacements(self, vectors: Tensor, row: Tensor) -> Tensor:
        """The vectors [h, K, d] of a batch at positions `row`, as codes."""
        rows = rows_at(vectors, row)
        return _affine.to_codebook(self, rows) if self.affine_param else rows

    def _set_from_outside(self) -> bool:
        """Whether something but this layer has written the codes since its last update."""
        return not torch.compiler.is_compiling() and self._written != (id(self.embed), self.embed._version)

    def _note_written(self) -> None:
        if not torch.compiler.is_compiling():
            self._written = id(self.embed), self.embed._version

    @torch.no_grad()
    def update_ema(self) -> None:
        """Set the codes from the averages."""
        codes, store = writable_codes(self, "embed")
        codebook_from_ema(self.cluster_size, self.embed_avg, self.eps, out=codes)
        if self.metric == "cosine":
            codes.copy_(normalize_codes(codes))
        store()

    @torch.no_grad()
    def expire_codes_(self, batch_samples: Tensor, seq_mask: Tensor | None = None) -> None:  # [h, ..., d], [h, ...]
        """In training, replace the codes whose cluster_size is below the threshold by vectors of the batch."""
        if not (self.training and self.threshold_ema_dead_code > 0):
            return
        vectors = batch_samples.detach().flatten(1, -2).unsqueeze(-1)
        valid = vectors.new_ones(vectors.shape[:2], dtype=torch.bool) if seq_mask is None else seq_mask.flatten(1)
        apply_replacement(self._update_of(vectors=vectors, indices=valid.long().unsqueeze(-1) - 1), self.synchronized)

    def check_code_weights(self, code_weights: CodeWeights | None) -> None:
        """Raise a ValueError for weights that do not fit the codebook."""
        check_code_weights("VectorQuantize", code_weights, self.embed)

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = codebook_state(state)
        # Earlier releases had neither.
        super().__setstate__(state if "affine_param" in state else {**state, "affine_param": False, "vq_bridge": None})

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        save_pending(self.pending, destination, prefix)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        pending = pop_pending(state_dict, prefix) if self.has_ema else {}
        if self.affine_param and prefix + "embed" in state_dict:
            _affine.expect_batch_statistics(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "embed" in state_dict:
            self.needs_init = self.kmeans_init and (self.initted.is_meta or not bool(self.initted))
            self.pending = None
        keep_precision_(self, {"cluster_size": self.cluster_size, "embed_avg": self.embed_avg})
        if pending:
            replaces = self.threshold_ema_dead_code > 0
            self.pending = load_pending(pending, self.cluster_size, self.embed_avg, replaces=replaces, prefix=prefix, errors=args[-1])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        averages = {"cluster_size": self.cluster_size, "embed_avg": self.embed_avg}
        super()._apply(fn, recurse)
        keep_precision_(self, averages)
        self.pending = moved(self.pending, self.cluster_size.device)
        return self
