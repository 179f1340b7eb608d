# SPDX-License-Identifier: Apache-2.0
"""Folders of digits, extractors of their features, and the command that compares them: what the tests of `genperf fid` share."""

import importlib
import json
import re
import sys

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

from genperf.cli.main import main

PER_CLASS = 20  # images of each digit in each folder

EXTRACTORS = """
import pathlib
import torch
from torch import nn

class Digits(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Dropout(0.1), nn.Linear(72, 16))
        self.head = nn.Linear(16, 10)
        weights = pathlib.Path(__file__).with_name("digits.pt")
        if weights.exists():
            self.load_state_dict(torch.load(weights, weights_only=True))

    def forward(self, images):
        assert not torch.is_grad_enabled()
        return self.body(images.mean(1, keepdim=True))

class NeedsArgument(nn.Module):
    def __init__(self, width):
        super().__init__()

seen = []

def record(images):
    seen.append(images.clone())
    return images.float().flatten(1)[:, :3] + torch.tensor([0.0, 1.0, 2.0], device=images.device)

def maps(images):
    return [Digits.shared.body[0](images.mean(1, keepdim=True))]

Digits.shared = Digits()
module = Digits.shared.eval()
not_callable = 3

def dictionary(images):
    return {"features": images}

def integers(images):
    return images.flatten(1).long()

def short(images):
    return images.flatten(1)[1:]

def infinite(images):
    return images.flatten(1) / 0

def pair(images):
    return images.flatten(1), images.flatten(1)

def precision(images):
    seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
    return images.flatten(1)[:, 30:32]

def raising(images):
    raise RuntimeError("no such layer.\\nmore")

def interrupted(images):
    raise KeyboardInterrupt

def broken_factory():
    raise OSError("no weights")
"""

DIGITS = ("--extractor", "fid_extractors:Digits")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Matrices this small are slower with more threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two folders with digits 0 to 4, one with 5 to 9, and a module with an extractor trained on other images of digits."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    root = tmp_path_factory.mktemp("fid")
    (root / "fid_extractors.py").write_text(EXTRACTORS)
    images = (digits.images * 15).astype(np.uint8)  # the range was [0, 16]
    labels = digits.target
    rank = np.array([(labels[:index] == label).sum() for index, label in enumerate(labels)])  # index within the class
    rest = rank >= 2 * PER_CLASS
    with pytest.MonkeyPatch.context() as context:
        context.syspath_prepend(str(root))
        module = importlib.import_module("fid_extractors")
        torch.manual_seed(0)
        train(module.Digits(), images[rest][:500], labels[rest][:500], root / "digits.pt")
        del sys.modules["fid_extractors"]
    for name, chosen in {
        "low": (labels < 5) & (rank < PER_CLASS),
        "low_again": (labels < 5) & ~rest & (rank >= PER_CLASS),
        "high": (labels >= 5) & (rank < PER_CLASS),
    }.items():
        (root / name / "more").mkdir(parents=True)
        for number, image in enumerate(images[chosen]):
            folder = root / name if number % 2 else root / name / "more"
            Image.fromarray(image).save(folder / f"{number:03}.png")
    return root


@pytest.fixture
def extractors(world, monkeypatch):
    """The module of the extractors, freshly imported."""
    monkeypatch.syspath_prepend(str(world))
    monkeypatch.delitem(sys.modules, "fid_extractors", raising=False)
    yield importlib.import_module("fid_extractors")
    sys.modules.pop("fid_extractors", None)


def train(model, images, labels, path):
    """Train with gradient descent and save the weights."""
    images, labels = torch.from_numpy(images)[:, None].float() / 255, torch.from_numpy(labels)
    for _ in range(100):
        loss = torch.nn.functional.cross_entropy(model.head(model.body(images).relu()), labels)
        for parameter, gradient in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
            parameter.data -= gradient
    assert loss < 0.5
    torch.save(model.state_dict(), path)


def fid(*arguments):
    return main(["fid", "--device", "cpu", *map(str, arguments)])


def fid_json(capsys, *arguments):
    assert fid("--json", *arguments) == 0
    return json.loads(capsys.readouterr().out)


def files(folder):
    return sorted(folder.rglob("*.png"))


def features_of(extractors, folder):
    """Features computed directly from the files, float64 [N, 16]."""
    images = torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in files(folder)])
    with torch.no_grad():
        return extractors.Digits().eval()(images[:, None].repeat(1, 3, 1, 1).float() / 255).double().numpy()


def statistics_of(features, correction=1):
    return features.mean(0), np.cov(features, rowvar=False, ddof=correction)


def direct_terms(mean1, cov1, mean2, cov2):
    root = scipy.linalg.sqrtm(cov1 @ cov2).real
    return np.square(mean1 - mean2).sum(), np.trace(cov1 + cov2 - 2 * root)


def assert_fails(capsys, arguments, sentence, folder=None):
    """The command fails with code 2 and one sentence after the progress bars; it prints no result and writes no file."""
    before = folder and sorted(folder.rglob("*"))
    capsys.readouterr()
    assert fid(*arguments) == 2
    printed = capsys.readouterr()
    last = printed.err.strip().splitlines()[-1]
    assert re.search(sentence, last), last
    assert re.fullmatch(r"genperf: .*\.", last), last
    assert printed.out == ""
    assert before is None or before == sorted(folder.rglob("*"))
