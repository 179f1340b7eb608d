"""Pictures of results."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

_COLUMNS = 12
_PAIRS = 4
_SIDE = 84  # pixels that an image is scaled up to, at least roughly
_GAP = 2


def write_comparison(path: Path, originals: Tensor, reconstructions: Tensor) -> None:
    """A .png with rows of originals, each above the row of their reconstructions; both [N, C, H, W] around [0, 1]."""
    from PIL import Image

    shown = min(len(originals), _COLUMNS * _PAIRS)
    columns = min(shown, _COLUMNS)
    rows = []
    for start in range(0, shown, columns):
        rows += [_row(images[start : min(start + columns, shown)], columns) for images in (originals, reconstructions)]
        rows.append(rows[-1].new_ones(rows[-1].shape[0], 3 * _GAP, rows[-1].shape[2]))  # wider apart than the two of a pair
    grid = torch.cat(rows[:-1], dim=1)  # [C, rows, columns]
    pixels = (grid.clamp(0, 1) * 255).round().byte().movedim(0, -1)
    Image.fromarray(pixels.squeeze(-1).numpy() if pixels.shape[-1] == 1 else pixels.numpy()).save(path)


def _row(images: Tensor, columns: int) -> Tensor:
    """Scaled images side by side, [C, height, width], with white gaps and white places where images are missing."""
    images = images.detach().float().cpu()
    images = F.pad(images, (0, 0, 0, 0, 0, 0, 0, columns - len(images)), value=1)
    scale = max(1, round(_SIDE / max(images.shape[2:])))
    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    images = F.pad(images, (0, _GAP, 0, _GAP), value=1)
    return torch.cat(list(images), dim=-1)
