import pytest
import torch

from genperf.models import VQVAE, VQVAEConfig


def small(**changes):
    torch.manual_seed(0)
    return VQVAE(VQVAEConfig(**{"hidden": 8, "dim": 4, "num_codes": 16, **changes}))


@pytest.mark.parametrize(("channels", "height", "width"), [(1, 28, 28), (3, 8, 12)])
def test_shapes(channels, height, width):
    model = small(image_channels=channels)
    images = torch.rand(2, channels, height, width)
    reconstruction, indices, loss = model(images)
    assert reconstruction.shape == images.shape
    assert indices.shape == (2, height // 4, width // 4)
    assert indices.dtype == torch.int64
    assert loss.shape == ()
    assert model.decode(indices).shape == images.shape


def test_indices_carry_the_whole_image():
    model = small().eval()
    images = torch.rand(3, 1, 16, 16)
    output = model(images)
    indices = model.encode(images)
    assert torch.equal(indices, output.indices)
    torch.testing.assert_close(model.decode(indices), output.reconstruction)


def test_encode_learns_nothing():
    model = small().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.encode(torch.rand(3, 1, 16, 16))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("decay", [None, 0.9])
def test_training_lowers_the_loss(decay):
    model = small(decay=decay)
    images = torch.rand(8, 1, 2, 2).repeat_interleave(8, 2).repeat_interleave(8, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    reconstruction = []
    for _ in range(60):
        losses = model.training_step(images)
        assert losses.keys() == {"loss", "reconstruction", "quantizer"}
        torch.testing.assert_close(losses["loss"].detach(), losses["reconstruction"] + losses["quantizer"])
        optimizer.zero_grad()
        losses["loss"].backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        reconstruction.append(losses["reconstruction"].item())
    assert reconstruction[-1] < 0.4 * reconstruction[0]


def test_init_codes_takes_encodings():
    model = small()
    images = torch.rand(4, 1, 16, 16)
    model.init_codes(images)
    latents = model.encoder(images).movedim(1, -1).reshape(-1, 4)
    assert torch.cdist(model.quantizer.codebook, latents).amin(1).max() < 1e-3


@pytest.mark.parametrize("shape", [(1, 1, 30, 28), (1, 3, 28, 28), (1, 28, 28)])
def test_images_that_do_not_fit(shape):
    with pytest.raises(ValueError, match=r"shape \[B, 1, H, W\], H and W divisible by 4, got \["):
        small()(torch.rand(shape))


@pytest.mark.parametrize(
    ("changes", "message"), [({"image_channels": 0}, "image_channels"), ({"hidden": 7}, "even"), ({"num_codes": 0}, "num_codes")]
)
def test_config_that_does_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)
