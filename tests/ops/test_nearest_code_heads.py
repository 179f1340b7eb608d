# SPDX-License-Identifier: Apache-2.0
import math
from itertools import product

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import genperf
from genperf import _library, testing
from genperf.ops.nearest_code import _as_head_positions

pytestmark = [pytest.mark.compiled, pytest.mark.search]


def head_by_head(x, codebook, metric="euclidean"):
    """Search x [heads, ..., D] with the reference, head by head."""
    found = [genperf.nearest_code(a, b, metric=metric, impl="reference") for a, b in zip(x, codebook, strict=True)]
    return torch.stack(found)


def heads_of(kind, heads, n, k, d, dtype, device):
    pairs = [testing.vectors(kind, n, k, d, dtype, device, seed=head) for head in range(heads)]
    x, codebook = (torch.stack(part) for part in zip(*pairs, strict=True))
    return x, codebook


@pytest.mark.parametrize("dtype", [*testing.DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["random", "offset", "tied", "near_ties"])
def test_every_head_has_its_own_codebook(kind, dtype, device):
    for heads, (n, k, d) in product((1, 3), [(1, 1, 1), (70, 33, 5), (33, 300, 20), (257, 70, 64)]):
        x, codebook = heads_of(kind, heads, n, k, d, dtype, device)
        for metric in ("euclidean", "cosine"):
            found = genperf.nearest_code(x, codebook, metric=metric)
            assert (found.shape, found.dtype) == ((heads, n), torch.int64)
            assert torch.equal(found, head_by_head(x, codebook, metric)), (heads, n, k, d, metric)


def test_heads_of_different_scale(device):
    """An error bound or a center shared by the heads would be wrong for one of them."""
    x, codebook = heads_of("random", 4, 200, 300, 16, torch.float32, device)
    for head, (scale, offset) in enumerate([(1e-3, 0), (1, 500), (1e4, 0), (1, -1e5)]):
        x[head], codebook[head] = x[head] * scale + offset, codebook[head] * scale + offset
    assert torch.equal(genperf.nearest_code(x, codebook), head_by_head(x, codebook))


def test_one_head_is_the_plain_search(device):
    x, codebook = testing.vectors("random", 300, 200, 12, torch.float32, device)
    assert torch.equal(genperf.nearest_code(x[None], codebook[None])[0], genperf.nearest_code(x, codebook))


def test_many_heads_of_few_vectors(device):
    x, codebook = heads_of("random", 40, 3, 17, 8, torch.float32, device)
    assert torch.equal(genperf.nearest_code(x, codebook), head_by_head(x, codebook))
    assert torch.equal(genperf.nearest_code(x[:, 0], codebook), head_by_head(x, codebook)[:, 0])


def head_views(heads, d, device):
    """Views of multi-head layers: name, x with heads first, its channel_dim."""
    image = torch.randn(2, heads * d, 5, 6, device=device)
    tokens = torch.randn(2, 30, heads * d, device=device)
    spaced = torch.full((heads, 4, 2 * d + 1, 9), math.nan, device=device)
    spaced[:, :, 1::2] = torch.randn(heads, 4, d, 9, device=device)
    return [
        ("image", image.unflatten(1, (heads, d)).movedim(1, 0), 2),
        ("channels_last", image.contiguous(memory_format=torch.channels_last).unflatten(1, (heads, d)).movedim(1, 0), 2),
        ("tokens", tokens.unflatten(-1, (heads, d)).movedim(-2, 0), -1),
        ("interleaved", tokens.unflatten(-1, (d, heads)).movedim(-1, 0), 3),
        ("one_vector_each", tokens[:, 0].unflatten(-1, (heads, d)).movedim(1, 0), 2),
        ("channel_first", torch.randn(heads, d, 4, 5, device=device), 1),
        ("spaced", spaced[:, :, 1::2], 2),
        ("backwards", torch.randn(7, d, heads, device=device).movedim(-1, 0), 2),
        ("expanded", torch.randn(11, d, device=device).expand(heads, -1, -1), -1),
    ]


def test_views_are_not_copied(device):
    heads, d = 3, 8
    codebook = torch.randn(heads, 40, d, device=device)
    for name, x, channel_dim in head_views(heads, d, device):
        expected = head_by_head(x.movedim(channel_dim, -1), codebook)
        assert torch.equal(genperf.nearest_code(x, codebook, channel_dim=channel_dim), expected), name
        assert _as_head_positions(x, channel_dim % x.dim()).untyped_storage().data_ptr() == x.untyped_storage().data_ptr(), name


def test_layouts_without_a_view_are_copied(device):
    x = torch.randn(3, 4, 5, 8, 6, device=device)[:, :, :, :, ::2].transpose(1, 2)[:, :, 1:]
    codebook = torch.randn(3, 40, 8, device=device)
    assert torch.equal(genperf.nearest_code(x, codebook, channel_dim=3), head_by_head(x.movedim(3, -1), codebook))


def test_layouts_of_the_codebook(device):
    x, codebook = heads_of("random", 3, 60, 50, 9, torch.float32, device)
    expected = head_by_head(x, codebook)
    assert torch.equal(genperf.nearest_code(x, codebook.transpose(1, 2).contiguous().transpose(1, 2)), expected)
    assert torch.equal(genperf.nearest_code(x, codebook.movedim(0, 1).contiguous().movedim(1, 0)), expected)
    shared = codebook[:1].expand(3, -1, -1)
    assert torch.equal(genperf.nearest_code(x, shared), head_by_head(x, shared))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_codebook_with_half_input(dtype, device):
    x, _ = heads_of("random", 2, 100, 1, 33, dtype, device)
    _, codebook = heads_of("random", 2, 1, 200, 33, torch.float32, device)
    assert torch.equal(genperf.nearest_code(x, codebook), head_by_head(x, codebook))


def test_nonfinite_values_stay_in_their_head(device):
    x, codebook = heads_of("random", 3, 40, 50, 20, torch.float32, device)
    expected = head_by_head(x, codebook)
    x[1, 3, 2], x[1, 4, 0], codebook[1, 7, 1], codebook[1, 8, 1] = math.nan, math.inf, math.nan, math.inf
    found = genperf.nearest_code(x, codebook)
    assert torch.equal(found, head_by_head(x, codebook))
    assert torch.equal(found[[0, 2]], expected[[0, 2]])


def test_mask(device):
    x, codebook = heads_of("random", 3, 70, 30, 6, torch.float32, device)
    positions = x.unflatten(1, (2, 35)).transpose(2, 3)  # [heads, outer, D, inner]
    mask = torch.rand(3, 2, 35, device=device) > 0.3
    found = torch.ops.genperf.nearest_code(positions, codebook, mask, False)
    assert torch.equal(found, head_by_head(x, codebook).unflatten(1, (2, 35)).masked_fill(~mask, -1))
    # A mask of other strides.
    found = torch.ops.genperf.nearest_code(positions, codebook, mask.movedim(0, -1).contiguous().movedim(-1, 0), False)
    assert torch.equal(found, head_by_head(x, codebook).unflatten(1, (2, 35)).masked_fill(~mask, -1))


def test_no_vectors(device):
    codebook = torch.randn(3, 5, 4, device=device)
    assert genperf.nearest_code(torch.empty(3, 0, 4, device=device), codebook).shape == (3, 0)
    assert genperf.nearest_code(torch.empty(3, 2, 4, 0, device=device), codebook, channel_dim=2).shape == (3, 2, 0)
    assert genperf.nearest_code(codebook[:, 2], codebook).tolist() == [2, 2, 2]


def test_threads_have_no_effect(device, set_threads):
    x, codebook = heads_of("near_ties", 3, 500, 200, 24, torch.float32, device)
    whole = genperf.nearest_code(x, codebook)
    for count in (1, 2, 5):
        set_threads(count)
        assert torch.equal(genperf.nearest_code(x, codebook), whole)


@pytest.mark.once
def test_contract(device):
    x, codebook = torch.randn(3, 2, 6, 35, device=device), torch.randn(3, 9, 6, device=device)
    mask = torch.rand(3, 2, 35, device=device) > 0.3
    testing.check_op("nearest_code", [(x, codebook, None, False), (x.movedim(0, 1).contiguous().movedim(1, 0), codebook, mask, True)])
    sizes = [
        (torch.randn(3, 5, 8, device=device), torch.randn(3, 10, 8, device=device)),
        (torch.randn(2, 7, 8, device=device), torch.randn(2, 33, 8, device=device)),
    ]
    testing.check_compile(lambda x, codebook: (genperf.nearest_code(x, codebook),), *sizes)


@pytest.mark.once
def test_compiled_view_of_a_layer(device):
    def layer(x, codebook):
        return genperf.nearest_code(x.unflatten(1, (2, 4)).movedim(1, 0), codebook, channel_dim=2)

    torch._dynamo.reset()
    x, codebook = torch.randn(3, 8, 5, 6, device=device), torch.randn(2, 20, 4, device=device)
    compiled = torch.compile(layer, fullgraph=True)
    assert torch.equal(compiled(x, codebook), layer(x, codebook))


def test_shapes_on_fake_cuda_tensors():
    if _library.cuda_failure is not None:
        pytest.skip(f"no CUDA library: {_library.cuda_failure}")
    with FakeTensorMode():
        x, codebook = torch.empty(3, 2, 8, 5, 7, device="cuda"), torch.empty(3, 30, 8, device="cuda")
        found = genperf.nearest_code(x, codebook, channel_dim=2)
        assert (found.shape, found.dtype, found.device.type) == ((3, 2, 5, 7), torch.int64, "cuda")


GOOD = torch.zeros(2, 4, 3)


@pytest.mark.parametrize(
    ("message", "x", "codebook", "kwargs"),
    [
        (r"codebook must have shape \[K, D\] or \[heads, K, D\], got \[1, 2, 5, 3\]", GOOD, torch.zeros(1, 2, 5, 3), {}),
        ("as many heads", GOOD, torch.zeros(3, 5, 3), {}),
        ("as many heads", GOOD, torch.zeros(1, 5, 3), {}),
        ("at least one head", GOOD[:0], torch.zeros(0, 5, 3), {}),
        ("at least one code", GOOD, torch.zeros(2, 0, 3), {}),
        ("dimension 0 of x is the heads", GOOD, torch.zeros(2, 5, 2), {"channel_dim": 0}),
        ("dimension 0 of x is the heads", GOOD, torch.zeros(2, 5, 2), {"channel_dim": -3}),
        ("dimension 0 of x is the heads", torch.zeros(3), torch.zeros(2, 5, 3), {}),
        ("as long as a code, got 3 channels", GOOD, torch.zeros(2, 5, 4), {}),
        ("channel_dim must be a dimension", GOOD, torch.zeros(2, 5, 3), {"channel_dim": 3}),
    ],
)
def test_bad_input(message, x, codebook, kwargs):
    with pytest.raises(ValueError, match="nearest_code: .*" + message):
        genperf.nearest_code(x, codebook, **kwargs)


def test_vector_quantize_has_one_codebook():
    with pytest.raises(ValueError, match=r"vector_quantize: codebook must have shape \[K, D\]"):
        genperf.vector_quantize(GOOD, torch.zeros(2, 5, 3))
