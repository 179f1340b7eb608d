# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel of residual_vector_quantize in the interpreter. A script, as interpreted_search.py."""

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
from genperf.kernels.nearest_code import residual_launch
from genperf.kernels.nearest_code.residual_launch import residual_vector_quantize

from genperf import testing
from genperf.ops.residual_vector_quantize import ResidualOptions, quantize_residual


class SmallShape(residual_launch.ResidualShape):
    """Several tiles of rows to a program."""

    def __init__(self, dim, num_codes, device, rows):
        super().__init__(dim, num_codes, 9, rows)
        self.block_n, self.block_k, self.tma, self.programs = 32, 64, False, 1
        self.fit(1)


residual_launch.ResidualShape = SmallShape


def check(what, x, codebooks, mask=None, limit=None, cosine=False):
    metric, options = "cosine" if cosine else "euclidean", ResidualOptions(1.0, 0.0, False)
    limit = None if limit is None else torch.tensor(limit)
    quantized, indices, losses = quantize_residual(x, codebooks, mask, limit, metric, options, "reference")
    with testing.poisoned_memory():
        found = residual_vector_quantize(x, codebooks, mask, limit, cosine)
    assert torch.equal(found[1], indices), (what, (found[1] != indices).nonzero(), found[1][found[1] != indices])
    torch.testing.assert_close(found[0], quantized, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{what}: {text}")
    assert found[0].stride() == torch.empty_like(x).stride(), what
    torch.testing.assert_close(found[2], losses, rtol=1e-5, atol=0, equal_nan=True, msg=lambda text: f"{what}: {text}")
    assert found[3] == (x.shape[0] * x.shape[2] if mask is None else mask.sum()), what


def residual_codebooks(x, quantizers, num_codes):
    """Codes near the residuals, as after training."""
    rows = x.movedim(1, -1).flatten(0, -2).float()
    chosen = torch.randint(len(rows), (quantizers, num_codes))
    shrink = 0.5 ** torch.arange(quantizers).reshape(-1, 1, 1)
    return (rows[chosen] + 0.3 * torch.randn(quantizers, num_codes, x.shape[1])) * shrink


if __name__ == "__main__":
    torch.manual_seed(0)
    # Split operands, half-precision inputs, ties, masks and a limit; layouts.
    x = torch.randint(-3, 3, (2, 1, 20)).half()
    check("integers", x, torch.randint(-2, 3, (3, 70, 1)).float(), torch.rand(2, 20) > 0.3, 2)
    x = torch.randn(3, 7, 15)
    check("planar", x, residual_codebooks(x, 2, 80), None, 9, True)
    spaced = torch.full((2, 40, 30), torch.nan)[:, ::2, ::3]
    check("strided", spaced.copy_(torch.randn(2, 20, 10)), torch.randn(20, 2, 50).permute(1, 2, 0), None, 0)
    for d in (64, 128, 200):
        x = torch.randn(40 if d == 64 else 5, d, 1)
        check(("held", d), x, residual_codebooks(x, 2, 70 if d == 64 else 20), torch.rand(x.shape[0], 1) > 0.2)

    # Repeated codes, a codebook of one code, near-ties that only the order of additions decides, a code far longer than the others,
    # and queries that are not finite or have no bound: every way to a decision.
    d = 33
    x, codebook = torch.randn(9, d, 1), torch.randn(60, d)
    close = codebook[:1] + 1e-7 * torch.randn(60, d)
    twice, often = torch.cat([codebook[:30]] * 2), torch.cat([codebook[:10]] * 6)
    outlier = codebook.clone()
    outlier[50] *= 1e5
    x[0, 2], x[1, 0], x[2, 1], x[3] = torch.nan, torch.inf, -torch.inf, 1e30
    check("ways", x, torch.stack([codebook, twice, often, close, outlier, codebook[:1].expand(60, d)]))
    x[4] = 0
    check("ways of the cosine", x[:6, :5], torch.stack([codebook[:, :5], outlier[:, :5]]), None, None, True)
    check("one codebook", x[4:], twice.expand(3, -1, -1))
    check("all masked", x, twice.expand(2, -1, -1), torch.zeros(9, 1, dtype=torch.bool))
    for empty in (torch.zeros(0, 4, 3), torch.zeros(2, 4, 0)):
        check("empty", empty, torch.randn(2, 5, 4))
