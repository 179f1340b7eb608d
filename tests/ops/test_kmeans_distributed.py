# SPDX-License-Identifier: Apache-2.0
"""k-means of several ranks equals that of one on the concatenated vectors, bitwise."""

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1] / "nn"))
from forked_ranks import results_of_ranks


def test_ranks_equal_one_process(tmp_path):
    results = results_of_ranks(str(Path(__file__).with_name("cluster_in_ranks.py")), tmp_path, [1, 2, 3], 120)
    (expected,) = results[1]
    assert "not finite on the last rank" in expected
    for world in (2, 3):
        for name, (codebook, indices, counts, inertia) in ((name, parts) for name, parts in expected.items() if parts):
            ranks = [rank[name] for rank in results[world]]
            assert torch.equal(torch.cat([rank[1] for rank in ranks]), indices), (world, name)
            for rank in ranks:
                for part, whole in zip((rank[0], *rank[2:]), (codebook, counts, inertia), strict=True):
                    assert torch.equal(part, whole), (world, name)
        assert all("not finite on the last rank" in rank for rank in results[world])
