# SPDX-License-Identifier: Apache-2.0
"""Class-conditional GAN."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .dcgan import DCGAN, DCGANConfig
from .system import check_labels


@dataclass(frozen=True)
class ConditionalGANConfig(DCGANConfig):
    """Configuration of a `ConditionalGAN`."""

    num_classes: int = 10


class ConditionalGAN(DCGAN):
    """A class-conditional GAN with the networks of `DCGAN`; Mirza & Osindero, "Conditional Generative Adversarial Nets" (2014).

    The generator gets the one-hot label concatenated to the noise. The discriminator adds the inner product of its
    features with an embedding of the label: Miyato & Koyama, "cGANs with Projection Discriminator" (2018).
    """

    Config = ConditionalGANConfig
    config: ConditionalGANConfig

    @property
    def condition_dim(self) -> int:
        return self.config.num_classes

    def condition(self, labels: Tensor | None) -> Tensor:
        """One-hot labels [B, num_classes].

        Raises:
            ValueError: no labels, or labels of another shape or out of range (on a GPU, a device-side assertion instead).
            TypeError: labels that are not int64.
        """
        name, classes = self.name, self.config.num_classes
        if labels is None:
            raise ValueError(f"{name}: labels must be int64 [B], got None.")
        if labels.dtype != torch.int64:
            raise TypeError(f"{name}: labels must be int64, got {labels.dtype}.")
        check_labels(name, labels, classes)
        return F.one_hot(labels.to(self.device), classes).to(next(self.parameters()).dtype)

    def sample(self, n: int, labels: Tensor | None = None) -> Tensor:
        """Images [n, C, H, W] in [0, 1] of labels [n]; None cycles through all classes."""
        if labels is None and n > 0:
            labels = torch.arange(n) % self.config.num_classes
        return super().sample(n, labels)

    def _check_config(self) -> None:
        super()._check_config()
        if not self.config.num_classes >= 1:
            raise ValueError(f"{self.name}: num_classes must be at least 1, got {self.config.num_classes!r}.")
