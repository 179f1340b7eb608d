# SPDX-License-Identifier: Apache-2.0
"""Random points between real and fake images, float32; a copy shows the limit of the memory bandwidth."""

import pytest
import torch

import genperf

from measure import MANY_ROUNDS, measure  # isort: skip

SHAPES = ((64, 3, 64, 64), (64, 3, 256, 256))


def plain_lines(real, fake):
    weight = torch.rand(len(real), 1, 1, 1, device=real.device)
    return weight * real + (1 - weight) * fake


def lerp(real, fake):
    return torch.lerp(fake, real, torch.rand(len(real), 1, 1, 1, device=real.device))


CONTENDERS = {
    "genperf": lambda compiled: genperf.interpolate,
    "PyTorch": lambda compiled: plain_lines,
    "torch.lerp": lambda compiled: lerp,
    "torch.compile": lambda compiled: compiled(plain_lines),
    "clone": lambda compiled: lambda real, fake: real.clone(),
}


def verify(mixed, real, fake):
    """Check that each image of `mixed` lies between those of `real` and `fake`, at a place of its own."""
    weight = ((mixed - fake) * (real - fake)).flatten(1).sum(1) / (real - fake).square().flatten(1).sum(1)
    assert ((weight > -1e-6) & (weight < 1 + 1e-6)).all()
    assert len(weight.unique()) == len(real)
    torch.testing.assert_close(mixed, torch.lerp(fake, real, weight.view(-1, 1, 1, 1)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_interpolate(benchmark, shape, contender, size, compiled, device):
    shape = size(shape)
    real, fake = torch.randn(2, *shape, device=device)
    function = CONTENDERS[contender](compiled)
    mixed = function(real, fake)
    if contender == "clone":
        assert torch.equal(mixed, real)
    else:
        verify(mixed, real, fake)
    measure(
        benchmark, lambda: function(real, fake), device, moved=(2 if contender == "clone" else 3) * 4 * real.numel(),
        least_rounds=MANY_ROUNDS, op="interpolate", workload=str(list(shape)), contender=contender,
    )  # fmt: skip
