"""Codebooks of several processes: the same on all of them, and those of one process on the joined batch."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("train_quantizers.py")
CASES = [
    "moving_averages",
    "heads_and_mask",
    "code_weights",
    "kmeans",
    "cosine",
    "kmeans_on_some_vectors",
    "data",
    "revival",
    "accumulation",
    "first_process_has_no_vector",
    "first_process_is_masked",
    "first_process_takes_no_step",
    "no_process_has_a_vector",
    "process_group_after_the_layer",
    "compiled",
    "learned_under_data_parallel",
    "codes_loaded_by_the_first_process",
    "lookup_free_under_data_parallel",
    "entropy_without_vectors_of_the_first_process",
    "residual_levels",
]
TO_ROUNDING = (
    "cosine",
    "learned_under_data_parallel",
    "lookup_free_under_data_parallel",
    "entropy_without_vectors_of_the_first_process",
    "residual_levels",
)
# Seconds for all processes together; a collective that others do not join ends its process after 40.
TIMEOUT = 180


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What every case comes to, by number of processes and rank."""
    folder = tmp_path_factory.mktemp("quantizers")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    run = subprocess.Popen([sys.executable, SCRIPT, folder], env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        errors = run.communicate(timeout=TIMEOUT)[1]
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        pytest.fail(f"the processes hang:\n{run.communicate()[1][-5000:]}")
    assert run.returncode == 0, errors[-5000:]
    return {world: [torch.load(folder / f"{world}-{rank}.pt", weights_only=True) for rank in range(world)] for world in (1, 2, 3)}


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_processes_have_the_codebooks_of_one_on_the_joined_batch(trained, world, case):
    (one,), many = trained[1], trained[world]
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if case in TO_ROUNDING else {"rtol": 0, "atol": 0}
    for name, value in one[case].items():
        for rank, results in enumerate(many):
            assert torch.equal(results[case][name], many[0][case][name]), f"{name} of process {rank} differs from that of process 0"
        torch.testing.assert_close(many[0][case][name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def test_every_case_is_compared(trained):
    assert all(list(results) == CASES for processes in trained.values() for results in processes)
