"""Residual vector quantization on CUDA, composed of the ops of one quantizer.

A float32 residual stays in the device's L2 cache up to sizes at which one search fills the device, and a search takes many times
as long as reading the residual.
"""

import torch
from torch import Tensor


def running(mask: Tensor | None, x: Tensor, q: int, num_quantizers: Tensor | None) -> Tensor | None:
    """The mask of quantizer q's search: False everywhere from number `num_quantizers` on; the first one always runs."""
    if num_quantizers is None or q == 0:
        return mask
    runs = (num_quantizers > q).reshape(1, 1)
    return runs.expand(x.shape[0], x.shape[2]) if mask is None else mask & runs


def forward(x: Tensor, codebooks: Tensor, mask: Tensor | None, num_quantizers: Tensor | None, cosine: bool) -> tuple[Tensor, ...]:
    ops = torch.ops.genperf
    residual, total, found, errors, valid = x.to(codebooks.dtype), None, [], [], None
    for q, codebook in enumerate(codebooks):
        index = ops.nearest_code(residual, codebook, running(mask, x, q, num_quantizers), cosine)
        code, error, number = ops.vector_quantize(residual, codebook, index)  # zeros where the index is -1
        residual, total = residual - code, code if total is None else total + code
        valid = number if valid is None else valid
        found.append(index)
        errors.append(error)
    assert total is not None  # there is at least one codebook
    assert valid is not None
    quantized = torch.empty_like(x).copy_(total)
    return quantized, torch.stack(found, -1), torch.stack(errors), valid


def backward(
    grad_quantized: Tensor | None,
    grad_mse: Tensor | None,
    x: Tensor,
    codebooks: Tensor,
    indices: Tensor,
    valid: Tensor,
    commitment_weight: float,
    rotation: bool,
    per_quantizer: bool,
) -> Tensor:
    ops = torch.ops.genperf
    dtype = codebooks.dtype
    residual = x.to(dtype)
    upstream = None if grad_quantized is None else grad_quantized.to(dtype)
    total, gradient = torch.zeros_like(residual), torch.zeros_like(residual)
    for q, codebook in enumerate(codebooks):
        index = indices[..., q].contiguous()
        slope = None if grad_mse is None else grad_mse[q]
        passed = upstream if per_quantizer else None
        if passed is not None or slope is not None:
            gradient += ops.vector_quantize_backward(passed, slope, residual, codebook, index, valid, commitment_weight, rotation)
        code, _, _ = ops.vector_quantize(residual, codebook, index)
        residual, total = residual - code, total + code
    if upstream is not None and not per_quantizer:  # as for one quantizer whose codes are the sums
        sums = total.transpose(1, 2).reshape(-1, x.shape[1])
        own = torch.arange(sums.shape[0], device=x.device).view(x.shape[0], x.shape[2])
        own = torch.where(indices[..., 0] >= 0, own, -1)
        if sums.shape[0] > 0:
            gradient += ops.vector_quantize_backward(upstream, None, x.to(dtype), sums, own, valid, 0.0, rotation)
    return torch.empty_like(x).copy_(gradient)


def code_statistics(x: Tensor, codebooks: Tensor, indices: Tensor, left: bool) -> tuple[Tensor, Tensor]:
    ops = torch.ops.genperf
    residual, found = x.to(codebooks.dtype), []
    for q, codebook in enumerate(codebooks):
        index = indices[..., q].contiguous()
        found.append(ops.code_statistics(residual, index, codebook.shape[0], None, codebook if left else None))
        residual = residual - ops.vector_quantize(residual, codebook, index)[0]
    counts, sums = zip(*found, strict=True)
    return torch.stack(counts), torch.stack(sums)
