"""Slots: where the weights that can be lowered live in a model, and why the others cannot be.

A slot is a weight, not a module: one that several layers share is one slot with several paths, treated once and counted once; the
packed `in_proj_weight` of an `nn.MultiheadAttention` is a slot although no module of that name exists before the
attention is opened (`attention.py`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ranksearch.errors import UsageError, nearest
from ranksearch.lowering import LayerSpec, lowering_named
from ranksearch.lowering.chain import Chain
from ranksearch.model.as_plain import AsPlain, as_plain, settle_, weight_norm_hook
from ranksearch.model.attention import IN_PROJ, OUT_PROJ, QKV, OpenAttention, attention_refusal, hooks_refusal
from ranksearch.model.bare import is_lazy
from ranksearch.model.copying import memory
from ranksearch.model.experts import are_experts, experts_refusal
from ranksearch.model.experts import parts as matrices
from ranksearch.model.plan import LayerPlan, RankPlan
from ranksearch.model.recurrent import OpenRecurrent, parts, recurrent_refusal

KINDS = "Conv1d/2d/3d, ConvTranspose1d/2d/3d, Linear or Embedding"


@dataclass(frozen=True)
class Slot:
    """A weight that can be lowered: the name plans use, its spec, the tensor itself (or a view into a packed one), and who holds it."""

    name: str
    spec: LayerSpec
    weight: Tensor
    paths: tuple[str, ...]
    """Names of the layers that compute with this weight, the slot's own name first."""
    attention: str | None = None
    """The `nn.MultiheadAttention` that it is part of, if any."""
    recurrent: str | None = None
    """The LSTM, GRU or RNN that it is part of, if any."""
    experts: str | None = None
    """The fused experts that it is part of, if any."""
    layer: AsPlain | None = None
    """What the layer computes, if it has a class of its own or a weight that is made of parameters (`as_plain.py`)."""

    @property
    def inside(self) -> str | None:
        """The module that has to be opened for a layer of this name to be there."""
        return next((path for path in (self.attention, self.recurrent, self.experts) if path is not None), None)

    @property
    def is_made(self) -> bool:
        """Whether `weight` is not a parameter itself, but was made of some when the slot was found."""
        return self.layer is not None and bool(self.layer.sources)

    @property
    def settles(self) -> bool:
        """Whether the layer stops making its weight before it is written into."""
        return self.layer is not None and self.layer.settles

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """What an optimizer holds of it."""
        if self.layer is not None and self.layer.sources:
            return self.layer.sources
        turned = self.experts is not None and not self.weight.is_contiguous()
        return (self.weight.mT if turned else self.weight,)

    @property
    def own_params(self) -> int:
        """Parameters beside the spec's that are gone once the layer is lowered."""
        made_of = sum(source.numel() for source in self.parameters)
        return made_of - self.weight.numel() if self.is_made else 0

    def write_(self, weight: Tensor) -> None:
        """Gives the layer another weight."""
        if self.layer is not None and self.layer.write is not None:
            self.layer.write(weight)
        else:
            self.weight.copy_(weight)


def find_slots(model: nn.Module) -> dict[str, Slot]:
    """Every slot of `model` by name. An attention's input projections are offered packed and one by one."""
    return survey(model)[0]


def slots_of(model: nn.Module, plan: RankPlan) -> dict[str, tuple[Slot, LayerPlan]]:
    """The slots that `plan` lowers, with what becomes of them.

    Raises:
        UsageError: a layer that is not there or cannot be lowered, a lowering that refuses it, a rank outside its range; the text
            names the layer, says why, and what is nearest.
    """
    slots, skipped = survey(model)
    found = {}
    for name, choice in plan.lowered():
        if name not in slots:
            raise UsageError(_no_slot(model, name, slots, skipped))
        try:
            lowering_named(choice.lowering).check_rank(slots[name].spec, choice.rank)
        except UsageError as error:
            raise UsageError(f"Layer {name!r}: {error}") from error
        found[name] = slots[name], choice
    return found


def settled_(model: nn.Module, plan: RankPlan) -> nn.Module:
    """The model, in which layers that `plan` lowers and that make their weight by code of their own stop doing so, in place.

    They compute what they did before. What is written into the parameters of a layer that made its weight would not come out again.
    """
    for slot, _ in slots_of(model, plan).values():
        if slot.settles:
            settle_(model.get_submodule(slot.name))
    return model


def _no_slot(model: nn.Module, name: str, slots: dict[str, Slot], skipped: dict[str, str]) -> str:
    for slot in slots.values():
        if name in slot.paths:
            return f"Layer {name!r} shares its weight with {slot.name!r}: name that one, both follow."
    if name in skipped:
        return f"Layer {name!r} cannot be lowered: {skipped[name]}"
    modules = dict(model.named_modules())
    for path in skipped.keys() & modules.keys():
        if name.startswith(f"{path}.") and are_experts(modules[path]):
            return f"Layer {name!r} cannot be lowered, because it is a part of {path!r}: {skipped[path]}"
    kind = type(modules.get(name)).__name__
    what = (
        f"The model has no layer {name!r}."
        if kind == "NoneType"
        else f"Layer {name!r} is a {kind}, not a plain {KINDS}."
    )
    return f"{what} {nearest(name, slots)}"


def _paths(model: nn.Module) -> dict[int, tuple[nn.Module, list[str]]]:
    """Every module once, with all the names it goes by."""
    found: dict[int, tuple[nn.Module, list[str]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found.setdefault(id(module), (module, []))[1].append(name)
    return found


def survey(model: nn.Module) -> tuple[dict[str, Slot], dict[str, str]]:
    """(slots by name; every other layer that has a weight of at least two dimensions, and why it is no slot)"""
    slots: dict[str, Slot] = {}
    skipped: dict[str, str] = {}
    owners: dict[Any, list[str]] = defaultdict(list)
    stored: dict[int, set[Any]] = defaultdict(set)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners[memory(parameter)].append(name)
        if len(memory(parameter)) > 1:
            stored[memory(parameter)[0]].add(memory(parameter))
    sharing: dict[Any, list[tuple[AsPlain, list[str]]]] = defaultdict(list)
    inside: set[int] = set()
    for module, names in _paths(model).values():
        if id(module) in inside:
            continue
        if isinstance(module, nn.MultiheadAttention) and not isinstance(module, OpenAttention):
            inside |= {id(child) for child in module.modules()}
            own = _own(names)
            tied = [
                name for p in module.parameters() for name in owners[memory(p)] if name.rpartition(".")[0] not in own
            ]
            reason = f"this attention shares a weight with {tied[0]!r}." if tied else attention_refusal(module)
            if reason is None:
                slots |= {slot.name: slot for slot in _attention_slots(module, names)}
            else:
                skipped[names[0]] = reason
        elif (opened := _opened(module)) is not None:
            refusal, slots_in = opened
            tied = [n for p in module.parameters() for n in owners[memory(p)] if n.rpartition(".")[0] not in names]
            reason = f"it shares a weight with {tied[0]!r}." if tied else refusal(module)
            if reason is None:
                slots |= {slot.name: slot for slot in slots_in(module, names)}
            else:
                skipped[names[0] or "(the model itself)"] = reason
        elif _has_matrix(module):
            found = as_plain(module)
            reason = _refusal(module, found)
            if reason is None and isinstance(found, AsPlain):
                inside |= {id(child) for child in module.modules()}
                sharing[memory(found.sources[0] if found.sources else found.weight)].append((found, names))
            else:
                skipped[names[0] or "(the model itself)"] = reason or ""
        elif _is_quantised(module):
            skipped[names[0] or "(the model itself)"] = (
                f"{type(module).__name__} is quantised; lower the net first, then quantise it."
            )
    for key, holders in sharing.items():
        first, _ = holders[0]
        names = [name for _, holder in holders for name in holder]
        places = {*names, *(f"{name}.parametrizations.weight".removeprefix(".") for name in names)}
        others = [owner for owner in owners[key] if owner.rpartition(".")[0] not in places]
        beside = [owner for other in stored.get(key[0], set()) - {key} for owner in owners[other]]
        if others:
            skipped |= dict.fromkeys(names, f"its weight is shared with {others[0]!r}, which is no such layer.")
        elif beside:
            skipped |= dict.fromkeys(
                names, f"its weight shares memory with {beside[0]!r}, which sees it in another shape."
            )
        elif len(holders) > 1 and first.sources:
            skipped |= dict.fromkeys(names, f"{' and '.join(map(repr, names))} make their weights of one parameter.")
        elif (head := _tied_head([other.spec for other, _ in holders])) is not None:
            paths = tuple(sorted(names, key=lambda name: isinstance(model.get_submodule(name), nn.Embedding)))
            slots[paths[0]] = Slot(paths[0], head, first.weight, paths)
        elif len({(replace(other.spec, bias=False), other.pad) for other, _ in holders}) > 1:
            reason = f"{' and '.join(map(repr, names))} share a weight, but are different kinds of layer."
            skipped |= dict.fromkeys(names, reason)
        else:
            plain = first.pad is None and not first.sources
            slots[names[0]] = Slot(names[0], first.spec, first.weight, tuple(names), layer=None if plain else first)
    return slots, skipped


def _tied_head(specs: list[LayerSpec]) -> LayerSpec | None:
    """The Linear among layers of one weight, the others being Embeddings of its rows; None where they are others."""
    linear = {replace(spec, bias=False) for spec in specs if not spec.lookup}
    lookups = {spec for spec in specs if spec.lookup}
    if len(linear) != 1 or len(lookups) != 1 or next(iter(linear)).is_conv or next(iter(linear)).transposed:
        return None
    return replace(next(spec for spec in specs if not spec.lookup), tied=True)


def _has_matrix(module: Any) -> bool:
    """Whether the module has a parameter of its own, or a computed weight, of at least two dimensions."""
    if isinstance(module, Chain):
        return True
    weights = [*module._parameters.values(), getattr(module, "weight", None)]
    return any(isinstance(w, Tensor) and (is_lazy(w) or w.dim() > 1) for w in weights)


def _is_quantised(module: Any) -> bool:
    """Whether it is one of torch's quantised layers, whose weight is no parameter but a method."""
    return "quantized" in type(module).__module__ and callable(getattr(module, "weight", None))


def _own(names: list[str]) -> set[str]:
    return {*names, *(f"{name}.{OUT_PROJ}" for name in names)}


def _refusal(module: Any, found: AsPlain | str | None) -> str | None:
    """Why a module with a weight cannot be lowered; None where it can.

    Args:
        found: what `as_plain` says of it.
    """
    if any(map(is_lazy, module._parameters.values())):
        return "it is lazy, and the forward pass does not call it: its shape is not known."
    if isinstance(module, Chain):
        return f"it is lowered already, by {module.lowering.name}."
    if isinstance(found, str):
        return found
    if found is None:
        if "weight" not in module._parameters and isinstance(getattr(module, "weight", None), Tensor):
            return "its weight is computed (spectral norm, pruning or another parametrization); remove that first."
        own = [name for name, p in module._parameters.items() if p is not None and p.dim() > 1]
        if own and next(module.children(), None) is not None:
            return f"{type(module).__name__} computes with {', '.join(own)} itself; the layers in it are treated one by one."
        return f"{type(module).__name__} is no plain {KINDS}."
    if not found.weight.is_floating_point():
        return f"its weight is {found.weight.dtype}, not floating point."
    return hooks_refusal(module, but=weight_norm_hook(module))


def _opened(
    module: nn.Module,
) -> tuple[Callable[[Any], str | None], Callable[[Any, list[str]], Iterator[Slot]]] | None:
    """(why it cannot be opened, its slots) of a module whose matrices are Linears once it is opened; None for any other."""
    if isinstance(module, nn.RNNBase) and not isinstance(module, OpenRecurrent):
        return recurrent_refusal, _recurrent_slots
    return (experts_refusal, _expert_slots) if are_experts(module) else None


def _recurrent_slots(module: Any, names: list[str]) -> Iterator[Slot]:
    """The matrices of a recurrent module, as the Linears that they become."""
    for part, weight, bias in parts(module):
        paths = tuple(f"{path}.{part}".removeprefix(".") for path in names)
        spec = LayerSpec(weight.shape[1], weight.shape[0], bias=bias is not None)
        yield Slot(paths[0], spec, weight, paths, recurrent=names[0])


def _expert_slots(module: Any, names: list[str]) -> Iterator[Slot]:
    """The matrices of fused experts, as the Linears that they become."""
    for part, weight, bias in matrices(module):
        paths = tuple(f"{path}.{part}".removeprefix(".") for path in names)
        spec = LayerSpec(weight.shape[1], weight.shape[0], bias=bias is not None)
        yield Slot(paths[0], spec, weight, paths, experts=names[0])


def _attention_slots(module: Any, names: list[str]) -> Iterator[Slot]:
    """The projections of an attention: packed as one Linear of 3E outputs where it is so, and one by one."""
    name, width, bias = names[0], module.embed_dim, module.in_proj_bias is not None

    def slot(part: str, weight: Tensor, spec: LayerSpec) -> Slot:
        return Slot(f"{name}.{part}", spec, weight, tuple(f"{path}.{part}" for path in names), attention=name)

    if module.in_proj_weight is not None:
        packed = module.in_proj_weight
        yield slot(IN_PROJ, packed, LayerSpec(width, 3 * width, bias=bias))
        weights = [packed[i * width : (i + 1) * width] for i in range(3)]
    else:
        weights = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
    for part, weight in zip(QKV, weights, strict=True):
        yield slot(part, weight, LayerSpec(weight.shape[1], width, bias=bias))
    out = module.out_proj
    yield slot(OUT_PROJ, out.weight, LayerSpec(width, width, bias=out.bias is not None))
