# SPDX-License-Identifier: Apache-2.0
"""Layers over the ops of genperf."""

import warnings
from typing import Any

from .._distributed import global_mean
from ._ema import update_codebooks
from .batch_norm import BatchNorm
from .conditioning_augmentation import ConditioningAugmentation
from .diagonal_gaussian import DiagonalGaussian
from .finite_scalar_quantizer import FiniteScalarQuantizer
from .gumbel_quantizer import GumbelQuantizer
from .index_backprop_quantizer import IndexBackpropQuantizer
from .laplacian_pyramid import LaplacianPyramid
from .lookup_free_quantizer import LookupFreeQuantizer
from .minibatch_discrimination import MinibatchDiscrimination
from .residual_vector_quantizer import ResidualVectorQuantizer
from .vector_quantizer import CodeUsage, LossTerms, VectorQuantizer, code_usage
from .virtual_batch_norm import ReferenceBatchNorm, VirtualBatchNorm, reference_pass, set_reference_batch

__all__ = [
    "BatchNorm",
    "CodeUsage",
    "ConditioningAugmentation",
    "DiagonalGaussian",
    "FiniteScalarQuantizer",
    "GumbelQuantizer",
    "IndexBackpropQuantizer",
    "LaplacianPyramid",
    "LookupFreeQuantizer",
    "LossTerms",
    "MinibatchDiscrimination",
    "ReferenceBatchNorm",
    "ResidualVectorQuantizer",
    "VectorQuantizer",
    "VirtualBatchNorm",
    "code_usage",
    "global_mean",
    "reference_pass",
    "set_reference_batch",
    "update_codebooks",
]


def __getattr__(name: str) -> Any:
    if name == "joint_mean":
        warnings.warn("genperf.nn: joint_mean is deprecated, use global_mean.", DeprecationWarning, stacklevel=2)
        return global_mean
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
