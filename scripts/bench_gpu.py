"""What needs a GPU, in one command: steps eager and captured, what projections take, captured = eager, memory. Most important first.

  step          images per second of our training loop, ResNet-20 in bf16 on random images, eager and replayed from a recording
                (`ips_{128,512}`, `captured_over_eager` of batch 128)
  projection    share of the time that projections at period 10 take, from two runs with and without them, by lowering
                (`projection_share_p10_{im2col,spatial,tucker2}`), and how many layers' projections were not certified
  equal         relative difference of all weights after 200 fp32 steps, replayed against eager (`captured_error`)
  memory        the most that PyTorch allocated, eager and replayed
  shared        2 and 4 processes at once on one GPU, batch 128, with projections (`ips_shared_{2,4}`); CUDA MPS where it runs already

Each part's rows are printed as soon as it is done, and written to `--out`; a part that would begin after `--minutes` is left out and named.
On a CPU (`--device cpu --quick`) the same statements run, steps "replayed" by calling them, so its figures say nothing about a GPU.

    python scripts/bench_gpu.py --json --minutes 8 --out gpu
    python scripts/bench_gpu.py --device cpu --quick --json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).resolve()
sys.path[:0] = [str(SCRIPT.parent), str(SCRIPT.parent.parent)]  # a source tree will do
if "cpu" in sys.argv[1:] and "--device" in sys.argv[1:]:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch  # noqa: E402
from bench_projection import half_break_even  # noqa: E402
from bench_training import random_task  # noqa: E402
from report import Report, arguments  # noqa: E402

from ranksearch.compress import Projector  # noqa: E402
from ranksearch.errors import UsageError  # noqa: E402
from ranksearch.tasks import cifar10  # noqa: E402
from ranksearch.tasks.capture import WARM_STEPS, Recorder, recorder_for  # noqa: E402
from ranksearch.tasks.dense import checkpoint_path, read_checkpoint  # noqa: E402
from ranksearch.tasks.device import clock, pick_device  # noqa: E402
from ranksearch.tasks.train import Optimisation, Training  # noqa: E402

PERIOD = 10


class Calls:
    """A recorder for CPUs: it replays by calling."""

    def warm(self, work: Callable[[], None]) -> None:
        work()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        return work


class Refuses(Calls):
    """A recorder that makes every step eager."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("eager")


class Bench:
    """A net on random images, trained for some steps in one of the ways."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = pick_device()
        self.options, self.task = options, random_task("resnet20").to(self.device)
        self.weights = "random: spectra are flatter than trained ones"
        try:
            task = cifar10.make_task("resnet20", data=None, validation=1000, split_seed=0)
            self.task.model.load_state_dict(read_checkpoint(checkpoint_path(task, "auto", None)))
            self.weights = "trained"
        except UsageError:
            pass

    def trained(
        self, steps: int, batch: int, *, captured: bool, bf16: bool, lowering: str | None = None
    ) -> dict[str, Any]:
        """One run: images per second after the warm-up, the net, why it was eager, layers that were not certified."""
        torch.manual_seed(0)
        model = self.task.dense_model().to(self.device)
        settings = Optimisation(
            optimizer="sgd", schedule="constant", lr=0.02, warmup=0, momentum=0.9, weight_decay=5e-4, batch_size=batch,
            total_steps=steps, label_smoothing=0, clip_norm=0, ema=0, bf16=bf16, compile=False,
        )  # fmt: skip
        generator = torch.Generator(self.device).manual_seed(0)
        recorder: Recorder | None = recorder_for(self.device, [generator]) or Calls()
        training = Training(
            model, self.task, settings, range(steps), generator=generator, recorder=recorder if captured else Refuses()
        )
        projector = Projector(half_break_even(model, lowering), batched=True) if lowering else None
        warm, started, unsure = min(steps // 4, 6 * PERIOD), 0.0, 0

        def after(training: Training) -> None:
            nonlocal started, unsure
            if projector is not None and training.done % PERIOD == 0:
                projector.later(model, training.replay)
                if projector._batched is not None:
                    unsure += len(projector._batched.unsure)
            if training.done == warm:
                started = clock(self.device)

        training.run(after)
        seconds = clock(self.device) - started
        return {
            "images_per_second": (steps - warm) * batch / seconds, "ms_per_step": 1000 * seconds / (steps - warm),
            "eager": training.eager if captured else "asked for", "not_certified": unsure, "model": model,
        }  # fmt: skip


def step(bench: Bench, report: Report) -> dict[str, float]:
    steps, found = (WARM_STEPS + 9, {}) if bench.options.quick else (600, {})
    for batch in (8,) if bench.options.quick else (128, 512):
        for captured in (True, False):
            run = bench.trained(
                steps if captured else max(12, steps // 3), batch, captured=captured, bf16=bench.device.type == "cuda"
            )
            run.pop("model")
            report.rows.append({"part": "step", "batch": batch, "captured": captured, **run})
            found[batch, captured] = run["images_per_second"]
    figures = {f"ips_{batch}": found[batch, True] for batch in {batch for batch, _ in found}}
    first = min(batch for batch, _ in found)
    return figures | {"captured_over_eager": found[first, True] / found[first, False]}


def projection(bench: Bench, report: Report) -> dict[str, float]:
    steps, batch = (24, 8) if bench.options.quick else (600, 128)
    bf16, figures = bench.device.type == "cuda", {}
    plain = bench.trained(steps, batch, captured=True, bf16=bf16)["ms_per_step"]
    for lowering in ("im2col", "spatial", "tucker2"):
        run = bench.trained(steps, batch, captured=True, bf16=bf16, lowering=lowering)
        share = 1 - plain / run["ms_per_step"]
        run.pop("model")
        report.rows.append(
            {"part": "projection", "lowering": lowering, "plain_ms_per_step": plain, "share": share, **run}
        )
        figures[f"projection_share_p10_{lowering}"] = share
    return figures


def equal(bench: Bench, report: Report) -> dict[str, float]:
    steps, batch = (12, 8) if bench.options.quick else (200, 128)
    nets = [bench.trained(steps, batch, captured=captured, bf16=False)["model"] for captured in (True, False, False)]
    flat = [torch.cat([p.detach().flatten() for p in net.parameters()]).double() for net in nets]
    error, noise = (float((flat[i] - flat[1]).norm() / flat[1].norm()) for i in (0, 2))
    report.rows.append({"part": "equal", "steps": steps, "captured_error": error, "eager_against_itself": noise})
    return {"captured_error": error}


def memory(bench: Bench, report: Report) -> dict[str, float]:
    if bench.device.type != "cuda":
        return {}
    figures = {}
    for captured in (True, False):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        bench.trained(30, 128, captured=captured, bf16=True)
        name = "captured" if captured else "eager"
        figures[f"memory_mib_{name}"] = torch.cuda.max_memory_reserved() / 2**20
        report.rows.append({"part": "memory", "captured": captured, "mib": figures[f"memory_mib_{name}"]})
    return figures


def shared(bench: Bench, report: Report) -> dict[str, float]:
    """Processes that begin together and train for the same time; their images are added up."""
    figures = {}
    for count in (2,) if bench.options.quick else (4, 2):
        seconds = 2 if bench.options.quick else 10
        begin = time.time() + (15 if bench.options.quick else 25)
        command = [
            sys.executable,
            str(SCRIPT),
            "--child",
            str(begin),
            "--child-seconds",
            str(seconds),
            "--threads",
            "1",
        ]
        command += ["--device", bench.options.device, *(["--quick"] if bench.options.quick else [])]
        children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]
        rates = [float(child.communicate(timeout=120)[0].split()[-1]) for child in children]
        report.rows.append({"part": "shared", "processes": count, "images_per_second": sum(rates)})
        figures[f"ips_shared_{count}"] = sum(rates)
    return figures


def child(options: argparse.Namespace) -> None:
    """One of several processes on a GPU: prints its images per second between the common beginning and end."""
    bench = Bench(options)
    batch, counted = 8 if options.quick else 128, 0
    model, generator = bench.task.dense_model().to(bench.device), torch.Generator(bench.device).manual_seed(0)
    settings = Optimisation(
        optimizer="sgd", schedule="constant", lr=0.02, warmup=0, momentum=0.9, weight_decay=5e-4, batch_size=batch,
        total_steps=10**7, label_smoothing=0, clip_norm=0, ema=0, bf16=bench.device.type == "cuda", compile=False,
    )  # fmt: skip
    recorder = recorder_for(bench.device, [generator]) or Calls()
    training = Training(model, bench.task, settings, range(10**7), generator=generator, recorder=recorder)
    projector = Projector(half_break_even(model, "im2col"), batched=True)

    class Over(Exception):
        pass

    def after(training: Training) -> None:
        nonlocal counted
        if training.done % PERIOD == 0:
            projector.later(model, training.replay)
            clock(bench.device)  # no more than a period is queued ahead
        now = time.time()
        counted += batch * (options.child <= now)
        if now >= options.child + options.child_seconds:
            raise Over

    try:
        training.run(after)
    except Over:
        print(counted / options.child_seconds)


PARTS: dict[str, Callable[[Bench, Report], dict[str, float]]] = {
    "step": step, "projection": projection, "equal": equal, "shared": shared, "memory": memory,
}  # fmt: skip


def main() -> None:
    parser = arguments(__doc__, minutes=8.0)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu"], help="default: %(default)s")
    parser.add_argument("--parts", default=",".join(PARTS), help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="a folder for rows and figures, written part by part")
    parser.add_argument("--child", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--child-seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        child(options)
        return
    report, started = Report("bench_gpu", options), time.monotonic()
    notes = ["on a CPU: steps are 'replayed' by calling them"] if not torch.cuda.is_available() else []
    bench, figures = Bench(options), dict[str, float]()
    notes.append(f"weights: {bench.weights}")
    for name in options.parts.split(","):
        if time.monotonic() - started > 60 * options.minutes:
            notes.append(f"{name}: left out, the time was over")
            continue
        seen = len(report.rows)
        try:
            figures |= PARTS[name](bench, report)
        except Exception as error:  # the other parts are worth their time all the same
            notes.append(f"{name}: {type(error).__name__}: {error}")
            report.say(notes[-1])
        for row in report.rows[seen:]:
            report.say(json.dumps(row))
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            text = json.dumps(
                {"figures": figures, "rows": report.rows, "notes": notes, "device": report.device}, indent=1
            )
            (options.out / "bench_gpu.json").write_text(text)
    report.finish(figures, notes)


if __name__ == "__main__":
    main()
