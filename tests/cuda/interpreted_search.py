"""The Triton search in the interpreter. A script, run by test_triton_interpret.py: the interpreter must be chosen before any import.

    interpreted_search.py suite        shapes, layouts, masks, heads, adversarial data
    interpreted_search.py bound        adversarial data, on a model of the tensor cores
    interpreted_search.py half_bound   the same with half of the bound: prints the number of wrong rows

The interpreter multiplies matrices in float32 with float32 sums. The model adds products as the tensor cores do: `depth` of them
and the running sum at a time, each aligned to the largest of them and truncated to `bits` bits.
"""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

from pathlib import Path

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))

import test_nearest_code_bound as adversarial

from genperf import testing
from genperf.kernels.nearest_code import launch, nearest_code, rows, shape
from genperf.ops.nearest_code import search

wrong_rows = 0
plain_dot = InterpreterBuilder.create_dot


def patch_once():
    """The interpreter replaces parts of triton.language for each call of a function. Once for each module takes half of the time."""
    patch, patched = interpreter._patch_lang, {}

    def patch_lang(fn):
        key = id(fn.__globals__)
        if key not in patched:
            patched[key] = patch(fn)
            patched[key].restore = lambda: None
            tl.tensor.__index__ = lambda self: int(self.handle.data.squeeze())  # that of Triton 3.6 fails under NumPy 2.4
        return patched[key]

    interpreter._patch_lang = patch_lang


def check(what, x, codebook, mask=None, cosine=False, fails=True):
    global wrong_rows
    expected = search(x, codebook, mask, "cosine" if cosine else "euclidean", "reference")
    with testing.poisoned_memory():
        found = nearest_code(x, codebook, mask, cosine)
    wrong = (found != expected).nonzero()
    wrong_rows += len(wrong)
    assert found.shape == expected.shape
    assert not fails or not len(wrong), (what, len(wrong), found[tuple(wrong[0])], expected[tuple(wrong[0])])


def vectors(*size):
    return torch.randn(*size).unsqueeze(-1)


def truncated(value, quantum):
    return np.trunc(value / quantum) * quantum


def tensor_core(depth, bits):
    """A product of float16 matrices added to `sums` as by tensor cores that add `depth` products at a time."""

    def dot(self, a, b, sums, *options):
        if a.data.dtype == np.float32:  # not on the tensor cores
            return plain_dot(self, a, b, sums, *options)
        assert a.data.dtype == b.data.dtype == np.float16
        left, right = a.data.astype(np.float64), b.data.astype(np.float64)
        total = sums.data.astype(np.float64)
        for start in range(0, left.shape[1], depth):
            terms = left[:, None, start : start + depth] * right[start : start + depth].T[None]
            largest = np.maximum(np.abs(terms).max(-1), np.abs(total))
            quantum = np.ldexp(1.0, np.frexp(np.where(largest > 0, largest, 1.0))[1] - bits)
            total = truncated(terms, quantum[..., None]).sum(-1) + truncated(total, quantum)
            total = truncated(total, np.ldexp(1.0, np.frexp(np.where(total == 0, 1.0, total))[1] - 24))
        return TensorHandle(total.astype(np.float32), sums.dtype.scalar)

    return dot


def suite():
    # Every regime: split operands of each depth, held and streamed queries; several tiles, several programs over the codes.
    for d, k in (
        (1, 150), (1, 400), (3, 80), (4, 300), (5, 140), (8, 70), (9, 130), (10, 50), (16, 60), (21, 200), (22, 40),
        (33, 80), (64, 20), (128, 9), (129, 150), (257, 5), (1024, 130),
    ):  # fmt: skip
        x, codebook = testing.vectors("random", 5 if d < 100 else 1, k, d, (torch.float32, torch.float16)[d % 2], "cpu")
        check(("regime", d, k), x.unsqueeze(-1), codebook, None, d % 3 == 0)

    # Data on which a bound that is too small, or a wrong tie-break, gives a wrong index.
    for kind in ("random", "clustered", "offset", "tied", "near_ties"):
        for n, k, d in ((1, 1, 1), (5, 40, 7), (3, 30, 12), (9, 300, 24)):
            for cosine in (False, True) if kind in ("random", "tied") else (False,):
                x, codebook = testing.vectors(kind, n, k, d, torch.float32, "cpu")
                check((kind, n, k, d, cosine), x.unsqueeze(-1), codebook, None, cosine)
    for d in (4, 11, 30):
        x, codebook = vectors(4, d), torch.randn(25, d)
        outlier = codebook.clone()
        outlier[20] *= 1e5
        close = torch.cat([codebook, codebook + 1e-4 * torch.randn(25, d)])
        long = torch.cat([codebook, 3 * codebook, 30 * codebook, 1000 * codebook])
        for cosine in (False, True):
            check(("outlier", d, cosine), x, outlier, None, cosine)
            check(("lengths", d, cosine), torch.cat([x * scale for scale in (0.1, 1, 4, 20, 1e3)]), long, None, cosine)
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
    for d, k in ((4, 40), (13, 20), (30, 20), (129, 3), (300, 3)):
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

    # Several tiles of rows to a program and several programs over the codes, of sizes that divide nothing.
    for d, k, most, least in ((3, 700, 1, 40), (24, 300, 1, 1), (140, 260, 2, 99), (300, 260, 1, 1)):
        shape.MIN_PROGRAMS, launch.MAX_PROGRAMS = least, most
        mask = torch.arange(300).unsqueeze(1) % 60 == 9
        check(("programs", d), vectors(300, d), torch.randn(k, d), mask)
        x, codebook = testing.vectors("near_ties", 150, k, d, torch.float32, "cpu")
        check(("near ties in programs", d), x.unsqueeze(-1), codebook, mask[:150])
    x, codebook = torch.randn(2, 129, 5, 1), torch.randn(2, 340, 5)
    check("programs of heads", x, codebook, (torch.arange(129) % 32 == 0).expand(2, -1).unsqueeze(-1))

    assert nearest_code(vectors(0, 5), torch.randn(7, 5), None, False).shape == (0, 1)
    torch.set_default_dtype(torch.float64)
    check("default dtype", vectors(9, 6).float(), torch.randn(50, 6, dtype=torch.float32))


class SmallShape(shape.Shape):
    def __init__(self, *args):
        super().__init__(*args)
        self.block_n = 32


def bound(fails=True):
    launch.Shape = SmallShape
    number = 0

    def model():
        nonlocal number
        InterpreterBuilder.create_dot = tensor_core((4, 8, 16)[number % 3], (24, 25, 27)[number // 3 % 3])
        number += 1

    for form, dims in (("tf32", (33, 64, 140)), ("split", (5, 20)), ("split product", (5, 20))):  # tf32 has the bits of float16
        for d in dims:
            model()
            x, codebook = adversarial.aligned_roundings(form, d, 140, (5, 77), "euclidean", adversarial.seeded(d))
            check((form, d), x.unsqueeze(-1), codebook, None, False, fails)
        model()
        x, codebook = adversarial.aligned_roundings(form, dims[-1], 140, (40, 7), "cosine", adversarial.seeded(d))
        check((form, "cosine"), x.unsqueeze(-1), codebook, None, True, fails)
    if not fails:
        return
    for d in (3, 20, 33, 64):
        model()
        x, codebook = adversarial.rounded_additions(d, adversarial.seeded(d, 1))
        check(("additions", d), x.unsqueeze(-1), codebook)
    for i, (family, make) in enumerate(adversarial.FAMILIES.items()):
        model()
        d = (9, 30, 2)[i % 3]
        x, codebook = make(d, adversarial.seeded(d))
        step = max(1, len(x) // 6)
        check((family, d), x[::step].unsqueeze(-1), codebook[:260], None, i % 4 == 0)


whole_row_bound = rows.row_bound


@triton.jit
def half_row_bound(square, error, low_square, back, dim, columns, COSINE: tl.constexpr):
    at_length, at_residual, at_zero, length = whole_row_bound(square, error, low_square, back, dim, columns, COSINE)
    return at_length * 0.5, at_residual * 0.5, at_zero * 0.5, length


if __name__ == "__main__":
    torch.manual_seed(0)
    patch_once()
    shape.SEARCH_PROGRAMS = launch.SEARCH_PROGRAMS = 3
    if sys.argv[1] == "suite":
        suite()
    elif sys.argv[1] == "bound":
        bound()
    else:
        rows.row_bound = half_row_bound
        bound(fails=False)
    print(wrong_rows)
