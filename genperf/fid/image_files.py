# SPDX-License-Identifier: Apache-2.0
"""Image files in folders and zip archives."""

import io
import os
import stat
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from .._errors import UserError, reason
from .._messages import log

Image.init()
# Pillow detects the format from the content, not from the name. Excluded: EPS runs Ghostscript, IPTC opens any nested format, and the
# others have no decoder of Pillow's own.
FORMATS = [name for name in Image.OPEN if name not in ("EPS", "IPTC", "WMF", "EMF", "BUFR", "GRIB", "HDF5", "MPEG")]
# Photos that Pillow does not read, or only if it is built for them.
_PHOTOS = {".avif", ".heic", ".heif", ".hif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"}

_ORIENTATION = 0x0112  # in EXIF
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ZippedFile(NamedTuple):
    """A file in an open zip archive."""

    archive: zipfile.ZipFile
    name: str

    def __str__(self) -> str:
        return f"{self.archive.filename}/{self.name}"


ImageFile = Path | ZippedFile


def image_paths(folder: Path) -> list[Path]:
    """Images in a folder and its subfolders, sorted by path.

    Links are followed. Files and folders whose names begin with a dot are left out.

    Raises:
        UserError: there are none, a folder cannot be read, or a link leads nowhere.
    """
    paths = _images(_files(folder), str(folder))
    if not paths:
        raise UserError(f"the folder {str(folder)!r} must hold images, but no file in it has the suffix of an image.")
    return paths


def zipped_images(path: Path) -> list[ZippedFile]:
    """Images in a zip archive, chosen and sorted like those of a folder.

    Raises:
        UserError: there are none, or the archive is damaged.
    """
    try:
        archive = zipfile.ZipFile(path)
        names = {Path(name): name for name in archive.namelist() if not name.endswith("/")}
    except Exception as error:  # damaged archives raise exceptions of many classes
        raise UserError(f"the archive {str(path)!r} cannot be read: {reason(error)}.") from error
    paths = _images((path for path in names if not any(part.startswith(".") for part in path.parts)), str(path))
    if not paths:
        raise UserError(f"the archive {str(path)!r} must hold images or arrays, but no file in it has the suffix of one.")
    return [ZippedFile(archive, names[path]) for path in paths]


@contextmanager
def open_image(file: ImageFile, *, exif: bool = True) -> Iterator[Image.Image]:
    """Open an image file with 8 bits per channel.

    Args:
        exif: turn the image upright, as its EXIF orientation says.

    Raises:
        UserError: the file cannot be opened, or decoding it within the context fails.
    """
    try:
        source = file if isinstance(file, Path) else io.BytesIO(file.archive.read(file.name))
        with Image.open(source, formats=FORMATS) as image:
            if image.mode[0] in "IF":
                raise UserError(f"images must have 8 bits per channel, got {str(file)!r} of mode {image.mode}.")
            yield _upright(image) if exif else image
    except UserError:
        raise
    except Exception as error:  # decoders raise exceptions of many classes on damaged data
        raise UserError(f"the image {str(file)!r} cannot be read: {reason(error)}.") from error


def _upright(image: Image.Image) -> Image.Image:
    image.load()  # the metadata may follow the pixels
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # viewers ignore damaged metadata as well
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _images(paths: Iterable[Path], source: str) -> list[Path]:
    """Those with the suffix of an image that Pillow reads, sorted; a warning in the log counts photos in other formats."""
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
    images, photos = [], Counter[str]()
    for path in paths:
        suffix = path.suffix.lower()
        if suffix in suffixes:
            images.append(path)
        elif suffix in _PHOTOS:
            photos[suffix] += 1
    if photos:
        counts = ", ".join(f"{count} {suffix}" for suffix, count in sorted(photos.items()))
        log.warning("photos in %r that Pillow does not read are left out: %s.", source, counts)
    return sorted(images)


def _files(folder: Path) -> Iterator[Path]:
    """Files in a folder and its subfolders. A folder that is linked from within itself is not entered again."""
    folders: list[tuple[Path, frozenset[tuple[int, int]]]] = [(folder, frozenset())]
    while folders:
        folder, above = folders.pop()
        try:
            status = folder.stat()
            identity = (status.st_dev, status.st_ino)
            if identity in above:
                continue
            with os.scandir(folder) as entries:
                visible = [folder / entry.name for entry in entries if not entry.name.startswith(".")]
        except OSError as error:
            raise UserError(f"the folder {str(folder)!r} cannot be read: {reason(error)}.") from error
        for path in visible:
            try:
                mode = path.stat().st_mode
            except OSError as error:
                if isinstance(error, FileNotFoundError) and not path.is_symlink():
                    continue  # removed since the folder was listed
                raise UserError(f"the entry {str(path)!r} of the folder cannot be followed: {reason(error)}.") from error
            if stat.S_ISDIR(mode):
                folders.append((path, above | {identity}))
            elif stat.S_ISREG(mode):
                yield path
