"""Matched steps: gradients of a lowered layer's factors, scaled so that steps move the layer's weight about as far as those of a dense one.

For W = A B a step of SGD on the factors is ΔW = -lr (G BᵀB + A Aᵀ G), where a step on W is -lr G. How large BᵀB and A Aᵀ are depends on
how W is written: a pivoted form has many coefficients of up to one. So each factor's gradient is divided by its reach, the mean square by
which W moves with one of the factor's numbers. That is a mean over directions: in the leading ones a step is still several times as long.
Adam divides by the gradient's size itself and does not notice, unless gradients are clipped by their norm, which is that of the scaled
ones. Weight decay is not scaled.

It does **not** help where a weight is so small that training moves it by more than its own size: its reach is small then and grows, and
nothing is multiplied by more than 1 / `LEAST`.

Reference: Tong, Ma & Chi 2021, arXiv 2005.08898 (ScaledGD, which divides by the matrices BᵀB and AAᵀ instead of their mean).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import isfinite

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ranksearch.errors import UsageError
from ranksearch.lowering.chain import Chain
from ranksearch.lowering.contract import Lowering
from ranksearch.lowering.spec import LayerSpec
from ranksearch.lowering.tiled import rebuilt

MATCHED, PLAIN = STEPS = ("matched", "plain")
"""What a recipe says of the factors' steps."""
LEAST = 0.1
"""The least that a gradient is divided by."""
DRAWS, MANY = 4, 10_000
"""Random directions that a factor is moved in; a single one where it has that many numbers, which average by themselves."""


@torch.no_grad()
def reaches(model: nn.Module) -> dict[str, float]:
    """Parameter name -> the mean square by which its layer's weight moves with one of its numbers, of all factors that are trained."""
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    found: dict[str, float] = {}
    for lowering, spec, stored in _factored(model):
        exact = [_in_fp32(factor) for factor in stored]
        whole = lowering.reconstruct(exact, spec)
        for place, factor in enumerate(stored):
            name = names.get(id(factor))
            if name is not None and name not in found and factor.numel():
                found[name] = max(LEAST, _reach(lowering, spec, exact, place, whole))
    return {name: reach for name, reach in found.items() if isfinite(reach)}


def match_steps_(model: nn.Module, reach: Mapping[str, float] | None = None) -> list[RemovableHandle]:
    """Divides the gradients of a compressed net's factors by their reaches, from now on, for SGD in a training loop of one's own.

    Args:
        reach: what `reaches` said of this net earlier, for a training that goes on; left out, it is measured.

    Returns:
        A hook per factor; `remove()` ends it. Two calls divide twice.

    Raises:
        UsageError: nothing was measured before, and the net has no factors that are trained.
    """
    if reach is None and not (reach := reaches(model)):
        raise UsageError(
            "match_steps_: this net has no factors that are trained: pass one that `ranksearch.compress` or `ranksearch.load` made."
        )
    parameters = dict(model.named_parameters())
    return [parameters[name].register_hook(_divided_by(found)) for name, found in reach.items()]


def _divided_by(reach: float) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient / reach


def _in_fp32(factor: Tensor) -> Tensor:
    """A factor of 16 bits in fp32, where neither its sums overflow nor a small move is lost; an index as it is."""
    return factor.float() if factor.is_floating_point() and factor.element_size() < 4 else factor


def _factored(model: nn.Module) -> Iterator[tuple[Lowering, LayerSpec, Sequence[Tensor]]]:
    """The lowered layers of a net, with what they store."""
    for module in model.modules():
        if isinstance(module, Chain):
            yield module.lowering, module.spec, module.stored_factors
        elif (found := rebuilt(module)) is not None:
            yield found.lowering, found.spec, found.lowering.stored_weights(module)


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
