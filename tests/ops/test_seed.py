# SPDX-License-Identifier: Apache-2.0
"""Where the seeds of noise come from, and that no op copies numbers to a GPU, which would wait."""

import ast
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import genperf
from genperf import _library
from genperf.ops import _noise
from genperf.ops.finite_scalar_quantize import _filled_column

OPS = Path(genperf.__file__).parent / "ops"
KEYS = [(0, 0), (0x299F31D0A4093822, 4), (2**64 - 1, 2**40 + 8)]


class Generator:
    """The state of a CUDA generator."""

    def __init__(self, key, offset):
        self.key, self.offset = key, offset

    def initial_seed(self):
        return self.key

    def get_offset(self):
        return self.offset

    def set_offset(self, offset):
        self.offset = offset


@pytest.mark.parametrize(("key", "offset"), KEYS)
def test_the_seed_of_a_state_is_two_words_of_philox(key, offset, monkeypatch):
    signed = torch.tensor(key - 2**64 if key >= 2**63 else key)
    first, second = _noise.random_words(signed, torch.tensor([offset // 4]), torch.tensor([0]))[0, :2].tolist()
    expected = (first << 32 | second) % (2**63 - 1)
    assert _noise.seed_of_philox(key, offset) == expected

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    generator = Generator(key, offset)
    monkeypatch.setattr(torch.cuda, "default_generators", (None, generator))
    for number, given in ((1, generator), (2, None)):
        seed = _noise._seed_of_state(torch.device("cuda", 1), given)
        assert (seed.device.type, seed.dtype, seed.shape) == ("cpu", torch.int64, ())
        assert (seed == expected) == (number == 1)
        assert generator.offset == offset + 4 * number
    # Another thread may draw from the same generator, and FakeTensors have no numbers.
    monkeypatch.setattr(threading, "active_count", lambda: 2)
    assert _noise._seed_of_state(torch.device("cuda", 1), generator) is None
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    with FakeTensorMode():
        assert _noise._seed_of_state(torch.device("cuda", 1), generator) is None
    assert generator.offset == offset + 8


def test_the_seed_of_a_state_is_that_of_randint(device):
    if device == "cpu":
        pytest.skip("compares with torch.randint on a CUDA device.")
    generator = torch.Generator(device).manual_seed(5)
    for _ in range(3):
        state = generator.get_state()
        seed = _noise.draw_seed("op", torch.device(device, 0), generator, by_value=True)
        advanced = generator.get_state()
        generator.set_state(state)
        assert seed.item() == torch.randint(2**63 - 1, (), device=device, generator=generator).item()
        assert torch.equal(generator.get_state(), advanced)


DRAWS = {
    "gaussian_sample": lambda x, generator: genperf.gaussian_sample(x, x, generator=generator),
    "gumbel_sample": lambda x, generator: genperf.gumbel_sample(x, generator=generator),
    "interpolate": lambda x, generator: genperf.interpolate(x, x, generator=generator),
    "perturb": lambda x, generator: genperf.perturb(x, generator=generator),
    "sample_code": lambda x, generator: genperf.sample_code(x, x, generator=generator),
}


@pytest.mark.parametrize("op", DRAWS)
@pytest.mark.parametrize("capturing", [True, False])
def test_a_seed_of_the_cpu_is_refused_while_a_graph_is_captured(op, capturing, monkeypatch):
    monkeypatch.setattr(_library, "cuda_failure", None)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
        assert _noise.is_capturing() == capturing
    monkeypatch.setattr(_noise, "is_capturing", lambda: capturing)
    with FakeTensorMode():
        x = torch.empty(4, 6, device="cuda")
        if not capturing:
            DRAWS[op](x, torch.Generator())
            return
        with pytest.raises(ValueError, match=f"{op}: a CUDA graph that is being captured would keep a seed"):
            DRAWS[op](x, torch.Generator())
        DRAWS[op](x, None)  # from the generator of the device, which the graph replays


def test_no_op_copies_numbers_to_the_device():
    """torch.tensor with a device other than the CPU waits on CUDA, and no graph can capture it."""
    found = set()
    for path in sorted(OPS.glob("*.py")):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
                    devices = [keyword.value for keyword in call.keywords if keyword.arg == "device"]
                    copies = ast.unparse(call.func) in ("torch.tensor", "torch.as_tensor", "torch.asarray")
                    if copies and devices and ast.unparse(devices[0]) != "'cpu'":
                        found.add((path.name, function.name))
    assert found == {("finite_scalar_quantize.py", "_column")}  # other devices than CUDA


def test_columns_of_references_are_filled_on_cuda():
    for numbers, dtype in (([8, 5, 5, 5], torch.float32), ([0.5], torch.float64), ([1, 8, 40, 200], torch.int64)):
        expected = torch.tensor(numbers, dtype=dtype).unsqueeze(1)
        assert torch.equal(_filled_column(numbers, dtype, torch.device("cpu")), expected)
    from genperf.ops.finite_scalar_quantize import _column

    with FakeTensorMode():
        like = torch.empty(3, device="cuda", dtype=torch.float64)
        column = _column([8, 5, 5], like)
        assert (column.shape, column.dtype, column.device) == ((3, 1), torch.float64, like.device)
    assert _column([2, 3], SimpleNamespace(dtype=torch.int64, device=torch.device("cpu"))).tolist() == [[2], [3]]
