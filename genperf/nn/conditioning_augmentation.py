"""Conditioning augmentation: a random condition from an embedding, with its KL divergence."""

from torch import Tensor, nn

from .diagonal_gaussian import DiagonalGaussian


class ConditioningAugmentation(nn.Module):
    """Draws the condition of a generator around an embedding; Zhang et al., "StackGAN" (2017), section 3.2.

    Equivalent to:
        mean, logvar = linear(condition).chunk(2, 1)
        logvar = logvar.clamp(-30, 20)
        sample = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(1)       # from N(0, I), in nats

    Few embeddings leave gaps between them; noise around each and the KL, added to the generator's loss as its mean over
    the batch, make the space of conditions smooth. Where code for StackGAN averages the KL over the elements as well,
    its weight is D times the one here.

    Args:
        condition_dim: E, the length of an embedding.
        dim: D, the length of the condition drawn.
        deterministic: False samples in evaluation mode too, as published; None takes the mean there; True always does.

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
        """Draw conditions.

        Args:
            condition: embeddings [B, E].

        Returns:
            sample [B, D]; kl [B], float32 (float64 for float64), in nats. `genperf.sample_offset` applies to the noise.

        Raises:
            ValueError: embeddings of another shape.
        """
        if condition.dim() != 2 or condition.shape[1] != self.condition_dim:
            raise ValueError(f"ConditioningAugmentation: condition must be [B, {self.condition_dim}], got {list(condition.shape)}.")
        return self.gaussian(self.linear(condition))

    def extra_repr(self) -> str:
        return f"{self.condition_dim}, {self.dim}"
