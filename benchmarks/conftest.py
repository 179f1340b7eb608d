import functools

import pytest
import torch

from workloads import Workload  # isort: skip


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="device that the benchmarks run on: cpu or cuda")


@pytest.fixture(scope="session")
def device(request):
    return request.config.getoption("--device")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch._dynamo.reset()


@pytest.fixture
def size(benchmark):
    """The workload or shape as it is, or small where the benchmarks only have to run."""

    def shrink(workload):
        if not benchmark.disabled:
            return workload
        if isinstance(workload, Workload):
            return workload._replace(n=min(workload.n, 256), k=min(workload.k, 300))
        return tuple(min(length, 8) for length in workload)

    return shrink


@pytest.fixture
def compiled(benchmark):
    """torch.compile, without the minutes of its code generation where the benchmarks only have to run."""
    return functools.partial(torch.compile, backend="aot_eager" if benchmark.disabled else "inductor")
