# SPDX-License-Identifier: Apache-2.0
"""`torchrun -m genperf fid A B`: the images of each input are divided over the processes, and the scores are those of one process."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

EXTRACTOR = "def features(images):\n    return images.flatten(1)[:, ::7]\n"
OPTIONS = ("--extractor", "per_image:features", "--kid", "--kid-subsets", "3", "--precision-recall", "--neighbors", "1", "--device", "cpu")


@pytest.fixture
def inputs(tmp_path):
    """A folder of 7 images and an archive of 2, which leaves one of three processes without a share."""
    (tmp_path / "per_image.py").write_text(EXTRACTOR)
    draws = np.random.default_rng(0)
    (tmp_path / "a").mkdir()
    for number in range(7):
        Image.fromarray(draws.integers(0, 256, (4, 5, 3), dtype=np.uint8)).save(tmp_path / "a" / f"{number}.png")
    np.savez(tmp_path / "b.npz", draws.integers(0, 256, (2, 4, 5, 3), dtype=np.uint8))
    return tmp_path


def start(folder, world, *arguments):
    """One process of `genperf fid` for each rank, with the environment that torchrun sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank in range(world):
        torchrun = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in torchrun.items()}}
        command = [sys.executable, "-m", "genperf", "fid", *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        ranks.append(subprocess.Popen(command, cwd=folder, env=environment, **pipes))
    return ranks


def test_scores_are_those_of_one_process(inputs):
    outputs = {}
    for world in (1, 3):
        ranks = start(inputs, world, "a", "b.npz", *OPTIONS, "--json")
        printed = [rank.communicate(timeout=200) for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0] * world, printed
        assert [bool(out) for out, _ in printed] == [True] + [False] * (world - 1)
        outputs[world] = json.loads(printed[0][0])
    for scores in outputs.values():
        del scores["seconds"]
    kid, expected_kid = outputs[3].pop("kid"), outputs[1].pop("kid")
    assert outputs[3].keys() == outputs[1].keys()
    for name, expected in outputs[1].items():
        assert outputs[3][name] == (pytest.approx(expected, rel=1e-9) if isinstance(expected, float) else expected), name
    assert kid == pytest.approx(expected_kid, rel=1e-12)
    assert outputs[3]["n"] == [7, 2]


def test_sizes_that_differ_between_shares_are_an_error(inputs):
    for number in (4, 5, 6):
        (inputs / "a" / f"{number}.png").unlink()
    for number in (2, 3):
        Image.fromarray(np.zeros((3, 5, 3), np.uint8)).save(inputs / "a" / f"{number}.png")
    ranks = start(inputs, 2, "a", "b.npz", *OPTIONS[:2], "--device", "cpu")
    errors = [rank.communicate(timeout=200)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], errors
    assert all("images must have one size unless --size gives it, got 5x3 and 5x4 in 'a'." in error for error in errors)
