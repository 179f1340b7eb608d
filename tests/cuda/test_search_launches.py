# SPDX-License-Identifier: Apache-2.0
"""How the search is launched: from the second call of a kind on without Triton's binder, with the same arguments. The driver is a mock."""

import sys
import time
import weakref
from pathlib import Path
from unittest import mock

import pytest
import torch
from triton import knobs

from mocked_driver import mocked_driver  # isort: skip

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import gpu_steps

if knobs.runtime.interpret:
    pytest.skip("kernels are interpreted, not launched", allow_module_level=True)

from genperf.kernels.nearest_code import launch, plan

LAUNCHES = 4
HOST_US = 30  # of a call, beyond the two allocations by PyTorch and the driver; Triton's own launches take 180


def normal(*sizes):
    return torch.randn(sizes)


INPUTS = {
    "rows": lambda: (normal(90, 24, 1), normal(40, 24), None, False),
    "images": lambda: (normal(3, 24, 30), normal(40, 24), torch.rand(3, 30) > 0.5, False),
    "heads": lambda: (normal(2, 5, 24, 3), normal(2, 40, 24), None, True),
    "half, several programs over the codes": lambda: (normal(2, 256, 1).half(), normal(3000, 256).half(), None, False),
    "not aligned": lambda: (normal(90 * 24 + 1)[1:].view(90, 24, 1), normal(40, 24), None, False),
    "streamed": lambda: (normal(9, 300, 1), normal(40, 300), None, False),
}


def arguments(found):
    """Of a launch: tensors as their addresses, hooks without calls as none."""
    *others, last = found
    flat = [*others, *last] if isinstance(last, (tuple, list)) else found  # Triton 3.6 passes a flat list
    values = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in flat]
    return [None if isinstance(value, knobs.HookChain) else value for value in values]


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("inputs", INPUTS)
def test_launches_equal_those_of_triton(inputs, arch, monkeypatch):
    x, codebook, mask, cosine = INPUTS[inputs]()
    indices, workspace = torch.empty(x.shape[:-2] + x.shape[-1:], dtype=torch.int64), torch.empty(1 << 24, dtype=torch.int32)
    with mocked_driver(arch) as driver:
        monkeypatch.setattr(torch, "empty", lambda size, **options: workspace[:size] if isinstance(size, int) else indices)
        launch.nearest_code(x, codebook, mask, cosine)
        by_triton = [arguments(found) for found in driver.launches]
        assert len(driver.sources) == len(by_triton) == LAUNCHES
        driver.launches.clear()
        monkeypatch.setattr(plan.Plan, "_launch_through_triton", None)
        launch.nearest_code(x, codebook, mask, cosine)
        assert [arguments(found) for found in driver.launches] == by_triton


def test_what_triton_compiles_for_other_alignments_is_launched_for_these():
    memory, codebook = torch.randn(8 * 24 + 1), torch.randn(40, 24)
    functions = []
    with mocked_driver(90) as driver:
        for first in (0, 1, 0, 1):
            driver.launches.clear()
            launch.nearest_code(memory[first : first + 8 * 24].view(8, 24, 1), codebook, None, False)
            functions.append([found[4] for found in driver.launches])
        # prepare reads the codebook alone
        assert len(driver.sources) == 2 * LAUNCHES - 1
    assert functions[0] == functions[2] == [1, 2, 3, 4]
    assert functions[1] == functions[3] == [1, 5, 6, 7]


def test_profilers_and_unknown_releases_get_launches_through_triton(monkeypatch):
    inputs = INPUTS["rows"]()

    def hook(metadata):
        pass

    through_triton = plan.Plan._launch_through_triton
    with mock.patch.object(plan.Plan, "_launch_through_triton", autospec=True, side_effect=through_triton) as launched:
        with mocked_driver(90):
            for _ in range(2):
                launch.nearest_code(*inputs)
            assert launched.call_count == 1
            knobs.runtime.launch_enter_hook.add(hook)
            try:
                launch.nearest_code(*inputs)
            finally:
                knobs.runtime.launch_enter_hook.remove(hook)
            assert launched.call_count == 2
        monkeypatch.setattr(plan, "_COMPILED_IS_KNOWN", False)
        with mocked_driver(90):
            for _ in range(2):
                launch.nearest_code(*inputs)
        assert launched.call_count == 4


def test_host_time():
    x, codebook = torch.randn(8192, 128, 1), torch.randn(1024, 128)

    def least(function):
        times = []
        for _ in range(300):
            start = time.perf_counter_ns()
            function()
            times.append(time.perf_counter_ns() - start)
        return min(times) / 1e3

    with mocked_driver(90):
        call = least(lambda: launch.nearest_code(x, codebook, None, False))
    allocations = least(lambda: (torch.empty(8192, 1, dtype=torch.int64), torch.empty(1 << 20, dtype=torch.int32)))
    print(f"{call:.1f} us a call, {allocations:.1f} of them two allocations")
    assert call - allocations < HOST_US


def test_a_plan_holds_no_memory():
    """So that a captured graph depends on nothing that a later call changes."""
    x, codebook, mask, cosine = INPUTS["images"]()
    tensors = [weakref.ref(tensor) for tensor in (x, codebook, mask)]
    with mocked_driver(90) as driver:
        for _ in range(2):
            launch.nearest_code(x, codebook, mask, cosine)
        driver.launches.clear()
        del x, codebook, mask
        assert [tensor() for tensor in tensors] == [None] * 3


@pytest.mark.parametrize(("dim", "tiles"), [(dim, tiles) for dim, candidates in gpu_steps.TILES.items() for tiles in candidates], ids=str)
def test_other_tiles_are_launched(dim, tiles):
    """The candidates that a report of a GPU times."""
    x, codebook = torch.empty(1 << 18, dim, 1), torch.randn(500, dim)
    with mocked_driver(90) as driver:
        with gpu_steps._launched_with(tiles):
            launch.nearest_code(x, codebook, None, False)
        prepare, scan, *_ = driver.sources
        chosen = launch.Shape(dim, 500, x.device)
        rows, _, _ = driver.launches[1][:3]
    named = {source.fn.arg_names[i]: value for source, _ in (prepare, scan) for (i,), value in source.constants.items()}
    block_n = tiles.block_n or chosen.block_n
    assert (named["BLOCK_N"], named["BLOCK_K"]) == (block_n, tiles.block_k or chosen.block_k)
    assert (scan[1]["num_warps"], scan[1]["maxnreg"]) == (tiles.warps or chosen.warps, tiles.registers or chosen.max_registers)
    assert scan[1]["num_stages"] <= tiles.stages
    assert rows == min((1 << 18) // block_n, tiles.most_programs or launch.MAX_PROGRAMS)
