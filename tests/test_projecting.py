"""When projections are made during a training, and at which ranks."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from ranksearch.compress import LayerPlan, RankPlan, trace
from ranksearch.data.parallel import ALONE
from ranksearch.space.recipe import RecipeSpace
from ranksearch.trial.projecting import RECORDED, Projecting
from ranksearch.trial.recipe import Recipe, middle

PLAN = RankPlan({"body.0": LayerPlan("im2col", 3), "stem": LayerPlan("tucker2", (1, 4))})


class FakeTraining(SimpleNamespace):
    """A training whose steps move the weights a little."""

    is_replayed = False

    def forget_momentum_(self):
        self.optimizer.state.clear()

    def step(self):
        self.done += 1
        with torch.no_grad():
            for weight in self.model.parameters():
                weight += 0.01 * torch.randn(weight.shape, generator=self.generator)

    def probe(self):
        return float(self.done)


def projected(net, image, *, steps=60, rates=None, **settings):
    """(the `Projecting`, steps after which it projected, ranks of `body.0` and `stem` there) of a run of `steps`."""
    recipe = Recipe.settled(RecipeSpace(steps=steps, projection={"period": 5} | settings), middle).projection
    projecting = Projecting(PLAN, trace(net, image), recipe, rates or [0.1] * steps)
    optimizer = SimpleNamespace(state={"momentum": 1})
    training = FakeTraining(
        group=ALONE, done=0, model=net, optimizer=optimizer, generator=torch.Generator().manual_seed(0)
    )
    made, ranks = [], []
    projector = projecting.projector

    def spy(model, plan):
        made.append(training.done)
        ranks.append((plan["body.0"].rank, plan["stem"].rank))
        return projector(model, plan)

    projecting.projector = spy
    for _ in range(steps):
        training.step()
        projecting.after_step(training)
    projecting.finish(training)
    return projecting, made, ranks


def test_a_constant_period_ends_on_a_projection_that_is_not_made_twice(small_net, image):
    projecting, made, ranks = projected(small_net, image)
    assert made == [5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55, 60]
    assert set(ranks) == {(3, (1, 4))}
    assert projecting.count == 12
    weight = small_net.body[0].weight.detach()
    assert torch.linalg.matrix_rank(weight.reshape(24, -1), rtol=1e-5) == 3


@pytest.mark.parametrize(("start", "until_end"), [(0.5, 1.0), (0.0, 0.25), (0.25, 0.75), (1.0, 1.0)])
def test_the_window_holds_the_periodic_projections_and_the_last_one_is_always_made(small_net, image, start, until_end):
    _, made, _ = projected(small_net, image, start=start, until_end=until_end)
    first, last = round(60 * start), round(60 * until_end)
    assert made == [*range(first + 5, min(last, 59) + 1, 5), 60]


def test_by_learning_rate_there_are_as_many_projections_but_they_follow_the_rate(small_net, image):
    rates = [0.1 * (1 - step / 60) for step in range(60)]
    _, made, _ = projected(small_net, image, rates=rates, schedule="learning_rate")
    assert abs(len(made) - 12) <= 1
    gaps = [b - a for a, b in pairwise(made)]
    assert gaps[0] < 5 < gaps[-2]
    share = 5 * sum(rates) / 60  # of the learning rates' sum, per projection
    for number, step in enumerate(made[:-1], start=1):
        assert number * share <= sum(rates[:step]) + 1e-9 < number * share + rates[step - 1] + 2e-9


def test_by_removed_energy_the_period_adapts_within_a_factor_of_four(small_net, image):
    _, rare, _ = projected(small_net, image, schedule="removed_energy", removed_energy=1.0)
    _, often, _ = projected(small_net, image, schedule="removed_energy", removed_energy=1e-9)
    assert len(rare) < 12 < len(often)
    gaps = [b - a for a, b in pairwise(rare)]
    assert max(gaps) == 20
    assert len([step for step in often if step > 40]) == pytest.approx(20 / 1.25, abs=1)


def test_annealed_ranks_come_down_from_full_and_end_at_the_plans(small_net, image):
    _, made, ranks = projected(small_net, image, rank_annealing=0.5)
    body, stem = zip(*ranks, strict=True)
    assert list(body) == sorted(body, reverse=True)
    assert 3 < body[0] <= 24
    assert body[-1] == 3
    assert all(rank == 3 for rank, step in zip(body, made, strict=True) if step >= 30)
    assert all(1 <= rs <= 3 and 4 <= rt <= 12 for rs, rt in stem)
    expected = 3 + round((1 - 5 / 30) ** 3 * (24 - 3))
    assert body[0] == expected


def test_a_format_whose_decomposition_is_no_projection_is_not_annealed(small_net, image):
    plan = RankPlan({"body.0": LayerPlan("cp", 5), "stem": LayerPlan("im2col", 2)})
    recipe = Recipe.settled(RecipeSpace(steps=10, projection={"rank_annealing": 1.0}), middle).projection
    found = Projecting(plan, trace(small_net, image), recipe, [0.1] * 10)._plan_at(2)
    assert found["body.0"].rank == 5
    assert found["stem"].rank > 2


def test_momentum_is_kept_unless_reset(small_net, image):
    recipe = RecipeSpace(steps=10, projection={"period": 2, "momentum": "reset"})
    settings = Recipe.settled(recipe, middle).projection
    projecting = Projecting(PLAN, trace(small_net, image), settings, [0.1] * 10)
    state = {"momentum": 1}
    training = FakeTraining(
        group=ALONE, done=1, model=small_net, optimizer=SimpleNamespace(state=state), generator=torch.Generator()
    )
    projecting.after_step(training)
    assert state  # no projection was due
    training.done = 2
    projecting.after_step(training)
    assert not state


def test_long_runs_record_some_projections_and_always_the_last(small_net, image):
    projecting, made, _ = projected(small_net, image, steps=600)
    assert len(made) == 120
    assert RECORDED <= len(projecting.records) <= RECORDED + 1
    assert projecting.records[-1]["step"] == 600
    assert set(projecting.records[0]["removed_energy"]) == set(PLAN.layers)
    assert projecting.summary()["loss_after_projection"] == 600.0
