"""Collectives of torch.distributed over tensors of unequal length."""

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
