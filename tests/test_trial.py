"""The trial, in-process, on the real digits."""

import copy
import json
import os
import pickle
import signal
import subprocess
import sys
import time

import pytest
import torch

import ranksearch
from ranksearch.allocate import LayerRules, allocate_plan, parse_budget, rank_curves
from ranksearch.compress import LayerPlan, RankPlan, dense_cost, project_, trace
from ranksearch.lowering import cp_als, lowering_named
from ranksearch.space.recipe import RecipeSpace
from ranksearch.tasks import digits
from ranksearch.training.dense import dense_state
from ranksearch.training.evaluate import Evaluation, evaluate
from ranksearch.training.train import Training
from ranksearch.trial import trial
from ranksearch.trial.attempt import attempt
from ranksearch.trial.calibration import Calibration, in_one
from ranksearch.trial.candidate import Candidate, MetricSetting
from ranksearch.trial.checkpoint import CheckpointFile
from ranksearch.trial.projecting import Projecting
from ranksearch.trial.recipe import Recipe, middle
from ranksearch.trial.result import Status
from ranksearch.trial.trial import run_trial


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    task = digits.make_task("resnet8", data=None, validation=360, split_seed=0)
    dense = dense_state(task, checkpoint="auto", data=None, fallback=tmp_path_factory.mktemp("dense"), log=print)
    model = digits.build_model("resnet8")
    model.load_state_dict(dense)
    net = trace(model, task.example_input)
    return task.without_test(), dense, net, planned(model, net, "30%")


def planned(model, net, flops):
    """The solver's plan."""
    curves = rank_curves(model, net, LayerRules(("im2col", "channel", "spatial"), exclude=("linear",)))
    return allocate_plan(curves, [parse_budget("flops", flops)], model="digits/resnet8").plan


def recipe(**changes) -> Recipe:
    projection = {"period": 10} | changes.pop("projection", {})
    settings = {"steps": 60, "batch_size": 64, "bn_batches": 5, "projection": projection} | changes
    return Recipe.settled(RecipeSpace(**settings), middle)


def dense_of(bench):
    """The dense net of the bench, with its weights."""
    model = bench[0].dense_model()
    model.load_state_dict(bench[1])
    return model


def run(bench, save_to=None, seed=0, checkpoint=None, **changes):
    reports = []
    file = checkpoint or CheckpointFile(None, 60)
    result = run_trial(*bench, recipe(**changes), seed=seed, report=reports.append, save_to=save_to, checkpoint=file)
    return result, reports


def test_a_trial_ends_accurate_within_its_cost_and_loses_nothing_by_decomposing(bench, tmp_path):
    task, _, net, plan = bench
    result, reports = run(bench, save_to=tmp_path)
    assert result.status == "complete"
    assert result.macs <= 0.3 * dense_cost(net).macs
    assert [entry["phase"] for entry in reports] == ["untrained", "trained", "projected", "decomposed", "factors"]
    assert reports == result.history
    phases = {entry["phase"]: entry for entry in reports}
    # the dense form has the plan's ranks when it is decomposed: no image of 360 changes sides, or a borderline one
    assert abs(phases["decomposed"]["val_accuracy"] - phases["projected"]["val_accuracy"]) < 100 / 360 + 1e-9
    assert phases["decomposed"]["val_loss"] == pytest.approx(phases["projected"]["val_loss"], rel=1e-3)
    best = max((phases[phase] for phase in ("untrained", "decomposed", "factors")), key=lambda e: e["val_accuracy"])
    assert result.val_accuracy == best["val_accuracy"] > 90
    assert phases[result.kept["phase"]]["val_accuracy"] == best["val_accuracy"]
    assert 0 < phases["projected"]["removed_energy_mean"] <= phases["projected"]["removed_energy_max"] < 1
    assert phases["projected"]["projections"] == 3  # after steps 10 and 20, and the last one
    assert [record["step"] for record in result.projections] == [10, 20, 30]
    assert all(set(record["removed_energy"]) == {n for n, _ in plan.lowered()} for record in result.projections)
    assert all(record["loss_after"] > record["loss_before"] > 0 for record in result.projections[:2])
    assert 0 < result.projection_share < 1
    assert result.epochs == pytest.approx(60 * 64 / len(task.train))
    loaded = ranksearch.load(tmp_path)
    assert evaluate(loaded, task.val, task).accuracy == result.val_accuracy
    assert sum(p.numel() for p in loaded.parameters()) == result.params


def test_projection_training_ends_on_the_low_rank_set(bench, monkeypatch):
    """What is decomposed has the plan's ranks already, so decomposing changes the outputs by rounding alone."""
    task, _, _, plan = bench
    (x, _), checked = next(task.val.in_order(64)), []

    def checked_compress(model, given, **settings):
        small = ranksearch.compress.surgery.compress(model, given, **settings)
        with torch.no_grad():
            expected, found = model.eval()(x), small.eval()(x)
        checked.append(((found - expected).norm() / expected.norm()).item())
        assert max(project_(copy.deepcopy(model), plan).values()) < 1e-6
        return small

    monkeypatch.setattr(trial, "compress", checked_compress)
    result, reports = run(bench, factor_share=0.0)
    assert [entry["phase"] for entry in reports] == ["untrained", "trained", "projected", "decomposed"]
    assert result.status == "complete"
    assert checked[0] < 1e-4


def test_the_same_seed_gives_the_same_trial(bench):
    once, _ = run(bench, steps=6)
    again, _ = run(bench, steps=6)
    other, _ = run(bench, steps=6, seed=1)
    assert (once.val_accuracy, once.val_loss) == (again.val_accuracy, again.val_loss)
    assert once.val_loss != other.val_loss


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_no_steps_at_all_is_decomposition_with_fresh_bn_statistics(bench, share):
    result, _ = run(bench, steps=0, factor_share=share)
    assert result.status == "complete"
    assert result.epochs == 0
    assert result.images_per_second is None
    assert result.val_accuracy > 60  # near chance, 10 %, without the re-estimation


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_what_is_decomposed_before_training_is_fitted_as_the_recipe_says(bench, share):
    small = (*bench[:3], planned(dense_of(bench), bench[2], "15%"))
    first = {
        fit: run(small, steps=2, factor_share=share, calibration=fit)[1][0] for fit in ("none", "bias", "sequential")
    }
    assert {entry["phase"] for entry in first.values()} == {"decomposed" if share == 1 else "untrained"}
    assert first["sequential"]["val_loss"] < 0.8 * first["none"]["val_loss"]
    assert first["sequential"]["val_accuracy"] > first["none"]["val_accuracy"]


def test_training_begins_at_the_fitted_weights_which_have_their_ranks(bench, monkeypatch):
    _, dense, _, plan = bench
    begun = []
    monkeypatch.setattr(
        Projecting, "after_step", lambda self, training: begun.append(copy.deepcopy(training.model.state_dict()))
    )
    seen = {}
    for fit in ("none", "sequential"):
        run(bench, steps=1, factor_share=0.0, lr=1e-8, warmup=0.0, calibration=fit)
        seen[fit] = begun[-1]
    name, choice = next(plan.lowered())
    spec = next(layer.spec for layer in bench[2].layers if layer.name == name)
    projected = lowering_named(choice.lowering).project(seen["sequential"][f"{name}.weight"], choice.rank, spec)
    assert projected.removed < 1e-6
    torch.testing.assert_close(seen["none"][f"{name}.weight"], dense[f"{name}.weight"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("fit", "starts"), [("sequential", 2), ("none", 4)])
def test_terms_of_cp_are_found_once_and_gone_on_from(bench, monkeypatch, fit, starts):
    """By the fit; without one, by the net without training and again by the first projection."""
    names, begun, found = [name for name, _ in bench[3].lowered()][:2], [], cp_als.started
    monkeypatch.setattr(cp_als, "started", lambda *args: begun.append(1) or found(*args))
    plan = RankPlan({name: LayerPlan("cp", 6) for name in names}, model="digits/resnet8")
    result, _ = run((*bench[:3], plan), steps=12, factor_share=0.5, calibration=fit, projection={"period": 2})
    assert result.status == Status.COMPLETE
    assert len(begun) == starts


def test_small_batches_are_fitted_on_as_one_and_ragged_ones_each_by_itself(bench, monkeypatch):
    task, _, net, plan = bench
    drawn, stream = [], type(task.train).stream

    def noted(source, *arguments):
        for batch in stream(source, *arguments):
            drawn.append(len(batch[0]))
            yield batch

    monkeypatch.setattr(type(task.train), "stream", noted)
    for size, batches in ((16, 4), (128, 2), (500, 1)):
        drawn.clear()
        small = Calibration(task, net, recipe(batch_size=size), 0).decomposed(dense_of(bench), plan, {})
        assert drawn == [size] * batches
        assert evaluate(small, task.val, task).loss < 100
    parts = [(torch.zeros(2, 5), torch.zeros(2)), (torch.zeros(3, 5), torch.zeros(3))]
    (whole,) = in_one(parts)
    assert [list(part.shape) for part in whole] == [[5, 5], [5]]
    ragged = [{"ids": torch.zeros(2, 5)}, {"ids": torch.zeros(2, 7)}]
    assert in_one(ragged) is ragged
    flagged = [(torch.zeros(2, 5), True), (torch.zeros(2, 5), True)]
    assert in_one(flagged) is flagged


def test_a_recipe_of_before_has_neither_calibration_nor_matched_steps():
    known = recipe().to_dict()
    assert (known.pop("calibration"), known.pop("factor_steps")) == ("sequential", "matched")
    read = Recipe.from_dict(known)
    assert (read.calibration, read.factor_steps) == ("none", "plain")


def test_a_trial_keeps_its_best_net(bench, tmp_path):
    """Trained to pieces, though not to infinity: what was decomposed without training is the result, also after a restart."""
    harmful = {"steps": 12, "factor_share": 0.5, "lr": 0.4, "warmup": 0.0, "schedule": "constant", "weight_decay": 0.5}
    result, reports = run(bench, save_to=tmp_path / "whole", **harmful)
    scores = {entry["phase"]: entry["val_accuracy"] for entry in reports}
    assert scores["factors"] < scores["untrained"] - 5, "the training did no harm: the test tells nothing"
    assert result.status == "complete"
    assert result.kept == {"phase": "untrained", "step": 0}
    assert result.val_accuracy == max(scores[phase] for phase in ("untrained", "decomposed", "factors"))
    task = bench[0]
    assert evaluate(ranksearch.load(tmp_path / "whole"), task.val, task).accuracy == result.val_accuracy
    path = tmp_path / "state.pt"
    with pytest.raises(Stopped):
        run(bench, checkpoint=StopsAt(path, 8), **harmful)
    resumed, _ = run(bench, save_to=tmp_path / "resumed", checkpoint=CheckpointFile(path, 60), **harmful)
    assert (resumed.kept, resumed.val_accuracy) == (result.kept, result.val_accuracy)
    assert torch.equal(final_weights(tmp_path / "resumed"), final_weights(tmp_path / "whole"))


@pytest.mark.parametrize("error", ["SystemExit(0)", "BaseException('odd')", "Odd()"])
def test_whatever_a_users_code_raises_fails_its_trial_alone_and_is_told_with_its_line(monkeypatch, error):
    result = _attempted(monkeypatch, error, module="ranksearch_task_0", file="/home/somebody/own.py")
    assert result.status is Status.FAILED
    assert "(own.py, line 5)" in result.reason.splitlines()[0]


@pytest.mark.parametrize(
    ("error", "module"), [("SystemExit(0)", "ray.train._internal.session"), ("KeyboardInterrupt()", "own")]
)
def test_what_ends_a_worker_is_no_result(monkeypatch, error, module):
    """Ray's report of a trial that is to stop, and its answer to SIGTERM, are a `sys.exit` too."""
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        _attempted(monkeypatch, error, module=module, file=f"{module}.py")


def _attempted(monkeypatch, error, *, module, file):
    """An attempt at a trial in which the code of a module raises."""
    place = {"__name__": module, "__file__": file}
    source = (
        "class Odd(Exception):\n    def __str__(self):\n        raise ValueError\ndef raises(*_, **__):\n    raise "
        + error
    )
    exec(compile(source, file, "exec"), place)
    monkeypatch.setattr("ranksearch.trial.attempt.run_trial", place["raises"])
    candidate = Candidate(0, plan=None, recipe=None, seed=0, save_to=None, checkpoint=None)
    return attempt(None, None, None, candidate, report=None, checkpoint_seconds=60.0)


def test_divergence_is_a_result(bench, tmp_path):
    result, _ = run(
        bench, lr=100, weight_decay=1, warmup=0, save_to=tmp_path / "net"
    )  # weights grow hundredfold a step
    assert result.status == "diverged"
    assert "step" in result.reason
    assert result.macs
    assert not (tmp_path / "net").exists()
    assert result.epochs < 60 * 64 / len(bench[0].train)  # what was seen, not what was planned
    assert result.epochs > 0
    json.dumps(result.to_dict(), allow_nan=False)


def test_a_late_divergence_keeps_the_last_good_metrics(bench, monkeypatch):
    """The factors' training diverges: what was scored before is the result's, and never an objective."""
    scored = Training._step

    def step(self):
        loss = scored(self)
        return loss * float("nan") if self.steps[self.done] >= 40 else loss

    monkeypatch.setattr(Training, "_step", step)
    result, reports = run(bench, factor_share=0.5)
    assert result.status == "diverged"
    assert "step 41 of 60" in result.reason
    assert result.history == reports
    assert result.val_accuracy == reports[-1]["val_accuracy"] > 60
    assert reports[-1]["phase"] == "decomposed"
    assert result.projections
    assert result.epochs == pytest.approx(41 * 64 / len(bench[0].train))


def test_a_net_whose_outputs_are_not_finite_is_divergence_too(bench, monkeypatch):
    """Its argmax is class 0, an accuracy of 10 % that looks like a result."""
    monkeypatch.setattr("ranksearch.trial.scores.evaluate", lambda *args: Evaluation(accuracy=10.0, loss=float("nan")))
    result, _ = run(bench, steps=2)
    assert result.status == "diverged"
    assert "validation loss" in result.reason
    assert result.val_accuracy is None


def test_distillation_runs_through_the_trial(bench):
    result, _ = run(bench, distillation={"weight": 0.7})
    assert result.status == "complete"
    assert result.val_accuracy > 85


@pytest.mark.parametrize(
    "changes",
    [
        {"projection": {"energy_transfer": True}},
        {"projection": {"bn_rectification": True}},
        {"projection": {"momentum": "reset"}},
        {"distillation": {"weight": 0.5}},
        {"distillation": {"weight": 0.5, "temperature": 1.0}},
        {"projection": {"rank_annealing": 0.8}},
        {"projection": {"schedule": "learning_rate"}},
        {"projection": {"schedule": "removed_energy", "removed_energy": 1e-4}},
        {"projection": {"start": 0.5}},
        {"projection": {"until_end": 0.5}},
        {"label_smoothing": 0.1},
        {"clip_norm": 0.1},
        {"ema": 0.8},
        {"optimizer": "adamw", "lr": 1e-3},
        {"schedule": "step"},
        {"warmup": 0.0},
        {"factor_lr": 0.3},
        {"factor_steps": "plain"},
    ],
    ids=lambda changes: str(changes.get("projection", changes)),
)
def test_every_option_of_the_recipe_reaches_the_training(bench, changes):
    short = {"steps": 24, "factor_share": 0.25}
    projection = {"period": 4}
    plain, _ = run(bench, **short, projection=projection)
    result, _ = run(bench, **short | changes | {"projection": projection | changes.get("projection", {})})
    assert result.status == "complete"
    assert result.val_accuracy > 80
    assert result.history[-1]["val_loss"] != plain.history[-1]["val_loss"]


# Restarts ------------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """The process is gone."""


class StopsAt(CheckpointFile):
    """Saves after every step, and is gone with the process right after the save number `last`."""

    def __init__(self, path, last):
        super().__init__(path, 0.0)
        self.left = last

    def save(self, state):
        super().save(state)
        self.left -= 1
        if self.left == 0:
            raise Stopped


def final_weights(folder):
    return torch.cat([p.detach().reshape(-1) for p in ranksearch.load(folder).parameters()])


MIXED = RankPlan(
    {
        "layer1.0.conv1": LayerPlan("spatial", 6),
        "layer2.0.conv2": LayerPlan("tucker2", (8, 10)),
        "layer3.0.conv1": LayerPlan("cp", 20),
        "layer3.0.conv2": LayerPlan("tiled_c4", 8),
    },
    "digits/resnet8",
)
"""Formats that start a projection from the last one's result: that, too, has to be in a checkpoint."""
PLAIN = {"steps": 30, "factor_share": 0.4}
ADAPTIVE = PLAIN | {
    "ema": 0.7, "distillation": {"weight": 0.5}, "factor_lr": 0.1,
    "projection": {"period": 4, "schedule": "removed_energy", "rank_annealing": 0.4},
}  # fmt: skip
OTHER = PLAIN | {
    "optimizer": "adamw", "lr": 1e-3, "factor_lr": 0.1, "label_smoothing": 0.1, "clip_norm": 1.0,
    "projection": {
        "period": 4, "schedule": "learning_rate", "momentum": "reset", "bn_rectification": True, "energy_transfer": True,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("plan", "changes"), [(None, PLAIN), (MIXED, PLAIN), (MIXED, ADAPTIVE), (MIXED, OTHER)],
    ids=["plain", "mixed", "adaptive", "other"],
)  # fmt: skip
@pytest.mark.parametrize("stop", [1, 11, 17, 18, 27])
def test_a_restarted_trial_ends_as_if_it_had_not_stopped(bench, tmp_path, stop, plan, changes):
    """18 dense steps, then 12 on the factors: stopped early, between projections, before the last dense step, and in the factors."""
    bench = bench if plan is None else (*bench[:3], plan)
    whole, _ = run(bench, save_to=tmp_path / "whole", **changes)
    path = tmp_path / "state.pt"
    with pytest.raises(Stopped):
        run(bench, checkpoint=StopsAt(path, stop), **changes)
    torch.rand(5)  # a fresh process would have other random numbers
    resumed, reports = run(bench, save_to=tmp_path / "resumed", checkpoint=CheckpointFile(path, 60), **changes)
    torch.testing.assert_close(
        final_weights(tmp_path / "resumed"), final_weights(tmp_path / "whole"), rtol=0, atol=1e-6
    )
    assert [e["phase"] for e in resumed.history] == [e["phase"] for e in whole.history]
    for one, other in zip(resumed.history, whole.history, strict=True):
        assert one["val_loss"] == pytest.approx(other["val_loss"], rel=1e-4)
    assert len(resumed.projections) == len(whole.projections)
    for one, other in zip(resumed.projections, whole.projections, strict=True):
        assert one["step"] == other["step"]
        assert one["loss_before"] == pytest.approx(other["loss_before"], rel=1e-4)
        assert one["loss_after"] == pytest.approx(other["loss_after"], rel=1e-4)
        assert one["removed_energy"] == pytest.approx(other["removed_energy"], rel=1e-3, abs=1e-7)
    assert resumed.epochs == whole.epochs
    # phases that were scored before the stop are not scored again; of an average the last weights are scored, too
    assert len(reports) == (4 if stop <= 17 else 1) + (changes.get("ema", 0) > 0)
    assert resumed.kept == whole.kept
    assert path.exists()  # its result may be lost on the way to the study, which removes it


def test_a_checkpoint_of_another_kind_of_device_starts_the_trial_anew(bench, tmp_path):
    """Its random numbers are of no use here; the trial is not lost for that."""
    path = tmp_path / "state.pt"
    with pytest.raises(Stopped):
        run(bench, checkpoint=StopsAt(path, 5), **PLAIN)
    torch.save(torch.load(path, weights_only=True) | {"device": "another"}, path)
    result, reports = run(bench, checkpoint=CheckpointFile(path, 60), **PLAIN)
    assert result.status == "complete"
    assert len(reports) == 5
    assert result.epochs == pytest.approx(30 * 64 / len(bench[0].train))


def test_a_killed_process_goes_on_from_its_checkpoint(bench, tmp_path):
    """A real SIGKILL in the middle of a step, whatever it hits."""
    whole, _ = run(bench, save_to=tmp_path / "whole", steps=400)
    script = (
        "import pickle, sys, torch; from ranksearch.trial.trial import run_trial\n"
        "from ranksearch.trial.checkpoint import CheckpointFile; from pathlib import Path\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"  # results differ in the last bits with their number
        "arguments, recipe, path = pickle.load(open(sys.argv[1], 'rb'))\n"
        "run_trial(*arguments, recipe, seed=0, report=print, save_to=None, checkpoint=CheckpointFile(path, 0.05))"
    )
    given, path = tmp_path / "given", tmp_path / "state.pt"
    given.write_bytes(pickle.dumps((bench, recipe(steps=400), path)))
    process = subprocess.Popen([sys.executable, "-c", script, str(given)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not path.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    path.with_name(f"{path.name}.1234").write_bytes(b"half")  # as a kill in the middle of writing leaves it
    assert 0 < torch.load(path, weights_only=True)["training"]["done"] < 400
    resumed, _ = run(bench, save_to=tmp_path / "resumed", checkpoint=CheckpointFile(path, 60), steps=400)
    assert resumed.val_accuracy == whole.val_accuracy
    CheckpointFile(path, 60).remove()  # as the study does once it knows the result
    assert not list(tmp_path.glob("state.pt*"))
    torch.testing.assert_close(
        final_weights(tmp_path / "resumed"), final_weights(tmp_path / "whole"), rtol=0, atol=1e-6
    )


def test_a_checkpoint_that_cannot_be_read_starts_the_trial_anew(bench, tmp_path):
    path = tmp_path / "state.pt"
    path.write_bytes(b"half a file")
    result, _ = run(bench, steps=4, checkpoint=CheckpointFile(path, 60))
    assert result.status == "complete"


@pytest.mark.parametrize("metric", ["auto", "kfac"])
def test_a_trial_cuts_its_layers_in_the_metric_of_the_data_and_says_what_that_took(bench, tmp_path, metric):
    result = run_trial(
        *bench, recipe(steps=4), seed=0, report=lambda entry: None, save_to=None,
        checkpoint=CheckpointFile(tmp_path / "state.pt", 60.0), metric=MetricSetting(metric, 1, 2),
    )  # fmt: skip
    assert result.status == "complete"
    projected = next(entry for entry in result.history if entry["phase"] == "projected")
    assert 0 < projected["metric_seconds"] <= result.seconds
