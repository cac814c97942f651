"""What to be careful of in the nets of a front, from its record: nets that are lost, measured above a budget, or no faster.

`certainty.py` tells whether the dense net has seen its validation samples.
"""

from __future__ import annotations

from ranksearch.front.front_shape import FrontRecord
from ranksearch.words import over_budget

SLOWER = 1.05
"""A net is called slower above this share of the dense net's time; less is within the measurement's error."""


def lost(record: FrontRecord) -> str:
    """Names the nets of the front whose files are lost, so that only their numbers are left."""
    if not (lost := [str(number) for number in record.get("lost", [])]):
        return ""
    if len(lost) == 1:
        return (
            f"the net of trial {lost[0]} is lost (a file is missing or empty): it is on the front by its numbers only."
        )
    return f"the nets of trials {', '.join(lost)} are lost (files are missing or empty): they are on the front by their numbers only."


def slow(record: FrontRecord) -> str:
    """Names the nets of the front that measure above a budget on latency which they were predicted to keep."""
    slow = [str(row["trial"]) for row in record["trials"] if over_budget(record, row)]
    if not slow:
        return ""
    which = (
        "every net of the front measures" if len(slow) == len(record["trials"]) else f"trials {', '.join(slow)} measure"
    )
    which = f"trial {slow[0]} measures" if len(slow) == 1 else which
    return f"{which} above the budget latency ≤ {record['budgets']['latency']}, within which it was predicted to be."


def no_faster(record: FrontRecord, row: FrontRecord) -> str:
    """Says that a net with fewer MACs saves no time, as where small layers take as long as large ones; its costs do not show that."""
    ratio = row.get("latency_ratio")
    if ratio is None or ratio <= SLOWER:
        return ""
    return (
        f"trial {row['trial']} was measured to take {100 * (ratio - 1):.0f} % longer than the dense net, although it has fewer MACs: "
        f"search under `--budget latency=…`, or set the runtime and batch that it is deployed with (latency.runtime, latency.batch)."
    )
