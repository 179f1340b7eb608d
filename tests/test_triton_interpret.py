"""Triton kernels in the interpreter, which must be chosen before they are imported: hence a process of its own.

The interpreter is wrong for bfloat16 and slow, so float32, float16 and small sizes; it multiplies in full precision where
the tensor cores take TF32, which the kernel's own rounding makes the same.
"""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

SCRIPT = """
import torch
from genperf import testing
from genperf.kernels.nearest_code import nearest_code
from genperf.ops.nearest_code import search

torch.manual_seed(0)
for kind in ("random", "offset", "tied", "near_ties"):
    for dtype in (torch.float32, torch.float16):
        for n, k, d in ((1, 1, 1), (33, 70, 7), (17, 301, 33)):
            for cosine in (False, True) if kind == "random" else (False,):
                x, codebook = testing.vectors(kind, n, k, d, dtype, "cpu")
                mask = torch.rand(n, 1) > 0.2 if n > 1 else None
                rows = x.unsqueeze(-1)  # [n, D, 1]
                expected = search(rows, codebook, mask, "cosine" if cosine else "euclidean", "reference")
                with testing.poisoned_memory():
                    found = nearest_code(rows, codebook, mask, cosine)
                assert torch.equal(found, expected), (kind, dtype, n, k, d, cosine)
                if mask is None:
                    continue
                planes = x.t().contiguous().unsqueeze(0)  # [1, D, n]
                found = nearest_code(planes, codebook, mask.t(), cosine)
                assert torch.equal(found, expected.t()), (kind, dtype, n, k, d, cosine, "channels first")

x, codebook = testing.vectors("random", 20, 90, 5, torch.float32, "cpu")
x[3, 2], x[4, 0], codebook[7, 1], codebook[0, 0] = torch.nan, torch.inf, torch.nan, torch.inf
rows = x.unsqueeze(-1)
assert torch.equal(nearest_code(rows, codebook, None, False), search(rows, codebook, None, "euclidean", "reference"))
assert nearest_code(rows[:0], codebook, None, False).shape == (0, 1)
codebook = torch.randn(40, 16)
codebook = torch.cat([codebook, codebook + 1e-4 * torch.randn(40, 16)])
rows = (torch.randn(20, 16) * 1e-24).unsqueeze(-1)
assert torch.equal(nearest_code(rows, codebook, None, True), search(rows, codebook, None, "cosine", "reference"))
torch.set_default_dtype(torch.float64)
assert torch.equal(nearest_code(rows, codebook, None, False), search(rows, codebook, None, "euclidean", "reference"))
print("interpreted")
"""


def test_nearest_code():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "interpreted\n"
