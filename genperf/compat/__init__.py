"""Drop-in replacements for classes of other libraries, with their names and semantics.

The libraries need not be installed, except torchmetrics, whose class `compat.torchmetrics` extends; it is imported on first use.
"""

import importlib

from . import diffusers, pytorch_fid, taming, vector_quantize_pytorch

__all__ = ["diffusers", "pytorch_fid", "taming", "vector_quantize_pytorch"]


def __getattr__(name: str) -> object:
    if name == "torchmetrics":
        return importlib.import_module(".torchmetrics", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
