# SPDX-License-Identifier: Apache-2.0
"""Convolutional encoders and decoders: from images to a quarter of their height and width, or to vectors, and back."""

from typing import Any

from torch import Tensor, nn

from .system import check_divisible

DOWNSAMPLING = 4


class ResidualBlock(nn.Module):
    """x + f(x), with two convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, channels // 2, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels // 2, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def image_encoder(channels: int, hidden: int, outputs: int) -> nn.Sequential:
    """Images [B, channels, H, W] to [B, outputs, H/4, W/4]."""
    return nn.Sequential(*_down(channels, hidden), nn.Conv2d(hidden, outputs, 1))


def image_decoder(inputs: int, hidden: int, channels: int) -> nn.Sequential:
    """[B, inputs, h, w] to images [B, channels, 4h, 4w], unbounded."""
    return nn.Sequential(nn.Conv2d(inputs, hidden, 3, padding=1), *_up(hidden, channels))


def vector_encoder(image_shape: tuple[int, int, int], hidden: int, outputs: int) -> nn.Sequential:
    """Images [B, *image_shape] to vectors [B, outputs]."""
    channels, height, width = image_shape
    size = hidden * (height // DOWNSAMPLING) * (width // DOWNSAMPLING)
    return nn.Sequential(*_down(channels, hidden), nn.Flatten(), nn.Linear(size, outputs))


def vector_decoder(inputs: int, hidden: int, image_shape: tuple[int, int, int]) -> nn.Sequential:
    """Vectors [B, inputs] to images [B, *image_shape], unbounded."""
    channels, height, width = image_shape
    grid = (hidden, height // DOWNSAMPLING, width // DOWNSAMPLING)
    return nn.Sequential(nn.Linear(inputs, grid[0] * grid[1] * grid[2]), nn.Unflatten(1, grid), *_up(hidden, channels))


def check_convolutional(owner: str, config: Any) -> None:
    """Raise ValueError unless these networks can be built with the config's image_shape, hidden and dim."""
    check_divisible(owner, config.image_shape, DOWNSAMPLING)
    if config.hidden < 2 or config.hidden % 2:
        raise ValueError(f"{owner}: hidden must be a positive even number, got {config.hidden}.")
    if config.dim < 1:
        raise ValueError(f"{owner}: dim must be at least 1, got {config.dim}.")


def _down(channels: int, hidden: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, hidden // 2, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(hidden // 2, hidden, 4, stride=2, padding=1),
        ResidualBlock(hidden),
        nn.ReLU(),
    ]


def _up(hidden: int, channels: int) -> list[nn.Module]:
    return [
        ResidualBlock(hidden),
        nn.ReLU(),
        nn.ConvTranspose2d(hidden, hidden // 2, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(hidden // 2, channels, 4, stride=2, padding=1),
    ]
