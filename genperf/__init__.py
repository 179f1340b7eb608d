# SPDX-License-Identifier: Apache-2.0
"""Compiled kernels for VQ-VAEs, VAEs and GANs on PyTorch, each validated against plain PyTorch."""

from . import _program

if _program.is_program():  # before torch is imported, which takes seconds
    _program.exit_on_interrupt()

from . import _library, _moved
from ._version import __version__

_library.load()
_moved.install()

from . import compat, losses, metrics, models, nn, ops  # noqa: E402
from ._patch import patch, unpatch  # noqa: E402
from .ops import *  # noqa: E402, F403

__all__ = ["__version__", "compat", "losses", "metrics", "models", "nn", "patch", "unpatch"]
__all__ += ops.__all__
