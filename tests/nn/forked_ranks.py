# SPDX-License-Identifier: Apache-2.0
"""Several ranks for one test: a script that forks them, and its start with a time limit.

The ranks are forked from a process that has imported and compiled what they need, since that takes longer than their work.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist

from genperf.testing import leave_rank

# Seconds after which a rank that waits for a collective alone fails.
COLLECTIVE_TIMEOUT = 40


def fork_ranks(work: Callable[[int, int], Any], folder: str, worlds: Sequence[int]) -> None:
    """Call work(world, rank) in a process for each rank of each world size, all at once, and save what it returns in the folder.

    The last call of a script: it exits with 1 if a rank has failed.
    """
    context = multiprocessing.get_context("fork")
    arguments = [(work, folder, world, rank) for world in worlds for rank in range(world)]
    processes = [context.Process(target=_run_rank, args=each, daemon=True) for each in arguments]  # end with this process
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(any(process.exitcode for process in processes))


def _run_rank(work: Callable[[int, int], Any], folder: str, world: int, rank: int) -> None:
    torch.set_num_threads(1)
    if world > 1:
        store, timeout = f"file://{folder}/group-{world}", timedelta(seconds=COLLECTIVE_TIMEOUT)
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timeout)
    torch.save(work(world, rank), f"{folder}/{world}-{rank}.pt")
    if world > 1:
        leave_rank()


def results_of_ranks(script: str, folder: Path, worlds: Sequence[int], seconds: int) -> dict[int, list[Any]]:
    """Run `script` FOLDER, which calls `fork_ranks`, and return what each rank of each world size has saved."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, script, str(folder)]
    run = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        errors = run.communicate(timeout=seconds)[1]
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        pytest.fail(f"the processes hang:\n{run.communicate()[1][-5000:]}")
    assert run.returncode == 0, errors[-5000:]
    return {world: [torch.load(folder / f"{world}-{rank}.pt", weights_only=True) for rank in range(world)] for world in worlds}
