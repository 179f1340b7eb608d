"""Triton kernels in the interpreter, in a process of its own because the interpreter must be chosen before they are imported.

The interpreter is slow and multiplies bfloat16 wrongly. So inputs are small and of float32 or float16, and the operands of
products are float32 tensors that hold values rounded to bfloat16.
"""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

SCRIPT = """
import torch
from genperf import testing
from genperf.kernels.nearest_code import launch, nearest_code, shape
from genperf.ops.nearest_code import search

torch.manual_seed(0)

def check(what, x, codebook, mask=None, cosine=False):
    expected = search(x, codebook, mask, "cosine" if cosine else "euclidean", "reference")
    with testing.poisoned_memory():
        found = nearest_code(x, codebook, mask, cosine)
    wrong = (found != expected).nonzero()
    assert found.shape == expected.shape and not len(wrong), (what, len(wrong), found[tuple(wrong[0])], expected[tuple(wrong[0])])

def rows(*size):
    return torch.randn(*size).unsqueeze(-1)

# Every regime: split operands of depth 16 and 32; plain and streamed operands, with the bias among their columns or apart.
# Blocks of 8, 32 and 128 codes.
codes_per_block = shape.codes_per_block
for d, k, block_codes in (
    (1, 150, 128), (1, 400, None), (3, 80, None), (4, 300, 32), (8, 70, None), (9, 130, 128), (10, 50, None), (16, 60, 32),
    (33, 80, 128), (64, 20, None), (128, 9, None), (129, 20, 32), (192, 9, None), (257, 5, None), (1000, 2, None),
):  # fmt: skip
    shape.codes_per_block = codes_per_block if block_codes is None else lambda *_: block_codes
    x, codebook = testing.vectors("random", 5 if d < 100 else 1, k, d, (torch.float32, torch.float16)[d % 2], "cpu")
    check(("regime", d, k), x.unsqueeze(-1), codebook, None, d % 3 == 0)
shape.codes_per_block = codes_per_block

# Data on which a bound that is too small, or a wrong tie-break, gives a wrong index.
for kind in ("random", "clustered", "offset", "tied", "near_ties"):
    for n, k, d in ((1, 1, 1), (5, 40, 7), (3, 30, 12)):
        for cosine in (False, True) if kind in ("random", "tied") else (False,):
            x, codebook = testing.vectors(kind, n, k, d, torch.float32, "cpu")
            check((kind, n, k, d, cosine), x.unsqueeze(-1), codebook, None, cosine)
for d in (4, 11):
    x, codebook = rows(4, d), torch.randn(25, d)
    outlier = codebook.clone()
    outlier[20] *= 1e5  # its length makes the bound so large that all codes are searched
    close = torch.cat([codebook, codebook + 1e-4 * torch.randn(25, d)])
    for cosine in (False, True):
        check(("outlier", d, cosine), x, outlier, None, cosine)
        check(("repeated", d, cosine), x, codebook[:1].expand(60 if d == 4 else 530, d), None, cosine)
        check(("zero codes", d, cosine), x, torch.cat([codebook * 0, codebook]), None, cosine)
        for scale in ((1e-41, 1e15), (1e-24, 1e38))[d == 4]:
            check(("queries", scale, d, cosine), (x * scale).clamp(-3e38, 3e38), close, None, cosine)
            check(("codes", scale, d, cosine), x, (close * scale).clamp(-3e38, 3e38), None, cosine)
        bad, codes = x.clone(), codebook.clone()
        bad[0, 2], bad[1, 0], bad[3, 1] = torch.nan, torch.inf, -torch.inf
        codes[7, 1], codes[0, 0], codes[9, 3] = torch.nan, torch.inf, -torch.inf
        check(("not finite", d, cosine), bad, codes, None, cosine)
        check(("no finite code", d, cosine), x, torch.full_like(codebook[:3], torch.nan), None, cosine)
    # Codes that differ by one unit in the last place of one component: only float64 tells them apart.
    near = codebook.clone()
    near[:, 0] = torch.nextafter(near[:, 0], torch.tensor(9.0))
    check(("last place", d), codebook[:4].unsqueeze(-1) * 1.001, torch.cat([codebook, near]))

# Layouts, masks and heads.
for d, k in ((4, 40), (13, 20), (129, 3)):
    x, codebook = torch.randn(2, d, 2), torch.randn(k, d)
    mask = torch.rand(2, 2) > 0.3
    spaced = torch.full((2, 2 * d, 6), torch.nan)[:, ::2, ::3]
    check(("planar", d), x, codebook, mask)
    check(("strided", d), spaced.copy_(x), codebook.t().contiguous().t(), mask)
    check(("transposed", d), x.transpose(1, 2).contiguous().transpose(1, 2).half(), codebook, mask.t().contiguous().t(), True)
    heads, codebooks = torch.randn(2, 2 * d, 2).unflatten(1, (2, d)).movedim(1, 0), torch.randn(k, 2, d).transpose(0, 1)
    codebooks[1] += 100
    check(("heads", d), heads, codebooks, torch.rand(2, 2, 2) > 0.3)
    check(("heads", d), heads.contiguous(), codebooks.contiguous(), None, d == 13)
    check(("one head", d), heads[:1], codebooks[:1])

# Several chunks of positions and several programs over the codes, of sizes that divide nothing.
launch.MAX_MAXIMA = 1
for d, k, programs in ((3, 300, 8), (20, 140, 1), (140, 260, 99)):
    shape.MIN_PROGRAMS = programs
    mask = torch.arange(130).unsqueeze(1) % 60 == 9
    check(("chunks", d), rows(130, d), torch.randn(k, d), mask)
x, codebook = torch.randn(2, 129, 5, 1), torch.randn(2, 140, 5)
check("chunks of heads", x, codebook, (torch.arange(129) % 32 == 0).expand(2, -1).unsqueeze(-1))

assert nearest_code(rows(0, 5), torch.randn(7, 5), None, False).shape == (0, 1)
torch.set_default_dtype(torch.float64)
check("default dtype", rows(9, 6).float(), torch.randn(50, 6, dtype=torch.float32))
print("interpreted")
"""


def test_nearest_code():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "interpreted\n"
