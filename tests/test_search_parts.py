"""The parts that a study is made of: journal, ledger, groups, the direct form, first points, warm starts, what becomes of results."""

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest

from ranksearch.allocate import BASELINES, LayerRules, parse_budget, rank_curves
from ranksearch.allocate.damage import WITHOUT_DATA
from ranksearch.compress import RankPlan, plan_cost
from ranksearch.errors import StudyError, UsageError
from ranksearch.front.row import Row
from ranksearch.pareto import hypervolume, nondominated
from ranksearch.search.allocated import Allocated
from ranksearch.search.direct import Direct
from ranksearch.search.groups import groups_of
from ranksearch.search.opening import first_points
from ranksearch.space.reading import read_space
from ranksearch.store.folder import find_front
from ranksearch.store.journal import mend_journal, open_journal
from ranksearch.study import driver as runner
from ranksearch.study.ledger import Ledger
from ranksearch.study.study import Study
from ranksearch.trial.result import Status, TrialResult
from tests.conftest import drain, simulated

# The journal ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def journal(tmp_path):
    path = tmp_path / "optuna.journal"
    study = optuna.create_study(storage=open_journal(path), study_name="s")
    for value in (1.0, 2.0):
        study.tell(study.ask({"x": optuna.distributions.FloatDistribution(0, 1)}), value)
    return path


def reopened(path):
    return optuna.load_study(storage=open_journal(path), study_name="s")


def test_half_a_line_is_cut_off_and_the_rest_goes_on(journal):
    whole = journal.read_bytes()
    assert mend_journal(journal) == 0
    journal.write_bytes(whole + b'{"op_code": 4, "study_id"')
    assert len(reopened(journal).trials) == 2  # reading alone is no harm
    assert mend_journal(journal) == 25
    assert journal.read_bytes() == whole
    study = reopened(journal)
    study.tell(study.ask(), 3.0)
    assert [t.value for t in reopened(journal).trials] == [1.0, 2.0, 3.0]


def test_without_the_mending_half_a_line_ruins_the_journal(journal):
    """Why `mend_journal` is there; should Optuna mend it itself one day, this test says so."""
    journal.write_bytes(journal.read_bytes() + b'{"op_code": 4, "study_id"')
    with pytest.raises((AttributeError, ValueError)):
        reopened(journal).ask()
    assert len(journal.read_bytes().splitlines()[-1]) > 100  # two lines glued together


def test_a_full_disk_leaves_no_half_line(journal, monkeypatch):
    whole = journal.read_bytes()
    study = reopened(journal)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            study.ask()
    assert journal.read_bytes() == whole
    study.tell(study.ask(), 3.0)
    assert [t.value for t in reopened(journal).trials] == [1.0, 2.0, 3.0]


def test_a_lock_does_not_outlive_its_process(journal):
    hold = (
        "import sys, time; from pathlib import Path; from ranksearch.store.journal import KernelLock\n"
        "KernelLock(Path(sys.argv[1])).acquire(); print('held', flush=True); time.sleep(60)"
    )
    lock = journal.with_name(f".{journal.name}.lock")
    process = subprocess.Popen([sys.executable, "-c", hold, str(lock)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    process.kill()
    process.wait()
    study = reopened(journal)
    study.tell(study.ask(), 3.0)  # at once: the test's time limit is below Optuna's own grace period
    assert len(study.trials) == 3


# The ledger ----------------------------------------------------------------------------------------------------------


def row(number, accuracy, ratio, status="complete", params=0.5):
    return Row(
        number, Status(status), val_accuracy=accuracy, macs=int(1e6 * ratio), macs_ratio=ratio, params_ratio=params,
        share=accuracy and accuracy / 100, plan={"layers": {"conv": {"lowering": "svd", "rank": number + 1}}},
    )  # fmt: skip


@pytest.mark.parametrize("objectives", [["accuracy"], ["accuracy", "macs"], ["macs", "accuracy", "params"]])
def test_the_ledger_keeps_the_front_of_all_rows(objectives):
    rng, ledger, rows = np.random.default_rng(0), Ledger(objectives), []
    for i in range(120):
        new = row(i, float(rng.integers(50, 70)), float(rng.integers(1, 20)) / 20, params=float(rng.integers(1, 9)) / 9)
        rows.append(new)
        before = ledger.front
        assert ledger.add(new) == (ledger.front != before)
        points = [
            [1 - r["val_accuracy"] / 100 if o == "accuracy" else r[f"{o}_ratio"] for o in objectives] for r in rows
        ]
        expected = {r["trial"] for r, keep in zip(rows, nondominated(points), strict=True) if keep}
        assert {r["trial"] for r in ledger.front} == expected
    assert ledger.hypervolume == pytest.approx(hypervolume(points, [1.0] * len(objectives)))
    assert ledger.best["val_accuracy"] == max(r["val_accuracy"] for r in rows)


def test_the_ledger_counts_and_takes_a_trial_once():
    ledger = Ledger(["accuracy", "macs"], [row(3, 90, 0.4), row(1, None, 0.3, "failed"), row(2, 20, 0.1, "stopped")])
    assert ledger.counts == {"complete": 1, "failed": 1, "stopped": 1}
    assert [r["trial"] for r in ledger.rows] == [1, 2, 3]
    assert [r["trial"] for r in ledger.front] == [3]
    with pytest.raises(ValueError, match="in the ledger already"):
        ledger.add(row(3, 91, 0.4))
    ledger.score({"3": 88.0, "dense": 92.0})
    assert ledger.front[0]["test_accuracy"] == 88.0
    assert Ledger(["accuracy"]).hypervolume == 0


# Groups and forms ----------------------------------------------------------------------------------------------------


def test_groups_by_stage_shape_layer_and_pattern(bench):
    curves = bench.curves
    free = [o.layer.name for o in curves.layers if len(o.choices) > 1]
    for grouping in ("stage", "shape", "layer", "all", {"early": ["conv1", "layer1.*"], "late": ["layer3.*"]}):
        groups = groups_of(curves, grouping)
        assert sorted(name for names in groups.values() for name in names) == sorted(free)
    assert set(groups_of(curves, "stage")) == {name.split(".")[0] for name in free}
    assert "64x64x3x3" in groups_of(curves, "shape")
    named = groups_of(curves, {"early": ["conv1", "layer1.*"], "late": ["layer3.*"]})
    assert set(named) == {"early", "late", "rest"}
    assert all(name.startswith("layer2") for name in named["rest"])
    with pytest.raises(UsageError, match=r"search\.groups\.late: 'layer9\.\*' matches no layer.*Did you mean"):
        groups_of(curves, {"late": ["layer9.*"]})


def test_a_search_of_named_groups(make, bench):
    study = make(trials=6, settings=["search.groups={early: [conv1, 'layer1.*'], late: 'layer3.*'}"])
    drain(study, bench)
    (searched,) = [r for r in study.trials if r["allocator"] == "search"][:1]
    assert {"log_weight/early", "log_weight/late", "log_weight/rest", "trust", "level"} <= set(
        searched["params_searched"]
    )


def test_trust_and_weights_change_the_plan_and_their_neutral_point_is_the_uncorrected_optimum(bench, digits_yaml):
    from ranksearch.allocate import allocate_plan

    form = Allocated(read_space(digits_yaml), bench.curves, bench.damage)
    neutral = form.neutral(0.6)
    uncorrected = allocate_plan(bench.curves, [parse_budget("flops", "30%")], damage=bench.damage).plan
    assert form.plan(neutral).digest() == uncorrected.digest()
    for change in ({"trust": 0.0}, {"log_weight/layer3": 0.69}):
        changed = form.plan({**neutral, **change})
        assert changed.digest() != uncorrected.digest()
        assert plan_cost(bench.net, changed).macs <= 0.3 * 747_136


def test_what_competes_makes_its_own_plans_and_opens_the_study(bench, digits_yaml):
    from ranksearch.allocate import Damage

    space = read_space(digits_yaml, trials=32, settings=["search.predictions=[uniform, kfac, none]"])
    rivals = {"kfac": bench.damage, "none": Damage(bench.damage.measure)}
    form = Allocated(space, bench.curves, bench.damage, rivals)
    neutral, budget = form.neutral(0.6), [parse_budget("flops", "30%")]
    assert neutral["prediction"] == "uniform"
    assert form.plan(neutral).digest() == BASELINES["uniform"](bench.curves, budget, form._reference).digest()
    alone = Allocated(read_space(digits_yaml), bench.curves, bench.damage)
    assert "prediction" not in alone.distributions
    assert form.plan(neutral | {"prediction": "kfac"}).digest() == alone.plan(alone.neutral(0.6)).digest()
    assert form.plan(neutral | {"prediction": "none"}).digest() != alone.plan(alone.neutral(0.6)).digest()
    opened = [point.params.get("prediction") for point in first_points(space, bench.curves, form, form)]
    assert opened[:4] == ["uniform", "uniform", "kfac", "kfac"]
    assert "none" in opened


def test_the_prediction_is_settled_by_scores_on_the_tasks_metric(bench, digits_yaml):
    """Where damage is of no use, the rule that scores best leads; a settled space leaves nothing open, and says so of one that is named."""
    from ranksearch.allocate import Damage
    from ranksearch.search.predicting import CLOSE, settle, usual

    space, said = read_space(digits_yaml), []
    assert space.search.sensitivity == space.search.measure == "auto"
    # the less a layer keeps the better, it says: the solver's plans are the smallest of all
    shares = {options.layer.name: 0.5 * (1 - options.removed) for options in bench.curves.layers}
    void = Damage(bench.damage.measure, shares)
    found = settle(
        space, bench.task, bench.dense_model(), bench.curves, lambda names: dict.fromkeys(names, void), said.append, {}
    )
    assert found.predictions[0] in ("uniform", "energy", "minimax")
    leading = found.scores[found.predictions[0]]
    assert leading == max(found.scores.values())
    assert all(leading - found.scores[name] <= 100 * CLOSE + 1e-9 for name in found.predictions)
    assert "plans without training" in said[0]
    settled = found.settled(space).search
    assert settled.sensitivity in ("kfac", "activation", "none")
    assert settled.measure in ("log_kept_energy", "relative_energy")
    named = read_space(digits_yaml, settings=["search.sensitivity=fisher"])
    assert usual(named).search.sensitivity == "fisher"


def test_the_usual_prediction_leads_unless_another_is_better_by_more_than_chance(bench, digits_yaml):
    """The solver's sensitivities all alike here: no score tells them apart, and only rules that score better still compete."""
    from ranksearch.search.predicting import settle

    for trials, most in ((4, 1), (8, 2), (64, 3)):
        space = read_space(digits_yaml, trials=trials)
        found = settle(
            space, bench.task, bench.dense_model(), bench.curves,
            lambda names: dict.fromkeys(names, bench.damage), lambda text: None, {},
        )  # fmt: skip
        assert (found.sensitivity, found.predictions[0]) == ("kfac", "kfac")
        assert len(found.predictions) <= most
        assert all(found.scores[name] > found.scores["kfac"] for name in found.predictions[1:])


def test_the_direct_form_finds_back_its_own_plans(bench, digits_yaml):
    form = Direct(read_space(digits_yaml, settings=["search.parametrization=direct"]), bench.curves)
    rng = np.random.default_rng(0)
    for _ in range(20):
        values = {
            name: rng.choice(d.choices) if hasattr(d, "choices") else float(rng.random())
            for name, d in form.distributions.items()
        }
        plan = form.plan(values)
        params = form.params_of(plan)
        assert params is not None
        assert form.plan(params).digest() == plan.digest()
    uniform = BASELINES["uniform"](bench.curves, [parse_budget("flops", "40%")])
    assert form.plan(form.params_of(uniform)).digest() == uniform.digest()


def test_a_direct_search_keeps_its_budget_and_tells_the_sampler_of_violations(make, bench):
    study = make(trials=12, budgets=["flops=45%"], settings=["search.parametrization=direct"])
    drain(study, bench)
    assert all(r["macs_ratio"] <= 0.45 for r in study.trials)
    trials = study._study.get_trials()
    infeasible = [t for t in trials if t.user_attrs.get("outcome") == "infeasible"]
    assert infeasible, "every draw was feasible: the test tells nothing"
    for trial in trials:
        (violation,) = trial.constraints.values()
        assert (violation > 0) == (trial in infeasible)
    assert study.finished == 12


# First points and warm starts ----------------------------------------------------------------------------------------


def test_the_classics_open_a_study_at_several_levels(bench, digits_yaml):
    space = read_space(digits_yaml, trials=32)
    form = Allocated(space, bench.curves, bench.damage)
    found = first_points(space, bench.curves, form, form)
    names = [point.allocator for point in found]
    assert names == ["solver"] * 3 + ["uniform", "solver", "solver", "energy", "minimax"]
    levels = [point.params["level"] for point in found if point.allocator == "solver"]
    assert levels == pytest.approx([1.0, 0.3, 0.65, 0.475, 0.825])
    assert all(point.plan is not None for point in found if point.allocator != "solver")
    few = first_points(read_space(digits_yaml, trials=4), bench.curves, form, form)
    assert [point.allocator for point in few] == ["solver", "solver"]
    assert first_points(read_space(digits_yaml, settings=["search.first_points=[]"]), bench.curves, form, form) == []
    scored = first_points(space, bench.curves, form, form, scored=True)  # baselines that did not keep up cost no trial
    assert [point.params["level"] for point in scored] == pytest.approx([1.0, 0.3, 0.65, 0.475, 0.825])


@pytest.fixture
def earlier(make, bench):
    study = make(trials=14, name="earlier")
    drain(study, bench)
    return study


def test_an_earlier_front_is_tried_first_in_either_form(make, bench, earlier, tmp_path):
    front = {RankPlan.from_dict(r["plan"]).digest() for r in earlier.front}
    for form in ("allocated", "direct"):
        study = make(
            trials=40, name=f"warm-{form}", warm_start=[str(earlier.folder / "front.json")],
            settings=[f"search.parametrization={form}"],
        )  # fmt: skip
        drain(study, bench)
        warm = [r for r in study.trials if r["allocator"] == "warm start"]
        solver = {RankPlan.from_dict(r["plan"]).digest() for r in study.trials if r["allocator"] == "solver"}
        assert {RankPlan.from_dict(r["plan"]).digest() for r in warm} | solver >= front
        assert warm
        first = min(r["trial"] for r in study.trials if r["allocator"] == "search")
        assert all(r["trial"] < first for r in warm)
        if form == "allocated":  # the corrections are known again, so that the sampler learns from them
            assert any("trust" in r["params_searched"] for r in warm)


def test_a_warm_start_keeps_to_budget_rules_and_half_of_the_trials(make, bench, earlier, digits_yaml):
    where = [str(earlier.folder / "front.json")]
    tight = make(trials=20, name="tight", budgets=["flops=20%"], warm_start=where)
    drain(tight, bench)
    assert all(r["macs_ratio"] <= 0.2 for r in tight.trials)
    few = make(trials=6, name="few", warm_start=where)
    assert few.info["opened_with"] == {"solver": 1, "warm start": 2}
    rules = LayerRules(("im2col",), ("*",), ("linear",))
    narrow = replace(bench, curves=rank_curves(bench.dense_model(), bench.net, rules), damage=WITHOUT_DATA)
    space = read_space(digits_yaml, trials=6, name="narrow", warm_start=where)
    other = Study.create(earlier.folder.parent, space, narrow, 99.0)
    drain(other, narrow)
    used = {entry["lowering"] for r in other.trials for entry in r["plan"]["layers"].values()}
    assert used <= {"im2col", "dense"}
    assert "warm start" not in other.info["opened_with"]


def test_a_warm_start_that_cannot_be_read_is_one_sentence(make, earlier, tmp_path):
    assert find_front("earlier", earlier.folder.parent) == earlier.folder / "front.json"
    with pytest.raises(UsageError, match=r"warm start: There is no study 'earlyer'.*Did you mean 'earlier'"):
        find_front("earlyer", earlier.folder.parent)
    strange = tmp_path / "strange.json"
    strange.write_text("{}")
    with pytest.raises(UsageError, match="is no front of a study"):
        make(trials=4, name="a", warm_start=[str(strange)])
    record = json.loads((earlier.folder / "front.json").read_text())
    record["trials"][0]["plan"]["layers"] = {"features.0": {"lowering": "im2col", "rank": 3}}
    strange.write_text(json.dumps(record))
    with pytest.raises(UsageError, match=r"another net: this one has no layer 'features\.0'"):
        make(trials=4, name="b", warm_start=[str(strange)])
    assert not (earlier.folder.parent / "b").exists()


# What becomes of results ---------------------------------------------------------------------------------------------


def failing(study, bench, outcomes):
    driver = runner.Driver(study, bench, lambda row: None, print)
    for outcome in outcomes:
        candidate = driver.ask()
        good = simulated(candidate, bench)
        driver.settle(
            candidate.number, good if outcome == "complete" else type(good)(outcome, 0, 0.0, reason=f"it {outcome}")
        )


def test_more_failures_than_allowed_end_the_study_with_the_last_reason(make, bench):
    study = make(trials=40)
    with pytest.raises(
        StudyError, match=r"6 of 10 trials failed or diverged, more than search\.max_failures=0\.5.*it failed"
    ):
        failing(study, bench, ["complete"] * 4 + ["failed", "diverged"] * 2 + ["diverged", "failed"] + ["complete"] * 9)
    assert study.finished == 10
    patient = make(trials=40, name="patient", settings=["search.max_failures=0.9"])
    failing(patient, bench, ["complete"] * 4 + ["failed", "diverged"] * 5)
    assert patient.finished == 14
    stubborn = make(trials=4, name="stubborn", settings=["search.max_failures=1"])
    failing(stubborn, bench, ["failed"] * 4)
    assert stubborn.finished == 4
    # an earlier run's failures do not end this one
    failing(Study.open(study.folder), bench, ["complete"] * 8)


@pytest.mark.parametrize("when", range(3))
def test_a_result_is_held_while_the_disk_is_full(make, bench, monkeypatch, when):
    """The disk is full at the `when`-th write of telling, the front or asking, and has room again at the third try."""
    study, said, writes = make(trials=3), [], []
    fsync, write_text = os.fsync, Path.write_text

    def guarded(action):
        def write(*arguments, **options):
            writes.append(1)
            if when < len(writes) <= when + 2:
                raise OSError(errno.ENOSPC, "No space left on device")
            return action(*arguments, **options)

        return write

    driver = runner.Driver(study, bench, lambda row: None, said.append)
    monkeypatch.setattr(runner, "LOOK_SECONDS", 0.01)
    candidate = driver.ask()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", guarded(fsync))
        patch.setattr(Path, "write_text", guarded(write_text))
        driver.settle(candidate.number, simulated(candidate, bench, 77.0))
        candidate = driver.ask()
    driver.settle(candidate.number, simulated(candidate, bench, 78.0))
    assert len(said) == 2
    assert "No space left" in said[0]
    assert study.running == 0
    again = Study.open(study.folder)
    again.requeue_interrupted()
    assert [r["val_accuracy"] for r in again.trials] == [77.0, 78.0]
    assert json.loads((study.folder / "front.json").read_text()) == json.loads(json.dumps(study.front_record()))
    assert len(drain(again, bench)) == 1


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_trial_that_finds_the_disk_full_is_run_again_once_there_is_room(make, bench, monkeypatch):
    study, said, tries, looks = make(trials=2), [], [], iter([False, False, False, True])

    def run(task, dense, net, plan, recipe, *, seed, **options):
        tries.append((plan.digest(), seed))
        if len(tries) == 1:
            full_disk()
        return TrialResult("complete", seed, 1.0, val_accuracy=80.0 + len(tries))

    monkeypatch.setattr(runner, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(runner, "has_room", lambda folder, size: next(looks))
    monkeypatch.setattr("ranksearch.trial.attempt.run_trial", run)
    runner.run_inline(study, bench, lambda row: None, said.append)
    assert next(looks, None) is None
    assert tries[0] == tries[1] != tries[2]
    assert study.counts == {"complete": 2}
    assert "it is run again once" in said[0]
    assert "has room again" in said[1]
    again = Study.open(study.folder)
    assert (again.counts, again.requeue_interrupted()) == (study.counts, 0)


def test_a_disk_that_stays_full_ends_the_study_and_resume_runs_the_trial_again(make, bench, monkeypatch):
    study = make(trials=3)
    with monkeypatch.context() as patch:
        patch.setattr(runner, "LOOK_SECONDS", 0.0)
        patch.setattr("ranksearch.trial.attempt.run_trial", full_disk)
        with pytest.raises(
            StudyError, match=r"No space is left for trial \d.*has room: OSError.*`ranksearch resume digits_resnet8`"
        ):
            runner.run_inline(study, bench, lambda row: None, print)
        patch.setattr(runner, "has_room", lambda folder, size: False)
        patch.setattr(runner, "PATIENCE_SECONDS", 0.0)
        with pytest.raises(StudyError, match=r"No space is left in .*`ranksearch resume digits_resnet8`"):
            runner.run_inline(Study.open(study.folder), bench, lambda row: None, print)
    again = Study.open(study.folder)
    assert again.finished == 0
    assert again.requeue_interrupted() == 1
    assert drain(again, bench)[0].plan.digest()
    assert again.counts == {"complete": 3}


def test_a_driver_that_dies_right_after_taking_an_enqueued_trial_loses_none_of_its_parameters(make, bench):
    study = make(trials=6)
    trial = study._study.ask()  # taken from the queue, and the driver dies before it has drawn a parameter
    assert trial.params == {}
    again = Study.open(study.folder)
    again.requeue_interrupted()
    drain(again, bench)
    solver = [r["params_searched"]["level"] for r in again.trials if r["allocator"] == "solver"]
    assert 1.0 in solver
    assert all(r["params_searched"]["trust"] == 1.0 for r in again.trials if r["allocator"] == "solver")


def told(study, bench, count):
    """Runs so many trials; a plan's accuracy depends on the plan alone."""
    for _ in range(count):
        candidate = study.ask(bench)
        macs = plan_cost(bench.net, candidate.plan).macs
        accuracy = 60 + 35 * (macs / 747_136) ** 0.3 + int(candidate.plan.digest()[:4], 16) % 20 / 10
        study.tell(candidate.number, simulated(candidate, bench, accuracy))


def test_a_study_that_was_killed_proposes_what_it_would_have_proposed(make, bench):
    def proposals(study):
        return [(r["plan"], r["recipe"], r["params_searched"]) for r in study.trials]

    whole = make(trials=18, name="whole")
    told(whole, bench, 18)
    killed = make(trials=18, name="killed")
    for finished in (9, 10, 14):  # killed three times in mid-trial, once before it had a plan
        told(killed, bench, finished - killed.finished)
        if finished == 14:
            killed._study.ask()
        else:
            assert killed.ask(bench) is not None
        killed = Study.open(killed.folder)
        assert killed.requeue_interrupted() == (finished != 14)
    told(killed, bench, 18 - killed.finished)
    assert proposals(killed) == proposals(whole)


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "gp"])
@pytest.mark.parametrize("form", ["allocated", "direct"])
def test_a_retried_trial_keeps_its_parameters_and_the_samplers_space(make, bench, sampler, form):
    settings = [f"search.sampler={sampler}", f"search.parametrization={form}", "search.first_points=[solver, uniform]"]
    study = make(trials=14, budgets=["flops=80%"], settings=settings)
    told(study, bench, 6)
    lost = study.ask(bench)
    assert study.retry(lost.number)
    again = study.ask(bench)
    assert (again.plan, again.seed) == (lost.plan, lost.seed)
    study.tell(again.number, simulated(again, bench))
    trials = study._study.get_trials()
    assert trials[again.number].params == trials[lost.number].params
    trial = study._study.ask()
    space = study._study.sampler.infer_relative_search_space(study._study, study._study.get_trials()[trial.number])
    assert set(space) == set(study._proposals._searched.distributions)


def test_a_retry_after_the_space_was_exhausted_is_still_run(make, bench, monkeypatch):
    monkeypatch.setattr("ranksearch.study.proposals.MAX_REJECTED", 20)
    fixed = ["recipe.lr=0.1", "recipe.factor_share=0.5", "recipe.projection={period: 5}", "search.trust=1"]
    fixed += ["search.weight_range=1", "search.search_lowerings=false", "search.objectives=[accuracy]"]
    study, asked = make(trials=16, settings=fixed), []
    while (candidate := study.ask(bench)) is not None:
        asked.append(candidate)
    assert "nothing new" in study.exhausted
    assert study.retry(asked[-1].number)
    again = study.ask(bench)
    assert again.plan == asked[-1].plan


def test_a_proposal_that_was_cut_off_before_its_verdict_is_no_trial(make, bench):
    study = make(trials=12)
    told(study, bench, 8)
    taken = study._study.ask()  # the driver dies while the sampler's parameters are drawn
    taken.suggest_float("level", 0.3, 1.0)
    again = Study.open(study.folder)
    assert again.requeue_interrupted() == 0
    drain(again, bench)
    assert again.finished == 12
    assert len({json.dumps([r["plan"]["layers"], r["recipe"]]) for r in again.trials}) == 12


def test_a_first_point_whose_asking_broke_off_is_asked_again(make, bench, monkeypatch):
    study, fsync, writes = make(trials=6), os.fsync, []

    def full_once(descriptor):
        writes.append(1)
        if len(writes) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(runner, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(os, "fsync", full_once)
    driver = runner.Driver(study, bench, lambda row: None, print)
    while (candidate := driver.ask()) is not None:
        driver.settle(candidate.number, simulated(candidate, bench))
    levels = sorted(r["params_searched"]["level"] for r in study.trials if r["allocator"] == "solver")
    assert levels == pytest.approx(
        [0.3, 0.65, 1.0]
    )  # the first of them was taken from the queue when the disk was full
    assert study.finished == 6


def test_a_study_of_thousands_of_trials_is_resumed_with_any_sampler(digits_yaml):
    from ranksearch.search.samplers import make_sampler
    from ranksearch.trial.metric import Metric

    for sampler in ("tpe", "nsga2", "nsga3", "gp", "qmc", "random"):
        settings = [f"search.sampler={sampler}", "search.parametrization=direct", f"search.seed={2**32 - 1}"]
        metric = Metric("accuracy", "maximize", "%", 90.0)
        assert make_sampler(read_space(digits_yaml, settings=settings), {}, opened_with=50_000, metric=metric)
    with pytest.raises(UsageError, match=r"search\.seed: .*less than 4294967296"):
        read_space(digits_yaml, settings=[f"search.seed={2**32}"])


def test_strange_values_in_a_front_are_one_sentence_or_left_out(make, earlier, tmp_path):
    good = json.loads((earlier.folder / "front.json").read_text())
    strange = tmp_path / "strange.json"
    for number, (change, says) in enumerate([
        ({"params_searched": [1, 2]}, "no mapping"),
        ({"recipe": [1]}, "no mapping"),
        ({"plan": {"layers": {"conv1": {"lowering": "im2cool", "rank": 3}}}}, r"warm start: .*strange\.json: .*im2col"),
    ]):  # fmt: skip
        strange.write_text(json.dumps({**good, "trials": [{**good["trials"][0], **change}]}))
        with pytest.raises(UsageError, match=says):
            make(trials=4, name=f"strange-{number}", warm_start=[str(strange)])
    recipe = {**good["trials"][0]["recipe"], "lr": "fast", "projection": {"period": 2.5}}
    strange.write_text(json.dumps({**good, "trials": [{**good["trials"][0], "recipe": recipe}]}))
    study = make(trials=4, name="odd", warm_start=[str(strange)])
    assert study.info["opened_with"]["warm start"] == 1
