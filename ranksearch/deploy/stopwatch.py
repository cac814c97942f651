"""`Stopwatch`: times layers and whole nets under one setting: a runtime, a batch, a number of threads, this machine's device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ranksearch.deploy.latency import hardware_name, latencies_ms, threads_set
from ranksearch.deploy.runtimes import Function, runtime_named
from ranksearch.errors import UsageError
from ranksearch.lowering import LayerSpec, lowering_named
from ranksearch.lowering.pivoted_layers import stored_pivots
from ranksearch.lowering.spec import Ints
from ranksearch.model.copying import copied
from ranksearch.model.inputs import moved, repeated
from ranksearch.model.plan import DENSE, LayerPlan

AT_ONCE = 40
"""Layers that are timed in turn: all of them are in memory at once."""
ROUNDS, NET_ROUNDS = 150, 1000
"""The most rounds, for layers and nets of a fraction of a millisecond. What else a machine does comes in bursts of seconds, which a
median must span."""
LAYER_SECONDS, NET_SECONDS = 0.12, 1.0
"""What the rounds of one layer or net may take in all, beyond the least number of them."""
CPU_STEP = 16
"""On a CPU latency climbs in steps of this many channels, a vector register or a block of the layout."""
STEPS = (64, 32, 16, 8)
NO_MEMORY = "allocate memory"
"""What torch's allocator of the CPU says, in an error without a class of its own."""
SAME = 1.05
"""Two times of one step of the staircase differ by less than this factor."""

TimedShape = tuple[LayerSpec, Ints]
"""What a layer's time depends on: its spec and the size of its input."""


@dataclass(frozen=True)
class LatencySetting:
    """How latency is measured."""

    runtime: str
    batch: int
    """Inputs of one call."""
    threads: int
    """Threads of the CPU."""


class Stopwatch:
    """Times in milliseconds of one call."""

    def __init__(self, setting: LatencySetting) -> None:
        self.setting, self._runtime = setting, runtime_named(setting.runtime)
        self.device = self._runtime.device()

    @property
    def key(self) -> str:
        """What a time depends on besides the layer: device, runtime, versions, batch, threads."""
        s = self.setting
        return f"{hardware_name(self.device)}; {s.runtime} ({self._runtime.versions}); batch {s.batch}; threads {s.threads}"

    def nets_ms(self, nets: Sequence[nn.Module], example: Any, *, seconds: float = NET_SECONDS) -> list[float]:
        """Median time of each net, in turn; the nets are not changed.

        Args:
            example: a batch of one input, a tensor or arguments: its shapes and dtypes are used; integers are repeated as they are.
            seconds: what the rounds of one net may take, beyond the least number of them.
        """
        return self.nets_and_layers_ms(nets, example, (), seconds=seconds)[0]

    def nets_and_layers_ms(
        self, nets: Sequence[nn.Module], example: Any, shapes: Sequence[TimedShape], *, seconds: float = NET_SECONDS
    ) -> tuple[list[float], list[float]]:
        """Median time of each net, as `nets_ms`, and of one dense layer of each shape, by itself, all in turn."""
        with self._in_memory(), threads_set(self.setting.threads):
            batch = moved(repeated(example, self.setting.batch), self.device)
            copies = [copied(net).to(self.device).eval() for net in nets]
            functions = [self._runtime.net(net, batch) for net in copies] + [
                self._alone(shape, DENSE) for shape in shapes
            ]
            times = latencies_ms(
                functions, batch, NET_ROUNDS, seconds=seconds * len(nets) + LAYER_SECONDS * len(shapes)
            )
        return times[: len(nets)], times[len(nets) :]

    def pieces_ms(
        self, pieces: Sequence[tuple[TimedShape, LayerPlan]], *, seconds: float = LAYER_SECONDS
    ) -> list[float]:
        """Median time of layers of any shapes and lowerings, each by itself on an input of its own, all in turn."""
        if not pieces:
            return []
        with self._in_memory(), threads_set(self.setting.threads):
            functions = [self._alone(shape, choice) for shape, choice in pieces]
            example = torch.zeros(1, device=self.device)
            return latencies_ms(functions, example, ROUNDS, seconds=seconds * len(pieces), least=3)

    @contextmanager
    def _in_memory(self) -> Iterator[None]:
        """Turns a lack of memory within into a UsageError that names the setting which decides it; layers run as they are stored."""
        try:
            with stored_pivots():
                yield
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError, on a GPU, is a RuntimeError
            if not isinstance(error, MemoryError | torch.OutOfMemoryError) and NO_MEMORY not in str(error):
                raise
            raise UsageError(
                f"latency.batch: {self.device} has too little memory to time the net on {self.setting.batch:,} inputs at once. Set a "
                f"smaller batch."
            ) from error

    def _alone(self, shape: TimedShape, choice: LayerPlan) -> Function:
        """A layer on an input of its own, whatever it is called with."""
        example = self._input_of(*shape)
        (layer,) = self._runtime.layers(
            [lowering_named(choice.lowering).build(shape[0], choice.rank, device=self.device).eval()], example
        )
        return lambda batch: layer(example)

    def _input_of(self, spec: LayerSpec, in_size: Ints) -> Tensor:
        if spec.lookup:
            return torch.randint(spec.in_channels, (self.setting.batch, *in_size), device=self.device)
        shape = (spec.in_channels, *in_size) if spec.is_conv else (*in_size, spec.in_channels)
        return torch.randn(self.setting.batch, *shape, device=self.device)

    def layers_ms(self, spec: LayerSpec, in_size: Ints, choices: Sequence[LayerPlan]) -> list[float]:
        """Time of one layer under each of `choices`, the first of which is dense.

        Every group of them is timed in turn with the dense layer and scaled by it, so that what is slow for a while does not count.
        """
        found, dense = [], []
        for start in range(1, max(len(choices), 2), AT_ONCE):
            group = [DENSE, *choices[start : start + AT_ONCE]]
            with self._in_memory(), threads_set(self.setting.threads):
                example = self._input_of(spec, in_size)
                modules = [lowering_named(c.lowering).build(spec, c.rank, device=self.device).eval() for c in group]
                functions = self._runtime.layers(modules, example)
                times = latencies_ms(functions, example, ROUNDS, seconds=LAYER_SECONDS * len(group), least=3)
            dense.append(times[0])
            found += [time / times[0] for time in times[1:]]
        return [median(dense), *(ratio * median(dense) for ratio in found)]

    def step(self) -> int:
        """The width of the steps in which latency climbs with a rank: known on a CPU, found by a probe elsewhere."""
        if self.device.type == "cpu":
            return CPU_STEP
        spec, size = LayerSpec.conv(256, 256, (3, 3), padding=(1, 1)), (28, 28)
        wanted = probed_ranks(STEPS)
        times = self.layers_ms(spec, size, [DENSE, *(LayerPlan("im2col", rank) for rank in wanted)])
        return widest_step(dict(zip(wanted, times[1:], strict=True)))


def probed_ranks(steps: Sequence[int]) -> list[int]:
    """One above a multiple of every step, and the upper ends of the steps from there."""
    base = max(steps)
    return sorted({base + 1, *(base + step for step in steps)})


def widest_step(times: Mapping[int, float]) -> int:
    """The widest of `STEPS` over which times (rank -> ms, of `probed_ranks`) do not climb; the narrowest where all do."""
    base = max(STEPS)
    return next((step for step in STEPS if times[base + step] <= SAME * times[base + 1]), min(STEPS))
