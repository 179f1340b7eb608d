# SPDX-License-Identifier: Apache-2.0
import pickle
from datetime import timedelta

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing, nn
from torch.utils.checkpoint import checkpoint

import genperf
from genperf._distributed import global_mean
from genperf.losses.feature_matching import feature_matching
from genperf.losses.gradient_penalty import gradient_penalty
from genperf.nn.batch_norm import BatchNorm

TORCH = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 5), (4, 3, 2, 5), (2, 3, 2, 1, 2)])
def test_one_rank_matches_torch_bitwise(shape, affine, device):
    layer = BatchNorm(3, momentum=0.3, affine=affine).to(device)
    reference = TORCH[len(shape)](3, momentum=0.3, affine=affine).to(device)
    reference.load_state_dict(layer.state_dict())
    for training in (True, True, False):
        x = 5 + torch.randn(shape, device=device)
        assert torch.equal(layer.train(training)(x), reference.train(training)(x))
    for name, value in reference.state_dict().items():
        assert torch.equal(layer.state_dict()[name], value), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_counts_a_step_once(reentrant, device):
    layer, plain = BatchNorm(3).to(device), BatchNorm(3).to(device)
    for _ in range(2):
        leaves = [torch.randn(6, 3, 2, device=device).requires_grad_()]
        leaves.append(leaves[0].detach().clone().requires_grad_())
        checkpoint(layer, leaves[0], use_reentrant=reentrant).square().mean().backward()
        plain(leaves[1]).square().mean().backward()
        assert torch.equal(leaves[0].grad, leaves[1].grad)
    for name, value in plain.state_dict().items():
        assert torch.equal(layer.state_dict()[name], value), name
    del layer._steps  # as in a pickle of an earlier release
    assert torch.equal(pickle.loads(pickle.dumps(layer))(leaves[0]), plain(leaves[0]))


def test_global_mean_on_one_rank():
    x = torch.randn(4, 3, 2)
    assert torch.equal(global_mean(x), x.mean(0))
    assert torch.equal(global_mean(x, (0, 2)), x.mean((0, 2)))


def test_old_name_of_global_mean():
    with pytest.warns(DeprecationWarning, match="joint_mean is deprecated, use global_mean"):
        assert genperf.nn.joint_mean is global_mean


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BatchNorm(0), "num_features must be at least 1, got 0"),
        (lambda: BatchNorm(3, eps=-1.0), "eps must not be negative, got -1.0"),
        (lambda: BatchNorm(3, momentum=1.5), r"momentum must lie in \[0, 1\], got 1.5"),
        (lambda: BatchNorm(3)(torch.zeros(4, 2)), r"x must be \[B, 3, ...\], got \[4, 2\]"),
        (lambda: BatchNorm(3)(torch.zeros(3)), r"x must be \[B, 3, ...\], got \[3\]"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=f"BatchNorm: {message}"):
        call()


class Critic(nn.Module):
    """BatchNorm on three and on two dimensions, with and without affine parameters."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.inner = nn.Sequential(nn.Conv1d(2, 3, 2), BatchNorm(3), nn.Tanh(), nn.Flatten(), nn.Linear(9, 4), BatchNorm(4, affine=False))
        self.outer = nn.Sequential(nn.Tanh(), nn.Linear(4, 1))
        self.double()
        for p in self.parameters():
            p.data.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))

    def forward(self, x, real):
        """A loss with everything that communicates: normalized features, feature matching, and a penalty's double backward."""
        features = self.inner(x)
        logits = self.outer(features)
        penalty = gradient_penalty(lambda points: self.outer(self.inner(points)), x, kind="r1", weight=1.0)
        return logits.square().mean() + feature_matching(self.inner(real), features.tanh()) + penalty


def step_of(critic, x, real):
    """Loss, gradients of the parameters, running statistics, and the output in evaluation mode."""
    loss = critic(x, real)
    loss.backward()
    found = {f"grad {name}": p.grad for name, p in critic.named_parameters()} | dict(critic.named_buffers())
    return found | {"loss": loss.detach(), "evaluated": critic.eval().inner(x).detach()}


def batch():
    generator = torch.Generator().manual_seed(1)
    # The means of the two halves are far apart, so their statistics differ from those of the batch.
    return [torch.randn(8, 2, 4, generator=generator, dtype=torch.float64) + torch.arange(8)[:, None, None] for _ in range(2)]


def _train(rank, path):
    """The results of one rank of two, with gradients and loss averaged like in DistributedDataParallel."""
    dist.init_process_group("gloo", init_method=f"file://{path / 'store'}", rank=rank, world_size=2, timeout=timedelta(seconds=120))
    try:
        share = slice(4 * rank, 4 * rank + 4)
        found = step_of(Critic(), *(t[share] for t in batch()))
        for name in found:
            if name.startswith(("grad", "loss")):
                dist.all_reduce(found[name])
                found[name] /= 2
        offset = (1e4 + batch()[0][share]).float()
        layer = BatchNorm(2)
        found["far from 0"] = layer(offset).detach()
        found["half"] = BatchNorm(2)(batch()[0][share].bfloat16()).detach()
        found["half mean"] = global_mean(batch()[0][share].bfloat16())
        found["one value each"] = BatchNorm(2)(batch()[0][4 * rank : 4 * rank + 1, :, 0].float()).detach()
        with pytest.raises(ValueError, match=r"at least one value per channel, got \[0, 2, 4\]"):
            layer(offset[:0])
        torch.save(found, path / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_ranks_match_one_process_on_the_global_batch(tmp_path):
    # This process is rank 0.
    other = multiprocessing.get_context("spawn").Process(target=_train, args=(1, tmp_path))
    other.start()
    _train(0, tmp_path)
    other.join()
    assert other.exitcode == 0
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    expected = step_of(Critic(), *batch())
    for name, value in expected.items():
        if name == "evaluated":
            torch.testing.assert_close(torch.cat([first[name], second[name]]), value)
            continue
        torch.testing.assert_close(first[name], value, msg=lambda text, name=name: f"{name}: {text}")
        torch.testing.assert_close(second[name], first[name], rtol=0, atol=0)
    x, _ = batch()
    gathered = {name: torch.cat([first[name], second[name]]) for name in ("far from 0", "half", "one value each")}
    exact = BatchNorm(2).double()
    torch.testing.assert_close(gathered["far from 0"], exact((1e4 + x).float().double()).float(), rtol=0, atol=2e-3)
    assert gathered["half"].dtype == first["half mean"].dtype == torch.bfloat16
    torch.testing.assert_close(gathered["half"].double(), exact(x.bfloat16().double()), rtol=0.01, atol=0.01)
    torch.testing.assert_close(first["half mean"].double(), x.bfloat16().double().mean(0), rtol=0.01, atol=0.01)
    torch.testing.assert_close(gathered["one value each"], BatchNorm(2)(x[[0, 4], :, 0].float()))
