# SPDX-License-Identifier: Apache-2.0
"""K-means of residuals: identifiers of several codes for each vector."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._choices import ClusterInit, ClusterUpdate, Impl, Metric
from .._distributed import world_size
from ._dispatch import choose_impl
from ._kmeans_fit import KMeansOptions, KMeansProgress, fit, with_shape
from ._kmeans_vectors import Stage, Vectors
from ._layout import positions_shape
from ._validate import check_channel_dim, check_float, check_tensor
from .kmeans import INITS, check_options, check_weights, read_vectors, unavailable
from .nearest_code import check_metric


class ResidualKMeansResult(NamedTuple):
    """The result of `residual_kmeans`, on x's device."""

    codebooks: Tensor
    """[stages, K, D], float32 (float64 for a float64 x), as `residual_vector_quantize` takes them."""
    indices: Tensor
    """int64, x's shape without channel_dim, and the stages as the last dimension: the identifier of each vector."""
    counts: Tensor
    """[stages, K], the number of vectors of each code, or the sum of their weights."""
    inertia: Tensor
    """[stages], the sum of squared distances between the vectors and the sum of their codes so far, weighted, float64."""


def residual_kmeans(
    x: Tensor,  # [..., D, ...]
    num_codes: int,
    stages: int,
    *,
    iterations: int = 25,
    init: ClusterInit = "k-means++",
    n_init: int = 1,
    metric: Metric = "euclidean",
    weights: Tensor | None = None,  # [...]
    update: ClusterUpdate = "lloyd",
    batch_size: int | None = None,
    decay: float | None = None,
    balance: float | None = None,
    channel_dim: int = -1,
    synchronized: bool = False,
    callback: Callable[[KMeansProgress], Any] | None = None,
    generator: torch.Generator | None = None,
    impl: Impl | None = None,
) -> ResidualKMeansResult:
    """Fit the codebooks of a residual quantizer, one stage after the other, each by k-means of what the earlier ones leave.

    Equivalent to (channel_dim=-1):
        residual = x.float()
        for stage in range(stages):
            codebooks[stage], indices[..., stage], counts[stage], inertia[stage] = kmeans(residual, num_codes)
            residual = residual - codebooks[stage][indices[..., stage]]

    without a copy of x: chunks of the residual are computed where they are searched, on the CPU; on CUDA it is one temporary tensor.
    The indices are semantic identifiers, as recommender systems use them (Rajput et al., "Recommender Systems with Generative Retrieval",
    2023). Those of other vectors are `residual_vector_quantize(vectors, codebooks)[1]`, and so are those of x, without `balance`.

    With metric="cosine" identifiers depend on directions: x is normalized, the first stage is spherical k-means, whose codes are unit
    vectors, and the later ones are k-means of what is left of the unit vectors. Normalize other vectors before they are quantized.

    Args:
        x, num_codes, metric, weights, channel_dim: as in `kmeans`.
        stages: the number of codebooks, at least 1.
        iterations, init, n_init, update, batch_size, decay, balance, synchronized, generator, impl: of the k-means of every stage;
            `init` is "k-means++" or "random".
        callback: as in `kmeans`; a true result ends the k-means of this stage.

    Returns:
        codebooks, indices, counts, inertia: see `ResidualKMeansResult`. Deterministic as `kmeans`. Not differentiable.

    Raises:
        ValueError, TypeError, NotImplementedError: as `kmeans`, and a ValueError for stages < 1.
    """
    op = "residual_kmeans"
    check_tensor(op, "x", x)
    channel = check_channel_dim(op, x, channel_dim)
    check_float(op, "x", x)
    synchronized = synchronized and world_size() > 1
    if x.shape[channel] == 0 or (x.numel() == 0 and not synchronized):
        raise ValueError(f"{op}: x must have at least one vector of at least one dimension, got shape {list(x.shape)}.")
    if stages < 1:
        raise ValueError(f"{op}: stages must be at least 1, got {stages}.")
    if init not in INITS:
        raise ValueError(f"{op}: init must be one of {', '.join(INITS)}, got {init!r}.")
    options = KMeansOptions(iterations, init, n_init, update, batch_size, decay, balance, generator, callback)
    check_metric(op, metric)
    check_options(op, num_codes, options)
    check_weights(op, weights, x, channel)
    chosen = choose_impl(op, impl, unavailable(x.device, x.dtype))
    with torch.no_grad():
        data = read_vectors(op, x.detach(), channel, metric, chosen, weights, synchronized)
        shape = positions_shape(x, channel)
        done: list[Stage] = []
        found = []
        for stage in range(stages):
            found.append(fit_stage(data, done, num_codes, with_shape(options, shape), stage))
            done.append(Stage(*found[-1][:2]))
        codebooks, indices, counts, inertia = (torch.stack(parts, -1 if i == 1 else 0) for i, parts in enumerate(zip(*found, strict=True)))
        return ResidualKMeansResult(codebooks, indices.reshape(*shape, stages), counts, inertia)


def fit_stage(
    data: Vectors, done: Sequence[Stage], num_codes: int, options: KMeansOptions, stage: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codebook, indices [outer, inner], counts and inertia of the stage that follows those that are done."""
    return fit(data.residual(tuple(done)) if done else data, num_codes, options, stage=stage)
