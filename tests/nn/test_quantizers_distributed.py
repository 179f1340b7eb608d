# SPDX-License-Identifier: Apache-2.0
"""Quantizers trained on several ranks: the same state on every rank, and that of one process on the global batch."""

import pytest
import torch
import train_quantizers
from forked_ranks import results_of_ranks
from train_quantizers import CASES, TO_ROUNDING


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Results of every case, by number of processes and rank."""
    return results_of_ranks(train_quantizers.__file__, tmp_path_factory.mktemp("quantizers"), (1, 2, 3), seconds=180)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_ranks_match_one_process_on_the_global_batch(trained, world, case):
    (one,), many = trained[1], trained[world]
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if CASES[case] in TO_ROUNDING else {"rtol": 0, "atol": 0}
    for name, value in one[case].items():
        for rank, results in enumerate(many):
            assert torch.equal(results[case][name], many[0][case][name]), f"{name} of rank {rank} differs from that of rank 0"
        torch.testing.assert_close(many[0][case][name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def test_every_rank_runs_every_case(trained):
    assert all(list(results) == list(CASES) for ranks in trained.values() for results in ranks)
