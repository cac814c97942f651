"""Optimizer and learning rate of a net whose task does not say what it was trained with: found by short trials, and only where it pays."""

import textwrap

import pytest

from ranksearch.search.range_test import CANDIDATES, with_recipe
from ranksearch.search.workbench import prepare
from ranksearch.space.reading import read_space
from ranksearch.study.study import Study

FAINT = """
import torch, ranksearch
from torch import nn

def faint(outputs, labels):  # SGD goes nowhere by its gradients, which AdamW scales
    return 1e-4 * nn.functional.cross_entropy(outputs, labels)

def make_task():
    torch.manual_seed(0)
    labels = torch.randint(4, (600,))
    inputs = torch.randn(4, 24)[labels] + 0.5 * torch.randn(600, 24)
    net = nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 4))
    train, val = (inputs[:400], labels[:400]), (inputs[400:], labels[400:])
    return ranksearch.Task(model=net, train=train, val=val, loss=faint, trained_with={told})
"""


@pytest.fixture
def faint(tmp_path):
    """(space, workbench, dense metric) of a net on faint inputs, under settings."""

    def made(told: object = None, settings: tuple[str, ...] = (), trials: int = 8):
        (tmp_path / "faint.py").write_text(textwrap.dedent(FAINT).replace("{told}", repr(told)))
        file = tmp_path / "faint.yaml"
        file.write_text(
            f"name: faint\ntask: {tmp_path / 'faint.py'}:make_task\nbudgets: {{params: 70%}}\n"
            "recipe: {steps: 500, batch_size: 32}\nsearch: {sensitivity: kfac}\n"
        )
        space = read_space(file, trials=trials, settings=list(settings))
        return space, prepare(space, fallback=tmp_path, log=lambda text: None), 25.0

    return made


def test_a_net_that_sgd_does_not_move_is_trained_by_adamw(faint, tmp_path):
    space, bench, dense = faint()
    said: list[str] = []
    found = with_recipe(space, bench, dense, said.append)
    print(said)
    assert found.task.trained_with["optimizer"] == "adamw"
    assert all(f"{optimizer} at {lr:g}" in said[0] for optimizer, lr in CANDIDATES)
    study = Study.create(tmp_path, space, found, dense)
    kept = Study.open(study.folder).space.recipe
    assert (kept.optimizer, kept.lr) == ("adamw", found.task.trained_with["lr"])  # a resumed study does not look again


@pytest.mark.parametrize(
    ("told", "settings", "trials"),
    [
        ({"optimizer": "sgd", "lr": 0.1}, (), 8), (None, ("recipe.lr=0.05",), 8), (None, ("recipe.optimizer=adamw",), 8),
        (None, ("recipe.lr={low: 0.001, high: 0.1, log: true}",), 8), (None, (), 3), (None, ("recipe.steps=20",), 8),
        (None, ("recipe.steps=0",), 8),
    ],
    ids=["task", "rate", "optimizer", "searched", "few trials", "short", "untrained"],
)  # fmt: skip
def test_nothing_is_tried_where_it_was_said_or_cannot_pay(faint, told, settings, trials):
    space, bench, dense = faint(told, settings, trials)
    assert with_recipe(space, bench, dense, pytest.fail) is bench


def test_the_usual_recipe_stays_where_no_other_is_better_by_more_than_chance():
    from ranksearch.search.range_test import _best
    from ranksearch.trial.metric import Metric

    usual, metric = ("sgd", 0.02), Metric("accuracy", "maximize", "%", 90.0)
    assert _best({usual: 80.0, ("adamw", 0.002): 82.0}, usual, metric, 500) == usual
    assert _best({usual: 80.0, ("adamw", 0.002): 86.0}, usual, metric, 500) == ("adamw", 0.002)
    assert _best({("adamw", 0.002): 1.0}, usual, metric, 500) == ("adamw", 0.002)  # the usual one diverged
