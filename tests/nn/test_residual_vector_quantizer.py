# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch.nn import functional as F

import genperf
from genperf.nn import ResidualVectorQuantizer, VectorQuantizer, update_codebooks

DECAY, EPS = 0.9, 1e-5


def with_random_codes(layer):
    """The layer with random codes, large enough that every quantizer reduces the residual."""
    layer.set_codes(torch.randn(layer.codebook.shape, generator=torch.Generator().manual_seed(1)) * 0.7)
    return layer


def ema_chain(x, codebooks, counts, sums):
    """Codebooks, counts and sums after an EMA update of every quantizer, in plain PyTorch, for x [N, D] in float64."""
    residual, found = x, []
    for codebook, count, total in zip(codebooks, counts, sums, strict=True):
        nearest = (residual[:, None] - codebook).square().sum(-1).argmin(1)
        one_hot = F.one_hot(nearest, len(codebook)).to(x.dtype)
        count = DECAY * count + (1 - DECAY) * one_hot.sum(0)
        total = DECAY * total + (1 - DECAY) * one_hot.T @ residual
        smoothed = (count + EPS) / (count.sum() + len(codebook) * EPS) * count.sum()
        found.append((total / smoothed[:, None], count, total))
        residual = residual - codebook[nearest]
    return tuple(torch.stack(each) for each in zip(*found, strict=True))


@pytest.mark.parametrize("channel_dim", [-1, 1])
@pytest.mark.parametrize("groups", [1, 2])
def test_ema_matches_the_formula(groups, channel_dim):
    layer = ResidualVectorQuantizer(3, 7, 4 * groups, groups=groups, decay=DECAY, eps=EPS, channel_dim=channel_dim).double()
    with_random_codes(layer)
    expected = [
        (codes.clone(), torch.ones(3, 7, dtype=torch.float64), codes.clone())
        for codes in layer.codebook.unflatten(0, (groups, 3)).unbind(0)
    ]
    for _ in range(3):
        x = torch.randn(5, 6, 4 * groups, dtype=torch.float64)
        layer(x.movedim(-1, channel_dim))
        expected = [ema_chain(part, *state) for part, state in zip(x.reshape(30, -1).chunk(groups, 1), expected, strict=True)]
    for name, values in zip(("codebook", "counts", "sums"), zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(getattr(layer, name), torch.cat(values), msg=name)


def test_one_quantizer_equals_vector_quantizer():
    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    options = {"decay": DECAY, "channel_dim": 1, "gradient": "rotation", "init": "kmeans", "replace_dead_below": 0.5}
    torch.manual_seed(3)
    single = VectorQuantizer(6, 8, **options)
    torch.manual_seed(3)
    residual = ResidualVectorQuantizer(1, 6, 8, **options)
    for _ in range(3):
        torch.manual_seed(5)
        quantized, indices, loss = single(x)
        torch.manual_seed(5)
        found = residual(x)
        assert torch.equal(found[0], quantized)
        assert torch.equal(found[1], indices.unsqueeze(-1))
        torch.testing.assert_close(found[2].sum(), loss)
        grad_output = torch.randn_like(quantized)
        outputs = (found[0], found[2]), (quantized, loss)
        grads = [torch.autograd.grad((q * grad_output).sum() + losses.sum(), x)[0] for q, losses in outputs]
        torch.testing.assert_close(*grads)
        for name in ("codebook", "counts", "sums"):
            torch.testing.assert_close(getattr(residual, name).squeeze(0), getattr(single, name), msg=name)


def test_gradients_of_learned_codebooks_match_plain_pytorch():
    layer = with_random_codes(ResidualVectorQuantizer(3, 5, 4, codebook_weight=0.7, commitment_weight=0.3))
    x = torch.randn(40, 4, requires_grad=True)
    _, indices, losses = layer(x)
    codebooks = layer.codebook.detach().clone().requires_grad_()
    residual, expected = x, 0
    for q in range(3):
        code = codebooks[q][indices[:, q]]
        expected = expected + 0.7 * F.mse_loss(code, residual.detach()) + 0.3 * F.mse_loss(residual, code.detach())
        residual = residual - code.detach()
    torch.testing.assert_close(losses.sum(), expected)
    grads = torch.autograd.grad(losses.sum(), (x, layer.codebook))
    for grad, wanted in zip(grads, torch.autograd.grad(expected, (x, codebooks)), strict=True):
        torch.testing.assert_close(grad, wanted)


def test_a_step_uses_the_codes_from_before_its_update():
    layer = with_random_codes(ResidualVectorQuantizer(2, 5, 3, decay=DECAY))
    before = layer.codebook.clone()
    x = torch.randn(20, 3, requires_grad=True)
    quantized, indices, losses = layer(x)
    assert not torch.equal(layer.codebook, before)
    assert torch.equal(quantized, before[0][indices[:, 0]] + before[1][indices[:, 1]])
    (gradient,) = torch.autograd.grad(losses.sum(), x)
    first = x.detach() - before[0][indices[:, 0]]
    torch.testing.assert_close(gradient, 0.25 * 2 / x.numel() * (2 * first - before[1][indices[:, 1]]))


@pytest.mark.parametrize(("groups", "code_dim"), [(1, None), (2, None), (1, 3), (2, 3)])
@pytest.mark.parametrize("channel_dim", [-1, 1])
@pytest.mark.parametrize("shared", [False, True])
def test_decode_equals_quantized(groups, code_dim, channel_dim, shared):
    layer = with_random_codes(
        ResidualVectorQuantizer(4, 9, 8, groups=groups, code_dim=code_dim, channel_dim=channel_dim, shared_codebook=shared, decay=DECAY)
    ).eval()
    x = torch.randn(3, 8, 8)
    mask = torch.rand(3, 8) > 0.3
    for number in (None, 2):
        quantized, indices, losses = layer(x, mask, num_quantizers=number)
        assert list(indices.shape) == [3, 8, *([groups] if groups > 1 else []), 4]
        assert torch.equal(indices, layer.encode(x, mask, num_quantizers=number))
        assert losses.shape == (4,)
        decoded = layer.decode(indices)
        if code_dim is None:
            assert torch.equal(decoded, quantized)
        else:
            torch.testing.assert_close(decoded, quantized)
        assert not decoded.movedim(channel_dim, -1)[~mask].any()
    prefix = layer.encode(x)[..., :2]
    torch.testing.assert_close(layer.decode(prefix), layer(x, num_quantizers=2)[0])


def test_masked_vectors_do_not_affect_the_codebooks():
    masked, kept = (with_random_codes(ResidualVectorQuantizer(3, 5, 4, groups=2, decay=DECAY)) for _ in range(2))
    x = torch.randn(4, 6, 4)
    mask = torch.rand(4, 6) < 0.5
    x[~mask] = float("nan")
    quantized, indices, losses = masked(x, mask)
    expected = kept(x[mask])
    assert torch.equal(quantized[mask], expected[0])
    assert torch.equal(indices[mask], expected[1])
    torch.testing.assert_close(losses, expected[2])
    for name in ("codebook", "counts", "sums"):
        assert torch.equal(getattr(masked, name), getattr(kept, name)), name
    lengths = torch.tensor([2, 6, 0, 3])
    by_length, by_mask = masked.eval()(x.nan_to_num(), lengths=lengths), masked(x.nan_to_num(), torch.arange(6) < lengths[:, None])
    assert torch.equal(by_length[1], by_mask[1])


def test_shared_codebook_learns_from_all_quantizers():
    layer = with_random_codes(ResidualVectorQuantizer(3, 6, 4, shared_codebook=True, decay=DECAY))
    before = layer.codebook[0].clone()
    x = torch.randn(50, 4)
    _, indices, _ = layer(x)
    counts, sums, residual = torch.zeros(6), torch.zeros(6, 4), x
    for q in range(3):
        found = genperf.code_statistics(residual, indices[:, q], 6)
        counts, sums = counts + found[0], sums + found[1]
        residual = residual - before[indices[:, q]]
    torch.testing.assert_close(layer.counts[0], DECAY + (1 - DECAY) * counts)
    torch.testing.assert_close(layer.sums[0], DECAY * before + (1 - DECAY) * sums)


@pytest.mark.parametrize("init", ["data", "kmeans"])
@pytest.mark.parametrize("options", [{}, {"shared_codebook": True}, {"groups": 2}, {"decay": 0.9}])
def test_codes_are_initialized_from_the_residuals(init, options):
    x = torch.randn(400, 8)
    layer = ResidualVectorQuantizer(4, 16, 8, init=init, **options)
    _, _, losses = layer(x)
    if "shared_codebook" not in options:
        assert (losses[1:] < 0.9 * losses[:-1]).all(), "every quantizer must reduce the residual"
    assert losses[0] < 0.6 * ResidualVectorQuantizer(4, 16, 8, **options)(x)[2][0] or init == "data"
    before = layer.codebook.detach().clone()
    layer.eval()(x + 5)
    assert torch.equal(layer.codebook, before)


def test_quantizer_dropout():
    options = {"quantizer_dropout": True, "dropout_min_quantizers": 2, "decay": DECAY}
    layer, again = (with_random_codes(ResidualVectorQuantizer(6, 5, 4, **options)) for _ in range(2))
    numbers = []
    for _ in range(60):
        x = torch.randn(30, 4)
        before = layer.codebook.clone()
        _, indices, losses = layer(x)
        number = (indices[0] >= 0).sum().item()
        assert ((indices >= 0) == (torch.arange(6) < number)).all()
        assert (losses[number:] == 0).all()
        changed = (layer.codebook != before).flatten(1).any(1)
        assert changed[:number].all()
        torch.testing.assert_close(layer.codebook[number:], before[number:])
        assert torch.equal(again(x)[1], indices), "the number of quantizers must not depend on the rank"
        numbers.append(number)
    assert set(numbers) == {2, 3, 4, 5, 6}
    assert (layer.eval()(x)[1] >= 0).all()
    other = ResidualVectorQuantizer(6, 5, 4, **options, dropout_seed=1)
    assert [(other(x)[1][0] >= 0).sum().item() for _ in range(60)] != numbers
    multiples = ResidualVectorQuantizer(10, 5, 4, quantizer_dropout=True, dropout_multiple_of=4)
    assert {(multiples(x)[1][0] >= 0).sum().item() for _ in range(30)} == {4, 8, 10}
    state = layer.state_dict()
    assert state["num_steps"] == 60


def test_num_quantizers_of_a_call_overrides_dropout():
    layer = ResidualVectorQuantizer(5, 4, 3, quantizer_dropout=True)
    for number in (1, torch.tensor(3)):
        _, indices, _ = layer(torch.randn(7, 3), num_quantizers=number)
        assert ((indices >= 0).sum(-1) == int(number)).all()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_dead_codes_are_replaced_by_residuals_of_their_quantizer(groups, shared):
    options = {"groups": groups, "shared_codebook": shared, "decay": 0.5, "replace_dead_below": 0.3}
    layer = with_random_codes(ResidualVectorQuantizer(3, 8, 4 * groups, **options))
    with torch.no_grad():
        layer.codebook[:, 5:] = layer.sums[:, 5:] = 1e3  # nearest to no vector
    before = layer.codebook.clone()
    x = torch.randn(40, 4 * groups)
    for _ in range(2):  # counts of 1, 0.5, 0.25: dead after the second step
        before = layer.codebook.clone()
        layer.eval()
        indices = layer.encode(x)
        layer.train()(x)
    indices = indices.view(40, groups, 3)
    for codebook, codes in enumerate(layer.codebook):
        group, own = (codebook, None) if shared else divmod(codebook, 3)
        codebooks = before[group].expand(3, -1, -1) if shared else before[group * 3 : group * 3 + 3]
        residual, possible = x.chunk(groups, 1)[group], []
        for q in range(3):
            possible.append(residual)
            residual = residual - codebooks[q][indices[:, group, q]]
        for k in range(5, 8):
            candidates = possible[k % 3 if shared else own]
            assert (candidates - codes[k]).abs().amax(1).min() < 1e-5, (codebook, k)
    assert layer.num_updates == 2


def test_accumulated_steps_match_one_step():
    whole, parts = (with_random_codes(ResidualVectorQuantizer(3, 5, 4, decay=DECAY, update=update)) for update in ("step", "accumulate"))
    x = torch.randn(60, 4)
    before = parts.codebook.clone()
    for part in x.chunk(3):
        parts(part)
    assert torch.equal(parts.codebook, before)
    update_codebooks(parts)
    whole(x)
    for name in ("codebook", "counts", "sums"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), msg=name)
    whole.update = "none"
    before = whole.codebook.clone()
    whole(x)
    assert torch.equal(whole.codebook, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("code_dim", [None, 4])
def test_half_precision_vectors(dtype, code_dim):
    layer = with_random_codes(ResidualVectorQuantizer(3, 6, 8, code_dim=code_dim, decay=DECAY, gradient="rotation"))
    x = torch.randn(30, 8).to(dtype).requires_grad_()
    quantized, _, losses = layer(x)
    assert quantized.dtype == dtype
    assert losses.dtype == torch.float32
    (quantized.float().sum() + losses.sum()).backward()
    assert x.grad.isfinite().all()
    assert layer.codebook.dtype == torch.float32


@pytest.mark.parametrize("decay", [None, DECAY])
def test_empty_batch_and_state(decay):
    layer = ResidualVectorQuantizer(3, 6, 4, decay=decay, replace_dead_below=0.1, init="data")
    _, indices, losses = layer(torch.randn(0, 4))
    assert indices.shape == (0, 3)
    assert (losses == 0).all()
    layer(torch.randn(20, 4))
    other = ResidualVectorQuantizer(3, 6, 4, decay=decay, replace_dead_below=0.1, init="data")
    other.load_state_dict(layer.state_dict())
    x = torch.randn(9, 4)
    assert torch.equal(other(x)[1], layer.eval()(x)[1])


def test_cosine_selects_by_direction():
    layer = ResidualVectorQuantizer(2, 6, 4, metric="cosine", decay=DECAY)
    torch.testing.assert_close(layer.codebook.norm(dim=-1), torch.ones(2, 6))
    x = torch.randn(20, 4)
    first = (x @ layer.codebook[0].T).argmax(1)
    assert torch.equal(layer.eval().encode(x)[:, 0], first)
    layer.train()(x)
    torch.testing.assert_close(layer.codebook.norm(dim=-1), torch.ones(2, 6))


@pytest.mark.parametrize("training", [True, False])
def test_compiles_as_one_graph(training):
    torch._dynamo.reset()
    options = {"decay": DECAY, "replace_dead_below": 0.2, "quantizer_dropout": True, "groups": 2, "channel_dim": 1}
    eager, layer = (with_random_codes(ResidualVectorQuantizer(4, 6, 8, **options)).train(training) for _ in range(2))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for step in range(4):
        x = torch.randn(2, 8, 5, requires_grad=True)
        outputs = []
        for call in (eager, compiled):
            quantized, indices, losses = call(x)
            (gradient,) = torch.autograd.grad(quantized.square().sum() + losses.sum(), x)
            outputs.append((quantized, indices, losses, gradient))
        for expected, found in zip(*outputs, strict=True):
            torch.testing.assert_close(found, expected, msg=f"step {step}")
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name], value, msg=name)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("num_quantizers must be at least 1", {"num_quantizers": 0}),
        ("num_codes must be at least 1", {"num_codes": 0}),
        ("dim must be divisible by groups", {"groups": 3}),
        ("groups must be at least 1", {"groups": 0}),
        ("gradient must be one of", {"gradient": "reinforce"}),
        ("dropout_min_quantizers must lie in 1 ... 2", {"dropout_min_quantizers": 3}),
        ("dropout_multiple_of must be at least 1", {"dropout_multiple_of": 0}),
        ("commitment_weight must not be negative", {"commitment_weight": -1.0}),
        ("decay must be None or lie in", {"decay": 1.0}),
    ],
)
def test_invalid_constructor_arguments(message, arguments):
    with pytest.raises(ValueError, match="ResidualVectorQuantizer: " + message):
        ResidualVectorQuantizer(**({"num_quantizers": 2, "num_codes": 4, "dim": 4} | arguments))


def test_invalid_input():
    layer = ResidualVectorQuantizer(2, 4, 4, groups=2)
    with pytest.raises(ValueError, match="x must have 4 channels"):
        layer(torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"num_quantizers must lie in 1 \.\.\. 2"):
        layer(torch.zeros(3, 4), num_quantizers=3)
    with pytest.raises(ValueError, match=r"indices must have shape \[..., 2, q\] with 1 <= q <= 2"):
        layer.decode(torch.zeros(3, 2, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match="indices must be int64"):
        layer.decode(torch.zeros(3, 2, 2))


def test_training_leaves_the_random_state_unchanged():
    layer = ResidualVectorQuantizer(4, 4, 4, quantizer_dropout=True, decay=DECAY, replace_dead_below=0.5)
    state = torch.get_rng_state()
    layer(torch.zeros(9, 4))
    assert torch.equal(torch.get_rng_state(), state)
