"""Compiled kernels for VQ-VAEs, VAEs and GANs on PyTorch, each validated against plain PyTorch."""

from . import _library
from ._version import __version__

_library.load()

from . import compat, losses, models, nn  # noqa: E402
from .ops import (  # noqa: E402
    code_statistics,
    gaussian_sample,
    gradient_norm_penalty,
    gumbel_sample,
    interpolate,
    minibatch_similarity,
    nearest_code,
    perturb,
    vector_quantize,
)

__all__ = [
    "__version__",
    "code_statistics",
    "compat",
    "gaussian_sample",
    "gradient_norm_penalty",
    "gumbel_sample",
    "interpolate",
    "losses",
    "minibatch_similarity",
    "models",
    "nearest_code",
    "nn",
    "perturb",
    "vector_quantize",
]
