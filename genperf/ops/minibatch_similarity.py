# SPDX-License-Identifier: Apache-2.0
"""Similarity of each sample to the rest of the batch, for minibatch discrimination."""

import math
from typing import Any

import torch
from torch import Tensor

from .._choices import Impl
from ._autograd import Function, apply, differentiate, need_function, need_graph, saved_tensors
from ._dispatch import Reasons, choose_impl, register_fake, remembered, streaming_unavailable
from ._precision import accumulator_dtype
from ._validate import check_float, check_tensor


def minibatch_similarity(
    features: Tensor,  # [N, B, C]
    impl: Impl | None = None,
) -> Tensor:
    """Sum of the similarities of each sample to all others; Salimans et al., "Improved Techniques for Training GANs" (2016).

    Equivalent to:
        distance = (features.unsqueeze(0) - features.unsqueeze(1)).abs().sum(3)     # [N, N, B]
        similarity = torch.exp(-distance).sum(1) - 1                                # without the sample itself

    Neither forward nor backward builds an N x N tensor, and only the features are saved for backward. B is the number of kernels of the
    layer and C their dimension.

    Args:
        features: float32, bfloat16, float16 or float64.
        impl: "native", "reference", or None to choose automatically.

    Returns:
        similarity [N, B], features' dtype, summed in float32 or better. NaN and infinity propagate within their kernel.
        Differentiable; equal features have no gradient between them. Second derivatives (create_graph=True) run in plain PyTorch with
        N x N x B x C elements.

    Raises:
        ValueError, TypeError: an invalid argument.
        NotImplementedError: an `impl` that cannot run here.
    """
    op = "minibatch_similarity"
    check_tensor(op, "features", features)
    check_float(op, "features", features)
    if features.dim() != 3:
        raise ValueError(f"{op}: features must be [N, B, C], got shape {list(features.shape)}.")
    chosen = choose_impl(op, impl, unavailable(features.device, features.dtype), features)
    if chosen == "reference":
        return minibatch_similarity_reference(features)
    features = features.contiguous()
    if need_function(features):
        return apply(_MinibatchSimilarity, features)
    return torch.ops.genperf.minibatch_similarity(features)


@remembered
def unavailable(device: torch.device, dtype: torch.dtype) -> Reasons:
    """Why each implementation cannot run on this device and dtype, or None; best first."""
    return streaming_unavailable("minibatch_similarity", device, dtype)


class _MinibatchSimilarity(Function):
    @staticmethod
    def forward(features: Tensor) -> Tensor:
        return torch.ops.genperf.minibatch_similarity(features)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], outputs: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_similarity: Tensor) -> Tensor | None:
        (features,) = saved_tensors(ctx)
        if need_graph((grad_similarity,), (features,)):
            return differentiate(lambda t: (minibatch_similarity_reference(t),), (grad_similarity,), (features,), (True,))[0]
        return torch.ops.genperf.minibatch_similarity_backward(grad_similarity.contiguous(), features)


def minibatch_similarity_reference(features: Tensor) -> Tensor:
    """The op in plain PyTorch, differentiated by autograd."""
    wide = features.to(accumulator_dtype(features.dtype))
    distance = (wide.unsqueeze(0) - wide.unsqueeze(1)).abs().sum(3)
    itself = torch.eye(features.shape[0], dtype=torch.bool, device=features.device).unsqueeze(-1)
    return torch.exp(-distance.masked_fill(itself, math.inf)).sum(1).to(features.dtype)


@register_fake("minibatch_similarity")
def _(features: Tensor) -> Tensor:
    return features.new_empty(features.shape[:2])


@register_fake("minibatch_similarity_backward")
def _(grad_similarity: Tensor, features: Tensor) -> Tensor:
    return torch.empty_like(features)
