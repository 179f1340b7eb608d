# SPDX-License-Identifier: Apache-2.0
"""How the codebook of nn.VectorQuantizer trains: initialization, dead-code replacement, regularizers, accumulation, compilation."""

import copy
import io
import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import functional as F

from genperf.nn import LossTerms, VectorQuantizer, update_codebooks

NAN = float("nan")


def state(layer):
    return {name: value.clone() for name, value in layer.state_dict().items()}


def assert_same(first, second, **tolerance):
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(
            value, second[name], **{"rtol": 0, "atol": 0, **tolerance}, msg=lambda text, name=name: f"{name}: {text}"
        )


def rows_in(codes, x):
    """For each of the codes [K, D], whether it is a row of x [N, D], and which one."""
    equal = torch.isclose(codes.unsqueeze(1), x, rtol=1e-6, atol=0).all(-1)
    return equal.any(1), equal.int().argmax(1)


def clusters(number, dim=4, each=30):
    centers = 10 * torch.randn(number, dim)
    return (centers + 0.1 * torch.randn(each, number, dim)).flatten(0, 1)


def distortion(layer, x):
    return torch.cdist(x, layer.codebook.detach()).min(1).values.square().sum()


def test_kmeans_initializes_codes_with_cluster_centers():
    x = clusters(12)
    layers = {init: VectorQuantizer(12, 4, decay=0.9, init=init) for init in ("kmeans", "data")}
    for layer in layers.values():
        layer.init_codes(x)
    kmeans = layers["kmeans"]
    assert distortion(kmeans, x) < 0.1 * distortion(layers["data"], x)
    assert torch.equal(kmeans.counts, torch.full((12,), 30.0))
    torch.testing.assert_close(kmeans.sums, kmeans.codebook * 30)
    assert torch.equal(layers["data"].counts, torch.ones(12))


def test_kmeans_initialization_depends_on_the_seed():
    x = torch.randn(200, 4)
    codebooks = []
    for seed in (0, 0, 1):
        layer = VectorQuantizer(9, 4, init="kmeans", heads=2, separate_codebooks=True)
        torch.manual_seed(seed)
        layer(x)
        codebooks.append(layer.codebook.detach().clone())
        before = layer.codebook.detach().clone()
        layer(x + 5)
        assert torch.equal(layer.codebook, before)  # learned by gradient, and already initialized
    assert torch.equal(codebooks[0], codebooks[1])
    assert not torch.equal(codebooks[0], codebooks[2])


def test_kmeans_initialization_with_fewer_vectors_than_codes():
    layer = VectorQuantizer(6, 3, decay=0.5, init="kmeans")
    x = torch.randn(2, 3)
    layer(x)
    layer(x)
    assert distortion(layer, x) < 1e-6
    assert torch.cdist(layer.codebook, x).min(1).values.max() < 1e-3, "a code moved to the origin"


def test_loading_codes_resets_the_averages():
    layer = VectorQuantizer(5, 3, decay=0.9, init="kmeans", replace_dead_below=1e-3)
    codes = torch.randn(5, 3)
    layer.load_state_dict({"codebook": codes}, strict=False)
    layer(codes[:3])
    torch.testing.assert_close(layer.codebook, codes, rtol=1e-4, atol=1e-4)


def test_averages_of_a_layer_without_dead_code_replacement_load():
    source, target = VectorQuantizer(5, 3, decay=0.9), VectorQuantizer(5, 3, decay=0.9, replace_dead_below=0.1)
    target.load_state_dict(source.state_dict())
    assert target.num_updates == 0


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("decay", [None, 0.5])
def test_dead_codes_are_replaced_by_vectors_of_the_batch(decay, metric):
    layer = VectorQuantizer(8, 4, decay=decay, usage_decay=0.5, metric=metric, replace_dead_below=0.9)
    with torch.no_grad():  # only the first code is nearest to any vector
        layer.codebook[0] = 1
        layer.codebook[1:] = -layer.codebook[1:].abs()
    x = 5 + torch.randn(20, 4)
    random_state = torch.get_rng_state()
    quantized, _, loss = layer(x)
    assert torch.equal(torch.get_rng_state(), random_state)
    x = F.normalize(x, dim=-1, eps=1e-6) if metric == "cosine" else x
    replaced, row = rows_in(layer.codebook.detach(), x)
    assert replaced.tolist() == [False] + [True] * 7
    assert len(set(row[1:].tolist())) == 7
    assert torch.equal(layer.counts[1:], torch.full((7,), 0.9))
    assert torch.equal(layer.sums[1:], layer.codebook.detach()[1:] * 0.9)
    if decay is None:  # backward uses the codes that x was quantized with
        (quantized.sum() + loss).backward()
        assert not layer.codebook.grad[1:].any()
        assert layer.codebook.grad[0].any()


def test_dead_code_replacement_is_deterministic_and_changes_position():
    x = 100 + torch.arange(50.0).unsqueeze(1).expand(50, 2)
    runs = []
    for _ in range(2):
        layer, drawn = VectorQuantizer(4, 2, replace_dead_below=1.0), []
        layer.load_state_dict({"codebook": torch.zeros(4, 2)}, strict=False)
        for _ in range(6):
            with torch.no_grad():
                layer.codebook.zero_()
                layer.counts.zero_()
            layer(x)
            drawn.append(layer.codebook.detach()[1:, 0].tolist())
        runs.append(drawn)
        torch.manual_seed(7)
    assert runs[0] == runs[1]
    assert len({min(step) for step in runs[0]}) == 6


def test_dead_code_replacement_with_fewer_vectors_than_codes():
    layer = VectorQuantizer(9, 2, decay=0.5, replace_dead_below=0.9)
    ever_replaced = torch.zeros(9, dtype=torch.bool)
    for step in range(12):
        x = 50 + 10 * torch.randn(3, 2)
        before = layer.codebook.clone()
        layer(x)
        replaced, row = rows_in(layer.codebook, x)
        replaced &= (layer.codebook != before).any(-1)
        chosen = row[replaced & (layer.counts == 0.9)].tolist()
        assert len(chosen) == len(set(chosen)) <= 3, step
        ever_replaced |= replaced
    assert ever_replaced.sum() >= 8  # codes without a replacement wait for a later step


@pytest.mark.parametrize("kind", ["masked", "NaN", "infinite"])
def test_replacements_are_valid_and_finite(kind):
    bad = torch.rand(6, 10) < 0.5
    x = 50 + torch.randn(6, 10, 2)
    x[bad] = NAN if kind != "infinite" else math.inf
    layer = VectorQuantizer(8, 2, decay=0.5, replace_dead_below=0.9)
    for step in range(3):
        layer(x, ~bad if kind == "masked" else None)
        assert step > 0 or rows_in(layer.codebook, x[~bad])[0].sum() >= 2
        finite = layer.codebook.isfinite().all(-1)
        assert finite[1:].all()  # unmasked vectors with NaN or infinity are assigned to code 0
        assert finite[0] or kind != "masked"


def test_dead_codes_of_a_head_are_replaced_by_its_own_vectors():
    layer = VectorQuantizer(6, 4, decay=0.5, heads=2, separate_codebooks=True, replace_dead_below=0.9, channel_dim=1)
    x = torch.cat([50 + torch.randn(3, 2, 5), -50 + torch.randn(3, 2, 5)], 1)
    layer(x)
    for codes, vectors in zip(layer.codebook, x.movedim(1, -1).reshape(15, 4).split(2, 1), strict=True):
        assert rows_in(codes, vectors)[0].sum() == 5


def gram(codes):
    """The orthogonal term of codes [n, D] from the cosines of all pairs, as in the paper."""
    codes = F.normalize(codes, dim=-1)
    return (codes @ codes.T).square().sum() / len(codes) ** 2 - 1 / len(codes)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("used_only", [False, True])
def test_orthogonal_term(used_only, separate):
    layer = VectorQuantizer(
        6, 4, heads=2, separate_codebooks=separate, orthogonal_weight=0.3, orthogonal_used_only=used_only, codebook_weight=0
    ).double()
    x, mask = torch.randn(4, 4, dtype=torch.float64), torch.tensor([True, True, False, True])
    _, indices, loss, terms = layer(x, mask, return_terms=True)
    codes = layer.codebook.detach().clone().requires_grad_()
    codebooks, used = (codes, indices[mask].T) if separate else (codes[None], indices[mask].reshape(1, -1))
    expected = torch.stack([gram(c[i.unique()] if used_only else c) for c, i in zip(codebooks, used, strict=True)]).mean()
    torch.testing.assert_close(terms.orthogonal, expected)
    torch.testing.assert_close(loss, 0.25 * terms.error + 0.3 * expected)
    loss.backward()
    expected.mul(0.3).backward()
    torch.testing.assert_close(layer.codebook.grad, codes.grad)
    assert isinstance(terms, LossTerms)
    assert layer.eval()(x, return_terms=True)[3].orthogonal == 0


def test_orthogonal_term_of_randomly_drawn_codes():
    layer = VectorQuantizer(3, 4, orthogonal_weight=1.0, orthogonal_max_codes=2)
    pairs = [gram(layer.codebook.detach()[list(pair)]).item() for pair in ((0, 1), (0, 2), (1, 2))]
    seen = {
        min(range(3), key=lambda i: abs(pairs[i] - value))
        for _ in range(20)
        for value in [layer(torch.randn(2, 4), return_terms=True)[3].orthogonal.item()]
    }
    assert seen == {0, 1, 2}
    value = layer(torch.randn(2, 4), return_terms=True)[3].orthogonal.item()
    assert min(abs(pair - value) for pair in pairs) < 1e-6


def test_orthogonal_term_of_an_empty_batch_and_under_autocast():
    layer = VectorQuantizer(500, 4, orthogonal_weight=1.0, orthogonal_used_only=True)
    loss = layer(torch.randn(3, 4), torch.zeros(3, dtype=torch.bool))[2]
    loss.backward()
    assert loss == 0
    assert not layer.codebook.grad.any()
    layer.orthogonal_used_only = False
    with torch.no_grad():
        layer.codebook.fill_(1.0)
    with torch.autocast("cpu", torch.float16):  # the sum of squares over 500 equal codes exceeds float16
        term = layer(torch.randn(3, 4), return_terms=True)[3].orthogonal
    assert term.item() == pytest.approx(1 - 1 / 500, rel=1e-5)


def test_accumulated_steps_match_one_step():
    whole, parts, mixed = (VectorQuantizer(7, 3, decay=0.9, channel_dim=1, heads=1, separate_codebooks=True) for _ in range(3))
    for layer in (parts, mixed):
        layer.load_state_dict(whole.state_dict())
    for _ in range(3):
        x = torch.randn(6, 3, 4)
        whole(x)
        before = state(parts)
        for part in x.split(2):
            parts(part, update="accumulate")
        waiting = state(parts)
        for name in ("pending.counts", "pending.sums"):
            del waiting[name]
        assert_same(waiting, before)
        update_codebooks(nn.Sequential(nn.Identity(), parts))
        for part, update in zip(x.split(2), ("accumulate", "accumulate", "step"), strict=True):
            mixed(part, update=update)
        assert_same(state(parts), state(whole), rtol=1e-6, atol=1e-6)
        assert_same(state(mixed), state(whole), rtol=1e-6, atol=1e-6)


def test_layers_without_statistics_keep_their_codes():
    layers = nn.ModuleList(
        VectorQuantizer(7, 3, decay=0.9, replace_dead_below=2.0, update=update) for update in ("accumulate", "none", "step")
    )
    layers.append(VectorQuantizer(7, 3))
    layers[1](torch.randn(20, 3))
    before = [layer.codebook.detach().clone() for layer in layers]
    update_codebooks(layers)
    for layer, codes in zip(layers, before, strict=True):
        torch.testing.assert_close(layer.codebook.detach(), codes, rtol=1e-6, atol=0)
        assert not layer.has_ema or torch.equal(layer.counts, torch.ones(7))
    assert torch.equal(layers[1].codebook, before[1])


def test_accumulated_statistics_are_copied_with_the_layer():
    layer = VectorQuantizer(7, 3, decay=0.9, replace_dead_below=0.99, update="accumulate")
    layer(torch.randn(20, 3, requires_grad=True))
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    copies = [copy.deepcopy(layer), torch.load(file, weights_only=False)]
    before = layer.codebook.clone()
    for module in (layer, *copies):
        update_codebooks(module)
        assert_same(state(module), state(layer))
    assert not torch.equal(layer.codebook, before)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("kind", ["tensor", "function"])
def test_code_weights(kind, heads):
    layer = VectorQuantizer(5, 3 * heads, decay=0.9, eps=1e-8, heads=heads, separate_codebooks=heads > 1).double()
    shape = layer.codebook.shape[:-1]
    weights = torch.rand(shape, dtype=torch.float64).round(decimals=1)
    weights[..., 1] = 0
    before = state(layer)
    x = torch.randn(30, 3 * heads, dtype=torch.float64)
    seen = []

    def function(sums, counts):
        seen.append((sums, counts))
        return weights

    _, indices, _ = layer(x, code_weights=weights if kind == "tensor" else function)
    one_hot = F.one_hot(indices.reshape(30, heads), 5).double()  # [30, heads, 5]
    counts = one_hot.sum(0).view(shape)
    sums = torch.einsum("nhk,nhd->hkd", one_hot, x.view(30, heads, 3)).view(layer.sums.shape)
    expected_counts = before["counts"] + 0.1 * weights * (counts - before["counts"])
    expected_sums = before["sums"] + (0.1 * weights).unsqueeze(-1) * (sums - before["sums"])
    torch.testing.assert_close(layer.counts, expected_counts)
    torch.testing.assert_close(layer.sums, expected_sums)
    torch.testing.assert_close(layer.codebook, expected_sums / expected_counts.unsqueeze(-1))
    if kind == "function":
        torch.testing.assert_close(seen[0][0], sums)
        torch.testing.assert_close(seen[0][1], counts)


def test_code_weights_are_checked_before_any_layer_is_updated():
    layers = nn.ModuleList([VectorQuantizer(5, 3, decay=0.9, update="accumulate"), VectorQuantizer(6, 3, decay=0.9, update="accumulate")])
    for layer in layers:
        layer(torch.randn(20, 3))
    before = state(layers)
    with pytest.raises(ValueError, match=r"^VectorQuantizer: code_weights must have shape \[6\], got \[5\]"):
        update_codebooks(layers, code_weights=torch.ones(5))
    assert_same(state(layers), before)
    update_codebooks(layers)
    assert not torch.equal(layers[0].counts, before["0.counts"])


def test_frozen_codes():
    layer = VectorQuantizer(5, 3, decay=0.9, replace_dead_below=2.0, update="none")
    before = state(layer)
    layer(torch.randn(20, 3))
    assert_same(state(layer), before)
    layer(torch.randn(20, 3), update="step")
    assert not torch.equal(layer.codebook, before["codebook"])


def test_usage_from_ema_counts():
    layer = VectorQuantizer(4, 2, decay=0.5, replace_dead_below=0.1)
    layer.counts.copy_(torch.tensor([2.0, 1.0, 1.0, 0.05]))
    perplexity, used, dead = layer.usage()
    frequency = torch.tensor([2.0, 1.0, 1.0, 0.05]).double() / 4.05
    torch.testing.assert_close(perplexity, (-(frequency * frequency.log()).sum()).exp(), rtol=1e-6, atol=0)
    assert (used, dead) == (3, 0.25)
    with pytest.raises(ValueError, match=r"^VectorQuantizer: usage .* needs a decay or replace_dead_below, got None"):
        VectorQuantizer(4, 2).usage()


OPTIONS = {
    "learned": {},
    "EMA and dead-code replacement": {"decay": 0.9, "replace_dead_below": 1.0},
    "separate heads": {"decay": 0.9, "replace_dead_below": 0.5, "heads": 2, "separate_codebooks": True, "gradient": "rotation"},
    "projection": {"decay": 0.9, "heads": 2, "code_dim": 3, "metric": "cosine", "replace_dead_below": 0.5},
    "orthogonal": {"replace_dead_below": 1.0, "orthogonal_weight": 1.0, "orthogonal_used_only": True, "orthogonal_max_codes": 7},
}


@pytest.mark.parametrize("name", ["separate heads", "projection", "orthogonal"])
def test_compiled_steps(name):
    torch._dynamo.reset()
    eager = VectorQuantizer(8, 4, channel_dim=1, **OPTIONS[name])
    layer = copy.deepcopy(eager)
    compiled = torch.compile(layer, fullgraph=True, backend="eager" if name == "projection" else "aot_eager")
    for step in range(3):
        x, mask = torch.randn(2, 4, 5), torch.rand(2, 5) < 0.8
        eager_x, compiled_x = (x.clone().requires_grad_() for _ in range(2))
        torch.manual_seed(step)
        expected = eager(eager_x, mask)
        torch.manual_seed(step)
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            outputs = compiled(compiled_x, mask)
        for q, _, loss in (outputs, expected):
            (q.square().sum() + loss).backward()
        for value, wanted in zip((*outputs, compiled_x.grad), (*expected, eager_x.grad), strict=True):
            torch.testing.assert_close(value, wanted)
        assert_same(state(layer), state(eager), rtol=1e-6, atol=1e-6)
        for parameter, wanted in zip(layer.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, wanted.grad)
    layer.eval(), eager.eval()
    for step in range(2):
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=step > 0):
            outputs = compiled(x)
        for value, wanted in zip(outputs, eager(x), strict=True):
            torch.testing.assert_close(value, wanted)
    decoded = torch.compile(layer.decode, fullgraph=True, backend="eager")(outputs[1])
    torch.testing.assert_close(decoded, eager.decode(outputs[1]))


def test_compiled_backward_uses_the_codes_from_before_the_update():
    """Inductor would recompute a plain clone in backward, from the updated codebook."""
    torch._dynamo.reset()
    eager = VectorQuantizer(8, 4, decay=0.5)
    compiled = torch.compile(copy.deepcopy(eager), fullgraph=True)
    compiled_x = torch.randn(6, 4, requires_grad=True)
    eager_x = compiled_x.detach().clone().requires_grad_()
    compiled(compiled_x)[2].backward()
    eager(eager_x)[2].backward()
    torch.testing.assert_close(compiled_x.grad, eager_x.grad)


def test_compiled_accumulation():
    torch._dynamo.reset()
    eager = VectorQuantizer(8, 4, decay=0.9, replace_dead_below=1.0, update="accumulate")
    layer = copy.deepcopy(eager)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for step in range(2):
        for x in torch.randn(3, 9, 4):
            eager(x)
            with torch._dynamo.config.patch(error_on_recompile=step > 0):
                compiled(x)
        update_codebooks(eager)
        update_codebooks(layer)
        assert_same(state(layer), state(eager), rtol=1e-6, atol=1e-6)


def test_error_of_compiled_data_initialization_names_init_codes():
    torch._dynamo.reset()
    layer, x = VectorQuantizer(8, 4, decay=0.9, init="kmeans"), torch.randn(30, 4)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"call init_codes, or take the first"):
        compiled(x)
    layer.init_codes(x)
    compiled(x)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_training_does_not_synchronize(options):
    """On fake tensors, reading a value is an error, and so is a shape that depends on values."""
    with FakeTensorMode():
        layer = VectorQuantizer(8, 4, channel_dim=1, **options)
        model = nn.Sequential(nn.Conv1d(4, 4, 1), layer)
        for given in ({}, {"mask": torch.ones(2, 5, dtype=torch.bool)}, {"lengths": torch.ones(2, dtype=torch.int64)}):
            for update in ("step", "accumulate"):
                quantized, indices, loss = layer(model[0](torch.randn(2, 4, 5)), update=update, **given)
                (quantized.sum() + loss).backward()
                update_codebooks(model)
        if layer.has_ema:
            layer.usage()
        decoded = layer.eval().decode(indices)
        assert decoded.shape == layer(torch.randn(2, 4, 5))[0].shape == (2, 4, 5)
        with pytest.raises(DataDependentOutputException):
            loss.item()
