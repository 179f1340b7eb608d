# SPDX-License-Identifier: Apache-2.0
"""Gumbel-softmax sampling with the KL divergence to the uniform prior, of categories or of codes."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._choices import Impl
from ._autograd import (
    Function,
    ValueOf,
    apply,
    can_view_within,
    differentiate,
    need_function,
    need_graph,
    requires_grad,
    saved_tensors,
    viewing,
)
from ._dispatch import Reasons, also_not_native, choose_impl, register_fake, remembered, streaming_unavailable
from ._layout import Positions
from ._noise import draw_seed, first_sample, gumbel_noise
from ._precision import HALF_DTYPES, accumulator_dtype
from ._validate import check_float, check_noise, check_tensor


def gumbel_sample(
    logits: Tensor,  # [..., K, ...]
    codebook: Tensor | None = None,  # [K, D]
    *,
    tau: float | Tensor = 1.0,
    hard: bool = False,
    dim: int = -1,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,  # [..., K, ...]
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample categories by the Gumbel-softmax; Jang et al., "Categorical Reparameterization with Gumbel-Softmax" (2016).

    Equivalent to (dim=-1):
        perturbed = logits - torch.empty_like(logits).exponential_().log()
        soft = (perturbed / tau).softmax(-1)
        indices = perturbed.argmax(-1)
        sample = F.one_hot(indices, K) - soft.detach() + soft if hard else soft     # bitwise one-hot
        sample = sample if codebook is None else sample @ codebook
        q = logits.softmax(-1)
        kl = (q * (q * K).log()).sum(-1)

    Forward reads the logits and draws the noise in one pass. For backward, which draws the noise again, autograd saves only the logits, a
    seed and four numbers per position. Images [B, K, H, W] (dim=1) are read without a copy. With a codebook, hard samples gather codes
    instead of multiplying by one-hot vectors, and no probabilities are saved. The gradient of the codebook is that of the product,
    summed deterministically.

    Args:
        logits: float32, bfloat16, float16 or float64; any strides; K is the size along `dim`. -inf excludes a category.
        codebook: K codes in logits' dtype, or float32 with half-precision logits.
        tau: temperature >= 0. A one-element tensor can be annealed without recompilation and without device synchronization; its value is
            not checked, and a negative one or NaN counts as 0. With 0 the sample is the one-hot vector of the largest perturbed logit,
            with no gradient.
        hard: one-hot samples with the gradient of the soft samples (straight-through estimator).
        dim: the dimension of the categories.
        generator: the generator that the seed of the noise is drawn from; None for torch's default generator of the logits' device. A seed
            gives the same noise on every device and in every memory layout, up to rounding in log.
        noise: Gumbel noise to use instead, logits' shape, in logits' dtype or float32.
        impl: "native", "reference", or None to choose automatically. A tau or noise that requires a gradient needs the reference.

    Returns:
        sample, logits' shape and dtype; with a codebook D replaces K;
        indices, int64, logits' shape without `dim`: the category with the largest perturbed logit, the lowest on ties;
        kl, float32 (float64 for float64 logits), shape of indices: the KL of softmax(logits) to the uniform distribution, in nats.
        A position with a NaN or without a finite logit has a NaN kl. Half-precision inputs are computed in float32.
        Differentiable in logits and codebook; second derivatives (create_graph=True) run in plain PyTorch.

    Raises:
        ValueError, TypeError: an invalid argument.
        NotImplementedError: an `impl` that cannot run here.
    """
    op = "gumbel_sample"
    check_tensor(op, "logits", logits)
    check_float(op, "logits", logits)
    if logits.dim() == 0 or not -logits.dim() <= dim < logits.dim():
        raise ValueError(f"{op}: dim must be a dimension of logits, got dim={dim} for shape {list(logits.shape)}.")
    dim %= logits.dim()
    if logits.shape[dim] == 0:
        raise ValueError(f"{op}: logits must have at least one category along dim={dim}, got shape {list(logits.shape)}.")
    if codebook is not None:
        _check_codebook(op, codebook, logits, dim)
    if noise is not None:
        check_noise(op, noise, "logits", logits, logits.shape)
    if isinstance(tau, Tensor):
        if tau.numel() != 1:
            raise ValueError(f"{op}: tau must be a number or a tensor of one element, got shape {list(tau.shape)}.")
    elif not 0 <= tau < math.inf:
        raise ValueError(f"{op}: tau must not be negative, got {tau!r}.")
    reasons = unavailable(logits.device, logits.dtype)
    if noise is not None or isinstance(tau, Tensor):
        for name, value in (("tau", tau), ("noise", noise)):
            if requires_grad(value):
                reasons = also_not_native(reasons, f"{name} requires a gradient, which the kernels do not compute.")
    chosen = choose_impl(op, impl, reasons, logits, codebook, tau, noise)

    temperature, tau = (tau.to(logits.device, torch.float32), 0.0) if isinstance(tau, Tensor) else (None, float(tau))
    seed = draw_seed(op, logits.device, generator, by_value=True) if noise is None else None
    differentiable = chosen != "reference" and need_function(logits, codebook)
    within = differentiable and can_view_within(logits)
    positions = Positions(logits.detach() if within else logits, dim)
    vectors = positions.vectors
    if noise is not None:
        noise = positions.view_like(noise)
    # Rows of noise are positions; with the categories in the first dimension none belongs to a sample of the batch.
    first = first_sample() * math.prod(positions.sizes[1:]) if dim != 0 else 0
    options = (codebook, temperature, tau, noise, seed, first, hard)
    if within:
        sample, indices, kl, _ = apply(_GumbelSampleViewing, logits, *options, vectors.shape, dim)
    else:
        if chosen == "reference":
            sample, indices, kl = gumbel_sample_reference(vectors, *options)
        elif differentiable:
            sample, indices, kl, _ = apply(_GumbelSample, vectors, *options)
        else:
            sample, indices, kl, _ = _forward(vectors, *options)
        sample = positions.restore(sample)
    return sample, positions.restore_indices(indices), positions.restore_indices(kl)


@remembered
def unavailable(device: torch.device, dtype: torch.dtype) -> Reasons:
    """Why each implementation cannot run on this device and dtype, or None; best first."""
    return streaming_unavailable("gumbel_sample", device, dtype)


def _check_codebook(op: str, codebook: Tensor, logits: Tensor, dim: int) -> None:
    check_tensor(op, "codebook", codebook)
    if codebook.dim() != 2 or codebook.shape[0] != logits.shape[dim]:
        raise ValueError(f"{op}: codebook must have shape [K, D] with K = {logits.shape[dim]} as in logits, got {list(codebook.shape)}.")
    if codebook.dtype != logits.dtype and not (codebook.dtype == torch.float32 and logits.dtype in HALF_DTYPES):
        raise TypeError(
            f"{op}: codebook must have the dtype of logits, or float32 with half-precision logits, got {codebook.dtype} and {logits.dtype}."
        )
    if codebook.device != logits.device:
        raise ValueError(f"{op}: logits and codebook must be on one device, got {logits.device} and {codebook.device}.")


def _forward(
    logits: Tensor,
    codebook: Tensor | None,
    temperature: Tensor | None,
    tau: float,
    noise: Tensor | None,
    seed: Tensor | None,
    first: int,
    hard: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dense = codebook is None or not hard
    sample, indices, kl, statistics = torch.ops.genperf.gumbel_sample(logits, temperature, tau, noise, seed, first, hard, dense)
    if codebook is not None:
        sample = _multiply(sample, codebook, logits) if dense else F.embedding(indices, codebook).to(logits.dtype).transpose(1, 2)
    return sample, indices, kl, statistics


def _multiply(x: Tensor, matrix: Tensor, like: Tensor) -> Tensor:
    """x [outer, K, inner] times matrix [K, D] along K, in x's dtype regardless of autocast, and in the memory layout of `like`."""
    matrix = matrix.to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        if like.stride(1) == 1:
            return (x.transpose(1, 2) @ matrix).transpose(1, 2)
        # Not matmul, which would copy the transposed result if the matrix requires a gradient.
        return torch.bmm(matrix.T.expand(x.shape[0], -1, -1), x)


def _multiply_positions(soft: Tensor, grad: Tensor) -> Tensor:
    """soft [outer, K, inner] times grad [outer, D, inner] along the positions: [K, D]."""
    with torch.autocast(soft.device.type, enabled=False):
        # A product per outer position if their [K, D] results are no larger than copies of the operands, else one product of copies.
        if grad.shape[1] <= grad.shape[2]:
            return torch.bmm(soft, grad.transpose(1, 2)).sum(0)
        return torch.einsum("oki,odi->kd", soft, grad)


class _GumbelSample(Function):
    @staticmethod
    def forward(
        logits: Tensor,
        codebook: Tensor | None,
        temperature: Tensor | None,
        tau: float,
        noise: Tensor | None,
        seed: Tensor | None,
        first: int,
        hard: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _forward(logits, codebook, temperature, tau, noise, seed, first, hard)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
        logits, codebook, temperature, ctx.tau, noise, seed, ctx.first, ctx.hard = inputs
        _, indices, _, statistics = outputs
        ctx.save_for_backward(logits, codebook, temperature, noise, seed, indices, statistics)
        ctx.mark_non_differentiable(indices, statistics)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, grad_sample: Tensor | None, _indices: None, grad_kl: Tensor | None, _statistics: None
    ) -> tuple[Tensor | None, ...]:
        logits, codebook, temperature, noise, seed, indices, statistics = saved_tensors(ctx)
        needed = ctx.needs_input_grad[:2]
        rest = (None,) * 6
        if grad_sample is None and grad_kl is None:
            return (None, None, *rest)
        if need_graph((grad_sample, grad_kl), (logits, codebook)):

            def reference(logits: Tensor, codebook: Tensor | None) -> tuple[Tensor, Tensor]:
                sample, _, kl = gumbel_sample_reference(logits, codebook, temperature, ctx.tau, noise, seed, ctx.first, ctx.hard)
                return sample, kl

            return (*differentiate(reference, (grad_sample, grad_kl), (logits, codebook), needed), *rest)
        grad_logits = grad_codebook = None
        if needed[0]:
            grad_soft, grad_logits = grad_sample, None
            if codebook is not None and grad_sample is not None:
                grad_soft = _multiply(grad_sample, codebook.T, logits)
                # The product is as large as the logits and not used otherwise, so their gradient overwrites it.
                grad_logits = None if torch.compiler.is_compiling() else grad_soft
            grad_logits = torch.empty_like(logits) if grad_logits is None else grad_logits
            torch.ops.genperf.gumbel_sample_backward(
                grad_logits, grad_soft, grad_kl, logits, statistics, temperature, ctx.tau, noise, seed, ctx.first
            )
        if codebook is not None and needed[1] and grad_sample is not None:
            if ctx.hard:
                _, grad_codebook = torch.ops.genperf.code_statistics(grad_sample, indices, codebook.shape[0], None, None)
            else:
                soft = torch.ops.genperf.gumbel_sample(logits, temperature, ctx.tau, noise, seed, ctx.first, False, True)[0]
                grad_codebook = _multiply_positions(soft, grad_sample)
            grad_codebook = grad_codebook.to(codebook.dtype)
        return (grad_logits, grad_codebook, *rest)


_GumbelSampleViewing = viewing(_GumbelSample)


def gumbel_sample_reference(
    logits: Tensor,  # [outer, K, inner]
    codebook: Tensor | None,  # [K, D]
    temperature: Tensor | None,
    tau: float,
    noise: Tensor | None,  # [outer, K, inner]
    seed: Tensor | None,
    first: int,
    hard: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op in plain PyTorch, differentiated by autograd. `temperature`, if given, replaces tau."""
    dtype = accumulator_dtype(logits.dtype)
    outer, classes, inner = logits.shape
    wide = logits.to(dtype)
    if noise is None:
        assert seed is not None
        noise = gumbel_noise(seed, outer * inner, classes, dtype, first, logits.device)
        noise = noise.reshape(outer, inner, classes).transpose(1, 2)
    perturbed = wide + noise.to(dtype)
    indices = perturbed.argmax(1)
    one_hot = (torch.arange(classes, device=logits.device).unsqueeze(1) == indices.unsqueeze(1)).to(dtype)
    if temperature is None:
        temperature = torch.full((), tau, dtype=dtype, device=logits.device)  # unlike torch.tensor, no copy to the device
    temperature = temperature.to(dtype).reshape(())
    # The maximum is subtracted before the division, so that small temperatures do not overflow.
    relative = perturbed - perturbed.amax(1, keepdim=True).detach()
    soft = (relative / torch.where(temperature > 0, temperature, 1)).softmax(1)
    soft = torch.where(temperature > 0, soft, one_hot)
    sample = (ValueOf.apply(one_hot, soft) if hard else soft).to(logits.dtype)
    if codebook is not None:
        sample = _multiply(sample, codebook, logits)
    log_q = wide.log_softmax(1)
    q = log_q.exp()
    kl = (q * (torch.where(log_q == -math.inf, 0, log_q) + math.log(classes))).sum(1)
    return sample, indices, kl


@register_fake("gumbel_sample")
def _(
    logits: Tensor, temperature: Tensor | None, tau: float, noise: Tensor | None, seed: Tensor | None, first: int, hard: bool, dense: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outer, _, inner = logits.shape
    sample = torch.empty_like(logits) if dense else logits.new_empty(0)
    return (
        sample,
        logits.new_empty((outer, inner), dtype=torch.int64),
        logits.new_empty((outer, inner), dtype=torch.float32),
        logits.new_empty((4, outer, inner), dtype=torch.float32),
    )


@register_fake("gumbel_sample_backward")
def _(*arguments: object) -> None:
    pass
