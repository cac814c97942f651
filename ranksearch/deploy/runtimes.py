"""The runtimes that latency is measured in: how a net, or many single layers at once, becomes a function of a batch there.

`eager` is PyTorch as it is, `compile` torch.compile (seconds of compilation per net and layer), `onnx` ONNX Runtime on a CPU.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from ranksearch.compress.export import unneeded
from ranksearch.deploy.formats import FORMATS, OPSET, Function, format_named, opened_onnx, quiet, told
from ranksearch.errors import UsageError, nearest
from ranksearch.model.inputs import call, repeated
from ranksearch.model.plan import RankPlan

TRACED_BATCH = 2


@dataclass(frozen=True)
class Runtime:
    """A way to run nets."""

    name: str
    net: Callable[[nn.Module, Any], Function]
    """A net in evaluation mode and an input batch -> the net as a function of such a batch."""
    layers: Callable[[Sequence[nn.Module], Tensor], list[Function]]
    """Modules that take the same input -> a function each."""
    packages: tuple[str, ...]
    """Those whose version a measured time depends on."""
    cpu_alone: bool = False

    @property
    def versions(self) -> str:
        """Such as `torch 2.13.0`."""
        return ", ".join(f"{package} {metadata.version(package)}" for package in self.packages)

    def device(self) -> torch.device:
        """Where it runs: a GPU where there is one and it can, else the CPU."""
        return torch.device("cuda" if torch.cuda.is_available() and not self.cpu_alone else "cpu")


def runtime_named(name: str) -> Runtime:
    """The runtime `name`, if everything that it needs is installed.

    Raises:
        UsageError: no such runtime (the text names the nearest one), or its extra is not installed.
    """
    if name not in RUNTIMES:
        raise UsageError(f"There is no runtime {name!r} to measure latency in. {nearest(name, RUNTIMES)}")
    if name in FORMATS:
        format_named(name)
    return RUNTIMES[name]


def _own_frame(model: nn.Module) -> Function:
    """The net as a function with a code object of its own.

    Dynamo keeps compiled graphs by code object: the eighth net that came through `nn.Module`'s would be the last one that is compiled, all
    further ones would silently run as they are, and every call would try the guards of all before it.
    """

    def run(batch: Any) -> Any:
        return call(model, batch)

    return FunctionType(run.__code__.replace(), run.__globals__, closure=run.__closure__)


def _compiled(model: nn.Module, batch: Any) -> Function:
    compiled = torch.compile(_own_frame(model), dynamic=False)
    with told("torch.compile cannot compile this net here"), quiet(), torch.inference_mode():
        compiled(batch)
    return compiled


def _net_in_onnx(model: nn.Module, batch: Any) -> Function:
    example = repeated(batch, TRACED_BATCH)
    with tempfile.TemporaryDirectory() as folder:
        FORMATS["onnx"].write(model.cpu(), RankPlan(), example, Path(folder))
        return FORMATS["onnx"].open(Path(folder), unneeded)


class _Branches(nn.Module):
    """Every module on the same input."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(modules)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [branch(x) for branch in self.branches]


def _layers_in_onnx(modules: Sequence[nn.Module], example: Tensor) -> list[Function]:
    """All of them in one graph, which is cut into a model each: the exporter's seconds are paid once."""
    from onnx.utils import Extractor

    with told("torch.onnx cannot write these layers"), quiet():
        program = torch.onnx.export(
            _Branches(modules).eval(),
            (example,),
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
            input_names=["input"],
        )
        graph = program.model_proto  # type: ignore[union-attr]
        cut = Extractor(graph)
        return [
            opened_onnx(cut.extract_model(["input"], [output.name]).SerializeToString())
            for output in graph.graph.output
        ]


RUNTIMES = {
    made.name: made
    for made in (
        Runtime("eager", lambda model, batch: partial(call, model), lambda modules, batch: list(modules), ("torch",)),
        Runtime("compile", _compiled, lambda modules, batch: [_compiled(m, batch) for m in modules], ("torch",)),
        Runtime("onnx", _net_in_onnx, _layers_in_onnx, ("onnxruntime",), cpu_alone=True),
    )
}
