"""The drop-ins for vector-quantize-pytorch against that package, timed in turn in one process: speed and memory of whole layers.

A training step is forward, backward and the update of the codebook; the arguments are the same for both. Standard normal float32, shortest
wall times, peak memory beyond what is there before the call. Exits with 1 where a goal is missed.
"""

import argparse
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
import vector_quantize_pytorch as theirs
from measure import device_name, peak_extra_bytes
from report import machine, markdown, milliseconds
from torch import Tensor, nn
from turns import in_turn, verdict

from genperf import _library
from genperf.compat import vector_quantize_pytorch as ours


class Case(NamedTuple):
    layer: str
    size: tuple[int, int, int]
    """N vectors, K codes, D dimensions."""
    arguments: dict[str, object]
    step: float | None = None
    """How many times faster a training step is meant to be."""
    megabytes: float | None = None
    """What a training step may need."""


def vq(**options: object) -> dict[str, object]:
    return options


CASES = (
    Case("VectorQuantize", (16384, 512, 64), vq(), 15),
    Case("VectorQuantize", (8192, 1024, 64), vq(), 15),
    Case("VectorQuantize", (8192, 8192, 32), vq(), 40),
    Case("VectorQuantize", (4096, 16384, 256), vq(), 15),
    Case("VectorQuantize", (26624, 8192, 64), vq(), megabytes=64),
    Case("VectorQuantize", (26624, 8192, 64), vq(codebook_diversity_loss_weight=0.1), megabytes=128),
    Case("VectorQuantize", (8192, 8192, 32), vq(use_cosine_sim=True)),
    Case("VectorQuantize", (8192, 8192, 32), vq(threshold_ema_dead_code=2)),
    Case("VectorQuantize", (8192, 8192, 32), vq(codebook_diversity_loss_weight=0.1)),
    Case("VectorQuantize", (8192, 8192, 32), vq(stochastic_sample_codes=True)),
    Case("VectorQuantize", (8192, 1024, 64), vq(heads=8, codebook_dim=8, separate_codebook_per_head=True)),
    Case("ResidualVQ", (4800, 1024, 128), vq(num_quantizers=8), 10),
    Case("SimVQ", (4096, 8192, 128), vq()),
    Case("FSQ", (65536, 64000, 6), vq(levels=[8, 8, 8, 5, 5, 5])),
    Case("LFQ", (4096, 8192, 13), vq()),
    Case("LFQ", (2048, 262144, 18), vq()),
)
# What the other package holds for each (vector, code) at its peak, about.
BYTES_PER_PAIR = {"VectorQuantize": 36, "ResidualVQ": 25, "SimVQ": 5, "FSQ": 0, "LFQ": 28}
MAXIMUM_BYTES = 12e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="of both (%(default)s)")
    parser.add_argument("--only", help="a layer's name")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    facts = {"device": device_name("cpu"), "threads": arguments.threads, "torch": torch.__version__, "genperf": _library.isa}
    print(f"{machine([facts])}; load {os.getloadavg()[0]:.2f}\n", flush=True)
    rows = [compared(case) for case in CASES if arguments.only in (None, case.layer)]
    print("\n" + markdown(rows))
    raise SystemExit(any(row["reached"] == "no" for row in rows))


def compared(case: Case) -> dict[str, str]:
    n, k, d = case.size
    torch.manual_seed(0)
    layers = [make(package, case) for package in (ours, theirs)]
    layers[0].load_state_dict(layers[1].state_dict())
    x, gradient = torch.randn(2, 16, n // 16, d)
    mine, its = (training_step(layer, x, gradient) for layer in layers)
    fits = BYTES_PER_PAIR[case.layer] * n * k < MAXIMUM_BYTES
    row = {
        "layer": case.layer,
        "N, K, D": f"{n}, {k}, {d}",
        "options": ", ".join(f"{name}={value}" for name, value in case.arguments.items()),
    }
    row |= dict.fromkeys(("eval, ms", "eval, ratio", "step, ms", "step, ratio"), "")
    if fits:
        # The first step of both starts from the same codes and takes the same ones.
        found = [layer(x)[:2] for layer in (layer.eval() for layer in layers)]
        equal = (found[0][1].long() == found[1][1].long()).float().mean().item()
        assert equal > 0.99, f"{case}: only {equal:.1%} of the indices agree"
        eval_ms = in_turn(evaluation(layers[0], x), evaluation(layers[1], x))
        for layer in layers:
            layer.train()
        step_ms = in_turn(mine, its)
        for what, (a, b) in (("eval", eval_ms), ("step", step_ms)):
            row |= {f"{what}, ms": f"{milliseconds(a * 1e3)} / {milliseconds(b * 1e3)}", f"{what}, ratio": f"{b / a:.1f}x"}
    extra = peak_extra_bytes(mine, "cpu")
    row["step, MB"] = f"{extra / 1e6:.0f}" + (f" / {peak_extra_bytes(its, 'cpu') / 1e6:.0f}" if fits else "")
    row["bytes per (vector, code)"] = f"{extra / n / k:.2f}"
    reached = [step_ms[1] / step_ms[0] >= case.step] if case.step else []
    reached += [extra < case.megabytes * 1e6] if case.megabytes else []
    row["goal"] = f">= {case.step}x" if case.step else f"< {case.megabytes} MB" if case.megabytes else ""
    row["reached"] = verdict(all(reached) if reached else None)
    print(row, flush=True)
    return row


def make(package: object, case: Case) -> nn.Module:
    _, k, d = case.size
    sizes = {"FSQ": {}, "LFQ": {"codebook_size": k, "dim": d}}.get(case.layer, {"dim": d, "codebook_size": k})
    return getattr(package, case.layer)(**sizes, **case.arguments).train()


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


if __name__ == "__main__":
    main()
