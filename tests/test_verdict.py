"""Which net to ship: the one value that terminal, report, MLflow and JSON show."""

import json
import subprocess
import sys

import pytest

from ranksearch.front.certainty import plus_minus
from ranksearch.front.failures import commonest
from ranksearch.front.front_shape import knee, points_of
from ranksearch.front.layer_costs import layer_costs
from ranksearch.front.verdict import verdict_of
from ranksearch.store.where import finished_front
from ranksearch.tracking.figures import front_chart
from ranksearch.tracking.view import View
from ranksearch.trial.result import TrialResult
from tests.conftest import simulated

ACCURACY = {"name": "accuracy", "direction": "maximize", "unit": "%"}


def row(trial, val, test, macs, **more):
    return {
        "trial": trial, "val_accuracy": val, "test_accuracy": test, "macs_ratio": macs, "size_ratio": macs, "allocator": "solver",
        "latency_ms": None, "latency_ratio": None, "latency_predicted_ms": None,
    } | more  # fmt: skip


def record(trials, *, dense=(92.0, 91.73), samples=(5000, 10_000), **more):
    return {
        "study": "s", "metric": ACCURACY, "objectives": [{"name": "accuracy"}, {"name": "macs"}], "budgets": {"flops": "50%"},
        "dense": {"val_accuracy": dense[0], "test_accuracy": dense[1]}, "trials": trials, "state": "complete", "planned": 16,
        "counts": {"complete": 16}, "samples": {"validation": samples[0], "test": samples[1]},
        "gains": {"last": 4, "last_gain": 0.003, "half_gain": 0.01},
    } | more  # fmt: skip


def test_a_verdict_sets_test_beside_test_with_its_error():
    best = row(8, 91.2, 90.96, 0.5, latency_ms=3.1, latency_ratio=3.1 / 5.4, size_ratio=1 / 1.8)
    verdict = verdict_of(record([best, row(3, 90.9, 91.0, 0.4)]), where="s --runs here")
    assert verdict.ship == (
        "Ship trial 8: test 90.96 % (dense 91.73, −0.77 ± 0.40), 50 % of the MACs, 1.8× smaller, 3.1 ms against 5.4 ms."
    )
    assert verdict.export == "ranksearch export s --runs here 8 --format onnx"
    assert (verdict.trial, verdict.split, verdict.value, verdict.dense) == (8, "test", 90.96, 91.73)
    assert "trial 3" in verdict.cheaper
    assert "+0.04 ± 0.41" in verdict.cheaper
    assert "within noise" in verdict.cheaper
    assert "the last 4 of 16 added 0.3 %" in verdict.done
    assert not verdict.warning


def test_a_net_that_measures_above_a_budget_on_latency_is_marked_and_not_shipped():
    slow, fast = (row(i, 91.0 - i, None, 0.5, latency_ms=ms, latency_ratio=ms / 5) for i, ms in ((1, 3.6), (2, 3.4)))
    limited = {"budgets": {"latency": "70%"}, "latency_limits": {"latency_ratio": 0.7}, "measured_with": "a CPU; eager"}
    verdict = verdict_of(record([slow, fast], **limited))
    assert verdict.trial == 2
    assert verdict.warning.startswith("trial 1 measures above the budget latency ≤ 70%")
    assert "in turn with the dense one: a CPU; eager" in verdict.trust
    assert verdict_of(record([slow], **limited)).trial == 1
    assert not verdict_of(record([fast], **limited)).warning


def test_a_net_that_is_lost_is_not_shipped_but_where_all_are():
    nets = [row(1, 91.0, None, 0.5), row(2, 90.0, None, 0.4)]
    one, all_ = (verdict_of(record(nets, lost=lost)) for lost in ([1], [1, 2]))
    assert (one.trial, all_.trial) == (2, 1)
    assert "trials 1, 2 are lost" in all_.warning


@pytest.mark.parametrize(("ratio", "warned"), [(1.23, True), (1.03, False), (None, False)])
def test_a_net_that_is_slower_for_all_its_fewer_macs_is_told(ratio, warned):
    warning = verdict_of(record([row(1, 91.0, 90.9, 0.5, latency_ms=ratio, latency_ratio=ratio)])).warning
    assert ("23 % longer than the dense net" in warning) is warned


def test_without_a_test_set_validation_stands_beside_validation():
    verdict = verdict_of(record([row(1, 91.0, None, 0.5)], dense=(92.0, None), samples=(5000, None)))
    assert verdict.split == "validation"
    assert "validation 91.00 % (dense 92.00, −1.00 ± 0.56)" in verdict.ship


def test_a_dense_net_that_has_seen_its_validation_samples_is_told():
    assert "trained on the validation" in verdict_of(record([row(1, 91.0, 90.0, 0.5)], dense=(99.8, 91.73))).warning
    assert not verdict_of(record([row(1, 91.0, 90.0, 0.5)], dense=(93.0, 91.73), samples=(200, 200))).warning


def test_a_metric_that_is_no_accuracy_has_no_error_but_its_samples():
    rmse = {"name": "rmse", "direction": "minimize", "unit": "K"}
    nets = [row(1, 0.31, 0.32, 0.5, params_ratio=0.5), row(2, 0.4, 0.3123, 0.3, params_ratio=0.3)]
    verdict = verdict_of(record(nets, dense=(0.3, 0.3), metric=rmse, samples=(80, 40)))
    assert "test rmse 0.32 K (dense 0.3, 0.02 worse)" in verdict.ship
    assert "test 0.3123 K, 0.0077 better than trial 1" in verdict.cheaper
    assert "10 points of MACs bring about 0.045 K along it" in verdict.front
    assert verdict.plus_minus is None
    assert "40 test samples" in verdict.trust


@pytest.mark.parametrize(
    ("reason", "says"),
    [
        ("diverged: the loss is nan", "recipe.lr"),
        ("CUDA out of memory", "batch_size"),
        ("inference_mode: no", "resume"),
    ],
)
def test_a_study_without_a_net_says_what_to_change_and_offers_none(reason, says):
    failed = record([], counts={"failed": 3}, state="failed", failures=commonest([reason] * 3), gains=None)
    verdict = verdict_of(failed)
    assert verdict.trial is None
    assert verdict.export == ""
    assert "none of 3 trials was completed" in verdict.ship
    assert says in verdict.ship
    assert verdict.trials == f"3 failed; 3 of 3: {reason}"


def test_reasons_are_alike_but_for_their_numbers():
    found = commonest(["the loss is nan at step 12\nmore", "other", "the loss is nan at step 7"])
    assert found == {"count": 3, "reason": "the loss is nan at step 12", "alike": 2}
    assert commonest([]) == {"count": 0, "reason": None, "alike": 0}


def test_the_error_of_a_share_is_that_of_a_binomial_and_never_none():
    assert plus_minus(50.0, 10_000) == pytest.approx(0.5, rel=1e-3)
    assert 0.3 < plus_minus(100.0, 360) < 0.5
    assert plus_minus(91.0, 40_000) == pytest.approx(plus_minus(91.0, 10_000) / 2, rel=1e-2)


def test_the_knee_is_where_the_front_bends():
    bent = record([row(1, 92.0, None, 0.9), row(2, 91.5, None, 0.4), row(3, 80.0, None, 0.2), row(4, 79.0, None, 0.5)])
    points = points_of(bent)
    assert [trial for _, _, trial in points] == [3, 2, 1]
    assert knee(points) == 1
    assert knee([(0.0, 0.0, 1), (50.0, 20.0, 2), (100.0, 100.0, 3)]) is None
    said = verdict_of(bent).front
    assert "bends at trial 2 (40 % of dense MACs)" in said
    assert "bring 0.10 points, below it they cost 5.75 points" in said


def test_what_more_budget_would_bring_is_not_read_off_two_nets_beside_each_other():
    close = [row(1, 91.0, None, 0.5), row(2, 90.0, None, 0.49), row(3, 88.0, None, 0.2)]
    assert "a tenth more budget would bring 0.10 to 0.50 points" in verdict_of(record(close)).front


@pytest.mark.parametrize(
    ("change", "known"),
    [
        ({}, [50, 60, 75]),
        ({"model": "resnet20"}, []),
        ({"budgets": {"flops": "40%"}}, []),
        ({"own_level": 75.0}, []),
        ({"plans": 1}, []),
    ],
    ids=lambda value: "-".join(map(str, value)) or "none",
)
def test_what_a_preview_of_this_net_and_budget_knows_beyond_is_told_as_not_trained(make, bench, change, known):
    study = make(trials=2, budgets=["flops=50%"])
    while (candidate := study.ask(bench)) is not None:
        study.tell(candidate.number, simulated(candidate, bench))
    plans = [
        {"level": level, "macs_ratio": level / 100, "val_accuracy": level + better}
        for level, better in ((25, 0), (50, 0), (50, 9), (60, 9), (75, 9))
    ]
    previewed = {
        "task": "digits",
        "model": "resnet8",
        "cost": "flops",
        "cost_ratio": "macs_ratio",
        "own_level": 50.0,
        "plans": plans,
    }
    (study.folder / "preview").mkdir()
    (study.folder / "preview/preview.json").write_text(json.dumps(previewed | {"budgets": {"flops": "50%"}} | change))
    front = study.front_record()
    assert [point["percent"] for point in front["preview"]] == known
    said = (
        "the preview knows 2 beyond the budget, not trained: 59.00 at 50 % of MACs, then 69.00 at 60 %, 84.00 at 75 %"
    )
    assert (said in verdict_of(front).front) == bool(known)
    names = [series.name.split(" (")[0] for series in front_chart(View.of(study), "macs").series]
    assert ("preview, not trained" in names) == bool(known)


def test_the_record_of_a_study_holds_its_verdict_state_and_failures(make, bench):
    study = make(trials=4)
    assert study.front_record()["verdict"]["ship"].startswith("No net to ship yet")
    for status in ("failed", "complete", "complete"):
        candidate = study.ask(bench)
        bad = TrialResult("failed", candidate.seed, 0.0, reason="MemoryError: no")
        study.tell(candidate.number, bad if status == "failed" else simulated(candidate, bench))
    found = study.front_record()
    assert (found["schema"], found["state"], found["counts"]) == (2, "running", {"failed": 1, "complete": 2})
    assert found["failures"] == {"count": 1, "reason": "MemoryError: no", "alike": 1}
    assert found["samples"] == {"validation": 360, "test": 360}
    assert "so far" in found["verdict"]["ship"]
    assert finished_front(study.folder) is None
    study.tell((candidate := study.ask(bench)).number, simulated(candidate, bench))
    study.conclude()
    assert finished_front(study.folder) == json.loads(json.dumps(study.front_record()))
    assert finished_front(study.folder)["verdict"]["trial"] == study.best()["trial"]
    study.plan_for(9)
    assert finished_front(study.folder) is None


def test_the_front_of_a_study_that_is_over_is_shown_without_loading_torch(make, bench, tmp_path):
    study = make(trials=1)
    study.tell((candidate := study.ask(bench)).number, simulated(candidate, bench))
    study.conclude()
    script = (
        "import sys; sys.argv = ['ranksearch', 'front', 'digits_resnet8']\n"
        "from ranksearch.cli import app\n"
        "app(standalone_mode=False)\n"
        "assert not {'torch', 'optuna', 'mlflow', 'ray', 'numpy'} & set(sys.modules), 'loaded'"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"RANKSEARCH_RUNS": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"Ship trial 0: validation {study.best()['val_accuracy']:.2f} %" in done.stdout
    assert done.stdout.rstrip().endswith(f"ranksearch export digits_resnet8 --runs {tmp_path} 0 --format onnx")


def test_the_layers_of_a_plan_add_up_to_the_nets_macs(make, bench):
    study = make(trials=2)
    for _ in range(2):
        row = study.tell((candidate := study.ask(bench)).number, simulated(candidate, bench))
        layers = layer_costs(json.loads(json.dumps(study.info["layer_costs"])), row["plan"])
        assert [layer.name for layer in layers] == [layer.name for layer in bench.net.layers]
        saved = sum(layer.macs - layer.kept_macs for layer in layers)
        assert study.dense.macs - saved == row["macs"]
