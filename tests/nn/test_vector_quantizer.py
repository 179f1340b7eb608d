# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch.nn import functional as F

from genperf.nn import VectorQuantizer, code_usage

DECAY, EPS = 0.9, 1e-5


def ema_step(x, codebook, counts, sums):
    """Codebook, counts and sums after an EMA update, in plain PyTorch, for x [N, D]."""
    nearest = (x[:, None] - codebook).square().sum(-1).argmin(1)
    one_hot = F.one_hot(nearest, len(codebook)).to(x.dtype)
    counts = DECAY * counts + (1 - DECAY) * one_hot.sum(0)
    sums = DECAY * sums + (1 - DECAY) * one_hot.T @ x
    smoothed = (counts + EPS) / (counts.sum() + len(codebook) * EPS) * counts.sum()
    return sums / smoothed[:, None], counts, sums


@pytest.mark.parametrize("channel_dim", [-1, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ema_matches_the_formula(dtype, channel_dim):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(7, 3, decay=DECAY, eps=EPS, channel_dim=channel_dim).to(dtype)
    codebook = quantizer.codebook.double().clone()
    expected = codebook, torch.ones(7, dtype=torch.float64), codebook
    for _ in range(4):
        x = torch.randn(5, 4, 3, dtype=dtype)
        quantizer(x.movedim(-1, channel_dim))
        expected = ema_step(x.double().reshape(-1, 3), *expected)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for name, value in zip(("codebook", "counts", "sums"), expected, strict=True):
        torch.testing.assert_close(getattr(quantizer, name).double(), value, rtol=tolerance, atol=tolerance, msg=name)


def test_masked_vectors_do_not_affect_the_codebook():
    torch.manual_seed(0)
    masked, kept = VectorQuantizer(5, 3, decay=DECAY), VectorQuantizer(5, 3, decay=DECAY)
    kept.load_state_dict(masked.state_dict())
    x = torch.randn(4, 6, 3)
    mask = torch.rand(4, 6) < 0.5
    x[~mask] = float("nan")
    quantized, indices, loss = masked(x, mask)
    kept_quantized, kept_indices, kept_loss = kept(x[mask])
    for name in ("codebook", "counts", "sums"):
        assert torch.equal(getattr(masked, name), getattr(kept, name)), name
    assert torch.equal(quantized[mask], kept_quantized)
    assert not quantized[~mask].any()
    assert torch.equal(indices[mask], kept_indices)
    assert (indices[~mask] == -1).all()
    torch.testing.assert_close(loss, kept_loss)


def test_a_step_uses_the_codes_from_before_its_update():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(5, 3, decay=DECAY, commitment_weight=0.5)
    before = quantizer.codebook.clone()
    x = torch.randn(20, 3, requires_grad=True)
    quantized, indices, loss = quantizer(x)
    assert not torch.equal(quantizer.codebook, before)
    assert torch.equal(quantized, before[indices])
    loss.backward()
    torch.testing.assert_close(loss, 0.5 * F.mse_loss(x, before[indices]))  # only the commitment loss
    torch.testing.assert_close(x.grad, 0.5 * 2 * (x.detach() - before[indices]) / x.numel())


def test_gradient_step_of_a_learned_codebook_matches_plain_pytorch():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(6, 4, codebook_weight=0.7, commitment_weight=0.3)
    plain = quantizer.codebook.detach().clone().requires_grad_()
    x = torch.randn(30, 4)
    indices = torch.cdist(x, plain).argmin(1)
    F.mse_loss(plain[indices], x).mul(0.7).backward()

    optimizer = torch.optim.SGD(quantizer.parameters(), lr=2.0)
    quantizer(x)[2].backward()
    optimizer.step()
    torch.testing.assert_close(quantizer.codebook.detach(), plain.detach() - 2.0 * plain.grad)
    assert not torch.equal(quantizer.codebook, plain)


@pytest.mark.parametrize("decay", [None, DECAY])
@pytest.mark.parametrize("channel_dim", [-1, 1])
def test_decode_equals_quantized_bitwise(decay, channel_dim):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(6, 4, decay=decay, channel_dim=channel_dim).eval()
    x = torch.randn(2, 3, 5, 4).movedim(-1, channel_dim)
    mask = torch.rand(2, 3, 5) < 0.7
    for valid in (None, mask):
        quantized, indices, _ = quantizer(x, valid)
        assert torch.equal(quantizer.decode(indices), quantized)
    assert torch.equal(quantizer.encode(x)[mask], indices[mask])
    with pytest.raises(TypeError, match="int64"):
        quantizer.decode(indices.int())


def test_decode_is_differentiable_in_a_learned_codebook():
    quantizer = VectorQuantizer(4, 2)
    quantizer.decode(torch.tensor([1, 1, 3, -1])).sum().backward()
    assert quantizer.codebook.grad.tolist() == [[0, 0], [2, 2], [0, 0], [1, 1]]


@pytest.mark.parametrize(("decay", "names"), [(None, {"codebook"}), (DECAY, {"codebook", "counts", "sums"})])
def test_state_dict_round_trip(decay, names):
    torch.manual_seed(0)
    source, target = (VectorQuantizer(5, 3, decay=decay) for _ in range(2))
    source(torch.randn(20, 3))
    state = source.state_dict()
    assert state.keys() == names
    assert not torch.equal(source.codebook, target.codebook)
    target.load_state_dict(state)
    x = torch.randn(20, 3)
    for step in range(2):
        for expected, found in zip(source(x), target(x), strict=True):
            assert torch.equal(found, expected), step
    assert {name for name, _ in source.named_parameters()} == ({"codebook"} if decay is None else set())


def test_evaluation_updates_nothing():
    quantizer = VectorQuantizer(5, 3, decay=DECAY, init="data").eval()
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    quantizer(torch.randn(20, 3))
    quantizer.encode(torch.randn(20, 3))
    for name, value in quantizer.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("decay", [None, DECAY])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_vectors_train_a_float32_codebook(dtype, decay):
    torch.manual_seed(0)
    half, full = VectorQuantizer(5, 3, decay=decay), VectorQuantizer(5, 3, decay=decay)
    full.load_state_dict(half.state_dict())
    x = torch.randn(40, 3).to(dtype).requires_grad_()
    quantized, indices, loss = half(x)
    (quantized.float().sum() + loss).backward()
    _, full_indices, full_loss = full(x.detach().float())
    assert quantized.dtype == x.grad.dtype == dtype
    assert loss.dtype == half.codebook.dtype == torch.float32
    assert torch.equal(indices, full_indices)
    if decay is None:
        full_loss.backward()
        torch.testing.assert_close(half.codebook.grad, full.codebook.grad)
    else:
        assert torch.equal(half.codebook, full.codebook)


def test_same_seed_same_codes():
    codebooks = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        quantizer = VectorQuantizer(50, 3, init="data")
        assert not quantizer.codebook.any(), "zeros stand for codes that data have to set"
        start = VectorQuantizer(50, 3).codebook.detach().clone()
        assert start.abs().max() <= 1 / 50
        quantizer(torch.arange(300.0).reshape(100, 3))
        codebooks.append((start, quantizer.codebook.detach().clone()))
    for first, second, other in zip(*codebooks, strict=True):
        assert torch.equal(first, second)
        assert not torch.equal(first, other)


@pytest.mark.parametrize("decay", [None, DECAY])
def test_data_initializes_the_codes_once(decay):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(8, 2, decay=decay, init="data", channel_dim=1)
    x = torch.arange(60.0).reshape(2, 15, 2).movedim(-1, 1)
    mask = torch.arange(30).reshape(2, 15) % 3 == 0  # 10 vectors for 8 codes
    quantized = quantizer(x, mask)[0]
    codes = quantized.movedim(1, -1)[mask].unique(dim=0)
    assert len(codes) == 8, "the codes must be 8 different vectors of x"
    assert all((x.movedim(1, -1)[mask] == code).all(-1).any() for code in codes)
    before = quantizer.codebook.detach().clone()
    quantizer(1000 + x)
    moved = quantizer.codebook.detach() - before
    assert moved.count_nonzero() == 0 if decay is None else moved.abs().max() < 1000


def test_init_codes_with_fewer_vectors_than_codes():
    quantizer = VectorQuantizer(5, 2)
    before = quantizer.codebook.detach().clone()
    quantizer.init_codes(torch.zeros(0, 2))
    quantizer.init_codes(torch.full((3, 2), float("nan")), torch.zeros(3, dtype=torch.bool))
    assert torch.equal(quantizer.codebook, before)
    quantizer.init_codes(torch.tensor([[1.0, 1], [2, 2]]))
    assert sorted(quantizer.codebook[:, 0].tolist()) in ([1, 1, 1, 2, 2], [1, 1, 2, 2, 2])


def test_loaded_codes_are_not_initialized_from_data():
    quantizer = VectorQuantizer(5, 3, init="data")
    codebook = torch.randn(5, 3)
    quantizer.load_state_dict({"codebook": codebook})
    quantizer(torch.randn(20, 3))
    assert torch.equal(quantizer.codebook, codebook)


def test_gradient_and_metric_options():
    torch.manual_seed(0)
    x = torch.randn(20, 3, requires_grad=True)
    quantizer = VectorQuantizer(5, 3, gradient="rotation", metric="cosine")
    quantized, indices, _ = quantizer(x)
    assert torch.equal(indices, (x @ F.normalize(quantizer.codebook, dim=-1).T).argmax(-1))
    quantized.sum().backward()
    assert not torch.allclose(x.grad, torch.ones(20, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_codes": 0}, "num_codes must be at least 1, got 0"),
        ({"dim": -1}, "dim must be at least 1, got -1"),
        ({"decay": 1.0}, r"decay must be None or lie in \[0, 1\), got 1.0"),
        ({"decay": -0.1}, "decay must be"),
        ({"decay": float("nan")}, "decay must be"),
        ({"eps": 0.0}, "eps must be positive, got 0.0"),
        ({"codebook_weight": -1.0}, "codebook_weight must not be negative, got -1.0"),
        ({"commitment_weight": -1.0}, "commitment_weight must not be negative"),
        ({"gradient": "none"}, "gradient must be one of straight_through, rotation, got 'none'"),
        ({"metric": "dot"}, "metric must be one of euclidean, cosine, got 'dot'"),
        ({"init": "pca"}, "init must be one of uniform, data, kmeans, got 'pca'"),
    ],
)
def test_invalid_constructor_arguments(arguments, message):
    with pytest.raises(ValueError, match="^VectorQuantizer: .*" + message):
        VectorQuantizer(**{"num_codes": 4, "dim": 2, **arguments})


def test_code_usage():
    usage = code_usage(torch.tensor([[0, 0, 2], [2, -1, 5]]), 6)
    entropy = -(2 * 0.4 * torch.tensor(0.4).log() + 0.2 * torch.tensor(0.2).log())
    assert usage.used == 3
    torch.testing.assert_close(usage.perplexity, entropy.exp().double(), rtol=1e-6, atol=0)
    assert code_usage(torch.arange(64), 64).perplexity.item() == pytest.approx(64)
    assert code_usage(torch.tensor([-1, -1]), 3) == (0, 0, 1)
    with pytest.raises(TypeError, match="int64"):
        code_usage(torch.zeros(3), 3)
    with pytest.raises(ValueError, match="num_codes"):
        code_usage(torch.zeros(3, dtype=torch.int64), 0)
    for wrong in (-2, 5):
        with pytest.raises(IndexError, match=rf"code_usage: indices must lie between -1 and 4, got {min(wrong, 0)} \.\.\. {max(wrong, 0)}"):
            code_usage(torch.tensor([0, wrong]), 5)
