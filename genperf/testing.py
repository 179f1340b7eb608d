"""What the tests of every op share: inputs that find bugs, the accuracy rule, and the contract of an op as one check."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Sizes that divide no block, and their neighbours.
ODD_SIZES = (1, 7, 31, 33, 1000)


def vectors(
    kind: str, count: int, codes: int, dim: int, dtype: torch.dtype, device: str | torch.device, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """x [count, dim] and codebook [codes, dim] of a kind of data.

    "random": standard normal. "clustered": x around the codes. "offset": mean / std = 1000. "tied": small integers, many
    codes alike and many distances equal. "near_ties": every code has a neighbour one rounding step away.
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
