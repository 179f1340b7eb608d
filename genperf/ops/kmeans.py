"""K-means on the exact search: codebooks from data, without a matrix of distances."""

from typing import NamedTuple

import torch
from torch import Tensor

from ._dispatch import choose_impl, native_unavailable
from ._layout import as_positions, positions_shape
from ._precision import accumulator_dtype
from ._validate import check_channel_dim, check_float, check_tensor
from .code_statistics import statistics
from .nearest_code import check_metric, search
from .nearest_code import unavailable as search_unavailable

INITS = ("k-means++", "random")

# k-means||: candidates drawn for each code, and in how many rounds.
_OVERSAMPLING = 2
_DRAW_ROUNDS = 5
# Rounds in which the candidates are merged into the codes; the last ones merge all that is left to merge.
_MERGE_ROUNDS = 16
_LAST_ROUNDS = 4

# Elements of a temporary tensor.
_CHUNK = 1 << 22


class KMeansResult(NamedTuple):
    """What `kmeans` found, on x's device."""

    codebook: Tensor
    """[K, D], float32 (float64 for a float64 x); unit vectors for "cosine"."""
    indices: Tensor
    """int64, x's shape without channel_dim: each vector's nearest code in this codebook."""
    counts: Tensor
    """[K], how often each index occurs; the codebook's dtype, as `code_statistics` counts."""
    inertia: Tensor
    """Sum of the squared distances of the vectors to their codes, a float64 scalar; for "cosine" of unit vectors."""


def kmeans(
    x: Tensor,  # [..., D, ...]
    num_codes: int,
    *,
    iterations: int = 25,
    init: str | Tensor = "k-means++",
    metric: str = "euclidean",
    channel_dim: int = -1,
    heads: bool = False,
    generator: torch.Generator | None = None,
    impl: str | None = None,
) -> KMeansResult:
    """Codebook of K codes that leave little distance between the vectors of x and their nearest codes (Lloyd, 1982).

    Equivalent to (channel_dim=-1, but for empty clusters):
        codebook = init
        for _ in range(iterations):
            counts, sums = code_statistics(x, nearest_code(x, codebook), num_codes)
            codebook = sums / counts[:, None]
        indices = nearest_code(x, codebook)

    The search is exact and the sums are deterministic: one state of the generator gives one result on a device, and no
    iteration raises the inertia but by rounding. Nothing of size positions x K or K x K exists, and on CUDA nothing waits
    for the device.

    "cosine" is spherical k-means (Dhillon and Modha, 2001): vectors count with their direction only, and codes are the
    directions of their sums; a vector of zeros has none and moves no code.

    Codes without vectors move onto vectors of x, each onto another: those at which the squared distances from the codes,
    summed up in the order of the positions, reach evenly spaced shares of the inertia.

    Args:
        x: float32, bfloat16, float16 or float64, finite, at least one vector; any strides, read where it lies.
        num_codes: K. Where x has fewer than K distinct vectors, codes repeat, and all but the first of a kind stay empty.
        iterations: updates of the codebook, as many as asked for unless nothing moves.
        init: where the codes start.
            "k-means++": 2 K candidates are drawn in five rounds, in proportion to the squared distance from those before,
            which is the parallel form of k-means++ (Bahmani et al., "Scalable K-Means++", 2012). They are then merged into
            K codes where that adds least to the inertia (Ward, "Hierarchical Grouping to Optimize an Objective Function",
            1963), the best partners found by search. For the price of about ten iterations, and worth it.
            "random": random vectors of x; each is drawn once before any is drawn twice.
            A tensor [K, D] of codes.
        metric: "euclidean" or "cosine", as in `nearest_code`.
        channel_dim: the dimension of x that holds a vector; 1 for images [B, D, H, W].
        heads: dimension 0 of x is heads; each has a codebook of its own, and all results (an init tensor too) have a
            first dimension of heads. Equal to one call after the other.
        generator: of the draws of `init`, on any device; None for the default one of x's device.
        impl: None picks; "native" (on CUDA with the Triton search) and "reference" insist.

    Returns:
        codebook, indices, counts, inertia: see `KMeansResult`. Not differentiable.

    Raises:
        ValueError: no vectors, num_codes < 1, iterations < 0, an unknown init, metric or impl, an init tensor or a
            channel_dim that does not fit.
        TypeError: an unsupported dtype; a generator that is none.
        NotImplementedError: an `impl` that cannot run here.
    """
    op = "kmeans"
    check_tensor(op, "x", x)
    channel = check_channel_dim(op, x, channel_dim)
    check_float(op, "x", x)
    check_metric(op, metric)
    if heads and channel == 0:
        raise ValueError(
            f"{op}: with heads, dimension 0 of x is the heads and cannot be the channels, "
            f"got channel_dim={channel_dim} for x of shape {list(x.shape)}."
        )
    if x.numel() == 0:
        raise ValueError(f"{op}: x must hold at least one vector of at least one dimension, got shape {list(x.shape)}.")
    if num_codes < 1:
        raise ValueError(f"{op}: num_codes must be at least 1, got {num_codes}.")
    if iterations < 0:
        raise ValueError(f"{op}: iterations must not be negative, got {iterations}.")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"{op}: generator must be a torch.Generator or None, got {type(generator).__name__}.")
    _check_init(op, init, [x.shape[0]] * heads + [num_codes, x.shape[channel]], x.device)
    chosen = choose_impl(op, impl, unavailable(x.device, x.dtype))

    x = x.detach()
    with torch.no_grad():
        if not heads:
            return _kmeans(x, channel, num_codes, iterations, init, metric, generator, chosen)
        inits = init if isinstance(init, Tensor) else [init] * x.shape[0]
        found = [
            _kmeans(head, channel - 1, num_codes, iterations, start, metric, generator, chosen)
            for head, start in zip(x, inits, strict=True)
        ]
        return KMeansResult(*(torch.stack(parts) for parts in zip(*found, strict=True)))


def _check_init(op: str, init: str | Tensor, shape: list[int], device: torch.device) -> None:
    if not isinstance(init, Tensor):
        if init not in INITS:
            raise ValueError(f"{op}: init must be one of {', '.join(INITS)} or a tensor of codes, got {init!r}.")
        return
    check_float(op, "init", init)
    if list(init.shape) != shape:
        raise ValueError(f"{op}: an init tensor must have the shape of the codebook, {shape}, got {list(init.shape)}.")
    if init.device != device:
        raise ValueError(f"{op}: x and init must be on one device, got {device} and {init.device}.")


def unavailable(device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
    """Implementations of k-means, best first, and why each cannot run on this device and dtype."""
    native = native_unavailable("kmeans", device, dtype)
    if native is None and device.type == "cuda":
        native = search_unavailable(device, dtype)["triton"]
    return {"native": native, "reference": None}


def _kmeans(
    x: Tensor,
    channel: int,
    num_codes: int,
    iterations: int,
    init: str | Tensor,
    metric: str,
    generator: torch.Generator | None,
    impl: str,
) -> KMeansResult:
    data = _Data(as_positions(x, channel), metric, impl)
    if isinstance(init, Tensor):
        codebook = init.detach().to(data.dtype, copy=True)
    elif init == "random":
        order = data.uniform(data.count, generator).argsort(stable=True)
        codebook = data.vectors(order[torch.arange(num_codes, device=x.device) % data.count])
    else:
        codebook = _seed(data, num_codes, generator)
    codebook = data.as_codes(codebook, codebook)

    on_host = _on_host(x.device)
    indices = data.search(codebook)
    for _ in range(iterations):
        counts, means = data.means(indices, num_codes)
        updated = torch.where(counts.unsqueeze(1) > 0, data.as_codes(means, codebook), codebook)
        # To ask a GPU would be to wait for it: there this is done in any case, and without empty codes changes nothing.
        if not on_host or bool((counts == 0).any()):
            updated = _reseed(data, updated, codebook, indices, counts == 0)
        if on_host and torch.equal(updated, codebook):
            break
        codebook, indices = updated, data.search(updated)
    distances = data.square_distances(codebook, indices)
    return KMeansResult(
        codebook,
        indices.reshape(positions_shape(x, channel)),
        data.counts(indices, num_codes),
        distances.sum(dtype=torch.float64),
    )


def _on_host(device: torch.device) -> bool:
    """Whether a value can be looked at without waiting for the device."""
    return device.type == "cpu"


class _Data:
    """The vectors under a metric: for "cosine" all but the search sees them scaled to unit length, without a copy of that."""

    def __init__(self, x: Tensor, metric: str, impl: str) -> None:
        self.x = x  # [outer, D, inner]
        self.metric = metric
        self.impl = impl
        self.dtype = accumulator_dtype(x.dtype)
        self.count = x.shape[0] * x.shape[2]
        self.scale = None  # [outer, inner]
        if metric == "cosine":
            norm = torch.linalg.vector_norm(x, dim=1, dtype=self.dtype)
            self.scale = torch.where(norm >= torch.finfo(self.dtype).tiny, 1 / norm, 0)

    def uniform(self, count: int, generator: torch.Generator | None) -> Tensor:
        """Random numbers [count] in [0, 1), float64."""
        source = self.x.device if generator is None else generator.device
        return torch.rand(count, dtype=torch.float64, device=source, generator=generator).to(self.x.device)

    def search(self, codebook: Tensor) -> Tensor:
        """Index [outer, inner] of the nearest code."""
        return search(self.x, codebook, None, self.metric, self.impl)

    def vectors(self, positions: Tensor) -> Tensor:
        """The vectors [M, D] at positions [M]."""
        outer, inner = positions // self.x.shape[2], positions % self.x.shape[2]
        found = self.x[outer, :, inner].to(self.dtype)
        return found if self.scale is None else found * self.scale[outer, inner].unsqueeze(1)

    def means(self, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
        """Number [K] and mean [K, D] of the vectors of each code; a mean of none is NaN."""
        counts, sums = statistics(self.x, indices, num_codes, self.scale, None, self.impl)
        if self.scale is not None:
            counts = self.counts(indices, num_codes)
        return counts, sums / counts.unsqueeze(1)

    def counts(self, indices: Tensor, num_codes: int) -> Tensor:
        """Number [K] of the vectors of each code."""
        return statistics(self.x[:, :1], indices, num_codes, None, None, self.impl)[0]

    def as_codes(self, means: Tensor, otherwise: Tensor) -> Tensor:
        """The codes of clusters with these means; where a mean has no direction and needs one, `otherwise`."""
        if self.metric == "euclidean":
            return means
        norm = torch.linalg.vector_norm(means, dim=1, keepdim=True)
        return torch.where(norm > 0, means / norm, otherwise)

    def square_distances(self, codebook: Tensor, indices: Tensor) -> Tensor:
        """Squared distance [outer, inner] of every vector to the code of its index."""
        outer, dim, inner = self.x.shape
        split = 0 if outer >= inner else 1
        step = max(1, _CHUNK // (dim * min(outer, inner)))
        parts = []
        for start in range(0, indices.shape[split], step):
            length = min(step, indices.shape[split] - start)
            vectors = self.x.narrow(2 * split, start, length).to(self.dtype)
            codes = codebook[indices.narrow(split, start, length)].transpose(1, 2)
            if self.scale is None:
                parts.append((vectors - codes).square().sum(1))
            else:
                scale = self.scale.narrow(split, start, length)
                distance = (vectors * scale.unsqueeze(1) - codes).square().sum(1)
                parts.append(torch.where(scale > 0, distance, 0))
        return torch.cat(parts, split)


def _seed(data: _Data, num_codes: int, generator: torch.Generator | None) -> Tensor:
    """Codes [K, D] to start from: candidates by k-means||, each with the vectors that are nearest to it, merged into K."""
    batch = -(-num_codes * _OVERSAMPLING // _DRAW_ROUNDS)
    strata = torch.arange(batch, device=data.x.device)
    distances = torch.ones_like(data.x[:, 0], dtype=data.dtype)
    indices = torch.zeros_like(distances, dtype=torch.int64)
    for turn in range(_DRAW_ROUNDS):
        drawn = _draw(distances, (strata + data.uniform(batch, generator)) / batch)
        candidates = data.vectors(drawn)
        found = data.search(candidates)
        to_found = data.square_distances(candidates, found)
        closer = to_found < distances if turn > 0 else torch.ones_like(found, dtype=torch.bool)
        distances = torch.where(closer, to_found, distances)
        indices = torch.where(closer, found + turn * batch, indices)
    counts, means = data.means(indices, _DRAW_ROUNDS * batch)
    return _merge(data, means.nan_to_num(0), counts, num_codes, generator)


def _draw(weights: Tensor, quantiles: Tensor) -> Tensor:
    """Positions at which the weights, summed in the order of the positions, reach these shares of their total."""
    # In integers, whose sums are the same in any order; all fit for 2^33 weights.
    shares = (weights.double() / weights.max() * 2**30).nan_to_num(0, 0, 0).to(torch.int64).flatten()
    reached = shares.cumsum(0)
    drawn = torch.searchsorted(reached, (quantiles * reached[-1]).to(torch.int64), right=True)
    return drawn.clamp(max=shares.shape[0] - 1)


def _merge(data: _Data, centers: Tensor, counts: Tensor, num_codes: int, generator: torch.Generator | None) -> Tensor:
    """Centers of K clusters, merged from more [C, D] with these counts [C] so that the inertia grows little.

    Merging two clusters adds n m / (n + m) |a - b|^2 to the inertia. In each round a random half of the clusters is
    searched for in the other half, each cluster remembers the best partner that it has met, and the cheapest pairs merge.
    """
    own = torch.arange(len(centers), device=centers.device)

    def added(one: Tensor, other: Tensor) -> Tensor:
        price = (centers[one] - centers[other]).square().sum(1) / (1 / counts[one] + 1 / counts[other])
        return torch.where((one != other) & (counts[one] > 0) & (counts[other] > 0), price, torch.inf)

    partner = own
    for turn in range(_MERGE_ROUNDS):
        left, right = data.uniform(len(centers), generator).argsort().tensor_split(2)
        codes = torch.where(counts[right].unsqueeze(1) > 0, centers[right], torch.nan)  # which is never nearest
        met = right[search(centers[left].unsqueeze(2), codes, None, "euclidean", data.impl).squeeze(1)]
        known = partner[left]
        partner = partner.scatter(0, left, torch.where(added(left, met) < added(left, known), met, known))

        surplus = (counts > 0).sum() - num_codes
        quota = surplus if turn >= _MERGE_ROUNDS - _LAST_ROUNDS else (surplus / 4).ceil()
        price = added(own, partner)
        rank = torch.empty_like(own).scatter_(0, price.argsort(stable=True), own)
        goes = (rank < quota) & price.isfinite()
        goes &= ~(goes[partner] & (partner[partner] == own) & (own > partner))  # not both of a pair,
        goes &= ~goes[partner]  # nor to one that goes itself
        target = torch.where(goes, partner, own)
        alive = torch.where(counts > 0, target, -1)
        counts, sums = statistics(centers.unsqueeze(2), alive.unsqueeze(1), len(own), counts.unsqueeze(1), None, data.impl)
        centers = torch.where(counts.unsqueeze(1) > 0, sums / counts.unsqueeze(1), 0)
        partner = target[partner]
    # Of what is still too many the largest stay; too few are filled up with copies.
    kept = counts.argsort(descending=True, stable=True)
    return centers[kept[torch.arange(num_codes, device=kept.device) % (counts > 0).sum()]]


def _reseed(data: _Data, updated: Tensor, codebook: Tensor, indices: Tensor, empty: Tensor) -> Tensor:
    """`updated` with the empty codes on vectors drawn in proportion to their squared distance from their codes."""
    number = torch.arange(len(codebook), device=codebook.device)
    missing = empty.sum()
    drawn = _draw(data.square_distances(codebook, indices), ((number.double() + 0.5) / missing.clamp(min=1)).clamp(max=1))
    # Ascending; a vector that is drawn more than once passes the draw on to the next ones.
    drawn = (drawn - number).cummax(0).values + number
    drawn = torch.minimum(drawn, data.count - missing + number).clamp(0, data.count - 1)
    place = drawn[(empty.cumsum(0) - 1).clamp(min=0)]
    vectors = data.as_codes(data.vectors(place), codebook)
    return torch.where(empty.unsqueeze(1), vectors, updated)
