# SPDX-License-Identifier: Apache-2.0
"""VectorQuantizer and DiagonalGaussianDistribution of diffusers, implemented with genperf's ops.

diffusers need not be installed.

VectorQuantizer has the same constructor, state_dict (`embedding.weight`), meaning of beta (with legacy=True), remapping and
shapes of returned values as upstream. To use it in a VQModel, assign `model.quantize = VectorQuantizer(...)` and load the
state_dict of the original quantizer.

Differences from upstream:
  - No positions x codes matrix is computed, and z is not permuted.
  - z_q equals the code bitwise, and the nearest code is that of float64 arithmetic.
  - Remapping neither synchronizes with the device nor changes indices in place.

DiagonalGaussianDistribution has the same constructor, methods, attributes and formulas as upstream, up to rounding for images
[B, C, H, W] in float32 and float64. To use it in an autoencoder of diffusers, replace the name in the autoencoder's module:

    from diffusers.models.autoencoders import autoencoder_kl
    autoencoder_kl.DiagonalGaussianDistribution = genperf.compat.diffusers.DiagonalGaussianDistribution

Differences from upstream:
  - kl() of video latents [B, C, T, H, W] is [B]; upstream sums dimensions 1, 2 and 3 and returns [B, W]. kl(), and nll() without
    `dims`, support latents [B, C] and [B, C, L], for which upstream raises an error.
  - kl() and nll() of a deterministic distribution are zeros [B] on its device; upstream returns one zero on the CPU.
  - For bfloat16 and float16, kl(), nll() and sample() compute in float32 and round once, and kl() and nll() are float32.
    Upstream sums in half precision, which rounds the KLs of large latents coarsely.
  - kl() does not cancel where the variance is near 1.
  - kl(other) for a deterministic other is infinite; upstream can return NaN.
  - Setting `deterministic` later makes samples deterministic too; upstream changes kl() and nll() only.
  - A generator of any device can be used, or a list with one per sample, as upstream.
  - The noise is computed from a seed drawn from the generator, so that only the seed is saved for backward. The same
    generator state gives other numbers than torch.randn. For upstream's numbers pass `sample(noise=randn_tensor(...))`, or set
    `torch_noise = True` on the class or an instance, which draws the noise with torch.randn as upstream does.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..ops.gaussian_sample import LOGVAR_RANGE, gaussian_sample
from ._image_quantizer import ImageQuantizer
from ._used_codes import UnknownIndex


class VectorQuantizer(ImageQuantizer):
    """VectorQuantizer of diffusers: an `ImageQuantizer` with upstream's names of arguments.

    Args:
        n_e: K, the number of codes.
        vq_embed_dim: D, the length of a code.
        beta: weight of the codebook loss, or with legacy=False of the commitment loss; the other one has weight 1.
        remap, unknown_index, sane_index_shape, legacy: as in `ImageQuantizer`.
    """

    def __init__(
        self,
        n_e: int,
        vq_embed_dim: int,
        beta: float,
        remap: str | np.ndarray | Tensor | None = None,
        unknown_index: UnknownIndex = "random",
        sane_index_shape: bool = False,
        legacy: bool = True,
    ) -> None:
        super().__init__(n_e, vq_embed_dim, beta, remap, unknown_index, sane_index_shape, legacy)
        self.vq_embed_dim = vq_embed_dim


def _lazy(name: str) -> property:
    """A property that is computed when it is first read, and can be assigned."""

    def get(self: "DiagonalGaussianDistribution") -> Tensor:
        if name not in self._values:
            self._values[name] = self._computed(name, self._raw_logvar)
        return self._values[name]

    def set_(self: "DiagonalGaussianDistribution", value: Tensor) -> None:
        self._values[name] = value

    return property(get, set_)


class DiagonalGaussianDistribution:
    """Diagonal Gaussian over an autoencoder's latents, from mean and log variance packed along dimension 1.

    Equivalent to:
        mean, logvar = parameters.chunk(2, dim=1)
        logvar = logvar.clamp(-30, 20)
        std, var = torch.exp(0.5 * logvar), torch.exp(logvar)
        sample = mean + std * torch.randn_like(mean)
        kl = 0.5 * (mean.square() + var - 1 - logvar).flatten(1).sum(1)
        nll = 0.5 * (math.log(2 * math.pi) + logvar + (x - mean).square() / var).flatten(1).sum(1)

    mean, logvar, std and var can be assigned, and all methods use the assigned values. logvar, std and var are computed when
    they are first read, so that encoding and sampling is one kernel. Samples and KLs are differentiable twice in the
    parameters; the second backward runs in plain PyTorch.

    Args:
        parameters: moments [B, 2 * C, ...], of a floating dtype.
        deterministic: whether samples are the mean.

    Attributes:
        parameters: the moments.
        mean: the first half of the parameters.
        logvar: the second half, clamped to [-30, 20].
        std, var: exp(logvar / 2) and exp(logvar); zeros if deterministic.
        deterministic: assigning it recomputes std and var.
        torch_noise: whether noise is drawn by torch.randn; False, a class attribute.

    Raises:
        ValueError: parameters with an odd number of channels.
    """

    torch_noise = False

    def __init__(self, parameters: Tensor, deterministic: bool = False) -> None:
        if parameters.dim() < 2 or parameters.shape[1] % 2:
            raise ValueError(
                f"DiagonalGaussianDistribution: parameters must have an even number of channels in dimension 1, "
                f"got shape {list(parameters.shape)}."
            )
        self.parameters = parameters
        self.mean, self._raw_logvar = parameters.chunk(2, dim=1)
        self._original_mean = self.mean
        self._deterministic = deterministic
        self._grad_enabled = torch.is_grad_enabled()
        # Values that were assigned, or were read and may have been changed in place.
        self._values: dict[str, Tensor] = {}

    logvar = _lazy("logvar")
    std = _lazy("std")
    var = _lazy("var")

    @property
    def deterministic(self) -> bool:
        return self._deterministic

    @deterministic.setter
    def deterministic(self, value: bool) -> None:
        self._deterministic = value
        self._values.pop("std", None)
        self._values.pop("var", None)

    def sample(
        self, generator: torch.Generator | Sequence[torch.Generator] | None = None, *, noise: Tensor | None = None
    ) -> Tensor:  # [B, C, ...]
        """Draw a sample, of the dtype of the parameters.

        Args:
            generator: a generator of any device, or a list with one per sample.
            noise: noise in place of drawn noise, of the mean's shape and of its dtype or float32.
        """
        if noise is None and isinstance(generator, Sequence) and len(generator) == 1:
            (generator,) = generator
        if noise is None and self.torch_noise:
            noise = self._torch_noise(generator)
        elif noise is None and isinstance(generator, Sequence):
            return self._sample_each(generator)
        source = None if isinstance(generator, Sequence) else generator
        is_original_std = "std" not in self._values
        if is_original_std and self.deterministic:
            return self.mean.clone()
        if is_original_std and self.mean is self._original_mean:
            return gaussian_sample(self.parameters, generator=source, noise=noise)[0]
        if noise is None:  # the noise that gaussian_sample would have drawn
            zeros = torch.zeros_like(self._original_mean)
            noise, _ = gaussian_sample(zeros, zeros, dtype=self._accumulator(), generator=source)
        wide = self._wide("mean") + self._wide("std") * noise.to(self._accumulator())
        return wide.to(self.parameters.dtype)

    def kl(self, other: "DiagonalGaussianDistribution | None" = None) -> Tensor:  # [B]
        """KL divergence from N(0, 1) or from `other`, in nats, summed over all dimensions but the first."""
        if self.deterministic:
            return self._zero()
        if other is not None and other.deterministic:
            return torch.full_like(self._zero(), math.inf)
        if self._is_unchanged() and (other is None or other._is_unchanged()):
            # Zero noise, so that a KL does not advance the generator.
            zero = self.mean.new_zeros(()).expand(self.mean.shape)
            prior = None if other is None else other.parameters
            return gaussian_sample(self.parameters, prior=prior, noise=zero)[1]
        mean, var, logvar = (self._wide(name) for name in ("mean", "var", "logvar"))
        if other is None:
            terms = mean.square() + var - 1 - logvar
        else:
            other_mean, other_var, other_logvar = (other._wide(name) for name in ("mean", "var", "logvar"))
            terms = (mean - other_mean).square() / other_var + var / other_var - 1 - logvar + other_logvar
        return 0.5 * terms.flatten(1).sum(1)

    def nll(self, sample: Tensor, dims: Sequence[int] | None = None) -> Tensor:
        """Negative log-likelihood of `sample`, summed over `dims`, by default all but the first: [B]."""
        if self.deterministic:
            return self._zero()
        mean, var, logvar = (self._wide(name) for name in ("mean", "var", "logvar"))
        terms = math.log(2 * math.pi) + logvar + (sample.to(mean.dtype) - mean).square() / var
        return 0.5 * terms.sum(list(range(1, terms.dim())) if dims is None else list(dims))

    def mode(self) -> Tensor:
        """The mean."""
        return self.mean

    def _sample_each(self, generators: Sequence[torch.Generator]) -> Tensor:
        """Draw each sample with its own generator, as in a batch of one."""
        return torch.cat([self._part(i).sample(g) for i, g in enumerate(self._one_per_sample(generators))])

    def _part(self, index: int) -> "DiagonalGaussianDistribution":
        part = DiagonalGaussianDistribution(self.parameters[index : index + 1], self.deterministic)
        if self.mean is not self._original_mean:
            part.mean = self.mean[index : index + 1]
        if "std" in self._values:
            part.std = self.std[index : index + 1]
        return part

    def _torch_noise(self, generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
        def draw(count: int, source: torch.Generator | None) -> Tensor:
            device = self.parameters.device if source is None else source.device
            noise = torch.randn(count, *self.mean.shape[1:], generator=source, device=device, dtype=self.parameters.dtype)
            return noise.to(self.parameters.device)

        if isinstance(generator, Sequence):
            return torch.cat([draw(1, source) for source in self._one_per_sample(generator)])
        return draw(self.mean.shape[0], generator)

    def _one_per_sample(self, generators: Sequence[torch.Generator]) -> Sequence[torch.Generator]:
        if len(generators) != self.mean.shape[0]:
            raise ValueError(
                f"DiagonalGaussianDistribution: a list of generators must hold one for each of the {self.mean.shape[0]} samples, "
                f"got {len(generators)}."
            )
        return generators

    def _is_unchanged(self) -> bool:
        return self.mean is self._original_mean and "logvar" not in self._values and "var" not in self._values

    def _wide(self, name: str) -> Tensor:
        """An attribute in the dtype of sums; not stored if it has not been read."""
        if name == "mean" or name in self._values:
            return getattr(self, name).to(self._accumulator())
        return self._computed(name, self._raw_logvar.to(self._accumulator()))

    def _computed(self, name: str, logvar: Tensor) -> Tensor:
        # In the grad mode of the constructor, where upstream computes it.
        with torch.set_grad_enabled(self._grad_enabled):
            if name != "logvar" and self.deterministic:
                return torch.zeros_like(logvar)
            logvar = logvar.clamp(*LOGVAR_RANGE)
            if name == "logvar":
                return logvar
            return torch.exp(0.5 * logvar if name == "std" else logvar)

    def _accumulator(self) -> torch.dtype:
        return torch.promote_types(self.parameters.dtype, torch.float32)

    def _zero(self) -> Tensor:
        return torch.zeros(self.mean.shape[0], dtype=self._accumulator(), device=self.mean.device)
