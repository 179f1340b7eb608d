# SPDX-License-Identifier: Apache-2.0
"""code_entropy, code_cross_entropy and sample_code."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import genperf
from genperf import testing
from genperf.ops import _code_softmax, _code_softmax_chunks
from genperf.ops._noise import gumbel_noise

pytestmark = pytest.mark.compiled

LOGITS = ("distance", "squared_distance", "dot")
SIZES = [(300, 7, 31), (33, 300, 7)]


def losses(x, codebook, indices, **options):
    """The losses and their gradients, one at a time, to cover every branch of backward."""
    results = {}
    for name, weights in {"sample": (1, 0), "batch": (0, 1), "both": (2, -3)}.items():
        leaves = [t.detach().clone().requires_grad_() for t in (x, codebook)]
        entropies = genperf.code_entropy(*leaves, **options)
        used = [(weight * value).sum() for weight, value in zip(weights, entropies, strict=True) if weight]
        results[name] = sum(used).detach()
        results[f"{name}.x.grad"], results[f"{name}.codebook.grad"] = torch.autograd.grad(sum(used), leaves)
    leaves = [t.detach().clone().requires_grad_() for t in (x, codebook)]
    options.pop("epsilon", None)
    loss = genperf.code_cross_entropy(*leaves, indices, **options)
    results["cross"] = loss.detach()
    results["cross.x.grad"], results["cross.codebook.grad"] = torch.autograd.grad(loss.sum(), leaves)
    return results


def assert_close(found, expected, rtol=1e-4, atol=1e-6):
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=atol, msg=lambda text, n=name: f"{n}: {text}")


def use_chunks(monkeypatch):
    """Compute small inputs in chunks too."""
    monkeypatch.setattr(_code_softmax, "MAX_SMALL", 0)


def plain_logits(x, codebook, logits):
    squared = (x.unsqueeze(-2) - codebook).square().sum(-1)
    return {"distance": -squared.clamp(min=1e-8).sqrt(), "squared_distance": -squared, "dot": x @ codebook.T}[logits]


@pytest.mark.parametrize("logits", LOGITS)
def test_equivalent_to_the_plain_lines(logits, device):
    x = torch.randn(50, 6, dtype=torch.float64, device=device, requires_grad=True)
    codebook = torch.randn(9, 6, dtype=torch.float64, device=device, requires_grad=True)
    indices = torch.randint(-1, 9, (50,), device=device)
    p = (plain_logits(x, codebook, logits) / 0.6).softmax(-1)
    mean = p.mean(0)
    expected = (
        -(p * p.log()).sum(-1).mean(),
        -(mean * mean.log()).sum(),
        F.cross_entropy(plain_logits(x, codebook, logits) / 0.6, indices, ignore_index=-1),
    )
    for impl in (None, "reference"):
        options = {"logits": logits, "temperature": 0.6, "impl": impl}
        found = (*genperf.code_entropy(x, codebook, **options), genperf.code_cross_entropy(x, codebook, indices, **options))
        for value, want in zip(found, expected, strict=True):
            torch.testing.assert_close(value, want)
            gradients = [torch.autograd.grad(out, (x, codebook), retain_graph=True) for out in (value, want)]
            for gradient, wanted in zip(*gradients, strict=True):
                torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize(
    ("kind", "dtype", "logits"),
    [
        *[("random", dtype, logits) for dtype in (torch.float32, torch.bfloat16) for logits in LOGITS],
        # Sanitizers see their memory accesses in the cases above. Of "offset", "dot" has logits of millions: all but one code have
        # probability 0.
        *[pytest.param("clustered", torch.float32, logits, marks=pytest.mark.unsanitized) for logits in LOGITS],
        *[pytest.param("offset", torch.float32, logits, marks=pytest.mark.unsanitized) for logits in LOGITS if logits != "dot"],
    ],
    ids=str,
)
def test_accuracy(kind, dtype, logits, device):
    """Mean squared over several draws, since the error of a single number in plain PyTorch may happen to be 0."""
    for n, k, d in SIZES:
        # High enough that 1 - p is not 0 in float64.
        apart = d**0.5 if kind == "clustered" else 1.0
        unit = {"distance": apart, "squared_distance": d, "dot": apart * d**0.5}[logits]
        for temperature in (0.2 * unit, 2.0 * unit):
            native, plain, exact = [], [], []
            for seed in range(4):
                x, codebook = testing.vectors(kind, n, k, d, dtype, device, seed)
                indices = torch.randint(k, (n,), device=device)
                options = {"logits": logits, "temperature": temperature}
                native.append(losses(x, codebook, indices, **options))
                plain.append(losses(x, codebook, indices, impl="reference", **options))
                exact.append(losses(x.double(), codebook.double(), indices, impl="reference", **options))
            for name in native[0]:
                rounding = torch.finfo(native[0][name].dtype).eps
                found, want, other = (torch.stack([draw[name] for draw in draws]).double() for draws in (native, exact, plain))
                budget = 2 * (other - want).norm() + rounding * want.norm()
                assert (found - want).norm() <= budget, (kind, n, k, d, temperature, name)
                assert native[0][name].dtype == plain[0][name].dtype


def test_accuracy_far_from_the_origin(device):
    """Where plain float32 is wrong by whole nats."""
    x, codebook = testing.vectors("offset", 200, 40, 8, torch.float32, device)
    indices = torch.randint(40, (200,), device=device)
    found = losses(x, codebook, indices)
    exact = losses(x.double(), codebook.double(), indices, impl="reference")
    for name, value in exact.items():
        torch.testing.assert_close(found[name].double(), value, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("cosine", [False, True])
def test_losses_of_vector_quantize_pytorch(cosine, device):
    """Upstream averages probabilities over the batch for each position of the sequence, and the loss over the positions."""
    peer = pytest.importorskip("vector_quantize_pytorch")
    layer = peer.VectorQuantize(
        6, 20, use_cosine_sim=cosine, codebook_diversity_loss_weight=1.0, commitment_use_cross_entropy_loss=True, freeze_codebook=True
    ).to(device)
    codebook = layer.codebook.detach().clone()
    for batch, places in ((60, 1), (15, 4)):
        x = torch.randn(batch, places, 6, device=device, requires_grad=True)
        _, indices, _, parts = layer(x, return_loss_breakdown=True)
        unit = F.normalize(x, dim=-1, eps=1e-6) if cosine else x
        options = {"logits": "dot" if cosine else "distance"}
        cross = genperf.code_cross_entropy(unit, codebook, indices, **options)
        options |= {"temperature": 1 / 100, "epsilon": 1e-5}
        if places == 1:
            _, entropy = genperf.code_entropy(unit, codebook, **options)
        else:
            _, entropy = genperf.code_entropy(unit.movedim(1, 0), codebook.expand(places, -1, -1), **options)
        for found, expected in ((cross, parts.commitment), (-entropy.mean(), parts.codebook_diversity)):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            gradients = [torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in (found, expected)]
            torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3 * gradients[1].abs().max().item())


@pytest.mark.once
@pytest.mark.parametrize("logits", LOGITS)
def test_derivatives(logits, device):
    x = torch.randn(2, 4, 2, dtype=torch.float64, device=device, requires_grad=True)
    codebook = torch.randn(2, 3, 2, dtype=torch.float64, device=device, requires_grad=True)
    indices = torch.tensor([[0, 2, -1, 1], [2, 2, 0, -1]], device=device)
    mask = indices != 1
    for check in (gradcheck, gradgradcheck):
        assert check(lambda x, c: genperf.code_entropy(x, c, logits=logits, temperature=0.8, mask=mask), (x, codebook))
        assert check(lambda x, c: genperf.code_cross_entropy(x, c, indices, logits=logits, temperature=0.8), (x, codebook))


@pytest.mark.parametrize("logits", LOGITS)
def test_kernels_agree_with_chunks_in_pytorch(logits, monkeypatch, device):
    """The kernel of small inputs, that of chunks, and the PyTorch code of float64 and CUDA, run in float32."""
    x, codebook = torch.randn(2, 40, 6, 3, device=device), torch.randn(2, 37, 6, device=device)
    indices, mask = torch.randint(-1, 37, (2, 40, 3), device=device), torch.rand(2, 40, 3, device=device) > 0.2
    options = {"logits": logits, "temperature": 0.5, "channel_dim": 2, "mask": mask}
    found = losses(x, codebook, indices, **options)
    torch.manual_seed(3)
    drawn = genperf.sample_code(x, codebook, **options)
    use_chunks(monkeypatch)
    for has_kernel in (_code_softmax_chunks._has_kernel, lambda products: False):
        monkeypatch.setattr(_code_softmax_chunks, "_has_kernel", has_kernel)
        assert_close(found, losses(x, codebook, indices, **options))
        torch.manual_seed(3)
        assert torch.equal(genperf.sample_code(x, codebook, **options), drawn)


@pytest.mark.parametrize("channel_dim", [1, 2])
def test_chunk_size_has_no_effect(channel_dim, monkeypatch, device):
    x, codebook = torch.randn(5, 24, 24, device=device), torch.randn(70, 24, device=device)
    indices = torch.randint(70, (5, 24), device=device)
    results = []
    use_chunks(monkeypatch)
    for rows in (120, 24, 7, 1):
        monkeypatch.setattr(_code_softmax_chunks, "_CHUNK", rows * 70)
        monkeypatch.setattr(_code_softmax_chunks, "_MIN_ROWS", 1)
        torch.manual_seed(5)
        drawn = genperf.sample_code(x, codebook, channel_dim=channel_dim)
        results.append((drawn, losses(x, codebook, indices, channel_dim=channel_dim)))
    for drawn, found in results[1:]:
        assert torch.equal(drawn, results[0][0])
        assert_close(found, results[0][1], atol=1e-7)


@pytest.mark.parametrize("logits", LOGITS)
def test_masked_vectors_are_excluded(logits, device):
    x, codebook = torch.randn(60, 5, device=device), torch.randn(40, 5, device=device)
    indices, mask = torch.randint(40, (60,), device=device), torch.rand(60, device=device) > 0.4
    expected = losses(x[mask], codebook, indices[mask], logits=logits)
    x[~mask] = math.nan
    for impl in (None, "reference"):
        found = losses(x, codebook, indices, logits=logits, mask=mask, impl=impl)
        for name, value in expected.items():
            if name.endswith("x.grad"):
                assert (found[name][~mask] == 0).all()
                value, found[name] = value, found[name][mask]
        assert_close(found, expected)
        # An index of -1 does the same.
        crossed = genperf.code_cross_entropy(x, codebook, indices.masked_fill(~mask, -1), logits=logits, impl=impl)
        torch.testing.assert_close(crossed, expected["cross"])
        assert (genperf.sample_code(x, codebook, logits=logits, mask=mask, impl=impl)[~mask] == -1).all()


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("size", [0, 3])
def test_without_vectors(size, impl, device):
    x, codebook = torch.randn(size, 4, 3, device=device), torch.randn(5, 4, device=device)
    indices = torch.full((size, 3), -1, device=device)
    mask = torch.zeros(size, 3, dtype=torch.bool, device=device)
    for given in (mask, None) if size == 0 else (mask,):
        for name, value in losses(x, codebook, indices, channel_dim=1, mask=given, impl=impl).items():
            assert (value == 0).all(), name
        assert genperf.sample_code(x, codebook, channel_dim=1, mask=given, impl=impl).tolist() == indices.tolist()


def test_heads_equal_single_calls(device):
    x, codebook = torch.randn(3, 4, 6, 5, device=device), torch.randn(3, 20, 6, device=device)
    indices, mask = torch.randint(-1, 20, (3, 4, 5), device=device), torch.rand(3, 4, 5, device=device) > 0.3
    entropies = genperf.code_entropy(x, codebook, channel_dim=2, mask=mask)
    cross = genperf.code_cross_entropy(x, codebook, indices, channel_dim=2, mask=mask)
    assert [t.shape for t in (*entropies, cross)] == [(3,)] * 3
    for head in range(3):
        options = {"channel_dim": 1, "mask": mask[head]}
        for found, expected in zip(entropies, genperf.code_entropy(x[head], codebook[head], **options), strict=True):
            assert torch.equal(found[head], expected)
        assert torch.equal(cross[head], genperf.code_cross_entropy(x[head], codebook[head], indices[head], **options))
    drawn = genperf.sample_code(x[:1].expand(3, -1, -1, -1), codebook[:1].expand(3, -1, -1), channel_dim=2, temperature=9.0)
    assert not torch.equal(drawn[0], drawn[1]), "heads share their noise"


def test_layouts_agree(device):
    x, codebook = testing.vectors("random", 64, 40, 33, torch.float32, device)
    indices = torch.randint(40, (64,), device=device)
    expected = losses(x, codebook, indices)
    torch.manual_seed(1)
    drawn = genperf.sample_code(x, codebook, temperature=3.0)
    for name, (laid_out, channel_dim) in testing.layouts(x).items():
        shape = list(laid_out.shape)
        shape.pop(channel_dim)
        found = losses(laid_out, codebook, indices.reshape(shape), channel_dim=channel_dim)
        for key, value in found.items():
            value = value.movedim(channel_dim, -1).reshape(64, 33) if key.endswith("x.grad") else value
            torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-6, msg=lambda text, n=name, k=key: f"{n} {k}: {text}")
        torch.manual_seed(1)
        assert torch.equal(genperf.sample_code(laid_out, codebook, temperature=3.0, channel_dim=channel_dim).flatten(), drawn), name


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("logits", LOGITS)
def test_vectors_equal_to_codes(logits, dtype, impl, device):
    """The derivative of the distance is infinite there, and the other codes have probability 0."""
    codebook = 30 * torch.randn(40, 8, dtype=dtype, device=device)
    codebook[20:] = codebook[:20]
    x, indices = codebook[:30].clone(), torch.randint(40, (30,), device=device)
    for temperature in (1.0, 0.01, 1e-30):
        found = losses(x, codebook, indices, logits=logits, temperature=temperature, impl=impl)
        for name, value in found.items():
            assert value.isnan().sum() == 0, (name, temperature)
            if not name.startswith("cross") and temperature == 1:
                assert value.isfinite().all(), name
    if logits != "dot":
        sample, batch = genperf.code_entropy(x, codebook, logits=logits, temperature=0.01, impl=impl)
        torch.testing.assert_close(sample, torch.tensor(math.log(2), dtype=dtype, device=device), rtol=1e-3, atol=1e-3)
        assert math.log(20) < batch < math.log(40)


def test_nan_propagates_to_every_loss(device):
    x, codebook = torch.randn(20, 5, device=device), torch.randn(9, 5, device=device)
    x[3, 2] = math.nan
    for impl in (None, "reference"):
        found = losses(x, codebook, torch.zeros(20, dtype=torch.int64, device=device), impl=impl)
        assert all(found[name].isnan() for name in ("sample", "batch", "cross"))


def test_one_code(device):
    found = losses(torch.randn(5, 3, device=device), torch.randn(1, 3, device=device), torch.zeros(5, dtype=torch.int64, device=device))
    assert all((value.abs() < 1e-6).all() for value in found.values())


def test_frozen_inputs(device):
    x, codebook = torch.randn(30, 5, device=device), torch.randn(9, 5, device=device)
    indices = torch.randint(9, (30,), device=device)
    both = losses(x, codebook, indices)
    for frozen, name in ((1, "x.grad"), (0, "codebook.grad")):
        inputs = [x.clone(), codebook.clone()]
        leaf = inputs[1 - frozen].requires_grad_()
        sample, batch = genperf.code_entropy(*inputs)
        assert torch.equal(torch.autograd.grad(2 * sample - 3 * batch, leaf)[0], both[f"both.{name}"])
    assert not genperf.code_entropy(x, codebook)[0].requires_grad


def test_reduced_matmul_precision_has_no_effect(device):
    x, codebook = torch.randn(300, 40, device=device), torch.randn(200, 40, device=device)
    indices = torch.randint(200, (300,), device=device)
    expected = losses(x, codebook, indices)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast(device, torch.bfloat16):
            found = losses(x, codebook, indices)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_runs_are_bitwise_equal(device):
    x, codebook = torch.randn(500, 12, device=device), torch.randn(300, 12, device=device)
    indices = torch.randint(300, (500,), device=device)
    first, second = (losses(x, codebook, indices) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(second[name], value), name


def test_memory_does_not_grow_with_the_number_of_vectors(monkeypatch, device):
    if device != "cpu":
        pytest.skip("the profiler counts the allocations of the CPU")
    monkeypatch.setattr(_code_softmax_chunks, "_CHUNK", 1 << 14)
    x, codebook = torch.randn(1 << 11, 8, requires_grad=True), torch.randn(1 << 9, 8, requires_grad=True)
    step = lambda: genperf.code_entropy(x, codebook)  # noqa: E731
    assert testing.saved_bytes(step) < 2 * x.numel() * 4
    assert testing.largest_allocation(lambda: torch.autograd.grad(sum(step()), (x, codebook))) <= 4 * (x.numel() + codebook.numel())


def chi_square(indices, p):
    expected = p * indices.numel()
    return ((torch.bincount(indices.flatten(), minlength=len(p)) - expected).square() / expected).sum().item()


@pytest.mark.unsanitized
@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("logits", LOGITS)
def test_samples_follow_the_softmax(logits, impl, device):
    codebook = torch.randn(37, 4, dtype=torch.float64, device=device)
    x = torch.randn(4, dtype=torch.float64, device=device)
    for temperature in (0.9, 3.0, 1e30):
        p = (plain_logits(x, codebook, logits) / temperature).softmax(-1)
        drawn = genperf.sample_code(x.float().expand(20000, 4), codebook.float(), logits=logits, temperature=temperature, impl=impl)
        common = p > 1e-3
        # 36 degrees of freedom at most: above 90 with a probability of 2e-6.
        assert chi_square(common.cumsum(0)[drawn[common[drawn]]] - 1, p[common] / p[common].sum()) < 90


def test_noise_equals_the_reference(device):
    x, codebook = torch.randn(50, 3, device=device), torch.randn(5000, 3, device=device)
    torch.manual_seed(2)
    drawn = genperf.sample_code(x, codebook, temperature=0.7)
    torch.manual_seed(2)
    seed = torch.randint(torch.iinfo(torch.int64).max, (), dtype=torch.int64, device=device)
    noise = gumbel_noise(seed, 50, 5000, torch.float64)
    perturbed = plain_logits(x.double(), codebook.double(), "distance") + 0.7 * noise
    best = perturbed.max(-1).values
    assert (best - perturbed.gather(1, drawn.unsqueeze(1)).squeeze(1)).max() < 1e-4


def test_samples_depend_on_the_generator(device):
    x, codebook = torch.randn(2, 60, 4, device=device), torch.randn(2, 50, 4, device=device)
    testing.check_randomness(lambda generator: genperf.sample_code(x, codebook, generator=generator), device)


@pytest.mark.parametrize("heads", [False, True])
def test_parts_of_a_batch_draw_the_noise_of_the_batch(heads, device):
    x, codebook = torch.randn(1, 8, 5, 4, device=device), torch.randn(1, 50, 4, device=device)
    x, codebook = (x.expand(2, -1, -1, -1), codebook.expand(2, -1, -1)) if heads else (x[0], codebook[0])
    torch.manual_seed(4)
    whole = genperf.sample_code(x, codebook, temperature=5.0)
    batch = 1 if heads else 0
    shares = []
    for first, share in zip((0, 3), x.split([3, 5], batch), strict=True):
        torch.manual_seed(4)
        with genperf.sample_offset(first):
            shares.append(genperf.sample_code(share, codebook, temperature=5.0))
    assert torch.equal(torch.cat(shares, batch), whole)


@pytest.mark.parametrize("impl", [None, "reference"])
def test_temperature_zero_gives_the_best_code(impl, device):
    x, codebook = torch.randn(3, 60, 4, device=device), torch.randn(3, 50, 4, device=device)
    for logits in ("distance", "squared_distance"):
        found = genperf.sample_code(x, codebook, temperature=0, logits=logits, impl=impl)
        assert torch.equal(found, genperf.nearest_code(x, codebook))
    found = genperf.sample_code(x, codebook, temperature=0, logits="dot", impl=impl)
    assert torch.equal(found, (x.double() @ codebook.double().mT).argmax(-1))
    tiny = genperf.sample_code(x, codebook, temperature=1e-30, logits="dot", impl=impl)
    assert torch.equal(tiny, found)


@pytest.mark.parametrize("kernel", ["small", "rows", "none"])
def test_nan_is_never_chosen(kernel, monkeypatch, device):
    if kernel != "small":
        use_chunks(monkeypatch)
    if kernel == "none":
        monkeypatch.setattr(_code_softmax_chunks, "_has_kernel", lambda products: False)
    x, codebook = torch.randn(20, 4, device=device), torch.randn(50, 4, device=device)
    x[2, 1] = math.nan
    found = genperf.sample_code(x, codebook, logits="dot")
    assert found[2] == 0
    codebook[7] = math.nan
    for _ in range(20):
        assert 7 not in genperf.sample_code(x[3:], codebook, logits="dot")


@pytest.mark.once
@pytest.mark.parametrize("with_indices", [False, True])
def test_contract_of_the_ops(with_indices, device):
    x = torch.randn(2, 3, 4, 5, device=device)
    codebook = torch.randn(2, 9, 4, device=device)
    indices = torch.randint(-1, 9, (2, 3, 5), device=device) if with_indices else None
    mask = None if with_indices else torch.rand(2, 3, 5, device=device) > 0.3
    arguments = (x, codebook, mask, indices, "distance", 0.5, 1e-3)
    mean, entropy, usage, statistics = torch.ops.genperf.code_softmax(*arguments)
    testing.check_op("code_softmax", [arguments])
    gradients = torch.randn_like(mean), None if with_indices else torch.randn_like(entropy)
    backward = (*gradients, x, codebook, mask, indices, usage, statistics, "distance", 0.5, 1e-3)
    testing.check_op("code_softmax_backward", [(*backward, True, True), (*backward, False, False)])
    if device == "cpu":
        arguments = (*arguments[:4], 0, 0.5, 1e-3, 2)
        _, _, usage, statistics = torch.ops.genperf.small_code_softmax(*arguments)
        testing.check_op("small_code_softmax", [arguments])
        backward = (*gradients, *arguments[:4], usage, statistics, *arguments[4:])
        testing.check_op("small_code_softmax_backward", [(*backward, True, True), (*backward, False, False)])
        testing.check_op("small_sample_code", [(x, codebook, mask, torch.tensor(7), 3, 1, 0.5, 2)])
    seed = torch.tensor(7, device=device)
    testing.check_op("sample_code", [(x, codebook, mask, seed, 3, "squared_distance", 0.5), (x, codebook, mask, None, 0, "dot", 0.0)])


@pytest.mark.once
def test_compile(device):
    def step(x, codebook, indices):
        sample, batch = genperf.code_entropy(x, codebook, temperature=0.5, mask=indices >= 0)
        return sample, batch, genperf.code_cross_entropy(x, codebook, indices, logits="dot")

    # Without code generation, since opaque ops leave nothing to fuse.
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (31, 12, 31):
        x, codebook = torch.randn(n, 5, device=device, requires_grad=True), torch.randn(9, 5, device=device, requires_grad=True)
        indices = torch.arange(n, device=device) % 10 - 1
        results = [call(x, codebook, indices) for call in (compiled, step)]
        results = [(*outputs, *torch.autograd.grad(sum(outputs), (x, codebook))) for outputs in results]
        torch.testing.assert_close(*results)
    x, codebook = x.detach(), codebook.detach()
    compiled = torch.compile(lambda x: genperf.sample_code(x, codebook, temperature=0.5), fullgraph=True, backend="aot_eager")
    torch.manual_seed(2)
    expected = genperf.sample_code(x, codebook, temperature=0.5)
    torch.manual_seed(2)
    assert torch.equal(compiled(x), expected)


GOOD = torch.zeros(3, 4), torch.zeros(5, 4)


@pytest.mark.parametrize(
    ("message", "error", "options"),
    [
        ("logits must be one of distance, squared_distance, dot, got 'cosine'", ValueError, {"logits": "cosine"}),
        ("temperature must not be negative, got -1", ValueError, {"temperature": -1}),
        ("temperature must not be negative, got nan", ValueError, {"temperature": math.nan}),
        ("mask must be bool, got torch.float32", TypeError, {"mask": torch.zeros(3)}),
        ("mask must have the shape of x without", ValueError, {"mask": torch.ones(4, dtype=torch.bool)}),
        ("channel_dim must be a dimension of x", ValueError, {"channel_dim": 2}),
        ("impl='triton' cannot run here", NotImplementedError, {"impl": "triton"}),
    ],
)
def test_bad_options(message, error, options):
    indices = torch.zeros(3, dtype=torch.int64)
    for op, arguments in (("code_entropy", ()), ("code_cross_entropy", (indices,)), ("sample_code", ())):
        with pytest.raises(error, match=f"{op}: .*{message}"):
            getattr(genperf, op)(*GOOD, *arguments, **options)


def test_bad_input_of_one_op():
    indices = torch.zeros(3, dtype=torch.int64)
    for call, message, error in (
        (lambda: genperf.code_entropy(*GOOD, temperature=0), "temperature must be positive, got 0", ValueError),
        (lambda: genperf.code_entropy(*GOOD, epsilon=-1), r"epsilon must lie in \[0, 1\), got -1", ValueError),
        (lambda: genperf.code_cross_entropy(*GOOD, indices, temperature=0.0), "temperature must be positive", ValueError),
        (lambda: genperf.code_cross_entropy(*GOOD, indices[:2]), "indices must have the shape of x", ValueError),
        (lambda: genperf.code_cross_entropy(*GOOD, indices.int()), "indices must be int64, got torch.int32", TypeError),
        (lambda: genperf.code_cross_entropy(*GOOD, indices + 5), "indices must lie between -1 and 4, got 5", IndexError),
        (lambda: genperf.sample_code(*GOOD, generator=3), "generator must be a torch.Generator or None, got int", TypeError),
    ):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("first", ["tf32", "ieee", "none"])
def test_inherited_precision_stays_inherited(first):
    backends, matmul = torch.backends, torch.backends.cuda.matmul
    before, matmul_before = backends.fp32_precision, matmul.fp32_precision
    try:
        backends.fp32_precision, matmul.fp32_precision = first, "none"
        genperf.code_entropy(torch.randn(4, 3), torch.randn(5, 3))
        genperf.lookup_free_entropy(torch.randn(4, 3))
        backends.fp32_precision = "tf32" if first == "ieee" else "ieee"
        assert matmul.fp32_precision == backends.fp32_precision
        matmul.fp32_precision = first
        genperf.code_entropy(torch.randn(4, 3), torch.randn(5, 3))
        assert matmul.fp32_precision == (first if first != "none" else backends.fp32_precision)
    finally:
        backends.fp32_precision, matmul.fp32_precision = before, matmul_before
