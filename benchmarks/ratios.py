# SPDX-License-Identifier: Apache-2.0
"""`genperf bench --in-turn`: genperf and one rival after the other, timed in alternating turns of one process, beside goals.

Standard normal float32 on the CPU, shortest wall times. Searches pack the codebook in every call. A training step of a layer is forward,
backward and the update of the codebook, with equal arguments and equal codes.
"""

import argparse
import functools
import importlib
import os
import statistics
import sys
from collections.abc import Callable
from importlib import metadata
from typing import NamedTuple

import pytest
import torch
from bench_nearest_code import CONTENDERS, checked_rows
from measure import TURNS, device_name, in_turn, peak_extra_bytes, seconds_of
from modes import command, selected, write
from report import machine, markdown, megabytes, milliseconds
from torch import Tensor, nn
from workloads import IN_TURN, Workload

from genperf import __version__, _library
from genperf._errors import UserError

UPSTREAM, DROP_IN = "vector_quantize_pytorch", "genperf.compat.vector_quantize_pytorch"

CHECKED_PRODUCTS = 2.5e9  # float64 computes them within seconds
EXTRA_MEGABYTES = 32
RIVALS = ("faiss", "torch.cdist+argmin", "vector-quantize-pytorch")
# How many times faster than each rival a search is meant to be on two threads of a processor with AMX.
SEARCH_GOALS = {
    "RQ-VAE-level": (7, 12, 40),
    "VQ-VAE": (5, 15, 50),
    "ViT-VQGAN": (6, 35, 120),
    "VQGAN-f16": (4, 6, 12),
    "LlamaGen-f16": (1.4, 20, 150),
    "LDM-f4": (1.1, 15, 80),
}


class Layer(NamedTuple):
    """A layer that genperf.compat.vector_quantize_pytorch and upstream have under one name, at one size."""

    name: str
    size: tuple[int, int, int]
    """N vectors, K codes, D dimensions."""
    arguments: dict[str, object]
    step: float | None = None
    """How many times faster than upstream a training step is meant to be."""
    megabytes: float | None = None
    """Memory that a training step may take."""

    def __str__(self) -> str:
        return " ".join([f"layer {self.name} {', '.join(map(str, self.size))}", self.options()]).rstrip()

    def options(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.arguments.items())


LAYERS = (
    Layer("VectorQuantize", (16384, 512, 64), {}, 15),
    Layer("VectorQuantize", (8192, 1024, 64), {}, 15),
    Layer("VectorQuantize", (8192, 8192, 32), {}, 40),
    Layer("VectorQuantize", (4096, 16384, 256), {}, 15),
    Layer("VectorQuantize", (26624, 8192, 64), {}, megabytes=64),
    Layer("VectorQuantize", (26624, 8192, 64), {"codebook_diversity_loss_weight": 0.1}, megabytes=128),
    Layer("VectorQuantize", (8192, 8192, 32), {"use_cosine_sim": True}),
    Layer("VectorQuantize", (8192, 8192, 32), {"threshold_ema_dead_code": 2}),
    Layer("VectorQuantize", (8192, 8192, 32), {"codebook_diversity_loss_weight": 0.1}),
    Layer("VectorQuantize", (8192, 8192, 32), {"stochastic_sample_codes": True}),
    Layer("VectorQuantize", (8192, 1024, 64), {"heads": 8, "codebook_dim": 8, "separate_codebook_per_head": True}),
    Layer("ResidualVQ", (4800, 1024, 128), {"num_quantizers": 8}, 10),
    Layer("SimVQ", (4096, 8192, 128), {}),
    Layer("FSQ", (65536, 64000, 6), {"levels": [8, 8, 8, 5, 5, 5]}),
    Layer("LFQ", (4096, 8192, 13), {}),
    Layer("LFQ", (2048, 262144, 18), {}),
)
# Approximate peak memory of upstream for each pair of a vector and a code.
BYTES_PER_PAIR = {"VectorQuantize": 36, "ResidualVQ": 25, "SimVQ": 5, "FSQ": 0, "LFQ": 28}
MAXIMUM_BYTES = 12e9

TRAINING = {"steps": 300, "batch_size": 64, "codes": 512}
TRAINING_QUICK = {"steps": 10, "batch_size": 4, "codes": 16}
POINTS = 10


def search_lines(workload: Workload, goals: tuple[float | None, ...], rounds: int = TURNS) -> list[dict[str, str]]:
    """Wrong rows, memory, and the ratio to each rival, at one size."""
    _, n, k, d = workload
    torch.manual_seed(0)
    x, codebook = torch.randn(n, d), torch.randn(k, d)
    search = CONTENDERS["genperf"].make(x, codebook, None)

    def line(what: str, value: str, rival: str = "", ratio: str = "", goal: str = "", reached: bool | None = None) -> dict[str, str]:
        row = {"N, K, D": f"{n}, {k}, {d}", "": what, "genperf": value, "rival": rival, "ratio": ratio, "goal": goal}
        return {**row, "reached": verdict(reached)}

    rows, exact = checked_rows(x, codebook, CHECKED_PRODUCTS)
    wrong = int((search()[rows] != exact).sum())
    extra = peak_extra_bytes(search, "cpu")
    lines = [line(f"wrong rows of {len(rows)}", str(wrong), goal="0", reached=wrong == 0)]
    if extra is not None:
        needed = megabytes({"extra_bytes": extra})
        lines.append(line("extra MB", needed, goal=f"< {EXTRA_MEGABYTES}", reached=extra < EXTRA_MEGABYTES * 1e6))
    for name, goal in zip(RIVALS, goals, strict=True):
        try:
            rival = CONTENDERS[name].make(x, codebook, None)
        except pytest.skip.Exception as reason:  # it is not installed
            print(f"{name}: {reason}", file=sys.stderr)
            continue
        genperf_seconds, rival_seconds = in_turn(search, rival, rounds)
        ratio = rival_seconds / genperf_seconds
        wanted = {} if goal is None else {"goal": f">= {goal}x", "reached": ratio >= goal}
        times = (milliseconds(seconds * 1e3) for seconds in (genperf_seconds, rival_seconds))
        lines.append(line(f"ms, {name}", *times, f"{ratio:.2f}x", **wanted))
    return lines


def search_goals(workload: Workload) -> tuple[float | None, ...]:
    if _library.isa == "amx":
        return SEARCH_GOALS[workload.name]
    return (1.2 if workload.d <= 32 else 1.0, None, None)


def layer_line(layer: Layer, rounds: int = TURNS) -> dict[str, str]:
    """Times, ratios and memory of a layer, genperf / upstream; checks first that both choose the same codes."""
    n, k, d = layer.size
    torch.manual_seed(0)
    genperf, upstream = (make(package, layer) for package in (DROP_IN, UPSTREAM))
    genperf.load_state_dict(upstream.state_dict())
    x, gradient = torch.randn(2, 16, n // 16, d)
    step, upstream_step = (training_step(module, x, gradient) for module in (genperf, upstream))
    fits = BYTES_PER_PAIR[layer.name] * n * k < MAXIMUM_BYTES
    line = {"layer": layer.name, "N, K, D": f"{n}, {k}, {d}", "options": layer.options()}
    line |= dict.fromkeys(("eval, ms", "eval, ratio", "step, ms", "step, ratio"), "")
    if fits:
        indices, expected = (module.eval()(x)[1].long() for module in (genperf, upstream))
        equal = (indices == expected).float().mean().item()
        assert equal > 0.99, f"{layer}: only {equal:.1%} of the indices agree"
        eval_times = in_turn(evaluation(genperf, x), evaluation(upstream, x), rounds)
        genperf.train()
        upstream.train()
        step_times = in_turn(step, upstream_step, rounds)
        for what, (a, b) in (("eval", eval_times), ("step", step_times)):
            line |= {f"{what}, ms": f"{milliseconds(a * 1e3)} / {milliseconds(b * 1e3)}", f"{what}, ratio": f"{b / a:.1f}x"}
    extra = peak_extra_bytes(step, "cpu")
    line["step, MB"] = line["bytes per (vector, code)"] = ""
    if extra is not None:
        line["step, MB"] = f"{extra / 1e6:.0f}" + (f" / {peak_extra_bytes(upstream_step, 'cpu') / 1e6:.0f}" if fits else "")
        line["bytes per (vector, code)"] = f"{extra / n / k:.2f}"
    reached = [step_times[1] / step_times[0] >= layer.step] if layer.step else []
    reached += [extra < layer.megabytes * 1e6] if layer.megabytes and extra is not None else []
    line["goal"] = f">= {layer.step}x" if layer.step else f"< {layer.megabytes} MB" if layer.megabytes else ""
    line["reached"] = verdict(all(reached) if reached else None)
    return line


def make(package: str, layer: Layer) -> nn.Module:
    _, k, d = layer.size
    sizes = {"FSQ": {}, "LFQ": {"codebook_size": k, "dim": d}}.get(layer.name, {"dim": d, "codebook_size": k})
    return getattr(importlib.import_module(package), layer.name)(**sizes, **layer.arguments).train()


def training_step(layer: nn.Module, x: Tensor, gradient: Tensor) -> Callable[[], object]:
    def run() -> object:
        leaf = x.detach().requires_grad_()
        quantized, _, *loss = layer(leaf)
        outputs = [quantized, *(part.sum() for part in loss if part.requires_grad)]
        torch.autograd.backward(outputs, [gradient, *(torch.ones_like(part) for part in outputs[1:])])
        return leaf.grad

    return run


def evaluation(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    @torch.no_grad()
    def run() -> object:
        return layer(x)

    return run


def training_lines(steps: int, batch_size: int, codes: int, seed: int = 0) -> list[dict[str, str]]:
    """The VQ-VAE of `genperf train vqvae` on MNIST digits with either quantizer: losses, error on held-out digits, times of a step.

    Everything but the import of the quantizer is equal. A loss is the mean over a tenth of the run.
    """
    from genperf.training.data import load_images, split_held_out

    training, held_out = (part.images for part in split_held_out(load_images(None)))
    runs = [_Training(package, codes, seed) for package in (DROP_IN, UPSTREAM)]
    batches = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        images = training[torch.randint(len(training), (batch_size,), generator=batches)]
        for run in runs:
            run.seconds.append(seconds_of(functools.partial(run.step, images)))
    tenth = steps // POINTS
    shown = {}
    for start in range(0, tenth * POINTS, tenth):
        means = (statistics.mean(run.losses[start : start + tenth]) for run in runs)
        shown[f"loss, steps {start + 1} to {start + tenth}"] = [f"{mean:.5f}" for mean in means]
    shown["squared error, held-out digits"] = [f"{run.error(held_out):.5f}" for run in runs]
    shown |= {
        f"step, {name} ms": [milliseconds(of(run.seconds) * 1e3) for run in runs]
        for name, of in (("min", min), ("median", statistics.median))
    }
    return [{"": what, "genperf": genperf, "vector-quantize-pytorch": upstream} for what, (genperf, upstream) in shown.items()]


class _Training:
    def __init__(self, package: str, codes: int, seed: int) -> None:
        from genperf.models import VQVAE, VQVAEConfig

        torch.manual_seed(seed)
        config = VQVAEConfig(num_codes=codes, prior_width=0)
        self.model = VQVAE(config)
        self.model.quantizer = importlib.import_module(package).VectorQuantize(
            config.dim, config.num_codes, decay=config.decay, commitment_weight=config.commitment_weight, accept_image_fmap=True
        )
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.lr)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, images: Tensor) -> None:
        from genperf.models.vqvae import quantized_losses

        loss = quantized_losses(self.model(images), images)["loss"]
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())

    @torch.no_grad()
    def error(self, images: Tensor) -> float:
        return (self.model.eval()(images).reconstruction - images).square().mean().item()


def verdict(reached: bool | None) -> str:
    return "" if reached is None else "yes" if reached else "no"


def sections(quick: bool) -> dict[str, dict[str, Callable[[], list[dict[str, str]]]]]:
    """Title, and the rows of its table by name."""
    rounds = 1 if quick else TURNS
    training = TRAINING_QUICK if quick else TRAINING
    return {
        "Searches": {f"search {w.name} {w.n}, {w.k}, {w.d}": functools.partial(search_lines, w, search_goals(w), rounds) for w in IN_TURN},
        "Quantizer layers, genperf / vector-quantize-pytorch": {
            str(layer): lambda layer=layer: [layer_line(layer, rounds)] for layer in LAYERS
        },
        "Training a VQ-VAE with either quantizer": {"training vqvae": lambda: training_lines(**training)},
    }


def run(arguments: argparse.Namespace) -> int:
    """Measure the rows that -k selects, and write a page; returns 1 where a goal is missed."""
    found = sections(arguments.quick)
    chosen = selected([name for rows in found.values() for name in rows], arguments.k)
    facts = {"device": device_name("cpu"), "threads": torch.get_num_threads(), "torch": torch.__version__}
    facts["genperf"] = f"{__version__}, {_library.isa}"
    upstream = f"vector-quantize-pytorch {metadata.version('vector-quantize-pytorch')}"
    head = f"{machine([facts])}; {upstream}; load {os.getloadavg()[0]:.2f} at the start."
    blocks, missed = ["# genperf and its rivals, timed in turn", f"{command(arguments, '--in-turn')}. {head}"], False
    for title, rows in found.items():
        lines = []
        for name in filter(chosen.__contains__, rows):
            print(name, file=sys.stderr)
            try:
                lines += rows[name]()
            except UserError as reason:  # the data need a package that is not installed
                print(f"left out: {reason}", file=sys.stderr)
        if lines:
            blocks += [f"## {title}", markdown(lines)]
        missed |= any(line.get("reached") == "no" for line in lines)
    return write("\n\n".join(blocks) + "\n", arguments, "in-turn") or int(missed)
