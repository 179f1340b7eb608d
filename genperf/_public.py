# SPDX-License-Identifier: Apache-2.0
"""The public names of the package `genperf`. Imports torch and loads the libraries."""

from . import _library, _moved

_library.load()
_moved.install()

from . import compat, losses, metrics, models, nn, ops  # noqa: E402
from ._patch import patch, unpatch  # noqa: E402
from ._version import __version__  # noqa: E402
from .ops import *  # noqa: E402, F403

__all__ = ["__version__", "compat", "losses", "metrics", "models", "nn", "patch", "unpatch"]
__all__ += ops.__all__
