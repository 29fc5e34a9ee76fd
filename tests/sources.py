"""Tiny models that read a source beside the text: encoder-decoder models of many kinds, and what they read."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers
from tiny import PAD, VOCABULARY, make_noisy
from torch import Tensor
from toy_tokenizers import ENGLISH, build
from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = [
    "START",
    "TEXTUAL",
    "WRITERS",
    "build_writer",
    "decoder_of",
    "noisy_writer",
    "source",
    "taught_writer",
    "writer",
]

START = 2
_SPECIAL = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": PAD, "decoder_start_token_id": START}
_BART = {
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4}
_GEMMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"],
}
_VISION = {
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 16,
    "patch_size": 4,
}
_KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5),
    "umt5": ("UMT5ForConditionalGeneration", "UMT5Config", _T5),
    "bart": ("BartForConditionalGeneration", "BartConfig", {**_BART, "max_position_embeddings": 128}),
    "marian": ("MarianMTModel", "MarianConfig", {**_BART, "max_position_embeddings": 128}),
    "m2m": ("M2M100ForConditionalGeneration", "M2M100Config", {**_BART, "max_position_embeddings": 128}),
    "t5gemma": ("T5GemmaForConditionalGeneration", "T5GemmaConfig", {}),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {**_BART, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 64},
    ),
    "moonshine": (
        "MoonshineForConditionalGeneration",
        "MoonshineConfig",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "encoder_num_hidden_layers": 2,
            "decoder_num_hidden_layers": 2,
            "encoder_num_attention_heads": 4,
            "decoder_num_attention_heads": 4,
            "max_position_embeddings": 128,
        },
    ),
    "trocr": ("VisionEncoderDecoderModel", "VisionEncoderDecoderConfig", {}),
}
_VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
# Transformers' UMT5 read several tokens behind a cache wrongly before 5.24
WRITERS = tuple(kind for kind in _KINDS if kind != "umt5" or _VERSION >= (5, 24))
TEXTUAL = tuple(kind for kind in WRITERS if kind not in ("whisper", "moonshine", "trocr"))


def _config(kind: str, vocabulary: int) -> Any:
    name, values = _KINDS[kind][1:]
    both = {"vocab_size": vocabulary, **_SPECIAL}
    if kind == "trocr":
        reading = transformers.ViTConfig(**_VISION)
        sizes = {name: value for name, value in _BART.items() if name.startswith(("d_model", "decoder"))}
        writing = transformers.TrOCRConfig(**both, **sizes, max_position_embeddings=64)
        return transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(reading, writing)
    made = getattr(transformers, name)
    if kind == "t5gemma":
        return made(encoder={**_GEMMA, **both}, decoder={**_GEMMA, **both}, **both)
    return made(**{**both, **values})


def build_writer(kind: str, *, vocabulary: int = VOCABULARY, seed: int = 0) -> PreTrainedModel:
    """A fresh random model in eval mode that never meets an EOS of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = getattr(transformers, _KINDS[kind][0])(_config(kind, vocabulary)).eval()
        for parameter in made.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 * 1.5)
    made.tie_weights()
    nothing = dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens"))
    for name, value in {**_SPECIAL, **nothing, "num_beams": 1}.items():
        setattr(made.generation_config, name, value)
    if kind == "whisper":
        made.generation_config.no_timestamps_token_id = vocabulary - 1
        made.generation_config.is_multilingual = False
    return made


@functools.cache
def writer(kind: str, *, vocabulary: int = VOCABULARY, seed: int = 0) -> PreTrainedModel:
    """A random model, shared by all tests: none may change it."""
    return build_writer(kind, vocabulary=vocabulary, seed=seed)


@functools.cache
def noisy_writer(kind: str) -> PreTrainedModel:
    """The shared noisy copy of ``writer(kind)``: near enough to be accepted, far enough to be rejected."""
    return make_noisy(writer(kind), {"umt5": 0.01, "t5gemma": 0.01}.get(kind, 0.1))


@functools.cache
def decoder_of() -> PreTrainedModel:
    """The decoder of Whisper's noisy copy alone, as a decoder-only model that reads what another encoder made."""
    whole: Any = noisy_writer("whisper")
    config = type(whole.config)(**whole.config.to_dict())
    made: Any = transformers.WhisperForCausalLM(config).eval()
    made.model.decoder.load_state_dict(whole.model.decoder.state_dict())
    made.proj_out.weight = made.model.decoder.embed_tokens.weight
    return made


def source(kind: str, rows: int = 1, *, padded: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """What the encoder reads: random ids, sound or pictures. ``padded``: of different lengths."""
    dice = torch.Generator().manual_seed(seed)
    if kind == "whisper":
        return {"input_features": torch.randn(rows, 8, 40, generator=dice)}
    if kind == "trocr":
        return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=dice)}
    if kind == "moonshine":
        return {"input_values": torch.randn(rows, 2000, generator=dice)}
    ids = torch.randint(3, VOCABULARY, (rows, 17), generator=dice)
    mask = torch.ones_like(ids)
    if padded:
        for row in range(rows):
            hidden = (3 * row + 2) % 11
            ids[row, 17 - hidden :] = PAD
            mask[row, 17 - hidden :] = 0
    return {"input_ids": ids, "attention_mask": mask}


@functools.cache
def taught_writer(role: str, kind: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A model that goes on with the text it reads, and its tokenizer; another vocabulary for each role."""
    tokenizer = build("byte_a" if role == "target" else "byte_b")
    made = build_writer(kind, vocabulary=len(tokenizer), seed=0 if role == "target" else 1)
    configs = made.config, made.generation_config
    for config in configs:
        config.decoder_start_token_id = config.pad_token_id = tokenizer.pad_token_id
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in made.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.7 * parameter.shape[-1] ** -0.5)
        ids = torch.tensor(tokenizer(ENGLISH * 2, add_special_tokens=False)["input_ids"])
        optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2)
        made.train()
        for _ in range(250):
            starts = torch.randint(0, len(ids) - 49, (8,)).tolist()
            read = torch.stack([ids[first : first + 12] for first in starts])
            written = torch.stack([ids[first + 12 : first + 48] for first in starts])
            loss = made(input_ids=read, labels=written).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    made.eval().requires_grad_(False)
    return made, tokenizer
