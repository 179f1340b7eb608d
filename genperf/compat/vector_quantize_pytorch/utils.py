# SPDX-License-Identifier: Apache-2.0
"""vector-quantize-pytorch's Sequential."""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..._typing import signature_of
from .evo_lookup_free_quantization import EvoLFQ
from .finite_scalar_perturbation import FSP
from .finite_scalar_quantization import FSQ
from .hierarchical_vq import HierarchicalVQ
from .latent_quantization import LatentQuantize
from .lookup_free_quantization import LFQ
from .random_projection_quantizer import RandomProjectionQuantizer
from .residual_fsq import GroupedResidualFSQ, ResidualFSQ
from .residual_lfq import GroupedResidualLFQ, ResidualLFQ
from .residual_sim_vq import ResidualSimVQ
from .residual_vq import GroupedResidualVQ, ResidualVQ
from .sim_vq import SimVQ
from .vector_quantize_pytorch import VectorQuantize

QUANTIZE_KLASSES = (
    *(VectorQuantize, ResidualVQ, GroupedResidualVQ, RandomProjectionQuantizer, SimVQ, ResidualSimVQ, HierarchicalVQ),
    *(FSQ, FSP, ResidualFSQ, GroupedResidualFSQ, LFQ, EvoLFQ, ResidualLFQ, GroupedResidualLFQ, LatentQuantize),
)


class Sequential(nn.Module):
    """Layers in a row, one of which is a quantizer of this package.

    Equivalent to:
        for fn in fns:
            if isinstance(fn, QUANTIZE_KLASSES):
                x, *others = fn(x, **kwargs)
            else:
                x = fn(x)
        return x, *others

    An `EvoLFQ` counts as a quantizer, which it does not upstream. Raises a ValueError for another number of quantizers.
    """

    def __init__(self, *fns: nn.Module) -> None:
        super().__init__()
        number = sum(isinstance(fn, QUANTIZE_KLASSES) for fn in fns)
        if number != 1:
            raise ValueError(f"Sequential: one of the layers must be a quantizer, got {number}.")
        self.fns = nn.ModuleList(fns)

    def forward(self, x: Tensor, **kwargs: Any) -> tuple[Any, ...]:
        """The output of the last layer, and what the quantizer returns besides quantized; kwargs are options of the quantizer."""
        others: list[Any] = []
        for fn in self.fns:
            if isinstance(fn, QUANTIZE_KLASSES):
                x, *others = fn(x, **kwargs)
            else:
                x = fn(x)
        return x, *others

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self) -> None: ...
