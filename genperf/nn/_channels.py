"""Helpers for layers whose channel dimension can be anywhere: inputs are not permuted."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops._layout import as_positions, from_positions
from ..ops._validate import check_channel_dim, check_mask, check_tensor


def check_input(name: str, x: Tensor, channel_dim: int, mask: Tensor | None) -> int:
    """Check the input and the mask of a layer, and return the channel dimension as a non-negative number."""
    check_tensor(name, "x", x)
    channel = check_channel_dim(name, x, channel_dim)
    check_mask(name, mask, x, channel)
    return channel


def project(
    x: Tensor,  # [..., I, ...]
    channel: int,
    weight: Tensor,  # [O, I]
    bias: Tensor | None = None,  # [O]
) -> Tensor:
    """torch.nn.functional.linear over the dimension `channel` of x, without moving it to the end."""
    if channel % x.dim() == x.dim() - 1:
        return F.linear(x, weight, bias)
    positions = as_positions(x, channel % x.dim())
    if positions.stride(1) == 1 or positions.shape[2] == 1:
        projected = F.linear(positions.transpose(1, 2), weight, bias).transpose(1, 2)
    else:
        weights = weight.expand(positions.shape[0], -1, -1)
        projected = torch.bmm(weights, positions) if bias is None else torch.baddbmm(bias.unsqueeze(1), weights, positions)
    return from_positions(projected, x, channel % x.dim())


def project_vectors(layer: nn.Linear, vectors: Tensor) -> Tensor:
    """Apply a Linear layer to vectors [outer, C, inner], in their dtype."""
    bias = None if layer.bias is None else layer.bias.to(vectors.dtype)
    return project(vectors, 1, layer.weight.to(vectors.dtype), bias)


def linear(layer: nn.Module, x: Tensor, channel: int) -> Tensor:
    """Apply a Linear layer over the dimension `channel` of x, or any other layer to x as it is."""
    return project(x, channel, layer.weight, layer.bias) if isinstance(layer, nn.Linear) else layer(x)


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
    return vectors.movedim(-1, channel_dim).contiguous()
