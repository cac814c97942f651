"""What needs a GPU, in one command: steps, projections, equality, sharing, a whole study, restarts, memory. Most important first.

  step          images per second of our training loop, ResNet-20 in bf16 on random images, eager and replayed from a recording
                (`ips_{128,512}`, `captured_over_eager` of batch 128)
  projection    share of the time that projections at period 10 take, from two runs with and without them, by lowering
                (`projection_share_p10_{im2col,spatial,tucker2,cp}`), and how many layers' projections were not certified
  curves        seconds that the rank curves of `cp` take there and on the CPU (`cp_curves_seconds_{device,cpu}`), and the largest
                difference of what they say is removed (`cp_curves_error`)
  equal         relative difference of all weights after 200 fp32 steps, replayed against eager (`captured_error`)
  shared        4, 8, 2 and 1 processes at once on one GPU, batch 128, with projections (`ips_shared_{4,8,2,1}`), through CUDA MPS where it
                is available; then 4 by turns (`ips_turns_4`)
  study         a study from beginning to end, 12 trials of 2,000 steps one after the other: the share of its time in which a trial trains
                (`gpu_busy_share`), seconds before the first trial, of trials, after the last one; CIFAR-10 in the data folder, else digits
  restart       relative difference of all weights of a training that was stopped and taken up again from what a checkpoint holds,
                against one that was not (`restart_error`, and `restart_noise` of two that were not)
  memory        the most that PyTorch allocated, eager and replayed
  sixty_four    64 trials of 10 epochs, as many at once as `auto` packs (`trials_64_seconds`, to be at most 300): five minutes or more, so
                only where `--parts` names it

Each part's rows are printed as soon as it is done, and written to `--out`; a part that would begin after `--minutes` is left out and named.
On a CPU (`--device cpu --quick`) the same statements run, steps "replayed" by calling them, so its figures say nothing about a GPU. With
`--device pretended --quick` they run as on a GPU, which is pretended (`pretended_gpu.py`): it shows errors, and whether what is replayed
computes the same.

    python scripts/bench_gpu.py --json --minutes 8 --out gpu
    python scripts/bench_gpu.py --json --minutes 7 --parts sixty_four --out gpu
    python scripts/bench_gpu.py --device cpu --quick --json
    python scripts/bench_gpu.py --device pretended --quick --json
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).resolve()
sys.path[:0] = [str(SCRIPT.parent), str(SCRIPT.parent.parent)]  # a source tree will do
if "cpu" in sys.argv[1:] and "--device" in sys.argv[1:]:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch  # noqa: E402
from bench_projection import half_break_even  # noqa: E402
from bench_training import random_task  # noqa: E402
from pretended_gpu import PretendedGpu  # noqa: E402
from report import Report, arguments  # noqa: E402
from torch import Tensor  # noqa: E402

import ranksearch  # noqa: E402
from ranksearch.allocate import LayerRules, rank_curves  # noqa: E402
from ranksearch.cluster import mps  # noqa: E402
from ranksearch.compress import Projector, trace  # noqa: E402
from ranksearch.data.folder import data_folder  # noqa: E402
from ranksearch.errors import UsageError  # noqa: E402
from ranksearch.run_study import Silent  # noqa: E402
from ranksearch.study.study import Study  # noqa: E402
from ranksearch.tasks import cifar10  # noqa: E402
from ranksearch.training.capture import WARM_STEPS, Recorder, recorder_for  # noqa: E402
from ranksearch.training.dense import checkpoint_path, read_checkpoint  # noqa: E402
from ranksearch.training.device import clock, pick_device  # noqa: E402
from ranksearch.training.optimisation import Optimisation  # noqa: E402
from ranksearch.training.train import Training  # noqa: E402

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

    def begun(
        self, steps: int, batch: int, *, captured: bool, bf16: bool, lowering: str | None = None
    ) -> tuple[Training, Projector | None]:
        """A training that has made no step, and what projects it."""
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
        return training, Projector(half_break_even(model, lowering), batched=True) if lowering else None

    def trained(
        self, steps: int, batch: int, *, captured: bool, bf16: bool, lowering: str | None = None
    ) -> dict[str, Any]:
        """One run: images per second after the warm-up, the net, why it was eager, layers that were not certified."""
        training, projector = self.begun(steps, batch, captured=captured, bf16=bf16, lowering=lowering)
        warm, started, unsure = min(steps // 4, 6 * PERIOD), 0.0, 0

        def after(training: Training) -> None:
            nonlocal started, unsure
            if projector is not None and training.done % PERIOD == 0:
                projector.later(training.model, training.replay)
                if projector._batched is not None:
                    unsure += len(projector._batched.unsure)
            if training.done == warm:
                started = clock(self.device)

        training.run(after)
        seconds = clock(self.device) - started
        return {
            "images_per_second": (steps - warm) * batch / seconds, "ms_per_step": 1000 * seconds / (steps - warm),
            "eager": (training.eager or training.between) if captured else "asked for", "not_certified": unsure, "model": training.model,
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
    # on a CPU the first projection of `cp`, from no terms, takes half a minute
    for lowering in ("im2col", "spatial", "tucker2", *(() if bench.options.quick else ("cp",))):
        run = bench.trained(steps, batch, captured=True, bf16=bf16, lowering=lowering)
        share = 1 - plain / run["ms_per_step"]
        run.pop("model")
        report.rows.append(
            {"part": "projection", "lowering": lowering, "plain_ms_per_step": plain, "share": share, **run}
        )
        figures[f"projection_share_p10_{lowering}"] = share
    return figures


def curves(bench: Bench, report: Report) -> dict[str, float]:
    model = bench.task.dense_model()
    net = trace(model, torch.zeros(1, 3, 32, 32))
    rules = LayerRules(("cp",), include=("layer1.0.*",) if bench.options.quick else ("*",))
    found, seconds = [], []
    for device in (bench.device, torch.device("cpu")):
        started = clock(device)
        found.append(rank_curves(model, net, rules, device=device))
        seconds.append(clock(device) - started)
    pairs = zip(*(curves.layers for curves in found), strict=True)
    error = max(float(abs(one.removed - other.removed).max()) for one, other in pairs)
    report.rows.append({"part": "curves", "seconds": seconds[0], "seconds_cpu": seconds[1], "error": error})
    return {"cp_curves_seconds_device": seconds[0], "cp_curves_seconds_cpu": seconds[1], "cp_curves_error": error}


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
    figures, folder = {}, mps.new_folder()
    with mps.side_by_side(folder) if bench.device.type == "cuda" else nullcontext("no GPU") as reason:
        for count in (2,) if bench.options.quick else (4, 8, 2, 1):
            figures[f"ips_shared_{count}"] = at_once(bench, report, count, reason or "side by side through MPS")
    if reason is None:
        figures["ips_turns_4"] = at_once(bench, report, 4, "by turns")
    return figures


def at_once(bench: Bench, report: Report, count: int, how: str) -> float:
    """Images per second of so many processes."""
    seconds = 1 if bench.options.quick else 8
    command = [sys.executable, str(SCRIPT), "--child-seconds", str(seconds), "--threads", "1"]
    command += ["--device", bench.options.device, *(["--quick"] if bench.options.quick else [])]
    children = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(count)
    ]
    try:
        for child in children:
            assert child.stdout is not None
            if child.stdout.readline().strip() != "ready":
                raise RuntimeError(f"a process of {count} did not get ready")
        rates = [float(child.communicate(timeout=60)[0]) for child in told_to_begin(children)]
    finally:
        for child in children:
            child.kill()
    report.rows.append({"part": "shared", "processes": count, "how": how, "images_per_second": sum(rates)})
    return sum(rates)


def told_to_begin(children: list[subprocess.Popen[str]]) -> list[subprocess.Popen[str]]:
    for child in children:
        assert child.stdin is not None
        child.stdin.write("begin\n")
        child.stdin.flush()
    return children


def child(options: argparse.Namespace) -> None:
    """One of several processes on a GPU: says that it is ready, is told to begin, prints its images per second."""
    bench = Bench(options)
    batch, bf16 = 8 if options.quick else 128, bench.device.type == "cuda"
    training, projector = bench.begun(10**7, batch, captured=True, bf16=bf16, lowering="im2col")
    assert projector is not None
    until, counted = float("inf"), 0

    class Over(Exception):
        pass

    def after(training: Training) -> None:
        nonlocal until, counted
        if training.done % PERIOD == 0:
            projector.later(training.model, training.replay)
            clock(bench.device)  # no more than a period is queued ahead
        if training.done == (2 * PERIOD if options.quick else 6 * PERIOD):
            print("ready", flush=True)
            sys.stdin.readline()
            until = time.time() + options.child_seconds
        now = time.time()
        counted += batch * (until < float("inf"))
        if now >= until:
            raise Over

    try:
        training.run(after)
    except Over:
        print(counted / options.child_seconds)


def restart(bench: Bench, report: Report) -> dict[str, float]:
    """In fp32, with projections, stopped between two of them."""
    steps, batch = (24, 8) if bench.options.quick else (200, 128)

    class Stop(Exception):
        pass

    def run(stop: int | None, state: dict[str, Any] | None = None) -> tuple[Tensor, dict[str, Any]]:
        training, projector = bench.begun(steps, batch, captured=True, bf16=False, lowering="im2col")
        assert projector is not None
        if state is not None:
            training.load_state_dict(state["training"])
            projector.load_state_dict(state["projector"])
            training._generator.set_state(state["generator"])

        def after(training: Training) -> None:
            if training.done % PERIOD == 0:
                projector.later(training.model, training.replay)
            if training.done == stop:
                raise Stop

        with suppress(Stop):
            training.run(after)
        kept = {
            "training": training.state_dict(), "projector": projector.state_dict(), "generator": training._generator.get_state(),
        }  # fmt: skip
        held = io.BytesIO()
        torch.save(kept, held)
        held.seek(0)
        flat = torch.cat([p.detach().flatten() for p in training.model.parameters()]).double()
        return flat, torch.load(held, map_location="cpu", weights_only=True)

    whole, other = run(None)[0], run(None)[0]
    again = run(None, run(steps // 2 + 3)[1])[0]
    error, noise = (float((found - whole).norm() / whole.norm()) for found in (again, other))
    report.rows.append({"part": "restart", "steps": steps, "restart_error": error, "restart_noise": noise})
    return {"restart_error": error, "restart_noise": noise}


class Times(Silent):
    """An observer that notes when trials begin and end."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say, self.created = say, time.perf_counter()
        self.began = self.ended = self.created

    def log(self, message: str) -> None:
        self.say(message)

    def start(self, study: Study) -> None:
        self.began = time.perf_counter()

    def stop(self) -> None:
        self.ended = time.perf_counter()


def searched(bench: Bench, report: Report, part: str, trials: int, epochs: float | None, gpus: str) -> dict[str, Any]:
    """A study from beginning to end; the row of where its time went."""
    quick, root = bench.options.quick, SCRIPT.parent.parent / "search_spaces"
    known = (data_folder() / cifar10.FOLDER / "test_batch").is_file() and not quick
    space = root / ("cifar10_resnet20.yaml" if known else "digits_resnet8.yaml")
    images = 45_000 if known else 1_077
    steps = 20 if quick else 2000 if epochs is None else round(epochs * images / 128)
    settings = [f"recipe.steps={steps}", "recipe.batch_size=128", f"search.trials={trials}", f"resources.gpus={gpus}"]
    settings += ["search.sensitivity=kfac", "tracking.models=false", "recipe.bn_batches=2"] if quick else []
    times = Times(report.say)
    with tempfile.TemporaryDirectory() as runs:
        study = ranksearch.search(
            space, settings=settings, runs=runs, name=part, inline=quick or gpus == "0", observer=times
        )
        over = time.perf_counter()
        done = [row for row in study.trials if row["images_per_second"]]
    training = sum(row["epochs"] * images / row["images_per_second"] for row in done)
    row = {
        "part": part, "space": space.name, "trials": len(study.trials), "steps": steps, "seconds": over - times.created,
        "seconds_before": times.began - times.created, "seconds_of_trials": times.ended - times.began,
        "seconds_after": over - times.ended, "seconds_of_training": training,
    }  # fmt: skip
    report.rows.append(row)
    return row


def study(bench: Bench, report: Report) -> dict[str, float]:
    row = searched(
        bench, report, "study", 2 if bench.options.quick else 12, None, "1" if bench.device.type == "cuda" else "0"
    )
    return {
        "gpu_busy_share": row["seconds_of_training"] / row["seconds"],
        **{f"study_{name}": row[name] for name in ("seconds_before", "seconds_of_trials", "seconds_after")},
    }


def sixty_four(bench: Bench, report: Report) -> dict[str, float]:
    trials, gpus = (2, "0") if bench.options.quick else (64, "auto")
    return {"trials_64_seconds": searched(bench, report, "sixty_four", trials, 10.0, gpus)["seconds"]}


PARTS: dict[str, Callable[[Bench, Report], dict[str, float]]] = {
    "step": step, "projection": projection, "curves": curves, "equal": equal, "shared": shared, "study": study, "restart": restart,
    "memory": memory, "sixty_four": sixty_four,
}  # fmt: skip
DEFAULT = [name for name in PARTS if name != "sixty_four"]


def main() -> None:
    parser = arguments(__doc__, minutes=8.0)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "pretended"], help="default: %(default)s")
    parser.add_argument("--parts", default=",".join(DEFAULT), help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="a folder for rows and figures, written part by part")
    parser.add_argument("--child-seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    with PretendedGpu() if options.device == "pretended" else nullcontext():
        measure(options) if options.child_seconds is None else child(options)


def measure(options: argparse.Namespace) -> None:
    report, started = Report("bench_gpu", options), time.monotonic()
    notes = ["on a CPU: steps are 'replayed' by calling them"] if not torch.cuda.is_available() else []
    notes += ["the GPU is pretended: no figure says how fast anything is"] if options.device == "pretended" else []
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
