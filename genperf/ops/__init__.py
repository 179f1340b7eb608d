from .code_statistics import code_statistics
from .gaussian_sample import gaussian_sample
from .gradient_norm_penalty import gradient_norm_penalty
from .gumbel_sample import gumbel_sample
from .interpolate import interpolate, perturb
from .minibatch_similarity import minibatch_similarity
from .nearest_code import nearest_code
from .vector_quantize import vector_quantize

__all__ = [
    "code_statistics",
    "gaussian_sample",
    "gradient_norm_penalty",
    "gumbel_sample",
    "interpolate",
    "minibatch_similarity",
    "nearest_code",
    "perturb",
    "vector_quantize",
]
