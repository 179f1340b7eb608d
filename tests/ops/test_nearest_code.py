# SPDX-License-Identifier: Apache-2.0
import math
from functools import partial
from itertools import product

import pytest
import torch

import genperf
from genperf import testing

pytestmark = [pytest.mark.compiled, pytest.mark.search]

KINDS = ("random", "clustered", "offset", "tied", "near_ties")


def exact(x, codebook, metric="euclidean"):
    """The indices of the reference.

    A matrix product in float64 leaves it the rows, and of the codes the candidates, that its rounding does not decide: the reference adds
    the components in order, which takes ten times as long.
    """
    reference = partial(genperf.nearest_code, metric=metric, impl="reference")
    if metric != "euclidean" or x.dtype == torch.float64 or not (x.isfinite().all() and codebook.isfinite().all()):
        return reference(x, codebook)
    rows, codes = x.double() - codebook[0].double(), codebook.double() - codebook[0].double()
    scores = codes.square().sum(1) - 2 * rows @ codes.T  # squared distances, less a constant of each row
    lengths = rows.norm(dim=1, keepdim=True) + codes.norm(dim=1).max()
    rounding = 8 * (x.shape[1] + 8) * 2.0**-53 * lengths.square()  # of two scores, and of two sums of the reference
    near = scores <= scores.min(1, keepdim=True).values + rounding
    found = near.long().argmax(1)
    undecided = near.sum(1) > 1
    candidates = near[undecided].any(0).nonzero().flatten()
    if undecided.any():
        found[undecided] = candidates[reference(x[undecided], codebook[candidates])]
    return found


@pytest.mark.unsanitized
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_row_is_the_float64_argmin(kind, dtype, device):
    for n, k, d in product(testing.ODD_SIZES, repeat=3):
        if n * k * d > 1e7 and (kind, dtype) != ("random", torch.float32):
            n = 31  # the reference is slow
        x, codebook = testing.vectors(kind, n, k, d, dtype, device, seed=n + k + d)
        found = genperf.nearest_code(x, codebook)
        wrong = int((found != exact(x, codebook)).sum())
        assert wrong == 0, f"{wrong} of {n} rows wrong at N={n}, K={k}, D={d}"


def test_reference_is_the_argmin_of_the_distances(device):
    x, codebook = testing.vectors("random", 200, 300, 17, torch.float64, device)
    direct = (x[:, None] - codebook).square().sum(-1).argmin(-1)
    assert torch.equal(exact(x, codebook), direct)
    cosine = torch.nn.functional.cosine_similarity(x[:, None], codebook, dim=-1).argmax(-1)
    assert torch.equal(exact(x, codebook, "cosine"), cosine)


@pytest.mark.parametrize("dtype", [*testing.DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_metrics_and_dtypes(metric, dtype, device):
    for kind in KINDS:
        for n, k, d in [(100, 50, 3), (257, 300, 20), (65, 700, 100)]:
            x, codebook = testing.vectors(kind, n, k, d, dtype, device)
            assert torch.equal(genperf.nearest_code(x, codebook, metric=metric), exact(x, codebook, metric)), (kind, n, k, d)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_codebook_with_half_input(dtype, device):
    x, _ = testing.vectors("random", 300, 1, 33, dtype, device)
    _, codebook = testing.vectors("random", 1, 500, 33, torch.float32, device)
    assert torch.equal(genperf.nearest_code(x, codebook), exact(x, codebook))


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_layouts_agree(dtype, device):
    for n, k, d in [(1, 3, 2), (256, 300, 33), (1000, 70, 7)]:
        x, codebook = testing.vectors("random", n, k, d, dtype, device)
        expected = exact(x, codebook)
        for name, (laid_out, channel_dim) in testing.layouts(x).items():
            found = genperf.nearest_code(laid_out, codebook, channel_dim=channel_dim)
            shape = list(laid_out.shape)
            shape.pop(channel_dim)
            assert list(found.shape) == shape, name
            assert torch.equal(found.flatten(), expected), name
        assert torch.equal(genperf.nearest_code(x, codebook.t().contiguous().t()), expected)


def test_batches_and_threads_have_no_effect(device, set_threads):
    x, codebook = testing.vectors("near_ties", 3000, 400, 24, torch.float32, device)
    whole = genperf.nearest_code(x, codebook)
    assert torch.equal(torch.cat([genperf.nearest_code(part, codebook) for part in x.split(701)]), whole)
    set_threads(1)
    assert torch.equal(genperf.nearest_code(x, codebook), whole)


def test_codebook_larger_than_a_panel(device):
    """Enough codes for several panels, with ties across their borders."""
    _, codebook = testing.vectors("random", 1, 30000, 256, torch.float32, device)
    codebook[17000:] = codebook[:13000]
    x = codebook[::1000] + 1e-3
    assert torch.equal(genperf.nearest_code(x, codebook), exact(x, codebook))


@pytest.mark.parametrize("spread", [1e-30, 1e-18, 1e18, 1e30])
def test_extreme_scales(spread, device):
    x, codebook = testing.vectors("random", 100, 200, 19, torch.float32, device)
    assert torch.equal(genperf.nearest_code(x * spread, codebook * spread), exact(x * spread, codebook * spread))
    assert torch.equal(genperf.nearest_code(x * spread, codebook), exact(x * spread, codebook))
    assert torch.equal(genperf.nearest_code(x, codebook * spread), exact(x, codebook * spread))


def test_adversarial_codes_just_inside_the_bound(device):
    """Codes whose distances differ by less than the coarse pass resolves."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 48, generator=generator)
    for gap in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7):
        directions = torch.nn.functional.normalize(torch.randn(500, 48, generator=generator), dim=1)
        radii = 1 + gap * torch.rand(500, 1, generator=generator)
        codebook = (x[:1] + directions * radii).to(device)
        assert torch.equal(genperf.nearest_code(x.to(device), codebook), exact(x.to(device), codebook)), gap


@pytest.mark.parametrize("dim", [5, 8, 64, 512])
@pytest.mark.parametrize("length", [1e-2, 1e-4, 1e-5, 1e-7])
def test_queries_much_shorter_than_codes(length, dim, device):
    """Codes f and -f: their scores differ by far less than |f|^2 / 2."""
    generator = torch.Generator().manual_seed(0)
    codebook = torch.nn.functional.normalize(torch.randn(512, dim, generator=generator), dim=1)
    codebook = torch.cat([codebook, -codebook]).to(device)
    x = (torch.randn(200, dim, generator=generator) / dim**0.5 * length).to(device)
    assert torch.equal(genperf.nearest_code(x, codebook), exact(x, codebook))


@pytest.mark.parametrize("length", [1e-19, 1e-21, 1e-23, 1e-24, 1e-30, 1e-38, 1e-42])
def test_cosine_of_tiny_queries(length, device):
    """Lengths whose squares underflow in float32."""
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randn(128, 16, generator=generator)
    codebook = torch.cat([codebook, codebook + 1e-4 * torch.randn(128, 16, generator=generator)]).to(device)
    x = (torch.randn(48, 16, generator=generator) * length).to(device)
    assert torch.equal(genperf.nearest_code(x, codebook, metric="cosine"), exact(x, codebook, "cosine"))


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_float64_beyond_the_range_of_float32(metric, device):
    for scale in (1e60, 1e-60, 1e-160, 1e-200):
        x, codebook = testing.vectors("random", 40, 90, 16, torch.float64, device)
        x[0], codebook[3] = 0, 0
        for a, b in ((x, codebook * scale), (x * scale, codebook), (x * scale, codebook * scale)):
            assert torch.equal(genperf.nearest_code(a, b, metric=metric), exact(a, b, metric)), scale
    x, codebook = torch.zeros(1, 16, dtype=torch.float64, device=device), torch.full((2, 16), 1.1e60, dtype=torch.float64, device=device)
    codebook[1] = 0.53e60
    assert torch.equal(genperf.nearest_code(x, codebook, metric=metric), exact(x, codebook, metric))


def test_large_blocks(device):
    """Enough codes that a block has more than 32."""
    x, codebook = testing.vectors("random", 20, 70000, 3, torch.float32, device)
    assert torch.equal(genperf.nearest_code(x, codebook), exact(x, codebook))


def test_default_dtype_has_no_effect(device):
    x, codebook = testing.vectors("random", 20, 30, 5, torch.float32, device)
    expected = exact(x, codebook)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(genperf.nearest_code(x, codebook), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_ties_go_to_the_lowest_index(device):
    for count in (2, 40, 1000):
        codebook = torch.ones(count, 16, device=device)
        assert (genperf.nearest_code(torch.randn(50, 16, device=device), codebook) == 0).all()


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_nonfinite_values(metric, device):
    x, codebook = testing.vectors("random", 60, 90, 20, torch.float32, device)
    x[3, 5], x[4, 0], x[5, 1] = math.nan, math.inf, -math.inf
    codebook[7, 2], codebook[8, 3], codebook[0, 0] = math.nan, math.inf, math.nan
    found = genperf.nearest_code(x, codebook, metric=metric)
    assert torch.equal(found, exact(x, codebook, metric))
    assert found[3] == 0
    finite = torch.ones(60, dtype=torch.bool)
    finite[3:6] = False
    assert not torch.isin(found[finite], torch.tensor([0, 7, 8], device=device)).any()
    codebook[:] = math.nan
    assert (genperf.nearest_code(x, codebook, metric=metric) == 0).all()


def test_empty_and_single(device):
    codebook = torch.randn(5, 3, device=device)
    assert genperf.nearest_code(torch.empty(0, 3, device=device), codebook).shape == (0,)
    assert genperf.nearest_code(torch.empty(2, 3, 0, 4, device=device), codebook, channel_dim=1).shape == (2, 0, 4)
    single = genperf.nearest_code(codebook[2], codebook)
    assert single.shape == ()
    assert single == 2


def test_poisoned_memory(device):
    with testing.poisoned_memory():
        x, codebook = testing.vectors("random", 130, 70, 21, torch.float32, device)
        assert torch.equal(genperf.nearest_code(x, codebook), exact(x, codebook))


def test_inputs_are_not_changed_or_differentiated(device):
    x, codebook = testing.vectors("random", 10, 20, 4, torch.float32, device)
    before = x.clone(), codebook.clone()
    x.requires_grad_()
    assert not genperf.nearest_code(x, codebook).requires_grad
    assert torch.equal(x, before[0])
    assert torch.equal(codebook, before[1])


@pytest.mark.once
def test_contract(device):
    image, codebook = torch.randn(2, 6, 35, device=device), torch.randn(9, 6, device=device)
    mask = torch.rand(2, 35, device=device) > 0.3
    testing.check_op(
        "nearest_code",
        [
            (image, codebook, None, False),
            (image.transpose(0, 2).contiguous().transpose(0, 2), codebook, None, True),
            (image, codebook, mask, False),
        ],
    )
    sizes = [
        (torch.randn(3, 5, 8, device=device), torch.randn(10, 8, device=device)),
        (torch.randn(2, 7, 8, device=device), torch.randn(33, 8, device=device)),
    ]
    testing.check_compile(lambda x, codebook: (genperf.nearest_code(x, codebook),), *sizes)


def bad(message, *args, error=ValueError, **kwargs):
    return pytest.param(message, error, args, kwargs, id=message[:40])


GOOD = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("message", "error", "args", "kwargs"),
    [
        bad("codebook must have shape", GOOD, torch.zeros(3)),
        bad("at least one code", GOOD, torch.zeros(0, 3)),
        bad("as long as a code", GOOD, torch.zeros(5, 2)),
        bad(r"as long as a code, got 4 channels .*; channel_dim=1 is that dimension of x", GOOD, torch.zeros(5, 3), channel_dim=0),
        bad("channel_dim must be a dimension", GOOD, torch.zeros(5, 3), channel_dim=2),
        bad("channel_dim must be a dimension", torch.tensor(1.0), torch.zeros(5, 3)),
        bad("metric must be one of", GOOD, torch.zeros(5, 3), metric="manhattan"),
        bad("impl must be None or one of", GOOD, torch.zeros(5, 3), impl="fast"),
        bad("one device", GOOD, torch.zeros(5, 3, device="meta")),
        bad("x must be float32", GOOD.int(), torch.zeros(5, 3), error=TypeError),
        bad("codebook must have the dtype of x", GOOD, torch.zeros(5, 3).double(), error=TypeError),
        bad("x must be a tensor", [1.0], torch.zeros(5, 3), error=TypeError),
        bad("impl='triton' cannot run here", GOOD, torch.zeros(5, 3), impl="triton", error=NotImplementedError),
    ],
)
def test_bad_input(message, error, args, kwargs):
    with pytest.raises(error, match="nearest_code: .*" + message):
        genperf.nearest_code(*args, **kwargs)
