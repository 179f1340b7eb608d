# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

import genperf


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("options", [{}, {"update": "ema"}, {"weights": True, "n_init": 2}, {"weights": True, "balance": 1.05}], ids=str)
def test_equals_kmeans_of_residuals(options, dtype, device):
    x = torch.randn(2, 6, 150, generator=seeded()).to(dtype).to(device)
    if "weights" in options:
        options = options | {"weights": torch.rand(2, 150, generator=seeded()).to(device)}
    generators = seeded(), seeded()
    found = genperf.residual_kmeans(x, 10, 3, iterations=4, channel_dim=1, generator=generators[0], **options)
    residual = x if dtype == torch.float64 else x.float()
    assert found.codebooks.dtype == residual.dtype
    for stage in range(3):
        # The first stage reads x as it is.
        single = genperf.kmeans(x if stage == 0 else residual, 10, iterations=4, channel_dim=1, generator=generators[1], **options)
        assert torch.equal(single.codebook, found.codebooks[stage])
        assert torch.equal(single.indices, found.indices[..., stage])
        assert torch.equal(single.counts, found.counts[stage])
        assert torch.equal(single.inertia, found.inertia[stage])
        residual = residual - single.codebook[single.indices].movedim(-1, 1)
    if "balance" not in options:
        assert torch.equal(genperf.residual_vector_quantize(x, found.codebooks, channel_dim=1)[1], found.indices)
    assert (found.inertia[1:] < found.inertia[:-1]).all()


def test_cosine_is_spherical_and_then_of_residuals_of_unit_vectors(device):
    x, weights = torch.randn(150, 6, generator=seeded()).to(device), torch.rand(150, generator=seeded()).to(device)
    options, generator = {"iterations": 4, "weights": weights}, seeded()
    found = genperf.residual_kmeans(x, 10, 3, metric="cosine", generator=seeded(), **options)
    unit = x * (1 / x.double().norm(dim=1, keepdim=True).float())
    residual = unit
    for stage in range(3):
        metric = "cosine" if stage == 0 else "euclidean"
        single = genperf.kmeans(x if stage == 0 else residual, 10, metric=metric, generator=generator, **options)
        for name, expected in single._asdict().items():
            part = found.indices[:, stage] if name == "indices" else getattr(found, f"{name}s" if name == "codebook" else name)[stage]
            assert torch.equal(part, expected), (stage, name)
        residual = residual - single.codebook[single.indices]
    torch.testing.assert_close(found.codebooks[0].norm(dim=1), torch.ones(10, device=device))
    assert torch.equal(genperf.residual_vector_quantize(unit, found.codebooks)[1], found.indices)
    scaled = genperf.residual_kmeans(4 * x, 10, 3, metric="cosine", generator=seeded(), **options)
    assert all(torch.equal(part, other) for part, other in zip(scaled, found, strict=True))


def test_callback_knows_the_stage():
    seen = []

    def note(progress):
        seen.append((progress.stage, progress.iteration))
        assert progress.indices.shape == (4, 15)

    genperf.residual_kmeans(torch.randn(4, 3, 15), 4, 2, channel_dim=1, iterations=2, callback=note, generator=seeded())
    assert sorted({stage for stage, _ in seen}) == [0, 1]
    assert (1, 0) in seen


@pytest.mark.parametrize(
    ("message", "error", "kwargs"),
    [
        ("stages must be at least 1, got 0", ValueError, {"stages": 0}),
        ("num_codes must be at least 1, got 0", ValueError, {"num_codes": 0}),
        ("init must be one of k-means..?.?, random", ValueError, {"init": torch.zeros(4, 3)}),
        ("x must have at least one vector", ValueError, {"x": torch.zeros(0, 3)}),
        ("x must be float32", TypeError, {"x": torch.zeros(5, 3, dtype=torch.int32)}),
        ("metric must be one of euclidean, cosine, got 'dot'", ValueError, {"metric": "dot"}),
        ("x must be finite", ValueError, {"x": torch.full((5, 3), torch.nan)}),
        ("balance must be a finite number of at least 1, got 0.5", ValueError, {"balance": 0.5}),
    ],
)
def test_bad_input(message, error, kwargs):
    with pytest.raises(error, match=f"residual_kmeans: .*{message}"):
        genperf.residual_kmeans(**{"x": torch.zeros(9, 3), "num_codes": 4, "stages": 2} | kwargs)
