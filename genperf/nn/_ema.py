# SPDX-License-Identifier: Apache-2.0
"""The EMA of a codebook as functions of tensors: moving averages, codes from them, dead-code replacement, all-reduce.

A layer owns its buffers under its own names. For an update it passes them as a `CodebookUpdate`, together with the statistics
of its training steps. Shapes: [..., K] and [..., K, D], where ... is empty or the number of codebooks.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeGuard, get_args

import torch
from torch import Tensor, nn
from torch import distributed as dist

from .._choices import CodebookInit, Metric, UpdateTime
from .._distributed import all_reduce_sum, world_size
from ..ops._precision import HALF_DTYPES, accumulator_dtype, normalized
from ..ops._validate import check
from ..ops.nearest_code import METRICS
from ._codebook_init import INITS
from ._ema_kernel import run_kernel
from ._recompute import in_backward

UPDATES: tuple[UpdateTime, ...] = get_args(UpdateTime)

# Factors of 1 - decay for each code: a tensor, or a function of the batch's sums and counts.
CodeWeights = Tensor | Callable[[Tensor, Tensor], Tensor]

# Fractional parts of multiples of these fill [0, 1) evenly.
_GOLDEN, _SQRT2 = (math.sqrt(5) - 1) / 2, math.sqrt(2) - 1


@torch.no_grad()
def ema_update_(
    counts: Tensor, sums: Tensor, batch_counts: Tensor, batch_sums: Tensor, decay: float, weights: Tensor | None = None
) -> None:
    """Move the averages of each code's count and sum toward those of a batch, in place.

    Equivalent to (a batch that is not empty, no weights of the codes):
        counts.lerp_(batch_counts, 1 - decay)
        sums.lerp_(batch_sums, 1 - decay)

    A codebook without a vector in the batch keeps its averages.
    """
    batch_counts = batch_counts.reshape(counts.shape).to(counts.dtype)
    batch_sums = batch_sums.reshape(sums.shape).to(sums.dtype)
    weight = (1 - decay) * (batch_counts.sum(-1, keepdim=True) > 0).to(batch_counts)
    weight = weight if weights is None else weight * weights
    counts.lerp_(batch_counts, weight)
    sums.lerp_(batch_sums, weight.unsqueeze(-1))


def _weights(code_weights: CodeWeights | None, batch_counts: Tensor, batch_sums: Tensor, counts: Tensor) -> Tensor | None:
    """The weights of the codes for a batch, of shape [K] or that of `counts`."""
    if code_weights is None or isinstance(code_weights, Tensor):
        return code_weights if code_weights is None else code_weights.to(counts)
    batch_sums = batch_sums.reshape(*counts.shape, -1).to(counts.dtype)
    return code_weights(batch_sums, batch_counts.reshape(counts.shape).to(counts.dtype)).to(counts)


@torch.no_grad()
def codebook_from_ema(counts: Tensor, sums: Tensor, eps: float, *, out: Tensor | None = None) -> Tensor:
    """Codes from the averages: sums / counts, with Laplace-smoothed counts."""
    return torch.div(sums, _smoothed(counts, eps).unsqueeze(-1), out=out)


def _smoothed(counts: Tensor, eps: float) -> Tensor:
    total = counts.sum(-1, keepdim=True)
    return (counts + eps) / (total + counts.shape[-1] * eps) * total


@torch.no_grad()
def follow_codes_(codebook: Tensor, counts: Tensor, sums: Tensor, eps: float, normalize: bool) -> None:
    """Where a code is not the one of its averages, because it was set from outside, make the averages those of the code, in place."""
    smoothed = _smoothed(counts, eps).unsqueeze(-1)
    expected = sums / smoothed
    expected = (normalize_codes(expected) if normalize else expected).to(codebook.dtype)
    # By more than rounding.
    moved = (codebook - expected).square().sum(-1) > 1e-4 * codebook.square().sum(-1)
    sums.copy_(torch.where(moved.unsqueeze(-1), codebook.to(sums.dtype) * smoothed, sums))


@torch.no_grad()
def replace_dead_codes_(codebook: Tensor, counts: Tensor, sums: Tensor, replacements: Tensor, found: Tensor, threshold: float) -> None:
    """Replace each code whose count is below the threshold, in place; its averages become those of `threshold` equal vectors.

    Args:
        replacements: [..., K, D], a vector for each code.
        found: bool, [..., K]; where False there is no replacement, and the code stays.
    """
    dead = (counts < threshold) & found
    counts.masked_fill_(dead, threshold)
    dead = dead.unsqueeze(-1)
    sums.copy_(torch.where(dead, replacements * threshold, sums))
    codebook.copy_(torch.where(dead, replacements, codebook))


@torch.no_grad()
def set_codes_(
    codebook: Tensor, counts: Tensor | None, sums: Tensor | None, codes: Tensor, code_counts: Tensor | None, *, normalize: bool
) -> None:
    """Set codes, and the averages as if each code had `code_counts` vectors (None: one), all equal to it."""
    codes = codes.to(codebook)
    codebook.copy_((normalize_codes(codes) if normalize else codes).reshape(codebook.shape))
    if counts is not None and sums is not None:
        counts.copy_(torch.ones_like(counts) if code_counts is None else code_counts.reshape(counts.shape))
        sums.copy_(codebook.detach() * counts.unsqueeze(-1))


def draw_replacements(
    valid: Tensor,  # [codebooks, N]
    vectors_at: Callable[[Tensor], Tensor],  # [codebooks, K] -> [codebooks, K, D]
    num_codes: int,
    step: Tensor,
    before: Tensor,  # [codebooks]
    total: Tensor,  # [codebooks]
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # [codebooks, K, D], [codebooks, K]
    """A vector of the global batch for every code, and whether this rank holds it; zeros where it does not.

    Positions are evenly spaced in the global batch, with another offset for each `step`. They depend on `step` only, so
    every rank draws the same ones, each at most once. With fewer vectors than codes, some codes get none.

    Args:
        valid: which of this rank's vectors may be drawn.
        vectors_at: this rank's vectors at given positions.
        before, total: int64, the number of valid vectors on the ranks before this one, and on all ranks.
    """
    k = torch.arange(num_codes, device=valid.device)
    number = step.double()
    offset, shift = (number * _GOLDEN) % 1, ((number * _SQRT2) % 1 * num_codes).long()
    stratum = (k + shift) % num_codes
    strata = total.clamp(max=num_codes).unsqueeze(1)
    position = ((stratum + offset) * (total.unsqueeze(1) / strata.clamp(min=1).double())).long() - before.unsqueeze(1)
    found = (stratum < strata) & (position >= 0) & (position < valid.sum(1, keepdim=True))
    row = torch.searchsorted(valid.cumsum(1), position.clamp(min=0) + 1).clamp(max=valid.shape[1] - 1)
    drawn = vectors_at(row).to(dtype)
    found = found & drawn.isfinite().all(-1)
    return torch.where(found.unsqueeze(-1), drawn, 0), found


@dataclass
class CodebookUpdate:
    """One update of a layer's codebooks: the buffers that it writes, and the statistics of this rank.

    Attributes:
        codebook, counts, sums: the layer's buffers, [..., K, D], [..., K] and [..., K, D].
        store: called once the codes are written (see `writable_codes`).
        batch_counts, batch_sums: statistics of the training steps since the last update, or None if there was none.
        normalize: make codes unit vectors.
        writes_codebook: set the codes from the averages; otherwise only the averages move.
        follows_codes: the codes may have been set from outside since the last update (see `follow_codes_`).
        written: called after the update.
        replace_below: threshold of dead-code replacement, 0 for none. The attributes below are for replacement only.
        step: int64 scalar by which replacements are drawn; that of rank 0 counts on all ranks.
        counts_steps: whether `step` is a buffer, which an update increments.
        valid: [codebooks, N], which vectors of the last training step may replace a code, or None if there was no step.
        vectors_at: the vectors [codebooks, K, D] at positions [codebooks, K] of that step.
    """

    codebook: Tensor
    counts: Tensor
    sums: Tensor
    store: Callable[[], None]
    batch_counts: Tensor | None
    batch_sums: Tensor | None
    decay: float
    eps: float
    normalize: bool
    writes_codebook: bool
    follows_codes: bool = False
    written: Callable[[], None] | None = None
    replace_below: float = 0.0
    step: Tensor | None = None
    counts_steps: bool = True
    valid: Tensor | None = None
    vectors_at: Callable[[Tensor], Tensor] | None = None

    @property
    def num_codebooks(self) -> int:
        return self.counts.shape[0] if self.counts.dim() > 1 else 1

    def num_valid(self) -> Tensor:
        """[codebooks], int64: the number of this rank's vectors that may replace a code."""
        if self.valid is None:
            return torch.zeros(self.num_codebooks, dtype=torch.int64, device=self.counts.device)
        return self.valid.sum(1)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """This rank's counts and sums."""
        if self.batch_counts is None or self.batch_sums is None:
            return torch.zeros_like(self.counts), torch.zeros_like(self.sums)
        return self.batch_counts, self.batch_sums

    def replacements(self, before: Tensor, total: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """A vector for every code and whether this rank holds it (see `draw_replacements`)."""
        if self.step is None or self.valid is None or self.vectors_at is None or self.valid.numel() == 0:
            return torch.zeros_like(self.sums), torch.zeros_like(self.counts)
        num_codes, dtype = self.counts.shape[-1], self.sums.dtype
        return draw_replacements(self.valid, self.vectors_at, num_codes, step, before, total, dtype)

    def apply_(self, counts: Tensor, sums: Tensor, weights: Tensor | None) -> None:
        """Update averages and codes from the statistics of all ranks."""
        if weights is None and self.writes_codebook:
            tensors = self.codebook, self.counts, self.sums, counts, sums
            if run_kernel(*tensors, self.decay, self.eps, normalize=self.normalize, follow=self.follows_codes):
                return
        if self.follows_codes:
            follow_codes_(self.codebook, self.counts, self.sums, self.eps, self.normalize)
        ema_update_(self.counts, self.sums, counts, sums, self.decay, weights)
        if self.writes_codebook:
            kept = None if weights is None else self.codebook.clone()
            codebook_from_ema(self.counts, self.sums, self.eps, out=self.codebook)
            if self.normalize:
                self.codebook.copy_(normalize_codes(self.codebook))
            if kept is not None:
                self.codebook.copy_(torch.where((weights == 0).unsqueeze(-1), kept, self.codebook))

    def replace_(self, drawn: Tensor, found: Tensor, weights: Tensor | None = None) -> None:
        """Replace dead codes, but those of weight 0, by the vectors that all ranks have drawn."""
        drawn, found = drawn.reshape(self.sums.shape), found.reshape(self.counts.shape) > 0
        found = found if weights is None else found & (weights != 0)
        drawn = normalize_codes(drawn) if self.normalize else drawn
        replace_dead_codes_(self.codebook, self.counts, self.sums, drawn, found, self.replace_below)
        if self.step is not None and self.counts_steps:
            self.step += 1


class HasCodebook(Protocol):
    """A layer whose codebooks learn by EMA, or whose dead codes are replaced.

    Attributes:
        has_ema: whether training steps gather statistics.
        synchronized: whether the statistics are summed over ranks.
        update: one of UPDATES.
    """

    has_ema: bool
    synchronized: bool
    update: UpdateTime

    def take_update(self) -> CodebookUpdate:
        """The pending update. Clears the layer's statistics."""
        ...

    def check_code_weights(self, code_weights: CodeWeights | None) -> None: ...


def _has_codebook(layer: nn.Module) -> TypeGuard[HasCodebook]:
    return hasattr(layer, "take_update")


def update_codebooks(module: nn.Module, *, code_weights: CodeWeights | None = None) -> None:
    """Update all codebooks in a module from the statistics gathered by training steps with update="accumulate".

    Call it after backward, which needs the codes that the step was quantized with. Under torch.distributed every rank must
    call it on the same module: the statistics of all layers are summed in one all-reduce. Layers with dead-code replacement
    all-reduce the number of each rank's vectors first. A layer without a vector on any rank keeps its averages, and so does a
    layer with update="none".

    Args:
        module: contains VectorQuantizer or ResidualVectorQuantizer layers, or is one.
        code_weights: [K] or [codebooks, K], factors of 1 - decay for each code; or a function of the sums and counts of the
            global batch that returns them.
    """
    layers = [layer for layer in module.modules() if _has_codebook(layer) and layer.has_ema and layer.update != "none"]
    for layer in layers:
        layer.check_code_weights(code_weights)
    for synchronized in (True, False):
        updates = [layer.take_update() for layer in layers if layer.synchronized == synchronized]
        apply_updates(updates, code_weights, synchronized)


@torch.no_grad()
def apply_updates(updates: Sequence[CodebookUpdate], code_weights: CodeWeights | None, synchronized: bool) -> None:
    """Update codebooks from the statistics of all ranks if `synchronized`, otherwise of this rank."""
    synchronized = synchronized and world_size() > 1 and len(updates) > 0
    replacing = [update for update in updates if update.replace_below > 0]
    statistics = [update.statistics() for update in updates]
    drawn = []
    if replacing:
        drawn = [update.replacements(*place) for update, place in zip(replacing, _places(replacing, synchronized), strict=True)]
    if synchronized:
        summed = sync_statistics([*updates, *replacing], statistics + drawn)
        statistics, drawn = summed[: len(updates)], summed[len(updates) :]
    weights = [_weights(code_weights, *batch, update.counts) for update, batch in zip(updates, statistics, strict=True)]
    for update, batch, of_codes in zip(updates, statistics, weights, strict=True):
        update.apply_(*batch, of_codes)
    if replacing:
        replacing_weights = (of_codes for update, of_codes in zip(updates, weights, strict=True) if update.replace_below > 0)
        for update, found, of_codes in zip(replacing, drawn, replacing_weights, strict=True):
            update.replace_(*found, of_codes)
    for update in updates:
        update.store()
        if update.written is not None:
            update.written()


@torch.no_grad()
def apply_replacement(update: CodebookUpdate, synchronized: bool) -> None:
    """Replace the dead codes of one layer, without a step of its averages."""
    synchronized = synchronized and world_size() > 1
    drawn = [update.replacements(*_places([update], synchronized)[0])]
    update.replace_(*(sync_statistics([update], drawn) if synchronized else drawn)[0])
    update.store()


def sync_statistics(updates: Sequence[CodebookUpdate], parts: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Sum over ranks, in one all-reduce, a pair of tensors for each update."""
    # The same dtype on every rank, whether or not it has seen a vector.
    dtypes = [accumulator_dtype(update.sums.dtype) for update in updates]
    flat = [part.reshape(-1).to(dtype) for pair, dtype in zip(parts, dtypes, strict=True) for part in pair]
    summed = iter(all_reduce_sum(torch.cat(flat)).split([len(part) for part in flat]))
    return [(next(summed).view(first.shape), next(summed).view(second.shape)) for first, second in parts]


def _places(updates: Sequence[CodebookUpdate], synchronized: bool) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each update the numbers of vectors [codebooks] on the ranks before this one and on all ranks, and the step of rank 0."""
    numbers = [update.num_valid() for update in updates]
    steps = [torch.zeros_like(number[0]) if update.step is None else update.step for update, number in zip(updates, numbers, strict=True)]
    if not synchronized or not updates:
        return [(torch.zeros_like(number), number, step) for number, step in zip(numbers, steps, strict=True)]
    rank, lengths = dist.get_rank(), [len(number) for number in numbers]
    own = torch.cat([*numbers, *(step.reshape(1) for step in steps)])
    by_rank = own.new_zeros(world_size(), len(own))
    by_rank[rank] = own
    by_rank = all_reduce_sum(by_rank)
    counts, first_steps = by_rank[:, : sum(lengths)], by_rank[0, sum(lengths) :]
    before, total = counts[:rank].sum(0).split(lengths), counts.sum(0).split(lengths)
    return list(zip(before, total, first_steps, strict=True))


def check_codebook_options(
    name: str,
    *,
    num_codes: int,
    code_dim: int,
    decay: float | None,
    usage_decay: float,
    eps: float,
    metric: Metric,
    init: CodebookInit,
    init_iterations: int,
    replace_dead_below: float,
    update: UpdateTime,
) -> None:
    """Check the constructor arguments that every layer with a codebook has."""
    check(name, "num_codes must be at least 1", num_codes, num_codes >= 1)
    check(name, "the dimension of a code must be at least 1", code_dim, code_dim >= 1)
    check(name, "decay must be None or lie in [0, 1)", decay, decay is None or 0 <= decay < 1)
    check(name, "usage_decay must lie in [0, 1)", usage_decay, 0 <= usage_decay < 1)
    check(name, "eps must be positive", eps, eps > 0)
    check(name, f"metric must be one of {', '.join(METRICS)}", metric, metric in METRICS)
    check(name, f"init must be one of {', '.join(INITS)}", init, init in INITS)
    check(name, "init_iterations must not be negative", init_iterations, init_iterations >= 0)
    check(name, "replace_dead_below must not be negative", replace_dead_below, replace_dead_below >= 0)
    check(name, f"update must be one of {', '.join(UPDATES)}", update, update in UPDATES)


def normalize_codes(codes: Tensor) -> Tensor:
    """Unit vectors [..., D], as a codebook for the cosine metric holds them."""
    return normalized(codes, -1).to(codes.dtype)


def keep_precision_(layer: nn.Module, before: dict[str, Tensor]) -> None:
    """Undo a cast of the averages `before` to half precision, in which they would stop moving or overflow."""
    for name, average in before.items():
        now = getattr(layer, name)
        if now.dtype in HALF_DTYPES:
            wide = average if average.dtype not in HALF_DTYPES and not average.is_meta else now
            setattr(layer, name, wide.to(now.device, torch.float32))


def check_step(name: str, update: UpdateTime, code_weights: CodeWeights | None, codebook: Tensor) -> None:
    """Check the arguments of a training step that concern the update."""
    if update not in UPDATES:
        raise ValueError(f"{name}: update must be one of {', '.join(UPDATES)}, got {update!r}.")
    check_code_weights(name, code_weights, codebook)


def check_code_weights(name: str, code_weights: CodeWeights | None, codebook: Tensor) -> None:
    """A tensor of weights must have the shape [K] or [codebooks, K]."""
    if isinstance(code_weights, Tensor):
        shape = list(codebook.shape[:-1])
        rule = f"code_weights must have shape {shape}" + (f" or {shape[1:]}" if len(shape) > 1 else "")
        check(name, rule, list(code_weights.shape), list(code_weights.shape) in (shape, shape[-1:]))


def saved_copy(codebook: Tensor) -> Tensor:
    """A copy of the codebook for backward, which needs the codes from before the in-place update."""
    # An exported program has no backward, and ONNX no such operator.
    compiled = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    return _saved_copy(codebook) if compiled else codebook.clone()


@torch.library.custom_op("genperf::saved_copy", mutates_args=())
def _saved_copy(t: Tensor) -> Tensor:
    """A clone that torch.compile saves for backward. A plain clone would be recomputed from the updated codebook.

    Gradient checkpointing recomputes this one too, and a compiled step cannot look up what the first run used.
    """
    if in_backward():
        raise RuntimeError(
            "quantizer: a compiled training step that writes to its codebook must run once, got a second run in backward, by "
            "gradient checkpointing. Leave the quantizer out of what is checkpointed, or out of what is compiled."
        )
    return t.clone()


_saved_copy.register_fake(torch.empty_like)
_saved_copy.register_autograd(lambda ctx, grad: grad)
