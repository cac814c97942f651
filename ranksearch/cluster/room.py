"""How many trials run at once: as many as the cluster's cores and GPUs hold, fewer where their measured memory would not fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ranksearch.cluster.packing import GIB, Machine, trials_in_memory


class Room:
    """`at_once` trials, lowered as soon as a finished trial shows what one takes; never raised again."""

    def __init__(
        self, machines: Sequence[Machine], at_once: int, *, cpus: float, gpus: float, log: Callable[[str], None]
    ) -> None:
        self.at_once = at_once
        self._machines, self._cpus, self._gpus, self._log = machines, cpus, gpus, log

    def learn(self, peak_bytes: int | None) -> None:
        """A trial's process held so many bytes of its own at its peak; None where that is not known."""
        if not peak_bytes:
            return
        fits = trials_in_memory(self._machines, peak_bytes, cpus=self._cpus, gpus=self._gpus)
        if fits >= self.at_once:
            return
        memory = sum(machine.memory for machine in self._machines)
        self._log(
            f"memory: a trial took {peak_bytes / GIB:.2f} GiB at its peak, and the cluster's workers have {memory / GIB:.1f} GiB: {fits} "
            f"trials at once from here on, not {self.at_once}; with a smaller recipe.batch_size more fit"
        )
        self.at_once = fits
