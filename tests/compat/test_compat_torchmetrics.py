# SPDX-License-Identifier: Apache-2.0
"""genperf.compat.torchmetrics against torchmetrics, with a small module in place of Inception."""

import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from processes import forked_context
from torch import nn

import genperf
from genperf.testing import leave_rank

torchmetrics = pytest.importorskip("torchmetrics")
upstream_module = pytest.importorskip("torchmetrics.image.fid")
genperf_module = pytest.importorskip("genperf.compat.torchmetrics")

Genperf = genperf_module.FrechetInceptionDistance
Upstream = upstream_module.FrechetInceptionDistance
STATES = [f"{side}_features_{state}" for side in ("real", "fake") for state in ("sum", "cov_sum", "num_samples")]


class Features(nn.Module):
    """Mean colors of image patches, multiplied by a fixed matrix, after a ReLU, plus an offset."""

    def __init__(self, num_features=12, offset=0.0):
        super().__init__()
        self.num_features = num_features
        self.offset = offset
        self.register_buffer("mixing", torch.randn(48, num_features, generator=torch.Generator().manual_seed(0)) / 7)

    def forward(self, images):
        patches = nn.functional.adaptive_avg_pool2d(images.to(self.mixing.dtype), 4).flatten(1)
        return (patches @ self.mixing).relu() + self.offset


def images(count, scale=1.0, seed=0, dtype=torch.float32):
    return scale * torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def filled(metric, real=200, fake=150, batch=64):
    for part in images(real).split(batch):
        metric.update(part, real=True)
    for part in images(fake, 1.3, seed=1).split(batch):
        metric.update(part, real=False)
    return metric


def metric(kind=Genperf, **arguments):
    features = arguments.pop("feature", None) or Features()
    return kind(features, normalize=True, **arguments)


def exact(feature, real, fake):
    """The distance from the features in float64; the trace is the nuclear norm of the product of centered features."""
    with torch.no_grad():
        a, b = (feature(x).double() for x in (real, fake))
    f, g = ((x - x.mean(0)).T / (len(x) - 1) ** 0.5 for x in (a, b))
    trace = torch.linalg.svdvals(f.T @ g).sum()
    return (a.mean(0) - b.mean(0)).square().sum() + f.square().sum() + g.square().sum() - 2 * trace


def test_matches_upstream(device):
    actual, upstream = (filled(metric(kind)).compute() for kind in (Genperf, Upstream))
    assert actual.dtype == upstream.dtype == torch.float32
    assert actual.shape == upstream.shape == ()
    torch.testing.assert_close(actual, upstream, rtol=1e-6, atol=0)
    torch.testing.assert_close(actual.double(), exact(Features(), images(200), images(150, 1.3, seed=1)), rtol=1e-6, atol=0)
    assert actual > 0.01


def test_matches_upstream_in_float64():
    found = []
    for kind in (Genperf, Upstream):
        m = metric(kind, feature=Features().double()).set_dtype(torch.float64)
        found.append(filled(m).compute())
    assert found[0].dtype == torch.float64
    torch.testing.assert_close(*found, rtol=1e-9, atol=0)


def test_same_interface_and_states():
    actual, upstream = metric(), metric(Upstream)
    assert isinstance(actual, Upstream)
    assert list(actual._defaults) == list(upstream._defaults) == STATES
    for name in STATES:
        assert getattr(actual, name).dtype == getattr(upstream, name).dtype
        assert actual._reductions[name] is upstream._reductions[name]
    assert (actual.higher_is_better, actual.is_differentiable, actual.full_state_update) == (False, False, False)
    with pytest.raises(ValueError, match="reset_real_features"):
        Genperf(Features(), reset_real_features="no")
    with pytest.raises(TypeError, match="feature"):
        Genperf([1, 2])


def test_number_of_features_from_a_dummy_image():
    features = Features(5)
    del features.num_features
    assert Genperf(features, normalize=True, input_img_size=(3, 8, 8)).real_features_sum.shape == (5,)


def test_forward_gives_the_value_and_accumulates():
    m = metric()
    m.update(images(100), real=True)
    m.update(images(100, 1.3, seed=1), real=False)
    before = m.compute()
    with pytest.raises(RuntimeError, match="at least two real"):  # the batch alone has one side only
        m(images(50), real=True)
    assert torch.isfinite(before)


def test_reset_can_keep_the_real_features():
    for keep in (True, False):
        m = filled(metric(reset_real_features=not keep))
        first = m.compute()
        m.reset()
        assert int(m.real_features_num_samples) == (200 if keep else 0)
        assert int(m.fake_features_num_samples) == 0
        if keep:
            m.update(images(150, 1.3, seed=1), real=False)
            torch.testing.assert_close(m.compute(), first)


@pytest.mark.parametrize("kinds", [(Genperf, Upstream), (Upstream, Genperf), (Genperf, Genperf)])
def test_states_load_in_both_directions(kinds):
    source, target = (metric(kind) for kind in kinds)
    for m in (source, target):
        m.persistent(True)
    filled(source)
    saved = source.state_dict()
    assert set(STATES) <= set(saved)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # compute before update
        target.load_state_dict(saved)
        for name in STATES:
            assert torch.equal(getattr(target, name), getattr(source, name))
        if kinds[1] is Genperf:
            torch.testing.assert_close(target.compute(), source.compute(), rtol=1e-6, atol=0)
        else:
            with pytest.raises(AttributeError):
                target.compute()


def test_merged_metrics():
    whole, first, second = filled(metric(), 200, 150), metric(), metric()
    first.update(images(200)[:70], real=True)
    second.update(images(200)[70:], real=True)
    second.update(images(150, 1.3, seed=1), real=False)
    first.merge_state(second)
    torch.testing.assert_close(first.compute(), whole.compute(), rtol=1e-6, atol=0)


def test_moved_metric_keeps_its_value(device):
    m = metric().to(device)
    for part, real in ((images(200), True), (images(150, 1.3, seed=1), False)):
        m.update(part.to(device), real=real)
    found = m.compute()
    assert found.device.type == torch.device(device).type
    torch.testing.assert_close(found.cpu(), filled(metric()).compute(), rtol=1e-6, atol=0)
    assert m.half().real_features_sum.dtype == torch.float64  # as in torchmetrics, half() does not change states


def test_states_in_float32():
    """The root is float64, so the error is that of float32 sums."""
    m = metric().set_dtype(torch.float32)
    assert m.real_features_cov_sum.dtype == torch.float32
    value = exact(Features(), images(300), images(200, 1.3, seed=1))
    torch.testing.assert_close(filled(m, 300, 200).compute().double(), value, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("real", "fake"), [(300, 20), (20, 300), (20, 30), (2, 2)])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_fewer_samples_than_features(real, fake, offset):
    features = Features(48, offset).double()
    value = exact(Features(48).double(), images(real), images(fake, 1.3, seed=1))
    found = []
    for kind in (Genperf, Upstream):
        m = metric(kind, feature=features)
        found.append(filled(m, real, fake).compute())
    # Offset 1e4: features are of order 0.1, so their covariances have 16 - 2 * 5 digits.
    torch.testing.assert_close(found[0], value, rtol=1e-7 if offset == 0 else 1e-4, atol=0)
    if offset:
        assert not abs(found[1] - value) < 10 * abs(found[0] - value), "upstream has become accurate: update the docs"


def test_large_means():
    """float64 features with mean / std near 10^6; the sums leave four digits of a covariance."""
    features = Features(12, 1e5).double()
    value = exact(Features(12).double(), images(200), images(150, 1.3, seed=1))
    torch.testing.assert_close(filled(metric(feature=features)).compute(), value, rtol=1e-2, atol=0)


def test_equal_images_have_distance_zero():
    for count in (8, 300):
        m = metric(feature=Features().double())
        for real in (True, False):
            m.update(images(count), real=real)
        assert 0 <= m.compute() < 1e-7


def test_half_precision_features():
    """A distance above the largest float16."""
    features = Features().half()
    m, upstream = metric(feature=features), metric(Upstream, feature=features)
    for each in (m, upstream):
        filled_with_large = ((images(100), True), (images(100, 1e4, seed=1), False))
        for part, real in filled_with_large:
            each.update(part, real=real)
    assert m.compute().dtype == torch.float32
    assert m.compute() > 65504
    assert upstream.compute().isinf()


@pytest.mark.parametrize("count", [5, 50])
def test_non_finite_features(count):
    m = metric()
    m.update(images(count), real=True)
    m.update(images(count).fill_(float("nan")), real=False)
    assert m.compute().isnan()


def test_too_few_samples():
    m = metric()
    m.update(images(1), real=True)
    m.update(images(5), real=False)
    with pytest.raises(RuntimeError, match="at least two real and two generated images, got 1 and 5"):
        m.compute()


def test_pickle_clone_and_collection():
    m = filled(metric())
    for copy in (pickle.loads(pickle.dumps(m)), m.clone()):
        assert type(copy) is Genperf
        assert torch.equal(copy.compute(), m.compute())
    collection = torchmetrics.MetricCollection({"fid": metric()})
    filled(collection)
    assert torch.equal(collection.compute()["fid"], m.compute())


def _half_of_the_images(rank, store, results):
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(store), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    m = metric()
    m.update(images(200)[rank::2], real=True)
    m.update(images(150, 1.3, seed=1)[rank::2], real=False)
    results.put(m.compute().item())
    leave_rank()


def test_ranks_are_synchronized(tmp_path):
    context = forked_context()
    results = context.SimpleQueue()
    processes = [context.Process(target=_half_of_the_images, args=(rank, tmp_path / "store", results), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    first, second = (results.get() for _ in processes)
    assert first == second
    assert first == pytest.approx(filled(metric()).compute().item(), rel=1e-6)


def test_replaces_the_helper_of_torchmetrics(monkeypatch):
    value = filled(metric(Upstream)).compute()
    monkeypatch.setattr(upstream_module, "_compute_fid", genperf.frechet_distance)
    torch.testing.assert_close(filled(metric(Upstream)).compute(), value, rtol=1e-6, atol=0)


def test_genperf_does_not_need_torchmetrics():
    program = """
import sys
sys.modules["torchmetrics"] = None
import genperf
assert "torchmetrics" not in dir(genperf.compat)
try:
    genperf.compat.torchmetrics
except ModuleNotFoundError as error:
    assert "pip install torchmetrics" in str(error), error
else:
    raise SystemExit("no error")
try:
    genperf.compat.nothing
except AttributeError:
    pass
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    assert genperf.compat.torchmetrics is genperf_module
