"""Classes of vector-quantize-pytorch with the same arguments, returned values and state_dicts; upstream need not be installed.

    from genperf.compat.vector_quantize_pytorch import VectorQuantize

Checkpoints load in both directions. Each class documents its differences from upstream.
"""

from .finite_scalar_quantization import FSQ
from .lookup_free_quantization import LFQ
from .residual_vq import GroupedResidualVQ, ResidualVQ
from .sim_vq import SimVQ
from .vector_quantize import VectorQuantize

__all__ = ["FSQ", "LFQ", "GroupedResidualVQ", "ResidualVQ", "SimVQ", "VectorQuantize"]
