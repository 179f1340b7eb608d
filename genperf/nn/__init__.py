"""Layers over the ops of genperf."""

from .vector_quantizer import CodeUsage, VectorQuantizer, code_usage

__all__ = ["CodeUsage", "VectorQuantizer", "code_usage"]
