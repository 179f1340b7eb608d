# SPDX-License-Identifier: Apache-2.0
"""Training under DDP, and training that is killed and resumed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from genperf.models import SYSTEMS
from genperf.training.checkpoint import load_checkpoint

pytest.importorskip("lightning_fabric")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Results of every system, from one process and from two."""
    folder = tmp_path_factory.mktemp("systems")
    script = str(Path(__file__).parent / "train_small_systems.py")
    runs = [
        subprocess.Popen([*launcher, script, str(folder / name)], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
        for name, launcher in (("one", [sys.executable]), ("two", TORCHRUN))
    ]
    for run in runs:
        _, errors = run.communicate(timeout=600)
        assert run.returncode == 0, errors[-5000:]
    return [torch.load(folder / name, weights_only=True) for name in ("one", "two")]


@pytest.mark.parametrize("system", SYSTEMS)
def test_two_processes_match_one_on_the_global_batch(trained, system):
    one, two = (results[system] for results in trained)
    assert len(one["history"]) == 2
    for losses, expected in zip(two["history"], one["history"], strict=True):
        assert expected == pytest.approx(losses, rel=1e-6, abs=1e-9)
    assert one["model"].keys() == two["model"].keys()
    for name, value in one["model"].items():
        torch.testing.assert_close(
            two["model"][name], value, rtol=1e-5, atol=1e-6, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
        )


def write_images(path):
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    np.savez(path, images=images, labels=np.arange(40) % 4)
    return str(path)


def options(tmp_path, out, *more):
    small = ["--batch-size", "6", "--num-codes", "6", "--dim", "3", "--hidden", "8", "--prior-width", "8", "--device", "cpu"]
    return ["train", "vqvae", "--out", str(tmp_path / out), "--data", str(tmp_path / "images.npz"), *small, *more]


def test_command_under_torchrun(tmp_path):
    write_images(tmp_path / "images.npz")
    for out, launcher in (("one", [sys.executable, "-m"]), ("two", [*TORCHRUN, "-m"])):
        command = [*launcher, "genperf", *options(tmp_path, out, "--epochs", "2")]
        run = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-5000:]
        assert run.stdout.count("written") == 1  # by rank 0 only
    one, two = (json.loads((tmp_path / out / "metrics.json").read_text()) for out in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    for losses, expected in zip(two["history"], one["history"], strict=True):
        assert expected == pytest.approx(losses, rel=1e-3)
    assert two["scores"] == pytest.approx(one["scores"], rel=1e-2)
    uneven = subprocess.run(
        [*TORCHRUN, "-m", "genperf", *options(tmp_path, "three", "--batch-size", "5")], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert "the batch must be divisible by the number of processes, got --batch-size 5 and 2." in uneven.stderr


def test_killed_run_resumes(tmp_path):
    """A run that is killed three times at random moments ends like an uninterrupted run."""
    write_images(tmp_path / "images.npz")
    command = [sys.executable, "-m", "genperf"]
    epochs = ("--epochs", "60")
    whole = subprocess.Popen(
        [*command, *options(tmp_path, "whole", *epochs)], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    rng = random.Random(os.getpid())
    checkpoint = tmp_path / "parts" / "checkpoint.pt"
    for attempt in range(3):
        resume = ["--resume"] if attempt else []
        before = checkpoint.stat().st_mtime_ns if attempt else 0
        run = subprocess.Popen([*command, *options(tmp_path, "parts", *epochs, *resume)], env=ENVIRONMENT, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while not checkpoint.exists() or checkpoint.stat().st_mtime_ns == before:
            assert run.poll() is None, run.stderr.read().decode()[-5000:]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        run.send_signal(signal.SIGKILL)
        assert run.wait() in (-signal.SIGKILL, 0)
        load_checkpoint(checkpoint)
    done = subprocess.run([*command, *options(tmp_path, "parts", *epochs, "--resume")], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    assert whole.wait(timeout=300) == 0
    expected, resumed = (load_checkpoint(tmp_path / out / "checkpoint.pt")["training"] for out in ("whole", "parts"))
    assert resumed["history"] == expected["history"]
    assert resumed["model"].keys() == expected["model"].keys()
    for name, value in expected["model"].items():
        assert torch.equal(value, resumed["model"][name]), name
