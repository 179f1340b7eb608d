# SPDX-License-Identifier: Apache-2.0
"""Options of the classes of vector-quantize-pytorch that have a codebook.

VectorQuantize, ResidualVQ, GroupedResidualVQ, RandomProjectionQuantizer, SimVQ, ResidualSimVQ, HierarchicalVQ, Sequential.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vqp_case import Case

CASES: list[Case] = []

# Why an option is missing in genperf, by class and option; a class that is missing has the option "".
UNSUPPORTED: dict[tuple[str, str], str] = {}

# How an option differs from upstream's; with the option "", the class.
DIFFERS: dict[tuple[str, str], str] = {
    ("VectorQuantize", "kmeans_init"): "other random vectors to start from; a code without vectors stays in place",
    ("VectorQuantize", "sync_kmeans"): "k-means is synchronized whenever the codebook is",
    ("VectorQuantize", "sync_codebook"): "None means True, and is decided at each step",
    ("VectorQuantize", "threshold_ema_dead_code"): "replacements at evenly spaced positions of the batch",
    ("VectorQuantize", "stochastic_sample_codes"): "the noise is drawn by a kernel",
    ("VectorQuantize", "straight_through"): "differentiated at the codes from before the EMA step",
    ("VectorQuantize", "commitment_use_cross_entropy_loss"): "differentiated at the codes from before the EMA step",
    ("VectorQuantize", "codebook_diversity_loss_weight"): "one mean distribution for each codebook, without padding",
    ("VectorQuantize", "mask"): "works with projections, heads and images; the loss compares what was quantized",
    ("VectorQuantize", "vq_bridge"): "indices are decoded through it",
    ("VectorQuantize", "affine_param"): "indices are decoded with its statistics",
    ("VectorQuantize", "ema_update_weight"): "a function receives the accumulated statistics",
    ("VectorQuantize", "codebook_transform_fn"): "one head, or separate codebooks",
    ("ResidualVQ", "accept_image_fmap"): "works; upstream raises an error",
    ("ResidualVQ", "indices"): "works; upstream raises an error",
    ("ResidualVQ", "beam_size"): "the EMA of every quantizer moves; upstream 1.32 moves that of the first",
    ("ResidualVQ", "freeze_codebook"): "also in the constructor; also after a beam search",
    ("ResidualVQ", "diveq"): "noise in training only",
    ("GroupedResidualVQ", "accept_image_fmap"): "works; upstream raises an error",
    ("GroupedResidualVQ", "indices"): "works; upstream raises an error",
    ("ResidualSimVQ", "quantize_dropout"): "works for images with channels last",
    ("Sequential", ""): "EvoLFQ counts as a quantizer",
}

# Options that are supported without a kernel; with the option "", the class.
PLAIN: dict[tuple[str, str], str] = {
    ("VectorQuantize", "straight_through"): "the softmax in chunks",
    ("VectorQuantize", "vq_bridge"): "the module itself",
    ("VectorQuantize", "affine_param"): "the statistics",
    ("VectorQuantize", "codebook_transform_fn"): "the codes of every vector are stored",
    ("ResidualVQ", "implicit_neural_codebook"): "the networks, in chunks",
    ("HierarchicalVQ", ""): "all but the quantizers",
}

# Why an attribute or method of a layer is missing, by class and name.
WITHOUT: dict[tuple[str, str], str] = {
    ("VectorQuantize", "maybe_split_heads_from_input"): "a helper of upstream's forward, which takes shapes of einops",
    ("VectorQuantize", "zero"): "a constant of upstream's forward",
    **{
        ("HierarchicalVQ", name): "a layer of einops without parameters"
        for name in (
            *("to_channel_first", "to_channel_last", "mask_to_channel", "mask_from_channel"),
            *("flatten_spatial", "flatten_indices", "unflatten_spatial", "indices_to_spatial"),
        )
    },
}

DIM, CODES = 8, 16
SEQUENCE, IMAGE, VOLUME = (2, 12, DIM), (2, DIM, 3, 4), (2, DIM, 2, 3, 2)
MASK = torch.arange(12) < torch.tensor([[12], [7]])

LEARNED = {"learnable_codebook": True, "ema_update": False}
# With an EMA, upstream differentiates the softmax at the codes from after the update.
FIXED = {"ema_update": False}
SOFT = {"straight_through": True, "rotation_trick": False, "route_gradients_to_input": False, **FIXED}
IN_PLACE = {**LEARNED, "in_place_codebook_optimizer": partial(torch.optim.SGD, lr=0.3)}
SEPARATE = {"heads": 2, "codebook_dim": 3, "separate_codebook_per_head": True}
DROPOUT = {"quantize_dropout": True}
NOISE = "random numbers are drawn in another order"


def vq(options: dict[str, Any] | None = None, shape: tuple[int, ...] = SEQUENCE, call: Any = None, **others: Any) -> Case:
    return Case("VectorQuantize", {"dim": DIM, "codebook_size": CODES, **(options or {})}, shape, call or {}, **others)


def residual(options: dict[str, Any] | None = None, shape: tuple[int, ...] = SEQUENCE, call: Any = None, **others: Any) -> Case:
    return Case("ResidualVQ", {"dim": DIM, "codebook_size": CODES, "num_quantizers": 3, **(options or {})}, shape, call or {}, **others)


def grouped(options: dict[str, Any], shape: tuple[int, ...] = SEQUENCE, call: Any = None, **others: Any) -> Case:
    options = {"dim": DIM, "groups": 2, "codebook_size": CODES, "num_quantizers": 2, **options}
    return Case("GroupedResidualVQ", options, shape, call or {}, **others)


def sim(options: dict[str, Any], shape: tuple[int, ...] = SEQUENCE, call: Any = None) -> Case:
    return Case("ResidualSimVQ", {"dim": DIM, "codebook_size": CODES, "num_quantizers": 4, **options}, shape, call or {}, lr=0.01)


def hierarchical(options: dict[str, Any], shape: tuple[int, ...] = (2, DIM, 12), call: Any = None, **others: Any) -> Case:
    fixed = {"kmeans_init": False, "threshold_ema_dead_code": 0} if not others else {}
    options = {"dim": DIM, "codebook_size": CODES, "scales": (1, 3, 12), **fixed, **options}
    return Case("HierarchicalVQ", options, shape, call or {}, **others)


def projection(shape: tuple[int, ...], codebook_size: int, num_codebooks: int, call: Any = None) -> Case:
    options = {"dim": DIM, "codebook_size": codebook_size, "codebook_dim": 4, "num_codebooks": num_codebooks, "norm": num_codebooks > 1}
    return Case("RandomProjectionQuantizer", options, shape, call or {})


def scaled(codes: Tensor) -> Tensor:  # [h, K, D] -> [h, 2, 12, K, D]
    """Codes of each vector of a sequence."""
    return codes[:, None, None] * torch.linspace(0.5, 1.5, 24).view(1, 2, 12, 1, 1)


def heavier(sums: Tensor, counts: Tensor) -> Tensor:
    return counts / (counts + 1)


def with_bridge(library: Any) -> dict[str, Any]:
    return {"dim": DIM, "codebook_size": CODES, "vq_bridge": nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh())}


CASES += [
    # Layouts, heads, projections
    vq({"eps": 1e-3, "decay": 0.9, "channel_last": False}, (2, DIM, 12)),
    vq({**SEPARATE, "accept_image_fmap": True, "layernorm_after_project_in": True}, IMAGE, lr=0.01),
    vq({"accept_3d_fmap": True, "use_cosine_sim": True}, VOLUME),
    vq({"return_zeros_for_masked_padding": False}, call={"mask": MASK}),
    vq({"sync_codebook": False}, call={"lens": torch.tensor([12, 5])}),
    # What moves the codes
    vq({"decay": 1.0, "commitment_weight": 0.5}),
    vq({"manual_ema_update": True}),
    vq({"freeze_codebook": True}, call=lambda step: {"freeze_codebook": step % 2 == 0}),
    vq(call=lambda step: {"ema_update_weight": heavier, "ema_update": None}),
    vq(call=lambda step: {"accum_ema_update": step % 4 < 3}),
    vq({**LEARNED, "sync_update_v": 0.3, "orthogonal_reg_weight": 0.5, "orthogonal_reg_active_codes_only": True}),
    vq({"orthogonal_reg_weight": 0.5, "orthogonal_reg_max_codes": 6}, unequal=NOISE),
    vq({"kmeans_init": True, "kmeans_iters": 3, "sync_kmeans": False}, (64, DIM), unequal=NOISE),
    vq({"threshold_ema_dead_code": 1}, (64, DIM), unequal=NOISE),
    vq({"directional_reparam": True, "directional_reparam_variance": 0.0, "threshold_ema_dead_code": 1e-9}),
    Case("VectorQuantize", with_bridge, SEQUENCE),
    # In-place optimizer
    vq(IN_PLACE),
    vq({**IN_PLACE, "threshold_ema_dead_code": 1e-9}, call={"mask": MASK}),
    vq({**IN_PLACE, **SEPARATE, "manual_in_place_optimizer_update": True}),
    # Affine parameters
    vq({"affine_param": True}, call={"return_loss_breakdown": True}),
    vq({"affine_param": True, "affine_param_batch_decay": 0.7, "affine_param_codebook_decay": 0.6}, call={"mask": MASK}),
    vq({**IN_PLACE, **SEPARATE, "affine_param": True}),
    vq({"affine_param": True, "sync_affine_param": True}, fails=ValueError),
    # Softmax over the codes
    vq({**FIXED, "commitment_use_cross_entropy_loss": True}),
    vq({**FIXED, "codebook_diversity_loss_weight": 0.5, "codebook_diversity_temperature": 10.0}, (24, DIM)),
    vq(LEARNED, call={"indices": torch.arange(24).reshape(2, 12) % CODES}),
    vq({"stochastic_sample_codes": True, "sample_codebook_temp": 0.5}, call={"sample_codebook_temp": 0.1}, unequal=NOISE),
    vq({**SOFT, "sample_codebook_temp": 0.7}),
    vq({**SOFT, "use_cosine_sim": True, "heads": 2, "codebook_dim": 3}),
    vq({**SOFT, "orthogonal_reg_weight": 1.0, "accept_image_fmap": True}, IMAGE),
    vq({"straight_through": True, "rotation_trick": False, "stochastic_sample_codes": True}, unequal=NOISE),
    # Several codes
    vq({"return_zeros_for_masked_padding": False}, call={"topk": 3, "mask": MASK}),
    vq({**LEARNED, "orthogonal_reg_weight": 1.0}, call={"topk": 3, "return_loss_breakdown": True}),
    vq({"use_cosine_sim": True, "channel_last": False}, (2, DIM, 12), {"topk": 30}),
    vq({"accept_image_fmap": True}, IMAGE, {"topk": 3}),
    vq({"accept_3d_fmap": True, "affine_param": True, "rotation_trick": False}, VOLUME, {"topk": 3}),
    vq({"channel_last": False, "commitment_weight": 0.0}, (12, DIM), {"topk": 3}),
    vq({"stochastic_sample_codes": True}, call={"topk": 3}, unequal=NOISE),
    # Codes of each vector
    vq(LEARNED, call={"codebook_transform_fn": scaled, "mask": MASK}),
    vq({"use_cosine_sim": True}, call={"codebook_transform_fn": scaled, "topk": 2}),
    vq({**LEARNED, **SEPARATE, "commitment_use_cross_entropy_loss": True}, call={"codebook_transform_fn": scaled}),
    vq({**SOFT, **SEPARATE}, call={"codebook_transform_fn": scaled}),
    # ResidualVQ
    residual({"return_zeros_for_masked_padding": False, "heads": 1}, call={"mask": MASK}),
    residual({"codebook_dim": 4, "quant_grad_frac": 0.3, "use_cosine_sim": True}, call={"freeze_codebook": True}),
    residual({"shared_codebook": True, "affine_param": True}, call={"sample_codebook_temp": 0.5}),
    residual({"diveq": True}, unequal="the directions of noise"),
    residual(
        {"quantize_dropout": True, "quantize_dropout_cutoff_index": 1, "quantize_dropout_multiple_of": 3, "num_quantizers": 6},
        call=lambda step: {"rand_quantize_dropout_fixed_seed": step},
    ),
    residual(IN_PLACE),
    residual({"accept_image_fmap": True}, IMAGE, fails=RuntimeError),
    # Upstream only fails unless height, width and channels are equal.
    residual({"dim": 4, "accept_image_fmap": True, "use_cosine_sim": True}, (2, 4, 4, 4)),
    residual({"channel_last": False}, (2, DIM, 12), fails=RuntimeError),
    residual({"accept_3d_fmap": True, "beam_size": 2}, VOLUME, fails=RuntimeError),
    residual(call={"indices": torch.arange(72).reshape(2, 12, 3) % CODES}, fails=ValueError),
    residual({**FIXED, "beam_size": 3, "eval_beam_size": 2, "beam_score_quantizer_weights": [1.0, 0.5, 2.0]}, call={"mask": MASK}),
    residual({**FIXED, "beam_size": 3, "codebook_dim": 4, "quantize_dropout": True}, call={"return_all_codes": True}),
    residual({"shared_codebook": True, "use_cosine_sim": True, **FIXED}, call={"beam_size": 2}),
    residual({**LEARNED, "quant_grad_frac": 0.5}, (12, DIM), {"beam_size": 2}),
    residual({"implicit_neural_codebook": True}, call={"return_all_codes": True}, lr=0.01),
    residual(
        {
            "implicit_neural_codebook": True,
            "mlp_kwargs": {"depth": 2, "dim_hidden": 5},
            "quantize_dropout": True,
            "codebook_size": (5, 6, 7),
        },
        call=lambda step: {"rand_quantize_dropout_fixed_seed": step, "return_all_codes": True},
        lr=0.01,
    ),
    residual({"implicit_neural_codebook": True, "commitment_use_cross_entropy_loss": True}, lr=0.01),
    residual({"implicit_neural_codebook": True, "beam_size": 2}, fails=RuntimeError),
    # GroupedResidualVQ
    grouped({"quantize_dropout": True}, call={"mask": MASK, "return_all_codes": True, "freeze_codebook": False}),
    grouped({"sample_codebook_temp": 0.5}, call={"sample_codebook_temp": 0.3}),
    grouped({"accept_image_fmap": True}, IMAGE, fails=RuntimeError),
    grouped({}, call={"indices": torch.arange(96).reshape(2, 2, 12, 2) % CODES}, fails=ValueError),
    # RandomProjectionQuantizer
    projection(SEQUENCE, CODES, 1),
    projection(SEQUENCE, CODES, 3),
    projection(SEQUENCE, CODES, 2, {"indices": torch.arange(48).reshape(2, 12, 2) % CODES}),
    # SimVQ, ResidualSimVQ
    Case("SimVQ", {"dim": DIM, "codebook_size": CODES, "channel_first": True, "init_fn": torch.neg, "frozen_codebook_dim": 5}, IMAGE),
    Case(
        "SimVQ",
        lambda library: {
            "dim": DIM,
            "codebook_size": CODES,
            "codebook_transform": nn.Sequential(nn.Linear(DIM, 6), nn.ReLU(), nn.Linear(6, DIM)),
            "rotation_trick": False,
            "commitment_weight": 0.7,
            "input_to_quantize_commit_loss_weight": 0.4,
        },
        SEQUENCE,
    ),
    sim({"heads": 1}, call={"return_all_codes": True}),
    sim({"channel_first": True, "rotation_trick": False, "commitment_weight": 0.5}, IMAGE, {"return_all_codes": True}),
    sim(
        {"quantize_dropout": True, "quantize_dropout_cutoff_index": 1, "quantize_dropout_multiple_of": 2},
        call=lambda step: {"rand_quantize_dropout_fixed_seed": step},
    ),
    # HierarchicalVQ
    hierarchical({"decay": 0.9, "commitment_weight": 0.5, "sync_codebook": False}, call={"indices": None}),
    hierarchical({"channel_first": False, "rotation_trick": True}, SEQUENCE, {"lens": torch.tensor([12, 5]), "sample_codebook_temp": 0.5}),
    hierarchical(
        {"accept_image_fmap": True, "scales": (1, (2, 3), (3, 4)), "shared_codebook": False, "codebook_size": (8, 12, 16)},
        IMAGE,
        {"mask": MASK.reshape(2, 3, 4)},
    ),
    hierarchical({"accept_3d_fmap": True, "scales": (1, 2), "share_quant_resi": 0, "quant_resi": 0.3}, VOLUME),
    hierarchical({"nested_dropout": 0.7, "nested_dropout_min_levels": 1, "share_quant_resi": 2}, call={"return_cutoff": True}),
    hierarchical(
        {
            "kmeans_init": True,
            "kmeans_iters": 3,
            "threshold_ema_dead_code": 2,
            "stochastic_sample_codes": True,
            "sample_codebook_temp": 0.2,
            "orthogonal_reg_weight": 0.5,
            "orthogonal_reg_max_codes": 6,
            "orthogonal_reg_active_codes_only": True,
        },
        (8, DIM, 12),
        unequal=NOISE,
    ),
    # Sequential
    Case("Sequential", {}, SEQUENCE, arguments=lambda library: [nn.Linear(DIM, DIM), library.SimVQ(DIM, CODES), nn.Linear(DIM, 3)]),
]
