# SPDX-License-Identifier: Apache-2.0
"""Losses under the transforms of torch.func, with autograd and a loop over the samples as the oracle."""

import pytest
import torch
from torch.func import functional_call, grad, jacrev, vjp, vmap

from genperf.losses import (
    FrechetLoss,
    discriminator_loss,
    feature_matching,
    generator_loss,
    gradient_penalty,
    js_divergence,
    kl_divergence,
    wasserstein_1d,
)
from genperf.losses.gradient_penalty import CENTERS
from genperf.metrics import FrechetReference

LOSSES = {
    **{
        f"discriminator {kind}": (lambda a, b, kind=kind: discriminator_loss(a, b, kind))
        for kind in ("non-saturating", "hinge", "wasserstein")
    },
    "generator": lambda a, b: generator_loss(a, "least-squares") + b.sum(),
    "feature_matching": lambda a, b: feature_matching(b.view(4, 2), a.view(4, 2)) + b.sum(),
    "kl_divergence": lambda a, b: kl_divergence(a.exp(), b.exp(), normalize=True),
    "js_divergence": lambda a, b: js_divergence(a.exp(), b.exp(), normalize=True),
    "wasserstein_1d": lambda a, b: wasserstein_1d(a, b[:5], p=2),
    "wasserstein_1d, weights": lambda a, b: wasserstein_1d(a, b, a.exp(), b.exp()),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name):
    loss = LOSSES[name]
    inputs = torch.randn(3, 8), torch.randn(3, 8)
    leaves = [t.clone().requires_grad_() for t in inputs]
    expected = torch.autograd.grad(sum(map(loss, *leaves)), leaves)
    torch.testing.assert_close(vmap(grad(loss, (0, 1)))(*inputs), expected)
    torch.testing.assert_close(grad(lambda a, b: vmap(loss)(a, b).sum(), (0, 1))(*inputs), expected)
    torch.testing.assert_close(jacrev(loss)(*(t[0] for t in inputs)), expected[0][0])


class Critic(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize("kind", CENTERS)
def test_gradient_penalty(kind):
    """grad and vjp in the parameters of the critic equal autograd; vmap over ensembles of critics equals a loop."""
    critic, real, fake = Critic().double(), *torch.randn(2, 4, 6, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in critic.named_parameters()}

    def loss(parameters):
        generator = torch.Generator().manual_seed(3)
        return gradient_penalty(lambda x: functional_call(critic, parameters, (x,)), real, fake, kind=kind, generator=generator)

    leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
    expected = torch.autograd.grad(loss(leaves), list(leaves.values()), allow_unused=True)
    expected = [torch.zeros_like(p) if g is None else g for g, p in zip(expected, parameters.values(), strict=True)]
    torch.testing.assert_close(list(grad(loss)(parameters).values()), expected)
    torch.testing.assert_close(list(vjp(loss, parameters)[1](torch.ones((), dtype=torch.float64))[0].values()), expected)
    ensemble = {name: torch.stack([p, 2 * p]) for name, p in parameters.items()}
    found = vmap(grad(loss), randomness="same")(ensemble)
    doubled = grad(loss)({name: 2 * p for name, p in parameters.items()})
    for name, slope in found.items():
        torch.testing.assert_close(slope, torch.stack([expected[list(parameters).index(name)], doubled[name]]))


@pytest.mark.parametrize("count", [3, 12], ids=["factor", "covariance"])
@pytest.mark.parametrize("history", [{}, {"queue_size": 20}, {"momentum": 0.9}], ids=["batch", "queue", "average"])
def test_frechet_loss(history, count):
    """In evaluation mode, where the history does not change."""
    loss = FrechetLoss(FrechetReference.from_features(torch.randn(40, 4)), **history)
    loss.update(torch.randn(15, 4))
    loss.eval()
    features = torch.randn(2, count, 4)
    leaf = features.clone().requires_grad_()
    expected = torch.autograd.grad(sum(map(loss, leaf)), leaf)[0]
    torch.testing.assert_close(vmap(grad(loss))(features), expected)
    torch.testing.assert_close(vjp(loss, features[0])[1](torch.ones(()))[0], expected[0])
    torch.testing.assert_close(grad(lambda x: vmap(loss)(x).sum())(features), expected)
