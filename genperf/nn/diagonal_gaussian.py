# SPDX-License-Identifier: Apache-2.0
"""Gaussian bottleneck layer: a reparameterized sample from an encoder's moments, and its KL divergence."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .._typing import signature_of
from ..ops.gaussian_sample import gaussian_sample


class DiagonalGaussian(nn.Module):
    """Samples a diagonal Gaussian; Kingma and Welling, "Auto-Encoding Variational Bayes" (2013).

    Equivalent to (dim=1, free_bits=0):
        mean, logvar = moments.chunk(2, 1)
        logvar = logvar.clamp(-30, 20)
        sample = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean) if training else mean
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)

    In evaluation mode the sample is the mean, so encoding is deterministic; the KL is that of the distribution in both
    modes. An importance-weighted or Monte Carlo bound needs samples in evaluation mode too: `deterministic=False`. The
    layer has no parameters and no buffers.

    Args:
        dim: the dimension of the moments that holds mean and log variance, mean first.
        free_bits: lower bound on each element's KL, in nats, as in `genperf.gaussian_sample`.
        dtype: dtype of the sample; None for that of the moments. torch.float32 keeps noise that half precision would
            round off.
        deterministic: None samples in training mode and returns the mean in evaluation mode; True always returns the
            mean; False always samples.

    Raises:
        ValueError: free_bits below 0.
        TypeError: deterministic that is neither None nor a bool.
    """

    def __init__(
        self, *, dim: int = 1, free_bits: float = 0.0, dtype: torch.dtype | None = None, deterministic: bool | None = None
    ) -> None:
        super().__init__()
        if not free_bits >= 0:
            raise ValueError(f"DiagonalGaussian: free_bits must not be negative, got {free_bits!r}.")
        if deterministic not in (None, True, False):
            raise TypeError(f"DiagonalGaussian: deterministic must be None, True or False, got {deterministic!r}.")
        self.dim = dim
        self.free_bits = free_bits
        self.dtype = dtype
        self.deterministic = deterministic

    def forward(
        self,
        moments: Tensor,  # [B, ..., 2 * D, ...]
        logvar: Tensor | None = None,
        *,
        prior: Tensor | tuple[Tensor, Tensor] | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,  # [B, ..., D, ...]
    ) -> tuple[Tensor, Tensor]:
        """Sample, or return the mean, and compute the KL.

        Args:
            moments: mean and log variance, packed along `dim`; with `logvar`, the mean alone.
            logvar: log variance of the mean's shape.
            prior: Gaussian to compute the KL against, in place of N(0, 1); packed like moments, or (mean, logvar).
            generator: random generator of the noise; None for torch's default generator.
            noise: noise to use in place of drawn noise; ignored where the layer returns the mean.

        Returns:
            sample, of the mean's shape. kl: [B], in nats, float32 (float64 for float64), summed over all dimensions but
            the first; `kl.mean()` is the KL term of the evidence lower bound. See `genperf.gaussian_sample`.
        """
        if self.is_deterministic:
            noise = self._zeros(moments, logvar)
        return gaussian_sample(
            moments, logvar, dim=self.dim, prior=prior, free_bits=self.free_bits, dtype=self.dtype, generator=generator, noise=noise
        )

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self) -> None: ...

    @property
    def is_deterministic(self) -> bool:
        """Whether `forward` returns the mean in the current mode."""
        return not self.training if self.deterministic is None else self.deterministic

    def _zeros(self, moments: Tensor, logvar: Tensor | None) -> Tensor | None:
        """Zero noise, an expanded scalar: mean and KL then come from the same kernel as a sample."""
        shape = list(moments.shape)
        if logvar is None:
            if not -len(shape) <= self.dim < len(shape):
                return None  # gaussian_sample raises the error
            shape[self.dim] //= 2
        return moments.new_zeros(()).expand(shape)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, free_bits={self.free_bits}, deterministic={self.deterministic}"
