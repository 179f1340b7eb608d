# SPDX-License-Identifier: Apache-2.0
import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import genperf
from genperf.compat.taming import GumbelQuantize


def quantizer(device, **options):
    return GumbelQuantize(6, 3, 8, **options).to(device)


def plain_loss(layer, z, used=None):
    """kl_weight times the mean over positions of the KL from a uniform distribution over all codes, taming's 1e-10 included."""
    logits = layer.proj(z)
    q = (logits if used is None else logits[:, used]).softmax(1)
    return layer.kl_weight * (q * torch.log(q * layer.n_embed + 1e-10)).sum(1).mean()


def test_parameters_and_checkpoint_layout(device):
    layer = quantizer(device, temp_init=0.7)
    shapes = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    assert shapes == {"proj.weight": (8, 6, 1, 1), "proj.bias": (8,), "embed.weight": (8, 3)}
    other = quantizer(device)
    other.load_state_dict(layer.state_dict())
    z = torch.randn(2, 6, 4, 5, device=device)
    results = []
    for each in (layer, other):
        torch.manual_seed(0)
        results.append(each(z, temp=1.0))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("straight_through", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_forward(training, straight_through, device):
    layer = quantizer(device, straight_through=straight_through, kl_weight=0.3).train(training)
    z = torch.randn(2, 6, 4, 5, device=device)
    z_q, diff, (perplexity, encodings, indices), logits = layer(z, return_logits=True)
    assert perplexity is encodings is None
    assert indices.shape == (2, 4, 5)
    assert indices.dtype == torch.int64
    torch.testing.assert_close(logits, layer.proj(z))
    torch.testing.assert_close(diff, plain_loss(layer, z))
    codes = layer.embed.weight[indices].permute(0, 3, 1, 2)
    assert torch.equal(z_q, codes) == (straight_through or not training)
    assert len(layer(z)) == 3


def test_gradients_match_plain_pytorch(device):
    layer = quantizer(device, straight_through=False, temp_init=0.8).double()
    z = torch.randn(2, 6, 4, 5, dtype=torch.float64, device=device)
    torch.manual_seed(0)
    z_q, diff, _ = layer(z)
    parameters = [layer.proj.weight, layer.proj.bias, layer.embed.weight]
    actual = torch.autograd.grad(z_q.square().sum() + 10 * diff, parameters)

    logits = layer.proj(z)
    torch.manual_seed(0)
    soft = genperf.gumbel_sample(logits, tau=0.8, dim=1, impl="reference")[0]
    plain = torch.einsum("bkhw,kd->bdhw", soft, layer.embed.weight)
    upstream = torch.autograd.grad(plain.square().sum() + 10 * plain_loss(layer, z), parameters)
    for found, expected in zip(actual, upstream, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_evaluation_samples_with_noise(device):
    layer = quantizer(device).eval()
    torch.nn.init.zeros_(layer.proj.weight)
    torch.nn.init.zeros_(layer.proj.bias)
    indices = layer(torch.zeros(1, 6, 20, 20, device=device))[2][2]
    assert len(indices.unique()) == 8


def test_loss_is_a_mean_over_positions(device):
    layer = quantizer(device)
    z = torch.randn(2, 6, 4, 5, device=device)
    torch.testing.assert_close(layer(z)[1], layer(z.repeat(8, 1, 1, 1))[1])


def test_without_vq_interface(device):
    layer = quantizer(device, use_vqinterface=False)
    z_q, diff, indices = layer(torch.randn(2, 6, 4, 5, device=device))
    assert (z_q.shape, diff.shape, indices.shape) == ((2, 3, 4, 5), (), (2, 4, 5))


def test_temperature_attribute(device):
    layer = quantizer(device, straight_through=False)
    z = torch.randn(2, 6, 4, 5, device=device)
    for value in (0.5, torch.tensor(0.5, device=device)):
        layer.temperature = value
        assert layer.temperature == 0.5
    torch.manual_seed(0)
    by_attribute = layer(z)[0]
    layer.temperature = 2.0
    torch.manual_seed(0)
    assert torch.equal(layer(z, temp=0.5)[0], by_attribute)
    torch.manual_seed(0)
    assert not torch.equal(layer(z)[0], by_attribute)
    z_q, _, (_, _, indices) = layer(z, temp=0.0)
    assert torch.equal(z_q, layer.embed.weight[indices].permute(0, 3, 1, 2))
    with pytest.raises(ValueError, match="temperature must be a finite number, at least 0, got -1"):
        layer.temperature = -1


@pytest.mark.parametrize("from_file", [True, False])
@pytest.mark.parametrize("straight_through", [True, False])
def test_remap(straight_through, from_file, tmp_path, device):
    used = np.array([6, 1, 4])
    np.save(tmp_path / "used.npy", used)
    layer = quantizer(device, remap=str(tmp_path / "used.npy") if from_file else used, straight_through=straight_through, kl_weight=1.0)
    assert layer.re_embed == 3
    assert layer.state_dict()["used"].tolist() == [6, 1, 4]
    z = torch.randn(4, 6, 4, 5, device=device)
    z_q, diff, (_, _, indices), logits = layer(z, return_logits=True)
    torch.testing.assert_close(logits, layer.proj(z)[:, [6, 1, 4]])
    torch.testing.assert_close(diff, plain_loss(layer, z, [6, 1, 4]))
    assert indices.unique().tolist() == [0, 1, 2]
    assert layer.unmap_to_all(indices).unique().tolist() == [1, 4, 6]
    codes = layer.get_codebook_entry(indices.flatten(), (4, 4, 5, 3))
    assert torch.equal(codes, layer.embed.weight[layer.used[indices]].permute(0, 3, 1, 2))
    assert torch.equal(codes, z_q) == straight_through


def test_gradient_of_remapped_codes(device):
    layer = quantizer(device, remap=np.array([6, 1]))
    layer(torch.randn(4, 6, 4, 5, device=device))[0].sum().backward()
    assert layer.embed.weight.grad.abs().sum(1).nonzero().flatten().tolist() == [1, 6]
    assert layer.proj.weight.grad.flatten(1).abs().sum(1).nonzero().flatten().tolist() == [1, 6]


@pytest.mark.parametrize(("unknown_index", "expected", "re_embed"), [("extra", 3, 4), (2, 2, 3), ("random", None, 3)])
def test_unknown_indices(unknown_index, expected, re_embed, device):
    layer = quantizer(device, remap=np.array([6, 1, 4]), unknown_index=unknown_index)
    assert layer.re_embed == re_embed
    indices = torch.tensor([[6, 1, 4, 0], [5, 4, 6, 7]], device=device)
    given = indices.clone()
    mapped = layer.remap_to_used(indices)
    assert torch.equal(indices, given)
    known = torch.tensor([[True, True, True, False], [False, True, True, False]], device=device)
    assert mapped[known].tolist() == [0, 1, 2, 2, 0]
    assert (mapped[~known] < re_embed).all()
    if expected is not None:
        assert (mapped[~known] == expected).all()
    back = layer.unmap_to_all(mapped)
    assert torch.equal(back[known], indices[known])
    if unknown_index == "extra":
        assert (back[~known] == 6).all()


def test_codebook_entries(device):
    layer = quantizer(device)
    indices = torch.randint(8, (2 * 4 * 5,), device=device)
    codes = layer.get_codebook_entry(indices, (2, 4, 5, 3))
    one_hot = F.one_hot(indices.reshape(2, 4, 5), 8).float()
    torch.testing.assert_close(codes, torch.einsum("bhwn,nd->bdhw", one_hot, layer.embed.weight))
    with pytest.raises(ValueError, match=r"shape \(2, 4, 4, 3\) needs 32 indices, got 40"):
        layer.get_codebook_entry(indices, (2, 4, 4, 3))


def test_loss_of_certain_logits_is_log_num_codes(device):
    layer = quantizer(device, kl_weight=1.0)
    torch.nn.init.zeros_(layer.proj.weight)
    with torch.no_grad():
        layer.proj.bias.copy_(torch.tensor([1000.0] + 7 * [0.0]))
    assert layer(torch.zeros(1, 6, 2, 2, device=device))[1].item() == pytest.approx(math.log(8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, device):
    layer = quantizer(device)
    with torch.autocast(device, dtype):
        z_q, diff, (_, _, indices) = layer(100 * torch.randn(2, 6, 4, 5, device=device))
    (z_q.float().sum() + diff).backward()
    assert z_q.dtype == dtype
    assert diff.dtype == layer.proj.weight.grad.dtype == torch.float32
    assert torch.equal(z_q, layer.embed.weight[indices].permute(0, 3, 1, 2).to(dtype))
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_compiles_once_for_all_temperatures(device):
    layer = quantizer(device)
    z = torch.randn(2, 6, 4, 5, device=device)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")  # same random numbers as eager
    with torch._dynamo.config.patch(error_on_recompile=True):
        for temperature in (1.0, 0.5):
            layer.temperature = temperature
            results = []
            for call in (layer, compiled):
                torch.manual_seed(0)
                z_q, diff, (_, _, indices) = call(z)
                results.append([z_q, diff, indices, *torch.autograd.grad(z_q.square().sum() + diff, list(layer.parameters()))])
            for eager, fused in zip(*results, strict=True):
                torch.testing.assert_close(fused, eager)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"remap": torch.zeros(2)}, r"remap must hold a list of indices, got torch.float32 of shape \[2\]"),
        ({"remap": torch.tensor([1]), "unknown_index": "none"}, "unknown_index must be 'random', 'extra' or a number, got 'none'"),
        ({"temp_init": -1.0}, "temperature must be a finite number"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match="^GumbelQuantize: " + message):
        GumbelQuantize(6, 3, 8, **arguments)


def test_temperature_of_a_layer_built_on_the_meta_device(device):
    layer = quantizer(device, straight_through=False)
    with torch.device("meta"):
        emptied, assigned = quantizer("meta"), quantizer("meta")
    emptied.to_empty(device=device).load_state_dict(layer.state_dict())
    assigned.load_state_dict(layer.state_dict(), assign=True)
    z = torch.randn(2, 6, 4, 5, device=device)
    for other in (emptied, assigned, copy.deepcopy(assigned), pickle.loads(pickle.dumps(assigned)), assigned.half().float()):
        assert float(other.temperature) == 1
        other(z)
        other.temperature = 0.25
        assert float(other.temperature) == 0.25
        other.temperature = 1.0
    assert "temperature" not in " ".join(layer.state_dict())


def test_empty_batch(device):
    _, diff, (_, _, indices) = quantizer(device)(torch.randn(0, 6, 4, 5, device=device))
    assert diff.isfinite()
    assert indices.shape == (0, 4, 5)
