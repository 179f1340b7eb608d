# SPDX-License-Identifier: Apache-2.0
"""State of layers pickled by earlier releases, with attributes renamed as they are now; for `__setstate__`."""

from typing import Any

from torch import Tensor

from .nn._pending import Pending
from .nn._recompute import StepMemory

# Attributes of genperf.nn.VectorQuantizer and ResidualVectorQuantizer.
_LAYER = {
    "revive_below": "replace_dead_below",
    "num_levels": "num_quantizers",
    "level_dropout": "quantizer_dropout",
    "dropout_min_levels": "dropout_min_quantizers",
    "_awaits_data": "_needs_init",
}
# Attributes of the drop-in VectorQuantize that used to belong to its codebook.
_HELD_BY_CODEBOOK = {
    "learnable_codebook": "learnable_codebook",
    "commitment_weight": "commitment_weight",
    "commits_by_cross_entropy": "commitment_use_cross_entropy_loss",
    "diversity_weight": "codebook_diversity_loss_weight",
    "diversity_temperature": "codebook_diversity_temperature",
    "orthogonal_weight": "orthogonal_reg_weight",
    "orthogonal_used_only": "orthogonal_reg_active_codes_only",
    "orthogonal_max_codes": "orthogonal_reg_max_codes",
    "sample_temperature": "sample_codebook_temp",
    "sync_update_v": "sync_update_v",
    "route_gradients": "route_gradients_to_input",
}


def _pending(counts_and_sums: tuple[Tensor, Tensor] | None) -> Pending | None:
    return None if counts_and_sums is None else Pending(*counts_and_sums)


def quantizer_state(state: dict[str, Any]) -> dict[str, Any]:
    """State of a `VectorQuantizer` or `ResidualVectorQuantizer` of genperf.nn."""
    if "_awaits_data" not in state:
        return state
    state = {_LAYER.get(name, name): value for name, value in state.items()}
    usage_decay = state.pop("_usage_decay")
    state["usage_decay"] = usage_decay if state["decay"] is None else state["decay"]
    # A layer pickled between a step and its update replaces no dead codes in that update.
    del state["_vectors"]
    state["pending"] = _pending(state.pop("_pending"))
    buffers, parameters = dict(state["_buffers"]), state["_parameters"]
    if bool(buffers.pop("_no_codes", False)):  # which zeros stand for now
        codebook = buffers["codebook"] if "codebook" in buffers else parameters["codebook"].detach()
        codebook.zero_()
    return {**state, "_buffers": buffers, "_non_persistent_buffers_set": set(), "_written": None, "_steps": StepMemory()}


def codebook_state(state: dict[str, Any]) -> dict[str, Any]:
    """State of the `Codebook` of a drop-in `VectorQuantize`."""
    if "_awaits_data" not in state:
        return state
    return {
        **state,
        "num_codebooks": len(state["_buffers"]["cluster_size"]),
        "codebook_size": state["num_codes"],
        "dim": state["code_dim"],
        "decay": state["_usage_decay"],
        "kmeans_init": state["init"] == "kmeans",
        "kmeans_iters": state["init_iterations"],
        "threshold_ema_dead_code": state["revive_below"],
        "needs_init": state["_awaits_data"],
        "pending": _pending(state["_pending"]),
        "_written": None,
    }


def vector_quantize_state(state: dict[str, Any]) -> dict[str, Any]:
    """State of a drop-in `VectorQuantize`, whose codebook is unpickled first."""
    if "commitment_weight" in state:
        return state
    held = vars(state["_modules"]["_codebook"])
    variance = held["directional_variance"]
    return {
        **state,
        **{new: held[old] for old, new in _HELD_BY_CODEBOOK.items()},
        "use_cosine_sim": held["metric"] == "cosine",
        "rotation_trick": held["gradient"] == "rotation",
        "_steps": StepMemory(),
        "directional_reparam": variance is not None,
        "directional_reparam_variance": 5e-3 if variance is None else variance,
    }
