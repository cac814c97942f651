"""Shared fixtures: small nets, fresh for every test, and where the real data are."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from xdist.scheduler import LoadScopeScheduling

from ranksearch.compress import plan_cost
from ranksearch.run_study import Silent
from ranksearch.search.workbench import prepare
from ranksearch.space.reading import read_space
from ranksearch.study.study import Study
from ranksearch.training.train import Training
from ranksearch.trial.result import TrialResult

if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # several processes share the cores: a thread each, here and in what the tests start
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "2")
REPOSITORY = Path(__file__).parent.parent
RAY_FILES = ("cli", "docs", "drills", "jobs", "own_task", "placement_ray", "two_nodes")
"""Tests that start Ray: one after the other, since `--address auto` finds any cluster of the machine, and kills go by name."""

DRILLS = pytest.mark.skipif(
    "RANKSEARCH_DRILLS" not in os.environ, reason="minutes on two cores: set RANKSEARCH_DRILLS=1 to run it"
)
"""Drills on clusters, of minutes."""


class ByFile(LoadScopeScheduling):
    """A file's tests run in one process, those of all files that start Ray too. (xdist 3.8's own groups do nothing under pytest 9.2.)"""

    def _split_scope(self, nodeid: str) -> str:
        name = Path(nodeid.split("::")[0]).stem.removeprefix("test_")
        return "ray" if name in RAY_FILES else name


def pytest_configure(config: pytest.Config) -> None:
    """What is not marked `gpu` runs as on a machine without one: it compares with what a CPU computes to the last digits, and forks
    processes, which one that has begun CUDA cannot. Ray counts devices by their commas, and some tests give it GPUs that are made up.
    """
    marked = config.getoption("markexpr") or ""
    if Path("/dev/nvidiactl").exists() and ("gpu" not in marked or "not gpu" in marked):
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1,-1,-1,-1"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    """Files begin in their order, so that Ray's, which take longest, begin early."""
    config.option.loadscopereorder = False
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file of measuring scripts, the longest that one process runs, begins first: begun late, it would be waited for alone."""
    items.sort(key=lambda item: item.path.name != "test_scripts.py")


def pytest_make_parametrize_id(val: Any) -> str | None:
    """Bytes give a test no name: two processes that compress the same text at other seconds would collect other tests."""
    return "bytes" if isinstance(val, bytes) else None


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nothing listens on now."""
    with ExitStack() as open_ones:
        sockets = [open_ones.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [found.getsockname()[1] for found in sockets]


class Told(Silent):
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.statuses: list[str] = []

    def log(self, message: str) -> None:
        self.lines.append(message)

    def status(self, line: str) -> None:
        self.statuses.append(line)


class SmallNet(nn.Module):
    """Convs of several kinds, BN, a functional product that no layer counts, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1, bias=True)
        self.bn = nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.body = nn.Sequential(nn.Conv2d(12, 24, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU())
        self.head = nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = self.body(self.depthwise(x)).mean((2, 3))
        return self.head(x @ torch.eye(24, dtype=x.dtype, device=x.device))


@pytest.fixture
def small_net() -> SmallNet:
    torch.manual_seed(0)
    return SmallNet().eval()


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def digits_yaml() -> Path:
    return REPOSITORY / "search_spaces" / "digits_resnet8.yaml"


@pytest.fixture(scope="session")
def short_settings() -> list[str]:
    """A digits study in seconds, without models in MLflow."""
    return [
        "recipe.steps=20", "recipe.bn_batches=2", "search.trials=3", "search.sensitivity=kfac", "tracking.models=false",
    ]  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def data_folder_for_tests(tmp_path_factory: pytest.TempPathFactory):
    """Dense nets trained by tests go to a folder of their own; real data are linked in where they are."""
    from ranksearch.data.folder import data_folder

    real = data_folder()
    folder = tmp_path_factory.mktemp("data")
    for name in ("cifar-10-batches-py", "weights"):
        if (real / name).is_dir():
            (folder / name).symlink_to(real / name)
    before = os.environ.get("RANKSEARCH_DATA")
    os.environ["RANKSEARCH_DATA"] = str(folder)
    yield folder
    if before is None:
        del os.environ["RANKSEARCH_DATA"]
    else:
        os.environ["RANKSEARCH_DATA"] = before


@pytest.fixture(scope="session", autouse=True)
def own_yeses_for_tests(tmp_path_factory: pytest.TempPathFactory):
    """What tests confirm, task files and addresses, is not confirmed for whoever runs them."""
    before = os.environ.get("XDG_STATE_HOME")
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))
    yield
    if before is None:
        del os.environ["XDG_STATE_HOME"]
    else:
        os.environ["XDG_STATE_HOME"] = before


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    space = read_space(REPOSITORY / "search_spaces" / "digits_resnet8.yaml", settings=["search.sensitivity=kfac"])
    return prepare(space, fallback=tmp_path_factory.mktemp("dense"), log=print)


@pytest.fixture
def make(bench, tmp_path, digits_yaml):
    def new(**options) -> Study:
        return Study.create(tmp_path, read_space(digits_yaml, **options), bench, 99.0)

    return new


@pytest.fixture
def steps_made(bench, monkeypatch) -> list[int | None]:
    """What every training step finds done; in place of the 16th there is a None, and an interruption. The dense net is trained before."""
    made, step = [], Training._step

    def counted(self):
        if len(made) == 15:
            made.append(None)
            raise KeyboardInterrupt
        made.append(self.done)
        return step(self)

    monkeypatch.setattr(Training, "_step", counted)
    return made


def simulated(candidate, bench, accuracy=None) -> TrialResult:
    """What a trial might return, in no time: accuracy from the plan's cost."""
    cost = plan_cost(bench.net, candidate.plan)
    value = 90 + 8 * cost.macs / 747_136 + (candidate.number % 5) if accuracy is None else accuracy
    return TrialResult(
        "complete",
        candidate.seed,
        1.0,
        val_accuracy=value,
        macs=cost.macs,
        params=cost.params,
        size_bytes=cost.size_bytes,
    )


def drain(study, bench):
    candidates = []
    while (candidate := study.ask(bench)) is not None:
        candidates.append(candidate)
        study.tell(candidate.number, simulated(candidate, bench))
    return candidates
