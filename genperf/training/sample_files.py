# SPDX-License-Identifier: Apache-2.0
"""Files of samples: one picture, a folder of pictures, or an .npz file."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from .._errors import UserError, reason
from .._files import write_atomically
from .pictures import write_image, write_images


def check_output_path(path: Path) -> None:
    """Raise UserError unless `write_samples` supports the path."""
    if path.suffix in (".png", ".npz"):
        if os.path.isdir(path):
            raise UserError(f"--out must be a file where it ends in {path.suffix}, got the folder {str(path)!r}.")
    elif path.suffix and not os.path.isdir(path):
        raise UserError(f"--out must be a .png or .npz file or a folder, got {str(path)!r}.")
    elif os.path.isfile(path) or (os.path.isdir(path) and os.listdir(path)):
        # New samples could not be told apart from the images that are already there.
        raise UserError(f"--out must be a new or empty folder, or end in .png or .npz, got {str(path)!r}.")


def write_samples(path: Path, images: Tensor, labels: Tensor | None, columns: int) -> None:
    """Write samples to a path that `check_output_path` has accepted.

    Args:
        path: a .png file for one picture with `columns` columns; an .npz file for arrays "images", uint8 [N, H, W, C], and "labels";
            otherwise a folder, for a .png per sample.
        images: [N, C, H, W] in [0, 1], on the CPU.

    Raises:
        UserError: the path cannot be written to.
    """
    try:
        (path.parent if path.suffix in (".png", ".npz") else path).mkdir(parents=True, exist_ok=True)
        if path.suffix == ".png":
            write_images(path, images, columns)
        elif path.suffix == ".npz":
            arrays: dict[str, Any] = {"images": (images * 255).round().byte().movedim(1, -1).numpy()}
            if labels is not None:
                arrays["labels"] = labels.numpy()
            write_atomically(path, lambda file: np.savez(file, **arrays))
        else:
            _write_folder(path, images)
    except OSError as error:
        raise UserError(f"--out must name a place that can be written to, got {str(path)!r}: {reason(error)}.") from error


def _write_folder(folder: Path, images: Tensor) -> None:
    """Write a .png per image; after an error or Ctrl-C the folder is empty again, as `check_output_path` will want it."""
    digits = len(str(len(images) - 1))
    written = [folder / f"{number:0{digits}}.png" for number in range(len(images))]
    try:
        for path, image in zip(written, images, strict=True):
            write_image(path, image)
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        raise
