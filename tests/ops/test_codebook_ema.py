# SPDX-License-Identifier: Apache-2.0
"""The compiled kernel of an EMA update beside the same steps in plain PyTorch."""

import pytest
import torch

import genperf
from genperf import _library
from genperf.nn import ResidualVectorQuantizer, VectorQuantizer
from genperf.nn._ema import codebook_from_ema, ema_update_, follow_codes_, normalize_codes
from genperf.nn._ema_kernel import run_kernel

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.skipif(_library.cpu_failure is not None, reason=str(_library.cpu_failure)),
]

CODES, DIM = 37, 21


def state(dtype, *codebooks, normalize=False):
    """Codes, averages that are theirs but for a third of the codes, and the statistics of a batch that leaves codes out."""
    torch.manual_seed(0)
    codes = torch.randn(*codebooks, CODES, DIM, dtype=torch.float64)
    codes = (normalize_codes(codes) if normalize else codes).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    counts = torch.rand(*codebooks, CODES, dtype=wide) * 4
    moved = codes.to(wide).clone()
    moved[..., ::3, :] *= 1.5
    sums = moved * counts.unsqueeze(-1)
    batch_counts = torch.randint(3, (*codebooks, CODES)).to(wide)
    batch_sums = torch.randn(*codebooks, CODES, DIM, dtype=wide) * batch_counts.unsqueeze(-1)
    return codes, counts, sums, batch_counts, batch_sums


def plain(codes, counts, sums, batch_counts, batch_sums, decay, eps, normalize, follow):
    if follow:
        follow_codes_(codes, counts, sums, eps, normalize)
    ema_update_(counts, sums, batch_counts, batch_sums, decay)
    codebook_from_ema(counts, sums, eps, out=codes)
    if normalize:
        codes.copy_(normalize_codes(codes))


@pytest.mark.parametrize("follow", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("codebooks", [(), (3,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_kernel_equals_plain_pytorch(dtype, codebooks, normalize, follow):
    for decay in (0.0, 0.4, 0.99):
        found, expected = (state(dtype, *codebooks, normalize=normalize) for _ in range(2))
        if codebooks:  # one of them without a vector, which keeps its averages
            for statistics in (found, expected):
                statistics[3][1], statistics[4][1] = 0, 0
        assert run_kernel(*found, decay, 1e-5, normalize=normalize, follow=follow)
        plain(*expected, decay, 1e-5, normalize, follow)
        tolerance = 1e-13 if dtype == torch.float64 else 1e-6
        for name, own, other in zip(("codes", "counts", "sums"), found, expected, strict=False):
            step = 0 if own.dtype in (torch.float32, torch.float64) else torch.finfo(dtype).eps
            torch.testing.assert_close(own, other, rtol=max(tolerance, step), atol=tolerance, msg=name)


def test_a_graph_that_saved_the_codes_notices_the_update():
    codes, *rest = state(torch.float32)
    x = torch.randn(CODES, DIM, requires_grad=True)
    product = x * codes
    assert run_kernel(codes, *rest, 0.9, 1e-5, normalize=False, follow=False)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_what_the_kernel_cannot_write_is_left_to_pytorch():
    codes, *rest = state(torch.float32)
    kept = codes.clone()
    options = {"normalize": False, "follow": False}
    assert not run_kernel(codes.T.contiguous().T, *rest, 0.9, 1e-5, **options)
    assert not run_kernel(codes, *(t.double() for t in rest), 0.9, 1e-5, **options)
    with genperf.reference_ops():
        assert not run_kernel(codes, *rest, 0.9, 1e-5, **options)
    assert torch.equal(codes, kept)


@pytest.mark.parametrize("threads", [1, 2])
def test_result_does_not_depend_on_the_number_of_threads(threads, set_threads):
    found = state(torch.float32)
    large = [t.repeat(64, *[1] * (t.dim() - 1)) for t in found]
    expected = [t.clone() for t in large]
    set_threads(1)
    run_kernel(*expected, 0.9, 1e-5, normalize=True, follow=True)
    set_threads(threads)
    run_kernel(*large, 0.9, 1e-5, normalize=True, follow=True)
    assert all(map(torch.equal, large, expected))


@pytest.mark.parametrize("layer", [VectorQuantizer, ResidualVectorQuantizer])
def test_layers_update_by_the_kernel(layer):
    """The kernel, not the steps that it replaces, runs in a training step."""
    torch.manual_seed(0)
    quantizer = layer(8, 4, decay=0.9) if layer is VectorQuantizer else layer(2, 8, 4, decay=0.9)
    with torch.profiler.profile() as profile:
        quantizer(torch.randn(32, 4))
    names = [event.key for event in profile.key_averages()]
    assert "genperf::codebook_ema" in names
    assert "aten::lerp_" not in names
