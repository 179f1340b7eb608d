# SPDX-License-Identifier: Apache-2.0
"""StackGAN: a conditional GAN at half the resolution, and a second one that refines its images."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._distributed import all_gather_rows, world_size
from ..losses.adversarial import discriminator_loss, generator_loss
from ..losses.feature_matching import feature_matching
from ..losses.gradient_penalty import gradient_penalty
from ..nn.batch_norm import BatchNorm
from ..nn.conditioning_augmentation import ConditioningAugmentation
from ._adversarial_networks import ConvDiscriminator, dcgan_init
from ._convolutional import ResidualBlock
from .gan import GAN, GANConfig
from .system import System, check_divisible, check_labels, frozen, option, share


@dataclass(frozen=True)
class StackGANConfig(GANConfig):
    """Configuration of a `StackGAN`; the options of `GAN` apply to both stages."""

    num_classes: int = 10
    condition_dim: int | None = None
    """Length of given embeddings, such as text embeddings; None if the conditions are labels."""
    augmented_dim: int = option(32, "length of the condition sampled by conditioning augmentation")
    kl_weight: float = option(0.002, "weight of the KL divergence of conditioning augmentation, in nats, in the generator loss")
    stage1_share: float = option(0.5, "fraction of the training for the first stage, before the second")
    width: int = option(32, "channels of the largest feature maps")
    lr: float = option(5e-4, "learning rate of the generators")
    ema: float = option(0.99, "decay of the moving average of the generators, used for sampling, 0: none")


class StackGAN(System):
    """A conditional GAN and a second one that refines its images; Zhang et al., "StackGAN: Text to Photo-realistic Image
    Synthesis with Stacked Generative Adversarial Networks" (2017).

    Stage I generates images of half the height and width from noise z and a condition, stage II images of full size from
    these and the condition. Each generator samples its condition c around an embedding e, see `ConditioningAugmentation`:
        stage I:    s = g1(z, c1)       stage II:   g2(s, c2)
    The discriminators are matching-aware (Reed et al. 2016): a real image x with a mismatched embedding w counts as fake.
    In each stage, with logits d(., .):
        discriminator:  mean softplus(-d(x, e)) + (mean softplus(d(x, w)) + mean softplus(d(g, e))) / 2
        generator:      mean softplus(-d(g, e)) + kl_weight * mean KL(c || N(0, I))
    Stage I trains for the first part of the training; stage II then trains with stage I fixed. All options of `GAN` are
    supported.

    A condition is a label, int64 [B], or an embedding, floats [B, E]. Embeddings are given, not learned; their elements should
    have a mean square of about 1, so that different embeddings are distinguishable at the start. A label is embedded as its one-hot
    vector times sqrt(E), E = num_classes; with `condition_dim`, E is that and labels are not accepted. The mismatched
    embedding is that of another class, or for given embeddings that of the next image in the batch, even if both are equal.

    Attributes:
        stages: the two GANs; their discriminators and generators are the four players.

    Raises:
        ValueError: a height or width that is below 8 or not divisible by 4, or another invalid configuration.
    """

    Config = StackGANConfig
    config: StackGANConfig
    players = ("discriminator1", "generator1", "discriminator2", "generator2")
    downsampling = 4

    def __init__(self, config: StackGANConfig | None = None) -> None:
        super().__init__(config)
        config = self.config
        check_divisible("StackGAN", config.image_shape, self.downsampling)
        channels, height, width = config.image_shape
        if min(height, width) < self.least_side(config):
            raise ValueError(f"StackGAN: sides must be at least {self.least_side(config)}, got {height} x {width}.")
        if not config.num_classes >= 2:
            raise ValueError(f"StackGAN: num_classes must be at least 2, got {config.num_classes!r}.")
        for field in ("condition_dim", "augmented_dim"):
            if getattr(config, field) is not None and not getattr(config, field) >= 1:
                raise ValueError(f"StackGAN: {field} must be at least 1, got {getattr(config, field)!r}.")
        if not 0 <= config.kl_weight < math.inf:
            raise ValueError(f"StackGAN: kl_weight must be a finite number, at least 0, got {config.kl_weight!r}.")
        if not 0 <= config.stage1_share <= 1:
            raise ValueError(f"StackGAN: stage1_share must be in [0, 1], got {config.stage1_share!r}.")
        half = dataclasses.replace(config, image_shape=(channels, height // 2, width // 2))
        self.stages = nn.ModuleList([Stage(half, Stage1Generator), Stage(config, Stage2Generator)])

    @classmethod
    def least_side(cls, config: Any) -> int:
        return 8  # the first stage has half of it

    def embed(self, labels: Tensor | None) -> Tensor:
        """Embeddings [B, E] of labels, or given embeddings, in the dtype of the parameters.

        Raises:
            ValueError: no labels, another shape, or labels out of range (on a GPU, a device-side assertion instead).
            TypeError: neither int64 labels nor floating-point embeddings.
        """
        classes, given, dtype = self.config.num_classes, self.config.condition_dim, next(self.parameters()).dtype
        expected = f"embeddings [B, {given}]" if given else f"int64 labels [B] or embeddings [B, {classes}]"
        if labels is None:
            raise ValueError(f"StackGAN: labels must be {expected}, got None.")
        if labels.dtype == torch.int64 and given is None:
            check_labels("StackGAN", labels, classes)
            return F.one_hot(labels.to(self.device), classes).to(dtype) * classes**0.5
        if not labels.is_floating_point():
            raise TypeError(f"StackGAN: labels must be {expected}, got {labels.dtype}.")
        if labels.dim() != 2 or labels.shape[1] != (given or classes):
            raise ValueError(f"StackGAN: labels must be {expected}, got shape {list(labels.shape)}.")
        return labels.to(self.device, dtype)

    def training_step(self, images: Tensor, labels: Tensor | None = None, *, player: str) -> dict[str, Tensor]:
        """The losses of a player for a batch, with the names of `GAN.training_step`, and for generators the weighted "kl".

        Raises:
            ValueError: images of another shape, an unknown player, invalid labels, or for discriminators a global batch of one
                image with an embedding.
            TypeError: invalid labels, see `embed`.
        """
        self.check_images(images)
        self.check_player(player)
        role, number = player[:-1], int(player[-1])
        embedding = self.embed(labels)
        wrong = self._mismatched(labels) if role == "discriminator" else None
        stage1_share = self.config.stage1_share
        first, second = self._gans
        if number == 1:
            first.progress = min(1.0, self.progress / stage1_share) if stage1_share else 1.0
            return first.training_step(F.avg_pool2d(images, 2), Condition(embedding, wrong), player=role)
        second.progress = max(0.0, (self.progress - stage1_share) / (1 - stage1_share)) if stage1_share < 1 else 1.0
        return second.training_step(images, Condition(embedding, wrong, self._low(embedding)), player=role)

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Adam for each player; see `GAN.optimizers`."""
        return {f"{role}{k}": optimizer for k, stage in enumerate(self._gans, 1) for role, optimizer in stage.optimizers().items()}

    def players_at(self, step: int) -> Sequence[str]:
        """The players of stage I in the first part of the training, then those of stage II."""
        k = 1 if self.progress < self.config.stage1_share else 2
        return [f"{role}{k}" for role in self._gans[k - 1].players_at(step)]

    def step_done(self, player: str) -> None:
        self._gans[int(player[-1]) - 1].step_done(player[:-1])

    @torch.no_grad()
    def sample(self, n: int, labels: Tensor | None = None) -> Tensor:
        """Images [n, C, H, W] in [0, 1] of labels or embeddings; None cycles through all classes.

        Raises:
            ValueError: n below 1, another number of labels, or invalid labels.
            TypeError: invalid labels, see `embed`.
        """
        self.check_sample(n)
        if labels is None and self.config.condition_dim is None:
            labels = torch.arange(n) % self.config.num_classes
        embedding = self.embed(labels)
        if len(embedding) != n:
            raise ValueError(f"StackGAN: labels must have length n, got {len(embedding)} for n = {n}.")
        return self._gans[1].sample(n, Condition(embedding, None, self._low(embedding)))

    def _low(self, embedding: Tensor) -> Tensor:
        """Images of stage I, [B, C, H/2, W/2] in [0, 1]."""
        return self._gans[0].sample(len(embedding), Condition(embedding))

    @property
    def _gans(self) -> "list[Stage]":
        return cast("list[Stage]", list(self.stages))

    def _mismatched(self, labels: Tensor | None) -> Tensor:
        """Mismatched embeddings: of another class, or those of the next sample in the global batch."""
        assert labels is not None  # `embed` raises before
        if labels.dtype == torch.int64:
            classes = self.config.num_classes
            return self.embed((labels + torch.randint(1, classes, ()).item()) % classes)
        embedding, ranks = self.embed(labels), world_size()
        if len(embedding) * ranks == 1:
            raise ValueError("StackGAN: a batch with embeddings must have at least 2 images, for mismatched embeddings, got 1.")
        global_batch = embedding if ranks == 1 else all_gather_rows(embedding, [len(embedding)] * ranks)
        return share(global_batch.roll(-1, 0))


@dataclass(frozen=True)
class Condition:
    """The condition of a stage for B images, in place of labels."""

    embedding: Tensor
    """[B, E]"""
    wrong: Tensor | None = None
    """[B, E], mismatched embeddings, for the discriminator"""
    low: Tensor | None = None
    """[B, C, H/2, W/2] in [0, 1], images of stage I, for stage II"""

    def __len__(self) -> int:
        return len(self.embedding)


class Stage(GAN):
    """One stage, a GAN whose "labels" are a `Condition`."""

    config: StackGANConfig
    generator: "Stage1Generator | Stage2Generator"

    @property
    def name(self) -> str:
        return "StackGAN"

    def __init__(self, config: StackGANConfig, generator: "type[Stage1Generator] | type[Stage2Generator]") -> None:
        self.build_generator = lambda: generator(config)
        super().__init__(config)

    def build_discriminator(self) -> nn.Module:
        config = self.config
        return ConvDiscriminator(
            config.image_shape,
            config.width,
            norm="batch" if config.penalty is None else "none",
            minibatch_kernels=config.minibatch_kernels,
            condition_dim=config.condition_dim or config.num_classes,
        )

    def condition(self, labels: Condition) -> Condition:
        return labels

    def _discriminator_losses(self, real: Tensor, condition: Condition) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        config, embedding = self.config, condition.embedding
        with torch.no_grad():
            real, fake = self._noisy(real), self._noisy(self.generator(self._noise(len(real)), condition))
        real_logits, _ = self.discriminator(real, embedding)
        fake_logits, _ = self.discriminator(fake, embedding)
        wrong_logits, _ = self.discriminator(real, condition.wrong)
        negatives = torch.cat([fake_logits, wrong_logits])
        parts = {"adversarial": discriminator_loss(real_logits, negatives, config.loss, label_smoothing=config.label_smoothing)}
        if config.penalty is not None:
            parts["penalty"] = gradient_penalty(
                lambda points: self.discriminator(points, embedding)[0], real, fake, kind=config.penalty, weight=config.penalty_weight
            )
        return parts, {"real_score": real_logits.mean(), "fake_score": fake_logits.mean(), "wrong_score": wrong_logits.mean()}

    def _generator_losses(self, real: Tensor, condition: Condition) -> dict[str, Tensor]:
        config, embedding = self.config, condition.embedding
        with frozen(self.discriminator):
            fake, kl = self.generator.draw(self._noise(len(real)), condition)
            logits, features = self.discriminator(self._noisy(fake), embedding)
            parts = {"adversarial": generator_loss(logits, config.loss), "kl": config.kl_weight * kl.mean()}
            if config.feature_matching:
                with torch.no_grad():
                    _, real_features = self.discriminator(self._noisy(real), embedding)
                parts["feature_matching"] = config.feature_matching * feature_matching(real_features, features)
        return parts


class Stage1Generator(nn.Module):
    """Noise [B, latent_dim] and a `Condition` to images in [-1, 1] of the config's shape, upsampled once by 2."""

    def __init__(self, config: StackGANConfig) -> None:
        super().__init__()
        channels, rows, columns = config.image_shape
        width = config.width
        start = (2 * width, rows // 2, columns // 2)
        self.augmentation = ConditioningAugmentation(config.condition_dim or config.num_classes, config.augmented_dim)
        self.body = nn.Sequential(
            nn.Linear(config.latent_dim + config.augmented_dim, start[0] * start[1] * start[2]),
            nn.Unflatten(1, start),
            BatchNorm(2 * width),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1),
            BatchNorm(width),
            nn.ReLU(),
            nn.Conv2d(width, channels, 3, padding=1),
            nn.Tanh(),
        )
        self.body.apply(dcgan_init)

    def forward(self, z: Tensor, condition: Condition) -> Tensor:
        return self.draw(z, condition)[0]

    def draw(self, z: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """Images, and the KL divergence [B] of the sampled conditions."""
        augmented, kl = self.augmentation(condition.embedding)
        return self.body(torch.cat([z, augmented], 1)), kl


class Stage2Generator(nn.Module):
    """Images of stage I and a `Condition` to images in [-1, 1] of the config's shape; noise is not used, as in the paper."""

    def __init__(self, config: StackGANConfig) -> None:
        super().__init__()
        channels, width = config.image_shape[0], config.width
        self.augmentation = ConditioningAugmentation(config.condition_dim or config.num_classes, config.augmented_dim)
        self.encoder = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            BatchNorm(2 * width),
            nn.ReLU(),
        )
        self.body = nn.Sequential(
            nn.Conv2d(2 * width + config.augmented_dim, 2 * width, 3, padding=1),
            BatchNorm(2 * width),
            ResidualBlock(2 * width),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1),
            BatchNorm(width),
            nn.ReLU(),
            nn.ConvTranspose2d(width, channels, 4, stride=2, padding=1),
            nn.Tanh(),
        )

    def forward(self, z: Tensor, condition: Condition) -> Tensor:
        return self.draw(z, condition)[0]

    def draw(self, z: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """Images, and the KL divergence [B] of the sampled conditions."""
        augmented, kl = self.augmentation(condition.embedding)
        assert condition.low is not None
        features = self.encoder(condition.low * 2 - 1)
        spread = augmented[:, :, None, None].expand(-1, -1, *features.shape[2:])
        return self.body(torch.cat([features, spread], 1)), kl
