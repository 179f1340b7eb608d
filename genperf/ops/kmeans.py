# SPDX-License-Identifier: Apache-2.0
"""K-means with exact search and without a distance matrix."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from .._choices import ClusterInit, ClusterUpdate, Impl, Metric
from .._distributed import world_size
from ._autograd import transformed
from ._dispatch import Reasons, choose_impl, native_unavailable
from ._kmeans_fit import KMeansOptions, KMeansProgress, fit, with_shape
from ._kmeans_vectors import Vectors
from ._layout import as_positions, positions_shape
from ._precision import accumulator_dtype
from ._validate import check_channel_dim, check_float, check_positions, check_tensor
from .nearest_code import check_metric
from .nearest_code import unavailable as search_unavailable

INITS: tuple[ClusterInit, ...] = get_args(ClusterInit)
UPDATES: tuple[ClusterUpdate, ...] = get_args(ClusterUpdate)


class KMeansResult(NamedTuple):
    """The result of `kmeans`, on x's device."""

    codebook: Tensor
    """[K, D], float32 (float64 for a float64 x); unit vectors for "cosine"."""
    indices: Tensor
    """int64, x's shape without channel_dim: the nearest code of each vector in `codebook`, or its code in the balanced assignment."""
    counts: Tensor
    """[K], the number of vectors of each code, or the sum of their weights, in the codebook's dtype."""
    inertia: Tensor
    """Sum of the squared distances between the vectors (normalized for "cosine") and their codes, weighted, a float64 scalar."""


def kmeans(
    x: Tensor,  # [..., D, ...]
    num_codes: int,
    *,
    iterations: int = 25,
    init: ClusterInit | Tensor = "k-means++",
    n_init: int = 1,
    metric: Metric = "euclidean",
    weights: Tensor | None = None,  # [...]
    update: ClusterUpdate = "lloyd",
    batch_size: int | None = None,
    decay: float | None = None,
    balance: float | None = None,
    channel_dim: int = -1,
    heads: bool = False,
    synchronized: bool = False,
    callback: Callable[[KMeansProgress], Any] | None = None,
    generator: torch.Generator | None = None,
    impl: Impl | None = None,
) -> KMeansResult:
    """Fit a codebook of K codes to the vectors of x by Lloyd's algorithm (Lloyd, "Least squares quantization in PCM", 1982).

    Equivalent to (channel_dim=-1, without empty clusters):
        codebook = init
        for _ in range(iterations):
            counts, sums = code_statistics(x, nearest_code(x, codebook), num_codes)
            codebook = sums / counts[:, None]
        indices = nearest_code(x, codebook)

    The search is exact and the sums are deterministic, so a generator state gives one result per device, and no iteration increases the
    inertia by more than rounding. On the CPU the result is the same, bitwise, for any number of threads, and for any split of the vectors
    over ranks. Once few codes change, an iteration on the CPU searches those and the vectors that they concern, with the same result.
    No positions x K or K x K matrix is built, and on CUDA an iteration does not synchronize with the host and can be captured
    in a graph. x may be a memory-mapped file (`torch.from_numpy(numpy.load(path, mmap_mode="c"))`): it is read in chunks, in order.

    "cosine" is spherical k-means (Dhillon and Modha, 2001): vectors are normalized, and codes are the normalized sums. A zero vector has no
    direction and moves no code.

    Codes without vectors are moved to distinct vectors of x: those at which the cumulative sum of the squared distances to the codes, in
    the order of the positions, reaches evenly spaced fractions of the inertia.

    Args:
        x: float32, bfloat16, float16 or float64, finite (not checked on CUDA), at least one vector; any strides, not copied.
        num_codes: K. If x has fewer than K distinct vectors, codes repeat, and only the first of equal codes has vectors.
        iterations: the number of updates of the codebook, or of passes over x with update="ema". The loop ends earlier if the codebook
            no longer changes.
        init: the initial codes.
            "k-means++": draws 2 K candidates in five rounds, with probabilities proportional to the squared distance to earlier
            candidates, the parallel variant of k-means++ (Bahmani et al., "Scalable K-Means++", 2012). Then merges them into K codes
            where that increases the inertia least (Ward, "Hierarchical Grouping to Optimize an Objective Function", 1963), with partners
            found by search. Of more than 65,536 and 128 K vectors, the candidates come from a sample of so many. Takes about as long
            as four iterations.
            "random": random vectors of x, each drawn once before any is drawn twice, whatever their weights.
            A tensor [K, D] of codes.
        n_init: the number of runs, each from other initial codes; the one with the least inertia is returned.
        metric: "euclidean" or "cosine", as in `nearest_code`.
        weights: of x's shape without channel_dim, a floating dtype, finite, not negative (not checked on CUDA), not all 0. A vector with
            weight 2 counts as two vectors.
        update: "lloyd", or "ema": codes are moving averages of the vectors of mini-batches, which takes fewer passes over many vectors.
        batch_size: vectors in a mini-batch; by default 16 K, and at least a sixteenth of all.
        decay: share of an average that is kept in each mini-batch, in [0, 1); by default averages remember about half a pass.
        balance: a code has at most `balance` times the mean number of vectors, rounded down, or as many as an even split needs if that
            is more; at least 1. A vector is then assigned to the code with the least sum of squared distance and a price that rises for
            crowded codes, or near to it. Reads values from the device. With weights, the limit is on their sum: a code exceeds it only
            if each of its vectors has a weight above `balance` - 1 times the mean of the sums, and a vector whose weight alone exceeds
            it shares its code with none but those of weight 0. With update="ema" mini-batches are assigned with prices that follow the
            averages, and all vectors with the limit at the end.
        channel_dim: the dimension of x that holds the D channels; 1 for images [B, D, H, W].
        heads: dimension 0 of x is the heads, each with its own codebook. All results, and an init tensor, have a leading dimension of
            heads. Equal to one call per head, in order.
        synchronized: cluster the vectors of all ranks of torch.distributed, as one process would the concatenated ones. Every rank must
            call this, with the same arguments but for x, weights and generator; a rank may have no vectors. Random numbers are those of
            rank 0. indices are those of the rank's vectors, the other results are equal on all ranks. On CUDA, equal to one process up to
            rounding.
        callback: called with a `KMeansProgress` before each update and at the end; a true result ends the run. The inertia is
            computed for it.
        generator: generator of random numbers, on any device; None for torch's default generator of x's device.
        impl: "native" (with the Triton search on CUDA), "reference", or None to choose automatically.

    Returns:
        codebook, indices, counts, inertia: see `KMeansResult`. Not differentiable.

    Raises:
        ValueError: no vectors, NaN or infinity in x (not checked on CUDA, where it would synchronize, nor within torch.vmap),
            an argument out of its range, an unknown init, metric, update or impl, an init tensor of the wrong shape, an invalid
            channel_dim, or options that exclude each other.
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
    synchronized = synchronized and world_size() > 1
    if x.shape[channel] == 0 or (x.numel() == 0 and not synchronized):
        raise ValueError(f"{op}: x must have at least one vector of at least one dimension, got shape {list(x.shape)}.")
    options = KMeansOptions(iterations, init, n_init, update, batch_size, decay, balance, generator, callback)
    check_options(op, num_codes, options)
    _check_init(op, init, [x.shape[0]] * heads + [num_codes, x.shape[channel]], x.device)
    check_weights(op, weights, x, channel)
    chosen = choose_impl(op, impl, unavailable(x.device, x.dtype))

    x = x.detach()
    with torch.no_grad():
        if not heads:
            data = read_vectors(op, x, channel, metric, chosen, weights, synchronized)
            return _result(x, channel, fit(data, num_codes, with_shape(options, positions_shape(x, channel))))
        each = [
            read_vectors(op, head, channel - 1, metric, chosen, None if weights is None else weights[i], synchronized)
            for i, head in enumerate(x)
        ]
        options = with_shape(options, positions_shape(x[0], channel - 1))
        found = [
            _result(x[i], channel - 1, fit(data, num_codes, options._replace(init=init[i] if isinstance(init, Tensor) else init), head=i))
            for i, data in enumerate(each)
        ]
        return KMeansResult(*(torch.stack(parts) for parts in zip(*found, strict=True)))


def _result(x: Tensor, channel: int, found: tuple[Tensor, Tensor, Tensor, Tensor]) -> KMeansResult:
    codebook, indices, counts, inertia = found
    return KMeansResult(codebook, indices.reshape(positions_shape(x, channel)), counts, inertia)


def read_vectors(op: str, x: Tensor, channel: int, metric: Metric, impl: Impl, weights: Tensor | None, synchronized: bool) -> Vectors:
    """The vectors of x, which must be finite."""
    positions = as_positions(x, channel)
    if weights is not None:
        weights = weights.detach().reshape(positions.shape[0], positions.shape[2]).to(accumulator_dtype(x.dtype))
    data = Vectors(positions, metric, impl, weights, synchronized)
    if data.count == 0:
        raise ValueError(f"{op}: x must have at least one vector, got none on any rank.")
    if data.on_host and not bool(data.finite):
        raise ValueError(f"{op}: x must be finite, got NaN or infinity among its values.")
    return data


def check_options(op: str, num_codes: int, options: KMeansOptions) -> None:
    """Check what does not depend on the vectors."""
    if num_codes < 1:
        raise ValueError(f"{op}: num_codes must be at least 1, got {num_codes}.")
    if options.iterations < 0:
        raise ValueError(f"{op}: iterations must not be negative, got {options.iterations}.")
    if options.n_init < 1:
        raise ValueError(f"{op}: n_init must be at least 1, got {options.n_init}.")
    if options.update not in UPDATES:
        raise ValueError(f"{op}: update must be one of {', '.join(UPDATES)}, got {options.update!r}.")
    for name, value in (("batch_size", options.batch_size), ("decay", options.decay)):
        if value is not None and options.update != "ema":
            raise ValueError(f'{op}: {name} is for update="ema", got {name}={value} with update={options.update!r}.')
    if options.batch_size is not None and options.batch_size < 1:
        raise ValueError(f"{op}: batch_size must be at least 1, got {options.batch_size}.")
    if options.decay is not None and not 0 <= options.decay < 1:
        raise ValueError(f"{op}: decay must lie in [0, 1), got {options.decay}.")
    if options.balance is not None and not 1 <= options.balance < math.inf:
        raise ValueError(f"{op}: balance must be a finite number of at least 1, got {options.balance}.")
    if options.generator is not None and not isinstance(options.generator, torch.Generator):
        raise TypeError(f"{op}: generator must be a torch.Generator or None, got {type(options.generator).__name__}.")


def check_weights(op: str, weights: Tensor | None, x: Tensor, channel: int) -> None:
    if weights is None:
        return
    check_tensor(op, "weights", weights)
    check_float(op, "weights", weights)
    check_positions(op, "weights", weights, x, channel)
    if weights.device.type != "cpu" or transformed() or weights.numel() == 0:
        return
    low, high = (float(bound) for bound in weights.detach().aminmax())
    if not 0 <= low <= high < math.inf:
        raise ValueError(f"{op}: weights must be finite and not negative, got {low} ... {high}.")
    if high == 0:
        raise ValueError(f"{op}: a weight must be above 0, got zeros.")


def _check_init(op: str, init: ClusterInit | Tensor, shape: list[int], device: torch.device) -> None:
    if not isinstance(init, Tensor):
        if init not in INITS:
            raise ValueError(f"{op}: init must be one of {', '.join(INITS)} or a tensor of codes, got {init!r}.")
        return
    check_float(op, "init", init)
    if list(init.shape) != shape:
        raise ValueError(f"{op}: an init tensor must have the shape of the codebook, {shape}, got {list(init.shape)}.")
    if init.device != device:
        raise ValueError(f"{op}: x and init must be on one device, got {device} and {init.device}.")


def unavailable(device: torch.device, dtype: torch.dtype) -> Reasons:
    """Why each implementation cannot run on this device and dtype, or None; best first."""
    native = native_unavailable("kmeans", device, dtype)
    if native is None and device.type == "cuda":
        native = search_unavailable(device, dtype)["triton"]
    return {"native": native, "reference": None}
