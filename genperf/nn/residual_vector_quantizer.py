# SPDX-License-Identifier: Apache-2.0
"""Residual vector quantization layer: several quantizers, each on the residual of the previous ones.

Above 400 lines: a layer reads from top to bottom in one file, and a third of it is documentation.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._choices import CodebookInit, Gradient, Metric, UpdateTime
from .._deprecation import RenamedAttribute, renamed_arguments
from .._pickled import quantizer_state
from .._typing import signature_of
from ..ops._autograd import ValueOf
from ..ops._dispatch import choose_impl
from ..ops._layout import Positions
from ..ops._precision import accumulator_dtype
from ..ops._validate import check, check_layer_input
from ..ops.nearest_code import search
from ..ops.nearest_code import unavailable as search_unavailable
from ..ops.residual_vector_quantize import ResidualOptions, check_num_quantizers, finite_residual_statistics, quantize_residual, unavailable
from ..ops.vector_quantize import GRADIENTS
from ._channels import channels_to, project_vectors
from ._code_usage import CodeUsage, usage_from_counts
from ._codebook_init import codes_from_data, uniform_codes
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
from ._recompute import Step, StepMemory
from ._sharded import check_gathered, is_dtensor, whole, writable_codes
from ._vectors import check_decoded, check_given_codes, mask_from_lengths


class ResidualVectorQuantizer(nn.Module):
    """Quantizes every vector as a sum of codes, one from each quantizer; Zeghidour et al., "SoundStream" (2021).

    Quantizer i quantizes the residual of quantizer i - 1, all fused into one op (`genperf.residual_vector_quantize`). The
    codebooks learn as in `VectorQuantizer`: by gradient, or with a `decay` by EMA of the residuals assigned to each code. A step
    is quantized with the codes from before its update. Training does not synchronize with the device. Under torch.distributed
    the statistics of all codebooks are summed in one all-reduce.

    Args:
        num_quantizers: Q.
        num_codes: K, of each quantizer.
        dim: length of the channel dimension of x.
        code_dim: D, the length of a code; None for dim / groups. Where groups * D is not dim, linear layers before the first
            quantizer and after the last change the dimension.
        groups: number of parts that a vector is split into, each with its own Q quantizers (Yang et al., "HiFi-Codec", 2023).
        shared_codebook: one codebook for all quantizers (of a group).
        quantizer_dropout: in every training step, run only the first n quantizers, with n uniformly random, so that a decoder
            can work from a prefix of the codes. A quantizer that does not run is not updated.
        dropout_min_quantizers: the smallest n.
        dropout_multiple_of: round n up to a multiple of this, or to Q.
        dropout_seed: n is a function of it and of the number of training steps, so it is the same on all ranks.
        decay, usage_decay, eps, codebook_weight, commitment_weight, replace_dead_below, update: as `VectorQuantizer`. A dead
            code is replaced by one of its quantizer's residuals.
        gradient: "straight_through" or "rotation", once from x to the sum of the codes.
        metric: "euclidean"; or "cosine": a residual is assigned the code of highest cosine similarity, and codes are unit vectors.
        channel_dim: the dimension of x that holds a vector.
        init, init_iterations: as `VectorQuantizer`, quantizer by quantizer on the residuals; a shared codebook on the vectors.

    Attributes:
        codebook: [groups * Q, K, D], group by group, or with a shared codebook [groups, K, D]; a parameter, or with a decay
            a buffer.
        counts, sums: [groups * Q, K] and [groups * Q, K, D], the averages; buffers that exist with a decay or dead-code
            replacement.
        num_updates: int64, the number of updates; a buffer that exists with dead-code replacement.
        num_steps: int64, the number of training steps; a buffer that exists with quantizer_dropout.
        pending: as `VectorQuantizer`.
        project_in, project_out: the linear layers, or None.

    Raises:
        ValueError: an invalid argument.
    """

    # Whether statistics are summed over ranks.
    synchronized = True

    num_levels = RenamedAttribute("num_quantizers")
    level_dropout = RenamedAttribute("quantizer_dropout")
    dropout_min_levels = RenamedAttribute("dropout_min_quantizers")
    revive_below = RenamedAttribute("replace_dead_below")

    codebook: Tensor
    counts: Tensor
    sums: Tensor
    num_updates: Tensor
    num_steps: Tensor

    @renamed_arguments(
        "ResidualVectorQuantizer",
        num_levels="num_quantizers",
        level_dropout="quantizer_dropout",
        dropout_min_levels="dropout_min_quantizers",
        revive_below="replace_dead_below",
    )
    def __init__(
        self,
        num_quantizers: int,
        num_codes: int,
        dim: int,
        *,
        code_dim: int | None = None,
        groups: int = 1,
        shared_codebook: bool = False,
        quantizer_dropout: bool = False,
        dropout_min_quantizers: int = 1,
        dropout_multiple_of: int = 1,
        dropout_seed: int = 0,
        decay: float | None = None,
        usage_decay: float = 0.99,
        eps: float = 1e-5,
        codebook_weight: float = 1.0,
        commitment_weight: float = 0.25,
        gradient: Gradient = "straight_through",
        metric: Metric = "euclidean",
        channel_dim: int = -1,
        init: CodebookInit = "uniform",
        init_iterations: int = 10,
        replace_dead_below: float = 0.0,
        update: UpdateTime = "step",
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check(name, "num_quantizers must be at least 1", num_quantizers, num_quantizers >= 1)
        check(name, "dim must be at least 1", dim, dim >= 1)
        check(name, "groups must be at least 1", groups, groups >= 1)
        if code_dim is None:
            check(name, "dim must be divisible by groups where code_dim is not given", (dim, groups), dim % groups == 0)
            code_dim = dim // groups
        check(name, "codebook_weight must not be negative", codebook_weight, codebook_weight >= 0)
        check(name, "commitment_weight must not be negative", commitment_weight, commitment_weight >= 0)
        check(name, f"gradient must be one of {', '.join(GRADIENTS)}", gradient, gradient in GRADIENTS)
        fewest = dropout_min_quantizers
        check(name, f"dropout_min_quantizers must lie in 1 ... {num_quantizers}", fewest, 1 <= fewest <= num_quantizers)
        check(name, "dropout_multiple_of must be at least 1", dropout_multiple_of, dropout_multiple_of >= 1)
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
        self.num_quantizers = num_quantizers
        self.num_codes = num_codes
        self.dim = dim
        self.code_dim = code_dim
        self.groups = groups
        self.shared_codebook = shared_codebook
        self.quantizer_dropout = quantizer_dropout
        self.dropout_min_quantizers = dropout_min_quantizers
        self.dropout_multiple_of = dropout_multiple_of
        self.dropout_seed = dropout_seed
        self.decay = decay
        self.usage_decay = usage_decay if decay is None else decay
        self.eps = eps
        self.codebook_weight = codebook_weight if decay is None else 0.0
        self.commitment_weight = commitment_weight
        self.gradient: Gradient = gradient
        self.metric: Metric = metric
        self.channel_dim = channel_dim
        self.init: CodebookInit = init
        self.init_iterations = init_iterations
        self.replace_dead_below = replace_dead_below
        self.update: UpdateTime = update

        shape = (groups if shared_codebook else groups * num_quantizers, num_codes, code_dim)
        codebook = uniform_codes(*shape)  # drawn in any case, so that one seed gives the modules built later the same weights
        codebook = codebook if init == "uniform" else torch.zeros_like(codebook)
        codebook = normalize_codes(codebook) if metric == "cosine" else codebook
        if decay is None:
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
        if self.has_ema:
            dtype = accumulator_dtype(codebook.dtype)
            self.register_buffer("counts", torch.ones(codebook.shape[:-1], dtype=dtype))
            self.register_buffer("sums", codebook.to(dtype, copy=True))
        if replace_dead_below > 0:
            self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        if quantizer_dropout:
            self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64))
        # Zeros stand for codes that data have to set, whichever way codes come in. The flag spares a look at them in every step.
        self._needs_init = init != "uniform"
        # The codebook and its version when the layer last wrote it: another one was set from outside.
        self._written: tuple[int, int] | None = None
        self._steps = StepMemory()
        self.pending: Pending | None = None

        projects = groups * code_dim != dim
        self.project_in = nn.Linear(dim, groups * code_dim) if projects else None
        self.project_out = nn.Linear(groups * code_dim, dim) if projects else None

    @property
    def has_ema(self) -> bool:
        """Whether training steps gather statistics: for codes that learn by EMA, or for dead-code replacement."""
        return self.decay is not None or self.replace_dead_below > 0

    @renamed_arguments("ResidualVectorQuantizer", levels="num_quantizers")
    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        num_quantizers: int | Tensor | None = None,
        update: UpdateTime | None = None,
        code_weights: CodeWeights | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize x.

        Args:
            x, mask, lengths, update, code_weights: as `VectorQuantizer.forward`.
            num_quantizers: run only this many quantizers, the first ones, as in `genperf.residual_vector_quantize`; None for all, or
                for a random number in training with quantizer_dropout.

        Returns:
            quantized, of x's shape and dtype; indices, int64, x's shape without channel_dim and with a last dimension of
            quantizers ([..., Q]; with groups [..., groups, Q]), -1 for quantizers that did not run; losses [Q], means over the
            groups, whose sum belongs in the training loss.
        """
        check_gathered("ResidualVectorQuantizer", self.codebook)
        positions, mask = self._check_input(x, mask, lengths)
        update = self.update if update is None else update
        check_step("ResidualVectorQuantizer", update, code_weights, self.codebook)
        check_num_quantizers("ResidualVectorQuantizer", num_quantizers, self.num_quantizers, x.device)
        again = self._steps.recall(x) if self.training else None
        if again is not None:
            num_quantizers = again.num_quantizers
        elif self.training and self.quantizer_dropout:
            num_quantizers = self._random_num_quantizers() if num_quantizers is None else num_quantizers
            self.num_steps += 1
        vectors, valid = self._to_vectors(positions, mask)
        starts = self.training and self._needs_init
        if starts:
            from ._outside_compile import init_in_first_step

            init_in_first_step(self, _stack(vectors), valid)

        frozen = self._learns and not self.codebook.requires_grad
        updates = self.training and self.has_ema and update != "none" and not frozen and again is None
        # An update overwrites codes that backward still needs. FSDP2 may gather initial codes for backward before they are written.
        codes = saved_copy(self.codebook) if (updates and update == "step") or starts else self.codebook
        codes = codes if again is None else ValueOf.apply(again.codebook, codes)
        codebooks = self._search_codebooks(codes)
        learned = codebooks if self.codebook_weight > 0 else codebooks.detach()
        impl = choose_impl("residual_vector_quantize", None, unavailable(x.device, x.dtype), x, learned)
        options = ResidualOptions(self.codebook_weight, self.commitment_weight, self.gradient == "rotation")
        groups = zip(vectors, learned, strict=True)
        outputs = [quantize_residual(v, c, valid, num_quantizers, self.metric, options, impl) for v, c in groups]
        quantized, indices, losses = zip(*outputs, strict=True)
        if updates or (self.training and self.quantizer_dropout):
            self._steps.record(x, Step(codes.detach(), None, num_quantizers))

        if updates:
            found = [finite_residual_statistics(*group, impl) for group in zip(vectors, codebooks, indices, strict=True)]
            counts, sums, valid_indices = (_stack(each) for each in zip(*found, strict=True))
            self._gather(counts, sums, _stack(vectors), valid_indices, waits=update == "accumulate")
            if update == "step":
                apply_updates([self.take_update()], code_weights, self.synchronized)
        return self._from_vectors(quantized, positions, mask), self._merge_indices(indices, positions), torch.stack(losses).mean(0)

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self) -> None: ...

    @renamed_arguments("ResidualVectorQuantizer", levels="num_quantizers")
    def encode(self, x: Tensor, mask: Tensor | None = None, *, num_quantizers: int | Tensor | None = None) -> Tensor:
        """Indices of x as `forward` returns them, without losses, gradients or an update of the codebooks."""
        check_gathered("ResidualVectorQuantizer.encode", self.codebook)
        with torch.no_grad():
            positions, mask = self._check_input(x, mask)
            check_num_quantizers("ResidualVectorQuantizer", num_quantizers, self.num_quantizers, x.device)
            vectors, valid = self._to_vectors(positions, mask)
            impl = choose_impl("residual_vector_quantize", None, unavailable(x.device, x.dtype))
            options = ResidualOptions(0.0, 0.0, False)
            pairs = zip(vectors, self._search_codebooks(self.codebook), strict=True)
            indices = [quantize_residual(v, c, valid, num_quantizers, self.metric, options, impl)[1] for v, c in pairs]
            return self._merge_indices(indices, positions)

    def decode(self, indices: Tensor) -> Tensor:
        """The `quantized` that `forward` returns for these indices, in the codebook's dtype.

        Differentiable in learned codebooks and in the projection.

        Args:
            indices: int64, [..., q] or with groups [..., groups, q], of the first q <= Q quantizers. Quantizers from the first
                index of -1 on add nothing; where the first index is -1, the result is zero.

        Raises:
            TypeError: indices that are not int64.
            IndexError: an index past the codebook (on the CPU).
            ValueError: more quantizers or other groups than the layer has.
        """
        check_gathered("ResidualVectorQuantizer.decode", self.codebook)
        check_decoded("ResidualVectorQuantizer.decode", indices, self.num_codes)
        shape = list(indices.shape)
        fits = len(shape) > 0 and 1 <= shape[-1] <= self.num_quantizers and (self.groups == 1 or shape[-2:-1] == [self.groups])
        groups = f"{self.groups}, " if self.groups > 1 else ""
        rule = f"indices must have shape [..., {groups}q] with 1 <= q <= {self.num_quantizers}"
        check("ResidualVectorQuantizer", rule, shape, fits)
        indices = indices.unsqueeze(-2) if self.groups == 1 else indices
        pairs = zip(self._search_codebooks(self.codebook), indices.unbind(-2), strict=True)
        codes = torch.cat([_sum_of_codes(*pair) for pair in pairs], -1)
        if self.project_out is not None:
            codes = torch.where(indices[..., :1, 0] >= 0, self.project_out(codes), 0)
        return channels_to(codes, self.channel_dim).contiguous()

    @torch.no_grad()
    def init_codes(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Set the codes from the vectors of x, as `VectorQuantizer.init_codes`: each quantizer's from its residuals."""
        vectors, valid = self._to_vectors(*self._check_input(x, mask))
        self._init_from(_stack(vectors), valid)

    @torch.no_grad()
    def set_codes(self, codes: Tensor, counts: Tensor | None = None) -> None:
        """Set the codebooks, and the averages as if each code had `counts` vectors (None: one), all equal to it.

        Raises:
            TypeError: codes or counts that are not tensors.
            ValueError: codes of another shape than the codebook's, or counts of another shape than that without D.
        """
        averages = (self.counts, self.sums) if self.has_ema else (None, None)
        codebook, store = writable_codes(self, "codebook")
        check_given_codes("ResidualVectorQuantizer.set_codes", codes, counts, codebook)
        set_codes_(codebook, *averages, codes, counts, normalize=self.metric == "cosine")
        store()
        self._needs_init = False

    def usage(self) -> CodeUsage:
        """Usage of the codebooks in training, as `VectorQuantizer.usage`; over all codebooks together."""
        rule = "usage of the codes needs a decay or replace_dead_below"
        check("ResidualVectorQuantizer", rule, self.decay, self.has_ema)
        return usage_from_counts(self.counts.double().flatten(), max(self.replace_dead_below, torch.finfo(torch.float32).tiny))

    def take_update(self) -> CodebookUpdate:
        """The update from the statistics gathered since the last one. Clears them."""
        counts, sums, vectors, indices = self.pending or (None,) * 4  # vectors [groups, outer, D, inner], indices [groups, outer, inner, Q]
        codebook, store = writable_codes(self, "codebook")
        valid = vectors_at = None
        if vectors is not None and indices is not None:
            # A quantizer's own residuals; for a shared codebook, the positions of the first quantizer.
            own = indices[..., 0] if self.shared_codebook else indices.movedim(-1, 1).flatten(0, 1)
            valid, vectors_at = (own >= 0).flatten(1), partial(self._residuals_at, codebook, vectors, indices)
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
        return torch.compiler.is_compiling() or self._written != (id(self.codebook), self.codebook._version)

    def _note_written(self) -> None:
        if not torch.compiler.is_compiling():
            self._written = id(self.codebook), self.codebook._version

    def check_code_weights(self, code_weights: CodeWeights | None) -> None:
        """Raise a ValueError for weights that do not fit the codebooks."""
        check_code_weights("ResidualVectorQuantizer", code_weights, self.codebook)

    def _check_input(self, x: Tensor, mask: Tensor | None, lengths: Tensor | None = None) -> tuple[Positions, Tensor | None]:
        """Check x, mask and lengths. Returns x as positions, and the mask."""
        if lengths is not None:
            mask = mask_from_lengths("ResidualVectorQuantizer", x, mask, lengths, self.channel_dim)
        dtype = self.codebook.dtype
        channel = check_layer_input("ResidualVectorQuantizer", x, mask, dim=self.dim, channel_dim=self.channel_dim, dtype=dtype)
        if mask is not None and self.project_in is not None:
            x = torch.where(mask.unsqueeze(channel), x, 0)  # otherwise a masked NaN could reach the gradients
        return Positions(x, channel), mask

    def _to_vectors(self, positions: Positions, mask: Tensor | None) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """The vectors of each group, [outer, D, inner], and which are valid, [outer, inner]."""
        vectors = positions.vectors
        if self.project_in is not None:
            vectors = project_vectors(self.project_in, vectors)
        # Not `unflatten`, after which torch.onnx.export(dynamo=False) takes every size for a constant.
        vectors = vectors.reshape(vectors.shape[0], self.groups, self.code_dim, vectors.shape[2])
        return vectors.unbind(1), positions.view_mask(mask)

    def _from_vectors(self, quantized: tuple[Tensor, ...], positions: Positions, mask: Tensor | None) -> Tensor:
        """The quantized vectors [outer, D, inner] of the groups in the shape of x."""
        joined = quantized[0] if self.groups == 1 else torch.cat(quantized, 1)
        if self.project_out is None:
            return positions.restore(joined)
        joined = positions.restore(project_vectors(self.project_out, joined)).to(positions.vectors.dtype)
        return joined if mask is None else torch.where(mask.unsqueeze(positions.channel), joined, 0)

    def _merge_indices(self, indices: list[Tensor] | tuple[Tensor, ...], positions: Positions) -> Tensor:
        """The indices [outer, inner, Q] of the groups in the shape of x without its channels, with groups and quantizers last."""
        if self.groups == 1:
            return positions.restore_indices(indices[0], self.num_quantizers)
        return positions.restore_indices(torch.stack(list(indices), 2), self.groups, self.num_quantizers)

    def _search_codebooks(self, codebook: Tensor) -> Tensor:
        """The codes to search, [groups, Q, K, D]; a parameter is normalized for "cosine", a buffer holds unit vectors."""
        if self.metric == "cosine" and self._learns:
            codebook = normalize_codes(codebook)
        if self.shared_codebook:
            return codebook.unsqueeze(1).expand(-1, self.num_quantizers, -1, -1)
        return codebook.unflatten(0, (self.groups, self.num_quantizers))

    def _random_num_quantizers(self) -> Tensor:
        """Number of quantizers that this step runs, a tensor on the device: a hash of the number of steps and the seed."""
        bits = (saved_copy(self.num_steps) + (0x9E3779B1 * (self.dropout_seed + 1) & 0x7FFFFFFF)) & 0x7FFFFFFF
        for multiplier in (0x2C1B3C6D, 0x297A2D39):
            bits = ((bits ^ (bits >> 15)) * multiplier) & 0x7FFFFFFF
        bits = bits ^ (bits >> 15)
        number = self.dropout_min_quantizers + bits % (self.num_quantizers - self.dropout_min_quantizers + 1)
        multiple = self.dropout_multiple_of
        return ((number + multiple - 1) // multiple * multiple).clamp(max=self.num_quantizers)

    def _gather(self, counts: Tensor, sums: Tensor, vectors: Tensor, indices: Tensor, *, waits: bool) -> None:
        """Keep the statistics [groups, Q, ...] of a training step for the next update."""
        counts, sums = (counts.sum(1), sums.sum(1)) if self.shared_codebook else (counts.flatten(0, 1), sums.flatten(0, 1))
        # An update that waits must not depend on what becomes of x.
        last = (vectors.detach().clone() if waits else vectors.detach(), indices) if self.replace_dead_below > 0 else ()
        self.pending = add_step(self.pending, counts, sums, last)

    def _residuals_at(self, codebook: Tensor, vectors: Tensor, indices: Tensor, row: Tensor) -> Tensor:
        """The residuals [codebooks, K, D] at positions `row` [codebooks, K] of a step.

        They are residuals of the codebook's quantizer; with a shared codebook, code k gets one of quantizer k % Q.

        Args:
            codebook: as the attribute.
            vectors: [groups, outer, D, inner].
            indices: [groups, outer, inner, Q].
        """
        group = torch.arange(len(row), device=row.device)
        quantizer = torch.arange(self.num_codes, device=row.device) % self.num_quantizers
        if not self.shared_codebook:
            group, quantizer = group // self.num_quantizers, (group % self.num_quantizers).unsqueeze(1)
        group = group.unsqueeze(1)
        outer, inner = row // vectors.shape[3], row % vectors.shape[3]
        residual = vectors.movedim(2, -1)[group, outer, inner].to(accumulator_dtype(vectors.dtype))
        for q, codes in enumerate(self._search_codebooks(codebook).unbind(1)):  # [groups, K, D]
            index = indices[group, outer, inner, q]
            before = ((q < quantizer) & (index >= 0)).unsqueeze(-1)
            residual = torch.where(before, residual - codes[group, index.clamp(min=0)], residual)
        return residual

    @torch.no_grad()
    def init_in_first_step(self, vectors: Tensor, valid: Tensor | None) -> None:
        """Set the codes from the vectors of the first training step, unless codes were loaded."""
        if self.codebook.any():
            self._needs_init = False
        else:
            self._init_from(vectors, valid)

    def _init_from(self, vectors: Tensor, valid: Tensor | None) -> None:
        """Set the codes of one quantizer after another; vectors [groups, outer, D, inner], valid [outer, inner]."""
        valid = None if valid is None else valid.expand(self.groups, *valid.shape)
        options = {"init": self.init, "iterations": self.init_iterations, "metric": self.metric, "synchronized": self.synchronized}
        residual, found = vectors.detach().to(accumulator_dtype(vectors.dtype)), []
        for _ in range(1 if self.shared_codebook else self.num_quantizers):
            codes_and_counts = codes_from_data(residual, valid, self.num_codes, **options)
            if codes_and_counts is None:
                return
            codes, counts = codes_and_counts
            codes = normalize_codes(codes.to(residual)) if self.metric == "cosine" else codes.to(residual)
            found.append((codes, counts))
            impl = choose_impl("nearest_code", None, search_unavailable(residual.device, residual.dtype))
            index = search(residual, codes, None, self.metric, impl)
            group = torch.arange(self.groups, device=index.device).view(-1, 1, 1)
            residual = residual - codes[group, index].transpose(2, 3)
        self.set_codes(*(torch.stack(each, 1) for each in zip(*found, strict=True)))

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
        sizes = f"{self.num_quantizers}, {self.num_codes}, {self.dim}"
        return f"{sizes}, groups={self.groups}, decay={self.decay}, channel_dim={self.channel_dim}"


def _stack(groups: tuple[Tensor, ...]) -> Tensor:
    """torch.stack, without a copy of a single tensor."""
    return groups[0].unsqueeze(0) if len(groups) == 1 else torch.stack(groups)


def _sum_of_codes(codebooks: Tensor, indices: Tensor) -> Tensor:
    """Sum [..., D] of the codes of indices [..., q] in codebooks [Q, K, D], in order, up to the first index of -1."""
    present = indices[..., :1] >= 0
    total = torch.where(present, F.embedding(indices[..., 0].clamp(min=0), codebooks[0]), 0)
    for q in range(1, indices.shape[-1]):
        present = present & (indices[..., q : q + 1] >= 0)
        code = F.embedding(indices[..., q].clamp(min=0), codebooks[q])
        total = torch.where(present, total + code, total)
    return total
