# SPDX-License-Identifier: Apache-2.0
"""Options of k-means: restarts, weights, moving averages, balance, callbacks, mapped files; threads; what a GPU would run."""

import importlib
import math

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import genperf
from genperf import _library, testing

fitting, vectors, seeding = (importlib.import_module(f"genperf.ops._kmeans_{name}") for name in ("fit", "vectors", "init"))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def clusters(count, codes, dim, spread, seed=0):
    generator = seeded(seed)
    centers = spread * torch.randn(codes, dim, generator=generator)
    return centers[torch.randint(codes, (count,), generator=generator)] + torch.randn(count, dim, generator=generator)


def same(a, b):
    return all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("update", ["lloyd", "ema"])
def test_assignments_are_exact_in_every_iteration(update, metric):
    x, seen = clusters(700, 12, 6, 3), []

    def check(progress):
        assert torch.equal(progress.indices, genperf.nearest_code(x, progress.codebook, metric=metric, impl="reference"))
        assert torch.equal(progress.counts, torch.bincount(progress.indices, minlength=20).float())
        rows = x.double() if metric == "euclidean" else torch.nn.functional.normalize(x.double(), dim=1)
        expected = (rows - progress.codebook.double()[progress.indices]).square().sum()
        torch.testing.assert_close(progress.inertia, expected, rtol=1e-5, atol=0)
        seen.append((progress.restart, progress.iteration, float(progress.inertia)))

    found = genperf.kmeans(x, 20, iterations=4, n_init=2, update=update, metric=metric, callback=check, generator=seeded())
    assert [place[:2] for place in seen] == [(restart, turn) for restart in range(2) for turn in range(5)]
    assert float(found.inertia) == min(inertia for _, turn, inertia in seen if turn == 4)
    quiet = genperf.kmeans(x, 20, iterations=4, n_init=2, update=update, metric=metric, generator=seeded())
    assert same(found, quiet)


def test_callback_can_end_a_run():
    x, turns = clusters(200, 5, 3, 2), []
    found = genperf.kmeans(x, 9, callback=lambda p: turns.append(p.iteration) or p.iteration == 2, generator=seeded())
    assert turns == [0, 1, 2]
    assert same(found, genperf.kmeans(x, 9, iterations=2, generator=seeded()))
    heads = []
    genperf.kmeans(torch.stack([x, x]), 3, iterations=0, heads=True, callback=lambda p: heads.append(p.head))
    assert heads == [0, 1]


@pytest.mark.parametrize(
    "options", [{}, {"metric": "cosine"}, {"update": "ema"}, {"balance": 1.1}, {"init": "random", "n_init": 2}], ids=str
)
def test_threads_do_not_change_the_result(options, set_threads):
    x = torch.randn(1500, 20, dtype=torch.float64, generator=seeded())  # sums in another order differ in the last bits
    results = []
    for threads in (1, 2):
        set_threads(threads)
        results.append(genperf.kmeans(x, 40, iterations=4, generator=seeded(), **options))
    assert same(results[0], results[1])


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("channel_dim", [0, 1])
def test_updated_sums_equal_new_ones(channel_dim, metric, monkeypatch):
    x = torch.randn(900, 6, dtype=torch.float64, generator=seeded())  # sums in another order differ in the last bits
    x = x.movedim(1, channel_dim).contiguous()
    options = {"iterations": 12, "metric": metric, "channel_dim": channel_dim, "weights": torch.rand(900, generator=seeded())}
    results = []
    # Sums are updated, and a part of the codes searched, never, always, and in the end.
    for few, partial, chunk in ((-1, -1, 1 << 24), (2, 2, 1 << 24), (2, 2, 600), (2, 0.9, 1 << 24), (0.125, 0.5, 600)):
        monkeypatch.setattr(vectors, "_FEW", few)
        monkeypatch.setattr(vectors, "_PARTIAL", partial)
        monkeypatch.setattr(vectors, "_SEARCH_CHUNK", chunk)
        results.append(genperf.kmeans(x, 40, generator=seeded(), **options))
    assert all(same(results[0], other) for other in results[1:])


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize(("dtype", "zero"), [(torch.float32, False), (torch.float16, True), (torch.float64, False)], ids=str)
def test_search_of_changed_codes_is_exact(dtype, zero, metric, monkeypatch):
    """On a grid, where many vectors are as near to several codes, some vectors are zero, and codes repeat."""
    monkeypatch.setattr(vectors, "_FEW", 2)
    monkeypatch.setattr(vectors, "_PARTIAL", 3)
    x = torch.randint(-2, 3, (1500, 3), generator=seeded()).to(dtype)
    start = torch.cat([x[:40], x[:20]]).to(torch.float64 if dtype == torch.float64 else torch.float32)
    start[7] = 0 if zero else start[7]
    search, turns, sizes = vectors.search, [], []
    monkeypatch.setattr(vectors, "search", lambda rows, codes, *rest: sizes.append(len(codes)) or search(rows, codes, *rest))

    def check(progress):
        assert torch.equal(progress.indices, genperf.nearest_code(x, progress.codebook, metric=metric, impl="reference"))
        turns.append(progress.iteration)

    genperf.kmeans(x, 60, iterations=10, init=start, metric=metric, callback=check)
    assert len(turns) > 3
    assert min(sizes) < 30, "all codes were searched"


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("rounds", [16, 0])
def test_first_assignment_moves_the_vectors_of_merged_clusters(rounds, metric, monkeypatch):
    monkeypatch.setattr(seeding, "_MERGE_ROUNDS", rounds)  # without one, half of the clusters are left out, and their vectors have no code
    for x in (clusters(900, 30, 8, 2), torch.randn(20, 8).repeat(3, 1)):
        data = vectors.Vectors(x.unsqueeze(2), metric, "native", torch.rand(len(x), 1) + 0.5)
        codes, start = seeding.initial_codes(data, 40, seeded())
        codes = data.as_codes(codes, codes)
        assert (start.indices < 0).any() == (rounds == 0 and len(x) == 900)
        expected, found = data.assign(codes), data.assign(codes, start)
        assert torch.equal(found.indices, expected.indices)
        assert torch.equal(found.sums, expected.sums)


def test_best_of_several_runs():
    x = clusters(400, 30, 2, 12)
    single = [genperf.kmeans(x, 30, init="random", iterations=5, generator=seeded(seed)) for seed in range(4)]
    generator = seeded(0)
    runs = [genperf.kmeans(x, 30, init="random", iterations=5, generator=generator) for _ in range(4)]
    best = genperf.kmeans(x, 30, init="random", iterations=5, n_init=4, generator=seeded(0))
    assert same(best, min(runs, key=lambda found: float(found.inertia)))
    assert len({float(found.inertia) for found in single}) > 1


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_weights_are_repetitions(metric, device):
    x = clusters(300, 8, 4, 6).to(device)
    times = torch.randint(0, 4, (300,), generator=seeded()).to(device)
    repeated, start = x.repeat_interleave(times, 0), x[times > 0][:8]
    options = {"iterations": 5, "init": start, "metric": metric}
    weighted = genperf.kmeans(x, 8, weights=times.float(), **options)
    expected = genperf.kmeans(repeated, 8, **options)
    torch.testing.assert_close(weighted.codebook, expected.codebook, rtol=1e-6, atol=1e-6)
    assert torch.equal(weighted.counts, expected.counts)
    torch.testing.assert_close(weighted.inertia, expected.inertia)
    assert torch.equal(weighted.indices.repeat_interleave(times), expected.indices)
    drawn = genperf.kmeans(x, 40, iterations=0, weights=(times == 3).half(), metric=metric, generator=seeded(1))
    kept = x[times == 3] if metric == "euclidean" else torch.nn.functional.normalize(x[times == 3], dim=1)
    assert (drawn.codebook.amax(0) <= kept.amax(0) + 1e-6).all(), "a candidate without weight was drawn"


def test_weights_of_heads():
    x, weights = torch.randn(2, 90, 3), torch.rand(2, 90)
    found = genperf.kmeans(x, 5, heads=True, weights=weights, generator=seeded())
    generator = seeded()
    for head in range(2):
        assert same(genperf.kmeans(x[head], 5, weights=weights[head], generator=generator), [part[head] for part in found])


@pytest.mark.parametrize("spread", [0, 1])
def test_moving_averages_need_fewer_passes(spread, device):
    x = clusters(6000, 60, 8, spread).to(device)
    passes = {
        update: [genperf.kmeans(x, 50, iterations=i, init=x[:50], update=update, generator=seeded()) for i in (3, 10)]
        for update in ("lloyd", "ema")
    }
    assert passes["ema"][0].inertia < passes["lloyd"][0].inertia
    assert passes["ema"][0].inertia < 1.01 * passes["lloyd"][1].inertia
    assert passes["ema"][1].inertia < 1.005 * passes["lloyd"][1].inertia


def test_moving_averages_replace_dead_codes(device):
    x = clusters(997, 10, 4, 3).to(device)  # not a whole number of blocks
    start = x[:16].clone()
    start[6:] = 1e6
    for batch_size, decay in ((None, None), (100, 0.5), (5000, 0.0)):
        found = genperf.kmeans(x, 16, iterations=5, init=start, update="ema", batch_size=batch_size, decay=decay, generator=seeded())
        assert (found.counts > 0).all()
        assert found.codebook.abs().max() < 100
    few = genperf.kmeans(x[:20], 4, update="ema", generator=seeded())  # less than a block
    assert few.counts.sum() == 20


@pytest.mark.parametrize(
    ("count", "codes", "spread", "balance"), [(3000, 40, 3, 1.05), (999, 64, 0, 1.0), (500, 300, 1, 1.05), (9, 9, 1, 1.3)]
)
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_balance(metric, count, codes, spread, balance, device):
    x = clusters(count, 9, 6, spread).to(device)
    found = genperf.kmeans(x, codes, iterations=5, balance=balance, metric=metric, generator=seeded())
    capacity = max(math.floor(balance * count / codes), math.ceil(count / codes))
    assert found.counts.max() <= capacity
    assert torch.equal(found.counts, torch.bincount(found.indices, minlength=codes).float())
    rows = x if metric == "euclidean" else torch.nn.functional.normalize(x, dim=1)
    torch.testing.assert_close(found.inertia, (rows - found.codebook[found.indices]).double().square().sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"update": "ema"}, {"metric": "cosine"}], ids=str)
def test_balance_of_weights(options, device):
    x = clusters(3000, 9, 6, 3).to(device)
    weights = torch.empty(3000, dtype=torch.float64).exponential_(generator=seeded()).clamp(0.1, 3).sub(0.1).to(device)  # some are 0
    found = genperf.kmeans(x, 40, iterations=3, balance=1.05, weights=weights, generator=seeded(), **options)
    sums = torch.zeros(40, dtype=torch.float64, device=device).index_add(0, found.indices, weights)
    torch.testing.assert_close(found.counts.double(), sums, rtol=1e-6, atol=0)
    assert weights.max() < 0.05 * sums.mean()
    assert sums.max() <= 1.05 * sums.mean() * (1 + 1e-12)
    free = genperf.kmeans(x, 40, iterations=3, weights=weights, generator=seeded(), **options)
    assert free.counts.max() > 1.5 * sums.mean()
    options |= {"iterations": 3, "balance": 1.04}  # a whole number of vectors, 78
    even, expected = (genperf.kmeans(x, 40, weights=w, generator=seeded(), **options) for w in (torch.ones_like(weights), None))
    assert same(even, expected)


def test_balance_with_vectors_that_are_too_heavy(device):
    """They are alone but for vectors without weight; of the others, each code has its share if their weights allow it."""
    x = clusters(600, 5, 4, 2).to(device)
    weights = torch.ones(600, device=device)
    weights[:3], weights[3:200], weights[200:230] = 200.0, 0.0, 8.0
    found = genperf.kmeans(x, 20, iterations=4, balance=1.1, weights=weights, generator=seeded())
    limit = 1.1 * float(weights.sum()) / 20
    for code, total in enumerate(found.counts.tolist()):
        inside = weights[found.indices == code]
        assert total <= limit or (inside.max() == 200 and (inside > 0).sum() == 1)
    assert (found.counts > limit).sum() == 3
    # Codes of two vectors of weight 1 cannot be emptied, since each limit leaves room for less than one.
    found = genperf.kmeans(x[:7], 4, iterations=2, balance=1.05, weights=torch.ones(7, device=device).double(), generator=seeded())
    assert found.counts.max() == 2


def test_balance_costs_little(device):
    x = clusters(4000, 40, 8, 0).to(device)
    plain = genperf.kmeans(x, 40, iterations=10, generator=seeded())
    even = genperf.kmeans(x, 40, iterations=10, balance=1.05, generator=seeded())
    naive = x[torch.randperm(4000, generator=seeded())].view(40, 100, 8)
    assert plain.counts.max() > 1.2 * 100
    assert even.inertia < 1.03 * plain.inertia
    assert even.inertia < 0.6 * (naive - naive.mean(1, keepdim=True)).square().sum()


def test_balance_on_duplicates():
    """All vectors are equally near to all codes."""
    found = genperf.kmeans(torch.ones(100, 3), 8, balance=1.0, iterations=2, generator=seeded())
    assert found.counts.max() <= 13
    assert found.inertia == 0


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_mapped_file(dtype, tmp_path, monkeypatch):
    data = clusters(3000, 20, 8, 2).numpy().astype(dtype)
    np.save(tmp_path / "x.npy", data)
    monkeypatch.setattr(vectors, "_SEARCH_CHUNK", 4000)
    monkeypatch.setattr(vectors, "_CHUNK", 3000)
    x = torch.from_numpy(np.load(tmp_path / "x.npy", mmap_mode="c"))
    found = genperf.kmeans(x, 16, iterations=3, generator=seeded())
    monkeypatch.undo()
    assert same(found, genperf.kmeans(torch.from_numpy(data), 16, iterations=3, generator=seeded()))


def test_memory_is_that_of_chunks(monkeypatch):
    """Neither a copy of the vectors nor one of a stage's residual."""
    monkeypatch.setattr(vectors, "_SEARCH_CHUNK", 1 << 15)
    monkeypatch.setattr(vectors, "_CHUNK", 1 << 15)
    x = torch.randn(8192, 64).half()
    assert testing.largest_allocation(lambda: genperf.kmeans(x, 8, iterations=1, init=x[:8].float())) < x.nbytes / 4
    assert testing.largest_allocation(lambda: genperf.residual_kmeans(x, 8, 2, iterations=1, init="random")) < x.nbytes / 4


def test_initial_codes_from_a_sample(monkeypatch):
    x = clusters(4000, 50, 8, 6)
    whole = genperf.kmeans(x, 50, iterations=0, generator=seeded())
    monkeypatch.setattr(seeding, "_SAMPLE", 100)
    monkeypatch.setattr(seeding, "_SAMPLE_PER_CODE", 40)
    sampled = genperf.kmeans(x, 50, iterations=0, generator=seeded())
    assert not same(whole, sampled)
    assert sampled.inertia < 1.1 * whole.inertia
    for metric in ("euclidean", "cosine"):
        weighted = genperf.kmeans(x, 50, metric=metric, weights=torch.ones(4000), generator=seeded())
        assert same(weighted, genperf.kmeans(x, 50, metric=metric, generator=seeded()))


# Ops that make the host wait for the device, or that a CUDA graph cannot hold.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "item", "unique", "bincount", "is_pinned", "lift_fresh")


class Indexing(TorchFunctionMode):
    """Indexing and inversion of fake CUDA tensors, for which those of Python need a torch with CUDA."""

    def __torch_function__(self, function, types, arguments=(), kwargs=None):
        if function is torch.Tensor.__invert__:
            return torch.ops.aten.bitwise_not(*arguments)
        if function is not torch.Tensor.__getitem__:
            return function(*arguments, **(kwargs or {}))
        t, keys = arguments
        gathered, dim = [], 0
        for key in keys if isinstance(keys, tuple) else (keys,):
            if isinstance(key, torch.Tensor):
                gathered += [None] * (dim - len(gathered)) + [key]
                dim += 1
            elif isinstance(key, slice):
                t = torch.ops.aten.slice(t, dim, key.start, key.stop, key.step or 1)
                dim += 1
            else:
                t = torch.ops.aten.select(t, dim, key)
        return torch.ops.aten.index(t, gathered) if gathered else t


class Record(TorchDispatchMode):
    """Fails at an op that waits for the device, and counts the others."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.ops.append(name)
        assert not name.startswith(WAITS), name
        if name.startswith("index"):
            assert all(t is None or t.dtype != torch.bool for t in arguments[1] if name in ("index", "index_put_")), "boolean index"
        found = function(*arguments, **(kwargs or {}))
        inputs = [t for t in torch.utils._pytree.tree_leaves((arguments, kwargs)) if isinstance(t, torch.Tensor) and t.dim() > 0]
        for t in torch.utils._pytree.tree_leaves(found):
            if isinstance(t, torch.Tensor) and inputs:
                assert t.device.type == "cuda", f"{name} copies to the CPU"
        assert all(t.device.type == "cuda" for t in inputs), f"{name} reads the CPU"
        return found


@pytest.mark.parametrize(
    "options", [{}, {"metric": "cosine"}, {"init": "random", "n_init": 2}, {"update": "ema"}, {"weights": True}], ids=str
)
def test_a_gpu_runs_without_waiting(options, monkeypatch):
    """The ops of the CUDA path, traced on fake tensors: none reads a value, and so all can be captured in a graph."""
    for failure in ("cuda_failure", "triton_failure"):
        monkeypatch.setattr(_library, failure, None)
    recorded = {}
    for iterations in (1, 3):
        with FakeTensorMode():
            x = torch.empty(3, 8, 50, dtype=torch.bfloat16, device="cuda")
            weights = torch.empty(3, 50, device="cuda") if "weights" in options else None
            with Record() as record, Indexing():
                found = genperf.kmeans(x, 30, iterations=iterations, channel_dim=1, impl="native", **options | {"weights": weights})
        assert [t.device.type for t in found] == ["cuda"] * 4
        recorded[iterations] = record.ops
    runs = options.get("n_init", 1)
    searches = [ops.count("nearest_code") for ops in recorded.values()]
    # EMA: one of the pass, and one for codes that no vector chose.
    assert searches[1] - searches[0] == 2 * runs * (2 if "update" in options else 1)
    assert recorded[3].count("code_statistics") > recorded[1].count("code_statistics")


def test_recorder_notices_a_wait():
    with FakeTensorMode(), Record(), Indexing():
        x = torch.empty(5, device="cuda")
        for wait in (lambda: x[x > 0], lambda: x.cpu(), lambda: x.sum().item(), lambda: x[torch.empty(2, dtype=torch.int64)]):
            with pytest.raises(AssertionError):
                wait()


def test_fixed_point_on_a_gpu_is_noticed_later(monkeypatch):
    """The answer of an update arrives three updates later; until then nothing changes any more."""
    late = 3

    class Event:
        def __init__(self):
            self.polls = 0

        def record(self):
            pass

        def query(self):
            self.polls += 1
            return self.polls > late

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(fitting, "_pinned_flag", lambda: torch.empty((), dtype=torch.bool))

    class OnGpu:
        """A codebook that says it is on a GPU."""

        is_cuda = True

        def __init__(self, values):
            self.values = values

        def __eq__(self, other):
            return self.values == other.values

    settled = fitting.FixedPoint(on_host=False)
    a, b = OnGpu(torch.zeros(3)), OnGpu(torch.ones(3))
    answers = [settled(a, b), settled(b, a), *(settled(a, a) for _ in range(12))]
    assert not any(answers[: 2 + late])
    assert any(answers)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    settled = fitting.FixedPoint(on_host=False)
    assert not any(settled(a, a) for _ in range(20))


def bad(message, error=ValueError, **kwargs):
    return pytest.param(message, error, {"x": torch.zeros(10, 3), "num_codes": 4} | kwargs, id=message[:40])


@pytest.mark.parametrize(
    ("message", "error", "kwargs"),
    [
        bad("n_init must be at least 1, got 0", n_init=0),
        bad("update must be one of lloyd, ema, got 'sgd'", update="sgd"),
        bad('batch_size is for update="ema"', batch_size=4),
        bad('decay is for update="ema"', decay=0.5),
        bad("batch_size must be at least 1, got 0", update="ema", batch_size=0),
        bad(r"decay must lie in \[0, 1\), got 1.0", update="ema", decay=1.0),
        bad("balance must be a finite number of at least 1, got 0.9", balance=0.9),
        bad("balance must be a finite number of at least 1, got nan", balance=math.nan),
        bad("weights must be a tensor", TypeError, weights=[1.0] * 10),
        bad("weights must be float32", TypeError, weights=torch.ones(10, dtype=torch.int64)),
        bad(r"weights must have the shape of x without its channel dimension, \[10\]", weights=torch.ones(3)),
        bad("weights must be finite and not negative, got -1.0 ... 1.0", weights=torch.tensor([-1.0] + [1.0] * 9)),
        bad("weights must be finite and not negative, got nan", weights=torch.tensor([math.nan] + [1.0] * 9)),
        bad("a weight must be above 0, got zeros", weights=torch.zeros(10)),
    ],
)
def test_bad_input(message, error, kwargs):
    with pytest.raises(error, match="kmeans: .*" + message):
        genperf.kmeans(**kwargs)
