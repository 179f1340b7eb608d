# SPDX-License-Identifier: Apache-2.0
"""Modules that have moved: their old names import the module at its new place, with a DeprecationWarning."""

import importlib
import sys
import warnings
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType

_TRAINING = ("checkpoint", "classifier", "data", "evaluation", "interrupt", "pictures", "runs", "sampling", "seeding", "timing")
_FID = ("extractors", "images", "sources", "zipped_array")

MOVED = {
    **{f"genperf.cli.{name}": f"genperf.training.{name}" for name in _TRAINING},
    "genperf.cli.training": "genperf.training.trainer",
    **{f"genperf.cli.{name}": f"genperf.fid.{name}" for name in _FID},
    "genperf.cli.errors": "genperf._errors",
    "genperf.nn.joint": "genperf._distributed",
    "genperf.compat.vector_quantize_pytorch.fsq": "genperf.compat.vector_quantize_pytorch.finite_scalar_quantization",
    "genperf.compat.vector_quantize_pytorch.vector_quantize": "genperf.compat.vector_quantize_pytorch.vector_quantize_pytorch",
    "genperf.compat.vector_quantize_pytorch.lfq": "genperf.compat.vector_quantize_pytorch.lookup_free_quantization",
}

# Functions that were renamed with the move.
RENAMED = {"genperf.nn.joint": {"joint_mean": "global_mean", "joint_sum": "global_sum"}}


class _MovedModules(Loader):
    """Finder and loader of the names in MOVED. It is last on sys.meta_path, so it shadows no module."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in MOVED else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        new = MOVED[old]
        # warnings skips the frames of importlib, so that level 2 is the line with the import.
        warnings.warn(f"{old} is now {new}.", DeprecationWarning, stacklevel=2)
        found = importlib.import_module(new)
        if old not in RENAMED:
            sys.modules[old] = found
            return
        for before, after in RENAMED[old].items():
            setattr(module, before, getattr(found, after))


def install() -> None:
    sys.meta_path.append(_MovedModules())
