# SPDX-License-Identifier: Apache-2.0
"""Random training schedules with uneven shares of the ranks: the states of one process on the joined batch, bitwise equal on all ranks."""

import pytest
import torch
import train_schedules
from forked_ranks import results_of_ranks
from train_schedules import KINDS, SCHEDULES, kind_of


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Results of every schedule, by number of ranks, rank and schedule."""
    return results_of_ranks(train_schedules.__file__, tmp_path_factory.mktemp("schedules"), (1, 2, 3), seconds=180)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_match_one_process_on_the_joined_batch(results, kind, world):
    tolerance = {"rtol": 0, "atol": 0} if KINDS[kind].exact else {"rtol": 1e-9, "atol": 1e-9}
    for schedule in (schedule for schedule in range(SCHEDULES) if kind_of(schedule) == kind):
        one, ranks = results[1][0][schedule], [rank[schedule] for rank in results[world]]
        for step, expected in enumerate(one["indices"]):
            indices = torch.cat([rank["indices"][step] for rank in ranks])
            assert torch.equal(indices, expected), f"indices of schedule {schedule}, step {step}"
        for name, value in one["state"].items():
            message = lambda text, name=name, schedule=schedule: f"{name} of schedule {schedule}: {text}"  # noqa: E731
            torch.testing.assert_close(ranks[0]["state"][name], value, **tolerance, msg=message)
            assert value.isfinite().all(), message("")
            for rank in ranks[1:]:
                assert torch.equal(rank["state"][name], ranks[0]["state"][name]), message("ranks differ")
