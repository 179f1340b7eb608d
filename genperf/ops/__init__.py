from .code_statistics import code_statistics
from .nearest_code import nearest_code
from .vector_quantize import vector_quantize

__all__ = ["code_statistics", "nearest_code", "vector_quantize"]
