"""A compressed net checked as a whole: that it costs what its plan says, calls what was lowered, and computes what it should.

Two forward passes: one of the dense net projected in place (which shows what every layer gets), one of the compressed net. It is done
wherever a compressed net appears: in `compress`, where a trial decomposes, before an export and where a study's net is loaded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ranksearch.errors import UsageError
from ranksearch.lowering.chain import Chain, Computed
from ranksearch.lowering.pivoted_layers import stored_pivots
from ranksearch.lowering.tiled import settle_, stores_factors
from ranksearch.model.attention import IN_PROJ, OUT_PROJ, QKV
from ranksearch.model.bare import bare
from ranksearch.model.copying import copied
from ranksearch.model.cost import plan_cost
from ranksearch.model.counting import counter, macs
from ranksearch.model.experts import bias_of, open_all_experts_
from ranksearch.model.inputs import batch_size, call, cast, moved, tensors
from ranksearch.model.plan import RankPlan
from ranksearch.model.slots import Slot, find_slots, slots_of
from ranksearch.model.trace import Net, traced
from ranksearch.model.undisturbed import own, undisturbed

TOLERANCE = 1e-4
"""The largest allowed max |a - b| / max |a|, with a the outputs of the projected net and b those of the compressed one."""


@stored_pivots()
def check_whole(model: nn.Module, small: nn.Module, plan: RankPlan, example_input: Any) -> None:
    """Holds `small`, which `compress(model, plan)` made, to `model` and `plan` on one example input.

    Raises:
        UsageError: a lowered layer that is not called, MACs other than planned, or outputs other than those of the dense net projected
            in place; the text names layers to exclude.
    """
    dense = copied(bare(model))
    _project_(dense, small, plan)
    if stores_factors(small):  # as it runs: what is rebuilt from factors is so once
        small = settle_(copied(small))
    _compare(dense, small, plan, moved(example_input, _device(dense)))


def check_rebuilt(small: nn.Module, plan: RankPlan, dense: nn.Module, example_input: Any) -> None:
    """Holds `small`, a compressed net that was read from its files, to its plan and to the dense net of its architecture.

    Args:
        dense: with any weights; they are lost, since it takes those of `small`.

    Raises:
        UsageError: as `check_whole`.
    """
    _take_over_(dense, small)
    _compare(dense, small, plan, moved(example_input, _device(dense)))


def _device(model: nn.Module) -> torch.device:
    return next(iter(model.parameters())).device


def _chains(small: nn.Module, plan: RankPlan) -> dict[str, nn.Module]:
    return {name: small.get_submodule(name) for name, _ in plan.lowered() if _holds(small, name)}


def _compare(dense: nn.Module, small: nn.Module, plan: RankPlan, example_input: Any) -> None:
    try:
        _hold_to(dense, small, plan, example_input)
    except (
        UsageError
    ):  # rounding alone may pass the tolerance in a deep net, or send a token to another expert: settled in fp64
        if not _holds_in_fp64(dense, small, plan, example_input):
            raise


def _hold_to(dense: nn.Module, small: nn.Module, plan: RankPlan, example_input: Any) -> None:
    chains = _chains(small, plan)
    net, wanted = traced(dense, example_input)
    called: set[str] = set()
    hooks = [chain.register_forward_pre_hook(_noting(called, name)) for name, chain in chains.items()]
    try:
        with undisturbed(small), torch.no_grad(), counter() as counted:
            found = call(small, own(example_input))
    finally:
        for hook in hooks:
            hook.remove()
    _check_calls_and_macs(net, plan, chains, called, -(-macs(counted) // batch_size(example_input)))
    error = difference(wanted, found)
    if not error <= TOLERANCE:
        raise UsageError(
            f"The compressed net is off by {error:.2g} (max |a - b| / max |a|, at most {TOLERANCE:g}) from the dense net projected in "
            f"place: its forward pass depends on what its layers are. Exclude some of the lowered layers: {_named(list(chains))}."
        )


def _check_calls_and_macs(
    net: Net, plan: RankPlan, chains: dict[str, nn.Module], called: set[str], measured: int
) -> None:
    listed, reasons = {layer.name: layer for layer in net.layers}, dict(net.skipped)
    missing = [name for name in chains if name not in called and name in listed and not listed[name].idle]
    if missing:
        raise UsageError(f"The compressed net does not call {_named(missing)}, which the plan lowers: exclude it.")
    odd = [name for name in called if name not in listed]
    for name in odd:
        if name in reasons:
            raise UsageError(f"Layer {name!r} cannot be lowered: {reasons[name]} Exclude it.")
    planned = plan_cost(net, RankPlan({name: choice for name, choice in plan.layers.items() if name in listed})).macs
    if not odd and abs(measured - planned) > len(net.layers):
        raise UsageError(
            f"The compressed net takes {measured:,} MACs a sample where the plan says {planned:,}: what it computes depends on what its "
            f"layers are. Exclude some of the lowered layers: {_named(list(chains))}."
        )


def _holds_in_fp64(dense: nn.Module, small: nn.Module, plan: RankPlan, example_input: Any) -> bool:
    """Whether both nets run in fp64 and agree there; the dense one stays in it. Fused experts have no operator for it: they are opened."""
    double = open_all_experts_(copied(small)).double()
    try:
        with torch.no_grad():
            for name, slot in find_slots(open_all_experts_(dense).double()).items():
                if _holds(double, name):
                    slot.write_(_weight(double.get_submodule(name)))
        _hold_to(dense, double, plan, cast(own(example_input), torch.float64))
    except (RuntimeError, TypeError, AttributeError, UsageError):
        return False
    return True


def _holds(small: nn.Module, name: str) -> bool:
    try:
        return isinstance(small.get_submodule(name), Chain)
    except AttributeError:
        return False


def _project_(dense: nn.Module, small: nn.Module, plan: RankPlan) -> None:
    """Writes into the dense weights what the lowered layers compute with, so that nothing is decomposed twice."""
    with torch.no_grad():
        for name, (slot, _) in slots_of(dense, plan).items():
            slot.write_(_weight(small.get_submodule(name)))


def _weight(layer: Any) -> Tensor:
    """The dense weight that a layer, lowered or not, computes with."""
    weight: Tensor = layer.weight
    return weight.dense() if isinstance(weight, Computed) else weight


def _take_over_(dense: nn.Module, small: nn.Module) -> None:
    """Gives the dense net the weights that the compressed one computes with."""
    stored = small.state_dict()
    with torch.no_grad():
        for name, tensor in dense.state_dict().items():
            if name in stored and stored[name].shape == tensor.shape:
                tensor.copy_(stored[name])
        for name, slot in find_slots(dense).items():
            try:
                layer: Any = small.get_submodule(name)
            except AttributeError:  # an attention that was opened in its other form
                continue
            if slot.settles and type(layer) is type(dense.get_submodule(name)):
                continue  # it makes its weight there, too, of parameters that it has now
            slot.write_(_weight(layer))
            if slot.inside is not None and layer.bias is not None:
                _bias_inside(dense, slot).copy_(layer.bias)
            for path in slot.paths if slot.inside is None else ():  # layers of one weight have biases of their own
                theirs: Any = getattr(dense.get_submodule(path), "bias", None)
                if theirs is not None:
                    theirs.copy_(small.get_submodule(path).bias)


def _bias_inside(dense: nn.Module, slot: Slot) -> Tensor:
    """A view of the bias of a slot that is part of an attention, a recurrent net or fused experts."""
    attention: Any = dense.get_submodule(slot.inside or "")
    part = slot.name.rpartition(".")[2]
    if slot.experts is not None:
        return bias_of(attention, slot.name.removeprefix(f"{slot.experts}."))
    if slot.recurrent is not None:
        return getattr(attention, f"bias_{part}")  # type: ignore[no-any-return]
    if part == OUT_PROJ:
        return attention.out_proj.bias
    packed: Tensor = attention.in_proj_bias
    return packed if part == IN_PROJ else packed.split(attention.embed_dim)[QKV.index(part)]


def _noting(called: set[str], name: str) -> Any:
    return lambda module, args: called.add(name)


def _named(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(map(repr, names[:4])) + more


def difference(wanted: Any, found: Any) -> float:
    """The largest max |a - b| / max |a| over the tensors of two outputs; infinite where their forms differ."""
    ours, theirs = tensors(wanted), tensors(found)
    if [x.shape for x in ours] != [y.shape for y in theirs]:
        return float("inf")
    return max((_error(x, y) for x, y in zip(ours, theirs, strict=True)), default=0.0)


def _error(a: Tensor, b: Tensor) -> float:
    known = a.isfinite()  # what has diverged says nothing
    a, b = a.double()[known], b.double()[known]
    if a.numel() == 0 or torch.equal(a, b):
        return 0.0
    return float((a - b).abs().max() / a.abs().max().clamp_min(torch.finfo(torch.float32).tiny))
