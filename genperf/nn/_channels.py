# SPDX-License-Identifier: Apache-2.0
"""Helpers for layers whose channel dimension can be anywhere: inputs are not permuted."""

from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops._layout import Positions, for_inductor
from ..ops._validate import check_channel_dim, check_mask, check_tensor


def check_input(name: str, x: Tensor, channel_dim: int, mask: Tensor | None) -> int:
    """Check the input and the mask of a layer, and return the channel dimension as a non-negative number."""
    check_tensor(name, "x", x)
    channel = check_channel_dim(name, x, channel_dim)
    check_mask(name, mask, x, channel)
    return channel


def linear(layer: nn.Module, x: Tensor, channel: int) -> Tensor:
    """Call a layer that maps the last dimension, such as a Linear, over the dimension `channel` of x.

    The layer is called, so hooks, adapters, parametrizations and replaced modules take effect. It sees [..., C].
    """
    channel %= x.dim()
    if isinstance(layer, nn.Identity) or channel == x.dim() - 1:
        return layer(x)
    positions = Positions(x, channel)
    return positions.restore(_apply(layer, positions.vectors))


def project(
    x: Tensor,  # [..., I, ...]
    channel: int,
    weight: Tensor,  # [O, I]
) -> Tensor:
    """torch.nn.functional.linear over the dimension `channel` of x, without moving it to the end."""
    channel %= x.dim()
    if channel == x.dim() - 1:
        return F.linear(x, weight)
    positions = Positions(x, channel)
    return positions.restore(_matmul(positions.vectors, weight, None))


def project_vectors(layer: nn.Module, vectors: Tensor) -> Tensor:
    """Call a layer that maps the last dimension over the channels of vectors [outer, C, inner], and compute in their dtype.

    With parameters of another dtype, half-precision vectors are processed under autocast, others in the dtype of the parameters.
    """
    dtype = parameter_dtype(layer)
    if dtype is None or dtype == vectors.dtype:
        return _apply(layer, vectors)
    if vectors.dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(vectors.device.type, vectors.dtype):
            return _apply(layer, vectors).to(vectors.dtype)
    return _apply(layer, vectors.to(dtype)).to(vectors.dtype)


def parameter_dtype(layer: nn.Module) -> torch.dtype | None:
    """The dtype that a layer computes in; None for one without floating-point parameters, as Identity or a quantized Linear."""
    weight = getattr(layer, "weight", None)  # of a DataParallel replica, which has no parameters
    tensors = [weight] if isinstance(weight, Tensor) else layer.parameters()
    return next((t.dtype for t in tensors if t.is_floating_point()), None)


def _apply(layer: nn.Module, vectors: Tensor) -> Tensor:
    if _is_plain_linear(layer):
        return _matmul(vectors, layer.weight, layer.bias)
    return layer(vectors.transpose(1, 2)).transpose(1, 2)


def _is_plain_linear(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether calling the layer is F.linear of its tensors and nothing else, so that the operands may be swapped."""
    return (
        type(layer) is nn.Linear
        and type(layer.weight) in (Tensor, nn.Parameter)
        and "forward" not in layer.__dict__
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
        and not torch.nn.modules.module._has_any_global_hook()
    )


def _matmul(vectors: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """weight @ vectors + bias for vectors [outer, I, inner], without a copy of them."""
    if vectors.stride(1) == 1 or vectors.shape[2] == 1:
        return F.linear(vectors.transpose(1, 2), weight, bias).transpose(1, 2)
    weights = weight.expand(vectors.shape[0], -1, -1)
    return torch.bmm(weights, vectors) if bias is None else torch.baddbmm(bias.unsqueeze(1), weights, vectors)


def channels_to(t: Tensor, channel_dim: int) -> Tensor:
    """Move the last dimension of t to `channel_dim`."""
    # By numbers that are not negative, as torch.onnx.export(dynamo=False) writes the others into the graph.
    return t.movedim(t.dim() - 1, channel_dim % t.dim())


def split_codebooks(x: Tensor, channel: int, num_codebooks: int) -> Tensor:
    """View the channels [num_codebooks * D] at `channel` of x as two dimensions [num_codebooks, D]."""
    # Not `unflatten`, after which torch.onnx.export(dynamo=False) takes every size for a constant.
    sizes = x.shape
    return x.reshape(*sizes[:channel], num_codebooks, sizes[channel] // num_codebooks, *sizes[channel + 1 :])


def join_codebooks(x: Tensor, channel: int) -> Tensor:
    """Undo `split_codebooks`."""
    return for_inductor(x.flatten(channel, channel + 1))


def codebooks_last(indices: Tensor, channel: int) -> Tensor:
    """Move the codebook dimension of indices, which is where the channels were, to the end; drop it if there is one codebook."""
    return indices.movedim(channel, -1) if indices.shape[channel] > 1 else indices.squeeze(channel)


def decode_codebooks(
    indices: Tensor, num_codebooks: int, channel_dim: int, decode: Callable[[Tensor], Tensor], project_out: nn.Module
) -> Tensor:
    """Decode indices as returned by `codebooks_last`; negative indices give zeros. `decode` appends a dimension of channels."""
    codes = decode(indices)
    if num_codebooks > 1:
        codes, indices = codes.flatten(-2), indices[..., 0]
    vectors = torch.where(indices.unsqueeze(-1) >= 0, project_out(codes), 0)
    return channels_to(vectors, channel_dim).contiguous()
