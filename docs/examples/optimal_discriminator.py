"""The optimal discriminator between two known densities, and the value of the game.

Theorem 1 of Goodfellow et al., "Generative Adversarial Nets" (2014): for a fixed generator the optimal discriminator is
D*(x) = p(x) / (p(x) + q(x)), and the value of the game there is -log 4 + 2 JSD(p, q). A small discriminator is trained on
samples of both densities and compared with these exact values.

    python docs/examples/optimal_discriminator.py
"""

import math

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, MixtureSameFamily, Normal

from genperf.losses.adversarial import discriminator_loss
from genperf.losses.divergences import js_divergence

STEPS = 1000
BATCH = 512


def train(discriminator: nn.Module, p: Distribution, q: Distribution) -> None:
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        loss = discriminator_loss(discriminator(p.sample((BATCH, 1))), discriminator(q.sample((BATCH, 1))))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def probabilities(density: Distribution, grid: Tensor) -> Tensor:
    """The probability of the cell around each point of an evenly spaced grid."""
    return density.log_prob(grid).exp() * (grid[1] - grid[0])


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = MixtureSameFamily(Categorical(torch.tensor([0.4, 0.6])), Normal(torch.tensor([-2.0, 1.0]), torch.tensor([0.5, 0.8])))
    generated = Normal(torch.tensor(0.0), torch.tensor(1.5))
    discriminator = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    train(discriminator, data, generated)

    grid = torch.linspace(-10, 10, 20_001)
    p, q = probabilities(data, grid), probabilities(generated, grid)
    with torch.no_grad():
        logits = discriminator(grid[:, None]).squeeze(1)
    found, optimal = logits.sigmoid(), p / (p + q)
    error = ((p + q) / 2 * (found - optimal).abs()).sum().item()
    # Numerical integration instead of samples, so that the value has no sampling error.
    value = (p * nn.functional.logsigmoid(logits) + q * nn.functional.logsigmoid(-logits)).sum().item()
    divergence = js_divergence(p, q).item()
    optimal_value = -math.log(4) + 2 * divergence

    print("    x     D(x)   p/(p+q)   density (p+q)/2")
    for x in range(-4, 5):
        i = int((grid - x).abs().argmin())
        print(f"{x:5.1f}   {found[i]:6.3f}   {optimal[i]:7.3f}   {(p + q)[i] / 2 / (grid[1] - grid[0]):15.4f}")
    print(f"mean |D - p/(p+q)| under (p + q) / 2: {error:.4f}")
    print(f"JSD(p, q) = {divergence:.4f} nats")
    print(f"value of the game: {value:.4f}, for the optimal discriminator -log 4 + 2 JSD = {optimal_value:.4f}")

    assert error < 0.02, "the discriminator must be close to p / (p + q)"
    assert optimal_value - 0.01 < value <= optimal_value + 1e-4, "the value must be close to the optimum and not above it"


if __name__ == "__main__":
    main()
