"""Vector quantization layer: a codebook learned by gradient or by exponential moving averages."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops._dispatch import choose_impl
from ..ops._layout import as_positions, from_positions, positions_shape
from ..ops._noise import first_sample
from ..ops._precision import accumulator_dtype
from ..ops._validate import check_channel_dim, check_float, check_positions, check_tensor
from ..ops.code_entropy import code_entropy
from ..ops.nearest_code import search
from ..ops.nearest_code import unavailable as search_unavailable
from ..ops.sample_code import draw_codes
from ..ops.vector_quantize import GRADIENTS, quantize
from ..ops.vector_quantize import unavailable as quantize_unavailable
from ._codebooks import UPDATES, Codebooks, Weights, copied, project


class LossTerms(NamedTuple):
    """The terms of a quantizer's loss before their weights; scalars."""

    error: Tensor
    """Mean squared difference of the vectors and their codes, as in the commitment and codebook terms; 0 where both have no weight."""
    diversity: Tensor
    """Negative entropy of the batch's mean distribution over the codes, in nats; 0 where it has no weight."""
    orthogonal: Tensor
    """Mean squared cosine between two codes, less what a code has with itself; 0 where it has no weight."""


class VectorQuantizer(Codebooks):
    """Replaces every vector by its nearest code; van den Oord et al., "Neural Discrete Representation Learning" (2017).

    With `decay=None` the codebook is a parameter that learns from the loss. With a `decay` it is a buffer that, in
    training mode, follows moving averages of the vectors assigned to each code (appendix A.1 of the paper):

        counts.lerp_(n, 1 - decay)                                          # n [K], s [K, D]: this batch's
        sums.lerp_(s, 1 - decay)                                            # code_statistics
        smoothed = (counts + eps) / (counts.sum() + K * eps) * counts.sum()
        codebook = sums / smoothed[:, None]

    The output of a step is quantized with the codebook from before its update, and nothing waits for the device.

    Under torch.distributed n and s are summed over all processes, so that their codebooks stay equal and are those of one
    process on the joined batch: in training mode every process must take part in every step, if only with an empty batch.
    A codebook that learns by gradient stays equal by its averaged gradients (DistributedDataParallel).

    Args:
        num_codes: K.
        dim: length of the channel dimension of x.
        code_dim: D, the length of a code; None for dim / heads. Where heads * D is not dim, a linear layer before the
            search and one after it change the dimension.
        heads: parts that a vector is cut into, each quantized on its own.
        separate_codebooks: each head has a codebook of its own; otherwise all share one.
        decay: of the moving averages, 0 <= decay < 1; None for a codebook that learns by gradient.
        usage_decay: of the counts that `revive_below` looks at, where decay is None.
        eps: Laplace smoothing of the counts, positive; only with a decay.
        codebook_weight: weight of the loss term that moves codes to vectors. With a decay that term is left out.
        commitment_weight: weight of the loss term that moves vectors to codes.
        diversity_weight: weight of the negative entropy, in nats, of the batch's mean of softmax(-diversity_temperature *
            distance) over the codes, which keeps many codes in use; distance is Euclidean, or minus the cosine
            (`genperf.code_entropy`, no matrix of vectors by codes).
        diversity_temperature: see there; an inverse temperature, positive.
        orthogonal_weight: weight of the mean squared cosine between codes (Shin et al., "Translation-equivariant Image
            Quantizer", 2021), from the D x D Gram matrix. The codebook is then a parameter even with a decay, though
            averages soon take back what the optimizer did to it: the term is meant for codes that learn by gradient.
        orthogonal_used_only: count only the codes that the batch uses.
        orthogonal_max_codes: count at most this many codes, drawn at random in every step; None for all.
        gradient: "straight_through" or "rotation", as in `genperf.vector_quantize`.
        metric: "euclidean", or "cosine": vectors and codes are divided by their norms, and quantized are unit vectors.
        channel_dim: the dimension of x that holds a vector; 1 for images [B, D, H, W].
        init: "uniform" draws codes from (-1/K, 1/K), made unit vectors for "cosine". The others also do so, and replace
            the codes from the first training batch (`init_codes`), unless codes were loaded before: then no code starts
            out of reach. "data" takes random vectors of it, "kmeans" the centers that `genperf.kmeans` finds in it.
            That step waits for the device; under torch.compile(fullgraph=True) call `init_codes` before it.
        init_iterations: of k-means.
        revive_below: a code whose moving count falls below it is replaced by a vector of the batch; 0 for never. The
            vectors stand evenly spaced in the (joined) batch, from another start in every step; where there are fewer
            vectors than codes, some codes wait for a later step.
        sample_temperature: in training, draw the codes from softmax(-distance / temperature) in place of the nearest
            (`genperf.sample_code`); 0 for the nearest.
        update: "step": training steps update the codebook. "accumulate": `update_codebooks` does, once for many
            micro-batches and with one collective for all layers. "none": the averages and the codes they move stay.

    Attributes:
        codebook: [K, D], or with separate codebooks [heads, K, D]; a parameter, or with a decay a buffer.
        counts, sums: [K] and [K, D], or with heads, buffers that exist with a decay or revival; they start as ones and as
            the codebook.
        num_updates: int64, a buffer that exists with revival, which draws by it.
        project_in, project_out: the linear layers, or None.

    Raises:
        ValueError: an argument outside its range.
    """

    # The logarithms of the diversity term take no smaller probabilities than this.
    _diversity_epsilon = 0.0

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
        gradient: str = "straight_through",
        metric: str = "euclidean",
        channel_dim: int = -1,
        init: str = "uniform",
        init_iterations: int = 10,
        revive_below: float = 0.0,
        sample_temperature: float = 0.0,
        update: str = "step",
    ) -> None:
        self.check("dim must be at least 1", dim, dim >= 1)
        self.check("heads must be at least 1", heads, heads >= 1)
        if code_dim is None:
            self.check("dim must be divisible by heads where code_dim is not given", (dim, heads), dim % heads == 0)
            code_dim = dim // heads
        for name, weight in (
            ("codebook_weight", codebook_weight),
            ("commitment_weight", commitment_weight),
            ("diversity_weight", diversity_weight),
            ("orthogonal_weight", orthogonal_weight),
            ("sample_temperature", sample_temperature),
        ):
            self.check(f"{name} must not be negative", weight, weight >= 0)
        self.check("diversity_temperature must be positive", diversity_temperature, diversity_temperature > 0)
        codes_left = orthogonal_max_codes is None or orthogonal_max_codes >= 2
        self.check("orthogonal_max_codes must be None or at least 2", orthogonal_max_codes, codes_left)
        self.check(f"gradient must be one of {', '.join(GRADIENTS)}", gradient, gradient in GRADIENTS)
        super().__init__(
            num_codes,
            code_dim,
            books=heads if separate_codebooks else None,
            decay=decay,
            usage_decay=usage_decay,
            eps=eps,
            metric=metric,
            init=init,
            init_iterations=init_iterations,
            revive_below=revive_below,
            learned=orthogonal_weight > 0,
            update=update,
        )
        self.dim = dim
        self.heads = heads
        self.codebook_weight = codebook_weight if decay is None else 0.0
        self.commitment_weight = commitment_weight
        self.diversity_weight = diversity_weight
        self.diversity_temperature = diversity_temperature
        self.orthogonal_weight = orthogonal_weight
        self.orthogonal_used_only = orthogonal_used_only
        self.orthogonal_max_codes = orthogonal_max_codes
        self.gradient = gradient
        self.channel_dim = channel_dim
        self.sample_temperature = sample_temperature
        projects = heads * code_dim != dim
        self.project_in = nn.Linear(dim, heads * code_dim) if projects else None
        self.project_out = nn.Linear(heads * code_dim, dim) if projects else None

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        update: str | None = None,
        code_weights: Weights | None = None,
        return_terms: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, LossTerms]:
        """Quantize x.

        Args:
            x: [..., D, ...], of the codebook's dtype, or half precision with a float32 codebook; the linear layers then
                compute in x's dtype.
            mask: bool, x's shape without channel_dim; where False a vector is left out: quantized 0, index -1, no part
                in loss, gradients and moving averages.
            lengths: int64 or int32, [B], in place of a mask: of row i of x [B, T, D] (or [B, D, T]) the first lengths[i] vectors count.
            update: in place of the attribute `update`.
            code_weights: as in `update_codebooks`.
            return_terms: also return the terms of the loss.

        Returns:
            quantized, of x's shape and dtype; indices, int64, x's shape without channel_dim, with a last dimension of heads
            where there are several; loss, a scalar (see `genperf.vector_quantize`, plus the weighted diversity and
            orthogonal terms); with return_terms, `LossTerms`.

        Raises:
            ValueError, TypeError: arguments that do not fit; the codebook has not changed then.
        """
        mask = self._checked_mask(x, mask, lengths)
        update = self.update if update is None else update
        self.check(f"update must be one of {', '.join(UPDATES)}", update, update in UPDATES)
        self.check_code_weights(code_weights)
        updates = self.training and self.follows and update != "none"
        vectors, valid = self._split(x, mask)
        if self.training and self._awaits_data:
            self._start_from(vectors, valid)

        # Backward still needs these codes after the update has written the new ones in place.
        books = self._books_in_use(copied(self.codebook) if updates and update == "step" else self.codebook)
        assigned = self._assign(vectors, books, valid, self.sample_temperature if self.training else 0.0, self._first_vector(vectors, x))
        folded, indices = _fold(vectors), _fold(self._numbered(assigned))
        weights = self.codebook_weight, self.commitment_weight
        codes = (books if self.codebook_weight > 0 else books.detach()).flatten(0, 1)
        impl = choose_impl("vector_quantize", None, quantize_unavailable(x.device, folded.dtype), folded, codes)
        quantized, loss = quantize(folded, codes, indices, *weights, self.gradient, impl)
        diversity, orthogonal = self._diversity(vectors, books, valid), self._orthogonality(books, assigned)
        terms = LossTerms(loss / (sum(weights) or 1.0), diversity, orthogonal)
        loss = loss + self.diversity_weight * terms.diversity + self.orthogonal_weight * terms.orthogonal
        if updates:
            self.observe(folded, indices, vectors, assigned, update, code_weights)
        outputs = self._merged(quantized, x, mask), self._positions_of(assigned, x), loss
        return (*outputs, terms) if return_terms else outputs

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Indices of the nearest codes of x as `forward` returns them, without loss, gradients or an update of the codebook."""
        with torch.no_grad():
            mask = self._checked_mask(x, mask, None)
            vectors, valid = self._split(x, mask)
            return self._positions_of(self._assign(vectors, self._books_in_use(self.codebook), valid), x)

    def decode(self, indices: Tensor) -> Tensor:
        """What `forward` returns as `quantized` for these indices, of the codebook's dtype; zeros where an index is -1.

        Differentiable in a learned codebook and in the projection.

        Raises:
            TypeError: indices that are not int64.
        """
        codes = self.codes_of(indices)
        if self.project_out is not None:
            present = indices if self.heads == 1 else indices[..., 0]
            codes = torch.where((present >= 0).unsqueeze(-1), self.project_out(codes), 0)
        return codes.movedim(-1, self.channel_dim).contiguous()

    def codes_of(self, indices: Tensor) -> Tensor:
        """The codes of `indices`, [..., heads * D], before project_out; zeros where an index is -1."""
        if indices.dtype != torch.int64:
            raise TypeError(f"{type(self).__name__}.decode: indices must be int64, got {indices.dtype}.")
        books = self._books_in_use(self.codebook)
        indices = indices.unsqueeze(-1) if self.heads == 1 else indices
        first = torch.arange(len(books), device=indices.device) * self.num_codes  # of each head, or one for all
        codes = F.embedding(indices.clamp(min=0) + first, books.flatten(0, 1))
        return torch.where(indices.unsqueeze(-1) >= 0, codes, 0).flatten(-2)

    @torch.no_grad()
    def init_codes(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Set the codes from the vectors of x as `init` says ("uniform": as "data"), with torch's default generator for a seed.

        "data": random vectors, each drawn once before any is drawn twice. Where x has no vector (the mask is False
        everywhere) the codes stay. Under torch.distributed every process must call it; all end with the same codes, those of
        the joined batch with the seed of process 0.
        """
        self._init_from(*self._split(x, self._checked_mask(x, mask, None)))

    def usage(self) -> "CodeUsage":
        """How the moving averages of the training steps use the codebook; of all books together where there are several.

        A code is in use where its averaged count reaches revive_below, or without revival is not 0.
        """
        self.check("usage is of the moving averages: it needs a decay or revive_below", self.decay, self.follows)
        return _usage_of(self.counts.double().flatten(), max(self.revive_below, torch.finfo(torch.float32).tiny))

    def _checked_mask(self, x: Tensor, mask: Tensor | None, lengths: Tensor | None) -> Tensor | None:
        """The mask of x's positions that `mask` or `lengths` stand for."""
        name = type(self).__name__
        check_tensor(name, "x", x)
        channel = check_channel_dim(name, x, self.channel_dim)
        check_float(name, "x", x)
        self.check(f"x must have {self.dim} channels in dimension {self.channel_dim}", list(x.shape), x.shape[channel] == self.dim)
        self._check_dtype(x)
        if lengths is not None:
            check_tensor(name, "lengths", lengths)
            self.check("only one of mask and lengths can be given", "both", mask is None)
            self.check("with lengths, x must be [B, T, D] or [B, D, T]", list(x.shape), x.dim() == 3 and channel != 0)
            fits = lengths.shape == x.shape[:1] and lengths.dtype in (torch.int64, torch.int32)
            self.check("lengths must hold an integer for each row of x", (list(lengths.shape), lengths.dtype), fits)
            steps = torch.arange(x.shape[3 - channel], device=x.device)
            mask = steps < lengths.unsqueeze(1)
        if mask is not None:
            check_tensor(name, "mask", mask)
            if mask.dtype != torch.bool:
                raise TypeError(f"{name}: mask must be bool, got {mask.dtype}.")
            check_positions(name, "mask", mask, x, channel)
        return mask

    def _split(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The vectors that are searched, [books, outer, D, inner], and which of them are valid, [books, outer, inner]."""
        channel = self.channel_dim % x.dim()
        if mask is not None and (self.project_in is not None or self.metric == "cosine"):
            x = torch.where(mask.unsqueeze(channel), x, 0)  # else what is masked could make gradients NaN
        positions = as_positions(x, channel)
        if positions.stride(1) == 1 and (self.heads > 1 or self.project_in is not None):
            positions = positions.transpose(1, 2).flatten(0, 1).unsqueeze(2)  # which to cut, or to project, takes no copy
        outer, _, inner = positions.shape
        if self.project_in is not None:
            positions = project(self.project_in, positions)
        vectors = self._by_book(positions.reshape(outer * self.heads, self.code_dim, inner))
        if self.metric == "cosine":
            vectors = F.normalize(vectors, dim=2, eps=1e-6)
        if mask is not None:
            mask = mask.reshape(outer, 1, inner).expand(-1, self.heads, -1)
            mask = self._by_book(mask.reshape(outer * self.heads, inner))
        return vectors, mask

    def _by_book(self, t: Tensor) -> Tensor:
        """View t [outer * heads, ...] as [books, outer or outer * heads, ...]."""
        books = len(self.books)
        return t.unflatten(0, (t.shape[0] // books, books)).transpose(0, 1)

    def _books_in_use(self, codebook: Tensor) -> Tensor:
        """[books, K, D], as the search sees them; a buffer holds unit vectors for "cosine", a parameter need not."""
        codebook = codebook if codebook.dim() == 3 else codebook.unsqueeze(0)
        return self._normalized(codebook) if isinstance(self.codebook, nn.Parameter) else codebook

    def _assign(self, vectors: Tensor, books: Tensor, valid: Tensor | None, temperature: float = 0.0, first: int = 0) -> Tensor:
        """The codes [books, outer, inner] of the vectors, drawn with the noise of the vectors first, first + 1, ... of a larger batch."""
        vectors, books = vectors.detach(), books.detach()
        if temperature > 0:
            logits = "dot" if self.metric == "cosine" else "distance"
            return draw_codes(vectors, books, temperature, logits, 2, valid, first=first)
        impl = choose_impl("nearest_code", None, search_unavailable(vectors.device, vectors.dtype))
        return search(vectors, books, valid, self.metric, impl)

    def _first_vector(self, vectors: Tensor, x: Tensor) -> int:
        """The number, in each book, of the first vector of the sample that `genperf.sample_offset` names."""
        batch = 0 if self.channel_dim % x.dim() == 0 else x.shape[0]
        return first_sample() * (vectors.shape[1] * vectors.shape[3] // batch) if batch > 0 else 0

    def _numbered(self, assigned: Tensor) -> Tensor:
        """The codes [books, outer, inner], numbered over all books."""
        if len(assigned) == 1:
            return assigned
        first = torch.arange(len(assigned), device=assigned.device) * self.num_codes
        return torch.where(assigned < 0, -1, assigned + first.view(-1, 1, 1))

    def _diversity(self, vectors: Tensor, books: Tensor, valid: Tensor | None) -> Tensor:
        """Negative entropy of the mean distribution over the codes; 0 outside training and without a weight."""
        if not (self.training and self.diversity_weight > 0):
            return books.new_zeros(())
        _, entropy = code_entropy(
            vectors,
            books,
            temperature=1 / self.diversity_temperature,
            logits="dot" if self.metric == "cosine" else "distance",
            channel_dim=2,
            mask=valid,
            epsilon=self._diversity_epsilon,
        )
        return -entropy.mean()

    def _orthogonality(self, books: Tensor, assigned: Tensor) -> Tensor:
        """Mean squared cosine of two codes, from the sum of squares of the Gram matrix of dimensions; 0 as `_diversity`."""
        if not (self.training and self.orthogonal_weight > 0):
            return books.new_zeros(())
        books = books.to(accumulator_dtype(books.dtype))
        counted = books.new_ones(books.shape[:2])
        if self.orthogonal_used_only:
            # Slot 0 takes the masked ones.
            counted = F.pad(torch.zeros_like(counted), (1, 0)).scatter(1, assigned.flatten(1) + 1, 1.0)[:, 1:]
        if self.orthogonal_max_codes is not None and self.orthogonal_max_codes < self.num_codes:
            keys = torch.rand_like(counted) * counted
            counted = counted * (keys >= keys.topk(self.orthogonal_max_codes, dim=1).values[:, -1:])
        codes = F.normalize(books, dim=-1, eps=1e-6) * counted.unsqueeze(-1)
        number = counted.sum(1)
        with torch.autocast(books.device.type, enabled=False):  # squares of up to K codes exceed float16
            gram = codes.transpose(1, 2) @ codes
        squares = gram.square().sum((1, 2)) - number  # without those of a code and itself
        return (squares / number.clamp(min=1).square()).mean()

    def _merged(self, quantized: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        """The quantized vectors [outer * heads, D, inner] in the shape of x."""
        channel = self.channel_dim % x.dim()
        quantized = quantized.reshape(quantized.shape[0] // self.heads, self.heads * self.code_dim, quantized.shape[2])
        if self.project_out is not None:
            quantized = project(self.project_out, quantized)
        quantized = from_positions(quantized, x, channel).to(x.dtype)
        return quantized if mask is None or self.project_out is None else torch.where(mask.unsqueeze(channel), quantized, 0)

    def _positions_of(self, assigned: Tensor, x: Tensor) -> Tensor:
        """The codes [books, outer, inner] in the shape of x without its channels, and heads last."""
        sizes = positions_shape(x, self.channel_dim % x.dim())
        if self.heads == 1:
            return assigned.reshape(sizes)
        by_head = _fold(assigned).unflatten(0, (-1, self.heads)) if assigned.numel() else assigned
        return by_head.movedim(1, -1).reshape(*sizes, self.heads)

    def extra_repr(self) -> str:
        return f"{self.num_codes}, {self.dim}, decay={self.decay}, metric={self.metric!r}, channel_dim={self.channel_dim}"


def _fold(t: Tensor) -> Tensor:
    """View t [books, outer, ...] as [outer * books, ...]."""
    return t.squeeze(0) if len(t) == 1 else t.transpose(0, 1).flatten(0, 1)


class CodeUsage(NamedTuple):
    """How a set of indices uses a codebook; scalars on the device of the indices."""

    perplexity: Tensor
    """exp of the entropy of the codes' frequencies: the number of codes that, used evenly, would carry as much; 0 without indices."""
    used: Tensor
    """Number of codes that occur."""
    dead: Tensor
    """Share of the codes that do not occur."""


def code_usage(indices: Tensor, num_codes: int) -> CodeUsage:
    """Perplexity and number of the codes in use, and the share of the others.

    Equivalent to:
        frequency = torch.bincount(indices.flatten(), minlength=num_codes) / indices.numel()
        perplexity, used = torch.special.entr(frequency).sum().exp(), (frequency > 0).sum()
        dead = 1 - used / num_codes

    Args:
        indices: int64 of any shape, -1 ... num_codes - 1; -1 (a masked vector) is left out.
        num_codes: K.

    Returns:
        perplexity, float64; used, int64; dead, float32.
    """
    if indices.dtype != torch.int64:
        raise TypeError(f"code_usage: indices must be int64, got {indices.dtype}.")
    if num_codes < 1:
        raise ValueError(f"code_usage: num_codes must be at least 1, got {num_codes}.")
    flat = indices.reshape(-1)
    # Slot 0 takes the masked ones. Not bincount, which waits for the device to size its result.
    counts = torch.zeros(num_codes + 1, dtype=torch.float64, device=indices.device)
    counts = counts.scatter_add(0, flat + 1, counts.new_ones(flat.shape))[1:]
    return _usage_of(counts, 1)


def _usage_of(counts: Tensor, least: float) -> CodeUsage:
    """The usage that float64 counts [K] show; a code occurs where its count is at least `least`."""
    total = counts.sum()
    entropy = torch.special.entr(counts / total.clamp(min=torch.finfo(torch.float64).tiny)).sum()
    used = (counts >= least).sum()
    return CodeUsage(torch.where(total > 0, entropy.exp(), 0), used, 1 - used / counts.numel())
