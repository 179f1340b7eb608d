# SPDX-License-Identifier: Apache-2.0
"""Every cell of the table of docs/compatibility.md: a "yes" holds for the row, and what is said not to work fails."""

import copy
import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import what_works
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from what_works import METRICS, NA, ROWS, YES, Network, batch, floating, measured, total

sys.path.insert(0, str(Path(__file__).parent / "nn"))
import test_export


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tensors(result):
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def step(network, x, call=None):
    """Outputs, gradients and state of a training step; noise is that of the same seed."""
    x = x.clone().requires_grad_()
    torch.manual_seed(3)
    result = (call or network.forward)(x)
    if differentiable(result):
        total(result, x).backward()
    return found_by(network, x, result)


def differentiable(result):
    return any(t.requires_grad for t in floating(result))


def found_by(network, x, result):
    gradients = [t.grad for t in (x, *network.parameters()) if t.grad is not None]
    return [t.detach() for t in tensors(result)], gradients, list(network.state_dict().values())


def mixed_precision(row):
    """Under autocast and in a half-precision module, outputs are those of float32 for the same values up to rounding.

    GradScaler skips a step whose gradients overflow, and takes the next one.
    """
    for dtype in (torch.bfloat16, torch.float16):
        network = Network(row).start()
        half = copy.deepcopy(network.layer).to(dtype)
        x = batch(row).to(dtype)
        for layer, exact, autocast in ((network.layer, copy.deepcopy(network.layer), True), (half, copy.deepcopy(half).float(), False)):
            torch.manual_seed(3)
            with torch.autocast("cpu", dtype, enabled=autocast):
                found = tensors(layer(x))
            torch.manual_seed(3)
            expected = tensors(exact(x.float()))
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a.float(), b.float(), rtol=0.05, atol=0.05)
    network, scaler = Network(row).start(), torch.amp.GradScaler("cpu", init_scale=2.0**60, backoff_factor=2.0**-50)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    before = [p.clone() for p in network.parameters()]
    moved = []
    for _ in range(2):
        x = batch(row)
        with torch.autocast("cpu", torch.float16):
            result = network(x)
        if not differentiable(result):
            return
        scaler.scale(total(result, x)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moved.append(any(not torch.equal(p, b) for p, b in zip(network.parameters(), before, strict=True)))
    assert moved == [False, True]
    assert all(t.isfinite().all() for t in network.state_dict().values())


def checkpointing(row):
    """A step in which the layer runs again in backward: the same gradients and state."""
    expected = step(network := Network(row).start(), batch(row))
    for reentrant in (False, True) if row.cell("checkpointing") == YES else (False,):
        network = Network(row).start()
        found = step(network, batch(row), lambda x, network=network, reentrant=reentrant: checkpoint(network, x, use_reentrant=reentrant))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def functional(row):
    """In evaluation mode: gradients in inputs and parameters, and vmap over samples, against autograd and a loop."""
    network = Network(row).start()
    row.frozen(network)
    parameters = {name: p.detach() for name, p in network.named_parameters()}

    def loss(parameters, x):
        return total(functional_call(network, parameters, (x,)), x)

    xs, expected = torch.stack([batch(row, seed) for seed in (1, 2, 3)]), []
    for x in xs:
        torch.manual_seed(3)
        leaves = [*network.parameters(), x.clone().requires_grad_()]
        found = torch.autograd.grad(total(network(leaves[-1]), x), leaves, allow_unused=True)
        expected.append([torch.zeros_like(p) if g is None else g for g, p in zip(found, leaves, strict=True)])
    torch.manual_seed(3)
    slopes, slope = grad(loss, (0, 1))(parameters, xs[0])
    torch.testing.assert_close([*slopes.values(), slope], expected[0], rtol=1e-4, atol=1e-5)
    torch.manual_seed(3)
    slopes, slope = vmap(grad(loss, (0, 1)), (None, 0), randomness="same")(parameters, xs)
    torch.testing.assert_close([*slopes.values(), slope], [torch.stack(g) for g in zip(*expected, strict=True)], rtol=1e-4, atol=1e-5)


def exported(row):
    network = Network(row).start().eval()
    sizes = None if "fixed" in row.cell("torch.export") else ({0: torch.export.Dim.DYNAMIC},)
    with torch.no_grad():
        program = torch.export.export(network, (batch(row),), dynamic_shapes=sizes)
        for count in (1, 2) if sizes else (1,):
            x, results = batch(row, 2, count), []
            for call in (program.module(), network):
                torch.manual_seed(3)
                results.append(tensors(call(x)))
            torch.testing.assert_close(*results)


CHECKS = {
    "mixed precision": mixed_precision,
    "checkpointing": checkpointing,
    "torch.func": functional,
    "torch.export": exported,
}
CELLS = [(label, column) for column in CHECKS for label, row in ROWS.items() if row.cell(column) != NA]


@pytest.mark.parametrize(("label", "column"), CELLS)
@pytest.mark.filterwarnings("ignore")
def test_cell(label, column):
    row = ROWS[label]
    if row.cell(column).startswith(YES):
        CHECKS[column](row)
    else:
        with pytest.raises(Exception):  # noqa: B017, PT011 whatever it is, the cell has to change where it works
            CHECKS[column](row)


class Together(torch.nn.Module):
    """Several networks as one, since most of the time to compile or export one does not depend on its size."""

    def __init__(self, rows):
        super().__init__()
        self.networks = torch.nn.ModuleList(Network(row).start() for row in rows)

    def forward(self, *inputs):
        return [network(x) for network, x in zip(self.networks, inputs, strict=True)]


def compiled(rows):
    """A training step under torch.compile has the outputs, gradients and state of a plain one."""
    torch._dynamo.reset()
    steps = []
    for compiles in (False, True):
        together = Together(rows)
        call = torch.compile(together, backend="aot_eager", fullgraph=True) if compiles else together
        inputs = [batch(row).requires_grad_() for row in rows]
        torch.manual_seed(3)
        results = call(*inputs)
        losses = [total(result, x) for result, x in zip(results, inputs, strict=True) if differentiable(result)]
        if losses:
            sum(losses[1:], losses[0]).backward()
        steps.append([found_by(*each) for each in zip(together.networks, inputs, results, strict=True)])
    for row, expected, found in zip(rows, *steps, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=lambda text, row=row: f"{row.label}: {text}")


@pytest.mark.parametrize("section", what_works.SECTIONS)
@pytest.mark.filterwarnings("ignore")
def test_compile(section):
    rows = [row for row in ROWS.values() if row in what_works.SECTIONS[section]]
    if working := [row for row in rows if row.cell("torch.compile").startswith(YES)]:
        compiled(working)
    for row in rows:
        if row.cell("torch.compile").startswith("no"):
            with pytest.raises(Exception):  # noqa: B017, PT011
                compiled([row])


def exported_to_onnx(rows):
    network, content = Together(rows).eval(), io.BytesIO()
    with torch.no_grad():
        # Optimized, as nn/test_export.py has it, a graph of so many networks takes twice as long.
        torch.onnx.export(network, tuple(map(batch, rows)), dynamo=True, verbose=False, optimize=False).save(content)
    session = pytest.importorskip("onnxruntime").InferenceSession(content.getvalue(), providers=["CPUExecutionProvider"])
    inputs = [batch(row, 2) for row in rows]
    found = session.run(None, {given.name: x.numpy() for given, x in zip(session.get_inputs(), inputs, strict=True)})
    torch.testing.assert_close([torch.from_numpy(t) for t in found], tensors(network(*inputs)), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_onnx():
    pytest.importorskip("onnxscript")
    exported_to_onnx([row for row in ROWS.values() if row.cell("ONNX").startswith(YES) and not row.onnx])
    for row in ROWS.values():
        if row.cell("ONNX").startswith("no"):
            with pytest.raises(Exception):  # noqa: B017, PT011
                exported_to_onnx([row])


def test_onnx_of_layers_in_another_file():
    named = {row.onnx for row in ROWS.values() if row.onnx}
    assert named <= test_export.LAYERS.keys()


@pytest.mark.parametrize("label", METRICS)
def test_metrics_of_half_precision(label):
    row = METRICS[label]
    for dtype in (torch.bfloat16, torch.float16):
        metric = row.make()
        for part in ("real", "fake"):
            with torch.autocast("cpu", dtype):
                row.update(metric, measured(part).to(dtype), part == "real")
        torch.testing.assert_close(row.result(metric), row.expected())


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What failed on each of two ranks, by cell."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-W", "ignore", Path(__file__).with_name("what_works_in_processes.py"), folder]
    run = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        errors = run.communicate(timeout=180)[1]
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        pytest.fail(f"the processes hang:\n{run.communicate()[1][-5000:]}")
    assert run.returncode == 0, errors[-5000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("column", ["DDP", "FSDP2"])
@pytest.mark.parametrize("label", [*ROWS, *METRICS])
def test_ranks(ranks, label, column):
    cell = (ROWS | METRICS)[label].cell(column)
    found = [rank.get(f"{label}: {column}") for rank in ranks]
    if cell.startswith(YES):
        assert found == ["", ""]
    else:
        assert all(error is None if cell == NA else error for error in found)


def test_every_public_name_has_a_row():
    rows = {row.name for rows in what_works.SECTIONS.values() for row in rows}
    rows -= {row.name for row in what_works.ELSEWHERE if row.package and importlib.util.find_spec(row.package) is None}
    assert rows == what_works.public_names()


def test_cells_say_yes_or_no():
    for rows in what_works.SECTIONS.values():
        for row in rows:
            assert all(re.fullmatch(r"yes(, .+)?|no: .+|n/a", row.cell(column)) for column in what_works.COLUMNS), row.label


def test_tests_of_other_files_exist():
    for path in (path for row in what_works.ELSEWHERE for path in row.tests.values()):
        file, name = path.split("::")
        assert f"def {name}(" in (Path(__file__).parent / file).read_text()


def test_page_has_the_table():
    page = what_works.PAGE.read_text()
    assert what_works.rendered(page) == page, "run `python tests/what_works.py`"
