"""ranksearch: give it a PyTorch net, data and a budget; get back the Pareto front of low-rank nets you can deploy.

    ranksearch.search("space.yaml").front          run a study; observer=Terminal() prints a line per trial
    ranksearch.preview("space.yaml")               the front that allocation alone gives, before any training
    ranksearch.allocate(model, x, {"flops": "50%"})  a plan within a budget, without a study
    ranksearch.compress(model, plan)               the compressed net
    ranksearch.project_(model, plan)               projection, once; Projector(plan) in a training loop of your own
    ranksearch.project_every(model, optimizer, plan, period=100)  the same in any loop that calls optimizer.step()
    ranksearch.Task(model=net, train=…, val=…)     your own net and data, for `task: FILE.py:FUNCTION`
    ranksearch.load("runs/NAME/trials/007")        a net of a study
    ranksearch.export("NAME", "best", format="onnx")  that net for another runtime, checked against it
    ranksearch.save(net, "kept", like="runs/NAME/trials/007")  a net that was trained further; load("kept") reads it

Importing the package loads none of torch, ray and mlflow; they are imported at the first use of a name.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what an editor and mypy see; at run time a name is imported at its first use
    from ranksearch.allocate import LayerRule
    from ranksearch.allocate.allocate import allocate
    from ranksearch.api import preview, report, resume, search, sync
    from ranksearch.calibration.calibrate import calibrate
    from ranksearch.calibration.weightings import weightings
    from ranksearch.compress import (
        LayerPlan,
        Projector,
        RankPlan,
        plan_cost,
        project_,
        project_every,
        reestimate_bn_,
    )
    from ranksearch.compress.factor_steps import match_steps_
    from ranksearch.compress.surgery import compress
    from ranksearch.console import Terminal
    from ranksearch.errors import RanksearchError, StudyError, UsageError
    from ranksearch.model.trace import trace
    from ranksearch.nets import export, load, save
    from ranksearch.study.study import Study
    from ranksearch.tasks.imagefolder import ImageFolder
    from ranksearch.tasks.task import Task

__version__ = "0.1.0"

_HOMES = {
    "search": "ranksearch.search",
    "allocate": "ranksearch.allocate",
    "compress": "ranksearch.compress",
    "resume": "ranksearch.api:resume",
    "load": "ranksearch.nets:load",
    "export": "ranksearch.nets:export",
    "save": "ranksearch.nets:save",
    "ImageFolder": "ranksearch.tasks.imagefolder:ImageFolder",
    "preview": "ranksearch.api:preview",
    "sync": "ranksearch.api:sync",
    "report": "ranksearch.api:report",
    "project_": "ranksearch.compress:project_",
    "Projector": "ranksearch.compress:Projector",
    "project_every": "ranksearch.compress:project_every",
    "reestimate_bn_": "ranksearch.compress:reestimate_bn_",
    "match_steps_": "ranksearch.compress.factor_steps:match_steps_",
    "trace": "ranksearch.compress:trace",
    "plan_cost": "ranksearch.compress:plan_cost",
    "plan_to": "ranksearch.deploy.plan_to:plan_to",
    "save_pretrained": "ranksearch.deploy.hugging_face:save_pretrained",
    "from_pretrained": "ranksearch.deploy.hugging_face:from_pretrained",
    "RankPlan": "ranksearch.compress:RankPlan",
    "LayerPlan": "ranksearch.compress:LayerPlan",
    "LayerRule": "ranksearch.allocate:LayerRule",
    "calibrate": "ranksearch.calibration.calibrate:calibrate",
    "weightings": "ranksearch.calibration.weightings:weightings",
    "Task": "ranksearch.tasks.task:Task",
    "Study": "ranksearch.study.study:Study",
    "Terminal": "ranksearch.console:Terminal",
    "RanksearchError": "ranksearch.errors:RanksearchError",
    "UsageError": "ranksearch.errors:UsageError",
    "StudyError": "ranksearch.errors:StudyError",
}
"""Public name -> "module:attribute"; `search`, `allocate` and `compress` are packages that can be called."""

__all__ = [
    "ImageFolder",
    "LayerPlan",
    "LayerRule",
    "Projector",
    "RankPlan",
    "RanksearchError",
    "Study",
    "StudyError",
    "Task",
    "Terminal",
    "UsageError",
    "__version__",
    "allocate",
    "calibrate",
    "compress",
    "export",
    "from_pretrained",
    "load",
    "match_steps_",
    "plan_cost",
    "plan_to",
    "preview",
    "project_",
    "project_every",
    "reestimate_bn_",
    "report",
    "resume",
    "save",
    "save_pretrained",
    "search",
    "sync",
    "trace",
    "weightings",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ranksearch' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
