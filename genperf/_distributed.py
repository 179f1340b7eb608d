"""Sums, means and gathers over the processes of torch.distributed."""

import torch
from torch import Tensor
from torch import distributed as dist


def world_size(group: "dist.ProcessGroup | None" = None) -> int:
    """Number of processes of the group; 1 where torch.distributed is not in use."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def gather_numbers(numbers: list[int], group: "dist.ProcessGroup | None") -> list[list[int]]:
    """The numbers of every process, in the order of ranks."""
    mine = _on_group_device(torch.tensor(numbers, dtype=torch.int64), group)
    gathered = [torch.empty_like(mine) for _ in range(world_size(group))]
    dist.all_gather(gathered, mine, group=group)
    return [t.tolist() for t in gathered]


def gather_rows(rows: Tensor, counts: list[int], group: "dist.ProcessGroup | None") -> Tensor:
    """The rows [counts[rank], ...] of all processes, one below the other in the order of ranks."""
    padded = _on_group_device(rows, group).new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded, group=group)
    return torch.cat([t[:count] for t, count in zip(gathered, counts, strict=True)]).to(rows.device)


def sum_over_processes(value: Tensor, group: "dist.ProcessGroup | None") -> Tensor:
    """The sum of every process's `value`, the same on each."""
    total = _on_group_device(value, group).clone()
    dist.all_reduce(total, group=group)
    return total.to(value.device)


def _on_group_device(value: Tensor, group: "dist.ProcessGroup | None") -> Tensor:
    """NCCL moves only what is on a GPU."""
    if value.device.type == "cpu" and dist.get_backend(group) == "nccl":
        return value.to(torch.device("cuda", torch.cuda.current_device()))
    return value.contiguous()


def joint_mean(x: Tensor, dim: int | tuple[int, ...] = 0) -> Tensor:
    """The mean over `dim` of the batch that all processes hold together.

    Equivalent to (in one process):
        x.mean(dim)

    With several processes every one must call it, with x of one shape, and gets the same result. Differentiable any
    number of times. Backward adds up what the losses of all processes ask of the mean, so that where the gradients of
    the parameters are averaged over processes, as DistributedDataParallel does, they are those of one process on the
    joined batch: of a loss that is the mean of the processes' losses, whether these differ or are one and the same.

    Args:
        x: a floating dtype; the mean of half precision is taken in float32.
        dim: one or more dimensions, the batch's among them.

    Returns:
        x's shape without `dim`, of x's dtype.
    """
    processes = world_size()
    if processes == 1:
        return x.mean(dim)
    mean = x.mean(dim, dtype=torch.promote_types(x.dtype, torch.float32))
    return (_SumOverProcesses.apply(mean) / processes).to(x.dtype)


def joint_sum(x: Tensor) -> Tensor:
    """The sum of all processes' x, of one shape, with the gradient of `joint_mean`; x itself in one process."""
    return x if world_size() == 1 else _SumOverProcesses.apply(x)


class _SumOverProcesses(torch.autograd.Function):
    """The sum is its own backward: what every process's result asks for counts for every process's input."""

    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:
        total = value.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _SumOverProcesses.apply(grad)
