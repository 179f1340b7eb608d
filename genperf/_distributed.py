# SPDX-License-Identifier: Apache-2.0
"""Sums, means and gathers over the ranks of torch.distributed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


def world_size(group: "dist.ProcessGroup | None" = None) -> int:
    """Number of ranks in the group; 1 without torch.distributed."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def rank(group: "dist.ProcessGroup | None" = None) -> int:
    """This process's rank in the group; 0 without torch.distributed."""
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0


def all_gather_ints(values: list[int], group: "dist.ProcessGroup | None" = None) -> list[list[int]]:
    """The values of every rank, in the order of ranks."""
    local = _on_group_device(torch.tensor(values, dtype=torch.int64), group)
    gathered = [torch.empty_like(local) for _ in range(world_size(group))]
    dist.all_gather(gathered, local, group=group)
    return [t.tolist() for t in gathered]


def all_gather_rows(rows: Tensor, counts: list[int], group: "dist.ProcessGroup | None" = None) -> Tensor:
    """Concatenate the rows [counts[rank], ...] of every rank, in the order of ranks."""
    padded = _on_group_device(rows, group).new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded, group=group)
    return torch.cat([t[:count] for t, count in zip(gathered, counts, strict=True)]).to(rows.device)


def all_reduce_sum(value: Tensor, group: "dist.ProcessGroup | None" = None) -> Tensor:
    """The sum of `value` over the ranks, without a gradient; `value` itself is not changed."""
    total = _on_group_device(value, group).clone()
    dist.all_reduce(total, group=group)
    return total.to(value.device)


def of_rank_0(value: Tensor) -> Tensor:
    """The tensor of rank 0; ranks on different machines may round differently."""
    return all_reduce_sum(value if rank() == 0 else torch.zeros_like(value))


def _on_group_device(value: Tensor, group: "dist.ProcessGroup | None") -> Tensor:
    """`value` where the backend of the group can reach it: NCCL needs a GPU."""
    if value.device.type == "cpu" and dist.get_backend(group) == "nccl":
        return value.to(torch.device("cuda", torch.cuda.current_device()))
    return value.contiguous()


def global_mean(x: Tensor, dim: int | tuple[int, ...] = 0) -> Tensor:
    """The mean over `dim` of the global batch, the batch over all ranks.

    Equivalent to (on one rank):
        x.mean(dim)

    Every rank must call it, with x of the same shape, and gets the same result. Differentiable any number of times. Backward
    all-reduces the gradient: where DistributedDataParallel averages gradients over ranks, they equal those of one process
    on the global batch, for a loss that is the mean of the ranks' losses.

    Args:
        x: a floating dtype; the mean of half precision is computed in float32.
        dim: one or more dimensions, the batch dimension among them.

    Returns:
        x's shape without `dim`, in x's dtype.
    """
    ranks = world_size()
    if ranks == 1:
        return x.mean(dim)
    mean = x.mean(dim, dtype=torch.promote_types(x.dtype, torch.float32))
    return (_AllReduceSum.apply(mean) / ranks).to(x.dtype)


def global_sum(x: Tensor) -> Tensor:
    """The sum of x, of the same shape on every rank, over the ranks. Backward all-reduces the gradient; one rank returns x itself."""
    return x if world_size() == 1 else _AllReduceSum.apply(x)


class _AllReduceSum(torch.autograd.Function):
    """All-reduce in both directions: every rank's result depends on every rank's input."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _AllReduceSum.apply(grad)


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Within this context the processes that torchrun has started are ranks; a process alone stays alone."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()
