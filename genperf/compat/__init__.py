# SPDX-License-Identifier: Apache-2.0
"""Drop-in replacements for classes of other libraries, with their names and semantics.

The libraries need not be installed, except torchmetrics, whose class `compat.torchmetrics` extends. `compat.torchmetrics` and
`compat.torcheval`, which uses torcheval where it is installed, are imported on first use.
"""

import importlib

from . import diffusers, pytorch_fid, taming, vector_quantize_pytorch

__all__ = ["diffusers", "pytorch_fid", "taming", "vector_quantize_pytorch"]


def __getattr__(name: str) -> object:
    if name in ("torcheval", "torchmetrics"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
