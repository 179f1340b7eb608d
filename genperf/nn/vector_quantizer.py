# SPDX-License-Identifier: Apache-2.0
"""Vector quantization layer: a codebook learned by gradient or by EMA.

Above 400 lines: a layer reads from top to bottom in one file, and a third of it is documentation.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from .._choices import CodebookInit, Gradient, Metric, UpdateTime
from .._deprecation import RenamedAttribute, renamed_arguments
from .._pickled import quantizer_state
from .._typing import signature_of
from ..ops._autograd import ValueOf, can_view_within
from ..ops._dispatch import choose_impl
from ..ops._layout import Positions
from ..ops._noise import first_sample
from ..ops._precision import accumulator_dtype, normalized
from ..ops._validate import check, check_layer_input
from ..ops.code_statistics import codebook_statistics
from ..ops.nearest_code import search
from ..ops.nearest_code import unavailable as search_unavailable
from ..ops.sample_code import draw_codes
from ..ops.vector_quantize import GRADIENTS, quantize_codebooks
from ._channels import channels_to, project_vectors
from ._code_usage import CodeUsage, code_usage, usage_from_counts
from ._codebook_init import codes_from_data, uniform_codes
from ._codebook_losses import diversity_loss, orthogonal_loss
from ._ema import (
    CodebookUpdate,
    CodeWeights,
    apply_updates,
    check_code_weights,
    check_codebook_options,
    check_step,
    keep_precision_,
    normalize_codes,
    saved_copy,
    set_codes_,
)
from ._pending import Pending, add_step, load_pending, moved, pop_pending, save_pending
from ._recompute import Step, StepMemory, may_run_again
from ._sharded import check_gathered, is_dtensor, whole, writable_codes
from ._vectors import check_decoded, check_given_codes, look_up, mask_from_lengths, merge_heads, merge_indices, rows_at, split_heads

__all__ = ["CodeUsage", "LossTerms", "VectorQuantizer", "code_usage"]


class LossTerms(NamedTuple):
    """The terms of a quantizer's loss before their weights; scalars."""

    error: Tensor
    """Mean squared difference of vectors and codes, as in the commitment and codebook losses; 0 if both weights are 0."""
    diversity: Tensor
    """Negative entropy of the batch mean of the code probabilities, in nats; 0 if its weight is 0."""
    orthogonal: Tensor
    """Mean squared cosine between two different codes; 0 if its weight is 0."""


class VectorQuantizer(nn.Module):
    """Replaces every vector by its nearest code; van den Oord et al., "Neural Discrete Representation Learning" (2017).

    With `decay=None` the codebook is a parameter that learns from the loss. With a `decay` it is a buffer that training
    steps update by EMA (appendix A.1 of the paper):

        counts.lerp_(n, 1 - decay)                                          # n [K], s [K, D]: this batch's
        sums.lerp_(s, 1 - decay)                                            # code_statistics
        smoothed = (counts + eps) / (counts.sum() + K * eps) * counts.sum()
        codebook = sums / smoothed[:, None]

    A step is quantized with the codebook from before its update. Training does not synchronize with the device.

    Under torch.distributed n and s are summed over ranks, so the codebooks match single-process training on the global batch.
    Every rank must run every training step, with an empty batch if it has no data. A codebook that learns by gradient is kept
    equal by DistributedDataParallel, which averages its gradients.

    Args:
        num_codes: K.
        dim: length of the channel dimension of x.
        code_dim: D, the length of a code; None for dim / heads. Where heads * D is not dim, linear layers before and after
            the quantizer change the dimension.
        heads: number of parts that a vector is split into, each quantized separately.
        separate_codebooks: one codebook for each head; otherwise all heads share one.
        decay: of the EMA, 0 <= decay < 1; None for a codebook that learns by gradient.
        usage_decay: decay of the counts for `replace_dead_below` if decay is None.
        eps: Laplace smoothing of the counts, positive; only with a decay.
        codebook_weight: weight of the loss term that moves codes to vectors; not used with a decay.
        commitment_weight: weight of the commitment loss, which moves vectors to codes.
        diversity_weight: weight of the negative entropy, in nats, of the batch mean of softmax(-diversity_temperature *
            distance) over the codes, which keeps many codes in use; distance is Euclidean, or minus the cosine
            (`genperf.code_entropy`, no [N, K] matrix).
        diversity_temperature: inverse temperature of that softmax, positive.
        orthogonal_weight: weight of the mean squared cosine between codes (Shin et al., "Translation-equivariant Image
            Quantizer", 2021), from the D x D Gram matrix. The codebook is then a parameter even with a decay. The term is meant
            for codes that learn by gradient: an EMA soon undoes the optimizer's step.
        orthogonal_used_only: count only the codes that the batch uses.
        orthogonal_max_codes: count at most this many codes, drawn at random in every step; None for all.
        gradient: "straight_through" or "rotation", as in `genperf.vector_quantize`.
        metric: "euclidean", or "cosine": vectors and codes are divided by their norms, and quantized vectors have unit norm.
        channel_dim: the dimension of x that holds a vector; 1 for images [B, D, H, W].
        init: "uniform" draws codes from (-1/K, 1/K), made unit vectors for "cosine". "data" and "kmeans" start the same way and
            replace the codes in the first training step (`init_codes`), unless codes were loaded before: "data" by random
            vectors of the batch, "kmeans" by the cluster centers of `genperf.kmeans`. That step synchronizes with the device;
            under torch.compile(fullgraph=True) call `init_codes` before it.
        init_iterations: of k-means.
        replace_dead_below: dead-code replacement: a code whose EMA count falls below this is replaced by a vector of the batch;
            0 for never. Replacements are taken at evenly spaced positions of the global batch, with a new offset each step;
            with fewer vectors than codes, some dead codes wait for a later step.
        sample_temperature: in training, draw the codes from softmax(-distance / temperature) instead of taking the nearest
            (`genperf.sample_code`); 0 for the nearest.
        update: "step": every training step updates the codebook. "accumulate": `update_codebooks` does, once for many
            micro-batches and with one all-reduce for all layers. "none": averages and codes are frozen.

    Attributes:
        codebook: [K, D], or with separate codebooks [heads, K, D]; a parameter, or with a decay a buffer.
        counts, sums: the averages, [K] and [K, D], or with separate codebooks [heads, K] and [heads, K, D]; buffers that exist
            with a decay or dead-code replacement. Initially ones and the codebook.
        num_updates: int64, the number of updates; a buffer that exists with dead-code replacement.
        pending: the statistics gathered with update="accumulate" since the last update, or None. The state dict holds them as
            `pending.counts`, `pending.sums` and with dead-code replacement `pending.vectors`, `pending.indices`, only while there
            are any; loading a state dict without them discards those of the layer. Every rank has its own.
        project_in, project_out: the linear layers, or None.

    Raises:
        ValueError: an invalid argument.
    """

    # Whether statistics are summed over ranks.
    synchronized = True

    revive_below = RenamedAttribute("replace_dead_below")

    codebook: Tensor
    counts: Tensor
    sums: Tensor
    num_updates: Tensor

    @renamed_arguments("VectorQuantizer", revive_below="replace_dead_below")
    def __init__(
        self,
        num_codes: int,
        dim: int,
        *,
        code_dim: int | None = None,
        heads: int = 1,
        separate_codebooks: bool = False,
        decay: float | None = None,
        usage_decay: float = 0.99,
        eps: float = 1e-5,
        codebook_weight: float = 1.0,
        commitment_weight: float = 0.25,
        diversity_weight: float = 0.0,
        diversity_temperature: float = 1.0,
        orthogonal_weight: float = 0.0,
        orthogonal_used_only: bool = False,
        orthogonal_max_codes: int | None = None,
        gradient: Gradient = "straight_through",
        metric: Metric = "euclidean",
        channel_dim: int = -1,
        init: CodebookInit = "uniform",
        init_iterations: int = 10,
        replace_dead_below: float = 0.0,
        sample_temperature: float = 0.0,
        update: UpdateTime = "step",
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check(name, "dim must be at least 1", dim, dim >= 1)
        check(name, "heads must be at least 1", heads, heads >= 1)
        if code_dim is None:
            check(name, "dim must be divisible by heads where code_dim is not given", (dim, heads), dim % heads == 0)
            code_dim = dim // heads
        check(name, "codebook_weight must not be negative", codebook_weight, codebook_weight >= 0)
        check(name, "commitment_weight must not be negative", commitment_weight, commitment_weight >= 0)
        check(name, "diversity_weight must not be negative", diversity_weight, diversity_weight >= 0)
        check(name, "orthogonal_weight must not be negative", orthogonal_weight, orthogonal_weight >= 0)
        check(name, "sample_temperature must not be negative", sample_temperature, sample_temperature >= 0)
        check(name, "diversity_temperature must be positive", diversity_temperature, diversity_temperature > 0)
        codes_left = orthogonal_max_codes is None or orthogonal_max_codes >= 2
        check(name, "orthogonal_max_codes must be None or at least 2", orthogonal_max_codes, codes_left)
        check(name, f"gradient must be one of {', '.join(GRADIENTS)}", gradient, gradient in GRADIENTS)
        check_codebook_options(
            name,
            num_codes=num_codes,
            code_dim=code_dim,
            decay=decay,
            usage_decay=usage_decay,
            eps=eps,
            metric=metric,
            init=init,
            init_iterations=init_iterations,
            replace_dead_below=replace_dead_below,
            update=update,
        )
        self.num_codes = num_codes
        self.dim = dim
        self.code_dim = code_dim
        self.heads = heads
        self.decay = decay
        self.usage_decay = usage_decay if decay is None else decay
        self.eps = eps
        self.codebook_weight = codebook_weight if decay is None else 0.0
        self.commitment_weight = commitment_weight
        self.diversity_weight = diversity_weight
        self.diversity_temperature = diversity_temperature
        self.orthogonal_weight = orthogonal_weight
        self.orthogonal_used_only = orthogonal_used_only
        self.orthogonal_max_codes = orthogonal_max_codes
        self.gradient: Gradient = gradient
        self.metric: Metric = metric
        self.channel_dim = channel_dim
        self.init: CodebookInit = init
        self.init_iterations = init_iterations
        self.replace_dead_below = replace_dead_below
        self.sample_temperature = sample_temperature
        self.update: UpdateTime = update

        shape = (heads, num_codes, code_dim) if separate_codebooks else (num_codes, code_dim)
        codebook = uniform_codes(*shape)  # drawn in any case, so that one seed gives the modules built later the same weights
        codebook = codebook if init == "uniform" else torch.zeros_like(codebook)
        codebook = normalize_codes(codebook) if metric == "cosine" else codebook
        if decay is None or orthogonal_weight > 0:
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
        if self.has_ema:
            dtype = accumulator_dtype(codebook.dtype)
            self.register_buffer("counts", torch.ones(shape[:-1], dtype=dtype))
            self.register_buffer("sums", codebook.to(dtype, copy=True))
        if replace_dead_below > 0:
            self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        # Zeros stand for codes that data have to set, whichever way codes come in. The flag spares a look at them in every step.
        self._needs_init = init != "uniform"
        # The codebook and its version when the layer last wrote it: another one was set from outside.
        self._written: tuple[int, int] | None = None
        self._steps = StepMemory()
        self.pending: Pending | None = None

        projects = heads * code_dim != dim
        self.project_in = nn.Linear(dim, heads * code_dim) if projects else None
        self.project_out = nn.Linear(heads * code_dim, dim) if projects else None

    @property
    def has_ema(self) -> bool:
        """Whether training steps gather statistics: for codes that learn by EMA, or for dead-code replacement."""
        return self.decay is not None or self.replace_dead_below > 0

    @overload
    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        update: UpdateTime | None = None,
        code_weights: CodeWeights | None = None,
        return_terms: Literal[False] = False,
    ) -> tuple[Tensor, Tensor, Tensor]: ...
    @overload
    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        update: UpdateTime | None = None,
        code_weights: CodeWeights | None = None,
        return_terms: Literal[True],
    ) -> tuple[Tensor, Tensor, Tensor, LossTerms]: ...
    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        update: UpdateTime | None = None,
        code_weights: CodeWeights | None = None,
        return_terms: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, LossTerms]:
        """Quantize x.

        Args:
            x: [..., D, ...], of the codebook's dtype, or half precision with a float32 codebook; the linear layers then
                compute in x's dtype.
            mask: bool, x's shape without channel_dim; where False, quantized is 0, the index is -1, and the vector has no effect
                on loss, gradients and averages.
            lengths: int64 or int32, [B], instead of a mask: the first lengths[i] vectors of row i of x [B, T, D] or [B, D, T] are valid.
            update: overrides the attribute `update`.
            code_weights: as in `update_codebooks`.
            return_terms: also return the terms of the loss.

        Returns:
            quantized, of x's shape and dtype; indices, int64, x's shape without channel_dim, with a last dimension of heads
            if there are several; loss, a scalar (see `genperf.vector_quantize`, plus the weighted diversity and
            orthogonal terms); with return_terms, `LossTerms`.

        Raises:
            ValueError, TypeError: an invalid argument; the codebook is unchanged.
        """
        own_codebook = self.codebook
        check_gathered("VectorQuantizer", own_codebook)
        within = self._can_view_within(x)
        positions, mask = self._check_input(x.detach() if within else x, mask, lengths)
        update = self.update if update is None else update
        check_step("VectorQuantizer", update, code_weights, own_codebook)
        vectors, valid = self._to_vectors(positions, mask)
        starts = self.training and self._needs_init
        if starts:
            from ._outside_compile import init_in_first_step

            init_in_first_step(self, vectors, valid)

        again = self._steps.recall(vectors) if self.training else None
        frozen = self._learns and not self.codebook.requires_grad
        updates = self.training and self.has_ema and update != "none" and not frozen and again is None
        # An update overwrites codes that backward still needs. FSDP2 may gather initial codes for backward before they are written.
        codes = saved_copy(self.codebook) if (updates and update == "step") or starts else self.codebook
        codes = codes if again is None else ValueOf.apply(again.codebook, codes)
        codebook = codes if within else self._search_codebook(codes)
        queries, vectors = vectors, self._unit(vectors)
        indices = None if again is None else again.indices
        if indices is None and self.training and self.sample_temperature > 0:
            indices = self._sample(vectors, self._search_codebook(codes), valid, x)
        learned = codebook if self.codebook_weight > 0 else codebook.detach()
        weights = self.codebook_weight, self.commitment_weight
        options = *weights, self.gradient, self.metric, queries, codes, (x, positions.channel) if within else None
        quantized, indices, loss = quantize_codebooks(vectors, learned, valid, indices, *options)
        if (updates or (self.training and self.sample_temperature > 0)) and may_run_again():
            self._steps.record(queries, Step(codes.detach(), indices), loss)

        error, diversity, orthogonal = loss, None, None
        if self.training and self.diversity_weight > 0:
            options = {"inverse_temperature": self.diversity_temperature, "metric": self.metric}
            diversity = diversity_loss(vectors, codebook, valid, **options)
            loss = loss + self.diversity_weight * diversity
        if self.training and self.orthogonal_weight > 0:
            codebook = self._search_codebook(codes)
            options = {"used_only": self.orthogonal_used_only, "max_codes": self.orthogonal_max_codes}
            orthogonal = orthogonal_loss(codebook, indices, **options)
            loss = loss + self.orthogonal_weight * orthogonal

        if updates:
            gathered = self._gather(vectors, indices, waits=update == "accumulate")
            # An attribute that is set makes torch.compile leave gradient checkpointing around this step to Python.
            if update == "accumulate" or (torch.compiler.is_compiling() and not torch.compiler.is_exporting()):
                self.pending = gathered
            if update == "step":
                apply_updates([self.take_update(gathered)], code_weights, self.synchronized)

        quantized = quantized if within else self._from_vectors(quantized, positions, mask)
        outputs = quantized, merge_indices(indices, positions.sizes, self.heads), loss
        if not return_terms:
            return outputs
        terms = (loss.new_zeros(()) if term is None else term for term in (diversity, orthogonal))
        return *outputs, LossTerms(error / (sum(weights) or 1.0), *terms)

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self) -> None: ...

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Indices of the nearest codes of x as `forward` returns them, without loss, gradients or an update of the codebook."""
        check_gathered("VectorQuantizer.encode", self.codebook)
        with torch.no_grad():
            positions, mask = self._check_input(x, mask)
            vectors, valid = self._to_vectors(positions, mask)
            impl = choose_impl("nearest_code", None, search_unavailable(vectors.device, vectors.dtype))
            codebook = self.codebook if self.codebook.dim() == 3 else self.codebook.unsqueeze(0)
            indices = search(vectors, codebook, valid, self.metric, impl)
            return merge_indices(indices, positions.sizes, self.heads)

    def decode(self, indices: Tensor) -> Tensor:
        """The `quantized` that `forward` returns for these indices, in the codebook's dtype; zeros where an index is -1.

        Differentiable in a learned codebook and in the projection.

        Raises:
            TypeError: indices that are not int64.
            IndexError: an index past the codebook (on the CPU).
        """
        check_gathered("VectorQuantizer.decode", self.codebook)
        check_decoded("VectorQuantizer.decode", indices, self.num_codes)
        indices = indices.unsqueeze(-1) if self.heads == 1 else indices
        codes = look_up(self._search_codebook(self.codebook), indices)
        if self.project_out is not None:
            codes = torch.where(indices[..., :1] >= 0, self.project_out(codes), 0)
        return channels_to(codes, self.channel_dim).contiguous()

    @torch.no_grad()
    def init_codes(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Set the codes from the vectors of x as `init` says ("uniform": as "data"), seeded from torch's default generator.

        "data": random vectors, each drawn once before any is drawn twice. If x has no valid vector, the codes stay. Under
        torch.distributed every rank must call it; the codes are drawn from the global batch with the seed of rank 0.
        """
        vectors, valid = self._to_vectors(*self._check_input(x, mask))
        self._init_from(self._unit(vectors), valid)

    @torch.no_grad()
    def set_codes(self, codes: Tensor, counts: Tensor | None = None) -> None:
        """Set the codebook, and the averages as if each code had `counts` vectors (None: one), all equal to it.

        Raises:
            TypeError: codes or counts that are not tensors.
            ValueError: codes of another shape than the codebook's, or counts of another shape than that without D.
        """
        averages = (self.counts, self.sums) if self.has_ema else (None, None)
        codebook, store = writable_codes(self, "codebook")
        check_given_codes("VectorQuantizer.set_codes", codes, counts, codebook)
        set_codes_(codebook, *averages, codes, counts, normalize=self.metric == "cosine")
        store()
        self._needs_init = False

    def usage(self) -> CodeUsage:
        """Usage of the codebook in training, from the EMA counts; over all codebooks if there are several.

        A code is used if its EMA count is at least replace_dead_below, or without dead-code replacement if it is not 0.
        """
        check("VectorQuantizer", "usage of the codes needs a decay or replace_dead_below", self.decay, self.has_ema)
        return usage_from_counts(self.counts.double().flatten(), max(self.replace_dead_below, torch.finfo(torch.float32).tiny))

    def take_update(self, pending: Pending | None = None) -> CodebookUpdate:
        """The update from the statistics gathered since the last one (None: `self.pending`). Clears them."""
        counts, sums, vectors, indices = pending or self.pending or (None,) * 4
        codebook, store = writable_codes(self, "codebook")
        valid = vectors_at = None
        if vectors is not None and indices is not None:
            valid, vectors_at = (indices >= 0).flatten(1), partial(rows_at, vectors)
        if self.pending is not None:
            self.pending = None
        return CodebookUpdate(
            codebook=codebook,
            counts=self.counts,
            sums=self.sums,
            store=store,
            batch_counts=counts,
            batch_sums=sums,
            decay=self.usage_decay if self.decay is None else self.decay,
            eps=self.eps,
            normalize=self.metric == "cosine",
            writes_codebook=self.decay is not None,
            follows_codes=self.decay is not None and not self._learns and self._set_from_outside(),
            written=self._note_written,
            replace_below=self.replace_dead_below,
            step=self.num_updates if self.replace_dead_below > 0 else None,
            valid=valid,
            vectors_at=vectors_at,
        )

    @property
    def _learns(self) -> bool:
        """Whether the codebook is a parameter; also where functional_call, a parametrization or a replica stands in for it."""
        return "codebook" not in self._buffers

    def _set_from_outside(self) -> bool:
        """Whether something but this layer may have written the codebook since its last update."""
        if torch.compiler.is_compiling():
            return True
        codebook = self.codebook
        return self._written != (id(codebook), codebook._version)

    def _note_written(self) -> None:
        if not torch.compiler.is_compiling():
            codebook = self.codebook
            self._written = id(codebook), codebook._version

    def check_code_weights(self, code_weights: CodeWeights | None) -> None:
        """Raise a ValueError for weights that do not fit the codebook."""
        check_code_weights("VectorQuantizer", code_weights, self.codebook)

    def _check_input(self, x: Tensor, mask: Tensor | None, lengths: Tensor | None = None) -> tuple[Positions, Tensor | None]:
        """Check x, mask and lengths. Returns x as positions, and the mask."""
        if lengths is not None:
            mask = mask_from_lengths("VectorQuantizer", x, mask, lengths, self.channel_dim)
        dtype = self.codebook.dtype
        channel = check_layer_input("VectorQuantizer", x, mask, dim=self.dim, channel_dim=self.channel_dim, dtype=dtype)
        if mask is not None and (self.project_in is not None or self.metric == "cosine"):
            x = torch.where(mask.unsqueeze(channel), x, 0)  # otherwise a masked NaN could reach the gradients
        return Positions(x, channel), mask

    def _can_view_within(self, x: object) -> bool:
        """Whether a Function can view x as vectors, since nothing else here needs a gradient of them."""
        if self.heads > 1 or self.project_in is not None or self.metric == "cosine" or (self.training and self.diversity_weight > 0):
            return False
        return isinstance(x, Tensor) and can_view_within(x)

    def _to_vectors(self, positions: Positions, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The vectors to search, [codebooks, outer, D, inner], and which are valid, [codebooks, outer, inner]."""
        vectors = positions.vectors
        mask = None if mask is None else positions.view_mask(mask)
        if self.project_in is not None or self.heads > 1:
            if vectors.stride(1) == 1:  # then projecting or splitting heads needs no copy
                vectors = vectors.transpose(1, 2).flatten(0, 1).unsqueeze(2)
                mask = None if mask is None else mask.reshape(-1, 1)
            if self.project_in is not None:
                vectors = project_vectors(self.project_in, vectors)
        vectors, mask = split_heads(vectors, mask, self.heads, self.heads if self.codebook.dim() == 3 else 1)
        return vectors, mask

    def _unit(self, vectors: Tensor) -> Tensor:
        """For "cosine", vectors [codebooks, outer, D, inner] divided by their norms."""
        return normalized(vectors, 2).to(vectors.dtype) if self.metric == "cosine" else vectors

    def _from_vectors(self, quantized: Tensor, positions: Positions, mask: Tensor | None) -> Tensor:
        """The quantized vectors [outer * heads, D, inner] in the shape of x."""
        quantized = quantized if self.heads == 1 else merge_heads(quantized, self.heads)
        if self.project_out is None:
            return positions.restore(quantized)
        quantized = positions.restore(project_vectors(self.project_out, quantized)).to(positions.vectors.dtype)
        return quantized if mask is None else torch.where(mask.unsqueeze(positions.channel), quantized, 0)

    def _search_codebook(self, codebook: Tensor) -> Tensor:
        """The codes to search, [codebooks, K, D]; a parameter is normalized for "cosine", a buffer holds unit vectors."""
        codebook = codebook if codebook.dim() == 3 else codebook.unsqueeze(0)
        return normalize_codes(codebook) if self.metric == "cosine" and self._learns else codebook

    def _sample(self, vectors: Tensor, codebook: Tensor, valid: Tensor | None, x: Tensor) -> Tensor:
        """Draw codes [codebooks, outer, inner]; `genperf.sample_offset` gives the position of x in a larger batch."""
        batch = 0 if self.channel_dim % x.dim() == 0 else x.shape[0]
        first = first_sample() * (vectors.shape[1] * vectors.shape[3] // batch) if batch > 0 else 0
        logits = "dot" if self.metric == "cosine" else "distance"
        return draw_codes(vectors.detach(), codebook.detach(), self.sample_temperature, logits, 2, valid, first=first)

    def _gather(self, vectors: Tensor, indices: Tensor, *, waits: bool) -> Pending:
        """The pending statistics with those of a training step."""
        counts, sums, indices = codebook_statistics(vectors, indices, self.num_codes)
        # An update that waits must not depend on what becomes of x.
        last = (vectors.detach().clone() if waits else vectors.detach(), indices) if self.replace_dead_below > 0 else ()
        return add_step(self.pending, counts, sums, last)

    @torch.no_grad()
    def init_in_first_step(self, vectors: Tensor, valid: Tensor | None) -> None:
        """Set the codes from the vectors of the first training step, unless codes were loaded."""
        if self.codebook.any():
            self._needs_init = False
        else:
            self._init_from(self._unit(vectors), valid)

    def _init_from(self, vectors: Tensor, valid: Tensor | None) -> None:
        options = {"init": self.init, "iterations": self.init_iterations, "metric": self.metric, "synchronized": self.synchronized}
        found = codes_from_data(vectors, valid, self.num_codes, **options)
        if found is not None:
            self.set_codes(*found)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(quantizer_state(state))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        save_pending(self.pending, destination, prefix)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        pending = pop_pending(state_dict, prefix) if self.has_ema else {}
        if self.replace_dead_below > 0 and prefix + "counts" in state_dict:  # possibly saved without dead-code replacement
            state_dict.setdefault(prefix + "num_updates", torch.zeros_like(self.num_updates))
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "codebook" in state_dict:
            codebook = self.codebook.detach()
            # The next training step looks at a codebook that is sharded.
            self._needs_init = self.init != "uniform" and (codebook.is_meta or is_dtensor(codebook) or not bool(codebook.any()))
            self.pending = None
            if self.has_ema and prefix + "sums" not in state_dict:  # the averages are of other codes
                self.counts.fill_(1)
                self.sums.copy_(whole(codebook))
        if self.has_ema:
            keep_precision_(self, {"counts": self.counts, "sums": self.sums})
        if pending:
            replaces = self.replace_dead_below > 0
            self.pending = load_pending(pending, self.counts, self.sums, replaces=replaces, prefix=prefix, errors=args[-1])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        averages = {"counts": self.counts, "sums": self.sums} if self.has_ema else {}
        super()._apply(fn, recurse)
        keep_precision_(self, averages)
        self.pending = moved(self.pending, self.codebook.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.num_codes}, {self.dim}, decay={self.decay}, metric={self.metric!r}, channel_dim={self.channel_dim}"
