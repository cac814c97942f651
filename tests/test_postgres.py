"""A study mirrored in PostgreSQL, without a server of MLflow's in between, and one that Optuna keeps there: a real database on a free port
of this machine."""

import json
import os
import shutil
import subprocess
import uuid
from pathlib import Path

import pytest

from ranksearch.api import resume, search, sync
from ranksearch.errors import StudyError, UsageError
from ranksearch.nets import export
from ranksearch.study.study import Study
from ranksearch.tracking.ui import find_store
from tests.conftest import free_ports
from tests.test_mirror import dump, runs_of

psycopg = pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'ranksearch[postgres]'")


def programs() -> Path | None:
    """The folder of PostgreSQL's own programs."""
    found = shutil.which("initdb")
    places = [Path(found).parent] if found else []
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((place for place in places if (place / "initdb").is_file()), None)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """URI of a server's first database."""
    found = programs()
    if found is None:
        pytest.skip("PostgreSQL's server is not installed")
    folder = tmp_path_factory.mktemp("postgres")
    as_user = []
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        if shutil.which("runuser") is None or subprocess.run(["id", "postgres"], capture_output=True).returncode:
            pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
        as_user = ["runuser", "-u", "postgres", "--"]
        shutil.chown(folder, "postgres")
        for parent in folder.parents:
            if parent.stat().st_uid == 0 and parent.is_relative_to("/tmp") and parent != Path("/tmp"):
                parent.chmod(parent.stat().st_mode | 0o011)
    (port,) = free_ports(1)

    def run(*command, **options):
        return subprocess.run([*as_user, *map(str, command)], check=True, cwd=folder, **options)

    run(found / "initdb", "-D", folder / "data", "-A", "trust", "-U", "ranksearch", capture_output=True)
    settings = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories={folder} -c fsync=off"
    run(
        found / "pg_ctl",
        "-D",
        folder / "data",
        "-o",
        settings,
        "-l",
        folder / "log",
        "-w",
        "start",
        stdout=subprocess.DEVNULL,
    )
    yield f"postgresql://ranksearch@127.0.0.1:{port}/postgres"
    run(found / "pg_ctl", "-D", folder / "data", "-m", "immediate", "-t", "300", "stop", stdout=subprocess.DEVNULL)


@pytest.fixture
def new_database(server):
    """Makes an empty database and returns its URI."""

    def made(name: str) -> str:
        name = f"{name}_{uuid.uuid4().hex[:8]}"
        with psycopg.connect(server, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return server.replace("/postgres", f"/{name}")

    return made


@pytest.fixture
def database(new_database):
    return new_database("mlflow")


def test_a_study_is_mirrored_in_postgresql_as_in_sqlite(database, tmp_path, digits_yaml, short_settings):
    settings = [
        *short_settings,
        "search.trials=2",
        f"tracking.uri={database}",
        f"tracking.artifacts={(tmp_path / 'files').as_uri()}",
    ]
    study = search(digits_yaml, settings=settings, runs=tmp_path / "runs", inline=True)
    client, parent, trials = runs_of(database)
    assert sorted(trials) == [0, 1]
    for row in study.trials:
        held = trials[row["trial"]].data.metrics
        for name in ("val_accuracy", "macs_ratio", "seconds"):
            assert held[name] == row[name]
    assert (tmp_path / "files" / parent.info.run_id / "artifacts" / "front.png").is_file()
    assert find_store("digits_resnet8", tmp_path / "runs").uri == database
    before = dump(database)
    sync("digits_resnet8", runs=tmp_path / "runs")
    assert dump(database) == before
    assert client.get_experiment_by_name("digits_resnet8").artifact_location.endswith("/files")


def test_a_store_that_a_variable_names_leaves_no_password_anywhere(
    database, tmp_path, digits_yaml, short_settings, monkeypatch
):
    secret = database.replace("ranksearch@", "ranksearch:not-asked-for@")
    for name, set_in, settings in (
        ("named", "MY_STORE", ["tracking.uri=env:MY_STORE"]),
        ("ambient", "MLFLOW_TRACKING_URI", []),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(set_in, secret)
            options = [
                *short_settings,
                "search.trials=1",
                f"tracking.artifacts={(tmp_path / 'files').as_uri()}",
                *settings,
            ]
            study = search(digits_yaml, name=name, settings=options, runs=tmp_path / "runs", inline=True)
            assert find_store(name, tmp_path / "runs").uri == secret
            sync(name, runs=tmp_path / "runs")
        assert json.loads((study.folder / "mlflow.json").read_text())["uri"] == f"env:{set_in}"
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written
    assert not [path for path in written if b"not-asked-for" in path.read_bytes()]


def test_optunas_study_in_postgresql_is_resumed_and_read(database, tmp_path, digits_yaml, short_settings, monkeypatch):
    """Two studies of one name, one of them named by a variable: each is continued from its folder and the database alone."""
    monkeypatch.setenv("OPTUNA_URL", database.replace("ranksearch@", "ranksearch:not-asked-for@"))
    for runs, where in ((tmp_path / "one", database), (tmp_path / "two", "env:OPTUNA_URL")):
        settings = [*short_settings, "search.trials=2", f"storage.optuna={where}"]
        study = search(digits_yaml, settings=settings, runs=runs, inline=True)
        assert not (study.folder / "optuna.journal").exists()
    more = resume("digits_resnet8", trials=3, runs=tmp_path / "two", inline=True)
    assert more.finished == 3
    assert Study.open(more.folder).front_record() == more.front_record()
    assert Study.open(tmp_path / "one" / "digits_resnet8").finished == 2
    assert export("digits_resnet8", 2, format="state_dict", runs=tmp_path / "two")["trial"] == 2
    written = [path for path in (tmp_path / "two").rglob("*") if path.is_file()]
    assert not [path for path in written if b"not-asked-for" in path.read_bytes()]


def test_optuna_and_mlflow_share_a_server_not_a_database(new_database, tmp_path, digits_yaml, short_settings):
    """Each has a table `alembic_version`: one database is refused before anything is made, and where the other's tables are found."""
    optunas, mlflows = new_database("optuna"), new_database("mlflow")

    def found(optuna: str, mlflow: str, name: str) -> Study:
        settings = [*short_settings, "search.trials=1", f"storage.optuna={optuna}", f"tracking.uri={mlflow}"]
        settings.append(f"tracking.artifacts={(tmp_path / 'files').as_uri()}")
        return search(digits_yaml, name=name, settings=settings, runs=tmp_path / "runs", inline=True)

    study = found(optunas, mlflows, "apart")
    assert study.finished == len(runs_of(mlflows, "apart")[2]) == 1
    with pytest.raises(UsageError, match="is MLflow's database too: Optuna and MLflow each keep"):
        found(mlflows, mlflows.replace("ranksearch@", "other@"), "one")
    with pytest.raises(StudyError, match="cannot be opened: Optuna and MLflow each keep a table alembic_version"):
        found(mlflows, new_database("mlflow"), "stale")
    assert [path.parent.name for path in (tmp_path / "runs").glob("*/study.json")] == ["apart"]
    with psycopg.connect(mlflows, autocommit=True) as connection:
        connection.execute("CREATE SCHEMA optuna")
    assert found(f"{mlflows}?options=-csearch_path%3Doptuna", mlflows, "schema").finished == 1
