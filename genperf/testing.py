# SPDX-License-Identifier: Apache-2.0
"""Helpers for testing ops: inputs that expose bugs, an error budget measured from plain PyTorch, and checks of the contract of an op."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NoReturn, get_args

import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils.checkpoint import checkpoint

Vectors = Literal["random", "clustered", "offset", "tied", "near_ties"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# One, sizes next to a power of two, and a large size that is not a power of two.
ODD_SIZES = (1, 7, 31, 33, 1000)


def vectors(
    kind: Vectors, count: int, codes: int, dim: int, dtype: torch.dtype, device: str | torch.device, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return x [count, dim] and a codebook [codes, dim] of a kind of data.

    Args:
        kind: "random": standard normal. "clustered": x close to the codes. "offset": mean / std = 1000. "tied": small integers,
            with many repeated codes and many equal distances. "near_ties": every code has a neighbor one rounding step away.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, dim, generator=generator)
    codebook = torch.randn(codes, dim, generator=generator)
    if kind == "clustered":
        x = codebook[torch.randint(codes, (count,), generator=generator)] + 0.05 * x
    elif kind == "offset":
        x, codebook = x + 1000, codebook + 1000
    elif kind == "tied":
        x, codebook = x.mul(1.5).round(), codebook.mul(1.5).round()
    elif kind == "near_ties":
        x, codebook = x.to(dtype).float(), codebook.to(dtype)
        half = codes // 2
        codebook[half : 2 * half] = torch.nextafter(codebook[:half], torch.full_like(codebook[:half], 10))
    elif kind != "random":
        raise ValueError(f"vectors: kind must be one of {', '.join(get_args(Vectors))}, got {kind!r}.")
    return x.to(dtype).to(device), codebook.to(dtype).to(device)


def layouts(x: Tensor) -> dict[str, tuple[Tensor, int]]:
    """Return the vectors x [N, D] as tensors of several layouts, each with its channel_dim. The order of positions is the same."""
    n, d = x.shape
    half = n // 2 if n % 2 == 0 else n
    folded = x.reshape(-1, half, d) if half else x.reshape(1, n, d)
    spaced = x.new_full((n, 2 * d + 1), float("nan"))
    spaced[:, 1::2] = x
    return {
        "channels_last": (x, -1),
        "channels_first": (folded.transpose(1, 2).contiguous(), 1),
        "permuted": (folded.transpose(1, 2).contiguous().transpose(1, 2), 2),
        "image": (folded.transpose(1, 2).contiguous().unsqueeze(-1), -3),
        "channel_zero": (x.t().contiguous(), 0),
        "spaced": (spaced[:, 1::2], 1),
    }


def strided(x: Tensor) -> dict[str, Tensor]:
    """Return x [B, ...] in several memory layouts, with NaN in the gaps between its elements."""
    backwards = list(range(x.dim()))[::-1]
    spaced = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), float("nan"))
    spaced[..., 1::2] = x
    cropped = x.new_full([size + 2 for size in x.shape], float("nan"))[tuple(slice(1, size + 1) for size in x.shape)]
    cropped.copy_(x)
    tensors = {
        "contiguous": x.contiguous(),
        "backwards": x.permute(backwards).contiguous().permute(backwards),
        "batch_last": x.movedim(0, -1).contiguous().movedim(-1, 0),
        "spaced": spaced[..., 1::2],
        "cropped": cropped,
    }
    if x.dim() in (4, 5):
        channels_last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        tensors["channels_last"] = x.contiguous(memory_format=channels_last)
    return tensors


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill new tensors with NaN (integers with their largest value), so that elements which a kernel fails to write are found."""
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")  # use_deterministic_algorithms also imports Inductor, which takes seconds
    torch.utils.deterministic.fill_uninitialized_memory = True  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


def assert_accurate(name: str, actual: Tensor, exact: Tensor, plain: Tensor) -> None:
    """Assert that the error of `actual` is at most twice that of plain PyTorch, plus one rounding of the largest value.

    Args:
        actual: the result under test.
        exact: the float64 result on the same inputs.
        plain: the result of plain PyTorch in the dtype of `actual`.
    """
    assert actual.dtype == plain.dtype, f"{name}: dtype {actual.dtype}, expected {plain.dtype}"
    assert actual.shape == exact.shape, f"{name}: shape {list(actual.shape)}, expected {list(exact.shape)}"
    if exact.numel() == 0:
        return
    assert actual.isfinite().all(), f"{name}: {(~actual.isfinite()).sum()} of {actual.numel()} values are not finite"
    error = (actual.double() - exact).abs()
    budget = 2 * (plain.double() - exact).abs().max() + torch.finfo(actual.dtype).eps * exact.abs().max()
    worst = int(error.argmax())
    assert error.max() <= budget, (
        f"{name}: error {error.max():.3e} exceeds the budget {budget:.3e}, worst at {worst}: "
        f"got {actual.flatten()[worst]:.9g}, expected {exact.flatten()[worst]:.9g}"
    )


def saved_bytes(function: Callable[[], object]) -> int:
    """Return the bytes of tensors that autograd saves for the backward of `function`. Shared storage counts once."""
    saved = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    del result  # kept alive until here, so that no address is reused
    return sum(saved.values())


def largest_allocation(function: Callable[[], object]) -> int:
    """Return the size in bytes of the largest single CPU allocation in `function`."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    allocated = [event.cpu_memory_usage for event in profile.events() or () if event.cpu_memory_usage > 0]
    assert allocated, "the profiler saw no allocation"
    return max(allocated)


def check_op(name: str, samples: Sequence[tuple[Any, ...]]) -> None:
    """Run torch.library.opcheck on sample arguments: schema, fake implementation, aliasing, dynamic shapes."""
    op = getattr(torch.ops.genperf, name).default
    for sample in samples:
        torch.library.opcheck(op, sample)


def check_compile(function: Callable[..., Sequence[Tensor]], *inputs: Sequence[Tensor]) -> None:
    """Check that torch.compile(fullgraph=True) of a public function agrees with eager, forward and backward.

    Each element of `inputs` is one set of tensor arguments. A second set of other sizes exercises dynamic shapes; a second
    call with the first set must not recompile.
    """
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for tensors in inputs:
        results = []
        for call in (function, compiled):
            leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in tensors]
            outputs = [out for out in call(*leaves) if isinstance(out, Tensor)]
            total = sum(out.float().square().sum() for out in outputs if out.requires_grad)
            gradients = (
                torch.autograd.grad(total, [t for t in leaves if t.requires_grad], allow_unused=True) if torch.is_tensor(total) else ()
            )
            results.append([*outputs, *(g for g in gradients if g is not None)])
        for expected, actual in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, equal_nan=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(*(t.detach().clone().requires_grad_(t.is_floating_point()) for t in inputs[0]))


def check_randomness(draw: Callable[[torch.Generator | None], Tensor], device: str) -> None:
    """Check the use of generators: noise is reproducible from a seed, differs between calls, and advances only the generator in use."""
    torch.manual_seed(7)
    first, second = draw(None), draw(None)
    torch.manual_seed(7)
    assert torch.equal(draw(None), first)
    assert not torch.equal(first, second)
    for place in {"cpu", device}:
        generator = torch.Generator(place).manual_seed(3)
        state = generator.get_state()
        torch.manual_seed(7)
        drawn, next_drawn = draw(generator), draw(generator)
        assert torch.equal(draw(None), first), "a call with a generator advanced the default generator"
        assert not torch.equal(drawn, next_drawn)
        generator.set_state(state)
        assert torch.equal(draw(generator), drawn)


def check_checkpoint(function: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Check that gradient checkpointing leaves the value and gradients of a scalar function that draws noise bitwise the same."""
    results = []
    for checkpointed in (False, True):
        leaves = [t.detach().requires_grad_() for t in inputs]
        torch.manual_seed(11)
        value = checkpoint(function, *leaves, use_reentrant=False) if checkpointed else function(*leaves)
        torch.rand(3, device=value.device)  # advances the generator between forward and backward
        results.append([value, *torch.autograd.grad(value, leaves)])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


def check_cuda_graph(draw: Callable[[], Tensor]) -> None:
    """Check that a function that draws noise can be captured in a CUDA graph, and that every replay draws new noise."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            draw()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = draw()
    seen = []
    for _ in range(3):
        graph.replay()
        seen.append(captured.clone())
    assert seen[0].isfinite().all()
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


def leave_rank() -> NoReturn:
    """End the process of a rank as soon as all ranks are here, without destroying the process group, which can deadlock at exit."""
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
