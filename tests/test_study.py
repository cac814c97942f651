"""The study, in-process: ask and tell, budgets, seeds, failures, resume, front. The journal is real, on disk."""

import json
import subprocess
import sys

import numpy as np
import optuna
import pytest

import ranksearch
from ranksearch.api import Silent, resume
from ranksearch.errors import StudyError, UsageError
from ranksearch.pareto import hypervolume
from ranksearch.space.reading import read_space
from ranksearch.store.where import find_study
from ranksearch.study import driver as runner
from ranksearch.study.study import Study
from ranksearch.trial.result import TrialResult
from tests.conftest import drain, simulated


def test_every_plan_is_within_every_budget_and_the_count_is_kept(make, bench):
    study = make(trials=25, budgets=["flops=40%", "params=35%"])
    drain(study, bench)
    assert study.finished == 25 == len(study.trials)
    assert all(row["macs_ratio"] <= 0.40 and row["params_ratio"] <= 0.35 for row in study.trials)
    assert {row["allocator"] for row in study.trials} == {"solver", "uniform", "energy", "minimax", "search"}
    levels = [row["macs_ratio"] for row in study.trials]
    assert max(levels) - min(levels) > 0.1  # a front is searched, not one cost


def test_the_same_seed_gives_the_same_plans_and_another_seed_others(make, bench):
    def plans(name, *settings):
        return [c.plan.digest() for c in drain(make(trials=12, name=name, settings=settings), bench)]

    first = plans("a")
    assert first == plans("b")
    assert first != plans("c", "search.seed=7")
    assert len(set(first)) > 8


@pytest.mark.parametrize("form", ["allocated", "direct"])
@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "nsga3", "gp", "qmc", "random"])
def test_every_sampler_in_every_form(make, bench, sampler, form):
    settings = [f"search.sampler={sampler}", f"search.parametrization={form}"]
    study = make(trials=9, budgets=["flops=70%"], settings=settings)
    assert len(drain(study, bench)) == 9
    assert all(row["macs_ratio"] <= 0.7 for row in study.trials)
    again = make(trials=9, budgets=["flops=70%"], settings=settings, name="again")
    drain(again, bench)
    assert [row["plan"] for row in again.trials] == [row["plan"] for row in study.trials]


def test_one_objective_searches_at_the_budget(make, bench):
    study = make(trials=8, settings=["search.objectives=[accuracy]"], budgets=["size=40%"])
    drain(study, bench)
    assert all("level" not in row["params_searched"] for row in study.trials)
    (solver,) = [row for row in study.trials if row["allocator"] == "solver"]
    # the file's flops: 50% holds beside it, and either may be the one that is used up
    assert max(solver["size_ratio"] / 0.4, solver["macs_ratio"] / 0.5) > 0.98
    assert len({row["val_accuracy"] for row in study.front}) == 1  # the best, and its equals


def test_without_a_budget_the_front_is_searched_up_to_the_dense_net(make, bench, tmp_path, digits_yaml):
    text = digits_yaml.read_text().replace("budgets:\n  flops: 50%", "budgets: {}")
    (tmp_path / "free.yaml").write_text(text)
    study = Study.create(tmp_path, read_space(tmp_path / "free.yaml", trials=16), bench, 99.0)
    drain(study, bench)
    ratios = [row["macs_ratio"] for row in study.trials]
    assert max(ratios) > 0.8
    assert min(ratios) < 0.31  # front_from
    assert (
        max(row["macs_ratio"] for row in study.trials if row["allocator"] == "solver") < 0.9
    )  # none on the dense net itself


def test_front_and_hypervolume_against_brute_force(make, bench):
    study = make(trials=12)
    drain(study, bench)
    points = {r["trial"]: (1 - r["val_accuracy"] / 100, r["macs_ratio"]) for r in study.trials}
    brute = {
        t for t, p in points.items()
        if not any(all(a <= b for a, b in zip(q, p, strict=True)) and q != p for q in points.values())
    }  # fmt: skip
    assert {row["trial"] for row in study.front} == brute
    ordered = [row["val_accuracy"] for row in study.front]
    assert ordered == sorted(ordered, reverse=True)
    assert study.hypervolume == pytest.approx(hypervolume(list(points.values()), [1, 1]))
    grid = np.stack(np.meshgrid(*[np.linspace(0, 1, 801)] * 2), -1).reshape(-1, 2)
    covered = np.zeros(len(grid), bool)
    for p in points.values():
        covered |= (grid >= p).all(1)
    assert study.hypervolume == pytest.approx(covered.mean(), abs=5e-3)


def test_front_json_has_the_fixed_fields(make, bench):
    study = make(trials=4)
    drain(study, bench)
    record = json.loads((study.folder / "front.json").read_text())
    assert record == json.loads(json.dumps(study.front_record()))
    assert {"study", "objectives", "budgets", "reference_point", "hypervolume", "dense", "trials"} <= set(record)
    fields = {
        "trial", "status", "epochs", "val_accuracy", "test_accuracy", "macs", "params", "size_bytes", "latency_ms", "macs_ratio",
        "params_ratio", "plan", "params_searched", "seed",
    }  # fmt: skip
    for row in record["trials"]:
        assert fields <= set(row)
        assert row["latency_ms"] is None
        assert row["test_accuracy"] is None


def test_best_within_a_budget(make, bench):
    study = make(trials=10)
    drain(study, bench)
    best = study.best("flops=25%")
    assert best["macs_ratio"] <= 0.25
    assert study.best()["val_accuracy"] == max(row["val_accuracy"] for row in study.trials)
    with pytest.raises(UsageError, match="within flops=1%"):
        study.best("flops=1%")


def test_failed_and_diverged_trials_are_recorded_and_stay_out_of_the_front(make, bench):
    study = make(trials=5)
    results = [
        lambda c: TrialResult("failed", c.seed, 0.0, reason="MemoryError: no"),
        lambda c: TrialResult("diverged", c.seed, 0.0, reason="the loss is nan"),
        lambda c: simulated(c, bench, accuracy=float("nan")),
    ]
    for make_result in [*results, lambda c: simulated(c, bench), lambda c: simulated(c, bench)]:
        candidate = study.ask(bench)
        study.tell(candidate.number, make_result(candidate))
    assert study.ask(bench) is None
    assert [row["status"] for row in study.trials] == ["failed", "diverged", "diverged", "complete", "complete"]
    assert study.trials[0]["reason"] == "MemoryError: no"
    assert all(row["status"] == "complete" for row in study.front)
    states = {t.state for t in study._study.get_trials()}
    assert optuna.trial.TrialState.RUNNING not in states


def test_a_study_is_continued_from_its_folder(make, bench, tmp_path):
    study = make(trials=10)
    for _ in range(4):
        candidate = study.ask(bench)
        study.tell(candidate.number, simulated(candidate, bench))
    lost = [study.ask(bench), study.ask(bench)]  # a driver that dies here leaves them running
    done = {row["trial"]: row["val_accuracy"] for row in study.trials}
    del study

    again = Study.open(find_study("digits_resnet8", tmp_path))
    assert again.requeue_interrupted() == 2
    assert again.requeue_interrupted() == 0
    rest = drain(again, bench)
    assert len(rest) == 6
    # first of all what was cut off: the same plan, recipe and seed
    assert [(c.plan, c.recipe, c.seed) for c in rest[:2]] == [(c.plan, c.recipe, c.seed) for c in lost]
    assert again.finished == 10 == len(again.trials)
    assert done.items() <= {row["trial"]: row["val_accuracy"] for row in again.trials}.items()
    keys = [(r["plan"]["layers"].__repr__(), r["params_searched"].__repr__()) for r in again.trials]
    assert len(set(keys)) == 10


def test_a_study_that_is_done_goes_on_with_more_trials(tmp_path, digits_yaml, short_settings):
    study = ranksearch.search(digits_yaml, settings=short_settings, runs=tmp_path, inline=True)
    before = {row["trial"]: row["val_accuracy"] for row in study.trials}
    with pytest.raises(UsageError, match="--trials 2: 3 trials of 'digits_resnet8' are finished already"):
        resume("digits_resnet8", trials=2, runs=tmp_path, inline=True)
    more = resume("digits_resnet8", trials=5, runs=tmp_path, inline=True)
    assert more.finished == 5 == Study.open(study.folder).planned
    assert before.items() <= {row["trial"]: row["val_accuracy"] for row in more.trials}.items()


def test_a_result_that_was_written_but_not_told_is_not_lost(make, bench, tmp_path, monkeypatch):
    study = make(trials=3)
    candidate = study.ask(bench)

    def die(number):
        raise SystemExit

    monkeypatch.setattr(study, "_tell_optuna", die)
    with pytest.raises(SystemExit):
        study.tell(candidate.number, simulated(candidate, bench, accuracy=77.0))
    again = Study.open(tmp_path / "digits_resnet8")
    assert again.requeue_interrupted() == 0
    assert [row["val_accuracy"] for row in again.trials] == [77.0]


def test_a_space_with_nothing_new_ends_the_study_early_and_keeps_it(make, bench, monkeypatch):
    monkeypatch.setattr("ranksearch.study.proposals.MAX_REJECTED", 20)
    fixed = ["recipe.lr=0.1", "recipe.factor_share=0.5", "recipe.projection={period: 5}"]
    corrections = ["search.weight_range=1", "search.search_lowerings=false", "search.objectives=[accuracy]"]
    study = make(trials=16, settings=[*fixed, *corrections])
    drain(study, bench)
    assert study.exhausted
    assert 1 <= study.finished < 16
    assert len({row["plan"]["layers"].__repr__() for row in study.trials}) == study.finished
    assert study.front


def test_a_study_is_run_by_one_process_at_a_time(make):
    study = make(trials=2)
    with (
        study.locked(),
        pytest.raises(UsageError, match="being run by another process"),
        Study.open(study.folder).locked(),
    ):
        pass
    with Study.open(study.folder).locked():
        pass


def test_half_a_study_is_removed_and_a_strange_folder_left_alone(make, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("ranksearch.study.study.write_durably", full)
        with pytest.raises(OSError, match="no space"):
            make(trials=2)
    assert not (tmp_path / "digits_resnet8").exists()
    (tmp_path / "digits_resnet8").mkdir()
    (tmp_path / "digits_resnet8" / "mine.txt").write_text("")
    with pytest.raises(UsageError, match="is not a study"):
        make(trials=2)
    assert (tmp_path / "digits_resnet8" / "mine.txt").exists()


def test_a_driver_that_is_killed_while_it_makes_a_study_is_not_in_the_way_of_the_next(
    make, bench, digits_yaml, tmp_path
):
    (tmp_path / "digits_resnet8" / "preview").mkdir(parents=True)
    script = f"""
import os
from pathlib import Path
from ranksearch.study import study
from ranksearch.space.reading import read_space
from ranksearch.search.workbench import prepare

study.write_durably = lambda *args: os._exit(9)
space = read_space({str(digits_yaml)!r}, trials=2)
bench = prepare(space, fallback=Path({str(tmp_path / "dense")!r}), log=print)
study.Study.create(Path({str(tmp_path)!r}), space, bench, 99.0)
"""
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert killed.returncode == 9, killed.stderr
    assert (tmp_path / "digits_resnet8" / "optuna.journal").is_file()
    study = make(trials=2)
    drain(study, bench)
    assert study.finished == 2
    assert (study.folder / "preview").is_dir()


def test_a_taken_name_proposes_a_free_one(make, tmp_path):
    make(trials=2)
    with pytest.raises(UsageError, match=r"resume digits_resnet8`.*--name digits_resnet8-2"):
        make(trials=2)


def test_an_unknown_study_names_the_nearest(make, tmp_path):
    make(trials=2)
    with pytest.raises(UsageError, match="Did you mean 'digits_resnet8'"):
        find_study("digits_resnet", tmp_path)


def test_a_damaged_study_is_an_error_not_a_traceback(make, tmp_path):
    study = make(trials=2)
    (study.folder / "study.json").write_text("{")
    with pytest.raises(UsageError, match=r"study\.json: expected JSON"):
        Study.open(study.folder)


def test_a_study_whose_first_trials_all_fail_ends_with_the_reason(make, bench, monkeypatch):
    def broken(*args, **kwargs):
        raise MemoryError("the plan was too large")

    monkeypatch.setattr("ranksearch.trial.attempt.run_trial", broken)
    study = make(trials=8)
    with pytest.raises(
        StudyError, match=r"first 3 trials failed or diverged. 3 of 3: MemoryError: the plan was too large"
    ):
        runner.run_inline(study, bench, lambda row: None, print)
    assert study.finished == 3


def test_an_interrupted_trial_goes_on_from_its_checkpoint(tmp_path, digits_yaml, short_settings, steps_made):
    settings = [*short_settings, "search.trials=1", "resources.checkpoint_seconds=0.000001"]
    with pytest.raises(KeyboardInterrupt):
        ranksearch.search(digits_yaml, settings=settings, runs=tmp_path, inline=True)
    folder = tmp_path / "digits_resnet8"
    assert len(list((folder / "checkpoints").glob("*.pt"))) == 1
    study = resume("digits_resnet8", runs=tmp_path, inline=True)
    assert study.finished == 1
    assert len([done for done in steps_made if done is not None]) == 20  # not a step of the 20 was made twice
    assert not list((folder / "checkpoints").iterdir())
    (row,) = study.trials
    assert row["epochs"] == pytest.approx(20 * 64 / (1797 - 360 - 360))
    assert row["projections"]
    assert "projections" not in study.front_record()["trials"][0]


def test_a_trial_that_lost_its_workers_leaves_no_state_behind(make, bench):
    study = make(trials=2)
    candidate = study.ask(bench)
    candidate.checkpoint.parent.mkdir()
    for name in (candidate.checkpoint.name, f"{candidate.checkpoint.name}.99"):
        (candidate.checkpoint.parent / name).write_bytes(b"")
    study.tell(candidate.number, TrialResult("failed", 0, 0.0, reason="its workers died, twice"))
    assert not list(candidate.checkpoint.parent.iterdir())


def test_a_retried_trial_has_the_same_checkpoint_and_another_trial_another(make, bench):
    study = make(trials=4)
    first, second = study.ask(bench), study.ask(bench)
    assert first.checkpoint != second.checkpoint
    assert study.retry(first.number)
    later = [study.ask(bench) for _ in range(3)]
    assert [c.recipe for c in later if c.checkpoint == first.checkpoint] == [first.recipe]
    assert len({c.checkpoint for c in [first, second, *later]}) == 4


def test_inline_search_from_the_public_api(tmp_path, digits_yaml, short_settings):
    seen = []

    class Watch(Silent):
        def row(self, study, row):
            seen.append(row["trial"])

    study = ranksearch.search(
        digits_yaml,
        settings=short_settings,
        budgets=["flops=35%"],
        name="inline",
        runs=tmp_path,
        inline=True,
        observer=Watch(),
    )
    assert len(seen) == 3 == len(study.trials)
    front = study.front_record()
    assert all(row["macs_ratio"] <= 0.35 for row in study.trials)
    assert all(row["test_accuracy"] is not None for row in front["trials"])
    assert front["dense"]["test_accuracy"] > 95
    on_front = {row["trial"] for row in front["trials"]}
    # the test set was read for the front alone
    assert all(row["test_accuracy"] is None for row in study.trials if row["trial"] not in on_front)
    net = ranksearch.load(study.folder / "trials" / f"{front['trials'][0]['trial']:03d}")
    assert sum(p.numel() for p in net.parameters()) == front["trials"][0]["params"]


def test_flops_are_macs_as_an_objective(make, bench):
    study = make(trials=5, settings=["search.objectives=[accuracy, flops]"])
    drain(study, bench)
    twin = make(trials=5, name="twin")
    drain(twin, bench)
    assert [row["plan"] for row in study.trials] == [row["plan"] for row in twin.trials]
    assert study.hypervolume == twin.hypervolume


def test_three_objectives(make, bench):
    study = make(trials=14, settings=["search.objectives=[params, accuracy, macs]"])
    drain(study, bench)
    assert study.finished == 14
    assert len({row["params"] for row in study.trials}) > 6
    assert 0 < study.hypervolume < 1
