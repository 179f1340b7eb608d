# SPDX-License-Identifier: Apache-2.0
"""The table of goals: what a line says, and rows of small sizes."""

import functools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import goals


@pytest.fixture(autouse=True)
def _few_turns(monkeypatch):
    monkeypatch.setattr(goals, "SECONDS", 0)


@pytest.mark.parametrize(
    ("goal", "ratio", "expected"),
    [
        (goals.Goal("speed-up", 2), "2.00x", "reached"),
        (goals.Goal("speed-up", 2.5), "2.00x", "missed"),
        (goals.Goal("share", 0.5), "0.50 of it", "reached"),
        (goals.Goal("share", 0.4), "0.50 of it", "missed"),
        (goals.Goal("ms", 1000), "2.00x", "reached"),
        (goals.Goal("ms", 999), "2.00x", "missed"),
        (None, "2.00x", ""),
    ],
)
def test_a_goal_is_judged(goal, ratio, expected):
    line = goals.line("", (1.0, 2.0), "other", goal)
    assert (line["ratio"], line[""]) == (ratio, expected)


@pytest.mark.parametrize(
    ("run", "lines"),
    [
        (functools.partial(goals.gaussian_lines, (64, 64), goals.Goal("ms", 1e9)), 1),
        (functools.partial(goals.interpolate_lines, (8, 3, 32, 32)), 1),
        (functools.partial(goals.step_lines, 64, 32, 8), 1),
        (functools.partial(goals.product_lines, 64, 32, 8), 1),
        (functools.partial(goals.neighbors_lines, 64, 32, 8, 3), 1),
    ],
)
def test_rows_of_small_sizes(run, lines):
    found = goals.measured(goals.Row("work", "size", run))
    assert len(found) == lines
    assert [line[""] for line in found if line[""] not in ("reached", "missed")] == []
    assert all(line["genperf"].endswith(" ms") and line["goal"] for line in found)


def test_a_wrong_result_and_a_missing_rival_are_said():
    def wrong():
        assert 1 == 2, "the indices differ"
        yield {}

    def missing():
        pytest.importorskip("no_such_rival")
        yield {}

    (line,) = goals.measured(goals.Row("work", "size", wrong))
    assert line[""].startswith("wrong result: the indices differ")
    (line,) = goals.measured(goals.Row("work", "size", missing))
    assert "no_such_rival" in line["rival"]
    assert line[""] == ""


def test_page(monkeypatch):
    lines = [{"work": "w", "size": "1", **goals.line("", (1.0, 2.0), "other", goals.Goal("speed-up", bound))} for bound in (1, 3)]
    for line in lines:
        del line["what"]
    facts = {"device": "Some CPU", "threads": 2, "torch": "2", "genperf": "1, isa"}
    page = goals.page(lines, facts, 0.5, "python benchmarks/goals.py --full")
    assert "1 of 2 goals are reached" in page
    assert "`python benchmarks/goals.py --full`. Some CPU, 2 threads" in page
    assert "| w | 1 | 1000 ms | other | 2000 ms | 2.00x | >= 3x | missed |" in page


def test_rows_have_unique_names():
    for full in (False, True):
        names = [str(row) for row in goals.rows(full)]
        assert len(set(names)) == len(names)
        assert {row.threads for row in goals.rows(full)} == set(goals.ENVIRONMENTS)
