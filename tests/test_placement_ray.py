"""Placement on a real cluster of two nodes on this machine: data once per node, data-parallel trials, `auto`, killed workers."""

import os
import secrets
import signal
import threading
import time
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

import ranksearch
from ranksearch.cluster import probe
from ranksearch.cluster.nodes import usable_nodes
from ranksearch.cluster.packing import GIB
from ranksearch.cluster.shared import share
from ranksearch.errors import StudyError
from ranksearch.space.reading import read_space
from ranksearch.study.study import Study
from ranksearch.trial.placement import data_loads_per_node, loads_of
from tests.conftest import DRILLS, Told

SETTINGS = ["recipe.steps=20", "recipe.bn_batches=2", "tracking.models=false"]


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of one core each, so that two processes lie on two nodes; the second says that it has a GPU."""
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1, num_gpus=1)
    made.wait_for_nodes()
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture
def log():
    return Told()


def search(
    digits_yaml: Path, tmp_path: Path, cluster: Cluster, name: str, *settings: str, trials: int, observer=None
) -> Study:
    return ranksearch.search(
        digits_yaml, trials=trials, name=name, settings=[*SETTINGS, *settings], runs=tmp_path, address=cluster.address, observer=observer
    )  # fmt: skip


def test_data_reach_every_node_once_and_a_row_says_where_it_ran(cluster, tmp_path, digits_yaml):
    study = search(digits_yaml, tmp_path, cluster, "once", "resources.gpus_per_trial=0", trials=5)
    assert [row["status"] for row in study.trials] == ["complete"] * 5
    places = [row["placement"] for row in study.trials]
    assert {place["node_id"] for place in places} == {node["NodeID"] for node in usable_nodes()}
    assert data_loads_per_node(study.folder) == {node["NodeID"]: 1 for node in usable_nodes()}
    # a process makes the task once, and its later trials have it
    assert sum(place["unpacked"] for place in places) == len({place["pid"] for place in places}) < 5
    assert [load.trial for load in loads_of(study.folder)].count(None) == 1
    assert all(place["peak_bytes"] > 50 * 2**20 for place in places)
    assert all(place["gpus"] == [] and place["workers"] == [] for place in places)


def kill_a_worker_of(study_folder: Path, seen: list[int]) -> None:
    """Kills a process of a data-parallel trial that is not rank 0, as soon as one is known to have saved its state."""
    until = time.monotonic() + 250
    while time.monotonic() < until:
        others = [load for load in loads_of(study_folder) if load.trial is not None]
        if len(others) >= 2 and list((study_folder / "checkpoints").glob("*.pt")):
            seen.append(others[1].pid)
            os.kill(others[1].pid, signal.SIGKILL)
            return
        time.sleep(0.02)


@DRILLS
def test_two_workers_train_one_trial_and_a_killed_one_costs_a_restart_from_its_state(
    cluster, tmp_path, digits_yaml, bench
):
    killed: list[int] = []
    killer = threading.Thread(target=kill_a_worker_of, args=(tmp_path / "pair", killed))
    killer.start()
    settings = [
        "resources.workers_per_trial=2",
        "resources.gpus_per_trial=0",
        "recipe.steps=300",
        "resources.checkpoint_seconds=0.1",
    ]
    study = search(digits_yaml, tmp_path, cluster, "pair", *settings, trials=1)
    killer.join()
    (row,) = study.trials
    assert row["status"] == "complete", row["reason"]
    assert len(killed) == 1
    workers = row["placement"]["workers"]
    assert len({worker["node_id"] for worker in workers}) == 2
    assert killed[0] not in [worker["pid"] for worker in workers]
    assert study.status(0) == "given back"  # and run again under another number
    assert row["trial"] > 0
    assert (study.trial_folder(row["trial"]) / "model.safetensors").is_file()
    assert not list((study.folder / "checkpoints").glob("*.pt*"))
    assert row["epochs"] == pytest.approx(300 * row["recipe"]["batch_size"] / len(bench.task.train))


@DRILLS
def test_a_data_parallel_trial_that_is_stopped_leaves_its_place_to_the_next(
    cluster, tmp_path, digits_yaml, monkeypatch
):
    monkeypatch.setattr(Study, "goes_on", lambda self, number, rung, value: number > 0)
    settings = ["resources.workers_per_trial=2", "resources.gpus_per_trial=0", "recipe.steps=200"]
    settings += ["search.early_stopping.rungs=[0.2]"]
    study = search(digits_yaml, tmp_path, cluster, "stopped", *settings, trials=2)
    assert [row["status"] for row in study.trials] == ["stopped", "complete"]
    assert len({worker["node_id"] for worker in study.trials[1]["placement"]["workers"]}) == 2


class MadeUp:
    kind, total = "made up", 8 * GIB

    def reset(self) -> None: ...

    def peak(self) -> int:
        return 3 * GIB

    def limit(self, share: float) -> None: ...


def made_up() -> MadeUp:
    return MadeUp()


def none_there() -> None:
    return None


def test_auto_probes_once_on_a_gpu_worker_and_keeps_what_it_found(cluster, tmp_path, digits_yaml, bench, log):
    if not ray.is_initialized():
        ray.init(address=cluster.address)
    space = read_space(digits_yaml, name="auto", settings=[*SETTINGS, "resources.gpus=auto"])
    study = Study.create(tmp_path, space, bench, 99.0)
    shared, _ = share(bench, None, None)
    assert (
        probe.auto_share(study, bench, shared, usable_nodes(), log.log, find=made_up) == 1.0
    )  # 8 / 3.3 = 2, but one core
    assert Study.open(study.folder).info["gpu_probe"] == {"device": "made up", "peak_bytes": 3 * GIB}
    assert "a trial takes 3.00 GiB at its peak (made up), 10 % more allowed for: 1 on a GPU of 8.0 GiB" in log.lines[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "_measured", lambda *args: pytest.fail("it was measured already"))
        assert probe.auto_share(study, bench, shared, usable_nodes(), log.log, find=made_up) == 1.0
    with pytest.raises(StudyError, match=r"a trial of a few steps failed on a GPU .*its PyTorch sees none"):
        probe.auto_share(study, bench, shared, usable_nodes(), log.log, find=none_there)
    no_gpu = [node for node in usable_nodes() if "GPU" not in node["Resources"]]
    assert probe.auto_share(study, bench, shared, no_gpu, log.log, find=made_up) == 0.0
    assert "the cluster has no GPU" in log.lines[-1]
