"""Where batches come from: resident tensors, Datasets with workers, loaders; and the metrics that they are scored by."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from ranksearch.data.loaded import Loaded, LoadedDataset, as_source
from ranksearch.data.resident import Resident
from ranksearch.front.front import front_hypervolume
from ranksearch.front.row import Row
from ranksearch.pareto import hypervolume
from ranksearch.tasks.task import Task
from ranksearch.training.evaluate import evaluate
from ranksearch.trial.metric import Metric
from ranksearch.trial.result import Status

X, Y = torch.arange(50.0)[:, None].repeat(1, 4), torch.arange(50) % 3


class Numbers(Dataset):
    """(i, i mod 3), made one by one."""

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((4,), float(index)), index % 3


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def take(stream, count):
    return [next(stream) for _ in range(count)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataset_gives_every_sample_once_an_epoch_and_goes_on_where_it_was(workers):
    source = LoadedDataset(Numbers(), "train", workers)
    batches = take(source.stream(10, seeded()), 12)
    for epoch in (batches[:5], batches[5:10]):
        assert sorted(torch.cat([x[:, 0] for x, _ in epoch]).tolist()) == list(range(50))
    assert not torch.equal(batches[0][0], batches[5][0])
    assert all(torch.equal(y, x[:, 0].long() % 3) for x, y in batches)
    first = source.stream(10, seeded())
    take(first, 7)
    second = source.stream(10, seeded(1))
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(a[0], b[0]) for a, b in zip(take(second, 5), batches[7:], strict=True))
    assert torch.equal(torch.cat([x for x, _ in source.in_order(16)]), X)
    assert len(source.first(20)) == 20


def test_what_a_user_may_give_becomes_a_source():
    assert isinstance(as_source((X, Y), "train"), Resident)
    assert isinstance(as_source(TensorDataset(X, Y), "train"), Resident)
    assert isinstance(as_source(Numbers(), "train"), LoadedDataset)
    loader = as_source(DataLoader(Numbers(), 20), "train")
    listed = as_source([(X[:30], Y[:30]), (X[30:], Y[30:])], "train")
    for source in (loader, listed):
        assert isinstance(source, Loaded)
        assert len(source) == 50
        assert torch.equal(torch.cat([x for x, _ in source.in_order(7)]), X)
        assert len(source.first(25)) in (30, 40)  # whole batches
    stream = loader.stream(7, seeded())
    assert [len(x) for x, _ in take(stream, 4)] == [20, 20, 10, 20]  # as the loader has them, again and again


def test_a_loader_that_has_run_can_be_sent(tmp_path):
    import pickle

    source = as_source(DataLoader(Numbers(), 10, num_workers=1, persistent_workers=True), "train")
    take(source.stream(10, seeded()), 2)
    assert len(pickle.loads(pickle.dumps(source))) == 50


def test_every_source_scores_the_same_and_every_form_of_a_metric():
    model = nn.Sequential(nn.Linear(4, 3))

    class Counted:
        def reset(self):
            self.right = self.total = 0

        def update(self, outputs, targets):
            self.right, self.total = self.right + int((outputs.argmax(1) == targets).sum()), self.total + len(targets)

        def compute(self):
            return torch.tensor(100 * self.right / self.total)

    def whole(outputs, targets):
        assert outputs.shape == (50, 3)  # the split at once
        return np.float64(100 * (outputs.argmax(1) == targets).float().mean())

    found = []
    for val in ((X, Y), Numbers(), DataLoader(Numbers(), 7)):
        for metric in (None, whole, Counted()):
            task = Task(model=model, train=(X, Y), val=val, metric=metric)
            found.append(evaluate(task.dense_model(), task.val, task))
    assert all(score.accuracy == pytest.approx(found[0].accuracy) for score in found)
    assert all(score.loss == pytest.approx(found[0].loss, rel=1e-4) for score in found)


# Shares --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dense", [0.03, 4.0, -2.0, 0.0])
@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_a_share_rises_with_what_is_better_and_is_half_for_the_dense_net(direction, dense):
    metric = Metric("m", direction, "", dense)
    values = np.linspace(dense - 1000, dense + 1000, 4001)
    shares = [metric.share(v) for v in (values if direction == "maximize" else values[::-1])]
    assert metric.share(dense) == 0.5
    assert all(a < b for a, b in itertools.pairwise(shares))
    assert shares[0] > 0
    assert shares[-1] < 1
    assert metric.share(metric.worst) < 0.05


def test_a_metric_in_percent_keeps_its_scale():
    assert Metric("accuracy", "maximize", "%", 90.0).share(75.0) == 0.75
    error = Metric("error", "minimize", "%", 10.0)
    assert (error.share(25.0), error.share(error.worst), error.text(25.0)) == (0.75, 0.0, "25.00 %")
    assert Metric("rmse", "minimize", "K", 2.0).share(4.0) == 0.25  # twice the dense net's


def test_the_hypervolume_of_a_minimised_metric_is_that_of_its_shares():
    metric = Metric("rmse", "minimize", "", 2.0)
    rows = [
        Row(0, Status.COMPLETE, share=metric.share(v), macs_ratio=r) for v, r in ((2.1, 0.5), (2.6, 0.3), (5.0, 0.1))
    ]
    points = [[1 - metric.share(v), r] for v, r in ((2.1, 0.5), (2.6, 0.3), (5.0, 0.1))]
    assert front_hypervolume(rows, ["accuracy", "macs"]) == pytest.approx(hypervolume(points, [1.0, 1.0]))
