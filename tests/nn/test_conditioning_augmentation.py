# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

import genperf
from genperf.nn.conditioning_augmentation import ConditioningAugmentation


def test_sample_and_kl_match_plain_pytorch(device):
    layer = ConditioningAugmentation(5, 3).to(device)
    condition = torch.randn(4, 5, device=device)
    mean, logvar = layer.linear(condition).chunk(2, 1)
    torch.manual_seed(3)
    sample, kl = layer(condition)
    assert sample.shape == (4, 3)
    torch.testing.assert_close(kl, 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(1))
    torch.manual_seed(3)
    noise, _ = genperf.gaussian_sample(torch.zeros_like(mean), torch.zeros_like(mean))
    torch.testing.assert_close(sample, mean + torch.exp(0.5 * logvar) * noise)
    (sample.sum() + kl.mean()).backward()
    assert all(p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize(("deterministic", "draws"), [(False, (True, True)), (None, (True, False)), (True, (False, False))])
def test_modes(deterministic, draws):
    layer = ConditioningAugmentation(5, 3, deterministic=deterministic)
    condition = torch.randn(4, 5)
    for training, drawn in zip((True, False), draws, strict=True):
        sample, _ = layer.train(training)(condition)
        assert torch.equal(sample, layer(condition)[0]) is not drawn
        if not drawn:
            torch.testing.assert_close(sample, layer.linear(condition)[:, :3])


def test_noise_of_a_split_batch():
    layer = ConditioningAugmentation(5, 3)
    condition = torch.randn(4, 5)
    torch.manual_seed(1)
    whole, _ = layer(condition)
    torch.manual_seed(1)
    with genperf.sample_offset(2):
        share, _ = layer(condition[2:])
    torch.testing.assert_close(share, whole[2:])


def test_bad_arguments():
    with pytest.raises(ValueError, match="ConditioningAugmentation: condition_dim must be at least 1, got 0"):
        ConditioningAugmentation(0, 3)
    with pytest.raises(ValueError, match=r"ConditioningAugmentation: condition must be \[B, 5\], got \[4, 6\]"):
        ConditioningAugmentation(5, 3)(torch.zeros(4, 6))
