# SPDX-License-Identifier: Apache-2.0
"""Anomaly detection by reconstruction error."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .denoising_autoencoder import DenoisingAutoencoder, DenoisingAutoencoderConfig
from .system import check_divisible, option


@dataclass(frozen=True)
class AnomalyDetectorConfig(DenoisingAutoencoderConfig):
    """Configuration of an `AnomalyDetector`."""

    hidden: int = option(128, "units of the hidden layers")
    dim: int = option(16, "length of a code; a short code cannot reconstruct anomalies")
    level: float = option(0.2, "standard deviation of gaussian noise, or fraction of pixels changed by other noise; 0: no noise")
    normal_class: int | None = option(None, "label of the training images, none: all images")


class AnomalyDetector(DenoisingAutoencoder):
    """Detects anomalies by the reconstruction error of an autoencoder of normal images; Sakurada and Yairi, "Anomaly
    Detection Using Autoencoders with Nonlinear Dimensionality Reduction" (2014).

    Fully connected, which needs fewer normal images than convolutions. Noise on the training inputs keeps the
    networks from learning the identity.

    Equivalent to:
        score = (model.reconstruct(images) - images).square().flatten(1).mean(1)
        model.threshold = model.anomaly_score(normal_images).quantile(0.95)
        anomalous = score > model.threshold

    Attributes:
        threshold: scalar buffer, NaN before `fit_threshold`.

    Raises:
        ValueError: an invalid configuration, or images of another shape.
    """

    Config = AnomalyDetectorConfig
    config: AnomalyDetectorConfig
    downsampling = 1
    threshold: Tensor

    def __init__(self, config: AnomalyDetectorConfig | None = None) -> None:
        super().__init__(config)
        self.register_buffer("threshold", torch.tensor(math.nan))

    def build_networks(self) -> tuple[nn.Module, nn.Module]:
        config = self.config
        check_divisible("AnomalyDetector", config.image_shape, self.downsampling)
        for name in ("hidden", "dim"):
            if getattr(config, name) < 1:
                raise ValueError(f"AnomalyDetector: {name} must be at least 1, got {getattr(config, name)}.")
        pixels, hidden, dim = math.prod(config.image_shape), config.hidden, config.dim
        encoder = nn.Sequential(nn.Flatten(), nn.Linear(pixels, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        decoder = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, pixels), nn.Unflatten(1, config.image_shape))
        return encoder, decoder

    def prepare(self, images: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The images of the normal class.

        Raises:
            ValueError: no labels, or no image of that class.
        """
        normal = self.config.normal_class
        if normal is None:
            return images, labels
        if labels is None:
            raise ValueError(f"AnomalyDetector: normal_class={normal} needs labels, got None.")
        chosen = labels == normal
        if not chosen.any():
            raise ValueError(
                f"AnomalyDetector: normal_class must be the label of some image, got {normal} among {labels.unique().tolist()}."
            )
        return images[chosen], labels[chosen]

    def anomaly_score(self, images: Tensor) -> Tensor:
        """Mean squared reconstruction error of each image, [B]; higher for anomalies."""
        return (self.reconstruct(images).to(images.dtype) - images).square().flatten(1).mean(1)

    def fit_threshold(self, images: Tensor, *, quantile: float = 0.95) -> Tensor:
        """Set the threshold to a quantile of the scores of normal images, and return it.

        Use images that the model was not trained on, since training images have lower scores.

        Raises:
            ValueError: quantile outside [0, 1], or no images.
        """
        if not 0 <= quantile <= 1:
            raise ValueError(f"AnomalyDetector.fit_threshold: quantile must lie in [0, 1], got {quantile}.")
        if len(images) == 0:
            raise ValueError("AnomalyDetector.fit_threshold: images must not be empty, got 0 of them.")
        scores = torch.cat([self.anomaly_score(batch) for batch in images.split(256)])
        self.threshold.copy_(scores.quantile(quantile))
        return self.threshold.clone()

    def finish(self, held_out: Tensor) -> None:
        """Set the threshold to the 0.95 quantile of the scores of held-out normal images."""
        if len(held_out):
            self.fit_threshold(held_out)

    def is_anomaly(self, images: Tensor) -> Tensor:
        """Whether each image scores above the threshold, bool [B].

        Raises:
            RuntimeError: before `fit_threshold`.
        """
        if self.threshold.isnan():
            raise RuntimeError("AnomalyDetector.is_anomaly: the threshold must be set by fit_threshold first, got none.")
        return self.anomaly_score(images) > self.threshold
