"""What keeps the driver's time per trial small and flat: writes that go together, folded curves, a queue that is not searched anew."""

import copy
import errno
import json
import os
import pickle

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from ranksearch.errors import StudyError
from ranksearch.front.row import Row
from ranksearch.store.folded import Folded
from ranksearch.store.journal import open_journal, together
from ranksearch.study.study import Study
from ranksearch.trial.result import Status, TrialResult
from tests.conftest import simulated


@pytest.fixture
def study(tmp_path):
    return optuna.create_study(storage=open_journal(tmp_path / "optuna.journal"), study_name="s")


@pytest.fixture
def syncs(monkeypatch):
    """Grows by one whenever the disk is waited for."""
    done, sync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (done.append(1), sync(descriptor)))
    return done


def reopened(folder):
    return optuna.load_study(storage=open_journal(folder / "optuna.journal"), study_name="s")


def test_what_goes_together_is_one_write_and_counts_at_once(study, syncs, tmp_path):
    before = (tmp_path / "optuna.journal").read_bytes()
    syncs.clear()
    with together(study._storage):
        trial = study.ask()
        trial.suggest_float("x", 0, 1)
        trial.suggest_int("n", 1, 9)
        trial.set_user_attr("a", [1, (2, 3)])
        assert study.trials[0].user_attrs["a"] == [1, [2, 3]]  # as it comes back from the file
        assert (tmp_path / "optuna.journal").read_bytes() == before
        assert (
            reopened(tmp_path).trials == []
        )  # to others, and to whoever comes after a crash, nothing has been written
    assert len(syncs) == 1
    study.tell(trial, 3.0)
    assert reopened(tmp_path).trials == study.trials
    plain = optuna.load_study(
        storage=JournalStorage(JournalFileBackend(str(tmp_path / "optuna.journal"))), study_name="s"
    )
    assert plain.trials == study.trials  # it is Optuna's own format


def test_on_a_full_disk_what_was_held_goes_before_the_next_write(study, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = (tmp_path / "optuna.journal").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"), together(study._storage):  # noqa: PT012
            trial = study.ask()
            trial.suggest_float("x", 0, 1)
    assert (tmp_path / "optuna.journal").read_bytes() == before
    study.tell(trial, 1.0)
    other = study.ask()
    study.tell(other, 2.0)
    assert reopened(tmp_path).trials == study.trials
    assert [t.value for t in study.trials] == [1.0, 2.0]


def test_a_second_writer_is_noticed_before_it_does_harm(study, tmp_path):
    with pytest.raises(StudyError, match="written by another process"), together(study._storage):  # noqa: PT012
        study.ask()
        reopened(tmp_path).ask()


def test_a_trial_of_a_study_takes_two_writes_of_its_journal(make, bench, syncs):
    study = make(trials=4)
    syncs.clear()
    while (candidate := study.ask(bench)) is not None:
        study.tell(candidate.number, simulated(candidate, bench))
    assert len(syncs) == 2 * 4


def test_enqueued_trials_are_found_in_their_order_as_optuna_finds_them(study):
    def waiting():
        ours = study._storage.get_all_trials(study._study_id, deepcopy=False, states=(TrialState.WAITING,))
        assert ours == [t for t in study.trials if t.state == TrialState.WAITING]
        return [t.number for t in ours]

    study.ask()
    for x in (0.1, 0.2):
        study.enqueue_trial({"x": x})
    assert waiting() == [1, 2]
    assert study.ask().suggest_float("x", 0, 1) == 0.1
    study.enqueue_trial({"x": 0.3})
    assert waiting() == [2, 3]
    assert [study.ask().suggest_float("x", 0, 1) for _ in range(2)] == [0.2, 0.3]
    assert waiting() == []
    assert study.ask().number == 4


def test_a_folded_list_is_that_list():
    values = [{"step": i, "train_loss": i / 7, "of": {"conv1": 0.1}} for i in range(50)]
    folded = Folded(values)
    assert folded == values
    assert values == folded
    assert folded != values[:-1]
    assert (len(folded), folded[3], folded[-2:], list(folded)) == (50, values[3], values[-2:], values)
    assert folded == pickle.loads(pickle.dumps(folded)) == copy.deepcopy(folded)
    row = Row(3, Status.COMPLETE, losses=folded).unfolded()
    assert type(row.losses) is list
    assert row.losses == values
    assert len(folded._packed) < len(json.dumps(values)) / 3


def test_rows_that_are_handed_out_hold_plain_lists(make, bench):
    study = make(trials=2)
    losses = [{"step": i, "train_loss": 1 / (i + 1)} for i in range(50)]
    told = [
        study.tell(c.number, TrialResult(**simulated(c, bench).to_dict() | {"losses": losses}))
        for c in (study.ask(bench), study.ask(bench))
    ]
    for source in (study, Study.open(study.folder)):
        for row in (*source.trials, *source.front, source.best()):
            assert type(row["losses"]) is list
            json.dumps(dict(row))
        assert [row["losses"] for row in source.trials] == [losses, losses] == [row["losses"] for row in told]
        assert all(isinstance(row["losses"], Folded) for row in source.rows)
