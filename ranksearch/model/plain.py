"""A net as other programs run it: named tensors in, one tensor or a dict of named tensors out.

What is exported is this form of a net, wherever the net does not map one tensor to one tensor: a graph's file can hold neither a
`ModelOutput` nor a nested batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ranksearch.model.inputs import LOSS, call, cut, flat, mapped

ALONE = "input"
"""The name of the one input of a net that takes one tensor."""


def named_inputs(inputs: Any) -> dict[str, Tensor]:
    """Every tensor of an input, once, by a name that may be an argument's: the keys of a dict, else `input`, or `input_0`, `input_1`."""
    found: dict[str, Tensor] = {}
    known: set[int] = set()
    for name, tensor in flat(inputs, ALONE):
        if id(tensor) not in known:
            known.add(id(tensor))
            taken = name if name.isidentifier() and name not in found else f"{ALONE}_{len(found)}"
            found[taken] = tensor
    return found


def plain_outputs(outputs: Any) -> Any:
    """The tensors of an output: one alone as it is, several by name; a loss is none of them."""
    found = {name: tensor for name, tensor in flat(outputs, "output") if name != LOSS}
    return next(iter(found.values())) if len(found) == 1 else found


def listed(outputs: Any) -> list[Tensor]:
    """The same tensors in order; one that is there under two names is there twice, as in a graph's outputs."""
    found = plain_outputs(outputs)
    return [found] if isinstance(found, Tensor) else list(found.values())


@torch.no_grad()
def is_plain(net: nn.Module, inputs: Any) -> bool:
    """Whether a net maps one tensor to one tensor as it is."""
    return isinstance(inputs, Tensor) and isinstance(net(inputs), Tensor)


class _Plain(nn.Module):
    def __init__(self, net: nn.Module, inputs: Any) -> None:
        super().__init__()
        self.net = net
        self._form = (cut(inputs, 0, 1),)  # in a tuple: no buffers
        self._places = {name: id(x) for name, x in named_inputs(self._form[0]).items()}

    def run(self, **tensors: Tensor) -> Any:
        given = {self._places[name]: tensor for name, tensor in tensors.items()}
        return plain_outputs(call(self.net, mapped(lambda x: given[id(x)], self._form[0])))


def plain(net: nn.Module, inputs: Any) -> nn.Module:
    """`net` in that form, its forward's arguments called as `named_inputs` calls the tensors of `inputs`; weights are shared."""
    names = list(named_inputs(inputs))  # identifiers all of them, as the exporters want arguments to be
    # a signature of its own, which exporters read the inputs' names from
    forward = eval(f"lambda self, {', '.join(names)}: self.run({', '.join(f'{n}={n}' for n in names)})")
    made: nn.Module = type("Plain", (_Plain,), {"forward": forward})(net, inputs)
    return made.train(net.training)
