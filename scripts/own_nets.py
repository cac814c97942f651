"""Nets that are no image classifiers, for `check_nets.py`: Hugging Face's in small configurations with random weights, and nets that
people write themselves (an LSTM tagger, a siamese U-Net, a video net of Conv3d).

`NETS` holds for each a function that makes the net and one that makes an example of a number of samples.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from structures import UNet
from torch import Tensor, nn

from ranksearch.errors import UsageError

WORDS, LENGTH = 200, 12
TEXT = {"vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BLOCKS = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
IMAGE = {"image_size": 32, "patch_size": 8}


class Tagger(nn.Module):
    """A tag to every word: an LSTM of two layers, forth and back."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 48)
        self.lstm = nn.LSTM(48, 48, num_layers=2, bidirectional=True, batch_first=True)
        self.hidden, self.tags = nn.Linear(96, 96), nn.Linear(96, 9)

    def forward(self, words: Tensor) -> Tensor:
        return self.tags(torch.relu(self.hidden(self.lstm(self.words(words))[0])))


class Siamese(nn.Module):
    """What changed between two images: one U-Net for both."""

    def __init__(self) -> None:
        super().__init__()
        self.net = UNet()
        self.compare = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        return self.compare((self.net(before) - self.net(after)).abs())


class Video(nn.Module):
    """Conv3d over time and space, its frames then read one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(3, 16, 3, padding=1), nn.BatchNorm3d(16), nn.ReLU())
        self.deep = nn.Sequential(
            nn.Conv3d(16, 32, (3, 3, 3), (1, 2, 2), 1), nn.BatchNorm3d(32), nn.ReLU(), nn.Conv3d(32, 32, (1, 3, 3), padding=(0, 1, 1))
        )  # fmt: skip
        self.frames = nn.Conv2d(32, 32, 3, padding=1)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.deep(self.stem(x))  # [N, C, frames, h, w]
        count = x.shape[2]
        x = torch.relu(self.frames(x.transpose(1, 2).flatten(0, 1))).mean((2, 3))
        return self.head(x.unflatten(0, (-1, count)).mean(1))


@dataclass(frozen=True)
class Made:
    """A net and what it takes."""

    build: Callable[[], nn.Module]
    example: Callable[[int], Any]
    """An input of a number of samples."""
    budget: float = 0.5
    """Share of its FLOPs that a plan may take: more where most of them are in parts that no lowering takes."""


def _words(count: int) -> Tensor:
    return torch.randint(3, WORDS, (count, LENGTH))


def _text(count: int) -> dict[str, Tensor]:
    return {"input_ids": _words(count), "attention_mask": torch.ones(count, LENGTH, dtype=torch.long)}


def _maps(*shape: int) -> Callable[[int], Tensor]:
    return lambda count: torch.randn(count, *shape)


def _hugging_face(model: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        if importlib.util.find_spec("transformers") is None:
            raise UsageError(f"{model} needs transformers, which is not installed here.")
        import transformers

        transformers.utils.logging.set_verbosity_error()
        return getattr(transformers, model)(getattr(transformers, config)(**settings))

    return build


def _whisper() -> nn.Module:
    sizes = {
        "d_model": 64,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 128,
        "max_source_positions": 50,
    }
    decoder = {
        "decoder_layers": 1,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 128,
        "num_mel_bins": 20,
        "decoder_start_token_id": 1,
    }
    model: Any = _hugging_face("WhisperModel", "WhisperConfig", **TEXT, **sizes, **decoder)()
    return model.get_encoder()  # type: ignore[no-any-return]


LANGUAGE = TEXT | {"use_cache": False}
HUGGING_FACE = {
    "hf:bert": Made(
        _hugging_face(
            "BertForSequenceClassification", "BertConfig", vocab_size=WORDS, **BLOCKS, max_position_embeddings=64
        ),
        _text,
    ),
    "hf:gpt2": Made(
        _hugging_face("GPT2LMHeadModel", "GPT2Config", **LANGUAGE, n_embd=64, n_layer=2, n_head=4, n_positions=64),
        _text,
    ),
    "hf:llama": Made(
        _hugging_face(
            "LlamaForCausalLM", "LlamaConfig", **LANGUAGE, **BLOCKS, num_key_value_heads=2, max_position_embeddings=64
        ),
        _text,
    ),
    "hf:mixtral": Made(
        _hugging_face(
            "MixtralForCausalLM", "MixtralConfig", **LANGUAGE, **BLOCKS, num_key_value_heads=2, num_local_experts=4,
            num_experts_per_tok=2, max_position_embeddings=64,
        ),
        _text,
    ),
    "hf:qwen3_moe": Made(
        _hugging_face(
            "Qwen3MoeForCausalLM", "Qwen3MoeConfig", **LANGUAGE, **BLOCKS, num_key_value_heads=2, num_experts=4, head_dim=16,
            num_experts_per_tok=2, moe_intermediate_size=64, max_position_embeddings=64,
        ),
        _text,
    ),
    "hf:t5": Made(
        _hugging_face(
            "T5ForConditionalGeneration", "T5Config", vocab_size=WORDS, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
            feed_forward_proj="gated-gelu", decoder_start_token_id=0, use_cache=False,
        ),
        lambda count: _text(count) | {"decoder_input_ids": _words(count)},
    ),
    "hf:vit": Made(_hugging_face("ViTForImageClassification", "ViTConfig", **BLOCKS, **IMAGE, num_labels=5), _maps(3, 32, 32)),
    "hf:clip_vision": Made(_hugging_face("CLIPVisionModel", "CLIPVisionConfig", **BLOCKS, **IMAGE), _maps(3, 32, 32)),
    "hf:whisper_encoder": Made(_whisper, _maps(20, 100)),
    "hf:wav2vec2": Made(
        _hugging_face(
            "Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", **BLOCKS, vocab_size=32, conv_dim=(32, 32, 32), conv_kernel=(10, 3, 3),
            conv_stride=(5, 2, 2), num_feat_extract_layers=3, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
            classifier_proj_size=32,
        ),
        _maps(2000),
    ),
    "hf:swin": Made(
        _hugging_face(
            "SwinForImageClassification", "SwinConfig", image_size=32, patch_size=2, embed_dim=32, depths=[2, 2], num_heads=[2, 4],
            window_size=4, num_labels=5,
        ),
        _maps(3, 32, 32),
    ),
    "hf:segformer": Made(
        _hugging_face(
            "SegformerForSemanticSegmentation", "SegformerConfig", depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 48, 64],
            num_attention_heads=[1, 2, 3, 4], mlp_ratios=[2, 2, 2, 2], decoder_hidden_size=32, num_labels=5,
        ),
        _maps(3, 64, 64),
    ),
    "hf:mamba": Made(
        _hugging_face("MambaForCausalLM", "MambaConfig", **LANGUAGE, hidden_size=64, num_hidden_layers=2, state_size=8),
        lambda count: {"input_ids": _words(count)},
    ),
}  # fmt: skip
OWN = {
    "lstm_tagger": Made(Tagger, _words),
    "siamese_unet": Made(Siamese, lambda count: {"before": torch.randn(count, 3, 32, 32), "after": torch.randn(count, 3, 32, 32)}),
    "video": Made(Video, _maps(3, 4, 16, 16)),
}  # fmt: skip
NETS = OWN | HUGGING_FACE
"""Name -> the net and its example; those named hf: need `transformers`."""
