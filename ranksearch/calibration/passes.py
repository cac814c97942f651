"""Passes of a net that go as far as some of its layers, and what these layers are given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ranksearch.calibration.statistics import ROWS, batched, drawn_rows
from ranksearch.lowering import LayerSpec
from ranksearch.model.inputs import call, moved
from ranksearch.model.undisturbed import own


class Reached(BaseException):
    """Ends a pass whose rest is not needed; no `except Exception` of the net's own code takes it for an error."""


@contextmanager
def asked(net: nn.Module, names: Iterable[str], told: Callable[[str, nn.Module, Tensor], None]) -> Iterator[None]:
    """Within, `told(name, layer, input)` is called before each of the layers is."""
    with ExitStack() as hooks:
        for name in names:

            def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
                told(name, layer, args[0] if args else next(iter(kwargs.values())))

            hook = net.get_submodule(name).register_forward_pre_hook(before, with_kwargs=True)
            hooks.callback(hook.remove)
        yield


def stages_of(net: nn.Module, names: Sequence[str], batch: Any) -> list[list[str]]:
    """The layers in the order of their calls, those together that follow each other and share an input; without those called twice."""
    calls: list[tuple[str, Tensor, int]] = []
    with asked(net, names, lambda name, layer, x: calls.append((name, x, x._version))):
        run(net, batch)
    order = [name for name, *_ in calls]
    stages: list[list[str]] = []
    last: tuple[Tensor, int] | None = None
    for name, x, version in calls:
        if order.count(name) > 1:
            continue
        if last is not None and x is last[0] and version == last[1]:  # changed in place it is another input
            stages[-1].append(name)
        else:
            stages.append([name])
        last = x, version
    return stages


def rows_given(
    net: nn.Module, specs: Mapping[str, LayerSpec], batch: Any, seed: int, most: int = ROWS
) -> dict[str, Tensor]:
    """Layer -> rows of its inputs, of a pass that ends with the last of the layers."""
    found: dict[str, Tensor] = {}

    def told(name: str, layer: nn.Module, x: Tensor) -> None:
        found[name] = drawn(x, specs[name], layer, seed, most)
        if len(found) == len(specs):
            raise Reached

    with asked(net, specs, told):
        run(net, batch)
    return found


def drawn(x: Tensor, spec: LayerSpec, layer: nn.Module, seed: int, most: int) -> Tensor:
    """Rows [m, g, n] of what a layer is given, at positions that the seed alone decides: the same in both nets."""
    return drawn_rows(batched(x, spec, layer), spec, torch.Generator().manual_seed(seed), most).float()


def run(net: nn.Module, batch: Any) -> None:
    """Runs a batch through the net, or as far as `Reached` is raised."""
    with suppress(Reached):
        call(net, moved(own(batch), next(net.parameters()).device))


@contextmanager
def batch_statistics(net: nn.Module) -> Iterator[None]:
    """Within, BN layers normalise by each batch's own statistics, as if they had been re-estimated; their running ones stay."""
    norms = [module for module in net.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum, norm.training = 0.0, True
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum, norm.training = momentum, False
