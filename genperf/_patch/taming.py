# SPDX-License-Identifier: Apache-2.0
"""taming-transformers: the quantizers of VQGAN, by those of genperf.compat.taming."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ..compat import taming as compat
from .registry import Adapter, by_name, constructed, from_template, require
from .swap import Step


def image_quantizer(cls: Callable[..., nn.Module], dim: str, *options: str) -> Callable[[nn.Module, type], Sequence[Step]]:
    """Steps for a quantizer of images with an embedding, whose length of a code is the attribute `dim`."""

    def steps(module: Any, upstream: type) -> list[Step]:
        require(module, ("n_e", dim, "beta", "embedding", *options))
        arguments = {name: getattr(module, name) for name in ("n_e", dim, "beta", *options)}
        return [from_template(module, upstream, constructed(cls, **arguments, **used_codes(module)))]

    return steps


def used_codes(module: Any) -> dict[str, Any]:
    """The arguments of remapping. The used codes are a buffer; their file may be gone."""
    if getattr(module, "remap", None) is None:
        return {}
    # An extra index is stored as the number that it has.
    extra = module.re_embed > len(module.used)
    return {"remap": module.used, "unknown_index": "extra" if extra else module.unknown_index}


def _gumbel(module: Any, upstream: type) -> list[Step]:
    options = ("embedding_dim", "n_embed", "straight_through", "kl_weight", "use_vqinterface")
    require(module, ("proj", "embed", "temperature", *options))
    arguments = {name: getattr(module, name) for name in options}
    temperature = module.temperature
    template = constructed(
        compat.GumbelQuantize, num_hiddens=module.proj.in_channels, temp_init=float(temperature), **arguments, **used_codes(module)
    )
    step = from_template(module, upstream, template)
    step.attributes["_temperature"] = step.attributes["_temperature"].to(module.embed.weight.device)
    return [step]


_OPTIONS = ("sane_index_shape", "legacy")

find = by_name(
    {
        "taming.modules.vqvae.quantize.GumbelQuantize": Adapter(
            "compat.taming.GumbelQuantize, which draws other noise from a seed", _gumbel
        ),
        "taming.modules.vqvae.quantize.VectorQuantizer": Adapter(
            "compat.taming.VectorQuantizer", image_quantizer(compat.VectorQuantizer, "e_dim")
        ),
        "taming.modules.vqvae.quantize.VectorQuantizer2": Adapter(
            "compat.taming.VectorQuantizer2", image_quantizer(compat.VectorQuantizer2, "e_dim", *_OPTIONS)
        ),
    }
)
