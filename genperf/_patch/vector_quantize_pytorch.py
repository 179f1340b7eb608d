# SPDX-License-Identifier: Apache-2.0
"""vector-quantize-pytorch 1.32: each class by that of genperf.compat.vector_quantize_pytorch.

A class is one line of `_CLASSES`: where upstream has it, and a function that reads from a module the arguments of the constructor
that are not attributes of the same name.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..compat import vector_quantize_pytorch as compat
from .registry import Adapter, UnsupportedError, checked, constructed, from_template
from .registry import find as find_adapter
from .swap import Step, joined_class

Arguments = Callable[[Any], dict[str, Any]]


def _nothing(module: Any) -> dict[str, Any]:
    return {}


def _without(arguments: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in names}


def _optimizer(module: Any) -> Callable[[object], torch.optim.Optimizer] | None:
    """The constructor's function of the parameters, which are the same tensors as before."""
    optimizer = module.in_place_codebook_optimizer
    return None if optimizer is None else lambda parameters: optimizer


def _biased(module: Any) -> bool:
    return getattr(module.project_out, "bias", None) is not None


def _vector_quantize(module: Any) -> dict[str, Any]:
    codebook = module._codebook
    sampling = codebook.gumbel_sample.keywords
    arguments = {
        "codebook_dim": codebook.embed.shape[-1],
        # Whether k-means is still to come; on the meta device a state dict will tell.
        "kmeans_init": codebook.initted.is_meta or not bool(codebook.initted),
        "stochastic_sample_codes": sampling["stochastic"],
        "straight_through": sampling["straight_through"],
        "sync_codebook": codebook.use_ddp,
        "in_place_codebook_optimizer": _optimizer(module),
        "manual_in_place_optimizer_update": module.manual_in_place_optimizer_update and module.in_place_codebook_optimizer is not None,
    }
    shared = ("decay", "kmeans_iters", "threshold_ema_dead_code", "sample_codebook_temp", "ema_update", "vq_bridge", "manual_ema_update")
    affine = ("affine_param", "sync_affine_param", "affine_param_batch_decay", "affine_param_codebook_decay")
    return arguments | {name: getattr(codebook, name) for name in shared + affine if hasattr(codebook, name)}


def _residual_vq(module: Any) -> dict[str, Any]:
    layer = module.layers[0]
    sizes = module.codebook_sizes
    arguments = {
        **_without(
            _arguments(layer), "dim", "codebook_dim", "codebook_size", "heads", "accept_image_fmap", "return_zeros_for_masked_padding"
        ),
        "dim": module.project_in.in_features if module.has_projections else module.codebook_dim,
        "codebook_size": sizes[0] if module.uniform_codebook_size else sizes,
        "beam_score_quantizer_weights": None if module.beam_size is None else module.beam_score_weights.tolist(),
    }
    if module.implicit_neural_codebook and len(module.mlps) > 0:
        mlp = module.mlps[0]
        arguments["mlp_kwargs"] = {"depth": len(mlp.layers), "dim_hidden": mlp.layers[0][0].out_features}
    return arguments


def _grouped(dropped: Sequence[str]) -> Arguments:
    return lambda module: _without(_arguments(module.rvqs[0]), "dim", *dropped)


def _sim_vq(module: Any) -> dict[str, Any]:
    frozen = module.frozen_codebook.shape[-1]
    transform = module.code_transform
    return {"dim": getattr(transform, "out_features", frozen), "frozen_codebook_dim": frozen, "codebook_transform": transform}


def _residual_sim_vq(module: Any) -> dict[str, Any]:
    layer = _arguments(module.layers[0])
    return {**layer, "codebook_transform": None} if type(module.layers[0].code_transform) is nn.Linear else layer


def _levels(module: Any) -> dict[str, Any]:
    return {"levels": module._levels.tolist(), "projection_has_bias": _biased(module)}


def _residual_fsq(module: Any) -> dict[str, Any]:
    layer = module.layers[0]
    arguments = _without(_arguments(layer), "levels", "dim", "preserve_symmetry", "projection_has_bias")
    clamp = None if layer.bound_hard_clamp else module.soft_clamp_input_value
    arguments["soft_clamp_input_value"] = None if clamp is None else clamp.tolist()
    return {**arguments, "dim": module.project_in.in_features if module.has_projections else len(module.levels)}


def _lfq(module: Any) -> dict[str, Any]:
    projection = module.project_in
    cosine = type(projection).__name__ == "CosineSimLinear"
    return {
        "straight_through_activation": module.activation,
        "projection_has_bias": _biased(module),
        "cosine_sim_project_in": cosine,
        "cosine_sim_project_in_scale": projection.scale if cosine else None,
    }


def _residual_lfq(module: Any) -> dict[str, Any]:
    layer = module.layers[0]
    arguments = _without(_arguments(layer), "dim", "codebook_scale", "has_projections", "projection_has_bias", "codebook_size")
    dim = module.project_in.in_features if module.has_projections else layer.codebook_dim
    return {**arguments, "dim": dim, "codebook_size": layer.codebook_size}


def _latent_quantize(module: Any) -> dict[str, Any]:
    return {
        "levels": module._levels.tolist(),
        "codebook_dim": -1,
        "commitment_loss_weight": float(module.commitment_loss_weight),
        "quantization_loss_weight": float(module.quantization_loss_weight),
        "optimize_values": isinstance(module.values_per_latent, nn.ParameterList),
        "in_place_codebook_optimizer": _optimizer(module),
    }


def _random_projection(module: Any) -> dict[str, Any]:
    fixed = ("dim", "heads", "codebook_dim", "use_cosine_sim", "separate_codebook_per_head")
    _, dim, codebook_dim = module.rand_projs.shape
    norm = isinstance(module.norm, nn.LayerNorm)
    return {**_without(_arguments(module.vq), *fixed), "dim": dim, "codebook_dim": codebook_dim, "norm": norm}


def _hierarchical(module: Any) -> dict[str, Any]:
    layer = module.vqs[0] if module.vq is None else module.vq
    phi = module.phi_levels[0] if module.phi_shared is None else module.phi_shared
    return {
        **_without(_arguments(layer), "dim", "channel_last"),
        "codebook_size": module.codebook_sizes,
        "shared_codebook": module.vq is not None,
        "quant_resi": phi.resi_ratio,
        "share_quant_resi": 1 if module.phi_levels is None else len(module.phi_levels),
        "accept_image_fmap": module.spatial_dims == 2,
        "accept_3d_fmap": module.spatial_dims == 3,
    }


_CLASSES: dict[str, Arguments] = {
    "binary_mapper.BinaryMapper": _nothing,
    "finite_scalar_perturbation.FSP": lambda module: _levels(module) | {"vector_norm": "none"},  # its norm is a child
    "finite_scalar_perturbation.VectorNorm": _nothing,
    "finite_scalar_quantization.FSQ": _levels,
    "hierarchical_vq.HierarchicalVQ": _hierarchical,
    "latent_quantization.LatentQuantize": _latent_quantize,
    "lookup_free_quantization.LFQ": _lfq,
    "random_projection_quantizer.RandomProjectionQuantizer": _random_projection,
    "residual_fsq.GroupedResidualFSQ": _grouped(["channel_first"]),
    "residual_fsq.ResidualFSQ": _residual_fsq,
    "residual_lfq.GroupedResidualLFQ": _grouped([]),
    "residual_lfq.ResidualLFQ": _residual_lfq,
    "residual_sim_vq.ResidualSimVQ": _residual_sim_vq,
    "residual_vq.GroupedResidualVQ": _grouped(["accept_image_fmap"]),
    "residual_vq.ResidualVQ": _residual_vq,
    "sim_vq.SimVQ": _sim_vq,
    "vector_quantize_pytorch.VectorQuantize": _vector_quantize,
}


def find(cls: type) -> Adapter | None:
    library, _, name = cls.__module__.partition(".")
    key = f"{name}.{cls.__qualname__}"
    return _adapter(key) if library == "vector_quantize_pytorch" and key in _CLASSES else None


@functools.cache
def _adapter(key: str) -> Adapter:
    name = key.partition(".")[2]

    def steps(module: nn.Module, upstream: type) -> list[Step]:
        cls = getattr(compat, name, None) or getattr(getattr(compat, key.partition(".")[0], None), name, None)
        if cls is None:
            raise UnsupportedError(f"genperf.compat.vector_quantize_pytorch has no {name}")
        try:
            template = constructed(cls, **_arguments(module))
        except AttributeError as error:
            raise UnsupportedError(f"this version of the class has other attributes ({error})") from error
        return [from_template(module, upstream, template), *_steps_below(module, template)]

    return Adapter(f"compat.vector_quantize_pytorch.{name}", steps)


def _arguments(module: nn.Module) -> dict[str, Any]:
    """The arguments of the constructor of a module of upstream."""
    found = next(
        (cls, key) for cls in type(module).__mro__ if (key := f"{cls.__module__.partition('.')[2]}.{cls.__qualname__}") in _CLASSES
    )
    upstream, key = found
    given = _CLASSES[key](module)
    names = [n for n, p in inspect.signature(upstream).parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    accepts_more = len(names) < len(inspect.signature(upstream).parameters)
    arguments = {name: getattr(module, name) for name in names if name not in given and hasattr(module, name)}
    return arguments | {name: value for name, value in given.items() if accepts_more or name in names}


def _steps_below(module: nn.Module, template: nn.Module) -> Iterator[Step]:
    """The steps of what a quantizer consists of: its codebook, and quantizers, which its methods need to be genperf's."""
    for name, made in template._modules.items():
        child = module._modules.get(name)
        if child is None or made is None or joined_class(type(child)) is not None:
            continue
        known = find_adapter(child)
        if known is not None:
            yield from known[1].steps(child, known[0])
            continue
        if type(made).__module__.partition(".")[0] == "genperf":
            yield checked(from_template(child, type(child), made), type(child))
        yield from _steps_below(child, made)
