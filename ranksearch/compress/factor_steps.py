"""Matched steps: gradients of a lowered layer's factors, scaled so that a step on one of them moves the layer's weight as a dense one does.

For W = A B a step of SGD on the factors is ΔW = -lr (G BᵀB + A Aᵀ G), where a step on W is -lr G. How large BᵀB and A Aᵀ are depends on
how W is written: the coefficients of a pivoted form are many and up to one, and those of ResNet-20's last stage make the step twelve times
as long on average. So each factor's gradient is divided by its reach, the mean square by which W moves with one of the factor's numbers. A
rate that suits the dense net then suits the factors; Adam, which divides by the gradient's size, does not notice.

Reference: Tong, Ma & Chi 2021, arXiv 2005.08898 (ScaledGD, which divides by the matrices BᵀB and AAᵀ; by their mean is as good here).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ranksearch.lowering.chain import Chain
from ranksearch.lowering.contract import Lowering
from ranksearch.lowering.spec import LayerSpec
from ranksearch.lowering.tiled import Rebuilt

MATCHED, PLAIN = STEPS = ("matched", "plain")
"""What a recipe says of the factors' steps."""
DRAWS, MANY = 4, 10_000
"""Random directions that a factor is moved in; a single one where it has that many numbers, which average by themselves."""


@torch.no_grad()
def reaches(model: nn.Module) -> dict[str, float]:
    """Parameter name -> the mean square by which its layer's weight moves with one of its numbers, of all factors that are trained."""
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    found: dict[str, float] = {}
    for lowering, spec, stored in _factored(model):
        whole = lowering.reconstruct(stored, spec)
        for place, factor in enumerate(stored):
            name = names.get(id(factor))
            if name is not None and name not in found and factor.numel():
                found[name] = _reach(lowering, spec, stored, place, whole)
    return {name: reach for name, reach in found.items() if reach > 0}


def match_steps_(model: nn.Module, reach: Mapping[str, float]) -> None:
    """Divides the gradients of the parameters that `reaches` named, from now on."""
    for name, parameter in model.named_parameters():
        if name in reach:
            parameter.register_hook(_divided_by(reach[name]))


def _divided_by(reach: float) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient / reach


def _factored(model: nn.Module) -> Iterator[tuple[Lowering, LayerSpec, Sequence[Tensor]]]:
    """The lowered layers of a net, with what they store."""
    for module in model.modules():
        if isinstance(module, Chain):
            yield module.lowering, module.spec, module.lowering.stored_weights(nn.Sequential(*module.layers))
        elif parametrize.is_parametrized(module, "weight"):
            (first, *_) = module.parametrizations["weight"]  # type: ignore[index, union-attr]
            if isinstance(first, Rebuilt):
                yield first.lowering, first.spec, first.lowering.stored_weights(module)


def _reach(lowering: Lowering, spec: LayerSpec, stored: Sequence[Tensor], place: int, whole: Tensor) -> float:
    """The weight is linear in each factor by itself, but for what is constant: a move of any size tells."""
    factor, moved = stored[place], list(stored)
    generator = torch.Generator().manual_seed(place)
    squares, draws = 0.0, DRAWS if factor.numel() < MANY else 1
    for _ in range(draws):
        move = torch.randn(factor.shape, generator=generator, dtype=factor.dtype).to(factor.device)
        moved[place] = factor + move
        squares += float((lowering.reconstruct(moved, spec) - whole).square().sum() / move.square().sum())
    return squares / draws
