"""What a trial says while it runs, and to whom: the words between it and whoever runs it. Loads no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Report = Callable[[dict[str, Any]], None]
"""Takes the metrics of each phase; it may raise `Stopped`."""
Watch = Callable[[int], None]
"""Is told after every step how many are done."""


def unwatched(step: int) -> None:
    """Nobody looks."""


RUNG = "rung"
"""The phase of a score that early stopping compares."""
UNTRAINED, LAST = "untrained", "last"
"""The phases of two candidates beside what each phase ends with: the dense net decomposed as it is, and the weights of the last step where
a moving average takes their place."""


class Stopped(Exception):
    """Raised by a `Report`: the trial has fallen behind at a rung and is to end here."""
