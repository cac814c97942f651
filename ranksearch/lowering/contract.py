"""The `Lowering` contract and what is derived from it.

A lowering is a way to see a layer's weight as matrices (or a small tensor format) and to replace the layer by a chain of
smaller layers at a rank. It states `refusal`, `full_rank`, `factor_specs`, `decompose`, `reconstruct`, `project`, `curve`; costs,
break-even ranks, the ladder of ranks and the built module follow from those, as do the contract tests. A lowering that is a
batch of matrices inherits from `matrix.MatrixLowering` and states only how the weight is unfolded and how the factors are laid out.

One file per lowering; `@register` adds it to the registry, and every file of this folder is imported: nothing else to edit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ranksearch.costs import BYTES_PER_INDEX, BYTES_PER_WEIGHT
from ranksearch.errors import UsageError, nearest
from ranksearch.lowering.spec import Ints, LayerSpec
from ranksearch.lowering.weighting import Weighting

LOWERINGS: dict[str, Lowering] = {}

Rank = int | tuple[int, ...]
"""An int, or one int per side of a format that has several (Tucker-2: input side, output side). 0 is the rank of `dense`."""


LAYER_COSTS = ("macs", "flops", "params", "size")
"""Costs known from a spec and a rank alone. 1 MAC = 2 FLOPs; size in bytes of the export dtype."""

L = TypeVar("L", bound="type[Lowering]")


def register(cls: L) -> L:
    """Class decorator: registers an instance of the lowering, or one per member of a family, under its `name`."""
    for lowering in cls.members():
        if lowering.name in LOWERINGS:
            raise ValueError(f"a lowering named {lowering.name!r} is registered already")
        LOWERINGS[lowering.name] = lowering
    return cls


def lowering_named(name: str) -> Lowering:
    """The lowering `name`.

    Raises:
        UsageError: no such lowering; the text names the nearest one.
    """
    if name not in LOWERINGS:
        raise UsageError(f"There is no lowering {name!r}. {nearest(name, LOWERINGS)}")
    return LOWERINGS[name]


def default_lowerings(*, timed: bool = False) -> tuple[str, ...]:
    """Names of the lowerings that a search takes where none are named: all but the opt-in ones and `dense`, which is always allowed.

    Args:
        timed: whether latency counts. A pivoted form removes the same at less cost, so its plain form is of use only where it is faster.
    """
    fit = {name: it for name, it in LOWERINGS.items() if it.has_rank and not it.opt_in}
    return tuple(name for name, it in fit.items() if timed or it.takes_more or not it.pivoted_ends)


def expand_families(names: Iterable[str]) -> tuple[str, ...]:
    """Lowering names with every family's name (`tiled`) replaced by those of its members.

    Raises:
        UsageError: neither a lowering nor a family; the text names the nearest one.
    """
    families: dict[str, list[str]] = {}
    for lowering in LOWERINGS.values():
        if lowering.family:
            families.setdefault(lowering.family, []).append(lowering.name)
    names = list(names)
    for name in names:
        if name not in LOWERINGS and name not in families:
            raise UsageError(f"There is no lowering {name!r}. {nearest(name, [*LOWERINGS, *families])}")
    return tuple(dict.fromkeys(member for name in names for member in families.get(name, [name])))


class Projected(NamedTuple):
    """A projected weight, the share of ||W||² that was removed (0..1), and what the layer's next projection may start from."""

    weight: Tensor
    removed: float
    warm: Any


class Spectrum(NamedTuple):
    """Squared singular values [b, k], descending, of a batch of n x m matrices, and their shape (n, m)."""

    squared: np.ndarray
    shape: tuple[int, int]


@dataclass(frozen=True)
class RankCurve:
    """What a weight loses at each of `ranks`, from the smallest to the full one. Arrays are [n ranks]."""

    ranks: tuple[Rank, ...]
    removed: np.ndarray
    """Share of ||W||² that projection at the rank removes (an upper bound where the format has no closed-form optimum)."""
    residual: np.ndarray
    """Relative operator-norm error: the largest singular value left out, sigma_{r+1} / sigma_1."""
    spectra: tuple[Spectrum, ...] = ()
    """Singular values of the matrices that the rank cuts, one spectrum per side of the rank; none for `cp`, which cuts none."""


class WeightView(Protocol):
    """A lowering of one layer in a metric of its errors; arguments and results are as the lowering's own."""

    def project(self, weight: Tensor, rank: Rank, warm: Any = None) -> Projected:
        """The nearest weight of rank `rank`, and the share of the weight's own norm² in the metric that is removed."""

    def curve(self, weight: Tensor, multiple: int = 1) -> RankCurve:
        """What is removed at each rank, as a share of the weight's norm² in the metric."""

    def approximations(self, weight: Tensor, ranks: Sequence[Rank]) -> Iterator[Tensor]:
        """The weight near its projection at each of `ranks` in turn."""


class Lowering(ABC):
    """How a layer becomes a chain of smaller layers at a rank."""

    name: str
    family: str | None = None
    """Name under which several members of one kind are asked for at once."""
    is_projection: bool
    """Whether reconstruct(decompose(.)) is an orthogonal projection: idempotent and nearest at its rank (Tucker-2: locally)."""
    opt_in: bool = False
    """Whether a search takes it only where the space names it."""
    has_rank: bool = True
    """False for `dense` alone."""
    pivoted_ends: tuple[str, ...] = ()
    """Which ends of the chain have a pivoted form (`pivoted.py`): a "first" layer of any kernel, a "last" 1x1 conv or Linear."""
    curve_iterates: bool = False
    """Whether a curve is made by many products in a row, which a GPU does faster than a CPU, and not by an eigenvalue decomposition."""
    takes_more: bool = False
    """Whether it takes layers that its pivoted form refuses."""

    @property
    def curve_name(self) -> str:
        """Lowerings of one `curve_name` remove the same of a weight at the same rank: one curve serves them all."""
        return self.name

    @classmethod
    def members(cls) -> Sequence[Lowering]:
        """The instances to register: one, or a family's."""
        return (cls(),)

    @abstractmethod
    def refusal(self, spec: LayerSpec) -> str | None:
        """Why this lowering cannot take the layer, as a sentence; None where it can."""

    @abstractmethod
    def full_rank(self, spec: LayerSpec) -> Rank:
        """The smallest rank at which the chain equals any dense layer of this spec."""

    @abstractmethod
    def factor_specs(self, spec: LayerSpec, rank: Rank) -> tuple[LayerSpec, ...]:
        """The layers that run, first to last, with stride, padding, dilation, groups and bias placed."""

    @abstractmethod
    def decompose(self, weight: Tensor, rank: Rank, spec: LayerSpec, warm: Any = None) -> tuple[Tensor, ...]:
        """The stored factors of the dense `weight`, in the order of `stored_shapes`. `warm` is that of the layer's last projection."""

    @abstractmethod
    def reconstruct(self, factors: Sequence[Tensor], spec: LayerSpec) -> Tensor:
        """The dense weight that the chain of `factors` computes: linear in each of them by itself, up to a constant."""

    def ranks(self, spec: LayerSpec, multiple: int = 1) -> tuple[Rank, ...]:
        """The ranks that an allocation may choose from, smallest first: all multiples of `multiple`, or a grid of them."""
        (full,) = sides(self.full_rank(spec))
        return tuple(range(multiple, full + 1, multiple))

    @abstractmethod
    def curve(self, weight: Tensor, spec: LayerSpec, multiple: int = 1) -> RankCurve:
        """What projection removes at each of `ranks(spec, multiple)`."""

    def curves(self, weights: Sequence[Tensor], spec: LayerSpec, multiple: int = 1) -> list[RankCurve]:
        """The curves of several layers of one spec and dtype: a format may share work between them."""
        return [self.curve(weight, spec, multiple) for weight in weights]

    @abstractmethod
    def project(self, weight: Tensor, rank: Rank, spec: LayerSpec, warm: Any = None) -> Projected:
        """reconstruct(decompose(weight)) and what it removes. `warm`, from the last projection of a weight nearby, makes it faster.

        It is a tuple of tensors and numbers or None, so that it can be saved; it may come back as a plain tuple.
        """

    def approximations(self, weight: Tensor, ranks: Sequence[Rank], spec: LayerSpec) -> Iterator[Tensor]:
        """The weight near its projection at each of `ranks` in turn, for estimates: a format may share work between ranks or save it."""
        return (self.project(weight, rank, spec).weight for rank in ranks)

    def seen(self, weighting: Weighting, spec: LayerSpec) -> WeightView | None:
        """This lowering of the layer in the metric of its data; None where it knows the plain one alone."""
        return None

    # Derived -----------------------------------------------------------------------------------------------------

    def supports(self, spec: LayerSpec) -> bool:
        """Whether this lowering can take the layer; `refusal` says why not."""
        return self.refusal(spec) is None

    def check_rank(self, spec: LayerSpec, rank: Rank) -> None:
        """Raises UsageError where the lowering refuses the layer or `rank` is not one of its ranks."""
        if (reason := self.refusal(spec)) is not None:
            raise UsageError(f"{self.name} cannot lower this layer: {reason}")
        full = self.full_rank(spec)
        if not isinstance(rank, int if isinstance(full, int) else tuple) or len(sides(rank)) != len(sides(full)):
            count = len(sides(full))
            raise UsageError(f"{self.name} takes {'one rank' if count == 1 else f'{count} ranks'}, got {rank!r}")
        if not all(min(1, most) <= side <= most for side, most in zip(sides(rank), sides(full), strict=True)):
            ranges = " and ".join(f"{min(1, most)}..{most}" for most in sides(full))
            raise UsageError(f"rank {rank} is outside {ranges}, the ranks of {self.name} on this layer")

    def scaled_rank(self, spec: LayerSpec, ratio: float, multiple: int = 1) -> Rank:
        """The rank that is `ratio` (0..1) of the full one, every side by its own width, a multiple of `multiple` and at least 1.

        A side that is narrower than `multiple` keeps its whole width.
        """
        full = self.full_rank(spec)
        scaled = tuple(_scaled_side(side, ratio, multiple) for side in sides(full))
        return scaled[0] if isinstance(full, int) else scaled

    def ladder(self, spec: LayerSpec, multiple: int = 1) -> tuple[Rank, ...]:
        """The ranks of all ratios, smallest to full: the one-number family in which costs grow from step to step."""
        widest = max(sides(self.full_rank(spec)))
        return tuple(dict.fromkeys(self.scaled_rank(spec, step / widest, multiple) for step in range(1, widest + 1)))

    def stored_shapes(self, spec: LayerSpec, rank: Rank) -> tuple[Ints, ...]:
        """Shapes of the stored factors: the weights of the chain."""
        return tuple(factor.weight_shape for factor in self.factor_specs(spec, rank))

    def params(self, spec: LayerSpec, rank: Rank) -> int:
        """Stored parameters, bias included."""
        return sum(map(prod, self.stored_shapes(spec, rank))) + (spec.out_channels if spec.bias else 0)

    def indices(self, spec: LayerSpec, rank: Rank) -> int:
        """Stored whole numbers, int32, that are no parameters."""
        return 0

    def macs(self, spec: LayerSpec, rank: Rank, in_size: Ints) -> int:
        """MACs of what runs, for one sample whose map enters with extents `in_size`."""
        total = 0
        for factor in self.factor_specs(spec, rank):
            total += factor.macs(in_size)
            in_size = factor.out_size(in_size)
        return total

    def cost(self, spec: LayerSpec, rank: Rank, cost: str, in_size: Ints = ()) -> int:
        """One of `LAYER_COSTS`, from the spec alone: nothing is built.

        Raises:
            UsageError: no such cost; the text names the nearest one.
        """
        if cost in ("macs", "flops"):
            return self.macs(spec, rank, in_size) * (2 if cost == "flops" else 1)
        if cost == "params":
            return self.params(spec, rank)
        if cost == "size":
            return self.params(spec, rank) * BYTES_PER_WEIGHT + self.indices(spec, rank) * BYTES_PER_INDEX
        raise UsageError(
            f"A layer's cost is one of {', '.join(LAYER_COSTS)}, not {cost!r}. {nearest(cost, LAYER_COSTS)}"
        )

    def break_even_rank(self, spec: LayerSpec, cost: str, in_size: Ints = ()) -> Rank:
        """The largest rank of the ladder at which the layer costs less than dense; 0 where there is none. A bisection."""
        dense = LOWERINGS["dense"].cost(spec, 0, cost, in_size)
        ladder: tuple[Rank, ...] = (0, *(self.ladder(spec) if self.has_rank else ()))
        low, high = 0, len(ladder) - 1
        while low < high:
            middle = (low + high + 1) // 2
            cheaper = self.cost(spec, ladder[middle], cost, in_size) < dense
            low, high = (middle, high) if cheaper else (low, middle - 1)
        return ladder[low]

    def build(
        self,
        spec: LayerSpec,
        rank: Rank,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> nn.Module:
        """The layers that run as a module with initial weights; `decompose` gives the right ones, `stored_weights` takes them."""
        self.check_rank(spec, rank)
        layers = [factor.build(device=device, dtype=dtype) for factor in self.factor_specs(spec, rank)]
        return layers[0] if len(layers) == 1 else nn.Sequential(*layers)

    def stored_weights(self, built: nn.Module) -> tuple[Tensor, ...]:
        """The parameters, and buffers of whole numbers, of a built module that hold the factors, in the order of `stored_shapes`."""
        return tuple(layer.weight for layer in running_layers(built))  # type: ignore[misc]


def running_layers(built: nn.Module) -> tuple[Any, ...]:
    """The layers of a built module, first to last; the bias is the last one's."""
    return tuple(built) if isinstance(built, nn.Sequential) else (built,)


def _scaled_side(side: int, ratio: float, multiple: int) -> int:
    most = side if side < multiple else side // multiple * multiple
    return max(min(multiple, most), min(most, multiple * round(ratio * side / multiple)))


def sides(rank: Rank) -> tuple[int, ...]:
    """A rank as a tuple; it holds one number where the format has one."""
    return (rank,) if isinstance(rank, int) else rank


def kernel_area(spec: LayerSpec) -> int:
    """Number of taps of the kernel, 1 for a Linear."""
    return prod(spec.kernel_size)
