"""MACs as they are measured: `torch.utils.flop_counter`, extended by what it does not know.

torch counts matrix products and convolutions. What it misses are operators that do several at once: attention on a CPU
(`scaled_dot_product_attention`, `nn.MultiheadAttention` and `nn.TransformerEncoder` on their fused paths), LSTM and GRU on a CPU (oneDNN)
or by cuDNN, `nn.Bilinear`, and products of a matrix with a vector. 1 MAC = 2 FLOPs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

Shape = Any


def _attention(query: Shape, key: Shape, value: Shape, *rest: Any, **more: Any) -> int:
    """Scores and mixture, [.., L, E] x [.., S, E] x [.., S, V]: both products, as for the kernels that torch counts."""
    *lead, length, width = query
    rows = length
    for extent in lead:
        rows *= extent
    return 2 * rows * key[-2] * (width + value[-1])


def _native_attention(query: Shape, key: Shape, value: Shape, width: int, heads: int, *rest: Any, **more: Any) -> int:
    """`nn.MultiheadAttention` in one operator: [N, L, E], packed projections, scores, mixture, output projection."""
    batch, length, _ = query
    return 2 * batch * length * (4 * width * width + 2 * key[1] * width)


def _encoder_layer(source: Shape, width: int, heads: int, *rest: Any, **more: Any) -> int:
    """`nn.TransformerEncoderLayer` in one operator; the first matrix of its MLP is at place 14, [F, E]."""
    batch, length, _ = source
    hidden = rest[11][0]
    return 2 * batch * length * (4 * width * width + 2 * length * width + 2 * width * hidden)


def _one_dnn_rnn(x: Shape, of_input: Shape, of_state: Shape, *rest: Any, **more: Any) -> int:
    """One direction of one layer over x [L, N, S]: every step meets both matrices."""
    return 2 * x[0] * x[1] * (of_input[0] * of_input[1] + of_state[0] * of_state[1])


def _cudnn_rnn(x: Shape, weights: Any, *rest: Any, **more: Any) -> int:
    """All layers and directions: every step of every sequence meets every matrix, [L, N, S] or [N, L, S]."""
    return 2 * x[0] * x[1] * sum(w[0] * w[1] for w in weights if len(w) == 2)


def _bilinear(left: Shape, weight: Shape, right: Shape, *rest: Any, **more: Any) -> int:
    """x [N, S] and y [N, R] against [T, S, R], as `nn.Bilinear` calls it: first all outputs' matrices times x, then times y."""
    outputs, first, second = weight
    return 2 * left[0] * outputs * (first * second + second)


def _grouped(rows: Shape, matrices: Shape, *rest: Any, **more: Any) -> int:
    """Rows [N, S], each against one of the experts' matrices [G, S, T]."""
    return 2 * rows[0] * matrices[-2] * matrices[-1]


def _matrix_vector(matrix: Shape, vector: Shape, *rest: Any, **more: Any) -> int:
    return 2 * matrix[0] * matrix[1]


def _added_matrix_vector(bias: Shape, matrix: Shape, vector: Shape, *rest: Any, **more: Any) -> int:
    return 2 * matrix[0] * matrix[1]


def _dot(left: Shape, right: Shape, *rest: Any, **more: Any) -> int:
    return 2 * left[0]


_FORMULAS: dict[str, Callable[..., int]] = {
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_fused_attention_overrideable": _attention,
    "_native_multi_head_attention": _native_attention,
    "_transformer_encoder_layer_fwd": _encoder_layer,
    "mkldnn_rnn_layer": _one_dnn_rnn,
    "_cudnn_rnn": _cudnn_rnn,
    "_trilinear": _bilinear,
    "mv": _matrix_vector,
    "addmv": _added_matrix_vector,
    "dot": _dot,
}
"""Operator -> its FLOPs, from the shapes of its arguments."""
_EXPERTS = (("aten", "_grouped_mm"), ("transformers", "grouped_mm_fallback"))
"""(library, operator) of experts' products; a library's are there once it is imported."""


def counter() -> FlopCounterMode:
    """A context manager that counts what runs in it; `macs(counter)` reads it."""
    known: dict[Any, Callable[..., int]] = {
        getattr(getattr(torch.ops, library), name): _grouped
        for library, name in _EXPERTS
        if hasattr(getattr(torch.ops, library), name)
    }
    known |= {getattr(torch.ops.aten, name): made for name, made in _FORMULAS.items() if hasattr(torch.ops.aten, name)}
    return FlopCounterMode(display=False, custom_mapping=known)


def macs(counted: FlopCounterMode) -> int:
    """MACs of everything that ran under the counter."""
    return int(counted.get_total_flops()) // 2
