"""diffusers' VectorQuantizer over genperf.vector_quantize and DiagonalGaussianDistribution over genperf.gaussian_sample; diffusers
itself is not needed.

VectorQuantizer: what is the same: the constructor, `embedding.weight` (a checkpoint loads), beta with legacy=True, remapping, the
shapes of what is returned. What differs, since there it is a cost or a fault: no positions x codes matrix, z is not permuted, z_q
is the code bit for bit, the nearest code is exact in float64; with remap nothing waits for the device, and indices are not changed
in place. To use it in a VQModel: `model.quantize = VectorQuantizer(...)` with the old one's state_dict.

DiagonalGaussianDistribution: to use it in an autoencoder of diffusers, put it in the place of the name that the autoencoder's
module imported:

    from diffusers.models.autoencoders import autoencoder_kl
    autoencoder_kl.DiagonalGaussianDistribution = genperf.compat.diffusers.DiagonalGaussianDistribution

What is the same: the constructor, the methods, the attributes and the formulas, for images [B, C, H, W] in float32 and
float64 up to rounding.

What differs, since there it is a fault:
  - kl() of video latents [B, C, T, H, W] is [B]; theirs sums dimensions 1, 2 and 3, and returns [B, W]. Latents [B, C]
    and [B, C, L], for which theirs raises an error, work. So does nll() without `dims`.
  - kl() and nll() of a deterministic distribution are zeros [B] on its device; theirs are one zero on the CPU.
  - bfloat16 and float16: kl(), nll() and sample() compute in float32 and round once; kl() and nll() are float32. Theirs
    sum in half precision, where the KLs of large latents become one number.
  - kl() does not cancel where the variance is near 1.
  - kl(other) of a deterministic other is infinite; theirs can be NaN.
  - Setting `deterministic` later makes samples deterministic too; there it changes kl() and nll() alone.
  - One generator drives any device, and a list holds one for each sample, as there.

What differs by design: the noise is a function of a seed drawn from the generator, so that nothing but the seed is kept
for backward, and the same generator state gives other numbers than torch.randn. For their numbers pass
`sample(noise=randn_tensor(...))`, or set `torch_noise = True` on the class or on one distribution: the noise then comes
from torch.randn, drawn as diffusers draws it.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..ops.gaussian_sample import LOGVAR_RANGE, gaussian_sample
from ._image_quantizer import ImageQuantizer


class VectorQuantizer(ImageQuantizer):
    """Quantizes images with a codebook learned by gradient (van den Oord et al., 2017; Esser et al., 2021).

    Equivalent to (no remap):
        z_q, indices, loss = genperf.vector_quantize(
            z, self.embedding.weight, codebook_weight=beta if legacy else 1, commitment_weight=1 if legacy else beta, channel_dim=1
        )
        return z_q, loss, (None, None, indices.flatten())

    Args:
        n_e: K, the number of codes.
        vq_embed_dim: D, the length of a code.
        beta: weight of the codes' term, or with legacy=False of the commitment; the other has weight 1.
        remap: path of a .npy file with the indices of the codes in use, or those indices; the returned indices count them.
        unknown_index: what `remap_to_used` makes of an unused index: "random", "extra" (one past the last) or a number.
        sane_index_shape: return indices [B, H, W].
        legacy: see beta.

    Attributes:
        embedding: Embedding(n_e, vq_embed_dim).
        used, re_embed: with remap, the indices in use, a buffer; the number of indices after remapping.
    """

    def __init__(
        self,
        n_e: int,
        vq_embed_dim: int,
        beta: float,
        remap: str | np.ndarray | Tensor | None = None,
        unknown_index: str | int = "random",
        sane_index_shape: bool = False,
        legacy: bool = True,
    ) -> None:
        super().__init__(n_e, vq_embed_dim, beta, remap, unknown_index, sane_index_shape, legacy)
        self.vq_embed_dim = vq_embed_dim


def _computed(name: str) -> property:
    """An attribute that is computed when it is first read, and can be assigned."""

    def read(self) -> Tensor:
        if name not in self._given:
            self._given[name] = self._first(name, self._raw_logvar)
        return self._given[name]

    def assign(self, value: Tensor) -> None:
        self._given[name] = value

    return property(read, assign)


class DiagonalGaussianDistribution:
    """Distribution of an autoencoder's latents, from moments packed along dimension 1, mean first.

    Equivalent to:
        mean, logvar = parameters.chunk(2, dim=1)
        logvar = logvar.clamp(-30, 20)
        std, var = torch.exp(0.5 * logvar), torch.exp(logvar)
        sample = mean + std * torch.randn_like(mean)
        kl = 0.5 * (mean.square() + var - 1 - logvar).flatten(1).sum(1)
        nll = 0.5 * (math.log(2 * math.pi) + logvar + (x - mean).square() / var).flatten(1).sum(1)

    The attributes mean, logvar, std and var can be assigned; sample, mode, kl and nll take what they then hold. std, var
    and logvar are computed when they are first read, so that encoding and sampling is one kernel.

    Args:
        parameters: moments [B, 2 * C, ...], of a floating dtype.
        deterministic: samples are the mean.

    Attributes:
        parameters: the moments.
        mean: the first half.
        logvar: the second half, clamped to [-30, 20].
        std, var: exp(logvar / 2) and exp(logvar); zeros when deterministic.
        deterministic: setting it computes std and var anew.
        torch_noise: whether noise is torch.randn's. False, a class attribute.

    Samples and KLs are differentiable in the parameters, and twice, the second time in plain PyTorch.

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
        self._first_mean = self.mean
        self._deterministic = deterministic
        self._learns = torch.is_grad_enabled()
        # Values assigned, or read and so perhaps changed in place: they are what counts from then on.
        self._given: dict[str, Tensor] = {}

    logvar = _computed("logvar")
    std = _computed("std")
    var = _computed("var")

    @property
    def deterministic(self) -> bool:
        return self._deterministic

    @deterministic.setter
    def deterministic(self, value: bool) -> None:
        self._deterministic = value
        self._given.pop("std", None)
        self._given.pop("var", None)

    def sample(
        self, generator: torch.Generator | Sequence[torch.Generator] | None = None, *, noise: Tensor | None = None
    ) -> Tensor:  # [B, C, ...]
        """Draw a sample, of the dtype of the parameters.

        Args:
            generator: of any device, or a list with one for each sample of the batch.
            noise: used in place of drawn noise; of the shape of the mean, of its dtype or float32.
        """
        if noise is None and isinstance(generator, Sequence) and len(generator) == 1:
            (generator,) = generator
        if noise is None and self.torch_noise:
            noise = self._torch_noise(generator)
        elif noise is None and isinstance(generator, Sequence):
            return self._sample_each(generator)
        std_is_first = "std" not in self._given
        if std_is_first and self.deterministic:
            return self.mean.clone()
        if std_is_first and self.mean is self._first_mean:
            return gaussian_sample(self.parameters, generator=generator, noise=noise)[0]
        if noise is None:  # what gaussian_sample would have drawn
            zeros = torch.zeros_like(self._first_mean)
            noise, _ = gaussian_sample(zeros, zeros, dtype=self._accumulator(), generator=generator)
        wide = self._wide("mean") + self._wide("std") * noise.to(self._accumulator())
        return wide.to(self.parameters.dtype)

    def kl(self, other: "DiagonalGaussianDistribution | None" = None) -> Tensor:  # [B]
        """KL divergence from N(0, 1) or from `other`, in nats, summed over all dimensions but the first."""
        if self.deterministic:
            return self._zero()
        if other is not None and other.deterministic:
            return torch.full_like(self._zero(), math.inf)
        if self._is_unchanged() and (other is None or other._is_unchanged()):
            # Noise of one zero seen everywhere: a KL draws nothing from the generator.
            nothing = self.mean.new_zeros(()).expand(self.mean.shape)
            prior = None if other is None else other.parameters
            return gaussian_sample(self.parameters, prior=prior, noise=nothing)[1]
        mean, var, logvar = (self._wide(name) for name in ("mean", "var", "logvar"))
        if other is None:
            terms = mean.square() + var - 1 - logvar
        else:
            their_mean, their_var, their_logvar = (other._wide(name) for name in ("mean", "var", "logvar"))
            terms = (mean - their_mean).square() / their_var + var / their_var - 1 - logvar + their_logvar
        return 0.5 * terms.flatten(1).sum(1)

    def nll(self, sample: Tensor, dims: Sequence[int] | None = None) -> Tensor:
        """Negative log likelihood of `sample`, summed over `dims`: by default all but the first, [B]."""
        if self.deterministic:
            return self._zero()
        mean, var, logvar = (self._wide(name) for name in ("mean", "var", "logvar"))
        terms = math.log(2 * math.pi) + logvar + (sample.to(mean.dtype) - mean).square() / var
        return 0.5 * terms.sum(list(range(1, terms.dim())) if dims is None else list(dims))

    def mode(self) -> Tensor:
        """The mean."""
        return self.mean

    def _sample_each(self, generators: Sequence[torch.Generator]) -> Tensor:
        """Each sample as it would be alone in a batch with its generator."""
        return torch.cat([self._part(i).sample(g) for i, g in enumerate(self._one_for_each(generators))])

    def _part(self, index: int) -> "DiagonalGaussianDistribution":
        part = DiagonalGaussianDistribution(self.parameters[index : index + 1], self.deterministic)
        if self.mean is not self._first_mean:
            part.mean = self.mean[index : index + 1]
        if "std" in self._given:
            part.std = self.std[index : index + 1]
        return part

    def _torch_noise(self, generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
        def draw(count: int, source: torch.Generator | None) -> Tensor:
            device = self.parameters.device if source is None else source.device
            noise = torch.randn(count, *self.mean.shape[1:], generator=source, device=device, dtype=self.parameters.dtype)
            return noise.to(self.parameters.device)

        if isinstance(generator, Sequence):
            return torch.cat([draw(1, source) for source in self._one_for_each(generator)])
        return draw(self.mean.shape[0], generator)

    def _one_for_each(self, generators: Sequence[torch.Generator]) -> Sequence[torch.Generator]:
        if len(generators) != self.mean.shape[0]:
            raise ValueError(
                f"DiagonalGaussianDistribution: a list of generators must hold one for each of the {self.mean.shape[0]} samples, "
                f"got {len(generators)}."
            )
        return generators

    def _is_unchanged(self) -> bool:
        return self.mean is self._first_mean and "logvar" not in self._given and "var" not in self._given

    def _wide(self, name: str) -> Tensor:
        """An attribute in the dtype of sums, not kept where nobody has read it."""
        if name == "mean" or name in self._given:
            return getattr(self, name).to(self._accumulator())
        return self._first(name, self._raw_logvar.to(self._accumulator()))

    def _first(self, name: str, logvar: Tensor) -> Tensor:
        # With the gradient that it would have, had the constructor computed it.
        with torch.set_grad_enabled(self._learns):
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
