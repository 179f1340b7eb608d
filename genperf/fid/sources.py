# SPDX-License-Identifier: Apache-2.0
"""Inputs of `genperf fid`: a file of statistics or features, or images."""

import dataclasses
import os
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from .._errors import UserError, import_extra
from ..metrics import FrechetReference, load_moments
from .zipped_array import ZippedArray, is_image_archive

if TYPE_CHECKING:
    from .images import ImageSequence


@dataclasses.dataclass(frozen=True)
class Statistics:
    """A file with a mean and a covariance."""

    path: str
    reference: FrechetReference


@dataclasses.dataclass(frozen=True)
class Features:
    """A file with features."""

    path: str
    rows: Tensor  # [N, d]


@dataclasses.dataclass(frozen=True)
class Images:
    """A folder, a zip archive or an array of images, from which an extractor computes features."""

    path: str
    images: "ImageSequence"


Source = Statistics | Features | Images


def open_source(path: str) -> Source:
    """Open the input at `path`, whose content decides its kind. Images in a folder are listed but not read.

    Raises:
        UserError: the input does not exist, or is none of the supported kinds.
    """
    if not path:
        raise UserError("an input must be the path of a file or folder, got ''.")
    if os.path.isdir(path):
        import_extra("PIL", "pillow", "fid")
        from .image_files import image_paths

        return Images(path, image_paths(Path(path)))
    if not os.path.exists(path):
        raise UserError(
            f"an input must be a file of statistics or features, or a folder or archive of images, got {path!r}, which does not exist."
        )
    # Before load_moments, which would read a whole array of images only to reject it.
    images = _image_array(path, only_array=True)
    if images is None and is_image_archive(path):
        import_extra("PIL", "pillow", "fid")
        from .image_files import zipped_images

        return Images(path, zipped_images(Path(path)))
    if images is None:
        try:
            content = load_moments(path)
        except (ValueError, OSError) as error:
            images = _image_array(path, only_array=False)
            if images is None:
                raise UserError(str(error).removeprefix("load_moments: ")) from error
        else:
            return Features(path, content) if isinstance(content, Tensor) else Statistics(path, _reference(path, *content))
    import_extra("PIL", "pillow", "fid")
    return Images(path, images)


def _reference(path: str, mean: Tensor, cov: Tensor) -> FrechetReference:
    try:
        return FrechetReference.from_moments(mean, cov)
    except ValueError as error:
        reason = str(error).partition(": ")[2].rstrip(".")
        raise UserError(f"the statistics in {path!r} cannot be used: {reason}.") from error


def _image_array(path: str, *, only_array: bool) -> np.ndarray | ZippedArray | None:
    """Open the images in a .npy or .npz file, memory-mapped or to be read row by row; None if it has none.

    Args:
        only_array: whether the images must be the only array in the file.
    """
    try:
        names: list[str] = []
        if not zipfile.is_zipfile(path):
            loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            with zipfile.ZipFile(path) as archive:
                names = [name.removesuffix(".npy") for name in archive.namelist()]
            if len(names) > 1:
                # guided-diffusion writes batches of samples as the first unnamed array.
                names = [] if only_array else [name for name in ("images", "arr_0") if name in names]
            if not names:
                return None
            loaded = ZippedArray(path, names[0])
        shape = loaded.shape
        if loaded.dtype != np.uint8 or 0 in shape or len(shape) not in (3, 4):
            return None
        if len(shape) == 4 and shape[-1] not in (1, 3):
            raise UserError(f"{path} must hold images [N, H, W] or [N, H, W, 1 or 3], with the channels last, got {list(shape)}.")
        if isinstance(loaded, ZippedArray) and loaded.fortran_order:
            with np.load(path, allow_pickle=False) as arrays:
                return arrays[names[0]]
        return loaded
    except UserError:
        raise
    except Exception:  # another kind of file, or a damaged one: load_moments says what is wrong
        return None
