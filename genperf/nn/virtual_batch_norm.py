# SPDX-License-Identifier: Apache-2.0
"""Normalization by the statistics of a reference batch, without dependence between the samples of a batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .._typing import signature_of
from ..ops._validate import check


class _Statistics(NamedTuple):
    """Statistics of each channel over batch and positions."""

    mean: Tensor  # [C]
    var: Tensor  # [C], biased
    count: Tensor  # [], number of samples in the batch


class ReferenceBatchNorm(nn.Module):
    """Normalizes each channel by the statistics of a reference batch; Salimans et al. (2016), section 3.4.

    Equivalent to:
        y = (x - reference_mean) / torch.sqrt(reference_var + eps) * weight + bias

    The reference batch is chosen once and passed through the whole network, where each layer computes the statistics of
    its input. `set_reference_batch(network, images)` does so once; `reference_pass(network, images)` uses the statistics
    under the current weights, with their gradient. Nothing else changes the statistics, in training or evaluation mode.

    A sample's output does not depend on the rest of its batch, so a gradient penalty on a network with this layer
    penalizes single samples. Under torch.distributed, pass every rank the same reference batch; the layer does not communicate.

    Args:
        num_features: C, the size of dimension 1.
        eps: added to the variance.
        affine: whether to learn weight and bias [C].

    Attributes:
        reference_mean, reference_var, reference_count: [C], [C] and [], float32 buffers; the count is 0 until a reference
            batch is set.

    Raises:
        ValueError: an argument outside its range.
    """

    reference_mean: Tensor
    reference_var: Tensor
    reference_count: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5, *, affine: bool = True) -> None:
        super().__init__()
        name = type(self).__name__
        check(name, "num_features must be at least 1", num_features, num_features >= 1)
        check(name, "eps must not be negative", eps, eps >= 0)
        self.num_features = num_features
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features)) if affine else None
        self.register_buffer("reference_mean", torch.zeros(num_features))
        self.register_buffer("reference_var", torch.ones(num_features))
        self.register_buffer("reference_count", torch.zeros(()))
        # reference_count > 0, on the host to avoid a device synchronization.
        self._has_reference = False
        self._recording = False
        # Statistics of the current `reference_pass`, with their gradient.
        self._statistics: _Statistics | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Normalize.

        Args:
            x: [B, C, ...], float32 or float64, or half precision (normalized in float32).

        Returns:
            A tensor of x's shape and dtype.

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
            raise RuntimeError(f"{name}: a reference batch must be set before the forward pass (set_reference_batch), got none.")
        scale = torch.rsqrt(var + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        y = (values - mean.view(shape)) * scale.view(shape)
        if self.bias is not None:
            y = y + self.bias.view(shape)
        return y.to(x.dtype)

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self) -> None: ...

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, affine={self.weight is not None}"

    def _combined(self, x: Tensor, reference: _Statistics) -> tuple[Tensor, Tensor]:
        """Mean and variance, [C] or [B, C], to normalize the samples x by."""
        return reference.mean, reference.var

    def _record(self, x: Tensor) -> tuple[Tensor, Tensor]:
        name = type(self).__name__
        if self._statistics is not None:
            raise RuntimeError(f"{name}: a layer must be called once in a reference pass, got two calls.")
        if x.numel() == 0:
            raise ValueError(f"{name}: a reference batch must have at least one value per channel, got {list(x.shape)}.")
        var, mean = torch.var_mean(x, (0, *range(2, x.dim())), correction=0)
        self._statistics = _Statistics(mean, var, mean.new_full((), x.shape[0]))
        return mean, var

    @torch.no_grad()
    def _store_statistics(self) -> None:
        if self._statistics is not None:
            self.reference_mean.copy_(self._statistics.mean)
            self.reference_var.copy_(self._statistics.var)
            self.reference_count.copy_(self._statistics.count)
            self._has_reference = True

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        count = state_dict.get(prefix + "reference_count")
        if count is not None:
            self._has_reference = bool(count > 0)


class VirtualBatchNorm(ReferenceBatchNorm):
    """Normalizes each sample by a reference batch and the sample itself; Salimans et al. (2016), section 3.4.

    Equivalent to (a reference batch of n samples):
        var, mean = torch.var_mean(x, (2, ...), correction=0, keepdim=True)             # of each sample; the value itself for [B, C]
        mean_both = (n * reference_mean + mean) / (n + 1)
        square_both = (n * (reference_var + reference_mean**2) + var + mean**2) / (n + 1)
        y = (x - mean_both) / torch.sqrt(square_both - mean_both**2 + eps) * weight + bias

    with the variance computed without cancellation. The reference batch is normalized by its own statistics alone. Set the
    reference batch with `set_reference_batch` or `reference_pass`, as for `ReferenceBatchNorm`.
    """

    def _combined(self, x: Tensor, reference: _Statistics) -> tuple[Tensor, Tensor]:
        if x.dim() > 2:
            var, mean = torch.var_mean(x, tuple(range(2, x.dim())), correction=0)
        else:
            var, mean = torch.zeros_like(x), x
        weight = 1 / (reference.count + 1)
        difference = mean - reference.mean
        combined_var = torch.lerp(reference.var.to(var.dtype), var, weight.to(var.dtype)) + weight * (1 - weight) * difference.square()
        return reference.mean + weight * difference, combined_var


def set_reference_batch(network: nn.Module, *inputs: Any, **options: Any) -> None:
    """Set the statistics of every `ReferenceBatchNorm` and `VirtualBatchNorm` in a network from a batch.

    Equivalent to:
        with torch.no_grad():
            network(*inputs, **options)                                     # each layer normalizes by this batch

    The statistics are persistent buffers without a gradient; they do not change with the weights until the next call. The
    mode of the network does not change. If the pass fails, no statistics change.

    Raises:
        ValueError: a network without such a layer.
        RuntimeError: a layer that is called twice in the pass.
    """
    with torch.no_grad(), reference_pass(network, *inputs, **options):
        pass


@contextmanager
def reference_pass(network: nn.Module, *inputs: Any, **options: Any) -> Iterator[None]:
    """Context manager: normalize by the statistics of a reference batch under the current weights, with gradients.

    As published, the reference batch goes through the network at every step:
        with reference_pass(discriminator, reference):
            logits = discriminator(images)
        loss(logits).backward()                                             # also through the statistics

    This adds a forward pass of the reference batch to each step. The buffers keep the statistics afterwards, without
    gradient. Raises the errors of `set_reference_batch`.
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
            layer._store_statistics()
        yield
    finally:
        for layer, statistics in zip(layers, outer, strict=True):
            layer._statistics = statistics
