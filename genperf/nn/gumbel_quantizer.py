# SPDX-License-Identifier: Apache-2.0
"""Gumbel-softmax quantization layer: samples codes of a learned codebook from logits."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._typing import signature_of
from ..ops._validate import check, check_index_range
from ..ops.gumbel_sample import gumbel_sample


class GumbelQuantizer(nn.Module):
    """Samples a code for each position from its logits; Jang et al., "Categorical Reparameterization with Gumbel-Softmax" (2016).

    Equivalent to (channel_dim=-1):
        sample = F.gumbel_softmax(logits, tau, hard)                        # training
        sample = F.one_hot(logits.argmax(-1), K)                            # evaluation
        quantized, indices = sample @ codebook, sample.argmax(-1)
        q = logits.softmax(-1)
        kl = (q * (q * K).log()).sum(-1)                                    # from the uniform prior

    The preceding layer computes the logits, with K channels. In evaluation mode each position takes the code of its
    largest logit, without noise, so encoding is deterministic and `decode(encode(logits))` equals the `quantized` of `forward`.

    The KL is returned for each position, in nats. `kl.mean()` is the mean over positions and `kl.sum() / len(kl)` the mean
    over samples. In an evidence lower bound use the latter, with a reconstruction term summed over each sample.

    Args:
        num_codes: K.
        dim: D, the length of a code.
        tau: initial temperature, >= 0.
        hard: in training, return single codes with the gradient of the soft mixture (straight-through); False returns the
            soft mixture.
        channel_dim: the dimension of the logits that holds the classes; 1 for images [B, K, H, W].
        deterministic: None samples in training mode and takes the largest logit in evaluation mode; True always takes
            the largest; False always samples, and returns single codes in evaluation mode.

    Attributes:
        codebook: [K, D], a parameter, initialized from the standard normal distribution like torch.nn.Embedding.
        tau: the temperature, a persistent buffer of one element. `set_tau` changes it without a recompilation and without
            a device synchronization.

    Raises:
        ValueError, TypeError: an argument outside its range.
    """

    tau: Tensor

    def __init__(
        self,
        num_codes: int,
        dim: int,
        *,
        tau: float = 1.0,
        hard: bool = False,
        channel_dim: int = -1,
        deterministic: bool | None = None,
    ) -> None:
        super().__init__()
        check("GumbelQuantizer", "num_codes must be at least 1", num_codes, num_codes >= 1)
        check("GumbelQuantizer", "dim must be at least 1", dim, dim >= 1)
        check("GumbelQuantizer", "tau must be a finite number, at least 0", tau, 0 <= tau < math.inf)
        if deterministic not in (None, True, False):
            raise TypeError(f"GumbelQuantizer: deterministic must be None, True or False, got {deterministic!r}.")
        self.num_codes = num_codes
        self.dim = dim
        self.hard = hard
        self.channel_dim = channel_dim
        self.deterministic = deterministic
        self.codebook = nn.Parameter(torch.randn(num_codes, dim))
        self.register_buffer("tau", torch.tensor(float(tau)))

    def forward(
        self,
        logits: Tensor,  # [..., K, ...]
        *,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,  # [..., K, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sample codes, or take the most likely ones.

        Args:
            logits: of the codebook's dtype, or half precision with a float32 codebook.
            generator: random generator of the noise; None for torch's default generator.
            noise: Gumbel noise to use in place of drawn noise; ignored where the layer takes the largest logit.

        Returns:
            quantized, of logits' dtype and shape with D in place of K; indices, int64, logits' shape without channel_dim;
            kl, float32 (float64 for float64), of indices' shape. See `genperf.gumbel_sample`.
        """
        if self.is_deterministic:
            noise = logits.new_zeros(()).expand(logits.shape)
        hard = self.hard or not self.training or self.is_deterministic
        return gumbel_sample(logits, self.codebook, tau=self.tau, hard=hard, dim=self.channel_dim, generator=generator, noise=noise)

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self) -> None: ...

    @property
    def is_deterministic(self) -> bool:
        """Whether `forward` takes the largest logit in the current mode."""
        return not self.training if self.deterministic is None else self.deterministic

    def encode(self, logits: Tensor) -> Tensor:
        """Indices of the largest logits, the lowest on ties: int64, logits' shape without channel_dim."""
        return logits.argmax(self.channel_dim)

    def decode(self, indices: Tensor) -> Tensor:
        """The codes of `indices` [...], with their channels at channel_dim.

        Returns:
            [..., D, ...], of the codebook's dtype, differentiable in the codebook.

        Raises:
            TypeError: indices that are not int64.
            IndexError: an index below 0, or num_codes or above (on the CPU).
        """
        if indices.dtype != torch.int64:
            raise TypeError(f"GumbelQuantizer.decode: indices must be int64, got {indices.dtype}.")
        check_index_range("GumbelQuantizer.decode", indices, self.num_codes, 0)
        return F.embedding(indices, self.codebook).movedim(-1, self.channel_dim).contiguous()

    @torch.no_grad()
    def set_tau(self, tau: float | Tensor) -> None:
        """Set the temperature. Call it between backward and the next forward.

        Annealing from 1 to 0.5:
            quantizer.set_tau(max(0.5, math.exp(-1e-5 * step)))

        Args:
            tau: >= 0. The value of a tensor is not checked, which would synchronize with the device.
        """
        if isinstance(tau, Tensor):
            self.tau.copy_(tau.reshape(()))
        else:
            check("GumbelQuantizer", "tau must be a finite number, at least 0", tau, 0 <= tau < math.inf)
            self.tau.fill_(tau)

    def extra_repr(self) -> str:
        return f"{self.num_codes}, {self.dim}, hard={self.hard}, channel_dim={self.channel_dim}, deterministic={self.deterministic}"
