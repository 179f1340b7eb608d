# SPDX-License-Identifier: Apache-2.0
"""Statistics of training steps that wait for an update of the codebook.

They are no buffers, which DistributedDataParallel would overwrite with those of rank 0. A state dict holds them only while
there are any, so that other checkpoints keep their keys.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Pending(NamedTuple):
    """What a layer gathers for the next update. No tensor is written in place."""

    counts: Tensor
    """[codebooks, K], the sum over the steps."""
    sums: Tensor
    """[codebooks, K, D], the sum over the steps."""
    vectors: Tensor | None = None
    """Of the last step, [..., outer, D, inner], for dead-code replacement."""
    indices: Tensor | None = None
    """Of the last step, [..., outer, inner, ...]; -1 for vectors that may not replace a code."""


def add_step(pending: Pending | None, counts: Tensor, sums: Tensor, last: tuple[Tensor, Tensor] | tuple[()] = ()) -> Pending:
    """Add a training step; `last` are its vectors and indices, if the layer replaces dead codes."""
    if pending is not None:
        counts, sums = pending.counts + counts, pending.sums + sums
    return Pending(counts, sums, *last)


def moved(pending: Pending | None, device: torch.device) -> Pending | None:
    """The statistics on the device of their layer; none on the meta device, where codes lose their values too."""
    if pending is None or device.type == "meta":
        return None
    counts, sums, *last = pending
    return Pending(counts.to(device), sums.to(device), *(None if t is None else t.to(device) for t in last))


def save_pending(pending: Pending | None, state_dict: dict[str, Any], prefix: str) -> None:
    """Add the statistics to the state dict of the layer, as pending.counts, pending.sums, ..."""
    for name, value in ({} if pending is None else pending._asdict()).items():
        if value is not None:
            state_dict[f"{prefix}pending.{name}"] = value.detach()


def pop_pending(state_dict: dict[str, Any], prefix: str) -> dict[str, Tensor]:
    """Remove the statistics from a state dict that is being loaded, as torch does not know their keys."""
    keys = {name: f"{prefix}pending.{name}" for name in Pending._fields}
    return {name: state_dict.pop(key) for name, key in keys.items() if key in state_dict}


def load_pending(
    found: dict[str, Tensor], counts: Tensor, sums: Tensor, *, replaces: bool, prefix: str, errors: list[str]
) -> Pending | None:
    """Copies of the statistics from a state dict, for a layer with averages `counts` and `sums`; None if there are none.

    Args:
        replaces: whether the layer replaces dead codes, and so needs the last step.
        errors: gets a sentence for each tensor that does not fit.
    """
    if not found or counts.is_meta:
        return None
    before = len(errors)
    for name, average in (("counts", counts), ("sums", sums)):
        shape = list(found[name].shape) if name in found else None
        if shape is None or found[name].numel() != average.numel():
            errors.append(f"{prefix}pending.{name} must have the shape of the averages, {list(average.shape)}, got {shape}.")
    vectors, indices = found.get("vectors"), found.get("indices")
    if (vectors is None) != (indices is None):
        errors.append(f"{prefix}pending.vectors and {prefix}pending.indices must be given together.")
    elif vectors is not None and indices is not None:
        expected = [*vectors.shape[:-2], *vectors.shape[-1:]]
        if vectors.dim() != 4 or vectors.shape[2] != sums.shape[-1] or list(indices.shape[:3]) != expected:
            shapes = f"{list(vectors.shape)} and {list(indices.shape)}"
            errors.append(
                f"{prefix}pending.vectors and {prefix}pending.indices must fit codes of {sums.shape[-1]} dimensions, got {shapes}."
            )
    if len(errors) > before:
        return None
    last = {name: found[name].to(sums.device, copy=True) for name in ("vectors", "indices") if replaces and name in found}
    return Pending(found["counts"].to(counts, copy=True), found["sums"].to(sums, copy=True), **last)
