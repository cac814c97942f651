"""`View`: a study as it is shown, in plain values. Figures, report, note and runs are made from it, even while the study goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ranksearch.allocate import cost_value
from ranksearch.compress import Cost
from ranksearch.costs import same_cost
from ranksearch.front.row import Row
from ranksearch.space.space import Space
from ranksearch.study.ledger import Ledger
from ranksearch.study.study import Study
from ranksearch.trial.metric import Metric
from ranksearch.words import COST_RATIOS


@dataclass(frozen=True)
class View:
    """What is known of a study at one moment."""

    folder: Path
    space: Space
    info: Mapping[str, Any]
    front: dict[str, Any]
    """What `front.json` holds."""
    trials: Sequence[Row]
    """Every finished trial, in their order."""

    @classmethod
    def of(cls, study: Study) -> View:
        return cls(study.folder, study.space, study.info, study.front_record(), study.rows)

    @property
    def name(self) -> str:
        return self.space.name

    @property
    def dense(self) -> Mapping[str, Any]:
        return self.front["dense"]

    @property
    def objectives(self) -> list[str]:
        return list(self.space.search.objectives)

    @property
    def metric(self) -> Metric:
        """The metric by which trials are judged."""
        return Metric.of_study(self.info)

    @property
    def costs(self) -> list[str]:
        return shown_costs(self.space)

    @property
    def table_costs(self) -> list[str]:
        """The costs in a table's columns: those searched, then params and size. MACs and FLOPs are one cost, with one name in a study."""
        compute = "flops" if "flops" in self.costs else "macs"
        return list(dict.fromkeys([*self.costs, compute, "params", "size"]))

    @property
    def on_front(self) -> set[int]:
        """Numbers of the trials on the front."""
        return {row["trial"] for row in self.front["trials"]}

    @property
    def previewed(self) -> Sequence[Mapping[str, float]]:
        """What a preview knows from the budget up, over the first cost; empty without a preview, or if it was made for another cost."""
        budgets = self.space.parsed_budgets()
        return self.front.get("preview", []) if budgets and same_cost(budgets[0].cost, self.costs[0]) else []

    @property
    def complete(self) -> list[Row]:
        return [row for row in self.trials if row.complete]

    @property
    def front_rows(self) -> list[Row]:
        """The front's rows with everything that is known about them, by rising cost."""
        on_front, ratio = self.on_front, COST_RATIOS[self.costs[0]]
        return sorted((row for row in self.trials if row["trial"] in on_front), key=lambda row: row[ratio] or 0.0)

    @property
    def champion(self) -> Row | None:
        """The trial of the front that the verdict names."""
        trial = self.front["verdict"]["trial"]
        return next((row for row in self.front["trials"] if row["trial"] == trial), None)

    def budget_ratio(self, cost: str) -> float | None:
        """The budget on `cost` as a share of the dense net's; None without one."""
        dense = Cost(*(self.dense[key] for key in ("macs", "params", "size_bytes", "latency_ms")))
        same = [budget for budget in self.space.parsed_budgets() if same_cost(budget.cost, cost)]
        limits = [budget.limit(dense) / cost_value(dense, budget.cost) for budget in same]
        return min(limits, default=None)

    def progress(self) -> list[tuple[Row, dict[str, float]]]:
        """Every finished trial, in the order in which they ended, with how far the study was after it."""
        least = self.metric.least_share(self.space.quality)
        ledger, found = Ledger(self.objectives, faster=self.space.has_latency, least=least), []
        for row in sorted(self.trials, key=lambda row: (row["ended"] or 0.0, row["trial"])):
            ledger.add(row)
            found.append((row, ledger.progress()))
        return found


def shown_costs(space: Space) -> list[str]:
    """The costs over which a front is shown: the objectives, else the first budget's, else MACs."""
    budgets = [budget.cost for budget in space.parsed_budgets()]
    return [name for name in space.search.objectives if name != "accuracy"] or budgets[:1] or ["macs"]


def cost_percent(row: Row | Mapping[str, Any], cost: str) -> float | None:
    """A row's cost in percent of the dense net's; None if it was not measured."""
    ratio = row.get(COST_RATIOS[cost])
    return 100 * ratio if ratio is not None else None
