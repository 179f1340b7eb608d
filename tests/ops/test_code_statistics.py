# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

import genperf
from genperf import testing

pytestmark = pytest.mark.compiled


def one_hot_statistics(x, indices, num_codes, weights=None):
    one_hot = torch.nn.functional.one_hot(indices.clamp(min=0), num_codes) * (indices >= 0).unsqueeze(-1)
    one_hot = one_hot.to(x.dtype) if weights is None else one_hot.to(x.dtype) * weights.unsqueeze(-1).to(x.dtype)
    return one_hot.sum(0), one_hot.T @ x


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_accuracy(dtype, weighted, device):
    for kind in ("random", "offset"):
        for n, k, d in [(1, 1, 1), (7, 31, 33), (1000, 7, 31), (3000, 300, 7), (33, 5, 1000)]:
            x, _ = testing.vectors(kind, n, k, d, dtype, device)
            indices = torch.randint(-1, k, (n,), device=device)
            weights = torch.rand(n, device=device) if weighted else None
            counts, sums = genperf.code_statistics(x, indices, k, weights=weights)
            exact = one_hot_statistics(x.double(), indices, k, weights)
            plain = one_hot_statistics(x.float(), indices, k, weights)
            testing.assert_accurate(f"counts {n, k, d}", counts, exact[0], plain[0])
            testing.assert_accurate(f"sums {n, k, d}", sums, exact[1], plain[1])


@pytest.mark.parametrize("dtype", [*testing.DTYPES, torch.float64], ids=str)
def test_native_equals_reference_in_every_layout(dtype, device):
    for n, k, d in [(1, 3, 2), (256, 30, 33), (1000, 7, 7)]:
        x, _ = testing.vectors("random", n, k, d, dtype, device)
        indices, weights = torch.randint(-1, k, (n,), device=device), torch.rand(n, device=device)
        expected = genperf.code_statistics(x, indices, k, weights=weights, impl="reference")
        for name, (laid_out, channel_dim) in testing.layouts(x).items():
            shape = list(laid_out.shape)
            shape.pop(channel_dim)
            found = genperf.code_statistics(laid_out, indices.reshape(shape), k, weights=weights.reshape(shape), channel_dim=channel_dim)
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=2e-7, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", [*testing.DTYPES, torch.float64], ids=str)
def test_images_equal_their_rows(dtype, device):
    """Bitwise, with codes that have no vector, and where blocks of positions and channels end early."""
    for images, dim, pixels in [(5, 3, 8), (2, 20, 49), (3, 33, 1), (1, 8, 70), (1, 1, 40)]:
        rows, _ = testing.vectors("random", images * pixels, 1, dim, dtype, device)
        indices, weights = torch.randint(-1, 60, (images, pixels), device=device), torch.rand(images, pixels, device=device)
        image = rows.unflatten(0, (images, pixels)).movedim(-1, 1).contiguous()
        for given in (None, weights):
            flat = None if given is None else given.flatten()
            expected = genperf.code_statistics(rows, indices.flatten(), 70, weights=flat)
            for laid_out in (image, torch.stack([image, image], -1)[..., 0]):
                found = genperf.code_statistics(laid_out, indices, 70, weights=given, channel_dim=1)
                assert all(map(torch.equal, found, expected))


def test_bitwise_equal_in_every_run_and_for_any_number_of_threads(device, set_threads):
    x, _ = testing.vectors("offset", 5000, 1, 37, torch.float32, device)
    indices = torch.randint(13, (5000,), device=device)
    first = genperf.code_statistics(x, indices, 13)
    for count in (1, 2, 3):
        set_threads(count)
        for a, b in zip(genperf.code_statistics(x, indices, 13), first, strict=True):
            assert torch.equal(a, b)


def test_skewed_and_unused_codes(device):
    x, _ = testing.vectors("random", 2000, 1, 9, torch.float32, device)
    indices = torch.full((2000,), 3, device=device)
    counts, sums = genperf.code_statistics(x, indices, 50)
    assert counts[3] == 2000
    assert counts.sum() == 2000
    testing.assert_accurate("sums", sums[3], x.double().sum(0), x.sum(0))
    assert (sums[torch.arange(50, device=device) != 3] == 0).all()


def test_nan_stays_with_its_code(device):
    x, _ = testing.vectors("random", 100, 1, 4, torch.float32, device)
    indices = torch.arange(100, device=device) % 10
    x[3] = torch.nan
    _, sums = genperf.code_statistics(x, indices, 10)
    assert sums[3].isnan().all()
    assert sums.isfinite().all(1).sum() == 9


def test_empty_and_masked(device):
    counts, sums = genperf.code_statistics(torch.empty(0, 5, device=device), torch.empty(0, dtype=torch.int64, device=device), 4)
    assert (counts == 0).all()
    assert (sums == 0).all()
    x = torch.full((6, 5), torch.nan, device=device)
    counts, sums = genperf.code_statistics(x, torch.full((6,), -1, device=device), 4)
    assert (counts == 0).all()
    assert (sums == 0).all()


def test_indices_of_any_strides(device):
    x, indices = torch.randn(3, 4, 5, device=device), torch.randint(7, (5, 3), device=device).t()
    for a, b in zip(
        genperf.code_statistics(x, indices, 7, channel_dim=1),
        genperf.code_statistics(x, indices.contiguous(), 7, channel_dim=1),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_poisoned_memory(device):
    with testing.poisoned_memory():
        x, _ = testing.vectors("random", 130, 1, 21, torch.float32, device)
        indices = torch.randint(-1, 40, (130,), device=device)
        for a, b in zip(genperf.code_statistics(x, indices, 40), genperf.code_statistics(x, indices, 40, impl="reference"), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.once
def test_contract(device):
    x, indices = torch.randn(2, 6, 35, device=device), torch.randint(-1, 9, (2, 35), device=device)
    weights, origins = torch.rand(2, 35, device=device), torch.randn(9, 6, device=device)
    testing.check_op(
        "code_statistics",
        [(x, indices, 9, None, None), (x.transpose(0, 1).contiguous().transpose(0, 1), indices, 9, weights, origins)],
    )

    def statistics(x, indices):
        return genperf.code_statistics(x, indices, 9)

    testing.check_compile(statistics, *[(torch.randn(n, 6, device=device), torch.randint(9, (n,), device=device)) for n in (20, 33)])


GOOD = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("message", "error", "x", "indices", "codes", "options"),
    [
        ("indices must have the shape of x without", ValueError, GOOD, torch.zeros(3, dtype=torch.int64), 2, {}),
        ("indices must be int64", TypeError, GOOD, torch.zeros(4), 2, {}),
        ("num_codes must be at least 1", ValueError, GOOD, torch.zeros(4, dtype=torch.int64), 0, {}),
        ("x must be float32", TypeError, GOOD.int(), torch.zeros(4, dtype=torch.int64), 2, {}),
        ("weights must have the shape", ValueError, GOOD, torch.zeros(4, dtype=torch.int64), 2, {"weights": torch.ones(3)}),
        ("indices must lie between -1 and 1, got 0 ... 2", IndexError, GOOD, torch.tensor([0, 1, 2, 0]), 2, {}),
        ("indices must lie between -1 and 1, got -2 ... 0", IndexError, GOOD, torch.tensor([0, -2, 0, 0]), 2, {}),
        ("channel_dim must be a dimension", ValueError, GOOD, torch.zeros(4, dtype=torch.int64), 2, {"channel_dim": -3}),
    ],
)
def test_bad_input(message, error, x, indices, codes, options):
    with pytest.raises(error, match="code_statistics: .*" + message):
        genperf.code_statistics(x, indices, codes, **options)
