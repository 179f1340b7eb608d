# SPDX-License-Identifier: Apache-2.0
"""Pictures of a trained system's results, written as .png files."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from .._errors import import_extra
from .._files import write_atomically
from .._modes import evaluating
from ..models.latent import interpolations
from ..models.system import System, standard_normal
from .data import LabeledImages
from .sampling import draw, num_conditions, sampling_unavailable
from .seeding import seeded

_COLUMNS = 12
_ROWS = 12
_PAIRS = 4
_SIDE = 84  # approximate side in pixels to which small images are scaled up
_GAP = 2
_GRID = 12  # images per side of the latent grid


@torch.no_grad()
def write_pictures(
    folder: Path, system: System, held_out: LabeledImages, *, history: Sequence[dict[str, float]] = (), seed: int = 0
) -> list[Path]:
    """Write a .png to the folder for each of the following that the system supports. Torch's random state does not change.

    supports                    file
    sample                      samples.png, with a row per class for conditional systems
    reconstruct                 reconstructions.png, held-out images above their reconstructions
    corrupt, denoise            denoised.png, rows of held-out images, noisy images and denoised images
    encode to vectors, decode   interpolations.png, each row from one held-out image to another
    a generator from noise      interpolations.png, each row from one sample to another
    latent_grid                 latent_grid.png
    a given training history    losses.png

    Returns:
        the paths, in this order.
    """
    device = system.device
    shown = held_out.images[: _COLUMNS * _PAIRS].to(device)
    written = []

    def path(name: str) -> Path:
        written.append(folder / name)
        return written[-1]

    with seeded(seed, device), evaluating(system):
        if sampling_unavailable(system) is None:
            _write_samples(path("samples.png"), system)
        reconstruct = getattr(system, "reconstruct", None)
        if reconstruct is not None:
            write_comparison(path("reconstructions.png"), shown, reconstruct(shown))
        corrupt, denoise = getattr(system, "corrupt", None), getattr(system, "denoise", None)
        if corrupt is not None and denoise is not None:
            noisy = corrupt(shown)
            write_comparison(path("denoised.png"), shown, noisy, denoise(noisy))
        rows = _interpolations(system, held_out.images[: 2 * _ROWS].to(device))
        if rows is not None:
            write_rows(path("interpolations.png"), list(rows))
        latent_grid = getattr(system, "latent_grid", None)
        if latent_grid is not None and len(held_out.images) >= 3:
            write_images(path("latent_grid.png"), latent_grid(_GRID, held_out.images.to(device)), _GRID)
    if history:
        write_curves(path("losses.png"), history)
    return written


def write_image(path: Path, image: Tensor) -> None:
    """Write one image [C, H, W], clamped to [0, 1], at its own size, as .png."""
    from PIL import Image

    pixels = (image.detach().float().cpu().clamp(0, 1) * 255).round().byte().movedim(0, -1)
    picture = Image.fromarray(pixels.squeeze(-1).numpy() if pixels.shape[-1] == 1 else pixels.numpy())
    write_atomically(path, lambda file: picture.save(file, "PNG"), sync=False)


def write_images(path: Path, images: Tensor, columns: int) -> None:
    """Write the images [N, C, H, W], clamped to [0, 1], as a grid in row-major order."""
    write_rows(path, images.split(columns))


def write_rows(path: Path, rows: Sequence[Tensor]) -> None:
    """Write a grid with a row per element [N, C, H, W] of `rows`, clamped to [0, 1]; N may differ between rows."""
    columns = max(len(row) for row in rows)
    write_image(path, torch.cat([_row(row, columns) for row in rows], dim=1))


def write_comparison(path: Path, originals: Tensor, *others: Tensor) -> None:
    """Write rows of originals, each above the rows of `others` that correspond to it; all [N, C, H, W], clamped to [0, 1]."""
    shown = min(len(originals), _COLUMNS * _PAIRS)
    columns = min(shown, _COLUMNS)
    rows = []
    for start in range(0, shown, columns):
        rows += [_row(images[start : min(start + columns, shown)], columns) for images in (originals, *others)]
        rows.append(rows[-1].new_ones(rows[-1].shape[0], 3 * _GAP, rows[-1].shape[2]))  # a wider gap between groups of rows
    write_image(path, torch.cat(rows[:-1], dim=1))


def write_curves(path: Path, history: Sequence[dict[str, float]]) -> None:
    """Plot each loss over the epochs in its own panel; not every epoch has every loss. Losses that are equal share a panel."""
    # Not pyplot, which keeps figures alive and looks for a display.
    Figure = import_extra("matplotlib.figure", "matplotlib", "train").Figure
    from matplotlib.ticker import MaxNLocator

    names = dict.fromkeys(name for losses in history for name in losses)
    curves = {name: [(epoch, losses[name]) for epoch, losses in enumerate(history, start=1) if name in losses] for name in names}
    titles = {tuple(curve): name for name, curve in curves.items()}  # of equal losses the last one, which says what it measures
    columns = min(len(titles), 3)
    rows = -(-len(titles) // columns)
    figure = Figure(figsize=(4 * columns, 2.6 * rows), dpi=100, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for (curve, name), panel in zip(titles.items(), panels, strict=False):
        panel.plot(*zip(*curve, strict=True), marker="." if len(curve) < 20 else None)
        panel.set_title(name.replace("_", " "), fontsize=10)
        panel.set_xlabel("epoch")
        panel.set_xlim(0.5, len(history) + 0.5)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(alpha=0.3)
    for panel in list(figure.axes)[len(titles) :]:
        panel.set_axis_off()
    write_atomically(path, lambda file: figure.savefig(file, format="png"), sync=False)


def _write_samples(path: Path, system: System) -> None:
    classes = num_conditions(system)
    if not classes:
        write_images(path, draw(system, _COLUMNS * _ROWS), _COLUMNS)
        return
    rows = min(classes, 2 * _ROWS)
    write_images(path, draw(system, rows * _COLUMNS, torch.arange(rows).repeat_interleave(_COLUMNS)), _COLUMNS)


def _interpolations(system: System, images: Tensor) -> Tensor | None:
    """Images [rows, columns, C, H, W] interpolated in the latent space, or None if the latents are not vectors."""
    encode, decode = getattr(system, "encode", None), getattr(system, "decode", None)
    if encode is not None and decode is not None:
        codes = encode(images)
        if len(images) < 2 or not isinstance(codes, Tensor) or not codes.is_floating_point():
            return None
        half = len(codes) // 2
        latents = interpolations(codes[:half], codes[half : 2 * half], _COLUMNS, "lerp")
        return decode(latents.flatten(0, 1)).unflatten(0, (-1, _COLUMNS))
    sampler, condition = getattr(system, "sampler", None), getattr(system, "condition", None)
    if sampler is None or condition is None or not hasattr(system.config, "latent_dim"):
        return None
    start, end = (standard_normal(_ROWS, system.config.latent_dim, device=images.device) for _ in range(2))
    latents = interpolations(start, end, _COLUMNS, "slerp").flatten(0, 1)
    classes = num_conditions(system)
    labels = torch.arange(_ROWS, device=images.device).remainder(classes).repeat_interleave(_COLUMNS) if classes else None
    return sampler(latents, condition(labels)).add(1).div(2).unflatten(0, (-1, _COLUMNS))


def _row(images: Tensor, columns: int) -> Tensor:
    """Upscaled images side by side, [C, height, width], with white gaps, padded with white images to `columns`."""
    images = images.detach().float().cpu()
    images = F.pad(images, (0, 0, 0, 0, 0, 0, 0, columns - len(images)), value=1)
    scale = max(1, round(_SIDE / max(images.shape[2:])))
    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    images = F.pad(images, (0, _GAP, 0, _GAP), value=1)
    return torch.cat(list(images), dim=-1)
