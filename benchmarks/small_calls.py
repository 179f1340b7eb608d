# SPDX-License-Identifier: Apache-2.0
"""What a call of an op costs on a CPU beyond its compiled kernels, in microseconds: checks, views, the seed and autograd.

python benchmarks/small_calls.py [-k WORDS]

Inputs are small enough for the kernels to take a few microseconds. The kernels that a call runs are recorded, and called again by
themselves with the same arguments; call and kernels are timed in turn, on one thread. Backward is a call of the autograd engine, without
the checks of torch.autograd.grad or backward, which a model pays once. Beside it is an empty Function: a torch.autograd.Function of the
same inputs and outputs that computes nothing, the least that a gradient costs without C++ of autograd. Ops that are made of many calls of
PyTorch (Frechet distance, matrix square root, k-means) are not here. For the layers, what their ops cost counts as well. Kernels that are
called again find the packed codebook of the search in its cache, which a training step has to pack.

The second table has the parts that these calls share, each beside what it replaces.
"""

import argparse
import contextlib
import functools
import gc
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import genperf
from genperf.ops import _autograd, _dispatch, _layout, _noise, _validate
from genperf.ops.nearest_code import unavailable

from modes import selected  # isort: skip
from report import markdown  # isort: skip

FORWARD_GOAL, BACKWARD_GOAL = 15.0, 45.0  # microseconds beyond the kernels
ROUNDS = 150
ROUND_SECONDS = 5e-4


class Case(NamedTuple):
    """A call, and the inputs that it is differentiated in; none where the op has no gradient."""

    name: str
    call: Callable[[], Any]
    inputs: tuple[Tensor, ...] = ()
    is_op: bool = True


class Cost(NamedTuple):
    """Microseconds of a call, of its kernels alone, and of an empty Function of its inputs and outputs."""

    name: str
    passes: str
    call: float
    kernels: float
    goal: float | None
    function: float | None = None

    @property
    def beyond(self) -> float:
        return self.call - self.kernels

    @property
    def verdict(self) -> str:
        return "" if self.goal is None else "reached" if self.beyond <= self.goal else "missed"


class _Recorder(TorchDispatchMode):
    """Keeps the calls of compiled ops of genperf, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func.namespace == "genperf":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def cases() -> list[Case]:
    """The ops, then the layers, on 64 vectors or a batch of 64."""

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, requires_grad=True)

    x, codebook, codebooks = leaf(64, 16), leaf(32, 16), leaf(4, 32, 16)
    features, indices = leaf(64, 4), torch.randint(32, (64,))
    moments, logits, kernels = leaf(128, 128), leaf(64, 32), leaf(8, 16, 4)
    real, fake, gradients = torch.randn(64, 64), leaf(64, 64), leaf(64, 64)

    def case(name: str, *inputs: Tensor, **options: Any) -> Case:
        return Case(name, functools.partial(getattr(genperf, name), *inputs, **options), tuple(t for t in inputs if t.requires_grad))

    ops = [
        case("nearest_code", x.detach(), codebook.detach()),
        case("nearest_codes", x.detach(), codebook.detach(), k=4),
        case("code_statistics", x.detach(), indices, num_codes=32),
        case("vector_quantize", x, codebook),
        case("residual_vector_quantize", x, codebooks),
        case("finite_scalar_quantize", features, levels=[8, 5, 5, 5]),
        case("lookup_free_quantize", features),
        case("lookup_free_entropy", features),
        case("code_entropy", x, codebook),
        case("code_cross_entropy", x, codebook, indices),
        case("sample_code", x.detach(), codebook.detach()),
        case("gaussian_sample", moments),
        case("gumbel_sample", logits),
        case("interpolate", real, fake),
        case("perturb", real),
        case("gradient_norm_penalty", gradients),
        case("minibatch_similarity", kernels),
    ]
    layers = {"VectorQuantizer, eval": genperf.nn.VectorQuantizer(32, 16, decay=0.99).eval()}
    layers["VectorQuantizer, EMA step"] = genperf.nn.VectorQuantizer(32, 16, decay=0.99)
    layers["VectorQuantizer, learned"] = genperf.nn.VectorQuantizer(32, 16)
    return ops + [
        Case(name, functools.partial(layer, x), () if "eval" in name else (x, *layer.parameters()), False) for name, layer in layers.items()
    ]


def step_of(case: Case) -> Callable[[], Any]:
    """Forward and backward of a case, from a gradient of ones."""
    first = case.call()
    first = first if isinstance(first, tuple) else (first,)
    places = [place for place, t in enumerate(first) if isinstance(t, Tensor) and t.requires_grad]
    gradients = tuple(torch.ones_like(first[place]) for place in places)

    def step() -> tuple[Any, ...]:
        found = case.call()
        outputs = tuple([found[place] for place in places]) if isinstance(found, tuple) else (found,)
        return outputs, run_backward(outputs, gradients, False, False, case.inputs, False, accumulate_grad=False)

    return step


# The call that torch.autograd.grad makes after its checks.
run_backward = torch.autograd.Variable._execution_engine.run_backward


def empty_function(inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> type[_autograd.Function]:
    """A Function of these inputs that returns these outputs and, as gradients, ones; it saves the inputs, as most ops do."""
    outputs = tuple(t.detach() for t in outputs)
    gradients = tuple(torch.ones_like(t) for t in inputs)

    class Empty(_autograd.Function):
        @staticmethod
        def forward(*_: Tensor) -> Any:
            found = tuple([t.detach() for t in outputs])
            return found if len(found) > 1 else found[0]

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.save_for_backward(*inputs)
            if len(outputs) > 1:
                ctx.mark_non_differentiable(*[t for t in output if not t.is_floating_point()])
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx: Any, *_: Tensor) -> Any:
            _ = ctx.saved_tensors
            return tuple([t.detach() for t in gradients])

    return Empty


def empty_case(case: Case) -> Case:
    """The case with an empty Function in place of its op."""
    found = case.call()
    function = empty_function(case.inputs, found if isinstance(found, tuple) else (found,))
    return Case(case.name, functools.partial(_autograd.apply, function, *case.inputs), case.inputs)


def kernels_of(call: Callable[[], Any]) -> Callable[[], None]:
    """The compiled ops that `call` runs, with the arguments that it passes."""
    with _Recorder() as recorder:
        call()

    def run() -> None:
        for op, arguments, options in recorder.calls:
            op(*arguments, **options)

    return run


def verify(call: Callable[[], Any]) -> None:
    """Compare the results with those of the plain PyTorch references."""
    torch.manual_seed(0)
    found = call()
    torch.manual_seed(0)
    with genperf.reference_ops():
        torch.testing.assert_close(found, call(), rtol=1e-3, atol=1e-4)


def in_turn(*calls: Callable[[], Any], rounds: int = ROUNDS) -> list[float]:
    """The least microseconds of each, over rounds of many calls."""
    best = [float("inf")] * len(calls)
    counts = [max(1, int(ROUND_SECONDS / _seconds(call, 20))) for call in calls]
    collects = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for place, (call, count) in enumerate(zip(calls, counts, strict=True)):
                best[place] = min(best[place], _seconds(call, count))
    finally:
        if collects:
            gc.enable()
    return [seconds * 1e6 for seconds in best]


def _seconds(call: Callable[[], Any], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch computes on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def costs(chosen: Callable[[str], bool] = lambda name: True, rounds: int = ROUNDS) -> Iterator[Cost]:
    """Verify and time forward without a gradient, then forward with backward, of every case that is chosen."""
    with one_thread():
        for case in cases():
            if not chosen(case.name):
                continue
            passes = [("forward", torch.no_grad(), case.call, FORWARD_GOAL)]
            if case.inputs:
                passes.append(("forward and backward", torch.enable_grad(), step_of(case), BACKWARD_GOAL))
            for name, mode, call, goal in passes:
                with mode:
                    if case.is_op:
                        verify(call)
                    kernels = kernels_of(call)
                    with torch.no_grad():
                        kernels()
                    calls = [call, _without_gradient(kernels)]
                    if case.is_op and goal == BACKWARD_GOAL:
                        calls.append(step_of(empty_case(case)))
                    call_time, kernel_time, *function = in_turn(*calls, rounds=rounds)
                yield Cost(case.name, name, call_time, kernel_time, goal if case.is_op else None, *function)


def _without_gradient(call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> None:
        before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        call()
        torch._C._set_grad_enabled(before)

    return run


def row(cost: Cost) -> dict[str, str]:
    times = {"call, us": cost.call, "its kernels, us": cost.kernels, "beyond them, us": cost.beyond, "an empty Function, us": cost.function}
    goal = {"goal": "" if cost.goal is None else f"<= {cost.goal:g}", "": cost.verdict}
    shown = {name: "" if value is None else f"{value:.1f}" for name, value in times.items()}
    return {"op": cost.name, "passes": cost.passes, **shown, **goal}


class Part(NamedTuple):
    """A part of the way through an op, and what it stands in for."""

    name: str
    call: Callable[[], Any]
    replaced: str = ""
    earlier: Callable[[], Any] | None = None


def parts() -> list[Part]:
    """The parts that the ops share, on 64 vectors."""
    x, codebook = torch.randn(64, 16, requires_grad=True), torch.randn(32, 16, requires_grad=True)
    values, vectors, codes = x.detach(), x.detach().view(64, 16, 1), codebook.detach()
    nothing, no_indices = vectors[:0], torch.empty(0, 1, dtype=torch.int64)
    quantize = torch.ops.genperf.vector_quantize
    gradients = torch.ones(64, 16), torch.ones(())
    outputs = values, torch.zeros(()), torch.zeros((), dtype=torch.int64)
    small, large = empty_function((x,), (values,)), empty_function((x, codebook), outputs)
    flat = empty_function((vectors,), (vectors, outputs[1]))
    within = _autograd.viewing(flat)
    reasons = unavailable(x.device, x.dtype)

    def choose() -> str:
        return _dispatch.choose_impl("op", None, unavailable(x.device, x.dtype))

    def choose_anew() -> str:
        return _dispatch.choose_impl("op", None, unavailable.__wrapped__(x.device, x.dtype))

    def backward_of(function: type[_autograd.Function], *inputs: Tensor) -> Callable[[], Any]:
        found = _autograd.apply(function, *inputs)
        found = found[:2] if isinstance(found, tuple) else (found,)
        return lambda: run_backward(found, gradients[: len(found)], True, False, inputs, False, accumulate_grad=False)

    def one_node() -> Any:
        found = _autograd.apply(within, x, vectors.shape, 1)[:2]
        return run_backward(found, gradients, False, False, (x,), False, accumulate_grad=False)

    def view_nodes() -> Any:
        found, loss = _autograd.apply(flat, x.view(64, 16, 1))
        return run_backward((found.view(64, 16), loss), gradients, False, False, (x,), False, accumulate_grad=False)

    assert reasons["native"] is None
    return [
        Part("checks of x and a codebook", lambda: _validate.check_vectors("op", x, codebook, -1)),
        Part("choice of an implementation, remembered", choose, "found anew", choose_anew),
        Part(
            "x as vectors, and back", lambda: _layout.Positions(values, 1).restore(vectors), "movedim and reshape", lambda: _moved(values)
        ),
        Part("a seed", lambda: _noise.draw_seed("op", x.device, None, by_value=True)),
        Part("a compiled op on no vectors: dispatcher, checks, three results", lambda: quantize(nothing, codes, no_indices, 1.0)),
        Part("Function of one tensor", lambda: _autograd.apply(small, x), "torch's apply", lambda: small.apply(x)),
        Part("its backward", backward_of(small, x)),
        Part(
            "Function of two tensors and three results",
            lambda: _autograd.apply(large, x, codebook),
            "torch's apply",
            lambda: large.apply(x, codebook),
        ),
        Part("its backward", backward_of(large, x, codebook)),
        Part("Function that views its input, both ways", one_node, "nodes for the views", view_nodes),
    ]


def _moved(x: Tensor) -> Tensor:
    return x.movedim(1, -1).reshape(64, 16, 1).reshape(64, 16).movedim(-1, 1)


def part_rows(rounds: int = ROUNDS) -> Iterator[dict[str, str]]:
    """Time each part and what it replaces, in turn, on one thread."""
    with one_thread():
        for part in parts():
            times = in_turn(part.call, *(() if part.earlier is None else (part.earlier,)), rounds=rounds)
            shown = [f"{value:.1f}" for value in times] + [""]
            yield {"part": part.name, "us": shown[0], "in place of": part.replaced, "its us": shown[1]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-k", metavar="WORDS", help="only the ops that match, as pytest's -k")
    arguments = parser.parse_args()
    chosen = set(selected([case.name for case in cases()], arguments.k))
    found = list(costs(chosen.__contains__))
    print(markdown([row(cost) for cost in found]))
    if not arguments.k:
        print(f"\n{markdown(list(part_rows()))}")
    judged = [cost.verdict for cost in found if cost.verdict]
    print(f"\n{judged.count('reached')} of {len(judged)} goals are reached.")
    return int("missed" in judged)


if __name__ == "__main__":
    sys.exit(main())
