"""taming-transformers' GumbelQuantize over genperf.gumbel_sample; taming-transformers itself is not needed.

What is the same: the constructor, the names and shapes of the parameters (a checkpoint loads), the temperature as an
attribute to assign, the noise in evaluation mode, the returned values and the loss, up to its 1e-10 inside the logarithm.

What differs, since there it is a fault or a cost:
  - tau = 0 gives hard codes; theirs gives NaN.
  - bfloat16 and float16 logits are perturbed, normalised and summed in float32; the loss is float32.
  - The hard sample is the code itself; theirs multiplies all codes by 1 - y + y, which rounds, and zeros.
  - `temperature` is held in a tensor, so that annealing does not compile again; reading it gives that tensor. It is
    no part of the state_dict, as there.
  - With remap nothing waits for the device, and indices are not changed in place.

The noise is drawn from another place in torch's generator: equal seeds give other samples than theirs.
For new code without the convolution and the tuple: `genperf.nn.GumbelQuantizer`, which is deterministic in evaluation mode.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.gumbel_sample import gumbel_sample


class GumbelQuantize(nn.Module):
    """Projects features to logits and draws codes by the Gumbel-softmax (Jang et al., 2016; Esser et al., 2021).

    Equivalent to (training, no remap):
        logits = self.proj(z)
        one_hot = F.gumbel_softmax(logits, tau=self.temperature, hard=self.straight_through, dim=1)
        z_q = torch.einsum("bkhw,kd->bdhw", one_hot, self.embed.weight)
        q = logits.softmax(1)
        diff = self.kl_weight * (q * torch.log(q * self.n_embed)).sum(1).mean()

    Args:
        num_hiddens: channels of z.
        embedding_dim: D, the length of a code.
        n_embed: K, the number of codes.
        straight_through: hard samples in training with the gradient of the soft ones; evaluation is always hard.
        kl_weight: factor of the loss, a mean over all positions of the batch.
        temp_init: temperature of the start, >= 0.
        use_vqinterface: indices are returned as (None, None, indices).
        remap: path of a .npy file with the indices of the codes in use, or those indices; the others are never drawn, and
            indices count the ones in use.
        unknown_index: what `remap_to_used` makes of an unused index: "random", "extra" (one past the last) or a number.

    Attributes:
        proj: Conv2d(num_hiddens, n_embed, 1).
        embed: Embedding(n_embed, embedding_dim).
        used: with remap, the indices in use; a buffer.
        re_embed: the number of indices there are after remapping.
        temperature: float, to be assigned; a tensor when read.
    """

    used: Tensor
    _temperature: Tensor

    def __init__(
        self,
        num_hiddens: int,
        embedding_dim: int,
        n_embed: int,
        straight_through: bool = True,
        kl_weight: float = 5e-4,
        temp_init: float = 1.0,
        use_vqinterface: bool = True,
        remap: str | np.ndarray | Tensor | None = None,
        unknown_index: str | int = "random",
    ) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        self.n_embed = n_embed
        self.straight_through = straight_through
        self.kl_weight = kl_weight
        self.proj = nn.Conv2d(num_hiddens, n_embed, 1)
        self.embed = nn.Embedding(n_embed, embedding_dim)
        self.use_vqinterface = use_vqinterface
        self.register_buffer("_temperature", torch.tensor(float(temp_init)), persistent=False)
        self.temperature = temp_init
        self.remap = remap
        self.re_embed = n_embed
        self.unknown_index = unknown_index
        if remap is not None:
            used = torch.as_tensor(remap if isinstance(remap, np.ndarray | Tensor) else np.load(remap))
            if used.dim() != 1 or used.dtype.is_floating_point or used.numel() == 0:
                raise ValueError(f"GumbelQuantize: remap must hold a list of indices, got {used.dtype} of shape {list(used.shape)}.")
            self.register_buffer("used", used.long().clone())
            self.re_embed = len(used)
            if unknown_index == "extra":
                self.unknown_index = self.re_embed
                self.re_embed += 1
            elif unknown_index != "random" and not isinstance(unknown_index, int):
                raise ValueError(f"GumbelQuantize: unknown_index must be 'random', 'extra' or a number, got {unknown_index!r}.")

    @property
    def temperature(self) -> Tensor:
        return self._temperature

    @temperature.setter
    def temperature(self, value: float | Tensor) -> None:
        if not isinstance(value, Tensor) and not 0 <= value < math.inf:
            raise ValueError(f"GumbelQuantize: temperature must be a finite number, at least 0, got {value!r}.")
        with torch.no_grad():
            self._temperature.copy_(value.reshape(())) if isinstance(value, Tensor) else self._temperature.fill_(value)

    def forward(self, z: Tensor, temp: float | Tensor | None = None, return_logits: bool = False) -> tuple:  # z [B, num_hiddens, H, W]
        """Draw a code for every position.

        Args:
            z: [B, num_hiddens, H, W].
            temp: temperature in place of the attribute.
            return_logits: return the logits (with remap, those of the codes in use) as well.

        Returns:
            z_q [B, D, H, W]; diff, the weighted KL from the uniform distribution, a scalar; indices int64 [B, H, W], as
            (None, None, indices) with use_vqinterface; with that and return_logits the logits [B, K, H, W].
        """
        hard = self.straight_through or not self.training
        logits = self.proj(z)
        codebook = self.embed.weight
        if self.remap is not None:
            logits, codebook = logits[:, self.used], codebook[self.used]
        z_q, indices, kl = gumbel_sample(logits, codebook, tau=self.temperature if temp is None else temp, hard=hard, dim=1)
        # The prior is uniform over all codes, whichever are in use.
        diff = self.kl_weight * (kl.mean() + math.log(self.n_embed / logits.shape[1]))
        if not self.use_vqinterface:
            return z_q, diff, indices
        if return_logits:
            return z_q, diff, (None, None, indices), logits
        return z_q, diff, (None, None, indices)

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
        """Codes [B, D, H, W] of indices [B * H * W], where shape is (B, H, W, D)."""
        batch, height, width, _ = shape
        if indices.numel() != batch * height * width:
            raise ValueError(f"GumbelQuantize: shape {tuple(shape)} is of {batch * height * width} indices, got {indices.numel()}.")
        indices = indices.reshape(batch, height, width)
        if self.remap is not None:
            indices = self.unmap_to_all(indices)
        return F.embedding(indices, self.embed.weight).permute(0, 3, 1, 2).contiguous()

    def remap_to_used(self, inds: Tensor) -> Tensor:
        """Positions of `inds` among the indices in use; of what is not in use, see `unknown_index`."""
        match = inds.unsqueeze(-1) == self.used.to(inds)
        found = match.int().argmax(-1)
        unknown = torch.randint_like(found, self.re_embed) if self.unknown_index == "random" else self.unknown_index
        return torch.where(match.any(-1), found, unknown)

    def unmap_to_all(self, inds: Tensor) -> Tensor:
        """The inverse of `remap_to_used`; the extra index becomes the first in use."""
        return self.used.to(inds)[torch.where(inds < len(self.used), inds, 0)]
