# SPDX-License-Identifier: Apache-2.0
"""Entropies of soft lookup-free codes, computed from the bits without the positions x codes matrix."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import _library
from .._choices import Impl
from ._autograd import Function, apply, differentiate, need_function, need_graph, saved_tensors, transformed
from ._dispatch import Reasons, choose_impl, register_fake, remembered
from ._layout import as_positions
from ._precision import accumulator_dtype, full_float32, normalized
from ._validate import check_channel_dim, check_float, check_mask, check_tensor
from .lookup_free_quantize import check_bits, check_scale, code_size

MAX_GROUP = 24
# Elements of the probabilities of the two halves of the bits, per chunk. On a GPU a chunk must outweigh about twenty kernel launches.
CHUNK = {"cpu": 2**20, "cuda": 2**22}
# Logits of bits are clamped to this, where the bit is certain, so that infinity does not give NaN.
MAX_LOGIT = 1e4
# Where the kernel of small inputs is faster: elements, and products of numbers.
MAX_SMALL, MAX_SMALL_PRODUCTS = 1 << 14, 1 << 22
_TINY = torch.finfo(torch.float32).tiny


def lookup_free_entropy(
    x: Tensor,  # [..., D, ...]
    *,
    scale: float = 1.0,
    spherical: bool = False,
    inv_temperature: float = 100.0,
    group_size: int | None = None,
    channel_dim: int = -1,
    mask: Tensor | None = None,  # [...]
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor]:
    """Per-sample entropy of the soft codes of `lookup_free_quantize`, and entropy of their batch mean.

    Equivalent to (channel_dim=-1, not spherical, no mask, no groups; C [2^D, D] all codes, with components +-scale):
        p = (2 * inv_temperature * x.reshape(-1, D) @ C.T).softmax(-1)      # [N, 2^D]
        mean = p.mean(0)
        sample_entropy = torch.special.entr(p).sum(-1).mean()
        codebook_entropy = torch.special.entr(mean).sum()
    LFQ (Yu et al., arXiv 2310.05737) trains with the loss sample_entropy - codebook_entropy.

    The bits of a soft code are independent. The sample entropy is therefore a sum over bits, and the probabilities of all codes are the
    outer product of those of two halves of the bits. Their mean over the vectors is a matrix product [2^(D/2), N] x [N, 2^(D/2)], computed
    in chunks of N; backward is two such products. Memory beyond the 2^D mean probabilities does not grow with N.

    Args:
        x: float32, bfloat16, float16 or float64, 1 to 63 channels; any strides. Computed in float32 or better.
        scale, spherical: as in `lookup_free_quantize`; with `spherical` x is normalized first.
        inv_temperature: positive; larger values give harder codes.
        group_size: a divisor of D, at most 24; None for D. The codebook entropy is the sum of the entropies of groups of this many
            adjacent bits, an upper bound that costs 2^group_size instead of 2^D (Zhao et al., arXiv 2406.07548). 1 treats all bits as
            independent.
        channel_dim: the dimension of x that holds the D channels.
        mask: bool, x's shape without channel_dim; vectors where it is False are excluded.
        impl: "native", "reference", or None to choose automatically.

    Returns:
        sample_entropy and codebook_entropy, in nats, float32 scalars (float64 for a float64 x); 0 without vectors. NaN makes both NaN;
        infinity is a certain bit. Deterministic. Differentiable in x; second derivatives (create_graph=True) run in plain PyTorch with
        N x 2^group_size elements.

    Raises:
        ValueError, TypeError: an invalid argument.
        NotImplementedError: an `impl` that cannot run here.
    """
    op = "lookup_free_entropy"
    check_tensor(op, "x", x)
    check_float(op, "x", x)
    channel = check_channel_dim(op, x, channel_dim)
    bits = x.shape[channel]
    check_bits(op, bits)
    check_scale(op, scale)
    group = check_group(op, group_size, bits)
    if not inv_temperature > 0:
        raise ValueError(f"{op}: inv_temperature must be positive, got {inv_temperature!r}.")
    check_mask(op, mask, x, channel)
    if spherical:
        x = scale * normalized(x, channel)
    sharpness = 4 * inv_temperature * code_size(scale, spherical, bits)
    return soft_code_entropies(op, x, channel, mask, sharpness, group, None, impl)


def check_group(op: str, group_size: int | None, bits: int) -> int:
    """The number of bits in a group."""
    group = bits if group_size is None else group_size
    if not 1 <= group <= MAX_GROUP or bits % group:
        raise ValueError(
            f"{op}: group_size, by default the number of bits, must divide the {bits} bits and be at most {MAX_GROUP}, got {group}."
        )
    return group


def soft_code_entropies(
    op: str,
    x: Tensor,
    channel: int,
    mask: Tensor | None,
    sharpness: float,
    group: int,
    floor: float | None,
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean entropy of the vectors' codes, and the sum over the groups of `entropy_of` their mass, for arguments that are checked."""
    chosen = choose_impl(op, impl, unavailable(x.device, x.dtype), x)
    if chosen != "reference" and _is_small(x, channel, mask, group):
        arguments = (x, mask, sharpness, group, _TINY if floor is None else floor, channel)
        if need_function(x):
            sample, entropy, _ = apply(_SmallEntropies, *arguments)
        else:
            sample, entropy, _ = torch.ops.genperf.small_lookup_free_entropy(*arguments)
        return sample, entropy
    entropy, mass, count = code_mass(op, x, channel, mask, sharpness, group, impl)
    return entropy / count.clamp(min=1), entropy_of(mass, floor).sum()


def code_mass(
    op: str, x: Tensor, channel: int, mask: Tensor | None, sharpness: float, group: int, impl: Impl | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the vectors that are not masked, and their number.

    Returns:
        entropy [], the sum of the entropies; mass [groups, 2^group], the sums of the probabilities of each group's codes; count [].
    """
    positions = as_positions(x, channel)
    if mask is not None:
        mask = mask.reshape(positions.shape[0], positions.shape[2])
        count = mask.sum(dtype=accumulator_dtype(x.dtype))
    else:
        count = positions.new_full((), positions.shape[0] * positions.shape[2], dtype=accumulator_dtype(x.dtype))
    if choose_impl(op, impl, unavailable(x.device, x.dtype), x) == "reference":
        entropy, mass = code_mass_reference(positions, mask, sharpness, group)
    elif need_function(x):
        entropy, mass = apply(_CodeMass, positions, mask, sharpness, group)
    else:
        entropy, mass = torch.ops.genperf.lookup_free_mass(positions, mask, sharpness, group)
    return entropy, mass, count


def _is_small(x: Tensor, channel: int, mask: Tensor | None, group: int) -> bool:
    """Whether one kernel computes the op. Not where a graph or a batch is made."""
    if torch.compiler.is_compiling() or transformed() or _library.cpu_failure is not None:
        return False
    if x.device.type != "cpu" or x.dtype == torch.float64:
        return False
    bits, size = x.shape[channel], x.numel()
    # For every vector, the codes of each group.
    if size > MAX_SMALL or (size << group) // group > MAX_SMALL_PRODUCTS or (bits << group) // group > MAX_SMALL:
        return False
    return x.is_contiguous() and (mask is None or mask.is_contiguous())


def entropy_of(mass: Tensor, floor: float | None = None) -> Tensor:  # [groups, K] -> [groups]
    """Entropy of each group's normalized mass.

    Probabilities are clamped to at least `floor` before the logarithm; by default to the smallest normal number, so that the derivative is
    finite.
    """
    # Divided by its own sum, not by the number of vectors: rounding errors of the bits' probabilities are common to all codes and cancel.
    p = mass / mass.sum(-1, keepdim=True).clamp(min=0.5)
    return -(p * p.clamp(min=torch.finfo(p.dtype).tiny if floor is None else floor).log()).sum(-1)


@remembered
def unavailable(device: torch.device, dtype: torch.dtype) -> Reasons:
    """Why each implementation cannot run on this device and dtype, or None; best first."""
    return {"native": None, "reference": None}


class _SmallEntropies(Function):
    @staticmethod
    def forward(x: Tensor, mask: Tensor | None, sharpness: float, group: int, floor: float, channel: int) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.genperf.small_lookup_free_entropy(x, mask, sharpness, group, floor, channel)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor, Tensor]) -> None:
        x, mask, *ctx.options = inputs
        ctx.save_for_backward(x, mask, outputs[2])
        ctx.mark_non_differentiable(outputs[2])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_sample: Tensor | None, grad_entropy: Tensor | None, _mass: None) -> tuple[Tensor | None, ...]:
        x, mask, mass = saved_tensors(ctx)
        if grad_sample is None and grad_entropy is None:
            grad_x = None
        elif need_graph((grad_sample, grad_entropy), (x,)):
            sharpness, group, floor, channel = ctx.options
            per_vector = None if mask is None else mask.reshape(math.prod(x.shape[:channel]), -1)
            count = x.numel() // x.shape[channel] if mask is None else mask.sum(dtype=torch.float32)

            def reference(x: Tensor) -> tuple[Tensor, Tensor]:
                entropy, mass = code_mass_reference(as_positions(x, channel), per_vector, sharpness, group)
                return entropy / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)), entropy_of(mass, floor).sum()

            (grad_x,) = differentiate(reference, (grad_sample, grad_entropy), (x,), (True,))
        else:
            grad_x = torch.ops.genperf.small_lookup_free_entropy_backward(grad_sample, grad_entropy, mass, x, mask, *ctx.options)
        return grad_x, None, None, None, None, None


class _CodeMass(Function):
    @staticmethod
    def forward(x: Tensor, mask: Tensor | None, sharpness: float, group: int) -> tuple[Tensor, Tensor]:
        return torch.ops.genperf.lookup_free_mass(x, mask, sharpness, group)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
        x, mask, ctx.sharpness, ctx.group = inputs
        ctx.save_for_backward(x, mask)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_entropy: Tensor | None, grad_mass: Tensor | None) -> tuple[Tensor | None, ...]:
        x, mask = saved_tensors(ctx)
        if grad_entropy is None and grad_mass is None:
            grad_x = None
        elif need_graph((grad_entropy, grad_mass), (x,)):

            def reference(x: Tensor) -> tuple[Tensor, Tensor]:
                return code_mass_reference(x, mask, ctx.sharpness, ctx.group)

            (grad_x,) = differentiate(reference, (grad_entropy, grad_mass), (x,), (True,))
        else:
            grad_x = torch.ops.genperf.lookup_free_mass_backward(grad_entropy, grad_mass, x, mask, ctx.sharpness, ctx.group)
        return grad_x, None, None, None


def code_mass_reference(x: Tensor, mask: Tensor | None, sharpness: float, group: int) -> tuple[Tensor, Tensor]:
    """The sums in plain PyTorch, from the probabilities of all codes, differentiated by autograd."""
    outer, bits, inner = x.shape
    logits = x.movedim(1, -1).reshape(outer * inner, bits // group, group).to(accumulator_dtype(x.dtype))
    logits = (logits * sharpness).clamp(-MAX_LOGIT, MAX_LOGIT)
    valid = None if mask is None else mask.reshape(outer * inner, 1, 1)
    if valid is not None:
        logits = torch.where(valid, logits, 0)
    log_p = (logits @ (_bits(group, logits) - 0.5).T).log_softmax(-1)
    p = log_p.exp()
    if valid is not None:
        p = torch.where(valid, p, 0)
    return -(p * log_p).sum(), p.sum(0)


def _chunks(x: Tensor, mask: Tensor | None, sharpness: float, group: int) -> Iterator[tuple[Tensor, Tensor | None, tuple[Any, ...]]]:
    """Yields, chunk by chunk, the logits of the bits [n, D], the mask [n, 1] and the index into x."""
    outer, dim, inner = x.shape
    size = max(64, CHUNK.get(x.device.type, 2**20) // (dim // group * (2 ** (group // 2) + 2 ** (group - group // 2))))
    for start in range(0, outer * inner, size):
        if inner == 1:
            place = (slice(start, start + size), slice(None), 0)
        else:
            position = torch.arange(start, min(start + size, outer * inner), device=x.device)
            place = (position // inner, slice(None), position % inner)
        logits = (x[place].to(accumulator_dtype(x.dtype)) * sharpness).clamp(-MAX_LOGIT, MAX_LOGIT)
        valid = None
        if mask is not None:
            valid = mask[place[0], place[2]].unsqueeze(1)
            logits = torch.where(valid, logits, 0)
        yield logits, valid, place


def _bits(width: int, like: Tensor) -> Tensor:
    """The bits of 0 ... 2^width - 1, most significant first: [2^width, width]."""
    places = torch.arange(width - 1, -1, -1, device=like.device)
    return (torch.arange(2**width, device=like.device).unsqueeze(1) >> places & 1).to(like.dtype)


def _halves(p: Tensor, q: Tensor, valid: Tensor | None, group: int) -> list[Tensor]:
    """The probabilities [groups, n, 2^b] of all values of the first and of the second half of each group's bits.

    p and q [n, D] are the probabilities that a bit is 1 and that it is 0.
    """
    products = []
    for bits in (range(group // 2), range(group // 2, group)):
        product = p.new_empty(p.shape[1] // group, p.shape[0], 2 ** len(bits))
        product[..., 0] = 1 if valid is None else valid.squeeze(1)
        for width, bit in enumerate(reversed(bits)):
            known, set_too = product[..., : 2**width], product[..., 2**width : 2 ** (width + 1)]
            torch.mul(known, p[:, bit::group].T.unsqueeze(-1), out=set_too)
            known.mul_(q[:, bit::group].T.unsqueeze(-1))
        products.append(product)
    return products


def _code_mass(x: Tensor, mask: Tensor | None, sharpness: float, group: int) -> tuple[Tensor, Tensor]:
    dtype = accumulator_dtype(x.dtype)
    mass = x.new_zeros(x.shape[1] // group, 2 ** (group // 2), 2 ** (group - group // 2), dtype=dtype)
    entropy = x.new_zeros((), dtype=torch.float64)
    with torch.autocast(x.device.type, enabled=False), full_float32():
        for logits, valid, _ in _chunks(x, mask, sharpness, group):
            p, q = logits.sigmoid(), (-logits).sigmoid()
            smaller = torch.minimum(p, q)
            entropies = logits.abs() * smaller - (-smaller).log1p()
            entropy += (entropies if valid is None else entropies * valid).sum(dtype=torch.float64)
            first, second = _halves(p, q, valid, group)
            mass.baddbmm_(first.transpose(1, 2), second)
    return entropy.to(dtype), mass.flatten(1)


def _code_mass_backward(
    grad_entropy: Tensor | None, grad_mass: Tensor | None, x: Tensor, mask: Tensor | None, sharpness: float, group: int
) -> Tensor:
    grad_x = torch.empty_like(x)
    with torch.autocast(x.device.type, enabled=False), full_float32():
        for logits, valid, place in _chunks(x, mask, sharpness, group):
            p, q = logits.sigmoid(), (-logits).sigmoid()
            slope = torch.zeros_like(logits) if grad_entropy is None else -grad_entropy * logits * p * q
            if grad_mass is not None:
                first, second = _halves(p, q, valid, group)
                upstream = grad_mass.reshape(-1, first.shape[-1], second.shape[-1])
                shares = (torch.bmm(second, upstream.mT).mul_(first), torch.bmm(first, upstream).mul_(second))
                # The probability of a code has the factor p, with the derivative p q, for each bit that is 1, and q, with the derivative
                # -p q, for each that is 0. Summed separately, the two keep their precision where a bit is nearly certain.
                bits = [_bits(half, logits) for half in (group // 2, group - group // 2)]
                ones = torch.cat([share @ bit for share, bit in zip(shares, bits, strict=True)], -1)
                zeros = torch.cat([share @ (1 - bit) for share, bit in zip(shares, bits, strict=True)], -1)
                slope += ones.transpose(0, 1).flatten(1) * q - zeros.transpose(0, 1).flatten(1) * p
            grad_x[place] = (slope * sharpness).to(x.dtype)
    return grad_x


torch.library.custom_op("genperf::lookup_free_mass", _code_mass, mutates_args=())
torch.library.custom_op("genperf::lookup_free_mass_backward", _code_mass_backward, mutates_args=())


@torch.library.register_fake("genperf::lookup_free_mass")
def _(x: Tensor, mask: Tensor | None, sharpness: float, group: int) -> tuple[Tensor, Tensor]:
    dtype = accumulator_dtype(x.dtype)
    return x.new_empty((), dtype=dtype), x.new_empty(x.shape[1] // group, 2**group, dtype=dtype)


@torch.library.register_fake("genperf::lookup_free_mass_backward")
def _(grad_entropy: Tensor | None, grad_mass: Tensor | None, x: Tensor, mask: Tensor | None, sharpness: float, group: int) -> Tensor:
    return torch.empty_like(x)


@register_fake("small_lookup_free_entropy")
def _(x: Tensor, mask: Tensor | None, sharpness: float, group: int, floor: float, channel: int) -> tuple[Tensor, Tensor, Tensor]:
    sample, entropy = (x.new_empty((), dtype=torch.float32) for _ in range(2))
    return sample, entropy, x.new_empty(x.shape[channel] // group, 2**group, dtype=torch.float32)


@register_fake("small_lookup_free_entropy_backward")
def _(
    grad_sample: Tensor | None,
    grad_entropy: Tensor | None,
    mass: Tensor,
    x: Tensor,
    mask: Tensor | None,
    sharpness: float,
    group: int,
    floor: float,
    channel: int,
) -> Tensor:
    return torch.empty_like(x)
