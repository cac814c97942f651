"""Rank curves kept on disk under a hash of the weights they belong to: a checkpoint that was seen before costs no second decomposition."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, MutableMapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from ranksearch.lowering.contract import RankCurve, Spectrum, sides
from ranksearch.lowering.spec import LayerSpec
from ranksearch.places.files import partly_written

FORMAT = 1
"""It is counted up when a lowering's curve comes to mean something else, so that older files are no longer used."""


def curve_key(weight: Tensor, spec: LayerSpec, lowering: str, multiple: int) -> str:
    """Content hash of a curve: the weight's bytes, the layer, the lowering and the rank multiple."""
    found = hashlib.sha256(f"{FORMAT} {lowering} {multiple} {spec} {weight.dtype}".encode())
    found.update(weight.detach().float().contiguous().cpu().numpy().tobytes())
    return found.hexdigest()[:24]


class CurveCache(MutableMapping[str, RankCurve]):
    """Curves by `curve_key`, read from one safetensors file; `save` writes them back. A file that cannot be read is made anew."""

    def __init__(self, path: Path) -> None:
        self.path, self._curves = path, _read(path)
        self.added = 0

    def __getitem__(self, key: str) -> RankCurve:
        return self._curves[key]

    def __setitem__(self, key: str, curve: RankCurve) -> None:
        self._curves[key] = curve
        self.added += 1

    def __delitem__(self, key: str) -> None:
        del self._curves[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._curves)

    def __len__(self) -> int:
        return len(self._curves)

    def save(self) -> None:
        """Writes the file where something was added; a reader sees the old file or the new one."""
        if not self.added:
            return
        tensors: dict[str, np.ndarray] = {}
        for key, curve in self._curves.items():
            ranks = np.array([sides(rank) for rank in curve.ranks], dtype=np.int64).reshape(len(curve.ranks), -1)
            tensors |= {f"{key}.ranks": ranks, f"{key}.removed": curve.removed, f"{key}.residual": curve.residual}
            for side, spectrum in enumerate(curve.spectra):
                tensors[f"{key}.squared.{side}"] = np.ascontiguousarray(spectrum.squared)
                tensors[f"{key}.shape.{side}"] = np.array(spectrum.shape, dtype=np.int64)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with partly_written(self.path) as partial:
            save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, partial)
        self.added = 0


def _read(path: Path) -> dict[str, RankCurve]:
    try:
        tensors = load_file(path) if path.is_file() else {}
        keys = [name.removesuffix(".ranks") for name in tensors if name.endswith(".ranks")]
        return {key: _curve(tensors, key) for key in keys}
    except (SafetensorError, KeyError, OSError):
        return {}


def _curve(tensors: dict[str, np.ndarray], key: str) -> RankCurve:
    ranks = tuple(int(row[0]) if len(row) == 1 else tuple(map(int, row)) for row in tensors[f"{key}.ranks"])
    spectra: list[Spectrum] = []
    while (squared := tensors.get(f"{key}.squared.{len(spectra)}")) is not None:
        rows, columns = map(int, tensors[f"{key}.shape.{len(spectra)}"])
        spectra.append(Spectrum(squared, (rows, columns)))
    return RankCurve(ranks, tensors[f"{key}.removed"], tensors[f"{key}.residual"], tuple(spectra))
