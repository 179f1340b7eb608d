# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
import torch.nn.functional as F

import genperf
from genperf import testing

pytestmark = pytest.mark.compiled

# Shape and dimension of the categories; enough positions that the largest error of plain PyTorch is not small by chance.
SHAPES = [((37, 31), -1), ((5, 33, 7), 1), ((3, 9, 5, 4), 1), ((20, 3, 5, 3, 1), 1), ((2, 3, 4, 5, 7), -1), ((1000,), 0), ((9, 1000), 1)]


def sample(logits, codebook=None, *, seed=5, impl=None, **options):
    """Outputs and gradients of a loss with a weight for every output element; inputs keep their layout."""
    leaves = [t.detach().requires_grad_() for t in (logits, codebook) if t is not None]
    torch.manual_seed(seed)
    drawn, indices, kl = genperf.gumbel_sample(*leaves, impl=impl, **options)
    # Multiples of 1/64, which are exact in every dtype.
    weight = torch.linspace(-64, 64, drawn.numel(), device=drawn.device).round().div(64).reshape(drawn.shape).to(drawn.dtype)
    kl_weight = torch.linspace(0.5, 2, kl.numel(), device=kl.device).reshape(kl.shape).to(kl.dtype)
    gradients = torch.autograd.grad((drawn * weight).sum() + (kl * kl_weight).sum(), leaves)
    result = {"sample": drawn.detach(), "indices": indices, "kl": kl.detach(), "logits.grad": gradients[0]}
    return result if codebook is None else {**result, "codebook.grad": gradients[1]}


def assert_matches(logits, codebook=None, noise=None, **options):
    """The native error against float64 is at most twice that of the reference in the inputs' dtype."""
    native = sample(logits, codebook, noise=noise, **options)
    plain = sample(logits, codebook, noise=noise, impl="reference", **options)
    logits64, codebook64, noise64 = (None if t is None else t.double() for t in (logits, codebook, noise))
    exact = sample(logits64, codebook64, noise=noise64, impl="reference", **options)
    assert torch.equal(native["indices"], exact["indices"])
    for name in native:
        if name != "indices":
            testing.assert_accurate(f"{name} {list(logits.shape)} {options}", native[name], exact[name], plain[name])


def codes(logits, dim, dtype=None, size=6):
    return torch.randn(logits.shape[dim], size, device=logits.device).to(dtype or logits.dtype)


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_accuracy(dtype, hard, device):
    for shape, dim in SHAPES:
        logits = (2 * torch.randn(shape, device=device)).to(dtype)
        for tau in (0.3, 1.0):
            assert_matches(logits, dim=dim, tau=tau, hard=hard)
        assert_matches(logits, dim=dim, hard=hard, noise=torch.randn(shape, device=device))


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_accuracy_with_a_codebook(dtype, hard, device):
    for shape, dim in SHAPES:
        logits = (2 * torch.randn(shape, device=device)).to(dtype)
        assert_matches(logits, codes(logits, dim), dim=dim, hard=hard)


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_float32_codebook_with_half_logits(hard, device):
    logits = torch.randn(40, 9, device=device).bfloat16()
    codebook = codes(logits, 1, torch.float32)
    result = sample(logits, codebook, hard=hard)
    assert result["sample"].dtype == torch.bfloat16
    assert result["codebook.grad"].dtype == torch.float32
    assert_matches(logits, codebook, hard=hard)


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_hard_samples_are_bitwise_one_hot(dtype, impl, device):
    for shape, dim in SHAPES:
        logits = torch.randn(shape, device=device).to(dtype).requires_grad_()
        drawn, indices, _ = genperf.gumbel_sample(logits, dim=dim, hard=True, impl=impl)
        assert drawn.dtype == dtype
        assert torch.equal(drawn.movedim(dim, -1), F.one_hot(indices, shape[dim]).to(dtype))


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_hard_codes_are_bitwise_codes(dtype, device):
    for shape, dim in SHAPES:
        logits = torch.randn(shape, device=device).to(dtype)
        codebook = codes(logits, dim)
        drawn, indices, _ = genperf.gumbel_sample(logits, codebook, dim=dim, hard=True)
        assert torch.equal(drawn.movedim(dim, -1), codebook[indices])


def test_a_codebook_multiplies_the_sample(device):
    logits = torch.randn(3, 9, 5, 4, device=device)
    codebook = codes(logits, 1)
    for hard in (False, True):
        with_codes = sample(logits, codebook, dim=1, hard=hard)
        without = sample(logits, dim=1, hard=hard)
        torch.testing.assert_close(with_codes["sample"], torch.einsum("bkhw,kd->bdhw", without["sample"], codebook))
        assert torch.equal(with_codes["indices"], without["indices"])
        assert torch.equal(with_codes["kl"], without["kl"])


@pytest.mark.parametrize("impl", [None, "reference"])
def test_hard_samples_have_the_gradient_of_soft_ones(impl, device):
    logits = torch.randn(3, 9, 5, device=device)
    soft, hard = (sample(logits, dim=1, tau=0.7, hard=hard, impl=impl)["logits.grad"] for hard in (False, True))
    torch.testing.assert_close(soft, hard, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_equivalent_to_the_plain_lines(hard, device):
    logits = torch.randn(6, 9, dtype=torch.float64, device=device, requires_grad=True)
    codebook = codes(logits, 1).requires_grad_()
    noise = -torch.empty_like(logits).exponential_().log()
    perturbed = logits + noise
    soft = (perturbed / 0.6).softmax(-1)
    indices = perturbed.argmax(-1)
    plain = F.one_hot(indices, 9) - soft.detach() + soft if hard else soft
    q = logits.softmax(-1)
    expected = (plain @ codebook, indices, (q * (q * 9).log()).sum(-1))
    found = genperf.gumbel_sample(logits, codebook, tau=0.6, hard=hard, noise=noise)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    for output in (0, 2):
        upstream = torch.randn_like(expected[output])
        both = [torch.autograd.grad(out[output], (logits, codebook), upstream, allow_unused=True) for out in (found, expected)]
        for a, b in zip(*both, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(7, 9), (3, 9, 5), (2, 9, 4, 5), (2, 9, 2, 3, 5)], ids=str)
def test_layouts_agree(shape, device):
    logits, noise = torch.randn(2, *shape, device=device)
    for with_codes in (False, True):
        codebook = codes(logits, 1) if with_codes else None
        for hard in (False, True):
            expected = sample(logits, codebook, dim=1, hard=hard)
            given = sample(logits, codebook, dim=1, hard=hard, noise=noise)
            for (name, laid_out), laid_noise in zip(testing.strided(logits).items(), testing.strided(noise).values(), strict=True):
                found = sample(laid_out, codebook, dim=1, hard=hard)
                found_given = sample(laid_out, codebook, dim=1, hard=hard, noise=laid_noise)
                for result, target in ((found, expected), (found_given, given)):
                    for key, value in result.items():
                        torch.testing.assert_close(
                            value, target[key], rtol=1e-5, atol=2e-6, msg=lambda text, n=name, k=key: f"{n} {k}: {text}"
                        )


def test_every_dimension_agrees(device):
    """The noise of a position depends on the order of the positions, not on where its categories are in memory."""
    logits = torch.randn(6, 5, 9, device=device)
    expected = sample(logits)
    for dim in (0, 1, -1):
        found = sample(logits.movedim(-1, dim).contiguous(), dim=dim)
        assert torch.equal(found["indices"], expected["indices"])
        torch.testing.assert_close(found["kl"], expected["kl"])
        torch.testing.assert_close(found["sample"].movedim(dim, -1), expected["sample"], rtol=1e-5, atol=1e-6)


def test_memory_format_is_kept(device):
    logits = torch.randn(2, 16, 6, 5, device=device).to(memory_format=torch.channels_last)
    for codebook in (None, torch.randn(16, 8, device=device)):
        for hard in (False, True):
            drawn, _, _ = genperf.gumbel_sample(logits, codebook, dim=1, hard=hard)
            assert drawn.is_contiguous(memory_format=torch.channels_last)


def test_expanded_logits(device):
    logits = torch.randn(1, 9, 1, device=device).expand(4, 9, 5)
    expected = sample(logits.contiguous(), dim=1)
    assert len(expected["indices"].unique()) > 1  # every position has its own noise
    for name, value in sample(logits, dim=1).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", [None, "reference"])
def test_the_lowest_index_wins_ties(impl, device):
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0], [3.0, 3.0, 3.0, 3.0], [0.0, 0.0, 0.0, 1.0]], device=device)
    for classes in (4, 400):
        wide = torch.cat([logits, logits[:, :1].expand(3, classes - 4) - 1], 1)
        _, indices, _ = genperf.gumbel_sample(wide, noise=torch.zeros_like(wide), impl=impl)
        assert indices.tolist() == [1, 0, 3]


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("tau", [0.0, torch.tensor(0.0), torch.tensor([0.0]), torch.tensor(-1.0), torch.tensor(math.nan)], ids=str)
def test_at_temperature_zero_samples_are_one_hot(tau, impl, device):
    logits = torch.randn(6, 9, device=device)
    tau = tau.to(device) if isinstance(tau, torch.Tensor) else tau
    for hard in (False, True):
        for codebook in (None, codes(logits, 1)):
            found = sample(logits, codebook, tau=tau, hard=hard, impl=impl)
            one_hot = F.one_hot(found["indices"], 9).float()
            torch.testing.assert_close(found["sample"], one_hot if codebook is None else one_hot @ codebook)
            # Only the gradient of the KL remains.
            leaf = logits.detach().requires_grad_()
            kl = genperf.gumbel_sample(leaf)[2]
            expected = torch.autograd.grad(kl, leaf, torch.linspace(0.5, 2, 6, device=device))[0]
            torch.testing.assert_close(found["logits.grad"], expected)


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("dtype", [*testing.DTYPES, torch.float64], ids=str)
def test_tiny_temperatures_stay_finite(dtype, impl, device):
    if impl is None and dtype == torch.float64:
        impl = "reference"
    logits = torch.randn(6, 9, device=device).to(dtype)
    for tau in (1e-38, 1e-30, 1e-6, torch.tensor(1e-38, device=device)):
        found = sample(logits, tau=tau, impl=impl)
        assert torch.equal(found["sample"], F.one_hot(found["indices"], 9).to(dtype))
        assert found["logits.grad"].isfinite().all()


def test_temperature_as_a_tensor(device):
    logits = torch.randn(6, 9, device=device)
    expected = sample(logits, tau=0.7)
    for tau in (torch.tensor(0.7), torch.tensor([0.7]), torch.tensor([[0.7]], dtype=torch.float64)):
        for name, value in sample(logits, tau=tau.to(device)).items():
            torch.testing.assert_close(value, expected[name])
    with pytest.raises(NotImplementedError, match="tau requires a gradient"):
        genperf.gumbel_sample(logits, tau=torch.tensor(0.7, device=device, requires_grad=True), impl="native")
    tau = torch.tensor(0.7, dtype=torch.float64, device=device, requires_grad=True)
    noise = torch.randn(6, 9, dtype=torch.float64, device=device)
    drawn, _, _ = genperf.gumbel_sample(logits.double(), tau=tau, noise=noise)
    step = 1e-5
    ahead, behind = (genperf.gumbel_sample(logits.double(), tau=0.7 + d, noise=noise)[0] for d in (step, -step))
    weight = torch.randn_like(drawn)
    slope = ((ahead - behind) / (2 * step) * weight).sum()
    torch.testing.assert_close(torch.autograd.grad(drawn, tau, weight)[0], slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_never_nan(dtype, impl, device):
    rows = [[60000.0, -60000.0, 0.0, 59000.0], [60000.0] * 4, [-60000.0] * 4, [1.0, 2.0, -60000.0, 3.0]]
    logits = torch.tensor(rows, device=device).to(dtype)
    for codebook in (None, torch.randn(4, 3, device=device).to(dtype)):
        for hard in (False, True):
            for tau in (1.0, 1e-4, 0.0):
                for name, value in sample(logits, codebook, hard=hard, tau=tau, impl=impl).items():
                    assert value.isfinite().all(), name


@pytest.mark.parametrize("impl", [None, "reference"])
def test_minus_infinity_excludes_a_category(impl, device):
    logits = torch.randn(200, 8, device=device)
    logits[:, [1, 4, 5]] = -math.inf
    kept = [0, 2, 3, 6, 7]
    for hard in (False, True):
        found = sample(logits, hard=hard, impl=impl)
        assert set(found["indices"].tolist()) <= set(kept)
        assert (found["sample"][:, [1, 4, 5]] == 0).all()
        assert (found["logits.grad"][:, [1, 4, 5]] == 0).all()
        assert found["logits.grad"].isfinite().all()
        # The KL is to the uniform distribution over all eight categories.
        expected = sample(logits[:, kept].contiguous(), impl=impl)["kl"] + math.log(8 / 5)
        torch.testing.assert_close(found["kl"], expected)


@pytest.mark.parametrize("impl", [None, "reference"])
def test_nonfinite_values_stay_at_their_position(impl, device):
    logits, noise = torch.randn(2, 6, 9, 4, device=device)
    clean = sample(logits, dim=1, noise=noise, impl=impl)
    logits[2, 3, 1] = math.nan
    logits[4, :, 2] = -math.inf
    bad = torch.zeros(6, 4, dtype=torch.bool, device=device)
    bad[2, 1] = bad[4, 2] = True
    found = sample(logits, dim=1, noise=noise, impl=impl)
    assert torch.equal(found["kl"].isnan(), bad)
    assert ((found["indices"] >= 0) & (found["indices"] < 9)).all()
    for name, value in found.items():
        value, expected = (t if t.dim() == 2 else t.movedim(1, -1) for t in (value, clean[name]))
        assert torch.equal(value[~bad], expected[~bad]), name
    # Indices stay within bounds for any logits.
    assert genperf.gumbel_sample(logits, torch.randn(9, 3, device=device), dim=1, hard=True, impl=impl)[0].isfinite().all()


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize(("shape", "dim"), [((0, 4), 1), ((0, 4, 3, 3), 1), ((3, 4, 0), 1), ((0, 4, 3), 2), ((4, 0), 0)], ids=str)
def test_empty(shape, dim, impl, device):
    logits = torch.empty(shape, device=device)
    for codebook in (None, torch.randn(shape[dim], 5, device=device)):
        for hard in (False, True):
            found = sample(logits, codebook, dim=dim, hard=hard, impl=impl)
            assert found["logits.grad"].shape == shape
            assert found["indices"].shape == found["kl"].shape == (*shape[:dim], *shape[dim + 1 :])
            if codebook is not None:
                assert found["sample"].shape == (*shape[:dim], 5, *shape[dim + 1 :])
                assert (found["codebook.grad"] == 0).all()


def test_one_category(device):
    found = sample(torch.randn(5, 1, device=device))
    assert (found["sample"] == 1).all()
    assert (found["indices"] == 0).all()
    assert (found["kl"] == 0).all()
    assert (found["logits.grad"] == 0).all()


def test_unused_outputs_and_frozen_inputs(device):
    logits = torch.randn(4, 6, 3, device=device)
    for hard in (False, True):
        for codebook in (None, codes(logits, 1)):
            whole = sample(logits, codebook, dim=1, hard=hard)
            leaf = logits.detach().requires_grad_()
            parts = []
            for output in (0, 2):
                torch.manual_seed(5)
                out = genperf.gumbel_sample(leaf, codebook, dim=1, hard=hard)[output]
                if output == 0:
                    weight = torch.linspace(-64, 64, out.numel(), device=device).round().div(64).reshape(out.shape)
                else:
                    weight = torch.linspace(0.5, 2, 12, device=device).view(4, 3)
                parts.append(torch.autograd.grad(out, leaf, weight)[0])
            torch.testing.assert_close(parts[0] + parts[1], whole["logits.grad"])
    codebook = codes(logits, 1)
    learning = codebook.detach().requires_grad_()
    for hard in (False, True):
        torch.manual_seed(5)
        drawn, _, kl = genperf.gumbel_sample(logits, learning, dim=1, hard=hard)
        weight = torch.linspace(-64, 64, drawn.numel(), device=device).round().div(64).reshape(drawn.shape)
        (gradient,) = torch.autograd.grad(drawn, learning, weight, retain_graph=True)
        torch.testing.assert_close(gradient, sample(logits, codebook, dim=1, hard=hard)["codebook.grad"])
        assert torch.autograd.grad(kl.sum(), learning, allow_unused=True) == (None,)
    assert not genperf.gumbel_sample(logits, codebook, dim=1)[0].requires_grad
    with torch.no_grad():
        assert not genperf.gumbel_sample(logits, learning, dim=1)[0].requires_grad


def test_output_gradients_of_any_strides(device):
    logits = torch.randn(2, 9, 4, 5, device=device).requires_grad_()
    codebook = torch.randn(9, 7, device=device).requires_grad_()
    for arguments, width in (((logits,), 9), ((logits, codebook), 7)):
        for hard in (False, True):
            for upstream in (
                torch.ones((), device=device).expand(2, width, 4, 5),
                torch.randn(2, 1, 1, 5, device=device).expand(2, width, 4, 5),
                *testing.strided(torch.randn(2, width, 4, 5, device=device)).values(),
            ):
                results = []
                for gradient in (upstream, upstream.contiguous()):
                    torch.manual_seed(5)
                    drawn, _, kl = genperf.gumbel_sample(*arguments, dim=1, hard=hard)
                    grad_kl = torch.full((), 2.0, device=device).expand(2, 4, 5)
                    results.append(torch.autograd.grad((drawn, kl), arguments, (gradient, grad_kl)))
                for a, b in zip(*results, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.once
@pytest.mark.parametrize("with_codes", [False, True], ids=["probabilities", "codes"])
def test_derivatives_of_both_orders(with_codes, device):
    logits = torch.randn(3, 4, 2, dtype=torch.float64, device=device, requires_grad=True)
    noise = torch.randn(3, 4, 2, dtype=torch.float64, device=device)
    codebook = [torch.randn(4, 3, dtype=torch.float64, device=device, requires_grad=True)] if with_codes else []

    def function(logits, *codebook):
        drawn, _, kl = genperf.gumbel_sample(logits, *codebook, dim=1, noise=noise, tau=0.8)
        return drawn, kl

    assert torch.autograd.gradcheck(function, (logits, *codebook))
    assert torch.autograd.gradgradcheck(function, (logits, *codebook))


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("with_codes", [False, True], ids=["probabilities", "codes"])
def test_second_derivatives_of_the_kernels(with_codes, hard, device):
    """create_graph=True through the compiled forward, compared with the reference."""
    logits = torch.randn(3, 5, 4, device=device, requires_grad=True)
    inputs = (logits, torch.randn(5, 6, device=device, requires_grad=True)) if with_codes else (logits,)
    results = []
    for impl in (None, "reference"):
        torch.manual_seed(5)
        drawn, _, kl = genperf.gumbel_sample(*inputs, dim=1, tau=0.8, hard=hard, impl=impl)
        slopes = torch.autograd.grad(drawn.sin().sum() + kl.square().sum(), inputs, create_graph=True)
        results.append(torch.autograd.grad(sum(slope.square().sum() for slope in slopes), inputs))
    for native, reference in zip(*results, strict=True):
        torch.testing.assert_close(native, reference, rtol=1e-4, atol=1e-5)


def test_functional_gradient(device):
    logits, noise = torch.randn(2, 4, 6, device=device)

    def loss(logits):
        drawn, _, kl = genperf.gumbel_sample(logits, noise=noise)
        return drawn.square().sum() + kl.sum()

    leaf = logits.detach().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(logits), torch.autograd.grad(loss(leaf), leaf)[0])


def test_randomness(device):
    logits = torch.randn(3, 6, 5, device=device)
    testing.check_randomness(lambda generator: genperf.gumbel_sample(logits, dim=1, generator=generator)[0], device)

    def loss(logits, codebook, hard=False):
        drawn, _, kl = genperf.gumbel_sample(logits * 2, codebook, dim=1, hard=hard)
        return drawn.square().sum() + kl.sum()

    testing.check_checkpoint(loss, logits, codes(logits, 1))
    testing.check_checkpoint(lambda *inputs: loss(*inputs, hard=True), logits, codes(logits, 1))


def test_bitwise_equal_for_any_number_of_threads(device, set_threads):
    logits = torch.randn(7, 9, 65, device=device)
    codebook = codes(logits, 1)
    for hard in (False, True):
        set_threads(1)
        expected = sample(logits, codebook, dim=1, hard=hard)
        for count in (2, 3):
            set_threads(count)
            for name, value in sample(logits, codebook, dim=1, hard=hard).items():
                # Products of soft samples with codes are computed by the BLAS library.
                if hard or "codebook" not in name:
                    torch.testing.assert_close(value, expected[name], rtol=0 if hard else 1e-5, atol=0 if hard else 1e-5)


def test_cuda_graph(device):
    if device == "cpu":
        pytest.skip("CUDA graphs need a GPU")
    logits, tau = torch.randn(3, 6, 5, device=device), torch.tensor(0.5, device=device)
    testing.check_cuda_graph(lambda: genperf.gumbel_sample(logits, tau=tau)[0])


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_only_the_logits_a_seed_and_little_per_position_are_saved(dtype, device):
    """The logits, a seed, four floats and one index for each position, and the codebook."""
    logits = torch.randn(2, 64, 5, 3, device=device).to(dtype).requires_grad_()
    codebook = torch.randn(64, 8, device=device).to(dtype).requires_grad_()
    expected = logits.numel() * logits.element_size() + 8 + 30 * (4 * 4 + 8)
    for hard in (False, True):
        assert testing.saved_bytes(lambda hard=hard: genperf.gumbel_sample(logits, dim=1, hard=hard)) <= expected
        with_codes = testing.saved_bytes(lambda hard=hard: genperf.gumbel_sample(logits, codebook, dim=1, hard=hard))
        assert with_codes <= expected + codebook.numel() * codebook.element_size()


def test_hard_codes_allocate_no_copy_of_the_logits(device):
    """Forward and backward allocate the logits' gradient and nothing else as large."""
    if device != "cpu":
        pytest.skip("the profiler's allocation events are read on the CPU")
    logits = torch.randn(2, 2048, 64, requires_grad=True)
    codebook = torch.randn(2048, 4, requires_grad=True)
    forward = testing.largest_allocation(lambda: genperf.gumbel_sample(logits, codebook, dim=1, hard=True))
    assert forward < logits.numel()


def test_poisoned_memory(device):
    logits = torch.randn(3, 21, 7, device=device)
    for codebook in (None, codes(logits, 1)):
        for hard in (False, True):
            clean = sample(logits, codebook, dim=1, hard=hard)
            with testing.poisoned_memory():
                for name, value in sample(logits, codebook, dim=1, hard=hard).items():
                    assert torch.equal(value, clean[name]), name


@pytest.mark.once
def test_contract(device):
    logits, noise, upstream = torch.randn(3, 2, 6, 35, device=device)
    channels_last = logits.transpose(1, 2).contiguous().transpose(1, 2)
    seed, tau = torch.tensor(77, device=device), torch.tensor(0.5, device=device)
    testing.check_op(
        "gumbel_sample",
        [
            (logits, None, 0.7, None, seed, 3, False, True),
            (channels_last, tau, 0.0, noise, None, 0, True, True),
            (logits.bfloat16(), None, 0.0, None, seed, 0, True, False),
        ],
    )
    statistics = torch.ops.genperf.gumbel_sample(logits, None, 0.7, None, seed, 0, False, True)[3]
    grad_kl = torch.ones(2, 35, device=device)
    testing.check_op(
        "gumbel_sample_backward",
        [
            (torch.empty_like(logits), upstream, grad_kl, logits, statistics, None, 0.7, None, seed, 3),
            (torch.empty_like(logits), upstream, None, channels_last, statistics, tau, 0.0, noise, None, 0),
            (torch.empty_like(logits), None, grad_kl, logits, statistics, None, 0.7, None, seed, 3),
        ],
    )


@pytest.mark.once
def test_compiles(device):
    """Hard with codes and soft without codes: this covers every kernel without products that take long to compile."""
    sizes = [(*torch.randn(2, b, 8, h, device=device), torch.randn(8, 5, device=device)) for b, h in [(2, 5), (3, 7)]]

    def both(logits, noise, codebook):
        options = {"dim": 1, "tau": 0.7, "noise": noise.detach()}
        return *genperf.gumbel_sample(logits, codebook, hard=True, **options), *genperf.gumbel_sample(logits, **options)

    testing.check_compile(both, *sizes)


@pytest.mark.once
def test_compiled_noise(device):
    """Drawn noise in a full graph is correct and new in every call; annealing a tensor tau does not recompile."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda logits, tau: genperf.gumbel_sample(logits, dim=1, hard=True, tau=tau), fullgraph=True)
    logits = torch.tensor([0.0, 1.0, 2.0], device=device).repeat(20_000, 1).requires_grad_()
    first, indices, _ = compiled(logits, torch.tensor(1.0, device=device))
    with torch._dynamo.config.patch(error_on_recompile=True):
        second, _, _ = compiled(logits, torch.tensor(0.5, device=device))
    assert not torch.equal(first, second)
    expected = logits[0].softmax(0).detach()
    frequencies = torch.bincount(indices, minlength=3) / 20_000
    assert ((frequencies - expected).abs() < 4.5 * (expected * (1 - expected) / 20_000).sqrt()).all()
    assert torch.autograd.grad(second.square().sum(), logits)[0].isfinite().all()


GOOD = torch.zeros(4, 6)


@pytest.mark.parametrize(
    ("message", "error", "arguments", "options"),
    [
        ("logits must be a tensor, got list", TypeError, ([1.0],), {}),
        ("logits must be float32", TypeError, (GOOD.int(),), {}),
        ("dim must be a dimension of logits, got dim=2", ValueError, (GOOD,), {"dim": 2}),
        ("dim must be a dimension of logits", ValueError, (torch.tensor(1.0),), {}),
        ("logits must have at least one category", ValueError, (GOOD[:, :0],), {}),
        ("codebook must be a tensor", TypeError, (GOOD, 3.0), {}),
        ("codebook must have shape", ValueError, (GOOD, torch.zeros(5, 3)), {}),
        ("codebook must have shape", ValueError, (GOOD, torch.zeros(6)), {}),
        ("codebook must have the dtype", TypeError, (GOOD, torch.zeros(6, 3, dtype=torch.float64)), {}),
        (
            "logits and codebook must be on one device",
            ValueError,
            (GOOD, torch.zeros(6, 3, device="meta")),
            {},
        ),
        ("tau must not be negative, got -1.0", ValueError, (GOOD,), {"tau": -1.0}),
        ("tau must not be negative, got nan", ValueError, (GOOD,), {"tau": math.nan}),
        ("tau must be a number or a tensor of one element", ValueError, (GOOD,), {"tau": torch.ones(2)}),
        ("noise must have shape", ValueError, (GOOD,), {"noise": torch.zeros(4, 5)}),
        ("noise must be float32 or have the dtype", TypeError, (GOOD,), {"noise": GOOD.double()}),
        ("generator must be a torch.Generator", TypeError, (GOOD,), {"generator": 3}),
        ("impl='triton' cannot run here", NotImplementedError, (GOOD,), {"impl": "triton"}),
        ("impl='native' cannot run here", NotImplementedError, (GOOD.double(),), {"impl": "native"}),
    ],
)
def test_bad_input(message, error, arguments, options):
    with pytest.raises(error, match="gumbel_sample: .*" + message):
        genperf.gumbel_sample(*arguments, **options)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("hard", [True, False])
def test_autocast_has_no_effect(hard, inside, device):
    """Products with the codebook keep the logits' dtype, whether backward runs under autocast or not."""
    logits, codebook = torch.randn(2, 5, 8, device=device, requires_grad=True), torch.randn(8, 4, device=device, requires_grad=True)
    noise = torch.randn(2, 5, 8, device=device)

    def gradients():
        sample, _, kl = genperf.gumbel_sample(logits, codebook, hard=hard, noise=noise)
        assert sample.dtype == torch.float32
        return sample.square().sum() + kl.sum()

    expected = torch.autograd.grad(gradients(), (logits, codebook))
    with torch.autocast(device, torch.bfloat16):
        total = gradients()
        found = torch.autograd.grad(total, (logits, codebook)) if inside else None
    found = found or torch.autograd.grad(total, (logits, codebook))
    for value, want in zip(found, expected, strict=True):
        assert torch.equal(value, want)


@pytest.mark.parametrize("tau", [0, -0.0, torch.tensor(-0.0)], ids=str)
@pytest.mark.parametrize("dim", [1, 2])
def test_the_lowest_index_wins_ties_at_temperature_zero(dim, tau, device):
    zeros = torch.zeros(2, 5, 5, device=device)
    sample, indices, _ = genperf.gumbel_sample(zeros, tau=tau, dim=dim, noise=zeros)
    assert (indices == 0).all()
    assert (sample.movedim(dim, -1) == torch.eye(5, device=device)[0]).all()


@pytest.mark.parametrize("dim", [0, 1])
def test_the_lowest_finite_number_is_above_minus_infinity(dim, device):
    lowest = torch.finfo(torch.float32).min
    logits = torch.tensor([[-torch.inf, lowest, -torch.inf]], device=device).movedim(1, dim)
    sample, indices, kl = genperf.gumbel_sample(logits, dim=dim, noise=torch.zeros_like(logits))
    assert indices.item() == 1
    assert sample.flatten().tolist() == [0, 1, 0]
    assert kl.isfinite().all()


def test_forward_mode_runs_the_reference(device):
    logits, tangent, noise = torch.randn(3, 2, 5, 8, device=device)
    found = torch.func.jvp(lambda x: genperf.gumbel_sample(x, noise=noise)[0], (logits,), (tangent,))[1]
    expected = torch.func.jvp(lambda x: genperf.gumbel_sample(x, noise=noise, impl="reference")[0], (logits,), (tangent,))[1]
    assert expected.any()
    torch.testing.assert_close(found, expected)
