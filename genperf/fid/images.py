"""Images on their way to a feature extractor: decoded and resized in threads, batch by batch."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .._errors import UserError
from .zipped_array import ZippedArray

# A folder's files, or an array [N, H, W] or [N, H, W, 1 or 3] of uint8.
ImageSequence = list[Path] | np.ndarray | ZippedArray

Image.init()
# Pillow goes by content, whatever a file is called. Of what it opens, EPS starts Ghostscript, IPTC opens any format inside it, and the
# others have no decoder but one that another package or the system adds.
FORMATS = [name for name in Image.OPEN if name not in ("EPS", "IPTC", "WMF", "EMF", "BUFR", "GRIB", "HDF5", "MPEG")]


def image_paths(folder: Path) -> list[Path]:
    """The images in a folder and the folders within, in the order of their names."""
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
    if not paths:
        raise UserError(f"the folder {str(folder)!r} must hold images, but no file in it has the suffix of an image.")
    return paths


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """An image file of 8 bits per channel.

    Raises:
        UserError: there is none, or decoding it within the context fails.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.mode[0] in "IF":
                raise UserError(f"images must have 8 bits per channel, got {str(path)!r} of mode {image.mode}.")
            yield image
    except UserError:
        raise
    except Exception as error:  # of whatever kind a decoder raises on broken data
        raise UserError(f"the image {str(path)!r} cannot be read: {str(error).rstrip('.') or type(error).__name__}.") from error


def read_batches(
    images: ImageSequence, source: str, *, batch_size: int, channels: int, size: tuple[int, int] | None, workers: int
) -> Iterator[Tensor]:
    """uint8 [B, channels, H, W], in order, the last batch perhaps smaller.

    Args:
        source: where the images come from, for messages.
        channels: 3 makes RGB of every image, 1 grayscale; an alpha channel is dropped.
        size: width and height to resize to, by Pillow's bicubic filter; None leaves images alone, which must then have one size.
        workers: threads; Pillow decodes and resizes outside of the interpreter lock.
    """
    mode = "RGB" if channels == 3 else "L"
    first: np.ndarray | None = None
    with ThreadPoolExecutor(workers) as pool:
        # A bounded queue: submitting every image at once would hold the decoded folder in memory.
        left = iter(images)
        queue: deque[Future[np.ndarray]] = deque()
        try:
            for start in range(0, len(images), batch_size):
                wanted = 2 * batch_size + workers - len(queue)
                queue.extend(pool.submit(_read, image, mode, size) for image in islice(left, wanted))
                batch = []
                for index in range(start, min(start + batch_size, len(images))):
                    pixels = queue.popleft().result()
                    first = pixels if first is None else first
                    if pixels.shape != first.shape:
                        raise UserError(
                            f"images must have one size unless --size gives it, got {_size(first)} in {_name(images, 0, source)} "
                            f"and {_size(pixels)} in {_name(images, index, source)}."
                        )
                    batch.append(pixels)
                # [B, H, W(, 3)] -> [B, channels, H, W]
                stacked = torch.from_numpy(np.stack(batch))
                yield stacked.movedim(-1, 1).contiguous() if channels == 3 else stacked[:, None]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _read(image: Path | np.ndarray, mode: str, size: tuple[int, int] | None) -> np.ndarray:
    if isinstance(image, np.ndarray):
        return _convert(Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image), mode, size)
    with open_image(image) as opened:
        return _convert(opened, mode, size)


def _convert(image: Image.Image, mode: str, size: tuple[int, int] | None) -> np.ndarray:
    image = image.convert(mode)
    if size is not None and image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    return np.asarray(image)


def _name(images: ImageSequence, index: int, source: str) -> str:
    return repr(str(images[index])) if isinstance(images, list) else f"image {index} of {source!r}"


def _size(pixels: np.ndarray) -> str:
    return f"{pixels.shape[1]}x{pixels.shape[0]}"
