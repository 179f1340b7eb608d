# SPDX-License-Identifier: Apache-2.0
"""Files that are written completely or not at all."""

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_text_atomically(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, completely or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    write_atomically(path, lambda file: file.write(text.encode()))


def write_atomically(path: Path, write: Callable[[BinaryIO], object], *, temporary: str | None = None, sync: bool = True) -> None:
    """Call `write(file)` on a temporary file in the folder of `path`, then rename it to `path`; errors leave no file behind.

    Args:
        path: an existing file is replaced; if it is a symbolic link, the file that it points to.
        temporary: name of the temporary file, for a path with a single writer: the next call replaces what a killed process left behind.
        sync: wait until the content is on the disk, so that the file is whole even after a crash of the machine.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(os.path.realpath(path))
    partial = path.with_name(temporary or f".{uuid.uuid4().hex}.partial")
    try:
        with open(partial, "wb" if temporary else "xb") as file:
            write(file)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        if not partial.is_dir():
            partial.unlink(missing_ok=True)
        raise
