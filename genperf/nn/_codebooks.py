"""Codebooks that follow their vectors: moving averages, initialization from data, revival of dead codes, on all processes alike."""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from .._distributed import gather_numbers, gather_rows, sum_over_processes, world_size
from ..ops._dispatch import choose_impl
from ..ops._precision import HALF_DTYPES, accumulator_dtype
from ..ops.code_statistics import statistics
from ..ops.code_statistics import unavailable as statistics_unavailable
from ..ops.kmeans import kmeans
from ..ops.nearest_code import METRICS

INITS = ("uniform", "data", "kmeans")
UPDATES = ("step", "accumulate", "none")

# Of a step in the moving averages of each code.
Weights = Tensor | Callable[[Tensor, Tensor], Tensor]

# Vectors for each code that k-means starts from; more of them move its result little.
_KMEANS_VECTORS = 256

# Fractional parts of multiples of these fill [0, 1) evenly.
_GOLDEN, _SQRT2 = (math.sqrt(5) - 1) / 2, math.sqrt(2) - 1


class Codebooks(nn.Module):
    """The codebooks of a quantizer and how they learn; layers extend it.

    Attributes:
        codebook: [K, D], or [books, K, D]; a buffer, or a parameter where gradients reach it.
        counts, sums: [K] and [K, D], or with books; moving averages of the vectors of each code. They start as ones and as
            the codebook, and exist where something follows them.
        num_updates: how many updates the codebook has had, int64; a buffer that exists with revival, which draws by it.
        update: what training steps do with their statistics: "step" updates the codebooks, "accumulate" keeps them for
            `update_codebooks`, "none" freezes the codebooks.
    """

    counts: Tensor
    sums: Tensor

    # Whether the codebooks are those of the joined batch where torch.distributed is in use.
    synchronized = True

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        *,
        books: int | None,
        decay: float | None,
        usage_decay: float,
        eps: float,
        metric: str,
        init: str,
        init_iterations: int,
        revive_below: float,
        learned: bool,
        update: str,
    ) -> None:
        super().__init__()
        self.check("num_codes must be at least 1", num_codes, num_codes >= 1)
        self.check("the dimension of a code must be at least 1", code_dim, code_dim >= 1)
        self.check("decay must be None or lie in [0, 1)", decay, decay is None or 0 <= decay < 1)
        self.check("usage_decay must lie in [0, 1)", usage_decay, 0 <= usage_decay < 1)
        self.check("eps must be positive", eps, eps > 0)
        self.check(f"metric must be one of {', '.join(METRICS)}", metric, metric in METRICS)
        self.check(f"init must be one of {', '.join(INITS)}", init, init in INITS)
        self.check("init_iterations must not be negative", init_iterations, init_iterations >= 0)
        self.check("revive_below must not be negative", revive_below, revive_below >= 0)
        self.check(f"update must be one of {', '.join(UPDATES)}", update, update in UPDATES)
        self.num_codes = num_codes
        self.code_dim = code_dim
        self.decay = decay
        self._usage_decay = usage_decay
        self.eps = eps
        self.metric = metric
        self.init = init
        self.init_iterations = init_iterations
        self.revive_below = revive_below
        self.update = update
        # On the host, so that asking costs no synchronization; and as a buffer, which DistributedDataParallel copies to all
        # processes with the codes that only one of them may have loaded.
        self._awaits_data = init != "uniform"
        if self._awaits_data:
            self.register_buffer("_no_codes", torch.ones((), dtype=torch.bool), persistent=False)
        self._pending: tuple[Tensor, Tensor] | None = None
        self._vectors: tuple[Tensor, Tensor] | None = None

        codebook = self._normalized(self._first_codes(books))
        if learned or decay is None:
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
        if self.follows:
            self.register_buffer("counts", torch.ones(codebook.shape[:-1]))
            self.register_buffer("sums", codebook.clone())
        if revive_below > 0:
            self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))

    @property
    def follows(self) -> bool:
        """Whether training steps gather statistics."""
        return self.decay is not None or self.revive_below > 0

    @property
    def revives(self) -> bool:
        """Whether an update replaces dead codes."""
        return self.revive_below > 0

    @property
    def usage_decay(self) -> float:
        """Of the moving averages, whether or not the codes follow them."""
        return self._usage_decay if self.decay is None else self.decay

    @property
    def books(self) -> Tensor:
        """The codebooks as [books, K, D]."""
        return self.codebook if self.codebook.dim() == 3 else self.codebook.unsqueeze(0)

    def _first_codes(self, books: int | None) -> Tensor:
        """What the codebooks start as, before any vector is seen."""
        shape = [self.num_codes, self.code_dim] if books is None else [books, self.num_codes, self.code_dim]
        return torch.empty(shape).uniform_(-1 / self.num_codes, 1 / self.num_codes)

    def _normalized(self, codes: Tensor) -> Tensor:
        return F.normalize(codes, dim=-1, eps=1e-6) if self.metric == "cosine" else codes

    @torch.no_grad()
    def set_codes(self, codes: Tensor, counts: Tensor | None = None) -> None:
        """Set the codebooks [(books,) K, D], and the averages as if each code had `counts` vectors, all equal to it (None: one)."""
        codes = self._normalized(codes.to(self.codebook)).reshape(self.codebook.shape)
        self.codebook.copy_(codes)
        if self.follows:
            self.counts.copy_(torch.ones_like(self.counts) if counts is None else counts.reshape(self.counts.shape))
            self.sums.copy_(codes * self.counts.unsqueeze(-1))
        self._has_codes()

    def _has_codes(self) -> None:
        self._awaits_data = False
        if self.init != "uniform":
            self._no_codes.fill_(False)

    @torch.compiler.disable(reason="the codes start from data: call init_codes, or take the first training step, without torch.compile")
    @torch.no_grad()
    def _start_from(self, vectors: Tensor, valid: Tensor | None) -> None:
        """`_init_from` in the first training step, unless there are codes."""
        if self._no_codes:
            self._init_from(vectors, valid)
        else:
            self._awaits_data = False

    @torch.no_grad()
    def _init_from(self, vectors: Tensor, valid: Tensor | None) -> None:
        """Set the codebooks from vectors [books, outer, D, inner], of which `valid` [books, outer, inner] are meant, alike in
        every book, as `init` says; without any vector they stay.
        """
        found = self._codes_from(vectors, valid)
        if found is not None:
            self.set_codes(*found)

    def _codes_from(self, vectors: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
        """The codes [books, K, D] that `_init_from` sets, and how many vectors each has; None without any vector."""
        rows = vectors.detach().movedim(2, -1).flatten(1, 2)
        rows = rows if valid is None else rows[:, valid[0].flatten()]
        limit = self.num_codes * _KMEANS_VECTORS
        joint = self.synchronized and world_size() > 1
        rows, seed = _joined(rows, limit if self.init == "kmeans" else None, joint)
        if rows.shape[1] == 0:
            return None
        generator = torch.Generator(rows.device).manual_seed(seed)
        if self.init == "kmeans":
            found = kmeans(
                rows,
                self.num_codes,
                iterations=self.init_iterations,
                metric=self.metric,
                heads=True,
                generator=generator,
            )
            # A code without vectors of its own counts as one vector, lest the averages take it to the origin.
            codes, counts = found.codebook, found.counts.clamp(min=1)
        else:
            order = torch.rand(rows.shape[:2], generator=generator, device=rows.device).argsort(1)
            drawn = order[:, torch.arange(self.num_codes, device=rows.device) % rows.shape[1]]
            codes, counts = rows.gather(1, drawn.unsqueeze(-1).expand(-1, -1, rows.shape[2])), None
        if joint:  # machines may round differently
            codes = sum_over_processes(codes if dist.get_rank() == 0 else torch.zeros_like(codes), None)
            counts = counts if counts is None else sum_over_processes(counts if dist.get_rank() == 0 else torch.zeros_like(counts), None)
        return codes, counts

    @torch.no_grad()
    def observe(self, x: Tensor, indices: Tensor, vectors: Tensor, assigned: Tensor, update: str, weights: Weights | None = None) -> None:
        """Take the vectors of a training step into account.

        Args:
            x, indices: [outer, D, inner] and [outer, inner], numbered over all books: code k of book b is b * K + k.
            vectors, assigned: the same as [books, outer, D, inner] and [books, outer, inner].
            update: one of UPDATES.
            weights: `code_weights` of `update_codebooks`.
        """
        if not self.follows or update == "none":
            return
        books = self.books
        impl = choose_impl("code_statistics", None, statistics_unavailable(x.device, x.dtype))
        counts, sums = statistics(x.detach(), indices, books.shape[0] * self.num_codes, None, None, impl)
        batch = counts.view(books.shape[:2]), sums.view(books.shape)
        self.gather_statistics(*batch, vectors, assigned)
        if update == "step":
            _update([self], weights)

    def gather_statistics(self, counts: Tensor, sums: Tensor, vectors: Tensor, assigned: Tensor) -> None:
        """Add to what the next update takes: counts [books, K], sums [books, K, D], and the vectors it may revive codes from."""
        if self._pending is not None:
            counts, sums = self._pending[0] + counts, self._pending[1] + sums
        self._pending = counts, sums
        if self.revive_below > 0:
            self._vectors = vectors.detach(), assigned

    def _follow(self, counts: Tensor, sums: Tensor, weights: Weights | None) -> None:
        """The moving averages; counts [books, K], sums [books, K, D]."""
        counts = counts.reshape(self.counts.shape).to(self.counts.dtype)
        sums = sums.reshape(self.sums.shape).to(self.sums.dtype)
        share = (1 - self.usage_decay) * (counts.sum(-1, keepdim=True) > 0).to(counts)  # without a vector, all stays
        if weights is not None:
            share = share * (weights(sums, counts) if callable(weights) else weights).to(counts)
        self.counts.lerp_(counts, share)
        self.sums.lerp_(sums, share.unsqueeze(-1))

    @torch.no_grad()
    def _take_averages(self) -> None:
        """Set the codes to what the moving averages say."""
        total = self.counts.sum(-1, keepdim=True)
        smoothed = (self.counts + self.eps) / (total + self.num_codes * self.eps) * total
        torch.div(self.sums, smoothed.unsqueeze(-1), out=self.codebook)
        if self.metric == "cosine":
            self.codebook.copy_(self._normalized(self.codebook))

    def number_of_vectors(self) -> Tensor:
        """[books], int64: the vectors of the last training step that codes may be revived from."""
        if self._vectors is None:
            return torch.zeros(len(self.books), dtype=torch.int64, device=self.sums.device)
        return self._valid_of(self._vectors[1]).flatten(1).sum(1)

    def _valid_of(self, assigned: Tensor) -> Tensor:
        """Which positions each book may revive its codes from, [books, outer, inner]."""
        return assigned >= 0

    def _candidates(self, before: Tensor, total: Tensor) -> Tensor:
        """For every code one of the vectors that all processes have, zeros where another process has it: [books, K, 1 + D].

        Component 0 is 1 where there is a vector. The vectors drawn stand evenly spaced in the joined batch, from a start that
        changes from step to step without a random number: each is drawn once at most, and all processes draw the same.

        Args:
            before, total: [books], int64: vectors of the processes before this one, and of all.
        """
        if self._vectors is None or self._vectors[1].numel() == 0:
            return self.sums.new_zeros(*self.books.shape[:2], 1 + self.code_dim)
        vectors, assigned = self._vectors
        valid = self._valid_of(assigned).flatten(1)  # [books, N]
        k = torch.arange(self.num_codes, device=vectors.device)
        step = self.num_updates.double()
        start, shift = (step * _GOLDEN) % 1, ((step * _SQRT2) % 1 * self.num_codes).long()
        stratum = (k + shift) % self.num_codes
        strata = total.clamp(max=self.num_codes).unsqueeze(1)
        position = ((stratum + start) * (total.unsqueeze(1) / strata.clamp(min=1).double())).long() - before.unsqueeze(1)
        mine = (stratum < strata) & (position >= 0) & (position < valid.sum(1, keepdim=True))
        row = torch.searchsorted(valid.cumsum(1), position.clamp(min=0) + 1).clamp(max=valid.shape[1] - 1)
        drawn = self._vectors_at(row, vectors, assigned).to(self.sums.dtype)
        mine = mine & drawn.isfinite().all(-1)
        return torch.cat([mine.unsqueeze(-1).to(drawn), torch.where(mine.unsqueeze(-1), drawn, 0)], -1)

    def _vectors_at(self, row: Tensor, vectors: Tensor, assigned: Tensor) -> Tensor:
        """The vectors [books, K, D] at the positions `row` [books, K] of what `gather_statistics` was given."""
        book = torch.arange(vectors.shape[0], device=vectors.device).unsqueeze(1)
        inner = vectors.shape[3]
        return vectors.movedim(2, -1)[book, row // inner, row % inner]

    def _revive(self, candidates: Tensor) -> None:
        """Put candidates [books, K, 1 + D] in the place of codes with few vectors."""
        codes = self._normalized(candidates[..., 1:]).reshape(self.sums.shape)
        dead = (self.counts < self.revive_below) & (candidates[..., 0] > 0).reshape(self.counts.shape)
        self.counts.masked_fill_(dead, self.revive_below)
        dead = dead.unsqueeze(-1)
        self.sums.copy_(torch.where(dead, codes * self.revive_below, self.sums))
        self.codebook.copy_(torch.where(dead, codes, self.codebook))
        self.num_updates += 1

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        if self.revive_below > 0 and prefix + "counts" in state_dict:  # averages of a layer without revival
            state_dict.setdefault(prefix + "num_updates", torch.zeros_like(self.num_updates))
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "codebook" in state_dict:
            self._has_codes()
            self._pending = self._vectors = None
            if self.follows and prefix + "sums" not in state_dict:  # averages of other codes
                self.counts.fill_(1)
                self.sums.copy_(self.codebook.detach())

    def check_code_weights(self, weights: Weights | None) -> None:
        if isinstance(weights, Tensor):
            each = list(self.codebook.shape[:-1])
            rule = f"code_weights must have shape {each}" + (f" or {each[1:]}" if len(each) > 1 else "")
            self.check(rule, list(weights.shape), list(weights.shape) in (each, each[-1:]))

    def _check_dtype(self, x: Tensor) -> None:
        dtype = self.codebook.dtype
        if x.dtype != dtype and not (dtype == torch.float32 and x.dtype in HALF_DTYPES):
            rule = "x must have the dtype of the codebook, or half precision with a float32 codebook"
            raise TypeError(f"{type(self).__name__}: {rule}, got {x.dtype} and {dtype}.")

    def check(self, rule: str, value: object, holds: bool) -> None:
        if not holds:
            raise ValueError(f"{type(self).__name__}: {rule}, got {value!r}.")


def update_codebooks(module: nn.Module, *, code_weights: Weights | None = None) -> None:
    """Update all codebooks in a module from the statistics that their training steps gathered with update="accumulate".

    Under torch.distributed every process must call it on the same module: the statistics of all layers are summed over the
    processes in one all_reduce, whether or not a process has seen a vector. Layers that revive codes also gather the number
    of each process's vectors first, so that all draw the same. The averages of a layer of which no process has seen a
    vector stay as they are, and so does a layer with update="none".

    Call it after backward, which needs the codes that the step was quantized with.

    Args:
        module: with VectorQuantizer or ResidualVectorQuantizer in it, or one of them.
        code_weights: [K] or [books, K], multiplies 1 - decay for each code; or a function that returns it for the sums and
            the counts of the joined batch.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, Codebooks) and layer.follows and layer.update != "none"]
    for layer in layers:
        layer.check_code_weights(code_weights)
    for synchronized in (True, False):
        _update([layer for layer in layers if layer.synchronized == synchronized], code_weights)


@torch.no_grad()
def _update(layers: list[Codebooks], code_weights: Weights | None, *, write: bool | None = None) -> None:
    """Update layers that are all `synchronized`, or none is; `write` the averages to the codes, or where there is a decay."""
    joint = world_size() > 1 and bool(layers) and layers[0].synchronized
    parts = _gathered(layers, joint)
    if joint:
        joined = sum_over_processes(torch.cat([part.reshape(-1) for part in parts]), None)
        parts = [flat.view(part.shape) for flat, part in zip(joined.split([part.numel() for part in parts]), parts, strict=True)]
    for layer in layers:
        layer._follow(parts.pop(0), parts.pop(0), code_weights)
        if write or (write is None and layer.decay is not None):
            layer._take_averages()
        if layer.revives:
            layer._revive(parts.pop(0))


def _gathered(layers: list[Codebooks], joint: bool) -> list[Tensor]:
    """Counts, sums, and candidates for revival of this process, layer by layer."""
    offsets = _offsets([layer.number_of_vectors() for layer in layers if layer.revives], joint)
    parts = []
    for layer in layers:
        books = layer.books
        batch = layer._pending or (layer.counts.new_zeros(books.shape[:2]), layer.sums.new_zeros(books.shape))
        batch = [*batch, layer._candidates(*offsets.pop(0))] if layer.revives else batch
        # Of one dtype on every process, whether it has seen a vector or not.
        parts += [part.to(accumulator_dtype(layer.sums.dtype)) for part in batch]
        layer._pending = layer._vectors = None
    return parts


def _offsets(numbers: list[Tensor], joint: bool) -> list[tuple[Tensor, Tensor]]:
    """How many vectors the processes before this one have, and all of them, for this one's `numbers` [books] of every layer."""
    if not joint or not numbers:
        return [(torch.zeros_like(number), number) for number in numbers]
    rank, lengths = dist.get_rank(), [len(number) for number in numbers]
    mine = torch.cat(numbers)
    everyone = mine.new_zeros(world_size(), len(mine))
    everyone[rank] = mine
    everyone = sum_over_processes(everyone, None)
    return list(zip(everyone[:rank].sum(0).split(lengths), everyone.sum(0).split(lengths), strict=True))


def copied(codebook: Tensor) -> Tensor:
    """A copy that backward can use after an update has written the codebook in place."""
    return _saved_copy(codebook) if torch.compiler.is_compiling() else codebook.clone()


@torch.library.custom_op("genperf::saved_copy", mutates_args=())
def _saved_copy(t: Tensor) -> Tensor:
    """A clone that torch.compile saves for backward. Clones as such it takes again there, of what the codebook has become."""
    return t.clone()


_saved_copy.register_fake(torch.empty_like)
_saved_copy.register_autograd(lambda ctx, grad: grad)


def project(linear: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer over the channels of x [outer, C, inner], where they lie."""
    weight, bias = linear.weight.to(x.dtype), None if linear.bias is None else linear.bias.to(x.dtype)
    if x.shape[2] <= 1:
        return F.linear(x.transpose(1, 2), weight, bias).transpose(1, 2)
    return F.conv1d(x, weight.unsqueeze(-1), bias)


def _joined(rows: Tensor, limit: int | None, joint: bool) -> tuple[Tensor, int]:
    """The rows [books, N, D] of all processes, or of this one alone if not `joint`, evenly spaced ones where there are more than
    `limit`; and one seed for all.
    """
    seed = int(torch.randint(2**62, ()))
    counts = [rows.shape[1]]
    if joint:
        numbers = gather_numbers([rows.shape[1], seed], None)
        counts, seed = [count for count, _ in numbers], numbers[0][1]
    total, rank = sum(counts), dist.get_rank() if len(counts) > 1 else 0
    if limit is not None and total > limit:
        starts = [sum(counts[:r]) for r in range(len(counts))]
        # Row i * total // limit for i < limit; of those, the ones between a process's start and end.
        first = [-(-start * limit // total) for start in [*starts, total]]
        picked = torch.arange(first[rank], first[rank + 1], device=rows.device) * total // limit - starts[rank]
        rows, counts = rows[:, picked], [b - a for a, b in itertools.pairwise(first)]
    if len(counts) > 1 and sum(counts) > 0:
        rows = gather_rows(rows.transpose(0, 1).contiguous(), counts, None).transpose(0, 1)
    return rows, seed
