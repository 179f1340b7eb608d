"""taming-transformers' quantizers over genperf.vector_quantize and genperf.gumbel_sample; taming-transformers itself is not needed.

VectorQuantizer2 and VectorQuantizer: what is the same: the constructor, `embedding.weight` (a checkpoint loads), the meaning
of beta (legacy=True: it weighs the codes' term, as VectorQuantizer always does), remapping, the shapes of what is returned.
What differs, since there it is a cost or a fault:
  - No positions x codes matrix: the `min_encodings` of VectorQuantizer's tuple is None.
  - z is not permuted, z_q is the code bit for bit, the nearest code is exact in float64.
  - With remap nothing waits for the device, and indices are not changed in place.
  - get_codebook_entry without a shape takes indices of any shape.
For new code: `genperf.nn.VectorQuantizer`.

GumbelQuantize: what is the same: the constructor, the names and shapes of the parameters (a checkpoint loads), the temperature as an
attribute to assign, the noise in evaluation mode, the returned values and the loss, up to its 1e-10 inside the logarithm.

What differs, since there it is a fault or a cost:
  - tau = 0 gives hard codes; theirs gives NaN.
  - bfloat16 and float16 logits are perturbed, normalized and summed in float32; the loss is float32.
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

from ..nn.vector_quantizer import code_usage
from ..ops.gumbel_sample import gumbel_sample
from ._image_quantizer import ImageQuantizer
from ._used_codes import UsedCodes


class VectorQuantizer2(ImageQuantizer):
    """Quantizes images with a codebook learned by gradient (van den Oord et al., 2017; Esser et al., 2021).

    Equivalent to (no remap):
        z_q, indices, loss = genperf.vector_quantize(
            z, self.embedding.weight, codebook_weight=beta if legacy else 1, commitment_weight=1 if legacy else beta, channel_dim=1
        )
        return z_q, loss, (None, None, indices.flatten())

    Args:
        n_e: K, the number of codes.
        e_dim: D, the length of a code.
        beta: weight of the codes' term, or with legacy=False of the commitment; the other has weight 1.
        remap: path of a .npy file with the indices of the codes in use, or those indices; the returned indices count them.
        unknown_index: what `remap_to_used` makes of an unused index: "random", "extra" (one past the last) or a number.
        sane_index_shape: return indices [B, H, W].
        legacy: see beta.

    Attributes:
        embedding: Embedding(n_e, e_dim).
        used, re_embed: with remap, the indices in use, a buffer; the number of indices after remapping.
    """

    def __init__(
        self,
        n_e: int,
        e_dim: int,
        beta: float,
        remap: str | np.ndarray | Tensor | None = None,
        unknown_index: str | int = "random",
        sane_index_shape: bool = False,
        legacy: bool = True,
    ) -> None:
        super().__init__(n_e, e_dim, beta, remap, unknown_index, sane_index_shape, legacy)
        self.e_dim = e_dim

    def forward(
        self, z: Tensor, temp: float | None = None, rescale_logits: bool = False, return_logits: bool = False
    ) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        """`ImageQuantizer.forward`; the other arguments are those of GumbelQuantize, and must be left alone.

        Raises:
            ValueError: another argument with a value of its own, or a z that is not [B, e_dim, H, W].
        """
        if temp not in (None, 1.0) or rescale_logits or return_logits:
            raise ValueError("VectorQuantizer2: temp, rescale_logits and return_logits are of GumbelQuantize only.")
        return super().forward(z)


class VectorQuantizer(ImageQuantizer):
    """`VectorQuantizer2` with legacy=True, which also returns the perplexity of the codes, and indices [B * H * W, 1].

    Args:
        n_e, e_dim, beta: as there.
    """

    def __init__(self, n_e: int, e_dim: int, beta: float) -> None:
        super().__init__(n_e, e_dim, beta)
        self.e_dim = e_dim

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, None, Tensor]]:
        """Quantize z [B, e_dim, H, W].

        Returns:
            z_q, of z's shape; the loss, a scalar; (perplexity, None, indices), a float32 scalar and int64 [B * H * W, 1].
        """
        z_q, loss, indices = self.quantize(z)
        return z_q, loss, (code_usage(indices, self.n_e).perplexity.float(), None, indices.reshape(-1, 1))


class GumbelQuantize(UsedCodes):
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
        self.use(n_embed, remap, unknown_index)

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
