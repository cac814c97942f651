"""Opening fused experts: the same mixture with every expert's matrices as plain Linears, which then are lowered like any other.

Hugging Face's mixtures keep the matrices of all E experts as two parameters, `gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I] (some
transposed, with biases, or without a gate), and compute with them by one of several operators, so there is no layer to replace. Opened,
expert e has the Linears `gate_up_proj.e` and `down_proj.e`; an allocation gives those of one stacked weight one rank, so that a net costs
the same wherever its tokens go. They run one after the other over their own tokens, as in the `eager` implementation. That loop costs
time where experts are many and small: lowering saves MACs and parameters, and saves time only where the matrices are large. What a
class computes is not guessed from its name: it is run against the opened form, and refused where they differ.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ranksearch.errors import first_line
from ranksearch.lowering.chain import class_of
from ranksearch.model.attention import hooks_refusal, linear
from ranksearch.model.copying import copied

GATED, UP, DOWN = "gate_up_proj", "up_proj", "down_proj"
_TRIED: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
"""Module -> why it cannot be opened, "" where it can: what its class computes does not change."""


def are_experts(module: Any) -> bool:
    """Whether a module holds the matrices of several experts as two parameters of three dimensions."""
    stacked = [module._parameters.get(name) for name in (_first(module), DOWN)]
    return all(p is not None and p.dim() == 3 for p in stacked)


def experts_refusal(module: Any) -> str | None:
    """Why fused experts cannot be opened; None where they can."""
    name, known = type(module).__name__, _names(module)
    others = [n for n, p in module._parameters.items() if p is not None and p.dim() > 1 and n not in known]
    if others:
        return f"{name} computes with {', '.join(others)} beside its experts' matrices."
    counts = {n: len(module._parameters[n]) for n in known}
    if len(set(counts.values())) > 1:
        return f"{name} holds its experts' matrices in different numbers: {', '.join(f'{count} of {n}' for n, count in counts.items())}."
    if not all(module._parameters[n].is_floating_point() for n in known):
        return f"the weights of {name} are {module._parameters[known[0]].dtype}, not floating point."
    if "forward" in vars(module) or "_apply_gate" in vars(module):
        return f"this {name} has a forward or a gate of its own."
    if getattr(module, "_is_expert_parallel", False):
        return f"{name} holds only a part of the experts (expert parallelism)."
    if (reason := hooks_refusal(module)) is not None:
        return reason
    if module not in _TRIED:
        _TRIED[module] = _tried(module) or ""
    return _TRIED[module] or None


def parts(module: Any) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """(name of the Linear that it becomes, weight [T, S], bias) of every expert's matrices, all views."""
    for name in (_first(module), DOWN):
        stacked, bias = module._parameters[name], module._parameters.get(f"{name}_bias")
        stacked = stacked.mT if getattr(module, "is_transposed", False) else stacked
        for e, weight in enumerate(stacked.unbind()):
            yield f"{name}.{e}", weight, None if bias is None else bias[e]


def bias_of(module: Any, part: str) -> Tensor:
    """A view of the bias of the matrix `part` of fused experts."""
    name, _, e = part.partition(".")
    bias: Tensor = module._parameters[f"{name}_bias"]
    return bias[int(e)]


def tokens_of_each(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    """How many tokens every expert gets in a call of fused experts."""
    _, index, _ = _given(_inputs(module), args, kwargs)
    count = len(module._parameters[DOWN])
    return torch.bincount(index.flatten(), minlength=count)[:count].tolist()  # an index beyond them is nobody's


class OpenExperts(nn.Module):
    """Experts over plain Linears; takes and returns what the module that it was did, and is an instance of its class, too."""

    argument_names: tuple[str, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the module's: tokens [N, H], the experts of each [N, k] and their shares [N, k] -> [N, H]."""
        wide: Any = getattr(self, _first(self))
        down: Any = getattr(self, DOWN)

        def expert(e: int, x: Tensor) -> Tensor:
            return _expert(self, wide[e], down[e], x)

        return _mixed(expert, len(down), *_given(self.argument_names, args, kwargs))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickles the module's class, from which the opened one's is made again."""
        return _opened, (type(self).__bases__[1],), self.__getstate__()  # type: ignore[misc]


def _opened(base: type) -> Any:
    made: Any = class_of(base, OpenExperts)
    return made.__new__(made)


def open_experts_(model: nn.Module, path: str) -> None:
    """Opens the fused experts `path`, in place: their parameters become those of Linears."""
    module: Any = model.get_submodule(path)
    layers: dict[str, list[nn.Module]] = {_first(module): [], DOWN: []}
    for part, weight, bias in parts(module):
        layer = linear(weight.detach().contiguous(), None if bias is None else bias.detach())
        layers[part.partition(".")[0]].append(layer.requires_grad_(weight.requires_grad).train(module.training))
    module.argument_names = _inputs(module)
    for name in _names(module):
        del module._parameters[name]
    for name, held in layers.items():
        module._modules[name] = nn.ModuleList(held).train(module.training)
    module.__class__ = class_of(type(module), OpenExperts)


def with_open_experts(model: nn.Module) -> nn.Module:
    """The model, or a copy in which all fused experts that can be are opened, for a format that has no operator for them."""
    return open_all_experts_(copied(model)) if any(map(are_experts, model.modules())) else model


def open_all_experts_(model: nn.Module) -> nn.Module:
    """Opens all fused experts of the model that can be, in place, and returns it."""
    for path in [path for path, m in model.named_modules() if are_experts(m) and experts_refusal(m) is None]:
        open_experts_(model, path)
    return model


def _first(module: Any) -> str:
    return UP if UP in module._parameters or UP in module._modules else GATED


def _names(module: Any) -> list[str]:
    """The parameters that fused experts are made of."""
    names = [f"{name}{end}" for name in (_first(module), DOWN) for end in ("", "_bias")]
    return [name for name in names if module._parameters.get(name) is not None]


def _inputs(module: Any) -> tuple[str, ...]:
    """The names of what its forward takes."""
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def _given(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    tokens, index, shares = (*args, *(kwargs[name] for name in names[len(args) :]))
    return tokens, index, shares


def _expert(module: Any, wide: Callable[[Tensor], Tensor], down: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """One expert over its tokens, [n, H] -> [n, H]."""
    y = down(_gated(module, wide(x)))
    return module.post_expert_norm(y) if getattr(module, "has_post_expert_norm", False) else y


def _gated(module: Any, wide: Tensor) -> Tensor:
    """[n, 2I] -> [n, I], as the class does it or by its activation; without a gate [n, I] -> [n, I]."""
    if _first(module) == UP:
        return module.act_fn(wide)  # type: ignore[no-any-return]
    if hasattr(type(module), "_apply_gate"):
        return module._apply_gate(wide)  # type: ignore[no-any-return]
    gate, up = wide.chunk(2, dim=-1)
    return module.act_fn(gate) * up  # type: ignore[no-any-return]


def _mixed(
    expert: Callable[[int, Tensor], Tensor], count: int, tokens: Tensor, index: Tensor, shares: Tensor
) -> Tensor:
    """The sum over every token's experts of share times output. An exported graph has all experts: other tokens choose others."""
    written_down = torch.compiler.is_exporting() or torch.jit.is_tracing()
    found = torch.zeros_like(tokens)
    for e in range(count) if written_down else index.unique().tolist():
        if e >= count:  # nobody's, as where a token is masked
            continue
        rows, place = torch.where(index == e)
        y = expert(e, tokens[rows]) * shares[rows, place, None]
        found.index_add_(0, rows, y.to(found.dtype))
    return found


@torch.no_grad()
def _tried(module: Any) -> str | None:
    """Why a class does not compute what its opened form does; None where it does, on tokens of several sizes for every expert.

    On the meta device nothing is computed, and the names and shapes alone are known.
    """
    kind, names = type(module).__name__, _inputs(module)
    if len(names) != 3:
        return f"{kind} takes ({', '.join(names)}), not tokens, their experts and the shares of these."
    matrices = list(parts(module))
    count, stacked = len(matrices) // 2, module._parameters[DOWN]
    if stacked.is_meta or not all(module._parameters[name].isfinite().all() for name in _names(module)):
        return None
    draw = torch.Generator().manual_seed(0)
    chosen = torch.arange(count)[:, None].add(torch.arange(min(2, count))) % count
    tokens = torch.randn(count, matrices[0][1].shape[1], generator=draw) * 8 ** torch.linspace(-1, 1, count)[:, None]
    shares = torch.rand(chosen.shape, generator=draw) + 0.1
    x, index, share = tokens.to(stacked), chosen.to(stacked.device), shares.to(stacked)

    def matrix(place: int) -> Callable[[Tensor], Tensor]:
        return lambda rows: F.linear(rows, *matrices[place][1:])

    try:
        with torch.autocast(stacked.device.type, enabled=False):
            wanted = type(module).forward(module, x, index, share)
            found = _mixed(lambda e, rows: _expert(module, matrix(e), matrix(count + e), rows), count, x, index, share)
        error = float((wanted.double() - found.double()).abs().max() / wanted.double().abs().max().clamp_min(1e-30))
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError, ImportError) as failure:
        return f"{kind} does not compute as experts do that are run one by one: {first_line(failure)}"
    if not error <= torch.finfo(stacked.dtype).eps ** 0.5:
        return f"{kind} computes something else than its experts one by one do (off by {error:.2g})."
    return None
