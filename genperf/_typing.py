# SPDX-License-Identifier: Apache-2.0
"""Helpers for type checkers."""

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def signature_of(function: Function) -> Callable[[Callable[..., Any]], Function]:
    """Decorator: give a stub the signature of `function`.

    In torch's annotations Module.__call__ takes and returns Any. A layer declares the call as `forward`, for checkers only:

        if TYPE_CHECKING:

            @signature_of(forward)
            def __call__(self) -> None: ...
    """
    return lambda _: function
