# SPDX-License-Identifier: Apache-2.0
"""Processes of a test."""

import multiprocessing
from multiprocessing.context import ForkServerContext

# DistributedDataParallel imports torch._dynamo.
IMPORTED = (
    "torch.distributed",
    "torch._dynamo",
    "torchmetrics",
    "genperf.nn",
    "genperf.losses",
    "genperf.metrics",
    "genperf.models",
)


def forked_context() -> ForkServerContext:
    """A context whose processes are forked from one that has imported torch and genperf, which takes longer than their work."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    return context
