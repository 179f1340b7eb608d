"""Gaussian bottleneck layer: the reparameterized sample of an encoder's moments and its KL divergence."""

import torch
from torch import Tensor, nn

from ..ops.gaussian_sample import gaussian_sample


class DiagonalGaussian(nn.Module):
    """Samples a diagonal Gaussian; Kingma and Welling, "Auto-Encoding Variational Bayes" (2013).

    Equivalent to (dim=1, free_bits=0):
        mean, logvar = moments.chunk(2, 1)
        logvar = logvar.clamp(-30, 20)
        sample = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean) if training else mean
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)

    In evaluation mode the sample is the mean, so that encoding is repeatable; the KL is that of the distribution in
    either mode. An importance-weighted or Monte Carlo bound needs samples in evaluation too: `deterministic=False`.
    The layer has no parameters and no state.

    Args:
        dim: the dimension of the moments that holds both halves, mean first.
        free_bits: floor, in nats, of each element's KL, as in `genperf.gaussian_sample`.
        dtype: of the sample; None for that of the moments. torch.float32 keeps noise that half precision would round off.
        deterministic: None samples in training mode and takes the mean in evaluation mode; True always takes the mean;
            False always samples.

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
        """Sample, or take the mean, and measure the KL.

        Args:
            moments: mean and log variance packed along `dim`; with `logvar` the mean alone, and `logvar` of its shape.
            prior: Gaussian that the KL is measured against in place of N(0, 1); packed like moments, or (mean, logvar).
            generator: source of the noise in place of torch's default generator.
            noise: used in place of drawn noise where the layer samples.

        Returns:
            sample, of the shape of one half; kl, float32 (float64 for float64) [B], in nats, summed over all dimensions
            but the first: `kl.mean()` is the term of the evidence lower bound. See `genperf.gaussian_sample`.
        """
        if self.is_deterministic:
            noise = self._zeros(moments, logvar)
        return gaussian_sample(
            moments, logvar, dim=self.dim, prior=prior, free_bits=self.free_bits, dtype=self.dtype, generator=generator, noise=noise
        )

    @property
    def is_deterministic(self) -> bool:
        """Whether `forward` takes the mean now."""
        return not self.training if self.deterministic is None else self.deterministic

    def _zeros(self, moments: Tensor, logvar: Tensor | None) -> Tensor | None:
        """Noise of one zero seen everywhere: the mean then comes, with the KL, out of the same pass as a sample."""
        shape = list(moments.shape)
        if logvar is None:
            if not -len(shape) <= self.dim < len(shape):
                return None  # gaussian_sample says what is wrong
            shape[self.dim] //= 2
        return moments.new_zeros(()).expand(shape)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, free_bits={self.free_bits}, deterministic={self.deterministic}"
