"""Time of one quantizer step, genperf's beside the one that plain PyTorch code takes."""

import copy
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..nn.vector_quantizer import VectorQuantizer

_REPEATS = 9


class QuantizerTimes(NamedTuple):
    """Medians over several steps of forward, backward and, with a decay, moving averages."""

    genperf_ms: float
    plain_pytorch_ms: float
    differing_indices: int
    """Positions at which the plain version, whose distances carry float32 rounding, found another code."""
    positions: int


def time_quantizers(quantizer: VectorQuantizer, latents: Tensor) -> QuantizerTimes:
    """Time both on latents [B, D, H, W], starting from the codes of `quantizer`, which stay as they are."""
    trained = copy.deepcopy(quantizer).train()
    plain = copy.deepcopy(quantizer)

    def genperf_step() -> Tensor:
        x = latents.detach().requires_grad_()
        quantized, indices, loss = trained(x)
        (loss + quantized.sum()).backward()
        return indices

    def plain_step() -> Tensor:
        x = latents.detach().requires_grad_()
        quantized, indices, loss = plain_pytorch_quantizer(x, plain)
        (loss + quantized.sum()).backward()
        return indices

    # The first calls start from the same codes.
    differing = (genperf_step() != plain_step()).sum().item()
    # In turns, so that a change in the load of the machine meets both.
    times = [(_milliseconds(genperf_step, latents.device), _milliseconds(plain_step, latents.device)) for _ in range(_REPEATS)]
    genperf_ms, plain_ms = (statistics.median(column) for column in zip(*times, strict=True))
    return QuantizerTimes(genperf_ms, plain_ms, differing, latents[:, 0].numel())


def plain_pytorch_quantizer(x: Tensor, state: VectorQuantizer) -> tuple[Tensor, Tensor, Tensor]:
    """A training step of the quantizer as it is commonly written in PyTorch, on x [B, D, H, W]; reads and updates `state`."""
    codebook, decay, num_codes = state.codebook, state.decay, state.num_codes
    channels_last = x.permute(0, 2, 3, 1).contiguous()
    flat = channels_last.view(-1, state.dim)
    indices = torch.cdist(flat.detach(), codebook.detach()).argmin(1)
    quantized = F.embedding(indices, codebook).view(channels_last.shape)
    loss = state.commitment_weight * F.mse_loss(channels_last, quantized.detach())
    if decay is None:
        loss = loss + state.codebook_weight * F.mse_loss(quantized, channels_last.detach())
    else:
        with torch.no_grad():
            one_hot = F.one_hot(indices, num_codes).to(flat.dtype)
            state.counts.mul_(decay).add_(one_hot.sum(0), alpha=1 - decay)
            state.sums.mul_(decay).add_(one_hot.T @ flat, alpha=1 - decay)
            total = state.counts.sum()
            smoothed = (state.counts + state.eps) / (total + num_codes * state.eps) * total
            state.codebook = state.sums / smoothed[:, None]
    quantized = channels_last + (quantized - channels_last).detach()
    return quantized.permute(0, 3, 1, 2).contiguous(), indices.view(channels_last.shape[:-1]), loss


def _milliseconds(step: Callable[[], object], device: torch.device) -> float:
    _wait_for(device)
    start = time.perf_counter()
    step()
    _wait_for(device)
    return (time.perf_counter() - start) * 1e3


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
