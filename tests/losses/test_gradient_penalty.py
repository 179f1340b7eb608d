# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from genperf.losses import gradient_penalty
from genperf.losses.gradient_penalty import CENTERS, INTERPOLATING, NEED_FAKE

KINDS = list(CENTERS)
EXACT = [kind for kind in KINDS if kind != "finite-difference"]


class Slopes(nn.Module):
    """A linear critic with a given gradient norm for each sample: D(x_i) = norm_i * <unit, x_i>."""

    def __init__(self, shape, dtype=torch.float64, device="cpu"):
        super().__init__()
        unit = torch.arange(1.0, 1 + math.prod(shape), dtype=dtype, device=device).reshape(shape)
        self.direction = nn.Parameter(unit / unit.norm())
        self.points = []

    def forward(self, x, norms):
        self.points.append(x.detach())
        return norms.to(x.dtype) * (x * self.direction).flatten(1).sum(1)


class Smooth(nn.Module):
    def __init__(self, features=4, hidden=5, dtype=torch.float64, device="cpu"):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(features, hidden), nn.Tanh(), nn.Linear(hidden, 1)).to(device, dtype)

    def forward(self, x):
        return self.layers(x)


def samples(*shape, dtype=torch.float64, device="cpu"):
    return torch.randn(2, *shape, dtype=dtype, device=device)


def published_faults(g):
    """Penalties with mistakes found in public implementations; the correct one is the mean over samples of (|g_i| - 1)^2."""
    return {
        "norm of the whole batch (torchgan)": (g.norm(2) - 1).square(),
        "norm over one axis (caogang; PyTorch-GAN's dragan)": (g.norm(2, dim=1) - 1).square().mean(),
        "sum over the batch (GAN zoo)": (g.flatten(1).norm(2, dim=1) - 1).square().sum(),
        "mean instead of norm": (g.flatten(1).square().mean(1).sqrt() - 1).square().mean(),
    }


@pytest.mark.parametrize("shape", [(3,), (5, 4), (1, 4, 4), (3, 4, 5), (4, 2, 3), (2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("kind", EXACT)
def test_known_norms(kind, shape, device):
    """Any number of channels and dimensions; mimicry assumes 3 channels, StyleGAN 4 dimensions."""
    norms = torch.tensor([0.0, 0.5, 1.0, 2.0, 3.5], dtype=torch.float64, device=device)
    real, fake = samples(5, *shape, device=device)
    critic = Slopes(shape, device=device)
    loss = gradient_penalty(critic, real, fake, kind=kind, weight=3.0, condition=norms)
    excess = norms - CENTERS[kind]
    if kind == "one-sided":
        excess = excess.clamp(min=0)
    expected = 3 * excess.square().mean() * (2 if kind == "r1+r2" else 1)
    torch.testing.assert_close(loss, expected)
    assert loss.shape == ()


@pytest.mark.parametrize("fault", published_faults(torch.ones(1, 1)).keys())
def test_common_mistakes_give_other_values(fault, device):
    norms = torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64, device=device)
    real, fake = samples(4, 3, 4, 4, device=device)
    critic = Slopes((3, 4, 4), device=device)
    loss = gradient_penalty(critic, real, fake, weight=1.0, condition=norms)
    right = (norms - 1).square().mean()
    torch.testing.assert_close(loss, right)
    gradients = norms.reshape(-1, 1, 1, 1) * critic.direction.detach()
    wrong = published_faults(gradients)[fault]
    assert abs(wrong - right) > 0.1 * right


def test_unit_norms_have_no_penalty_in_a_large_batch(device):
    """torchgan's penalty for this batch is 49."""
    real, fake = samples(64, 2, 3, 3, device=device)
    critic, norms = Slopes((2, 3, 3), device=device), torch.ones(64, device=device)
    assert gradient_penalty(critic, real, fake, weight=1.0, condition=norms).abs() < 1e-20
    gradients = norms.reshape(-1, 1, 1, 1) * critic.direction.detach()
    torch.testing.assert_close(published_faults(gradients)["norm of the whole batch (torchgan)"].item(), 49.0)


@pytest.mark.parametrize("copies", [2, 16])
@pytest.mark.parametrize("kind", ["wgan-gp", "r1"])
def test_loss_is_independent_of_the_batch_size(kind, copies, device):
    norms = torch.tensor([0.5, 3.0], dtype=torch.float64, device=device)
    critic = Slopes((4,), device=device)
    once, often = (gradient_penalty(critic, *samples(2 * n, 4, device=device), kind=kind, condition=norms.repeat(n)) for n in (1, copies))
    torch.testing.assert_close(once, often)


@pytest.mark.parametrize("kind", INTERPOLATING)
def test_one_uniform_weight_per_sample(kind, device):
    """Not one per batch (torchgan), not one per element (hwalsuklee), and not normal (keras-io)."""
    real, fake = samples(4000, 2, 3, device=device)
    critic = Slopes((2, 3), device=device)
    gradient_penalty(critic, real, fake, kind=kind, condition=torch.ones(4000, device=device))
    (points,) = critic.points
    weight = ((points - fake) / (real - fake)).flatten(1)
    torch.testing.assert_close(weight, weight.median(1, keepdim=True).values.expand_as(weight), rtol=1e-6, atol=1e-6)
    weight = weight.median(1).values
    assert weight.unique().numel() > 3900
    assert weight.min() > -1e-6
    assert weight.max() < 1 + 1e-6
    ranks = torch.arange(4000, dtype=torch.float64, device=device) / 4000
    assert (weight.sort().values - ranks).abs().max() < 0.04, "Kolmogorov-Smirnov, one in 10^5 by chance"


def test_dragan_perturbs_real_samples(device):
    real = samples(500, 3, 4, device=device)[0] * 2 + 5
    critic = Slopes((3, 4), device=device)
    norms = torch.full((500,), 3.0, device=device)
    loss = gradient_penalty(critic, real, kind="dragan", weight=1.0, condition=norms)
    torch.testing.assert_close(loss.item(), 4.0)
    moved = critic.points[0] - real
    assert moved.min() >= 0
    assert 0.9 < moved.max() / (0.5 * real.std()) <= 1


@pytest.mark.parametrize(("kind", "expected"), [("r1", "real"), ("r2", "fake"), ("r1+r2", "both")])
def test_points_of_r1_and_r2(kind, expected, device):
    real, fake = samples(3, 4, device=device)
    critic = Slopes((4,), device=device)
    gradient_penalty(critic, real, fake, kind=kind, condition=torch.ones(3, device=device))
    points = {"real": [real], "fake": [fake], "both": [real, fake]}[expected]
    assert len(critic.points) == len(points)
    assert all(torch.equal(actual, reference) for actual, reference in zip(critic.points, points, strict=True))


def test_r1_and_r2_with_different_batch_sizes(device):
    critic = Smooth(device=device)
    real, fake = samples(6, 4, device=device)
    both = gradient_penalty(critic, real, fake[:4], kind="r1+r2")
    torch.testing.assert_close(both, gradient_penalty(critic, real, kind="r1") + gradient_penalty(critic, fake[:4], kind="r1"))


def test_center_and_gamma_half(device):
    norms = torch.tensor([0.5, 3.0], dtype=torch.float64, device=device)
    real, fake = samples(2, 4, device=device)
    critic = Slopes((4,), device=device)
    loss = gradient_penalty(critic, real, fake, center=2.0, weight=1.0, condition=norms)
    torch.testing.assert_close(loss, (norms - 2).square().mean())
    gamma = 10.0
    points = real.clone().requires_grad_()
    (g,) = torch.autograd.grad(critic(points, norms).sum(), points)
    stylegan = (g.square().sum(1) * (gamma / 2)).mean()
    torch.testing.assert_close(gradient_penalty(critic, real, kind="r1", weight=gamma / 2, condition=norms), stylegan)
    tensor = gradient_penalty(critic, real, kind="r1", weight=torch.tensor(gamma / 2, device=device), condition=norms)
    torch.testing.assert_close(tensor, stylegan)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_gradients_give_no_nan(kind, device):
    """The square root of a sum of squares, (g * g).sum(1).sqrt(), has a NaN derivative at zero."""
    real, fake = samples(4, 3, dtype=torch.float32, device=device)
    critic = Slopes((3,), dtype=torch.float32, device=device)
    nn.init.zeros_(critic.direction)
    loss = gradient_penalty(critic, real, fake, kind=kind, weight=1.0, condition=torch.ones(4, device=device))
    loss.backward()
    assert loss.item() == (1.0 if kind in ("wgan-gp", "dragan") else 0.0)
    assert not critic.direction.grad.any()

    points = real.clone().requires_grad_()
    (g,) = torch.autograd.grad(critic(points, torch.ones(4, device=device)).sum(), points, create_graph=True)
    (published,) = torch.autograd.grad(((g * g).sum(1).sqrt() - 1).square().mean(), critic.direction)
    assert published.isnan().any()


def test_small_gradients_in_half_precision(device):
    """Squares of 1e-4, and an epsilon of 1e-16, are zero in float16."""
    real = torch.randn(2, 10000, dtype=torch.float16, device=device)
    loss = gradient_penalty(lambda x: x.sum(1) * 1e-4, real, kind="r1", weight=1.0)
    exact = 10000 * torch.tensor(1e-4, dtype=torch.float16).double().square()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double().cpu(), exact, rtol=1e-5, atol=0)
    gradients = torch.full((2, 10000), 1e-4, dtype=torch.float16)
    assert not ((gradients + 1e-16) ** 2).sum(1).any()


@pytest.mark.parametrize("kind", KINDS)
def test_second_order_is_exact(kind, device):
    real, fake = samples(3, 4, device=device)
    w1, w2 = (torch.randn(s, dtype=torch.float64, device=device, requires_grad=True) for s in ((4, 5), (5, 1)))

    def penalty(w1, w2):
        generator = torch.Generator().manual_seed(0)
        return gradient_penalty(lambda x: torch.tanh(x @ w1) @ w2, real, fake, kind=kind, weight=0.7, step=0.1, generator=generator)

    assert torch.autograd.gradcheck(penalty, (w1, w2))


@pytest.mark.parametrize("kind", KINDS)
def test_writes_no_grad_and_calls_no_hook(kind, device):
    real, fake = (t.requires_grad_() for t in samples(3, 4, device=device).unbind())
    critic = Smooth(device=device)
    calls = []
    for parameter in critic.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: calls.append(p))
    loss = gradient_penalty(critic, real, fake, kind=kind)
    assert not calls
    assert all(t.grad is None for t in (real, fake, *critic.parameters()))
    loss.backward()
    assert len(calls) == len(set(calls)) >= 3  # once each; the last bias does not affect the slope
    assert real.grad is None
    assert fake.grad is None


@pytest.fixture
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["wgan-gp", "r1+r2", "finite-difference"])
@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel(kind, device):
    real, fake = samples(3, 4, device=device)
    critic = Smooth(device=device)
    gradients = []
    for wrapped in (critic, nn.parallel.DistributedDataParallel(critic)):
        critic.zero_grad()
        generator = torch.Generator().manual_seed(0)
        adversarial = wrapped(fake).mean() - wrapped(real).mean()
        (adversarial + gradient_penalty(wrapped, real, fake, kind=kind, generator=generator)).backward()
        gradients.append([p.grad.clone() for p in critic.parameters()])
    for alone, parallel in zip(*gradients, strict=True):
        torch.testing.assert_close(parallel, alone)


@pytest.mark.parametrize(
    "critic",
    [
        lambda x: x.square().sum(1),
        lambda x: x.square().sum(1, keepdim=True),
        lambda x: x.square().reshape(-1, 1, 2, 2),
        lambda x: x.square().sum(),
        lambda x: (x[:, :1].square(), x[:, 1:].square()),
        lambda x: [x[:, :1].square(), [x[:, 1:2].square(), x[:, 2:].square().sum()]],
        lambda x: {"fine": x[:, :3].square().sum(1), "coarse": (x[:, 3:].square(),)},
        lambda x: (x.square().sum(1), torch.ones(len(x))),
    ],
)
def test_outputs_of_any_shape_and_number(critic, device):
    real = samples(3, 4, device=device)[0]
    loss = gradient_penalty(critic, real, kind="r1", weight=1.0)
    torch.testing.assert_close(loss, (2 * real).square().sum(1).mean())


def test_finite_difference_sums_several_outputs(device):
    real = samples(3, 4, device=device)[0]
    one, several = (
        gradient_penalty(c, real, kind="finite-difference", generator=torch.Generator().manual_seed(0))
        for c in (lambda x: x.sin().sum(1), lambda x: {"a": x[:, :3].sin(), "b": [x[:, 3:].sin().sum(1)]})
    )
    torch.testing.assert_close(one, several)


@pytest.mark.parametrize("kind", KINDS)
def test_conditions(kind, device):
    real, fake = samples(3, 4, device=device)
    label, style = torch.rand(2, 3, dtype=torch.float64, device=device)

    def critic(x, label=None, style=None):
        score = x.square().sum(1)
        return score * (1 if label is None else label) * (1 if style is None else style)

    def penalty(function, condition=None):
        return gradient_penalty(function, real, fake, kind=kind, condition=condition, generator=torch.Generator().manual_seed(0))

    torch.testing.assert_close(penalty(critic, label), penalty(lambda x: critic(x, label)))
    torch.testing.assert_close(penalty(critic, (label, style)), penalty(lambda x: critic(x, label, style)))
    torch.testing.assert_close(penalty(critic, {"style": style}), penalty(lambda x: critic(x, style=style)))


@pytest.mark.parametrize("kind", KINDS)
def test_seed_and_generator_determine_the_points(kind, device):
    real, fake = samples(3, 4, device=device)
    critic = Smooth(device=device)
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(gradient_penalty(critic, real, fake, kind=kind, center=0.1 if kind == "one-sided" else None))
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2]) == (kind in ("r1", "r2", "r1+r2"))
    assert torch.equal(*(gradient_penalty(critic, real, fake, kind=kind, generator=torch.Generator().manual_seed(5)) for _ in range(2)))


def test_finite_difference_is_the_documented_formula(device):
    real = samples(5, 4, device=device)[0]
    critic, step = Smooth(device=device), 0.3
    seen = []
    loss = gradient_penalty(lambda x: seen.append(x) or critic(x), real, kind="finite-difference", weight=2.0, step=step)
    here, there = seen
    assert torch.equal(here, real)
    slope = (critic(there) - critic(here)).flatten(1).sum(1) / step
    torch.testing.assert_close(loss, 2 * slope.square().mean())
    assert 0.5 < ((there - here) / step).std() < 1.5


def test_finite_difference_estimates_the_squared_norm(device):
    """The expectation is |g|^2, and for a quadratic critic |g|^2 + step^2 / 4 * E (v' v)^2, the latter step^2 / 4 * d (d + 2)."""
    count, step = 200_000, 0.5
    x = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, device=device)
    real = x.expand(count, 3)

    def estimate(critic):
        return gradient_penalty(critic, real, kind="finite-difference", weight=1.0, step=step).item()

    assert estimate(lambda p: p @ x) == pytest.approx(x.square().sum().item(), rel=0.02)
    curved = x.square().sum().item() + step**2 / 4 * 3 * 5
    assert estimate(lambda p: 0.5 * p.square().sum(1)) == pytest.approx(curved, rel=0.02)


class Attention(nn.Module):
    """A critic of sequences [B, N, D] with fused attention, which does not support double backward."""

    def __init__(self, dim=8, recompute=False):
        super().__init__()
        self.qkv, self.head, self.recompute = nn.Linear(dim, 3 * dim), nn.Linear(dim, 1), recompute

    def attend(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, x):
        x = checkpoint(self.attend, x, use_reentrant=False) if self.recompute else self.attend(x)
        return self.head(x).mean(1)


def finite_difference_step(critic, call, real, parameters):
    torch.manual_seed(3)
    loss = call(critic, real)
    return [loss, *torch.autograd.grad(loss, parameters)]


def finite_difference(critic, real):
    return gradient_penalty(critic, real, kind="finite-difference", weight=1.0, step=0.1)


def without_constants(critic):
    """Parameters that affect the slope: all but the last bias."""
    return list(critic.parameters())[:-1]


def test_finite_difference_with_fused_attention(device):
    real = torch.randn(3, 7, 8, device=device)
    critic = Attention().to(device)
    with sdpa_kernel(SDPBackend.MATH):
        expected = finite_difference_step(critic, finite_difference, real, without_constants(critic))
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        found = finite_difference_step(critic, finite_difference, real, without_constants(critic))
    for actual, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-3, atol=1e-5)


def test_finite_difference_with_activation_checkpointing(device):
    real = torch.randn(3, 7, 8, device=device)
    plain, recomputing = Attention().to(device), Attention(recompute=True).to(device)
    recomputing.load_state_dict(plain.state_dict())
    results = [finite_difference_step(c, finite_difference, real, without_constants(c)) for c in (plain, recomputing)]
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_finite_difference_compiles_in_one_graph(device):
    critic = Attention().to(device)
    torch._dynamo.reset()
    compiled = torch.compile(finite_difference, fullgraph=True, backend="aot_eager")  # same random numbers as eager
    for shape in ((3, 7, 8), (5, 6, 8)):
        real = torch.randn(shape, device=device)
        results = [finite_difference_step(critic, call, real, without_constants(critic)) for call in (finite_difference, compiled)]
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", EXACT)
def test_no_grad_raises(kind):
    real, fake = samples(3, 4)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"^gradient_penalty: .* under torch\.no_grad"):
        gradient_penalty(Smooth(), real, fake, kind=kind)


def test_finite_difference_needs_no_gradient(device):
    with torch.no_grad():
        loss = gradient_penalty(Smooth(device=device), samples(3, 4, device=device)[0], kind="finite-difference")
    assert loss.isfinite()
    assert not loss.requires_grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(kind, dtype, device):
    critic = Smooth(16, 32, torch.float32, device)
    real, fake = samples(8, 16, dtype=torch.float32, device=device)
    losses = []
    for enabled in (True, False):
        with torch.autocast(device, dtype, enabled=enabled):
            # Generators under autocast return half-precision samples.
            generated = fake.to(dtype) if enabled else fake.to(dtype).float()
            generator = torch.Generator().manual_seed(0)
            losses.append(gradient_penalty(critic, real, generated, kind=kind, step=0.5, generator=generator))
    torch.testing.assert_close(*losses, rtol=0.05, atol=0.02)
    losses[0].backward()
    assert losses[0].dtype == critic.layers[1].weight.grad.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("enabled", [True, False])
def test_scaler_does_not_change_the_loss(kind, enabled, device):
    critic = Smooth(dtype=torch.float32, device=device)
    real, fake = samples(5, 4, dtype=torch.float32, device=device)
    scaler = torch.amp.GradScaler(device, enabled=enabled)
    plain, scaled = (
        gradient_penalty(critic, real, fake, kind=kind, scaler=s, generator=torch.Generator().manual_seed(0)) for s in (None, scaler)
    )
    torch.testing.assert_close(plain, scaled)
    gradients = [torch.autograd.grad(loss, critic.layers[1].weight)[0] for loss in (plain, scaled)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("batch", [1, 3, 64])
def test_scaler_prevents_underflow(batch, dtype, device):
    def critic(x):  # the gradient of x is 1e-8, which underflows float16
        return (x.half() * 1e-4 * 1e-4).sum(1)

    real = torch.randn(batch, 4, dtype=dtype, device=device)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**15)
    kept = gradient_penalty(critic, real, kind="r1", weight=1.0, scaler=scaler)
    assert not gradient_penalty(critic, real, kind="r1", weight=1.0)
    assert kept.item() == pytest.approx(4 * 1e-16, rel=0.02)


def test_scaler_scale_fits_into_float16(device):
    """The initial scale of a GradScaler, 2^16, overflows float16."""
    real = torch.randn(4, 3, device=device)
    loss = gradient_penalty(lambda x: x.half().sum(1), real, kind="r1", weight=1.0, scaler=torch.amp.GradScaler(device))
    torch.testing.assert_close(loss.item(), 3.0)


@pytest.mark.parametrize("kind", ["wgan-gp", "one-sided", "r1+r2"])
def test_scaler_skips_a_step_that_overflows(kind, device):
    critic = nn.Linear(4, 1).to(device)
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**30)
    real, fake = samples(4, 4, dtype=torch.float32, device=device)
    before = critic.weight.detach().clone()
    skipped = 0
    while torch.equal(critic.weight, before):
        assert skipped < 30
        optimizer.zero_grad()
        with torch.autocast(device, torch.float16):
            loss = gradient_penalty(critic, real, 3 * fake, kind=kind, weight=5.0, center=0.1, scaler=scaler)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        skipped += torch.equal(critic.weight, before)
    assert skipped > 5
    assert scaler.get_scale() == 2.0 ** (30 - skipped)
    assert critic.weight.isfinite().all()


@pytest.mark.parametrize("kind", CENTERS)
def test_samples_made_in_inference_mode(kind, device):
    critic = torch.nn.Bilinear(6, 2, 1).to(device)
    with torch.inference_mode():
        real, fake, label, weight = (torch.randn(shape, device=device) for shape in ((4, 6), (4, 6), (4, 2), ()))
    options = {"kind": kind, "weight": weight, "condition": label}
    losses = [
        gradient_penalty(critic, *samples, generator=torch.Generator().manual_seed(5), **options)
        for samples in ((real, fake), (real.clone(), fake.clone()))
    ]
    assert torch.equal(*losses)
    assert all(g.isfinite().all() for g in torch.autograd.grad(losses[0], list(critic.parameters()), allow_unused=True) if g is not None)


def test_empty_batch(device):
    real, fake = samples(0, 4, dtype=torch.float32, device=device)
    critic = Smooth(dtype=torch.float32, device=device)
    for kind in KINDS:
        for scaler in (None, torch.amp.GradScaler(device)):
            assert gradient_penalty(critic, real, fake, kind=kind, scaler=scaler) == 0


def constant(x):
    return torch.ones(len(x), 1, requires_grad=True) * 2


@pytest.mark.parametrize(
    ("critic", "error", "message"),
    [
        (constant, ValueError, "critic's output must depend on its input"),
        (lambda x: x.detach().sum(), ValueError, "critic's output must depend on its input"),
        (lambda x: (x, None), TypeError, "critic must return floating tensors, .* got NoneType"),
        (lambda x: x.argmax(1), TypeError, "got a torch.int64 tensor"),
        (lambda x: 3.0, TypeError, "got float"),
    ],
)
def test_critic_without_gradient(critic, error, message):
    with pytest.raises(error, match="^gradient_penalty: .*" + message):
        gradient_penalty(critic, torch.randn(3, 4), kind="r1")


REAL = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kind": "gp"}, ValueError, "kind must be one of wgan-gp, .*, got 'gp'"),
        *(({"kind": kind, "fake": None}, ValueError, "needs fake samples, got None") for kind in NEED_FAKE),
        ({"real": None}, ValueError, "needs real samples, got None"),
        ({"real": [REAL]}, TypeError, "real must be a tensor, got list"),
        ({"real": REAL.long()}, TypeError, "real must be of a floating dtype, got torch.int64"),
        ({"real": REAL.sum()}, ValueError, "real must have a batch dimension"),
        ({"fake": REAL[:2]}, ValueError, r"must have the same shape, got \[3, 4\] and \[2, 4\]"),
        ({"weight": -1.0}, ValueError, "weight must be a finite number, at least 0, got -1.0"),
        ({"weight": float("nan")}, ValueError, "weight must be"),
        ({"kind": "finite-difference", "center": 1.0}, ValueError, "no center, got center=1.0"),
        ({"kind": "finite-difference", "step": 0.0}, ValueError, "step must be a finite number above 0, got 0.0"),
        ({"center": -1.0}, ValueError, "center must be"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        gradient_penalty(**{"critic": lambda x: x.square().sum(1), "real": REAL.double(), "fake": REAL.double(), **arguments})


def test_finite_difference_needs_a_batch_dimension():
    with pytest.raises(ValueError, match=r"first dimension is the batch of 3, got shape \[\]"):
        gradient_penalty(lambda x: x.sum(), REAL.double(), kind="finite-difference")
