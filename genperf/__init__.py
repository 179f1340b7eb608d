"""Compiled kernels for VQ-VAEs, VAEs and GANs on PyTorch, each validated against plain PyTorch."""

from . import _library
from ._version import __version__

_library.load()

from . import models, nn  # noqa: E402
from .ops import code_statistics, nearest_code, vector_quantize  # noqa: E402

__all__ = ["__version__", "code_statistics", "models", "nearest_code", "nn", "vector_quantize"]
