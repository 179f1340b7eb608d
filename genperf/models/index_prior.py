# SPDX-License-Identifier: Apache-2.0
"""Autoregressive prior over 2D maps of code indices."""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._modes import evaluating
from ..ops._validate import check
from ..ops.gumbel_sample import gumbel_sample
from .system import check_labels, standard_normal


class IndexPrior(nn.Module):
    """Autoregressive model of index maps in raster order; van den Oord et al. (2017), section 3.3.

    Equivalent to:
        log p(i | c) = sum_t log softmax(logits_t(i_0 ... i_(t - 1), c))[i_t]

    The logits come from a small pre-norm transformer, Vaswani et al., "Attention Is All You Need" (2017). The input of a
    position is its positional encoding, embeddings of the previous index and the index above, and features of the condition
    in its 5x5 neighborhood, and an embedding of the label. Each position attends to all previous ones, for any size of map.
    Sampling caches keys and values.

    Dropout is Gaussian, Srivastava et al., "Dropout" (2014), section 10: in training, the output y of each residual branch becomes
    y * (1 + sqrt(p / (1 - p)) * noise). Unlike that of torch's dropout, its noise follows `genperf.sample_offset`.

    Args:
        num_codes: K.
        width: dimension of the hidden vectors, a multiple of 4.
        layers: number of transformer layers.
        num_conditions: C, channels of the condition; 0 for none.
        num_classes: number of classes of the labels; 0 for none.
        dropout: p, 0 <= p < 1.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        num_codes: int,
        *,
        width: int = 64,
        layers: int = 2,
        num_conditions: int = 0,
        num_classes: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check("IndexPrior", "num_codes must be at least 1", num_codes, num_codes >= 1)
        check("IndexPrior", "width must be a positive multiple of 4", width, width >= 4 and width % 4 == 0)
        check("IndexPrior", "layers must be at least 1", layers, layers >= 1)
        check("IndexPrior", "num_conditions must not be negative", num_conditions, num_conditions >= 0)
        check("IndexPrior", "num_classes must not be negative", num_classes, num_classes >= 0)
        check("IndexPrior", "dropout must lie in [0, 1)", dropout, 0 <= dropout < 1)
        self.num_codes = num_codes
        self.width = width
        self.num_conditions = num_conditions
        self.num_classes = num_classes
        # Index K is the padding outside of the map.
        self.previous = nn.Embedding(num_codes + 1, width)
        self.above = nn.Embedding(num_codes + 1, width)
        self.condition = None
        if num_conditions:
            self.condition = nn.Sequential(nn.Conv2d(num_conditions, width, 3, padding=1), nn.GELU(), nn.Conv2d(width, width, 3, padding=1))
        self.label = nn.Embedding(num_classes, width) if num_classes else None
        self.blocks = nn.ModuleList(_Block(width, dropout) for _ in range(layers))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, num_codes))

    def forward(self, indices: Tensor, condition: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits of each index given the previous ones.

        Args:
            indices: [B, h, w], int64, 0 ... K - 1.
            condition: [B, C, h, w] if num_conditions > 0, else None.
            labels: [B], int64, if num_classes > 0, else None.

        Returns:
            [B, K, h, w]

        Raises:
            ValueError: indices, a condition or labels of another shape, or labels out of range.
            TypeError: indices or labels that are not int64.
        """
        return self._logits(indices, condition, labels).movedim(-1, 1)

    def loss(self, indices: Tensor, condition: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Mean negative log-likelihood of an index in nats, a scalar: F.cross_entropy(self(indices, condition, labels), indices)."""
        return F.cross_entropy(self._logits(indices, condition, labels).flatten(0, 2), indices.flatten())

    @torch.no_grad()
    def sample(
        self,
        n: int,
        height: int,
        width: int,
        condition: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        temperature: float = 1.0,
    ) -> Tensor:
        """Sample n index maps, position by position; `genperf.sample_offset` applies.

        Args:
            condition: [n, C, height, width] if num_conditions > 0, else None.
            labels: [n], int64, if num_classes > 0, else None.
            temperature: positive; the logits are divided by it.

        Returns:
            [n, height, width], int64.
        """
        check("IndexPrior", "temperature must be a finite number above 0", temperature, 0 < temperature < math.inf)
        self._check_condition(condition, (n, height, width))
        place = self._place(height, width, condition, self._check_labels(labels, n))
        length = height * width
        known = torch.full((n, width + length), self.num_codes, device=place.device)  # after a row of padding
        caches = [cast("_Block", block).new_cache(n, length) for block in self.blocks]
        with evaluating(self):
            for t in range(length):
                x = self.previous(known[:, width + t - 1]) + self.above(known[:, t]) + place[:, t]
                x = x.unsqueeze(1)
                for block, cache in zip(self.blocks, caches, strict=True):
                    x = block(x, cache, t)
                _, known[:, width + t], _ = gumbel_sample(self.head(x[:, 0]) / temperature, hard=True)
        return known[:, width:].reshape(n, height, width)

    def _logits(self, indices: Tensor, condition: Tensor | None, labels: Tensor | None) -> Tensor:
        """[B, h, w, K]"""
        if indices.dtype != torch.int64:
            raise TypeError(f"IndexPrior: indices must be int64, got {indices.dtype}.")
        if indices.dim() != 3:
            raise ValueError(f"IndexPrior: indices must have shape [B, h, w], got {list(indices.shape)}.")
        self._check_condition(condition, indices.shape)
        labels = self._check_labels(labels, len(indices))
        _, height, width = indices.shape
        place = self._place(height, width, condition, labels)
        known = F.pad(indices.flatten(1), (width, 0), value=self.num_codes)
        x = self.previous(known[:, width - 1 : -1]) + self.above(known[:, :-width]) + place
        for block in self.blocks:
            x = block(x)
        return self.head(x).unflatten(1, (height, width))

    def _place(self, height: int, width: int, condition: Tensor | None, labels: Tensor | None) -> Tensor:
        """Sinusoidal encodings of row and column plus features of condition and label, [1 or B, h * w, width]."""
        device = self.above.weight.device
        frequencies = torch.exp(-math.log(100) * torch.linspace(0, 1, self.width // 4, device=device))
        row, column = (torch.arange(size, device=device).unsqueeze(1) * frequencies for size in (height, width))
        row, column = (torch.cat([angle.sin(), angle.cos()], 1) for angle in (row, column))
        place = torch.cat([row.unsqueeze(1).expand(-1, width, -1), column.expand(height, -1, -1)], 2).flatten(0, 1).unsqueeze(0)
        if condition is not None and self.condition is not None:
            place = place + self.condition(condition).flatten(2).mT
        if labels is not None and self.label is not None:
            place = place + self.label(labels).unsqueeze(1)
        return place

    def _check_condition(self, condition: Tensor | None, shape: Sequence[int]) -> None:
        batch, height, width = shape
        expected = [batch, self.num_conditions, height, width] if self.num_conditions else None
        got = None if condition is None else list(condition.shape)
        if got != expected:
            raise ValueError(f"IndexPrior: condition must {f'have shape {expected}' if expected else 'be None'}, got {got}.")

    def _check_labels(self, labels: Tensor | None, batch: int) -> Tensor | None:
        """The labels on the device of the prior."""
        if labels is None or not self.num_classes:
            expected = f"be int64 [{batch}]" if self.num_classes else "be None"
            if (labels is None) != (not self.num_classes):
                raise ValueError(f"IndexPrior: labels must {expected}, got {None if labels is None else list(labels.shape)}.")
            return None
        if labels.dtype != torch.int64:
            raise TypeError(f"IndexPrior: labels must be int64, got {labels.dtype}.")
        check_labels("IndexPrior", labels, self.num_classes)
        if len(labels) != batch:
            raise ValueError(f"IndexPrior: labels must have shape [{batch}], got {list(labels.shape)}.")
        return labels.to(self.above.weight.device)


class _Block(nn.Module):
    """A pre-norm transformer layer: causal attention and an MLP, both with residual connections and dropout."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.noise = math.sqrt(dropout / (1 - dropout))
        self.head_dim = math.gcd(width, 32)
        self.attention_norm = nn.LayerNorm(width)
        self.to_qkv = nn.Linear(width, 3 * width)
        self.from_heads = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, cache: Tensor | None = None, t: int = 0) -> Tensor:
        """x [B, T, width]; with a cache, x is position t alone, [B, 1, width], and the cache holds keys and values of earlier ones."""
        qkv = self.to_qkv(self.attention_norm(x)).unflatten(2, (3, -1, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, heads, T, head_dim] each
        if cache is not None:
            cache[0, :, :, t], cache[1, :, :, t] = k[:, :, 0], v[:, :, 0]
            k, v = cache[:, :, :, : t + 1]
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None)
        x = x + self._drop(self.from_heads(attended.transpose(1, 2).flatten(2)))
        return x + self._drop(self.mlp(x))

    def _drop(self, y: Tensor) -> Tensor:
        if not self.training or self.noise == 0:
            return y
        return y * standard_normal(*y.shape, device=y.device).mul(self.noise).add(1)

    def new_cache(self, n: int, length: int) -> Tensor:
        """An empty cache of keys and values for n maps, [2, n, heads, T, head_dim]."""
        weight = self.from_heads.weight
        return weight.new_empty(2, n, len(weight) // self.head_dim, length, self.head_dim)
