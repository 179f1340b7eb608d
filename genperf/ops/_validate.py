# SPDX-License-Identifier: Apache-2.0
"""Checks of arguments. Each error names the op, the rule and the value."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ._autograd import transformed, values_of
from ._layout import positions_shape
from ._precision import HALF_DTYPES

FLOAT_DTYPES = (torch.float32, *HALF_DTYPES, torch.float64)


def check_tensor(op: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}.")


def check_channel_dim(op: str, x: Tensor, channel_dim: int) -> int:
    """Check channel_dim. Returns it as a non-negative number."""
    dims = x.dim()
    if not -dims <= channel_dim < dims:
        raise ValueError(f"{op}: channel_dim must be a dimension of x, got channel_dim={channel_dim} for x of shape {list(x.shape)}.")
    return channel_dim % dims


def check_positions(op: str, name: str, value: Tensor, x: Tensor, channel: int) -> None:
    """`value` must hold one entry for each position of x."""
    expected = positions_shape(x, channel)
    if list(value.shape) != expected:
        raise ValueError(f"{op}: {name} must have the shape of x without its channel dimension, {expected}, got {list(value.shape)}.")
    if value.device != x.device:
        raise ValueError(f"{op}: {name} and x must be on one device, got {value.device} and {x.device}.")


def check_vectors(op: str, x: Tensor, codebook: Tensor, channel_dim: int) -> int:
    """Check x against the codebook. Returns the channel dimension as a non-negative number."""
    check_tensor(op, "x", x)
    check_tensor(op, "codebook", codebook)
    channel = check_channel_dim(op, x, channel_dim)
    if codebook.dim() != 2:
        raise ValueError(f"{op}: codebook must have shape [K, D], got {list(codebook.shape)}.")
    _check_codes(op, x, codebook, channel, channel_dim)
    return channel


def check_codes(op: str, x: Tensor, codebook: Tensor, channel_dim: int) -> int:
    """`check_vectors` with one or several codebooks, [..., K, D]."""
    check_tensor(op, "x", x)
    channel = check_channel_dim(op, x, channel_dim)
    _check_codes(op, x, codebook, channel, channel_dim)
    return channel


def _check_codes(op: str, x: Tensor, codebook: Tensor, channel: int, channel_dim: int) -> None:
    num_codes, code_dim = codebook.shape[-2:]
    if num_codes == 0 or code_dim == 0:
        shape = [num_codes, code_dim]
        raise ValueError(f"{op}: codebook must hold at least one code of at least one dimension, got shape {shape}.")
    if x.shape[channel] != code_dim:
        raise ValueError(
            f"{op}: the channel dimension of x must be as long as a code, got {x.shape[channel]} channels "
            f"(x {list(x.shape)}, channel_dim={channel_dim}) and codes of {code_dim}{_other_channel_dim(x, code_dim)}."
        )
    check_float(op, "x", x)
    if codebook.dtype != x.dtype and not (codebook.dtype == torch.float32 and x.dtype in HALF_DTYPES):
        raise TypeError(f"{op}: codebook must have the dtype of x, or float32 with a half-precision x, got {codebook.dtype} and {x.dtype}.")
    if codebook.device != x.device:
        raise ValueError(f"{op}: x and codebook must be on one device, got {x.device} and {codebook.device}.")


def _other_channel_dim(x: Tensor, channels: int) -> str:
    """What an error says if one dimension of x is as long as its channels should be."""
    dims = [dim for dim, size in enumerate(x.shape) if size == channels]
    return f"; channel_dim={dims[0]} is that dimension of x" if len(dims) == 1 else ""


def check_layer_input(
    name: str, x: Tensor, mask: Tensor | None, *, dim: int, channel_dim: int, dtype: torch.dtype, is_option: bool = True
) -> int:
    """Check the input of a layer whose codebook has `dtype`, and its mask. Returns the channel dimension as a non-negative number.

    `is_option`: whether channel_dim is an option of the layer, which an error may name.
    """
    check_tensor(name, "x", x)
    channel = check_channel_dim(name, x, channel_dim)
    check_float(name, "x", x)
    if x.shape[channel] != dim:
        hint = _other_channel_dim(x, dim) if is_option else ""
        raise ValueError(f"{name}: x must have {dim} channels in dimension {channel_dim}, got {list(x.shape)}{hint}.")
    if x.dtype != dtype and not (dtype == torch.float32 and x.dtype in HALF_DTYPES):
        rule = "x must have the dtype of the codebook, or half precision with a float32 codebook"
        raise TypeError(f"{name}: {rule}, got {x.dtype} and {dtype}.")
    check_mask(name, mask, x, channel)
    return channel


def check_float(op: str, name: str, value: Tensor) -> None:
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: {name} must be float32, bfloat16, float16 or float64, got {value.dtype}.")


def check_noise(op: str, noise: Tensor, name: str, x: Tensor, shape: Sequence[int]) -> None:
    """`noise` must have `shape`, be on x's device, and be float32 or of x's dtype."""
    check_tensor(op, "noise", noise)
    if noise.shape != shape:
        raise ValueError(f"{op}: noise must have shape {list(shape)}, got {list(noise.shape)}.")
    if noise.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"{op}: noise must be float32 or have the dtype of {name}, {x.dtype}, got {noise.dtype}.")
    if noise.device != x.device:
        raise ValueError(f"{op}: noise and {name} must be on one device, got {noise.device} and {x.device}.")


def check_mask(op: str, mask: Tensor | None, x: Tensor, channel: int) -> None:
    """`mask`, if given, must hold a bool for each position of x."""
    if mask is None:
        return
    check_tensor(op, "mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"{op}: mask must be bool, got {mask.dtype}.")
    check_positions(op, "mask", mask, x, channel)


def can_branch_on(t: Tensor) -> bool:
    """Whether Python may branch on the values of t: on the CPU, and not while torch.compile or torch.func traces."""
    return _is_readable(t) and not transformed()


def _is_readable(t: Tensor) -> bool:
    return t.device.type == "cpu" and not torch.compiler.is_compiling() and not isinstance(t, FakeTensor)


def check_index_range(op: str, indices: Tensor, num_codes: int, lowest: int | None = -1) -> None:
    """`indices` must lie between `lowest` (None: any negative number) and num_codes - 1.

    The values are read on the CPU only, where that does not synchronize, and not by torch.compile.
    """
    if not _is_readable(indices) or indices.numel() == 0:
        return
    low, high = (int(bound) for bound in values_of(indices).aminmax())
    if high >= num_codes or (lowest is not None and low < lowest):
        rule = f"be at most {num_codes - 1}" if lowest is None else f"lie between {lowest} and {num_codes - 1}"
        raise IndexError(f"{op}: indices must {rule}, got {low} ... {high}.")


def check(name: str, rule: str, value: object, holds: bool) -> None:
    """Raise a ValueError with the rule and the value unless the rule holds."""
    if not holds:
        raise ValueError(f"{name}: {rule}, got {value!r}.")
