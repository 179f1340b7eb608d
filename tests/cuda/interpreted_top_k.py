# SPDX-License-Identifier: Apache-2.0
"""The Triton search of the k nearest codes in the interpreter. A script, run by test_top_k_interpret.py.

It checks shapes, layouts, heads, ties, lists that overflow and values that are not finite; and, on a model of the tensor cores, adversarial
data. Then it searches a part of that with half of the bound, and prints the number of wrong rows.
"""

import interpreted_search as nearest  # chooses the interpreter
import test_nearest_code_bound as adversarial
import torch
from genperf.kernels.nearest_code import rows, shape, top_k
from triton.runtime.interpreter import InterpreterBuilder

from genperf import testing
from genperf.ops.nearest_codes import nearest_codes_reference

wrong_rows = 0
Shape = top_k.TopKShape


class SmallShape(Shape):
    """Fewer rows than a program has on a device, since the interpreter computes all of them."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.block_n = 16


def check(what, x, codebook, k, cosine=False, fails=True):
    global wrong_rows
    indices, distances = nearest_codes_reference(x.transpose(-2, -1), codebook, k, "cosine" if cosine else "euclidean")
    with testing.poisoned_memory():
        found, measured = top_k.nearest_codes(x, codebook, k, cosine, True)
    wrong = (found != indices).any(-1).nonzero()
    wrong_rows += len(wrong)
    assert found.shape == indices.shape
    if fails:
        assert not len(wrong), (what, k, len(wrong), found[tuple(wrong[0])], indices[tuple(wrong[0])])
        assert torch.equal(measured, distances), (what, k)


def suite():
    # Operands that are split, held and streamed; one and several tiles; k from 1 to 64.
    for d, codes, k in ((1, 150, 2), (4, 300, 8), (40, 140, 20), (140, 70, 64), (257, 40, 5)):
        x, codebook = testing.vectors("random", 5 if k < 64 else 2, codes, d, (torch.float32, torch.float16)[d % 2], "cpu")
        check(("regime", d), x.unsqueeze(-1), codebook, k, d % 4 == 0)
    for kind in ("offset", "tied", "near_ties"):
        x, codebook = testing.vectors(kind, 5, 140, 12, torch.float32, "cpu")
        check(kind, x.unsqueeze(-1), codebook, 9, kind == "tied")

    x, codebook = nearest.vectors(4, 11), torch.randn(25, 11)
    check("all codes", x, codebook, 25)
    check("more equal codes than a list holds", x, torch.cat([codebook, codebook[:1].expand(280, 11)]), 6)
    outlier = codebook.clone()
    outlier[20] *= 1e5  # is not scored
    check("outlier", x[:2], outlier, 24)
    check("lengths", torch.cat([x * scale for scale in (0.1, 20.0)]), torch.cat([codebook, 30 * codebook, 1000 * codebook]), 3)
    for cosine in (False, True):
        bad, codes = x.clone(), codebook.clone()
        bad[0, 2], bad[1, 0], bad[3, 1] = torch.nan, torch.inf, -torch.inf
        codes[7, 1], codes[0, 0], codes[9, 3] = torch.nan, torch.inf, -torch.inf
        check("not finite", bad, codes, 9, cosine)
        check("zeros", torch.cat([x * 0, x]), torch.cat([codebook * 0, codebook]), 3, cosine)
    check("tiny", x * 1e-41, codebook, 4, True)

    x, codebook = torch.randn(2, 30, 3), torch.randn(30, 30)
    check("planar", x, codebook, 4)
    check("transposed", x.transpose(1, 2).contiguous().transpose(1, 2).half(), codebook.t().contiguous().t(), 4)
    heads, codebooks = torch.randn(2, 26, 2).unflatten(1, (2, 13)).movedim(1, 0), torch.randn(30, 2, 13).transpose(0, 1)
    codebooks[1] += 100
    check("heads", heads, codebooks, 3)

    # Several tiles of rows to a program, with and without several programs over the codes.
    top_k.TopKShape = Shape
    for d, codes, most, least in ((3, 700, 1, 8), (24, 300, 1, 1)):
        shape.MIN_PROGRAMS, top_k.MAX_PROGRAMS = least, most
        top_k._plan.cache_clear()
        check(("programs", d), nearest.vectors(80, d), torch.randn(codes, d), 5)
    found, measured = top_k.nearest_codes(nearest.vectors(3, 5), torch.randn(70, 5), 2, False, False)
    assert (found.shape, measured.shape) == ((3, 1, 2), (0,))
    assert top_k.nearest_codes(nearest.vectors(0, 5), torch.randn(7, 5), 2, False, True)[1].shape == (0, 1, 2)


def bound(fails=True):
    number = 0

    def model():
        nonlocal number
        InterpreterBuilder.create_dot = nearest.tensor_core((4, 8, 16)[number % 3], (24, 25, 27)[number // 3 % 3])
        number += 1

    for form, d in (("tf32", 64), ("split", 20), ("split product", 5)):  # tf32 has the bits of float16
        model()
        x, codebook = adversarial.aligned_roundings(form, d, 70, (5, 60), "euclidean", adversarial.seeded(d))
        check((form, d), x.unsqueeze(-1), codebook, 1, False, fails)
        if not fails:
            return
    families = ("rings", "one_bit", "permutations", "outlier_component", "wide_range", "ladder")
    for i, family in enumerate(families):
        model()
        d = (9, 30, 2)[i % 3]
        x, codebook = adversarial.FAMILIES[family](d, adversarial.seeded(d))
        check((family, d), x[:: max(1, len(x) // 4)].unsqueeze(-1), codebook[:200], (3, 12)[i % 2], i % 4 == 0)


if __name__ == "__main__":
    torch.manual_seed(0)
    top_k.TopKShape = SmallShape
    suite()
    top_k.TopKShape = SmallShape
    bound()
    rows.row_bound = nearest.half_row_bound
    bound(fails=False)
    print(wrong_rows)
