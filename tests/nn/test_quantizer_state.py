# SPDX-License-Identifier: Apache-2.0
"""What reaches the codes of a quantizer and its averages, and what does not: overflow, casts, second runs, codes from outside."""

import copy
from functools import partial

import pytest
import torch
from torch.func import functional_call
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import genperf
from genperf.compat.vector_quantize_pytorch import GroupedResidualVQ, ResidualVQ, VectorQuantize
from genperf.nn import ResidualVectorQuantizer, VectorQuantizer, update_codebooks

LAYERS = {
    "ema": lambda: VectorQuantizer(16, 4, decay=0.9),
    "data": lambda: VectorQuantizer(16, 4, decay=0.9, init="data"),
    "kmeans": lambda: VectorQuantizer(16, 4, decay=0.9, init="kmeans"),
    "heads": lambda: VectorQuantizer(16, 4, heads=2, separate_codebooks=True, decay=0.9, init="data"),
    "cosine": lambda: VectorQuantizer(16, 4, decay=0.9, init="data", metric="cosine"),
    "dead codes": lambda: VectorQuantizer(16, 4, decay=0.5, replace_dead_below=1.0),
    "projection": lambda: VectorQuantizer(16, 4, code_dim=2, decay=0.9, init="data"),
    "residual": lambda: ResidualVectorQuantizer(3, 16, 4, decay=0.9, init="data"),
    "residual, dead codes": lambda: ResidualVectorQuantizer(3, 16, 4, decay=0.5, replace_dead_below=1.0),
    "VectorQuantize": lambda: VectorQuantize(4, 16, decay=0.9),
    "VectorQuantize, dead codes": lambda: VectorQuantize(4, 16, decay=0.5, threshold_ema_dead_code=1),
    "VectorQuantize, kmeans": lambda: VectorQuantize(4, 16, decay=0.9, kmeans_init=True),
    "VectorQuantize, affine": lambda: VectorQuantize(4, 16, decay=0.9, affine_param=True),
    "ResidualVQ": lambda: ResidualVQ(dim=4, codebook_size=16, num_quantizers=3, decay=0.9),
}


def each(*names):
    return pytest.mark.parametrize("make", [LAYERS[name] for name in names], ids=names)


def batch(step, count=64):
    return torch.randn(1, count, 4, generator=torch.Generator().manual_seed(step))


def floating(layer):
    return {name: value for name, value in layer.state_dict().items() if value.is_floating_point()}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("first", [True, False])
@each(*LAYERS)
def test_a_nonfinite_vector_has_no_effect_on_the_state(make, first, value):
    torch.manual_seed(0)
    layer = make()
    if not first:
        layer(batch(0))
    other, mask = copy.deepcopy(layer), torch.ones(1, 64, dtype=torch.bool)
    x, mask[0, 7] = batch(1), False
    x[0, 7] = value
    torch.manual_seed(1)
    layer(x)
    torch.manual_seed(1)
    other(batch(1), mask=mask)
    for name, expected in floating(other).items():
        torch.testing.assert_close(layer.state_dict()[name], expected, msg=name)
    for step in range(3):
        losses = layer(batch(2 + step))[2]
    assert losses.isfinite().all()


def train_steps(layer, use_reentrant, decoder, steps=3):
    gradients = []
    for step in range(steps):
        x = batch(step).requires_grad_()

        def block(x):
            quantized, _, loss = layer(x)
            return decoder(quantized.tanh()), loss.sum()

        y, loss = block(x) if use_reentrant is None else checkpoint(block, x, use_reentrant=use_reentrant)
        (y.square().sum() + 10 * loss).backward()
        gradients.append(x.grad)
    update_codebooks(layer)
    return torch.stack(gradients)


CHECKPOINTED = {
    "ema": LAYERS["ema"],
    "accumulate": lambda: VectorQuantizer(16, 4, decay=0.9, update="accumulate", replace_dead_below=1.0),
    "dead codes": LAYERS["dead codes"],
    "learned, dead codes": lambda: VectorQuantizer(16, 4, replace_dead_below=0.9, usage_decay=0.5),
    "sampled": lambda: VectorQuantizer(16, 4, decay=0.9, sample_temperature=1.0),
    "cosine": LAYERS["cosine"],
    "residual, dropout": lambda: ResidualVectorQuantizer(8, 16, 4, quantizer_dropout=True, decay=0.9),
    "VectorQuantize": LAYERS["VectorQuantize"],
    "ResidualVQ": LAYERS["ResidualVQ"],
    "ResidualVQ, kmeans": lambda: ResidualVQ(dim=4, codebook_size=16, num_quantizers=3, decay=0.9, kmeans_init=True),
    "ResidualVQ, shared": lambda: ResidualVQ(
        dim=4, codebook_size=16, num_quantizers=3, decay=0.5, shared_codebook=True, threshold_ema_dead_code=1
    ),
    "ResidualVQ, dropout": lambda: ResidualVQ(dim=4, codebook_size=16, num_quantizers=8, decay=0.9, quantize_dropout=True),
    "GroupedResidualVQ": lambda: GroupedResidualVQ(dim=4, groups=2, codebook_size=16, num_quantizers=4, quantize_dropout=True),
}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("make", CHECKPOINTED.values(), ids=CHECKPOINTED)
def test_gradient_checkpointing_counts_a_step_once(make, use_reentrant):
    results = []
    for mode in (None, use_reentrant):
        torch.manual_seed(0)
        layer, decoder = make(), torch.nn.Linear(4, 4)
        torch.manual_seed(1)
        results.append((train_steps(layer, mode, decoder), layer.state_dict()))
    torch.testing.assert_close(*results)


TWICE = {
    "ema": LAYERS["ema"],
    "sampled": CHECKPOINTED["sampled"],
    "residual, dropout": CHECKPOINTED["residual, dropout"],
    "VectorQuantize, sampled": lambda: VectorQuantize(4, 16, decay=0.9, stochastic_sample_codes=True, sample_codebook_temp=1.0),
    "ResidualVQ, dropout": CHECKPOINTED["ResidualVQ, dropout"],
}


def recompute_all(context, op, *args, **kwargs):
    return CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("make", TWICE.values(), ids=TWICE)
def test_two_checkpointed_forwards_before_one_backward(make, alike):
    results = []
    for options in (None, {}, {"context_fn": partial(create_selective_checkpoint_contexts, recompute_all)}):
        torch.manual_seed(0)
        layer = make()
        inputs = [batch(step).requires_grad_() for step in range(2)]
        if alike:  # but for vectors between those that the memory of steps looks at, and one with NaN
            vectors = torch.zeros(2, 256, 4)
            vectors[1, 5] = 1
            vectors[:, 8] = float("nan")
            inputs = list(vectors.requires_grad_().unbind())
        torch.manual_seed(1)
        outputs = [layer(x) if options is None else checkpoint(layer, x, use_reentrant=False, **options) for x in inputs]
        sum(quantized.nan_to_num().square().sum() + 10 * loss.nan_to_num().sum() for quantized, _, loss in outputs).backward()
        gradients = vectors.grad if alike else torch.stack([x.grad for x in inputs])
        results.append((gradients, layer.state_dict()))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], equal_nan=True)


@pytest.mark.parametrize("make", TWICE.values(), ids=TWICE)
def test_steps_that_are_not_run_again_are_not_kept(make):
    layer, encoder = make(), torch.nn.Linear(4, 4)
    for step in range(3):
        with torch.no_grad():  # as the discriminator's step of a GAN calls the generator
            layer(encoder(batch(step)))
    assert not layer._steps._steps
    for step in range(3):
        with torch.autograd.graph.save_on_cpu():  # hooks, as gradient checkpointing has
            quantized = layer(encoder(batch(step)))[0]
        quantized.sum().backward()
        del quantized
    assert len(layer._steps._steps) <= 1


def test_compiled_gradient_checkpointing_is_left_to_python():
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        layer, x = VectorQuantizer(16, 4, decay=0.5), batch(0).requires_grad_()

        def step(x, layer=layer):
            quantized, _, loss = checkpoint(layer, x, use_reentrant=False)
            return quantized.square().sum() + 10 * loss

        (torch.compile(step, backend="aot_eager") if compiled else step)(x).backward()
        results.append((x.grad, layer.state_dict()))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    "make",
    [LAYERS["ema"], lambda: ResidualVectorQuantizer(2, 16, 4, quantizer_dropout=True), LAYERS["VectorQuantize"]],
    ids=["ema", "dropout", "VectorQuantize"],
)
def test_a_compiled_step_is_not_run_again(make):
    """Its second run could not tell that it is one, and would update the codes again."""
    compiled = torch.compile(make(), fullgraph=True, backend="aot_eager")
    loss = checkpoint(lambda x: compiled(x)[2].sum(), batch(0).requires_grad_(), use_reentrant=False)
    with pytest.raises(RuntimeError, match="second run in backward, by gradient checkpointing"):
        loss.backward()


LEARNED = {
    "layer": (lambda: VectorQuantizer(16, 4, init="data"), "codebook"),
    "residual": (lambda: ResidualVectorQuantizer(2, 16, 4, init="data"), "codebook"),
    "VectorQuantize": (lambda: VectorQuantize(4, 16, learnable_codebook=True, ema_update=False, kmeans_init=True), "_codebook.embed"),
}


class Doubled(torch.nn.Module):
    def forward(self, original):
        return original * 2

    def right_inverse(self, codes):
        return codes / 2


@pytest.mark.parametrize(("make", "name"), LEARNED.values(), ids=LEARNED)
def test_codes_from_data_reach_a_parametrized_codebook(make, name):
    states = []
    for parametrized in (False, True):
        torch.manual_seed(0)
        layer = make()
        owner, _, attribute = name.rpartition(".")
        owner = layer.get_submodule(owner)
        if parametrized:
            parametrize.register_parametrization(owner, attribute, Doubled())
        losses = layer(batch(0))[2].sum()
        losses.backward()
        states.append((getattr(owner, attribute), losses))
    torch.testing.assert_close(*states)
    assert states[0][0].any()


@pytest.mark.parametrize(("make", "name"), LEARNED.values(), ids=LEARNED)
def test_codes_cannot_be_written_to_what_a_hook_computes(make, name):
    layer = make()
    owner, _, attribute = name.rpartition(".")
    prune.l1_unstructured(layer.get_submodule(owner), attribute, 0.5)
    with pytest.raises(RuntimeError, match=r"codes cannot be written to \w+, which a hook computes"):
        layer(batch(0))


@each("ema", "data", "kmeans", "cosine", "residual", "VectorQuantize", "VectorQuantize, kmeans")
def test_codes_set_from_outside_stay(make):
    """Copied tensor by tensor, as loaders that know nothing of the layer do."""
    torch.manual_seed(0)
    source, layer = make(), make()
    for step in range(2):
        source(batch(step) + 5)
    with torch.no_grad():
        for name, value in layer.state_dict().items():
            value.copy_(source.state_dict()[name])
    for each_layer in (source, layer):
        each_layer(batch(3))
    torch.testing.assert_close(layer.state_dict(), source.state_dict())


@pytest.mark.parametrize("init", ["uniform", "kmeans"])
def test_averages_follow_a_codebook_that_is_set(init):
    layer = VectorQuantizer(16, 4, decay=0.99, init=init)
    layer(batch(0))
    codes = 5 + torch.randn(16, 4)
    layer.codebook.copy_(codes)
    layer(codes.repeat(4, 1))
    torch.testing.assert_close(layer.codebook, codes, rtol=1e-3, atol=1e-3)
    # A step that finds codes as it left them changes nothing about the averages.
    twin = copy.deepcopy(layer)
    twin(batch(2))
    layer(batch(2))
    assert torch.equal(layer.sums, twin.sums)


def test_meta_device_and_empty_memory():
    for make in (LAYERS["kmeans"], LAYERS["residual"], LAYERS["VectorQuantize, dead codes"]):
        source = make()
        source(batch(0))
        for assign in (True, False):
            with torch.device("meta"):
                layer = make()
            layer = layer if assign else layer.to_empty(device="cpu")
            layer.load_state_dict(source.state_dict(), assign=assign)
            layer.to("cpu")
            layer.eval(), source.eval()
            torch.testing.assert_close(layer(batch(1)), source(batch(1)))
            layer.train(), source.train()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each("ema", "heads", "residual", "VectorQuantize")
def test_averages_stay_float32_in_a_half_precision_module(make, dtype):
    torch.manual_seed(0)
    layer = make()
    layer(batch(0))
    before = {name: value.clone() for name, value in layer.named_buffers() if name.split(".")[-1] in AVERAGES}
    layer.to(dtype)
    for name, value in layer.named_buffers():
        if name in before:
            assert value.dtype == torch.float32
            assert torch.equal(value, before[name]), "casting must not round what is kept"
    layer(batch(1).to(dtype))
    assert all(value.isfinite().all() for value in layer.state_dict().values())


AVERAGES = ("counts", "sums", "cluster_size", "embed_avg")


@each("ema", "heads", "residual")
def test_given_codes_have_the_shape_of_the_codebook(make):
    layer = make()
    shape = layer.codebook.shape
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    counts = torch.ones(shape[:-1])
    for codes, given, message in (
        (torch.ones(*shape[:-2], shape[-1], shape[-2]), None, "codes must have shape"),
        (torch.ones(shape).flatten(), None, "codes must have shape"),
        (torch.ones(shape), counts.unsqueeze(-1), "counts must have shape"),
        (torch.ones(shape), counts[..., :-1], "counts must have shape"),
    ):
        with pytest.raises(ValueError, match=f"^{type(layer).__name__}.set_codes: {message}"):
            layer.set_codes(codes, given)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])
    layer.set_codes(torch.ones(1, *shape), counts.unsqueeze(0))
    assert (layer.codebook == 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_averages_of_half_precision_modules_move(dtype):
    layer = VectorQuantizer(1, 4, decay=0.99).to(dtype)
    layer.set_codes(torch.ones(1, 4), torch.tensor([64.0]))
    for _ in range(1500):
        layer(torch.full((64, 4), 1.25, dtype=dtype))
    assert layer.codebook.float().mean().item() == pytest.approx(1.25, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cosine_layers_take_the_code_of_nearest_code(dtype):
    layer = VectorQuantizer(1024, 16, metric="cosine", init="data")
    layer.init_codes(torch.randn(4096, 16))
    upstream = VectorQuantize(16, 1024, use_cosine_sim=True).eval()
    large = (torch.randn(200, 16) * 25000).clamp(-60000, 60000)  # whose norms float16 cannot hold
    x = torch.cat([torch.randn(4000, 16), large]).to(dtype)
    assert torch.equal(layer.eval().encode(x), genperf.nearest_code(x, layer.codebook, metric="cosine"))
    assert torch.equal(upstream(x.unsqueeze(0))[1][0], genperf.nearest_code(x, upstream.codebook, metric="cosine"))


@pytest.mark.parametrize(
    "make", [lambda: VectorQuantizer(64, 8, metric="cosine"), lambda: ResidualVectorQuantizer(3, 64, 8, metric="cosine")]
)
def test_functional_call_normalizes_learned_codes(make):
    layer, x = make(), torch.randn(200, 8)
    with torch.no_grad():
        layer.codebook.mul_(torch.rand(*layer.codebook.shape[:-1], 1) * 3 + 0.1)
    parameters = {name: value.detach().clone() for name, value in layer.named_parameters()}
    torch.testing.assert_close(functional_call(layer, parameters, (x,)), layer(x))


@pytest.mark.parametrize(
    "make",
    [
        lambda: VectorQuantizer(16, 4, metric="cosine", sample_temperature=0.5),
        lambda: VectorQuantize(4, 16, use_cosine_sim=True, stochastic_sample_codes=True, sample_codebook_temp=0.5, freeze_codebook=True),
    ],
)
def test_codes_are_sampled_by_cosines(make):
    """Whose logits do not depend on the lengths of the vectors."""
    torch.manual_seed(0)
    layer, found = make(), []
    for scale in (1, 16):
        torch.manual_seed(1)
        found.append(layer(batch(0, 500) * scale)[1])
    assert torch.equal(*found)


@pytest.mark.parametrize("index", [16, -2])
@pytest.mark.parametrize(
    "decode",
    [
        lambda i: VectorQuantizer(16, 4, heads=2, separate_codebooks=True).decode(i),
        lambda i: ResidualVectorQuantizer(2, 16, 4).decode(i),
        lambda i: VectorQuantize(4, 16, heads=2, codebook_dim=2, separate_codebook_per_head=True).get_codes_from_indices(i.unsqueeze(0)),
        lambda i: VectorQuantize(4, 16, heads=2, codebook_dim=2).update_indices(torch.randn(1, 1, 4), i.unsqueeze(0)),
    ],
)
def test_an_index_past_the_codebook_is_an_error(decode, index):
    with pytest.raises(IndexError, match="between -1 and 15"):
        decode(torch.tensor([[index, 3]]))


@each("cosine")
def test_gradient_at_a_zero_vector_is_of_usual_size(make):
    for layer in (VectorQuantizer(16, 4, metric="cosine"), VectorQuantize(4, 16, use_cosine_sim=True)):
        x = batch(0)
        x[0, 0] = 0
        x.requires_grad_()
        quantized, _, loss = layer(x)
        (quantized.sum() + loss).backward()
        assert x.grad[0, 0].abs().max() <= x.grad.abs().max() < 1e3


def test_frozen_codes_do_not_move():
    learned = VectorQuantizer(16, 4, replace_dead_below=2.0)
    learned.requires_grad_(False)
    layers = [learned, VectorQuantizer(16, 4, decay=0.5, replace_dead_below=2.0), VectorQuantizer(16, 4, decay=0.5, update="none")]
    before = [layer.codebook.detach().clone() for layer in layers]
    for step in range(2):
        for layer, options in zip(layers, ({}, {"code_weights": torch.zeros(16)}, {}), strict=True):
            layer(batch(step), **options)
    for layer, codes in zip(layers, before, strict=True):
        assert torch.equal(layer.codebook, codes)


def test_an_update_that_waits_does_not_depend_on_its_input():
    results = []
    for overwritten in (False, True):
        torch.manual_seed(0)
        layer, x = VectorQuantizer(16, 4, decay=0.5, replace_dead_below=2.0, update="accumulate"), batch(0)
        layer(x)
        if overwritten:
            x.zero_()
        update_codebooks(layer)
        results.append(layer.state_dict())
    torch.testing.assert_close(*results)


def test_replacements_repeat_with_the_state_of_the_generator():
    layer = VectorQuantize(4, 64, threshold_ema_dead_code=2, decay=0.5)
    for step in range(3):
        layer(batch(step))
    resumed = VectorQuantize(4, 64, threshold_ema_dead_code=2, decay=0.5)
    resumed.load_state_dict(layer.state_dict())
    state = torch.get_rng_state()
    for each_layer in (layer, resumed):
        torch.set_rng_state(state)
        for step in range(3, 6):
            each_layer(batch(step))
    torch.testing.assert_close(layer.state_dict(), resumed.state_dict())


ACCUMULATING = {
    "dead codes": lambda: VectorQuantizer(16, 4, decay=0.5, replace_dead_below=1.0),
    "learned, dead codes": lambda: VectorQuantizer(16, 4, replace_dead_below=1.0, usage_decay=0.5),
    "heads": LAYERS["heads"],
    "projection, cosine": lambda: VectorQuantizer(16, 4, code_dim=2, heads=4, decay=0.9, metric="cosine", replace_dead_below=1.0),
    "residual, dead codes": LAYERS["residual, dead codes"],
    "residual, groups": lambda: ResidualVectorQuantizer(3, 16, 4, groups=2, shared_codebook=True, decay=0.5, replace_dead_below=1.0),
    "VectorQuantize, dead codes": LAYERS["VectorQuantize, dead codes"],
}


def accumulate(layer, x):
    return layer(x, accum_ema_update=True) if isinstance(layer, VectorQuantize) else layer(x, update="accumulate")


def without_pending(state):
    return {key: value for key, value in state.items() if "pending." not in key}


@pytest.mark.parametrize("make", ACCUMULATING.values(), ids=ACCUMULATING)
def test_accumulated_statistics_are_part_of_the_state_dict(make):
    torch.manual_seed(0)
    layer = make()
    keys = set(layer.state_dict())
    accumulate(layer, batch(0))
    state = copy.deepcopy(layer.state_dict())
    assert keys < set(state)
    copies = []
    for options in ({"strict": True}, {"strict": False}, {"assign": True}):
        copies.append(make())
        accumulate(copies[-1], batch(9))
        copies[-1].load_state_dict(state, **options)
        assert set(copies[-1].state_dict()) == set(state)
    discarded = copy.deepcopy(layer)
    discarded.load_state_dict(without_pending(state))
    assert set(discarded.state_dict()) == keys
    for each_layer in (layer, *copies, discarded):
        accumulate(each_layer, batch(1))
        torch.manual_seed(1)
        update_codebooks(each_layer)
        assert set(each_layer.state_dict()) == keys
    for each_layer in copies:
        torch.testing.assert_close(each_layer.state_dict(), layer.state_dict(), rtol=0, atol=0)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(discarded.state_dict(), layer.state_dict())


def test_accumulated_statistics_in_distributed_checkpoints():
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    layer = ACCUMULATING["dead codes"]()
    model, other = (torch.nn.ModuleDict({"quantizer": each_layer}) for each_layer in (layer, ACCUMULATING["dead codes"]()))
    accumulate(layer, batch(0))
    set_model_state_dict(other, get_model_state_dict(model))
    torch.testing.assert_close(other.state_dict(), model.state_dict())
    assert not [name for name, _ in model.named_buffers() if "pending" in name], "DistributedDataParallel overwrites buffers"


def test_accumulated_statistics_that_do_not_fit():
    source, layer = ACCUMULATING["dead codes"](), ACCUMULATING["dead codes"]()
    accumulate(source, batch(0))
    state = source.state_dict()
    for key, value, message in (
        ("pending.counts", torch.ones(8), r"pending.counts must have the shape of the averages, \[16\], got \[8\]"),
        ("pending.sums", None, r"pending.sums must have the shape of the averages, \[16, 4\], got None"),
        ("pending.indices", None, "pending.vectors and pending.indices must be given together"),
        ("pending.vectors", torch.ones(1, 64, 3, 1), "must fit codes of 4 dimensions, got"),
        ("pending.other", torch.ones(1), "Unexpected key"),
    ):
        damaged = {**state, key: value} if value is not None else {name: t for name, t in state.items() if name != key}
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict(damaged)
    # A layer without dead-code replacement needs no vectors, and one without averages no statistics.
    plain = VectorQuantizer(16, 4, decay=0.5)
    plain.load_state_dict(state, strict=False)
    assert [key for key in plain.state_dict() if "pending." in key] == ["pending.counts", "pending.sums"]
    learned = VectorQuantizer(16, 4)
    assert set(learned.load_state_dict(state, strict=False).unexpected_keys) == set(state) - {"codebook"}


def test_accumulated_statistics_move_with_the_layer():
    layer = ACCUMULATING["dead codes"]()
    accumulate(layer, batch(0))
    counts = layer.pending.counts
    layer.half().to("cpu")
    assert torch.equal(layer.pending.counts, counts)
    assert layer.to("meta").pending is None
