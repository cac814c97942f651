"""`Quality`: a lower limit on a task's metric, written as one would say it: points below the dense net, a share of its value, or a value.

| written | for a dense net of 92.4 % | of a loss or error of 50, which is minimised |
|---|---|---|
| `-1` | 91.4 %: one point below dense | 51: one unit worse |
| `-2%` | 90.55 %: 2 % of dense's value worse | 51 |
| `90` | 90 % itself | at most 90 |
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ranksearch.errors import UsageError

ACCURACY = "accuracy"
"""The name of the objective, whatever the metric is."""


@dataclass(frozen=True)
class Quality:
    """A limit that a net's metric is held against."""

    name: str
    """"accuracy", or the metric's own name."""
    number: float
    relative: bool
    """Whether the number is a difference from the dense net's value: below 0 means worse."""
    share: bool
    """Whether that difference is in percent of the dense net's value."""
    text: str

    def value(self, dense: float, direction: str) -> float:
        """The limit in the metric's own unit, for a dense net whose value is `dense`."""
        if not self.relative:
            return self.number
        worse = -self.number * (abs(dense) / 100 if self.share else 1.0)
        return dense - worse if direction == "maximize" else dense + worse

    def __str__(self) -> str:
        return f"{self.name}={self.text}"


def parse_quality(name: str, text: object) -> Quality:
    """Reads a limit such as ("accuracy", "-1"), ("accuracy", "-2%") or ("accuracy", "90").

    Raises:
        UsageError: it is not a number, or it is a share without a sign.
    """
    match = re.fullmatch(r"\s*([-+−]?)\s*([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*(%?)\s*", str(text))
    if isinstance(text, bool) or match is None:
        raise UsageError(
            f"at least {name}={text}: expected points below the dense net ({name}=-1), a share of its value ({name}=-2%), or the metric's "
            f"value itself ({name}=90)."
        )
    sign, number, percent = match[1].replace("−", "-"), float(match[2]), match[3] == "%"
    if percent and not sign:
        raise UsageError(
            f"at least {name}={text}: a share needs a sign, as a difference from the dense net: {name}=-{match[2]}%; a metric of "
            f"{match[2]} percent is written {name}={match[2]}."
        )
    return Quality(name, -number if sign == "-" else number, bool(sign), percent, str(text).strip())


def quality_of(limits: Mapping[str, object]) -> Quality | None:
    """The limit of a space's `at_least`; None without one.

    Raises:
        UsageError: there are several, or it cannot be read.
    """
    if len(limits) > 1:
        raise UsageError(f"at_least: expected a limit on one metric, got {', '.join(limits)}.")
    return next((parse_quality(name, text) for name, text in limits.items()), None)


Limits = str | Mapping[str, object] | Sequence[str]
"""Limits as one may write them: "accuracy=-1", ["accuracy=-1"], {"accuracy": -1}, or "-1" alone."""


def limits_of(texts: Limits) -> dict[str, object]:
    """Limits by metric, however they were written."""
    if isinstance(texts, Mapping):
        return dict(texts)
    found: dict[str, object] = {}
    for text in [texts] if isinstance(texts, str | int | float) else texts:
        name, sign, limit = str(text).partition("=")
        found[name.strip() if sign else ACCURACY] = limit if sign else name
    return found
