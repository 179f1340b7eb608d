# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel of residual_vector_quantize: in the interpreter, as launched, and as compiled."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import genperf.ops.residual_vector_quantize  # noqa: F401

pytest.importorskip("triton")

from compiled import compile_for
from genperf.kernels.nearest_code import residual_launch
from mocked_driver import mocked_driver

op = sys.modules["genperf.ops.residual_vector_quantize"]


def test_all_quantizers_in_one_launch():
    """In a process of its own, as in test_triton_interpret.py."""
    script = Path(__file__).parent / "interpreted_residual.py"
    run = subprocess.run([sys.executable, "-W", "ignore", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def names(driver):
    return [source.fn.__name__ for source, _ in driver.sources]


def test_three_launches_for_any_number_of_quantizers():
    x, codebooks = torch.empty(500, 32, 1), torch.empty(1, 256, 32).expand(8, -1, -1)
    with mocked_driver(90) as driver:
        for quantizers in (1, 2, 8):
            quantized, indices, mse, valid = residual_launch.residual_vector_quantize(x, codebooks[:quantizers], None, None, False)
            assert (quantized.shape, indices.shape, mse.shape, valid.shape) == (x.shape, (500, 1, quantizers), (quantizers,), ())
            assert len(driver.launches) == 3
            # A codebook that the quantizers share is prepared once.
            assert driver.launches[0][:3] == (2, 1, 1)
            driver.launches.clear()
    assert names(driver)[:3] == ["nearest_code_prepare_kernel", "residual_quantize_kernel", "residual_finish_kernel"]


def test_the_kernel_as_compiled():
    with mocked_driver(90) as driver:
        residual_launch.residual_vector_quantize(torch.empty(1 << 17, 128, 1), torch.empty(8, 1024, 128), None, None, False)
    source, options = driver.sources[names(driver).index("residual_quantize_kernel")]
    compiled = compile_for(90, source, options)
    every, _ = compiled.per_score(128, 64)
    print(f"{every:.2f} instructions a score, {compiled.stack} bytes of stack, {compiled.programs} programs of {compiled.warps} warps")
    assert "wgmma.mma_async" in compiled.ptx
    assert "cp.async.bulk.tensor" in compiled.ptx
    assert (compiled.programs, compiled.warps) == (2, 4)
    assert every <= 7.8
    assert "SHFL" not in compiled.loop
    # What is constant over the codes may be read again, as little as fits into the L1 cache.
    assert compiled.loop.count("LDL") <= 20
    assert "STL" not in compiled.loop
    assert compiled.stack <= 1024


@pytest.mark.parametrize(
    ("rows", "num_codes", "dim", "at_once"),
    [(1000, 1024, 128, True), (10**5, 1024, 128, True), (10**6, 256, 32, False), (1000, 16384, 128, False), (500, 9, 300, False)],
)
def test_where_it_does_not_pay_each_quantizer_is_a_search_and_a_launch(rows, num_codes, dim, at_once, monkeypatch):
    x, codebooks = torch.empty(1, dim, rows, device="meta"), torch.empty(4, num_codes, dim, device="meta")
    called = []
    monkeypatch.setattr(residual_launch, "residual_vector_quantize", lambda *_: called.append("at once"))
    monkeypatch.setattr(torch.ops.genperf, "residual_vector_quantize_in_steps", lambda *_: called.append("in steps"), raising=False)
    op._launch(x, codebooks, None, None, False)
    assert called == ["at once" if at_once else "in steps"]
