# SPDX-License-Identifier: Apache-2.0
"""Quantizers of taming-transformers, implemented with genperf.vector_quantize and genperf.gumbel_sample.

taming-transformers need not be installed.

VectorQuantizer2 and VectorQuantizer have the same constructor, state_dict (`embedding.weight`), meaning of beta, remapping and
shapes of returned values as upstream. With legacy=True, and always in VectorQuantizer, beta is the weight of the codebook loss.

Differences from upstream:
  - No positions x codes matrix is computed: `min_encodings` in the tuple of VectorQuantizer is None.
  - z is not permuted, z_q equals the code bitwise, and the nearest code is that of float64 arithmetic.
  - Remapping neither synchronizes with the device nor changes indices in place.
  - get_codebook_entry with shape=None accepts indices of any shape.

For new code, see `genperf.nn.VectorQuantizer`.

GumbelQuantize has the same constructor, state_dict, assignable temperature, noise in evaluation mode, returned values and
loss as upstream, except for upstream's 1e-10 inside the logarithm.

Differences from upstream:
  - tau = 0 gives hard codes; upstream returns NaN.
  - bfloat16 and float16 logits are processed in float32, and the loss is float32.
  - A hard sample equals the code; upstream multiplies it by 1 - y + y, which rounds.
  - `temperature` is a tensor, so annealing does not recompile a compiled model. As upstream, it is not in the state_dict.
  - Remapping neither synchronizes with the device nor changes indices in place.
  - A seed gives other samples than upstream, since the noise is generated from a seed drawn from torch's generator.

For new code, see `genperf.nn.GumbelQuantizer`, which has no convolution and is deterministic in evaluation mode.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._typing import signature_of
from ..nn.vector_quantizer import code_usage
from ..ops.gumbel_sample import gumbel_sample
from ._image_quantizer import ImageQuantizer
from ._used_codes import UnknownIndex, UsedCodes


class VectorQuantizer2(ImageQuantizer):
    """VectorQuantizer2 of taming-transformers: an `ImageQuantizer` with upstream's names of arguments.

    Args:
        n_e: K, the number of codes.
        e_dim: D, the length of a code.
        beta: weight of the codebook loss, or with legacy=False of the commitment loss; the other one has weight 1.
        remap, unknown_index, sane_index_shape, legacy: as in `ImageQuantizer`.
    """

    def __init__(
        self,
        n_e: int,
        e_dim: int,
        beta: float,
        remap: str | np.ndarray | Tensor | None = None,
        unknown_index: UnknownIndex = "random",
        sane_index_shape: bool = False,
        legacy: bool = True,
    ) -> None:
        super().__init__(n_e, e_dim, beta, remap, unknown_index, sane_index_shape, legacy)
        self.e_dim = e_dim

    def forward(
        self, z: Tensor, temp: float | None = None, rescale_logits: bool = False, return_logits: bool = False
    ) -> tuple[Tensor, Tensor, tuple[Tensor | None, None, Tensor]]:
        """`ImageQuantizer.forward`; the other arguments exist for the interface of GumbelQuantize and must keep their defaults.

        Raises:
            ValueError: another value of these arguments, or a z that is not [B, e_dim, H, W].
        """
        if temp not in (None, 1.0) or rescale_logits or return_logits:
            raise ValueError("VectorQuantizer2: temp, rescale_logits and return_logits are supported by GumbelQuantize only.")
        return super().forward(z)

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self) -> None: ...


class VectorQuantizer(ImageQuantizer):
    """VectorQuantizer of taming-transformers: `VectorQuantizer2` with legacy=True, which also returns the perplexity.

    Args:
        n_e, e_dim, beta: as in `VectorQuantizer2`.
    """

    def __init__(self, n_e: int, e_dim: int, beta: float) -> None:
        super().__init__(n_e, e_dim, beta)
        self.e_dim = e_dim

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor | None, None, Tensor]]:
        """Quantize z [B, e_dim, H, W].

        Returns:
            z_q, of z's shape; the loss, a scalar; (perplexity, None, indices), a float32 scalar and int64 [B * H * W, 1].
        """
        z_q, loss, indices = self.quantize(z)
        return z_q, loss, (code_usage(indices, self.n_e).perplexity.float(), None, indices.reshape(-1, 1))

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self) -> None: ...


class GumbelQuantize(UsedCodes):
    """Projects features to logits and samples codes with the Gumbel-softmax; Jang et al. (2016), Esser et al. (2021).

    Equivalent to (training, no remap):
        logits = self.proj(z)
        one_hot = F.gumbel_softmax(logits, tau=self.temperature, hard=self.straight_through, dim=1)
        z_q = torch.einsum("bkhw,kd->bdhw", one_hot, self.embed.weight)
        q = logits.softmax(1)
        diff = self.kl_weight * (q * torch.log(q * self.n_embed)).sum(1).mean()

    Args:
        num_hiddens: number of channels of z.
        embedding_dim: D, the length of a code.
        n_embed: K, the number of codes.
        straight_through: in training, return hard samples with the gradient of soft ones; evaluation is always hard.
        kl_weight: weight of the loss, the mean KL over all positions of the batch.
        temp_init: initial temperature, >= 0.
        use_vqinterface: whether to return indices as (None, None, indices).
        remap: the indices of the used codes, or the path of a .npy file with them; other codes are never sampled, and
            returned indices are positions among the used ones.
        unknown_index: index of unused codes in `remap_to_used`: "random", "extra" (one past the last) or an int.

    Attributes:
        proj: Conv2d(num_hiddens, n_embed, 1).
        embed: Embedding(n_embed, embedding_dim).
        used, re_embed: with remap, the used indices, a buffer, and the number of indices after remapping.
        temperature: a tensor; assign a float or a tensor to change it.

    Raises:
        ValueError: a temperature out of range, a remap that is not a list of indices, or an invalid unknown_index.
    """

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
        unknown_index: UnknownIndex = "random",
    ) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        self.n_embed = n_embed
        self.straight_through = straight_through
        self.kl_weight = kl_weight
        self.proj = nn.Conv2d(num_hiddens, n_embed, 1)
        self.embed = nn.Embedding(n_embed, embedding_dim)
        self.use_vqinterface = use_vqinterface
        # Not a buffer, whose value a load from the meta device would lose.
        self._temperature = torch.tensor(float(temp_init), device="cpu")
        self.temperature = temp_init
        self.set_remap(n_embed, remap, unknown_index)

    @property
    def temperature(self) -> Tensor:
        return self._temperature

    @temperature.setter
    def temperature(self, value: float | Tensor) -> None:
        if not isinstance(value, Tensor) and not 0 <= value < math.inf:
            raise ValueError(f"GumbelQuantize: temperature must be a finite number, at least 0, got {value!r}.")
        with torch.no_grad():
            self._temperature.copy_(value.reshape(())) if isinstance(value, Tensor) else self._temperature.fill_(value)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "GumbelQuantize":
        super()._apply(fn, recurse)
        device = fn(torch.empty(0, device=self._temperature.device)).device
        if device.type != "meta":
            self._temperature = self._temperature.to(device)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The temperature was a buffer in earlier releases."""
        if "_temperature" in state["_buffers"]:
            buffers = dict(state["_buffers"])
            state = {**state, "_temperature": buffers.pop("_temperature"), "_buffers": buffers}
            state["_non_persistent_buffers_set"] = state["_non_persistent_buffers_set"] - {"_temperature"}
        super().__setstate__(state)

    def forward(self, z: Tensor, temp: float | Tensor | None = None, return_logits: bool = False) -> tuple[Any, ...]:
        """Sample a code for each position.

        Args:
            z: [B, num_hiddens, H, W].
            temp: temperature in place of the attribute.
            return_logits: whether to return the logits too, with remap those of the used codes.

        Returns:
            z_q [B, D, H, W]; diff, the weighted KL from the uniform distribution, a scalar; indices int64 [B, H, W], as
            (None, None, indices) with use_vqinterface; with that and return_logits the logits [B, K, H, W].
        """
        hard = self.straight_through or not self.training
        logits = self.proj(z)
        codebook = self.embed.weight
        if self.remap is not None:
            logits, codebook = logits[:, self.used], codebook[self.used]
        if self._temperature.device != z.device:  # parameters that were assigned, not moved by `.to()`
            self._temperature = self._temperature.to(z.device)
        z_q, indices, kl = gumbel_sample(logits, codebook, tau=self.temperature if temp is None else temp, hard=hard, dim=1)
        # The prior is uniform over all codes, not only the used ones.
        diff = self.kl_weight * (kl.sum() / max(1, kl.numel()) + math.log(self.n_embed / logits.shape[1]))
        if not self.use_vqinterface:
            return z_q, diff, indices
        if return_logits:
            return z_q, diff, (None, None, indices), logits
        return z_q, diff, (None, None, indices)

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self) -> None: ...

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
        """Codes [B, D, H, W] of indices [B * H * W], given shape (B, H, W, D)."""
        batch, height, width, _ = shape
        if indices.numel() != batch * height * width:
            raise ValueError(f"GumbelQuantize: shape {tuple(shape)} needs {batch * height * width} indices, got {indices.numel()}.")
        indices = indices.reshape(batch, height, width)
        if self.remap is not None:
            indices = self.unmap_to_all(indices)
        return F.embedding(indices, self.embed.weight).permute(0, 3, 1, 2).contiguous()
