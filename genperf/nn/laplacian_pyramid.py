# SPDX-License-Identifier: Apache-2.0
"""Laplacian pyramid: an image as bands of detail and a coarse image."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._choices import PyramidKernel

# Taps, and the index of the center tap.
KERNELS: dict[PyramidKernel, tuple[tuple[int, ...], int]] = {"binomial": ((1, 4, 6, 4, 1), 2), "box": ((1, 1), 0)}


class LaplacianPyramid(nn.Module):
    """Decomposes images into bands and reconstructs them; Burt and Adelson (1983), for GANs Denton et al. (2015).

    Equivalent to:
        coarse = [images]                                                   # I_0 ... I_levels
        for _ in range(levels):
            coarse.append(down(coarse[-1]))
        bands = [image - up(next) for image, next in zip(coarse, coarse[1:])] + [coarse[-1]]

        image = bands[-1]                                                   # reconstruct
        for band in bands[-2::-1]:
            image = band + up(image)

    `reconstruct(decompose(images))` equals the images up to rounding for both kernels, since both methods use the same
    `up`. Odd sizes are rounded up: 7 becomes 4. Borders are padded by replication, so a constant image has bands of 0.
    Filters run outside autocast. The layer has no parameters and no persistent buffers, and all methods are differentiable.

    Args:
        levels: K, the number of times images are halved; there are K + 1 bands.
        kernel: "binomial" blurs with (1, 4, 6, 4, 1) / 16 along each axis before dropping every second pixel, and
            interpolates with the same filter; "box" averages 2 x 2 pixels, and repeats them.

    Raises:
        ValueError: an argument outside its range.
    """

    filter: Tensor

    def __init__(self, levels: int, kernel: PyramidKernel = "binomial") -> None:
        super().__init__()
        if levels < 1:
            raise ValueError(f"LaplacianPyramid: levels must be at least 1, got {levels!r}.")
        if kernel not in KERNELS:
            raise ValueError(f"LaplacianPyramid: kernel must be one of {', '.join(KERNELS)}, got {kernel!r}.")
        self.levels = levels
        self.kernel = kernel
        weights, self._center = KERNELS[kernel]
        taps = torch.tensor(weights, dtype=torch.float32)
        self.register_buffer("filter", torch.outer(taps, taps)[None, None] / taps.sum() ** 2, persistent=False)

    def decompose(self, images: Tensor) -> list[Tensor]:
        """The K + 1 bands of images [..., H, W], finest first; the last one is the coarse image."""
        bands = []
        for _ in range(self.levels):
            coarse = self.down(images)
            bands.append(images - self.up(coarse, images.shape[-2:]))
            images = coarse
        return [*bands, images]

    def reconstruct(self, bands: Sequence[Tensor]) -> Tensor:
        """The images [..., H, W] of bands as returned by `decompose`.

        Raises:
            ValueError: another number of bands than K + 1, or bands whose shapes do not match.
        """
        if len(bands) != self.levels + 1:
            raise ValueError(f"LaplacianPyramid.reconstruct: there must be {self.levels + 1} bands, got {len(bands)}.")
        image = bands[-1]
        for band in bands[-2::-1]:
            if band.shape[:-2] != image.shape[:-2]:
                raise ValueError(
                    f"LaplacianPyramid.reconstruct: bands must agree but for height and width, got {list(band.shape)} "
                    f"over {list(image.shape)}."
                )
            image = band + self.up(image, band.shape[-2:])
        return image

    def down(self, x: Tensor) -> Tensor:
        """Filter and halve images [..., H, W] to [..., ceil(H / 2), ceil(W / 2)]."""
        _check("down", x)
        before, after = self._center, self.filter.shape[-1] - 1 - self._center
        with torch.autocast(x.device.type, enabled=False):
            padded = F.pad(x.flatten(0, -3).unsqueeze(1), (before, after, before, after), mode="replicate")
            y = F.conv2d(padded, self.filter.to(x.dtype), stride=2)
        return y.reshape(*x.shape[:-2], *y.shape[-2:])

    def up(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Upsample images [..., h, w] to twice the size, or to `size`: 2h or 2h - 1 by 2w or 2w - 1.

        Raises:
            ValueError: another size.
        """
        _check("up", x)
        h, w = x.shape[-2:]
        height, width = (2 * h, 2 * w) if size is None else size
        if height not in (2 * h, 2 * h - 1) or width not in (2 * w, 2 * w - 1):
            raise ValueError(f"LaplacianPyramid.up: size must be twice x's, or 1 less, got {height} x {width} for {h} x {w}.")
        with torch.autocast(x.device.type, enabled=False):
            padded = F.pad(x.flatten(0, -3).unsqueeze(1), (1, 1, 1, 1), mode="replicate")
            # 4, since only one pixel in four of the upsampled image is nonzero. The padding's pixels come first.
            y = F.conv_transpose2d(padded, 4 * self.filter.to(x.dtype), stride=2)
        first = 2 + self._center
        return y[..., first : first + height, first : first + width].reshape(*x.shape[:-2], height, width)

    def extra_repr(self) -> str:
        return f"{self.levels}, kernel={self.kernel!r}"


def _check(method: str, x: Tensor) -> None:
    if x.dim() < 3 or x.shape[-1] < 1 or x.shape[-2] < 1:
        raise ValueError(f"LaplacianPyramid.{method}: images must be [..., H, W] with at least one more dimension, got {list(x.shape)}.")
    if not x.is_floating_point():
        raise TypeError(f"LaplacianPyramid.{method}: images must be of a floating dtype, got {x.dtype}.")
