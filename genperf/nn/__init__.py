"""Layers over the ops of genperf."""

from .diagonal_gaussian import DiagonalGaussian
from .gumbel_quantizer import GumbelQuantizer
from .minibatch_discrimination import MinibatchDiscrimination
from .vector_quantizer import CodeUsage, VectorQuantizer, code_usage

__all__ = ["CodeUsage", "DiagonalGaussian", "GumbelQuantizer", "MinibatchDiscrimination", "VectorQuantizer", "code_usage"]
