# SPDX-License-Identifier: Apache-2.0
import copy
import itertools
import pickle

import pytest
import torch
from processes import forked_context
from torch import nn
from torch.utils.checkpoint import checkpoint

from genperf.losses import FrechetLoss
from genperf.metrics import FrechetReference
from genperf.testing import leave_rank

D = 6
DISTRIBUTED_KINDS = [{}, {"queue_size": 20}, {"momentum": 0.8}]
KINDS = {"batch": {}, "queue": {"queue_size": 20}, "short queue": {"queue_size": 4}, "averages": {"momentum": 0.8}}


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def kind(request):
    return request.param


def samples(count, dim=D, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(dim) + 0.3 * torch.randn(dim, dim, generator=generator)
    return ((torch.randn(count, dim, generator=generator) @ mixing).relu() + 0.1 * seed).to(dtype)


def make_reference(dim=D, device="cpu"):
    return FrechetReference.from_features(samples(400, dim, seed=7).to(device))


def distance(rows, reference, weights=None, unbiased=True):
    """The distance by eigenvalues in float64, of samples with optional weights; not differentiable."""
    x = rows.double()
    w = torch.full((len(x),), 1 / len(x), dtype=torch.float64, device=x.device) if weights is None else weights
    mean = w @ x
    cov = (x - mean).T @ (w[:, None] * (x - mean)) / ((1 - w.square().sum()) if unbiased else 1)
    trace = torch.linalg.svdvals(root(cov) @ root(reference.cov)).sum()
    return (mean - reference.mean).square().sum() + cov.trace() + reference.cov.trace() - 2 * trace


def root(cov):
    values, vectors = torch.linalg.eigh(cov)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def gradient(loss, x):
    x = x.detach().clone().requires_grad_()
    value = loss(x)
    return value.detach(), torch.autograd.grad(value, x)[0]


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("count", [2, D, D + 1, 50])
def test_distance_of_a_batch(count, unbiased, device):
    reference, x = make_reference(device=device), samples(count).to(device)
    found = FrechetLoss(reference, unbiased=unbiased)(x)
    torch.testing.assert_close(found, distance(x, reference, unbiased=unbiased), rtol=1e-6, atol=1e-7)
    assert found.shape == ()


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize(("queue_size", "batch"), [(4, 3), (4, 9), (20, 3), (20, 7), (20, 20), (20, 33), (6, 6)])
def test_queue_keeps_the_last_features(queue_size, batch, unbiased, device):
    """Over several cycles of the ring buffer, with and without running sums, before and after it is full."""
    reference = make_reference(device=device)
    loss = FrechetLoss(reference, queue_size=queue_size, unbiased=unbiased)
    seen = torch.empty(0, D, dtype=torch.float64, device=device)
    for step in range(12):
        x = samples(batch, seed=step).to(device)
        window = torch.cat([seen, x])
        torch.testing.assert_close(loss(x), distance(window, reference, unbiased=unbiased), rtol=1e-6, atol=1e-7)
        seen = window.float().double()[-queue_size:]
    assert set(map(tuple, seen.float().tolist())) == set(map(tuple, loss.state_dict()["parts.0.history.features"].tolist()))


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99])
def test_moving_average_weights_of_batches(momentum, unbiased, device):
    """The distance of all samples so far, where each batch has `momentum` times the weight of the next: there is no startup bias."""
    reference = make_reference(device=device)
    loss = FrechetLoss(reference, momentum=momentum, unbiased=unbiased)
    batches = [samples(8 + step, seed=step).to(device) for step in range(6)]
    for step, x in enumerate(batches):
        parts = [torch.full((len(b),), momentum ** (step - i) / len(b), dtype=torch.float64) for i, b in enumerate(batches[: step + 1])]
        weights = torch.cat(parts).to(device)
        value = distance(torch.cat(batches[: step + 1]), reference, weights / weights.sum(), unbiased)
        torch.testing.assert_close(loss(x), value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("count", [3, 5, 12])
def test_gradients(count, kind, device):
    """Against finite differences of the loss in evaluation mode, where the history does not change."""
    loss = FrechetLoss(make_reference(device=device), **kind)
    for step in range(5):
        loss.update(samples(5, seed=step).to(device))
    loss.eval()
    assert torch.autograd.gradcheck(loss, samples(count, seed=9).to(device).add(0.01).requires_grad_(), atol=1e-5)


def test_gradient_descent_reaches_the_reference(kind, device):
    reference = make_reference(device=device)
    noise = torch.randn(64, D, dtype=torch.float64, device=device)
    weight = torch.eye(D, dtype=torch.float64, device=device).requires_grad_()
    bias = torch.zeros(D, dtype=torch.float64, device=device).requires_grad_()
    loss, optimizer, alone = FrechetLoss(reference, **kind), torch.optim.Adam([weight, bias], lr=0.03), FrechetLoss(reference)
    start = alone(noise @ weight + bias).item()
    for _ in range(100):
        optimizer.zero_grad()
        loss(noise @ weight + bias).backward()
        optimizer.step()
    assert alone(noise @ weight + bias).item() < 0.1 * start


def degenerate(device):
    dead = samples(12)
    dead[:, 2] = 0
    doubled = samples(12)
    doubled[:, 1] = doubled[:, 0]
    cases = {
        "dead feature": dead,
        "doubled feature": doubled,
        "one sample": samples(1),
        "two samples": samples(2),
        "fewer samples than features": samples(4),
        "samples that coincide": samples(1).repeat(12, 1),
        "few samples that coincide": samples(1).repeat(3, 1),
        "zeros": torch.zeros(12, D, dtype=torch.float64),
    }
    return {name: x.to(device) for name, x in cases.items()}


@pytest.mark.parametrize("case", degenerate("cpu"))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_are_finite_for_zero_eigenvalues(case, dtype, kind, device):
    x, loss = degenerate(device)[case].to(dtype), FrechetLoss(make_reference(device=device), **kind)
    largest = 2 * (x.abs().max().item() + 10) * D
    for _ in range(4):
        value, grad = gradient(loss, x)
        assert value.isfinite()
        assert grad.isfinite().all()
        assert grad.abs().max() < largest
        assert grad.any()


def test_distance_of_one_sample(device):
    reference, x = make_reference(device=device), samples(1).to(device)
    value, grad = gradient(FrechetLoss(reference), x)
    torch.testing.assert_close(value, (x[0] - reference.mean).square().sum() + reference.cov.trace())
    torch.testing.assert_close(grad, 2 * (x - reference.mean))


def test_gradient_through_eigenvalue_roots_is_nan(device):
    """The common implementation by roots of eigvalsh has NaN gradients if samples coincide."""
    reference, x = make_reference(device=device), degenerate(device)["zeros"].requires_grad_()
    r = root(reference.cov)
    (grad,) = torch.autograd.grad(torch.linalg.eigvalsh(r @ x.T.cov() @ r).clamp(min=0).sqrt().sum(), x)
    assert grad.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype, kind, device):
    loss, exact = (FrechetLoss(make_reference(device=device), **kind) for _ in range(2))
    for step in range(3):
        x = samples(10, seed=step, dtype=dtype).to(device)
        value, grad = gradient(loss, x)
        expected, exact_grad = gradient(exact, x.double())
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert grad.dtype == dtype
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(grad, exact_grad.to(dtype))
    assert loss.distances["0"].dtype == torch.float64


def test_autocast_does_not_change_the_distance(kind, device):
    plain, cast = (FrechetLoss(make_reference(device=device), **kind) for _ in range(2))
    for step in range(3):
        x = samples(10, seed=step, dtype=torch.float32).to(device)
        value, grad = gradient(plain, x)
        with torch.autocast(device, dtype=torch.bfloat16):
            other, other_grad = gradient(cast, x)
        assert torch.equal(value, other)
        assert torch.equal(grad, other_grad)


def test_spatial_features_are_averaged(device):
    reference, x = make_reference(device=device), torch.rand(9, D, 3, 5, dtype=torch.float64, device=device)
    loss = FrechetLoss(reference)
    torch.testing.assert_close(loss(x), loss(x.mean((2, 3))))
    torch.testing.assert_close(FrechetLoss(reference, lambda images: [images])(x), loss(x))
    half = x.half()
    assert torch.equal(loss(half), loss(half.float().mean((2, 3))))


class Extractor(nn.Module):
    def __init__(self, dim=D):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(12, dim), nn.BatchNorm1d(dim), nn.Dropout(0.5)).double()

    def forward(self, images):
        return self.layers(images)


def test_extractor_is_frozen_and_not_in_the_state(device):
    extractor = Extractor().to(device)
    loss = FrechetLoss(make_reference(device=device), extractor, queue_size=8).train()
    before = copy.deepcopy(extractor.state_dict())
    images = torch.rand(10, 3, 2, 2, dtype=torch.float64, device=device)
    value, grad = gradient(loss, images)
    assert grad.any()
    extractor.train()  # as by a training loop that holds another reference to it
    assert torch.equal(FrechetLoss(make_reference(device=device), extractor)(images), value)
    assert not extractor.training
    extractor.layers[3].train()
    loss(images)
    assert not extractor.layers[3].training
    assert all(p.grad is None and not p.requires_grad for p in extractor.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), extractor.state_dict().values(), strict=True))
    assert not list(loss.parameters())
    assert all("layers" not in key for key in loss.state_dict())


@pytest.mark.parametrize("normalize", [False, True])
def test_several_extractors(normalize, device):
    first, second = Extractor().to(device), Extractor(9).to(device)
    references = [make_reference(device=device), make_reference(9, device=device)]
    images = torch.rand(12, 3, 2, 2, dtype=torch.float64, device=device)
    alone = [FrechetLoss(r, e) for r, e in zip(references, (first, second), strict=True)]
    values, grads = zip(*(gradient(one, images) for one in alone), strict=True)
    scale = [1 / (v + 0.01) if normalize else 1 for v in values]
    by_name = {"inner": (first, references[0]), "outer": (second, references[1])}
    for loss in (
        FrechetLoss(references, [first, second], weights=[0.5, 2], normalize=normalize),
        FrechetLoss(references, nn.ModuleList([first, second]), weights=(0.5, 2), normalize=normalize),
        FrechetLoss(by_name, weights={"outer": 2, "inner": 0.5}, normalize=normalize),
    ):
        value, grad = gradient(loss, images)
        torch.testing.assert_close(value, 0.5 * scale[0] * values[0] + 2 * scale[1] * values[1])
        torch.testing.assert_close(grad, 0.5 * scale[0] * grads[0] + 2 * scale[1] * grads[1])
        assert list(loss.distances) == list(loss.names)
        for logged, expected in zip(loss.distances.values(), values, strict=True):
            torch.testing.assert_close(logged, expected)
            assert not logged.requires_grad
    assert loss.names == ("inner", "outer")


def test_evaluation_mode_does_not_change_the_state(kind, device):
    loss = FrechetLoss(make_reference(device=device), **kind)
    for step in range(3):
        loss(samples(5, seed=step).to(device))
    before = copy.deepcopy(loss.state_dict())
    loss.eval()
    first, second = (loss(samples(5, seed=4).to(device)) for _ in range(2))
    assert torch.equal(first, second)
    assert all(torch.equal(before[key], value) for key, value in loss.state_dict().items())
    loss.train()
    assert torch.equal(loss(samples(5, seed=4).to(device)), first)
    assert any(not torch.equal(before[key], value) for key, value in loss.state_dict().items()) == bool(kind)


def test_update_fills_the_history_like_training(kind, device):
    trained, filled = (FrechetLoss(make_reference(device=device), **kind) for _ in range(2))
    filled.eval()
    for step in range(5):
        x = samples(5, seed=step).to(device).requires_grad_()
        trained(x)
        filled.update(x)
    for a, b in zip(trained.state_dict().values(), filled.state_dict().values(), strict=True):
        assert torch.equal(a, b)
        assert not b.requires_grad


@pytest.mark.parametrize("way", ["state_dict", "saved", "deepcopy"])
def test_training_resumes_exactly(way, kind, device, tmp_path):
    loss = FrechetLoss(make_reference(device=device), **kind)
    for step in range(7):
        loss(samples(5, seed=step).to(device))
    if way == "deepcopy":
        resumed = copy.deepcopy(loss)
    else:
        resumed = FrechetLoss(make_reference(device=device), **kind)
        state = loss.state_dict()
        if way == "saved":
            torch.save(state, tmp_path / "loss.pt")
            state = torch.load(tmp_path / "loss.pt", weights_only=True)
        resumed.load_state_dict(copy.deepcopy(state))
    for step in range(7, 15):
        x = samples(5, seed=step).to(device)
        for (value, grad), (other, other_grad) in [(gradient(loss, x), gradient(resumed, x))]:
            assert torch.equal(value, other)
            assert torch.equal(grad, other_grad)


def check_steps(run, kind, device):
    """Losses, gradients and states of several steps, which are run by `run(loss, x)`, against plain ones."""
    losses = [FrechetLoss(make_reference(device=device), **kind) for _ in range(2)]
    for step in range(9):
        leaves = [samples(5, seed=step).to(device).requires_grad_() for _ in losses]
        values = [run(losses[0], leaves[0]), losses[1](leaves[1])]
        sum(values).backward()
        # A distance without a gradient is computed in another way.
        torch.testing.assert_close(*values, rtol=1e-10, atol=1e-10)
        assert torch.equal(leaves[0].grad, leaves[1].grad)
        for a, b in zip(losses[0].state_dict().values(), losses[1].state_dict().values(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, kind, device):
    """The second run of a step sees the history of the first, and adds nothing to it."""
    check_steps(lambda loss, x: checkpoint(loss, x, use_reentrant=reentrant), kind, device)


def test_compiled_steps(kind, device):
    """Outside of the graph: backward would otherwise see the history after the step."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda loss, x: loss(x) + 0, backend="aot_eager")
    check_steps(compiled, kind, device)


@pytest.mark.parametrize("history", ["queue", "averages"])
def test_pickles_with_a_history_of_buffers(history, device):
    loss = FrechetLoss(make_reference(device=device), **KINDS[history])
    loss.update(samples(8).to(device))
    assert [name for name, _ in loss.named_buffers()] == ["parts.0.mean", "parts.0.factor"]
    with loss.parts["0"].history._history_as_buffers():
        content = pickle.dumps(loss)
    loaded = pickle.loads(content)
    del loaded._steps  # as in the earliest pickles
    loaded = pickle.loads(pickle.dumps(loaded))
    for step in range(3):
        x = samples(5, seed=step).to(device)
        assert torch.equal(loaded(x), loss(x))
    assert not list(loaded.parts["0"].history.buffers())


def test_statistics_keep_their_dtype(kind, device):
    loss, plain = (FrechetLoss(make_reference(device=device), nn.Identity(), **kind) for _ in range(2))
    for step, cast in enumerate((lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: nn.Sequential(m).float())):
        cast(loss)
        x = samples(5, seed=step).to(device)
        assert torch.equal(loss(x), plain(x))
    assert all(t.dtype != torch.float16 and t.dtype != torch.bfloat16 for t in (*loss.buffers(), *loss.state_dict().values()))


def test_moves_with_its_extractor(kind):
    extractor = Extractor()
    loss = FrechetLoss({"a": (extractor, make_reference())}, **kind).to("meta")
    tensors = (*loss.buffers(), *loss.state_dict().values(), *extractor.parameters(), *extractor.buffers())
    assert all(t.device.type == "meta" for t in tensors)
    extractor = Extractor().float()
    FrechetLoss(make_reference(), extractor, **kind).to(torch.float64)
    assert all(p.dtype == torch.float64 for p in extractor.parameters())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_batches_do_not_change_the_history(bad, kind, device):
    """The loss of that step is NaN, which a GradScaler detects; later losses are not affected."""
    loss = FrechetLoss(make_reference(device=device), **kind)
    x = samples(5).to(device)
    broken = x.clone()
    broken[:, 3] = bad
    loss(x)
    before = {key: value for key, value in copy.deepcopy(loss.state_dict()).items() if "cursor" not in key}
    assert not loss(broken).isfinite()
    assert all(value.isfinite().all() for value in loss.state_dict().values())
    if "momentum" in kind:
        assert all(torch.equal(value, loss.state_dict()[key]) for key, value in before.items())
    assert loss(x).isfinite()


@pytest.mark.parametrize("queue_size", [4, 20])
def test_queue_drops_non_finite_samples(queue_size, device):
    """A full queue keeps the old sample in place of a non-finite one; before it is full, the sample is dropped."""
    reference = make_reference(device=device)
    loss = FrechetLoss(reference, queue_size=queue_size)
    seen = torch.empty(0, D, dtype=torch.float64, device=device)
    while len(seen) < queue_size:
        x = samples(3, seed=len(seen)).to(device)
        window = torch.cat([seen, x])
        torch.testing.assert_close(loss(x), distance(window, reference), rtol=1e-6, atol=1e-7)
        seen = window.float().double()[-queue_size:]
        x[1] = float("nan")
        loss.update(x)
        seen = torch.cat([seen, x[::2]]).float().double()[-queue_size:]
    before = loss.eval()(x[:1])
    loss.update(torch.full_like(x, float("inf")))
    torch.testing.assert_close(loss(x[:1]), before)


def test_queue_recovers_from_outliers(device):
    """Rounding errors from the subtraction of an outlier are removed when the sums are recomputed."""
    reference = make_reference(device=device)
    loss, x = FrechetLoss(reference, queue_size=20), samples(10).to(device)
    loss.update(1e9 * x)
    for seed in range(1, 5):
        loss.update(samples(10, seed=seed).to(device))
    window = torch.cat([samples(10, seed=3), samples(10, seed=4)]).to(device)
    torch.testing.assert_close(loss(x), distance(torch.cat([window.float().double(), x]), reference), rtol=1e-6, atol=1e-7)


def test_moving_average_has_no_startup_bias_in_float32(monkeypatch):
    """As on MPS, which has no float64: 1 - momentum has 3 digits there."""
    monkeypatch.setattr("genperf.losses._feature_distance.working_dtype", lambda device: torch.float32)
    loss = FrechetLoss(make_reference(), momentum=0.9999)
    first, second = (samples(12, seed=seed, dtype=torch.float32) for seed in range(2))
    for x, expected in ((first, first.mean(0)), (second, (0.9999 * first.mean(0) + second.mean(0)) / 1.9999)):
        loss(x)
        torch.testing.assert_close(loss.state_dict()["parts.0.history.mean"], expected)


def test_large_means(kind, device):
    """Features far from the origin lose no precision: sums are of differences from a shift."""
    shift = 1e5
    near = make_reference(device=device)
    far = FrechetReference(near.mean + shift, near.cov, near.factor)
    losses = FrechetLoss(near, **kind), FrechetLoss(far, **kind)
    for step in range(8):
        x = (samples(5, seed=step) * 1024).round().div(1024).float().to(device)  # exact in float32 with the shift
        x = (x.double() * 64).round() / 64
        torch.testing.assert_close(losses[1](x + shift), losses[0](x), rtol=1e-6, atol=1e-6)


def _train(rank, store, results):
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(store), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    results.put((rank, [(*_steps(kind, rank, 2), _own_steps(kind, rank, wrapped=True)) for kind in DISTRIBUTED_KINDS]))
    leave_rank()


def _steps(kind, rank=0, world_size=1):
    """Losses, gradients of this rank's samples and of a shared parameter, with and without DistributedDataParallel."""
    loss = FrechetLoss(make_reference(), **kind)
    found = []
    for step in range(3):
        x = samples(8, seed=step).chunk(world_size)[rank].clone().requires_grad_()
        scale = torch.ones((), dtype=torch.float64, requires_grad=True)
        value = loss(x * scale)
        value.backward()
        found.append((value.item(), x.grad.tolist(), scale.grad.item()))
    layer = nn.Linear(D, D).double()
    with torch.no_grad():
        layer.weight.copy_(torch.eye(D))
        layer.bias.zero_()
    wrapped = nn.parallel.DistributedDataParallel(layer) if world_size > 1 else layer
    (world_size * loss(wrapped(samples(8, seed=5).chunk(world_size)[rank]))).backward()
    return found, layer.weight.grad.tolist()


class WithLoss(nn.Module):
    """A network that computes its loss, of the batches of one rank."""

    def __init__(self, kind):
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.loss = FrechetLoss(make_reference(), gather=False, **kind)

    def forward(self, x):
        return self.loss(self.scale * x)


def _own_steps(kind, rank, wrapped=False):
    """Losses and state of a rank that gathers no features; DistributedDataParallel sends the buffers of the first rank to all."""
    model = WithLoss(kind)
    call = nn.parallel.DistributedDataParallel(model, broadcast_buffers=True) if wrapped else model
    losses = []
    for step in range(5):
        losses.append(call(samples(5, seed=2 * step + rank)))
        losses[-1].backward()
    return [loss.item() for loss in losses], {name: t.tolist() for name, t in model.loss.state_dict().items()}


def test_ranks_match_one_process_on_the_global_batch(tmp_path):
    """The sum of the ranks' gradients is that of one process; under DistributedDataParallel the loss is scaled by the number of ranks.

    With gather=False each rank is a process of its own.
    """
    context = forked_context()
    results = context.SimpleQueue()
    processes = [context.Process(target=_train, args=(rank, tmp_path / "store", results), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    (_, first), (_, second) = sorted((results.get() for _ in processes), key=lambda found: found[0])
    for kind, (steps1, averaged1, own1), (steps2, averaged2, own2) in zip(DISTRIBUTED_KINDS, first, second, strict=True):
        assert own1 == _own_steps(kind, 0)
        assert own2 == _own_steps(kind, 1)
        assert own1 != own2
        alone, averaged = _steps(kind)
        for (value1, grad1, shared1), (value2, grad2, shared2), (value, grad, shared) in zip(steps1, steps2, alone, strict=True):
            assert value1 == value2
            assert value1 == pytest.approx(value, rel=1e-12)
            torch.testing.assert_close(torch.tensor(grad1 + grad2), torch.tensor(grad))
            assert shared1 + shared2 == pytest.approx(shared, rel=1e-6)
            assert abs(shared1 - shared2) > 1e-6
        torch.testing.assert_close(torch.tensor(averaged1), torch.tensor(averaged))
        assert averaged1 == averaged2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"queue_size": -1}, ValueError, "queue_size must be"),
        ({"queue_size": 2.5}, ValueError, "queue_size must be"),
        ({"momentum": 1.0}, ValueError, "momentum must be"),
        ({"momentum": 0.5, "queue_size": 3}, ValueError, "either a queue or a momentum"),
        ({"weights": [1, 2]}, ValueError, "weight for each of the 1"),
        ({"weights": [-1.0]}, ValueError, "at least 0"),
        ({"weights": {"a": 1.0}}, ValueError, "names 0"),
        ({"reference": "imagenet.npz"}, (TypeError, ValueError), "reference"),
        ({"reference": []}, ValueError, "extractors"),
        ({"reference": {}}, ValueError, "at least one"),
        ({"reference": {"a.b": (None, make_reference())}}, ValueError, "name must be"),
        ({"reference": {"keys": (None, make_reference())}}, ValueError, "name must be"),
        ({"reference": {"training": (None, make_reference())}}, ValueError, "name must be"),
        ({"reference": {"a": make_reference()}}, TypeError, "pairs"),
        ({"reference": {"a": (make_reference(), None)}}, TypeError, "reference must be"),
        ({"reference": [make_reference()] * 2, "extractor": [None]}, ValueError, "2 references need"),
        ({"extractor": 3}, TypeError, "callable"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=f"FrechetLoss: .*{message}"):
        FrechetLoss(**{"reference": make_reference(), **arguments})


@pytest.mark.parametrize(
    ("features", "error"),
    [
        (torch.rand(4, D + 1), ValueError),
        (torch.rand(0, D), ValueError),
        (torch.rand(4, 3, D), ValueError),
        (torch.rand(D), ValueError),
        (torch.ones(4, D, dtype=torch.int64), TypeError),
        ([torch.rand(4, D), torch.rand(4, D)], TypeError),
        (torch.rand(4, D, device="meta"), ValueError),
    ],
)
def test_bad_features_do_not_change_the_state(features, error, kind):
    loss = FrechetLoss(make_reference(), **kind)
    loss(samples(5))
    before = copy.deepcopy(loss.state_dict())
    for call in (loss, loss.update):
        with pytest.raises(error, match="FrechetLoss: "):
            call(features)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), loss.state_dict().values(), strict=True))


def test_implementations_agree(kind, device):
    x = [samples(5, seed=step).to(device) for step in range(4)]
    values = []
    for impl in ("reference", "eigen", "polar"):
        loss = FrechetLoss(make_reference(device=device), **kind, impl=impl)
        values.append(torch.stack([loss(batch) for batch in x]))
    for a, b in itertools.pairwise(values):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
