# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
from torch import nn

from genperf.losses.feature_matching import feature_matching
from genperf.losses.historical_averaging import HistoricalAveraging


def test_feature_matching_matches_plain_pytorch(device):
    real = torch.randn(6, 4, 2, device=device, requires_grad=True)
    fake = torch.randn(9, 4, 2, device=device, requires_grad=True)
    loss = feature_matching(real, fake)
    torch.testing.assert_close(loss, ((real.mean(0) - fake.mean(0)) ** 2).sum())
    loss.backward()
    assert real.grad is None
    torch.testing.assert_close(fake.grad, (2 / 9 * (fake.mean(0) - real.mean(0))).detach().expand(9, 4, 2))
    half = feature_matching(real.bfloat16(), fake.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, loss.detach(), rtol=0.05, atol=0.01, check_dtype=False)


@pytest.mark.parametrize(
    ("real", "fake", "error", "message"),
    [
        (
            torch.zeros(2, 3),
            torch.zeros(2, 4),
            ValueError,
            r"features must have the same shape but for the batch, got \[2, 3\] and \[2, 4\]",
        ),
        (torch.zeros(0, 3), torch.zeros(2, 3), ValueError, r"real_features must be a batch of at least one sample, got shape \[0, 3\]"),
        (torch.zeros(2, 3), torch.tensor(1.0), ValueError, r"fake_features must be a batch"),
        (torch.zeros(2, 3), [torch.zeros(2, 3)], TypeError, "fake_features must be a tensor, got list"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3), TypeError, "real_features must be of a floating dtype, got torch.int64"),
    ],
)
def test_feature_matching_bad_arguments(real, fake, error, message):
    with pytest.raises(error, match=f"feature_matching: {message}"):
        feature_matching(real, fake)


class Player(nn.Module):
    """A network with a HistoricalAveraging of its own parameters, like a GAN system."""

    def __init__(self):
        super().__init__()
        self.network = nn.Linear(3, 2)
        self.history = HistoricalAveraging(self.network.parameters())


def test_historical_averaging_matches_plain_pytorch():
    player = Player()
    loss = player.history()
    assert loss.item() == 0
    assert not any(g.any() for g in torch.autograd.grad(loss, list(player.network.parameters())))
    seen = []
    for _ in range(4):
        for p in player.network.parameters():
            p.data.normal_()
        if seen:
            means = [torch.stack(values).mean(0) for values in zip(*seen, strict=True)]
            loss = player.history()
            torch.testing.assert_close(loss, sum(((p - m) ** 2).sum() for p, m in zip(player.network.parameters(), means, strict=True)))
            for g, p, m in zip(
                torch.autograd.grad(loss, list(player.network.parameters())), player.network.parameters(), means, strict=True
            ):
                torch.testing.assert_close(g, 2 * (p - m).detach())
        seen.append([p.detach().clone() for p in player.network.parameters()])
        player.history.update()


def test_means_are_in_the_state_but_parameters_are_not():
    player = Player()
    assert [name for name, _ in player.named_parameters()] == ["network.weight", "network.bias"]
    assert list(player.history.state_dict()) == ["mean_0", "mean_1", "updates"]
    player.history.update()
    nn.init.zeros_(player.network.weight)
    resumed = Player()
    resumed.load_state_dict(player.state_dict())
    assert player.history() > 0
    assert torch.equal(resumed.history(), player.history())
    copied = copy.deepcopy(player)
    nn.init.ones_(copied.network.weight)
    assert copied.history() != player.history(), "a copy tracks its own parameters"
    moved = player.double()
    moved.history().backward()
    assert moved.network.weight.grad.dtype == torch.float64


def test_mean_of_half_precision_parameters_is_updated():
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    history = HistoricalAveraging([parameter])
    for step in range(1000):
        nn.init.constant_(parameter, step % 2)
        history.update()
    assert history.means[0].item() == pytest.approx(0.5, abs=1e-3)
    history().backward()
    assert parameter.grad.dtype == torch.bfloat16


def test_historical_averaging_bad_arguments():
    with pytest.raises(ValueError, match="HistoricalAveraging: there must be at least one parameter, got none"):
        HistoricalAveraging([])
    with pytest.raises(TypeError, match="must be an iterable of tensors, got Linear"):
        HistoricalAveraging(nn.Linear(1, 1))
    with pytest.raises(TypeError, match="must be tensors of a floating dtype, got str"):
        HistoricalAveraging(["weight"])
