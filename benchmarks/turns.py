"""Two contenders timed in turn in one process, and the table that says what came of it."""

import time
from collections.abc import Callable

ROUNDS, ROUNDS_OF_SLOW = 7, 3
SLOW_SECONDS = 1.0


def in_turn(ours: Callable[[], object], theirs: Callable[[], object]) -> tuple[float, float]:
    """Shortest seconds of each, in alternating turns of two calls, so that threads which wait for the other's work are not in the way."""
    ours()
    slow = seconds_of(theirs, 1) > SLOW_SECONDS
    rounds, calls = (ROUNDS_OF_SLOW, 1) if slow else (ROUNDS, 2)
    turns = [(seconds_of(ours, 2), seconds_of(theirs, calls)) for _ in range(rounds)]
    mine, its = zip(*turns, strict=True)
    return min(mine), min(its)


def seconds_of(function: Callable[[], object], calls: int) -> float:
    found = []
    for _ in range(calls):
        start = time.perf_counter()
        function()
        found.append(time.perf_counter() - start)
    return min(found)


def verdict(reached: bool | None) -> str:
    return "" if reached is None else "yes" if reached else "no"
