# SPDX-License-Identifier: Apache-2.0
"""Vectors in .npy, .npz and .parquet files."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._errors import UserError, import_extra, reason

SUFFIXES = (".npy", ".npz", ".parquet")


def open_vectors(path: Path, name: str | None = None) -> Tensor:
    """The vectors [N, D] of a file. Those of an .npy file are mapped into memory, so that they may be larger than it.

    Args:
        path: an .npy file with an array [N, D], an .npz file of arrays, or a .parquet file with a column of lists of one length.
        name: of the array or column; None if the file has only one.

    Returns:
        float16, float32 or float64 as in the file; integers as float32.

    Raises:
        UserError: the file cannot be read, or holds something else; for .parquet also if pyarrow is not installed.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"vectors must be in a file of {', '.join(SUFFIXES)}, got {str(path)!r}.")
    try:
        array = _read_parquet(path, name) if path.suffix == ".parquet" else _read_numpy(path, name)
    except UserError:
        raise
    except Exception as error:  # damaged files raise exceptions of many classes
        raise UserError(f"vectors cannot be read from {str(path)!r}: {reason(error)}.") from error
    if array.ndim != 2 or 0 in array.shape or array.dtype.kind not in "fiu":
        raise UserError(f"vectors must be a table of numbers [N, D], got {array.dtype} of shape {list(array.shape)} in {str(path)!r}.")
    return _as_tensor(array)


def open_weights(path: Path, count: int) -> Tensor:
    """The weights [N] of `count` vectors, from an .npy file: float16, float32 or float64 as in the file; integers as float32.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    if path.suffix != ".npy":
        raise UserError(f"weights must be in an .npy file, got {str(path)!r}.")
    try:
        array = np.load(path, mmap_mode="c", allow_pickle=False)
    except Exception as error:  # damaged files raise exceptions of many classes
        raise UserError(f"weights cannot be read from {str(path)!r}: {reason(error)}.") from error
    if array.shape != (count,) or array.dtype.kind not in "fiu":
        raise UserError(f"weights must be {count} numbers, one for each vector, got {array.dtype} {list(array.shape)} in {str(path)!r}.")
    return _as_tensor(array)


def _as_tensor(array: np.ndarray) -> Tensor:
    """A tensor of a floating dtype that torch has."""
    if array.dtype.kind in "iu" or array.dtype.itemsize > 8:
        array = array.astype(np.float32)
    return torch.from_numpy(array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("=")))


def _read_numpy(path: Path, name: str | None) -> np.ndarray:
    # Copy-on-write, since torch warns about read-only arrays.
    content: Any = np.load(path, mmap_mode="c", allow_pickle=False)
    if isinstance(content, np.ndarray):
        if name is not None:
            raise UserError(f"an .npy file holds one array without a name, got the name {name!r} for {str(path)!r}.")
        return content
    with content:
        return content[_only(path, "arrays", content.files, name)]


def _read_parquet(path: Path, name: str | None) -> np.ndarray:
    parquet: Any = import_extra("pyarrow.parquet", "pyarrow", "cluster")
    schema = parquet.read_schema(path)
    lists = [field.name for field in schema if "list" in str(field.type)]
    column = parquet.read_table(path, columns=[_only(path, "columns of lists", lists, name)]).column(0).combine_chunks()
    if column.null_count:
        raise UserError(f"a vector must not be missing, got {column.null_count} nulls in {str(path)!r}.")
    values = column.flatten().to_numpy(zero_copy_only=False)
    length = len(values) // max(1, len(column))
    if any(len(row) != length for row in column):
        raise UserError(f"vectors must have one length, got several in {str(path)!r}.")
    return values.reshape(len(column), length).copy()


def _only(path: Path, kind: str, names: list[str], name: str | None) -> str:
    if name is None and len(names) == 1:
        return names[0]
    if name not in names:
        got = "none" if name is None else repr(name)
        raise UserError(f"--name must be one of the {kind} in {str(path)!r}, which are {', '.join(names) or 'none'}, got {got}.")
    return name
