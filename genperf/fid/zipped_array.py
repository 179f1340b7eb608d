# SPDX-License-Identifier: Apache-2.0
"""Zip archives: of images, or of arrays that may be larger than memory and are read row by row."""

import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import numpy as np

from .._errors import UserError, reason
from ..metrics._plain_pickle import torch_pickle

_READ_HEADER = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def is_image_archive(path: str) -> bool:
    """Whether a file is a zip archive without arrays of numpy or torch, and so can only hold images."""
    try:
        with zipfile.ZipFile(path) as archive:
            return torch_pickle(archive) is None and not any(name.endswith(".npy") for name in archive.namelist())
    except Exception:  # another kind of file, or a damaged one
        return False


class ZippedArray:
    """An array in an .npz file. The constructor reads its header; iteration reads it row by row.

    Attributes:
        shape, dtype: of the array.
        fortran_order: whether the first index varies fastest; rows are then not contiguous and cannot be iterated over.

    Raises:
        Exception: of any class, if the array does not exist or cannot be read.
    """

    def __init__(self, path: str, name: str) -> None:
        self._path, self._name = path, name
        with self._open():
            if math.prod(self.shape) * self.dtype.itemsize > self._size:
                raise EOFError("it is cut short")

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[np.ndarray]:
        size = math.prod(self.shape[1:]) * self.dtype.itemsize
        try:
            with self._open() as file:
                for _ in range(len(self)):
                    row = file.read(size)
                    if len(row) < size:
                        raise EOFError("it is cut short")
                    yield np.frombuffer(row, self.dtype).reshape(self.shape[1:])
        except Exception as error:  # damaged archives raise exceptions of many classes
            raise UserError(f"the array {self._name!r} in {self._path!r} cannot be read: {reason(error)}.") from error

    @contextmanager
    def _open(self) -> Iterator[IO[bytes]]:
        """Open the array's file, positioned after the header."""
        with zipfile.ZipFile(self._path) as archive, archive.open(f"{self._name}.npy") as file:
            version = np.lib.format.read_magic(file)
            if version not in _READ_HEADER:
                raise ValueError(f"its format has version {version}")
            self.shape, self.fortran_order, self.dtype = _READ_HEADER[version](file)
            self._size = archive.getinfo(f"{self._name}.npy").file_size
            yield file
