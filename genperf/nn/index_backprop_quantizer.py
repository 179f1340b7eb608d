# SPDX-License-Identifier: Apache-2.0
"""Vector quantization whose gradient reaches the whole codebook through the softmax over all codes."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._typing import signature_of
from ..ops._layout import for_inductor
from ..ops._precision import accumulator_dtype
from ..ops._validate import check
from ..ops.code_entropy import code_entropy
from ..ops.sample_code import sample_code
from ._channels import channels_to, check_input, decode_codebooks
from ._vectors import check_decoded


class IndexBackpropQuantizer(nn.Module):
    """Index backpropagation quantization (IBQ); Shi et al., "Scalable Image Tokenization with Index Backpropagation Quantization" (2024).

    Equivalent to (channel_dim=-1, no mask, training):
        logits = x @ codebook.T                                                     # [..., K]
        soft = logits.softmax(-1)
        indices = logits.argmax(-1)
        one_hot = F.one_hot(indices, K) - soft.detach() + soft
        quantized, codes = one_hot @ codebook, codebook[indices]
        loss = F.mse_loss(quantized, x) + F.mse_loss(codes.detach(), x) + beta * F.mse_loss(codes, x.detach())
        sample_entropy, batch_entropy = genperf.code_entropy(x, codebook, logits="dot", temperature=entropy_temperature)
        loss = loss + entropy_weight * (sample_entropy - batch_entropy)

    in O(N + K) memory: the softmax over the codes is torch's scaled_dot_product_attention, with the codes as keys and values, and the
    logits of the entropies are computed in chunks. Every code gets a gradient in every step, so large codebooks stay in use (262,144 codes
    of dimension 256 in the paper).

    The batch entropy is that of the rank's own batch. On CUDA, the attention's backward is deterministic under
    torch.use_deterministic_algorithms(True).

    Args:
        num_codes: K.
        dim: D, the length of a code.
        beta: weight of the squared distance that moves codes to vectors.
        entropy_weight: weight of sample_entropy - batch_entropy.
        entropy_temperature: temperature of the softmax in the entropies.
        channel_dim: the dimension of x that holds a vector; 1 for images [B, D, H, W].

    Attributes:
        codebook: [K, D], a parameter, initialized uniformly in [-1/K, 1/K].

    Raises:
        ValueError: an argument outside its range.
    """

    def __init__(
        self,
        num_codes: int,
        dim: int,
        *,
        beta: float = 0.25,
        entropy_weight: float = 0.05,
        entropy_temperature: float = 0.01,
        channel_dim: int = -1,
    ) -> None:
        super().__init__()
        name = "IndexBackpropQuantizer"
        check(name, "num_codes must be at least 1", num_codes, num_codes >= 1)
        check(name, "dim must be at least 1", dim, dim >= 1)
        check(name, "beta must not be negative", beta, beta >= 0)
        check(name, "entropy_weight must not be negative", entropy_weight, entropy_weight >= 0)
        check(name, "entropy_temperature must be positive", entropy_temperature, entropy_temperature > 0)
        self.num_codes = num_codes
        self.dim = dim
        self.beta = beta
        self.entropy_weight = entropy_weight
        self.entropy_temperature = entropy_temperature
        self.channel_dim = channel_dim
        self.codebook = nn.Parameter(torch.empty(num_codes, dim).uniform_(-1 / num_codes, 1 / num_codes))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize x.

        Args:
            x: [..., D, ...], of the codebook's dtype, or half precision with a float32 codebook.
            mask: bool, x's shape without channel_dim; where False, quantized is 0, the index is -1, and the vector has no effect on loss
                and gradients.

        Returns:
            quantized, of x's shape and dtype: codes, with the gradient of the straight-through one-hot vectors; indices, int64, of x's
            shape without channel_dim, the lowest on ties; loss, a float32 scalar (float64 for float64), 0 in evaluation mode.
            Differentiable once.
        """
        channel = check_input(type(self).__name__, x, self.channel_dim, mask)
        check(type(self).__name__, f"x must have {self.dim} channels", x.shape[channel], x.shape[channel] == self.dim)
        if mask is not None:
            x = torch.where(mask.unsqueeze(channel), x, 0)
        indices = sample_code(x, self.codebook, temperature=0, logits="dot", channel_dim=channel, mask=mask)
        vectors = x.movedim(channel, -1)
        codebook = self.codebook.to(x.dtype)
        codes = F.embedding(indices.clamp(min=0), codebook)
        quantized = codes
        if torch.is_grad_enabled():
            quantized = codes + _without_value(_expected_code(vectors, codebook))
        if mask is not None:
            quantized = torch.where(mask.unsqueeze(-1), quantized, 0)
        loss = x.new_zeros((), dtype=accumulator_dtype(x.dtype))
        if self.training:
            loss = self._loss(vectors, codes, quantized, mask)
            if self.entropy_weight > 0:
                options = {"logits": "dot", "temperature": self.entropy_temperature, "channel_dim": channel, "mask": mask}
                sample, batch = code_entropy(x, self.codebook, **options)
                loss = loss + self.entropy_weight * (sample - batch)
        return for_inductor(channels_to(quantized, channel).contiguous()), indices, loss

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self) -> None: ...

    def _loss(self, vectors: Tensor, codes: Tensor, quantized: Tensor, mask: Tensor | None) -> Tensor:
        dtype = accumulator_dtype(vectors.dtype)
        vectors, codes, quantized = vectors.to(dtype), codes.to(dtype), quantized.to(dtype)
        terms = (quantized - vectors).square() + (codes.detach() - vectors).square() + self.beta * (codes - vectors.detach()).square()
        if mask is None:
            return terms.sum() / max(1, terms.numel())
        return torch.where(mask.unsqueeze(-1), terms, 0).sum() / (mask.sum() * self.dim).clamp(min=1)

    def encode(self, x: Tensor) -> Tensor:
        """Indices of the codes of x, as returned by `forward`, without gradients."""
        channel = check_input(type(self).__name__, x, self.channel_dim, None)
        return sample_code(x, self.codebook, temperature=0, logits="dot", channel_dim=channel)

    def decode(self, indices: Tensor) -> Tensor:
        """The codes of indices from `forward`, differentiable in the codebook; zeros where an index is -1.

        Raises:
            TypeError: indices that are not int64.
            IndexError: an index below -1, or num_codes or above (on the CPU).
        """
        check_decoded("IndexBackpropQuantizer.decode", indices, self.num_codes)
        return decode_codebooks(indices, 1, self.channel_dim, lambda i: F.embedding(i.clamp(min=0), self.codebook), nn.Identity())

    def extra_repr(self) -> str:
        return (
            f"{self.num_codes}, {self.dim}, beta={self.beta}, entropy_weight={self.entropy_weight}, "
            f"entropy_temperature={self.entropy_temperature}, channel_dim={self.channel_dim}"
        )


def _expected_code(vectors: Tensor, codebook: Tensor) -> Tensor:
    """The mean code under the softmax of the logits, with no gradient through the codes that are averaged."""
    queries = vectors.reshape(1, 1, -1, vectors.shape[-1])
    keys = codebook[None, None]
    return F.scaled_dot_product_attention(queries, keys, keys.detach(), scale=1.0).reshape(vectors.shape)


def _without_value(t: Tensor) -> Tensor:
    """Zeros with the gradient of t."""
    return t - t.detach()
