"""Ctrl-C that waits for the end of a training step."""

import signal
import threading
from types import FrameType


class DeferredInterrupt:
    """Within this context the first SIGINT sets `requested`; a second one raises KeyboardInterrupt at once.

    Outside the main thread, which alone may handle signals, it changes nothing.
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
