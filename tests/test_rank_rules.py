"""Rank rules on closed-form spectra, with the classic mistakes: off by one, the complement, the next singular value; kept curves."""

import numpy as np
import pytest
import torch
from torch import nn

from ranksearch.allocate import (
    BASELINES,
    CurveCache,
    Curves,
    LayerRules,
    greedy,
    measure_scores,
    parse_budget,
    rank_curves,
)
from ranksearch.allocate.greedy import RATIOS, candidates
from ranksearch.allocate.rank_rules import evbmf_rank, stable_rank
from ranksearch.compress import LayerPlan, RankPlan, plan_cost, trace
from ranksearch.lowering import LOWERINGS, LayerSpec
from ranksearch.lowering.contract import sides
from ranksearch.tasks.resnet import CifarResNet


@pytest.mark.parametrize(
    ("squared", "expected"),
    [([1.0] * 7, 7.0), ([9.0, 0.0, 0.0], 1.0), ([4.0, 1.0], 1.25), ([0.0, 0.0], 0.0), ([4.0, 4.0, 1.0], 2.25)],
)
def test_stable_rank(squared, expected):
    assert stable_rank(np.array(squared)) == pytest.approx(expected)
    assert stable_rank(1e12 * np.array(squared)) == pytest.approx(expected)


def planted(rows: int, columns: int, rank: int, noise: float, seed: int) -> np.ndarray:
    """Squared singular values of a rank-`rank` matrix with singular values of 3 sqrt(columns) to 6 sqrt(columns), and Gaussian noise."""
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.standard_normal((rows, max(rank, 1))))[0][:, :rank]
    right = np.linalg.qr(rng.standard_normal((columns, max(rank, 1))))[0][:, :rank]
    signal = left * (np.linspace(6, 3, rank) * np.sqrt(columns)) @ right.T
    return np.linalg.svd(signal + noise * rng.standard_normal((rows, columns)), compute_uv=False) ** 2


@pytest.mark.parametrize("shape", [(20, 20), (16, 144), (64, 90), (90, 64)])
@pytest.mark.parametrize("rank", [0, 1, 5])
@pytest.mark.parametrize("seed", [0, 1])
def test_evbmf_finds_the_planted_rank_whatever_scale_and_side(shape, rank, seed):
    squared = planted(min(shape), max(shape), rank, 1.0, seed)
    for scale in (1.0, 1e-12, 1e12):
        assert evbmf_rank(scale * squared, shape) == evbmf_rank(scale * squared, shape[::-1]) == rank


def test_evbmf_of_a_noiseless_matrix_is_its_rank_and_of_nothing_zero():
    assert evbmf_rank(planted(20, 30, 4, 1e-9, 0), (20, 30)) == 4
    assert evbmf_rank(np.zeros(5), (5, 9)) == 0
    assert evbmf_rank(np.array([3.0]), (1, 8)) == 1


def reference_evbmf(squared: np.ndarray, shape: tuple[int, int]) -> int:
    """Nakajima et al. 2013 by a grid over the noise variance, in the paper's words: L <= M, tau, every component's free energy."""
    small, large = min(shape), max(shape)
    alpha = small / large
    tau_bar = 2.5129 * alpha**0.5
    x_bar = (1 + tau_bar) * (1 + alpha / tau_bar)
    energies = {}
    for variance in np.geomspace(squared.mean() / large / 200, squared.sum() / (small * large), 4000):
        x = squared / (large * variance)
        kept = x > x_bar
        if kept.sum() >= np.ceil(small / (1 + alpha)):
            continue
        tau = 0.5 * (x[kept] - (1 + alpha) + np.sqrt((x[kept] - (1 + alpha)) ** 2 - 4 * alpha))
        free = np.sum(x[~kept] - np.log(x[~kept])) + np.sum(x[kept] - tau)
        energies[variance] = free + np.sum(np.log((tau + 1) / x[kept])) + alpha * np.sum(np.log(tau / alpha + 1))
    best = min(energies, key=energies.get)
    return int((squared > large * best * x_bar).sum())


def test_evbmf_agrees_with_a_search_over_the_noise():
    rng = np.random.default_rng(0)
    for seed in range(20):
        shape = (int(rng.integers(10, 40)), int(rng.integers(10, 120)))
        squared = planted(min(shape), max(shape), int(rng.integers(0, 6)), 1.0, seed)
        assert evbmf_rank(squared, shape) == reference_evbmf(squared, shape)


def diagonal_net(*spectra: list[float]) -> Curves:
    """Square Linears whose singular values are known; a budget counts in ranks, as every layer of n x n costs 2nr."""
    model = nn.Sequential(*(nn.Linear(len(s), len(s), bias=False) for s in spectra))
    for layer, values in zip(model, spectra, strict=True):
        layer.weight.data = torch.diag(torch.tensor(values))
    return rank_curves(model, trace(model, torch.zeros(1, len(spectra[0]))), LayerRules(("svd",)))


def ranks_of(plan: RankPlan, count: int) -> list[int]:
    return [plan[str(i)].rank for i in range(count)]


STEEP = [100.0] + [1.0] * 19  # 99.8 % of the energy in one value
FLAT = [1.0] * 20
HALVES = [2.0**-i for i in range(20)]


def budget(ranks: int, layers: int = 2) -> list:
    """Room for `ranks` ranks over all layers of width 20 at once."""
    return [parse_budget("macs", str(40 * ranks))]


def test_energy_takes_the_smallest_rank_that_keeps_the_share_and_not_the_complement():
    # at any share that leaves room for 8 ranks, the steep layer needs 1 (its complement would need 19) and the flat one 7
    plan = BASELINES["energy"](diagonal_net(STEEP, FLAT), budget(8))
    assert ranks_of(plan, 2) == [1, 7]


def test_energy_is_not_off_by_one():
    # kept shares of 2^-i: rank r keeps 1 - 4^-r. Both layers are the same, so both get the same rank
    plan = BASELINES["energy"](diagonal_net(HALVES, HALVES), budget(6))
    assert ranks_of(plan, 2) == [3, 3]
    curves = diagonal_net(HALVES, HALVES)
    (options, _) = curves.layers
    assert options.removed[options.choices.index(LayerPlan("svd", 3))] == pytest.approx(4.0**-3, rel=1e-5)


def test_minimax_reads_the_first_value_that_is_left_out():
    # sigma_{r+1} / sigma_1: STEEP drops to .01 at rank 1 already; a rule that read sigma_r would want rank 2
    curves = diagonal_net(STEEP, [0.9**i for i in range(20)])
    plan = BASELINES["minimax"](curves, budget(9))
    assert ranks_of(plan, 2) == [1, 8]
    (_, options) = curves.layers
    assert options.residual[options.choices.index(LayerPlan("svd", 8))] == pytest.approx(0.9**8, rel=1e-5)


def test_uniform_gives_equal_layers_equal_ranks_and_spends_the_budget():
    assert ranks_of(BASELINES["uniform"](diagonal_net(STEEP, FLAT), budget(8)), 2) == [4, 4]
    assert ranks_of(BASELINES["uniform"](diagonal_net(STEEP, FLAT), budget(9)), 2) == [4, 4]


def test_stable_rank_keeps_its_proportions():
    # stable ranks 2 and 8 of widths 20
    two, eight = [1.0, 1.0] + [0.0] * 18, [1.0] * 8 + [0.0] * 12
    curves = diagonal_net(two, eight)
    assert ranks_of(BASELINES["stable_rank"](curves, budget(10)), 2) == [2, 8]
    assert ranks_of(BASELINES["stable_rank"](curves, budget(5)), 2) == [1, 4]


def test_evbmf_keeps_its_proportions():
    model = nn.Sequential(nn.Linear(30, 30, bias=False), nn.Linear(30, 30, bias=False))
    for layer, rank, seed in zip(model, (2, 6), (0, 1), strict=True):
        rng = np.random.default_rng(seed)
        left, right = (np.linalg.qr(rng.standard_normal((30, rank)))[0] for _ in range(2))
        signal = left * 6 * 30**0.5 @ right.T
        layer.weight.data = torch.from_numpy(signal + rng.standard_normal((30, 30))).float()
    curves = rank_curves(model, trace(model, torch.zeros(1, 30)), LayerRules(("svd",)))
    plan = BASELINES["evbmf"](curves, [parse_budget("macs", str(60 * 8))])
    assert ranks_of(plan, 2) == [2, 6]
    assert ranks_of(BASELINES["evbmf"](curves, [parse_budget("macs", str(60 * 4))]), 2) == [1, 3]


def test_random_is_within_the_budget_and_follows_its_seed():
    torch.manual_seed(0)
    model = CifarResNet(1, channels=3, classes=10)
    net = trace(model, torch.zeros(1, 3, 16, 16))
    curves = rank_curves(model, net, LayerRules(("im2col", "spatial")))
    budgets = [parse_budget("flops", "30%")]
    plans = [BASELINES["random"](curves, budgets, seed=seed) for seed in (0, 0, 1, 2)]
    dense = plan_cost(net, RankPlan()).macs
    assert all(plan_cost(net, plan).macs <= 0.3 * dense for plan in plans)
    assert plans[0] == plans[1]
    assert len({plan.digest() for plan in plans}) == 3


@pytest.mark.parametrize("name", [n for n, low in LOWERINGS.items() if low.has_rank and n != "cp"])
def test_spectra_give_the_curve_and_multiples_are_a_part_of_it(name):
    lowering = LOWERINGS[name]
    spec = LayerSpec(24, 16) if name in ("svd", "svd_pivoted") else LayerSpec.conv(16, 72, (3, 3), groups=1)
    weight = torch.randn(spec.weight_shape, generator=torch.Generator().manual_seed(0))
    curve = lowering.curve(weight, spec)
    assert curve.removed[-1] == pytest.approx(0, abs=1e-6)
    for spectrum in curve.spectra:
        assert (np.diff(spectrum.squared, axis=1) <= 1e-6).all()
        energy = float(weight.double().square().sum())
        assert spectrum.squared.sum() == pytest.approx(energy, rel=1e-5)
    assert len(curve.spectra) == len(sides(lowering.full_rank(spec)))
    if len(curve.spectra) == 1:
        values = curve.spectra[0].squared.sum(axis=0)
        assert curve.removed == pytest.approx(1 - np.cumsum(values) / values.sum(), abs=1e-6)
    fours = lowering.curve(weight, spec, multiple=4)
    assert fours.ranks == lowering.ranks(spec, 4)
    known = dict(zip(curve.ranks, curve.removed, strict=True))
    for rank, removed in zip(fours.ranks, fours.removed, strict=True):
        assert all(side % 4 == 0 for side in sides(rank))
        assert rank not in known or removed == pytest.approx(known[rank], abs=1e-12)


def test_greedy_takes_the_cheapest_candidate_of_a_level_and_counts_its_evaluations():
    curves, calls = diagonal_net(STEEP, FLAT), []

    def score(plan: RankPlan) -> float:
        calls.append(plan)
        lost = sum(float(o.removed[o.choices.index(plan[o.layer.name])]) for o in curves.layers)
        return 100 * (1 - lost)

    told = []
    scores = measure_scores(curves, score, lambda done, total: told.append((done, total)))
    assert scores.evaluations == len(calls) == told[-1][0] == told[-1][1]
    assert scores.evaluations <= 1 + 2 * len(RATIOS)
    assert scores.dense == 100
    # the steep layer scores 99.8 at its smallest candidate, so it never needs more than that
    (steep, flat) = ranks_of(greedy(curves, budget(8), scores=scores), 2)
    smallest = curves.layers[0].choices[candidates(curves.layers[0])[0]].rank
    assert steep == smallest
    assert steep < flat <= 8 - steep


def test_greedy_takes_a_noisy_score_to_rise_with_the_cost():
    curves = diagonal_net(HALVES, HALVES)
    noise = iter(np.random.default_rng(0).uniform(50, 100, 1000))
    scores = measure_scores(curves, lambda plan: next(noise))
    for _, values in scores.layers.values():
        assert (np.diff(values) >= 0).all()


@pytest.fixture
def conv_net() -> tuple[nn.Module, LayerRules]:
    torch.manual_seed(0)
    return CifarResNet(1, channels=3, classes=10), LayerRules(("im2col", "tucker2", "cp"), include=("layer2.*",))


def curves_of(model: nn.Module, rules: LayerRules, known: CurveCache) -> Curves:
    return rank_curves(model, trace(model, torch.zeros(1, 3, 8, 8)), rules, known)


def test_curves_are_kept_by_content(conv_net, tmp_path, monkeypatch):
    model, rules = conv_net
    path = tmp_path / "study" / "curves.safetensors"
    known = CurveCache(path)
    first = curves_of(model, rules, known)
    known.save()
    again = CurveCache(path)
    assert len(again) == known.__len__() > 0
    with monkeypatch.context() as patch:
        for name in ("im2col", "tucker2", "cp"):
            patch.setattr(type(LOWERINGS[name]), "curve", lambda *a, **k: pytest.fail("decomposed again"))
        second = curves_of(model, rules, again)
    for mine, theirs in zip(first.layers, second.layers, strict=True):
        assert mine.choices == theirs.choices
        for field in ("removed", "residual", "macs", "params"):
            assert (getattr(mine, field) == getattr(theirs, field)).all()
        assert mine.spectra.keys() == theirs.spectra.keys()
        for name, spectra in mine.spectra.items():
            for s, t in zip(spectra, theirs.spectra[name], strict=True):
                assert s.shape == t.shape
                assert (s.squared == t.squared).all()
    stamp = path.stat().st_mtime_ns
    again.save()
    assert path.stat().st_mtime_ns == stamp


def test_another_weight_lowering_or_multiple_is_another_curve(conv_net, tmp_path):
    model, rules = conv_net
    known = CurveCache(tmp_path / "curves.safetensors")
    curves_of(model, rules, known)
    count = len(known)
    model.layer2[0].conv2.weight.data[0, 0, 0, 0] += 1
    curves_of(model, rules, known)
    assert len(known) == count + 3
    curves_of(model, LayerRules(("im2col",), include=("layer2.0.conv2",), rank_multiple=2), known)
    assert len(known) == count + 4
    curves_of(model, LayerRules(("channel",), include=("layer2.0.conv2",)), known)
    assert len(known) == count + 5


@pytest.mark.parametrize(
    "damage", [lambda data: b"no safetensors", lambda data: data[: len(data) // 2], lambda data: b""]
)
def test_a_damaged_file_is_made_anew(conv_net, tmp_path, damage):
    model, rules = conv_net
    path = tmp_path / "curves.safetensors"
    known = CurveCache(path)
    expected = curves_of(model, rules, known)
    known.save()
    path.write_bytes(damage(path.read_bytes()))
    fresh = CurveCache(path)
    assert len(fresh) == 0
    found = curves_of(model, rules, fresh)
    assert (found.layers[3].removed == expected.layers[3].removed).all()
    fresh.save()
    assert len(CurveCache(path)) == len(known)
