"""`Verdict`: which net to ship, and how far that can be trusted, as one value. Terminal, report, MLflow and JSON show this same one.

It is made only from a front's record (what `front.json` holds) and loads neither torch nor optuna. Nothing is chosen by the test set: the
net is the one with the best validation metric within the budgets (for latency: as measured), or, if the study has a limit on its metric,
the cheapest one that keeps it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ranksearch.front.cautions import lost, no_faster, slow
from ranksearch.front.certainty import NOISE, again, difference, seen, shared, standard_error, trust
from ranksearch.front.failures import nothing_to_ship, trials_in_words
from ranksearch.front.front_shape import FrontRecord, shape_in_words
from ranksearch.trial.metric import metric_text
from ranksearch.words import (
    COST_NAMES,
    MADE_BY,
    describe_budgets,
    limit_words,
    over_budget,
    percent_of_dense,
    shown_costs,
)

SCHEMA = 2
"""The version of a front's record, raised when a key changes or goes. 1 had neither this key nor the state, counts and verdict."""
KEYS = {"test": "test_accuracy", "validation": "val_accuracy"}


@dataclass(frozen=True)
class Verdict:
    """Sentences for people, and the numbers in them. A sentence is empty if there is nothing to say."""

    state: str
    """complete, running or failed; see `front_record`."""
    trial: int | None
    """The trial whose net to ship; None if there is none."""
    ship: str
    """Which net, its test beside dense's test, its costs."""
    export: str
    """The command that writes it for another runtime."""
    why: str
    cheaper: str
    """The next cheaper net of the front, with what it costs."""
    front: str
    """The front's shape: where it bends, what more budget would give."""
    trust: str
    done: str
    """What the last trials gained, and what as many more would gain."""
    trials: str
    """How many trials ended how, with the commonest reason of failures."""
    warning: str
    split: str | None
    """The samples on which `value`, `dense` and `difference` were measured: "test", or "validation" if the test set was not read."""
    value: float | None = None
    dense: float | None = None
    difference: float | None = None
    """The net's metric less the dense net's, in the metric's own unit."""
    plus_minus: float | None = None
    """One standard error of the difference; None if the metric is not an accuracy in percent, or the number of samples is not known."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def sentences(self) -> dict[str, str]:
        """The sentences after the first one, by their headings; empty ones are left out."""
        found = {
            "careful": self.warning, "why": self.why, "cheaper": self.cheaper, "front": self.front, "trust": self.trust, "done": self.done,
            "trials": self.trials,
        }  # fmt: skip
        return {heading: text for heading, text in found.items() if text}


def verdict_of(record: FrontRecord, *, where: str | None = None) -> Verdict:
    """The verdict on a study, from its front's record.

    Args:
        where: how commands name the study; None stands for its name.
    """
    trials, state = record["trials"], record.get("state", "complete")
    said: dict[str, Any] = {"trials": trials_in_words(record), "done": _done(record)}
    if not trials:
        return Verdict(state, None, nothing_to_ship(record), "", "", "", "", "", warning="", split=None, **said)
    dense, row = record["dense"], _best(record)
    split = "test" if row["test_accuracy"] is not None and dense["test_accuracy"] is not None else "validation"
    key = KEYS[split]
    return Verdict(
        state=state,
        trial=row["trial"],
        ship=_ship(record, row, split),
        export=f"ranksearch export {where or record['study']} {row['trial']} --format onnx",
        why=_why(record, row),
        cheaper=_cheaper(record, row, split),
        front=shape_in_words(record),
        trust=" ".join(filter(None, (trust(record), again(record), shared(record)))),
        warning=_joined([lost(record), slow(record), no_faster(record, row), seen(record)]),
        split=split,
        value=row[key],
        dense=dense[key],
        difference=row[key] - dense[key],
        plus_minus=standard_error(record, split, row[key], dense[key]),
        **said,
    )


def _joined(sentences: Sequence[str]) -> str:
    """Joins sentences behind a heading: the first begins with a small letter, the others with a capital."""
    first, *others = [sentence for sentence in sentences if sentence] or [""]
    return " ".join([first, *(sentence[0].upper() + sentence[1:] for sentence in others)])


def _ship(record: FrontRecord, row: FrontRecord, split: str) -> str:
    value, dense, metric = row[KEYS[split]], record["dense"][KEYS[split]], record["metric"]
    name = "" if metric["name"] == "accuracy" else f" {metric['name']}"
    beside = f"(dense {metric_text(metric, dense)}, {difference(record, split, value, dense)})"
    so_far = "" if record.get("state", "complete") == "complete" else "so far "
    score = f"{so_far}{split}{name} {metric_text(metric, value, with_unit=True)} {beside}"
    return f"Ship trial {row['trial']}: {score}, {', '.join(cost_words(record, row))}."


def cost_words(record: FrontRecord, row: FrontRecord) -> list[str]:
    """A net's costs beside the dense net's: its share of the MACs (or of the params, if they are searched), how much smaller it is, and its
    milliseconds, measured or predicted."""
    costs = shown_costs(record)
    counted = [cost for cost in ("flops", "macs", "params") if cost in costs] or ["macs"]
    shares = {cost: percent_of_dense(row, cost) for cost in counted}
    words = [f"{share:.0f} % of the {COST_NAMES[cost]}" for cost, share in shares.items() if share is not None]
    words.append(_smaller(1 / row["size_ratio"]))
    if row.get("latency_ms") is not None and row.get("latency_ratio"):
        words.append(f"{_ms(row['latency_ms'])} ms against {_ms(row['latency_ms'] / row['latency_ratio'])} ms")
    elif row.get("latency_predicted_ms") is not None:
        words.append(f"{_ms(row['latency_predicted_ms'])} ms predicted")
    return words


def _smaller(factor: float) -> str:
    return f"{factor:.1f}× smaller" if factor >= 1.05 else "as large" if factor > 0.95 else f"{1 / factor:.1f}× larger"


def _ms(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _why(record: FrontRecord, row: FrontRecord) -> str:
    metric, limit = record["metric"], record.get("at_least")
    if limit is not None:
        made, cost = MADE_BY.get(row["allocator"], row["allocator"]), COST_NAMES[shown_costs(record)[0]]
        return (
            f"the one with the least {cost} among the nets that keep {limit_words(record)} on validation "
            f"({metric_text(metric, row['val_accuracy'], with_unit=True)}); its plan: {made}."
        )
    best = "the most accurate" if metric["name"] == "accuracy" else f"the best {metric['name']}"
    made = MADE_BY.get(row["allocator"], row["allocator"])
    within = f" within {describe_budgets(record)}" if record["budgets"] else ""
    return (
        f"{best} on validation ({metric_text(metric, row['val_accuracy'], with_unit=True)}){within}; its plan: {made}."
    )


def _cheaper(record: FrontRecord, row: FrontRecord, split: str) -> str:
    """Describes the next net of the front that costs less, by the first cost that is searched."""
    cost = shown_costs(record)[0]
    mine = percent_of_dense(row, cost)
    less = [
        r for r in record["trials"] if mine is not None and (p := percent_of_dense(r, cost)) is not None and p < mine
    ]
    if not less:
        return ""
    other, metric = less[0], record["metric"]
    key = "test_accuracy" if split == "test" and other["test_accuracy"] is not None else "val_accuracy"
    split = "test" if key == "test_accuracy" else "validation"
    error, apart = standard_error(record, split, other[key], row[key]), abs(other[key] - row[key])
    noise = (
        f" (within noise: {NOISE:g} standard errors are {NOISE * error:.1f})"
        if error is not None and apart < NOISE * error
        else ""
    )
    change = difference(record, split, other[key], row[key])
    against = "than" if record["metric"]["direction"] == "minimize" and apart else "against"
    score = f"{split} {metric_text(metric, other[key], with_unit=True)}"
    costs = ", ".join(cost_words(record, other))
    return f"trial {other['trial']}, {costs}: {score}, {change} {against} trial {row['trial']}{noise}."


def _best(record: FrontRecord) -> FrontRecord:
    """The best net within the budgets whose files are still there; if all are lost, the best that there was."""
    trials, lost = record["trials"], set(record.get("lost", []))
    there = [row for row in trials if row["trial"] not in lost] or trials
    return next((row for row in there if not over_budget(record, row)), there[0])


def _done(record: FrontRecord) -> str:
    """Says what the last trials gained, and what as many more would gain if the gain keeps halving with every doubling."""
    gains, counts = record.get("gains"), record.get("counts", {})
    finished, planned = sum(counts.values()), record.get("planned", 0)
    if not gains or not record["trials"]:
        return ""
    what = "the front's hypervolume" if len(record["objectives"]) > 1 else "the best net"
    missing = (
        f"{planned - finished} of {planned} trials are still to come; " if record.get("state") == "running" else ""
    )
    which = "the last trial" if gains["last"] == 1 else f"the last {gains['last']}"
    last = "added nothing to" if gains["last_gain"] <= 0 else f"added {_percent(gains['last_gain'])} to"
    more = (
        f"; twice as many would add about {_percent(gains['half_gain'])} more, as the second half of these did"
        if gains["half_gain"] > 0
        else ""
    )
    return f"{missing}{which} of {finished} {last} {what}{more}."


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share >= 0.0005 else "less than 0.05 %"
