"""Several processes train one net: what a group computes, and that it comes out as one process would have it."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import ranksearch
from ranksearch.compress import LayerPlan, RankPlan, trace
from ranksearch.data.loaded import LoadedDataset
from ranksearch.data.parallel import ALONE, Distributed, PeerLost, swap_bn_
from ranksearch.data.source import calibration_batches
from ranksearch.errors import UsageError
from ranksearch.tasks import digits
from ranksearch.trial.checkpoint import CheckpointFile
from ranksearch.trial.recipe import DistillationRecipe, ProjectionRecipe, Recipe
from ranksearch.trial.reporting import Stopped
from ranksearch.trial.trial import run_trial

RECIPE = Recipe(
    steps=12, batch_size=32, optimizer="sgd", schedule="cosine", warmup=0.1, lr=0.02, momentum=0.9, weight_decay=1e-4,
    label_smoothing=0.0, clip_norm=1.0, ema=0.0, factor_share=0.25, factor_lr=1.0, bn_batches=2, precision="fp32", compile=False,
    projection=ProjectionRecipe(
        period=3, start=0.0, until_end=1.0, schedule="removed_energy", removed_energy=0.02, rank_annealing=0.0, momentum="keep",
        energy_transfer=False, bn_rectification=False,
    ),
    distillation=DistillationRecipe(0.5, 2.0), factor_steps="matched",
)  # fmt: skip
PLAN = RankPlan({"conv": LayerPlan("im2col", 3), "head.1": LayerPlan("svd", 4)}, "own.py:make")


class Net(nn.Module):
    """Without BN, so that the mean of parts is the whole; `norm` puts one in."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(8 * 64, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))))


def small_task(norm: bool = False) -> ranksearch.Task:
    torch.manual_seed(0)
    ours = digits.make_task("resnet8", data=None, validation=100, split_seed=0)
    return ranksearch.Task(model=Net(norm), train=ours.train.first(256), val=ours.val, test=None)


def train(task, group, folder: Path, *, report=lambda entry: None, resume: bool = False, recipe: Recipe = RECIPE):
    checkpoint = CheckpointFile(folder / "state.pt", 0.0 if resume else 1e9)
    return run_trial(
        task, task.model.state_dict(), trace(task.model, task.example_input), PLAN, recipe, seed=3, report=report, save_to=folder / "net",
        checkpoint=checkpoint, group=group,
    )  # fmt: skip


def bits(model: nn.Module) -> bytes:
    return b"".join(value.detach().contiguous().numpy().tobytes() for value in model.state_dict().values())


# What one rank does; each writes what it saw to a file of its own ----------------------------------------------------


def as_rank(rank: int, world: int, folder: str, what: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    try:
        found = globals()[what](Distributed(), Path(folder))
    finally:
        dist.destroy_process_group()
    torch.save(found, f"{folder}/{rank}.pt")


def on_ranks(folder: Path, what: str, world: int = 2) -> list:
    mp.start_processes(as_rank, args=(world, str(folder), what), nprocs=world, start_method="fork")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _collectives(group: Distributed, folder: Path):
    mine = [torch.full((3,), float(group.rank)), torch.full((2, 2), 10.0 * group.rank).bfloat16()]
    group.average_(mine)
    layout = torch.full((2, 3, 4, 4), float(group.rank)).to(memory_format=torch.channels_last)
    counter = torch.tensor(group.rank + 5)
    group.broadcast_([layout, counter])
    kept = layout.is_contiguous(memory_format=torch.channels_last), float(layout.sum()), int(counter)
    with pytest.raises(UsageError, match="no"):
        group.on_rank_0(lambda: (_ for _ in ()).throw(UsageError("no")))

    def stop_on_first() -> None:
        if group.rank == 0:
            raise Stopped("behind")

    with pytest.raises(Stopped, match="behind"):
        group.agree(stop_on_first)
    part = group.shard({"x": torch.arange(9), "y": (torch.arange(9), "text")})
    return [m.float().flatten().tolist() for m in mine], kept, group.all_gather(group.rank), part


def _trial(group: Distributed, folder: Path):
    from ranksearch.trial import projecting

    seen = []
    original = projecting.Projecting._project

    def noted(self, training, step, *, recorded):
        removed = original(self, training, step, recorded=recorded)
        seen.append((step, bits(training.model)))
        return removed

    projecting.Projecting._project = noted
    result = train(small_task(), group, folder)
    result_bn = train(small_task(norm=True), group, folder / "bn")
    return seen, replace(result, seconds=0), replace(result_bn, seconds=0)


def _stopped_at_a_rung(group: Distributed, folder: Path):
    def report(entry):
        if group.rank == 0 and entry["phase"] == "trained":
            raise Stopped("fell behind")

    return train(small_task(), group, folder, report=report).status


def _goes_on(group: Distributed, folder: Path):
    def interrupted(entry):
        if entry["phase"] == "projected":
            raise RuntimeError("the worker dies here")

    with pytest.raises(RuntimeError, match="dies here"):
        train(small_task(), group, folder, report=interrupted, resume=True)
    phases = []
    result = train(small_task(), group, folder, report=lambda entry: phases.append(entry["phase"]))
    return result.val_accuracy, result.losses, phases


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    return folder, on_ranks(folder, "_trial")


# -------------------------------------------------------------------------------------------------------------------


def test_collectives_and_parts(tmp_path):
    first, second = on_ranks(tmp_path, "_collectives")
    assert first[:3] == second[:3] == ([[0.5] * 3, [5.0] * 4], (True, 0.0, 5), [0, 1])
    assert first[3]["x"].tolist() == [0, 1, 2, 3]  # the ninth has no partner
    assert second[3]["y"][0].tolist() == [4, 5, 6, 7]
    assert second[3]["y"][1] == "text"


def test_ranks_hold_the_same_bits_after_every_projection(pair):
    _, ((first, *_), (second, *_)) = pair
    assert [step for step, _ in first] == [step for step, _ in second]
    assert len(first) >= 3
    assert first == second


def test_two_workers_find_what_one_finds(pair, tmp_path):
    folder, ((_, two, _), (_, other, _)) = pair
    one = train(small_task(), ALONE, tmp_path)
    assert two.history == other.history
    assert two.epochs == one.epochs
    assert [e["phase"] for e in two.history] == [e["phase"] for e in one.history]
    for ours, alone in zip(two.history, one.history, strict=True):
        assert ours["val_loss"] == pytest.approx(alone["val_loss"], rel=1e-4)
    for ours, alone in zip(two.losses, one.losses, strict=True):
        assert ours["train_loss"] == pytest.approx(alone["train_loss"], rel=1e-4)
    for ours, alone in zip(two.projections, one.projections, strict=True):
        assert ours["loss_before"] == pytest.approx(alone["loss_before"], rel=1e-4)
    # and the net that rank 0 wrote is that of one worker
    pairs = zip(
        ranksearch.load(folder / "net", build=Net).parameters(),
        ranksearch.load(tmp_path / "net", build=Net).parameters(),
        strict=True,
    )
    for ours, alone in pairs:
        torch.testing.assert_close(ours, alone, rtol=1e-3, atol=1e-5)


def test_with_bn_all_ranks_agree_on_scores_and_train(pair, tmp_path):
    _, ((_, _, first), (_, _, second)) = pair
    one = train(small_task(norm=True), ALONE, tmp_path)
    assert first.history == second.history
    assert first.losses[-1]["train_loss"] < first.losses[0]["train_loss"]
    # statistics of parts instead of the whole while it trains, the same re-estimation: close, not equal
    assert first.val_loss == pytest.approx(one.val_loss, rel=0.2)


def test_a_stop_reaches_all_ranks(tmp_path):
    assert on_ranks(tmp_path, "_stopped_at_a_rung") == ["stopped", "stopped"]


def test_a_group_goes_on_from_its_checkpoint(tmp_path, pair):
    first, second = on_ranks(tmp_path, "_goes_on")
    assert first == second
    accuracy, losses, phases = first
    whole = pair[1][0][1]
    assert (accuracy, losses) == (whole.val_accuracy, whole.losses)
    assert "trained" in phases
    assert (tmp_path / "state.pt").exists()  # until the study knows the result


def _lost(group: Distributed, folder: Path):
    if group.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(PeerLost, match="a worker of the trial is gone"):
        train(small_task(), group, folder)
    return "PeerLost"


def test_a_lost_worker_is_told_from_a_trial_that_fails(tmp_path):
    context = mp.start_processes(as_rank, args=(2, str(tmp_path), "_lost"), nprocs=2, join=False, start_method="fork")
    for process in context.processes:  # its own join would end the one that is left, before that notices
        process.join(60)
    assert [process.exitcode for process in context.processes] == [0, -signal.SIGKILL]
    assert torch.load(tmp_path / "0.pt") == "PeerLost"


class Numbered(torch.utils.data.Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        return torch.tensor([float(index)]), index


class Pretend(Distributed):
    """Rank and size without a process group."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world


def test_a_dataset_is_read_in_parts_of_the_same_batches():
    source = LoadedDataset(Numbered(), "train")
    streams = [
        source.stream(8, torch.Generator().manual_seed(1), group) for group in (ALONE, Pretend(0, 2), Pretend(1, 2))
    ]
    for _ in range(11):  # beyond an epoch
        whole, one, two = (next(stream)[1].tolist() for stream in streams)
        assert one + two == whole
        assert len(one) == 4
    states = [stream.state_dict() for stream in streams]
    assert states[0] == states[1] == states[2]
    with pytest.raises(UsageError, match=r"batch of 1 cannot be split over 2 workers"):
        Pretend(0, 2).shard(torch.zeros(1))


def test_synchronised_bn_shares_its_weights_and_goes_again():
    net = Net(norm=True)
    before = net.state_dict(keep_vars=True)
    swapped = swap_bn_(net)
    assert isinstance(net.norm, nn.SyncBatchNorm)
    after = net.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert [(name, type(norm)) for _, name, norm, _ in swapped] == [("norm", nn.BatchNorm2d)]


def test_calibration_batches_are_whole_on_every_rank():
    task = small_task()
    sizes = [len(batch) for batch in calibration_batches(task.train, 2, 32, torch.Generator().manual_seed(0))]
    assert sizes == [32, 32]
