"""A plan in the words of other libraries: PEFT's LoRA patterns, torchao's PAT config, plain JSON.

Both know one matrix a layer and its rank: a Linear's own (`svd`) and a convolution's T x S·k (`im2col`), pivoted or not. What a plan does
otherwise (tensor formats, groups, transposed convolutions, a part of a packed attention) is left out by name and reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import nn

from ranksearch.errors import UsageError, nearest
from ranksearch.lowering import lowering_named
from ranksearch.lowering.contract import sides
from ranksearch.model.attention import IN_PROJ, OUT_PROJ
from ranksearch.model.plan import LayerPlan, RankPlan
from ranksearch.model.slots import Slot, slots_of

ONE_MATRIX = ("svd", "im2col")
"""Lowerings, or plain forms of them, whose matrix the other libraries have, too."""
HALF = 0.5
"""PAT cuts the ceiling of a share of the singular values: a share half a value lower is safe from rounding."""


def plan_to(plan: RankPlan, form: str, *, model: nn.Module, period: int | None = None) -> dict[str, Any]:
    """`plan` as `form` has it: "peft", "torchao" or "json".

    - "peft": arguments of `peft.LoraConfig`: `target_modules`, `rank_pattern`, `alpha_pattern` (alpha = rank, a scale of 1). PEFT then
      learns updates of these ranks beside the dense weights; it does not make the net smaller.
    - "torchao": `config`, a pruning config of torchao.prototype.pat: for every weight `SVDGrouper`, `MinRankConstraint` and the
      `min_sparsity` (share of the singular values that are cut) that leaves the plan's rank, every `prox_freq` = `period` steps.
    - "json": the plan itself, as `plan.json` holds it.

    Args:
        model: the dense net of the plan, of any weights.
        period: optimizer steps between projections; left out, torchao's own default (every step).

    Returns:
        What JSON holds; in the first two forms `left_out` gives the reason for every other layer.

    Raises:
        UsageError: an unknown form, a period below 1, a plan that does not fit the model, or one that the form can express nothing of.
    """
    if form not in FORMS:
        raise UsageError(f"A plan is written for one of {', '.join(FORMS)}, not {form!r}. {nearest(form, FORMS)}")
    if period is not None and period < 1:
        raise UsageError(f"period is a number of optimizer steps >= 1, got {period}.")
    slots = slots_of(model, plan)
    left_out = {name: why for name, (slot, choice) in slots.items() if (why := _why_not(slot, choice, form))}
    if form != "json" and len(left_out) == len(slots):
        reasons = "".join(f"\n  {name}: {why}" for name, why in left_out.items())
        raise UsageError(f"Nothing of this plan can be expressed for {form}.{reasons}")
    kept = {name: pair for name, pair in slots.items() if name not in left_out}
    return FORMS[form](plan, kept, left_out, period)


def _why_not(slot: Slot, choice: LayerPlan, form: str) -> str | None:
    if lowering_named(choice.lowering).curve_name not in ONE_MATRIX:
        return f"{choice.lowering} is not one matrix of one rank: plan with lowerings {', '.join(ONE_MATRIX)}."
    if (slot.spec.lookup or slot.spec.tied) and form == "peft":
        return "PEFT adapts an embedding, and a head tied to it, in a way of its own."
    if slot.spec.is_conv and (slot.spec.groups > 1 or slot.spec.transposed):
        return "a grouped or transposed convolution is another matrix there."
    if slot.is_made and form == "torchao":
        return "its weight is made of other parameters, which the config cannot name."
    if slot.inside is not None and form == "peft":
        return "PEFT adapts no projections of an nn.MultiheadAttention and no matrices of an LSTM, GRU, RNN or of fused experts."
    if slot.attention is not None and slot.name.rpartition(".")[2] not in (IN_PROJ, OUT_PROJ):
        return "a part of an attention's packed weight has no name there."
    if slot.experts is not None:
        return "an expert's matrix is a part of a stacked weight and has no name of its own there."
    return None


def _rank(choice: LayerPlan) -> int:
    (rank,) = sides(choice.rank)
    return rank


LoweredSlots = dict[str, tuple[Slot, LayerPlan]]


def _json(plan: RankPlan, kept: LoweredSlots, left_out: dict[str, str], period: int | None) -> dict[str, Any]:
    return plan.to_dict()


def _peft(plan: RankPlan, kept: LoweredSlots, left_out: dict[str, str], period: int | None) -> dict[str, Any]:
    ranks = {path: _rank(choice) for slot, choice in kept.values() for path in slot.paths}
    patterns = {f"^{re.escape(path)}": rank for path, rank in ranks.items()}
    most = max(ranks.values())
    return {
        "peft_type": "LORA", "r": most, "lora_alpha": most, "target_modules": list(ranks),
        "rank_pattern": patterns, "alpha_pattern": patterns, "left_out": left_out,
    }  # fmt: skip


def _torchao(plan: RankPlan, kept: LoweredSlots, left_out: dict[str, str], period: int | None) -> dict[str, Any]:
    config = {}
    for slot, choice in kept.values():
        lowering, rank = lowering_named(choice.lowering), _rank(choice)
        (full,) = sides(lowering.full_rank(slot.spec))
        cut = max(0.0, (full - rank - HALF) / full)
        group = {"group_type": "SVDGrouper", "prox_type": "MinRankConstraint", "min_sparsity": cut, "rank": rank}
        config[_parameter(slot)] = group | ({} if period is None else {"prox_freq": period})
    return {"config": config, "left_out": left_out}


def _parameter(slot: Slot) -> str:
    """The weight's name in the dense net."""
    if slot.recurrent is not None:
        inside, _, part = slot.name.rpartition(".")
        return f"{inside}.weight_{part}".removeprefix(".")
    if slot.attention is not None and slot.name.rpartition(".")[2] == IN_PROJ:
        return f"{slot.name}_weight"
    return f"{slot.name}.weight"


FORMS: dict[str, Callable[[RankPlan, LoweredSlots, dict[str, str], int | None], dict[str, Any]]] = {
    "peft": _peft,
    "torchao": _torchao,
    "json": _json,
}
