"""Latency in a study: its table on disk, and the front's nets measured again at the end, in turn with the dense net."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from ranksearch.compress.latency_table import LatencyTable
from ranksearch.compress.stopwatch import Stopwatch
from ranksearch.space.space import Space
from ranksearch.study.folder import LATENCY
from ranksearch.study.row import Row
from ranksearch.study.study import Study
from ranksearch.tasks.folder import data_folder

AT_ONCE = 12
"""Nets of the front that are measured in turn with the dense one."""

Log = Callable[[str], None]


def open_table(space: Space, folder: Path | None, key: str | None = None) -> LatencyTable | None:
    """The table of the space's setting, from the study's own file and that of the data folder; None where latency plays no part.

    Args:
        folder: the study's; a table there is as the study began with it.
        key: under which the study's times stand, if they may be another machine's.
    """
    if not space.has_latency:
        return None
    files = [folder / LATENCY] if folder is not None else []
    return LatencyTable(Stopwatch(space.latency.as_setting()), [*files, data_folder(space.data) / LATENCY], key=key)


def measure_front(study: Study, dense: nn.Module, load: Callable[[Row], nn.Module], example: Any, log: Log) -> None:
    """Times the nets of the front in turn with the dense one, each once; those that are slower leave the front, and what comes up in
    their place is timed too.
    """
    stopwatch = Stopwatch(study.space.latency.as_setting())
    while rows := [row for row in study.front if not study.is_timed(row.trial)][:AT_ONCE]:
        dense_ms, *times = stopwatch.nets_ms([dense, *map(load, rows)], example)
        study.note_latencies({row.trial: (ms, ms / dense_ms) for row, ms in zip(rows, times, strict=True)})
        for row, ms in zip(rows, times, strict=True):
            known = row.latency_predicted_ms
            predicted = "" if known is None else f", predicted {known:.3f} ms"
            left = "; slower than the dense net, so not on the front" if ms > dense_ms else ""
            log(f"latency of trial {row['trial']}: {ms:.3f} ms, dense {dense_ms:.3f} ms{predicted}{left}")
