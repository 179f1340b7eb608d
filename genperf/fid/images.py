# SPDX-License-Identifier: Apache-2.0
"""Reading of images for a feature extractor: decoded and resized in threads, batch by batch."""

from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .._errors import UserError
from .image_files import ImageFile, ZippedFile, open_image
from .zipped_array import ZippedArray

# Files, or an array [N, H, W] or [N, H, W, 1 or 3], uint8.
ImageSequence = list[Path] | list[ZippedFile] | np.ndarray | ZippedArray


def read_batches(
    images: ImageSequence,
    source: str,
    *,
    batch_size: int,
    channels: int,
    size: tuple[int, int] | None,
    workers: int,
    exif: bool = True,
    share: range | None = None,
    one_size: bool = True,
) -> Generator[Tensor, None, None]:
    """Read images in order as batches, uint8 [B, channels, H, W]; the last one, or one before an image of another size, may be smaller.

    Args:
        source: name of the source for error messages.
        channels: 3 converts every image to RGB, 1 to grayscale; an alpha channel is dropped.
        size: width and height to resize to with Pillow's bicubic filter; None for no resizing.
        workers: number of threads; Pillow releases the GIL while it decodes and resizes.
        exif: as in `open_image`.
        share: consecutive indices of the images to read; None for all.
        one_size: whether images without `size` must have one size.
    """
    mode = "RGB" if channels == 3 else "L"
    share = range(len(images)) if share is None else share
    first: np.ndarray | None = None
    with ThreadPoolExecutor(workers) as pool:
        # The queue is bounded, to limit the number of decoded images in memory.
        remaining = islice(images, share.start, share.stop)
        queue: deque[Future[np.ndarray]] = deque()
        try:
            for start in share[::batch_size]:
                free = 2 * batch_size + workers - len(queue)
                queue.extend(pool.submit(_read, image, mode, size, exif) for image in islice(remaining, free))
                batch = []
                for index in range(start, min(start + batch_size, share.stop)):
                    pixels = queue.popleft().result()
                    first = pixels if first is None else first
                    if one_size and pixels.shape != first.shape:
                        raise UserError(
                            f"images must have one size unless --size gives it, got {_size(first)} in {_name(images, share.start, source)} "
                            f"and {_size(pixels)} in {_name(images, index, source)}; --size 299 resizes all to 299x299."
                        )
                    batch.append(pixels)
                for _, alike in groupby(batch, np.shape):
                    # [B, H, W(, 3)] -> [B, channels, H, W]
                    stacked = torch.from_numpy(np.stack(list(alike)))
                    yield stacked.movedim(-1, 1).contiguous() if channels == 3 else stacked[:, None]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _read(image: ImageFile | np.ndarray, mode: str, size: tuple[int, int] | None, exif: bool) -> np.ndarray:
    if isinstance(image, np.ndarray):
        return _convert(Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image), mode, size)
    with open_image(image, exif=exif) as opened:
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
