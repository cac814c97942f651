"""Running somebody's model without leaving a trace: modes, buffers, attributes and random numbers are as before, whatever is raised."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ranksearch.model.bare import is_lazy
from ranksearch.model.inputs import mapped

CONTAINERS = (dict, OrderedDict, list, set)
"""Hooks, and whatever a forward pass collects, lie in one of these. Hugging Face's nets add hooks in their first pass and note that they
did: without the note, and with the hooks, the next pass would add them a second time."""


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, off torch's fused attention, which calls no layers; afterwards everything is as it was.

    Modes, buffers, attributes that forward passes set, and the random numbers of torch, numpy and Python are restored; attributes of
    layers that were lazy stay, since these have their shapes then.
    """
    modules = list(model.modules())
    modes = {module: module.training for module in modules}
    kept = [_Kept(module) for module in modules if not _lazy(module)]
    devices = sorted({t.device.index for t in (*model.parameters(), *model.buffers()) if t.device.type == "cuda"})
    fused = torch.backends.mha.get_fastpath_enabled()
    drawn = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            model.eval()
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
            random.setstate(drawn[0])
            np.random.set_state(drawn[1])
            for state in kept:
                state.restore_()
            for module, mode in modes.items():
                module.training = mode


def _lazy(module: nn.Module) -> bool:
    return any(map(is_lazy, (*module._parameters.values(), *module._buffers.values())))


class _Kept:
    """One module's attributes, what its containers hold (its hooks among them), and the numbers of its buffers."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._attributes = {name: value for name, value in vars(module).items() if name not in ("_buffers", "training")}
        self._held = [(value, copy(value)) for value in self._attributes.values() if type(value) in CONTAINERS]
        self._buffers = {
            name: (buffer, None if buffer is None else buffer.detach().clone())
            for name, buffer in module._buffers.items()
        }

    @torch.no_grad()
    def restore_(self) -> None:
        state = vars(self._module)
        for name in set(state) - set(self._attributes) - {"_buffers", "training"}:
            del state[name]
        state.update(self._attributes)
        for value, before in self._held:
            _refill_(value, before)
        buffers = self._module._buffers
        for name in set(buffers) - set(self._buffers):
            del buffers[name]
        for name, (buffer, numbers) in self._buffers.items():
            buffers[name] = buffer
            if numbers is not None and buffer is not None:
                _restore_(buffer, numbers)


def _refill_(container: Any, before: Any) -> None:
    """Makes a container hold what it held before, each entry the same object."""
    if isinstance(container, list):
        container[:] = before
    else:
        container.clear()
        container.update(before)


def _restore_(buffer: Tensor, numbers: Tensor) -> None:
    if buffer.shape != numbers.shape:
        buffer.data = numbers
    elif buffer.requires_grad or not torch.equal(buffer, numbers):
        buffer.detach().copy_(numbers)


def own(batch: Any) -> Any:
    """The batch with tensors of its own, detached: what a net does to it in place, or asks gradients of, is not the caller's."""
    return mapped(lambda x: x.detach().clone(), batch)
