"""K-means with exact search and without a distance matrix."""

from typing import NamedTuple

import torch
from torch import Tensor

from ._autograd import transformed
from ._dispatch import choose_impl, native_unavailable
from ._layout import as_positions, positions_shape
from ._precision import accumulator_dtype
from ._validate import check_channel_dim, check_float, check_tensor
from .code_statistics import statistics
from .nearest_code import check_metric, search
from .nearest_code import unavailable as search_unavailable

INITS = ("k-means++", "random")

# k-means||: the number of candidates per code, and the number of rounds in which they are drawn.
_OVERSAMPLING = 2
_DRAW_ROUNDS = 5
# Rounds that merge the candidates into K codes. The first ones merge a part of the surplus, the last ones all of it.
_MERGE_ROUNDS = 16
_LAST_ROUNDS = 4

# Elements of temporary tensors.
_CHUNK = 1 << 22


class KMeansResult(NamedTuple):
    """The result of `kmeans`, on x's device."""

    codebook: Tensor
    """[K, D], float32 (float64 for a float64 x); unit vectors for "cosine"."""
    indices: Tensor
    """int64, x's shape without channel_dim: the nearest code of each vector in `codebook`."""
    counts: Tensor
    """[K], the number of vectors of each code, in the codebook's dtype as in `code_statistics`."""
    inertia: Tensor
    """Sum of the squared distances between the vectors (normalized for "cosine") and their codes, a float64 scalar."""


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
    """Fit a codebook of K codes to the vectors of x by Lloyd's algorithm (Lloyd, "Least squares quantization in PCM", 1982).

    Equivalent to (channel_dim=-1, without empty clusters):
        codebook = init
        for _ in range(iterations):
            counts, sums = code_statistics(x, nearest_code(x, codebook), num_codes)
            codebook = sums / counts[:, None]
        indices = nearest_code(x, codebook)

    The search is exact and the sums are deterministic, so a generator state gives one result per device, and no iteration increases the
    inertia by more than rounding. No positions x K or K x K matrix is built, and on CUDA nothing synchronizes with the host.

    "cosine" is spherical k-means (Dhillon and Modha, 2001): vectors are normalized, and codes are the normalized sums. A zero vector has no
    direction and moves no code.

    Codes without vectors are moved to distinct vectors of x: those at which the cumulative sum of the squared distances to the codes, in
    the order of the positions, reaches evenly spaced fractions of the inertia.

    Args:
        x: float32, bfloat16, float16 or float64, finite (not checked on CUDA), at least one vector; any strides, not copied.
        num_codes: K. If x has fewer than K distinct vectors, codes repeat, and only the first of equal codes has vectors.
        iterations: the number of updates of the codebook. On the CPU the loop ends earlier if the codebook no longer changes.
        init: the initial codes.
            "k-means++": draws 2 K candidates in five rounds, with probabilities proportional to the squared distance to earlier
            candidates, the parallel variant of k-means++ (Bahmani et al., "Scalable K-Means++", 2012). Then merges them into K codes
            where that increases the inertia least (Ward, "Hierarchical Grouping to Optimize an Objective Function", 1963), with partners
            found by search. Takes about as long as ten iterations.
            "random": random vectors of x, each drawn once before any is drawn twice.
            A tensor [K, D] of codes.
        metric: "euclidean" or "cosine", as in `nearest_code`.
        channel_dim: the dimension of x that holds the D channels; 1 for images [B, D, H, W].
        heads: dimension 0 of x is the heads, each with its own codebook. All results, and an init tensor, have a leading dimension of
            heads. Equal to one call per head, in order.
        generator: generator for `init`, on any device; None for torch's default generator of x's device.
        impl: "native" (with the Triton search on CUDA), "reference", or None to choose automatically.

    Returns:
        codebook, indices, counts, inertia: see `KMeansResult`. Not differentiable.

    Raises:
        ValueError: no vectors, NaN or infinity in x (not checked on CUDA, where it would synchronize, nor within torch.vmap),
            num_codes < 1, iterations < 0, an unknown init, metric or impl, an init tensor of the wrong shape, or an invalid channel_dim.
        TypeError: an unsupported dtype or an invalid generator.
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
        raise ValueError(f"{op}: x must have at least one vector of at least one dimension, got shape {list(x.shape)}.")
    if num_codes < 1:
        raise ValueError(f"{op}: num_codes must be at least 1, got {num_codes}.")
    if iterations < 0:
        raise ValueError(f"{op}: iterations must not be negative, got {iterations}.")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"{op}: generator must be a torch.Generator or None, got {type(generator).__name__}.")
    _check_init(op, init, [x.shape[0]] * heads + [num_codes, x.shape[channel]], x.device)
    chosen = choose_impl(op, impl, unavailable(x.device, x.dtype))
    # float64 holds the sum of any finite vectors of the other dtypes.
    if _on_host(x.device) and not bool(x.detach().sum(dtype=torch.float64).isfinite()):
        raise ValueError(f"{op}: x must be finite, got NaN or infinity among its values.")

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
    """Why each implementation cannot run on this device and dtype, or None; best first."""
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
        codebook = _initial_codes(data, num_codes, generator)
    codebook = data.as_codes(codebook, codebook)

    on_host = _on_host(x.device)
    indices = data.search(codebook)
    for _ in range(iterations):
        counts, means = data.means(indices, num_codes)
        updated = torch.where(counts.unsqueeze(1) > 0, data.as_codes(means, codebook), codebook)
        # On a GPU the check would synchronize, so the replacement always runs; without empty codes it changes nothing.
        if not on_host or bool((counts == 0).any()):
            updated = _replace_empty_codes(data, updated, codebook, indices, counts == 0)
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
    """Whether values can be read without device synchronization. Within torch.vmap they cannot be read."""
    return device.type == "cpu" and not transformed()


class _Data:
    """The vectors under a metric. For "cosine" they are scaled to unit length on the fly, without a normalized copy."""

    def __init__(self, x: Tensor, metric: str, impl: str) -> None:
        self.x = x  # [outer, D, inner]
        self.metric = metric
        self.impl = impl
        self.dtype = accumulator_dtype(x.dtype)
        self.count = x.shape[0] * x.shape[2]
        self.scale: Tensor | None = None  # [outer, inner]
        if metric == "cosine":
            norm = torch.linalg.vector_norm(x, dim=1, dtype=self.dtype)
            self.scale = torch.where(norm >= torch.finfo(self.dtype).tiny, 1 / norm, 0)

    def uniform(self, count: int, generator: torch.Generator | None) -> Tensor:
        """Uniform random numbers [count] in [0, 1), float64."""
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
        """Number [K] and mean [K, D] of the vectors of each code; NaN for a code without vectors."""
        counts, sums = statistics(self.x, indices, num_codes, self.scale, None, self.impl)
        if self.scale is not None:
            counts = self.counts(indices, num_codes)
        return counts, sums / counts.unsqueeze(1)

    def counts(self, indices: Tensor, num_codes: int) -> Tensor:
        """Number [K] of the vectors of each code."""
        return statistics(self.x[:, :1], indices, num_codes, None, None, self.impl)[0]

    def as_codes(self, means: Tensor, otherwise: Tensor) -> Tensor:
        """The codes of clusters with these means. For "cosine", means of zero have no direction and give `otherwise`."""
        if self.metric == "euclidean":
            return means
        norm = torch.linalg.vector_norm(means, dim=1, keepdim=True)
        return torch.where(norm > 0, means / norm, otherwise)

    def square_distances(self, codebook: Tensor, indices: Tensor) -> Tensor:
        """Squared distance [outer, inner] of each vector to the code of its index."""
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


def _initial_codes(data: _Data, num_codes: int, generator: torch.Generator | None) -> Tensor:
    """Initial codes [K, D]: candidates drawn by k-means||, replaced by the means of their nearest vectors, and merged into K."""
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
    """Positions at which the cumulative sum of the weights reaches these fractions of the total."""
    # In integers, whose sum does not depend on the order; the sum of 2^33 weights still fits.
    shares = (weights.double() / weights.max() * 2**30).nan_to_num(0, 0, 0).to(torch.int64).flatten()
    reached = shares.cumsum(0)
    drawn = torch.searchsorted(reached, (quantiles * reached[-1]).to(torch.int64), right=True)
    return drawn.clamp(max=shares.shape[0] - 1)


def _merge(data: _Data, centers: Tensor, counts: Tensor, num_codes: int, generator: torch.Generator | None) -> Tensor:
    """Merge C clusters with these centers [C, D] and counts [C] into K, keeping the increase of the inertia small.

    Merging two clusters adds n m / (n + m) |a - b|^2 to the inertia. Each round searches the nearest centers of a random half of the
    clusters in the other half. Each cluster keeps the best partner that it has found so far, and the cheapest pairs merge.
    """
    own = torch.arange(len(centers), device=centers.device)

    def cost(one: Tensor, other: Tensor) -> Tensor:
        increase = (centers[one] - centers[other]).square().sum(1) / (1 / counts[one] + 1 / counts[other])
        return torch.where((one != other) & (counts[one] > 0) & (counts[other] > 0), increase, torch.inf)

    partner = own
    for turn in range(_MERGE_ROUNDS):
        left, right = data.uniform(len(centers), generator).argsort().tensor_split(2)
        codes = torch.where(counts[right].unsqueeze(1) > 0, centers[right], torch.nan)  # NaN is never nearest
        nearest = right[search(centers[left].unsqueeze(2), codes, None, "euclidean", data.impl).squeeze(1)]
        known = partner[left]
        partner = partner.scatter(0, left, torch.where(cost(left, nearest) < cost(left, known), nearest, known))

        surplus = (counts > 0).sum() - num_codes
        quota = surplus if turn >= _MERGE_ROUNDS - _LAST_ROUNDS else (surplus / 4).ceil()
        costs = cost(own, partner)
        rank = torch.empty_like(own).scatter(0, costs.argsort(stable=True), own)
        merges = (rank < quota) & costs.isfinite()
        merges &= ~(merges[partner] & (partner[partner] == own) & (own > partner))  # only one of two that are each other's partner,
        merges &= ~merges[partner]  # and not into a cluster that is itself merged
        target = torch.where(merges, partner, own)
        alive = torch.where(counts > 0, target, -1)
        counts, sums = statistics(centers.unsqueeze(2), alive.unsqueeze(1), len(own), counts.unsqueeze(1), None, data.impl)
        centers = torch.where(counts.unsqueeze(1) > 0, sums / counts.unsqueeze(1), 0)
        partner = target[partner]
    # If there are still more than K, the largest are kept; if there are fewer, they are repeated.
    kept = counts.argsort(descending=True, stable=True)
    return centers[kept[torch.arange(num_codes, device=kept.device) % (counts > 0).sum()]]


def _replace_empty_codes(data: _Data, updated: Tensor, codebook: Tensor, indices: Tensor, empty: Tensor) -> Tensor:
    """`updated` with its empty codes replaced by vectors, chosen in proportion to the squared distance to their codes."""
    number = torch.arange(len(codebook), device=codebook.device)
    missing = empty.sum()
    drawn = _draw(data.square_distances(codebook, indices), ((number.double() + 0.5) / missing.clamp(min=1)).clamp(max=1))
    # The positions are ascending. One drawn more than once is followed by the next positions, so that all are distinct.
    drawn = (drawn - number).cummax(0).values + number
    drawn = torch.minimum(drawn, data.count - missing + number).clamp(0, data.count - 1)
    place = drawn[(empty.cumsum(0) - 1).clamp(min=0)]
    vectors = data.as_codes(data.vectors(place), codebook)
    return torch.where(empty.unsqueeze(1), vectors, updated)
