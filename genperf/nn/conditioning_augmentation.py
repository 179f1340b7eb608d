# SPDX-License-Identifier: Apache-2.0
"""Conditioning augmentation: a condition sampled around an embedding, and its KL divergence."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from .._typing import signature_of
from .diagonal_gaussian import DiagonalGaussian


class ConditioningAugmentation(nn.Module):
    """Samples a generator's condition around an embedding; Zhang et al., "StackGAN" (2017), section 3.2.

    Equivalent to:
        mean, logvar = linear(condition).chunk(2, 1)
        logvar = logvar.clamp(-30, 20)
        sample = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(1)       # from N(0, I), in nats

    Add `kl.mean()`, weighted, to the generator's loss. Together with the noise it fills the gaps between a small number
    of embeddings. StackGAN code that averages the KL over the elements as well has a weight D times the one here.

    Args:
        condition_dim: E, the length of an embedding.
        dim: D, the length of a sampled condition.
        deterministic: False samples in evaluation mode too, as published; None returns the mean there; True always
            returns the mean.

    Raises:
        ValueError, TypeError: an argument outside its range.
    """

    def __init__(self, condition_dim: int, dim: int, *, deterministic: bool | None = False) -> None:
        super().__init__()
        for name, size in (("condition_dim", condition_dim), ("dim", dim)):
            if size < 1:
                raise ValueError(f"ConditioningAugmentation: {name} must be at least 1, got {size!r}.")
        self.condition_dim = condition_dim
        self.dim = dim
        self.linear = nn.Linear(condition_dim, 2 * dim)
        self.gaussian = DiagonalGaussian(deterministic=deterministic)

    def forward(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Sample conditions.

        Args:
            condition: embeddings [B, E].

        Returns:
            sample: [B, D]. kl: [B], in nats, float32 (float64 for float64). `genperf.sample_offset` applies to the noise.

        Raises:
            ValueError: embeddings of another shape.
        """
        if condition.dim() != 2 or condition.shape[1] != self.condition_dim:
            raise ValueError(f"ConditioningAugmentation: condition must be [B, {self.condition_dim}], got {list(condition.shape)}.")
        return self.gaussian(self.linear(condition))

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self) -> None: ...

    def extra_repr(self) -> str:
        return f"{self.condition_dim}, {self.dim}"
