# SPDX-License-Identifier: Apache-2.0
"""FSQ and LFQ of genperf.compat against vector-quantize-pytorch."""

import copy
import pickle

import pytest
import torch
from torch import nn

from genperf.compat.vector_quantize_pytorch import FSQ, LFQ

upstream = pytest.importorskip("vector_quantize_pytorch")


def pair(genperf_class, upstream_class, device, **options):
    """A layer of genperf and one of upstream with the same parameters, loaded in both directions."""
    torch.manual_seed(0)
    other = upstream_class(**options).to(device)
    torch.manual_seed(0)
    layer = genperf_class(**options).to(device)
    assert {name: (value.shape, value.dtype) for name, value in layer.state_dict().items()} == {
        name: (value.shape, value.dtype) for name, value in other.state_dict().items()
    }
    for found, expected in zip(layer.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(found, expected)  # the same initial values
    layer.load_state_dict(other.state_dict())
    other.load_state_dict(copy.deepcopy(layer.state_dict()))
    return layer, other


def run(layer, x, **options):
    """Outputs, and gradients of input and parameters of a loss that depends on every output."""
    x = x.detach().clone().requires_grad_()
    results = layer(x, **options)
    parts = [*results] if isinstance(results, tuple) and not isinstance(results[0], tuple) else [*results[0], *results[1]]
    loss = sum(
        (out * torch.linspace(-1, 1, out.numel(), device=x.device).reshape(out.shape)).sum() if out.dim() else out
        for out in parts
        if out is not None and out.is_floating_point()
    )
    if not loss.requires_grad:
        return parts, []
    return parts, torch.autograd.grad(loss, [x, *layer.parameters()], allow_unused=True)


def assert_alike(layer, other, x, atol=1e-5, **options):
    torch.manual_seed(1)
    actual, gradients = run(layer, x, **options)
    torch.manual_seed(1)
    reference, expected_gradients = run(other, x, **options)
    for value, expected in zip(actual, reference, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=atol)
    for value, expected in zip(gradients, expected_gradients, strict=True):
        if value is None or expected is None:
            assert value is None or (value == 0).all()
            assert expected is None or (expected == 0).all()
            continue
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item() + 1e-7)
    return actual


FSQ_CASES = {
    "plain": ({"levels": [8, 5, 5, 5]}, (2, 30, 4)),
    "projected": ({"levels": [8, 6, 5], "dim": 9}, (2, 30, 9)),
    "no bias": ({"levels": [8, 6, 5], "dim": 9, "projection_has_bias": False}, (2, 30, 9)),
    "codebooks": ({"levels": (7, 5, 5), "num_codebooks": 2, "dim": 5}, (2, 30, 5)),
    "kept dimension": ({"levels": [7, 5, 5], "keep_num_codebooks_dim": True}, (2, 30, 3)),
    "image": ({"levels": [8, 5, 5], "dim": 6, "num_codebooks": 3}, (2, 6, 4, 5)),
    "video": ({"levels": [8, 5, 5]}, (2, 3, 2, 4, 5)),
    "channel first": ({"levels": [8, 5, 5], "channel_first": True}, (2, 3, 20)),
    "symmetric": ({"levels": [2, 3, 8], "preserve_symmetry": True}, (2, 30, 3)),
    "hard": ({"levels": [8, 5, 5], "bound_hard_clamp": True}, (2, 30, 3)),
    "symmetric hard": ({"levels": [8, 5, 5], "bound_hard_clamp": True, "preserve_symmetry": True}, (2, 30, 3)),
    "noise": ({"levels": [8, 5, 5], "preserve_symmetry": True, "noise_dropout": 0.5, "dim": 4}, (2, 30, 4)),
    "rotated": ({"levels": [5, 5, 5], "orthogonal_rotation": True, "dim": 4}, (2, 30, 4)),
    "rotated image": ({"levels": [5, 5, 5], "orthogonal_rotation": True, "num_codebooks": 2}, (2, 6, 4, 5)),
    "no indices": ({"levels": [8, 5, 5], "return_indices": False}, (2, 30, 3)),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", FSQ_CASES)
def test_fsq(case, training, device):
    options, shape = FSQ_CASES[case]
    layer, other = pair(FSQ, upstream.FSQ, device, **options)
    layer.train(training)
    other.train(training)
    codes, indices = assert_alike(layer, other, torch.randn(shape, device=device))
    if not options.get("return_indices", True):
        assert indices is None
        return
    back = layer.indices_to_codes(indices)
    torch.testing.assert_close(back, other.indices_to_codes(indices), rtol=1e-5, atol=1e-6)
    if not (training and "noise_dropout" in options):
        torch.testing.assert_close(back, codes, rtol=1e-5, atol=1e-6)
    assert layer.codebook_size == other.codebook_size
    torch.testing.assert_close(layer.implicit_codebook, other.implicit_codebook)
    assert torch.equal(layer.indices_to_level_indices(indices), other.indices_to_level_indices(indices))
    z = torch.randn(50, layer.codebook_dim, device=device)
    torch.testing.assert_close(layer.quantize(z), other.quantize(z))
    assert torch.equal(layer.codes_to_indices(layer.quantize(z)), other.codes_to_indices(other.quantize(z)))


def test_fsq_with_more_codes_than_upstream_supports(device):
    layer = FSQ([4] * 31).to(device)
    z = torch.randn(2, 300, 31, device=device)
    codes, indices = layer(z)
    assert indices.dtype == torch.int64
    assert indices.max() > 2**61
    torch.testing.assert_close(layer.indices_to_codes(indices), codes, rtol=0, atol=0)
    assert torch.equal(layer.codes_to_indices(codes), indices)
    assert FSQ([4] * 40, return_indices=False)(torch.randn(1, 2, 40))[1] is None


@pytest.mark.parametrize("symmetric", [False, True])
def test_fsq_methods_without_indices(symmetric):
    options = {"levels": [8, 5, 5], "return_indices": False, "preserve_symmetry": symmetric}
    layer, other = FSQ(**options), FSQ(**{**options, "return_indices": True})
    z = torch.randn(30, 3)
    codes, indices = other(z.unsqueeze(0))
    assert torch.equal(layer.codes_to_indices(codes), indices)
    assert torch.equal(layer.indices_to_level_indices(indices), other.indices_to_level_indices(indices))
    reference = upstream.FSQ(**options)
    for name in ("bound", "symmetry_preserving_bound"):
        for hard in (False, True):
            torch.testing.assert_close(getattr(layer, name)(z, hard_clamp=hard), getattr(reference, name)(z, hard_clamp=hard))


def test_fsq_half_precision(device):
    layer = FSQ([8, 5, 5, 5], dim=6).to(device)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        codes, indices = layer(torch.randn(2, 40, 6, device=device))
    assert codes.dtype == torch.bfloat16
    assert indices.dtype == torch.int32


LFQ_CASES = {
    "plain": ({"codebook_size": 64}, (2, 30, 6)),
    "by dim": ({"dim": 5}, (2, 30, 5)),
    "projected": ({"codebook_size": 16, "dim": 9, "commitment_loss_weight": 0.3}, (2, 30, 9)),
    "codebooks": ({"codebook_size": 16, "dim": 9, "num_codebooks": 3, "commitment_loss_weight": 0.3}, (2, 30, 9)),
    "kept dimension": ({"codebook_size": 16, "keep_num_codebooks_dim": True}, (2, 30, 4)),
    "image": ({"codebook_size": 16, "dim": 6, "num_codebooks": 2}, (2, 6, 4, 5)),
    "channel first": ({"codebook_size": 16, "channel_first": True}, (2, 4, 30)),
    "scale": ({"codebook_size": 16, "codebook_scale": 0.5, "diversity_gamma": 2.0, "commitment_loss_weight": 1.0}, (2, 30, 4)),
    "spherical": ({"codebook_size": 64, "spherical": True, "commitment_loss_weight": 0.3}, (2, 30, 6)),
    "spherical image": ({"codebook_size": 64, "spherical": True, "dim": 5, "codebook_scale": 2.0}, (2, 5, 4, 5)),
    "soft clamp": ({"codebook_size": 16, "soft_clamp_input_value": 1.5}, (2, 30, 4)),
    "cosine": ({"codebook_size": 16, "dim": 7, "cosine_sim_project_in": True}, (2, 30, 7)),
    "cosine image": ({"codebook_size": 16, "dim": 7, "cosine_sim_project_in": True, "cosine_sim_project_in_scale": 3.0}, (2, 7, 4, 5)),
    "softplus": ({"codebook_size": 16, "experimental_softplus_entropy_loss": True}, (2, 30, 4)),
    "rotated": ({"codebook_size": 16, "orthogonal_rotation": True, "dim": 6}, (2, 30, 6)),
    "activation": ({"codebook_size": 16, "straight_through_activation": nn.Tanh()}, (2, 30, 4)),
    "share": ({"codebook_size": 16, "frac_per_sample_entropy": 0.4}, (2, 30, 4)),
    "forced projections": ({"codebook_size": 16, "has_projections": True, "projection_has_bias": False}, (2, 30, 4)),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", LFQ_CASES)
def test_lfq(case, training, device):
    options, shape = LFQ_CASES[case]
    layer, other = pair(LFQ, upstream.LFQ, device, **options)
    layer.train(training)
    other.train(training)
    x = torch.randn(shape, device=device)
    for inv_temperature in (100.0, 2.0):
        # The tolerance is for upstream's clamped logarithms of improbable codes.
        quantized, indices, *_ = assert_alike(layer, other, x, atol=1e-4, inv_temperature=inv_temperature, return_loss_breakdown=True)
    torch.testing.assert_close(layer.indices_to_codes(indices), quantized, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.indices_to_codes(indices), other.indices_to_codes(indices), rtol=1e-5, atol=1e-6)
    codes = layer.indices_to_codes(indices, project_out=False)
    torch.testing.assert_close(codes, other.indices_to_codes(indices, project_out=False), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.codebook, other.codebook)


def test_lfq_breakdown_alone_does_not_communicate(monkeypatch):
    """Only some ranks may ask for the breakdown, so it must not communicate."""
    all_reduced = []
    monkeypatch.setattr("genperf.nn.lookup_free_quantizer.world_size", lambda: 2)
    monkeypatch.setattr("genperf.nn.lookup_free_quantizer.global_sum", lambda mass: all_reduced.append(mass) or mass)
    x = torch.randn(2, 30, 4)
    _, expected = LFQ(codebook_size=16)(x, return_loss_breakdown=True)
    assert len(all_reduced) == 1
    _, breakdown = LFQ(codebook_size=16, entropy_loss_weight=0.0)(x, return_loss_breakdown=True)
    assert len(all_reduced) == 1
    torch.testing.assert_close(breakdown, expected)


def test_lfq_spherical_float16():
    layer = LFQ(dim=6, codebook_size=16, spherical=True, projection_has_bias=False)
    with torch.autocast("cpu", dtype=torch.float16):
        quantized, _, loss = layer(torch.cat([torch.randn(1, 30, 6), torch.zeros(1, 2, 6)], 1))
        (quantized.float().square().mean() + loss).backward()
    assert quantized.dtype == torch.float16
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_lfq_mask(device):
    """Losses are those of the unmasked vectors. (In upstream, the batch entropy with a mask is the per-sample entropy.)"""
    layer, other = pair(LFQ, upstream.LFQ, device, codebook_size=16, dim=6, commitment_loss_weight=0.5)
    x, mask = torch.randn(3, 20, 6, device=device), torch.rand(3, 20, device=device) > 0.4
    image = x.transpose(1, 2).unflatten(2, (4, 5)).contiguous()
    _, expected = layer(x[mask].unsqueeze(0), return_loss_breakdown=True)
    (quantized, indices, _), reference = other(x, mask=mask, return_loss_breakdown=True)
    for given, place in ((x, mask), (image, mask), (image, mask.reshape(3, 4, 5))):
        result, breakdown = layer(given, mask=place, return_loss_breakdown=True)
        torch.testing.assert_close(breakdown, expected)
        assert torch.equal(result.indices.flatten(), indices.flatten())
    torch.testing.assert_close(result.quantized.flatten(2).transpose(1, 2), quantized)
    torch.testing.assert_close(breakdown.per_sample_entropy, reference.per_sample_entropy, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(breakdown.commitment, reference.commitment)
    assert layer(x, mask=torch.zeros_like(mask)).entropy_aux_loss == 0


def test_lfq_fraction_of_masked_vectors(device):
    """The fraction is that of the unmasked vectors."""
    layer = LFQ(codebook_size=4, frac_per_sample_entropy=0.5).to(device)
    x = torch.full((1, 40, 2), 1e-3, device=device)
    mask = torch.arange(40, device=device) < 11
    x[0, ~mask] = torch.nan
    _, breakdown = layer(x, mask=mask[None], inv_temperature=1.0, return_loss_breakdown=True)
    torch.testing.assert_close(breakdown.batch_entropy.cpu(), torch.tensor(4.0).log())
    bits = torch.zeros(1, 40, 2, device=device)
    chosen = layer._random_subset(bits, 2, mask[None])
    assert chosen.sum() == 5
    assert not (chosen & ~mask).any()


@pytest.mark.parametrize(
    ("genperf_class", "upstream_class", "options"),
    [
        (FSQ, upstream.FSQ, {"levels": [8, 5, 5], "dim": 6}),
        (LFQ, upstream.LFQ, {"codebook_size": 32, "dim": 6, "commitment_loss_weight": 0.2}),
        (LFQ, upstream.LFQ, {"codebook_size": 32, "dim": 6, "spherical": True, "commitment_loss_weight": 0.2}),
    ],
    ids=["FSQ", "LFQ", "BSQ"],
)
def test_training_matches_upstream(genperf_class, upstream_class, options, device):
    """Upstream in float64, since its softmax over codes is less accurate in float32."""
    layer, other = pair(genperf_class, upstream_class, device, **options)
    other = other.double()
    other.force_quantization_f32 = False
    batches = torch.randn(20, 2, 40, 6, device=device)
    losses = []
    for each in (layer, other):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.02)
        history = []
        for batch in batches:
            x = batch.to(each.project_in.weight.dtype)
            quantized, *rest = each(x)
            loss = (quantized - x).square().mean() + (rest[1] if len(rest) > 1 else 0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.detach().float())
        losses.append(torch.stack(history))
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)
    for name, value in layer.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name].to(value.dtype), rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("make", [lambda: FSQ([8, 5, 5], dim=6, num_codebooks=2), lambda: LFQ(codebook_size=16, dim=6, num_codebooks=2)])
def test_compiles_in_one_graph(make, device):
    layer = make().to(device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 6, 4, 5, device=device)
    for training in (True, False):
        layer.train(training)
        compiled.train(training)
        torch.testing.assert_close(run(compiled, x), run(layer, x))


def test_large_codebooks_of_lfq(device):
    layer = LFQ(codebook_size=2**40, entropy_loss_weight=0).to(device)
    quantized, indices, loss = layer(torch.randn(2, 50, 40, device=device))
    assert indices.max() > 2**38
    assert loss == 0
    assert torch.equal(layer.indices_to_codes(indices), quantized)
    with pytest.raises(NotImplementedError, match="LFQ: entropy_loss_weight over more than"):
        LFQ(codebook_size=2**40)(torch.randn(1, 2, 40))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FSQ([2, 3]), "FSQ: a level of 2 needs preserve_symmetry, got"),
        (lambda: FSQ([8, 5], noise_dropout=0.5), "FSQ: noise_dropout needs preserve_symmetry, got 0.5"),
        (lambda: FSQ([8, 5], num_codebooks=2, keep_num_codebooks_dim=False), "FSQ: several codebooks need"),
        (lambda: FSQ([4] * 32), "FSQ: the product of levels must be at most"),
        (lambda: FSQ([8, 5])(torch.zeros(1, 2, 3)), "FSQ: the channels of z must be 2, got"),
        (lambda: LFQ(), "LFQ: dim or codebook_size must be given"),
        (lambda: LFQ(codebook_size=24), "LFQ: codebook_size must be a power of 2, such as 32, got 24"),
        (lambda: LFQ(dim=4, soft_clamp_input_value=0.5), "LFQ: soft_clamp_input_value must be at least codebook_scale"),
        (lambda: LFQ(dim=4, frac_per_sample_entropy=0.0), "LFQ: frac_per_sample_entropy must lie in"),
        (lambda: LFQ(dim=4)(torch.zeros(1, 2, 3)), "LFQ: the channels of x must be 4, got"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "probe"),
    [
        (lambda: FSQ([8, 5, 5, 5], dim=8), lambda layer: layer.indices_to_level_indices(torch.tensor([777]))),
        (lambda: FSQ([8, 5, 5, 5], dim=8), lambda layer: layer.codes_to_indices(torch.zeros(1, 4))),
        (lambda: FSQ([3, 2], preserve_symmetry=True), lambda layer: layer.implicit_codebook),
        (lambda: LFQ(codebook_size=16, dim=8), lambda layer: layer.codebook),
        (lambda: LFQ(codebook_size=16, dim=8).eval(), lambda layer: layer(torch.zeros(1, 5, 8)).entropy_aux_loss),
    ],
)
def test_layers_built_on_the_meta_device(make, probe):
    """What is not in the state dict is computed: it is neither left on the meta device nor uninitialized."""
    layer = make()
    with torch.device("meta"):
        emptied, assigned = make(), make()
    emptied.to_empty(device="cpu")
    for name, buffer in emptied.named_buffers():
        if name not in layer.state_dict():
            buffer.fill_(123)
    emptied.load_state_dict(layer.state_dict())
    assigned.load_state_dict(layer.state_dict(), assign=True)
    for other in (emptied, assigned, assigned.to("cpu"), copy.deepcopy(assigned), pickle.loads(pickle.dumps(assigned))):
        assert torch.equal(probe(other), probe(layer))


def test_dtype_of_lfq():
    assert LFQ(codebook_size=16, dim=8).half().dtype == torch.float16


@pytest.mark.parametrize("make", [lambda: FSQ([8, 5, 5, 5], dim=8), lambda: LFQ(codebook_size=16, dim=8)])
def test_projections_may_be_wrapped(make, device):
    """An adapter around a projection is called on [..., channels], for images too."""

    class Adapter(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer
            self.low = nn.Linear(8, 4)

        def forward(self, x):
            return self.layer(x) + self.low(x)

    layer = make().to(device)
    layer.project_in = Adapter(layer.project_in).to(device)
    layer(torch.randn(2, 8, 6, 6, device=device))[0].sum().backward()
    assert layer.project_in.low.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("make", [lambda: FSQ([8, 5, 5, 5], dim=8), lambda: LFQ(codebook_size=16, dim=8)])
def test_index_past_the_codebook_and_empty_batch(make):
    layer = make()
    with pytest.raises(IndexError, match="indices must be at most"):
        layer.indices_to_codes(torch.tensor([[10**6]]))
    outputs = layer(torch.randn(0, 5, 8))
    assert all(out.isfinite().all() for out in outputs)
