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


# They take minutes, and the file that starts last runs alone.
FIRST = ("test_library.py", "test_sanitizers.py", "test_distributed_training.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in FIRST)
