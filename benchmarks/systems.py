# SPDX-License-Identifier: Apache-2.0
"""Trains every system on MNIST digits and scores it on held-out digits; writes results/systems.{json,md} and systems/*.png.

python benchmarks/systems.py [--only NAME ...] trains through `genperf train` and scores with the functions of `genperf evaluate`. With
--equal it trains four systems three times each, with genperf's ops and with their references.
"""

import argparse
import dataclasses
import json
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measure import device_name

from genperf._files import write_text_atomically
from genperf.cli.main import main as genperf
from genperf.training.classifier import Classifier, train_classifier
from genperf.training.data import load_images, split_held_out
from genperf.training.evaluation import anchors, evaluate
from genperf.training.runs import Run, load_run

RESULTS = Path(__file__).parent / "results"
SEED = 0


@dataclasses.dataclass(frozen=True)
class Row:
    """A system and its training options. The scores of several variants are averaged; a row without a picture draws no samples."""

    system: str
    options: str = ""
    variants: tuple[str, ...] = ("",)
    picture: str = "samples.png"


ROWS = {
    "autoencoder": Row("autoencoder", "--epochs 20 --lr-decay 0.5", picture="reconstructions.png"),
    "denoising-autoencoder": Row("denoising-autoencoder", "--epochs 15 --lr-decay 0.5", picture="denoised.png"),
    "anomaly-detector": Row(
        "anomaly-detector", "--epochs 20", tuple(f"--normal-class {digit}" for digit in range(10)), picture="reconstructions.png"
    ),
    "vae": Row("vae", "--epochs 30 --lr-decay 0.5"),
    "discrete-vae": Row("discrete-vae", "--epochs 16 --lr-decay 0.5"),
    "vqvae": Row("vqvae", "--epochs 12 --lr-decay 0.5"),
    "vqvae2": Row("vqvae2", "--epochs 8 --lr-decay 0.5"),
    "gan": Row("gan", "--epochs 60 --lr-decay 0.5"),
    "dcgan": Row("dcgan", "--epochs 30 --lr-decay 0.5"),
    "wgan": Row("wgan", "--epochs 60 --lr-decay 0.5 --critic-steps 2"),
    "wgan-gp": Row("wgan-gp", "--epochs 60 --lr-decay 0.5 --critic-steps 2"),
    "conditional-gan": Row("conditional-gan", "--epochs 20 --lr-decay 0.5"),
    "semi-supervised-gan": Row("semi-supervised-gan", "--epochs 45 --lr-decay 0.5 --adversarial-weight 1"),
    "labels alone": Row("semi-supervised-gan", "--epochs 45 --lr-decay 0.5 --no-unlabelled", picture=""),
    "stackgan": Row("stackgan", "--epochs 24 --lr-decay 0.5"),
    "lapgan": Row("lapgan", "--epochs 30 --lr-decay 0.5"),
}

Scores = dict[str, dict[str, float]]

# What a row must reach: a sentence, and a condition on all scores.
GOALS: tuple[tuple[str, str, Callable[[Scores], bool]], ...] = (
    ("autoencoder", "held-out MSE at most 0.012 with 32 dimensions", lambda s: s["autoencoder"]["mse"] <= 0.012),
    ("denoising-autoencoder", "PSNR of noisy digits up by at least 6 dB", lambda s: s["denoising-autoencoder"]["psnr_gain"] >= 6),
    ("anomaly-detector", "AUROC at least 0.90, averaged over the ten digits", lambda s: s["anomaly-detector"]["auroc"] >= 0.9),
    ("vae", "negative ELBO at most 120 nats", lambda s: s["vae"]["negative_elbo"] <= 120),
    ("discrete-vae", "MSE within 30 % of the VQ-VAE's", lambda s: s["discrete-vae"]["mse"] <= 1.3 * s["vqvae"]["mse"]),
    ("vqvae2", "MSE below the VQ-VAE's", lambda s: s["vqvae2"]["mse"] < s["vqvae"]["mse"]),
    *(
        (row, "FID at most a third of the untrained generator's, and below the mean image's", lambda s, row=row: _good_fid(s, row))
        for row in ("gan", "dcgan", "wgan", "wgan-gp", "conditional-gan", "semi-supervised-gan", "stackgan", "lapgan")
    ),
    ("dcgan", "all ten digits among its samples", lambda s: s["dcgan"]["coverage"] == 10),
    ("wgan-gp", "all ten digits among its samples", lambda s: s["wgan-gp"]["coverage"] == 10),
    ("conditional-gan", "label accuracy at least 90 %", lambda s: s["conditional-gan"]["label_accuracy"] >= 0.9),
    ("stackgan", "label accuracy at least 90 %", lambda s: s["stackgan"]["label_accuracy"] >= 0.9),
    (
        "semi-supervised-gan",
        "error with 100 labels at least 30 % below that of the labels alone",
        lambda s: s["semi-supervised-gan"]["error"] <= 0.7 * s["labels alone"]["error"],
    ),
    ("lapgan", "the pyramid reconstructs within 1e-6", lambda s: s["lapgan"]["pyramid_error"] <= 1e-6),
)

# Training options for --equal, and the score that is compared.
EQUAL = {
    "vqvae": ("--epochs 3 --prior-width 0", "mse"),
    "vae": ("--epochs 6", "negative_elbo"),
    "discrete-vae": ("--epochs 3 --prior-width 0", "mse"),
    "wgan-gp": ("--epochs 8 --critic-steps 2", "fid"),
}
SEEDS = (0, 1, 2)


def _good_fid(scores: Scores, row: str) -> bool:
    return scores[row]["fid"] <= min(scores[row]["fid_untrained"] / 3, scores["anchors"]["fid_mean_image"])


def train(system: str, options: str, folder: Path) -> Run:
    shutil.rmtree(folder, ignore_errors=True)
    command = ["train", system, "--out", str(folder), *options.split()]
    print("genperf", " ".join(command), flush=True)
    if genperf(command) != 0:
        raise SystemExit(f"genperf {' '.join(command)} failed.")
    return load_run(folder, torch.device("cpu"))


def score(run: Run, classifier: Classifier, *, samples: int) -> dict[str, float]:
    scores = evaluate(run.system, run.training, run.held_out, samples=samples, classifier=classifier, seed=SEED)
    if "fid" in scores:
        torch.manual_seed(run.settings.seed)
        new = type(run.system)(run.system.config)
        new.initialize(run.training.images[: run.settings.batch_size])
        scores["fid_untrained"] = evaluate(new, run.training, run.held_out, samples=samples, classifier=classifier, seed=SEED)["fid"]
    if hasattr(run.system, "pyramid"):
        images = run.held_out.images * 2 - 1
        rebuilt = run.system.pyramid.reconstruct(run.system.pyramid.decompose(images))
        scores["pyramid_error"] = (rebuilt - images).abs().max().item()
    return scores


def train_row(name: str, row: Row, classifier: Classifier, work: Path, pictures: Path) -> dict:
    results = []
    for number, variant in enumerate(row.variants):
        folder = work / name.replace(" ", "-") / str(number)
        run = train(row.system, f"{row.options} {variant}", folder)
        metrics = json.loads((folder / "metrics.json").read_text())
        scores = score(run, classifier, samples=2500 if row.picture else 0)
        results.append({"scores": scores, **{key: metrics[key] for key in ("training_seconds", "images_per_second", "step_ms")}})
        print(name, variant, results[-1]["scores"], flush=True)
    if row.picture:
        pictures.mkdir(parents=True, exist_ok=True)
        shutil.copy(work / name.replace(" ", "-") / "0" / row.picture, pictures / f"{name}.png")
    means = {key: statistics.mean(result["scores"][key] for result in results) for key in results[0]["scores"]}
    command = f"genperf train {row.system} {row.options}".strip() + (f" {row.variants[0]}" if len(row.variants) > 1 else "")
    seconds = sum(result["training_seconds"] for result in results)
    return {**results[0], "scores": means, "training_seconds": seconds, "command": command, "runs": [r["scores"] for r in results]}


def train_equally(classifier: Classifier, work: Path) -> dict:
    found = {}
    for system, (options, key) in EQUAL.items():
        scores: dict[str, list[float]] = {"genperf": [], "reference": []}
        for seed in SEEDS:
            for impl, choice in (("genperf", ""), ("reference", "--impl reference")):
                run = train(system, f"{options} --seed {seed} {choice}", work / "equal" / f"{system}-{impl}-{seed}")
                scores[impl].append(evaluate(run.system, run.training, run.held_out, classifier=classifier, seed=SEED)[key])
        found[system] = {"options": options, "score": key, **scores}
        print(system, found[system], flush=True)
    return found


def agrees(result: dict) -> bool:
    """Whether the mean scores differ by no more than the seeds do."""
    spread = max(max(result[impl]) - min(result[impl]) for impl in ("genperf", "reference"))
    return abs(statistics.mean(result["genperf"]) - statistics.mean(result["reference"])) <= spread


def markdown(results: dict) -> str:
    scores = {name: row["scores"] for name, row in results["rows"].items()} | {"anchors": results["anchors"]}
    lines = [
        f"{results['machine']}. 4,500 digits for training, 500 held out, of which the classifier recognizes "
        f"{results['classifier_accuracy']:.1%}. FID compares its 64 features of 2,500 samples and of the held-out digits.",
        "",
        "| FID of | |",
        "|---|---|",
        *(
            f"| {key.removeprefix('fid_').replace('_', ' ')} | {value:.4g} |"
            for key, value in results["anchors"].items()
            if key.startswith("fid_")
        ),
        "",
        "| system | scores | training s | step, genperf ms | step, reference ms | goals |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in results["rows"].items():
        shown = ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in row["scores"].items())
        goals = "; ".join(f"{text}: {'yes' if holds(scores) else '**no**'}" for goal, text, holds in GOALS if goal == name)
        times = row["step_ms"]
        lines.append(
            f"| {name} | {shown} | {row['training_seconds']:.0f} | {times['genperf_ms']:.1f} | {times['reference_ms']:.1f} | {goals} |"
        )
    if results.get("equal"):
        lines += ["", "Trained with genperf's ops and with their references in plain PyTorch, seeds 0, 1, 2:", ""]
        lines += ["| system | score | genperf | reference | means differ by no more than the seeds |", "|---|---|---|---|---|"]
        for system, result in results["equal"].items():
            native, reference = (", ".join(f"{value:.4g}" for value in result[impl]) for impl in ("genperf", "reference"))
            lines.append(
                f"| {system} {result['options']} | {result['score']} | {native} | {reference} | {'yes' if agrees(result) else '**no**'} |"
            )
    lines += ["", "Commands:", "", *(f"    {row['command']}" for row in results["rows"].values()), ""]
    for name, row in ROWS.items():
        if row.picture and name in results["rows"]:
            lines += [f"### {name}", "", f"![{name}](systems/{name}.png)", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=ROWS, help="rows to train again; the others keep their results")
    parser.add_argument("--equal", action="store_true", help="train with ops and references instead of the rows")
    parser.add_argument("--work", type=Path, default=Path("build/systems"), help="folder of the runs (%(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS / "systems.json", help="(%(default)s)")
    arguments = parser.parse_args()

    began = time.monotonic()
    results = json.loads(arguments.results.read_text()) if arguments.results.exists() else {"rows": {}}
    training, held_out = split_held_out(load_images(None))
    classifier = train_classifier(training, held_out, torch.device("cpu"))
    results["classifier_accuracy"] = classifier.accuracy
    results["anchors"] = anchors(training, held_out, classifier=classifier, seed=SEED)

    def write() -> None:
        write_text_atomically(arguments.results, json.dumps(results, indent=1) + "\n")
        if set(results["rows"]) == set(ROWS):
            write_text_atomically(arguments.results.with_suffix(".md"), markdown(results))

    if arguments.equal:
        results["equal"] = train_equally(classifier, arguments.work)
    else:
        results["machine"] = f"{device_name('cpu')}, {torch.get_num_threads()} threads, torch {torch.__version__}"
        for name in arguments.only or ROWS:
            results["rows"][name] = train_row(name, ROWS[name], classifier, arguments.work, arguments.results.with_suffix(""))
            # In the order of ROWS, whatever was trained first.
            results["rows"] = {row: results["rows"][row] for row in ROWS if row in results["rows"]}
            write()
    write()
    print(f"{(time.monotonic() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
