"""Normalization by a reference batch: batch normalization without dependence between the samples of a batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class _Statistics(NamedTuple):
    """Of each channel over a batch and its positions."""

    mean: Tensor  # [C]
    var: Tensor  # [C], not corrected for the degrees of freedom
    count: Tensor  # [], samples of the batch


class ReferenceBatchNorm(nn.Module):
    """Normalizes every channel by the statistics of a reference batch; Salimans et al. (2016), section 3.4.

    Equivalent to:
        y = (x - reference_mean) / torch.sqrt(reference_var + eps) * weight + bias

    The reference batch is chosen once and goes through the whole network, where each layer takes the statistics of what
    reaches it. `set_reference_batch(network, images)` does that once; with `reference_pass(network, images)` the
    statistics are those under the present weights and have a gradient. The order of other calls plays no part: outside
    of these two nothing changes the statistics, in training mode as in evaluation mode.

    The output of a sample does not depend on the others in its batch, so gradient penalties on a network with this layer
    are those of single samples. With several processes give each the same reference batch; nothing is exchanged.

    Args:
        num_features: C, the size of dimension 1.
        eps: added to the variance.
        affine: learn weight and bias [C].

    Attributes:
        reference_mean, reference_var, reference_count: [C], [C] and [], float32 buffers; count 0 before the first reference.

    Raises:
        ValueError: an argument outside its range.
    """

    reference_mean: Tensor
    reference_var: Tensor
    reference_count: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5, *, affine: bool = True) -> None:
        super().__init__()
        for rule, value, holds in (
            ("num_features must be at least 1", num_features, num_features >= 1),
            ("eps must not be negative", eps, eps >= 0),
        ):
            if not holds:
                raise ValueError(f"{type(self).__name__}: {rule}, got {value!r}.")
        self.num_features = num_features
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features)) if affine else None
        self.register_buffer("reference_mean", torch.zeros(num_features))
        self.register_buffer("reference_var", torch.ones(num_features))
        self.register_buffer("reference_count", torch.zeros(()))
        # On the host, so that asking costs no synchronization.
        self._has_reference = False
        self._recording = False
        # Of the running `reference_pass`, with their gradient.
        self._statistics: _Statistics | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Normalize.

        Args:
            x: [B, C, ...], float32 or float64, or half precision (normalized in float32).

        Returns:
            Of x's shape and dtype.

        Raises:
            ValueError: x of another shape.
            RuntimeError: no reference batch was set.
        """
        name = type(self).__name__
        if x.dim() < 2 or x.shape[1] != self.num_features:
            raise ValueError(f"{name}: x must be [B, {self.num_features}, ...], got {list(x.shape)}.")
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        shape = (-1, self.num_features, *[1] * (x.dim() - 2))
        if self._recording:
            mean, var = self._record(values)
        elif self._statistics is not None:
            mean, var = self._combined(values, self._statistics)
        elif self._has_reference:
            mean, var = self._combined(values, _Statistics(self.reference_mean, self.reference_var, self.reference_count))
        else:
            raise RuntimeError(f"{name}: there must be a reference batch first (set_reference_batch), got a forward pass without one.")
        scale = torch.rsqrt(var + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        y = (values - mean.view(shape)) * scale.view(shape)
        if self.bias is not None:
            y = y + self.bias.view(shape)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, affine={self.weight is not None}"

    def _combined(self, x: Tensor, reference: _Statistics) -> tuple[Tensor, Tensor]:
        """Mean and variance, [C] or [B, C], that samples x are normalized by."""
        return reference.mean, reference.var

    def _record(self, x: Tensor) -> tuple[Tensor, Tensor]:
        name = type(self).__name__
        if self._statistics is not None:
            raise RuntimeError(f"{name}: a layer has one set of statistics, got two calls of one layer in a reference pass.")
        if x.numel() == 0:
            raise ValueError(f"{name}: a reference batch must have at least one value per channel, got {list(x.shape)}.")
        var, mean = torch.var_mean(x, (0, *range(2, x.dim())), correction=0)
        self._statistics = _Statistics(mean, var, mean.new_full((), x.shape[0]))
        return mean, var

    @torch.no_grad()
    def _keep(self) -> None:
        if self._statistics is not None:
            self.reference_mean.copy_(self._statistics.mean)
            self.reference_var.copy_(self._statistics.var)
            self.reference_count.copy_(self._statistics.count)
            self._has_reference = True

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        count = state_dict.get(prefix + "reference_count")
        if count is not None:
            self._has_reference = bool(count > 0)


class VirtualBatchNorm(ReferenceBatchNorm):
    """Normalizes every sample by a reference batch and the sample itself; Salimans et al. (2016), section 3.4.

    Equivalent to (a reference batch of n samples):
        var, mean = torch.var_mean(x, (2, ...), correction=0, keepdim=True)             # of each sample; the value itself for [B, C]
        mean_both = (n * reference_mean + mean) / (n + 1)
        square_both = (n * (reference_var + reference_mean**2) + var + mean**2) / (n + 1)
        y = (x - mean_both) / torch.sqrt(square_both - mean_both**2 + eps) * weight + bias

    with a variance that does not cancel. The reference batch itself is normalized by its own statistics alone. All else
    is as in `ReferenceBatchNorm`: set the reference with `set_reference_batch` or `reference_pass`.
    """

    def _combined(self, x: Tensor, reference: _Statistics) -> tuple[Tensor, Tensor]:
        if x.dim() > 2:
            var, mean = torch.var_mean(x, tuple(range(2, x.dim())), correction=0)
        else:
            var, mean = torch.zeros_like(x), x
        weight = 1 / (reference.count + 1)
        difference = mean - reference.mean
        both = torch.lerp(reference.var.to(var.dtype), var, weight.to(var.dtype)) + weight * (1 - weight) * difference.square()
        return reference.mean + weight * difference, both


def set_reference_batch(network: nn.Module, *inputs: Any, **options: Any) -> None:
    """Let every `ReferenceBatchNorm` and `VirtualBatchNorm` of a network take its statistics from a batch.

    Equivalent to:
        with torch.no_grad():
            network(*inputs, **options)                                     # each layer normalizes by this batch

    The statistics are buffers that are saved with the network; they have no gradient and stay as they are while weights
    change, until the next call. The network's mode is left alone.

    Raises:
        ValueError: a network without such a layer.
        RuntimeError: one of the layers is called twice in the pass.
        Where the pass fails, all statistics stay as they were.
    """
    with torch.no_grad(), reference_pass(network, *inputs, **options):
        pass


@contextmanager
def reference_pass(network: nn.Module, *inputs: Any, **options: Any) -> Iterator[None]:
    """Within this context the network normalizes by a reference batch as the present weights see it, with gradients.

    As published, the reference batch goes through the network at every step:
        with reference_pass(discriminator, reference):
            logits = discriminator(images)
        loss(logits).backward()                                             # also through the statistics

    That doubles a forward pass of small batches. The statistics stay in the buffers afterwards, without their gradient.
    Raises like `set_reference_batch`.
    """
    layers = [module for module in network.modules() if isinstance(module, ReferenceBatchNorm)]
    if not layers:
        raise ValueError(f"reference_pass: the network must have a ReferenceBatchNorm or VirtualBatchNorm, got {type(network).__name__}.")
    outer = [layer._statistics for layer in layers]
    try:
        for layer in layers:
            layer._statistics, layer._recording = None, True
        try:
            network(*inputs, **options)
        finally:
            for layer in layers:
                layer._recording = False
        for layer in layers:
            layer._keep()
        yield
    finally:
        for layer, statistics in zip(layers, outer, strict=True):
            layer._statistics = statistics
