"""Residual vector quantization layer: several levels of codebooks, each for what the levels before it leave."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops._dispatch import choose_impl
from ..ops._layout import as_positions, from_positions, positions_shape
from ..ops._precision import accumulator_dtype
from ..ops.nearest_code import search
from ..ops.nearest_code import unavailable as search_unavailable
from ..ops.residual_vector_quantize import quantize_residual, residual_code_statistics
from ..ops.vector_quantize import GRADIENTS
from ._codebooks import UPDATES, Codebooks, Weights, _update, copied, project
from .vector_quantizer import VectorQuantizer


class ResidualVectorQuantizer(Codebooks):
    """Writes every vector as a sum of codes, one of each level; Zeghidour et al., "SoundStream" (2021).

    Level i quantizes the residual of level i - 1 (`genperf.residual_vector_quantize`: all levels in one op). The codebooks
    learn as those of `VectorQuantizer` do, by the gradient of the losses or, with a `decay`, by moving averages of the
    residuals that each code was given; the step is quantized with the codes from before its update, nothing waits for the
    device, and under torch.distributed the codebooks of all levels are summed in one all_reduce.

    Args:
        num_levels: Q.
        num_codes: K, of each level.
        dim: length of the channel dimension of x.
        code_dim: D, the length of a code; None for dim / groups. Where groups * D is not dim, a linear layer before the
            first level and one after the last change the dimension.
        groups: parts that a vector is cut into, each with Q levels of its own (Yang et al., "HiFi-Codec", 2023).
        shared_codebook: one codebook for all levels (of a group).
        level_dropout: in every training step, run only a first part of the levels (quantizer dropout): what is decoded
            from a prefix of the levels then is of use. All numbers of levels are as likely. A level that was not run is not
            updated.
        dropout_min_levels: the fewest levels that a step runs.
        dropout_multiple_of: round the number of levels up to a multiple of this, or to Q.
        dropout_seed: the numbers follow from it and from how many training steps there were, and so are the same on all
            processes.
        decay, usage_decay, eps, codebook_weight, commitment_weight, revive_below, update: as `VectorQuantizer`. A code is
            revived by a residual that its level was given.
        gradient: "straight_through" or "rotation", once from x to the sum of the codes.
        metric: "euclidean"; or "cosine": a residual takes the code whose direction is most like its own, and codes are unit
            vectors.
        channel_dim: the dimension of x that holds a vector.
        init, init_iterations: as `VectorQuantizer`, level by level on the residuals; a shared codebook on the vectors.

    Attributes:
        codebook: [groups * Q, K, D], group by group, or with a shared codebook [groups, K, D]; a parameter, or with a decay
            a buffer.
        counts, sums: [groups * Q, K] and [groups * Q, K, D], buffers that exist with a decay or revival.
        project_in, project_out: the linear layers, or None.

    Raises:
        ValueError: an argument outside its range.
    """

    def __init__(
        self,
        num_levels: int,
        num_codes: int,
        dim: int,
        *,
        code_dim: int | None = None,
        groups: int = 1,
        shared_codebook: bool = False,
        level_dropout: bool = False,
        dropout_min_levels: int = 1,
        dropout_multiple_of: int = 1,
        dropout_seed: int = 0,
        decay: float | None = None,
        usage_decay: float = 0.99,
        eps: float = 1e-5,
        codebook_weight: float = 1.0,
        commitment_weight: float = 0.25,
        gradient: str = "straight_through",
        metric: str = "euclidean",
        channel_dim: int = -1,
        init: str = "uniform",
        init_iterations: int = 10,
        revive_below: float = 0.0,
        update: str = "step",
    ) -> None:
        self.check("num_levels must be at least 1", num_levels, num_levels >= 1)
        self.check("dim must be at least 1", dim, dim >= 1)
        self.check("groups must be at least 1", groups, groups >= 1)
        if code_dim is None:
            self.check("dim must be divisible by groups where code_dim is not given", (dim, groups), dim % groups == 0)
            code_dim = dim // groups
        self.check("codebook_weight must not be negative", codebook_weight, codebook_weight >= 0)
        self.check("commitment_weight must not be negative", commitment_weight, commitment_weight >= 0)
        self.check(f"gradient must be one of {', '.join(GRADIENTS)}", gradient, gradient in GRADIENTS)
        self.check(f"dropout_min_levels must lie in 1 ... {num_levels}", dropout_min_levels, 1 <= dropout_min_levels <= num_levels)
        self.check("dropout_multiple_of must be at least 1", dropout_multiple_of, dropout_multiple_of >= 1)
        super().__init__(
            num_codes,
            code_dim,
            books=groups if shared_codebook else groups * num_levels,
            decay=decay,
            usage_decay=usage_decay,
            eps=eps,
            metric=metric,
            init=init,
            init_iterations=init_iterations,
            revive_below=revive_below,
            learned=False,
            update=update,
        )
        self.num_levels = num_levels
        self.dim = dim
        self.groups = groups
        self.shared_codebook = shared_codebook
        self.level_dropout = level_dropout
        self.dropout_min_levels = dropout_min_levels
        self.dropout_multiple_of = dropout_multiple_of
        self.dropout_seed = dropout_seed
        self.codebook_weight = codebook_weight if decay is None else 0.0
        self.commitment_weight = commitment_weight
        self.gradient = gradient
        self.channel_dim = channel_dim
        if level_dropout:
            self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64))
        projects = groups * code_dim != dim
        self.project_in = nn.Linear(dim, groups * code_dim) if projects else None
        self.project_out = nn.Linear(groups * code_dim, dim) if projects else None

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        levels: int | Tensor | None = None,
        update: str | None = None,
        code_weights: Weights | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize x.

        Args:
            x, mask, lengths, update, code_weights: as `VectorQuantizer.forward`.
            levels: run the first so many levels, as in `genperf.residual_vector_quantize`; None for all, or in training with
                level_dropout for a number that is drawn.

        Returns:
            quantized, of x's shape and dtype; indices, int64, x's shape without channel_dim and with a last dimension of
            levels ([..., Q]; with groups [..., groups, Q]), -1 in levels that were not run; losses [Q], whose sum belongs in
            the training loss: the means over the groups.
        """
        mask = self._checked_mask(x, mask, lengths)
        update = self.update if update is None else update
        self.check(f"update must be one of {', '.join(UPDATES)}", update, update in UPDATES)
        self.check_code_weights(code_weights)
        updates = self.training and self.follows and update != "none"
        if self.training and self.level_dropout:
            levels = self._drawn_levels() if levels is None else levels
            self.num_steps += 1
        parts, valid = self._split(x, mask)
        if self.training and self._awaits_data:
            self._start_from(_stacked(parts), None if valid is None else valid.expand(self.groups, *valid.shape))

        # Backward still needs these codes after the update has written the new ones in place.
        books = self._levels_of(copied(self.codebook) if updates and update == "step" else self.codebook)
        quantized, indices, losses = zip(*(self._quantize(*pair, valid, levels) for pair in zip(parts, books, strict=True)), strict=True)
        if updates:
            self._observe_levels(parts, books.detach(), indices, update, code_weights)
        return self._merged(quantized, x, mask), self._positions_of(indices, x), torch.stack(losses).mean(0)

    def encode(self, x: Tensor, mask: Tensor | None = None, *, levels: int | Tensor | None = None) -> Tensor:
        """Indices of x as `forward` returns them, without losses, gradients or an update of the codebooks."""
        with torch.no_grad():
            parts, valid = self._split(x, self._checked_mask(x, mask, None))
            books = self._levels_of(self.codebook)
            return self._positions_of([self._quantize(*pair, valid, levels)[1] for pair in zip(parts, books, strict=True)], x)

    def decode(self, indices: Tensor) -> Tensor:
        """What `forward` returns as `quantized` for these indices, of the codebook's dtype.

        Differentiable in learned codebooks and in the projection.

        Args:
            indices: int64, [..., q] or with groups [..., groups, q], of the first q <= Q levels; from the first -1 on, levels
                add nothing, and where it is the first level's, the result is zero.

        Raises:
            TypeError: indices that are not int64.
            ValueError: more levels or other groups than there are.
        """
        if indices.dtype != torch.int64:
            raise TypeError(f"{type(self).__name__}.decode: indices must be int64, got {indices.dtype}.")
        shape = list(indices.shape)
        fits = len(shape) > 0 and 1 <= shape[-1] <= self.num_levels and (self.groups == 1 or shape[-2:-1] == [self.groups])
        groups = f"{self.groups}, " if self.groups > 1 else ""
        self.check(f"indices must have shape [..., {groups}q] with 1 <= q <= {self.num_levels}", shape, fits)
        by_group = indices.unsqueeze(-2) if self.groups == 1 else indices
        codes = torch.cat([_sum_of_codes(*pair) for pair in zip(self._levels_of(self.codebook), by_group.unbind(-2), strict=True)], -1)
        if self.project_out is not None:
            codes = torch.where((by_group[..., :1, 0] >= 0), self.project_out(codes), 0)
        return codes.movedim(-1, self.channel_dim).contiguous()

    @torch.no_grad()
    def init_codes(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Set the codes from the vectors of x, as `VectorQuantizer.init_codes`: every level's from its residuals."""
        parts, valid = self._split(x, self._checked_mask(x, mask, None))
        self._init_from(_stacked(parts), None if valid is None else valid.expand(self.groups, *valid.shape))

    usage = VectorQuantizer.usage
    _checked_mask = VectorQuantizer._checked_mask

    def _drawn_levels(self) -> Tensor:
        """A number of levels for this step, on the device: a hash of the number of steps and the seed."""
        bits = (self.num_steps + (0x9E3779B1 * (self.dropout_seed + 1) & 0x7FFFFFFF)) & 0x7FFFFFFF
        for multiplier in (0x2C1B3C6D, 0x297A2D39):
            bits = ((bits ^ (bits >> 15)) * multiplier) & 0x7FFFFFFF
        bits = bits ^ (bits >> 15)
        levels = self.dropout_min_levels + bits % (self.num_levels - self.dropout_min_levels + 1)
        multiple = self.dropout_multiple_of
        return ((levels + multiple - 1) // multiple * multiple).clamp(max=self.num_levels)

    def _split(self, x: Tensor, mask: Tensor | None) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """The groups' vectors, each [outer, D, inner], and which are valid, [outer, inner]."""
        channel = self.channel_dim % x.dim()
        if mask is not None and self.project_in is not None:
            x = torch.where(mask.unsqueeze(channel), x, 0)  # else what is masked could make gradients NaN
        positions = as_positions(x, channel)
        valid = None if mask is None else mask.reshape(positions.shape[0], positions.shape[2])
        if self.project_in is not None:
            positions = project(self.project_in, positions)
        return positions.unflatten(1, (self.groups, self.code_dim)).unbind(1), valid

    def _levels_of(self, codebook: Tensor) -> Tensor:
        """[groups, Q, K, D], as the search sees them; a buffer holds unit vectors for "cosine", a parameter need not."""
        books = self._normalized(codebook) if isinstance(self.codebook, nn.Parameter) else codebook
        if self.shared_codebook:
            return books.unsqueeze(1).expand(-1, self.num_levels, -1, -1)
        return books.unflatten(0, (self.groups, self.num_levels))

    def _quantize(self, part: Tensor, books: Tensor, valid: Tensor | None, levels: int | Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """`residual_vector_quantize` of one group: quantized [outer, D, inner], indices [outer, inner, Q], losses."""
        return quantize_residual(
            part,
            books if self.codebook_weight > 0 else books.detach(),
            codebook_weight=self.codebook_weight,
            commitment_weight=self.commitment_weight,
            gradient=self.gradient,
            metric=self.metric,
            channel_dim=1,
            mask=valid,
            levels=levels,
        )

    @torch.no_grad()
    def _observe_levels(
        self, parts: tuple[Tensor, ...], books: Tensor, indices: tuple[Tensor, ...], update: str, weights: Weights | None
    ) -> None:
        """Take the residuals of a training step into account; `observe` for levels."""
        found = [residual_code_statistics(*group, channel_dim=1) for group in zip(parts, books, indices, strict=True)]
        counts, sums = (_stacked(each) for each in zip(*found, strict=True))  # [groups, Q, K], [groups, Q, K, D]
        assigned = _stacked(indices).movedim(-1, 1)  # [groups, Q, outer, inner]
        if self.shared_codebook:
            counts, sums = counts.sum(1), sums.sum(1)
        else:
            counts, sums = counts.flatten(0, 1), sums.flatten(0, 1)
        self.gather_statistics(counts, sums, _stacked(parts), assigned)
        if update == "step":
            _update([self], weights)

    def _valid_of(self, assigned: Tensor) -> Tensor:
        """`Codebooks._valid_of` indices [groups, Q, outer, inner]: a level's own, for a shared codebook the first's."""
        return (assigned[:, 0] if self.shared_codebook else assigned.flatten(0, 1)) >= 0

    def _vectors_at(self, row: Tensor, vectors: Tensor, assigned: Tensor) -> Tensor:
        """The residuals [books, K, D] at `row` [books, K]: of the book's level, or of all levels in turn where they share it."""
        group = torch.arange(len(row), device=row.device)
        level = torch.arange(self.num_codes, device=row.device) % self.num_levels
        if not self.shared_codebook:
            group, level = group // self.num_levels, (group % self.num_levels).unsqueeze(1)
        group = group.unsqueeze(1)
        inner = vectors.shape[3]
        residual = vectors.movedim(2, -1)[group, row // inner, row % inner].to(accumulator_dtype(vectors.dtype))
        for before, books in enumerate(self._levels_of(self.codebook).unbind(1)):  # [groups, K, D]
            index = assigned[group, before, row // inner, row % inner]
            run = ((before < level) & (index >= 0)).unsqueeze(-1)
            residual = torch.where(run, residual - books[group, index.clamp(min=0)], residual)
        return residual

    @torch.no_grad()
    def _init_from(self, vectors: Tensor, valid: Tensor | None) -> None:
        """`Codebooks._init_from` level by level: vectors [groups, outer, D, inner], valid [groups, outer, inner]."""
        residual, levels = vectors.detach().to(accumulator_dtype(vectors.dtype)), []
        for _ in range(1 if self.shared_codebook else self.num_levels):
            found = self._codes_from(residual, valid)
            if found is None:
                return
            codes, counts = self._normalized(found[0].to(residual)), found[1]
            levels.append((codes, codes.new_ones(codes.shape[:2]) if counts is None else counts))
            impl = choose_impl("nearest_code", None, search_unavailable(residual.device, residual.dtype))
            index = search(residual, codes, None, self.metric, impl)
            group = torch.arange(self.groups, device=index.device).view(-1, 1, 1)
            residual = residual - codes[group, index].transpose(2, 3)
        self.set_codes(*(torch.stack(each, 1) for each in zip(*levels, strict=True)))

    def _merged(self, quantized: tuple[Tensor, ...], x: Tensor, mask: Tensor | None) -> Tensor:
        """The groups' quantized vectors [outer, D, inner] in the shape of x."""
        channel = self.channel_dim % x.dim()
        joined = quantized[0] if self.groups == 1 else torch.cat(quantized, 1)
        if self.project_out is not None:
            joined = project(self.project_out, joined)
        joined = from_positions(joined, x, channel).to(x.dtype)
        return joined if mask is None or self.project_out is None else torch.where(mask.unsqueeze(channel), joined, 0)

    def _positions_of(self, indices: list[Tensor] | tuple[Tensor, ...], x: Tensor) -> Tensor:
        """The groups' indices [outer, inner, Q] in the shape of x without its channels, with groups and levels last."""
        sizes = positions_shape(x, self.channel_dim % x.dim())
        if self.groups == 1:
            return indices[0].reshape(*sizes, self.num_levels)
        return torch.stack(indices, 2).reshape(*sizes, self.groups, self.num_levels)

    def extra_repr(self) -> str:
        return f"{self.num_levels}, {self.num_codes}, {self.dim}, groups={self.groups}, decay={self.decay}, channel_dim={self.channel_dim}"


def _stacked(groups: tuple[Tensor, ...]) -> Tensor:
    """torch.stack, without a copy of the only one."""
    return groups[0].unsqueeze(0) if len(groups) == 1 else torch.stack(groups)


def _sum_of_codes(books: Tensor, indices: Tensor) -> Tensor:
    """Sum [..., D] of the codes of `indices` [..., q] in books [Q, K, D], the first level's first, up to an index of -1."""
    present = (indices >= 0).cumprod(-1).bool()
    total = torch.where(present[..., :1], F.embedding(indices[..., 0].clamp(min=0), books[0]), 0)
    for level in range(1, indices.shape[-1]):
        code = F.embedding(indices[..., level].clamp(min=0), books[level])
        total = torch.where(present[..., level, None], total + code, total)
    return total
