"""What the tests of every op share: inputs that find bugs, the accuracy rule, and the contract of an op as one check."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Sizes that divide no block, and their neighbors.
ODD_SIZES = (1, 7, 31, 33, 1000)


def vectors(
    kind: str, count: int, codes: int, dim: int, dtype: torch.dtype, device: str | torch.device, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """x [count, dim] and codebook [codes, dim] of a kind of data.

    "random": standard normal. "clustered": x around the codes. "offset": mean / std = 1000. "tied": small integers, many
    codes alike and many distances equal. "near_ties": every code has a neighbor one rounding step away.
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
        raise ValueError(f"vectors: unknown kind {kind!r}.")
    return x.to(dtype).to(device), codebook.to(dtype).to(device)


def layouts(x: Tensor) -> dict[str, tuple[Tensor, int]]:
    """The vectors x [N, D] as tensors of other layouts, each with its channel_dim; positions in the same order."""
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
    """x [B, ...] in other memory layouts; what lies between its elements is NaN."""
    backwards = list(range(x.dim()))[::-1]
    spaced = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), float("nan"))
    spaced[..., 1::2] = x
    cropped = x.new_full([size + 2 for size in x.shape], float("nan"))[tuple(slice(1, size + 1) for size in x.shape)]
    cropped.copy_(x)
    found = {
        "contiguous": x.contiguous(),
        "backwards": x.permute(backwards).contiguous().permute(backwards),
        "batch_last": x.movedim(0, -1).contiguous().movedim(-1, 0),
        "spaced": spaced[..., 1::2],
        "cropped": cropped,
    }
    if x.dim() in (4, 5):
        channels_last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        found["channels_last"] = x.contiguous(memory_format=channels_last)
    return found


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors start as NaN (integers as their largest value), so that what a kernel does not write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def assert_accurate(name: str, actual: Tensor, exact: Tensor, plain: Tensor) -> None:
    """`actual` errs at most twice as much as plain PyTorch in the same dtype, plus one rounding of the largest value.

    Args:
        actual: the result under test.
        exact: float64 result on the same inputs.
        plain: plain PyTorch's result in actual's dtype.
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
        f"{name}: error {error.max():.3e} over the budget {budget:.3e}, worst at {worst}: "
        f"{actual.flatten()[worst]:.9g}, exactly {exact.flatten()[worst]:.9g}"
    )


def saved_bytes(function: Callable[[], object]) -> int:
    """How many bytes of tensors autograd holds for the backward of what `function` does; shared memory counts once."""
    saved = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    del result  # held until here, so that no address is used twice
    return sum(saved.values())


def largest_allocation(function: Callable[[], object]) -> int:
    """The most bytes that `function` allocates at once on the CPU."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    allocated = [event.cpu_memory_usage for event in profile.events() if event.cpu_memory_usage > 0]
    assert allocated, "the profiler saw no allocation"
    return max(allocated)


def check_op(name: str, samples: Sequence[tuple]) -> None:
    """torch's own checks of a compiled op on sample arguments: schema, fake against real, aliasing, dynamic shapes."""
    op = getattr(torch.ops.genperf, name).default
    for sample in samples:
        torch.library.opcheck(op, sample)


def check_compile(function: Callable[..., Sequence[Tensor]], *inputs: Sequence[Tensor]) -> None:
    """torch.compile(fullgraph=True) of a public function agrees with eager at every input, forward and backward.

    Each element of `inputs` is one set of tensor arguments; a second set of other sizes exercises dynamic shapes, and
    the first set once more must not compile again.
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
        for eager, fused in zip(*results, strict=True):
            torch.testing.assert_close(fused, eager, equal_nan=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(*(t.detach().clone().requires_grad_(t.is_floating_point()) for t in inputs[0]))


def check_randomness(draw: Callable[[torch.Generator | None], Tensor], device: str) -> None:
    """What draws noise follows torch's generators: reproducible from a seed, another noise at each call, and nothing else moved."""
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
        assert torch.equal(draw(None), first), "a given generator moved the default one"
        assert not torch.equal(drawn, next_drawn)
        generator.set_state(state)
        assert torch.equal(draw(generator), drawn)


def check_checkpoint(function: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Gradients of a scalar function that draws noise are the same under activation checkpointing, bit for bit."""
    results = []
    for checkpointed in (False, True):
        leaves = [t.detach().requires_grad_() for t in inputs]
        torch.manual_seed(11)
        value = torch.utils.checkpoint.checkpoint(function, *leaves, use_reentrant=False) if checkpointed else function(*leaves)
        torch.rand(3, device=value.device)  # the generator moves on between forward and backward
        results.append([value, *torch.autograd.grad(value, leaves)])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


def check_cuda_graph(draw: Callable[[], Tensor]) -> None:
    """A function that draws noise can be captured in a CUDA graph, and every replay draws anew."""
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
