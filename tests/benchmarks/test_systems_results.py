# SPDX-License-Identifier: Apache-2.0
"""The committed table of trained systems: complete, and every goal reached."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

pytest.importorskip("lightning_fabric")

import systems  # noqa: E402

from genperf.models import SYSTEMS  # noqa: E402

RESULTS = json.loads((BENCHMARKS / "results" / "systems.json").read_text())
SCORES = {name: row["scores"] for name, row in RESULTS["rows"].items()} | {"anchors": RESULTS["anchors"]}


def test_table_has_every_system_with_its_picture():
    assert list(RESULTS["rows"]) == list(systems.ROWS)
    assert {row.system for row in systems.ROWS.values()} == set(SYSTEMS)
    for name, row in systems.ROWS.items():
        assert RESULTS["rows"][name]["command"].startswith(f"genperf train {row.system} {row.options}".strip())
        assert not row.picture or (BENCHMARKS / "results" / "systems" / f"{name}.png").is_file()
    assert (BENCHMARKS / "results" / "systems.md").read_text() == systems.markdown(RESULTS)


@pytest.mark.parametrize(("row", "goal", "holds"), systems.GOALS, ids=lambda value: value if isinstance(value, str) else "")
def test_goals_are_reached(row, goal, holds):
    assert holds(SCORES), SCORES[row]


@pytest.mark.parametrize("system", systems.EQUAL)
def test_ops_train_as_well_as_their_references(system):
    result = RESULTS["equal"][system]
    assert len(result["genperf"]) == len(result["reference"]) == 3
    assert systems.agrees(result), result
