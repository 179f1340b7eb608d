"""Drop-ins for classes of other libraries, under their names and with their semantics.

None of these libraries is needed, but for torchmetrics, whose class `compat.torchmetrics` extends: it is imported when first used.
"""

import importlib

from . import diffusers, pytorch_fid, taming, vector_quantize_pytorch

__all__ = ["diffusers", "pytorch_fid", "taming", "vector_quantize_pytorch"]


def __getattr__(name: str) -> object:
    if name == "torchmetrics":
        return importlib.import_module(".torchmetrics", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
