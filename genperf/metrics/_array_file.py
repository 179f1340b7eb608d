# SPDX-License-Identifier: Apache-2.0
"""Named arrays in files of several formats, read without executing anything in the files."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from .._errors import reason
from ._plain_pickle import load_plain_npy, load_plain_pickle, load_plain_torch, torch_pickle

_MOST_NAMES = 10  # in an error message


class ArrayFile:
    """The named arrays of an .npz, .npy, .pkl or .pt file; arrays of an .npz are read when they are accessed.

    It is a context manager. Within it, what damaged content raises becomes a ValueError that names the file; errors of `owner`, whose
    messages begin with its name, stay.

    Args:
        owner: function that reads the file, for error messages.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of another format, or a damaged one.
    """

    def __init__(self, owner: str, path: Path) -> None:
        self.owner, self.path = owner, path
        if not path.exists():
            raise FileNotFoundError(f"{owner}: there is no file {path}.")
        try:
            self.content = self._open()
            self.names = list(_leaves(self.content))
        except Exception as error:  # damaged files raise exceptions of many classes
            raise self._unreadable(error) from error

    def _open(self) -> Mapping[str, Any]:
        with open(self.path, "rb") as file:
            start = file.read(6)
            file.seek(0)
            if start.startswith(b"PK"):
                return self._open_archive(file)
            content = self._open_npy(file) if start == b"\x93NUMPY" else load_plain_pickle(file)
        if not isinstance(content, Mapping):
            raise ValueError(f"it must hold a dictionary, got a {type(content).__name__}")
        return content

    def _open_archive(self, file: BinaryIO) -> Mapping[str, Any]:
        with zipfile.ZipFile(file) as archive:
            pickle_name = torch_pickle(archive)
            if pickle_name is None:
                return np.load(self.path, allow_pickle=False)
            content = load_plain_torch(archive, pickle_name)
        return content if isinstance(content, Mapping) else {"array": content}

    def _open_npy(self, file: BinaryIO) -> object:
        if np.lib.format.read_magic(file) == (1, 0) and np.lib.format.read_array_header_1_0(file)[2].hasobject:
            return load_plain_npy(file)
        # Copy-on-write, since torch warns about read-only arrays.
        return {"array": np.load(self.path, mmap_mode="c", allow_pickle=False)}

    def has(self, *keys: str) -> bool:
        return all(key in self.names for key in keys)

    def __getitem__(self, key: str) -> Any:
        value = self.content
        try:
            for part in [key] if key in value else key.split("/"):
                value = value[part]
        except Exception as error:
            raise self._unreadable(error) from error
        return value

    def describe(self) -> str:
        if not self.names:
            return "nothing"
        more = f" and {len(self.names) - _MOST_NAMES} more" if len(self.names) > _MOST_NAMES else ""
        return f"the names {', '.join(sorted(self.names)[:_MOST_NAMES])}{more}"

    def _unreadable(self, error: Exception) -> ValueError:
        rule = f"{self.path} must be an .npz, .npy, .pkl or .pt file of arrays"
        return ValueError(f"{self.owner}: {rule}, got one that cannot be read: {reason(error)}.")

    def __enter__(self) -> "ArrayFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(self.content, np.lib.npyio.NpzFile):
            self.content.close()
        if isinstance(error, Exception) and not str(error).startswith(f"{self.owner}: "):
            raise self._unreadable(error) from error


def _leaves(content: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Names of the entries in nested dictionaries."""
    if isinstance(content, np.lib.npyio.NpzFile):
        return list(content.files)
    names = []
    for key, value in content.items():
        names += _leaves(value, f"{prefix}{key}/") if isinstance(value, Mapping) else [f"{prefix}{key}"]
    return names
