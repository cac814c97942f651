"""The preflight's judgement, a pure function from facts to findings, and the verb on this machine alone."""

import copy
import json
import os
import subprocess
import sys

import pytest

from ranksearch.preflight.doctor import examine
from ranksearch.preflight.findings import ERROR, OK, WARNING, judge
from ranksearch.space.reading import read_space

FACTS = {
    "host": "one",
    "versions": {"python": "3.11.9", "ranksearch": "0.1.0 (aaaa)", "torch": "2.13.0", "ray": "2.60.0"},
    "cores": 8,
    "quota": None,
    "threads": None,
    "files": 65536,
    "memory_mib": 16_000,
    "gpus": [{"name": "H100", "free_mib": 80_000, "total_mib": 81_000}],
    "mps": "available",
    "disk_mib": {"temporary": 50_000},
    "shm_mib": 16_000,
    "missing": [],
    "results": {"sees": True, "shared": True, "error": None},
    "offers": {"CPU": 8.0, "GPU": 1.0, "object_store_memory": 8e9},
    "offset_s": 0.01,
    "round_trip_s": 0.02,
}


def report(**second):
    """Two sound nodes, but for what the second one is said to be."""
    nodes = [copy.deepcopy(FACTS) | {"name": "one (10.0.0.1)"}, copy.deepcopy(FACTS) | {"name": "two (10.0.0.2)"}]
    nodes[1] |= second
    stores = {"results": None, "mlflow": None, "optuna": None}
    return {"results": "/runs", "driver": FACTS, "nodes": nodes, "stores": stores, "missing": []}


def test_a_sound_cluster_has_a_fine_finding_per_check():
    found = judge(report())
    assert {finding.level for finding in found} == {OK}
    assert len({finding.check for finding in found}) == len(found) == 13
    assert {finding.where for finding in found} == {"all 2 nodes"}


@pytest.mark.parametrize(
    ("second", "check", "level", "said"),
    [
        ({"results": {"sees": False, "shared": False, "error": None}}, "results", ERROR, "storage.results"),
        ({"results": {"sees": True, "shared": False, "error": None}}, "results", ERROR, "--runs on shared storage"),
        ({"results": {"sees": False, "shared": False, "error": "no"}}, "results", ERROR, "same on every node"),
        ({"versions": FACTS["versions"] | {"torch": "2.12.0"}}, "versions", WARNING, "torch 2.12.0, but 2.13.0 on the"),
        ({"versions": FACTS["versions"] | {"torch": None}}, "versions", WARNING, "torch is not installed"),
        ({"versions": FACTS["versions"] | {"ranksearch": "0.1.0 (b)"}}, "versions", ERROR, "run other code"),
        ({"versions": FACTS["versions"] | {"python": "3.12.1"}}, "versions", ERROR, "python 3.12.1"),
        ({"versions": FACTS["versions"] | {"python": "3.11.2"}}, "versions", WARNING, "python 3.11.2"),
        ({"offset_s": 30.0}, "clocks", WARNING, "30 s ahead of"),
        ({"offset_s": -1000.0}, "clocks", ERROR, "1000 s behind the driver's: stores such as S3 refuse"),
        ({"missing": ["/data/train"]}, "data", ERROR, "/data/train is missing"),
        ({"quota": 2.0}, "cpus", WARNING, "--num-cpus 2"),
        ({"threads": "32"}, "cpus", WARNING, "OMP_NUM_THREADS is 32"),
        ({"memory_mib": 900}, "memory", WARNING, "900 MiB"),
        ({"gpus": []}, "gpus", WARNING, "Ray offers 1 GPUs, but nvidia-smi finds 0"),
        ({"gpus": [{"name": "H100", "free_mib": 10, "total_mib": 81_000}]}, "gpus", WARNING, "Another process"),
        ({"disk_mib": {"temporary": 900}}, "disks", WARNING, "900 MiB"),
        ({"disk_mib": {"temporary": 50_000, "results": 9}}, "disks", ERROR, "of its results files"),
        ({"shm_mib": 64}, "shared memory", WARNING, "--shm-size"),
        ({"files": 1024}, "files", WARNING, "ulimit -n 65536"),
        ({"silent": "not within 60 s"}, "answers", ERROR, "did not answer (not within 60 s)"),
    ],
)
def test_a_fault_is_one_finding_that_names_its_node_and_how_to_mend_it(second, check, level, said):
    first, *others = judge(report(**second))
    assert (first.check, first.level, first.where) == (check, level, "two (10.0.0.2)")
    assert said in first.sentence()
    assert first.mend.endswith(".")
    assert {finding.level for finding in others} == {OK}


def test_nodes_that_do_not_share_are_named_together():
    apart = {"results": {"sees": False, "shared": False, "error": None}}
    both = report(**apart)
    both["nodes"][0] |= apart
    first = judge(both)[0]
    assert first.where == "one (10.0.0.1), two (10.0.0.2)"
    assert "do not share /runs" in first.what


def test_a_long_way_there_is_no_skew_and_a_node_alone_has_no_clock():
    assert judge(report(offset_s=4.0, round_trip_s=9.0))[0].level == OK
    assert judge(report(offset_s=None))[0].level == OK


@pytest.mark.parametrize(("store", "level"), [("mlflow", WARNING), ("optuna", ERROR), ("results", ERROR)])
def test_what_the_driver_does_not_reach(store, level):
    given = report()
    given["stores"][store] = "nobody there"
    first = judge(given)[0]
    assert (first.level, first.where) == (level, "driver")
    assert "nobody there" in first.what


def test_stores_that_are_away_are_found(tmp_path, digits_yaml):
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'ranksearch[postgres]'")
    settings = [
        "tracking.uri=http://127.0.0.1:9",
        "storage.optuna=postgresql://me@127.0.0.1:9/db",
        "checkpoint=none.pt",
    ]
    found = examine(read_space(digits_yaml, settings=settings), tmp_path / "runs", cluster=False)
    assert "refused" in found["stores"]["mlflow"]
    assert found["stores"]["optuna"].startswith("storage.optuna: postgresql://me@127.0.0.1:9/db: ")
    assert [finding.level for finding in judge(found)][:3] == [ERROR, ERROR, WARNING]  # data, stores
    assert found["missing"][0].endswith("none.pt")


def test_one_database_for_optuna_and_mlflow_is_found(tmp_path, digits_yaml):
    settings = [f"storage.optuna=sqlite:///{tmp_path}/one.db", f"tracking.uri=sqlite:///{tmp_path}/one.db"]
    found = examine(read_space(digits_yaml, settings=settings), tmp_path / "runs", cluster=False)
    assert "is MLflow's database too" in found["stores"]["optuna"]
    settings[1] = f"tracking.uri=sqlite:///{tmp_path}/other.db"
    assert (
        examine(read_space(digits_yaml, settings=settings), tmp_path / "runs", cluster=False)["stores"]["optuna"]
        is None
    )


def test_the_verb_looks_at_this_machine_without_ray(tmp_path):
    """A folder that cannot be written is an error and exit code 1; Ray is not even imported."""
    script = (
        "import sys; sys.argv[1:] = {arguments!r}\nimport ranksearch.cli\n"
        "try: ranksearch.cli.main()\n"
        "except SystemExit as end: print(end.code, 'ray' in sys.modules, file=sys.stderr)"
    )
    (tmp_path / "file").write_text("")

    def run(*arguments):
        given = ["doctor", *arguments]
        return subprocess.run(
            [sys.executable, "-c", script.format(arguments=given)], capture_output=True, text=True, timeout=120,
            cwd=tmp_path, env=os.environ,
        )  # fmt: skip

    done = run("--json")
    said = json.loads(done.stdout)
    assert done.stderr.split()[-2:] == ["0", "False"]
    assert said["status"] in (OK, WARNING)
    assert said["nodes"][0]["results"]["shared"]
    assert {finding["check"] for finding in said["findings"]} >= {"versions", "results", "clocks"}
    assert not list((tmp_path / "runs").iterdir())  # what it wrote there is gone
    broken = run("--runs", "file/runs")
    assert broken.stderr.split()[-2:] == ["1", "False"]
    assert "Name another place with storage.results" in " ".join(broken.stdout.split())
