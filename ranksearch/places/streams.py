"""Streams for what is shown while work goes on."""

from __future__ import annotations

from contextlib import suppress
from typing import Any


class Shown:
    """A stream whose failures end no study, be it a reader that is gone or a log on a full disk."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):  # a closed stream raises ValueError
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
