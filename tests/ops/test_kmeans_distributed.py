# SPDX-License-Identifier: Apache-2.0
"""k-means of several ranks equals that of one on the concatenated vectors, bitwise."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "nn"))
from forked_ranks import results_of_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def results(folder):
    return results_of_ranks(str(Path(__file__).with_name("cluster_in_ranks.py")), folder, [1, 2, 3], 120)


def test_command(results, folder):
    """`genperf kmeans` in every rank: the first one writes and prints."""
    with np.load(folder / "1.npz") as expected:
        assert expected["ids"].shape == (599, 2)
        for world in (2, 3):
            with np.load(folder / f"{world}.npz") as found:
                assert found.files == expected.files
                assert all(np.array_equal(found[name], expected[name]) for name in found.files)
            report = (folder / f"{world}.json").read_text().splitlines()
            assert [line for line in report if "seconds" not in line] == [
                line for line in (folder / "1.json").read_text().splitlines() if "seconds" not in line
            ]
            assert ["vectors" in rank["printed"] for rank in results[world]] == [True] + [False] * (world - 1)
            assert not any(rank["printed"] for rank in results[world][1:])
            assert not (folder / f"{world}.npz.resume").exists()


def test_ranks_equal_one_process(results):
    (expected,) = results[1]
    assert "not finite on the last rank" in expected
    results_of_vectors = {name: parts for name, parts in expected.items() if isinstance(parts, list) and parts}
    for world in (2, 3):
        for name, (codebook, indices, counts, inertia) in results_of_vectors.items():
            ranks = [rank[name] for rank in results[world]]
            assert torch.equal(torch.cat([rank[1] for rank in ranks]), indices), (world, name)
            for rank in ranks:
                for part, whole in zip((rank[0], *rank[2:]), (codebook, counts, inertia), strict=True):
                    assert torch.equal(part, whole), (world, name)
        assert all("not finite on the last rank" in rank for rank in results[world])
