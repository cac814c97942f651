"""Which errors of a layer's weight matter, as its data show it: second moments of inputs and of gradients, and what a matrix sees of them.

An error E of a layer's weight costs tr(G E C Eᵀ): C = E[x xᵀ] of the inputs of one output, G of the loss gradients at the outputs (the
identity, where inputs alone count). `Weighting` holds C and G of a layer; `Sides` is what the matrices [b, n, m] of a lowering see of
them. Nothing here knows where the moments come from, or truncates anything (`in_metric.py`).

Letters: g groups, T outputs, S inputs, k the kernel, N = S/g·k inputs of one output, u rows of a matrix per output.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ranksearch.lowering.spec import LayerSpec


@dataclass(frozen=True)
class Root:
    """The symmetric root of a second moment: V diag(values) Vᵀ, plus floor · (I - V Vᵀ) where V does not span everything."""

    vectors: Tensor  # [b, m, k], orthonormal
    values: Tensor  # [b, k]
    floor: Tensor | None  # [b, 1, 1]

    def after(self, rows: Tensor) -> Tensor:
        """rows [b, t, m] · M^½"""
        return self._scaled(rows, self.values, self.floor)

    def undone(self, rows: Tensor) -> Tensor:
        """rows [b, t, m] · M^-½"""
        return self._scaled(rows, 1 / self.values, None if self.floor is None else 1 / self.floor)

    def _scaled(self, rows: Tensor, values: Tensor, floor: Tensor | None) -> Tensor:
        inside = rows @ self.vectors
        if floor is None:
            return (inside * values[:, None]) @ self.vectors.mT
        return floor * rows + (inside * (values[:, None] - floor)) @ self.vectors.mT


@dataclass(frozen=True, eq=False)
class SecondMoment:
    """M = core + ridge · I, positive definite, of b blocks. The core is a matrix [b, m, m], or rowsᵀ rows of rows [b, k, m], k < m."""

    core: Tensor
    ridge: Tensor  # [b], above 0
    wide: bool
    """Whether `core` holds rows: m² numbers would be too many."""

    @classmethod
    def shrunk(cls, core: Tensor, shrinkage: float, *, wide: bool = False) -> SecondMoment:
        """`core` with `shrinkage` times its mean diagonal added: errors in directions that few samples leave unseen are not free.

        A block that is zero throughout, which no input ever reached, becomes the identity.
        """
        diagonal = core.square().sum(dim=1) if wide else core.diagonal(dim1=-2, dim2=-1)
        mean = diagonal.mean(dim=-1)
        return cls(core, torch.where(mean > 0, shrinkage * mean, torch.ones_like(mean)), wide)

    @property
    def width(self) -> int:
        return self.core.shape[-1]

    def like(self, tensor: Tensor) -> SecondMoment:
        """On the device and in the dtype of `tensor`."""
        return replace(self, core=self.core.to(tensor), ridge=self.ridge.to(tensor))

    def times(self, rows: Tensor) -> Tensor:
        """rows [b, t, m] · M"""
        product = (rows @ self.core.mT) @ self.core if self.wide else rows @ self.core
        return product + self.ridge[:, None, None] * rows

    def root(self) -> Root:
        """M^½ by `eigh` of the core, or of the Gram matrix of its rows."""
        if not self.wide:
            values, vectors = torch.linalg.eigh(self.core)
            return Root(vectors, (values.clamp_min(0) + self.ridge[:, None]).sqrt(), None)
        values, vectors = torch.linalg.eigh(self.core @ self.core.mT)
        seen = values > 1e-6 * values[:, -1:]  # what is below has no direction to speak of
        inverse = torch.where(seen, values, torch.ones_like(values)).rsqrt() * seen
        spanned = self.core.mT @ (vectors * inverse[:, None])
        return Root(spanned, (values * seen + self.ridge[:, None]).sqrt(), self.ridge.sqrt()[:, None, None])

    def blocks(self, index: Tensor) -> SecondMoment:
        """What blocks of columns see: index [q, u, m'] of columns, -1 for none -> [b·q, m', m'], added up over u."""
        blocks, parts, width = index.shape
        count = (index >= 0).sum(dim=(1, 2)).to(self.ridge) / width
        ridge = (self.ridge[:, None] * count).flatten()
        if self.wide:
            rows = _taken(self.core, index).permute(0, 2, 3, 1, 4)  # [b, q, u, k, m']
            stacked = rows.reshape(-1, parts * rows.shape[3], width)
            narrow = stacked.shape[1] >= width
            return SecondMoment(stacked.mT @ stacked if narrow else stacked, ridge, not narrow)
        total = self.core.new_zeros(len(self.core), blocks, width, width)
        for part in range(parts):
            chosen = index[:, part]
            square = _taken(self.core.mT, chosen).permute(0, 2, 1, 3)  # [b, q, m, m']: columns of the core
            rows = chosen.clamp_min(0)[None, :, :, None].expand(len(self.core), -1, -1, width)
            total += square.gather(2, rows) * (chosen >= 0)[None, :, :, None]
        return SecondMoment(total.flatten(0, 1), ridge, wide=False)

    def taps(self, index: Tensor) -> SecondMoment:
        """How the u rows of an output go together: index [q, u, m'] -> [b·q, u, u], mean diagonal 1."""
        if self.wide:
            rows = _taken(self.core, index)  # [b, k, q, u, m']
            found = torch.einsum("bkqum,bkqvm->bquv", rows, rows)
        else:
            pairs = self.core[:, index[:, :, None].clamp_min(0), index[:, None].clamp_min(0)]  # [b, q, u, u, m']
            found = pairs.sum(dim=-1)
        found = found.flatten(0, 1) + torch.eye(index.shape[1]).to(found) * (
            index.shape[2] * self.ridge.repeat_interleave(len(index))[:, None, None]
        )
        mean = found.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[:, None, None]
        return SecondMoment(found / mean, found.new_full((len(found),), 1e-6), wide=False)


def _taken(rows: Tensor, index: Tensor) -> Tensor:
    """rows [b, k, m], index [...] -> [b, k, ...], 0 where the index is -1"""
    return rows[..., index.clamp_min(0)] * (index >= 0)


@dataclass(frozen=True, eq=False)
class Weighting:
    """C and G of one layer: C over a group's inputs of one output, in the order [S/g, *k]; G over a group's outputs."""

    inputs: SecondMoment  # [g, N, N]
    outputs: SecondMoment | None = None  # [g, T/g, T/g]; None: all outputs count alike, and none goes with another

    def digest(self) -> str:
        """A digest of its content, for caches."""
        found = hashlib.sha256()
        for moment in (self.inputs, self.outputs):
            for tensor in () if moment is None else (moment.core, moment.ridge):
                found.update(f"{tuple(tensor.shape)}".encode())
                found.update(tensor.detach().float().contiguous().cpu().numpy().tobytes())
        return found.hexdigest()


@dataclass(frozen=True, eq=False)
class Sides:
    """What a batch of matrices E [b, n, m] sees: ‖E‖² = tr((outputs ⊗ taps) E · columns · Eᵀ), its rows in the order (output, tap)."""

    columns: SecondMoment  # [b, m, m]
    outputs: SecondMoment | None  # [b, n/u, n/u]
    taps: SecondMoment | None  # [b, u, u]

    def like(self, tensor: Tensor) -> Sides:
        """On the device and in the dtype of `tensor`."""
        outputs, taps = (None if part is None else part.like(tensor) for part in (self.outputs, self.taps))
        return Sides(self.columns.like(tensor), outputs, taps)

    def rows_times(self, matrix: Tensor) -> Tensor:
        """(outputs ⊗ taps) · matrix [b, n, m]"""
        return self._rows(matrix, lambda part, rows: part.times(rows))

    def row_root(self) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """(outputs ⊗ taps)^½ · and its inverse, on matrices [b, n, m]."""
        roots = {id(part): part.root() for part in (self.outputs, self.taps) if part is not None}
        return (
            lambda matrix: self._rows(matrix, lambda part, rows: roots[id(part)].after(rows)),
            lambda matrix: self._rows(matrix, lambda part, rows: roots[id(part)].undone(rows)),
        )

    def _rows(self, matrix: Tensor, apply: Callable[[SecondMoment, Tensor], Tensor]) -> Tensor:
        """Applies what acts on row vectors to the output and the tap axis of the rows."""
        if self.taps is not None:
            split = matrix.unflatten(1, (-1, self.taps.width)).transpose(2, 3)  # [b, n/u, m, u]
            matrix = apply(self.taps, split.flatten(1, 2)).view(split.shape).transpose(2, 3).flatten(1, 2)
        if self.outputs is not None:
            flat = matrix.unflatten(1, (self.outputs.width, -1)).flatten(2)  # [b, n/u, u·m]
            matrix = apply(self.outputs, flat.mT).mT.reshape(matrix.shape)
        return matrix


def sides_of(weighting: Weighting, spec: LayerSpec, unfold: Callable[[Tensor, LayerSpec], Tensor]) -> Sides:
    """What the matrices of an unfolding see of a layer's weighting, read off the unfolding itself.

    Exact where a matrix has a row per output and all its inputs in the columns (`im2col`, `svd`). Elsewhere it is an approximation: where
    taps of the kernel lie in the rows (`channel`, `spatial`), C ≈ columns ⊗ taps by the partial traces, exact where it is such a
    product; where a weight is cut into tiles, each sees its own diagonal block, as if the tiles' errors did not meet.
    """
    outputs, inputs = spec.block_shape[:2]
    width = weighting.inputs.width
    one = replace(spec, in_channels=inputs, out_channels=1, groups=1, bias=False)
    numbered = torch.arange(1, width + 1).reshape(1, *one.block_shape)
    index = unfold(numbered, one) - 1  # [q, u, m]; -1 where a tile is filled up
    whole = unfold(torch.empty(spec.groups, *spec.block_shape, device="meta"), spec)
    down = len(whole) // (spec.groups * len(index))  # tiles of rows: the batch is [g, down, q]
    index = index.to(weighting.inputs.core.device)
    columns = weighting.inputs.blocks(index)
    taps = weighting.inputs.taps(index) if index.shape[1] > 1 else None
    found = weighting.outputs
    if found is not None:
        rows = whole.shape[1] // index.shape[1]
        numbers = torch.arange(down * rows, device=index.device)
        numbers = torch.where(numbers < outputs, numbers, -1).reshape(down, 1, rows)
        found = found.blocks(numbers)
        found = _repeated(found, lambda b: b.repeat_interleave(len(index), dim=0))
    if down > 1:
        columns = _repeated(
            columns, lambda b: b.unflatten(0, (spec.groups, -1)).repeat_interleave(down, 0).flatten(0, 1)
        )
    return Sides(columns, found, taps)


def _repeated(moment: SecondMoment, repeat: Callable[[Tensor], Tensor]) -> SecondMoment:
    return replace(moment, core=repeat(moment.core), ridge=repeat(moment.ridge))
