"""Losses of the two players of an adversarial game, one function each for the published kinds."""

import torch
from torch import Tensor
from torch.nn import functional as F

ADVERSARIAL_LOSSES = ("non-saturating", "saturating", "least-squares", "hinge", "wasserstein")
SMOOTHED = ("non-saturating", "saturating", "least-squares")


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor, kind: str = "non-saturating", *, label_smoothing: float = 0.0) -> Tensor:
    """What the discriminator (or critic) minimizes.

    Equivalent to (kind="non-saturating"):
        loss = F.binary_cross_entropy_with_logits(real_logits, torch.full_like(real_logits, 1 - label_smoothing))
        loss = loss + F.binary_cross_entropy_with_logits(fake_logits, torch.zeros_like(fake_logits))

    kind                        loss                                                    paper
    "non-saturating",
    "saturating"                -E log D(real) - E log(1 - D(fake)), D = sigmoid        Goodfellow et al. 2014
    "least-squares"             E (real - 1)^2 / 2 + E fake^2 / 2                       Mao et al. 2017
    "hinge"                     E max(0, 1 - real) + E max(0, 1 + fake)                 Lim and Ye 2017, Miyato et al. 2018
    "wasserstein"               E fake - E real                                         Arjovsky et al. 2017

    The first is the negative of the minimax value, in nats: at the best discriminator log 4 - 2 JSD of the two
    distributions. "wasserstein" needs a critic that is kept Lipschitz: `gradient_penalty`, or clipped weights.

    Args:
        real_logits, fake_logits: the discriminator's output before any sigmoid, of any shape and each of its own.
        kind: of loss, from the table.
        label_smoothing: one-sided, Salimans et al. (2016): the target of real samples is 1 less this, that of generated
            ones stays 0. 0 <= label_smoothing < 1; only for the kinds that have targets, the first three.

    Returns:
        A scalar, float32 (float64 for float64), the sum of the means over real and over generated logits; stable for
        logits of any size.

    Raises:
        ValueError, TypeError: arguments that do not fit, as a sentence.
    """
    op = "discriminator_loss"
    _check(op, kind, real_logits=real_logits, fake_logits=fake_logits)
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"{op}: label_smoothing must lie in [0, 1), got {label_smoothing!r}.")
    if label_smoothing and kind not in SMOOTHED:
        raise ValueError(f"{op}: kind={kind!r} has no targets to smooth, got label_smoothing={label_smoothing!r}.")
    real, fake = _wide(real_logits), _wide(fake_logits)
    if kind == "least-squares":
        return (real - (1 - label_smoothing)).square().mean() / 2 + fake.square().mean() / 2
    if kind == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    if kind == "wasserstein":
        return fake.mean() - real.mean()
    real_loss = F.softplus(-real)
    if label_smoothing:
        real_loss = real_loss + label_smoothing * real
    return real_loss.mean() + F.softplus(fake).mean()


def generator_loss(fake_logits: Tensor, kind: str = "non-saturating") -> Tensor:
    """What the generator minimizes.

    Equivalent to (kind="non-saturating"):
        loss = F.binary_cross_entropy_with_logits(fake_logits, torch.ones_like(fake_logits))

    kind                        loss                            of the game of
    "non-saturating"            -E log D(fake)                  Goodfellow et al. 2014, section 3
    "saturating"                E log(1 - D(fake))              the same, the minimax game itself
    "least-squares"             E (fake - 1)^2 / 2              Mao et al. 2017
    "hinge", "wasserstein"      -E fake                         Miyato et al. 2018, Arjovsky et al. 2017

    Args:
        fake_logits: the discriminator's output at generated samples, before any sigmoid, of any shape.
        kind: of loss, from the table.

    Returns:
        A scalar, float32 (float64 for float64).

    Raises:
        ValueError, TypeError: arguments that do not fit, as a sentence.
    """
    _check("generator_loss", kind, fake_logits=fake_logits)
    fake = _wide(fake_logits)
    if kind == "non-saturating":
        return F.softplus(-fake).mean()
    if kind == "saturating":
        return -F.softplus(fake).mean()
    if kind == "least-squares":
        return (fake - 1).square().mean() / 2
    return -fake.mean()


def _check(op: str, kind: str, **logits: Tensor) -> None:
    if kind not in ADVERSARIAL_LOSSES:
        raise ValueError(f"{op}: kind must be one of {', '.join(ADVERSARIAL_LOSSES)}, got {kind!r}.")
    for name, values in logits.items():
        if not isinstance(values, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(values).__name__}.")
        if not values.is_floating_point():
            raise TypeError(f"{op}: {name} must be of a floating dtype, got {values.dtype}.")


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
