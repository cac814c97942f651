"""Where trials go and what they share, without a cluster: packing, the probe on a device that is made up, staging, threads, records."""

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ranksearch.cluster.packing import GIB, MARGIN, MOST, Machine, Needs, per_gpu, share_of, trials_at_once
from ranksearch.cluster.probe import measure, probe_plan, probe_recipe
from ranksearch.cluster.room import Room
from ranksearch.cluster.tune import warn_of_loaders
from ranksearch.cluster.worker import compute_threads
from ranksearch.data.loaded import LoadedDataset
from ranksearch.errors import UsageError
from ranksearch.space.reading import parse_space, read_space
from ranksearch.tasks import imagefolder
from ranksearch.tasks.stage import Staging, stage, staged
from ranksearch.tracking.runs import trial_tags
from ranksearch.training import device
from ranksearch.training.device import CONTEXT_BYTES, allocatable, limit_share, out_of_memory, use_bf16

# Packing ---------------------------------------------------------------------------------------------------------------
from ranksearch.trial.attempt import attempt
from ranksearch.trial.placement import Load, Placement, data_loads_per_node, loads_of, note_load


@given(
    peak=st.integers(2**20, 200 * GIB), sizes=st.lists(st.integers(2 * GIB, 160 * GIB), min_size=1, max_size=5),
    cpus_per_gpu=st.floats(1, 64), cpus=st.integers(1, 16),
)  # fmt: skip
def test_equal_shares_of_the_smallest_gpu_hold_the_peak_and_one_more_would_not(peak, sizes, cpus_per_gpu, cpus):
    count = per_gpu(peak, sizes, cpus_per_gpu=cpus_per_gpu, cpus=cpus)
    assert 1 <= count <= MOST
    need = peak * (1 + MARGIN)
    if count > 1:
        assert min(sizes) / count >= need
        assert count * cpus <= cpus_per_gpu
    if count < MOST and (count + 1) * cpus <= cpus_per_gpu:
        assert min(sizes) / (count + 1) < need
    assert count * share_of(count) <= 1
    assert int(1 / share_of(count)) == count


def test_packing_by_hand():
    assert per_gpu(3 * GIB, [80 * GIB, 24 * GIB], cpus_per_gpu=16, cpus=1) == 7  # 24 / 3.3
    assert per_gpu(3 * GIB, [80 * GIB], cpus_per_gpu=8, cpus=2) == 4
    assert per_gpu(100 * GIB, [80 * GIB], cpus_per_gpu=8, cpus=2) == 1


def test_trials_at_once_by_node():
    two = [Machine(3, 0, 0), Machine(3, 0, 0)]
    assert trials_at_once(two, Needs(1, 0)) == 6
    assert trials_at_once(two, Needs(2, 0)) == 2  # a trial lies on one node
    assert trials_at_once(two, Needs(1, 0, workers=4)) == 1  # its workers need not
    assert trials_at_once(two, Needs(2, 0, workers=3)) == 0
    assert str(Needs(2, 0, workers=3)) == "2 CPUs and 0 GPUs for each of its 3 workers"
    gpus = [Machine(16, 2, 0), Machine(4, 1, 0)]
    assert trials_at_once(gpus, Needs(2, share_of(3))) == 6 + 2
    assert trials_at_once(gpus, Needs(1, 1.0, workers=3)) == 1
    assert trials_at_once(gpus, Needs(1, 2.0)) == 1


def test_memory_lowers_how_many_run_at_once_and_says_so(monkeypatch):
    said, nodes = [], [Machine(8, 0, 16 * GIB), Machine(8, 0, 4 * GIB)]
    assert trials_at_once(nodes, Needs(1, 0), GIB) == 12
    monkeypatch.setattr("ranksearch.cluster.nodes.machines", lambda: nodes)
    monkeypatch.setattr("ranksearch.cluster.room.machines", lambda: nodes)
    monkeypatch.setattr("ranksearch.cluster.room.room_at_most", lambda needs: None)
    room = Room(Needs(1, 0), said.append)
    room.learn(None)
    room.learn(GIB // 8)
    assert (room(), said) == (16, [])
    room.learn(3 * GIB)
    assert room() == 6
    assert "3.00 GiB at its peak" in said[0]
    assert "6 trials at once from here on, not 16" in said[0]
    room.learn(GIB)
    assert room() == 6
    room.learn(100 * GIB)
    assert room() == 2  # one on each node, however large


# The probe and the share, on a device that is made up --------------------------------------------------------------------


class FakeMemory:
    kind, total = "made up", 10 * GIB

    def __init__(self, peak: int = 2 * GIB) -> None:
        self.calls, self._peak = [], peak

    def reset(self) -> None:
        self.calls.append("reset")

    def peak(self) -> int:
        self.calls.append("peak")
        return self._peak

    def limit(self, share: float) -> None:
        self.calls.append(("limit", share))


def test_the_probe_runs_a_real_short_trial_and_reads_the_peak_after_it(bench, digits_yaml, monkeypatch):
    settings = [
        "recipe.factor_share={low: 0, high: 0.5}",
        "recipe.distillation.weight={choices: [0, 0.5]}",
        "recipe.ema=0.9",
    ]
    space = read_space(digits_yaml, settings=[*settings, "recipe.optimizer={choices: [sgd, adamw]}"])
    recipe = probe_recipe(space.recipe)
    assert (recipe.factor_share, recipe.distillation.weight, recipe.ema, recipe.optimizer) == (0.5, 0.5, 0.9, "adamw")
    assert recipe.batch_size == space.recipe.batch_size
    assert len(list(probe_plan(bench.curves).lowered())) > 5
    memory, ran = FakeMemory(), []
    from ranksearch.cluster import probe

    real = probe.run_trial

    def noted(*args, **kwargs):
        memory.calls.append("trial")
        ran.append(real(*args, **kwargs))
        return ran[0]

    monkeypatch.setattr(probe, "run_trial", noted)
    found = measure(bench.task, bench.dense, bench.net, probe_plan(bench.curves), recipe, memory)
    assert (found.device, found.peak) == ("made up", 2 * GIB)
    assert memory.calls == ["reset", "trial", "peak"]
    assert [entry["phase"] for entry in ran[0].history] == [
        "untrained",
        "trained",
        "projected",
        "decomposed",
        "last",
        "factors",
    ]
    assert ran[0].status == "complete"


def test_a_share_limits_the_process_and_a_whole_gpu_does_not():
    memory = FakeMemory()
    for gpus in (0.0, 1.0, 2.0):
        limit_share(gpus, memory)
    limit_share(0.25, None)
    assert memory.calls == []
    limit_share(0.25, memory)
    assert memory.calls == [("limit", 0.25)]
    total = 16 * GIB
    assert 4 * allocatable(0.25, total) * total + 4 * CONTEXT_BYTES == pytest.approx(total)
    assert allocatable(0.01, total) == 0.005


def test_out_of_memory_is_a_reason_that_says_what_to_do(monkeypatch, bench, make):
    study = make(trials=1)
    candidate = study.ask(bench)

    def too_large(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr("ranksearch.trial.attempt.run_trial", too_large)
    result = attempt(bench.task, bench.dense, bench.net, candidate, report=lambda e: None, checkpoint_seconds=60)
    assert result.status == "failed"
    assert result.reason.startswith("out of GPU memory: a smaller batch (recipe.batch_size, or the task's own loader)")
    assert result.reason.endswith("(CUDA out of memory. Tried to allocate 2.00 GiB.)")
    assert "Traceback" not in result.reason
    assert out_of_memory(torch.OutOfMemoryError()).endswith("(CUDA out of memory)")


def test_precision_auto_is_decided_by_the_device_that_trains(monkeypatch):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    for able in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, able=able: able)
        assert use_bf16("auto", cuda, 1) is able
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda able=able: able)
        assert use_bf16("auto", cpu, device.BF16_FROM_MACS) is able
    assert not use_bf16("auto", cpu, device.BF16_FROM_MACS - 1)
    assert use_bf16("bf16", cpu, 1)
    assert not use_bf16("fp32", cuda, 10**9)


def test_a_trial_asks_for_its_own_device_at_its_start(bench, digits_yaml, monkeypatch):
    from ranksearch.data.parallel import ALONE
    from ranksearch.trial import session
    from ranksearch.trial.checkpoint import CheckpointFile
    from ranksearch.trial.reporting import unwatched

    asked = []
    monkeypatch.setattr(
        session, "use_bf16", lambda precision, device, macs: asked.append((precision, device.type)) or False
    )
    recipe = probe_recipe(read_space(digits_yaml).recipe)
    session.Session(
        bench.task, bench.dense, bench.net, recipe, seed=0, report=print, checkpoint=CheckpointFile(None, 1), rungs=(), group=ALONE,
        watch=unwatched,
    )  # fmt: skip
    assert asked == [("auto", "cpu")]


# The schema ---------------------------------------------------------------------------------------------------------------

SMALL = {
    "name": "x",
    "task": "digits",
    "model": "resnet8",
    "validation": 100,
    "recipe": {"steps": 10, "batch_size": 128},
}


def test_two_spellings_of_resources(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(json.dumps(SMALL | {"resources": {"gpus": "auto", "cpus": 2}}))
    resources = read_space(path).resources
    assert (resources.gpus_per_trial, resources.cpus_per_trial, resources.workers) == ("auto", 2, 1)
    assert "gpus" not in resources.model_dump()
    for setting in ("resources.gpus=0.5", "resources.gpus_per_trial=0.5"):
        assert read_space(path, settings=[setting]).resources.gpus_per_trial == 0.5
    assert parse_space(json.loads(path.read_text()), "f").resources == resources
    assert parse_space(SMALL | {"resources": {"gpus": 4}}, "f").resources.workers == 4
    assert parse_space(SMALL | {"resources": {"workers_per_trial": 2}}, "f").resources.workers == 2
    assert parse_space(SMALL | {"resources": {"workers_per_trial": 2, "gpus": 0}}, "f").resources.workers == 2


@pytest.mark.parametrize(
    ("resources", "says"),
    [
        ({"gpus": 1, "gpus_per_trial": 1}, "gpus and gpus_per_trial are two spellings of one key"),
        ({"gpus": "all"}, r"gpus_per_trial: 'all' is not possible: expected a fraction .*auto"),
        ({"gpus": -1}, r"gpus_per_trial: -1 is below 0"),
        ({"gpus": True}, r"gpus_per_trial: true is not possible"),
        (
            {"workers_per_trial": 2, "gpus": 0.5},
            r"workers_per_trial: 2 with gpus_per_trial: 0.5: .*write gpus_per_trial: 2, or 0",
        ),
        ({"workers_per_trial": 2, "gpus": "auto"}, r"workers_per_trial: 2 with gpus_per_trial: auto"),
        (
            {"workers_per_trial": 3},
            r"recipe.batch_size 128 cannot be split over the 3 workers .* the nearest that can is 129",
        ),
    ],
)
def test_resources_that_are_not_possible(resources, says):
    with pytest.raises(UsageError, match=says):
        parse_space(SMALL | {"resources": resources}, "f")


# Threads -------------------------------------------------------------------------------------------------------------------


def test_threads_are_the_cores_less_those_of_loaders(bench):
    class Two(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return torch.zeros(1, 8, 8), 0

    read = replace(bench.task, train=LoadedDataset(Two(), "train", workers=3))
    own = replace(bench.task, train=torch.utils.data.DataLoader(Two(), num_workers=1))
    assert [compute_threads(8, task) for task in (bench.task, read, own)] == [8, 5, 7]
    assert compute_threads(2, read) == 1
    said = []
    warn_of_loaders(read, 3, said.append)
    warn_of_loaders(read, 4, said.append)
    warn_of_loaders(bench.task, 1, said.append)
    assert len(said) == 1
    assert "3 CPUs for 3 processes that read its data" in said[0]


# Records -------------------------------------------------------------------------------------------------------------------


def test_loads_are_counted_by_node_and_run(tmp_path):
    assert data_loads_per_node(tmp_path) == {}
    one = Load("r1", None, "a", "host", "ip", 1, "k", 100, True, 0.1)
    for load in [
        one,
        replace(one, trial=0, data_loaded=False),
        replace(one, trial=1, node_id="b"),
        replace(one, run="r2", trial=2),
    ]:
        note_load(tmp_path, load)
    assert data_loads_per_node(tmp_path) == {"a": 1, "b": 1}  # a second run shares it anew
    note_load(tmp_path, replace(one, trial=3, node_id="b"))
    with (tmp_path / "loads.jsonl").open("a") as file:
        file.write('{"run": "r1", "tri')
    assert data_loads_per_node(tmp_path) == {"a": 1, "b": 2}
    assert len(loads_of(tmp_path)) == 5


def test_a_row_and_its_run_say_where_the_trial_ran(bench, make):
    from tests.conftest import simulated

    study = make(trials=2)
    place = Placement("host", "abc", "10.0.0.1", 7, ["0"], unpacked=True, data_loaded=True, load_seconds=0.5).to_dict()
    for where in (place, None):
        candidate = study.ask(bench)
        study.tell(candidate.number, replace(simulated(candidate, bench), placement=where))
    here, nowhere = study.trials
    assert here["placement"] == place
    assert nowhere["placement"] is None
    tags = [trial_tags(row, study.info, study.space, on_front=False) for row in study.trials]
    assert (tags[0]["node"], tags[0]["node_id"]) == ("host", "abc")
    assert "node" not in tags[1]
    assert {row["trial"]: row["placement"] for row in study.front_record()["trials"]}.get(here["trial"], place) == place


# Staging -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path) -> Path:
    root = tmp_path / "far" / "pictures"
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (32, 32), (number, 0, 0)).save(root / split / name / f"{number}.png")
    return root


def test_a_folder_is_staged_once_by_however_many_and_read_from_there(images, tmp_path):
    staging = Staging(images, tmp_path / "local")
    copied, ready = [], threading.Barrier(6)

    def come() -> None:
        ready.wait()
        copied.append(stage(staging))

    threads = [threading.Thread(target=come) for _ in range(6)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert sorted(copied) == [False] * 5 + [True]
    assert sorted(p.relative_to(staging.copy) for p in staging.copy.rglob("*.png")) == sorted(
        p.relative_to(images) for p in images.rglob("*.png")
    )
    train = imagefolder.ImageFolder(images / "train", training=False)
    subset = torch.utils.data.Subset(train, [1, 3])
    model = torch.nn.Linear(1, 1)
    from ranksearch import Task

    task = Task(
        model=model, train=LoadedDataset(subset, "train"), val=LoadedDataset(train, "val"), example_input=torch.zeros(1, 3, 224, 224)
    )  # fmt: skip
    moved, now = staged(task, staging)
    assert not now
    for path in images.rglob("*.png"):
        path.unlink()
    assert torch.equal(next(moved.train.in_order(2))[0][0, 0], next(moved.val.in_order(4))[0][1, 0])
    with pytest.raises(UsageError, match="is no readable image"):
        task.val.dataset[0]


def test_a_copy_that_broke_off_is_made_anew(images, tmp_path):
    staging = Staging(images, tmp_path / "local")
    broken = staging.copy.with_name(f"{staging.copy.name}.unfinished")
    (broken / "rubbish").mkdir(parents=True)
    assert stage(staging)
    assert not (staging.copy / "rubbish").exists()
    assert not broken.exists()


def test_a_folder_that_a_node_lacks_is_said(tmp_path):
    with pytest.raises(UsageError, match=r"there is no folder .*nowhere on this node"):
        stage(Staging(tmp_path / "nowhere", tmp_path / "local"))
    (tmp_path / "file").write_text("")
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError, match=r"resources.stage: .* cannot be copied"):
        stage(Staging(tmp_path / "there", tmp_path / "file" / "below"))
