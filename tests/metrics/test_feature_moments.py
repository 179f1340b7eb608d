# SPDX-License-Identifier: Apache-2.0
import copy
import io

import numpy as np
import pytest
import torch
from processes import forked_context
from torch import distributed as dist
from torch import multiprocessing

from genperf.metrics import FeatureMoments, FrechetDistance, KernelInceptionDistance, PrecisionRecall
from genperf.metrics._feature_rows import FeatureRows
from genperf.metrics.feature_moments import _BLOCK_ROWS
from genperf.testing import leave_rank


def two_pass(features, unbiased=True):
    """Mean and covariance in extended precision."""
    x = features.cpu().double().numpy().astype(np.longdouble)
    mean = x.mean(0)
    centered = x - mean
    return mean, centered.T @ centered / (len(x) - unbiased)


def assert_moments(moments, features, unbiased=True, tolerance=1e-12):
    mean, cov = two_pass(features, unbiased)
    scale = np.sqrt(np.outer(cov.diagonal(), cov.diagonal())).astype(np.float64) + np.finfo(np.float64).tiny
    assert moments.count == len(features)
    assert moments.mean.dtype == moments.cov.dtype == torch.float64
    np.testing.assert_allclose(moments.mean.cpu().numpy(), mean.astype(np.float64), rtol=1e-14, atol=1e-14)
    assert (np.abs(moments.cov.cpu().numpy() - cov.astype(np.float64)) / scale).max() < tolerance
    assert torch.equal(moments.cov, moments.cov.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("unbiased", [True, False])
def test_moments_are_independent_of_the_batch_size(dtype, unbiased, device):
    features = (torch.randn(2 * _BLOCK_ROWS + 77, 7).abs() * torch.arange(1, 8)).to(device, dtype)
    moments = FeatureMoments(unbiased=unbiased)
    for batch in features.split([1, 0, 5, 300, _BLOCK_ROWS, 1, _BLOCK_ROWS - 250, 20]):
        moments.update(batch)
    assert_moments(moments, features, unbiased)
    assert moments.dim == 7
    assert moments.device.type == device


def test_one_batch_of_many_blocks(device):
    features = torch.randn(3 * _BLOCK_ROWS + 5, 4, device=device)
    assert_moments(FeatureMoments(4).update(features), features)
    assert_moments(FeatureMoments(4).update(features[:10]).update(features[10:]), features)


def test_large_mean_loses_no_precision(device):
    features = 1e6 + torch.randn(3000, 5, dtype=torch.float64, device=device) + torch.linspace(0, 3, 3000, device=device)[:, None]
    moments = FeatureMoments()
    for batch in features.split(130):
        moments.update(batch)
    assert_moments(moments, features)
    _, exact = two_pass(features)
    sums, products, n = features.sum(0), features.T @ features, len(features)  # torchmetrics' states
    raw = (products - n * (sums / n).outer(sums / n)) / (n - 1)
    assert (raw.cpu().numpy() - exact.astype(np.float64)).__abs__().max() > 1e-6


def test_reading_moments_changes_them_by_rounding_only(device):
    features = torch.randn(500, 3, device=device)
    moments = FeatureMoments()
    for stop, batch in zip(range(50, 501, 50), features.split(50), strict=True):
        moments.update(batch)
        assert_moments(moments, features[:stop])


def test_batches_are_copied_and_detached(device):
    features = torch.randn(20, 3, device=device)
    batch = features.clone().requires_grad_()
    moments = FeatureMoments().update(batch)
    with torch.no_grad():
        batch.fill_(100)
    assert_moments(moments, features)
    assert not moments.mean.requires_grad


def test_spatial_features_are_averaged_over_positions(device):
    features = torch.randn(6, 5, 3, 4, device=device)
    assert_moments(FeatureMoments().update(features), features.double().mean((2, 3)))
    assert_moments(FeatureMoments().update(features[:, :, :1, :1]), features[:, :, 0, 0])


def test_mixed_dtypes(device):
    parts = [torch.randn(9, 4, device=device), torch.randn(3, 4, device=device, dtype=torch.float64)]
    moments = FeatureMoments()
    for part in (*parts, parts[0].bfloat16()):
        moments.update(part)
    assert_moments(moments, torch.cat([*(p.double() for p in parts), parts[0].bfloat16().double()]))


def test_merge(device):
    features = torch.randn(300, 4, device=device) + torch.arange(300, device=device)[:, None]
    first, second, third, empty = FeatureMoments(), FeatureMoments(unbiased=False), FeatureMoments(4), FeatureMoments()
    for moments, part in zip((first, second, third), features.split([1, 250, 49]), strict=True):
        moments.update(part)
    before = copy.deepcopy(second)
    first.merge(empty).merge(second).merge(third)
    assert_moments(first, features)
    assert torch.equal(second.cov, before.cov)
    assert second.count == before.count == 250
    assert_moments(empty.merge(second), features[1:251])
    empty.update(features[:1])
    assert second.count == 250, "merging into an empty one must copy"
    assert torch.equal(second.cov, before.cov)
    assert_moments(third.merge(third), torch.cat([features[251:]] * 2))


def test_merge_with_distant_shifts(device):
    features = 1e6 + torch.randn(400, 3, dtype=torch.float64, device=device)
    halves = [FeatureMoments().update(half) for half in features.split(200)]
    assert_moments(halves[0].merge(halves[1]), features)


@pytest.mark.parametrize("dim", [None, 4])
def test_state_dict_resumes_exactly(dim, device):
    features = torch.randn(100, 4, device=device)
    moments = FeatureMoments().update(features[:60])
    file = io.BytesIO()
    torch.save(moments.state_dict(), file)
    file.seek(0)
    resumed = FeatureMoments(dim, device=device).update(torch.randn(5, 4))
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(resumed.cov, moments.cov)
    assert torch.equal(resumed.update(features[60:]).cov, moments.update(features[60:]).cov)
    with pytest.raises(RuntimeError, match="the state must have 5 dimensions, got 4"):
        FeatureMoments(5).load_state_dict(moments.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*scatter"):
        FeatureMoments().load_state_dict({"count": torch.tensor(1)})
    with pytest.raises(RuntimeError, match=r"must have shapes \[\], \[d\], \[d\], \[d, d\], got"):
        resumed.load_state_dict(moments.state_dict() | {"scatter": torch.zeros(4)})
    assert torch.equal(resumed.cov, moments.cov)
    rows = FeatureRows().update(features)
    with pytest.raises(RuntimeError, match=r"must have shape \[N, d\], got \[4\]"):
        rows.load_state_dict({"features": torch.zeros(4)})
    assert rows.count == 100


def test_state_dict_sets_the_device_unless_given(device):
    features = torch.randn(20, 4, device=device)
    for kind in (FeatureMoments, FeatureRows):
        state = kind().update(features).state_dict()
        for given, expected in ((None, device), ("cpu", "cpu")):
            resumed = kind(device=given)
            resumed.load_state_dict(state)
            assert resumed.device.type == expected
            assert resumed.update(features.cpu()).count == 40
    meta = FeatureRows()
    meta.load_state_dict({"features": torch.empty(3, 2, device="meta")})
    assert meta.device.type == "meta"


def test_moves_keep_float64(device):
    features = torch.randn(30, 3, device=device)
    moments = FeatureMoments().update(features)
    moments.half().to(torch.bfloat16).to(device)
    assert_moments(moments, features)
    holder = torch.nn.Sequential(moments).to(device, torch.float16)
    assert_moments(holder[0], features)
    assert_moments(FeatureMoments(device="cpu").update(features), features)


def test_sums_from_inference_mode_can_be_updated(device):
    with torch.inference_mode():
        features = torch.randn(2 * _BLOCK_ROWS, 3, device=device)
        moments = FeatureMoments().update(features[:10]).update(features[10 : _BLOCK_ROWS + 10])
        assert moments.count == _BLOCK_ROWS + 10
        assert not moments.cov.requires_grad
    moments.update(features[_BLOCK_ROWS + 10 :].clone())
    assert_moments(moments, features)
    copy.deepcopy(moments)


def test_reset_keeps_only_a_given_dimension():
    moments = FeatureMoments().update(torch.randn(5, 3))
    moments.reset()
    assert (moments.count, moments.dim) == (0, None)
    features = torch.randn(5, 6)
    assert_moments(moments.update(features), features)
    fixed = FeatureMoments(np.int64(3)).update(torch.randn(5, 3))
    fixed.reset()
    assert (fixed.count, fixed.dim) == (0, 3)


def test_empty_batches_and_few_samples():
    moments = FeatureMoments().update(torch.empty(0, 3))
    with pytest.raises(ValueError, match="a mean needs at least 1 sample, got 0"):
        _ = moments.mean
    moments.update(torch.tensor([[1.0, 2, 3]]))
    assert moments.mean.tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="unbiased covariance needs at least 2 samples, got 1"):
        _ = moments.cov
    biased = FeatureMoments(unbiased=False).merge(moments)
    assert torch.equal(biased.cov, torch.zeros(3, 3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        (torch.zeros(2, 4), ValueError, r"must have shape \[N, 3\] or \[B, 3, H, W\], got \[2, 4\]"),
        (torch.zeros(3), ValueError, r"shape \[N, 3\] or \[B, 3, H, W\], got \[3\]"),
        (torch.zeros(2, 3, 0, 5), ValueError, r"got \[2, 3, 0, 5\]"),
        (torch.zeros(2, 3, dtype=torch.uint8), TypeError, r"must be float32, .* got torch.uint8"),
        (np.zeros((2, 3)), TypeError, "must be a tensor, got ndarray"),
        (torch.tensor([[0.0, 0, 1], [0, float("nan"), 0], [float("inf"), 0, 0]]), ValueError, "NaN or infinity in 2 of 3 samples"),
    ],
)
def test_bad_features_do_not_change_the_moments(features, error, message):
    good = torch.randn(9, 3)
    moments = FeatureMoments().update(good)
    with pytest.raises(error, match=f"FeatureMoments: .*{message}"):
        moments.update(features)
    assert_moments(moments, good)


def test_bad_arguments():
    with pytest.raises(ValueError, match="dim must be a whole number of at least 1, got 0"):
        FeatureMoments(0)
    with pytest.raises(ValueError, match="must have one dimension, got 3 and 2"):
        FeatureMoments(3).merge(FeatureMoments(2))
    with pytest.raises(TypeError, match="only FeatureMoments can be merged, got int"):
        FeatureMoments().merge(3)


def test_sync_without_torch_distributed():
    features = torch.randn(5, 3)
    moments = FeatureMoments().update(features)
    assert_moments(moments.sync().sync(), features)


def error_of(call):
    try:
        call()
    except RuntimeError as error:
        return str(error)


def _synchronize(rank, path, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    features = 1e6 + torch.randn(90, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moments = FeatureMoments().update(features[:70] if rank == 0 else features[70:]).sync()
    alone = FeatureMoments()
    if rank == 1:
        alone.update(features)
    alone.sync()
    nothing = FeatureMoments().sync()
    errors = [error_of(moments.sync)]
    loaded = FeatureMoments()
    loaded.load_state_dict(moments.state_dict())
    errors += [error_of(call) for call in (loaded.sync, lambda: loaded.update(features), lambda: loaded.merge(alone))]
    one_of_two = copy.deepcopy(moments)
    if rank == 1:
        one_of_two.reset()
    errors.append(error_of(one_of_two.sync))
    kept = FrechetDistance(reset_real=False)
    kept.update(features, real=True)
    if rank == 0:
        kept.real.load_state_dict(moments.state_dict())
    errors += [error_of(kept.sync), kept.fake.is_synced]
    rows = FeatureRows().update(features[:2]).sync()
    again = FeatureRows()
    again.load_state_dict(rows.state_dict())
    errors += [error_of(call) for call in (again.sync, lambda: again.update(features), lambda: again.merge(rows))]
    try:
        FeatureMoments().update(torch.zeros(2, 3 + rank)).sync()
        dims = ""
    except ValueError as error:
        dims = str(error)
    again = copy.deepcopy(moments)
    again.reset()
    again.update(features[:2]).sync()
    scores = []
    for metric in (FrechetDistance(reset_real=False), KernelInceptionDistance(reset_real=False)):
        features = features - features.round(decimals=-6)
        metric.update(features[rank::2], real=True)
        if rank == 1:
            metric.update(features[:40] + 1, real=False)
        metric.sync()
        metric.reset()
        metric.update(features[50 * rank :][: 50 - 20 * rank] - 1, real=False)
        metric.sync()  # gathers the generated samples only
        value = metric.compute() if isinstance(metric, FrechetDistance) else metric.compute_full()
        scores.append((metric.real.count, metric.fake.count, float(value)))
    statistics = [(m.count, m.mean.tolist(), m.cov.tolist()) for m in (moments, alone)]
    results.put((rank, statistics, nothing.count, errors, dims, again.count, scores))
    leave_rank()


def test_sync_of_uneven_ranks(tmp_path):
    context = forked_context()
    results = context.SimpleQueue()
    processes = [context.Process(target=_synchronize, args=(rank, tmp_path / "store", results), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    first, second = sorted(results.get() for _ in processes)
    assert first[1:] == second[1:], "bitwise"
    features = 1e6 + torch.randn(90, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, cov = two_pass(features)
    for count, found_mean, found_cov in first[1]:
        assert count == 90
        np.testing.assert_allclose(found_mean, mean.astype(np.float64), rtol=1e-15)
        np.testing.assert_allclose(found_cov, cov.astype(np.float64), rtol=0, atol=1e-13)
    nothing, errors, dims, again, scores = first[2:]
    twice, more = "call reset() before another sync()", "call reset() before adding samples after sync()"
    for found, expected in zip(
        errors,
        [twice, twice, more, more, twice, "the real samples are synchronized on some ranks only", False, twice, more, more],
        strict=True,
    ):
        assert found is expected or expected in found
    assert (nothing, dims, again) == (0, "FeatureMoments: features must have the same dimension on all ranks, got [3, 4].", 4)
    features -= features.round(decimals=-6)
    for metric, (real, fake, value) in zip((FrechetDistance(), KernelInceptionDistance()), scores, strict=True):
        metric.update(features, real=True)
        metric.update(torch.cat([features[:50], features[50:80]]) - 1, real=False)
        assert (real, fake) == (90, 80)
        expected = metric.compute() if isinstance(metric, FrechetDistance) else metric.compute_full()
        assert value == pytest.approx(float(expected), rel=1e-7)


@pytest.mark.parametrize("make", [FrechetDistance, KernelInceptionDistance, PrecisionRecall])
def test_metrics_have_no_buffers(make):
    """DistributedDataParallel would overwrite them with those of the first rank, in every forward pass."""
    metric = make()
    metric.update(torch.randn(2000, 4), real=True)
    metric.update(torch.randn(2000, 4), real=False)
    assert not list(metric.buffers())
    state = metric.state_dict()
    other = make()
    other.load_state_dict(state)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in state.items())


def run_rank(rank, path):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    train_with_metric(rank)
    leave_rank()


def train_with_metric(rank):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(4096, 4, generator=generator)
    model = torch.nn.ModuleDict({"generator": torch.nn.Linear(4, 4), "moments": FeatureMoments()})
    model.forward = model["generator"].forward
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    for batch in features[rank::2].split(512):
        wrapped(batch)
        model["moments"].update(batch)
        model["moments"].mean  # noqa: B018 adds the buffered features to the sums
    assert_moments(model["moments"].sync(), features)


def test_metric_inside_a_distributed_module_keeps_the_sums_of_its_rank(tmp_path):
    forked_context()
    multiprocessing.start_processes(run_rank, (tmp_path / "store",), nprocs=2, start_method="forkserver")
