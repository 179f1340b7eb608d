# SPDX-License-Identifier: Apache-2.0
"""State dicts, pickled modules and training runs written by genperf at commit 27c15df load, and give the same results as there."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_cases import CASES, PICKLED, reference, state_of

import genperf

FOLDER = Path(__file__).parent
SYSTEMS = ("vqvae", "wgan-gp")
# Results differ in the last bits between instruction sets.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
# Adam normalizes gradients: where one is near 0, its rounding error can move a weight by a learning rate.
AFTER_ADAM = {"rtol": 1e-3, "atol": 1e-3}


@pytest.fixture(scope="module")
def saved():
    return torch.load(FOLDER / "cases.pt", weights_only=True)


def assert_same_results(case, module, expected):
    """The module has the keys of the saved state, its parameters in their order, by which optimizers know them, and its results."""
    parameters = [name for name, _ in module.named_parameters()]
    assert parameters == [name for name in expected["state"] if name in parameters]
    assert state_of(module).keys() == expected["state"].keys()
    found = case.run(module, expected["input"])
    assert found["state_after"].keys() == expected["state_after"].keys()
    # Upstream's replacements of dead codes are drawn from torch's generator, in another place than at that commit.
    drawn = "threshold_ema_dead_code" in case.options
    for name in ("evaluated",) if drawn else ("evaluated", "trained", "state_after"):
        torch.testing.assert_close(found[name], expected[name], **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


def test_every_case_has_a_checkpoint(saved):
    assert list(saved) == list(CASES)


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_state_dict(saved, name):
    if name.startswith("torchmetrics"):
        pytest.importorskip("torchmetrics")
    case, expected = CASES[name], saved[name]
    with pytest.warns(DeprecationWarning, match="is deprecated") if case.renamed else nullcontext():
        module = case.load(expected["state"])
    assert_same_results(case, module, expected)


@pytest.mark.parametrize("name", PICKLED)
def test_pickled_module(saved, name):
    assert_same_results(CASES[name], torch.load(FOLDER / PICKLED[name], weights_only=False), saved[name])


def test_frechet_reference():
    loaded, expected = genperf.metrics.FrechetReference.load(FOLDER / "reference.npz"), reference()
    torch.testing.assert_close([loaded.mean, loaded.cov], [expected.mean, expected.cov])
    assert loaded.distance(expected.mean, expected.cov).item() == pytest.approx(0, abs=1e-9)


@pytest.fixture(params=SYSTEMS)
def run(request, tmp_path):
    """A copy of the run of a system, and what is expected of it."""
    pytest.importorskip("lightning_fabric")
    shutil.copytree(FOLDER / request.param, tmp_path / "run")
    return request.param, tmp_path / "run", torch.load(tmp_path / "run" / "expected.pt", weights_only=True)


def command(*arguments):
    from genperf.cli.main import main

    assert main([*map(str, arguments), "--device", "cpu"]) == 0


def samples(folder):
    out = folder / "samples.npz"
    command("sample", folder, "--n", 4, "--seed", 3, "--data", folder / "images.npz", "--out", out)
    with np.load(out) as arrays:
        return torch.from_numpy(arrays["images"]).float()


def test_samples_of_a_run(run):
    _, folder, expected = run
    torch.testing.assert_close(samples(folder), expected["samples"].float(), rtol=0, atol=1)


def test_resumed_run(run):
    system, folder, expected = run
    epochs = 1 + torch.load(folder / "checkpoint.pt", weights_only=True)["training"]["epoch"]
    command("train", system, "--resume", "--epochs", epochs, "--data", folder / "images.npz", "--out", folder)
    training = torch.load(folder / "checkpoint.pt", weights_only=True)["training"]
    assert list(training["model"]) == list(expected["model"])
    torch.testing.assert_close(training["model"], expected["model"], **AFTER_ADAM)
    losses = json.loads((folder / "metrics.json").read_text())["history"][-1]
    assert losses == pytest.approx(expected["losses"], rel=1e-3, abs=1e-3)
    torch.testing.assert_close(samples(folder), expected["resumed_samples"].float(), rtol=0, atol=2)
