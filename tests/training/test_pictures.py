# SPDX-License-Identifier: Apache-2.0
import sys

import pytest
import torch
from PIL import Image

from genperf._errors import UserError
from genperf.models.system import System, SystemConfig, standard_normal
from genperf.training.data import LabeledImages
from genperf.training.pictures import write_comparison, write_curves, write_image, write_images, write_pictures, write_rows

SHAPE = (1, 8, 8)
CELL = 8 * round(84 / 8) + 2  # side of an image in a grid, including the gap


class Vectors(System):
    """Encodes images to vectors, like an autoencoder."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def encode(self, images):
        return images.mean((1, 2, 3)).unsqueeze(1)

    def decode(self, codes):
        return codes.view(-1, 1, 1, 1).expand(-1, *SHAPE)

    def reconstruct(self, images):
        return self.decode(self.encode(images))


class Denoiser(Vectors):
    def corrupt(self, images):
        return images + standard_normal(*images.shape, device=images.device)

    def denoise(self, images):
        return self.reconstruct(images)

    def latent_grid(self, n, images):
        return torch.linspace(0, 1, n * n).view(-1, 1, 1, 1).expand(-1, *SHAPE)


class Indices(Vectors):
    def encode(self, images):
        return images[:, 0].round().long()

    def decode(self, codes):
        return codes[:, None].float()


class Generator(System):
    class Config(SystemConfig):
        latent_dim = 3

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def condition(self, labels):
        return labels

    def sampler(self, z, condition):
        brightness = z.tanh().mean(1) if condition is None else condition / 4 * 2 - 1
        return (brightness * self.weight).view(-1, 1, 1, 1).expand(-1, *SHAPE)

    @torch.no_grad()
    def sample(self, n, labels=None):
        return self.sampler(standard_normal(n, 3, device=self.device), self.condition(labels)).add(1).div(2)


class Conditional(Generator):
    class Config(Generator.Config):
        num_classes = 5


class NoPrior(Indices):
    class Config(SystemConfig):
        prior_width = 0

    def sample(self, n, labels=None):
        raise RuntimeError("no prior")


def held_out(count=30, shape=SHAPE):
    return LabeledImages(torch.rand(count, *shape), None)


def size(path):
    with Image.open(path) as picture:
        return picture.size


@pytest.mark.parametrize(
    ("system", "expected"),
    [
        (Vectors, ["reconstructions", "interpolations"]),
        (Denoiser, ["reconstructions", "denoised", "interpolations", "latent_grid"]),
        (Indices, ["reconstructions"]),
        (NoPrior, ["reconstructions"]),
        (Generator, ["samples", "interpolations"]),
        (Conditional, ["samples", "interpolations"]),
    ],
)
def test_pictures_of_each_supported_method(tmp_path, system, expected):
    system, data = system(), held_out()
    state = torch.get_rng_state()
    written = write_pictures(tmp_path, system, data, history=[{"loss": 1.0}])
    assert written == [tmp_path / f"{name}.png" for name in [*expected, "losses"]]
    assert sorted(written) == sorted(tmp_path.iterdir())
    assert torch.equal(torch.get_rng_state(), state)
    assert system.training
    first = [path.read_bytes() for path in written]
    torch.rand(3)
    assert [path.read_bytes() for path in write_pictures(tmp_path, system, data, history=[{"loss": 1.0}])] == first


def test_seed_determines_the_samples(tmp_path):
    found = [write_pictures(tmp_path, Generator(), held_out(), seed=seed)[0].read_bytes() for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]


def test_conditional_samples_have_a_row_per_class(tmp_path):
    write_pictures(tmp_path, Conditional(), held_out())
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.size == (12 * CELL, 5 * CELL)
        for row in range(5):
            for column in (0, 11):
                assert picture.getpixel((column * CELL + 4, row * CELL + 4)) == round(255 * row / 4)


def test_interpolations_start_and_end_at_held_out_images(tmp_path):
    data = held_out(4)
    write_pictures(tmp_path, Vectors(), data)
    brightness = (data.images.mean((1, 2, 3)) * 255).round()
    with Image.open(tmp_path / "interpolations.png") as picture:
        assert picture.size == (12 * CELL, 2 * CELL)
        for row in range(2):
            shown = [picture.getpixel((column * CELL + 4, row * CELL + 4)) for column in range(12)]
            assert [shown[0], shown[-1]] == [brightness[row], brightness[row + 2]]
            assert shown in (sorted(shown), sorted(shown, reverse=True))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_held_out_images(tmp_path, count):
    written = write_pictures(tmp_path, Denoiser(), held_out(count))
    assert len(written) == {1: 2, 2: 3, 3: 4}[count]


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_grids(tmp_path, channels, mode):
    images = torch.rand(5, channels, 8, 12)
    scale = round(84 / 12)
    write_images(tmp_path / "grid.png", images, columns=3)
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.mode == mode
        assert picture.size == (3 * (12 * scale + 2), 2 * (8 * scale + 2))
        # The pixel at row 2, column 5 of the image in row 1, column 1; then a cell without an image.
        place = (12 * scale + 2 + 5 * scale + 1, 8 * scale + 2 + 2 * scale + 1)
        assert torch.tensor(picture.getpixel(place)).tolist() == (images[4, :, 2, 5] * 255).round().long().squeeze().tolist()
        assert set(torch.tensor(picture.getpixel((2 * (12 * scale + 2) + 9, place[1]))).flatten().tolist()) == {255}
    write_rows(tmp_path / "rows.png", [images[:1], images[1:]])
    assert size(tmp_path / "rows.png") == (4 * (12 * scale + 2), 2 * (8 * scale + 2))
    write_image(tmp_path / "one.png", images[0])
    assert size(tmp_path / "one.png") == (12, 8)


def test_values_outside_the_range_are_clamped(tmp_path):
    write_image(tmp_path / "one.png", torch.tensor([[[-1.0, 0.5, 2.0]]]))
    with Image.open(tmp_path / "one.png") as picture:
        assert list(picture.tobytes()) == [0, 128, 255]


@pytest.mark.parametrize("others", [1, 2])
def test_comparisons_show_corresponding_images(tmp_path, others):
    images = torch.rand(20, *SHAPE)
    write_comparison(tmp_path / "a.png", images, *(images / (2 + index) for index in range(others)))
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (12 * CELL, 2 * (1 + others) * CELL + 6)
        for index in range(1 + others):
            shown = picture.getpixel((CELL + 1, CELL * index + 1))
            assert shown == (images[1, 0, 0, 0] * 255 / (1 + index)).round()


def test_curves_of_losses_missing_in_some_epochs(tmp_path):
    history = [{"loss": 3.0}, {"loss": 2.0, "generator_loss": 1.0}, {"loss": float("nan")}, {"loss": 1.0}]
    write_curves(tmp_path / "one.png", history[:1])
    write_curves(tmp_path / "two.png", history)
    assert size(tmp_path / "two.png")[0] == 2 * size(tmp_path / "one.png")[0]


def test_equal_losses_share_a_panel(tmp_path):
    history = [{"loss": 3.0, "prior_loss": 2.0, "prior_nats_per_code": 2.0}, {"loss": 2.0}]
    write_curves(tmp_path / "equal.png", history)
    history[0]["prior_nats_per_code"] = 1.0
    write_curves(tmp_path / "different.png", history)
    assert 3 * size(tmp_path / "equal.png")[0] == 2 * size(tmp_path / "different.png")[0]


def test_curves_need_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="needs the package matplotlib"):
        write_curves(tmp_path / "one.png", [{"loss": 1.0}])
