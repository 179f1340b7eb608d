# SPDX-License-Identifier: Apache-2.0
"""Steps of gpu_report.py that are no benchmark: each runs in a process of its own, and appends what it finds as it finds it.

python benchmarks/gpu_steps.py STEP [--rehearse]

With --rehearse the CPU stands in for the GPU, at small sizes, so that every line of a step runs without a device.
"""

import argparse
import contextlib
import functools
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

import genperf

from bench_nearest_code import CHECKED_PRODUCTS, checked_rows  # isort: skip
from measure import record  # isort: skip
from workloads import GPU_GOALS, Workload  # isort: skip

TOLERANCE = 2e-4
REPEATS = 3
PROFILED_CALLS = 3


class Gpu:
    """What a step needs of a device."""

    name = "cuda"
    smoke_processes = 8

    def size(self, workload: Workload) -> Workload:
        return workload

    def compilers(self) -> Executor:
        return ProcessPoolExecutor(8, mp_context=get_context("spawn"))

    def milliseconds(self, function: Callable[[], object]) -> float:
        """Median device time with a cold L2 cache."""
        from triton.testing import do_bench

        return do_bench(function, warmup=10, rep=60, quantiles=[0.5])

    def graph(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """A replay of `function`, and the tensor that a replay writes."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()  # compiles and allocates before the capture
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = function()
        return graph.replay, result

    @contextlib.contextmanager
    def without_waits(self) -> Iterator[None]:
        """Within this context a synchronization with the host is an error."""
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def kernels(self, function: Callable[[], object]) -> dict[str, dict[str, float]]:
        """Calls and milliseconds of each kernel in one call of `function`."""
        from torch.profiler import ProfilerActivity, profile

        function()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(PROFILED_CALLS):
                function()
            torch.cuda.synchronize()
        return {
            event.key: {"calls": event.count / PROFILED_CALLS, "ms": event.device_time_total / 1e3 / PROFILED_CALLS}
            for event in profiler.key_averages()
            if event.device_time_total > 0
        }

    def facts(self) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties(0)
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"]
        return {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "l2": properties.L2_cache_size,
            "cuda": torch.version.cuda,
            "driver, clocks, power limit": subprocess.run(query, capture_output=True, text=True).stdout.strip(),
        }

    def synchronize(self) -> None:
        torch.cuda.synchronize()


class Rehearsal(Gpu):
    """The CPU in place of the GPU, and small sizes."""

    name = "cpu"
    smoke_processes = 2

    def size(self, workload: Workload) -> Workload:
        return workload._replace(n=min(workload.n, 256), k=min(workload.k, 300), d=min(workload.d, 32))

    def compilers(self) -> Executor:
        return ThreadPoolExecutor(1)

    def milliseconds(self, function: Callable[[], object]) -> float:
        start = time.perf_counter()
        function()
        return (time.perf_counter() - start) * 1e3

    def graph(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        result = function()

        def replay() -> None:
            result.copy_(function())

        return replay, result

    @contextlib.contextmanager
    def without_waits(self) -> Iterator[None]:
        yield

    def kernels(self, function: Callable[[], object]) -> dict[str, dict[str, float]]:
        return {"the call": {"calls": 1, "ms": self.milliseconds(function)}}

    def facts(self) -> dict[str, Any]:
        return {"device": "rehearsal on a CPU", "cuda": torch.version.cuda}

    def synchronize(self) -> None:
        pass


def facts(gpu: Gpu) -> None:
    import platform

    import triton

    record(
        step="facts", python=platform.python_version(), torch=torch.__version__, triton=triton.__version__,
        genperf=genperf.__version__, **gpu.facts(),
    )  # fmt: skip
    from genperf.cli.info import info_lines

    print(*info_lines(), sep="\n")


def _inputs(*shapes: tuple[int, ...]) -> Callable[[str], list[Tensor]]:
    def make(device: str) -> list[Tensor]:
        torch.manual_seed(0)
        return [torch.randn(shape).to(device) for shape in shapes]

    return make


def _spd(d: int, device: str) -> Tensor:
    torch.manual_seed(d)
    a = torch.randn(4 * d, d, dtype=torch.float64).to(device)
    return a.T @ a / len(a)


# For every op: inputs on a device, and a call with them and `impl`.
SMOKE: dict[str, tuple[Callable[[str], list[Tensor]], Callable[..., Any]]] = {
    "nearest_code": (_inputs((3000, 48), (700, 48)), genperf.nearest_code),
    "nearest_codes": (
        _inputs((1000, 48), (700, 48)),
        lambda x, codebook, impl: genperf.nearest_codes(x, codebook, 5, return_distances=True, impl=impl),
    ),
    "vector_quantize": (_inputs((4, 48, 16, 16), (700, 48)), functools.partial(genperf.vector_quantize, channel_dim=1)),
    "residual_vector_quantize": (_inputs((2000, 32), (4, 256, 32)), genperf.residual_vector_quantize),
    "code_statistics": (
        lambda device: [*_inputs((5000, 24))(device), (torch.arange(5000) * 7 % 300).to(device)],
        lambda x, indices, impl: genperf.code_statistics(x, indices, 300, impl=impl),
    ),
    "kmeans": (
        _inputs((4000, 16), (50, 16)),
        lambda x, init, impl: tuple(genperf.kmeans(x, 50, iterations=4, init=init, impl=impl)),
    ),
    "residual_kmeans": (
        _inputs((2000, 16)),
        lambda x, impl: genperf.residual_kmeans(x, 20, 2, iterations=3, init="random", impl=impl)[:3],
    ),
    "code_entropy": (_inputs((600, 12), (100, 12)), genperf.code_entropy),
    "code_cross_entropy": (
        lambda device: [*_inputs((600, 12), (100, 12))(device), (torch.arange(600) % 100).to(device)],
        genperf.code_cross_entropy,
    ),
    "sample_code": (
        _inputs((600, 12), (100, 12)),
        lambda x, codebook, impl: genperf.sample_code(x, codebook, temperature=0.5, impl=impl),
    ),
    "finite_scalar_quantize": (_inputs((5000, 4)), lambda x, impl: genperf.finite_scalar_quantize(x, (8, 5, 5, 5), impl=impl)),
    "lookup_free_quantize": (_inputs((5000, 14)), genperf.lookup_free_quantize),
    "lookup_free_entropy": (_inputs((500, 8)), genperf.lookup_free_entropy),
    "gaussian_sample": (_inputs((16, 8, 33, 17)), genperf.gaussian_sample),
    "gumbel_sample": (
        _inputs((300, 512), (512, 64)),
        lambda logits, codebook, impl: genperf.gumbel_sample(logits, codebook, tau=0.7, impl=impl),
    ),
    "interpolate": (_inputs((16, 3, 33, 17), (16, 3, 33, 17)), genperf.interpolate),
    "gradient_norm_penalty": (_inputs((16, 3, 33, 17)), genperf.gradient_norm_penalty),
    "minibatch_similarity": (_inputs((64, 20, 8)), lambda x, impl: genperf.minibatch_similarity(x / 4, impl)),
    "trace_sqrt_product": (lambda device: [_spd(96, device), _spd(97, device)[:96, :96].contiguous()], genperf.trace_sqrt_product),
    "frechet_distance": (
        lambda device: [*_inputs((96,))(device), _spd(96, device), *_inputs((96,))(device), _spd(97, device)[:96, :96].contiguous()],
        lambda m1, c1, m2, c2, impl: genperf.frechet_distance(m1.to(c1), c1, m2.to(c2), c2, impl=impl),
    ),
    "matrix_sqrt": (lambda device: [_spd(96, device)], genperf.matrix_sqrt),
}


def smoke(gpu: Gpu) -> None:
    """Every op on the device against its reference there: values, and the gradient of the first input."""
    with ProcessPoolExecutor(gpu.smoke_processes, mp_context=get_context("spawn")) as pool:
        _record_smoke(pool.map(functools.partial(_smoke, gpu), SMOKE))


def checked(gpu: Gpu) -> None:
    """`smoke` in one process, for a memory checker."""
    _record_smoke(map(functools.partial(_smoke, gpu), SMOKE))


def _record_smoke(results: Iterable[dict[str, Any]]) -> None:
    for found in results:
        record(step="smoke", **found)


def _smoke(gpu: Gpu, op: str) -> dict[str, Any]:
    make, call = SMOKE[op]
    try:
        inputs = make(gpu.name)
        values, gradient = _values(call, inputs, impl=None)
        exact, exact_gradient = _values(call, inputs, impl="reference")
        errors = [_error(a, b) for a, b in zip((*values, gradient), (*exact, exact_gradient), strict=True) if a is not None]
        gpu.synchronize()
    except Exception as error:  # the other ops go on
        return {"op": op, "ok": False, "error": f"{type(error).__name__}: {error}"[:500]}
    return {"op": op, "ok": max(errors) < TOLERANCE, "error": max(errors)}


def _values(call: Callable[..., Any], inputs: list[Tensor], impl: str | None) -> tuple[tuple[Tensor, ...], Tensor | None]:
    leaf = inputs[0].clone().requires_grad_()
    torch.manual_seed(1)
    found = call(leaf, *inputs[1:], impl=impl)
    values = tuple(found) if isinstance(found, tuple) else (found,)
    scalars = [value.double().square().mean() for value in values if value.requires_grad]
    gradient = torch.autograd.grad(sum(scalars), leaf)[0] if scalars else None  # pyright: ignore[reportArgumentType, reportCallIssue]
    return tuple(value.detach() for value in values), gradient


def _error(found: Tensor, exact: Tensor) -> float:
    """Relative error, or the share of differing elements of integers."""
    if not exact.dtype.is_floating_point:
        return (found != exact).double().mean().item()
    scale = exact.double().norm().item()
    error = (found.double() - exact.double()).norm().item()
    return error / scale if scale > 0 else error


def search(gpu: Gpu) -> None:
    """The goal sizes of the search: device time in eager mode and of a graph replay, host time of a call, its kernels, wrong rows."""
    for workload in GPU_GOALS:
        name, n, k, d = gpu.size(workload)
        torch.manual_seed(0)
        x, codebook = torch.randn(n, d, device=gpu.name), torch.randn(k, d, device=gpu.name)
        call = functools.partial(genperf.nearest_code, x, codebook)
        rows, exact = checked_rows(x, codebook, CHECKED_PRODUCTS)
        wrong = (call()[rows] != exact).double().mean().item()
        replay, _ = gpu.graph(call)
        found = {"step": "search", "workload": name, "N": n, "K": k, "D": d, "wrong_rows": wrong}
        record(**found, eager_ms=gpu.milliseconds(call), graph_ms=gpu.milliseconds(replay), host_us=_host_us(gpu, call))
        record(step="kernels", op="nearest_code", workload=name, kernels=gpu.kernels(call))


def _host_us(gpu: Gpu, call: Callable[[], object], calls: int = 20) -> float:
    """Microseconds until a call returns, while the device works."""
    gpu.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    seconds = time.perf_counter() - start
    gpu.synchronize()
    return seconds / calls * 1e6


def invariants(gpu: Gpu) -> None:
    """What has to hold of the search and of every op, beyond the values: each is one record."""

    def check(name: str, holds: Callable[[], bool]) -> None:
        try:
            record(step="invariants", name=name, ok=bool(holds()))
        except Exception as error:  # the others go on
            record(step="invariants", name=name, ok=False, error=f"{type(error).__name__}: {error}"[:500])

    for op, (make, call) in SMOKE.items():
        inputs = make(gpu.name)
        check(f"{op}: {REPEATS} runs are bitwise equal", functools.partial(_repeats, call, inputs))
        if op not in ("kmeans", "residual_kmeans", "matrix_sqrt"):  # these read values back by their contract
            check(f"{op}: no wait for the device", functools.partial(_does_not_wait, gpu, call, inputs))

    shape = gpu.size(Workload("", 20000, 3000, 64))
    x, codebook = torch.randn(shape.n, shape.d, device=gpu.name), torch.randn(shape.k, shape.d, device=gpu.name)

    def graph_sees_new_data() -> bool:
        replay, indices = gpu.graph(lambda: genperf.nearest_code(x, codebook))
        x.normal_()
        codebook.normal_()
        replay()
        gpu.synchronize()
        return torch.equal(indices, genperf.nearest_code(x, codebook))

    def right(n: int, k: int, d: int, change: Callable[[Tensor, Tensor], object] = lambda x, codebook: None) -> bool:
        _, n, k, d = gpu.size(Workload("", n, k, d))
        x, codebook = torch.randn(n, d, device=gpu.name), torch.randn(k, d, device=gpu.name)
        change(x, codebook)
        rows, exact = checked_rows(x, codebook, CHECKED_PRODUCTS)
        return torch.equal(genperf.nearest_code(x, codebook)[rows], exact)

    def repeat_codes(x: Tensor, codebook: Tensor) -> None:
        codebook[len(codebook) // 2 :] = codebook[: len(codebook) - len(codebook) // 2].clone()

    check("search: a graph replay sees new data", graph_sees_new_data)
    check("search: N K beyond 2^31", lambda: right(3_000_000, 1024, 16))
    check("search: K = 2^20", lambda: right(4096, 1 << 20, 16))
    check("search: one code 30 times as long", lambda: right(50000, 4096, 128, lambda x, codebook: codebook[7].mul_(30)))
    check("search: every code twice", lambda: right(20000, 2048, 64, repeat_codes))
    check("search: data far from the origin", lambda: right(20000, 2048, 64, lambda x, codebook: (x.add_(100), codebook.add_(100))))


def _repeats(call: Callable[..., Any], inputs: list[Tensor]) -> bool:
    values, gradient = _values(call, inputs, impl=None)
    for _ in range(REPEATS - 1):
        again, gradient_again = _values(call, inputs, impl=None)
        if not all(map(torch.equal, values, again)):
            return False
        if gradient is not None and not torch.equal(gradient, gradient_again):  # pyright: ignore[reportArgumentType]
            return False
    return True


def _does_not_wait(gpu: Gpu, call: Callable[..., Any], inputs: list[Tensor]) -> bool:
    _values(call, inputs, impl=None)
    with gpu.without_waits():
        _values(call, inputs, impl=None)
    return True


class Tiles(NamedTuple):
    """Sizes and launch options of the pass over the codes; None is what shape.py chooses."""

    block_n: int | None = None
    block_k: int | None = None
    warps: int | None = None
    registers: int | None = None
    programs: int = 1  # on a multiprocessor, for which stages are fitted
    stages: int = 4  # at most
    most_programs: int | None = None  # of the launch

    def __str__(self) -> str:
        changed = [f"{name} {value}" for name, value in self._asdict().items() if value not in (None, self._field_defaults[name])]
        return ", ".join(changed) or "chosen"


# Two programs of 8 warps or one of 16 fill the registers of a multiprocessor where a thread has 128 of them.
TILES = {
    128: (
        Tiles(),
        Tiles(256, 128, 16, 128),
        Tiles(256, 64, 16, 128),
        Tiles(128, 64, 8, 128, programs=2),
        Tiles(64, 128, 4, 128, programs=4),
        Tiles(128, 256, 8, 255),
        Tiles(128, 128, 8, 128, programs=2, stages=2),
        Tiles(most_programs=264),
        Tiles(most_programs=1056),
    ),
    256: (
        Tiles(),
        Tiles(256, 128, 16, 128),
        Tiles(128, 64, 8, 255),
        Tiles(128, 128, 8, 255),
        Tiles(128, 64, 8, 128),
        Tiles(256, 64, 16, 128, stages=2),
        Tiles(most_programs=132),
        Tiles(most_programs=264),
    ),
}


def tiles(gpu: Gpu) -> None:
    """Times of the search with other tiles than those that kernels/nearest_code/shape.py chooses, and whether its results are the same."""
    with gpu.compilers() as pool:
        for workload in GPU_GOALS:
            candidates = TILES[128 if workload.d <= 128 else 256]
            # They compile in parallel; an error of theirs occurs here as well.
            list(pool.map(functools.partial(_compile_tiles, gpu, workload), candidates))
            search = _tile_search(gpu, workload)
            chosen = search()
            for candidate in candidates:
                found: dict[str, Any] = {"step": "tiles", "workload": workload.name, "tiles": str(candidate)}
                try:
                    with _launched_with(candidate):
                        record(**found, ok=torch.equal(search(), chosen), ms=gpu.milliseconds(search))
                except Exception as error:  # too many registers or too much shared memory
                    record(**found, error=f"{type(error).__name__}: {error}"[:200])


def _compile_tiles(gpu: Gpu, workload: Workload, candidate: Tiles) -> None:
    with contextlib.suppress(Exception), _launched_with(candidate):
        _tile_search(gpu, workload)()
        gpu.synchronize()


def _tile_search(gpu: Gpu, workload: Workload) -> Callable[[], Tensor]:
    from genperf.kernels.nearest_code import launch  # pyright: ignore[reportMissingImports]

    _, n, k, d = gpu.size(workload)
    torch.manual_seed(0)
    x, codebook = torch.randn(n, d, 1, device=gpu.name), torch.randn(k, d, device=gpu.name)
    if gpu.name == "cuda":
        return lambda: launch.nearest_code(x, codebook, None, False)

    def rehearsed() -> Tensor:  # the launcher needs a GPU or Triton's interpreter
        launch.Shape(d, k, x.device)
        return genperf.nearest_code(x[:, :, 0], codebook)

    return rehearsed


@contextlib.contextmanager
def _launched_with(candidate: Tiles) -> Iterator[None]:
    """Within this context the launcher plans its launches with other tiles, since it keeps plans by the class of their shape."""
    from genperf.kernels.nearest_code import launch, shape  # pyright: ignore[reportMissingImports]

    class Other(shape.Shape):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            if candidate.block_n is not None:
                self.block_n, self.block_k = candidate.block_n, candidate.block_k
                self.warps, self.max_registers = candidate.warps, candidate.registers
                self.fit(candidate.programs, candidate.stages)

    programs = candidate.most_programs or launch.MAX_PROGRAMS
    with mock.patch.object(launch, "Shape", Other), mock.patch.object(launch, "MAX_PROGRAMS", programs):
        yield


def counted(gpu: Gpu) -> None:
    """The main kernels once each, for a profiler of hardware counters."""
    checked(gpu)
    _, n, k, d = gpu.size(GPU_GOALS[0])
    genperf.nearest_code(torch.randn(n, d, device=gpu.name), torch.randn(k, d, device=gpu.name))
    gpu.synchronize()


STEPS = {step.__name__: step for step in (facts, smoke, checked, search, invariants, tiles, counted)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--rehearse", action="store_true")
    arguments = parser.parse_args()
    STEPS[arguments.step](Rehearsal() if arguments.rehearse else Gpu())


if __name__ == "__main__":
    main()
