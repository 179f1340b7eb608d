"""Row-by-row reading of arrays in .npz files that may be larger than memory."""

import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import numpy as np

from .._errors import UserError

ERRORS = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)  # RuntimeError: encrypted

_READ_HEADER = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class ZippedArray:
    """An array in an .npz file. The constructor reads its header; iteration reads it row by row.

    Attributes:
        shape, dtype: of the array.
        fortran_order: whether the first index varies fastest; rows are then not contiguous and cannot be iterated over.

    Raises:
        one of ERRORS: the array does not exist or cannot be read.
    """

    def __init__(self, path: str, name: str) -> None:
        self._path, self._name = path, name
        with self._open():
            pass

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
        except ERRORS as error:
            raise UserError(f"the array {self._name!r} in {self._path!r} cannot be read: {str(error).rstrip('.')}.") from error

    @contextmanager
    def _open(self) -> Iterator[IO[bytes]]:
        """Open the array's file, positioned after the header."""
        with zipfile.ZipFile(self._path) as archive, archive.open(f"{self._name}.npy") as file:
            version = np.lib.format.read_magic(file)
            if version not in _READ_HEADER:
                raise ValueError(f"its format has version {version}")
            self.shape, self.fortran_order, self.dtype = _READ_HEADER[version](file)
            yield file
