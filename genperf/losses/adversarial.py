# SPDX-License-Identifier: Apache-2.0
"""Adversarial losses of discriminator and generator."""

from typing import get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from .._choices import AdversarialLoss

ADVERSARIAL_LOSSES: tuple[AdversarialLoss, ...] = get_args(AdversarialLoss)
SMOOTHED = ("non-saturating", "saturating", "least-squares")


def discriminator_loss(
    real_logits: Tensor, fake_logits: Tensor, kind: AdversarialLoss = "non-saturating", *, label_smoothing: float = 0.0
) -> Tensor:
    """The loss of a discriminator or critic.

    Equivalent to (kind="non-saturating"):
        loss = F.binary_cross_entropy_with_logits(real_logits, torch.full_like(real_logits, 1 - label_smoothing))
        loss = loss + F.binary_cross_entropy_with_logits(fake_logits, torch.zeros_like(fake_logits))

    kind                        loss                                                    paper
    "non-saturating",
    "saturating"                -E log D(real) - E log(1 - D(fake)), D = sigmoid        Goodfellow et al. 2014
    "least-squares"             E (real - 1)^2 / 2 + E fake^2 / 2                       Mao et al. 2017
    "hinge"                     E max(0, 1 - real) + E max(0, 1 + fake)                 Lim and Ye 2017, Miyato et al. 2018
    "wasserstein"               E fake - E real                                         Arjovsky et al. 2017

    The first is the negative minimax value, in nats: log 4 - 2 JSD of the two distributions for the optimal discriminator.
    "wasserstein" needs a Lipschitz critic: use `gradient_penalty`, or clip its weights.

    Args:
        real_logits, fake_logits: the discriminator's outputs before any sigmoid, of any shapes.
        kind: a row of the table.
        label_smoothing: one-sided label smoothing, Salimans et al. (2016): the target of real samples is
            1 - label_smoothing, that of generated samples stays 0. In [0, 1), and only for the first three kinds, which
            have targets.

    Returns:
        A scalar, float32 (float64 for float64): the mean over real logits plus the mean over generated logits. Numerically
        stable for logits of any size. The mean of no logits is 0.

    Raises:
        ValueError: an unknown kind, or a label_smoothing out of range or without targets.
        TypeError: logits that are not floating-point tensors.
    """
    op = "discriminator_loss"
    _check(op, kind, real_logits=real_logits, fake_logits=fake_logits)
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"{op}: label_smoothing must lie in [0, 1), got {label_smoothing!r}.")
    if label_smoothing and kind not in SMOOTHED:
        raise ValueError(f"{op}: kind={kind!r} has no targets to smooth, got label_smoothing={label_smoothing!r}.")
    real, fake = _at_least_float32(real_logits), _at_least_float32(fake_logits)
    if kind == "least-squares":
        return _mean((real - (1 - label_smoothing)).square()) / 2 + _mean(fake.square()) / 2
    if kind == "hinge":
        return _mean(F.relu(1 - real)) + _mean(F.relu(1 + fake))
    if kind == "wasserstein":
        return _mean(fake) - _mean(real)
    real_loss = F.softplus(-real)
    if label_smoothing:
        real_loss = real_loss + label_smoothing * real
    return _mean(real_loss) + _mean(F.softplus(fake))


def generator_loss(fake_logits: Tensor, kind: AdversarialLoss = "non-saturating") -> Tensor:
    """The loss of a generator.

    Equivalent to (kind="non-saturating"):
        loss = F.binary_cross_entropy_with_logits(fake_logits, torch.ones_like(fake_logits))

    kind                        loss                            paper
    "non-saturating"            -E log D(fake)                  Goodfellow et al. 2014, section 3
    "saturating"                E log(1 - D(fake))              Goodfellow et al. 2014, the minimax game
    "least-squares"             E (fake - 1)^2 / 2              Mao et al. 2017
    "hinge", "wasserstein"      -E fake                         Miyato et al. 2018, Arjovsky et al. 2017

    Args:
        fake_logits: the discriminator's output for generated samples, before any sigmoid, of any shape.
        kind: a row of the table.

    Returns:
        A scalar, float32 (float64 for float64); 0 without logits.

    Raises:
        ValueError: an unknown kind.
        TypeError: logits that are not a floating-point tensor.
    """
    _check("generator_loss", kind, fake_logits=fake_logits)
    fake = _at_least_float32(fake_logits)
    if kind == "non-saturating":
        return _mean(F.softplus(-fake))
    if kind == "saturating":
        return -_mean(F.softplus(fake))
    if kind == "least-squares":
        return _mean((fake - 1).square()) / 2
    return -_mean(fake)


def _check(op: str, kind: AdversarialLoss, **logits: Tensor) -> None:
    if kind not in ADVERSARIAL_LOSSES:
        raise ValueError(f"{op}: kind must be one of {', '.join(ADVERSARIAL_LOSSES)}, got {kind!r}.")
    for name, values in logits.items():
        if not isinstance(values, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(values).__name__}.")
        if not values.is_floating_point():
            raise TypeError(f"{op}: {name} must be of a floating dtype, got {values.dtype}.")


def _mean(values: Tensor) -> Tensor:
    """The mean; 0 of no values, with a gradient."""
    return values.mean() if values.numel() else values.sum()


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
