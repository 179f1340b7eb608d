# SPDX-License-Identifier: Apache-2.0
"""The Frechet distance as a loss for generators."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn
from torch.utils._pytree import tree_map_only

from .._choices import Impl, Precision
from .._distributed import world_size
from .._typing import signature_of
from ..metrics._features import feature_matrix, whole_number
from ..metrics.frechet_reference import FrechetReference
from ..nn._recompute import StepMemory, may_run_again
from ._feature_distance import FeatureDistance, FeatureQueue, MovingMoments

# The names of these classes in earlier pickles of a FrechetLoss.
_FeatureDistance, _Queue, _Averages = FeatureDistance, FeatureQueue, MovingMoments

Extractor = Callable[[Tensor], Tensor]

# Bounds the gradient of a normalized distance near 0.
NORMALIZE_EPS = 0.01


class FrechetLoss(nn.Module):
    """Frechet distance between the features of generated and real images; Yang et al., FD-loss (2026), arXiv 2604.28190.

    Equivalent to (one extractor, no queue, no momentum, several samples):
        features = extractor(images).double()
        distance = genperf.frechet_distance(features.mean(0), features.T.cov(), reference.mean, reference.cov)

    A batch alone is a poor estimate of a distribution. With `queue_size`, the distance is that of the batch and the
    `queue_size` features before it. With `momentum`, it is that of the moving average of the moments, a mixture of all batches
    in which each has `momentum` times the weight of the next; the weights are normalized, so there is no startup bias. With
    neither, it is that of the batch. The gradient is with respect to the current batch only: if the batch is a fraction p of the
    samples, its gradient is p times that of the batch alone.

    Queue and moving average are updated by each forward pass in training mode, after the distance, and never in evaluation
    mode. Both are in the state_dict, so a run resumed from one continues unchanged. Fill them with `update` before
    training. The queue is float32. Samples with NaN or infinite features are left out of the queue (a full one keeps
    its oldest sample instead), and batches with such samples out of the moving average; the distance of that step is what
    frechet_distance returns for them.

    Moments and distance are float64 (float32 on MPS) under autocast and after `.half()` or `.to(dtype)` too. Fewer samples
    than dimensions cost less, since no covariance is formed. A queue with at least as many features as dimensions maintains
    sums of its moments, so the cost of a step does not grow with the queue; they are recomputed once per cycle. The position in
    the queue is kept on the host: CUDA graphs are not supported, and torch.compile breaks the graph and runs the loss in Python.
    A step that gradient checkpointing runs twice counts once.

    **Extractors.** A module is frozen permanently: it is put in evaluation mode, and its parameters are set not to require a
    gradient. It moves with `.to()`, but is not a submodule: state_dict(), parameters() and train() do not reach it. Pass a copy of a
    network that continues to train, such as a critic. Other callables are called as they are.

    **Several extractors.** Sequences of references and extractors, or a mapping name -> (extractor, reference), give the
    sum of the distances times `weights`. `normalize=True` divides each distance by its detached value + 0.01, so that features
    of different scales have gradients of similar size; the loss is then close to the sum of the weights.

    **Distributed training.** Under torch.distributed, features are gathered and every rank returns the loss of the global
    batch, with the gradient of its own samples; backward does not communicate. The sum of the ranks' gradients is that of one
    process on the global batch. DistributedDataParallel averages gradients: multiply the loss by the number of ranks. The batch size
    must be the same on all ranks, which is not checked: otherwise torch.distributed fails or hangs. Use drop_last=True in
    a DataLoader. With `gather=False` each rank has the loss and the history of its own batches, also as a part of a
    DistributedDataParallel module; its state_dict holds that history.

    Args:
        reference: statistics of real features, a genperf.metrics.FrechetReference; or a sequence or mapping of them, see above.
        extractor: images -> features [B, d], or [B, d, H, W], which are averaged over positions, possibly in a list of one.
            None: forward takes features. A sequence for a sequence of references.
        weights: weights of several distances, a sequence or a mapping by name, at least 0; None for 1 each.
        queue_size: number of earlier features to include.
        momentum: momentum of the moving average, 0 <= momentum < 1; 0.999 in FD-loss. Not together with a queue.
        normalize: whether to divide each distance by its own value.
        unbiased: whether to divide covariances by n - 1 (moving averages: by 1 - the sum of squared weights), as most
            statistics files do; False divides by n, as StyleGAN does. The covariance of one sample is 0.
        gather: whether to use the global batch under torch.distributed.
        precision, impl: as in genperf.frechet_distance.

    Attributes:
        names: names of the distances; "0", "1", ... for sequences.
        distances: name -> distance of the last forward pass, a detached scalar on the device, neither weighted nor normalized.

    Raises:
        ValueError: an option out of range, or references, extractors and weights that do not match in number or names.
        TypeError: a reference that is not a FrechetReference, or an extractor that is not callable.
    """

    def __init__(
        self,
        reference: FrechetReference | Sequence[FrechetReference] | Mapping[str, tuple[Extractor | None, FrechetReference]],
        extractor: Extractor | Sequence[Extractor | None] | None = None,
        *,
        weights: Sequence[float] | Mapping[str, float] | None = None,
        queue_size: int = 0,
        momentum: float | None = None,
        normalize: bool = False,
        unbiased: bool = True,
        gather: bool = True,
        precision: Precision = "float64",
        impl: Impl | None = None,
    ) -> None:
        super().__init__()
        pairs = _named_pairs(reference, extractor)
        self.names = tuple(pairs)
        self.weights = _checked_weights(weights, self.names)
        queue_size = whole_number("FrechetLoss", "queue_size", queue_size, 0)
        if momentum is not None and not 0 <= momentum < 1:
            raise ValueError(f"FrechetLoss: momentum must be None or lie in [0, 1), got {momentum!r}.")
        if momentum is not None and queue_size:
            raise ValueError(f"FrechetLoss: take either a queue or a momentum, got queue_size={queue_size} and momentum={momentum}.")
        self.queue_size = queue_size
        self.momentum = momentum
        self.normalize = normalize
        self.unbiased = unbiased
        self.gather = gather
        self.precision: Precision = precision
        self.impl: Impl | None = impl
        self.distances: dict[str, Tensor] = {}
        self._steps = StepMemory[list[Any]]()
        # A tuple keeps modules out of state_dict(), parameters() and train().
        self._extractors = tuple(pairs[name][0] for name in self.names)
        for module in self._extractor_modules():
            module.eval().requires_grad_(False)
        self.parts = nn.ModuleDict(
            {name: FeatureDistance(ref.mean, ref.factor, queue_size, momentum, unbiased) for name, (_, ref) in pairs.items()}
        )

    def forward(self, images: Tensor) -> Tensor:
        """The distance between generated `images` (or features) and the reference; of several, the weighted sum.

        Returns:
            A scalar, float32 (float64 for float64 features), differentiable once in the images.

        Raises:
            ValueError: features of another dimension, shape or device, or no samples. Queue and moving average do not change.
            TypeError: features that are not a floating-point tensor.
        """
        if self.training and torch.compiler.is_compiling():
            from ..nn._outside_compile import without_compile

            return without_compile(self._forward, images)
        return self._forward(images)

    def _forward(self, images: Tensor) -> Tensor:
        features = self._extract(images)
        dtype = torch.float64 if any(f.dtype == torch.float64 for f in features) else torch.float32
        distances, terms, steps = {}, [], []
        # Under gradient checkpointing this step may be run again, which then needs the history that this run overwrites.
        again = self._steps.recall(images) if self.training else None
        past = [self._part(name).past(len(rows)) for name, rows in zip(self.names, features, strict=True)] if again is None else again
        if self.training and again is None and may_run_again():
            past = tree_map_only(Tensor, Tensor.clone, past)
            self._steps.record(images, past)
        for name, weight, rows, before in zip(self.names, self.weights, features, past, strict=True):
            part = self._part(name)
            # Without autocast, which would compute the products of moments in half precision.
            with torch.autocast(rows.device.type, enabled=False):
                step = part.step(rows, before)
                distance = part.distance(step, before, self.precision, self.impl)
            steps.append(step)
            distances[name] = distance.detach()
            terms.append(weight * (distance / (distance.detach() + NORMALIZE_EPS) if self.normalize else distance))
        self.distances = distances
        if self.training and again is None:
            for name, step in zip(self.names, steps, strict=True):
                self._part(name).commit(step)
        return sum(terms[1:], terms[0]).to(dtype)

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self) -> None: ...

    @torch.no_grad()
    def update(self, images: Tensor) -> None:
        """Add `images` (or features) to queue or moving average without computing a distance, in any mode; use it before training."""
        for name, rows in zip(self.names, self._extract(images), strict=True):
            with torch.autocast(rows.device.type, enabled=False):
                part = self._part(name)
                part.commit(part.step(rows, part.past(len(rows))))

    def extra_repr(self) -> str:
        return f"{', '.join(self.names)}, queue_size={self.queue_size}, momentum={self.momentum}, normalize={self.normalize}"

    def _extract(self, images: Tensor) -> list[Tensor]:
        """Features [n, d] from each extractor, of the global batch if `gather`."""
        found = []
        for name, extractor in zip(self.names, self._extractors, strict=True):
            if isinstance(extractor, nn.Module) and any(module.training for module in extractor.modules()):
                extractor.eval()
            features = images if extractor is None else extractor(images)
            found.append(_checked_features(features, self._part(name).mean))
        if self.gather and world_size() > 1:
            found = [_AllGather.apply(rows) for rows in found]
        return found

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Earlier releases kept no steps."""
        super().__setstate__({"_steps": StepMemory(), **state})

    def _part(self, name: str) -> FeatureDistance:
        part = self.parts[name]
        assert isinstance(part, FeatureDistance)
        return part

    def _extractor_modules(self) -> list[nn.Module]:
        return list(dict.fromkeys(e for e in self._extractors if isinstance(e, nn.Module)))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "FrechetLoss":
        super()._apply(fn, recurse)
        for module in self._extractor_modules():
            module._apply(fn)
        return self


class _AllGather(torch.autograd.Function):
    """Concatenate the rows of all ranks; backward keeps the gradient of this rank's rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.count = rows.shape[0]
        rows = rows.contiguous()
        parts = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, rows)
        return torch.cat(parts)

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self) -> None: ...

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.narrow(0, ctx.count * distributed.get_rank(), ctx.count)


def _named_pairs(reference: Any, extractor: Any) -> dict[str, tuple[Extractor | None, FrechetReference]]:
    """Name -> (extractor, reference) for every form that the arguments of `FrechetLoss` may take."""
    pairs: dict[str, Any]
    if isinstance(reference, FrechetReference):
        pairs = {"0": (extractor, reference)}
    elif isinstance(reference, Mapping):
        if extractor is not None:
            raise ValueError("FrechetLoss: a mapping holds the extractors with the references, got an extractor beside it.")
        for name, pair in reference.items():
            if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict(), name):
                raise ValueError(f"FrechetLoss: a name must be a string that a submodule can have, got {name!r}.")
            if not isinstance(pair, Sequence) or len(pair) != 2:
                raise TypeError(f"FrechetLoss: a mapping must hold pairs (extractor, reference), got {pair!r} at {name!r}.")
        pairs = {name: tuple(pair) for name, pair in reference.items()}
    elif isinstance(reference, Sequence):
        if not isinstance(extractor, Sequence | nn.ModuleList) or len(extractor) != len(reference):
            got = f"{len(extractor)} of them" if isinstance(extractor, Sequence | nn.ModuleList) else type(extractor).__name__
            raise ValueError(f"FrechetLoss: {len(reference)} references need a sequence of as many extractors, got {got}.")
        pairs = {str(i): pair for i, pair in enumerate(zip(extractor, reference, strict=True))}
    else:
        raise TypeError(f"FrechetLoss: reference must be a genperf.metrics.FrechetReference, got {type(reference).__name__}.")
    if not pairs:
        raise ValueError("FrechetLoss: there must be at least one reference, got none.")
    for function, statistics in pairs.values():
        if not isinstance(statistics, FrechetReference):
            raise TypeError(f"FrechetLoss: reference must be a genperf.metrics.FrechetReference, got {type(statistics).__name__}.")
        if function is not None and not callable(function):
            raise TypeError(f"FrechetLoss: extractor must be None or callable, got {type(function).__name__}.")
    return pairs


def _checked_weights(weights: Sequence[float] | Mapping[str, float] | None, names: tuple[str, ...]) -> tuple[float, ...]:
    if weights is None:
        return (1.0,) * len(names)
    if isinstance(weights, Mapping):
        if set(weights) != set(names):
            raise ValueError(f"FrechetLoss: weights must have the names {', '.join(names)}, got {', '.join(map(str, weights))}.")
        weights = [weights[name] for name in names]
    if len(weights) != len(names):
        raise ValueError(f"FrechetLoss: there must be a weight for each of the {len(names)} distances, got {len(weights)}.")
    for weight in weights:
        if not 0 <= weight < math.inf:
            raise ValueError(f"FrechetLoss: weights must be finite and at least 0, got {weight!r}.")
    return tuple(float(weight) for weight in weights)


def _checked_features(features: Any, mean: Tensor) -> Tensor:
    """Features as a matrix [n, d], for a reference with this mean."""
    tensor: Any = features[0] if isinstance(features, list | tuple) and len(features) == 1 else features
    rows = feature_matrix("FrechetLoss", tensor, mean.shape[0])
    if not len(rows):
        raise ValueError(f"FrechetLoss: there must be at least one sample, got features {list(tensor.shape)}.")
    if tensor.device != mean.device:
        raise ValueError(
            f"FrechetLoss: features and statistics must be on one device (the loss has a .to()), got {tensor.device} and {mean.device}."
        )
    return rows
