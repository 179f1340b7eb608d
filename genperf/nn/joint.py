"""Means over a batch of which each process of torch.distributed holds an equal share."""

import torch
from torch import Tensor
from torch import distributed as dist

from ..metrics._distributed import world_size


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
