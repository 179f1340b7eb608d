# SPDX-License-Identifier: Apache-2.0
"""A picture of the sizes of clusters."""

from pathlib import Path

from torch import Tensor

from .._errors import import_extra
from .._files import write_atomically


def write_sizes(path: Path, counts: Tensor) -> None:
    """Plot the sizes of the clusters of each stage, in descending order and relative to their mean; counts [stages, K]."""
    # Not pyplot, which keeps figures alive and looks for a display.
    Figure = import_extra("matplotlib.figure", "matplotlib", "cluster").Figure
    figure = Figure(figsize=(6, 3.6), dpi=100, layout="constrained")
    axes = figure.subplots()
    for stage, sizes in enumerate(counts.double()):
        relative = (sizes / sizes.mean()).sort(descending=True).values
        axes.plot(range(1, len(relative) + 1), relative.tolist(), label=f"stage {stage + 1}", drawstyle="steps-mid")
    axes.axhline(1, color="gray", linewidth=0.8)
    axes.set_xlabel("codes, by size")
    axes.set_ylabel("vectors, relative to the mean")
    axes.set_ylim(bottom=0)
    axes.legend()
    axes.grid(alpha=0.3)
    write_atomically(path, lambda file: figure.savefig(file, format="png"), sync=False)
