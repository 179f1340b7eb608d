"""Softmax over all codes of a codebook without the matrix positions x codes: one chunk of rows after the other.

Forward keeps three numbers for each position; backward computes the logits again. A chunk of logits is one matrix product: the norms in
a squared distance are further columns of its operands. What follows it is one pass of a kernel on the CPU in float32, else plain PyTorch.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ._autograd import apply, differentiate
from ._dispatch import choose_impl, register_fake
from ._layout import as_positions
from ._noise import gumbel_noise
from ._precision import accumulator_dtype, full_float32
from ._validate import check_positions, check_tensor
from .nearest_code import _as_head_positions, _check_search

LOGITS = ("distance", "squared_distance", "dot")

# Logits that are held at a time: so many that they stay in cache, and more where codes are so many that too few rows would share a pass
# over the codebook.
_CHUNK = 1 << 20
_LARGEST_CHUNK = 1 << 23
_ROWS = 32

# Below it a squared distance counts as constant, and the gradient of its root as 0.
_SMALLEST = 1e-8


def check_arguments(op: str, x: Tensor, codebook: Tensor, temperature: float, logits: str, channel_dim: int, mask: Tensor | None) -> int:
    """Check what the ops on all codes share; the channel dimension as a non-negative number."""
    channel = _check_search(op, x, codebook, channel_dim)
    if logits not in LOGITS:
        raise ValueError(f"{op}: logits must be one of {', '.join(LOGITS)}, got {logits!r}.")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"{op}: temperature must not be negative, got {temperature!r}.")
    if mask is not None:
        check_tensor(op, "mask", mask)
        if mask.dtype != torch.bool:
            raise TypeError(f"{op}: mask must be bool, got {mask.dtype}.")
        check_positions(op, "mask", mask, x, channel)
    return channel


def unavailable(device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
    """Which implementations cannot run, and why; best first."""
    from genperf import _library

    return {"native": _library.cpu_failure, "reference": None}


def with_heads(x: Tensor, codebook: Tensor, channel: int) -> tuple[Tensor, Tensor]:
    """x as [heads, outer, D, inner] and codebook as [heads, K, D]; one head where the codebook is [K, D]."""
    if codebook.dim() == 2:
        return as_positions(x, channel).unsqueeze(0), codebook.unsqueeze(0)
    return _as_head_positions(x, channel), codebook


def code_softmax(
    op: str,
    x: Tensor,  # [..., D, ...]
    codebook: Tensor,  # [K, D] or [heads, K, D]
    channel: int,
    mask: Tensor | None,
    indices: Tensor | None,
    logits: str,
    temperature: float,
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor | int]:
    """Of checked arguments: entropy or cross-entropy of each position [heads, outer, inner], 0 where the mask is False or the index is
    -1; the sum of the probabilities [heads, K], float64; the number of positions that count, [heads] or one for all.
    """
    if temperature == 0:
        raise ValueError(f"{op}: temperature must be positive, got {temperature!r}.")
    chosen = choose_impl(op, impl, unavailable(x.device, x.dtype), x, codebook)
    positions, codes = with_heads(x, codebook, channel)
    shape = (positions.shape[0], positions.shape[1], positions.shape[3])
    mask = None if mask is None else mask.reshape(shape)
    if indices is not None:
        indices = indices.reshape(shape)
        indices = indices if mask is None else indices.masked_fill(~mask, -1)
        mask = None
    arguments = (positions, codes, mask, indices, logits, float(temperature))
    if chosen == "reference":
        value, usage = code_softmax_reference(*arguments)
    elif torch.is_grad_enabled() and (x.requires_grad or codebook.requires_grad):
        value, usage, _ = apply(_CodeSoftmax, *arguments)
    else:
        value, usage, _ = torch.ops.genperf.code_softmax(*arguments)
    valid = mask if indices is None else indices >= 0
    count = shape[1] * shape[2] if valid is None else valid.sum((1, 2))
    return value, usage, count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


class _CodeSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(x, codebook, mask, indices, logits, temperature):
        return torch.ops.genperf.code_softmax(x, codebook, mask, indices, logits, temperature)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        x, codebook, mask, indices, ctx.logits, ctx.temperature = inputs
        ctx.save_for_backward(x, codebook, mask, indices, outputs[2])
        ctx.mark_non_differentiable(outputs[2])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_value, grad_usage, _statistics):
        x, codebook, mask, indices, statistics = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]
        if grad_value is None and grad_usage is None:
            return (None,) * 6
        if torch.is_grad_enabled():  # create_graph=True: gradients that can be differentiated again
            outputs = code_softmax_reference(x, codebook, mask, indices, ctx.logits, ctx.temperature)
            return (*differentiate(outputs, (grad_value, grad_usage), (x, codebook), needed), None, None, None, None)
        grad_x, grad_codebook = torch.ops.genperf.code_softmax_backward(
            grad_value, grad_usage, x, codebook, mask, indices, statistics, ctx.logits, ctx.temperature, *needed
        )
        return grad_x if needed[0] else None, grad_codebook if needed[1] else None, None, None, None, None


def code_softmax_reference(
    x: Tensor,  # [heads, outer, D, inner]
    codebook: Tensor,  # [heads, K, D]
    mask: Tensor | None,  # [heads, outer, inner]
    indices: Tensor | None,  # [heads, outer, inner]
    logits: str,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """The op in plain PyTorch, differentiated by autograd."""
    heads, outer, _, inner = x.shape
    valid = mask if indices is None else indices >= 0
    log_p = (logits_reference(x, codebook, valid, logits) / temperature).log_softmax(-1)  # [heads, N, K]
    if indices is not None:
        value = -log_p.gather(2, indices.reshape(heads, -1, 1).clamp(min=0)).squeeze(2)
        usage = value.new_zeros(0, dtype=torch.float64)
    else:
        p = log_p.exp()
        value = -(p * torch.where(log_p == -math.inf, 0, log_p)).sum(-1)
        usage = (p if valid is None else torch.where(valid.reshape(heads, -1, 1), p, 0)).sum(1).double()
    value = value.reshape(heads, outer, inner)
    return value if valid is None else torch.where(valid, value, 0), usage


def logits_reference(x: Tensor, codebook: Tensor, valid: Tensor | None, logits: str) -> Tensor:
    """The logits [heads, N, K]; where `valid` is False, those of some vector that is finite."""
    dtype = accumulator_dtype(x.dtype)
    rows, codes = x.transpose(2, 3).flatten(1, 2).to(dtype), codebook.to(dtype)
    if logits != "dot":
        center = codes.detach().mean(1, keepdim=True)
        rows, codes = rows - center, codes - center
    if valid is not None:
        rows = torch.where(valid.reshape(len(rows), -1, 1), rows, 0)
    with torch.autocast(x.device.type, enabled=False):
        products = rows @ codes.mT
    if logits == "dot":
        return products
    squared = rows.square().sum(-1).unsqueeze(2) + codes.square().sum(-1).unsqueeze(1) - 2 * products
    return -squared.clamp(min=_SMALLEST).sqrt() if logits == "distance" else -squared


class _Chunks:
    """The logits of one head's positions, chunk by chunk, in a buffer that is used again.

    x is [outer, D, inner]; valid, where it is not None, is [outer * inner]. Both may be replaced by another head's.
    """

    def __init__(self, x: Tensor, codebook: Tensor, logits: str):  # [outer, D, inner], [K, D]
        self.x, self.valid, self.logits, self.dtype = x, None, logits, accumulator_dtype(x.dtype)
        codes = codebook.to(self.dtype)
        self.center = None if logits == "dot" else codes.mean(0)
        self.codes = codes if self.center is None else codes - self.center
        outer, dim, inner = x.shape
        rows = max(1, _CHUNK // max(len(codes), dim), min(_ROWS, _LARGEST_CHUNK // max(len(codes), dim)))
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
        """Whether a product is a squared distance, and the logit minus its root."""
        return self.logits == "distance"

    def __iter__(self) -> Iterator[tuple[slice, tuple, Tensor, Tensor]]:
        """Positions of a chunk, its place in x, its vectors in float and without the center, and their products with the operand."""
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
    """Each head with its chunks; heads of one codebook that was expanded share what is made of it."""
    chunks = None
    for head in range(len(x)):
        if chunks is None or codebook.stride(0) != 0:
            chunks = _Chunks(x[head], codebook[head], logits)
        chunks.x, chunks.valid = x[head], _rows_of(valid, head)
        yield head, chunks


def _implement(op: str) -> Callable[[Callable], Callable]:
    """Decorator: the implementation of `op` on every device."""
    from genperf import _library

    def decorate(function: Callable) -> Callable:
        def run(*arguments):
            device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
            with torch.no_grad(), torch.autocast(device.type, enabled=False), full_float32():
                return function(*arguments)

        if _library.cpu_failure is None:
            torch.library.impl(f"genperf::{op}", "CompositeExplicitAutograd")(run)
        return function

    return decorate


def _has_kernel(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32


@_implement("code_softmax")
def _softmax(x, codebook, mask, indices, logits, temperature):
    heads, outer, _, inner = x.shape
    dtype = accumulator_dtype(x.dtype)
    statistics = x.new_empty((3, heads, outer, inner), dtype=dtype)
    value = x.new_empty((heads, outer, inner), dtype=dtype)
    usage = x.new_zeros((heads, codebook.shape[1]) if indices is None else 0, dtype=torch.float64)
    for head, chunks in _heads(x, codebook, mask if indices is None else indices >= 0, logits):
        valid, chosen = chunks.valid, _rows_of(indices, head)
        kept = [_rows_of(t, head) for t in statistics]
        for at, _, _, products in chunks:
            arguments = (products, chunks.root, temperature, _at(valid, at), _at(chosen, at), *(t[at] for t in kept))
            forward = torch.ops.genperf.code_softmax_rows if _has_kernel(products) else _forward_rows
            forward(*arguments, _rows_of(value, head)[at], None if indices is not None else usage[head])
    return value, usage, statistics


@_implement("code_softmax_backward")
def _softmax_backward(grad_value, grad_usage, x, codebook, mask, indices, statistics, logits, temperature, of_x, of_codebook):
    dtype = accumulator_dtype(x.dtype)
    grad_x = torch.empty_like(x) if of_x else x.new_empty(0)
    grad_codebook = torch.empty_like(codebook) if of_codebook else codebook.new_empty(0)
    grad_value = None if grad_value is None else grad_value.to(dtype).contiguous()
    # Without what they have in common, which does not reach the logits, and less is rounded.
    used = grad_usage is not None and indices is None
    grad_usage = (grad_usage - grad_usage.mean(1, keepdim=True)).to(dtype) if used else None
    for head, chunks in _heads(x, codebook, mask if indices is None else indices >= 0, logits):
        valid, chosen, pulls = chunks.valid, _rows_of(indices, head), _rows_of(grad_value, head)
        kept = [_rows_of(t, head) for t in statistics]
        codes = chunks.codes
        # Where there is a distance, a column of ones sums the gradients beside the products with them: what is summed is then
        # gradient * (x - code), of which little is lost where x is near the code that has all the weight.
        extended = codes if logits == "dot" else torch.cat([codes, codes.new_ones(len(codes), 1)], 1)
        sums = codes.new_zeros(codes.shape[1] + (logits != "dot"), len(codes))
        for at, place, rows, products in chunks:
            arguments = (products, chunks.root, temperature, _at(valid, at), _at(chosen, at), *(t[at] for t in kept))
            backward = torch.ops.genperf.code_softmax_rows_backward if _has_kernel(products) else _backward_rows
            backward(*arguments, _at(pulls, at), None if grad_usage is None else grad_usage[head])
            if of_x:
                found = products @ extended
                if logits != "dot":
                    found = torch.addcmul(-found[:, :-1], rows, found[:, -1:])
                    found *= 1 if chunks.root else -2
                target = grad_x[head][place]
                target.copy_(found.view(target.shape[0], target.shape[2], -1).transpose(1, 2))
            if of_codebook:
                left = rows if logits == "dot" else torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
                sums.addmm_(left.T, products)
        if of_codebook:
            if logits != "dot":
                sums = torch.addcmul(sums[:-1], codes.T, sums[-1], value=-1)
                sums *= -1 if chunks.root else 2
            grad_codebook[head].copy_(sums.T)
    return grad_x, grad_codebook


@_implement("sample_code")
def _sample(x, codebook, mask, seed, first, logits, temperature):
    heads, outer, _, inner = x.shape
    indices = x.new_empty((heads, outer, inner), dtype=torch.int64)
    for head, chunks in _heads(x, codebook, None, logits):
        key = None if seed is None else seed + head
        found = _rows_of(indices, head)
        for at, _, _, products in chunks:
            draw = torch.ops.genperf.sample_code_rows if _has_kernel(products) else _sample_rows
            draw(products, chunks.root, temperature, key, first + at.start, found[at])
    return indices if mask is None else indices.masked_fill_(~mask, -1)


def _rows_of(t: Tensor | None, head: int) -> Tensor | None:
    """[heads, outer, inner] -> [outer * inner] of one head, contiguous."""
    return None if t is None else t[head].contiguous().view(-1)


def _at(t: Tensor | None, positions: slice) -> Tensor | None:
    return None if t is None else t[positions]


def _logits_in_place(products: Tensor, root: bool) -> Tensor:
    return products.clamp_(min=_SMALLEST).sqrt_().neg_() if root else products


def _forward_rows(products, root, temperature, valid, indices, largest, log_sum, mean, value, usage) -> None:
    """What csrc/cpu/code_softmax.cpp does with a chunk."""
    relative = _logits_in_place(products, root)
    torch.amax(relative, 1, out=largest)
    # Bounded, so that a product with a probability of 0 is 0.
    relative = relative.sub_(largest.unsqueeze(1)).mul_(1 / temperature).clamp_(min=-1000)
    exps = relative.exp()
    total = exps.sum(1)
    torch.log(total, out=log_sum)
    if indices is None:
        share = total.reciprocal() if valid is None else torch.where(valid, total.reciprocal(), 0)
        usage += exps.T @ share
        mean.copy_(relative.mul_(exps).sum(1) / total)
        value.copy_(log_sum - mean)
    else:
        mean.zero_()
        value.copy_(log_sum - relative.gather(1, indices.clamp(min=0).unsqueeze(1)).squeeze(1))
    if valid is not None:
        value.masked_fill_(~valid, 0)


def _backward_rows(products, root, temperature, valid, indices, largest, log_sum, mean, grad_value, grad_usage) -> None:
    logit = _logits_in_place(products, root)
    relative = (logit - largest.unsqueeze(1)).mul_(1 / temperature).clamp_(min=-1000)
    p = (relative - log_sum.unsqueeze(1)).exp_()
    if indices is not None:
        p.scatter_add_(1, indices.clamp(min=0).unsqueeze(1), p.new_full((1, 1), -1).expand(len(p), 1))
        gradient = p.mul_(grad_value.unsqueeze(1))
    else:
        slope = p.new_zeros(()) if grad_value is None else relative.sub_(mean.unsqueeze(1)).mul_(-grad_value.unsqueeze(1))
        if grad_usage is not None:
            slope = slope + (grad_usage - (p @ grad_usage).unsqueeze(1))
        gradient = p.mul_(slope)
    gradient *= 1 / temperature
    if root:
        gradient = torch.where(logit < -math.sqrt(_SMALLEST), gradient / logit, 0)
    products.copy_(gradient if valid is None else torch.where(valid.unsqueeze(1), gradient, 0))


def _sample_rows(products, root, temperature, seed, first, indices) -> None:
    perturbed = _logits_in_place(products, root)
    if seed is not None:
        perturbed += temperature * gumbel_noise(seed, *products.shape, products.dtype, first)
    torch.argmax(perturbed.nan_to_num_(nan=-math.inf, posinf=math.inf, neginf=-math.inf), 1, out=indices)


@register_fake("code_softmax")
def _(x, codebook, mask, indices, logits, temperature):
    heads, outer, _, inner = x.shape
    dtype = accumulator_dtype(x.dtype)
    usage = (heads, codebook.shape[1]) if indices is None else (0,)  # in float64, which the derivative of a logarithm deserves
    return (
        x.new_empty((heads, outer, inner), dtype=dtype),
        x.new_empty(usage, dtype=torch.float64),
        x.new_empty((3, heads, outer, inner), dtype=dtype),
    )


@register_fake("code_softmax_backward")
def _(grad_value, grad_usage, x, codebook, mask, indices, statistics, logits, temperature, of_x, of_codebook):
    return torch.empty_like(x) if of_x else x.new_empty(0), torch.empty_like(codebook) if of_codebook else codebook.new_empty(0)


@register_fake("sample_code")
def _(x, codebook, mask, seed, first, logits, temperature):
    return x.new_empty((x.shape[0], x.shape[1], x.shape[3]), dtype=torch.int64)


@register_fake("code_softmax_rows")
def _(*arguments) -> None:
    pass


@register_fake("code_softmax_rows_backward")
def _(*arguments) -> None:
    pass


@register_fake("sample_code_rows")
def _(*arguments) -> None:
    pass
