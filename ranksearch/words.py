"""What costs and the makers of plans are called wherever a person reads of them: one word for one thing. Loads no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ranksearch.costs import COSTS

Log = Callable[[str], None]
"""A function that is told how something goes, one sentence at a time."""
Note = Callable[[str, str], None]
"""A function that is told how far a part of the work is, such as ("test set", "3 of 7 nets")."""


def unnoted(part: str, how_far: str) -> None:
    """A `Note` that nobody reads."""


COST_RATIOS = {name: kind.ratio for name, kind in COSTS.items()}
"""Cost -> the key under which a record holds it as a ratio of the dense net's."""
COST_NAMES = {name: kind.label for name, kind in COSTS.items()}
MADE_BY = {
    "search": "proposed by the search's sampler from what the trials before it found",
    "solver": "the solver's plan: the least damage that measured sensitivities predict",
    "uniform": "the same share of its rank kept in every layer",
    "energy": "the same share of its energy kept in every layer",
    "minimax": "the layers' largest relative error made as small as it can be",
    "evbmf": "ranks that variational Bayes estimates for each layer",
    "stable_rank": "ranks in proportion to the layers' stable ranks",
    "greedy": "layers chosen by scoring the net with each of them lowered alone",
    "random": "drawn at random",
    "warm start": "the plan of an earlier study",
}
"""Who made a plan -> what that means to somebody who reads of it for the first time."""

PARAMETERS = {
    "level": ("share of the budget used", "1: all of it"),
    "trust": ("trust in the sensitivities", "1: as measured, 0: none"),
    "prediction": ("what makes the plan", ""),
    "lr": ("learning rate", ""),
    "calibration": ("fit to the dense net", "before training"),
    "factor_lr": ("learning rate of the factors", "as a multiple"),
    "factor_steps": ("steps of the factors", ""),
    "factor_share": ("training of the factors", "share of the steps"),
    "optimizer": ("optimizer", ""),
    "momentum": ("momentum", ""),
    "schedule": ("learning-rate schedule", ""),
    "warmup": ("warm-up", "share of the steps"),
    "weight_decay": ("weight decay", ""),
    "label_smoothing": ("label smoothing", ""),
    "clip_norm": ("largest gradient norm", "0: any"),
    "ema": ("averaging of the weights", "decay"),
    "projection.period": ("steps between projections", ""),
    "projection.start": ("first projection", "share of the dense steps"),
    "projection.until_end": ("last periodic projection", "share of the dense steps"),
    "projection.schedule": ("spacing of projections", ""),
    "projection.removed_energy": ("energy a projection should remove", "share"),
    "projection.rank_annealing": ("time in which ranks come down", "share of the dense steps"),
    "projection.momentum": ("momentum after a projection", ""),
    "projection.energy_transfer": ("energy transfer at projections", ""),
    "projection.bn_rectification": ("BN rectification at projections", ""),
    "distillation.weight": ("weight of distillation", "share of the loss"),
    "distillation.temperature": ("temperature of distillation", ""),
    "log_weight": ("protection of {}", "more keeps more of its rank, 0: as predicted"),
    "lowering": ("lowering of {}", ""),
    "ratio": ("rank kept in {}", "share of the largest useful one"),
}
"""Searched parameter -> what figures and sentences call it, and what its values mean where the name leaves that open.

A parameter of a group of layers, `KIND/GROUP`, is listed by its kind alone. One that is missing goes by its own name.
"""


def parameter_label(name: str) -> str:
    """What a searched parameter is called on an axis, such as `protection of layer1` for `log_weight/layer1`."""
    kind, _, group = name.partition("/")
    group = f"layer {group}" if group[:1].isdigit() else group  # as in an nn.Sequential
    return PARAMETERS.get(kind, (name, ""))[0].format(group)


def parameter_meaning(name: str) -> str:
    """What a searched parameter's values mean; empty where its label says it."""
    return PARAMETERS.get(name.partition("/")[0], ("", ""))[1]


def parameter_in_words(name: str) -> str:
    """A searched parameter's label with what its values mean, and the name it is stored under where that is another."""
    label = parameter_label(name)
    behind = "; ".join(text for text in (parameter_meaning(name), name if name != label else "") if text)
    return f"{label} ({behind})" if behind else label


def describe_budgets(record: Mapping[str, Any]) -> str:
    """The budgets of a front's record in words, such as `MACs ≤ 50%, size ≤ 1MiB`."""
    words = []
    for cost, text in record["budgets"].items():
        compute = "FLOPs" if "flops" in shown_costs(record) else "MACs"
        # a share of MACs is the same share of FLOPs: a study uses one word for both
        relative = cost in ("macs", "flops") and str(text).strip().endswith("%")
        words.append(f"{compute if relative else COST_NAMES[cost]} ≤ {text}")
    return ", ".join(words) or "no budget"


def limit_words(record: Mapping[str, Any]) -> str:
    """The limit on the metric of a front's record in words, such as `accuracy ≥ 91.40 %`; empty without one."""
    limit, metric = record.get("at_least"), record["metric"]
    if limit is None:
        return ""
    value = f"{limit['value']:.2f} %" if metric["unit"] == "%" else f"{limit['value']:.4g} {metric['unit']}".rstrip()
    return f"{metric['name']} {'≥' if metric['direction'] == 'maximize' else '≤'} {value}"


def shown_costs(record: Mapping[str, Any]) -> list[str]:
    """The costs that a front's record is shown over: the objectives, else the first budget's, else MACs."""
    given = record["objectives"]  # a preview's record has their names alone
    objectives = [objective if isinstance(objective, str) else objective["name"] for objective in given]
    return [name for name in objectives if name != "accuracy"] or list(record["budgets"])[:1] or ["macs"]


def percent_of_dense(row: Mapping[str, Any], cost: str) -> float | None:
    """A record's cost in percent of the dense net's; None where it was not measured."""
    ratio = row.get(COST_RATIOS[cost])
    return None if ratio is None else 100 * ratio


def over_budget(record: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    """Whether a net was measured to be slower than a budget on latency allows, although it was predicted to keep it."""
    limits = record.get("latency_limits") or {}
    return any(row.get(key) is not None and row[key] > limit for key, limit in limits.items())


def dense_ms(record: Mapping[str, Any]) -> float | None:
    """The dense net's time where all nets of a front's record were timed together with it; None where each was timed with its own."""
    times = {round(row["latency_ms"] / row["latency_ratio"], 9) for row in record["trials"] if row.get("latency_ratio")}
    return times.pop() if len(times) == 1 else None


def mix_of(plan: Mapping[str, Any]) -> str:
    """How many layers of a plan's dictionary take which lowering, the most frequent first, such as `spatial 12 · dense 4`."""
    counts: dict[str, int] = {}
    for layer in plan["layers"].values():
        counts[layer["lowering"]] = counts.get(layer["lowering"], 0) + 1
    return " · ".join(f"{name} {count}" for name, count in sorted(counts.items(), key=lambda item: -item[1])) or "dense"


def number(value: float | None, form: str = ",d") -> str:
    """A value for a table cell; what was not measured is a dash."""
    return "–" if value is None else format(value, form)
