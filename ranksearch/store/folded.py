"""`Folded`: a list that is kept packed, and unpacked whenever it is looked at. A study holds all its trials' curves this way."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, overload


class Folded(Sequence[Any]):
    """A list of plain values as packed JSON: a tenth of the memory, and one object instead of hundreds."""

    __slots__ = ("_length", "_packed")

    def __init__(self, values: Sequence[Any]) -> None:
        self._length, self._packed = len(values), zlib.compress(json.dumps(list(values)).encode(), 1)

    def unfolded(self) -> list[Any]:
        return json.loads(zlib.decompress(self._packed))

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:
        return iter(self.unfolded())

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        return self.unfolded()[index]

    def __eq__(self, other: object) -> bool:
        return self.unfolded() == list(other) if isinstance(other, Folded | list) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._packed)

    def __repr__(self) -> str:
        return repr(self.unfolded())

    def __deepcopy__(self, memo: dict[int, Any]) -> Folded:
        return self  # it cannot be changed
