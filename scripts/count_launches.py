"""What a study launches on a GPU one by one, and where the host waits for it, counted on a CPU: the GPU is pretended (`pretended_gpu.py`).

A launch takes some 5 to 20 µs of Python, which is what a small net's training on a GPU is made of; a replayed step is one launch. The
study runs in this process, from its start to its end.

  launches_start        before the first trial: sensitivities, curves, untrained plans
  launches_per_trial    of a trial, outside what is replayed, mean over the trials
  waits_start, waits_per_trial      how often the host waited for the device
  replays_per_trial     steps and projections that were one launch each
  not_recorded          trials whose steps, or projections between them, were made one by one

A row per part of a trial; parts that lie within another one are counted there, too. `--lines 20` adds the lines of code where the host
waited most often.

    python scripts/count_launches.py search_spaces/digits_resnet8.yaml --json
    python scripts/count_launches.py SPACE.yaml --set recipe.steps=200 layers.lowerings=[cp] --lines 20
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

SCRIPT = Path(__file__).resolve()
sys.path[:0] = [str(SCRIPT.parent), str(SCRIPT.parent.parent)]

from pretended_gpu import PretendedGpu  # noqa: E402
from report import Report, arguments  # noqa: E402

import ranksearch  # noqa: E402
from ranksearch import api  # noqa: E402
from ranksearch.run_study import Silent  # noqa: E402
from ranksearch.training.train import Training  # noqa: E402
from ranksearch.trial import attempt, session, trial  # noqa: E402
from ranksearch.trial.projecting import Projecting  # noqa: E402
from ranksearch.trial.scores import Scores  # noqa: E402

PARTS: dict[str, tuple[Any, str]] = {
    "start": (api, "prepare"), "trial": (attempt, "run_trial"), "begin: fit the layers": (session.Session, "starting_net"),
    "begin: score without training": (session.Session, "score_untrained"), "train": (session.Session, "train_"),
    "train: steps": (Training, "_step"), "train: project": (Projecting, "_project"), "estimate BN": (session.Session, "reestimate_bn_"),
    "score": (Scores, "_evaluate"), "decompose": (trial, "compress"), "write": (trial, "_write_net"),
}  # fmt: skip
"""Part -> whose function it is."""


class Counts(Silent):
    """Counts by part, and says how the study goes."""

    def __init__(self, gpu: PretendedGpu, say: Callable[[str], None]) -> None:
        self.gpu, self.log = gpu, say  # type: ignore[method-assign]
        self.parts = {name: Counter[str]() for name in PARTS}

    def counted(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            before, begun = self._now(), time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                found = {name: value - before[name] for name, value in self._now().items()}
                self.parts[part].update(calls=1, **found)
                if part in ("start", "trial"):
                    self.log(f"{part}: {found['launches']} launches, {time.perf_counter() - begun:.0f} s here")

        return call

    def _now(self) -> dict[str, int]:
        return {"launches": self.gpu.launches, "waits": len(self.gpu.waits), "replays": self.gpu.replays}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("space", type=Path)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings, as of `ranksearch search`")
    parser.add_argument("--lines", type=int, default=0, help="so many lines of code that waited (default: %(default)s)")
    options = parser.parse_args()
    report = Report("count_launches", options)
    fast = ["search.trials=1", "recipe.steps=12", "search.sensitivity=none"] if options.quick else []
    with ExitStack() as stack:
        gpu = stack.enter_context(PretendedGpu())
        counts = Counts(gpu, report.say)
        for part, (owner, name) in PARTS.items():
            stack.enter_context(mock.patch.object(owner, name, counts.counted(part, getattr(owner, name))))
        runs = stack.enter_context(tempfile.TemporaryDirectory())
        settings = ["tracking.models=false", *fast, *options.set]
        study = ranksearch.search(options.space, settings=settings, runs=runs, inline=True, observer=counts)
        trials = list(study.trials)
    report.rows += [{"part": part, **found} for part, found in counts.parts.items() if found]
    start, whole = counts.parts["start"], counts.parts["trial"]
    figures = {
        "launches_start": start["launches"], "waits_start": start["waits"],
        **{f"{name}_per_trial": whole[name] / len(trials) for name in ("launches", "waits", "replays")},
        "not_recorded": sum(row.eager is not None for row in trials),
    }  # fmt: skip
    notes = [f"status of trial {row.trial}: {row.status} ({row.reason})" for row in trials if not row.complete]
    lines = Counter(wait.replace(f"{SCRIPT.parent.parent}/", "") for wait in gpu.waits)
    notes += [f"waited {times} times: {line}" for line, times in lines.most_common(options.lines)]
    report.finish(figures, notes)


if __name__ == "__main__":
    main()
