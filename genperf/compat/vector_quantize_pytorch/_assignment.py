# SPDX-License-Identifier: Apache-2.0
"""How vectors are assigned to codes, and the terms that need all codes: nearest or sampled codes, one or several a vector; softmaxes.

Vectors are [h, outer, d, inner], indices [h, outer, inner]. No [N, K] tensor is stored: what no op computes takes chunks of vectors.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..._choices import Logits, Metric
from ...nn._codebook_losses import diversity_loss
from ...ops._autograd import Function, apply
from ...ops._code_softmax import logits_reference
from ...ops._code_softmax_chunks import MIN_SQUARED_DISTANCE
from ...ops._dispatch import choose_impl
from ...ops._layout import as_one_codebook
from ...ops.code_cross_entropy import code_cross_entropy
from ...ops.nearest_code import search, unavailable
from ...ops.nearest_codes import MAX_K, nearest_codes
from ...ops.sample_code import draw_codes
from ._implicit_codebook import Conditioned

# Elements of the logits that exist at a time.
CHUNK = 1 << 22


class CodebookAssignment:
    """Vectors choose among the codes [h, K, d] of a codebook."""

    def __init__(self, codes: Tensor, metric: Metric) -> None:
        self.codes = codes
        self.metric: Metric = metric
        self.logits: Logits = "dot" if metric == "cosine" else "distance"

    def assign(
        self, queries: Tensor, vectors: Tensor, valid: Tensor | None, temperature: float, first: int, topk: int | None
    ) -> Tensor:  # [h, outer, inner], or [h, outer, inner, topk]
        """Indices of the nearest codes of the queries, or at a temperature sampled ones of `vectors`, which are the queries as unit
        vectors for the cosine similarity; -1 where not valid. `first` numbers the vectors for the noise."""
        vectors, codes = vectors.detach(), self.codes.detach()
        if topk is None and temperature > 0:
            return draw_codes(vectors, codes, temperature, self.logits, 2, valid, first=first)
        if topk is None:
            impl = choose_impl("nearest_code", None, unavailable(queries.device, queries.dtype))
            return search(queries.detach(), codes, valid, self.metric, impl)
        if temperature == 0 and topk <= MAX_K:
            found = nearest_codes(queries.detach(), codes, topk, metric=self.metric, channel_dim=2)
        else:
            logits = (logits_reference(rows.unsqueeze(-1), codes, None, self.logits) for rows in self._chunks(vectors))
            found = torch.cat([best(each, temperature, topk) for each in logits], 1)
            found = found.unflatten(1, (vectors.shape[1], vectors.shape[3]))
        return found if valid is None else found.masked_fill(~valid.unsqueeze(-1), -1)

    def table(self, vectors: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors [outer, d, inner], codes [M, d] and indices [outer, inner] in these, of all codebooks in one."""
        vectors, indices = as_one_codebook(vectors, indices, self.codes.shape[1])
        return vectors, self.codes.flatten(0, 1), indices

    def cross_entropy(self, vectors: Tensor, indices: Tensor) -> Tensor:
        """Mean cross-entropy of the indices under the softmax of minus the distances, or of the cosines."""
        losses = code_cross_entropy(vectors, self.codes, indices, logits=self.logits, channel_dim=2)
        counted = (indices >= 0).flatten(1).sum(1)
        return (losses * counted).sum() / counted.sum().clamp(min=1)

    def diversity(self, vectors: Tensor, valid: Tensor | None, inverse_temperature: float) -> Tensor:
        options = {"inverse_temperature": inverse_temperature, "metric": self.metric, "epsilon": 1e-5}
        return diversity_loss(vectors, self.codes, valid, **options)

    def soft_codes(self, vectors: Tensor, valid: Tensor | None, temperature: float) -> Tensor:
        """The mean code under the softmax, [h, outer, d, inner]. Its gradient reaches vectors and codes through the softmax alone."""
        vectors = vectors if valid is None else torch.where(valid.unsqueeze(2), vectors, 0)
        parts = [apply(_MeanCode, rows, self.codes, self.logits, temperature) for rows in self._chunks(vectors)]
        return torch.cat(parts, 1).unflatten(1, (vectors.shape[1], vectors.shape[3])).movedim(-1, 2)

    def _chunks(self, vectors: Tensor) -> Iterator[Tensor]:
        rows = vectors.movedim(2, -1).flatten(1, 2)
        yield from rows.split(max(1, CHUNK // (len(rows) * self.codes.shape[1])), 1)


class _MeanCode(Function):
    """The mean code under the softmax, with a gradient through the softmax alone. Backward computes the softmax again."""

    @staticmethod
    def forward(rows: Tensor, codes: Tensor, logits: Logits, temperature: float) -> Tensor:  # [h, N, d], [h, K, d]
        return _softmax(rows, codes, logits, temperature)[1] @ codes

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        rows, codes, ctx.logits, ctx.temperature = inputs
        ctx.save_for_backward(rows, codes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, codes = ctx.saved_tensors
        logits, p = _softmax(rows, codes, ctx.logits, ctx.temperature)
        with torch.autocast(rows.device.type, enabled=False):
            of_p = grad @ codes.mT
            weight = p * (of_p - (of_p * p).sum(-1, keepdim=True)) / ctx.temperature
            if ctx.logits == "dot":
                return (weight @ codes).to(rows.dtype), weight.mT @ rows.to(codes.dtype), None, None
            weight = torch.where(logits < -(MIN_SQUARED_DISTANCE**0.5), weight / -logits, 0)
            center = codes.mean(1, keepdim=True)
            x, e = rows - center, codes - center
            of_rows = weight @ e - x * weight.sum(2, keepdim=True)
            return of_rows.to(rows.dtype), weight.mT @ x - e * weight.sum(1).unsqueeze(-1), None, None


def _softmax(rows: Tensor, codes: Tensor, logits: Logits, temperature: float) -> tuple[Tensor, Tensor]:
    """Logits and softmax, [h, N, K]."""
    found = logits_reference(rows.unsqueeze(-1), codes, None, logits)
    return found, (found / temperature).softmax(-1)


class TransformedAssignment:
    """Each vector chooses among codes of its own, which a function makes of the codebook's; Huijben et al., "Residual Quantization with
    Implicit Neural Codebooks" (2024).

    The function returns [h, B, N, K, d] for codes [h, K, d], as upstream's codebook_transform_fn. A `Conditioned` network is searched in
    chunks without a gradient, and differentiated at the chosen codes only; of another function all codes are stored.
    """

    def __init__(self, transform: Callable[[Tensor], Tensor], codes: Tensor, metric: Metric) -> None:
        self.transform = transform
        self.codes = codes
        self.metric: Metric = metric
        self._all: Tensor | None = None

    def assign(self, queries: Tensor, vectors: Tensor, valid: Tensor | None, temperature: float, first: int, topk: int | None) -> Tensor:
        rows = vectors.detach().movedim(2, -1).flatten(1, 2)
        if not isinstance(self.transform, Conditioned):
            self._all_codes()  # with a gradient
        with torch.no_grad():
            parts = [best(logits, temperature, topk) for logits in self._logits_of(rows)]
        found = torch.cat(parts, 1).unflatten(1, (vectors.shape[1], vectors.shape[3]))
        if valid is None:
            return found
        return found.masked_fill(~(valid if topk is None else valid.unsqueeze(-1)), -1)

    def table(self, vectors: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As of `CodebookAssignment`; M is the number of vectors, each of which has a code of its own."""
        valid = indices >= 0
        if valid.numel() == 0:
            return CodebookAssignment(self.codes, self.metric).table(vectors, indices)
        chosen = self._codes_at(indices.clamp(min=0).flatten(1))
        numbers = torch.arange(valid[0].numel(), device=valid.device).view(valid.shape[1:]).expand_as(valid)
        vectors, numbers = as_one_codebook(vectors, torch.where(valid, numbers, -1), chosen.shape[1])
        return vectors, chosen.flatten(0, 1), numbers

    def cross_entropy(self, vectors: Tensor, indices: Tensor) -> Tensor:
        return F.cross_entropy(self._all_logits(vectors).flatten(0, 1), indices.flatten(), ignore_index=-1)

    def diversity(self, vectors: Tensor, valid: Tensor | None, inverse_temperature: float) -> Tensor:
        p = (self._all_logits(vectors) * inverse_temperature).softmax(-1)
        counted = p.new_ones(p.shape[:2]) if valid is None else valid.flatten(1).to(p.dtype)
        mean = (p * counted.unsqueeze(-1)).sum(1) / counted.sum(1, keepdim=True).clamp(min=1)
        return (mean * mean.clamp(min=1e-5).log()).sum(-1).mean()

    def soft_codes(self, vectors: Tensor, valid: Tensor | None, temperature: float) -> Tensor:
        p = (self._all_logits(vectors) / temperature).softmax(-1)
        codes = (p.unsqueeze(-2) @ self._all_codes().detach()).squeeze(-2)
        return codes.unflatten(1, (vectors.shape[1], vectors.shape[3])).movedim(-1, 2)

    def _all_codes(self) -> Tensor:  # [h, N, K, d]
        if self._all is None:
            codes = self.transform(self.codes)
            self._all = self._unit(codes.reshape(codes.shape[0], -1, *codes.shape[-2:]))
        return self._all

    def _all_logits(self, vectors: Tensor) -> Tensor:  # [h, N, K]
        return self._similarity(vectors.movedim(2, -1).flatten(1, 2), self._all_codes())

    def _logits_of(self, rows: Tensor) -> Iterator[Tensor]:
        if not isinstance(self.transform, Conditioned):
            yield self._similarity(rows, self._all_codes())
            return
        conditions = self.transform.rows
        size = max(1, CHUNK // self.codes[0].numel())
        for part, condition in zip(rows.split(size, 1), conditions.split(size), strict=True):
            codes = self.transform.network.transform(self.codes.unsqueeze(1), condition.unsqueeze(1))
            yield self._similarity(part, self._unit(codes))

    def _codes_at(self, indices: Tensor) -> Tensor:  # [h, M] -> [h, M, d]
        if self._all is None and isinstance(self.transform, Conditioned):
            chosen = self.codes.gather(1, indices.unsqueeze(-1).expand(-1, -1, self.codes.shape[2]))
            conditions = self.transform.rows
            conditions = conditions.repeat_interleave(indices.shape[1] // max(len(conditions), 1), 0)
            return self._unit(self.transform.network.transform(chosen, conditions))
        codes = self._all_codes()
        per_vector = indices.view(len(indices), codes.shape[1], -1, 1).expand(-1, -1, -1, codes.shape[3])
        return codes.gather(2, per_vector).flatten(1, 2)

    def _unit(self, codes: Tensor) -> Tensor:
        return F.normalize(codes, dim=-1, eps=1e-6) if self.metric == "cosine" else codes

    def _similarity(self, rows: Tensor, codes: Tensor) -> Tensor:
        """Minus the distances, or the cosines, [h, N, K], of rows [h, N, d] and codes [h, N, K, d]."""
        if self.metric == "cosine":
            return (codes @ rows.to(codes.dtype).unsqueeze(-1)).squeeze(-1)
        return -F.pairwise_distance(rows.unsqueeze(2), codes)


def best(logits: Tensor, temperature: float, topk: int | None) -> Tensor:
    """The code with the largest logit, or the topk, after Gumbel noise at a temperature."""
    if temperature > 0:
        logits = logits - temperature * torch.empty_like(logits).exponential_().log()
    return logits.argmax(-1) if topk is None else logits.topk(topk).indices


def codes_at(codes: Tensor, indices: Tensor) -> Tensor:
    """Codes [outer, d, inner] of indices [outer, inner] in codes [K, d], differentiable; zeros where an index is -1."""
    found = F.embedding(indices.clamp(min=0), codes).transpose(1, 2)
    return torch.where((indices >= 0).unsqueeze(1), found, 0)
