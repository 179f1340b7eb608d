"""The Frechet distance of features as a loss for generators."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, distributed, nn

from .._distributed import world_size
from ..metrics._features import as_rows, whole_number
from ..metrics._sample_moments import Moments, population_moments, sample_moments
from ..metrics.frechet_reference import FrechetReference
from ..ops.covariance_factor import working_dtype
from ..ops.frechet_distance import frechet_distance

Extractor = Callable[[Tensor], Tensor]

# Keeps a normalized distance near 0 from a steep gradient.
NORMALIZE_EPS = 0.01


class FrechetLoss(nn.Module):
    """Frechet distance between the features of generated images and those of real ones; Yang et al., FD-loss (2026), arXiv 2604.28190.

    Equivalent to (one extractor, no queue, no momentum, several samples):
        features = extractor(images).double()
        distance = genperf.frechet_distance(features.mean(0), features.T.cov(), reference.mean, reference.cov)

    A batch alone is a poor estimate of a distribution. With `queue_size` the distance is that of the batch together with
    the last `queue_size` features before it. With `momentum` it is that of moving averages of the moments (the mixture
    of all batches, the weight of each `momentum` times that of the next); these are weighted means from the first step on,
    so that no start value has to fade. Without either it is that of the batch. The gradient is that of the current
    batch; a batch that is a part p of the samples has a gradient p times as large as alone.

    Queue and averages change at each forward pass in training mode, after the distance was taken, and never in eval
    mode. Both are buffers: a run that is resumed from a state_dict continues as it would have. Before training, fill them
    with `update`. The queue holds features in float32. A sample with a NaN or infinite feature does not enter the queue
    (of a full one, the oldest sample stays in its place), and a batch with one does not enter the averages; the distance of that
    step is what frechet_distance makes of it.

    Moments and distance are float64 (float32 on MPS), autocast or not, and neither `.half()` nor `.to(dtype)` changes
    that. Fewer samples than features cost less: then no covariance is formed. A queue at least as long as the
    features have dimensions keeps the sums of its moments, so that the cost of a step does not grow with the queue; each time round,
    they are summed anew. How full a queue is, and where it goes on, are numbers on the host: it is not for CUDA graphs or torch.compile.

    **Extractors.** A module is frozen for good: it is put in eval mode, its parameters stop requiring a gradient, and it
    moves with `.to()`. It is no submodule: state_dict(), parameters() and train() leave it out. To use a network that goes on
    training, a critic say, pass a copy. Other callables are called as they are.

    **Several extractors.** Sequences of references and extractors, or a mapping name -> (extractor, reference), give the
    sum of the distances times `weights`. `normalize=True` divides each distance by its own value + 0.01, without a
    gradient through the divisor, so that features of different scale pull alike; the loss is then near the sum of the weights.

    **Several processes.** With torch.distributed initialized, features are gathered and every rank returns the same loss, that of the
    joined batch; each gets the gradient of its own samples, without further communication. The sum of the ranks' gradients is
    that of one process on the joined batch. DistributedDataParallel takes their mean: multiply the loss by the number of ranks
    there. All ranks must have batches of one size, which is not checked: with others torch.distributed fails, or waits for ever. Take
    drop_last=True for a DataLoader.

    Args:
        reference: statistics of real features, a genperf.metrics.FrechetReference; a sequence of them; or a mapping.
        extractor: images -> features [B, d], or [B, d, H, W], which are averaged over positions; also in a list of one.
            None: forward gets features. With a sequence of references a sequence.
        weights: of several distances, a sequence or a mapping by name, all at least 0; None: 1 each.
        queue_size: number of earlier features that take part.
        momentum: of the moving averages, 0 <= momentum < 1; FD-loss takes 0.999. Not with a queue.
        normalize: divide each distance by its own value.
        unbiased: divide covariances by n - 1 (of averages: by 1 - the sum of the squared weights), as most statistics files
            do; False: by n, as StyleGAN does. Covariances of one sample are 0.
        gather: join the batches of all ranks.
        precision, impl: as in genperf.frechet_distance.

    Attributes:
        names: of the distances; "0", "1", ... in sequences.
        distances: name -> distance at the last forward pass, a detached scalar on the device; neither weighted nor normalized.

    Raises:
        ValueError, TypeError: arguments that do not fit.
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
        precision: str = "float64",
        impl: str | None = None,
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
        self.precision = precision
        self.impl = impl
        self.distances: dict[str, Tensor] = {}
        # In a tuple, which keeps modules out of state_dict(), parameters() and train().
        self._extractors = tuple(pairs[name][0] for name in self.names)
        for module in self._modules_of_extractors():
            module.eval().requires_grad_(False)
        self.parts = nn.ModuleDict(
            {name: _FeatureDistance(ref.mean, ref.factor, queue_size, momentum, unbiased) for name, (_, ref) in pairs.items()}
        )

    def forward(self, images: Tensor) -> Tensor:
        """Distance of the generated `images` (or features) to the reference, the weighted sum of several.

        Returns:
            A scalar, float32 (float64 for float64 features), differentiable once in the images.

        Raises:
            ValueError, TypeError: features that do not fit, as a sentence; queue and averages are unchanged.
        """
        features = self._extract(images)
        dtype = torch.float64 if any(f.dtype == torch.float64 for f in features) else torch.float32
        total, distances, steps = 0, {}, []
        for name, weight, rows in zip(self.names, self.weights, features, strict=True):
            part = self.parts[name]
            # Outside autocast: the products of moments would run in half precision.
            with torch.autocast(rows.device.type, enabled=False):
                step = part.step(rows)
                distance = part.distance(step, self.precision, self.impl)
            steps.append(step)
            distances[name] = distance.detach()
            total = total + weight * (distance / (distance.detach() + NORMALIZE_EPS) if self.normalize else distance)
        self.distances = distances
        if self.training:
            for name, step in zip(self.names, steps, strict=True):
                self.parts[name].commit(step)
        return total.to(dtype)

    @torch.no_grad()
    def update(self, images: Tensor) -> None:
        """Let `images` (or features) into queue and averages without a distance: fills them before training, in any mode."""
        for name, rows in zip(self.names, self._extract(images), strict=True):
            with torch.autocast(rows.device.type, enabled=False):
                self.parts[name].commit(self.parts[name].step(rows))

    def extra_repr(self) -> str:
        return f"{', '.join(self.names)}, queue_size={self.queue_size}, momentum={self.momentum}, normalize={self.normalize}"

    def _extract(self, images: Tensor) -> list[Tensor]:
        """Features [n, d] of each extractor, all ranks' samples together."""
        found = []
        for name, extractor in zip(self.names, self._extractors, strict=True):
            if isinstance(extractor, nn.Module) and any(module.training for module in extractor.modules()):
                extractor.eval()
            features = images if extractor is None else extractor(images)
            found.append(_checked_features(features, self.parts[name].mean))
        if self.gather and world_size() > 1:
            found = [_GatherBatch.apply(rows) for rows in found]
        return found

    def _modules_of_extractors(self) -> list[nn.Module]:
        return list(dict.fromkeys(e for e in self._extractors if isinstance(e, nn.Module)))

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        for module in self._modules_of_extractors():
            module._apply(fn)
        return self


class _Statistics(nn.Module):
    """A module whose buffers follow a move to another device but keep their dtype, except for float64 where there is none."""

    def _apply(self, fn, recurse=True):
        for child in self.children():
            child._apply(fn)
        for name, buffer in self._buffers.items():
            device = fn(torch.empty(0, device=buffer.device)).device
            self._buffers[name] = buffer.to(device, working_dtype(device) if buffer.dtype == torch.float64 else buffer.dtype)
        return self


class _FeatureDistance(_Statistics):
    """The distance to one reference, over what `history` remembers and the batch."""

    def __init__(self, mean: Tensor, factor: Tensor, queue_size: int, momentum: float | None, unbiased: bool) -> None:
        super().__init__()
        dtype = working_dtype(mean.device)
        mean = mean.detach().to(dtype)
        self.unbiased = unbiased
        self.register_buffer("mean", mean.clone(), persistent=False)
        self.register_buffer("factor", factor.detach().to(mean.device, dtype, copy=True), persistent=False)
        self.history = None
        if queue_size:
            self.history = _Queue(queue_size, mean, unbiased)
        elif momentum is not None:
            self.history = _Averages(momentum, mean, unbiased)

    def step(self, rows: Tensor) -> "Tensor | _AveragesState":
        """What the batch adds, to give to `distance` and `commit`."""
        x = rows.to(self.mean.dtype)
        return x if self.history is None else self.history.step(x)

    def distance(self, step: "Tensor | _AveragesState", precision: str, impl: str | None) -> Tensor:
        moments = _moments(step, self.unbiased) if self.history is None else self.history.moments(step)
        return frechet_distance(
            moments.mean,
            moments.cov,
            self.mean,
            None,
            factor1=moments.factor,
            factor2=self.factor,
            precision=precision,
            impl=impl,
        )

    @torch.no_grad()
    def commit(self, step: "Tensor | _AveragesState") -> None:
        if self.history is not None:
            self.history.commit(step)


class _Queue(_Statistics):
    """The last features in a ring, with the sums of their moments where a covariance can come to be cheaper than a factor."""

    def __init__(self, size: int, mean: Tensor, unbiased: bool) -> None:
        super().__init__()
        self.size = size
        self.unbiased = unbiased
        self.register_buffer("features", mean.new_zeros(size, mean.shape[0], dtype=torch.float32))
        self.register_buffer("cursor", torch.zeros(2, dtype=torch.int64, device=mean.device))
        # The same two numbers on the host, so that asking costs no synchronization.
        self._position, self._filled = 0, 0
        self.has_sums = size >= mean.shape[0]
        if self.has_sums:
            # Sums of features minus the shift: their products do not cancel where the mean is large.
            self.register_buffer("shift", mean.clone())
            self.register_buffer("total", torch.zeros_like(mean))
            self.register_buffer("outer", mean.new_zeros(mean.shape[0], mean.shape[0]))

    def step(self, x: Tensor) -> Tensor:
        return x

    def moments(self, x: Tensor) -> Moments:
        n, d = x.shape
        if not self.has_sums or self._filled + n <= d:
            return _moments(torch.cat([self.features[: self._filled].to(x.dtype), x]), self.unbiased)
        if self._filled == 0:
            return _moments(x, self.unbiased)
        center = self.total / self._filled
        held = self.shift + center, self.outer / self._filled - torch.outer(center, center)
        count = self._filled + n
        mean, cov = _mixture(*held, *population_moments(x), n / count)
        return Moments(mean, cov * (count / (count - 1)) if self.unbiased else cov)

    def commit(self, x: Tensor) -> None:
        rows = x.detach().to(self.features.dtype)
        if self._filled < self.size:
            # To leave samples out waits for the device; a full queue has others to put in their place.
            rows = rows[rows.isfinite().all(1)]
        rows = rows[-self.size :]
        n = rows.shape[0]
        index = (torch.arange(n, device=rows.device) + self._position) % self.size
        old = self.features[index]
        rows = torch.where(rows.isfinite().all(1, keepdim=True), rows, old)
        self.features[index] = rows
        if self.has_sums and self._position + n >= self.size:
            self._sum_anew()
        elif self.has_sums:
            entering = rows.to(self.total.dtype) - self.shift
            leaving = old[min(n, self.size - self._filled) :].to(self.total.dtype) - self.shift
            self.total.add_(entering.sum(0) - leaving.sum(0))
            self.outer.addmm_(entering.T, entering).addmm_(leaving.T, leaving, alpha=-1)
        self._position = (self._position + n) % self.size
        self._filled = min(self._filled + n, self.size)
        self.cursor[0].fill_(self._position)
        self.cursor[1].fill_(self._filled)

    def _sum_anew(self) -> None:
        """Of a full queue: subtraction leaves rounding behind, as large as the largest sample that ever was in."""
        self.total.zero_()
        self.outer.zero_()
        for rows in self.features.split(1024):
            rows = rows.to(self.total.dtype) - self.shift
            self.total.add_(rows.sum(0))
            self.outer.addmm_(rows.T, rows)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._position, self._filled = self.cursor.tolist()


class _AveragesState(NamedTuple):
    mean: Tensor  # [d]
    cov: Tensor  # [d, d], of the mixture as a population
    weights: Tensor  # [], their sum 1 - momentum ** steps
    squares: Tensor  # [], sum of the squared weights of all samples; its inverse is the effective number of samples


class _Averages(_Statistics):
    """Moments of the mixture of all batches so far, each weighing `momentum` times as much as the next."""

    def __init__(self, momentum: float, mean: Tensor, unbiased: bool) -> None:
        super().__init__()
        self.momentum = momentum
        self.unbiased = unbiased
        self.register_buffer("mean", torch.zeros_like(mean))
        self.register_buffer("cov", mean.new_zeros(mean.shape[0], mean.shape[0]))
        self.register_buffer("weights", mean.new_zeros(()))
        self.register_buffer("squares", mean.new_zeros(()))

    def step(self, x: Tensor) -> _AveragesState:
        weights = self.momentum * self.weights + (1 - self.momentum)
        weight = (1 - self.momentum) / weights  # 1 at the first step
        mean, cov = _mixture(self.mean, self.cov, *population_moments(x), weight)
        return _AveragesState(mean, cov, weights, (1 - weight) ** 2 * self.squares + weight**2 / x.shape[0])

    def moments(self, step: _AveragesState) -> Moments:
        if not self.unbiased:
            return Moments(step.mean, step.cov)
        rest = 1 - step.squares
        return Moments(step.mean, step.cov / torch.where(rest > 0, rest, 1))

    def commit(self, step: _AveragesState) -> None:
        finite = step.mean.isfinite().all() & step.cov.isfinite().all()
        for name, value in step._asdict().items():
            buffer = getattr(self, name)
            buffer.copy_(torch.where(finite, value.detach(), buffer))


class _GatherBatch(torch.autograd.Function):
    """The rows of all ranks; backward, each rank keeps the gradient of its own."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        ctx.count = rows.shape[0]
        rows = rows.contiguous()
        parts = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad.narrow(0, ctx.count * distributed.get_rank(), ctx.count)


def _moments(x: Tensor, unbiased: bool) -> Moments:
    return sample_moments("FrechetLoss", x, unbiased and len(x) > 1)


def _mixture(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor, weight: float | Tensor) -> tuple[Tensor, Tensor]:
    """Moments of a mixture of two populations, `weight` that of the second; nothing cancels."""
    difference = mean2 - mean1
    between = weight * (1 - weight) * torch.outer(difference, difference)
    return mean1 + weight * difference, (1 - weight) * cov1 + weight * cov2 + between


def _named_pairs(reference: object, extractor: object) -> dict[str, tuple[Extractor | None, FrechetReference]]:
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


def _checked_features(features: object, mean: Tensor) -> Tensor:
    """Features as rows [n, d], for a reference with this mean."""
    if isinstance(features, list | tuple) and len(features) == 1:
        features = features[0]
    rows = as_rows("FrechetLoss", features, mean.shape[0])
    if not len(rows):
        raise ValueError(f"FrechetLoss: there must be at least one sample, got features {list(features.shape)}.")
    if features.device != mean.device:
        raise ValueError(
            f"FrechetLoss: features and statistics must be on one device (the loss has a .to()), got {features.device} and {mean.device}."
        )
    return rows
