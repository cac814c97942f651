"""A compressed net of Hugging Face in its own folder: `config.json` holds the plan, `model.safetensors` the factors.

transformers itself would build the dense net from such a folder; `from_pretrained` here builds the compressed one. Nothing but
transformers' own classes is run: a folder with code of its own is refused.
"""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import nn

from ranksearch.compress.surgery import restructure_
from ranksearch.errors import UsageError, first_line
from ranksearch.lowering.tiled import settle_
from ranksearch.model.copying import memory
from ranksearch.model.plan import RankPlan

KEY = "ranksearch_plan"
"""The plan's name in a config."""


def save_pretrained(model: nn.Module, plan: RankPlan, folder: str | Path) -> None:
    """Writes a compressed net of Hugging Face by its own `save_pretrained`, with the plan in its config.

    Args:
        model: what `compress(net, plan)` returned, fine-tuned or not.

    Raises:
        UsageError: the model is not one of Hugging Face.
    """
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(model, "save_pretrained"):
        raise UsageError(
            f"save_pretrained takes a model of Hugging Face, got a {type(model).__name__}: any other is written by `ranksearch.save`."
        )
    setattr(config, KEY, plan.to_dict())
    save: Any = model.save_pretrained
    # by the net's own names: those of older checkpoints (experts one by one) are made of its dense weights
    own_names = {"save_original_format": False} if "save_original_format" in signature(save).parameters else {}
    try:
        save(str(folder), **own_names)
    finally:
        delattr(config, KEY)


def from_pretrained(folder: str | Path) -> nn.Module:
    """The compressed net that `save_pretrained` wrote to `folder`, in evaluation mode. Runs no pickle and no code of the folder.

    Raises:
        UsageError: a file is missing or damaged, the config holds no plan, or transformers has no such class.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} holds no model of Hugging Face: config.json is missing.")
    try:
        import transformers
    except ImportError as error:
        raise UsageError(
            "from_pretrained needs transformers, which is not installed here: `pip install transformers`."
        ) from error
    config: Any = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if not isinstance(getattr(config, KEY, None), dict):
        raise UsageError(
            f"{folder / 'config.json'} holds no plan ({KEY}): load it by transformers' own from_pretrained."
        )
    plan = RankPlan.from_dict(getattr(config, KEY))
    delattr(config, KEY)
    names = config.architectures or []
    if len(names) != 1 or not hasattr(transformers, names[0]):
        raise UsageError(f"{folder / 'config.json'}: architectures {names} is no class of transformers.")
    model = restructure_(getattr(transformers, names[0])(config), plan)
    _fill_(model, folder)
    return settle_(model).eval()


def _fill_(model: nn.Module, folder: Path) -> None:
    state: dict[str, Any] = {}
    try:
        for path in sorted(folder.glob("*.safetensors")):
            state |= safetensors.torch.load_file(path)
        missing, unexpected = model.load_state_dict(state, strict=False)
    except (SafetensorError, RuntimeError) as error:
        raise UsageError(f"The weights in {folder} do not fit its plan: {first_line(error)}") from error
    own = model.state_dict()
    there = {memory(own[name]) for name in state if name in own}
    missing = [name for name in missing if memory(own[name]) not in there]  # a tied weight is written once
    if missing or unexpected:
        raise UsageError(f"The weights in {folder} do not fit its plan: {', '.join([*missing, *unexpected][:3])} …")
