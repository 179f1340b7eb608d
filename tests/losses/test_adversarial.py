# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from torch.nn import functional as F

from genperf.losses.adversarial import ADVERSARIAL_LOSSES, discriminator_loss, generator_loss

BCE = F.binary_cross_entropy_with_logits
DISCRIMINATOR = {
    "non-saturating": lambda real, fake, s: BCE(real, torch.full_like(real, 1 - s)) + BCE(fake, torch.zeros_like(fake)),
    "saturating": lambda real, fake, s: BCE(real, torch.full_like(real, 1 - s)) + BCE(fake, torch.zeros_like(fake)),
    "least-squares": lambda real, fake, s: ((real - 1 + s) ** 2).mean() / 2 + (fake**2).mean() / 2,
    "hinge": lambda real, fake, s: (1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean(),
    "wasserstein": lambda real, fake, s: fake.mean() - real.mean(),
}
GENERATOR = {
    "non-saturating": lambda fake: -fake.sigmoid().log().mean(),
    "saturating": lambda fake: (1 - fake.sigmoid()).log().mean(),
    "least-squares": lambda fake: ((fake - 1) ** 2).mean() / 2,
    "hinge": lambda fake: -fake.mean(),
    "wasserstein": lambda fake: -fake.mean(),
}


@pytest.mark.parametrize("kind", ADVERSARIAL_LOSSES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_match_plain_pytorch(kind, smoothing, device):
    if smoothing and kind in ("hinge", "wasserstein"):
        with pytest.raises(ValueError, match=f"kind='{kind}' has no targets to smooth, got label_smoothing=0.1"):
            discriminator_loss(torch.zeros(1), torch.zeros(1), kind, label_smoothing=smoothing)
        return
    real, fake = 3 * torch.randn(7, dtype=torch.float64, device=device), 3 * torch.randn(5, 2, dtype=torch.float64, device=device)
    for actual, plain, logits in (
        (
            lambda r, f: discriminator_loss(r, f, kind, label_smoothing=smoothing),
            lambda r, f: DISCRIMINATOR[kind](r, f, smoothing),
            (real, fake),
        ),
        (lambda f: generator_loss(f, kind), GENERATOR[kind], (fake,)),
    ):
        found = []
        for loss in (actual, plain):
            leaves = [t.clone().requires_grad_() for t in logits]
            value = loss(*leaves)
            found.append([value, *torch.autograd.grad(value, leaves)])
        torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("kind", ADVERSARIAL_LOSSES)
def test_large_logits_and_half_precision(kind, device):
    leaves = [torch.tensor([-300.0, 200.0], device=device, dtype=torch.float16, requires_grad=True) for _ in range(2)]
    for loss in (discriminator_loss(*leaves, kind), generator_loss(leaves[1], kind)):
        assert loss.dtype == torch.float32
        assert loss.isfinite()
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss, leaves, allow_unused=True) if g is not None)
    many = torch.full((100_000,), 1.5, device=device, dtype=torch.bfloat16)
    assert generator_loss(many, kind).item() == pytest.approx(GENERATOR[kind](many.double()).item(), rel=1e-5)


@pytest.mark.parametrize("kind", ADVERSARIAL_LOSSES)
def test_no_logits(kind, device):
    """The mean of no logits is 0 with a gradient, so an empty batch adds nothing."""
    none, real = torch.zeros(0, 1, device=device, requires_grad=True), torch.randn(5, 1, device=device)
    loss = discriminator_loss(none, none, kind) + generator_loss(none, kind)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, none)[0].shape == (0, 1)
    torch.testing.assert_close(
        discriminator_loss(real, none, kind) + discriminator_loss(none, real, kind), discriminator_loss(real, real, kind)
    )


def test_values_at_equilibrium():
    logits = torch.zeros(4)
    assert discriminator_loss(logits, logits).item() == pytest.approx(math.log(4))
    assert generator_loss(logits, "saturating").item() == pytest.approx(-math.log(2))


def test_label_smoothing_bounds_the_optimal_real_logit():
    logit = torch.tensor([math.log(0.9 / 0.1)], requires_grad=True)
    (gradient,) = torch.autograd.grad(discriminator_loss(logit, torch.zeros(1), label_smoothing=0.1), logit)
    assert abs(gradient.item()) < 1e-6


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: discriminator_loss(x, x, "gan"), ValueError, "discriminator_loss: kind must be one of non-saturating, .* got 'gan'"),
        (lambda x: generator_loss(x, "gan"), ValueError, "generator_loss: kind must be one of"),
        (lambda x: discriminator_loss(x, x, label_smoothing=1.0), ValueError, r"label_smoothing must lie in \[0, 1\), got 1.0"),
        (lambda x: discriminator_loss(x.long(), x), TypeError, "real_logits must be of a floating dtype, got torch.int64"),
        (lambda x: generator_loss((x, x)), TypeError, "fake_logits must be a tensor, got tuple"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.zeros(2))
