# SPDX-License-Identifier: Apache-2.0
import sys

from ._dispatch import reference_ops
from ._noise import sample_offset
from .code_cross_entropy import code_cross_entropy
from .code_entropy import code_entropy
from .code_statistics import code_statistics
from .covariance_factor import covariance_factor
from .finite_scalar_quantize import finite_scalar_decode, finite_scalar_quantize
from .frechet_distance import frechet_distance
from .gaussian_sample import gaussian_sample
from .gradient_norm_penalty import gradient_norm_penalty
from .gumbel_sample import gumbel_sample
from .interpolate import interpolate, perturb
from .kmeans import KMeansProgress, KMeansResult, kmeans
from .lookup_free_entropy import lookup_free_entropy
from .lookup_free_quantize import lookup_free_decode, lookup_free_quantize
from .matrix_sqrt import matrix_sqrt
from .minibatch_similarity import minibatch_similarity
from .nearest_code import nearest_code
from .nearest_codes import nearest_codes
from .residual_kmeans import ResidualKMeansResult, residual_kmeans
from .residual_vector_quantize import residual_code_statistics, residual_vector_quantize
from .sample_code import sample_code
from .trace_sqrt_product import trace_sqrt_product
from .vector_quantize import vector_quantize

# The only list of public ops, which `genperf` exports as well. Its order is that of `genperf info`.
__all__ = [  # noqa: RUF022
    "nearest_code",
    "nearest_codes",
    "vector_quantize",
    "residual_vector_quantize",
    "code_statistics",
    "residual_code_statistics",
    "kmeans",
    "KMeansResult",
    "KMeansProgress",
    "residual_kmeans",
    "ResidualKMeansResult",
    "code_entropy",
    "code_cross_entropy",
    "sample_code",
    "finite_scalar_quantize",
    "finite_scalar_decode",
    "lookup_free_quantize",
    "lookup_free_decode",
    "lookup_free_entropy",
    "gaussian_sample",
    "gumbel_sample",
    "interpolate",
    "perturb",
    "gradient_norm_penalty",
    "minibatch_similarity",
    "trace_sqrt_product",
    "frechet_distance",
    "matrix_sqrt",
    "covariance_factor",
    "reference_ops",
    "sample_offset",
]

# Ops with implementations to choose from: each has a module of its name with `unavailable`. The name in this package is the function.
OPS = tuple(name for name in __all__ if hasattr(sys.modules.get(f"{__name__}.{name}"), "unavailable"))
