"""Training runs that a measurement compares: CIFAR-10 and a trained dense net, one run per plan, recipe and seed, each kept on disk.

A run that is on disk is not made again; one that was stopped goes on where it was. The test set is read once, at a run's end, for the net
that it ends with: the public checkpoints have seen the validation images, by which the untrained net would look best.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ranksearch.allocate import BASELINES, Curves, LayerRules, allocate_plan, parse_budget, rank_curves
from ranksearch.compress import Net, RankPlan, dense_cost, load_net, plan_cost, trace
from ranksearch.places.files import write_atomically
from ranksearch.store.provenance import provenance
from ranksearch.tasks import build_reference, cifar10, model_reference
from ranksearch.tasks.task import Task
from ranksearch.training.dense import State, dense_state
from ranksearch.training.device import pick_device
from ranksearch.training.evaluate import evaluate
from ranksearch.trial.checkpoint import CheckpointFile, stays
from ranksearch.trial.recipe import Recipe
from ranksearch.trial.trial import run_trial

CHECKPOINT_SECONDS = 60


def add_options(parser: argparse.ArgumentParser, *, out: str) -> None:
    """Options that every measurement of training runs takes."""
    parser.add_argument("--model", default="resnet32", choices=sorted(cifar10.BLOCKS), help="default: %(default)s")
    parser.add_argument("--subset", type=int, default=0, help="training images to use; 0: all that are not held out")
    parser.add_argument("--validation", type=int, default=1000, help="training images held out (default: %(default)s)")
    parser.add_argument(
        "--seeds", type=int, default=1, help="runs of everything, with seeds from --seed on (default: %(default)s)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, or the number of a GPU (default: %(default)s)")
    parser.add_argument("--data", help="data folder (default: $RANKSEARCH_DATA, else ~/.cache/ranksearch)")
    parser.add_argument("--out", type=Path, default=Path(out), help="finished runs and tables (default: %(default)s)")


def choose_device(name: str) -> None:
    """Hides the GPUs that are not to be used; has to come before CUDA is touched."""
    if name != "auto":
        os.environ["CUDA_VISIBLE_DEVICES"] = "" if name == "cpu" else name


@dataclass(frozen=True)
class Bench:
    """A task with its trained dense net, and the folder where runs are kept."""

    task: Task
    dense: State
    net: Net
    out: Path
    say: Callable[[str], None]
    curves: dict[tuple[tuple[str, ...], tuple[str, ...]], Curves] = field(default_factory=dict)
    leaving: Callable[[], bool] = stays
    """Whether the time is over: a run writes its state then and raises `Leaving`."""

    @classmethod
    def open(cls, options: argparse.Namespace, say: Callable[[str], None], *, test_images: int | None = None) -> Bench:
        task = cifar10.make_task(options.model, data=options.data, validation=options.validation, split_seed=0)
        dense = dense_state(task, checkpoint="auto", data=options.data, fallback=options.out, log=say)
        if options.subset:
            task = replace(task, train=task.train.first(options.subset))
        if test_images is not None and task.test is not None:
            task = replace(task, test=task.test.first(test_images))
        net = trace(task.dense_model(), task.example_input)  # shapes alone: any weights do
        return cls(task, dense, net, options.out, say)

    @cached_property
    def dense_digest(self) -> str:
        """Content hash of the dense weights."""
        found = hashlib.sha256()
        for name in sorted(self.dense):
            found.update(self.dense[name].numpy().tobytes())
        return found.hexdigest()

    @cached_property
    def dense_accuracy(self) -> float:
        """Validation accuracy of the dense net in percent."""
        model, device = self.task.dense_model(), pick_device()
        model.load_state_dict(self.dense)
        return evaluate(model.to(device), self.task.val.to(device), self.task).accuracy

    def ratio(self, plan: RankPlan) -> float:
        """Dense parameters / compressed parameters of the whole net."""
        return dense_cost(self.net).params / plan_cost(self.net, plan).params

    def steps(self, epochs: float, batch_size: int) -> int:
        return max(1, round(epochs * len(self.task.train) / batch_size))

    def plan(
        self,
        allocator: str,
        ratio: float,
        lowerings: tuple[str, ...],
        *,
        include: tuple[str, ...] = ("*",),
        cost: str = "params",
    ) -> RankPlan:
        """The plan of `allocator` ("solver" or a baseline) that has at most 1 / `ratio` of the net's parameters, or of its `cost`."""
        if (lowerings, include) not in self.curves:
            model = self.task.dense_model()
            model.load_state_dict(self.dense)
            self.curves[lowerings, include] = rank_curves(model, self.net, LayerRules(lowerings, include))
        curves = self.curves[lowerings, include]
        budgets = [parse_budget(cost, str(int(getattr(dense_cost(self.net), cost) / ratio + 1e-6)))]
        reference = model_reference(self.task.name, self.task.model_name)
        if allocator == "solver":
            return allocate_plan(curves, budgets, model=reference).plan
        return BASELINES[allocator](curves, budgets, reference)

    def run(self, label: dict[str, Any], plan: RankPlan, recipe: Recipe, seed: int, *, test: bool) -> dict[str, Any]:
        """The row of a run: `label`, costs, accuracies in percent after every phase, at the end the test accuracy where `test`."""
        train = self.task.train
        device = pick_device()
        what = {
            "model": self.task.model_name, "dense": self.dense_digest, "torch": torch.__version__,
            "plan": plan.digest(), "recipe": recipe.to_dict(), "seed": seed,
            "net": "last", "images": len(train), "val": len(self.task.val), "test": len(self.task.test or ()) if test else 0,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        }  # fmt: skip
        name = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
        file = self.out / "runs" / f"{name}.json"
        if file.is_file():
            return {**label, **json.loads(file.read_text())}
        row = self._train(plan, recipe, seed, name, test=test) | {"revision": provenance(self.out)["git_revision"]}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(row))
        self.say(
            f"{label}: {row['status']}, validation {row['val_accuracy']}, test {row['test_accuracy']}, {row['seconds']} s"
        )
        return {**label, **row}

    def _train(self, plan: RankPlan, recipe: Recipe, seed: int, name: str, *, test: bool) -> dict[str, Any]:
        folder, device = self.out / "nets" / name, pick_device()
        checkpoint = CheckpointFile(self.out / "checkpoints" / f"{name}.pt", CHECKPOINT_SECONDS, self.leaving)
        result = run_trial(
            self.task.without_test(), self.dense, self.net, plan, recipe, seed=seed, report=lambda metrics: None,
            save_to=folder, checkpoint=checkpoint, last=True,
        )  # fmt: skip
        test_accuracy = None
        if test and self.task.test is not None and result.status == "complete":
            net = load_net(folder, build_reference).to(device)
            test_accuracy = evaluate(net, self.task.test.to(device), self.task).accuracy
        shutil.rmtree(folder, ignore_errors=True)
        checkpoint.remove()
        cost, dense = plan_cost(self.net, plan), dense_cost(self.net)
        phases = {f"val_{entry['phase']}": entry["val_accuracy"] for entry in result.history}
        phases = {
            "val_trained": self.dense_accuracy
        } | phases  # decomposed first: the dense net is what was there before
        return {
            "seed": seed, "status": result.status, "reason": result.reason, "eager": result.eager,
            "ratio": self.ratio(plan), "macs": cost.macs / dense.macs,
            "epochs": round(result.epochs, 3), "test_accuracy": test_accuracy, "val_accuracy": result.val_accuracy,
            "val_loss": result.val_loss, **phases, "images_per_second": result.images_per_second,
            "projection_share": result.projection_share, "seconds": round(result.seconds or 0, 1), "plan": plan.summary(),
            "layers": plan.to_dict()["layers"],
        }  # fmt: skip
