# SPDX-License-Identifier: Apache-2.0
"""Methods of the quantizers of vector-quantize-pytorch that have no codebook, beside upstream; options are in vqp_code_free_cases.py."""

import copy

import pytest
import torch
from torch import nn

from genperf.compat import vector_quantize_pytorch as compat
from genperf.compat.vector_quantize_pytorch.finite_scalar_perturbation import build_cdf_act

upstream = pytest.importorskip("vector_quantize_pytorch")


def pair(name, *arguments, **options):
    layers = []
    for library in (upstream, compat):
        torch.manual_seed(0)
        layers.append(getattr(library, name)(*arguments, **options).eval())
    return layers


DECODED = {
    "ResidualFSQ": ("ResidualFSQ", {"levels": [5, 4], "num_quantizers": 3, "dim": 6}, (2, 9, 6)),
    "ResidualFSQ, rotated": ("ResidualFSQ", {"levels": [5, 5], "num_quantizers": 2, "orthogonal_rotation": True}, (2, 9, 2)),
    "ResidualFSQ, channels-last image": ("ResidualFSQ", {"levels": [5, 4], "num_quantizers": 2, "dim": 6}, (2, 3, 4, 6)),
    "ResidualLFQ": ("ResidualLFQ", {"codebook_size": 8, "num_quantizers": 3, "dim": 6}, (2, 9, 6)),
    "ResidualLFQ, spherical": ("ResidualLFQ", {"codebook_size": 8, "num_quantizers": 3, "dim": 3, "spherical": True}, (2, 9, 3)),
    "GroupedResidualFSQ": ("GroupedResidualFSQ", {"dim": 6, "groups": 2, "levels": [5, 4], "num_quantizers": 3}, (2, 9, 6)),
    "GroupedResidualLFQ": ("GroupedResidualLFQ", {"dim": 6, "groups": 2, "codebook_size": 4, "num_quantizers": 3}, (2, 9, 6)),
}
# Cases in which upstream raises, or leaves out a rotation or a normalization.
DECODED_WRONGLY = {"ResidualFSQ, rotated", "ResidualFSQ, channels-last image", "ResidualLFQ, spherical"}


@pytest.mark.parametrize("case", DECODED)
def test_residual_indices_decode_to_the_output(case):
    name, options, shape = DECODED[case]
    reference, layer = pair(name, **options)
    x = torch.randn(shape)
    quantized, indices, *_, codes = layer(x, return_all_codes=True)
    torch.testing.assert_close(layer.get_output_from_indices(indices), quantized)
    found = layer.get_codes_from_indices(indices)
    torch.testing.assert_close(found, torch.stack(codes) if isinstance(codes, tuple) else codes)
    if case not in DECODED_WRONGLY:
        torch.testing.assert_close(found, reference.get_codes_from_indices(indices))
        torch.testing.assert_close(layer.get_output_from_indices(indices), reference.get_output_from_indices(indices))
        torch.testing.assert_close(layer.codebooks, reference.codebooks)
    fewer = layer.get_codes_from_indices(indices[..., :1])
    assert fewer.shape == found.shape
    part = (slice(None), 0) if name.startswith("Grouped") else 0
    torch.testing.assert_close(fewer[part], found[part])
    assert fewer.count_nonzero() == fewer[part].count_nonzero()


@pytest.mark.parametrize("name", ["ResidualFSQ", "ResidualLFQ"])
def test_images_with_dropped_quantizers(name):
    """All codes of a channels-first image, which fail upstream."""
    options = {"levels": [5, 4], "is_channel_first": True} if name == "ResidualFSQ" else {"codebook_size": 4}
    layer = getattr(compat, name)(dim=6, num_quantizers=4, quantize_dropout=True, **options)
    x = torch.randn(2, 6, 3, 5)
    quantized, indices, *_, codes = layer(x, return_all_codes=True, rand_quantize_dropout_fixed_seed=3)
    if name == "ResidualFSQ":
        grouped = compat.GroupedResidualFSQ(dim=6, groups=2, num_quantizers=4, accept_image_fmap=True, levels=[5, 4])
        output, of_groups = grouped(x)
        torch.testing.assert_close(grouped.get_output_from_indices(of_groups), output)
    used = (indices >= 0).sum(1 if name == "ResidualFSQ" else -1)
    assert 0 < used.min() == used.max() < 4
    assert codes.shape == (4, 2, 3, 5, 2)
    assert not codes[used.max() :].any()
    output = layer.get_output_from_indices(indices)
    torch.testing.assert_close(output if name == "ResidualFSQ" else output.movedim(-1, 1), quantized)
    sequence = x.flatten(2).transpose(1, 2)
    layer = (
        layer if name == "ResidualLFQ" else load(compat.ResidualFSQ(levels=[5, 4], dim=6, num_quantizers=4, quantize_dropout=True), layer)
    )
    torch.testing.assert_close(layer(sequence, rand_quantize_dropout_fixed_seed=3)[0], quantized.flatten(2).transpose(1, 2))


def load(layer, other):
    layer.load_state_dict(other.state_dict())
    return layer


@pytest.mark.parametrize("name", ["GroupedResidualFSQ", "GroupedResidualLFQ"])
def test_groups_drop_the_same_quantizers(name):
    options = {"levels": [5, 4]} if name == "GroupedResidualFSQ" else {"codebook_size": 4}
    layer = getattr(compat, name)(dim=4, groups=2, num_quantizers=8, quantize_dropout=True, **options)
    used = torch.stack([(layer(torch.randn(2, 3, 4))[1] >= 0).sum(-1) for _ in range(8)]).flatten(1)
    assert (used == used[:, :1]).all()
    assert len(used.unique()) > 1


@pytest.mark.parametrize(("channel_first", "shape"), [(False, (6, 7)), (True, (2, 7, 3, 5))])
def test_fsp_indices(channel_first, shape):
    reference, layer = pair("FSP", [5, 4, 3], 7, channel_first=channel_first, need_inv_act=True)
    codes, indices, _, info = layer(torch.randn(shape))
    torch.testing.assert_close(layer.indices_to_codes(indices), reference.indices_to_codes(indices))
    torch.testing.assert_close(layer.indices_to_codes(indices), codes)
    assert torch.equal(layer.indices_to_level_indices(indices), info["level_indices"].long())
    assert torch.equal(layer.level_indices_to_indices(info["level_indices"]), indices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_laplace_distribution(dtype):
    """Its density is 1/2 at the middle, and neither function overflows."""
    function, inverse = build_cdf_act("laplace")
    z = torch.tensor([-1000, -1, 0, 1, 1000], dtype=dtype, requires_grad=True)
    (slope,) = torch.autograd.grad(function(z).sum(), z)
    torch.testing.assert_close(slope, (-z.abs()).exp() / 2)
    p = torch.tensor([0.01, 0.25, 0.5, 0.75, 0.99], dtype=dtype, requires_grad=True)
    torch.testing.assert_close(function(inverse(p)), p)
    (slope,) = torch.autograd.grad(inverse(p).sum(), p)
    torch.testing.assert_close(slope, 1 / torch.minimum(p, 1 - p))


def test_fsp_where_upstream_errs():
    layer = compat.FSP([1000] * 3)
    _, indices, _, info = layer(torch.full((2, 3), 9.0, dtype=torch.bfloat16))
    assert (indices == 1000**3 - 1).all()
    _, indices, loss, _ = layer(torch.full((1, 3), 9.0))
    assert indices == 1000**3 - 1
    assert loss == 0
    assert all(t.isfinite().all() for t in layer(torch.zeros(0, 5, 3))[:3])
    with torch.autocast("cpu", torch.bfloat16):
        _, _, _, info = compat.FSP([5, 4], dim=4)(torch.randn(50, 4) * 100)
    assert (info["level_indices"] <= torch.tensor([4, 3])).all()


@pytest.mark.parametrize("options", [{"dim": 7}, {"dim": 4, "num_codebooks": 2}, {"dim": 2, "keep_num_codebooks_dim": True}])
def test_latent_indices(options):
    reference, layer = pair("LatentQuantize", [5, 4], **options)
    z = torch.randn(2, options["dim"], 30)
    out, indices, _ = layer(z)
    torch.testing.assert_close(out, reference(z)[0])
    torch.testing.assert_close(layer.indices_to_codes(indices), out)
    torch.testing.assert_close(layer.indices_to_codes(indices), reference.indices_to_codes(indices))
    torch.testing.assert_close(layer.implicit_codebook, reference.implicit_codebook)
    codes = layer.implicit_codebook
    assert torch.equal(layer.codes_to_indices(codes), torch.arange(20, dtype=torch.int32))
    torch.testing.assert_close(layer.quantize(codes + 0.01), codes)


def test_latent_values_that_are_not_parameters_follow_the_layer():
    layer = compat.LatentQuantize([3, 4], 2, optimize_values=False)
    layer.values_per_latent[0] += 0.125
    layer = layer.double()
    assert {values.dtype for values in layer.values_per_latent} == {torch.float64}
    out, indices, _ = layer(torch.zeros(1, 2, 5, dtype=torch.float64))
    assert out.dtype == torch.float64
    assert (out[:, 0] == 0.125).all()
    assert torch.equal(layer.indices_to_codes(indices), out)


def test_latent_indices_where_upstream_truncates():
    layer = compat.LatentQuantize([9, 6], 2)
    z = torch.randn(1, 2, 4000, generator=torch.Generator().manual_seed(0))
    out, indices, _ = layer(z)
    assert torch.equal(layer.indices_to_codes(indices), out)
    other = upstream.LatentQuantize([9, 6], 2)
    assert (other(z)[1] != indices).any()


def test_latent_values_learn_in_place():
    layer = compat.LatentQuantize([5, 4], 2, in_place_codebook_optimizer=lambda values: torch.optim.SGD(values, lr=5))
    z = torch.rand(2, 2, 200) * 3
    before = [values.clone() for values in layer.values_per_latent]
    distances = [(layer(z)[0] - z).square().mean().item() for _ in range(30)]
    assert distances[-1] < 0.2 * distances[0]
    assert not any(torch.equal(a, b) for a, b in zip(before, layer.values_per_latent, strict=True))
    out, indices, _ = layer.eval()(z)
    torch.testing.assert_close(layer.indices_to_codes(indices), out)
    assert torch.equal(layer(z)[0], out)


def test_binary_mapper_probabilities():
    reference, layer = pair("BinaryMapper", 5)
    logits = torch.randn(2, 6, 5) * 3
    torch.manual_seed(1)
    one_hot, indices, _ = layer(logits, return_indices=True)
    torch.manual_seed(1)
    assert torch.equal(reference(logits, return_indices=True)[1], indices)
    for options in ({"indices": indices}, {"one_hot": one_hot}, {"indices": indices, "sum_bits": False}):
        torch.testing.assert_close(layer.log_prob(logits, **options), reference.log_prob(logits, **options))
    assert torch.equal(layer.codes, reference.codes)
    assert torch.equal(layer.power_two, reference.power_two)
    probabilities = layer._probabilities(logits)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 6))
    chosen = probabilities.gather(-1, indices.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(chosen.log(), layer.log_prob(logits, indices=indices))
    torch.testing.assert_close(layer.binary_entropy(logits), reference.binary_entropy(logits))


def test_binary_mapper_gradient_with_confident_logits():
    logits = torch.tensor([[-1e4, 1e4, 0.0]], requires_grad=True)
    one_hot, loss = compat.BinaryMapper(3)(logits)
    (one_hot[0] @ torch.arange(8.0) + loss).backward()
    assert logits.grad.isfinite().all()
    torch.testing.assert_close(logits.grad[0, 2], torch.tensor(1.0))  # the bit of weight 4, at the steepest place of the sigmoid


def fitness(decoded, bits):
    return -(decoded - 1).square().sum(-1) - bits.sum(-1) * 0


def test_evolution_matches_upstream():
    layers = []
    for library in (upstream, compat):
        torch.manual_seed(0)
        layers.append(library.EvoLFQ(nn.Linear(5, 6), nn.Linear(6, 5), codebook_size=8, num_codebooks=2, pop_size=12))
    runs = []
    for layer in layers:
        torch.manual_seed(1)
        runs.append(list(layer.evolve(fitness, shape=(6,), generations=6, return_best_decoded=True)))
    for expected, found in zip(*runs, strict=True):
        assert torch.equal(found.pop_bits, expected.pop_bits)
        assert found.best_fitness == pytest.approx(expected.best_fitness)
        torch.testing.assert_close(
            fitness(layers[1].decode_bits(found.best_gene[None]), found.best_gene[None])[0].item(), found.best_fitness
        )
        torch.testing.assert_close(found.best_decoded, layers[1].decode_bits(found.best_gene[None])[0])
    assert runs[1][-1].best_fitness > runs[1][0].best_fitness
    x = torch.randn(7, 5)
    bits = layers[1].encode(x)
    assert torch.equal(bits, layers[0].encode(x))
    assert torch.equal(layers[1].encode(x, return_signs=True), layers[0].encode(x, return_signs=True))
    torch.testing.assert_close(layers[1].decode_bits(bits), layers[1].eval()(x).reconstructed)
    torch.manual_seed(2)
    population = layers[1].init_population_from_data(x, is_sign=True)
    torch.manual_seed(2)
    assert torch.equal(population, layers[0].init_population_from_data(x, is_sign=True))
    torch.manual_seed(2)
    winners = layers[1].tournament_selection(population, population.sum(-1))
    torch.manual_seed(2)
    assert torch.equal(winners, layers[0].tournament_selection(population, population.sum(-1)))


def test_bits_of_a_projected_encoder_decode():
    layer = compat.EvoLFQ(nn.Identity(), nn.Identity(), dim=9, codebook_size=16, orthogonal_rotation=True).eval()
    x = torch.randn(3, 4, 9)
    bits = layer.encode(x)
    assert bits.shape == (3, 4, 4)
    torch.testing.assert_close(layer.decode_bits(bits), layer(x).reconstructed)


@pytest.mark.parametrize("options", [{}, {"frac_per_sample_entropy": 0.5}])
def test_lfq_masks_samples_of_images(options):
    """One bool a sample, as [B], [B, positions] and [B, H, W]; the losses are those of the samples that are left."""
    reference, layer = (each.train() for each in pair("LFQ", dim=6, codebook_size=16, commitment_loss_weight=0.5, **options))
    x, mask = torch.randn(4, 6, 3, 5), torch.tensor([True, False, True, True])
    losses = []
    for given in (mask, mask[:, None].expand(4, 15), mask[:, None, None].expand(4, 3, 5)):
        torch.manual_seed(1)
        losses.append(layer(x, mask=given).entropy_aux_loss)
    assert losses[0] == losses[1] == losses[2]
    if not options:
        torch.testing.assert_close(losses[0], reference(x, mask=mask).entropy_aux_loss, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(losses[0], layer(x[mask]).entropy_aux_loss)


def test_lfq_fraction_below_one_vector():
    x, mask = torch.tensor([[[0.1, -0.2], [0.2, -0.1]]]), torch.tensor([[False, True]])
    whole = compat.LFQ(dim=2, diversity_gamma=0.7)
    part = compat.LFQ(dim=2, diversity_gamma=0.7, frac_per_sample_entropy=0.1)
    torch.testing.assert_close(part(x[:, :1], 1.0).entropy_aux_loss, whole(x[:, :1], 1.0).entropy_aux_loss)
    torch.testing.assert_close(part(x, 1.0, mask=mask).entropy_aux_loss, whole(x, 1.0, mask=mask).entropy_aux_loss)
    assert part(x, 1.0, mask=mask & False).entropy_aux_loss == 0


MADE = {
    "ResidualFSQ": lambda: compat.ResidualFSQ(levels=[5, 4], num_quantizers=3, dim=6),
    "ResidualLFQ": lambda: compat.ResidualLFQ(dim=6, codebook_size=8, num_quantizers=3),
    "GroupedResidualFSQ": lambda: compat.GroupedResidualFSQ(dim=6, groups=2, levels=[5, 4], num_quantizers=3),
    "FSP": lambda: compat.FSP([5, 4], 6, quantize_rate=1.0),
    "LatentQuantize": lambda: compat.LatentQuantize([5, 4], 6, optimize_values=False),
    "BinaryMapper": lambda: compat.BinaryMapper(6, deterministic_on_eval=True),
}


@pytest.mark.parametrize("name", MADE)
def test_meta_device_half_precision_and_empty_batches(name):
    layer = MADE[name]().eval()
    with torch.device("meta"):
        emptied, assigned = MADE[name]().eval(), MADE[name]().eval()
    emptied.to_empty(device="cpu").load_state_dict(layer.state_dict())
    assigned.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(2, 6) if name == "LatentQuantize" else torch.randn(2, 3, 6)
    expected = layer(x)
    for other in (emptied, assigned.to("cpu"), copy.deepcopy(layer)):
        assert all(torch.equal(a, b) for a, b in zip(other(x)[:2], expected[:2], strict=True))
    assert all(t.isfinite().all() for t in layer.train()(x[:0])[:3] if isinstance(t, torch.Tensor))
    half = copy.deepcopy(layer).bfloat16()(x.bfloat16())[0]
    assert half.dtype == (torch.float32 if name == "BinaryMapper" else torch.bfloat16)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: compat.ResidualFSQ(levels=[5, 1], num_quantizers=2), "ResidualFSQ: levels must be"),
        (
            lambda: compat.ResidualFSQ(levels=[5], num_quantizers=2, soft_clamp_input_value=2.0),
            "ResidualFSQ: soft_clamp_input_value excludes",
        ),
        (lambda: compat.ResidualFSQ(levels=[5], num_quantizers=0), "ResidualFSQ: num_quantizers must be at least 1, got 0"),
        (lambda: compat.ResidualFSQ(levels=[5], num_quantizers=1)(torch.zeros(2, 3)), "ResidualFSQ: the channels of x must be 1"),
        (lambda: compat.ResidualLFQ(dim=4, num_quantizers=2, codebook_size=12), "ResidualLFQ: codebook_size must be a power of 2, got 12"),
        (lambda: compat.ResidualLFQ(dim=4, num_quantizers=2, codebook_size=16, num_codebooks=2), "ResidualLFQ: its quantizers must not"),
        (lambda: compat.GroupedResidualFSQ(dim=5, groups=2, levels=[5], num_quantizers=1), "GroupedResidualFSQ: dim must be divisible"),
        (
            lambda: compat.GroupedResidualLFQ(dim=5, groups=2, codebook_size=4, num_quantizers=1),
            "GroupedResidualLFQ: dim must be divisible",
        ),
        (lambda: compat.FSP([5, 4], act_name="relu"), "FSP: act_name must be one of"),
        (lambda: compat.FSP([5, 4], vector_norm="other"), "VectorNorm: the preset must be one of"),
        (lambda: compat.FSP([5, 4], quantize_rate=1.5), r"FSP: quantize_rate must lie in \[0, 1\], got 1.5"),
        (lambda: compat.LatentQuantize(4, 2), "LatentQuantize: one number of levels needs codebook_dim, got -1"),
        (lambda: compat.LatentQuantize([4, 4], 2, codebook_dim=3), "LatentQuantize: codebook_dim must be the number of levels, 2, got 3"),
        (lambda: compat.LatentQuantize([4, 4], 2)(torch.zeros(2, 3, 4)), "LatentQuantize: the channels of z must be 2"),
        (lambda: compat.BinaryMapper(2)(torch.zeros(3)), "BinaryMapper: logits must have 2 channels"),
        (lambda: compat.BinaryMapper(2).log_prob(torch.zeros(2)), "BinaryMapper: either indices or one_hot must be given"),
        (lambda: compat.EvoLFQ(nn.Identity(), nn.Identity(), dim=4, pop_size=1), "EvoLFQ: pop_size must be greater than elitism_count"),
        (lambda: compat.LFQ(dim=4)(torch.zeros(2, 3, 4), mask=torch.ones(3, dtype=torch.bool)), "LFQ: mask must have the shape"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
