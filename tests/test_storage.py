"""A study whose results or whose Optuna study live elsewhere; in this process."""

import json
from dataclasses import replace

import pytest

import ranksearch
from ranksearch.api import resume
from ranksearch.errors import StudyError, UsageError
from ranksearch.nets import export
from ranksearch.places.place import PlaceError
from ranksearch.places.urls import checked_store, checked_url, database_url, shown, without_password
from ranksearch.space.reading import read_space
from ranksearch.study import driver as runner
from ranksearch.study.study import Study
from tests.conftest import drain, simulated

SECRET = "hunter2"


def test_nets_are_brought_home_and_a_state_is_taken_up_from_where_results_live(
    tmp_path, digits_yaml, short_settings, steps_made
):
    elsewhere = tmp_path / "elsewhere"
    settings = [
        *short_settings, "search.trials=1", "resources.checkpoint_seconds=0.000001", f"storage.results={elsewhere}",
        f"storage.optuna=sqlite:///{tmp_path / 'optuna.db'}",
    ]  # fmt: skip
    runs = tmp_path / "runs"
    with pytest.raises(KeyboardInterrupt):
        ranksearch.search(digits_yaml, settings=settings, runs=runs, inline=True)
    assert len(list(elsewhere.glob("*/checkpoints/*.pt"))) == 1
    study = resume("digits_resnet8", runs=runs, inline=True)
    assert len([done for done in steps_made if done is not None]) == 20  # not a step of the 20 was made twice
    assert study.results.uri == f"{elsewhere.as_uri()}/digits_resnet8-{study.info['id'][:8]}"
    assert not list(elsewhere.glob("*/checkpoints/*"))
    assert not (study.folder / "checkpoints").exists()
    assert not (study.folder / "optuna.journal").exists()
    net = ranksearch.load(study.trial_folder(study.front[0]["trial"]))
    assert sum(p.numel() for p in net.parameters()) == study.front[0]["params"]
    assert export("digits_resnet8", "best", format="state_dict", runs=runs)["study_id"] == study.info["id"]
    assert Study.open(study.folder).front_record() == study.front_record()


def test_a_place_that_refuses_is_told_before_anything_is_trained(tmp_path, digits_yaml):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"storage.results: .*file/there.* cannot be written"):
        ranksearch.search(
            digits_yaml, settings=[f"storage.results={tmp_path / 'file' / 'there'}"], runs=tmp_path / "runs"
        )
    assert not (tmp_path / "runs" / "digits_resnet8").exists()


def test_a_net_that_another_node_did_not_share_fails_its_trial_and_says_so(make, bench, monkeypatch):
    monkeypatch.setattr(runner, "LOOKS", 1)
    study = make(trials=4)
    driver = runner.Driver(study, bench, lambda row: None, print)
    candidate = driver.ask()
    driver.settle(candidate.number, simulated(candidate, bench), node="far (10.0.0.2)")
    (row,) = study.trials
    assert row["status"] == "failed"
    assert row["reason"].startswith(f"far (10.0.0.2) wrote its net to {study.folder}, but the driver does not find")
    assert not study.front


def test_a_net_that_is_not_in_its_store_fails_its_trial_too(make, bench, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "LOOKS", 1)
    study = make(trials=4, settings=[f"storage.results={tmp_path / 'store'}"])
    driver = runner.Driver(study, bench, lambda row: None, print)
    candidate = driver.ask()
    driver.settle(candidate.number, simulated(candidate, bench))
    assert study.counts == {"failed": 1}


def test_a_place_that_refuses_ends_the_study_and_its_trial_is_run_again(make, bench, monkeypatch, tmp_path):
    study = make(trials=2, settings=[f"storage.results={tmp_path / 'store'}"])

    def refused(*args, **kwargs):
        raise PlaceError("s3://bucket cannot be written: access is refused")

    monkeypatch.setattr("ranksearch.trial.attempt.run_trial", refused)
    with pytest.raises(StudyError, match=r"could not keep its net or state: PlaceError: s3://bucket cannot.*resume"):
        runner.run_inline(study, bench, lambda row: None, print)
    assert Study.open(study.folder).requeue_interrupted() == 1


def test_two_studies_of_one_name_live_in_one_database(make, bench, tmp_path, digits_yaml):
    settings = [f"storage.optuna=sqlite:///{tmp_path / 'optuna.db'}"]
    first = make(trials=4, settings=settings)
    (tmp_path / "other").mkdir()
    second = Study.create(tmp_path / "other", read_space(digits_yaml, trials=5, settings=settings), bench, 99.0)
    drain(first, bench)
    drain(second, bench)
    for study, count in ((first, 4), (second, 5)):
        again = Study.open(study.folder)
        assert [row["plan"] for row in again.trials] == [row["plan"] for row in study.trials]
        assert again.finished == count
        assert again.status(0) == "complete"
    journal = make(trials=4, name="journal")
    drain(journal, bench)
    assert [row["plan"] for row in journal.trials] == [row["plan"] for row in first.trials]


def test_half_a_study_is_not_left_in_the_database(make, tmp_path, monkeypatch):
    import optuna

    url = f"sqlite:///{tmp_path / 'optuna.db'}"
    with monkeypatch.context() as patch:
        patch.setattr(Study, "_write_space", lambda self: (_ for _ in ()).throw(OSError("no space left on device")))
        with pytest.raises(OSError, match="no space"):
            make(trials=2, settings=[f"storage.optuna={url}"])
    assert optuna.get_all_study_names(url) == []


def test_a_password_is_never_written_down(tmp_path, make, bench, monkeypatch, digits_yaml):
    for url in (f"postgresql://me:{SECRET}@host/db", f"postgresql://host/db?password={SECRET}"):
        with pytest.raises(UsageError, match="holds a password") as caught:
            read_space(digits_yaml, settings=[f"storage.optuna={url}"])
        assert SECRET not in str(caught.value)
    # a SQLite file whose name is the secret stands for a URL that is one
    monkeypatch.setenv("MY_DATABASE", f"sqlite:///{tmp_path / SECRET}.db")
    study = make(trials=2, settings=["storage.optuna=env:MY_DATABASE"])
    drain(study, bench)
    written = [path for path in study.folder.rglob("*") if path.is_file()]
    assert written
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]
    monkeypatch.delenv("MY_DATABASE")
    with pytest.raises(UsageError, match="the environment variable MY_DATABASE is not set"):
        Study.open(study.folder)
    monkeypatch.setenv("MY_DATABASE", f"postgresql://me:{SECRET}@127.0.0.1:9/db?sslpassword={SECRET}")
    assert SECRET not in shown(database_url("env:MY_DATABASE"))
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'ranksearch[postgres]'")
    with pytest.raises(StudyError, match="cannot be opened") as caught:
        Study.open(study.folder)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "https://mlflow.example.org/",
        "https://me@mlflow.example.org:5000/path",
        "databricks://profile",
        "env:MLFLOW_SECRET",
        "postgresql+psycopg://me@host/db",
        "mssql://me@host/db",
    ],
)
def test_a_store_without_a_password_is_kept_as_it_is(uri):
    assert checked_store(uri) == uri == without_password(uri)


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        (f"https://me:{SECRET}@host:5000/x", "https://me:***@host:5000/x"),
        (f"https://:{SECRET}@host", "https://:***@host"),
        (f"https://me:{SECRET}/more@host/x", "https://me:***@host/x"),
        (f"https://host/x?user=me&access_token={SECRET}", "https://host/x?user=me&access_token=***"),
        (f"https://dapi0123456789{SECRET}@host/x", "https://***@host/x"),
        (f"postgresql://me:{SECRET}@host/db", "postgresql://me:***@host/db"),
        (f"mssql://me:{SECRET}@host/db", "mssql://me:***@host/db"),
        (f"mysql+pymysql://me@host/db?ssl_password={SECRET}", "mysql+pymysql://me@host/db"),
    ],
)
def test_a_store_with_a_password_is_refused_and_shown_without_it(uri, shown, digits_yaml):
    with pytest.raises(UsageError, match=r"tracking\.uri.*holds a password") as caught:
        read_space(digits_yaml, settings=[f"tracking.uri={uri}"])
    assert SECRET not in str(caught.value)
    assert without_password(uri) == shown


@pytest.mark.parametrize(
    "uri", [f"s3://AKIA:{SECRET}@bucket/x", f"s3://AKIA:{SECRET}/more@bucket/x", f"s3://bucket/x?secret_key={SECRET}"]
)
def test_a_place_for_results_holds_no_secret_either(uri, digits_yaml):
    with pytest.raises(UsageError, match=r"storage\.results.*holds a secret") as caught:
        read_space(digits_yaml, settings=[f"storage.results={uri}"])
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("key", ["storage.optuna", "tracking.uri"])
def test_a_variable_that_is_not_set_is_told_before_anything_is_made(key, tmp_path, digits_yaml, monkeypatch):
    monkeypatch.delenv("MY_STORE", raising=False)
    with pytest.raises(UsageError, match=f"{key}: env:MY_STORE: the environment variable MY_STORE is not set"):
        ranksearch.search(digits_yaml, settings=[f"{key}=env:MY_STORE"], runs=tmp_path, inline=True)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("nothing", "expected a database's URL"),
        ("env:1x", "names no environment variable"),
        ("postgres://host/db", "Did you mean 'postgresql'"),
    ],
)
def test_a_url_that_is_none_is_refused(given, said):
    with pytest.raises(UsageError, match=said):
        checked_url(given)


def test_the_schema_says_where_and_keeps_absolute_places(tmp_path, digits_yaml, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space = read_space(digits_yaml, settings=["storage.results=there", "storage.optuna=sqlite:///mine.db"])
    assert space.storage.results == (tmp_path / "there").as_uri()
    assert space.storage.optuna == f"sqlite:///{tmp_path / 'mine.db'}"
    assert json.loads(space.model_dump_json())["storage"]["results"] == space.storage.results
    with pytest.raises(UsageError, match=r"storage.result: there is no such key. Did you mean 'results'"):
        read_space(digits_yaml, settings=["storage.result=x"])


def test_a_diverged_trial_needs_no_net(make, bench):
    study = make(trials=2)
    driver = runner.Driver(study, bench, lambda row: None, print)
    candidate = driver.ask()
    driver.settle(candidate.number, replace(simulated(candidate, bench), status="diverged"), node="far")
    assert study.counts == {"diverged": 1}
