"""What to be careful of in the nets of a front, from its record: nets that are lost, over a budget as measured, or no faster.

That a dense net has seen its validation samples is told in `certainty.py`.
"""

from __future__ import annotations

from ranksearch.study.front_shape import FrontRecord
from ranksearch.words import over_budget

SLOWER = 1.05
"""Share of the dense net's time above which a net is said to be slower; what lies between is the measurement's."""


def lost(record: FrontRecord) -> str:
    """Which nets of the front have numbers and no files any more."""
    if not (lost := [str(number) for number in record.get("lost", [])]):
        return ""
    if len(lost) == 1:
        return (
            f"the net of trial {lost[0]} is lost (a file is missing or empty): it is on the front by its numbers alone."
        )
    return f"the nets of trials {', '.join(lost)} are lost (files are missing or empty): they are on the front by their numbers alone."


def slow(record: FrontRecord) -> str:
    """Which nets of the front measure above a budget on latency that they were predicted to keep."""
    slow = [str(row["trial"]) for row in record["trials"] if over_budget(record, row)]
    if not slow:
        return ""
    which = (
        "every net of the front measures" if len(slow) == len(record["trials"]) else f"trials {', '.join(slow)} measure"
    )
    which = f"trial {slow[0]} measures" if len(slow) == 1 else which
    return f"{which} above the budget latency ≤ {record['budgets']['latency']}, within which it was predicted to be."


def no_faster(record: FrontRecord, row: FrontRecord) -> str:
    """Fewer MACs are no time saved where small layers cost as much as large ones, which the costs alone do not show."""
    ratio = row.get("latency_ratio")
    if ratio is None or ratio <= SLOWER:
        return ""
    return (
        f"trial {row['trial']} was measured to take {100 * (ratio - 1):.0f} % longer than the dense net, for all its fewer MACs: "
        f"search under `--budget latency=…`, or set the runtime and batch that it is deployed with (latency.runtime, latency.batch)."
    )
