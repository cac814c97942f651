"""Steps as CUDA graphs: what a step launches on a GPU is recorded once and replayed, so that a step costs one launch from Python.

    recorder.warm(work)              runs `work`, as work must run a few times before it is recorded; says what in it made the host wait
    replay = recorder.record(work)   records `work` without running it; `replay()` runs it again and again

What is recorded reads and writes the same memory every time: a batch, a learning rate and a loss live in tensors of their own. Whatever
waits for the GPU inside (`.item()`, a copy to the CPU, a mask that picks) cannot be recorded; then `record` raises, and the caller goes on
step by step. `RANKSEARCH_CAPTURE=off` in the environment does without recording.

Reference: the whole-network capture of https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs: warm-up on a side stream,
static inputs, a private memory pool.
"""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from ranksearch.errors import first_line

WARM_STEPS = 3
"""Runs before a recording: libraries choose their algorithms and optimizers make their state in them."""
SWITCH = "RANKSEARCH_CAPTURE"


class Recorder(Protocol):
    """What records and replays; tests have ones that need no GPU."""

    def warm(self, work: Callable[[], None]) -> str | None:
        """Runs `work`; what made the host wait for the device in it, None where nothing did."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Records `work`, which is not run; the function that runs it."""


class CudaGraphs:
    """The recorder of a GPU. `generators` are those that the work draws from beside the device's own."""

    def __init__(self, device: torch.device, generators: Sequence[torch.Generator]) -> None:
        self._generators = list(generators)
        self._stream = torch.cuda.Stream(device)
        index = device.index if device.index is not None else torch.cuda.current_device()
        self._default = torch.cuda.default_generators[index]

    def warm(self, work: Callable[[], None]) -> str | None:
        here = torch.cuda.current_stream()
        self._stream.wait_stream(here)
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with torch.cuda.stream(self._stream):
                    work()
            finally:
                torch.cuda.set_sync_debug_mode(before)
        here.wait_stream(self._stream)
        waits = [found for found in seen if "synchronizing CUDA operation" in str(found.message)]
        return f"waits for the GPU at {waits[0].filename}:{waits[0].lineno}" if waits else None

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        drawn = [*self._generators, self._default]
        states = [generator.clone_state() for generator in drawn]
        graph = torch.cuda.CUDAGraph()
        for generator in self._generators:
            graph.register_generator_state(generator)
        torch.cuda.synchronize()
        try:
            # the outer context comes back to this stream even where the capture's own end raises
            own = torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local")
            with torch.cuda.stream(self._stream), own:
                work()
        except Exception:
            for generator, state in zip(drawn, states, strict=True):  # a capture that fails leaves them unusable
                generator.graphsafe_set_state(state)
            raise
        return graph.replay  # type: ignore[no-any-return]


def recorder_for(device: torch.device, generators: Sequence[torch.Generator]) -> Recorder | None:
    """A GPU's recorder; None on a CPU, and where the environment says so."""
    if device.type != "cuda" or os.environ.get(SWITCH, "auto") == "off":
        return None
    return CudaGraphs(device, generators)


class Replayed:
    """Statements that are run `WARM_STEPS` times, then recorded and replayed from there on; where that fails, they are run each time."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._runs, self._replay = 0, None  # type: int, Callable[[], None] | None
        self.reason: str | None = None
        """Why it cannot be recorded."""

    @property
    def is_recorded(self) -> bool:
        return self._replay is not None

    @property
    def is_warm(self) -> bool:
        return self._runs >= WARM_STEPS

    def refuse(self, reason: str) -> None:
        """Goes on without a recording."""
        self.reason, self._replay = reason, None

    def __call__(self, work: Callable[[], None]) -> None:
        """Runs `work` once, in whichever way; it must be the same statements on the same memory every time."""
        if self.reason is not None:
            return work()
        if not self.is_warm:
            self._runs += 1
            before = _drawn_on_cpu()
            waits = self._recorder.warm(work)
            if self.is_warm:
                self.reason = waits if before == _drawn_on_cpu() else "draws random numbers on the CPU"
            return None
        if self._replay is None:
            try:
                self._replay = self._recorder.record(work)
            except Exception as error:
                self.reason = _first_wrong(error)
                return work()
        return self._replay()


def _drawn_on_cpu() -> Any:
    """The state of the random numbers that a recording would freeze."""
    _, keys, place, *_ = np.random.get_state()
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), np.asarray(keys).tobytes(), place


def _first_wrong(error: BaseException) -> str:
    """The first thing that went wrong: the end of a failed capture raises an error of its own on top."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {first_line(error)}"
