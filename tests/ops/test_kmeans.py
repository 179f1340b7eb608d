# SPDX-License-Identifier: Apache-2.0
import importlib
import math
from itertools import pairwise

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import genperf
from genperf import testing

pytestmark = [pytest.mark.compiled, pytest.mark.search]


fitting, vectors = (importlib.import_module(f"genperf.ops._kmeans_{name}") for name in ("fit", "vectors"))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def clusters(count, codes, dim, spread, seed=0):
    """Vectors around random centers; spread is the distance between centers relative to the width of a cluster."""
    generator = seeded(seed)
    centers = spread * torch.randn(codes, dim, generator=generator)
    return centers[torch.randint(codes, (count,), generator=generator)] + torch.randn(count, dim, generator=generator)


def lloyd(x, codebook, iterations, cosine=False):
    """Lloyd's algorithm in float64 with the full distance matrix; requires that no cluster becomes empty."""
    x, codebook = x.double(), codebook.double()
    if cosine:
        x = x / x.norm(dim=1, keepdim=True)
    for turn in range(iterations + 1):
        indices = torch.cdist(x, codebook, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
        if turn < iterations:
            codebook = torch.stack([x[indices == k].mean(0) for k in range(len(codebook))])
            if cosine:
                codebook = codebook / codebook.norm(dim=1, keepdim=True)
    return codebook, indices, (x - codebook[indices]).square().sum()


def check_consistent(found, x, metric="euclidean"):
    """Check that indices, counts and inertia belong to the codebook."""
    assert torch.equal(found.indices, genperf.nearest_code(x, found.codebook, metric=metric, impl="reference"))
    assert torch.equal(found.counts, torch.bincount(found.indices.flatten(), minlength=len(found.codebook)).to(found.counts.dtype))
    vectors, codes = x.double(), found.codebook.double()
    if metric == "cosine":
        vectors = torch.nn.functional.normalize(vectors, dim=-1)
        torch.testing.assert_close(codes.norm(dim=1), torch.ones_like(codes[:, 0]), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.inertia, (vectors - codes[found.indices]).square().sum(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, *testing.DTYPES], ids=str)
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_equals_lloyd(metric, dtype, device):
    x = clusters(600, 12, 5, 8).to(dtype).to(device)
    start = x[torch.randperm(600, generator=seeded())[:12].to(device)].to(torch.float64 if dtype == torch.float64 else torch.float32)
    if metric == "cosine":
        start = torch.nn.functional.normalize(start, dim=1)
    for iterations in (0, 1, 4):
        found = genperf.kmeans(x, 12, iterations=iterations, init=start, metric=metric)
        assert found.codebook.dtype == start.dtype
        check_consistent(found, x, metric)
        codebook, indices, inertia = lloyd(x, start, iterations, metric == "cosine")
        assert torch.equal(found.indices, indices)
        tolerance = 1e-12 if dtype == torch.float64 else 2e-6
        torch.testing.assert_close(found.codebook.double(), codebook, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(found.inertia, inertia, rtol=tolerance * 10, atol=0)


def test_far_from_the_origin(device):
    """Offset data give the same clusters as centered data."""
    x = clusters(500, 10, 4, 20).mul(8).round().to(device)  # exact in float32 with the offset
    found = genperf.kmeans(x, 10, generator=seeded())
    moved = genperf.kmeans(x + 4096, 10, generator=seeded())
    assert torch.equal(found.indices, moved.indices)
    torch.testing.assert_close(moved.codebook - 4096, found.codebook, rtol=0, atol=2e-3)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_inertia_never_increases(init, metric, device):
    x = clusters(1000, 20, 6, 2).to(device)
    inertia = [float(genperf.kmeans(x, 30, iterations=i, init=init, metric=metric, generator=seeded()).inertia) for i in range(12)]
    for before, after in pairwise(inertia):
        assert after <= before * (1 + 1e-6)
    assert inertia[-1] < 0.97 * inertia[0]


@pytest.mark.once  # importing scikit-learn takes as long as all else; other tests compare with Lloyd's algorithm and between seedings
@pytest.mark.parametrize(("count", "codes", "dim", "spread"), [(2000, 64, 16, 10), (2000, 40, 2, 8), (1500, 60, 8, 3), (1500, 32, 8, 0)])
def test_as_good_as_scikit_learn(count, codes, dim, spread, device):
    """The mean inertia over several seeds, compared with one run of scikit-learn's greedy k-means++ with as many iterations."""
    from sklearn.cluster import KMeans

    genperf_inertia, sklearn_inertia, random_inertia = [], [], []
    for seed in range(4):
        x = clusters(count, codes, dim, spread, seed)
        sklearn_inertia.append(KMeans(codes, n_init=1, max_iter=10, tol=0, random_state=seed).fit(x.numpy()).inertia_)
        for found, init in ((genperf_inertia, "k-means++"), (random_inertia, "random")):
            found.append(float(genperf.kmeans(x.to(device), codes, iterations=10, init=init, generator=seeded(seed)).inertia))
    ratio = sum(genperf_inertia) / sum(sklearn_inertia)
    print(f"inertia relative to scikit-learn: {ratio:.3f}, with random codes {sum(random_inertia) / sum(sklearn_inertia):.3f}")
    assert ratio < 1.02


def test_kmeans_plus_plus_finds_clusters_of_every_size(device):
    """Small distant clusters among large ones, which random initial codes miss."""
    generator = seeded()
    sizes = [4000, 1000, 300, *[12] * 17]  # descending
    x = torch.cat([torch.randn(n, 8, generator=generator) + 100 * torch.randn(8, generator=generator) for n in sizes]).to(device)
    found = genperf.kmeans(x, len(sizes), iterations=0, generator=seeded())
    assert sorted(found.counts.tolist()) == sizes[::-1]
    assert float(genperf.kmeans(x, len(sizes), init="random", generator=seeded()).inertia) > 5 * float(found.inertia)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_empty_clusters_are_replaced(metric, device):
    x = clusters(800, 16, 6, 6).to(device)
    far = torch.full((16, 6), 1024.0, device=device) * 2 ** torch.arange(16, device=device)[:, None]  # one direction
    far[3] = x[0]
    found = genperf.kmeans(x, 16, iterations=1, init=far, metric=metric)
    empty = torch.ones(16, dtype=torch.bool, device=device)
    empty[genperf.nearest_code(x, far, metric=metric)] = False
    assert empty.sum() >= 14
    moved = found.codebook[empty]
    assert len(moved.unique(dim=0)) == len(moved), "two codes at one vector"
    vectors = x if metric == "euclidean" else torch.nn.functional.normalize(x, dim=1)
    assert (torch.cdist(moved, vectors, compute_mode="donot_use_mm_for_euclid_dist").amin(1) < 1e-5).all()
    check_consistent(found, x, metric)
    found = genperf.kmeans(x, 16, init=far, metric=metric)
    assert (found.counts > 0).all()
    check_consistent(found, x, metric)


@pytest.mark.parametrize("init", ["k-means++", "random"])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_few_distinct_vectors(init, metric, device):
    """Duplicates, and fewer vectors than codes."""
    distinct = torch.randn(7, 4, device=device)
    for x in (distinct, distinct[:1], distinct.repeat(50, 1), torch.cat([distinct[:1].expand(500, -1), distinct])):
        found = genperf.kmeans(x, 12, iterations=8, init=init, metric=metric, generator=seeded())
        check_consistent(found, x, metric)
        assert found.inertia < 1e-10
        assert (found.counts > 0).sum() == len(x.unique(dim=0))


def test_as_many_codes_as_vectors(device):
    x = torch.randn(50, 3, device=device)
    for init in ("k-means++", "random"):
        found = genperf.kmeans(x, 50, init=init, generator=seeded())
        assert found.inertia < 1e-10
        assert (found.counts == 1).all()


def test_one_code_is_the_mean(device):
    x = torch.randn(300, 5, device=device)
    torch.testing.assert_close(genperf.kmeans(x, 1, iterations=1).codebook[0], x.mean(0))
    direction = torch.nn.functional.normalize(torch.nn.functional.normalize(x, dim=1).sum(0), dim=0)
    torch.testing.assert_close(genperf.kmeans(x, 1, iterations=1, metric="cosine").codebook[0], direction)


def test_cosine_depends_on_directions_only(device):
    x = clusters(400, 8, 5, 5).to(device)
    scaled = x * 2.0 ** torch.randint(-20, 20, (400, 1), generator=seeded()).to(device)  # exact
    for init in ("k-means++", "random"):
        plain, other = (genperf.kmeans(data, 8, init=init, metric="cosine", generator=seeded()) for data in (x, scaled))
        assert torch.equal(plain.indices, other.indices)
        torch.testing.assert_close(plain.codebook, other.codebook)
    scaled[5] = 0
    found = genperf.kmeans(scaled, 8, metric="cosine", generator=seeded())
    assert found.codebook.isfinite().all()
    assert found.inertia.isfinite()


@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_result_depends_on_the_generator(init, device, set_threads):
    x = torch.randn(400, 6, device=device)

    def run(generator):
        return genperf.kmeans(x, 20, iterations=3, init=init, generator=generator).codebook

    testing.check_randomness(run, device)
    first = run(seeded())
    set_threads(3)
    assert torch.equal(run(seeded()), first)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_layouts_agree(metric, device):
    x = clusters(256, 9, 7, 3).to(device)
    expected = genperf.kmeans(x, 9, metric=metric, generator=seeded())
    for name, (laid_out, channel_dim) in testing.layouts(x).items():
        found = genperf.kmeans(laid_out, 9, metric=metric, channel_dim=channel_dim, generator=seeded())
        shape = list(laid_out.shape)
        shape.pop(channel_dim)
        assert list(found.indices.shape) == shape, name
        assert torch.equal(found.indices.flatten(), expected.indices), name
        torch.testing.assert_close(found.codebook, expected.codebook, msg=lambda text, name=name: f"{name}: {text}")


def test_native_equals_reference(device):
    x = clusters(300, 10, 6, 3).to(device)
    found = [genperf.kmeans(x, 10, iterations=3, generator=seeded(), impl=impl) for impl in (None, "reference")]
    assert torch.equal(found[0].indices, found[1].indices)
    torch.testing.assert_close(found[0].codebook, found[1].codebook)


@pytest.mark.parametrize("init", ["k-means++", "random", "tensor"])
def test_heads_equal_single_calls(init, device):
    x = torch.randn(2, 3 * 5, 6, 7, device=device).unflatten(1, (3, 5)).movedim(1, 0)  # [heads, B, D, H, W]
    start = torch.randn(3, 8, 5, device=device)
    generators = seeded(), seeded()
    inits = start if init == "tensor" else [init] * 3
    found = genperf.kmeans(x, 8, iterations=4, init=start if init == "tensor" else init, channel_dim=2, heads=True, generator=generators[0])
    assert (found.codebook.shape, found.indices.shape, found.counts.shape, found.inertia.shape) == ((3, 8, 5), (3, 2, 6, 7), (3, 8), (3,))
    for head in range(3):
        single = genperf.kmeans(x[head], 8, iterations=4, init=inits[head], channel_dim=1, generator=generators[1])
        for one, all_heads in zip(single, found, strict=True):
            assert torch.equal(one, all_heads[head])


def test_large_data_are_processed_in_chunks(device, monkeypatch):
    for shape, channel_dim in (((300, 6), -1), ((6, 300), 0), ((20, 6, 15), 1)):
        for metric in ("euclidean", "cosine"):
            x = torch.randn(shape, device=device)
            whole = genperf.kmeans(x, 9, iterations=2, metric=metric, channel_dim=channel_dim, generator=seeded())
            with monkeypatch.context() as patch:
                patch.setattr(vectors, "_CHUNK", 100)
                patch.setattr(vectors, "_SEARCH_CHUNK", 200)
                parts = genperf.kmeans(x, 9, iterations=2, metric=metric, channel_dim=channel_dim, generator=seeded())
            assert torch.equal(parts.indices, whole.indices)
            torch.testing.assert_close(parts, whole)


def test_no_distance_matrix(device):
    if device != "cpu":
        pytest.skip("the profiler counts memory of the CPU.")
    x = torch.randn(20000, 4)
    assert testing.largest_allocation(lambda: genperf.kmeans(x, 500, iterations=1)) < 20000 * 500 / 8


def test_inputs_are_not_changed_or_differentiated(device):
    x, start = torch.randn(50, 4, device=device, requires_grad=True), torch.randn(6, 4, device=device)
    before = x.detach().clone(), start.clone()
    for iterations in (0, 3):
        found = genperf.kmeans(x, 6, iterations=iterations, init=start)
        assert not found.codebook.requires_grad
        found.codebook.zero_()
        assert torch.equal(x, before[0])
        assert torch.equal(start, before[1])


def test_poisoned_memory(device):
    x = torch.randn(200, 5, device=device)
    expected = genperf.kmeans(x, 20, generator=seeded())
    with testing.poisoned_memory():
        found = genperf.kmeans(x, 20, generator=seeded())
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.once
@pytest.mark.parametrize("init", ["k-means++", "random"])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_no_device_synchronization(init, metric, monkeypatch):
    """The GPU path on fake tensors, where reading a value, or a shape that depends on one, is an error."""
    monkeypatch.setattr(vectors, "_on_host", lambda device: False)
    with FakeTensorMode():
        x = torch.empty(2, 8, 5, 7, dtype=torch.bfloat16)
        found = genperf.kmeans(x, 30, iterations=2, init=init, metric=metric, channel_dim=1)
        shapes = [(t.shape, t.dtype) for t in found]
    assert shapes == [((30, 8), torch.float32), ((2, 5, 7), torch.int64), ((30,), torch.float32), ((), torch.float64)]


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_skipping_the_checks_of_values_has_no_effect(metric, device, monkeypatch):
    """Without checking whether codes are empty or have converged, the result is the same."""
    x = clusters(200, 10, 4, 5).to(device)
    start = x[:10].clone()
    start[5:] = 1e4
    looked = [genperf.kmeans(x, 10, iterations=i, init=start, metric=metric) for i in (1, 2, 40)]
    monkeypatch.setattr(vectors, "_on_host", lambda device: False)
    blind = [genperf.kmeans(x, 10, iterations=i, init=start, metric=metric) for i in (1, 2, 40)]
    for a, b in zip(looked, blind, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


def bad(message, error=ValueError, **kwargs):
    return pytest.param(message, error, {"x": torch.zeros(10, 3), "num_codes": 4} | kwargs, id=message[:40])


@pytest.mark.parametrize(
    ("message", "error", "kwargs"),
    [
        bad("x must be a tensor", TypeError, x=[1.0]),
        bad("x must be float32", TypeError, x=torch.zeros(10, 3, dtype=torch.int64)),
        bad("at least one vector", x=torch.zeros(0, 3)),
        bad("at least one vector", x=torch.zeros(3, 0)),
        bad("num_codes must be at least 1, got 0", num_codes=0),
        bad("iterations must not be negative, got -1", iterations=-1),
        bad("init must be one of", init="farthest"),
        bad("init must be one of", init=None),
        bad(r"shape of the codebook, \[4, 3\], got \[3, 4\]", init=torch.zeros(3, 4)),
        bad(r"shape of the codebook, \[10, 4, 2\], got \[4, 2\]", x=torch.zeros(10, 3, 2), heads=True, init=torch.zeros(4, 2)),
        bad("init must be float32", TypeError, init=torch.zeros(4, 3, dtype=torch.int64)),
        bad("one device", init=torch.zeros(4, 3, device="meta")),
        bad("metric must be one of", metric="manhattan"),
        bad("channel_dim must be a dimension", channel_dim=2),
        bad("dimension 0 of x is the heads", heads=True, channel_dim=0),
        bad("generator must be a torch.Generator", TypeError, generator=3),
        bad("impl must be None or one of", impl="fast"),
        bad("has no such implementation", NotImplementedError, impl="triton"),
    ],
)
def test_bad_input(message, error, kwargs):
    with pytest.raises(error, match="kmeans: .*" + message):
        genperf.kmeans(**kwargs)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nonfinite_data(value, device):
    x = torch.randn(100, 3, device=device)
    x[4, 1] = value
    if device == "cpu":
        with pytest.raises(ValueError, match="kmeans: x must be finite"):
            genperf.kmeans(x, 5, iterations=3, generator=seeded())
    else:
        found = genperf.kmeans(x, 5, iterations=3, generator=seeded())
        assert ((found.indices >= 0) & (found.indices < 5)).all()
