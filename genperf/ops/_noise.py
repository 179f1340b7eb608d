"""Noise as a function of a seed and a position, in plain PyTorch: what csrc/noise.h computes inside the kernels.

Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) turns a 64-bit seed, the number of a
row and the number of a quad within it into four 32-bit words. All of it is exact integer arithmetic; log, sqrt, sin and
cos are taken in float64.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
WEIGHT_QUAD = -(1 << 63)  # 2^63 as a signed number: the quad that a sample's weight comes from


_first_sample = 0


@contextmanager
def sample_offset(first: int) -> Iterator[None]:
    """Within this context the ops draw the noise that belongs to samples first, first + 1, ... of a larger batch.

    So processes that share a batch, and draw the same seeds because their generators are in the same state, together draw
    what one process would draw for the whole batch:

        with genperf.sample_offset(rank * len(share)):
            loss = model(share)

    The noise of a sample is a function of the seed and of its number. Where `first` is not 0 it is computed in plain PyTorch and
    handed to the kernels, which costs time and memory. `perturb` takes the standard deviation of the share that it gets, and
    noise given by the caller stays as it is.

    Raises:
        ValueError: first is negative.
    """
    global _first_sample
    if first < 0:
        raise ValueError(f"sample_offset: first must not be negative, got {first}.")
    before, _first_sample = _first_sample, first
    try:
        yield
    finally:
        _first_sample = before


def first_sample() -> int:
    """The number of a batch's first sample, other than 0 within `sample_offset`."""
    return _first_sample


def draw_seed(op: str, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """A seed from torch's generator, int64 of one element on `device`; a generator of another device is welcome."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"{op}: generator must be a torch.Generator or None, got {type(generator).__name__}.")
    source = device if generator is None else generator.device
    seed = torch.randint(torch.iinfo(torch.int64).max, (), dtype=torch.int64, device=source, generator=generator)
    return seed if seed.device == device else seed.to(device, non_blocking=True)


def random_words(seed: Tensor, quad: Tensor, row: Tensor) -> Tensor:
    """Four 32-bit words, as int64 in a new last dimension, for each quad and row."""
    quad, row = torch.broadcast_tensors(quad, row)
    counter = [quad & WORD, quad >> 32 & WORD, row & WORD, row >> 32 & WORD]
    key = [seed & WORD, seed >> 32 & WORD]
    for _ in range(10):
        # Products wrap modulo 2^64, and the masked shift reads their upper half as unsigned.
        first, second = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            (second >> 32 & WORD) ^ counter[1] ^ key[0],
            second & WORD,
            (first >> 32 & WORD) ^ counter[3] ^ key[1],
            first & WORD,
        ]
        key = [key[0] + 0x9E3779B9 & WORD, key[1] + 0xBB67AE85 & WORD]
    return torch.stack(counter, dim=-1)


def exponential_variate(words: Tensor) -> Tensor:
    return -torch.log((words.double() + 0.5) * 2.0**-32)


def normal_noise(seed: Tensor, rows: int, count: int, dtype: torch.dtype, first: int = 0) -> Tensor:
    """Standard normal [rows, count], of the rows first, first + 1, ..., by Box and Muller's method."""
    words = _words(seed, rows, count, first)
    radius = torch.sqrt(2 * exponential_variate(words[..., 0::2]))
    angle = words[..., 1::2].double() * (2 * math.pi * 2.0**-32)
    pairs = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    return _flat(pairs, rows, count).to(dtype)


def gumbel_noise(seed: Tensor, rows: int, count: int, dtype: torch.dtype, first: int = 0) -> Tensor:
    """Standard Gumbel [rows, count]."""
    words = _words(seed, rows, count, first)
    return -torch.log(_flat(exponential_variate(words), rows, count)).to(dtype)


def uniform_noise(seed: Tensor, rows: int, count: int, dtype: torch.dtype, first: int = 0) -> Tensor:
    """Uniform on [0, 1), multiples of 2^-24, [rows, count]."""
    return _uniform(_flat(_words(seed, rows, count, first), rows, count)).to(dtype)


def uniform_weights(seed: Tensor, rows: int, first: int = 0) -> Tensor:
    """One weight for each row, uniform on [0, 1), float32 [rows]."""
    row = torch.arange(first, first + rows, device=seed.device)
    return _uniform(random_words(seed, torch.full_like(row, WEIGHT_QUAD), row)[:, 0])


def _words(seed: Tensor, rows: int, count: int, first: int) -> Tensor:
    quad = torch.arange((count + 3) // 4, device=seed.device)
    return random_words(seed, quad, torch.arange(first, first + rows, device=seed.device).unsqueeze(1))  # [rows, quads, 4]


def _flat(quads: Tensor, rows: int, count: int) -> Tensor:
    """The first `count` numbers of each row of quads."""
    return quads.reshape(rows, (count + 3) // 4 * 4)[:, :count]


def _uniform(words: Tensor) -> Tensor:
    return (words >> 8).float() * 2.0**-24
