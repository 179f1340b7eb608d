# SPDX-License-Identifier: Apache-2.0
"""Options of the classes of vector-quantize-pytorch that have no codebook.

FSQ, FSP, LFQ, EvoLFQ, ResidualFSQ, GroupedResidualFSQ, ResidualLFQ, GroupedResidualLFQ, LatentQuantize, BinaryMapper.
"""

from functools import partial
from math import prod
from typing import Any

import torch
from torch import nn
from vqp_case import Case

CASES: list[Case] = []

# Why an option is missing in genperf, by class and option; a class that is missing has the option "".
UNSUPPORTED: dict[tuple[str, str], str] = {}

# How an option differs from upstream's; with the option "", the class.
DIFFERS: dict[tuple[str, str], str] = {
    ("FSQ", "levels"): "indices are exact for every codebook; int64 from 2^31 codes on",
    ("FSQ", "allowed_dtypes"): "an attribute; the quantization is at least float32",
    ("FSQ", "force_quantization_f32"): "an attribute; the quantization is at least float32",
    ("FSP", "levels"): "indices are exact for every codebook; int64 from 2^31 codes on",
    ("FSP", "act_name"): "the slope of laplace at 0 is 1/2, not 0",
    ("FSP", "vector_norm"): "0 for a single vector, not NaN",
    ("FSP", "eps"): "None is the eps of float32 in half precision too",
    ("LFQ", "codebook_size"): "an entropy loss over more than 2^24 codes raises NotImplementedError",
    ("LFQ", "mask"): "the batch entropy is that of the vectors that are left; also of x's shape without channels",
    ("LFQ", "frac_per_sample_entropy"): "with a mask, of the vectors that are left; at least one vector",
    ("LFQ", "force_quantization_f32"): "an attribute; the quantization is at least float32",
    ("EvoLFQ", ""): "`encode` gives the bits of the indices with projections and rotations too, and `evolve` the best member",
    ("ResidualFSQ", "quantize_dropout"): "drawn on the host; a step does not compile with fullgraph=True",
    ("ResidualFSQ", "is_channel_first"): "indices are decoded as they are returned; upstream raises an error",
    ("ResidualFSQ", "return_all_codes"): "works with is_channel_first; upstream raises an error",
    ("GroupedResidualFSQ", "accept_image_fmap"): "implies is_channel_first; upstream needs both",
    ("ResidualLFQ", "quantize_dropout"): "drawn on the host; a step does not compile with fullgraph=True",
    ("ResidualLFQ", ""): "codes of spherical or rotated quantizers are decoded as `forward` adds them up",
    ("ResidualLFQ", "dim"): "projections of images work; upstream raises an error",
    ("GroupedResidualLFQ", "accept_image_fmap"): "projections work; upstream raises an error",
    ("LatentQuantize", "levels"): "indices are exact; upstream truncates, often to the level below",
    ("LatentQuantize", "optimize_values"): "False: the values follow the layer to another device",
    ("LatentQuantize", "in_place_codebook_optimizer"): "trains the values; upstream raises AttributeError in training",
    ("BinaryMapper", "straight_through"): "the output is one-hot without a rounding error",
}

# Options that are supported without a kernel; with the option "", the class.
PLAIN: dict[tuple[str, str], str] = {
    ("FSP", ""): "a few elementwise operations",
    ("BinaryMapper", ""): "the probabilities of all codes are the output",
    ("EvoLFQ", ""): "all but the LFQ",
}

# Why an attribute or method of a layer is missing, by class and name.
WITHOUT: dict[tuple[str, str], str] = {
    ("LatentQuantize", "quantize_and_project"): "a helper of upstream's forward, which takes shapes of einops",
}

SEQUENCE, IMAGE = (2, 12), (3, 4)


def sequence(channels: int) -> tuple[int, ...]:
    return (*SEQUENCE, channels)


def image(channels: int) -> tuple[int, ...]:
    return (2, channels, *IMAGE)


def networks(library: Any) -> dict[str, Any]:
    return {"encoder": nn.Linear(5, 6), "decoder": nn.Linear(6, 5)}


def some(*shape: int) -> torch.Tensor:
    """A mask that is False here and there."""
    return torch.arange(prod(shape)).reshape(shape) % 3 != 1


def lfq(name: str, options: Any, shape: tuple[int, ...], call: dict[str, Any] | None = None, lr: float = 0.02) -> Case:
    """A case with an entropy loss. At upstream's default temperature, each step multiplies rounding errors by 400."""
    return Case(name, options, shape, {"inv_temperature": 5.0, **(call or {})}, lr=lr)


PROJECTED = {"dim": 7, "codebook_size": 16}

CASES += [
    Case("FSQ", {"levels": [8, 6, 5], "dim": 7, "projection_has_bias": False}, sequence(7)),
    Case("FSQ", {"levels": [8, 6, 5], "dim": 7, "num_codebooks": 2, "keep_num_codebooks_dim": True}, image(7)),
    Case("FSQ", {"levels": [8, 6, 5], "dim": 7, "scale": 2.0, "channel_first": True, "return_indices": False}, (2, 7, 12)),
    Case("FSQ", {"levels": [2, 3, 4], "dim": 5, "preserve_symmetry": True, "noise_dropout": 0.5}, sequence(5)),
    Case("FSQ", {"levels": [5, 5], "dim": 3, "bound_hard_clamp": True, "orthogonal_rotation": True}, sequence(3)),
    Case("FSQ", {"levels": [5, 5], "dim": 3, "allowed_dtypes": (torch.float32,), "force_quantization_f32": False}, sequence(3)),
    # LFQ
    lfq("LFQ", {**PROJECTED, "entropy_loss_weight": 0.2, "commitment_loss_weight": 0.3, "diversity_gamma": 2.0}, sequence(7)),
    lfq("LFQ", {**PROJECTED, "straight_through_activation": nn.Tanh(), "num_codebooks": 2, "keep_num_codebooks_dim": True}, image(7)),
    lfq("LFQ", {**PROJECTED, "codebook_scale": 0.5, "soft_clamp_input_value": 1.5, "frac_per_sample_entropy": 0.6}, sequence(7)),
    lfq("LFQ", {"codebook_size": 16, "has_projections": True, "projection_has_bias": False, "channel_first": True}, (2, 4, 12)),
    lfq("LFQ", {**PROJECTED, "cosine_sim_project_in": True, "cosine_sim_project_in_scale": 2.0}, sequence(7)),
    lfq("LFQ", {**PROJECTED, "experimental_softplus_entropy_loss": True, "entropy_loss_offset": 3.0}, sequence(7)),
    lfq("LFQ", {**PROJECTED, "spherical": True, "orthogonal_rotation": True}, sequence(7), {"return_loss_breakdown": True}, lr=0.01),
    lfq("LFQ", {**PROJECTED, "commitment_loss_weight": 0.3, "force_quantization_f32": False}, image(7), {"mask": some(2)}),
    # ResidualFSQ
    Case("ResidualFSQ", {"levels": [5, 5, 4], "num_quantizers": 3, "dim": 7}, sequence(7), {"return_all_codes": True}),
    Case("ResidualFSQ", {"levels": [8, 5], "num_quantizers": 2, "dim": 7, "is_channel_first": True}, image(7)),
    Case(
        "ResidualFSQ",
        {"levels": [5, 5, 4], "num_quantizers": 2, "bound_hard_clamp": False, "soft_clamp_input_value": [1.5, 1.5, 2.0]},
        sequence(3),
    ),
    Case(
        "ResidualFSQ",
        {
            "levels": [5, 4],
            "num_quantizers": 6,
            "dim": 7,
            "quantize_dropout": True,
            "quantize_dropout_cutoff_index": 1,
            "quantize_dropout_multiple_of": 2,
        },
        sequence(7),
        lambda step: {"rand_quantize_dropout_fixed_seed": step},
    ),
    Case(
        "GroupedResidualFSQ",
        {"dim": 8, "groups": 2, "levels": [5, 5, 4], "num_quantizers": 3, "quantize_dropout": True},
        sequence(8),
        {"return_all_codes": True},
    ),
    Case(
        "GroupedResidualFSQ",
        {"dim": 8, "groups": 2, "accept_image_fmap": True, "is_channel_first": True, "levels": [5, 5, 4], "num_quantizers": 2},
        image(8),
    ),
    # ResidualLFQ
    Case(
        "ResidualLFQ",
        {**PROJECTED, "num_quantizers": 3, "soft_clamp_input_value": 2.0},
        sequence(7),
        {"mask": some(2), "return_all_codes": True},
    ),
    Case(
        "ResidualLFQ",
        {
            **PROJECTED,
            "num_quantizers": 6,
            "quantize_dropout": True,
            "quantize_dropout_cutoff_index": 1,
            "quantize_dropout_multiple_of": 2,
        },
        sequence(7),
        lambda step: {"rand_quantize_dropout_fixed_seed": step},
    ),
    Case(
        "GroupedResidualLFQ",
        {"dim": 8, "groups": 2, "codebook_size": 8, "num_quantizers": 3, "quantize_dropout": True},
        sequence(8),
        {"mask": some(2), "return_all_codes": True},
    ),
    Case("GroupedResidualLFQ", {"dim": 8, "groups": 2, "accept_image_fmap": True, "codebook_size": 16, "num_quantizers": 2}, image(8)),
    # FSP
    Case("FSP", {"levels": [5, 4, 3], "dim": 7, "projection_has_bias": False, "quantize_rate": 0.4}, sequence(7)),
    Case("FSP", {"levels": [5, 4, 3], "channel_first": True, "need_inv_act": True, "act_name": "normal"}, image(3), {"eps": 1e-3}),
    *(
        Case("FSP", {"levels": [5, 4], "act_name": name, "quantize_rate": 1.0, "vector_norm": norm}, sequence(2))
        for name, norm in (("sigmoid", "var_sigmoid"), ("laplace", "var_laplace"), ("cauchy", "kurt"), ("tanh", "var"), ("normal", "none"))
    ),
    *(
        Case("FSP", {"levels": [5, 4], "act_name": name, "need_inv_act": True}, sequence(2))
        for name in ("tanh", "sigmoid", "laplace", "cauchy")
    ),
    # LatentQuantize
    Case("LatentQuantize", {"levels": [5, 4], "dim": 7, "commitment_loss_weight": 0.3, "quantization_loss_weight": 0.2}, image(7)),
    Case("LatentQuantize", {"levels": [5, 4], "dim": 7, "num_codebooks": 2, "keep_num_codebooks_dim": True}, (2, 7, 12)),
    Case("LatentQuantize", {"levels": 4, "codebook_dim": 3, "dim": 7, "optimize_values": False}, (6, 7)),
    Case(
        "LatentQuantize",
        {"levels": [5, 4], "dim": 2, "in_place_codebook_optimizer": partial(torch.optim.SGD, lr=0.1)},
        (2, 2, 12),
        fails=AttributeError,
    ),
    # BinaryMapper
    Case("BinaryMapper", {"bits": 4, "kl_loss_threshold": 0.01}, sequence(4), {"temperature": 0.5, "return_indices": True}),
    Case("BinaryMapper", {"bits": 3, "deterministic_on_eval": True}, sequence(3), {"deterministic": True, "calc_aux_loss": True}),
    Case("BinaryMapper", {"bits": 3}, sequence(3), {"straight_through": False, "reduce_aux_kl_loss": False}),
    # EvoLFQ
    lfq("EvoLFQ", lambda library: {**networks(library), "lfq": library.LFQ(dim=6, codebook_size=8), "pop_size": 8}, sequence(5)),
    lfq(
        "EvoLFQ",
        lambda library: {
            **networks(library),
            "dim": 6,
            "codebook_size": 8,
            "num_codebooks": 2,
            "mutation_rate": 0.1,
            "tournament_size": 3,
            "elitism_count": 2,
            "generations": 5,
        },
        (12, 5),
    ),
]
