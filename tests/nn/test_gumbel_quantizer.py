# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from genperf.nn import GumbelQuantizer


def gumbel_noise(like):
    return -torch.empty_like(like).exponential_().log()


def plain(logits, codebook, tau, hard, noise):
    """GumbelQuantizer for channels-last logits in plain PyTorch."""
    soft = ((logits + noise) / tau).softmax(-1)
    one_hot = F.one_hot(soft.argmax(-1), logits.shape[-1]).to(soft)
    sample = one_hot - soft.detach() + soft if hard else soft
    q = logits.softmax(-1)
    return sample @ codebook, one_hot.argmax(-1), (q * (q * logits.shape[-1]).log()).sum(-1)


@pytest.mark.parametrize("channel_dim", [-1, 1])
@pytest.mark.parametrize("hard", [False, True])
def test_training_step_matches_plain_pytorch(hard, channel_dim, device):
    layer = GumbelQuantizer(7, 3, tau=0.7, hard=hard, channel_dim=channel_dim).to(device, torch.float64)
    logits = torch.randn(2, 4, 5, 7, dtype=torch.float64, device=device)
    noise = gumbel_noise(logits)
    weight = torch.randn(2, 4, 5, 3, dtype=torch.float64, device=device)

    actual, reference = (logits.clone().requires_grad_() for _ in range(2))
    quantized, indices, kl = layer(actual.movedim(-1, channel_dim), noise=noise.movedim(-1, channel_dim))
    codebook = layer.codebook.detach().clone().requires_grad_()
    expected, expected_indices, expected_kl = plain(reference, codebook, layer.tau.double(), hard, noise)
    torch.testing.assert_close(quantized.movedim(channel_dim, -1), expected)
    assert torch.equal(indices, expected_indices)
    torch.testing.assert_close(kl, expected_kl)

    ((quantized.movedim(channel_dim, -1) * weight).sum() + kl.sum()).backward()
    ((expected * weight).sum() + expected_kl.sum()).backward()
    torch.testing.assert_close(actual.grad, reference.grad)
    torch.testing.assert_close(layer.codebook.grad, codebook.grad)


@pytest.mark.parametrize("channel_dim", [-1, 1])
def test_evaluation_matches_decode_of_encode(channel_dim, device):
    layer = GumbelQuantizer(7, 3, channel_dim=channel_dim).to(device).eval()
    logits = torch.randn(2, 4, 5, 7, device=device)
    laid_out = logits.movedim(-1, channel_dim)
    quantized, indices, _ = layer(laid_out)
    assert torch.equal(indices, logits.argmax(-1))
    assert torch.equal(indices, layer.encode(laid_out))
    assert torch.equal(quantized, layer.decode(indices))
    assert torch.equal(quantized.movedim(channel_dim, -1), layer.codebook[indices])
    with pytest.raises(TypeError, match="int64"):
        layer.decode(indices.int())
    if torch.device(device).type == "cpu":
        for wrong in (-1, 7):
            with pytest.raises(IndexError, match=r"GumbelQuantizer.decode: indices must lie between 0 and 6, got "):
                layer.decode(torch.tensor([3, wrong]))


@pytest.mark.parametrize(
    ("deterministic", "training", "draws", "mixes"),
    [
        (None, True, True, True),
        (None, False, False, False),
        (True, True, False, False),
        (False, True, True, True),
        (False, False, True, False),
    ],
)
def test_sampling_and_mixing_modes(deterministic, training, draws, mixes, device):
    layer = GumbelQuantizer(5, 3, deterministic=deterministic).to(device).train(training)
    quantized, indices, _ = layer(torch.zeros(200, 5, device=device))
    assert (len(indices.unique()) > 1) == draws
    assert torch.equal(quantized, layer.codebook[indices]) != mixes


def test_deterministic_training_is_straight_through(device):
    layer = GumbelQuantizer(5, 3, deterministic=True).to(device)
    logits = torch.randn(6, 5, device=device, requires_grad=True)
    layer(logits)[0].sum().backward()
    assert logits.grad.abs().sum() > 0


@pytest.mark.parametrize("hard", [False, True])
def test_kl_loss_is_independent_of_the_batch_size(hard, device):
    """With kl_div(reduction="batchmean") and a prior of shape [1], as in DALLE-pytorch, the loss is proportional to the batch size."""
    layer = GumbelQuantizer(7, 3, hard=hard, channel_dim=1).to(device)
    logits = torch.randn(2, 7, 4, 4, device=device)
    many = logits.repeat(8, 1, 1, 1)
    kl, kl_of_many = layer(logits)[2], layer(many)[2]
    assert kl.shape == (2, 4, 4)
    torch.testing.assert_close(kl.mean(), kl_of_many.mean())
    torch.testing.assert_close(kl.sum() / len(kl), kl_of_many.sum() / len(kl_of_many))

    log_q = many.permute(0, 2, 3, 1).reshape(len(many), -1, 7).log_softmax(-1)
    prior = torch.log(torch.tensor([1 / 7], device=device))
    wrong = F.kl_div(prior, log_q, reduction="batchmean", log_target=True)
    torch.testing.assert_close(wrong, len(many) * (kl_of_many.sum() / len(kl_of_many)))


def test_kl_from_the_uniform_prior(device):
    layer = GumbelQuantizer(7, 3).to(device)
    logits = torch.stack([torch.zeros(7), torch.tensor([0.0] + [-math.inf] * 6)]).to(device)
    torch.testing.assert_close(layer(logits)[2], torch.tensor([0, math.log(7)], device=device))


def test_tau_is_annealed_in_place(device):
    layer = GumbelQuantizer(5, 3, tau=2.0).to(device)
    logits = torch.randn(4, 5, device=device)
    noise = gumbel_noise(logits)
    tau = layer.tau
    for value in (0.5, torch.tensor([0.25]), 0.0):
        layer.set_tau(value)
        assert layer.tau is tau
        assert tau.item() == float(value)
        expected = plain(logits, layer.codebook, max(float(value), 1e-6), False, noise)[0]
        torch.testing.assert_close(layer(logits, noise=noise)[0], expected)
    with pytest.raises(ValueError, match="tau must be a finite number, at least 0, got -1"):
        layer.set_tau(-1)


def test_temperature_zero_is_hard_and_not_nan(device):
    layer = GumbelQuantizer(5, 3, tau=0.0).to(device)
    logits = torch.randn(20, 5, device=device, requires_grad=True)
    quantized, indices, kl = layer(logits)
    assert torch.equal(quantized, layer.codebook[indices])
    (quantized.sum() + kl.sum()).backward()
    assert logits.grad.isfinite().all()
    assert layer.codebook.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_train_a_float32_codebook(dtype, device):
    layer = GumbelQuantizer(5, 3, hard=True).to(device)
    logits = (100 * torch.randn(50, 5, device=device)).to(dtype).requires_grad_()
    quantized, indices, kl = layer(logits)
    (quantized.float().sum() + kl.sum()).backward()
    assert quantized.dtype == logits.grad.dtype == dtype
    assert kl.dtype == layer.codebook.grad.dtype == torch.float32
    assert torch.equal(quantized, layer.codebook[indices].to(dtype))
    assert kl.isfinite().all()
    assert logits.grad.isfinite().all()


def test_state_dict_round_trip(device):
    source, target = (GumbelQuantizer(5, 3, hard=True).to(device) for _ in range(2))
    source.set_tau(0.3)
    assert source.state_dict().keys() == {"codebook", "tau"}
    target.load_state_dict(source.state_dict())
    logits = torch.randn(8, 5, device=device)
    noise = gumbel_noise(logits)
    for actual, expected in zip(source(logits, noise=noise), target(logits, noise=noise), strict=True):
        assert torch.equal(actual, expected)
    assert target.tau.item() == pytest.approx(0.3)
    assert [name for name, _ in source.named_parameters()] == ["codebook"]


def test_seed_and_generator_determine_the_noise(device):
    layer, logits = GumbelQuantizer(5, 3).to(device), torch.randn(30, 5, device=device)
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(layer(logits)[0])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert torch.equal(*(layer(logits, generator=torch.Generator().manual_seed(5))[0] for _ in range(2)))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("hard", [False, True])
def test_activation_checkpointing_draws_the_same_noise(hard, use_reentrant, device):
    layer, logits = GumbelQuantizer(5, 3, hard=hard).to(device), torch.randn(30, 5, device=device)
    gradients = []
    for run in (lambda x: layer(x), lambda x: checkpoint(layer, x, use_reentrant=use_reentrant)):
        torch.manual_seed(3)
        layer.zero_grad()
        x = logits.clone().requires_grad_()
        quantized, _, kl = run(x)
        (quantized.square().sum() + kl.sum()).backward()
        gradients.append((x.grad, layer.codebook.grad))
    for actual, expected in zip(*gradients, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("training", [True, False])
def test_compiles_in_one_graph(training, device):
    layer = GumbelQuantizer(8, 3, hard=True, channel_dim=1).to(device).train(training)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")  # same random numbers as eager
    for shape in ((3, 8, 5), (4, 8, 7)):
        logits, results = torch.randn(shape, device=device), []
        for call in (layer, compiled):
            torch.manual_seed(7)
            x = logits.clone().requires_grad_()
            quantized, indices, kl = call(x)
            gradients = torch.autograd.grad(quantized.square().sum() + kl.sum(), (x, layer.codebook))
            results.append((quantized, indices, kl, *gradients))
        for eager, fused in zip(*results, strict=True):
            torch.testing.assert_close(fused, eager)


def test_annealing_does_not_recompile(device):
    layer = GumbelQuantizer(8, 3).to(device)
    logits = torch.randn(4, 8, device=device)
    noise = gumbel_noise(logits)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: layer(x, noise=noise)[0], fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tau in (1.0, 0.9, 0.5):
            layer.set_tau(tau)
            torch.testing.assert_close(compiled(logits), layer(logits, noise=noise)[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_codes": 0}, "num_codes must be at least 1, got 0"),
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"tau": -0.5}, "tau must be a finite number, at least 0, got -0.5"),
        ({"tau": float("nan")}, "tau must be"),
        ({"deterministic": "eval"}, "deterministic must be None, True or False, got 'eval'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises((ValueError, TypeError), match="^GumbelQuantizer: .*" + message):
        GumbelQuantizer(**{"num_codes": 4, "dim": 2, **arguments})
