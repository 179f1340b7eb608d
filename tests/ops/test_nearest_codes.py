# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import test_nearest_code_bound as adversarial
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import genperf
from genperf import _library, testing

pytestmark = [pytest.mark.compiled, pytest.mark.search]

METRICS = ("euclidean", "cosine")


def check(x, codebook, k, metric="euclidean", message=""):
    """Indices and distances equal those of the reference, and the first column that of nearest_code."""
    expected, distances = genperf.nearest_codes(x, codebook, k, metric=metric, return_distances=True, impl="reference")
    found = genperf.nearest_codes(x, codebook, k, metric=metric)
    wrong = (found != expected).any(-1).nonzero().flatten().tolist()
    assert not wrong, (
        f"{len(wrong)} of {len(x)} rows wrong, {message} {metric}, k={k}, D={codebook.shape[-1]}: "
        f"row {wrong[0]} is {found[wrong[0]].tolist()}, exactly {expected[wrong[0]].tolist()}"
    )
    again, measured = genperf.nearest_codes(x, codebook, k, metric=metric, return_distances=True)
    assert torch.equal(again, expected), message
    if x.dtype == torch.float64 and metric == "cosine":  # PyTorch's square root is not rounded correctly
        torch.testing.assert_close(measured, distances, rtol=0, atol=4e-16)
    else:
        assert torch.equal(measured, distances), message
    assert torch.equal(found[..., 0], genperf.nearest_code(x, codebook, metric=metric)), message


@pytest.mark.parametrize("metric", METRICS)
def test_reference_is_the_stable_sort_of_the_distances(metric, device):
    """The lines of the docstring."""
    x, codebook = testing.vectors("random", 40, 50, 7, torch.float64, device)
    if metric == "euclidean":
        direct = (x[:, None] - codebook).square().sum(-1)
    else:
        direct = 1 - torch.nn.functional.normalize(x, dim=-1) @ torch.nn.functional.normalize(codebook, dim=-1).T
    direct, order = direct.sort(dim=-1, stable=True)
    indices, distances = genperf.nearest_codes(x, codebook, 5, metric=metric, return_distances=True, impl="reference")
    assert torch.equal(indices, order[:, :5])
    torch.testing.assert_close(distances, direct[:, :5])
    assert genperf.nearest_codes(x.float(), codebook.float(), 5, return_distances=True)[1].dtype == torch.float32


@pytest.mark.parametrize("dtype", [*testing.DTYPES, torch.float64], ids=str)
def test_kinds_of_data(dtype, device):
    for kind in ("random", "clustered", "offset", "tied", "near_ties"):
        for n, num_codes, d, k in [(1, 1, 1, 1), (33, 70, 5, 1), (40, 70, 9, 64), (33, 300, 20, 8), (64, 1000, 40, 17), (9, 64, 100, 64)]:
            x, codebook = testing.vectors(kind, n, num_codes, d, dtype, device, seed=d)
            check(x, codebook, k, METRICS[d % 2], kind)


@pytest.mark.parametrize("family", adversarial.FAMILIES)
def test_families(family, device):
    """Near-ties, copies, outliers, wide ranges: see test_nearest_code_bound.py."""
    for number, dim in enumerate((2, 9, 20, 64)):
        x, codebook = (t.to(device) for t in adversarial.FAMILIES[family](dim, adversarial.seeded(dim)))
        check(x, codebook, (2, 8, 33, 5)[number], METRICS[(number + 1) % 2], family)


@pytest.mark.unsanitized
@pytest.mark.parametrize("form", adversarial.MIDWAY)
@pytest.mark.parametrize("dim", [5, 20, 64])
def test_gaps_inside_and_outside_the_bound(form, dim, device):
    """The two nearest codes differ by about the error bound, and all roundings favor the wrong one."""
    for metric in METRICS:
        x, codebook = adversarial.aligned_roundings(form, dim, 400, (15, 16), metric, adversarial.seeded(dim))
        for k in (1, 2, 9):
            check(x.to(device), codebook.to(device), k, metric, form)


def test_every_k(device):
    x, codebook = testing.vectors("near_ties", 12, 64, 12, torch.float32, device)
    whole = genperf.nearest_codes(x, codebook, 64, impl="reference")
    for k in range(1, 65):
        assert torch.equal(genperf.nearest_codes(x, codebook, k), whole[:, :k])


def test_codes_in_the_order_of_their_distances(device):
    """Every code is nearer than all before it, or farther, so that a list of candidates fills as often as it can."""
    x = torch.zeros(40, 24, device=device)
    radii = torch.linspace(1, 2, 3000, device=device).unsqueeze(1)
    codebook = torch.nn.functional.normalize(torch.randn(3000, 24, generator=adversarial.seeded(1)).to(device), dim=1) * radii
    check(x + 1e-3, codebook, 20)
    check(x + 1e-3, codebook.flip(0), 20)


def test_more_equal_codes_than_a_list_holds(device):
    codebook = torch.randn(9000, 12, generator=adversarial.seeded(2)).to(device)
    codebook[::2] = codebook[0]
    check(codebook[:34] + 0.01, codebook, 64)


@pytest.mark.unsanitized
def test_codebook_of_several_panels(device):
    """Ties across the borders of the panels."""
    _, codebook = testing.vectors("random", 1, 3700, 4096, torch.float32, device)
    codebook[3500:] = codebook[:200]
    x = codebook[[0, 199, 2000, 3650]] + 1e-3
    x[2, 5] = math.nan
    expected = genperf.nearest_codes(x, codebook, 64, return_distances=True, impl="reference")
    for k in (1, 64):
        found = genperf.nearest_codes(x, codebook, k, return_distances=True)
        assert all(torch.equal(a, b[:, :k]) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("metric", METRICS)
def test_nonfinite_values(metric, device):
    x, codebook = testing.vectors("random", 40, 90, 20, torch.float32, device)
    x[3, 5], x[4, 0], x[5, 1] = math.nan, math.inf, -math.inf
    codebook[7, 2], codebook[8, 3], codebook[0, 0] = math.nan, math.inf, math.nan
    for k in (1, 6, 64):
        check(x, codebook, k, metric)
    indices, distances = genperf.nearest_codes(x, codebook, 6, metric=metric, return_distances=True)
    assert indices[3].tolist() == list(range(6))
    assert distances[3].isinf().all()
    assert not torch.isin(indices[6:], torch.tensor([0, 7, 8], device=device)).any()
    # Fewer finite codes than k: those with infinite distances follow in order.
    codebook[2:] = math.nan
    assert genperf.nearest_codes(x[:1], codebook, 5, metric=metric).tolist() == [[1, 0, 2, 3, 4]]
    check(x, codebook, 5, metric)


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e30])
def test_extreme_scales(scale, device):
    x, codebook = testing.vectors("random", 35, 120, 19, torch.float32, device)
    for a, b in ((x * scale, codebook * scale), (x * scale, codebook), (x, codebook * scale)):
        check(a, b, 4)
        check(a, b, 4, "cosine")


def test_layouts_and_heads(device):
    x, codebook = testing.vectors("random", 60, 90, 7, torch.float32, device)
    expected = genperf.nearest_codes(x, codebook, 5, impl="reference")
    for name, (laid_out, channel_dim) in testing.layouts(x).items():
        found = genperf.nearest_codes(laid_out, codebook, 5, channel_dim=channel_dim)
        shape = list(laid_out.shape)
        shape.pop(channel_dim)
        assert list(found.shape) == [*shape, 5], name
        assert torch.equal(found.flatten(0, -2), expected), name
    assert torch.equal(genperf.nearest_codes(x, codebook.t().contiguous().t(), 5), expected)

    image, codebooks = torch.randn(2, 24, 3, 5, device=device), torch.randn(40, 3, 8, device=device).transpose(0, 1)
    heads = image.unflatten(1, (3, 8)).movedim(1, 0)
    indices, distances = genperf.nearest_codes(heads, codebooks, 4, channel_dim=2, return_distances=True)
    assert indices.shape == distances.shape == (3, 2, 3, 5, 4)
    for head in range(3):
        alone = genperf.nearest_codes(heads[head], codebooks[head], 4, channel_dim=1, return_distances=True, impl="reference")
        assert torch.equal(indices[head], alone[0])
        assert torch.equal(distances[head], alone[1])


def test_mixed_dtypes(device):
    for dtype in (torch.bfloat16, torch.float16):
        x, _ = testing.vectors("random", 50, 1, 33, dtype, device)
        _, codebook = testing.vectors("random", 1, 200, 33, torch.float32, device)
        check(x, codebook, 6)


def test_threads_and_batches_have_no_effect(device, set_threads):
    x, codebook = testing.vectors("near_ties", 700, 400, 24, torch.float32, device)
    whole = genperf.nearest_codes(x, codebook, 9)
    assert torch.equal(torch.cat([genperf.nearest_codes(part, codebook, 9) for part in x.split(141)]), whole)
    for count in (1, 2, 5):
        set_threads(count)
        assert torch.equal(genperf.nearest_codes(x, codebook, 9), whole)


def test_empty_and_single(device):
    codebook = torch.randn(5, 3, device=device)
    indices, distances = genperf.nearest_codes(torch.empty(2, 3, 0, device=device), codebook, 2, channel_dim=1, return_distances=True)
    assert indices.shape == distances.shape == (2, 0, 2)
    assert genperf.nearest_codes(torch.empty(0, 3, device=device), codebook, 2, impl="reference").shape == (0, 2)
    single = genperf.nearest_codes(codebook[2], codebook, 5)
    assert single.shape == (5,)
    assert single[0] == 2


def test_memory_and_inputs(device):
    with testing.poisoned_memory():
        x, codebook = testing.vectors("random", 130, 70, 21, torch.float32, device)
        before = x.clone(), codebook.clone()
        check(x, codebook, 7)
    assert torch.equal(x, before[0])
    assert torch.equal(codebook, before[1])
    x.requires_grad_()
    assert not any(found.requires_grad for found in genperf.nearest_codes(x, codebook, 2, return_distances=True))


@pytest.mark.once
def test_no_distance_matrix():
    if _library.cpu_failure is not None:
        pytest.skip(f"no compiled ops: {_library.cpu_failure}")
    x, codebook = testing.vectors("random", 500, 2000, 8, torch.float32, "cpu")
    assert testing.largest_allocation(lambda: genperf.nearest_codes(x, codebook, 4)) <= 500 * 4 * 8


@pytest.mark.once
def test_contract(device):
    image, codebook = torch.randn(2, 6, 35, device=device), torch.randn(9, 6, device=device)
    heads, codebooks = torch.randn(3, 2, 6, 5, device=device), torch.randn(3, 9, 6, device=device)
    testing.check_op(
        "nearest_codes",
        [(image.transpose(0, 2).contiguous().transpose(0, 2), codebook, 3, True, True), (heads, codebooks, 2, False, False)],
    )
    sizes = [
        (torch.randn(3, 5, 8, device=device), torch.randn(10, 8, device=device)),
        (torch.randn(2, 7, 8, device=device), torch.randn(33, 8, device=device)),
    ]
    testing.check_compile(lambda x, codebook: genperf.nearest_codes(x, codebook, 4, return_distances=True), *sizes)


def test_shapes_on_fake_cuda_tensors():
    if _library.triton_failure is not None:
        pytest.skip(f"no Triton search: {_library.triton_failure}")
    with FakeTensorMode():
        x, codebook = torch.empty(3, 2, 8, 5, 7, device="cuda"), torch.empty(3, 30, 8, device="cuda")
        indices, distances = genperf.nearest_codes(x, codebook, 6, channel_dim=2, return_distances=True, impl="triton")
        assert (indices.shape, indices.dtype, indices.device.type) == ((3, 2, 5, 7, 6), torch.int64, "cuda")
        assert (distances.shape, distances.dtype) == ((3, 2, 5, 7, 6), torch.float32)


def bad(message, *args, error=ValueError, **kwargs):
    return pytest.param(message, error, args, kwargs, id=message[:40])


GOOD = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("message", "error", "args", "kwargs"),
    [
        bad("k must lie between 1 and 64, got 0", GOOD, torch.zeros(5, 3), 0),
        bad("k must lie between 1 and 64, got 65", GOOD, torch.zeros(100, 3), 65),
        bad(r"k must be at most the number of codes, got k=6 and a codebook \[5, 3\]", GOOD, torch.zeros(5, 3), 6),
        bad("k must be at most the number of codes", GOOD, torch.zeros(4, 5, 3), 6),
        bad("codebook must have shape", GOOD, torch.zeros(3), 1),
        bad("as long as a code", GOOD, torch.zeros(5, 2), 1),
        bad("metric must be one of", GOOD, torch.zeros(5, 3), 1, metric="manhattan"),
        bad("codebook must have the dtype of x", GOOD, torch.zeros(5, 3).double(), 1, error=TypeError),
        bad("impl='triton' cannot run here", GOOD, torch.zeros(5, 3), 1, impl="triton", error=NotImplementedError),
    ],
)
def test_bad_input(message, error, args, kwargs):
    with pytest.raises(error, match="nearest_codes: .*" + message):
        genperf.nearest_codes(*args, **kwargs)
