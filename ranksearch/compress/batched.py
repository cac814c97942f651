"""A plan's program of projections at work: which layers it takes, where they start from, and what is done where it cannot certify."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ranksearch.compress.program import Outcome, Program, program_key
from ranksearch.compress.stacks import Entry, plain
from ranksearch.errors import NonFiniteError
from ranksearch.linalg import NOT_FINITE
from ranksearch.lowering import LOWERINGS, MatrixLowering
from ranksearch.lowering.cp import Cp

Run = Callable[[object, Callable[[], None]], None]
"""(whose statements, statements): runs the statements, or replays what was captured of them for this owner."""


class Batched:
    """Projects `entries` by a program, from the bases `warm`."""

    def __init__(self, entries: list[Entry], warm: Mapping[str, Any], *, energy_transfer: bool) -> None:
        self.program = Program(entries, LOWERINGS, energy_transfer=energy_transfer)
        self._matrices = {e.name for e in entries if isinstance(plain(LOWERINGS[e.choice.lowering]), MatrixLowering)}
        self._sums = {e.name for e in entries if isinstance(plain(LOWERINGS[e.choice.lowering]), Cp)}
        self.unsure = set(self.program.start_from(warm))
        """Layers that are to be projected exactly next: without a basis, or not certified the last time."""
        self._pending: Callable[[], list[int]] | None = None

    def fits(self, entries: list[Entry]) -> bool:
        """Whether it was made for these layers with their weights where they lie now."""
        return self.program.key == program_key(entries)

    def now(self) -> tuple[dict[str, float], list[str]]:
        """Computes what the layers become and waits for it; nothing is written: (shares removed, layers that are left to be done alone).

        Matrices that are not certified, or have no basis yet, are projected by `eigh`, all at once; layers of `cp` start anew then.

        Raises:
            NonFiniteError: weights that are not finite; the text names the layer.
        """
        self.look()
        exactly = bool(self.unsure & self._matrices)
        self.program.begin(self.unsure & self._sums)
        self.program.compute(exactly=exactly, settle=True)
        outcomes = self._outcomes(self.program.outcomes.tolist())
        if not exactly and any(outcomes[name] != Outcome.DONE for name in self._matrices):
            self.program.compute(exactly=True, settle=True)
            outcomes = self._outcomes(self.program.outcomes.tolist())
        removed = dict(zip(self.program.names, self.program.removed.tolist(), strict=True))
        unsure = self.unsure - self._matrices - self._sums
        left = [name for name, outcome in outcomes.items() if outcome != Outcome.DONE or name in unsure]
        self.unsure = set(left)
        return removed, left

    def later(self, run: Run) -> None:
        """Projects in place without waiting; `look` says what became of it. Only where no layer is unsure."""
        run(self, self._project)
        self._pending = copied_later(self.program.outcomes)

    def _project(self) -> None:
        self.program.compute()
        self.program.write()

    def look(self) -> None:
        """Looks at the outcome of the last projection that was not waited for, if it has not been looked at."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self.unsure |= {name for name, it in self._outcomes(pending()).items() if it != Outcome.DONE}

    def start_from(self, warm: Mapping[str, Any]) -> None:
        """Takes over bases that layers were given elsewhere."""
        self.unsure -= {name for name, basis in warm.items() if basis is not None}
        self.program.start_from(warm, only=warm.keys())

    def warm(self) -> dict[str, Any]:
        """The bases; None for layers that are unsure, so that whoever goes on from these projects them exactly, too."""
        self.look()
        return {name: None if name in self.unsure else basis for name, basis in self.program.warm().items()}

    def _outcomes(self, numbers: list[int]) -> dict[str, int]:
        outcomes = dict(zip(self.program.names, numbers, strict=True))
        for name, outcome in outcomes.items():
            if outcome == Outcome.NOT_FINITE:
                raise NonFiniteError(f"Layer {name!r}: {NOT_FINITE}")
        return outcomes


def copied_later(tensor: Tensor) -> Callable[[], list[int]]:
    """A function that returns what `tensor` holds now; a copy from a GPU goes on meanwhile."""
    if not tensor.is_cuda:
        return tensor.clone().tolist
    there = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    there.copy_(tensor, non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def found() -> list[int]:
        done.synchronize()
        return there.tolist()  # type: ignore[no-any-return]

    return found
