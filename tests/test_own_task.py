"""Tasks of a user's own, from file to front: classification, segmentation, regression; copied, resumed, loaded, refused."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

import ranksearch
from ranksearch.errors import UsageError
from ranksearch.pareto import nondominated
from ranksearch.space.reading import read_space
from ranksearch.study.study import Study
from ranksearch.tasks.task_file import TaskFile
from tests.own_tasks import CLASSIFIER, FIT, REGRESSION, SEGMENTATION, write_task


def run(space, runs, **options):
    return ranksearch.search(space, runs=runs, inline=True, **options)


@pytest.fixture(scope="module")
def regression(tmp_path_factory):
    """(the study, the folder of its task's file)"""
    folder = tmp_path_factory.mktemp("regression")
    return run(write_task(folder, REGRESSION), folder / "runs", trials=8), folder


def test_a_classifier_on_a_loader_through_the_command_line_on_ray_from_elsewhere(tmp_path):
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    project.mkdir()
    elsewhere.mkdir()
    space = write_task(project, CLASSIFIER)
    done = subprocess.run(
        [sys.executable, "-m", "ranksearch", "search", str(space), "--trials", "2", "--json"],
        cwd=elsewhere, capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    front = json.loads(done.stdout)
    assert front["metric"] == {"name": "accuracy", "direction": "maximize", "unit": "%"}
    assert front["dense"]["test_accuracy"] is not None
    study = elsewhere / "runs" / "own"
    best = front["trials"][0]
    assert best["plan"]["model"] == "own.py:make_task"
    assert best["macs_ratio"] <= 0.6
    # the study goes on where the file that it came from is gone; what that file imports is gone too, but loaded where it stays
    (project / "own.py").unlink()
    record = json.loads((study / "study.json").read_text())["task_file"]
    assert record["sha256"] == TaskFile.parse(f"{study / 'own.py'}:make_task").code.sha256
    resumed = ranksearch.resume(str(study), trials=3, inline=True)
    assert resumed.finished == 3
    net = ranksearch.load(study / "trials" / f"{best['trial']:03d}")
    assert net(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_a_segmentation_on_a_dataset_with_mean_iou(tmp_path):
    study = run(write_task(tmp_path, SEGMENTATION), tmp_path / "runs")
    record = study.front_record()
    assert record["metric"] == {"name": "mean_iou", "direction": "maximize", "unit": ""}
    assert 0.5 < record["dense"]["val_accuracy"] <= 1
    assert record["dense"]["test_accuracy"] is None  # the task has no test set
    assert all(0 < row["val_accuracy"] <= 1 for row in record["trials"])
    net = ranksearch.load(study.trial_folder(record["trials"][0]["trial"]))
    assert net(torch.zeros(1, 1, 12, 12)).shape == (1, 2, 12, 12)


def test_a_minimised_metric_turns_the_front_round(regression):
    study, _ = regression
    record, complete = study.front_record(), [row for row in study.trials if row["status"] == "complete"]
    assert record["metric"] == {"name": "rmse", "direction": "minimize", "unit": "K"}
    assert record["objectives"][0] == {"name": "accuracy", "direction": "minimize"}
    keep = nondominated([[row["val_accuracy"], row["macs_ratio"]] for row in complete])
    assert {row["trial"] for row in record["trials"]} == {
        row["trial"] for row, on in zip(complete, keep, strict=True) if on
    }
    values = [row["val_accuracy"] for row in record["trials"]]
    assert values == sorted(values)  # the best first
    assert study.best()["val_accuracy"] == min(row["val_accuracy"] for row in complete)
    assert study.leader == study.best()
    assert study._study.directions[0].name == "MINIMIZE"
    tested = [row["test_accuracy"] for row in record["trials"]]
    assert all(value is not None for value in tested)
    assert 0 < record["hypervolume"] < 1


def test_a_preview_of_a_minimised_metric(regression, tmp_path):
    _, folder = regression
    record = ranksearch.preview(
        folder / "own.yaml", levels=[60, 30], allocators=["solver", "uniform", "greedy"], images=40, runs=tmp_path
    )
    keep = nondominated([[row["val_accuracy"], row["macs_ratio"]] for row in record["plans"]])
    assert [row["on_front"] for row in record["plans"]] == list(map(bool, keep))


def test_a_study_is_read_in_another_place(regression, tmp_path):
    study, _ = regression
    moved = shutil.copytree(study.folder, tmp_path / "moved")
    again = Study.open(moved)
    assert again.metric == study.metric
    assert [row["trial"] for row in again.front] == [row["trial"] for row in study.front]
    exported = ranksearch.export(moved, "best", format="state_dict")
    assert exported["metric"]["unit"] == "K"
    wanted = ranksearch.load(moved / "trials" / f"{study.best()['trial']:03d}")
    x = torch.randn(3, 10)
    assert torch.equal(ranksearch.load(exported["folder"])(x), wanted(x))
    assert ranksearch.report(moved).is_file()


def test_a_study_refuses_a_file_that_it_was_not_made_with(regression, tmp_path):
    study, _ = regression
    moved = shutil.copytree(study.folder, tmp_path / "moved")
    (moved / "own.py").write_text(REGRESSION + "# changed\n")
    assert Study.open(moved).front  # results can be read all the same
    with pytest.raises(UsageError, match="not the file that the study was made with"):
        ranksearch.resume(str(moved), trials=9, inline=True)
    with pytest.raises(UsageError, match="not the file that the study was made with"):
        ranksearch.load(moved / "trials" / "000")


def test_a_plan_alone_runs_no_code(regression, tmp_path):
    study, _folder = regression
    alone = shutil.copytree(study.trial_folder(study.best()["trial"]), tmp_path / "net")
    bomb = tmp_path / "bomb.py"
    bomb.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    for reference in ("own.py:make_task", f"{bomb}:make_task", f"{bomb}", "bomb.py:make_task"):
        plan = json.loads((alone / "plan.json").read_text()) | {"model": reference}
        (alone / "plan.json").write_text(json.dumps(plan))
        with pytest.raises(UsageError, match="pass build="):
            ranksearch.load(alone)
    # beside a study.json that is no study's either
    inside = tmp_path / "trials"
    inside.mkdir()
    shutil.copytree(alone, inside / "000")
    (tmp_path / "study.json").write_text("[1]")
    with pytest.raises(UsageError, match="pass build="):
        ranksearch.load(inside / "000")
    assert not (tmp_path / "ran").exists()

    def build():
        return nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))

    x = torch.randn(3, 10)
    wanted = ranksearch.load(study.trial_folder(study.best()["trial"]))
    assert torch.equal(ranksearch.load(alone, build=build)(x), wanted(x))


# Mistakes ------------------------------------------------------------------------------------------------------------

TINY = (
    FIT
    + """
x, y = torch.randn(40, 4), torch.randint(3, (40,))
net = nn.Sequential(nn.Linear(4, 3))
def make_task():
    return {}
"""
)
GOOD = "ranksearch.Task(model=net, train=(x, y), val=(x, y){})"


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("{'model': net}", r"returned a dict: expected a ranksearch\.Task"),
        ("ranksearch.Task(model=net[0].weight, train=(x, y), val=(x, y))", r"model is an nn\.Module, got a Parameter"),
        (
            "ranksearch.Task(model=net, train=(x, y[:9]), val=(x, y))",
            r"train holds inputs \[40, 4\] \(float32\) and targets \[9\] \(int64\)",
        ),
        ("ranksearch.Task(model=net, train=iter([(x, y)]), val=(x, y))", "train is a list_iterator, which ends after one"),
        ("ranksearch.Task(model=net, train=x, val=(x, y))", r"train is a Tensor: expected a pair \(inputs, targets\) of tensors"),
        (
            "ranksearch.Task(model=net, train=(x, y), val=[(x, y, y)])",
            r"the model on inputs \(\[2, 4\] \(float32\), \[2\] \(int64\)\) of val: TypeError",
        ),
        ("ranksearch.Task(model=net, train=(x, y), val=[])", "val gives no batch"),
        ("ranksearch.Task(model=net, train=(x[:, :3], y), val=(x, y))", r"the model on inputs \[2, 3\] \(float32\) of train"),
        (GOOD.format(", loss=nn.MSELoss()"), r"the loss on outputs \[2, 3\] \(float32\) and targets \[2\]"),
        (GOOD.format(", loss=nn.CrossEntropyLoss(reduction='none')"), r"the loss of train is \[2\] \(float32\): expected a"),
        (GOOD.format(", loss=lambda o, t: (o.argmax(1) == t).float().mean()"), "no gradient"),
        (GOOD.format(", metric=lambda o, t: 'good'"), r"returned 'good' \(str\): expected one number"),
        (GOOD.format(", metric=lambda o, t: o"), r"returned a tensor \[2, 3\]: expected one number"),
        (GOOD.format(", metric=lambda o, t: 1.0, direction='max'"), "Did you mean 'maximize'"),
        (GOOD.format(", direction='minimize'"), "'minimize' needs a metric"),
        (
            GOOD.format(", example_input={'x': x[:1]}"),
            r"the model on example_input \{x: \[1, 4\] \(float32\)\}: TypeError: .* argument 'x'",
        ),
        (
            "ranksearch.Task(model=net, train=[({'a': x}, y)], val=(x, y))",
            r"the model on inputs \{a: \[2, 4\] \(float32\)\} of train: TypeError: .* argument 'a'",
        ),
        (GOOD.format(", example_input=x[0, :2]"), r"the model on example_input \[2\]"),
        (
            "ranksearch.Task(model=nn.Sequential(net, nn.Linear(3, 1)), train=(x, y.float()), val=(x, y.float()), loss=nn.MSELoss(), "
            "metric=lambda o, t: 1.0)", r"the loss on outputs \[2, 1\] .* targets \[2\] .*target size",
        ),
        ("1 / 0", r"own\.py, line \d+: ZeroDivisionError: division by zero"),
        ("exit(0)", r"make_task\(\) raised: .*own\.py, line \d+: SystemExit: it left by sys\.exit\(0\)"),
        ("(_ for _ in ()).throw(BaseException('odd'))", r"own\.py, line \d+: BaseException: odd"),
        (GOOD.format(", loss=lambda o, t: exit(3)"), r"sys\.exit\(3\)"),
    ],
)  # fmt: skip
def test_a_task_that_is_of_no_use_is_told_in_a_sentence(tmp_path, returned, message):
    space = read_space(write_task(tmp_path, TINY.format(returned)))
    with pytest.raises(UsageError, match=message) as caught:
        space.kind()
    assert "\n" not in str(caught.value)


def test_the_same_file_in_two_projects_has_the_data_beside_it_and_prints_to_stderr(tmp_path, capsys):
    source = "import pathlib, sys\nHELD = (pathlib.Path(__file__).parent / 'data').read_text()\nGIVEN = sys.argv[1:]\nprint('hello')\n"
    modules = []
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "data").write_text(name)
        (folder / "own.py").write_text(source)
        modules.append(TaskFile.parse(f"{folder / 'own.py'}:make_task").code.module())
    assert [module.HELD for module in modules] == ["a", "b"]
    assert [module.GIVEN for module in modules] == [[], []]
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "hello\nhello\n")


def test_a_file_that_leaves_while_it_is_read_has_failed(tmp_path):
    (tmp_path / "own.py").write_text("import argparse\nargparse.ArgumentParser().add_argument('x')\nraise SystemExit\n")
    with pytest.raises(UsageError, match=r"own\.py, line 3: SystemExit: it left by sys\.exit\(None\)"):
        TaskFile.parse(f"{tmp_path / 'own.py'}:make_task").code.module()


def test_files_and_functions_that_are_not_there_are_told_with_the_nearest(tmp_path):
    space = write_task(tmp_path, TINY.format(GOOD.format("")), function="make_tsk")
    with pytest.raises(UsageError, match=r"has no function 'make_tsk'\. Did you mean 'make_task'"):
        read_space(space).kind()
    with pytest.raises(UsageError, match=r"no file 'onw\.py' in .*Did you mean 'own\.py'"):
        read_space(space, settings=["task=onw.py:make_task"])
    with pytest.raises(UsageError, match=r"names no function: write .*own\.py:make_task"):
        read_space(space, settings=["task=own.py"]).kind()
    with pytest.raises(UsageError, match="a task of your own brings its model: leave this key out"):
        read_space(space, settings=["model=resnet8"])
    with pytest.raises(UsageError, match=r"validation: this key is missing"):
        read_space(space, settings=["task=digits", "model=resnet8"])
    (tmp_path / "own.py").write_text("import torhc\n")
    with pytest.raises(UsageError, match=r"own\.py, line 1: ModuleNotFoundError: No module named 'torhc'"):
        read_space(space).kind()
    (tmp_path / "own.py").write_text("def make_task(:\n")
    with pytest.raises(UsageError, match=r"own\.py, line 1: SyntaxError"):
        read_space(space).kind()
    done = subprocess.run(
        [sys.executable, "-m", "ranksearch", "check", str(space)], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_a_dense_net_whose_metric_is_not_finite_begins_no_study(tmp_path):
    space = write_task(tmp_path, TINY.format(GOOD.format(", metric=lambda o, t: 0.0 if len(o) < 10 else float('nan')")))
    with pytest.raises(UsageError, match="of the dense net on the validation set is nan"):
        run(space, tmp_path / "runs")
    assert not (tmp_path / "runs" / "own" / "study.json").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("recipe.label_smoothing=0.1", "label_smoothing goes with the default loss"),
        ("recipe.distillation.weight={low: 0, high: 0.5}", "leave recipe.distillation.weight at 0"),
    ],
)
def test_settings_that_mean_nothing_under_a_loss_of_ones_own_are_refused(tmp_path, setting, message):
    space = write_task(tmp_path, REGRESSION)
    with pytest.raises(UsageError, match=message):
        run(space, tmp_path / "runs", settings=[setting])


@pytest.mark.parametrize("sensitivity", ["kfac", "fisher", "activation"])
def test_sensitivities_of_a_regression_follow_its_own_loss(tmp_path, sensitivity):
    from ranksearch.search.workbench import prepare

    space = read_space(write_task(tmp_path, REGRESSION), settings=[f"search.sensitivity={sensitivity}"])
    bench = prepare(space, fallback=tmp_path, log=lambda text: None)
    assert all(0 < scale < 100 for scale in bench.damage.scales.values())


def test_distillation_and_smoothing_work_for_pixels(tmp_path):
    settings = ["recipe.distillation.weight=0.5", "recipe.label_smoothing=0.1"]
    study = run(write_task(tmp_path, SEGMENTATION), tmp_path / "runs", settings=settings, trials=1)
    assert study.front
