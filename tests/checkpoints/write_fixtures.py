# SPDX-License-Identifier: Apache-2.0
"""Write the files beside this script: checkpoints, pickled modules, runs and the public names of genperf at commit 27c15df.

Run it with an editable install of that commit. Files that a later genperf wrote would not test what changed since.
"""

import os
import re
import shutil
import tempfile
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from checkpoint_cases import CASES, PICKLED, reference, state_of

import genperf
from genperf import kernels
from genperf.cli.main import main

FOLDER = Path(__file__).parent

MODELS = ("genperf.compat", "genperf.losses", "genperf.metrics", "genperf.models", "genperf.nn")
EPOCHS = 60
RUNS = {
    "vqvae": "--hidden=8 --dim=4 --num-codes=8 --prior-width=8 --prior-layers=1 --prior-every=1 --lr=0.01 --decay=0.7",
    "wgan-gp": "--width=4 --latent-dim=4 --critic-steps=1 --ema=0.5 --lr=0.01",
}


def write_cases() -> None:
    """Each layer after two steps, and what it does from there on."""
    saved = {}
    for seed, (name, case) in enumerate(CASES.items()):
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        trained = case.build()
        for _ in range(2):
            case.prepare(trained, torch.randn(case.shape, generator=generator))
        state, x = state_of(trained), torch.randn(case.shape, generator=generator)
        if name in PICKLED:
            torch.save(case.load(state), FOLDER / PICKLED[name])
        saved[name] = {"state": state, "input": x, **case.run(case.load(state), x)}
    torch.save(saved, FOLDER / "cases.pt")


def write_run(system: str, options: str) -> None:
    """A run, samples of it, and its model, losses and samples after another epoch."""
    target = FOLDER / system
    target.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        blocks = np.random.default_rng(0).integers(0, 256, (24, 2, 2), dtype=np.uint8)
        np.savez_compressed("images.npz", images=blocks.repeat(4, 1).repeat(4, 2))
        shutil.copy("images.npz", target)
        settings = ["--data", "images.npz", "--batch-size", "8", "--seed", "1", "--epochs", f"{EPOCHS}"]
        assert main(["train", system, *settings, *options.split(), "--device", "cpu", "--out", "run"]) == 0
        shutil.copy("run/checkpoint.pt", target)
        expected = {"samples": samples()}
        assert main(["train", system, "--epochs", f"{EPOCHS + 1}", "--resume", "--device", "cpu", "--out", "run"]) == 0
        training = torch.load("run/checkpoint.pt", weights_only=True)["training"]
        expected |= {"model": training["model"], "losses": training["history"][-1], "resumed_samples": samples()}
        torch.save(expected, target / "expected.pt")


def write_imports() -> None:
    """Every module; every name in an `__all__`, in README.md or in docs, also from the module that defines it; and the classes
    that a pickled model can refer to.
    """
    folders = {"genperf": Path(genperf.__path__[0]), "genperf.kernels": Path(kernels.__path__[0])}
    files = [(package, file.relative_to(folder)) for package, folder in folders.items() for file in folder.rglob("*.py")]
    paths = {".".join([package, *file.with_suffix("").parts]).removesuffix(".__init__") for package, file in files}
    paths = {path for path in paths if "._" not in path}
    names = {(path, name) for path in paths for name in getattr(import_module(path), "__all__", ())}
    names.discard(("genperf", "__version__"))
    root = folders["genperf"].parent
    for page in [root / "README.md", *root.glob("docs/**/*.md"), *root.glob("docs/**/*.py")]:
        names |= documented(page.read_text())
    # Internal to the ops, although in three lists.
    names = {(path, name) for path, name in names if name != "refusals"}
    for path in (path for path in paths if path.startswith(MODELS)):
        names |= {(path, name) for name, value in vars(import_module(path)).items() if is_class_of(path, name, value)}
    defined = {(getattr(getattr(import_module(path), name), "__module__", None), name) for path, name in names}
    names |= {(path, name) for path, name in defined if path in paths}
    lines = sorted(paths) + sorted(f"{path}:{name}" for path, name in names)
    (FOLDER / "imports.txt").write_text("\n".join(lines) + "\n")


def is_class_of(path: str, name: str, value: object) -> bool:
    return isinstance(value, type) and value.__module__ == path and not name.startswith("_")


def documented(text: str) -> set[tuple[str, str]]:
    """The names below genperf that a page shows: in imports, and as in `genperf.nn.VectorQuantizer`."""
    found = set()
    for path, imported in re.findall(r"from (genperf[\w.]*) import ([\w, ]+)", text):
        found |= {(path, name.strip()) for name in imported.split(",")}
    for path in re.findall(r"genperf(?:\.\w+)+", text):
        place: object = genperf
        for name in path.split(".")[1:]:
            if not isinstance(place, ModuleType) or not hasattr(place, name):
                break
            if not isinstance(getattr(place, name), ModuleType):
                found.add((place.__name__, name))
            place = getattr(place, name)
    return found


def samples() -> torch.Tensor:
    """Drawn from the run in the folder "run", uint8 [4, H, W, 1]."""
    assert main(["sample", "run", "--n", "4", "--seed", "3", "--device", "cpu", "--out", "samples.npz"]) == 0
    with np.load("samples.npz") as arrays:
        return torch.from_numpy(arrays["images"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    write_imports()
    write_cases()
    reference().save(FOLDER / "reference.npz")
    for system, options in RUNS.items():
        write_run(system, options)
