"""Classes of vector-quantize-pytorch under their names, arguments, returned values and state dicts; that package is not needed."""

from .fsq import FSQ
from .lfq import LFQ

__all__ = ["FSQ", "LFQ"]
