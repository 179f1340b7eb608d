# SPDX-License-Identifier: Apache-2.0
"""transformers 5: the codecs and image tokenizers, and the Gumbel quantizers of wav2vec 2.0 and its kin."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.finite_scalar_quantize import finite_scalar_quantize
from ..ops.gumbel_sample import gumbel_sample
from ..ops.vector_quantize import vector_quantize
from .codebooks import EmbeddingSearch, NormalizedSearch, nearest, residual_indices
from .registry import Adapter, UnsupportedError, by_name, override
from .swap import Step


class ResidualByBandwidth:
    """EncodecResidualVectorQuantizer, XcodecResidualVectorQuantization."""

    def encode(self: Any, embeddings: Tensor, bandwidth: float | None = None) -> Tensor:
        layers = (self.layers if hasattr(self, "layers") else self.quantizers)[: self.get_num_quantizers_for_bandwidth(bandwidth)]
        codebooks = [layer.codebook for layer in layers]
        indices = residual_indices(embeddings, codebooks, [codebook.embed for codebook in codebooks])
        return super().encode(embeddings, bandwidth) if indices is None else indices  # pyright: ignore[reportAttributeAccessIssue]


class MimiResidual:
    """MimiResidualVectorQuantizer."""

    def encode(self: Any, embeddings: Tensor, num_quantizers: int | None = None) -> Tensor:
        projected = embeddings if self.input_proj is None else self.input_proj(embeddings)
        codebooks = [layer.codebook for layer in self.layers[:num_quantizers]]
        indices = residual_indices(projected, codebooks, [codebook.embed for codebook in codebooks])
        return super().encode(embeddings, num_quantizers) if indices is None else indices  # pyright: ignore[reportAttributeAccessIssue]


class ImageTokenizer:
    """ChameleonVQVAEVectorQuantizer, JanusVQVAEVectorQuantizer."""

    def forward(self: Any, hidden_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [B, D, H, W]
        return self._quantize(hidden_state, self.embedding.weight)

    def _quantize(self: Any, x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        quantized, indices, loss = vector_quantize(x, codebook, codebook_weight=self.beta, commitment_weight=1.0, channel_dim=1)
        return quantized.contiguous(), loss, indices.flatten()


class NormalizedImageTokenizer(ImageTokenizer):
    """GlmImageVQVAEVectorQuantizer."""

    def forward(self: Any, hidden_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self._quantize(F.normalize(hidden_state, dim=1), F.normalize(self.embedding.weight, dim=-1))


class VideoTokenizer:
    """Emu3VQVAEVectorQuantizer."""

    def forward(self: Any, hidden_state: Tensor) -> Tensor:  # [B, T, D, H, W] -> [B, T, H, W]
        return nearest(hidden_state, self.embedding.weight, channel_dim=2)


class FiniteScalar:
    """NeuCodecFiniteScalarQuantization, Xcodec2FiniteScalarQuantization."""

    def forward(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        x = hidden_states.float() if hidden_states.dtype == torch.float64 else hidden_states  # as upstream
        codes, indices = finite_scalar_quantize(x, self.quantization_levels)
        return codes.to(hidden_states.dtype), indices.to(torch.int32)


class GumbelGroups:
    """Wav2Vec2GumbelVectorQuantizer and its copies. The noise of a seed is that of upstream."""

    def forward(self: Any, hidden_states: Tensor, mask_time_indices: Tensor | None = None) -> tuple[Tensor, Tensor]:
        batch, length, _ = hidden_states.shape
        logits = self.weight_proj(hidden_states).view(batch * length, self.num_groups, self.num_vars)
        codebooks = self.codevectors.view(self.num_groups, self.num_vars, -1)
        mask = () if mask_time_indices is None else (mask_time_indices,)
        if self.training:
            wide = logits.float()
            noise = -torch.empty_like(wide, memory_format=torch.contiguous_format).exponential_().log()
            parts = [
                gumbel_sample(wide[:, group], codebooks[group].to(wide.dtype), tau=self.temperature, hard=True, noise=noise[:, group])[0]
                for group in range(self.num_groups)
            ]
            perplexity = self._compute_perplexity(torch.softmax(wide, dim=-1), *mask)
        else:
            indices = logits.argmax(-1, keepdim=True)
            parts = [F.embedding(indices[:, group, 0], codebooks[group]) for group in range(self.num_groups)]
            perplexity = self._compute_perplexity(torch.zeros_like(logits).scatter_(-1, indices, 1.0), *mask)
        return torch.cat(parts, -1).to(logits.dtype).view(batch, length, -1), perplexity


def _largest_product(module: object, upstream: type) -> list[Step]:
    raise UnsupportedError("it searches the largest inner product, for which genperf has no kernel")


_SEARCH = override(EmbeddingSearch, "genperf.nearest_code", needs=("embed",))
_RESIDUAL = override(ResidualByBandwidth, "genperf.residual_vector_quantize", needs=("get_num_quantizers_for_bandwidth",))
_IMAGES = override(ImageTokenizer, "genperf.vector_quantize", needs=("embedding", "beta"))
_FSQ = override(FiniteScalar, "genperf.finite_scalar_quantize", needs=("quantization_levels",))
_GUMBEL = override(GumbelGroups, "genperf.gumbel_sample", needs=("weight_proj", "codevectors", "num_groups", "num_vars", "temperature"))

_ADAPTERS = {
    "apertus1p5.Apertus1p5VisionTokenizerVectorQuantizer": Adapter("", _largest_product),
    "chameleon.ChameleonVQVAEVectorQuantizer": _IMAGES,
    "dac.DacVectorQuantize": override(NormalizedSearch, "genperf.nearest_code", needs=("codebook",)),
    "emu3.Emu3VQVAEVectorQuantizer": override(VideoTokenizer, "genperf.nearest_code", needs=("embedding",)),
    "encodec.EncodecEuclideanCodebook": _SEARCH,
    "encodec.EncodecResidualVectorQuantizer": _RESIDUAL,
    "glm_image.GlmImageVQVAEVectorQuantizer": override(NormalizedImageTokenizer, "genperf.vector_quantize", needs=("embedding", "beta")),
    "higgs_audio_v2_tokenizer.HiggsAudioV2TokenizerEuclideanCodebook": _SEARCH,
    "janus.JanusVQVAEVectorQuantizer": _IMAGES,
    "mimi.MimiEuclideanCodebook": _SEARCH,
    "mimi.MimiResidualVectorQuantizer": override(MimiResidual, "genperf.residual_vector_quantize", needs=("layers", "input_proj")),
    "neucodec.NeuCodecFiniteScalarQuantization": _FSQ,
    "unispeech.UniSpeechGumbelVectorQuantizer": _GUMBEL,
    "unispeech_sat.UniSpeechSatGumbelVectorQuantizer": _GUMBEL,
    "wav2vec2.Wav2Vec2GumbelVectorQuantizer": _GUMBEL,
    "wav2vec2_conformer.Wav2Vec2ConformerGumbelVectorQuantizer": _GUMBEL,
    "wavlm.WavLMGumbelVectorQuantizer": _GUMBEL,
    "wavtokenizer.WavTokenizerEuclideanCodebook": _SEARCH,
    "xcodec.XcodecEuclideanCodebook": _SEARCH,
    "xcodec.XcodecResidualVectorQuantization": _RESIDUAL,
    "xcodec2.Xcodec2FiniteScalarQuantization": _FSQ,
}


def _path(name: str) -> str:
    model, _, cls = name.partition(".")
    return f"transformers.models.{model}.modeling_{model}.{cls}"


find = by_name({_path(name): adapter for name, adapter in _ADAPTERS.items()})
