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
from .kmeans import KMeansResult, kmeans
from .lookup_free_entropy import lookup_free_entropy
from .lookup_free_quantize import lookup_free_decode, lookup_free_quantize
from .matrix_sqrt import matrix_sqrt
from .minibatch_similarity import minibatch_similarity
from .nearest_code import nearest_code
from .residual_vector_quantize import residual_code_statistics, residual_vector_quantize
from .sample_code import sample_code
from .trace_sqrt_product import trace_sqrt_product
from .vector_quantize import vector_quantize

__all__ = [
    "KMeansResult",
    "code_cross_entropy",
    "code_entropy",
    "code_statistics",
    "covariance_factor",
    "finite_scalar_decode",
    "finite_scalar_quantize",
    "frechet_distance",
    "gaussian_sample",
    "gradient_norm_penalty",
    "gumbel_sample",
    "interpolate",
    "kmeans",
    "lookup_free_decode",
    "lookup_free_entropy",
    "lookup_free_quantize",
    "matrix_sqrt",
    "minibatch_similarity",
    "nearest_code",
    "perturb",
    "reference_ops",
    "residual_code_statistics",
    "residual_vector_quantize",
    "sample_code",
    "sample_offset",
    "trace_sqrt_product",
    "vector_quantize",
]
