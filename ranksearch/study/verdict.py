"""`Verdict`: which net to ship, and how far that can be trusted, as one value. Terminal, report, MLflow and JSON show this same one.

It is made of a front's record (what `front.json` holds) alone and loads neither torch nor optuna. Nothing is chosen by the test set: the
net is the one with the best validation metric within the budgets (of latency: as measured), or, where the study has a limit on its metric,
the cheapest one that keeps it.

The ± of an accuracy over n samples is one standard error of a binomial share, p(1 - p)/n with p = (correct + 2)/(n + 4), so that 100 % of
few samples is not certain (Agresti & Coull 1998); that of a difference takes two nets as independent, which is too much where they
fail on the same samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

from ranksearch.study.front_shape import FrontRecord, shape_in_words
from ranksearch.trial.metric import PERCENT, metric_text
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
"""The version of a front's record, raised where a key changes or goes. 1 had neither this key nor the state, counts and verdict."""
KEYS = {"test": "test_accuracy", "validation": "val_accuracy"}
NOISE = 2.0
"""Standard errors below which a difference is called noise."""
SLOWER = 1.05
"""Share of the dense net's time above which a net is said to be slower; what lies between is the measurement's."""
SEEN = 3.0
"""Standard errors that the dense net's validation may lie above its test before it is said to have seen those samples."""


@dataclass(frozen=True)
class Verdict:
    """Sentences for people, and the numbers in them. A sentence is empty where there is nothing to say."""

    state: str
    """complete, running or failed; see `front_record`."""
    trial: int | None
    """The net to ship; None where there is none."""
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
    """What the last trials gained, and what as many more would."""
    trials: str
    """How many trials ended how, with the commonest reason of failures."""
    warning: str
    split: str | None
    """The samples that `value`, `dense` and `difference` were measured on: "test", or "validation" where the test set was not read."""
    value: float | None = None
    dense: float | None = None
    difference: float | None = None
    """The net's metric less the dense net's, in the metric's own unit."""
    plus_minus: float | None = None
    """One standard error of the difference; None where the metric is no accuracy in percent, or the number of samples is not known."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def sentences(self) -> dict[str, str]:
        """What is said after the first sentence, by its heading; what there is nothing to say of is left out."""
        found = {
            "careful": self.warning, "why": self.why, "cheaper": self.cheaper, "front": self.front, "trust": self.trust, "done": self.done,
            "trials": self.trials,
        }  # fmt: skip
        return {heading: text for heading, text in found.items() if text}


def verdict_of(record: FrontRecord, *, where: str | None = None) -> Verdict:
    """The verdict on a study whose front's record this is.

    Args:
        where: how commands name the study; None is its name.
    """
    trials, state = record["trials"], record.get("state", "complete")
    said: dict[str, Any] = {"trials": _trials(record), "done": _done(record)}
    if not trials:
        return Verdict(state, None, _nothing(record), "", "", "", "", "", warning="", split=None, **said)
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
        trust=" ".join(filter(None, (_trust(record), _again(record)))),
        warning=_joined([_lost(record), _slow(record), _no_faster(record, row), _seen(record)]),
        split=split,
        value=row[key],
        dense=dense[key],
        difference=row[key] - dense[key],
        plus_minus=_error(record, split, row[key], dense[key]),
        **said,
    )


def _joined(sentences: Sequence[str]) -> str:
    """Sentences behind a heading, which begin small: from the second on with a capital."""
    first, *others = [sentence for sentence in sentences if sentence] or [""]
    return " ".join([first, *(sentence[0].upper() + sentence[1:] for sentence in others)])


def plus_minus(percent: float, samples: int) -> float:
    """One standard error, in points, of an accuracy in percent over so many samples; see above."""
    share = (min(max(percent, 0.0), 100.0) / 100 * samples + 2) / (samples + 4)
    return 100 * sqrt(share * (1 - share) / (samples + 4))


def _error(record: FrontRecord, split: str, *values: float) -> float | None:
    """One standard error of a value, or of the difference of two, where the metric is an accuracy in percent."""
    samples, metric = record.get("samples", {}).get(split), record["metric"]
    if samples is None or metric["name"] != "accuracy" or metric["unit"] != PERCENT:
        return None
    return sqrt(sum(plus_minus(value, samples) ** 2 for value in values))


def _difference(record: FrontRecord, split: str, value: float, other: float) -> str:
    """Such as `−0.77 ± 0.40`."""
    error, metric = _error(record, split, value, other), record["metric"]
    sign = "−" if value < other else "+"
    text = f"{sign}{metric_text(metric, abs(value - other))}"
    return text if error is None else f"{text} ± {error:.2f}"


def _ship(record: FrontRecord, row: FrontRecord, split: str) -> str:
    value, dense, metric = row[KEYS[split]], record["dense"][KEYS[split]], record["metric"]
    name = "" if metric["name"] == "accuracy" else f" {metric['name']}"
    beside = f"(dense {metric_text(metric, dense)}, {_difference(record, split, value, dense)})"
    so_far = "" if record.get("state", "complete") == "complete" else "so far "
    score = f"{so_far}{split}{name} {metric_text(metric, value, with_unit=True)} {beside}"
    return f"Ship trial {row['trial']}: {score}, {', '.join(cost_words(record, row))}."


def cost_words(record: FrontRecord, row: FrontRecord) -> list[str]:
    """A net's costs beside the dense net's: its share of the MACs (of the params where they are searched), how much smaller, its
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
            f"of least {cost} among the nets that keep {limit_words(record)} on validation "
            f"({metric_text(metric, row['val_accuracy'], with_unit=True)}); its plan: {made}."
        )
    best = "the most accurate" if metric["name"] == "accuracy" else f"the best {metric['name']}"
    made = MADE_BY.get(row["allocator"], row["allocator"])
    within = f" within {describe_budgets(record)}" if record["budgets"] else ""
    return (
        f"{best} on validation ({metric_text(metric, row['val_accuracy'], with_unit=True)}){within}; its plan: {made}."
    )


def _cheaper(record: FrontRecord, row: FrontRecord, split: str) -> str:
    """The next net of the front that costs less by the first cost that is searched."""
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
    error, apart = _error(record, split, other[key], row[key]), abs(other[key] - row[key])
    noise = (
        f" (within noise: {NOISE:g} standard errors are {NOISE * error:.1f})"
        if error is not None and apart < NOISE * error
        else ""
    )
    change = _difference(record, split, other[key], row[key])
    text = metric_text(metric, other[key], with_unit=True)
    return f"trial {other['trial']}, {', '.join(cost_words(record, other))}: {split} {text}, {change} against trial {row['trial']}{noise}."


def _trust(record: FrontRecord) -> str:
    """From how many samples the numbers are, and below what a difference is noise."""
    samples, dense, metric = record.get("samples", {}), record["dense"], record["metric"]
    parts = []
    for split, key in (("test", "test_accuracy"), ("validation", "val_accuracy")):
        count, value = samples.get(split), dense[key]
        if count is None or value is None:
            continue
        error = _error(record, split, value, value)
        below = "" if error is None else f" (differences below {NOISE * error:.1f} points are noise)"
        parts.append(f"{count:,} {split} samples{below}")
    timed = record.get("measured_with") if any(row.get("latency_ms") is not None for row in record["trials"]) else None
    ms = f" Milliseconds are medians, the nets in turn with the dense one: {timed}." if timed else ""
    if not parts:
        return ms.strip()
    n = "" if metric["name"] == "accuracy" else "; the ± of this metric is not known, judge by the number of samples"
    return f"{', '.join(parts)}; ± is one standard error{n}.".replace("; ± is one standard error;", ";") + ms


def _best(record: FrontRecord) -> FrontRecord:
    """The best net within the budgets that is still to be had; where every one is lost, the best that there was."""
    trials, lost = record["trials"], set(record.get("lost", []))
    there = [row for row in trials if row["trial"] not in lost] or trials
    return next((row for row in there if not over_budget(record, row)), there[0])


def _lost(record: FrontRecord) -> str:
    """Which nets of the front have numbers and no files any more."""
    if not (lost := [str(number) for number in record.get("lost", [])]):
        return ""
    if len(lost) == 1:
        return (
            f"the net of trial {lost[0]} is lost (a file is missing or empty): it is on the front by its numbers alone."
        )
    return f"the nets of trials {', '.join(lost)} are lost (files are missing or empty): they are on the front by their numbers alone."


def _slow(record: FrontRecord) -> str:
    """Which nets of the front measure above a budget on latency that they were predicted to keep."""
    slow = [str(row["trial"]) for row in record["trials"] if over_budget(record, row)]
    if not slow:
        return ""
    which = (
        "every net of the front measures" if len(slow) == len(record["trials"]) else f"trials {', '.join(slow)} measure"
    )
    which = f"trial {slow[0]} measures" if len(slow) == 1 else which
    return f"{which} above the budget latency ≤ {record['budgets']['latency']}, within which it was predicted to be."


def _again(record: FrontRecord) -> str:
    """What the nets that were trained again reached: mean and deviation over seeds."""
    said = []
    for row in record["trials"]:
        if not (again := row.get("repeats")):
            continue
        split = "test" if again["test_mean"] is not None else "validation"
        mean, apart = (again[f"{split}_{what}"] for what in ("mean", "std"))
        deviation = "" if apart is None else f" ± {metric_text(record['metric'], apart)}"
        failed = f", {again['failed']} more failed" if again["failed"] else ""
        said.append(
            f"trial {row['trial']} {split} {metric_text(record['metric'], mean)}{deviation} over {again['runs']} seeds{failed}"
        )
    return f"Trained again: {'; '.join(said)} (mean ± deviation)." if said else ""


def _no_faster(record: FrontRecord, row: FrontRecord) -> str:
    """Fewer MACs are no time saved where small layers cost as much as large ones, which the costs alone do not show."""
    ratio = row.get("latency_ratio")
    if ratio is None or ratio <= SLOWER:
        return ""
    return (
        f"trial {row['trial']} was measured to take {100 * (ratio - 1):.0f} % longer than the dense net, for all its fewer MACs: "
        f"search under `--budget latency=…`, or set the runtime and batch that it is deployed with (latency.runtime, latency.batch)."
    )


def _seen(record: FrontRecord) -> str:
    """A dense net whose validation lies far above its test was trained on those samples."""
    dense, metric = record["dense"], record["metric"]
    val, test, samples = dense["val_accuracy"], dense["test_accuracy"], record.get("samples", {})
    if test is None or metric["name"] != "accuracy" or metric["unit"] != PERCENT or not samples.get("validation"):
        return ""
    error = sqrt(
        plus_minus(val, samples["validation"]) ** 2
        + plus_minus(test, samples.get("test") or samples["validation"]) ** 2
    )
    if val - test <= max(1.0, SEEN * error):
        return ""
    return (
        f"the dense net reaches {val:.2f} % on validation and {test:.2f} % on test: it was probably trained on the validation samples, "
        f"so validation flatters every net here; compare by test."
    )


def _done(record: FrontRecord) -> str:
    """What the last trials gained, and what as many more would if the gain goes on halving with every doubling."""
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


def _trials(record: FrontRecord) -> str:
    """Such as `12 complete, 4 failed; most often: …`."""
    counts, failures = record.get("counts", {}), record.get("failures") or {}
    text = ", ".join(f"{count} {status}" for status, count in counts.items())
    if not failures.get("reason"):
        return f"{text}." if text else ""
    often = f"{failures['alike']} of {failures['count']}" if failures["count"] > 1 else "the reason"
    return f"{text}; {often}: {failures['reason']}"


def _nothing(record: FrontRecord) -> str:
    counts = record.get("counts", {})
    if not counts:
        return "No net to ship yet: no trial has ended."
    if counts.get("complete") and (best := record.get("best")) is not None and record.get("at_least") is not None:
        return (
            f"No net to ship: none keeps {limit_words(record)}; the best of them, trial {best['trial']}, reaches "
            f"{metric_text(record['metric'], best['val_accuracy'], with_unit=True)} (dense "
            f"{metric_text(record['metric'], record['dense']['val_accuracy'])}). Raise the budget, train longer (recipe.steps), or lower "
            f"the limit."
        )
    if counts.get("complete"):
        return (
            "No net to ship: every net was measured to be slower than the dense one. `ranksearch latency` says which layers gain; "
            "allow other lowerings, or another runtime or batch (latency.runtime, latency.batch)."
        )
    return f"No net to ship: none of {sum(counts.values())} trials was completed. {mend((record.get('failures') or {}).get('reason'))}"


def mend(reason: str | None) -> str:
    """What to change, by the commonest reason of failures."""
    reason = (reason or "").lower()
    if any(word in reason for word in ("nan", "finite", "diverged", "loss is", "inf")):
        return "They diverged: lower the learning rate (`--set recipe.lr=…`)."
    if "memory" in reason:
        return (
            "They ran out of memory: a smaller batch (`recipe.batch_size`, or the task's own loader), or more of the device per trial "
            "(`resources`)."
        )
    return "Mend what the reason names, then `ranksearch resume` with more `--trials`."


def commonest(reasons: Sequence[str]) -> dict[str, Any]:
    """Returns how many trials failed, the commonest first line of their reasons, and how many are like it (numbers apart)."""
    import re

    alike: dict[str, list[str]] = {}
    for reason in reasons:
        first = reason.splitlines()[0] if reason else "no reason was given"
        alike.setdefault(re.sub(r"[-+]?\d[\d.,e+-]*", "#", first), []).append(first)
    most = max(alike.values(), key=len, default=[])
    return {"count": len(reasons), "reason": most[0] if most else None, "alike": len(most)}
