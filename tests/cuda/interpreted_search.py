# SPDX-License-Identifier: Apache-2.0
"""The Triton search in the interpreter. A script, run by test_triton_interpret.py: the interpreter must be chosen before any import.

    interpreted_search.py PART...      checks, each of which prints its number of wrong rows:
        suite         shapes, layouts, masks, heads, adversarial data
        bound         adversarial data, on a model of the tensor cores
        half_bound    some of it with half of the bound
        accumulation  additions that the tensor cores lose, with an eighth of what the bound allows for them
        ways          that no data on which a search could slow down leaves many rows to float64
    interpreted_search.py ways N K D   prints how the rows of such data are decided

The interpreter multiplies matrices in float32 with float32 sums. The model adds products as the tensor cores do: `depth` of them
and the running sum at a time, each aligned to the largest of them and truncated to `bits` bits.
"""

import os
import sys
from collections import Counter

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
from genperf.kernels.nearest_code import launch, nearest_code, rows, shape
from genperf.kernels.nearest_code import search as second_look

from genperf import testing
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
        (33, 80), (64, 20), (128, 9), (129, 150), (257, 5), (1024, 70),
    ):  # fmt: skip
        x, codebook = testing.vectors("random", 5 if d < 100 else 1, k, d, (torch.float32, torch.float16)[d % 2], "cpu")
        check(("regime", d, k), x.unsqueeze(-1), codebook, None, d % 3 == 0)

    # Data on which a bound that is too small, or a wrong tie-break, gives a wrong index.
    for kind in ("random", "clustered", "offset", "tied", "near_ties"):
        for n, k, d in ((1, 1, 1), (8, 70, 12), (9, 190, 24)):
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
            check(("repeated", d, cosine), x, codebook[:1].expand(60 if d == 4 else 200, d), None, cosine)
            check(("zero codes", d, cosine), x, torch.cat([codebook * 0, codebook]), None, cosine)
            scales = ((1e-41, 1e15), (1e-24, 1e38))[d == 4]
            scaled = torch.cat([x * scale for scale in scales]).clamp(-3e38, 3e38)
            check(("queries", d, cosine), torch.cat([scaled, x * 0]), close, None, cosine)
            for scale in scales:
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
        if d in (13, 300):
            check(("heads", d), heads.contiguous(), codebooks.contiguous(), None, d == 13)
        check(("one head", d), heads[:1], codebooks[:1])

    # Several tiles of rows to a program and several programs over the codes, of sizes that divide nothing.
    most_programs = shape.MIN_PROGRAMS, launch.MAX_PROGRAMS
    for d, k, most, least in ((3, 500, 1, 40), (24, 200, 1, 1), (140, 140, 2, 99), (300, 140, 1, 1)):
        shape.MIN_PROGRAMS, launch.MAX_PROGRAMS = least, most
        mask = torch.arange(300).unsqueeze(1) % 60 == 9
        x, codebook = testing.vectors("near_ties", 150, k, d, torch.float32, "cpu")
        check(("programs", d), torch.cat([x.unsqueeze(-1), vectors(150, d)]), codebook, mask)
    x, codebook = torch.randn(2, 129, 5, 1), torch.randn(2, 340, 5)
    check("programs of heads", x, codebook, (torch.arange(129) % 32 == 0).expand(2, -1).unsqueeze(-1))

    shape.MIN_PROGRAMS, launch.MAX_PROGRAMS = most_programs
    launch.Shape = WideShape
    for d in (20, 200, 400):
        x, codebook = testing.vectors("near_ties", 6, 150, d, torch.float32, "cpu")
        check(("tiles of sm_90", d), torch.cat([x, codebook[:2]]).unsqueeze(-1), codebook)
    launch.Shape = shape.Shape
    assert nearest_code(vectors(0, 5), torch.randn(7, 5), None, False).shape == (0, 1)
    torch.set_default_dtype(torch.float64)
    check("default dtype", vectors(9, 6).float(), torch.randn(50, 6, dtype=torch.float32))
    torch.set_default_dtype(torch.float32)


class WideShape(shape.Shape):
    """That of sm_90, without tensor descriptors."""

    def __init__(self, dim, num_codes, device):
        super().__init__(dim, num_codes, 9)
        self.tma = False


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

    # The form tf32 has the bits of float16.
    for form, dims in (("tf32", (33, 64, 140) if fails else (33,)), ("split", (5, 20)), ("split product", (5, 20) if fails else ())):
        for d in dims:
            model()
            x, codebook = adversarial.aligned_roundings(form, d, 140, (5, 77), "euclidean", adversarial.seeded(d))
            check((form, d), x.unsqueeze(-1), codebook, None, False, fails)
        if not dims:
            continue
        model()
        x, codebook = adversarial.aligned_roundings(form, dims[-1], 140, (40, 7), "cosine", adversarial.seeded(d))
        check((form, "cosine"), x.unsqueeze(-1), codebook, None, True, fails)
    if not fails:
        return
    for d in (3, 20, 64):
        model()
        x, codebook = adversarial.rounded_additions(d, adversarial.seeded(d, 1))
        check(("additions", d), x.unsqueeze(-1), codebook)
    for i, (family, make) in enumerate(adversarial.FAMILIES.items()):
        model()
        d = (9, 30, 2)[i % 3]
        x, codebook = make(d, adversarial.seeded(d))
        step = max(1, len(x) // 6)
        check((family, d), x[::step].unsqueeze(-1), codebook[:190], None, i % 4 == 0)


whole_row_bound = rows.row_bound


@triton.jit
def half_row_bound(square, error, low_square, back, dim, columns, COSINE: tl.constexpr):
    at_length, at_residual, at_zero, length = whole_row_bound(square, error, low_square, back, dim, columns, COSINE)
    return at_length * 0.5, at_residual * 0.5, at_zero * 0.5, length


@triton.jit
def row_bound_of_eighth_accumulation(square, error, low_square, back, dim, columns, COSINE: tl.constexpr):
    return whole_row_bound(square, error, low_square, back, dim, (columns + 32) / 8 - 32, COSINE)


def lost_additions():
    """Operands that are exact in float16, of which the tensor cores lose all products of the nearest code but the first.

    The other code has almost the same sum in products that are not lost. Without an error of the operands, the bound is that of the sums.
    """
    d, small = 128, 2.0**-11 * (1 - 2.0**-11)
    code, other = torch.zeros(2, d)
    code[0] = other[0] = 1
    code[4:] = small
    other[4:42] = 3 * 2.0**-11
    codebook = torch.stack([other, code, -other, -code])
    x = torch.full((1, d), 2.0**-12)
    x[0, 0], x[0, 1:4] = 1, 0
    return 2.0**14 * x, codebook


def accumulation(fails=True):
    InterpreterBuilder.create_dot = tensor_core(4, 24)
    x, codebook = lost_additions()
    check("lost additions", torch.cat([x, -x]).unsqueeze(-1), codebook, None, False, fails)


ways = Counter()


class CountedSettle:
    """The kernel that settles rows, with a count of those that the pass has decided."""

    arg_names = launch.nearest_code_settle_kernel.arg_names
    kernel = launch.nearest_code_settle_kernel

    def __getitem__(self, grid):
        def run(*args, **options):
            named = dict(zip(self.arg_names, args, strict=False))
            first, last = named["first"], named["last"]
            ways["certificate"] += int(((first >= 0) & (last == -1)).sum())
            ways["pair"] += int(((first >= 0) & (last >= 0)).sum())
            ways["box"] += int(((first >= 0) & (last < -1)).sum())
            ways["list"] += int((first < 0).sum())
            return self.kernel[grid](*args, **options)

        return run


candidates_in_float32 = second_look.candidates_in_float32


def counted_candidates(*args):
    found, complete = candidates_in_float32(*args)
    present, decided = args[2].handle.data, complete.handle.data
    ways["float32"] += int((present & decided).sum())
    ways["float64"] += int((present & ~decided).sum())
    return found, complete


def hard_data(n, k, d):
    """Name, queries, codes, whether the metric is cosine, and whether rows may need float64 for all codes."""
    x, codes = torch.randn(n, d), torch.randn(k, d)

    def repeated(times):
        return codes[: -(-k // times)].repeat(times, 1)[torch.randperm(-(-k // times) * times)]

    yield "normal", x, codes, False, False
    yield "cosine", x, codes, True, False
    yield "half precision", x.half(), codes.half(), False, False
    yield "near the codes", codes[torch.randint(k, (n,))] + 0.5 * x, codes, False, False
    yield "offset of 100", x + 100, codes + 100, False, False
    for size in (3, 30):
        longer = codes.clone()
        longer[k // 2] *= size
        yield f"one code {size} times as long", x, longer, False, False
    for times in (2, 4, 16, 100):
        yield f"each code {times} times", x, repeated(times), False, False
    yield "all codes equal", x, codes[:1].expand(k, d), False, False
    yield "all codes zero", x, codes * 0, False, False
    yield "codes of 1 / K", x, (2 * torch.rand(k, d) - 1) / k, False, False
    replaced = (2 * torch.rand(k, d) - 1) / k
    replaced[::40] = torch.randn(len(replaced[::40]), d)
    yield "some of them replaced", x, replaced, False, False
    center = torch.randn(8, d)
    yield "codes around 8 centers, 1e-3", x, center[torch.randint(8, (k,))] + 1e-3 * codes, False, False
    yield "codes around 8 centers, 1e-6", x, center[torch.randint(8, (k,))] + 1e-6 * codes, False, True
    on_sphere = torch.nn.functional.normalize(codes, dim=1)
    yield "zero queries, codes of length 1", x * 0, on_sphere, False, True
    yield "zero queries, cosine", x * 0, codes, True, False
    infinite = x.clone()
    infinite[::2, 0], infinite[1::2, 1] = torch.inf, torch.nan
    yield "infinite and NaN", infinite, codes, False, False
    yield "queries of 1e20", 1e20 * x, codes, False, True


def count_ways(n, k, d, printed):
    """Count the ways of rows, each row once: all codes in one part."""
    shape.SEARCH_PROGRAMS = launch.SEARCH_PROGRAMS = shape.MIN_PROGRAMS = 1
    launch.nearest_code_settle_kernel = CountedSettle()
    second_look.candidates_in_float32 = counted_candidates
    if printed:
        print(f"N = {n}, K = {k}, D = {d}, percent\n| data | certificate | pair | box | list | of these float32 | float64 with all codes |")
        print("|---|---|---|---|---|---|---|")
    for name, x, codes, cosine, in_float64 in hard_data(n, k, d):
        ways.clear()
        check(name, x.unsqueeze(-1), codes, None, cosine)
        if printed:
            kinds = ("certificate", "pair", "box", "list", "float32", "float64")
            print(f"| {name} |" + "".join(f" {100 * ways[kind] / n:.1f} |" for kind in kinds), flush=True)
        assert sum(ways[kind] for kind in ("certificate", "pair", "box", "list")) == n
        assert in_float64 or ways["float64"] == 0, (name, ways)
        # Repeated codes are dropped, but for the few that another code has driven out of the hash table.
        assert "times" not in name or ways["certificate"] + ways["pair"] + ways["box"] > 0.9 * n, (name, ways)


def with_row_bound(function, check_rows):
    rows.row_bound = function
    check_rows(fails=False)
    rows.row_bound = whole_row_bound


PARTS = {
    "suite": suite,
    "bound": lambda: (bound(), accumulation()),
    "half_bound": lambda: with_row_bound(half_row_bound, bound),
    "accumulation": lambda: with_row_bound(row_bound_of_eighth_accumulation, accumulation),
    "ways": lambda: count_ways(32, 200, 12, printed=False),
}

if __name__ == "__main__":
    patch_once()
    if len(sys.argv) == 5:
        torch.manual_seed(0)
        count_ways(*map(int, sys.argv[2:]), printed=True)
        sys.exit()
    for part in sys.argv[1:]:
        torch.manual_seed(0)
        shape.SEARCH_PROGRAMS = launch.SEARCH_PROGRAMS = 3
        wrong_rows = 0
        PARTS[part]()
        InterpreterBuilder.create_dot = plain_dot
        launch.Shape = shape.Shape
        print(part, wrong_rows, flush=True)
