"""How far the numbers of a front's record can be trusted: what a difference of accuracies is worth, from how many samples, how many seeds.

The ± of an accuracy over n samples is one standard error of a binomial share, p(1 - p)/n with p = (correct + 2)/(n + 4), so that 100 % of
few samples is not certain (Agresti & Coull 1998). The ± of a difference takes two nets as independent, which is too large if they fail
on the same samples.
"""

from __future__ import annotations

from math import sqrt

from ranksearch.front.front_shape import FrontRecord
from ranksearch.trial.metric import PERCENT, metric_difference, metric_text

NOISE = 2.0
"""Standard errors below which a difference is called noise."""
SEEN = 3.0
"""By how many standard errors the dense net's validation may exceed its test before it counts as having seen those samples."""


def plus_minus(percent: float, samples: int) -> float:
    """One standard error, in points, of an accuracy in percent over so many samples; see above."""
    share = (min(max(percent, 0.0), 100.0) / 100 * samples + 2) / (samples + 4)
    return 100 * sqrt(share * (1 - share) / (samples + 4))


def standard_error(record: FrontRecord, split: str, *values: float) -> float | None:
    """One standard error of a value, or of the difference of two, where the metric is an accuracy in percent."""
    samples, metric = record.get("samples", {}).get(split), record["metric"]
    if samples is None or metric["name"] != "accuracy" or metric["unit"] != PERCENT:
        return None
    return sqrt(sum(plus_minus(value, samples) ** 2 for value in values))


def difference(record: FrontRecord, split: str, value: float, other: float) -> str:
    """How far a value is from another one, such as `−0.77 ± 0.40`; `0.025 better` where less is better."""
    error, metric = standard_error(record, split, value, other), record["metric"]
    text = metric_difference(metric, value, other)
    if metric["direction"] == "minimize" and value != other:
        return f"{text} {'better' if value < other else 'worse'}"
    text = f"{'−' if value < other else '+'}{text}"
    return text if error is None else f"{text} ± {error:.2f}"


def trust(record: FrontRecord) -> str:
    """Says how many samples the numbers come from, and below what a difference is noise."""
    samples, dense, metric = record.get("samples", {}), record["dense"], record["metric"]
    parts = []
    for split, key in (("test", "test_accuracy"), ("validation", "val_accuracy")):
        count, value = samples.get(split), dense[key]
        if count is None or value is None:
            continue
        error = standard_error(record, split, value, value)
        below = "" if error is None else f" (differences below {NOISE * error:.1f} points are noise)"
        parts.append(f"{count:,} {split} samples{below}")
    timed = record.get("measured_with") if any(row.get("latency_ms") is not None for row in record["trials"]) else None
    ms = f" Milliseconds are medians, the nets in turn with the dense one: {timed}." if timed else ""
    if not parts:
        return ms.strip()
    n = "" if metric["name"] == "accuracy" else "; the ± of this metric is not known, judge by the number of samples"
    return f"{', '.join(parts)}; ± is one standard error{n}.".replace("; ± is one standard error;", ";") + ms


def again(record: FrontRecord) -> str:
    """Says what the nets that were trained again reached: mean and deviation over seeds."""
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


def shared(record: FrontRecord) -> str:
    """Says that all nets of a nested study depend on one run, and how it compares with the study's other runs."""
    if (nested := record.get("nested")) is None:
        return ""
    best, metric = nested["trial"], record["metric"]
    others = [
        f"trial {number} {'left no weights' if score is None else metric_text(metric, score, with_unit=True)}"
        for number, score in nested["scores"].items()
        if int(number) != best
    ]
    score = metric_text(metric, nested["scores"][str(best)], with_unit=True)
    runs = f", the best of {len(others) + 1} by the mean of its levels ({score}; {', '.join(others)})" if others else ""
    return (
        f"Every net is cut from the weights of one run, trial {best}{runs}, or of its mixture with the dense net: what that run missed, "
        f"most of them miss."
    )


def seen(record: FrontRecord) -> str:
    """Warns of a dense net whose validation lies far above its test: it was probably trained on the validation samples."""
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
