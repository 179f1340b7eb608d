# SPDX-License-Identifier: Apache-2.0
import functools
import sys

import pytest
import torch

from workloads import QUICK, Workload  # isort: skip


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="device that the benchmarks run on: cpu or cuda")
    parser.addoption("--quick", action="store_true", help="one of each kind of size of the searches")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--quick"):
        return
    workloads = {item: item.callspec.params.get("workload") for item in items if hasattr(item, "callspec")}
    dropped = [item for item, workload in workloads.items() if workload is not None and workload.name not in QUICK]
    items[:] = [item for item in items if item not in dropped]
    config.hook.pytest_deselected(items=dropped)


@pytest.fixture(scope="session")
def device(request):
    return request.config.getoption("--device")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:  # it takes seconds to load
        torch._dynamo.reset()


@pytest.fixture
def size(benchmark):
    """A function that shrinks a workload or shape if the benchmarks are not timed."""

    def shrink(workload):
        if not benchmark.disabled:
            return workload
        if isinstance(workload, Workload):
            return workload._replace(n=min(workload.n, 256), k=min(workload.k, 300))
        return tuple(min(length, 8) for length in workload)

    return shrink


@pytest.fixture
def compiled(benchmark):
    """torch.compile; without its minutes of code generation if the benchmarks are not timed."""
    return functools.partial(torch.compile, backend="aot_eager" if benchmark.disabled else "inductor")
