# SPDX-License-Identifier: Apache-2.0
import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="device that the op tests run on: cpu or cuda")


@pytest.fixture(scope="session")
def device(request):
    name = request.config.getoption("--device")
    if name != "cpu" and not torch.cuda.is_available():
        pytest.exit(f"--device {name} needs a GPU that torch can see.", returncode=2)
    return name


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def set_threads():
    """torch.set_num_threads, undone after the test."""
    threads = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(threads)


# The longest files, in this order: a file is one worker's, and the workers should end together. The first two take minutes.
FIRST = (
    "test_library.py",
    "test_sanitizers.py",
    "test_ahead_of_time.py",
    "test_compiled_convolutions.py",
    "test_what_works.py",
    "test_distributed_training.py",
    "test_cuda_on_host.py",
    "test_triton_interpret.py",
)


def pytest_collection_modifyitems(items):
    order = {name: i for i, name in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
