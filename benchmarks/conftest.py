import pytest
import torch


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
    """The workload as it is, or small where the benchmarks only have to run."""

    def shrink(workload):
        return workload._replace(n=min(workload.n, 256), k=min(workload.k, 300)) if benchmark.disabled else workload

    return shrink
