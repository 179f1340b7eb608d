# SPDX-License-Identifier: Apache-2.0
"""Codebooks that a layer cannot simply write to: parameters that FSDP2 shards, and tensors that are computed from others.

`torch.distributed.fsdp.fully_shard` gathers a parameter for forward, and keeps a shard of it, a DTensor, for the optimizer and
the state dict. The gathered parameter is dropped after forward or backward, with everything that forward has written into it.
So what a layer writes (initial codes, replaced dead codes, EMA codes) is copied to the shard of this rank in the same moment.
"""

import itertools
import sys
import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .._distributed import world_size

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# The parameter of a layer when it was looked up, and what FSDP2 keeps of it (an FSDPParam), or None.
_found: "weakref.WeakKeyDictionary[nn.Module, tuple[weakref.ref[Tensor], weakref.ref[Any] | None]]" = weakref.WeakKeyDictionary()


def writable_codes(layer: nn.Module, name: str) -> tuple[Tensor, Callable[[], None]]:
    """The codebook `layer.<name>` to write in place, and a function to call after that, which stores what was written.

    Without FSDP2 it is the codebook itself. Otherwise every rank must write the same codes. Outside of forward, where the
    layer only has a shard, the codebook is gathered, and every rank must call this. A codebook that is computed from other
    tensors is written to them, by the right_inverse of its parametrization.
    """
    if name not in layer._parameters and name not in layer._buffers and not vars(layer).keys() & {"_is_replica", "_is_fsdp_managed_module"}:
        return _computed_codes(layer, name)
    if not torch.compiler.is_compiling():
        return _writable_codes(layer, name)
    if not hasattr(layer, "_is_fsdp_managed_module"):
        return getattr(layer, name), _nothing
    from ._outside_compile import writable_sharded_codes

    return writable_sharded_codes(layer, name)


def _computed_codes(layer: nn.Module, name: str) -> tuple[Tensor, Callable[[], None]]:
    if not is_parametrized(layer, name):
        raise RuntimeError(
            f"{type(layer).__name__}: codes cannot be written to {name}, which a hook computes from other tensors, got an attribute that "
            f"is neither a parameter nor a buffer. Use torch.nn.utils.parametrize, with a right_inverse."
        )
    codes = getattr(layer, name).detach().clone()
    return codes, partial(setattr, layer, name, codes)


def _writable_codes(layer: nn.Module, name: str) -> tuple[Tensor, Callable[[], None]]:
    codebook = getattr(layer, name)
    shard = _shard_of(layer, name, codebook)
    return (codebook, _nothing) if shard is None else _gathered_codes(codebook, shard)


@torch.no_grad()
def _gathered_codes(codebook: Tensor, shard: "DTensor") -> tuple[Tensor, Callable[[], None]]:
    if is_dtensor(codebook):
        codes = codebook.full_tensor()
        # With an integer reshard_after_forward the layer has another shard than the optimizer until backward.
        return codes, partial(_store, [shard] if shard is codebook else [shard, codebook], codes)
    if shard.dtype == codebook.dtype:
        return codebook, partial(_store, [shard], codebook)
    # A MixedPrecisionPolicy gathers the codes in half precision; those that stay must not be rounded.
    codes = codebook.to(shard.dtype)
    return codes, partial(_store_changed, shard, codebook, codes, codes.clone())


def is_dtensor(t: Tensor) -> "TypeGuard[DTensor]":
    """Whether t is a DTensor. Does not import torch.distributed.tensor."""
    if type(t) in (Tensor, nn.Parameter):
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def whole(codebook: Tensor) -> Tensor:
    """The codebook, gathered from all ranks if it is sharded; then every rank must call this."""
    return codebook.full_tensor() if is_dtensor(codebook) else codebook


def check_gathered(name: str, codebook: Tensor) -> None:
    """Raise a RuntimeError for a codebook of which this rank only has a shard."""
    if is_dtensor(codebook):
        raise RuntimeError(
            f"{name}: the codebook must be whole, got a DTensor with placements {codebook.placements}. FSDP2 gathers it for forward of "
            f"the module given to fully_shard, and for methods of that module that are named by register_fsdp_forward_method."
        )


def _shard_of(layer: nn.Module, name: str, codebook: Tensor) -> "DTensor | None":
    """The DTensor that FSDP2 keeps of a parameter, whichever module was given to fully_shard; None if it keeps none."""
    states = getattr(sys.modules.get("torch.distributed._composable_state"), "_module_state_mapping", None)
    if states and name in layer._parameters:
        known, managed = _found.get(layer, (None, None))
        if known is None or known() is not codebook:
            managed = _find(layer, name, states)
            _found[layer] = weakref.ref(codebook), managed
        kept = None if managed is None else managed()
        if kept is not None:  # with functional_call, the layer has a plain tensor in place of the gathered parameter
            return kept.sharded_param if isinstance(codebook, nn.Parameter) else None
    if is_dtensor(codebook):
        return codebook
    flattened = "_is_fsdp_managed_module" in vars(layer) and not isinstance(codebook, nn.Parameter) and name not in layer._buffers
    if flattened and world_size() > 1:
        raise RuntimeError(
            f"{type(layer).__name__}: codes cannot be written to a codebook that FullyShardedDataParallel flattens, got "
            f"{name} of shape {list(codebook.shape)}. Pass it as ignored_states, or use fully_shard."
        )
    return None


def _find(layer: nn.Module, name: str, states: Any) -> "weakref.ref[Any] | None":
    # torch has no public way from a gathered parameter to its shard.
    try:
        for state in {reference() for reference in states.values()}:
            groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
            for kept in itertools.chain.from_iterable(group.fsdp_params for group in groups if group is not None):
                info = kept._module_info
                owners = zip([info.module, *info.shared_modules], [info.param_name, *info.shared_param_names], strict=True)
                if any(module is layer and parameter == name for module, parameter in owners):
                    return weakref.ref(kept)
    except AttributeError as e:
        raise RuntimeError(
            f"{type(layer).__name__}: codes cannot be written to a sharded codebook with this version of torch, "
            f"got {torch.__version__}. Leave the codebook out of fully_shard with ignored_params."
        ) from e
    return None


@torch.no_grad()
def _store(shards: "list[DTensor]", codes: Tensor) -> None:
    for shard in shards:
        shard.to_local().copy_(_local(codes, shard))


@torch.no_grad()
def _store_changed(shard: "DTensor", codebook: Tensor, codes: Tensor, before: Tensor) -> None:
    changed = (codes != before).any(-1, keepdim=True).expand_as(codes)
    own = shard.to_local()
    own.copy_(torch.where(_local(changed, shard).to(own.device), _local(codes, shard).to(own.device), own))
    codebook.copy_(codes)


def _local(t: Tensor, like: "DTensor") -> Tensor:
    """The part of t on this rank, as `like` is sharded; without communication."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(t.detach(), like.device_mesh, like.placements, src_data_rank=None).to_local()


def _nothing() -> None: ...
