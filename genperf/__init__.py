"""Compiled kernels for VQ-VAEs, VAEs and GANs on PyTorch, each validated against plain PyTorch."""

from . import _library
from ._version import __version__

_library.load()

from . import compat, losses, metrics, models, nn  # noqa: E402
from .ops import (  # noqa: E402
    KMeansResult,
    code_cross_entropy,
    code_entropy,
    code_statistics,
    covariance_factor,
    finite_scalar_decode,
    finite_scalar_quantize,
    frechet_distance,
    gaussian_sample,
    gradient_norm_penalty,
    gumbel_sample,
    interpolate,
    kmeans,
    lookup_free_decode,
    lookup_free_entropy,
    lookup_free_quantize,
    matrix_sqrt,
    minibatch_similarity,
    nearest_code,
    perturb,
    reference_ops,
    "residual_code_statistics",
    "residual_vector_quantize",
