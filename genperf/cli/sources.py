"""What an argument of `genperf fid` may be: a file of statistics or features, or images."""

import dataclasses
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ..metrics import load_moments
from .errors import UserError, import_extra

if TYPE_CHECKING:
    from .images import ImageSequence


@dataclasses.dataclass(frozen=True)
class Statistics:
    """A file with mean and covariance."""

    path: str
    mean: Tensor  # [d]
    cov: Tensor  # [d, d]


@dataclasses.dataclass(frozen=True)
class Features:
    """A file with features."""

    path: str
    rows: Tensor  # [N, d]


@dataclasses.dataclass(frozen=True)
class Images:
    """A folder or an array of images, which an extractor makes features of."""

    path: str
    images: "ImageSequence"


Source = Statistics | Features | Images


def open_source(path: str) -> Source:
    """Find out by content what lies at `path`; images in a folder are listed, not read.

    Raises:
        UserError: a sentence that says what is wrong with it.
    """
    if Path(path).is_dir():
        import_extra("PIL", "pillow", "train")
        from .images import image_paths

        return Images(path, image_paths(Path(path)))
    if not Path(path).exists():
        raise UserError(f"an input must be a file of statistics or features, or a folder of images, got {path!r}, which does not exist.")
    try:
        held = load_moments(path)
    except ValueError as error:
        images = _image_array(path)
        if images is None:
            raise UserError(str(error).removeprefix("load_moments: ")) from error
        import_extra("PIL", "pillow", "train")
        return Images(path, images)
    return Features(path, held) if isinstance(held, Tensor) else Statistics(path, *held)


def _image_array(path: str) -> np.ndarray | None:
    """The images that a .npy or .npz file holds; None where it holds none."""
    try:
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(loaded, np.ndarray):
            with loaded:
                # guided-diffusion writes batches of samples as the first of unnamed arrays.
                names = [name for name in ("images", "arr_0") if name in loaded.files]
                if not names and len(loaded.files) != 1:
                    return None
                loaded = loaded[(names or loaded.files)[0]]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    is_image = loaded.ndim == 3 or (loaded.ndim == 4 and loaded.shape[-1] in (1, 3))
    return loaded if is_image and loaded.dtype == np.uint8 and loaded.size else None
