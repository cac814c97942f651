"""What a preview of the same net knows beyond a study's budget: plans that were decomposed and scored, not trained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from ranksearch.space.space import Space
from ranksearch.store.where import PREVIEW
from ranksearch.words import COST_RATIOS

PREVIEWED = "preview.json"


def beyond_budget(folder: Path, space: Space, direction: str) -> list[dict[str, float]]:
    """The best previewed plan of each level from the budget up, by rising cost: `percent` of the dense net's cost, `val_accuracy`.

    The first one is the budget's own, to compare the others with. The list is empty if there is no preview of this net under this budget,
    if it cannot be read, or if it has nothing above the budget.

    Args:
        direction: of the metric, "maximize" or "minimize".
    """
    try:
        record = json.loads((folder / PREVIEW / PREVIEWED).read_text(encoding="utf-8"))
        same = (record["task"], record["model"]) == (space.task, space.model)
        own = record["own_level"]
        if not same or own is None or record["budgets"] != {name: str(text) for name, text in space.budgets.items()}:
            return []
        ratio = COST_RATIOS[record["cost"]]
        levels: dict[float, list[dict[str, float]]] = {}
        for plan in record["plans"]:
            if plan["level"] >= own - 0.01:  # levels are kept with four digits
                point = {"percent": 100 * float(plan[ratio]), "val_accuracy": float(plan["val_accuracy"])}
                levels.setdefault(float(plan["level"]), []).append(point)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return []
    sign = -1 if direction == "minimize" else 1
    best = [max(levels[level], key=lambda point: sign * point["val_accuracy"]) for level in sorted(levels)]
    return best if len(best) > 1 and all(map(_whole, best)) else []


def _whole(point: Mapping[str, Any]) -> bool:
    return all(map(isfinite, point.values()))
