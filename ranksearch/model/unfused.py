"""torch's encoder layers without their fused path, which reads weights and calls no layers; else the same computation, step by step.

They are written out for TorchScript, which compiles the fused path even where it is never taken.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.transformer import _detect_is_causal_mask, _get_seq_len


def _masks(mask: Tensor | None, name: str, padding: Tensor | None, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(mask, padding mask) as sums to the attention's scores, in the dtype of `like`."""
    padding = F._canonical_mask(
        mask=padding,
        mask_name="src_key_padding_mask",
        other_type=F._none_or_dtype(mask),
        other_name=name,
        target_type=like.dtype,
    )
    mask = F._canonical_mask(
        mask=mask, mask_name=name, other_type=None, other_name="", target_type=like.dtype, check_other=False
    )
    return mask, padding


class UnfusedEncoderLayer(nn.TransformerEncoderLayer):
    """Takes and returns what `nn.TransformerEncoderLayer` does, and still is one."""

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """As the layer's."""
        mask, padding = _masks(src_mask, "src_mask", src_key_padding_mask, src)
        x = src
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), mask, padding, is_causal=is_causal)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(x + self._sa_block(x, mask, padding, is_causal=is_causal))
        return self.norm2(x + self._ff_block(x))


class UnfusedEncoder(nn.TransformerEncoder):
    """Takes and returns what `nn.TransformerEncoder` does, and still is one."""

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """As the encoder's."""
        mask, padding = _masks(mask, "mask", src_key_padding_mask, src)
        batch_first = self.layers[0].self_attn.batch_first
        causal = _detect_is_causal_mask(mask, is_causal, _get_seq_len(src, batch_first))
        output = src
        for layer in self.layers:
            output = layer(output, src_mask=mask, is_causal=causal, src_key_padding_mask=padding)
        if self.norm is not None:
            output = self.norm(output)
        return output
