"""A study that an earlier version made (the files of `stored_study/`, four trials on the digits) reads the same, and goes on."""

import json
import shutil
from pathlib import Path

import pytest

from ranksearch.study.driver import run_inline
from ranksearch.study.study import Study
from ranksearch.trial.result import Status

STORED = Path(__file__).parent / "stored_study"


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(STORED, tmp_path / "stored"))


def test_an_earlier_study_reports_the_same_front(folder):
    before, now = json.loads((STORED / "front.json").read_text()), Study.open(folder).front_record()
    assert now["hypervolume"] == pytest.approx(before["hypervolume"], rel=1e-12)
    for key in ("study", "metric", "objectives", "budgets", "reference_point"):
        assert now[key] == before[key]
    assert {name: now["dense"][name] for name in before["dense"]} == before["dense"]
    assert len(now["trials"]) == len(before["trials"]) == 4
    for mine, theirs in zip(now["trials"], before["trials"], strict=True):
        assert {name: mine[name] for name in theirs} == theirs


def test_an_earlier_study_goes_on(folder, bench):
    study, seen = Study.open(folder), []
    study.plan_for(5)
    assert study.requeue_interrupted() == 0
    run_inline(study, bench, seen.append, print)
    assert [row.trial for row in seen] == [4]
    assert [row.trial for row in study.trials][:4] == [0, 1, 2, 3]
    assert study.finished == 5
    assert study.trials[-1].status is Status.COMPLETE
    recipe = study.trials[-1].recipe  # as its first trials were trained, before there was a choice
    assert (recipe["calibration"], recipe["factor_steps"]) == ("none", "plain")
    assert study.trials[0].val_accuracy == json.loads((STORED / "front.json").read_text())["trials"][0]["val_accuracy"]
