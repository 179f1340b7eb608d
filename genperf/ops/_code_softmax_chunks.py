# SPDX-License-Identifier: Apache-2.0
"""Softmax over all codes of a codebook, one chunk of logits at a time: the compiled ops behind `_code_softmax`.

Forward keeps three numbers per position; backward computes the logits again. A chunk of logits is one matrix product; the squared norms of
a distance are extra columns of its operands. On the CPU in float32 one fused kernel processes the product, otherwise plain PyTorch does.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .. import _library
from ._dispatch import Implementation, register_fake
from ._noise import gumbel_noise
from ._precision import accumulator_dtype, full_float32

# Squared distances below this count as constant, so that the derivative of their root is 0.
MIN_SQUARED_DISTANCE = 1e-8

# Numbers of the kinds of logits, in csrc/cpu/small_code_softmax.cpp.
FORMS = {"distance": 0, "squared_distance": 1, "dot": 2}

# Logits per chunk: sized for the cache, larger for large K, so that at least _MIN_ROWS rows share a pass over the codebook.
_CHUNK = 1 << 20
_LARGEST_CHUNK = 1 << 23
_MIN_ROWS = 32


class _Chunks:
    """Iterates over the chunks of one head's positions. All chunks share one buffer for their products."""

    def __init__(self, x: Tensor, codebook: Tensor, logits: str) -> None:  # [outer, D, inner], [K, D]
        # Both are set anew for each head that shares the codebook.
        self.x = x
        self.valid: Tensor | None = None  # [outer * inner]
        self.logits, self.dtype = logits, accumulator_dtype(x.dtype)
        codes = codebook.to(self.dtype)
        self.center = None if logits == "dot" else codes.mean(0)
        self.codes = codes if self.center is None else codes - self.center
        outer, dim, inner = x.shape
        rows = max(1, _CHUNK // max(len(codes), dim), min(_MIN_ROWS, _LARGEST_CHUNK // max(len(codes), dim)))
        if inner >= rows:
            self.outer_step, self.inner_step = 1, -(-inner // -(-inner // rows))
        else:
            self.outer_step, self.inner_step = max(1, min(rows // max(1, inner), outer)), inner
        self.buffer = x.new_empty((self.outer_step * self.inner_step, len(codes)), dtype=self.dtype)
        norms = self.codes.square().sum(1, keepdim=True)
        if logits == "distance":
            self.operand = torch.cat([-2 * self.codes, norms, torch.ones_like(norms)], 1)
        elif logits == "squared_distance":
            self.operand = torch.cat([2 * self.codes, -norms], 1)
        else:
            self.operand = self.codes

    @property
    def root(self) -> bool:
        """Whether the products are squared distances, and the logits minus their roots. Otherwise the products are the logits."""
        return self.logits == "distance"

    def __iter__(self) -> Iterator[tuple[slice, tuple[slice, slice, slice], Tensor, Tensor]]:
        """Yields, for each chunk, its positions, its index into x, its centered vectors [rows, D] and the products [rows, K]."""
        outer, dim, inner = self.x.shape
        if inner == 0:
            return
        for o in range(0, outer, self.outer_step):
            for i in range(0, inner, self.inner_step):
                place = (slice(o, o + self.outer_step), slice(None), slice(i, i + self.inner_step))
                part = self.x[place]
                rows = part.transpose(1, 2).reshape(-1, dim).to(self.dtype)
                first = o * inner + i
                positions = slice(first, first + len(rows))
                rows = rows if self.center is None else rows - self.center
                if self.valid is not None:
                    rows = torch.where(self.valid[positions].unsqueeze(1), rows, 0)
                left = rows
                if self.logits != "dot":
                    ones = rows.new_ones(len(rows), 1)
                    left = torch.cat([rows, ones, rows.square().sum(1, keepdim=True)] if self.root else [rows, ones], 1)
                yield positions, place, rows, torch.mm(left, self.operand.T, out=self.buffer[: len(rows)])


def _heads(x: Tensor, codebook: Tensor, valid: Tensor | None, logits: str) -> Iterator[tuple[int, _Chunks]]:
    """Yields each head with its chunks. Heads that share one expanded codebook share its operand."""
    chunks = None
    for head in range(len(x)):
        if chunks is None or codebook.stride(0) != 0:
            chunks = _Chunks(x[head], codebook[head], logits)
        chunks.x, chunks.valid = x[head], None if valid is None else _rows_of(valid, head)
        yield head, chunks


def _implement(op: str) -> Callable[[Implementation], Implementation]:
    """Decorator: registers the implementation of `op` on every device."""

    def decorate(function: Implementation) -> Implementation:
        def run(*arguments: object) -> object:
            device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
            with torch.no_grad(), torch.autocast(device.type, enabled=False), full_float32():
                return function(*arguments)

        if _library.cpu_failure is None:
            torch.library.impl(f"genperf::{op}", "CompositeExplicitAutograd")(run)
        return function

    return decorate


def _has_kernel(products: Tensor) -> bool:
    return products.device.type == "cpu" and products.dtype == torch.float32


@_implement("code_softmax")
def _softmax(
    x: Tensor, codebook: Tensor, mask: Tensor | None, indices: Tensor | None, logits: str, temperature: float, floor: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    heads, outer, _, inner = x.shape
    dtype = accumulator_dtype(x.dtype)
    statistics = x.new_empty((3, heads, outer, inner), dtype=dtype)
    value = x.new_empty((heads, outer, inner), dtype=dtype)
    usage = x.new_zeros((heads, codebook.shape[1]) if indices is None else 0, dtype=torch.float64)
    valid = mask if indices is None else indices >= 0
    for head, chunks in _heads(x, codebook, valid, logits):
        chosen = None if indices is None else _rows_of(indices, head)
        kept, values = [_rows_of(t, head) for t in statistics], _rows_of(value, head)
        for at, _, _, products in chunks:
            forward = torch.ops.genperf.code_softmax_rows if _has_kernel(products) else _forward_rows
            largest, log_sum, mean = (t[at] for t in kept)
            total = usage[head] if indices is None else None
            forward(products, chunks.root, temperature, _at(chunks.valid, at), _at(chosen, at), largest, log_sum, mean, values[at], total)
    return *mean_and_entropy(value, usage, valid, floor), usage, statistics


def _count(valid: Tensor | None, positions: int) -> Tensor | int:
    """The number of positions of each head that are not masked, at least 1; [heads], or one number for all."""
    return max(1, positions) if valid is None else valid.sum((1, 2)).clamp(min=1)


def mean_and_entropy(value: Tensor, usage: Tensor, valid: Tensor | None, floor: float) -> tuple[Tensor, Tensor]:
    """Mean of the values [heads, outer, inner], 0 where they are not valid, and entropy of the mean probabilities, in the values' dtype."""
    count = _count(valid, value.shape[1] * value.shape[2])
    mean = (value.sum((1, 2), dtype=torch.float64) / count).to(value.dtype)
    if usage.dim() == 1:
        return mean, usage.to(value.dtype, copy=True)
    p = usage / (count.unsqueeze(1) if isinstance(count, Tensor) else count)
    return mean, -(p * p.clamp(min=floor).log()).sum(1).to(value.dtype)


@_implement("code_softmax_backward")
def _softmax_backward(
    grad_mean: Tensor | None,
    grad_entropy: Tensor | None,
    x: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    indices: Tensor | None,
    usage: Tensor,
    statistics: Tensor,
    logits: str,
    temperature: float,
    floor: float,
    need_x: bool,
    need_codebook: bool,
) -> tuple[Tensor, Tensor]:
    dtype = accumulator_dtype(x.dtype)
    grad_x = torch.empty_like(x) if need_x else x.new_empty(0)
    grad_codebook = torch.empty_like(codebook) if need_codebook else codebook.new_empty(0)
    _, outer, _, inner = x.shape
    valid = mask if indices is None else indices >= 0
    count = _count(valid, outer * inner)
    shares = None if grad_mean is None else (grad_mean / count).to(dtype)  # the gradient of each value
    grad_usage = None
    if grad_entropy is not None and indices is None:
        count = count.unsqueeze(1) if isinstance(count, Tensor) else count
        p = usage / count
        slopes = p.clamp(min=floor).log() + (p >= floor)
        # A constant does not change the gradient of the logits; without it less is lost to rounding.
        grad_usage = ((slopes.mean(1, keepdim=True) - slopes) * (grad_entropy.unsqueeze(1) / count)).to(dtype)
    for head, chunks in _heads(x, codebook, valid, logits):
        chosen = None if indices is None else _rows_of(indices, head)
        upstream = None if shares is None else shares[head].expand(min(outer * inner, chunks.buffer.shape[0])).contiguous()
        kept = [_rows_of(t, head) for t in statistics]
        codes = chunks.codes
        # For distances, a column of ones sums the gradients beside their products with the codes. The sums of gradient * (x - code) that
        # result lose little to rounding even where x is close to the code that has nearly all of the weight.
        extended = codes if logits == "dot" else torch.cat([codes, codes.new_ones(len(codes), 1)], 1)
        sums = codes.new_zeros(codes.shape[1] + (logits != "dot"), len(codes))
        for at, place, rows, products in chunks:
            backward = torch.ops.genperf.code_softmax_rows_backward if _has_kernel(products) else _backward_rows
            largest, log_sum, mean = (t[at] for t in kept)
            of_usage = None if grad_usage is None else grad_usage[head]
            valid, own = _at(chunks.valid, at), _at(chosen, at)
            backward(
                products,
                chunks.root,
                temperature,
                valid,
                own,
                largest,
                log_sum,
                mean,
                None if upstream is None else upstream[: len(rows)],
                of_usage,
            )
            if need_x:
                found = products @ extended
                if logits != "dot":
                    found = torch.addcmul(-found[:, :-1], rows, found[:, -1:])
                    found *= 1 if chunks.root else -2
                target = grad_x[head][place]
                target.copy_(found.view(target.shape[0], target.shape[2], -1).transpose(1, 2))
            if need_codebook:
                left = rows if logits == "dot" else torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
                sums.addmm_(left.T, products)
        if need_codebook:
            if logits != "dot":
                sums = torch.addcmul(sums[:-1], codes.T, sums[-1], value=-1)
                sums *= -1 if chunks.root else 2
            grad_codebook[head].copy_(sums.T)
    return grad_x, grad_codebook


@_implement("sample_code")
def _sample(x: Tensor, codebook: Tensor, mask: Tensor | None, seed: Tensor | None, first: int, logits: str, temperature: float) -> Tensor:
    heads, outer, _, inner = x.shape
    indices = x.new_empty((heads, outer, inner), dtype=torch.int64)
    for head, chunks in _heads(x, codebook, None, logits):
        head_seed = None if seed is None else seed + head
        found = _rows_of(indices, head)
        for at, _, _, products in chunks:
            draw = torch.ops.genperf.sample_code_rows if _has_kernel(products) else _sample_rows
            draw(products, chunks.root, temperature, head_seed, first + at.start, found[at])
    return indices if mask is None else indices.masked_fill_(~mask, -1)


def _rows_of(t: Tensor, head: int) -> Tensor:
    """[heads, outer, inner] -> [outer * inner] of one head, contiguous."""
    return t[head].contiguous().view(-1)


def _at(t: Tensor | None, positions: slice) -> Tensor | None:
    return None if t is None else t[positions]


def _logits_in_place(products: Tensor, root: bool) -> Tensor:
    return products.clamp_(min=MIN_SQUARED_DISTANCE).sqrt_().neg_() if root else products


def _forward_rows(
    products: Tensor,
    root: bool,
    temperature: float,
    valid: Tensor | None,
    indices: Tensor | None,
    largest: Tensor,
    log_sum: Tensor,
    mean: Tensor,
    value: Tensor,
    usage: Tensor | None,
) -> None:
    """The kernel csrc/cpu/code_softmax.cpp in plain PyTorch: writes the statistics and the value of a chunk, adds to the usage."""
    relative = _logits_in_place(products, root)
    torch.amax(relative, 1, out=largest)
    # Bounded, so that its product with a probability of 0 is 0.
    relative = relative.sub_(largest.unsqueeze(1)).mul_(1 / temperature).clamp_(min=-1000)
    exps = relative.exp()
    total = exps.sum(1)
    torch.log(total, out=log_sum)
    if indices is None:
        assert usage is not None
        share = total.reciprocal() if valid is None else torch.where(valid, total.reciprocal(), 0)
        usage += exps.T @ share
        mean.copy_(relative.mul_(exps).sum(1) / total)
        value.copy_(log_sum - mean)
    else:
        mean.zero_()
        value.copy_(log_sum - relative.gather(1, indices.clamp(min=0).unsqueeze(1)).squeeze(1))
    if valid is not None:
        value.masked_fill_(~valid, 0)


def _backward_rows(
    products: Tensor,
    root: bool,
    temperature: float,
    valid: Tensor | None,
    indices: Tensor | None,
    largest: Tensor,
    log_sum: Tensor,
    mean: Tensor,
    grad_value: Tensor | None,
    grad_usage: Tensor | None,
) -> None:
    """Overwrites the products of a chunk by the gradient in them."""
    logit = _logits_in_place(products, root)
    relative = (logit - largest.unsqueeze(1)).mul_(1 / temperature).clamp_(min=-1000)
    p = (relative - log_sum.unsqueeze(1)).exp_()
    if indices is not None:
        assert grad_value is not None
        p.scatter_add_(1, indices.clamp(min=0).unsqueeze(1), p.new_full((1, 1), -1).expand(len(p), 1))
        gradient = p.mul_(grad_value.unsqueeze(1))
    else:
        slope = p.new_zeros(()) if grad_value is None else relative.sub_(mean.unsqueeze(1)).mul_(-grad_value.unsqueeze(1))
        if grad_usage is not None:
            slope = slope + (grad_usage - (p @ grad_usage).unsqueeze(1))
        gradient = p.mul_(slope)
    gradient *= 1 / temperature
    if root:
        gradient = torch.where(logit < -math.sqrt(MIN_SQUARED_DISTANCE), gradient / logit, 0)
    products.copy_(gradient if valid is None else torch.where(valid.unsqueeze(1), gradient, 0))


def _sample_rows(products: Tensor, root: bool, temperature: float, seed: Tensor | None, first: int, indices: Tensor) -> None:
    """Writes the drawn indices of a chunk, whose first position is `first`."""
    perturbed = _logits_in_place(products, root)
    if seed is not None:
        perturbed += temperature * gumbel_noise(seed, products.shape[0], products.shape[1], products.dtype, first)
    torch.argmax(perturbed.nan_to_num_(nan=-math.inf, posinf=math.inf, neginf=-math.inf), 1, out=indices)


@register_fake("code_softmax")
def _(
    x: Tensor, codebook: Tensor, mask: Tensor | None, indices: Tensor | None, logits: str, temperature: float, floor: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    heads, outer, _, inner = x.shape
    dtype = accumulator_dtype(x.dtype)
    return (
        x.new_empty(heads, dtype=dtype),
        x.new_empty(heads if indices is None else 0, dtype=dtype),
        x.new_empty((heads, codebook.shape[1]) if indices is None else 0, dtype=torch.float64),  # a logarithm is taken of it
        x.new_empty((3, heads, outer, inner), dtype=dtype),
    )


@register_fake("code_softmax_backward")
def _(
    grad_mean: Tensor | None,
    grad_entropy: Tensor | None,
    x: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    indices: Tensor | None,
    usage: Tensor,
    statistics: Tensor,
    logits: str,
    temperature: float,
    floor: float,
    need_x: bool,
    need_codebook: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x) if need_x else x.new_empty(0), torch.empty_like(codebook) if need_codebook else codebook.new_empty(0)


@register_fake("sample_code")
def _(x: Tensor, codebook: Tensor, mask: Tensor | None, seed: Tensor | None, first: int, logits: str, temperature: float) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], x.shape[3]), dtype=torch.int64)


@register_fake("code_softmax_rows")
def _(*arguments: object) -> None:
    pass


@register_fake("code_softmax_rows_backward")
def _(*arguments: object) -> None:
    pass


@register_fake("sample_code_rows")
def _(*arguments: object) -> None:
    pass
