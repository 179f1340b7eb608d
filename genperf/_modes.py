# SPDX-License-Identifier: Apache-2.0
"""Context managers that change the mode of a module for the duration of a block."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(module: object) -> Iterator[None]:
    """Put every submodule in evaluation mode, and restore each one's mode afterwards. Does nothing to other callables."""
    training = [m for m in module.modules() if m.training] if isinstance(module, nn.Module) else []
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Set requires_grad=False on the module's parameters, and restore it afterwards: backward then skips their gradients."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)
