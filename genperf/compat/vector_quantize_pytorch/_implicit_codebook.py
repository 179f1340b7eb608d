# SPDX-License-Identifier: Apache-2.0
"""The network of an implicit neural codebook (QINCo): codes of a quantizer as a function of what the quantizers before it decoded."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from ..._typing import signature_of


class MLP(nn.Module):
    """A residual network of a code and a condition; Huijben et al., "Residual Quantization with Implicit Neural Codebooks" (2024).

    Equivalent to (codes and condition [..., dim]):
        x = proj_in(torch.cat([condition, codes], -1))
        for layer in layers:
            x = x + layer(x)                                  # Linear, SiLU, Linear
        return F.normalize(x, dim=-1) if l2norm_output else x
    """

    layers: Sequence[nn.Module]  # an nn.ModuleList

    def __init__(self, dim: int, dim_hidden: int | None = None, depth: int = 4, l2norm_output: bool = False) -> None:
        super().__init__()
        hidden = dim if dim_hidden is None else dim_hidden
        self.proj_in = nn.Linear(2 * dim, dim)
        blocks = [nn.Sequential(nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, dim)) for _ in range(depth)]
        self.layers = nn.ModuleList(blocks)  # pyright: ignore[reportAttributeAccessIssue]
        self.l2norm_output = l2norm_output

    def transform(self, codes: Tensor, condition: Tensor) -> Tensor:
        """Codes [..., dim] under a condition [..., dim]; their shapes broadcast, and only the result has all dimensions."""
        of_condition, of_codes = self.proj_in.weight.chunk(2, 1)
        x = F.linear(condition, of_condition, self.proj_in.bias) + F.linear(codes, of_codes)
        for layer in self.layers:
            x = layer(x) + x
        return F.normalize(x, dim=-1) if self.l2norm_output else x

    def forward(self, codes: Tensor, *, condition: Tensor) -> Tensor:
        """Codes [K, dim] or [h, K, dim] under each condition [B, ..., dim], as [B, N, K, dim] or [h, B, N, K, dim]."""
        condition = condition.unsqueeze(1) if condition.dim() == 2 else condition.flatten(1, -2)
        return self.transform(codes if codes.dim() == 2 else codes[:, None, None], condition.unsqueeze(2))

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self) -> None: ...


class Conditioned(NamedTuple):
    """A network with its condition [B, ..., dim], as a function of codes: what VectorQuantize takes as codebook_transform_fn."""

    network: MLP
    condition: Tensor

    def __call__(self, codes: Tensor) -> Tensor:
        return self.network(codes, condition=self.condition)

    @property
    def rows(self) -> Tensor:  # [N, dim]
        return self.condition.flatten(0, -2)
