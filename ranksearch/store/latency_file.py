"""The latency table of a study, on disk."""

from __future__ import annotations

from pathlib import Path

from ranksearch.data.folder import data_folder
from ranksearch.deploy.latency_table import LatencyTable
from ranksearch.deploy.stopwatch import Stopwatch
from ranksearch.space.space import Space
from ranksearch.store.where import LATENCY


def open_table(space: Space, folder: Path | None, key: str | None = None) -> LatencyTable | None:
    """The table of the space's setting, from the study's own file and that of the data folder; None if latency plays no part.

    Args:
        folder: the study's, with the table that the study began with.
        key: the key of the study's times, if they may come from another machine.
    """
    if not space.has_latency:
        return None
    files = [folder / LATENCY] if folder is not None else []
    return LatencyTable(Stopwatch(space.latency.as_setting()), [*files, data_folder(space.data) / LATENCY], key=key)
