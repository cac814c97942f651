"""What went wrong in a study, from a front's record: how many trials ended how, their commonest reason, and what to change.

`cautions.py` says what is wrong with nets that were made.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ranksearch.front.front_shape import FrontRecord
from ranksearch.trial.metric import metric_text
from ranksearch.words import limit_words


def trials_in_words(record: FrontRecord) -> str:
    """How many trials ended how, such as `12 complete, 4 failed; 3 of 4: …`."""
    counts, failures = record.get("counts", {}), record.get("failures") or {}
    text = ", ".join(f"{count} {status}" for status, count in counts.items())
    if not failures.get("reason"):
        return f"{text}." if text else ""
    often = f"{failures['alike']} of {failures['count']}" if failures["count"] > 1 else "the reason"
    return f"{text}; {often}: {failures['reason']}"


def nothing_to_ship(record: FrontRecord) -> str:
    """Why there is no net to ship, and what to change."""
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
    """What to change, given the commonest reason of failures."""
    reason = (reason or "").lower()
    if re.search(r"\b(nan|inf|infinite|finite|nonfinite|diverged)\b|\bloss is\b", reason):
        return "They diverged: lower the learning rate (`--set recipe.lr=…`)."
    if "memory" in reason:
        return (
            "They ran out of memory: take a smaller batch (`recipe.batch_size`, or the task's own loader), or give each trial more of "
            "the device (`resources`)."
        )
    return "Mend what the reason names, then run `ranksearch resume` with more `--trials`."


def commonest(reasons: Sequence[str]) -> dict[str, Any]:
    """Returns how many trials failed, the commonest first line of their reasons, and how many are like it but for their numbers."""
    alike: dict[str, list[str]] = {}
    for reason in reasons:
        first = reason.splitlines()[0] if reason else "no reason was given"
        alike.setdefault(re.sub(r"[-+]?\d[\d.,e+-]*", "#", first), []).append(first)
    most = max(alike.values(), key=len, default=[])
    return {"count": len(reasons), "reason": most[0] if most else None, "alike": len(most)}
