# SPDX-License-Identifier: Apache-2.0
"""diffusers: the quantizer of VQModel, and the latents of the autoencoders that return a DiagonalGaussianDistribution."""

import sys
from typing import Any

from ..compat import diffusers as compat
from .registry import Adapter, by_name, override
from .swap import joined
from .taming import image_quantizer

_DISTRIBUTION = "DiagonalGaussianDistribution"


class Distribution(compat.DiagonalGaussianDistribution):
    """Samples are those of upstream: a seed gives the noise of torch.randn."""

    torch_noise = True


class Latents:
    """`encode` of an autoencoder: the distribution of its output is genperf's, and an instance of upstream's class."""

    def encode(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = super().encode(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        if type(output) is tuple:
            return tuple(_converted(part) for part in output)
        if hasattr(output, "latent_dist"):
            output.latent_dist = _converted(output.latent_dist)
        return output


def _converted(value: Any) -> Any:
    cls = type(value)
    if (cls.__module__, cls.__name__) != ("diffusers.models.autoencoders.vae", _DISTRIBUTION) or isinstance(value, Distribution):
        return value
    return joined(Distribution, cls)(value.parameters, value.deterministic)


_LATENTS = override(Latents, "compat.diffusers.DiagonalGaussianDistribution", is_quantizer=False)
_QUANTIZERS = by_name(
    {
        "diffusers.models.autoencoders.vae.VectorQuantizer": Adapter(
            "compat.diffusers.VectorQuantizer",
            image_quantizer(compat.VectorQuantizer, "vq_embed_dim", "sane_index_shape", "legacy"),
        )
    }
)


def find(cls: type) -> Adapter | None:
    """The adapter of a quantizer, or of a class whose `encode` is defined beside an import of the distribution."""
    if "encode" in vars(cls) and hasattr(sys.modules.get(cls.__module__), _DISTRIBUTION):
        return _LATENTS
    return _QUANTIZERS(cls)
