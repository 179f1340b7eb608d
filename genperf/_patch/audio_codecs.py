# SPDX-License-Identifier: Apache-2.0
"""The packages encodec, descript-audio-codec and moshi."""

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.code_statistics import code_statistics
from .codebooks import EmbeddingSearch, NormalizedSearch, nearest, residual_indices
from .registry import by_name, override


class EncodecCodebook(EmbeddingSearch):
    """EuclideanCodebook of encodec. k-means and dead-code replacement stay upstream's."""

    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:  # [..., D] -> [..., D], [...]
        vectors = self.preprocess(x)
        self.init_embed_(vectors)
        found = self.quantize(vectors)
        indices = self.postprocess_emb(found, x.shape)
        codes = self.dequantize(indices)
        if self.training:
            self.expire_codes_(vectors)
            with torch.no_grad():
                counts, sums = code_statistics(vectors, found, self.codebook_size)
                self.cluster_size.lerp_(counts.to(self.cluster_size.dtype), 1 - self.decay)
                self.embed_avg.lerp_(sums.to(self.embed_avg.dtype), 1 - self.decay)
                total = self.cluster_size.sum()
                smoothed = (self.cluster_size + self.epsilon) / (total + self.codebook_size * self.epsilon) * total
                # Through `data`, as upstream: backward does not read the codes of this step.
                self.embed.data.copy_(self.embed_avg / smoothed.unsqueeze(1))
        return codes, indices


class MoshiCodebook:
    """EuclideanCodebook of moshi."""

    def _quantize(self: Any, x: Tensor) -> Tensor:  # [N, D] -> [N]
        return nearest(x, self.embedding)


class Residual:
    """ResidualVectorQuantization of encodec and moshi."""

    def encode(self: Any, x: Tensor, n_q: int | None = None) -> Tensor:  # [B, D, T] -> [n_q, B, T]
        layers = self.layers[: n_q or len(self.layers)]
        indices = None
        if all(isinstance(layer.project_in, nn.Identity) for layer in layers):
            codebooks = [layer._codebook for layer in layers]
            indices = residual_indices(x, codebooks, [getattr(codebook, self._codes) for codebook in codebooks])
        return super().encode(x, n_q) if indices is None else indices  # pyright: ignore[reportAttributeAccessIssue]


class EncodecResidual(Residual):
    _codes = "embed"


class MoshiResidual(Residual):
    _codes = "embedding"


class DescriptSearch(NormalizedSearch):
    """VectorQuantize of descript-audio-codec."""


_ENCODEC_NEEDS = ("embed", "embed_avg", "cluster_size", "decay", "epsilon", "init_embed_", "expire_codes_")

encodec = by_name(
    {
        "encodec.quantization.core_vq.EuclideanCodebook": override(EncodecCodebook, "genperf.nearest_code", needs=_ENCODEC_NEEDS),
        "encodec.quantization.core_vq.ResidualVectorQuantization": override(
            EncodecResidual, "genperf.residual_vector_quantize", needs=("layers",)
        ),
    }
)
dac = by_name({"dac.nn.quantize.VectorQuantize": override(DescriptSearch, "genperf.nearest_code", needs=("codebook",))})
moshi = by_name(
    {
        "moshi.quantization.core_vq.EuclideanCodebook": override(MoshiCodebook, "genperf.nearest_code", needs=("embedding_sum",)),
        "moshi.quantization.core_vq.ResidualVectorQuantization": override(
            MoshiResidual, "genperf.residual_vector_quantize", needs=("layers",)
        ),
    }
)
