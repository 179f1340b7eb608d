# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from processes import forked_context
from torch import distributed as dist
from torch.nn import functional as F

from genperf.models.discrete_vae import DiscreteVAE
from genperf.models.vqvae import VQVAE
from genperf.models.vqvae2 import VQVAE2
from genperf.nn import VectorQuantizer
from genperf.testing import leave_rank

BOTH = pytest.mark.parametrize("system", [VQVAE, VQVAE2])


def small(system=VQVAE, image_shape=(1, 16, 16), **changes):
    torch.manual_seed(0)
    return system(system.Config(image_shape=image_shape, **{"hidden": 8, "dim": 4, "num_codes": 16, "prior_width": 8, **changes}))


def levels(codes):
    """Codes of one or two levels, as a tuple."""
    return codes if isinstance(codes, tuple) else (codes,)


def blocks(n, side=8):
    """Images of four uniform quarters."""
    return torch.rand(n, 1, 2, 2).repeat_interleave(side, 2).repeat_interleave(side, 3)


@BOTH
@pytest.mark.parametrize("image_shape", [(1, 28, 28), (3, 8, 12)])
def test_shapes(system, image_shape):
    model = small(system, image_shape).eval()
    images = torch.rand(2, *image_shape)
    reconstruction, codes, loss = model(images)
    assert reconstruction.shape == images.shape
    assert loss.shape == ()
    for indices, factor in zip(levels(codes), (4, 2), strict=False):
        assert indices.shape == (2, image_shape[1] // factor, image_shape[2] // factor)
        assert indices.dtype == torch.int64
    for made in (model.decode(codes), model.reconstruct(images), model.sample(3)):
        assert made.shape[1:] == image_shape
        assert (made >= 0).all()
        assert (made <= 1).all()


@BOTH
def test_reconstruction_depends_on_codes_only(system):
    model = small(system).eval()
    images = torch.rand(3, 1, 16, 16)
    output = model(images)
    codes = model.encode(images)
    for actual, expected in zip(levels(codes), levels(output[1]), strict=True):
        assert torch.equal(actual, expected)
    torch.testing.assert_close(model.decode(codes), output.reconstruction.clamp(0, 1))
    assert torch.equal(model.reconstruct(images), model.decode(codes))
    assert not model.decode(codes).requires_grad


@BOTH
def test_only_training_steps_update_the_codebook(system):
    model = small(system).train()
    images = torch.rand(3, 1, 16, 16)
    model.initialize(images)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.encode(images)
    model.reconstruct(images)
    model.sample(2)
    for player in model.players[1:]:
        model.training_step(images, player=player)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@BOTH
@pytest.mark.parametrize("decay", [None, 0.9])
def test_training_lowers_the_losses(system, decay):
    model = small(system, decay=decay, lr=5e-3, lr_prior=1e-2)
    images = blocks(8)
    optimizers = model.optimizers()
    history = {player: [] for player in model.players}
    for step in range(40):
        for player in model.players_at(4 * step):
            losses = model.training_step(images, player=player)
            model.zero_grad(set_to_none=True)
            losses["loss"].backward()
            own = {id(p) for group in optimizers[player].param_groups for p in group["params"]}
            assert own == {id(p) for p in model.parameters() if p.grad is not None}
            optimizers[player].step()
            model.step_done(player)
            history[player].append(losses["reconstruction" if player == "model" else "loss"].item())
        if step == 0:
            assert sum(len(group["params"]) for o in optimizers.values() for group in o.param_groups) == len(list(model.parameters()))
    assert history["model"][-1] < 0.5 * history["model"][0]
    for player in model.players[1:]:
        assert history[player][-1] < history[player][0] - 0.2, player


@BOTH
def test_losses_match_their_names(system):
    model = small(system)
    images = torch.rand(3, 1, 16, 16)
    model.initialize(images)
    model.eval()
    losses = model.training_step(images)
    assert losses.keys() == {"loss", "reconstruction", "quantizer"}
    torch.testing.assert_close(losses["reconstruction"], F.mse_loss(model(images).reconstruction, images))
    torch.testing.assert_close(losses["loss"], losses["reconstruction"] + losses["quantizer"])
    codes = levels(model.encode(images))
    for player, indices in zip(model.players[1:], codes, strict=True):
        conditions = (
            []
            if indices is codes[0]
            else [model.top_quantizer.codebook[codes[0]].movedim(-1, 1).repeat_interleave(2, 2).repeat_interleave(2, 3)]
        )
        expected = F.cross_entropy(getattr(model, player)(indices, *conditions), indices)
        torch.testing.assert_close(model.training_step(images, player=player)["loss"], expected)


@BOTH
def test_priors_train_on_every_fourth_batch(system):
    model = small(system)
    assert [model.players_at(step) for step in range(5)] == [model.players, *[("model",)] * 3, model.players]
    assert small(system, prior_every=1).players_at(1) == model.players


def test_samples_resemble_a_single_training_image():
    """Trained on one image, the prior must sample its codes."""
    model = small(lr=1e-2, lr_prior=1e-2)
    images = blocks(1).expand(8, -1, -1, -1)
    optimizers = model.optimizers()
    for _ in range(60):
        for player in model.players:
            model.zero_grad(set_to_none=True)
            model.training_step(images, player=player)["loss"].backward()
            optimizers[player].step()
    errors = (model.sample(8) - images).square().mean((1, 2, 3))
    assert errors.median() < 0.02


def test_samples_of_a_class_resemble_its_training_image():
    """Half of the steps train the model, the others the prior alone, on one image of each class."""
    model = small(lr=1e-2, lr_prior=1e-2, class_conditional=True, num_classes=2, prior_only=0.5, replace_dead_below=0.1, prior_dropout=0.1)
    images, labels = blocks(2), torch.arange(8) % 2
    optimizers = model.optimizers()
    players, encoder = [], None
    for step in range(120):
        model.progress = step / 120
        for player in model.players_at(step):
            players.append(player)
            model.zero_grad(set_to_none=True)
            model.training_step(images[labels], labels, player=player)["loss"].backward()
            optimizers[player].step()
        if step == 59:
            encoder = {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("prior")}
    assert players == ["model"] * 60 + ["prior"] * 60
    assert all(torch.equal(model.state_dict()[name], value) for name, value in encoder.items())
    for wanted in (labels, None):
        errors = (model.sample(8, wanted) - images[labels]).square().mean((1, 2, 3))
        assert errors.median() < 0.02


@pytest.mark.parametrize("system", [VQVAE, VQVAE2, DiscreteVAE])
def test_class_conditional_priors(system):
    model = small(system, class_conditional=True, num_classes=3)
    images, labels = torch.rand(4, 1, 16, 16), torch.tensor([0, 1, 2, 0])
    model.initialize(images)
    model.eval()
    for player in model.players[1:]:
        losses = [model.training_step(images, shown, player=player)["loss"] for shown in (labels, labels.flip(0), labels)]
        assert losses[0] == losses[2] != losses[1]
        with pytest.raises(ValueError, match=r"^IndexPrior: labels must be int64 .*, got None"):
            model.training_step(images, player=player)
    drawn = []
    for label in (0, 1):
        torch.manual_seed(1)
        drawn.append(model.sample(24, torch.full((24,), label)))
    assert not torch.equal(*drawn)
    cold = small(system, class_conditional=True, num_classes=3, sample_temperature=1e-4)
    cold.load_state_dict(model.state_dict())
    assert len(cold.sample(9, torch.ones(9, dtype=torch.int64)).unique(dim=0)) == 1
    assert len(model.sample(4)) == 4
    with pytest.raises(ValueError, match=r"^IndexPrior: labels must be \[B\] with values 0 ... 2, got 3 ... 3"):
        model.sample(1, torch.tensor([3]))


def test_priors_train_on_shifted_images(monkeypatch):
    model = small(prior_shift=2).eval()
    encoded = []
    monkeypatch.setattr(model, "encode", lambda images: encoded.append(images) or VQVAE.encode(model, images))
    image = torch.zeros(1, 1, 16, 16)
    image[0, 0, 8, 8] = 1
    for _ in range(200):
        model.training_step(image, player="prior")
    assert {tuple(shifted[0, 0].nonzero()[0].tolist()) for shifted in encoded} == {(y, x) for y in range(6, 11) for x in range(6, 11)}


@BOTH
def test_state_dict_gives_the_same_samples(system):
    source, target = small(system), small(system, decay=0.9)
    source.training_step(torch.rand(4, 1, 16, 16))
    target.load_state_dict(source.state_dict())
    drawn = []
    for model in (source, target):
        torch.manual_seed(3)
        drawn.append(model.sample(4))
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], source.sample(4))
    assert torch.equal(*[model.reconstruct(torch.full((1, 1, 16, 16), 0.3)) for model in (source, target)])


@BOTH
def test_without_a_prior_there_is_one_player(system):
    model = small(system, prior_width=0)
    assert model.players == model.players_at(0) == ("model",)
    assert model.optimizers().keys() == {"model"}
    for player, optimizer in small(system, lr=0.1, lr_prior=0.2).optimizers().items():
        assert optimizer.defaults["lr"] == (0.1 if player == "model" else 0.2)
    assert small(system).optimizers().keys() == set(system.players)
    with pytest.raises(RuntimeError, match=rf"^{system.__name__}.sample: sampling needs .* got prior_width=0"):
        model.sample(1)
    with pytest.raises(ValueError, match=rf"^{system.__name__}: player must be one of model, got '{system.players[1]}'\.$"):
        model.training_step(torch.rand(2, 1, 16, 16), player=system.players[1])


@BOTH
def test_bad_calls(system):
    model, name = small(system), system.__name__
    with pytest.raises(ValueError, match=f"^{name}: player must be one of {', '.join(system.players)}, got 'generator'"):
        model.training_step(torch.rand(2, 1, 16, 16), player="generator")
    with pytest.raises(ValueError, match=f"^{name}: n must be at least 1, got 0"):
        model.sample(0)
    with pytest.raises(ValueError, match=f"^{name}: labels must be None"):
        model.sample(2, torch.zeros(2, dtype=torch.int64))


def test_submodules_keep_their_modes():
    model = small().train()
    model.quantizer.eval()
    modes = [module.training for module in model.modules()]
    model.reconstruct(torch.rand(2, 1, 16, 16))
    assert [module.training for module in model.modules()] == modes
    assert not all(modes)


def test_initialize_sets_codes_to_encodings():
    model = small()
    images = torch.rand(4, 1, 16, 16)
    model.initialize(images)
    latents = model.encoder(images).movedim(1, -1).reshape(-1, 4)
    assert torch.cdist(model.quantizer.codebook, latents).amin(1).max() < 1e-3


@BOTH
@pytest.mark.parametrize("shape", [(1, 1, 16, 12), (1, 3, 16, 16), (1, 16, 16)])
def test_bad_images(system, shape):
    model = small(system)
    for call in (model, model.encode, model.initialize, model.training_step):
        with pytest.raises(ValueError, match=rf"^{system.__name__}: images must have shape \[B, 1, 16, 16\], got \["):
            call(torch.rand(shape))
        with pytest.raises(TypeError, match=rf"^{system.__name__}: images must be floats in \[0, 1\], got torch.uint8"):
            call(torch.zeros(1, 1, 16, 16, dtype=torch.uint8))


@BOTH
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_shape": (0, 8, 8)}, "at least 1 channel"),
        ({"image_shape": (1, 30, 28)}, r"sides divisible by 4, got \[1, 30, 28\]"),
        ({"hidden": 7}, "hidden must be a positive .*, got 7"),
        ({"dim": 0}, "dim must be at least 1"),
        ({"num_codes": 0}, "num_codes"),
        ({"prior_width": 6}, "IndexPrior: width must be"),
        ({"prior_every": 0}, "prior_every must be at least 1, got 0"),
        ({"prior_only": 1.0}, r"prior_only must be in \[0, 1\), got 1.0"),
        ({"prior_only": 0.5, "prior_width": 0}, "prior_only must be 0 without a prior, got 0.5"),
        ({"prior_shift": -1}, "prior_shift must be at least 0, got -1"),
        ({"sample_temperature": 0.0}, "sample_temperature must be a finite number above 0, got 0.0"),
        ({"prior_dropout": 1.0}, r"IndexPrior: dropout must lie in \[0, 1\), got 1.0"),
        ({"class_conditional": True}, "num_classes must be at least 1 with class_conditional and 0 without it, got 0"),
        ({"num_classes": 2}, "num_classes must be at least 1 with class_conditional and 0 without it, got 2"),
    ],
)
def test_bad_config(system, changes, message):
    with pytest.raises(ValueError, match=message):
        small(system, **changes)


def trained(system, images, first, processes=1):
    """The state after initialization and two steps of every player, in float64; gradients are averaged over ranks."""
    model = small(system).double()
    model.initialize(first)
    for _ in range(2):
        for player in model.players:
            model.zero_grad(set_to_none=True)
            model.training_step(images, player=player)["loss"].backward()
            for p in model.parameters():
                if p.grad is not None:
                    if processes > 1:
                        dist.all_reduce(p.grad)
                    p.data -= 0.1 * p.grad / processes
    return model.state_dict()


def codes_drawn(x, mask):
    """A codebook initialized from partly masked vectors of x, and after an EMA update."""
    torch.manual_seed(1)
    quantizer = VectorQuantizer(6, 4, decay=0.5).double()
    quantizer.init_codes(x, mask)
    drawn = quantizer.codebook.clone()
    quantizer(x, mask)
    return [drawn, *quantizer.state_dict().values()]


def distributed_inputs():
    generator = torch.Generator().manual_seed(0)
    images, x = (torch.rand(*shape, generator=generator, dtype=torch.float64) for shape in ((4, 1, 16, 16), (9, 4)))
    return images, x, torch.arange(9) % 3 > 0


def _share(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    images, x, mask = distributed_inputs()
    states = [trained(system, images.chunk(2)[rank], images, 2) for system in (VQVAE, VQVAE2)]
    part = slice(0, 2) if rank == 0 else slice(2, None)  # uneven
    codes = [codes_drawn(x[part], mask[part]), codes_drawn(x[:0] if rank == 0 else x, None)]
    torch.save([list(state.values()) for state in states] + codes, folder / f"{rank}.pt")
    leave_rank()


def test_two_ranks_match_one_process_on_the_global_batch(tmp_path):
    context = forked_context()
    processes = [context.Process(target=_share, args=(rank, tmp_path), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    images, x, mask = distributed_inputs()
    alone = [list(trained(system, images, images).values()) for system in (VQVAE, VQVAE2)] + [codes_drawn(x, mask), codes_drawn(x, None)]
    for actual, reference, expected in zip(first, second, alone, strict=True):
        for value, other, exact in zip(actual, reference, expected, strict=True):
            assert torch.equal(value, other), "bitwise"
            torch.testing.assert_close(value, exact, rtol=1e-9, atol=1e-12)
