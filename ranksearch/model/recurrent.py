"""Opening `nn.LSTM`, `nn.GRU` and `nn.RNN`: the same net over plain Linears, which then are lowered like any other.

torch computes all steps in one operator from parameters of the module itself, so there is no layer to replace. Opened, layer k of
one direction has `ih_lk` (input weights, all gates in one Linear: one input factor serves all), `hh_lk` (recurrent weights) and with
`proj_size` `hr_lk`, `…_reverse` in the other direction. The input products of all steps are one product still; the recurrent ones
are a loop over the steps. That loop costs time, most of all for short products: lowering a recurrent net saves MACs and parameters, and
saves time only where its matrices are large. An exported loop has the number of steps that it was traced with.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence

from ranksearch.model.attention import hooks_refusal, linear

KINDS = (nn.LSTM, nn.GRU, nn.RNN)


def recurrent_refusal(module: Any) -> str | None:
    """Why a recurrent module cannot be opened; None where it can."""
    base = next((kind for kind in KINDS if isinstance(module, kind)), None)
    name = type(module).__name__
    if base is None or type(module).forward is not base.forward or "forward" in vars(module):
        return f"{name} is a recurrent net with a forward of its own."
    if parametrize.is_parametrized(module) or any(
        part not in module._parameters for part in module._flat_weights_names
    ):
        return "its weights are computed (weight norm, dropped weights or a parametrization); remove that first."
    return hooks_refusal(module)


def parts(module: Any) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """(name of the Linear that it becomes, weight, bias) of every matrix of a recurrent module."""
    for name in module._flat_weights_names:
        kind, _, part = name.partition("_")
        if kind == "weight":
            yield part, getattr(module, name), module._parameters.get(f"bias_{part}")


class OpenRecurrent(nn.RNNBase):
    """A recurrent net over plain Linears; takes and returns what the module that it was did, and still is one."""

    def flatten_parameters(self) -> None:
        """Nothing is packed here."""

    def __getattr__(self, name: str) -> Any:
        kind, _, part = name.partition("_")
        modules = self.__dict__.get("_modules", {})
        if kind in ("weight", "bias") and part in modules:
            return getattr(modules[part], kind)
        return super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)

    def forward(self, input: Any, hx: Any = None) -> Any:
        """As the module's: (outputs, last state); for an LSTM the state is a pair."""
        if isinstance(input, PackedSequence):
            lengths = input.batch_sizes.tolist()
            start = self._sorted(hx, input.sorted_indices)
            outputs, state = self._layers(input.data.split(lengths), start, lengths)
            packed = PackedSequence(torch.cat(outputs), input.batch_sizes, input.sorted_indices, input.unsorted_indices)
            return packed, self._sorted(state, input.unsorted_indices)
        batched = input.dim() == 3
        x = input if batched else input.unsqueeze(1)
        x = x.transpose(0, 1) if batched and self.batch_first else x
        hx = hx if batched or hx is None else self._each(hx, lambda h: h.unsqueeze(1))
        outputs, state = self._layers(x.unbind(0), hx, None)
        y = torch.stack(outputs, 1 if batched and self.batch_first else 0)
        return (y, state) if batched else (y.squeeze(1), self._each(state, lambda h: h.squeeze(1)))

    @staticmethod
    def _each(state: Any, change: Any) -> Any:
        return tuple(map(change, state)) if isinstance(state, tuple) else change(state)

    def _sorted(self, state: Any, order: Tensor | None) -> Any:
        if state is None or order is None:
            return state
        return self._each(state, lambda h: h.index_select(1, order))

    def _layers(self, steps: Any, hx: Any, lengths: list[int] | None) -> tuple[list[Tensor], Any]:
        """Steps of [n, S] -> steps of the last layer's outputs, and the states [layers x directions, N, H].

        Args:
            lengths: n of every step, never growing; None where all are one.
        """
        directions = ("", "_reverse") if self.bidirectional else ("",)
        given = hx if isinstance(hx, tuple) else (hx,)
        ends: list[tuple[Tensor, ...]] = []
        for layer in range(self.num_layers):
            found = []
            for direction in directions:
                start = None if hx is None else tuple(h[len(ends)] for h in given)
                outputs, end = self._direction(steps, f"l{layer}{direction}", start, lengths, direction != "")
                found.append(outputs)
                ends.append(end)
            steps = found[0] if len(found) == 1 else [torch.cat(both, -1) for both in zip(*found, strict=True)]
            if self.dropout and self.training and layer < self.num_layers - 1:
                steps = [nn.functional.dropout(step, self.dropout) for step in steps]
        state = tuple(torch.stack(each) for each in zip(*ends, strict=True))
        return list(steps), state if len(state) > 1 else state[0]

    def _direction(
        self, steps: Any, name: str, start: tuple[Tensor, ...] | None, lengths: list[int] | None, backwards: bool
    ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        ih, hh = self._modules[f"ih_{name}"], self._modules[f"hh_{name}"]
        assert ih is not None
        assert hh is not None
        whole = torch.stack(list(steps)) if lengths is None else torch.cat(list(steps))
        inputs = ih(whole).unbind(0) if lengths is None else ih(whole).split(lengths)
        state = self._zeros(steps[0]) if start is None else start
        outputs: list[Any] = [None] * len(steps)
        for t in reversed(range(len(steps))) if backwards else range(len(steps)):
            if lengths is None:
                state = self._step(name, inputs[t], hh, state)
                outputs[t] = state[0]
                continue
            running = self._step(name, inputs[t], hh, tuple(h[: lengths[t]] for h in state))
            outputs[t] = running[0]
            state = tuple(torch.cat([new, h[lengths[t] :]]) for new, h in zip(running, state, strict=True))
        return outputs, state

    def _zeros(self, step: Tensor) -> tuple[Tensor, ...]:
        rows, lstm = step.shape[0], isinstance(self, nn.LSTM)
        widths = (self.proj_size or self.hidden_size, self.hidden_size) if lstm else (self.hidden_size,)
        return tuple(step.new_zeros(rows, width) for width in widths)

    def _step(self, name: str, x: Tensor, hh: Any, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """One step of one layer: the input's products [n, gates x H] and the state before -> the state after, its first part the output."""
        h = state[0]
        if isinstance(self, nn.LSTM):
            i, f, g, o = (x + hh(h)).chunk(4, -1)
            c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            return (self._modules[f"hr_{name}"](h) if self.proj_size else h), c  # type: ignore[misc]
        if isinstance(self, nn.GRU):
            (r, z, n), (hr, hz, hn) = x.chunk(3, -1), hh(h).chunk(3, -1)
            n, z = (n + (r + hr).sigmoid() * hn).tanh(), (z + hz).sigmoid()
            return (n + z * (h - n),)
        activation = torch.relu if self.nonlinearity == "relu" else torch.tanh
        return (activation(x + hh(h)),)


class OpenLSTM(OpenRecurrent, nn.LSTM):
    """An LSTM over plain Linears."""


class OpenGRU(OpenRecurrent, nn.GRU):
    """A GRU over plain Linears."""


class OpenRNN(OpenRecurrent, nn.RNN):
    """An Elman net over plain Linears."""


_OPEN: dict[type, type] = {nn.LSTM: OpenLSTM, nn.GRU: OpenGRU, nn.RNN: OpenRNN}


def open_recurrent_(model: nn.Module, path: str) -> None:
    """Opens the recurrent module `path`, in place: its parameters become those of Linears."""
    module: Any = model.get_submodule(path)
    layers = {part: linear(weight, bias) for part, weight, bias in parts(module)}
    module._parameters.clear()
    module._flat_weights_names, module._flat_weights, module._all_weights, module._flat_weight_refs = [], [], [], []
    for name, layer in layers.items():
        module._modules[name] = layer.train(module.training)
    own = type(module)
    base = next(kind for kind in KINDS if isinstance(module, kind))
    module.__class__ = _OPEN[base] if own is base else type(own.__name__, (_OPEN[base], own), {})
