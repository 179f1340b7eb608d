# SPDX-License-Identifier: Apache-2.0
"""Compiled kernels for VQ-VAEs, VAEs and GANs on PyTorch, each validated against plain PyTorch."""

import importlib
from typing import TYPE_CHECKING, Any

from . import _program

if TYPE_CHECKING or not _program.is_program():
    from ._public import *  # noqa: F403
    from ._public import __all__ as __all__
else:
    _program.exit_on_interrupt()

    # Importing torch takes a second or more, which a command that only prints its usage does not need.
    def __getattr__(name: str) -> Any:
        if name in ("__all__", "__version__") or not name.startswith("_"):
            public = vars(importlib.import_module("genperf._public"))
            if name == "__all__" or name in public.get("__all__", ()):  # absent while the module itself is imported
                return public[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
