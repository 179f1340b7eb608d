# SPDX-License-Identifier: Apache-2.0
"""genperf.patch and genperf.unpatch. The package has another name than the function, which a submodule would shadow."""

from .report import Left, PatchReport, Replaced
from .walk import patch, unpatch

__all__ = ["Left", "PatchReport", "Replaced", "patch", "unpatch"]
