"""BN folded into the layer before it: the same function in fewer layers, for a net that is not trained any more.

In evaluation mode BN computes s·(y - m) + b per channel, s = gamma / sqrt(var + eps). A conv or Linear y = W x + c whose output nothing
else takes does the same with the weight s·W and the bias s·(c - m) + b. Which layer a BN follows is read off the exported
graph, not off names: what a layer's output is used for is a matter of data flow.

`torch.nn.utils.fusion` is the reference; it has no grouped transposed convs and no Linear before a BN without gamma, and this has.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.modules.batchnorm import _BatchNorm

from ranksearch.lowering import LayerSpec
from ranksearch.model.attention import hooks_refusal, set_module_

AFFINE = ("linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")


def fold_bn_(model: nn.Module, program: ExportedProgram) -> int:
    """Folds every BN of `model` that it can into the layer before it, in place; returns how many.

    A BN stays where its layer's output or weight is used elsewhere too, where it is called twice, or where it computes more than BN.

    Args:
        program: the exported graph of `model` in evaluation mode.
    """
    pairs = list(_pairs(model, program))
    for layer, norm in pairs:
        _absorb_(layer, norm)
        names = [name for name, module in model.named_modules(remove_duplicate=False) if module is norm]
        for name in names:
            set_module_(model, name, nn.Identity())
    return len(pairs)


def _pairs(model: nn.Module, program: ExportedProgram) -> Iterator[tuple[Any, _BatchNorm]]:
    """(layer, the BN that alone takes its output), both called once."""
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}

    def holder(node: Any, tensor: str) -> Any:
        """The module whose parameter or buffer `tensor` the node is, where the graph uses it once."""
        path, _, last = names.get(getattr(node, "name", ""), "").rpartition(".")
        return model.get_submodule(path) if last == tensor and len(node.users) == 1 else None

    for node in program.graph.nodes:
        if node.target is not torch.ops.aten.batch_norm.default:
            continue
        source, norm = node.args[0], holder(node.args[3], "running_mean")
        if not _is_affine(source) or len(source.users) != 1 or not _is_plain(norm):
            continue
        layer = holder(source.args[1], "weight")
        if layer is not None and LayerSpec.of(layer) is not None and hooks_refusal(layer) is None:
            yield layer, norm


def _is_affine(node: Any) -> bool:
    """Whether the node is a conv or Linear whose second axis holds its channels, as BN takes them."""
    name = str(getattr(node, "target", "")).removeprefix("aten.").partition(".")[0]
    if name not in AFFINE:
        return False
    axes = 0 if name == "linear" else int(name[-2])
    return node.meta["val"].dim() == 2 + axes


def _is_plain(norm: Any) -> bool:
    return isinstance(norm, _BatchNorm) and type(norm).forward is _BatchNorm.forward and hooks_refusal(norm) is None


@torch.no_grad()
def _absorb_(layer: Any, norm: _BatchNorm) -> None:
    spec = LayerSpec.of(layer)
    assert spec is not None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale: Tensor = (norm.running_var + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight
    shift = torch.zeros_like(scale) if norm.bias is None else norm.bias
    bias = torch.zeros_like(scale) if layer.bias is None else layer.bias
    blocks = spec.blocks(layer.weight)
    per_channel = scale.reshape(spec.groups, -1, *(1 for _ in blocks.shape[2:]))  # [g, T/g, 1, ...]
    layer.weight = nn.Parameter(spec.weight_of(blocks * per_channel), layer.weight.requires_grad)
    layer.bias = nn.Parameter(scale * (bias - norm.running_mean) + shift, layer.weight.requires_grad)
