# SPDX-License-Identifier: Apache-2.0
"""Walk a model and replace its quantizers."""

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from .registry import UnsupportedError, find
from .report import Left, PatchReport, Replaced
from .swap import Step, apply, joined_class, undo

Only = str | Sequence[str] | Callable[[str, nn.Module], bool]

# Names of classes that are listed as left if nothing in them is known.
_QUANTIZER = re.compile(r"(Quanti[sz](er|ation|e)|Codebook|VQ|FSQ|LFQ|BSQ)\d*$")
_NOT_QUANTIZERS = ("torch", "genperf", "transformers.quantizers", "torchao", "bitsandbytes")


def patch(model: nn.Module, *, only: Only | None = None, dry_run: bool = False) -> PatchReport:
    """Replace every quantizer of a model that genperf knows, in place.

    Equivalent to (for each such module):
        module.__class__ = a subclass of type(module) with genperf's methods

    The modules stay the same objects with the same parameters, buffers, hooks and names, so the optimizer, EMA copies, DDP and
    checkpoints stay valid, `isinstance` holds, and copies and pickles of the model are patched too. Values are those of the
    unpatched model up to rounding, but for indices that upstream's float32 distances get wrong. `unpatch` restores the model.

    Known are vector-quantize-pytorch, the codecs, image tokenizers and wav2vec 2.0 quantizers of transformers, VQModel and the
    autoencoders of diffusers, encodec, descript-audio-codec, moshi and taming-transformers; none needs to be installed.
    docs/patch.md lists the classes and how they differ.

    Args:
        model: may be wrapped in DDP, DataParallel or FSDP. Call it before torch.compile, and before hooks of accelerate are added.
        only: a qualified name or names to restrict it to, with `*` for any characters; a name selects what is below it too. Or a
            function of name and module that says whether to replace a quantizer.
        dry_run: change nothing, and report what would be done.

    Returns:
        what was replaced, and what was left, with the reason.

    Raises:
        TypeError: model is no nn.Module.
        ValueError: a compiled, scripted or traced model, or an `only` that no module has.
    """
    _check(model)
    report = PatchReport(dry_run=dry_run)
    names = {id(module): name for name, module in model.named_modules()}
    selected = _selection(only, list(names.values()))
    handled: set[int] = set()
    parts: set[int] = set()
    planned: list[Step] = []
    unknown: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if id(module) in handled or not selected(name, module):
            continue
        known = find(module)
        if known is not None and known[1].is_quantizer:
            parts |= {id(part) for part in module.modules()}
        if joined_class(type(module)) is not None:
            if known is not None:  # otherwise a part of a quantizer
                report.left.append(Left(name, type(module).__name__, "it is replaced already"))
            continue
        if known is None:
            if id(module) not in parts and _looks_like_quantizer(module):
                unknown.append((name, module))
            continue
        upstream, adapter = known
        try:
            # Two modules may share a codebook, which is replaced once.
            steps = list({id(step.module): step for step in adapter.steps(module, upstream)}.values())
        except (UnsupportedError, NotImplementedError, TypeError, ValueError) as error:
            report.left.append(Left(name, type(module).__name__, str(error).rstrip(".")))
            continue
        steps = [step for step in steps if id(step.module) not in handled and joined_class(type(step.module)) is None]
        handled |= {id(step.module) for step in steps}
        planned += steps
    report.replaced = _rows(planned, names)
    report.left += [
        Left(name, type(module).__name__, "genperf does not know this class") for name, module in unknown if not _has_quantizer(module)
    ]
    if not dry_run:  # only once nothing can fail
        for step in planned:
            apply(step)
    return report


def unpatch(model: nn.Module) -> list[str]:
    """Restore what `patch` has replaced in a model.

    Returns:
        the qualified names of the restored quantizers.

    Raises:
        ValueError: a quantizer was sharded by fully_shard or parametrized after `patch`; nothing is restored.
    """
    found = [(name, module) for name, module in _modules(model) if joined_class(type(module)) is not None]
    for name, module in found:
        if type(module) is not joined_class(type(module)):
            raise ValueError(f"unpatch: {name or 'the model'} was sharded or parametrized after patch; undo that first.")
    for _, module in found:
        undo(module)
    return [name for name, module in found if find(module) is not None]


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"unpatch: model must be a torch.nn.Module, got {type(model).__name__}.")
    return model.named_modules()


def _rows(steps: Sequence[Step], names: dict[int, str]) -> list[Replaced]:
    rows = []
    for step in steps:
        known = find(step.module)
        if known is not None:  # otherwise a part of a quantizer, as its codebook
            rows.append(Replaced(names[id(step.module)], type(step.module).__name__, known[1].by))
    return rows


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch: model must be a torch.nn.Module, got {type(model).__name__}.")
    for name, module in model.named_modules():
        what = f"the model's {name}" if name else "the model"
        if isinstance(module, torch.jit.ScriptModule) and (name == "" or _scripted_quantizer(module)):
            raise ValueError(f"patch: {what} is scripted, so its code cannot be replaced; patch it before torch.jit.script.")
        if isinstance(module, torch.fx.GraphModule) and _has_quantizer(module):
            raise ValueError(f"patch: {what} is traced, so its code cannot be replaced; patch it before tracing.")
        if _is_compiled(module) and _has_quantizer(module):
            raise ValueError(f"patch: {what} is compiled, and would run the code of before; patch it before torch.compile.")


def _scripted_quantizer(module: torch.jit.ScriptModule) -> bool:
    """Whether a scripted module was made of a quantizer."""
    return any(_QUANTIZER.search(getattr(child, "original_name", "")) for child in module.modules())


def _is_compiled(module: nn.Module) -> bool:
    dynamo = sys.modules.get("torch._dynamo")  # an import takes a second, and nothing is compiled without it
    return module._compiled_call_impl is not None or (dynamo is not None and isinstance(module, dynamo.OptimizedModule))


def _has_quantizer(module: nn.Module) -> bool:
    return any(find(child) is not None for child in module.modules())


def _looks_like_quantizer(module: nn.Module) -> bool:
    cls = type(module)
    return _QUANTIZER.search(cls.__name__) is not None and not cls.__module__.startswith(_NOT_QUANTIZERS)


def _selection(only: Only | None, names: list[str]) -> Callable[[str, nn.Module], bool]:
    if only is None:
        return lambda name, module: True
    if callable(only):
        return only
    patterns = [only] if isinstance(only, str) else list(only)

    def matches(name: str, pattern: str) -> bool:
        return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")

    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            raise ValueError(f"patch: only names no module of the model, got {pattern!r}.")
    return lambda name, module: any(matches(name, pattern) for pattern in patterns)
