# SPDX-License-Identifier: Apache-2.0
"""What the options of genperf.compat's vector quantizers do, where upstream draws other random numbers, errs, or needs more memory."""

import copy
import itertools
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from genperf.compat import vector_quantize_pytorch as compat
from genperf.compat.vector_quantize_pytorch import _affine, _assignment, vector_quantize_pytorch
from genperf.testing import largest_allocation

DIM, CODES = 6, 16
LEARNED = {"learnable_codebook": True, "ema_update": False}
SOFT = {"straight_through": True, "rotation_trick": False, "route_gradients_to_input": False, "ema_update": False}
IN_PLACE = {**LEARNED, "in_place_codebook_optimizer": partial(torch.optim.SGD, lr=0.5)}
MASK = torch.arange(5) < torch.tensor([[5], [3]])


def vq(**options):
    return compat.VectorQuantize(DIM, CODES, **options)


def residual(quantizers=3, **options):
    return compat.ResidualVQ(**{"dim": DIM, "codebook_size": CODES, "num_quantizers": quantizers, **options})


def with_bridge():
    return vq(vq_bridge=nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh()))


def implicit(**options):
    return residual(implicit_neural_codebook=True, mlp_kwargs={"depth": 1}, **options)


DECODED = {
    "bridge": with_bridge,
    "affine": lambda: vq(affine_param=True),
    "implicit": implicit,
    "implicit, projection": lambda: implicit(codebook_dim=4),
    "implicit, images": lambda: implicit(accept_image_fmap=True),
    "beam": lambda: residual(beam_size=3),
    "volumes": lambda: residual(accept_3d_fmap=True, use_cosine_sim=True),
    "channels first": lambda: residual(channel_last=False, beam_size=2),
    "simple": lambda: compat.ResidualSimVQ(dim=DIM, codebook_size=CODES, num_quantizers=3),
    "simple, images": lambda: compat.ResidualSimVQ(dim=DIM, codebook_size=CODES, num_quantizers=3, channel_first=True),
}
SHAPES = {"images": (2, DIM, 3, 4), "volumes": (2, DIM, 2, 3, 2), "channels first": (2, DIM, 5)}


@pytest.mark.parametrize("case", DECODED)
def test_indices_are_decoded_as_forward_quantizes(case):
    torch.manual_seed(0)
    layer = DECODED[case]()
    shape = next((shape for name, shape in SHAPES.items() if name in case), (2, 5, DIM))
    for _ in range(2):
        layer(torch.randn(shape))
    quantized, indices, _ = layer.eval()(torch.randn(shape))
    decoded = layer.get_output_from_indices(indices)
    channels_last = isinstance(layer, compat.ResidualVQ) and layer.channels_first
    torch.testing.assert_close(decoded, quantized.movedim(1, -1) if channels_last else quantized)
    empty = layer.get_output_from_indices(torch.full_like(indices, -1))
    torch.testing.assert_close(
        empty, torch.zeros_like(empty) if case != "implicit, projection" else layer.project_out.bias.expand_as(empty)
    )
    if indices.dim() > 2 and case != "affine":
        first = layer.get_output_from_indices(indices[..., :1])
        dropped = torch.cat([indices[..., :1], torch.full_like(indices[..., 1:], -1)], -1)
        torch.testing.assert_close(first, layer.get_output_from_indices(dropped))


def test_a_beam_that_keeps_everything_finds_the_best_codes():
    torch.manual_seed(0)
    layer = residual(codebook_size=4, beam_size=64, beam_score_quantizer_weights=[0.5, 1.0, 3.0]).eval()
    x = torch.randn(40, DIM)
    indices = layer(x)[1]
    codebooks, score = layer.codebooks, {}
    for path in itertools.product(range(4), repeat=3):
        left, total = x, 0
        for codebook, index, weight in zip(codebooks, path, layer.beam_score_quantizer_weights, strict=True):
            left = left - codebook[index]
            total = total + weight * left.square().mean(-1)
        score[path] = total
    best = torch.tensor(list(score))[torch.stack(list(score.values())).argmin(0)]
    assert torch.equal(indices, best)
    assert not torch.equal(indices, residual_of(layer)(x)[1])


def residual_of(layer):
    """The same quantizers without beams."""
    single = copy.deepcopy(layer)
    single.beam_size = single.eval_beam_size = None
    return single


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("cosine", [False, True])
def test_beam_search_updates_every_quantizer_by_the_chosen_codes(shared, cosine):
    torch.manual_seed(0)
    layer = residual(beam_size=2, decay=0.6, shared_codebook=shared, use_cosine_sim=cosine, quantize_dropout=True)
    before = copy.deepcopy(layer)
    x = torch.randn(2, 5, DIM)
    x[~MASK] = float("nan")
    x.requires_grad_()
    quantized, indices, losses = layer(x, mask=MASK, rand_quantize_dropout_fixed_seed=1)
    (quantized.sum() + losses.sum()).backward()
    assert x.grad.isfinite().all()
    assert (indices[..., 0] >= 0)[MASK].all()
    assert (indices[..., 2] == -1).all()  # dropped
    left = x.detach()[MASK]
    for stage, (old, new) in enumerate(zip(before.layers, layer.layers, strict=True)):
        index = indices[..., stage][MASK]
        if (index < 0).all():
            if not shared:
                torch.testing.assert_close(new.state_dict(), old.state_dict())
            continue
        one_hot = F.one_hot(index, CODES).float()
        vectors = F.normalize(left, dim=-1) if cosine else left
        codes = old.codebook[index]
        for name, total in (("cluster_size", one_hot.sum(0)), ("embed_avg", one_hot.T @ vectors)):
            getattr(old._codebook, name).lerp_(total.unsqueeze(0), 0.4)
        if not shared:
            torch.testing.assert_close(new._codebook.cluster_size, old._codebook.cluster_size)
            torch.testing.assert_close(new._codebook.embed_avg, old._codebook.embed_avg)
        left = left - codes
    if shared:
        torch.testing.assert_close(layer.layers[0]._codebook.embed_avg, before.layers[0]._codebook.embed_avg)
    frozen = copy.deepcopy(layer)
    frozen(x, mask=MASK, freeze_codebook=True)
    torch.testing.assert_close(frozen.state_dict(), layer.state_dict())


def test_beam_search_without_a_commitment_loss_scores_errors():
    torch.manual_seed(0)
    layer, reference = residual(beam_size=3, commitment_weight=0.0, ema_update=False), residual(beam_size=3, ema_update=False)
    reference.load_state_dict(layer.state_dict())
    x = torch.randn(2, 5, DIM)
    for result, expected in zip(layer(x, mask=MASK)[:2], reference(x, mask=MASK)[:2], strict=True):
        torch.testing.assert_close(result, expected)
    assert not layer(x)[2].any()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("options", [{"beam_size": 2}, {"beam_size": 2, "stochastic_sample_codes": True}, {"affine_param": True}, IN_PLACE])
def test_a_step_that_is_checkpointed_counts_once(options, use_reentrant):
    torch.manual_seed(0)
    plain = residual(**options)
    again = copy.deepcopy(plain)
    results = []
    for layer, run in ((plain, plain), (again, lambda x: checkpoint(again, x, use_reentrant=use_reentrant))):
        torch.manual_seed(1)
        x = torch.randn(2, 5, DIM, requires_grad=True)
        quantized, indices, losses = run(x)
        (quantized.square().sum() + losses.sum()).backward()
        results.append((quantized, indices, losses, x.grad, layer.state_dict()))
    torch.testing.assert_close(*results)


def test_gradients_of_an_implicit_codebook_are_those_of_all_codes():
    """A network and its condition, against a function that computes every code of every vector."""
    torch.manual_seed(0)
    layer, network = vq(**LEARNED), implicit().mlps[0]
    condition, x = torch.randn(2, 5, DIM), torch.randn(2, 5, DIM)
    results = []
    for transform in (_assignment.Conditioned(network, condition), lambda codes: network(codes, condition=condition)):
        leaf = x.clone().requires_grad_()
        quantized, indices, loss = layer(leaf, codebook_transform_fn=transform, mask=MASK)
        layer.zero_grad()
        network.zero_grad()
        (quantized.square().sum() + loss).backward()
        results.append((quantized, indices, loss, leaf.grad, *(p.grad for p in (*layer.parameters(), *network.parameters()))))
    torch.testing.assert_close(*results)
    expected = network.proj_in(torch.cat([condition, x], -1))
    for block in network.layers:
        expected = block(expected) + expected
    torch.testing.assert_close(network.transform(x, condition), expected)


MEMORY = {
    "topk": (lambda k: compat.VectorQuantize(DIM, k, **LEARNED), {"topk": 2}),
    "topk, noise": (lambda k: compat.VectorQuantize(DIM, k, stochastic_sample_codes=True), {"topk": 2}),
    "straight-through": (lambda k: compat.VectorQuantize(DIM, k, **SOFT), {}),
    "beam": (lambda k: residual(2, codebook_size=k, beam_size=2), {}),
    "implicit": (lambda k: implicit(codebook_size=k), {}),
}


@pytest.mark.parametrize("case", MEMORY)
def test_no_array_of_vectors_times_codes(case, monkeypatch):
    monkeypatch.setattr(_assignment, "CHUNK", 1 << 13)
    vectors, codes = 256, 256
    make, call = MEMORY[case]
    torch.manual_seed(0)
    layer, x = make(codes), torch.randn(1, vectors, DIM, requires_grad=True)

    def step():
        quantized, _, loss = layer(x, **call)
        (quantized.square().sum() + loss.sum()).backward()

    step()
    assert largest_allocation(step) < vectors * codes * (DIM if case == "implicit" else 1) * 4 / 4


def test_chunks_change_nothing(monkeypatch):
    torch.manual_seed(0)
    layers = [vq(**SOFT), vq(**SOFT, separate_codebook_per_head=True, heads=2, codebook_dim=3), implicit()]
    x = torch.randn(2, 7, DIM)
    results = []
    for size in (1 << 22, 50):
        monkeypatch.setattr(_assignment, "CHUNK", size)
        found = []
        for layer in layers:
            leaf = x.clone().requires_grad_()
            quantized, indices, loss = layer(leaf)
            quantized.square().sum().backward()
            found += [quantized, indices, loss, leaf.grad]
        results.append(found)
    torch.testing.assert_close(*results)


def test_several_codes_are_sampled_by_distance():
    torch.manual_seed(0)
    layer = compat.VectorQuantize(2, 5, stochastic_sample_codes=True, commitment_weight=0.0)
    x = torch.zeros(20_000, 2)
    _, indices, _ = layer(x, topk=3, sample_codebook_temp=0.3)
    p = (-layer.codebook.norm(dim=1) / 0.3).softmax(0)
    torch.testing.assert_close(torch.bincount(indices[:, 0], minlength=5) / len(x), p, rtol=0, atol=0.02)
    assert all(len(row.unique()) == 3 for row in indices[:50])
    assert len(layer.eval()(x, topk=3)[1].unique(dim=0)) == 1


@pytest.mark.parametrize(("metric", "topk"), [("euclidean", 4), ("cosine", 4), ("euclidean", 70)])
def test_topk_is_exact(metric, topk):
    torch.manual_seed(0)
    layer = compat.VectorQuantize(DIM, 80, use_cosine_sim=metric == "cosine").eval()
    x, codes = torch.randn(3, 10, DIM), layer.codebook.double()
    _, indices, loss = layer(x, topk=topk)
    unit = F.normalize(x.double(), dim=-1)
    score = unit @ codes.T if metric == "cosine" else -torch.cdist(x.double(), codes)
    assert torch.equal(indices, score.topk(topk).indices)
    reference = unit if metric == "cosine" else x.double()
    torch.testing.assert_close(loss, (codes[indices] - reference.unsqueeze(-2)).square().mean(-1).float())
    assert (loss.diff(dim=-1) > -1e-6).all()


def test_affine_statistics_are_those_of_all_ranks(monkeypatch):
    """Two ranks with the same batch, as the reduction of a group that is not there."""
    torch.manual_seed(0)
    sums = []
    monkeypatch.setattr(_affine, "world_size", lambda: 2)
    monkeypatch.setattr(_affine, "all_reduce_sum", lambda value: sums.append(value) or 2 * value)
    layer = vq(affine_param=True, sync_affine_param=True, affine_param_batch_decay=0.5)
    for step in range(2):
        x = 3 * torch.randn(2, 5, DIM) + 1
        before = copy.deepcopy(layer._codebook)
        layer(x, mask=MASK)
        variance, mean = torch.var_mean(x[MASK], 0, correction=0)
        for name, value in (("batch_mean", mean), ("batch_variance", variance)):
            expected = value if step == 0 else getattr(before, name).flatten().lerp(value, 0.5)
            torch.testing.assert_close(getattr(layer._codebook, name).flatten(), expected)
    assert len(sums) == 6


def test_affine_codebooks_of_an_empty_batch_and_of_checkpoints():
    torch.manual_seed(0)
    layer, other = vq(affine_param=True), vq(affine_param=True)
    layer(torch.randn(4, DIM), mask=torch.zeros(4, dtype=torch.bool))
    assert all(t.isfinite().all() for t in layer.state_dict().values())
    layer(torch.randn(4, DIM))
    other.load_state_dict(layer.state_dict())  # which has statistics of batches, unlike a new layer
    x = torch.randn(4, DIM)
    torch.testing.assert_close(other(x), layer(x))
    other.load_state_dict(vq(affine_param=True).state_dict())
    assert other._codebook.batch_mean is None


def test_dead_codes_of_an_affine_codebook_become_vectors_of_the_batch():
    torch.manual_seed(0)
    layer = vq(affine_param=True, threshold_ema_dead_code=0.9)
    x = 5 + 2 * torch.randn(64, DIM)
    layer(x)
    dead = layer._codebook.cluster_size.squeeze(0) == 0.9
    assert dead.any()
    codes = _affine.to_batch(layer._codebook, layer._codebook.embed)[0, dead]
    assert (codes.unsqueeze(1) - x).norm(dim=-1).min(1).values.max() < 1e-4


def test_the_in_place_optimizer_averages_gradients_over_ranks(monkeypatch):
    torch.manual_seed(0)
    options = {**IN_PLACE, "manual_in_place_optimizer_update": True}
    layer = vq(**options)
    layer(torch.randn(4, DIM))
    gradient, before = layer._codebook.embed.grad.clone(), layer.codebook.detach().clone()
    monkeypatch.setattr(vector_quantize_pytorch, "world_size", lambda: 4)
    monkeypatch.setattr(vector_quantize_pytorch, "all_reduce_sum", lambda value: 2 * value)
    layer.update_in_place_optimizer()
    torch.testing.assert_close(layer.codebook.detach(), before - 0.5 * gradient[0] / 2)
    assert layer._codebook.embed.grad is None
    vq().update_in_place_optimizer()  # without one, nothing


def test_the_in_place_optimizer_without_gradients_and_in_copies():
    torch.manual_seed(0)
    layer, x = vq(**IN_PLACE), torch.randn(20, DIM)
    with torch.no_grad():
        *_, breakdown = layer(x, return_loss_breakdown=True)
    assert breakdown.inplace_optimize > 0
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        parameters = other.in_place_codebook_optimizer.param_groups[0]["params"]
        assert parameters[0] is other._codebook.embed
        before = layer.codebook.detach().clone()
        other(x)
        assert not torch.equal(other.codebook, before)
        assert torch.equal(layer.codebook, before)
    frozen = layer.codebook.detach().clone()
    layer(x, freeze_codebook=True)
    layer.eval()(x)
    assert torch.equal(layer.codebook, frozen)


ADDED = {
    compat.GroupedResidualVQ: ("channels_first",),
    compat.ResidualVQ: (
        "beam_size",
        "eval_beam_size",
        "beam_score_quantizer_weights",
        "implicit_neural_codebook",
        "mlps",
        "channels_first",
    ),
    compat.VectorQuantize: ("straight_through", "in_place_codebook_optimizer", "manual_in_place_optimizer_update"),
    vector_quantize_pytorch.Codebook: ("affine_param", "vq_bridge"),
}


def test_states_of_an_earlier_release_without_these_options():
    torch.manual_seed(0)
    layer = compat.GroupedResidualVQ(dim=2 * DIM, groups=2, codebook_size=CODES, num_quantizers=2, threshold_ema_dead_code=1e-9)
    older, x = copy.deepcopy(layer), torch.randn(2, 5, 2 * DIM)
    for module in older.modules():
        state = {name: value for name, value in vars(module).items() if name not in ADDED.get(type(module), ())}
        vars(module).clear()
        module.__setstate__(state)
    for mode in (True, False):
        torch.testing.assert_close(older.train(mode)(x), layer.train(mode)(x))


def test_a_shared_codebook_takes_one_in_place_step():
    torch.manual_seed(0)
    layer = residual(shared_codebook=True, **IN_PLACE)
    before, steps = layer.layers[0].codebook.detach().clone(), []
    layer.layers[0].in_place_codebook_optimizer.register_step_post_hook(lambda *_: steps.append(1))
    layer(torch.randn(2, 5, DIM))
    assert len(steps) == 1
    assert not torch.equal(layer.layers[0].codebook, before)


def test_codes_of_zeros_are_orthogonal():
    layer = vq(**LEARNED, orthogonal_reg_weight=1.0, commitment_weight=0.0)
    layer.codebook = torch.zeros(CODES, DIM)
    assert layer(torch.randn(4, DIM))[2] == 0
    layer.codebook = torch.eye(CODES, DIM)
    assert layer(torch.randn(4, DIM))[2].abs() < 1e-7
    layer.codebook = torch.ones(CODES, DIM)
    torch.testing.assert_close(layer(torch.randn(4, DIM))[2].detach(), torch.tensor(1 - 1 / CODES))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes_of_several_codes(dtype):
    torch.manual_seed(0)
    layers = [(vq(), {"topk": 2}), (vq(**SOFT), {}), (vq(affine_param=True), {}), (residual(beam_size=2), {})]
    for layer, call in layers:
        x = torch.randn(2, 5, DIM, dtype=dtype, requires_grad=True)
        quantized, _, loss = layer(x, **call)
        (quantized.sum() + loss.sum()).backward()
        assert quantized.dtype == x.grad.dtype == dtype
        assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("make", "call"),
    [
        (lambda: vq(**LEARNED), {"topk": 2}),
        (lambda: vq(**SOFT), {}),
        (
            lambda: vq(**LEARNED, commitment_use_cross_entropy_loss=True),
            {"codebook_transform_fn": lambda c: c[:, None, None] * torch.ones(2, 5, 1, 1)},
        ),
        (lambda: vq(affine_param=True), {}),
        (lambda: vq(**IN_PLACE), {}),
        (implicit, {}),
        (lambda: residual(beam_size=2, **LEARNED), {}),
        (lambda: compat.HierarchicalVQ(dim=DIM, codebook_size=CODES, scales=(1, 2, 5), kmeans_init=False, channel_first=False), {}),
    ],
)
def test_padding_of_nan_does_not_spread(make, call):
    torch.manual_seed(0)
    layer, x = make(), torch.randn(2, 5, DIM)
    x[~MASK] = float("nan")
    x.requires_grad_()
    quantized, _, loss = layer(x, mask=MASK, **call)
    (quantized.square().sum() + loss.sum()).backward()
    assert not quantized[~MASK].any()
    assert all(t.grad is None or t.grad.isfinite().all() for t in (x, *layer.parameters()))
    assert all(t.isfinite().all() for t in layer.state_dict().values())


@pytest.mark.parametrize("make", [vq, residual, lambda: residual(beam_size=2), implicit, lambda: vq(**IN_PLACE), lambda: vq(**SOFT)])
def test_empty_batches(make):
    layer, x = make(), torch.zeros(0, 5, DIM, requires_grad=True)
    quantized, indices, loss = layer(x)
    (quantized.sum() + loss.sum()).backward()
    assert quantized.shape == x.shape
    assert indices.shape[:2] == (0, 5)
    assert all(t.isfinite().all() for t in layer.state_dict().values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"straight_through": True}, "exclude each other"),
        ({"straight_through": True, "rotation_trick": False, **LEARNED}, "learnable_codebook and straight_through"),
        ({"vq_bridge": nn.Identity(), "learnable_codebook": False}, "vq_bridge needs a learnable_codebook"),
        ({"vq_bridge": nn.Identity(), "ema_update": True}, "learnable_codebook needs ema_update=False"),
        ({"affine_param": True, "use_cosine_sim": True}, "affine_param and use_cosine_sim"),
        ({"in_place_codebook_optimizer": torch.optim.SGD}, "in_place_codebook_optimizer needs a learnable_codebook"),
        ({"decay": 1.1}, r"decay must lie in \[0, 1\]"),
    ],
)
def test_options_that_exclude_each_other(options, message):
    with pytest.raises(ValueError, match=f"VectorQuantize: .*{message}"):
        vq(**options)


def test_invalid_calls():
    x = torch.randn(2, 5, DIM)
    for layer, call, message in (
        (vq(), {"topk": 0}, "topk must be at least 1"),
        (vq(heads=2, codebook_dim=3), {"topk": 2}, "topk needs heads=1"),
        (vq(commitment_use_cross_entropy_loss=True), {"topk": 2}, "topk and commitment_use_cross_entropy_loss exclude"),
        (vq(**IN_PLACE), {"topk": 2}, "in_place_codebook_optimizer exclude"),
        (vq(heads=2, codebook_dim=3), {"codebook_transform_fn": nn.Identity()}, "needs one or separate heads"),
    ):
        before = copy.deepcopy(layer.state_dict())
        with pytest.raises(ValueError, match=message):
            layer(x, **call)
        torch.testing.assert_close(layer.state_dict(), before)
    with pytest.raises(ValueError, match="eval_beam_size needs a beam_size"):
        residual(eval_beam_size=2)
    with pytest.raises(ValueError, match="beam_score_quantizer_weights must be num_quantizers"):
        residual(beam_size=2, beam_score_quantizer_weights=[1.0])


@pytest.mark.parametrize("image", [False, True])
def test_hierarchical_indices_are_decoded(image):
    torch.manual_seed(0)
    scales = (1, (2, 3), (3, 4)) if image else (1, 3, 12)
    layer = compat.HierarchicalVQ(dim=DIM, codebook_size=CODES, scales=scales, accept_image_fmap=image, share_quant_resi=2)
    shape = (20, DIM, 3, 4) if image else (20, DIM, 12)
    layer(torch.randn(shape))
    quantized, indices, _ = layer.eval()(torch.randn(shape))
    torch.testing.assert_close(layer.get_output_from_indices(indices), quantized)
    empty = [torch.full_like(index, -1) for index in indices]
    bias = layer.get_output_from_indices(empty)
    torch.testing.assert_close(bias, bias[:1].expand_as(bias))
    larger = layer.get_output_from_indices(indices, (6, 8) if image else 24)
    assert larger.shape[2:] == ((6, 8) if image else (24,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": ()}, "scales must be positive"),
        ({"scales": (3, 2)}, "scales must not decrease"),
        ({"scales": ((1, 2),)}, "a scale must be a number, or 1"),
        ({"codebook_size": (4, 8)}, "a shared codebook needs one codebook size"),
        ({"codebook_size": (4, 8, 9), "shared_codebook": False}, "one codebook size, or one for each scale"),
        ({"nested_dropout": 1.5}, "nested_dropout must lie in"),
        ({"accept_image_fmap": True, "accept_3d_fmap": True}, "exclude each other"),
    ],
)
def test_invalid_hierarchies(options, message):
    with pytest.raises(ValueError, match=f"HierarchicalVQ: .*{message}"):
        compat.HierarchicalVQ(**{"dim": DIM, "codebook_size": CODES, "scales": (1, 2), **options})


def test_invalid_calls_of_hierarchies_and_sequences():
    layer = compat.HierarchicalVQ(dim=DIM, codebook_size=CODES, scales=(1, 2), kmeans_init=False)
    x = torch.randn(2, DIM, 5)
    with pytest.raises(ValueError, match="x must have 6 channels and 1 spatial"):
        layer(x.mT)
    with pytest.raises(ValueError, match="mask must have x's shape"):
        layer(x, mask=MASK[:, :4])
    with pytest.raises(NotImplementedError, match="takes no indices"):
        layer(x, indices=[])
    with pytest.raises(ValueError, match="one of the layers must be a quantizer, got 2"):
        compat.Sequential(vq(), nn.Identity(), vq())


def test_sequences_pass_options_to_their_quantizer():
    torch.manual_seed(0)
    layer = compat.Sequential(nn.Linear(4, DIM), vq(), nn.Linear(DIM, 3))
    output, indices, loss, breakdown = layer(torch.randn(2, 5, 4), return_loss_breakdown=True)
    assert output.shape == (2, 5, 3)
    assert (indices.shape, loss.shape) == ((2, 5), ())
    assert breakdown.commitment == loss
