# SPDX-License-Identifier: Apache-2.0
"""VectorQuantize, ResidualVQ, GroupedResidualVQ and SimVQ of genperf.compat against vector-quantize-pytorch."""

import copy
import importlib
import inspect
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from genperf.compat import vector_quantize_pytorch as compat
from genperf.nn import _ema, code_usage, update_codebooks

upstream = pytest.importorskip("vector_quantize_pytorch")

DIM, CODES, STEPS = 8, 12, 20


def pair(name, *arguments, **options):
    """A layer of upstream and one of genperf, made with the same seed."""
    layers = []
    for module in (upstream, compat):
        torch.manual_seed(0)
        layers.append(getattr(module, name)(*arguments, **options))
    assert_equal_states(*layers, exact=True)
    return layers


def assert_equal_states(reference, layer, exact=False):
    expected, state = reference.state_dict(), layer.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, msg=lambda m, name=name: f"{name}: {m}", **({"rtol": 0, "atol": 0} if exact else {}))
    assert {n for n, _ in layer.named_parameters()} == {n for n, _ in reference.named_parameters()}


def train_both(upstream_layer, genperf_layer, shape, forward=lambda step: {}, steps=STEPS, lr=0.5):
    """Train both layers and their inputs with SGD, and compare outputs, gradients and states in each step."""
    torch.manual_seed(1)
    start, targets = torch.randn(shape), torch.randn(steps, *shape)
    inputs = [nn.Parameter(start.clone()) for _ in range(2)]
    optimizers = [
        torch.optim.SGD([x, *layer.parameters()], lr=lr) for x, layer in zip(inputs, (upstream_layer, genperf_layer), strict=True)
    ]
    for step in range(steps):
        results = []
        for layer, x, optimizer in zip((upstream_layer, genperf_layer), inputs, optimizers, strict=True):
            optimizer.zero_grad()
            quantized, *others = layer(x, **forward(step))
            (F.mse_loss(quantized, targets[step], reduction="sum") / 8 + others[1].sum()).backward()
            optimizer.step()
            flat = [t for other in others for t in (other if isinstance(other, tuple) else [other])]
            results.append([quantized, *flat, *(p.grad for group in optimizer.param_groups for p in group["params"])])
        for number, (expected, value) in enumerate(zip(*results, strict=True)):
            assert_near(value, expected, f"step {step}, result {number}")
        state = genperf_layer.state_dict()
        for name, expected in upstream_layer.state_dict().items():
            assert_near(state[name], expected, f"step {step}, {name}")


def assert_near(value, expected, where):
    """Equal up to rounding, which the rotation amplifies where vector and code point in opposite directions."""
    if value is None or expected is None:
        assert value is None or not value.any(), where
        return
    scale = expected.abs().max().item() if expected.is_floating_point() else 0
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-4 * scale, msg=lambda m: f"{where}: {m}")


SEQUENCE, IMAGE = (3, 10, DIM), (2, DIM, 4, 5)
TRAINED = {
    "euclidean": (SEQUENCE, {}),
    "single vectors": ((30, DIM), {}),
    "straight-through": (SEQUENCE, {"rotation_trick": False}),
    "decay and eps": (SEQUENCE, {"decay": 0.95, "eps": 1e-2}),
    "cosine": (SEQUENCE, {"use_cosine_sim": True}),
    "projection": (SEQUENCE, {"codebook_dim": 4}),
    "layer norm": (SEQUENCE, {"codebook_dim": 4, "layernorm_after_project_in": True}),
    "heads": (SEQUENCE, {"heads": 2, "codebook_dim": 4}),
    "heads, projection, cosine": (SEQUENCE, {"heads": 2, "codebook_dim": 3, "use_cosine_sim": True}),
    "separate heads": (SEQUENCE, {"heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True}),
    "separate heads, projection": (SEQUENCE, {"heads": 3, "codebook_dim": 4, "separate_codebook_per_head": True}),
    "separate, one head": (SEQUENCE, {"separate_codebook_per_head": True}),
    "image": (IMAGE, {"accept_image_fmap": True}),
    "image, heads, projection": (IMAGE, {"accept_image_fmap": True, "heads": 2, "codebook_dim": 3, "separate_codebook_per_head": True}),
    "volume": ((2, DIM, 2, 3, 4), {"accept_3d_fmap": True}),
    "channels first": ((3, DIM, 10), {"channel_last": False}),
    "learnable": (SEQUENCE, {"learnable_codebook": True, "ema_update": False}),
    "learnable, synchronous": (SEQUENCE, {"learnable_codebook": True, "ema_update": False, "sync_update_v": 0.3}),
    "learnable, image": (IMAGE, {"learnable_codebook": True, "ema_update": False, "accept_image_fmap": True, "commitment_weight": 0.3}),
    "no update": (SEQUENCE, {"ema_update": False}),
    "manual update": (SEQUENCE, {"manual_ema_update": True}),
    "EMA for dead-code replacement": (SEQUENCE, {"ema_update": False, "threshold_ema_dead_code": 1e-9}),
    "frozen": (SEQUENCE, {"freeze_codebook": True}),
    "frozen learnable": (SEQUENCE, {"freeze_codebook": True, "learnable_codebook": True, "ema_update": False}),
    "orthogonal": (SEQUENCE, {"orthogonal_reg_weight": 3.0}),
    "orthogonal, heads": (SEQUENCE, {"orthogonal_reg_weight": 3.0, "heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True}),
    "orthogonal, used codes": (SEQUENCE, {"orthogonal_reg_weight": 3.0, "orthogonal_reg_active_codes_only": True}),
    "no commitment": (SEQUENCE, {"commitment_weight": 0.0}),
    "no gradient to the input": (SEQUENCE, {"route_gradients_to_input": False}),
    "no gradient to the input, learnable": (SEQUENCE, {"route_gradients_to_input": False, "learnable_codebook": True, "ema_update": False}),
    "directional": (SEQUENCE, {"directional_reparam": True, "directional_reparam_variance": 0.0, "threshold_ema_dead_code": 1e-9}),
}


@pytest.mark.parametrize("case", TRAINED)
def test_training_steps_match_upstream(case):
    shape, options = TRAINED[case]
    upstream_layer, genperf_layer = pair("VectorQuantize", DIM, CODES, **options)
    lr = 0.01 if options.get("layernorm_after_project_in") else 0.1
    train_both(upstream_layer, genperf_layer, shape, lambda step: {"return_loss_breakdown": True}, lr=lr)


LEARNED = {"learnable_codebook": True, "ema_update": False}
FIXED = {"ema_update": False}  # With an EMA, upstream differentiates these losses at the codes after the update.


@pytest.mark.parametrize(
    ("shape", "options"),
    [((30, DIM), FIXED), ((30, 1, DIM), LEARNED), ((30, DIM), {"use_cosine_sim": True, **FIXED}), ((30, DIM), {"freeze_codebook": True})],
)
def test_diversity_loss_matches_upstream(shape, options):
    weights = {"codebook_diversity_loss_weight": 0.5, "codebook_diversity_temperature": 10.0}
    layers = pair("VectorQuantize", DIM, CODES, **weights, **options)
    train_both(*layers, shape, lambda step: {"return_loss_breakdown": True}, lr=0.1)


@pytest.mark.parametrize("options", [FIXED, LEARNED, {"use_cosine_sim": True, **FIXED}, {"heads": 2, "codebook_dim": 4, **FIXED}])
def test_cross_entropies_match_upstream(options):
    torch.manual_seed(0)
    targets = torch.randint(-1, CODES, SEQUENCE[:2] + ((2,) if "heads" in options else ()))
    upstream_layer, genperf_layer = pair("VectorQuantize", DIM, CODES, **options)
    results = []
    for layer in (upstream_layer, genperf_layer):
        x = torch.randn(SEQUENCE, generator=torch.Generator().manual_seed(2)).requires_grad_()
        quantized, loss = layer(x, indices=targets)
        loss.backward()
        results.append((loss, x.grad, *(p.grad for p in layer.parameters())))
        assert quantized.shape[-1] == (DIM if layer is genperf_layer or layer.heads == 1 else DIM // 2)
    for expected, value in zip(*results, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    layers = pair("VectorQuantize", DIM, CODES, commitment_use_cross_entropy_loss=True, **options)
    train_both(*layers, SEQUENCE, lambda step: {"return_loss_breakdown": True}, lr=0.1, steps=5)


def test_codes_are_sampled_by_distance():
    torch.manual_seed(0)
    layer = compat.VectorQuantize(2, 4, stochastic_sample_codes=True, freeze_codebook=True, commitment_weight=0.0)
    x = torch.zeros(20_000, 2)
    for temperature, options in ((1.0, {}), (0.3, {"sample_codebook_temp": 0.3})):
        p = (-layer.codebook.norm(dim=1) / temperature).softmax(0)
        _, indices, _ = layer(x, **options)
        torch.testing.assert_close(torch.bincount(indices, minlength=4) / len(x), p, rtol=0, atol=0.02)
    assert len(layer(x, sample_codebook_temp=0.0)[1].unique()) == 1
    assert len(layer.eval()(x)[1].unique()) == 1


MASK = torch.arange(10) < torch.tensor([[10], [3], [6]])
CALLS = {
    "mask": lambda step: {"mask": MASK.roll(step, 0)},
    "lens": lambda step: {"lens": torch.tensor([10, 3, 1 + step % 10])},
    "weights": lambda step: {"ema_update_weight": torch.linspace(0, 1, CODES)},
    "weights by head": lambda step: {"ema_update_weight": torch.linspace(0, 1, CODES).reshape(1, CODES)},
    "function": lambda step: {"ema_update_weight": lambda sums, counts: (counts / (counts + 1)) * (sums.norm(dim=-1) > 1)},
    "accumulation": lambda step: {"accum_ema_update": step % 3 < 2},
    "no update": lambda step: {"ema_update": step % 2 == 0},
    "freezing": lambda step: {"freeze_codebook": step % 2 == 0},
    "temperature alone": lambda step: {"sample_codebook_temp": 0.5},
}


@pytest.mark.parametrize("call", CALLS)
def test_forward_arguments_match_upstream(call):
    upstream_layer, genperf_layer = pair("VectorQuantize", DIM, CODES)
    train_both(upstream_layer, genperf_layer, SEQUENCE, CALLS[call], lr=0.1)


def test_ema_update_in_forward_overrides_the_constructor():
    upstream_layer, genperf_layer = pair("VectorQuantize", DIM, CODES, ema_update=False)
    train_both(upstream_layer, genperf_layer, SEQUENCE, lambda step: {"ema_update": step % 2 == 0}, lr=0.1)


@pytest.mark.parametrize("zeros", [True, False])
def test_padding_is_ignored(zeros):
    """With projection, heads and cosine, where upstream fails; the reference is the layer on the valid vectors only."""
    torch.manual_seed(0)
    options = {"heads": 2, "codebook_dim": 3, "use_cosine_sim": True, "return_zeros_for_masked_padding": zeros}
    masked = compat.VectorQuantize(DIM, CODES, **options)
    kept = copy.deepcopy(masked)
    x = torch.randn(SEQUENCE)
    x[~MASK] = float("nan") if zeros else 5.0
    quantized, indices, loss = masked(x, lens=torch.tensor([10, 3, 6]))
    expected = kept(x[MASK])
    torch.testing.assert_close((quantized[MASK], indices[MASK], loss), expected)
    assert torch.equal(quantized[~MASK], torch.full_like(x[~MASK], 0.0 if zeros else 5.0))
    (quantized.sum() + loss).backward()
    (expected[0].sum() + expected[2]).backward()
    if zeros:
        torch.testing.assert_close(masked.project_in.weight.grad, kept.project_in.weight.grad)
    assert (indices[~MASK] == -1).all()
    assert_equal_states(kept, masked)
    if zeros:
        torch.testing.assert_close(masked.eval().get_output_from_indices(indices)[~MASK], quantized[~MASK])
    assert masked.train()(x, mask=torch.zeros_like(MASK))[2] == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("learnable", [False, True])
def test_dtypes(dtype, learnable):
    upstream_layer, genperf_layer = pair("VectorQuantize", DIM, CODES, learnable_codebook=learnable, ema_update=not learnable)
    torch.manual_seed(1)
    x = torch.randn(SEQUENCE, dtype=dtype)
    results = []
    for layer in (upstream_layer, genperf_layer):
        leaf = x.clone().requires_grad_()
        quantized, indices, loss = layer(leaf)
        (quantized.sum() + loss).backward()
        results.append((quantized, indices, loss, leaf.grad))
        assert quantized.dtype == dtype
    for value, expected in zip(*reversed(results), strict=True):
        tolerance = {torch.float64: 1e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
        torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)
    assert_equal_states(upstream_layer, genperf_layer)


def trained(layer, *shape):
    torch.manual_seed(3)
    for _ in range(3):
        layer(torch.randn(shape))
    return layer


CHECKPOINTS = {
    "euclidean": ("VectorQuantize", {"dim": DIM, "codebook_size": CODES}),
    "cosine": ("VectorQuantize", {"dim": DIM, "codebook_size": CODES, "use_cosine_sim": True}),
    "k-means": ("VectorQuantize", {"dim": DIM, "codebook_size": CODES, "kmeans_init": True}),
    "projection": (
        "VectorQuantize",
        {"dim": DIM, "codebook_size": CODES, "codebook_dim": 3, "heads": 2, "layernorm_after_project_in": True},
    ),
    "learnable": ("VectorQuantize", {"dim": DIM, "codebook_size": CODES, "learnable_codebook": True, "ema_update": False}),
    "residual": ("ResidualVQ", {"dim": DIM, "codebook_size": CODES, "num_quantizers": 3}),
    "residual, projection, sizes": ("ResidualVQ", {"dim": DIM, "codebook_size": (5, 6), "codebook_dim": 4}),
    "residual, shared": ("ResidualVQ", {"dim": DIM, "codebook_size": CODES, "num_quantizers": 3, "shared_codebook": True}),
    "grouped": ("GroupedResidualVQ", {"dim": DIM, "groups": 2, "codebook_size": CODES, "num_quantizers": 2}),
    "sim": ("SimVQ", {"dim": DIM, "codebook_size": CODES, "frozen_codebook_dim": 5}),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoints_load_in_both_directions(case):
    name, options = CHECKPOINTS[case]
    for source, target in ((upstream, compat), (compat, upstream)):
        saved, loaded = (nn.ModuleDict({"quantizer": getattr(module, name)(**options)}) for module in (source, target))
        trained(saved["quantizer"], 4, 20, DIM)
        loaded.load_state_dict(saved.state_dict(), strict=True)
        x = torch.randn(4, 50, DIM)
        for mode in (True, False):
            quantized, indices, _ = loaded.train(mode)["quantizer"](x)
            expected = saved.train(mode)["quantizer"](x)
            assert torch.equal(indices, expected[1])
            torch.testing.assert_close(quantized, expected[0])
        assert_equal_states(saved, loaded)


def test_loading_an_uninitialized_checkpoint():
    new = compat.VectorQuantize(DIM, CODES, kmeans_init=True)
    other = compat.VectorQuantize(DIM, CODES, kmeans_init=True)
    trained(other, 50, DIM)
    assert other._codebook.initted
    other.load_state_dict(new.state_dict())
    assert not other._codebook.initted
    other.eval()(torch.randn(50, DIM))
    assert other._codebook.initted
    assert other.codebook.norm(dim=1).min() > 0


def test_kmeans_error_is_near_that_of_upstream():
    torch.manual_seed(0)
    centers = 10 * torch.randn(CODES, DIM)
    x = centers[torch.randint(CODES, (2000,))] + torch.randn(2000, DIM)
    errors = []
    for layer in pair("VectorQuantize", DIM, CODES, kmeans_init=True, kmeans_iters=20):
        layer(x)
        assert layer._codebook.initted
        assert layer._codebook.cluster_size.sum().item() == pytest.approx(2000, rel=1e-4)
        errors.append(F.mse_loss(layer.eval()(x)[0], x))
    assert errors[1] < 1.02 * errors[0]


@pytest.mark.parametrize("options", [{}, {"use_cosine_sim": True}, {"learnable_codebook": True, "ema_update": False}])
def test_dead_codes_are_replaced_by_vectors_of_the_batch(options):
    layers = pair("VectorQuantize", DIM, CODES, threshold_ema_dead_code=0.9, **options)
    x = 5 + torch.randn(2, 40, DIM, generator=torch.Generator().manual_seed(5))
    for layer in layers:
        layer(x)
    sizes = [layer._codebook.cluster_size for layer in layers]
    torch.testing.assert_close(*sizes)
    dead = sizes[1].squeeze(0) == 0.9
    assert dead.any()
    codes, rows = layers[1].codebook[dead], x.flatten(0, 1)
    rows = F.normalize(rows, dim=-1) if options.get("use_cosine_sim") else rows
    assert (codes.unsqueeze(1) - rows).norm(dim=-1).min(1).values.max() < 1e-6
    assert len(codes.unique(dim=0)) == len(codes)
    torch.testing.assert_close(layers[1].codebook[~dead], layers[0].codebook[~dead])
    torch.testing.assert_close(layers[1]._codebook.embed_avg[0, dead], codes * 0.9)


def test_expire_codes():
    layer = compat.VectorQuantize(DIM, CODES, threshold_ema_dead_code=0.5)
    layer._codebook.cluster_size[0, ::2] = 0.1
    before = layer.codebook.clone()
    x = torch.randn(2, 10, DIM)
    layer.eval().expire_codes_(x)
    assert torch.equal(layer.codebook, before)
    layer.train().expire_codes_(x)
    assert torch.equal(layer.codebook[1::2], before[1::2])
    assert all((x == code).all(-1).any() for code in layer.codebook[::2])


@pytest.mark.parametrize("options", [{}, {"use_cosine_sim": True}, {"heads": 2, "codebook_dim": 3}, {"accept_image_fmap": True}])
def test_indices_and_outputs(options):
    torch.manual_seed(0)
    layer = compat.VectorQuantize(DIM, CODES, **options).eval()
    shape = IMAGE if "accept_image_fmap" in options else SEQUENCE
    x = torch.randn(shape)
    quantized, indices, loss = layer(x)
    torch.testing.assert_close(layer.get_output_from_indices(indices), quantized)
    torch.testing.assert_close(layer.get_output_from_indices(indices.int()), quantized)
    assert loss == 0
    assert not quantized.requires_grad or layer.has_projections
    codes = layer.get_codes_from_indices(indices)
    if layer.has_projections:
        assert torch.equal(codes, layer.codebook[indices].flatten(-2))
    else:
        assert torch.equal(codes, quantized)
    empty = torch.full_like(indices, -1)
    assert not layer.get_output_from_indices(empty).any()

    # update_ema_indices is the update of a training step.
    fused, manual = copy.deepcopy(layer).train(), copy.deepcopy(layer).train()
    fused(x)
    manual.update_ema_indices(x, indices)
    assert_equal_states(fused, manual)


def test_setting_the_codebook():
    for options in (
        {},
        {"learnable_codebook": True, "ema_update": False},
        {"separate_codebook_per_head": True, "heads": 2, "codebook_dim": 4},
    ):
        layer = compat.VectorQuantize(DIM, CODES, **options)
        codes = torch.randn_like(layer.codebook)
        assert codes.shape == ((2, CODES, 4) if "heads" in options else (CODES, DIM))
        layer.codebook = codes
        assert torch.equal(layer.codebook, codes)
        assert layer._codebook.embed.dim() == 3


def test_manual_updates():
    layers = pair("VectorQuantize", DIM, CODES, manual_ema_update=True)
    x = torch.randn(SEQUENCE)
    for layer in layers:
        layer(x)
        before = layer.codebook.clone()
        layer._codebook.update_ema()
        assert not torch.equal(layer.codebook, before)
    assert_equal_states(*layers)
    # Several layers in one update; a layer without an EMA keeps its codes.
    both = nn.ModuleList([compat.VectorQuantize(DIM, CODES), compat.VectorQuantize(DIM, CODES, learnable_codebook=True, ema_update=False)])
    before = [layer.codebook.detach().clone() for layer in both]
    for layer in both:
        layer(x, accum_ema_update=True)
    update_codebooks(both)
    assert not torch.equal(both[0].codebook, before[0])
    assert torch.equal(both[1].codebook, before[1])


def test_copies_and_dtypes_of_a_layer():
    layer = trained(compat.VectorQuantize(DIM, CODES, threshold_ema_dead_code=0.5), 30, DIM)
    x = torch.randn(30, DIM)
    expected = layer(x)[1]
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_equal_states(layer, other, exact=True)
        assert torch.equal(other(x)[0], copy.deepcopy(layer)(x)[0])
    assert (layer.double()(x.double())[1] == expected).float().mean() > 0.5
    assert layer.half()(x.half())[0].dtype == torch.float16
    assert code_usage(expected, CODES).used > 1


def test_backward_of_a_loss_without_parameters():
    quantized, _, loss = compat.VectorQuantize(DIM, CODES)(torch.randn(4, DIM))
    loss.backward()
    assert not quantized.requires_grad
    with torch.no_grad():
        assert not compat.VectorQuantize(DIM, CODES)(torch.randn(4, DIM))[2].requires_grad


RESIDUAL = {
    "residual": {},
    "straight-through": {"rotation_trick": False, "commitment_weight": 0.3},
    "frozen": {"ema_update": False},
    "manual update": {"manual_ema_update": True},
    "cosine": {"use_cosine_sim": True},
    "projection": {"codebook_dim": 4},
    "shared": {"shared_codebook": True},
    "shared, dead-code replacement": {"shared_codebook": True, "threshold_ema_dead_code": 1e-9},
    "shared, learnable": {"shared_codebook": True, "learnable_codebook": True, "ema_update": False},
    "gradient of the quantized": {"quant_grad_frac": 0.3},
    "full gradient": {"quant_grad_frac": 1.0},
    "learnable": {"learnable_codebook": True, "ema_update": False},
    "sizes": {"codebook_size": (5, 6, 7), "num_quantizers": None},
}


@pytest.mark.parametrize("case", RESIDUAL)
def test_residual_training_steps_match_upstream(case):
    layers = pair("ResidualVQ", **{"dim": DIM, "codebook_size": CODES, "num_quantizers": 3, **RESIDUAL[case]})
    train_both(*layers, SEQUENCE, lambda step: {"return_all_codes": True}, lr=0.05, steps=12)


def test_residual_mask_matches_upstream():
    layers = pair("ResidualVQ", dim=DIM, codebook_size=CODES, num_quantizers=3)
    train_both(*layers, SEQUENCE, lambda step: {"mask": MASK.roll(step, 0)}, lr=0.05, steps=5)


@pytest.mark.parametrize("options", [{}, {"quantize_dropout_multiple_of": 3}, {"quantize_dropout_cutoff_index": 2}])
def test_quantize_dropout_matches_upstream(options):
    layers = pair("ResidualVQ", dim=DIM, codebook_size=CODES, num_quantizers=4, quantize_dropout=True, **options)
    train_both(*layers, SEQUENCE, lambda step: {"rand_quantize_dropout_fixed_seed": step}, lr=0.05, steps=8)
    x, found = torch.randn(SEQUENCE), []
    for layer in layers:
        torch.manual_seed(7)
        found.append([(layer(x)[1] == -1).all((0, 1)).tolist() for _ in range(6)])
    assert found[0] == found[1]
    assert len({str(dropped) for dropped in found[1]}) > 1


@pytest.mark.parametrize("options", [{}, {"shared_codebook": True}, {"codebook_dim": 4}])
@pytest.mark.parametrize("image", [False, True])
def test_residual_outputs_from_indices(options, image):
    torch.manual_seed(0)
    layer = compat.ResidualVQ(dim=DIM, codebook_size=CODES, num_quantizers=4, accept_image_fmap=image, **options).eval()
    x = torch.randn(IMAGE if image else SEQUENCE)
    quantized, indices, losses, codes = layer(x, return_all_codes=True)
    last = quantized.movedim(1, -1) if image else quantized
    torch.testing.assert_close(layer.get_output_from_indices(indices), last)
    torch.testing.assert_close(layer.project_out(codes.sum(0)), last)
    assert losses.tolist() == [0] * 4
    dropped = torch.cat([indices[..., :2], torch.full_like(indices[..., 2:], -1)], -1)
    torch.testing.assert_close(layer.get_output_from_indices(indices[..., :2]), layer.get_output_from_indices(dropped))
    torch.testing.assert_close(
        layer.get_codes_from_indices(indices[..., :2]), codes * torch.tensor([1, 1, 0, 0]).reshape(4, *[1] * (codes.dim() - 1))
    )
    if not image:
        upstream_layer = upstream.ResidualVQ(dim=DIM, codebook_size=CODES, num_quantizers=4, quantize_dropout=True, **options).eval()
        upstream_layer.load_state_dict(layer.state_dict())
        torch.testing.assert_close(
            upstream_layer.get_output_from_indices(indices[..., :2]), layer.get_output_from_indices(indices[..., :2])
        )
    assert layer.codebooks.shape == (4, CODES, layer.codebook_dim)


def test_residual_cross_entropy_of_its_own_indices():
    torch.manual_seed(0)
    layer = compat.ResidualVQ(dim=DIM, codebook_size=CODES, num_quantizers=2).eval()
    x = torch.randn(SEQUENCE)
    indices = layer(x)[1]
    quantized, loss = layer(x, indices=indices)
    first, second = layer.codebooks
    residuals = x, x - first[indices[..., 0]]
    logits = [-torch.cdist(r, c) for r, c in zip(residuals, (first, second), strict=True)]
    expected = sum(F.cross_entropy(part.flatten(0, 1), indices[..., i].flatten()) for i, part in enumerate(logits))
    torch.testing.assert_close(loss, expected)
    assert quantized.shape == x.shape


@pytest.mark.parametrize("image", [False, True])
def test_grouped(image):
    options = {"dim": DIM, "groups": 2, "codebook_size": CODES, "num_quantizers": 3}
    if not image:  # upstream fails on images
        layers = pair("GroupedResidualVQ", **options)
        train_both(*layers, SEQUENCE, lambda step: {"return_all_codes": True}, lr=0.05, steps=5)
    layer = compat.GroupedResidualVQ(**options, accept_image_fmap=image, quantize_dropout=True)
    x = torch.randn(IMAGE if image else SEQUENCE)
    _, indices, losses = layer(x)
    assert torch.equal(indices[0] == -1, indices[1] == -1), "all groups must run the same quantizers"
    assert losses.shape == (2, 3)
    quantized, indices, _ = layer.eval()(x)
    last = quantized.movedim(1, -1) if image else quantized
    torch.testing.assert_close(layer.get_output_from_indices(indices), last)
    assert layer.get_codes_from_indices(indices).shape == (2, 3, *last.shape[:-1], DIM // 2)
    assert layer.codebooks.shape == (2, 3, CODES, DIM // 2)


def test_diveq_learns_the_codes():
    torch.manual_seed(0)
    layer = compat.ResidualVQ(dim=DIM, codebook_size=CODES, num_quantizers=2, diveq=True)
    x = torch.randn(SEQUENCE, requires_grad=True)
    quantized, _, losses = layer(x)
    assert not losses.any()
    quantized.square().sum().backward()
    assert all(p.grad.any() for p in (x, *layer.parameters()))
    assert not torch.equal(quantized, layer.eval()(x)[0])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rotation_trick": False, "commitment_weight": 0.7, "input_to_quantize_commit_loss_weight": 0.4},
        {"frozen_codebook_dim": 5},
        {"channel_first": True},
        {"codebook_transform": nn.Sequential(nn.Linear(DIM, 6), nn.ReLU(), nn.Linear(6, DIM))},
    ],
)
def test_sim_vq_training_steps_match_upstream(options):
    upstream_layer, genperf_layer = (module.SimVQ(DIM, CODES, **copy.deepcopy(options)) for module in (upstream, compat))
    genperf_layer.load_state_dict(upstream_layer.state_dict())
    shape = IMAGE if options.get("channel_first") else SEQUENCE
    train_both(upstream_layer, genperf_layer, shape, lr=0.05)
    x = torch.randn(shape)
    quantized, indices, _ = genperf_layer.eval()(x)
    torch.testing.assert_close(genperf_layer.indices_to_codes(indices), quantized)
    torch.testing.assert_close(genperf_layer.codebook, upstream_layer.codebook, rtol=2e-4, atol=2e-5)


def test_sim_vq_under_autocast():
    layer = compat.SimVQ(DIM, CODES)
    with torch.autocast("cpu", torch.bfloat16):
        quantized, _, loss = layer(torch.randn(SEQUENCE, requires_grad=True))
    loss.backward()
    assert quantized.dtype == torch.float32
    assert layer.code_transform.weight.grad.isfinite().all()


COMPILED = {
    "image": ("eager", "VectorQuantize", {"heads": 2, "codebook_dim": 3, "accept_image_fmap": True, "use_cosine_sim": True}),
    "residual": ("aot_eager", "ResidualVQ", {"num_quantizers": 2, "threshold_ema_dead_code": 0}),
    "shared": ("aot_eager", "ResidualVQ", {"num_quantizers": 2, "shared_codebook": True}),
}


@pytest.mark.parametrize("case", COMPILED)
def test_compiles_without_a_graph_break(case):
    backend, name, options = COMPILED[case]
    torch.manual_seed(0)
    eager = getattr(compat, name)(**{"dim": DIM, "codebook_size": CODES, "threshold_ema_dead_code": 0.5, **options})
    other = copy.deepcopy(eager)
    x = torch.randn(IMAGE if "accept_image_fmap" in options else SEQUENCE)
    torch._dynamo.reset()
    compiled = torch.compile(other, fullgraph=True, backend=backend)
    for mode in (True, True, False):
        results = []
        for layer, call in ((eager, eager), (other, compiled)):
            layer.train(mode)
            leaf = x.clone().requires_grad_()
            quantized, indices, loss = call(leaf)
            if mode:
                (quantized.square().sum() + loss.sum()).backward()
            results.append((quantized, indices, loss, leaf.grad))
        torch.testing.assert_close(*reversed(results))
        assert_equal_states(eager, other)


def test_compiled_backward_uses_the_codes_from_before_the_update():
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager = compat.VectorQuantize(4, 8, decay=0.5, threshold_ema_dead_code=0.5)
    compiled = torch.compile(copy.deepcopy(eager), fullgraph=True)
    inputs = [torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2)]
    for layer, x in zip((eager, compiled), inputs, strict=True):
        layer(x)[2].backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("VectorQuantize", {"learnable_codebook": True}, "learnable_codebook needs ema_update=False"),
        ("VectorQuantize", {"learnable_codebook": True, "ema_update": False, "use_cosine_sim": True}, "exclude each other"),
        ("VectorQuantize", {"directional_reparam": True}, "needs a threshold_ema_dead_code"),
        ("VectorQuantize", {"directional_reparam": True, "rotation_trick": True}, "exclude each other"),
        ("VectorQuantize", {"sync_update_v": 0.5}, "sync_update_v"),
        ("ResidualVQ", {"heads": 2, "num_quantizers": 2}, "heads must be 1"),
        ("ResidualVQ", {}, "num_quantizers"),
        ("ResidualVQ", {"codebook_size": (4, 5), "shared_codebook": True}, "one codebook size"),
        ("GroupedResidualVQ", {"groups": 3, "num_quantizers": 2}, "divisible by groups, got 8 and 3"),
    ],
)
def test_invalid_arguments(name, options, message):
    with pytest.raises(ValueError, match=f"^{name}: .*{message}"):
        getattr(compat, name)(**{"dim": DIM, "codebook_size": CODES, **options})


@pytest.mark.parametrize("name", ["GroupedResidualVQ", "ResidualVQ", "SimVQ", "VectorQuantize"])
@pytest.mark.parametrize("method", ["__init__", "forward"])
def test_signatures_match_upstream(name, method):
    expected, found = (inspect.signature(getattr(getattr(module, name), method)).parameters for module in (upstream, compat))
    assert list(found) == list(expected)
    for parameter in found:
        if parameter not in ("init_fn", "mlp_kwargs"):  # a function, and a mutable default
            assert (found[parameter].default, found[parameter].kind) == (expected[parameter].default, expected[parameter].kind), parameter


@pytest.mark.parametrize(("sync_codebook", "synchronized"), [(None, True), (True, True), (False, False)])
def test_codebooks_are_synchronized_by_default(sync_codebook, synchronized, monkeypatch):
    sums = []
    monkeypatch.setattr(_ema, "world_size", lambda: 2)
    monkeypatch.setattr(_ema, "all_reduce_sum", lambda value: sums.append(value) or 2 * value)
    torch.manual_seed(0)
    layer = compat.VectorQuantize(DIM, CODES, sync_codebook=sync_codebook)
    layer(torch.randn(SEQUENCE))
    assert len(sums) == synchronized
    expected = 0.8 * CODES + 0.2 * 30 * (1 + synchronized)
    assert layer._codebook.cluster_size.sum().item() == pytest.approx(expected)


@pytest.mark.parametrize("shape", [(2, 0, DIM), (0, 5, DIM), (0, DIM)])
@pytest.mark.parametrize("options", [{}, {"heads": 2, "codebook_dim": 3}, {"kmeans_init": True, "threshold_ema_dead_code": 2}])
def test_empty_batches(shape, options):
    layer = compat.VectorQuantize(DIM, CODES, **options)
    x = torch.zeros(shape, requires_grad=True)
    quantized, indices, loss = layer(x)
    (quantized.sum() + loss).backward()
    assert quantized.shape == x.grad.shape == x.shape
    assert indices.shape == shape[:-1] + ((2,) if "heads" in options else ())
    assert loss == 0
    assert layer.get_output_from_indices(indices).shape == x.shape
    layer.update_indices(x, indices)
    assert layer.codebook.isfinite().all()
    if not options:
        residual = compat.ResidualVQ(dim=DIM, codebook_size=CODES, num_quantizers=2)
        quantized, indices, losses = residual(x)
        (quantized.sum() + losses.sum()).backward()
        assert (quantized.shape, indices.shape, losses.tolist()) == (x.shape, (*shape[:-1], 2), [0, 0])


def test_training_curves_of_the_benchmark_match(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    lines = importlib.import_module("ratios").training_lines(steps=10, batch_size=4, codes=16)
    curves = [(float(line["vector-quantize-pytorch"]), float(line["genperf"])) for line in lines[:10]]
    assert curves[-1][0] < curves[0][0]
    for upstream_loss, genperf_loss in curves:
        assert genperf_loss == pytest.approx(upstream_loss, rel=0.02)
    assert lines[-1][""] == "step, median ms"


def test_fused_quantizers_match_quantizers_one_by_one(monkeypatch):
    torch.manual_seed(0)
    fused = compat.ResidualVQ(dim=DIM, codebook_size=CODES, num_quantizers=3, quantize_dropout=True)
    single = copy.deepcopy(fused)
    monkeypatch.setattr(single, "_can_fuse", lambda: False)
    monkeypatch.setattr(fused, "_one_by_one", None)
    for dtype in (torch.float32, torch.float64):
        for seed in range(3):
            results = []
            for layer in (fused, single):
                x = torch.randn(SEQUENCE, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()
                quantized, indices, losses = layer(x, mask=MASK, rand_quantize_dropout_fixed_seed=seed)
                (quantized.square().sum() + losses.sum()).backward()
                results.append((quantized, indices, losses, x.grad))
            torch.testing.assert_close(*results)
            assert_equal_states(single, fused)
    x = torch.randn(SEQUENCE, requires_grad=True)
    torch.testing.assert_close(fused.eval()(x), single.eval()(x))
    assert not fused(x)[0].requires_grad
    fused.train()(x.detach())[2].sum().backward()  # no parameter needs the gradient


@pytest.mark.parametrize(
    "layer",
    [
        lambda: compat.ResidualVQ(dim=4, codebook_dim=2, codebook_size=8, num_quantizers=3),
        lambda: compat.ResidualVQ(dim=4, codebook_size=8, num_quantizers=3, diveq=True),
        lambda: compat.VectorQuantize(4, 8, directional_reparam=True, threshold_ema_dead_code=1),
    ],
)
def test_nan_padding_does_not_reach_the_gradients(layer):
    layer, x = layer(), torch.randn(2, 5, 4)
    mask = torch.arange(5).expand(2, 5) < torch.tensor([[3], [5]])
    x[~mask] = float("nan")
    x.requires_grad_()
    quantized, _, loss = layer(x, mask=mask)
    (quantized.sum() + loss.sum()).backward()
    assert all(t.grad is None or t.grad.isfinite().all() for t in (x, *layer.parameters()))


def test_changed_attributes_take_effect():
    torch.manual_seed(0)
    layer, reference = compat.VectorQuantize(4, 8), upstream.VectorQuantize(4, 8)
    layer.load_state_dict(reference.state_dict())
    x, weight = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    gradients = []
    for module in (layer, reference):
        module._codebook.decay = 0.0
        module.rotation_trick = False
        leaf = x.clone().requires_grad_()
        (module(leaf)[0] * weight).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(layer.codebook, reference.codebook)
    assert torch.equal(gradients[0], weight)
    torch.testing.assert_close(*gradients)


def test_one_quantizer_in_evaluation_mode():
    torch.manual_seed(0)
    layer, reference = (module.ResidualVQ(dim=4, codebook_size=8, num_quantizers=3) for module in (compat, upstream))
    layer.load_state_dict(reference.state_dict())
    x = torch.randn(2, 5, 4)
    for residual in (layer, reference):
        residual.layers[1].eval()
    torch.testing.assert_close(layer(x), reference(x))
    torch.testing.assert_close(layer.codebooks, reference.codebooks)
    with pytest.raises(ValueError, match="there are 3 quantizers, got indices of 4"):
        layer.get_output_from_indices(torch.zeros(2, 5, 4, dtype=torch.int64))


@pytest.mark.parametrize("options", [{"threshold_ema_dead_code": 2}, {"learnable_codebook": True, "ema_update": False}])
def test_update_indices_in_evaluation_mode_and_without_ema(options):
    layer, reference = (module.VectorQuantize(4, 8, **options).eval() for module in (compat, upstream))
    layer.load_state_dict(reference.state_dict())
    x, indices = torch.randn(2, 5, 4), torch.randint(8, (2, 5))
    for module in (layer, reference):
        module.update_indices(x, indices)
    torch.testing.assert_close(layer.state_dict(), reference.state_dict())
