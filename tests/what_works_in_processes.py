# SPDX-License-Identifier: Apache-2.0
"""Train the modules of the table of docs/compatibility.md on two ranks under DDP and FSDP2.

python what_works_in_processes.py FOLDER

The results are compared with those of one process that trains on the global batch, or, where each rank has the loss of its own batch, on
the mean of the losses. FOLDER/<rank>.json says for each row and way why it failed, or "". The processes are forked from one that has
imported what they need, since that takes longer than the training.
"""

import json
import multiprocessing
import sys
from datetime import timedelta

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from what_works import METRICS, NA, ROWS, Network, batch, measured, total

import genperf
from genperf.testing import leave_rank

WORLD, STEPS = 2, 2


def train(row, call, network, rank=None):
    """Training steps of one process, or of a rank."""
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    for step in range(STEPS):
        parts = batch(row, step, WORLD).chunk(WORLD)
        inputs = parts if row.own_batch else [torch.cat(parts)]
        inputs = inputs if rank is None else [parts[rank]]
        # Each rank has its part of the noise of the global batch.
        with genperf.sample_offset(0 if rank is None else rank * row.shape[0]):
            torch.manual_seed(step)
            losses = [total(call(x), x) for x in inputs]
        scale = WORLD if row.summed and rank is not None else 1
        (scale * sum(losses) / len(losses)).backward()
        optimizer.step()
        optimizer.zero_grad()


def full_state(network):
    state = network.state_dict()
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in state.items()}


def wrapped(network, column):
    if column == "DDP":
        return DistributedDataParallel(network)
    mesh = init_device_mesh("cpu", (WORLD,))
    if any(True for _ in network.layer.parameters()):
        fully_shard(network.layer, mesh=mesh)
    return fully_shard(network, mesh=mesh)


def trained(row, column, rank, expected):
    network = Network(row)
    call = wrapped(network, column)
    train(row, call, network.start(), rank)
    torch.testing.assert_close(full_state(network), expected, rtol=1e-4, atol=1e-5)


class WithMetric(nn.Module):
    """A network that measures its outputs."""

    def __init__(self, metric):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.metric = metric

    def forward(self, x):
        return self.linear(x)


def synchronized(row, rank):
    """A metric within a distributed module, updated by each rank with its part."""
    metric = row.make()
    call = DistributedDataParallel(WithMetric(metric))
    for part in ("real", "fake"):
        for x in measured(part).chunk(4)[rank::WORLD]:
            call(x).sum().backward()
            row.update(metric, x, part == "real")
    metric.sync()
    torch.testing.assert_close(row.result(metric), row.expected(), rtol=1e-6, atol=1e-8)


def run(folder, rank):
    torch.set_num_threads(1)
    cases, expected = [], {}
    for label, row in ROWS.items():
        columns = [column for column in ("DDP", "FSDP2") if row.cell(column) != NA]
        if columns:
            network = Network(row).start()
            train(row, network, network)
            expected[label] = full_state(network)
        cases += [(label, column) for column in columns]
    options = {"rank": rank, "world_size": WORLD, "timeout": timedelta(seconds=40)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", **options)
    found = {}
    for label, column in cases:
        found[f"{label}: {column}"] = ""
        try:
            trained(ROWS[label], column, rank, expected[label])
        except Exception as error:
            found[f"{label}: {column}"] = f"{type(error).__name__}: {error}"
    for label, row in METRICS.items():
        found[f"{label}: DDP"] = ""
        try:
            synchronized(row, rank)
        except Exception as error:
            found[f"{label}: DDP"] = f"{type(error).__name__}: {error}"
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(found, file)
    leave_rank()


if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=run, args=(sys.argv[1], rank), daemon=True) for rank in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(any(process.exitcode for process in processes))
