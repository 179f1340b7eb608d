# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C that takes effect after the current training step."""

import signal
import threading
from types import FrameType


class DeferredInterrupt:
    """Context manager: the first SIGINT sets `requested`, a second one raises KeyboardInterrupt immediately.

    It has no effect outside the main thread, as only the main thread may install signal handlers.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous = None

    def __enter__(self) -> "DeferredInterrupt":
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
