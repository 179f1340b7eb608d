# SPDX-License-Identifier: Apache-2.0
"""BinaryMapper of vector-quantize-pytorch in plain PyTorch; the package need not be installed.

The arguments of constructor and forward, the returned values, the methods and the samples of a seed are those of upstream.

Differences from upstream:
  - The probabilities of all codes are built bit by bit; upstream multiplies two matrices of all codes.
  - With straight_through, the output is the one-hot vector itself; upstream's is rounded in one_hot + p - p.
  - Half precision is computed in float32, and works outside of autocast too.
  - Invalid arguments raise ValueError instead of AssertionError.
"""

from math import log
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ..._typing import signature_of
from ...ops._autograd import ValueOf
from ...ops._precision import accumulator_dtype
from ...ops._validate import check
from .._placed import Placed

NAT = log(2)


class BinaryMapper(Placed):
    """Samples independent bits from logits, as a one-hot vector over all 2^bits codes; Fleuret, "The Free Transformer" (arXiv 2510.17558).

    Equivalent to (evaluation mode):
        sampled = logits.sigmoid().bernoulli().long()
        one_hot = F.one_hot((sampled * 2 ** torch.arange(bits)).sum(-1), 2**bits).float()

    Args:
        bits: number of bits of a code; the output has 2^bits channels.
        kl_loss_threshold: divergence of the bits from fair coins, in nats, above which the auxiliary loss penalizes it.
        deterministic_on_eval: whether evaluation mode takes the likelier value of each bit instead of a sample.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, bits: int = 1, kl_loss_threshold: float = NAT, deterministic_on_eval: bool = False) -> None:
        super().__init__()
        check("BinaryMapper", "bits must be 1 to 62", bits, 1 <= bits <= 62)
        self.bits = bits
        self.num_codes = 2**bits
        self.kl_loss_threshold = kl_loss_threshold
        self.deterministic_on_eval = deterministic_on_eval

    @property
    def power_two(self) -> Tensor:
        """The weight of each bit in an index [bits]."""
        return 2 ** torch.arange(self.bits, device=self._placed.device)

    @property
    def codes(self) -> Tensor:
        """The bits of all codes, bool [2^bits, bits]."""
        return self._bits_of(torch.arange(self.num_codes, device=self._placed.device))

    @property
    def zero(self) -> Tensor:
        return self._placed.new_zeros(())

    def _bits_of(self, indices: Tensor) -> Tensor:
        return indices.unsqueeze(-1).bitwise_and(2 ** torch.arange(self.bits, device=indices.device)) != 0

    def binary_entropy(self, logits: Tensor) -> Tensor:
        """The entropy, in nats, of the bits of logits [..., bits]."""
        return -(logits.sigmoid() * F.logsigmoid(logits) + (-logits).sigmoid() * F.logsigmoid(-logits)).sum(-1)

    def calc_aux_loss(self, logits: Tensor, reduce_aux_kl_loss: bool = True) -> Tensor:
        """The divergence from fair coins in excess of kl_loss_threshold: its mean, or [...] for logits [..., bits]."""
        logits = logits.to(accumulator_dtype(logits.dtype))
        excess = F.relu(self.bits * NAT - self.binary_entropy(logits) - self.kl_loss_threshold)
        return excess.sum() / max(1, excess.numel()) if reduce_aux_kl_loss else excess

    def log_prob(self, logits: Tensor, *, indices: Tensor | None = None, one_hot: Tensor | None = None, sum_bits: bool = True) -> Tensor:
        """The log-probability of codes, given as indices [...] or one_hot [..., 2^bits], or of each of their bits [..., bits]."""
        check("BinaryMapper", "either indices or one_hot must be given", None, (indices is None) != (one_hot is None))
        if indices is None:
            assert one_hot is not None
            indices = one_hot.argmax(-1)
        logits = logits.to(accumulator_dtype(logits.dtype))
        log_probs = F.logsigmoid(torch.where(self._bits_of(indices), logits, -logits))
        return log_probs.sum(-1) if sum_bits else log_probs

    def forward(
        self,
        logits: Tensor,
        temperature: float = 1.0,
        straight_through: bool | None = None,
        calc_aux_loss: bool | None = None,
        deterministic: bool | None = None,
        return_indices: bool = False,
        reduce_aux_kl_loss: bool = True,
    ) -> tuple[Tensor, ...]:
        """Sample codes.

        Args:
            logits: [..., bits].
            temperature: of the sampling; not of the gradient.
            straight_through: whether the gradient is that of the probabilities of all codes; None for in training mode.
            calc_aux_loss: whether to compute the auxiliary loss, or else return 0; None for in training mode.
            deterministic: whether to take the likelier value of each bit; None for deterministic_on_eval in evaluation mode.
            return_indices: whether to return the indices of the codes too.
            reduce_aux_kl_loss: whether the auxiliary loss is a mean, or else [...].

        Returns:
            one_hot, float [..., 2^bits]; with return_indices, indices, int64 [...]; the auxiliary loss.
        """
        check("BinaryMapper", f"logits must have {self.bits} channels", list(logits.shape), logits.shape[-1] == self.bits)
        wide = logits.to(accumulator_dtype(logits.dtype))
        if deterministic is None:
            deterministic = self.deterministic_on_eval and not self.training
        probabilities = (wide.detach() / temperature).sigmoid()
        sampled = probabilities > 0.5 if deterministic else probabilities.bernoulli()
        # A product, not a shift, which torch.onnx cannot export.
        indices = (sampled.long() * 2 ** torch.arange(self.bits, device=logits.device)).sum(-1)
        one_hot = wide.new_zeros(*indices.shape, self.num_codes).scatter_(-1, indices.unsqueeze(-1), 1)
        if self.training if straight_through is None else straight_through:
            one_hot = ValueOf.apply(one_hot, self._probabilities(wide))
        aux_loss = wide.new_zeros(())
        if self.training if calc_aux_loss is None else calc_aux_loss:
            aux_loss = self.calc_aux_loss(wide, reduce_aux_kl_loss)
        return (one_hot, indices, aux_loss) if return_indices else (one_hot, aux_loss)

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self) -> None: ...

    def _probabilities(self, logits: Tensor) -> Tensor:
        """Of all codes [..., 2^bits]; each bit doubles them, the low half without it and the high half with it."""
        codes = torch.ones_like(logits[..., :1])
        for bit in logits.split(1, -1):
            codes = torch.cat([codes * (-bit).sigmoid(), codes * bit.sigmoid()], -1)
        return codes
