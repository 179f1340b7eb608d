# SPDX-License-Identifier: Apache-2.0
"""A training step of a WGAN-GP critic, float32, with the gradient penalty and with its finite-difference estimate.

torch.compile has no row: it does not support double backward.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from genperf.losses import gradient_penalty

from measure import MANY_ROUNDS, measure  # isort: skip

SHAPE = (64, 3, 32, 32)


def dcgan_critic():
    """Radford et al. (2016), for images of 32 x 32 and without normalization, as WGAN-GP needs it."""
    layers = []
    for width_in, width in ((3, 64), (64, 128), (128, 256)):
        layers += [nn.Conv2d(width_in, width, 4, 2, 1), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(256, 1, 4))


def plain_penalty(critic, real, fake):
    weight = torch.rand(len(real), 1, 1, 1, device=real.device)
    mixed = (weight * real + (1 - weight) * fake).requires_grad_()
    (gradients,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
    return 10 * (gradients.flatten(1).norm(2, dim=1) - 1).square().mean()


CONTENDERS = {
    "genperf": lambda critic, real, fake: gradient_penalty(critic, real, fake, kind="wgan-gp"),
    "PyTorch": plain_penalty,
    "genperf, finite-difference": lambda critic, real, fake: gradient_penalty(critic, real, kind="finite-difference"),
}


@pytest.mark.parametrize("contender", CONTENDERS)
def test_critic_step(benchmark, contender, size, device):
    shape = (size(SHAPE)[0], *SHAPE[1:])
    real, fake = torch.randn(2, *shape, device=device).tanh()
    critic = dcgan_critic().to(device)
    optimizer = torch.optim.Adam(critic.parameters(), 1e-4, betas=(0.0, 0.9))
    penalty = CONTENDERS[contender]
    verify(critic, penalty, contender, real, fake)

    def step():
        optimizer.zero_grad()
        loss = critic(fake).mean() - critic(real).mean() + penalty(critic, real, fake)
        loss.backward()
        optimizer.step()

    measure(
        benchmark, step, device, least_rounds=MANY_ROUNDS,
        op="critic_step", workload=f"WGAN-GP, DCGAN critic, {list(shape)}", contender=contender,
    )  # fmt: skip


def verify(critic, penalty, contender, real, fake):
    """Compare with the penalty of plain PyTorch, or an estimate with R1, within the noise of the draws."""
    if "finite" in contender:
        points = real.detach().requires_grad_()
        (gradients,) = torch.autograd.grad(critic(points).sum(), points)
        expected = 10 * gradients.flatten(1).square().sum(1).mean()
        draws = 30
        found = torch.stack([penalty(critic, real, fake).detach() for _ in range(draws)]).mean()
        assert abs(found / expected - 1) < 5 * (3 / len(real) / draws) ** 0.5
    else:
        expected = torch.stack([plain_penalty(critic, real, fake).detach() for _ in range(5)])
        found = torch.stack([penalty(critic, real, fake).detach() for _ in range(5)])
        assert F.l1_loss(found.mean(), expected.mean()) < 0.05 * expected.mean()
