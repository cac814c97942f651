"""Nets of torchvision and timm by name: `torchvision:resnet18`, `timm:vit_small_patch16_224`, with random weights.

A number of outputs may follow (`torchvision:resnet18:37`). Weights come from a file that the space names; nothing is downloaded. Both
packages are the optional extra `vision`, imported here alone and only when a net of theirs is asked for.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import nn

from ranksearch.errors import UsageError, first_line, nearest

LIBRARIES = ("torchvision", "timm")
OWN_TRAINING = ("googlenet", "inception_v3")
"""torchvision's nets that return several outputs while they train."""


def is_named(model: str) -> bool:
    """Whether a model's name is of the form LIBRARY:NAME or LIBRARY:NAME:OUTPUTS."""
    return ":" in model


def build_named(model: str, outputs: int) -> nn.Module:
    """The untrained net `model`, with `outputs` logits where its name says no other number.

    Raises:
        UsageError: no such library or net (the text names the nearest one), or the library does not load here.
    """
    library, _, rest = model.partition(":")
    name, _, number = rest.partition(":")
    if library not in LIBRARIES:
        raise UsageError(f"model: there is no library {library!r} of nets. {nearest(library, LIBRARIES)}")
    if number and not (number.isdecimal() and int(number) > 0):
        raise UsageError(
            f"model: {model!r} ends in {number!r}, which is no number of outputs, such as {library}:{name}:10."
        )
    outputs = int(number) if number else outputs
    package = _imported(library, model)
    if library == "torchvision":
        known = [found for found in package.models.list_models(module=package.models) if found not in OWN_TRAINING]
        make = package.models.get_model
    else:
        known, make = package.list_models(), package.create_model
    if name not in known:
        raise UsageError(f"model: {library} has no net {name!r}. {nearest(name, known)}")
    off = {"weights": None} if library == "torchvision" else {"pretrained": False}
    return make(name, num_classes=outputs, **off)


def _imported(library: str, model: str) -> ModuleType:
    try:
        package = importlib.import_module(library)
        importlib.import_module(f"{library}.models")
        return package
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] in LIBRARIES:
            raise UsageError(
                f"model: {model} needs {error.name}, which is not installed here: `pip install 'ranksearch[vision]'`."
            ) from error
        raise UsageError(f"model: {model}: {library} does not load here: {error}.") from error
    except (ImportError, RuntimeError, OSError) as error:  # built for another torch
        raise UsageError(
            f"model: {model}: {library} is installed, but does not load beside torch {torch.__version__} ({first_line(error)}): "
            f"install the one that was built for this torch."
        ) from error
