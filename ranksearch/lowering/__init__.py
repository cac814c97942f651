"""Lowerings: `LOWERINGS` by name, the `Lowering` contract, and `LayerSpec`. Every file of this folder is imported."""

import importlib
import pkgutil

from ranksearch.lowering.contract import (
    LAYER_COSTS,
    LOWERINGS,
    Lowering,
    Rank,
    RankCurve,
    default_lowerings,
    expand_families,
    lowering_named,
    register,
)
from ranksearch.lowering.matrix import MatrixLowering
from ranksearch.lowering.pivoted import register_pivoted
from ranksearch.lowering.spec import LayerSpec

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
register_pivoted()

__all__ = [
    "LAYER_COSTS",
    "LOWERINGS",
    "LayerSpec",
    "Lowering",
    "MatrixLowering",
    "Rank",
    "RankCurve",
    "default_lowerings",
    "expand_families",
    "lowering_named",
    "register",
]
