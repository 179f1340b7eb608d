# SPDX-License-Identifier: Apache-2.0
"""One of the two processes of `genperf bench --compare`: runs workloads with the build of genperf in the folder that it is given.

It reads requests from stdin, a JSON object a line, and answers each with a line. The workloads use public names only, so that they run on
earlier revisions.
"""

import contextlib
import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from workloads import IN_TURN, Workload

if __name__ == "__main__":  # the build in the folder comes before an installed one
    sys.path.insert(0, sys.argv[1])
import genperf

Step = Callable[[], tuple[Tensor, ...]]


def nearest_code(workload: Workload, device: str) -> Step:
    _, n, k, d = workload
    x, codebook = torch.randn(n, d, device=device), torch.randn(k, d, device=device)
    # On the CPU a search keeps the packed codebook for the next one, where the build has such a cache.
    cached = device == "cpu" and hasattr(torch.ops.genperf, "forget_codebooks")

    def step() -> tuple[Tensor, ...]:
        indices = genperf.nearest_code(x, codebook)
        if cached:
            torch.ops.genperf.forget_codebooks()
        return (indices,)

    return step


def vector_quantizer_step(device: str) -> Step:
    layer = with_codes(genperf.nn.VectorQuantizer(512, 64, decay=0.99), torch.randn(512, 64)).to(device)
    return training_step(layer, torch.randn(16, 1024, 64, device=device))


def vector_quantizer_eval(device: str) -> Step:
    layer = with_codes(genperf.nn.VectorQuantizer(64, 32, decay=0.99), torch.randn(64, 32)).to(device).eval()
    x = torch.randn(1024, 32, device=device)

    @torch.no_grad()
    def step() -> tuple[Tensor, ...]:
        return tuple(layer(x))

    return step


def residual_vector_quantizer_step(device: str) -> Step:
    # The residual of such a codebook is smaller by about this factor.
    codes = torch.randn(8, 1024, 128) * 0.8 ** torch.arange(8).view(-1, 1, 1)
    layer = with_codes(genperf.nn.ResidualVectorQuantizer(8, 1024, 128, decay=0.99), codes).to(device)
    # Several batches, since the codebooks would fit a single one ever better.
    steps = [training_step(layer, torch.randn(8, 600, 128, device=device)) for _ in range(8)]

    def step() -> tuple[Tensor, ...]:
        steps.append(steps.pop(0))
        return steps[-1]()

    return step


def with_codes(layer: nn.Module, codes: Tensor) -> nn.Module:
    layer.load_state_dict(layer.state_dict() | {"codebook": codes, "sums": codes})
    return layer


def training_step(layer: nn.Module, x: Tensor) -> Step:
    """Forward, backward and the update of the codebook."""
    upstream = torch.randn_like(x)

    def step() -> tuple[Tensor, ...]:
        leaf = x.detach().requires_grad_()
        quantized, indices, loss = layer(leaf)
        torch.autograd.backward([quantized, loss.sum()], [upstream, loss.new_ones(())])
        return quantized.detach(), indices, loss.detach(), leaf.grad, layer.codebook

    return step


def gumbel_sample(device: str) -> Step:
    logits = torch.randn(2, 8192, 32, 32, device=device, requires_grad=True)
    codebook = torch.randn(8192, 256, device=device, requires_grad=True)
    upstream = torch.randn(2, 256, 32, 32, device=device)

    def step() -> tuple[Tensor, ...]:
        sample, indices, kl = genperf.gumbel_sample(logits, codebook, dim=1, hard=True)
        gradients = torch.autograd.grad((sample, kl), (logits, codebook), (upstream, torch.ones_like(kl)))
        return sample.detach(), indices, kl.detach(), *gradients

    return step


def gaussian_sample(shape: tuple[int, ...], device: str) -> Step:
    moments = torch.randn(shape, device=device, requires_grad=True)
    upstream = torch.randn_like(moments.chunk(2, 1)[0])

    def step() -> tuple[Tensor, ...]:
        sample, kl = genperf.gaussian_sample(moments)
        gradients = torch.autograd.grad((sample, kl), moments, (upstream, torch.ones_like(kl)))
        return sample.detach(), kl.detach(), *gradients

    return step


def frechet_distance(device: str) -> Step:
    d = 768
    mix = torch.randn(d, d, dtype=torch.float64, device=device) / math.sqrt(d)
    sides = [torch.relu(torch.randn(4 * d, d, dtype=torch.float64, device=device) @ mix + 0.1) for _ in range(2)]
    moments = [moment for features in sides for moment in (features.mean(0), features.T.cov())]
    return lambda: (genperf.frechet_distance(*moments),)


WORKLOADS: dict[str, Callable[[str], Step]] = {
    **{f"nearest_code {w.name} {w.n}, {w.k}, {w.d}": functools.partial(nearest_code, w) for w in IN_TURN},
    "VectorQuantizer training step 16384, 512, 64": vector_quantizer_step,
    "VectorQuantizer eval 1024, 64, 32": vector_quantizer_eval,
    "ResidualVectorQuantizer training step 4800, 1024, 128, 8 quantizers": residual_vector_quantizer_step,
    "gumbel_sample forward and backward [2, 8192, 32, 32], 256": gumbel_sample,
    "gaussian_sample forward and backward [128, 128]": functools.partial(gaussian_sample, (128, 128)),
    "gaussian_sample forward and backward [64, 8, 64, 64]": functools.partial(gaussian_sample, (64, 8, 64, 64)),
    "frechet_distance 768, float64": frechet_distance,
}


class Worker:
    def __init__(self, device: str) -> None:
        self.device = device
        self.step: Step | None = None

    def describe(self) -> dict[str, object]:
        return {"file": genperf.__file__, "isa": genperf._library.isa, "threads": torch.get_num_threads()}

    def prepare(self, name: str, outputs: str) -> dict[str, object]:
        """Make the inputs of a workload from a fixed seed, run it once, and save what it returns."""
        self.step = None
        torch.manual_seed(0)
        self.step = WORKLOADS[name](self.device)
        torch.save([t.cpu() for t in self.step()], outputs)
        return {}

    def turn(self, calls: int) -> dict[str, object]:
        """Seconds of each call. One more call comes first, while threads of the other process may still spin."""
        return {"seconds": [self._seconds() for _ in range(calls + 1)][1:]}

    def _seconds(self) -> float:
        start = time.perf_counter()
        self.step()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def main(folder: Path, device: str) -> None:
    """Answer requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print to stdout must not mix with the answers
    if not (folder / "genperf" / "kernels").is_dir():  # built in place, with kernels/ beside the package
        genperf.__path__.append(str(folder))
    worker = Worker(device)
    with contextlib.suppress(KeyboardInterrupt):
        for line in sys.stdin:
            request = json.loads(line)
            try:
                answer = getattr(worker, request.pop("do"))(**request)
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
