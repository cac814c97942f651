"""`ranksearch init`: a search space and a task file to begin with, for a model given by its import path or by name.

What is written runs as it is, on random numbers that stand in for data, so that it can be checked at once and filled in piece by piece.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ranksearch.compress import Net, dense_cost, trace
from ranksearch.errors import RanksearchError, UsageError, first_line, nearest
from ranksearch.model.inputs import call, class_logits
from ranksearch.space.reading import yaml_value
from ranksearch.tasks.nets import LIBRARIES, build_named
from ranksearch.tasks.task_file import told

TASK = '''"""The task of {name}.yaml: {model}, its data, its loss and its metric.

Fill in the four places that say TODO, then: ranksearch check {name}.yaml
"""

import torch

import ranksearch
{imports}

def make_task() -> ranksearch.Task:
    model = {build}
    # TODO 1: the trained dense weights, such as
    # model.load_state_dict(torch.load("weights.pt", map_location="cpu", weights_only=True))

    # TODO 2: your data. Random numbers stand in: what a search finds on them means nothing.
    # A split is (inputs, targets), a Dataset, or a DataLoader of (inputs, targets) batches.
    train, val = stand_in(256), stand_in(64)

    # TODO 3: left out, the loss is cross-entropy and the metric accuracy in percent. Any others:
    # loss=torch.nn.MSELoss(), metric=rmse, direction="minimize", with def rmse(outputs, targets): return number
    # TODO 4: what the dense net was trained with; trials use it where the space's recipe names neither optimizer nor lr:
    # trained_with={{"optimizer": "adamw", "lr": 0.001, "weight_decay": 0.01}}
    return ranksearch.Task(model=model, train=train, val=val)


{stand_in}'''

ONE = '''def stand_in(samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs {inputs} and targets of the right shapes, and nothing to learn."""
    return {made}, torch.randint({classes}, (samples,{positions}))
'''
SEVERAL = '''def stand_in(samples: int) -> torch.utils.data.DataLoader:
    """Batches of {inputs}, as the model is called with them, and targets of the right shapes, and nothing to learn."""
    return torch.utils.data.DataLoader([one() for _ in range(samples)], batch_size=32, shuffle=True)


def one() -> tuple[object, torch.Tensor]:
    return {made}, torch.randint({classes}, ({positions}))
'''

SPACE = """# A search over low-rank forms of {model}. What every key means: docs/search_space.md
#   ranksearch check {name}.yaml                     validates, prints the costs that can be reached
#   ranksearch search {name}.yaml --trials 3         a first look, before the full search
#
# Its layers ({macs:,} MACs and {params:,} parameters in all):
{layers}
name: {name}
task: {name}_task.py:make_task

budgets:
  flops: 50%              # an upper bound; also macs, params, size, in percent of dense or absolute (1MiB, 20M)

layers:
  exclude: {exclude}
  # left out, every lowering that a layer can take but those that must be asked for, such as cp
  # lowerings: [im2col, channel, spatial, tucker2, svd]

recipe:
  steps: 1000             # per trial; at least one or two epochs, more to win accuracy back
  batch_size: 64          # a DataLoader's own overrides it
  # optimizer and lr: as the task says that the net was trained (trained_with), else found by short trials before the first one
  projection:
    period: {{low: 10, high: 80, log: true, default: 30}}

search:
  trials: 16
"""


def load_model(model: str) -> tuple[nn.Module, str, str, str]:
    """Returns the net of an import path or a library's name, its short name, and the import and expression that make it in a task file.

    An import path names a class, a function without arguments, or a net: `package.module:Net`, looked for in the working directory too.

    Raises:
        UsageError: it cannot be imported or made, or is not a net; one sentence.
    """
    where, colon, name = model.partition(":")
    if not colon or not name:
        raise UsageError(
            f"init: {model!r} is not a model: expected package.module:callable, or one of {', '.join(f'{x}:NAME' for x in LIBRARIES)}."
        )
    if where in LIBRARIES:
        made = build_named(model, 1000)
        bare, _, outputs = name.partition(":")
        arguments = f'"{bare}", num_classes={outputs or 1000}'
        if where == "timm":
            return made, bare, "import timm\n", f"timm.create_model({arguments}, pretrained=False)"
        return made, bare, "from torchvision.models import get_model\n", f"get_model({arguments}, weights=None)"
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        module = importlib.import_module(where)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise UsageError(f"init: {where!r} cannot be imported: {type(error).__name__}: {first_line(error)}") from error
    if not hasattr(module, name):
        known = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise UsageError(f"init: {where} has no {name!r}. {nearest(name, known)}")
    found = getattr(module, name)
    try:
        made = found if isinstance(found, nn.Module) else found()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise UsageError(
            f"init: {name}() raised {told(error, str(module.__file__))}: name a function that takes no arguments and returns the net."
        ) from error
    if not isinstance(made, nn.Module):
        raise UsageError(f"init: {model} gives a {type(made).__name__}: expected an nn.Module.")
    build = name if isinstance(found, nn.Module) else f"{name}()"
    return made, name, f"from {where} import {name}\n", build


def imported_net(model: str) -> nn.Module:
    """The net of an import path or a library's name, as `load_model`, for `ranksearch.load(folder, build=model)`.

    Raises:
        UsageError: as `load_model`.
    """
    try:
        return load_model(model)[0]
    except UsageError as error:
        raise UsageError(f"build={model!r}: {str(error).removeprefix('init: ')}") from error


@dataclass(frozen=True)
class Given:
    """One tensor that a net takes."""

    shape: tuple[int, ...]
    """Without the batch."""
    dtype: str = "float32"
    name: str | None = None
    """The argument that takes it; None where it is positional."""

    def example(self) -> Tensor:
        """Zeros [1, ...], which are valid indices of words, too."""
        return torch.zeros(1, *self.shape, dtype=getattr(torch, self.dtype))

    def made(self, samples: str) -> str:
        """The expression that draws it: normal numbers, or whole ones that are small enough for any embedding."""
        sizes = ", ".join([*([samples] if samples else []), *map(str, self.shape)])
        if self.example().is_floating_point():
            cast = "" if self.dtype == "float32" else f", dtype=torch.{self.dtype}"
            return f"torch.randn({sizes or '()'}{cast})"
        return f"torch.randint(2, ({sizes}{',' if sizes else ''}), dtype=torch.{self.dtype})"

    def described(self) -> str:
        name = "" if self.name is None else f"{self.name} "
        return f"{name}[{', '.join(['N', *map(str, self.shape)])}]" + (
            "" if self.dtype == "float32" else f" ({self.dtype})"
        )


def _together(given: Sequence[Given], parts: Sequence[Any]) -> Any:
    """Returns one tensor as it is, named ones as a dict, others as a tuple."""
    if given[0].name is not None:
        return dict(zip([one.name for one in given], parts, strict=True))
    return parts[0] if len(parts) == 1 else tuple(parts)


def write_start(model: str, inputs: Sequence[int] | Sequence[Given], folder: Path) -> tuple[Path, Path]:
    """Writes NAME.yaml and NAME_task.py for `model` to `folder`; returns both paths.

    Args:
        inputs: what one call takes, all by name or all by position; for one float32 tensor its shape without the batch is enough.

    Raises:
        UsageError: the model cannot be used or does not take the shape, or one of the files exists.
    """
    net, short, imports, build = load_model(model)
    given = [one for one in inputs if isinstance(one, Given)]
    given = given or [Given(tuple(extent for extent in inputs if isinstance(extent, int)))]
    example = _together(given, [one.example() for one in given])
    try:
        traced = trace(net, example)
        with torch.inference_mode():
            outputs = call(net.eval(), example)
    except RanksearchError:
        raise
    except Exception as error:
        raise UsageError(
            f"init: {model} does not take inputs {_shown(given)} ({first_line(error)}): name another shape with --input, such as "
            f"--input 1x28x28, another kind of numbers with --dtype, such as --dtype int64, or arguments, such as --input input_ids=16."
        ) from error
    name = re.sub(r"[^A-Za-z0-9]+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", short)).strip("_").lower()
    space, task = folder / f"{name}.yaml", folder / f"{name}_task.py"
    for path in (space, task):
        if path.exists():
            raise UsageError(
                f"init: {path} is there already, and it is kept: remove it, or name another folder with -o."
            )
    folder.mkdir(parents=True, exist_ok=True)
    task.write_text(
        TASK.format(name=name, model=model, imports=imports, build=build, stand_in=_stand_in(given, outputs))
    )
    cost = dense_cost(traced)
    space.write_text(
        SPACE.format(
            name=name,
            model=model,
            macs=cost.macs,
            params=cost.params,
            layers=_listed(traced),
            exclude=_excluded(traced),
        )
    )
    return space, task


def _shown(given: Sequence[Given]) -> str:
    return ", ".join(
        f"{[1, *one.shape]}" if one.dtype == "float32" else f"{[1, *one.shape]} ({one.dtype})" for one in given
    )


def _stand_in(given: Sequence[Given], outputs: Any) -> str:
    """The function that makes random data; targets are classes of the net's main output, where it has one."""
    try:
        logits = class_logits(outputs)
    except UsageError:
        logits = torch.zeros(1, 2)
    classes = logits.shape[1] if logits.dim() > 1 else 2
    extents = [str(extent) for extent in logits.shape[2:]]
    described = ", ".join(one.described() for one in given)
    if len(given) == 1 and given[0].name is None:
        positions = "".join(f" {extent}," for extent in extents).rstrip(",")
        return ONE.format(inputs=described, made=given[0].made("samples"), classes=classes, positions=positions)
    parts = [one.made("") for one in given]
    if given[0].name is None:
        made = f"({', '.join(parts)})"
    else:
        made = (
            f"{{{', '.join(f'{chr(34)}{one.name}{chr(34)}: {part}' for one, part in zip(given, parts, strict=True))}}}"
        )
    positions = "".join(f"{extent}, " for extent in extents).strip()
    return SEVERAL.format(inputs=described, made=made, classes=classes, positions=positions)


def _listed(net: Net) -> str:
    """A comment line per layer: name, weight, its share of the MACs."""
    total = dense_cost(net).macs or 1
    width = max(len(layer.name) for layer in net.layers)
    lines = [
        f"#   {layer.name:<{width}}  {'×'.join(map(str, layer.spec.weight_shape)):<16}  {100 * layer.macs / total:5.1f} % of MACs"
        for layer in net.layers
    ]
    return "\n".join([*lines, *(f"#   {name}: not lowered: {reason}" for name, reason in net.skipped)])


def _excluded(net: Net) -> str:
    """The first layer, which sees the input itself, and a Linear at the end, the classifier: few gain there, and much is lost."""
    first, last = net.layers[0], net.layers[-1]
    names = [first.name] if first.spec.is_conv and len(net.layers) > 2 else []
    names += [last.name] if not last.spec.is_conv and len(net.layers) > 1 else []
    why = "  # as is usual, the first conv and the classifier stay as they are" if names else ""
    return f"[{', '.join(map(_as_text, names))}]{why}"


def _as_text(name: str) -> str:
    """A name as YAML reads it back: `2`, a layer of a Sequential, would be a number."""
    return name if yaml_value(name) == name else json.dumps(name)
