"""A sentence encoder (MiniLM, 6 layers, 36 Linears) at 80, 60 and 50 % of its Linears' parameters: how near its embeddings stay.

  svd        truncated SVDs of the weights, every layer at the same share of its parameters; `svd_bias` and `svd_sequential` as below
  whitened   the same ranks in the metric of the inputs
  kfac       the same ranks in the metric of inputs and output gradients
  allocated  svd in that metric, ranks across layers by the allocation (sensitivity kfac)
  ours       the same with the pivoted form, whose rank costs less
  bias       ours, the biases fitted to what the dense layers compute
  sequential ours, layer after layer fitted to the dense outputs from what the lowered layers before it make
  trained    ours after 300 steps of projection training on other texts, distilled from the dense embeddings of texts and tokens

Embeddings are compared by cosine with the dense net's, on 300 texts that nothing else sees; `kept` is the share of them whose nearest
neighbour among the others stays the same. Second moments and gradients are of 200 other texts. All texts are docstrings of installed
packages, their first 64 tokens (`encoder.py`). Gradients are those of random directions of the embedding: its Gauss-Newton matrix.

    python scripts/bench_encoder.py [--json]      hours of training on one core: --steps 0 leaves it out (minutes)
    python scripts/bench_encoder.py --quick       all others at 50 % on 60 texts; no training
"""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from typing import Any

import torch
from encoder import TOKENS, Encoder, minilm, texts
from report import Report, arguments
from torch import Tensor, nn

import ranksearch
from ranksearch.calibration.calibrate import FITS
from ranksearch.calibration.drawn import drawn_directions_loss
from ranksearch.compress import LayerPlan, Net, RankPlan, dense_cost, plan_cost, trace

CALIBRATION, HELD_OUT, TRAINING, BATCH = 200, 300, 6000, 20
STEPS, STEP_BATCH, FACTOR_SHARE, PERIOD, LR = 300, 32, 0.5, 25, 1e-4
ENCODER = "bert.encoder.*"


def batches(ids: Tensor) -> list[Tensor]:
    return list(ids.split(BATCH))


@torch.no_grad()
def embedded(model: nn.Module, ids: Tensor) -> Tensor:
    return torch.cat([model(part) for part in batches(ids)])


def scores(embeddings: Tensor, dense: Tensor) -> tuple[float, float]:
    """(mean cosine with the dense embeddings, share of nearest neighbours kept)"""

    def nearest(x: Tensor) -> Tensor:
        return (x @ x.T).fill_diagonal_(-2).argmax(dim=1)

    return float((embeddings * dense).sum(dim=1).mean()), float((nearest(embeddings) == nearest(dense)).float().mean())


def distance(found: Tensor, wanted: Tensor) -> Tensor:
    """1 - cosine along the last axis, its mean."""
    return (1 - nn.functional.cosine_similarity(found, wanted, dim=-1)).mean()


def uniform(net: Net, share: float) -> RankPlan:
    """Every Linear at that share of its parameters, bias left out."""
    plan = {}
    for layer in net.layers:
        outputs, inputs = layer.spec.out_channels, layer.spec.in_channels
        plan[layer.name] = LayerPlan("svd", int(share * outputs * inputs / (outputs + inputs)))
    return RankPlan(plan)


def trained(model: Encoder, small: nn.Module, plan: RankPlan, weightings: Any, ids: Tensor, steps: int) -> nn.Module:
    """Projection training for the first half, then of the factors; the targets are the dense embeddings of texts and of their tokens."""
    generator = torch.Generator().manual_seed(0)
    dense_steps = round((1 - FACTOR_SHARE) * steps)

    def run(net: nn.Module, first: int, last: int, project: bool) -> Any:
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=LR, weight_decay=0.0)
        projection = (
            ranksearch.project_every(net, optimizer, plan, period=PERIOD, weightings=weightings) if project else None
        )
        for step in range(first, last):
            optimizer.param_groups[0]["lr"] = LR * min(1.0, (step + 1) / 20) * (1 - step / steps)
            chosen = ids[torch.randint(len(ids), (STEP_BATCH,), generator=generator)]
            with torch.no_grad():
                wanted = model.of_tokens(chosen)
            tokens = net.of_tokens(chosen)
            loss = distance(tokens.mean(dim=1), wanted.mean(dim=1)) + distance(tokens, wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if projection is not None:
            projection.finish()
            return projection.compress()
        return net

    whole = copy.deepcopy(model).requires_grad_(False)
    for name in plan.layers:
        whole.get_submodule(name).requires_grad_(True)
    ranksearch.project_(whole, plan, weightings=weightings)
    return run(run(whole, 0, dense_steps, True), dense_steps, steps, False).eval()


def main() -> None:
    parser = arguments(__doc__, steps=STEPS)
    parser.add_argument(
        "--shares", default="80,60,50", help="percent of the Linears' parameters (default: %(default)s)"
    )
    options = parser.parse_args()
    report, figures = Report("bench_encoder", options), {}
    torch.manual_seed(options.seed)
    tokenizer, model = minilm()
    quick = options.quick
    shares, held_out = ([50], 60) if quick else ([int(share) for share in options.shares.split(",")], HELD_OUT)
    calibration_count = 60 if quick else CALIBRATION
    steps = 0 if quick else options.steps
    ids = texts(tokenizer, calibration_count + held_out + (TRAINING if steps else 0))
    calibration, test, training = ids.split([calibration_count, held_out, len(ids) - calibration_count - held_out])
    model.requires_grad_(False)
    traced = trace(model, calibration[:2])
    layers = tuple(layer for layer in traced.layers if layer.name.startswith("bert.encoder"))
    net = replace(traced, layers=layers)
    weights = sum(layer.spec.out_channels * layer.spec.in_channels for layer in layers)
    dense = embedded(model, test)
    loss = drawn_directions_loss(torch.Generator().manual_seed(0))
    model.requires_grad_(True)
    started = time.perf_counter()
    inputs = ranksearch.weightings(model, calibration[:2], batches(calibration), metric="inputs")
    both = ranksearch.weightings(model, calibration[:2], batches(calibration), metric="kfac", loss="directions")
    report.say(f"{len(layers)} Linears, {weights} weights; second moments in {time.perf_counter() - started:.0f} s")

    def score(name: str, share: int, small: nn.Module, plan: RankPlan) -> None:
        cosine, kept = scores(embedded(small, test), dense)
        taken = 1 - (dense_cost(traced).params - plan_cost(traced, plan).params) / weights
        report.rows.append({"share": share, "method": name, "cosine": cosine, "kept": kept, "params_share": taken})
        figures[f"cosine_{share}_{name}"] = cosine
        report.say(f"{share} % {name}: {cosine:.4f}")

    for share in shares:
        flat = uniform(net, share / 100)
        for name, weightings in (("svd", None), ("whitened", inputs), ("kfac", both)):
            score(name, share, ranksearch.compress(model, flat, weightings=weightings), flat)
        for fit in FITS:
            score(f"svd_{fit}", share, ranksearch.calibrate(model, flat, [calibration], fit=fit), flat)
        limit = dense_cost(traced).params - round((1 - share / 100) * weights)
        for name, lowering in (("allocated", "svd"), ("ours", "svd_pivoted")):
            plan = ranksearch.allocate(
                model, calibration[:2], {"params": limit}, lowerings=[lowering], include=[ENCODER], sensitivity="kfac",
                calibration=batches(calibration), loss=loss, weightings=both,
            )  # fmt: skip
            small = ranksearch.compress(model, plan, weightings=both).eval()
            score(name, share, small, plan)
        for fit in FITS:
            score(fit, share, ranksearch.calibrate(model, plan, [calibration], fit=fit, weightings=both), plan)
        if steps:
            score("trained", share, trained(model, small, plan, both, training, steps), plan)
    note = f"{held_out} held-out texts, {calibration_count} for the statistics, of {TOKENS} tokens each; {steps} training steps"
    report.finish(figures, [note])


if __name__ == "__main__":
    main()
