# SPDX-License-Identifier: Apache-2.0
"""Noise as a function of a seed and a position, in plain PyTorch. The kernels compute the same in csrc/noise.h.

Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) maps a 64-bit seed, a row number and the number of a
quad within the row to four 32-bit words. These are exact integer operations; log, sqrt, sin and cos are computed in float64.
"""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ._autograd import transformed

_SEEDS = torch.iinfo(torch.int64).max
WORD = 0xFFFFFFFF
WEIGHT_QUAD = -(1 << 63)  # 2^63 as a signed integer: the quad reserved for the weight of a sample

_CPU = torch.device("cpu")
_first_sample = 0


@contextmanager
def sample_offset(first: int) -> Iterator[None]:
    """Within this context the ops draw the noise of samples first, first + 1, ... of a larger batch.

    Ranks whose generators are in the same state draw the same seeds. With this offset, each draws its share of the noise that a single
    process would draw for the global batch:

        with genperf.sample_offset(rank * len(batch)):
            loss = model(batch)

    With gradient checkpointing call backward within the context too: it runs parts of the model again, which draw their noise again.

    Noise is a function of the seed and the sample's number, which the kernels add `first` to. The standard deviation that `perturb` uses
    is still that of the local batch, and noise passed by the caller is used as it is.

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
    """The number of the batch's first sample, set by `sample_offset`."""
    return _first_sample


def draw_seed(op: str, device: torch.device, generator: torch.Generator | None, *, by_value: bool = False) -> Tensor:
    """Draw an int64 seed from `generator`, which may be on another device, or from torch's default generator; a scalar on `device`.

    With `by_value` the scalar may be on the CPU. CUDA kernels that take it as a value need no copy or launch for it.

    Raises:
        TypeError: generator is no torch.Generator.
        ValueError: the seed is drawn on the CPU while a CUDA graph captures the op, which would then repeat its noise.
    """
    if generator is None and device == _CPU:
        return torch.randint(_SEEDS, (), dtype=torch.int64, device=device)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"{op}: generator must be a torch.Generator or None, got {type(generator).__name__}.")
    source = device if generator is None else generator.device
    if device.type == "cuda" and not torch.compiler.is_compiling():
        capturing = is_capturing()
        if source.type == "cpu" and capturing:
            raise ValueError(
                f"{op}: a CUDA graph that is being captured would keep a seed from a generator on the CPU, and repeat its noise; "
                f"pass a generator on {device}, registered with the graph, or None."
            )
        if by_value and source.type == "cuda" and not capturing:
            seed = _seed_of_state(source, generator)
            if seed is not None:
                return seed
    seed = torch.randint(_SEEDS, (), dtype=torch.int64, device=source, generator=generator)
    by_value = by_value and seed.device.type == "cpu" and not torch.compiler.is_compiling()
    return seed if by_value or seed.device == device else seed.to(device, non_blocking=True)


def is_capturing() -> bool:
    """Whether a CUDA graph captures the current stream."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _seed_of_state(device: torch.device, generator: torch.Generator | None) -> Tensor | None:
    """What torch.randint would draw on a CUDA device, computed on the CPU from the state of the generator, without a launch; or None.

    torch.randint draws words 0 and 1 of Philox with the generator's seed as its key and a fourth of its offset as its counter, and
    advances the offset by 4. A thread that draws between the reading and the writing of the offset would be undone, hence None where
    other threads run, and where a mode must see the draw.
    """
    if not torch.cuda.is_initialized() or threading.active_count() > 1 or is_in_torch_dispatch_mode() or transformed():
        return None
    if generator is None:
        index = torch.cuda.current_device() if device.index is None else device.index
        generator = torch.cuda.default_generators[index]
    key, offset = generator.initial_seed(), generator.get_offset()
    generator.set_offset(offset + 4)
    return torch.tensor(seed_of_philox(key, offset), dtype=torch.int64)


def seed_of_philox(key: int, offset: int) -> int:
    """The int64 that torch.randint draws on a CUDA device whose generator has this seed and offset."""
    quad = offset // 4
    counter, (low, high) = [quad & WORD, quad >> 32, 0, 0], (key & WORD, key >> 32 & WORD)
    for _ in range(10):
        first, second = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [second >> 32 ^ counter[1] ^ low, second & WORD, first >> 32 ^ counter[3] ^ high, first & WORD]
        low, high = low + 0x9E3779B9 & WORD, high + 0xBB67AE85 & WORD
    return (counter[0] << 32 | counter[1]) % _SEEDS


def random_words(seed: Tensor, quad: Tensor, row: Tensor) -> Tensor:
    """Four 32-bit words for each quad and row, as int64 in a new last dimension."""
    quad, row = torch.broadcast_tensors(quad, row)
    counter = [quad & WORD, quad >> 32 & WORD, row & WORD, row >> 32 & WORD]
    key = [seed & WORD, seed >> 32 & WORD]
    for _ in range(10):
        # Products wrap modulo 2^64; the mask after the shift makes their upper half unsigned.
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
    """Standard exponential float64, one for each word."""
    return -torch.log((words.double() + 0.5) * 2.0**-32)


def normal_noise(seed: Tensor, rows: int, count: int, dtype: torch.dtype, first: int = 0, device: torch.device | None = None) -> Tensor:
    """Standard normal [rows, count] of the rows first, first + 1, ..., by the Box-Muller transform; on `device` or that of the seed."""
    words = _words(seed, rows, count, first, device)
    radius = torch.sqrt(2 * exponential_variate(words[..., 0::2]))
    angle = words[..., 1::2].double() * (2 * math.pi * 2.0**-32)
    pairs = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    return _flat(pairs, rows, count).to(dtype)


def gumbel_noise(seed: Tensor, rows: int, count: int, dtype: torch.dtype, first: int = 0, device: torch.device | None = None) -> Tensor:
    """Standard Gumbel [rows, count] of the rows first, first + 1, ..."""
    words = _words(seed, rows, count, first, device)
    return -torch.log(_flat(exponential_variate(words), rows, count)).to(dtype)


def uniform_noise(seed: Tensor, rows: int, count: int, dtype: torch.dtype, first: int = 0, device: torch.device | None = None) -> Tensor:
    """Uniform multiples of 2^-24 in [0, 1), [rows, count], of the rows first, first + 1, ..."""
    return _uniform(_flat(_words(seed, rows, count, first, device), rows, count)).to(dtype)


def uniform_weights(seed: Tensor, rows: int, first: int = 0, device: torch.device | None = None) -> Tensor:
    """A uniform weight in [0, 1) for each of the rows first, first + 1, ...; float32 [rows]."""
    row = torch.arange(first, first + rows, device=device or seed.device)
    return _uniform(random_words(seed, torch.full_like(row, WEIGHT_QUAD), row)[:, 0])


def _words(seed: Tensor, rows: int, count: int, first: int, device: torch.device | None) -> Tensor:
    """The words [rows, quads, 4] that hold `count` numbers per row, on `device` or that of the seed."""
    device = device or seed.device
    quad = torch.arange((count + 3) // 4, device=device)
    return random_words(seed, quad, torch.arange(first, first + rows, device=device).unsqueeze(1))


def _flat(quads: Tensor, rows: int, count: int) -> Tensor:
    """The first `count` numbers of each row of quads."""
    return quads.reshape(rows, (count + 3) // 4 * 4)[:, :count]


def _uniform(words: Tensor) -> Tensor:
    return (words >> 8).float() * 2.0**-24
