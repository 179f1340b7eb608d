# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch.nn import functional as F

from genperf import gumbel_sample, sample_offset
from genperf.models import index_prior
from genperf.models.index_prior import IndexPrior

K, C = 7, 3


def make(condition=False, **changes):
    torch.manual_seed(0)
    return IndexPrior(K, **{"width": 8, "num_conditions": C * condition, **changes})


def inputs(condition=False, batch=2, height=3, width=4):
    return torch.randint(K, (batch, height, width)), torch.randn(batch, C, height, width) if condition else None


@pytest.mark.parametrize("condition", [False, True])
@pytest.mark.parametrize(("height", "width"), [(3, 4), (1, 5), (4, 1)])
def test_logits_depend_on_all_previous_indices_only(condition, height, width):
    prior = make(condition).double()
    indices, condition = inputs(condition, 1, height, width)
    condition = None if condition is None else condition.double()
    logits = prior(indices, condition).flatten(2)
    assert logits.shape == (1, K, height * width)
    for t in range(height * width):
        other = indices.flatten(1).clone()
        other[0, t] = (other[0, t] + 1) % K
        changed = (prior(other.view_as(indices), condition).flatten(2) - logits).abs().amax((0, 1))
        assert not changed[: t + 1].any()
        assert (changed[t + 1 :] > 0).all()


def test_condition_reaches_every_position():
    prior = make(True)
    indices, condition = inputs(True)
    condition.requires_grad_()
    for row, column in ((0, 0), (2, 3)):
        (gradient,) = torch.autograd.grad(prior(indices, condition)[0, :, row, column].square().sum(), condition)
        assert gradient[0, :, row, column].any()
        assert not gradient[1].any()


@pytest.mark.parametrize("condition", [False, True])
def test_loss_is_the_cross_entropy_in_nats(condition):
    prior = make(condition)
    indices, condition = inputs(condition)
    loss = prior.loss(indices, condition)
    torch.testing.assert_close(loss, F.cross_entropy(prior(indices, condition), indices))
    loss.backward()
    assert all(p.grad is not None for p in prior.parameters())


@pytest.mark.parametrize("condition", [False, True])
def test_cached_sampling_matches_forward(condition, monkeypatch):
    """The logits computed step by step are those of `forward` on the sampled map."""
    prior, seen, labels = make(condition, num_classes=3), [], torch.arange(5) % 3
    monkeypatch.setattr(index_prior, "gumbel_sample", lambda logits, **options: seen.append(logits) or gumbel_sample(logits, **options))
    _, condition = inputs(condition, 5)
    drawn = prior.sample(5, 3, 4, condition, labels, temperature=0.5)
    assert drawn.shape == (5, 3, 4)
    torch.testing.assert_close(0.5 * torch.stack(seen, 2), prior(drawn, condition, labels).flatten(2), rtol=1e-4, atol=1e-5)


def test_label_reaches_every_position():
    prior, (indices, _) = make(num_classes=3), inputs()
    labels = torch.tensor([1, 2])
    logits = prior(indices, labels=labels)
    changed = (prior(indices, labels=torch.tensor([1, 0])) - logits).abs().amax(1)
    assert not changed[0].any()
    assert (changed[1] > 0).all()
    torch.testing.assert_close(prior.loss(indices, labels=labels), F.cross_entropy(logits, indices))
    assert [name for name in prior.state_dict() if name not in make().state_dict()] == ["label.weight"]


def test_dropout_is_noise_of_the_global_batch():
    prior, (indices, _) = make(dropout=0.2).train(), inputs(batch=6)
    shares = []
    for first, part in ((0, indices), (0, indices[:2]), (2, indices[2:])):
        torch.manual_seed(5)
        with sample_offset(first):
            shares.append(prior(part))
    torch.testing.assert_close(shares[0], torch.cat(shares[1:]))
    assert not torch.allclose(prior(indices), shares[0])
    noise = prior.blocks[0]._drop(torch.ones(40_000, 1))
    assert noise.mean() == pytest.approx(1, abs=0.02)
    assert noise.std() == pytest.approx(0.5, abs=0.02)  # sqrt(0.2 / 0.8)
    prior.eval()
    assert torch.equal(prior(indices), make()(indices))


def test_samples_follow_the_model_distribution():
    prior, n = make(width=16), 20_000
    with torch.no_grad():
        prior.head[1].weight *= 4
        pairs = torch.cartesian_prod(torch.arange(K), torch.arange(K)).view(-1, 1, 2)
        log_p = F.log_softmax(prior(pairs), 1).gather(1, pairs.unsqueeze(1)).sum((1, 2, 3))
    assert log_p.exp().sum() == pytest.approx(1)
    drawn = prior.sample(n, 1, 2)
    shares = torch.bincount(drawn[:, 0, 0] * K + drawn[:, 0, 1], minlength=K * K) / n
    deviation = (log_p.exp() * (1 - log_p.exp()) / n).sqrt()
    assert ((shares - log_p.exp()).abs() < 5 * deviation).all()
    cold = prior.sample(500, 1, 1, temperature=1e-4).flatten()
    assert (cold == prior(pairs)[0, :, 0, 0].argmax()).all()


def test_samples_of_a_split_batch():
    prior = make()
    shares = []
    for first, n in ((0, 6), (0, 2), (2, 4)):
        torch.manual_seed(5)
        with sample_offset(first):
            shares.append(prior.sample(n, 3, 3))
    assert torch.equal(shares[0], torch.cat(shares[1:]))
    torch.manual_seed(6)
    assert not torch.equal(prior.sample(6, 3, 3), shares[0])


def test_learns_a_pattern():
    """Rows that count upwards from a random start, which is the same for all rows of a map."""
    torch.manual_seed(0)
    prior = make(width=16).train()
    optimizer = torch.optim.Adam(prior.parameters(), lr=1e-2)
    for _ in range(80):
        start = torch.randint(K, (16, 1, 1))
        loss = prior.loss((start + torch.arange(4)).expand(-1, 3, 4) % K)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1.3 * torch.tensor(K).log() / 12  # only the first index is random
    drawn = prior.sample(40, 3, 4)
    assert prior.training
    assert ((drawn == (drawn[:, :1, :1] + torch.arange(4)) % K).all((1, 2))).float().mean() > 0.8
    assert drawn[:, 0, 0].unique().numel() > 3


INDICES = torch.zeros(2, 3, 4, dtype=torch.int64)
LABELS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: make(width=6), ValueError, "width must be a positive multiple of 4, got 6"),
        (lambda: make(layers=0), ValueError, "layers must be at least 1, got 0"),
        (lambda: make(num_conditions=-1), ValueError, "num_conditions must not be negative, got -1"),
        (lambda: make(num_classes=-1), ValueError, "num_classes must not be negative, got -1"),
        (lambda: make(dropout=1.0), ValueError, r"dropout must lie in \[0, 1\), got 1.0"),
        (lambda: IndexPrior(0), ValueError, "num_codes must be at least 1, got 0"),
        (lambda: make()(INDICES.int()), TypeError, "indices must be int64, got torch.int32"),
        (lambda: make()(INDICES[0]), ValueError, r"indices must have shape \[B, h, w\], got \[3, 4\]"),
        (lambda: make()(INDICES, torch.zeros(2, C, 3, 4)), ValueError, r"condition must be None, got \[2, 3, 3, 4\]"),
        (lambda: make(True).loss(INDICES), ValueError, r"condition must have shape \[2, 3, 3, 4\], got None"),
        (lambda: make(True).sample(1, 3, 4, torch.zeros(2, C, 3, 4)), ValueError, r"must have shape \[1, 3, 3, 4\], got \[2, 3, 3, 4\]"),
        (lambda: make()(INDICES, labels=LABELS), ValueError, r"labels must be None, got \[2\]"),
        (lambda: make(num_classes=2).loss(INDICES), ValueError, r"labels must be int64 \[2\], got None"),
        (lambda: make(num_classes=2)(INDICES, labels=LABELS.int()), TypeError, "labels must be int64, got torch.int32"),
        (lambda: make(num_classes=2)(INDICES, labels=LABELS + 1), ValueError, r"labels must be \[B\] with values 0 ... 1, got 1 ... 2"),
        (lambda: make(num_classes=2).sample(1, 2, 2, labels=LABELS), ValueError, r"labels must have shape \[1\], got \[2\]"),
        (lambda: make().sample(1, 2, 2, temperature=0), ValueError, "temperature must be a finite number above 0, got 0"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match="^IndexPrior: .*" + message):
        call()
