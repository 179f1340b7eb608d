"""Classes of vector-quantize-pytorch under their names, arguments, returned values and state dicts; that package is not needed.

    from genperf.compat.vector_quantize_pytorch import VectorQuantize

A checkpoint of theirs loads here and the other way around. What differs is listed with each class.
"""

from .fsq import FSQ
from .lfq import LFQ
from .residual_vq import GroupedResidualVQ, ResidualVQ
from .sim_vq import SimVQ
from .vector_quantize import VectorQuantize

__all__ = ["FSQ", "LFQ", "GroupedResidualVQ", "ResidualVQ", "SimVQ", "VectorQuantize"]
