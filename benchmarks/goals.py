# SPDX-License-Identifier: Apache-2.0
"""The goals of genperf on a CPU: each beside its rival, timed in turn, and whether it is reached. Writes goals.md.

python benchmarks/goals.py [--full] [-k WORDS] [--out FOLDER]

Every result is verified before it is timed. `genperf bench --goals` is the same command.
"""

import argparse
import datetime
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from genperf._errors import UserError

from modes import selected, write  # isort: skip
from report import machine, markdown, milliseconds  # isort: skip

NAME = "goals"
RIVALS = ("faiss-cpu", "superkmeans")
SECONDS = 1.0  # of a row, so that short calls have many turns
MAXIMUM_ROUNDS = 200
# Threads of one OpenMP runtime that spin would take the cores from those of the other.
ENVIRONMENTS: dict[str, dict[str, str]] = {"torch": {}, "own threads": {"OMP_WAIT_POLICY": "passive"}}


class Goal(NamedTuple):
    """What a row is meant to reach: a speed-up, a share of the rival's time, a time, or microseconds beyond the rival's."""

    kind: str
    bound: float

    def __str__(self) -> str:
        shown = {"speed-up": ">= {:g}x", "share": "<= {:g} of it", "ms": "<= {:g} ms", "us more": "<= {:g} us more"}
        return shown[self.kind].format(self.bound)

    def reached(self, seconds: float, rival: float) -> bool:
        if self.kind == "speed-up":
            return rival >= self.bound * seconds
        if self.kind == "us more":
            return seconds - rival <= self.bound * 1e-6
        return seconds <= self.bound * (rival if self.kind == "share" else 1e-3)


class Row(NamedTuple):
    """Lines of the table that share their inputs."""

    work: str
    size: str
    run: Callable[[], Iterator[dict[str, str]]]
    threads: str = "torch"
    """The key of ENVIRONMENTS."""

    def __str__(self) -> str:
        return f"{self.work}, {self.size}"


def line(what: str, times: tuple[float, float], rival: str, goal: Goal | None = None) -> dict[str, str]:
    """A line of a row, from the seconds of genperf and of its rival; `what` says more about its work."""
    own, other = times
    ratios = {"share": f"{own / other:.2f} of it", "us more": f"{(own - other) * 1e6:.1f} us more"}
    ratio = ratios.get("" if goal is None else goal.kind, f"{other / own:.2f}x")
    shown = {"genperf": f"{milliseconds(own * 1e3)} ms", "rival": rival, "its time": f"{milliseconds(other * 1e3)} ms"}
    return {"what": what, **shown, "ratio": ratio, **verdict(goal, None if goal is None else goal.reached(own, other))}


def verdict(goal: object, reached: bool | None) -> dict[str, str]:
    return {"goal": "" if goal is None else str(goal), "": "" if reached is None else "reached" if reached else "missed"}


def turns(genperf: Callable[[], object], rival: Callable[[], object]) -> tuple[float, float]:
    """Shortest seconds of each, in as many turns as fit in SECONDS."""
    from measure import TURNS, in_turn, seconds_of

    genperf(), rival()
    both = 2 * (seconds_of(genperf) + seconds_of(rival))
    return in_turn(genperf, rival, min(MAXIMUM_ROUNDS, max(TURNS, int(SECONDS / both))))


def gumbel_lines(shape: tuple[int, ...]) -> Iterator[dict[str, str]]:
    """Forward, backward and both of a hard sample with its KL."""
    import bench_gumbel_sample as bench
    import torch

    logits = torch.randn(shape, requires_grad=True)
    upstream, grad_kl = torch.randn(shape), torch.rand(shape[0], *shape[2:])

    def backward(outputs: tuple, retained: bool) -> torch.Tensor:
        return torch.autograd.grad((outputs[0], outputs[2]), logits, (upstream, grad_kl), retain_graph=retained)[0]

    def both(function: Callable) -> torch.Tensor:
        return backward(function(logits), False)

    torch.manual_seed(0)
    gradient = both(bench.genperf_sample)
    torch.manual_seed(0)
    torch.testing.assert_close(gradient, both(bench.reference_sample), rtol=1e-3, atol=1e-4)
    compiled = torch.compile(bench.plain_lines)
    for function in (bench.genperf_sample, bench.plain_lines, compiled):
        bench.verify(logits.detach(), *(output.detach() for output in function(logits)))
    yield line("forward", turns(lambda: bench.genperf_sample(logits), lambda: bench.plain_lines(logits)), "PyTorch")
    own, plain = (functools.partial(backward, function(logits), True) for function in (bench.genperf_sample, bench.plain_lines))
    yield line("backward", turns(own, plain), "PyTorch", Goal("ms", 12))
    del own, plain
    for rival, function, least in (("PyTorch", bench.plain_lines, 10), ("torch.compile", compiled, 5)):
        times = turns(lambda: both(bench.genperf_sample), lambda function=function: both(function))
        yield line("forward and backward", times, rival, Goal("speed-up", least))


def gaussian_lines(shape: tuple[int, ...], goal: Goal) -> Iterator[dict[str, str]]:
    import bench_gaussian_sample as bench
    import torch

    import genperf

    moments = torch.randn(shape, requires_grad=True)
    grad_sample, grad_kl = torch.randn_like(moments.chunk(2, 1)[0]), torch.rand(shape[0])

    def step(function: Callable) -> tuple[torch.Tensor, ...]:
        sample, kl = function(moments)
        return sample, kl, torch.autograd.grad((sample, kl), moments, (grad_sample, grad_kl))[0]

    for function in (genperf.gaussian_sample, bench.plain_lines):
        bench.verify(moments.detach(), grad_sample, grad_kl, *step(function))
    times = turns(lambda: step(genperf.gaussian_sample), lambda: step(bench.plain_lines))
    yield line("forward and backward", times, "PyTorch", goal)


def interpolate_lines(shape: tuple[int, ...]) -> Iterator[dict[str, str]]:
    import bench_interpolate as bench
    import torch

    import genperf

    real, fake = torch.randn(2, *shape)
    for function in (genperf.interpolate, bench.lerp):
        bench.verify(function(real, fake), real, fake)
    times = turns(lambda: genperf.interpolate(real, fake), lambda: bench.lerp(real, fake))
    yield line("", times, "torch.lerp with rand", Goal("speed-up", 1))


def step_lines(n: int, k: int, d: int) -> Iterator[dict[str, str]]:
    """A training step of the layer beside the search alone, which packs the codebook in every call as the step has to."""
    import bench_vector_quantize as bench
    import torch

    import genperf

    x, codebook = bench.image_of(n, d, "cpu"), torch.randn(k, d)

    def search() -> torch.Tensor:
        try:
            return genperf.nearest_code(x, codebook, channel_dim=1)
        finally:
            torch.ops.genperf.forget_codebooks()

    assert torch.equal(bench.step(x, bench.layer_of(codebook))()[0], search())
    yield line("", turns(bench.step(x, bench.layer_of(codebook)), search), "its search", Goal("share", 2))


def product_lines(n: int, k: int, d: int) -> Iterator[dict[str, str]]:
    """The search beside torch's matrix product of the same size: bfloat16 where the processor has AMX."""
    import torch

    from genperf import _library

    dtype = torch.bfloat16 if _library.isa == "amx" else torch.float32
    x, codebook, search = _search(n, k, d)
    a, b = x.to(dtype), codebook.to(dtype)
    product = a @ b.T
    torch.testing.assert_close(product[:64].double(), a[:64].double() @ b.double().T, rtol=1e-2, atol=1e-1)
    rival = f"{str(dtype).removeprefix('torch.')} matrix product"
    yield line("", turns(search, lambda: torch.mm(a, b.T, out=product)), rival, Goal("share", 1.25))


def faiss_lines(n: int, k: int, d: int) -> Iterator[dict[str, str]]:
    import bench_nearest_code as bench

    x, codebook, search = _search(n, k, d)
    rival = bench.faiss_flat(x, codebook, None)
    assert (rival() == search()).float().mean() > 0.9
    yield line("", turns(search, rival), "faiss", Goal("speed-up", 2))


def neighbors_lines(n: int, num_codes: int, d: int, k: int) -> Iterator[dict[str, str]]:
    import bench_nearest_codes as bench

    x, codebook, rows, exact = bench.case(n, num_codes, d, k, "cpu")
    search, rival = bench.genperf_search(x, codebook, k), bench.torch_cdist(x, codebook, k)
    assert (search()[rows] == exact).all()
    assert (rival()[rows] == exact).all(-1).float().mean() > 0.9
    yield line("", turns(search, rival), "torch.cdist+topk", Goal("speed-up", 1))


def kmeans_lines(n: int, k: int, d: int, least: float, repeats: int = 2) -> Iterator[dict[str, str]]:
    """Times beside SuperKMeans and faiss, and the sums of squared distances that the three reach."""
    import kmeans_rivals
    import torch
    from bench_kmeans import inertia
    from measure import seconds_of

    x = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    cases = kmeans_rivals.contenders(x.numpy(), k, torch.get_num_threads())
    cases = {name: cluster for name, cluster in cases.items() if "," not in name}
    seconds, codebooks = dict.fromkeys(cases, float("inf")), {}
    for _ in range(repeats):
        for name, cluster in cases.items():  # in turn
            seconds[name] = min(seconds[name], seconds_of(lambda name=name, cluster=cluster: codebooks.update({name: cluster()})))
    for rival, goal in (("SuperKMeans", Goal("speed-up", least)), ("faiss", None)):
        if rival in cases:
            yield line("", (seconds["genperf"], seconds[rival]), rival, goal)
        else:
            yield _without(f"{rival} is not installed", goal)
    sums = {name: inertia(x, torch.from_numpy(codebook).contiguous()) for name, codebook in codebooks.items()}
    own, others = sums.pop("genperf"), min(sums, key=sums.get, default=None)
    if others is not None:
        values = {"genperf": f"{own:.6g}", "rival": others, "its time": f"{sums[others]:.6g}", "ratio": f"{sums[others] / own:.4f}x"}
        yield {"what": "sum of squared distances", **values, **verdict(">= 1x", own <= sums[others])}


def small_call_lines() -> Iterator[dict[str, str]]:
    """What a call costs beyond its compiled kernels, on one thread."""
    import small_calls

    for cost in small_calls.costs():
        goal = None if cost.goal is None else Goal("us more", cost.goal)
        yield line(f"{cost.name}, {cost.passes}", (cost.call / 1e6, cost.kernels / 1e6), "its kernels alone", goal)


def rows(full: bool) -> list[Row]:
    """The rows of the table; with `full` in all their sizes."""
    from workloads import NEIGHBORS, SEARCHES, WORKLOADS

    # Rows of fewer vectors take seconds in place of a minute.
    clusterings = ((100000, 1024, 128, 5), (50000, 4096, 768, 3)) if full else ((25000, 1024, 128, 5), (10000, 2048, 768, 3))
    products = ((16384, 512, 64), (4096, 1024, 256), (4800, 1024, 128))
    neighbors = [(size[1:], k) for size, k in NEIGHBORS if size.name == "RQ-VAE-level" or (full and size.name == "features")]
    shape, latents, images = (16, 1024, 16, 16), (64, 8, 64, 64), (64, 3, 64, 64)
    found = [
        Row("gumbel_sample, hard", _sizes(shape), functools.partial(gumbel_lines, shape)),
        Row("gaussian_sample", _sizes(latents), functools.partial(gaussian_lines, latents, Goal("speed-up", 6))),
        Row("gaussian_sample", "128, 128", functools.partial(gaussian_lines, (128, 128), Goal("ms", 0.12))),
        Row("interpolate", _sizes(images), functools.partial(interpolate_lines, images)),
    ]
    found += [Row("small calls", "64 vectors", small_call_lines)]
    found += [Row("training step", f"{_sizes(size)} {name}", functools.partial(step_lines, *size)) for name, *size in WORKLOADS]
    found += [Row("search", _sizes(size), functools.partial(product_lines, *size)) for size in products]
    found += [Row("nearest_codes", f"{_sizes(size)}, k {k}", functools.partial(neighbors_lines, *size, k)) for size, k in neighbors]
    found += [
        Row("search", f"{_sizes(size)} {name}", functools.partial(faiss_lines, *size), "own threads")
        for name, *size in (SEARCHES if full else WORKLOADS)
        if size[-1] <= 8
    ]
    found += [
        Row("k-means, 10 iterations", _sizes((n, k, d)), functools.partial(kmeans_lines, n, k, d, least), "own threads")
        for n, k, d, least in clusterings
    ]
    return found


def _sizes(size: tuple[int, ...]) -> str:
    return ", ".join(map(str, size))


def _without(reason: str, goal: object) -> dict[str, str]:
    return {"what": "", "genperf": "", "rival": reason, "its time": "", "ratio": "", **verdict(goal, None)}


def _search(n: int, k: int, d: int) -> tuple:
    """x, codebook, and a search that packs the codebook in every call, checked against float64."""
    import bench_nearest_code as bench
    import torch

    x, codebook = torch.randn(n, d), torch.randn(k, d)
    search = bench.genperf_search(x, codebook, None)
    some, exact = bench.checked_rows(x, codebook, bench.CHECKED_PRODUCTS)
    assert torch.equal(search()[some], exact)
    return x, codebook, search


def measured(row: Row) -> list[dict[str, str]]:
    """The lines of a row; one that says why where a rival is not installed or a result is wrong."""
    import pytest
    import torch

    torch.manual_seed(0)
    found, name = [], {"work": row.work, "size": row.size}
    try:
        for one in row.run():
            what = one.pop("what")
            found.append({**name, "work": f"{row.work}, {what}" if what else row.work, **one})
    except pytest.skip.Exception as reason:
        found.append({**name, **_without(str(reason), None)})
    except AssertionError as error:
        found.append({**name, **_without("", None), "": f"wrong result: {' '.join(str(error).split())[:200]}"})
    return found


def facts() -> dict[str, object]:
    """The machine and the versions."""
    import torch
    from measure import device_name

    from genperf import __version__, _library

    library = f"{__version__}, {_library.isa}"
    return {"device": device_name("cpu"), "threads": torch.get_num_threads(), "torch": torch.__version__, "genperf": library}


def page(lines: list[dict[str, str]], found: dict[str, object], load: float, command: str) -> str:
    versions = [f"{name} {version}" for name in RIVALS if (version := _version(name))]
    head = "; ".join([machine([found]), *versions, f"load {load:.2f} at the start", datetime.date.today().isoformat()])
    judged = [one[""] for one in lines if one["goal"]]
    return f"""# Goals on a CPU

`{command}`. {head}.

{judged.count("reached")} of {len(judged)} goals are reached. Every result is verified, then genperf and its rival are timed in alternating
turns of one process. The ratio is the rival's time over that of genperf; "of it" is the time of genperf as a share of the rival's. Sizes of
searches, training steps and k-means are vectors, codes, dimensions. A training step is forward, backward and EMA of `VectorQuantizer`;
searches and steps pack the codebook in every call. The rows of faiss and SuperKMeans run with `OMP_WAIT_POLICY=passive`.

{markdown(lines)}
"""


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _run_rows(arguments: argparse.Namespace, path: Path) -> None:
    """In a process of its own: measure the chosen rows of one environment, and append their lines to a file."""
    with path.open("a") as file:
        print(json.dumps(facts()), file=file, flush=True)
        for row in rows(arguments.full):
            if str(row) in arguments.rows and row.threads == arguments.threads:
                print(row, file=sys.stderr, flush=True)
                for one in measured(row):
                    print(json.dumps(one), file=file, flush=True)


def run(arguments: argparse.Namespace) -> int:
    """Measure the rows that -k selects, and write the page; returns 1 where a goal is missed or a result is wrong."""
    found = rows(arguments.full)
    chosen = selected(map(str, found), arguments.k)
    load, known, lines = os.getloadavg()[0], {}, []
    for threads, environment in ENVIRONMENTS.items():
        if not any(str(row) in chosen and row.threads == threads for row in found):
            continue
        with tempfile.TemporaryDirectory(prefix="genperf-goals-") as folder:
            path = Path(folder) / "lines"
            command = [sys.executable, __file__, *(["--full"] if arguments.full else []), "--threads", threads, "--lines", str(path)]
            failed = subprocess.run([*command, "--rows", *chosen], env={**os.environ, **environment}).returncode
            if failed:
                raise UserError(f"the rows could not be measured (exit code {failed}); the message is above.")
            known, *measured_lines = map(json.loads, path.read_text().splitlines())
        lines += measured_lines
    command = ["python benchmarks/goals.py", *(["--full"] if arguments.full else []), *([f"-k '{arguments.k}'"] if arguments.k else [])]
    text = page(lines, known, load, " ".join(command))
    return write(text, arguments, NAME) or int(any(one[""] not in ("", "reached") for one in lines))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="all sizes of the searches, and k-means of 100,000 vectors")
    parser.add_argument("-k", metavar="WORDS", help="only the rows that match, as pytest's -k")
    parser.add_argument("--out", default="runs/bench", metavar="FOLDER", help="for what is written (%(default)s)")
    parser.add_argument("--name", help="of the page (goals)")
    for own in ("--threads", "--lines"):  # of the processes that it starts
        parser.add_argument(own, help=argparse.SUPPRESS)
    parser.add_argument("--rows", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.lines:
        _run_rows(arguments, Path(arguments.lines))
        return 0
    Path(arguments.out).mkdir(parents=True, exist_ok=True)
    return run(arguments)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"goals: {error}")
