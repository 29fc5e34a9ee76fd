"""Tiny models that read pictures or sounds beside text, and prompts for them.

The parts that see are as small as the text's; what they make of a picture decides what is written, as tests look at.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
import transformers as T
from torch import Tensor
from transformers import PreTrainedModel

__all__ = ["COUNTED", "KINDS", "PICTURE", "VOCABULARY", "build_seer", "noisy_seer", "pictured", "seer"]

VOCABULARY, PICTURE = 97, 60
KINDS = (
    "llava",
    "smolvlm",
    "gemma3",
    "paligemma",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen2_audio",
    "lfm2_vl",
    "qwen3_5",
)
COUNTED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")  # a picture takes up fewer positions than tokens


def _text(width: int, **more: Any) -> dict[str, Any]:
    own = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    own |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "vocab_size": width}
    return own | {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None} | more


def _seeing(**more: Any) -> dict[str, Any]:
    own = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return own | {"image_size": 28, "patch_size": 14} | more


def _config(kind: str, width: int, picture: int) -> Any:
    marks = {"video_token_id": picture + 1, "vision_start_token_id": picture + 2, "vision_end_token_id": picture + 3}
    both = {"image_token_id": picture, "image_token_index": picture}
    turned = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    if kind == "llava":
        sees = {"model_type": "clip_vision_model", "projection_dim": 16, **_seeing()}
        return T.LlavaConfig(
            text_config={"model_type": "llama", **_text(width)}, vision_config=sees, vision_feature_layer=-1, **both
        )
    if kind == "smolvlm":
        text = {"model_type": "llama", **_text(width)}
        return T.SmolVLMConfig(
            text_config=text,
            vision_config=_seeing(patch_size=7),
            scale_factor=2,
            image_token_id=picture,
            pad_token_id=0,
        )
    if kind == "gemma3":
        layers = ["sliding_attention", "full_attention", "sliding_attention"]
        text = _text(width, sliding_window=8, layer_types=layers, query_pre_attn_scalar=8)
        marked = {"boi_token_index": picture + 2, "eoi_token_index": picture + 3}
        return T.Gemma3Config(
            text_config=text, vision_config=_seeing(patch_size=7), mm_tokens_per_image=4, **both, **marked
        )
    if kind == "paligemma":
        sees = {"model_type": "siglip_vision_model", "vision_use_head": False, **_seeing()}
        text = {"model_type": "gemma", **_text(width)}
        return T.PaliGemmaConfig(text_config=text, vision_config=sees, projection_dim=32, hidden_size=32, **both)
    if kind == "qwen2_audio":
        hears = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
        hears |= {"num_mel_bins": 8, "max_source_positions": 16}
        marked = {"audio_token_id": picture, "audio_token_index": picture}
        return T.Qwen2AudioConfig(text_config={"model_type": "qwen2", **_text(width)}, audio_config=hears, **marked)
    if kind == "lfm2_vl":
        text = _text(width, layer_types=["conv", "full_attention", "conv"], block_ff_dim=48)
        text |= {"block_auto_adjust_ff_dim": False}
        sees = _seeing(patch_size=4, num_patches=16)
        return T.Lfm2VlConfig(
            text_config=text, vision_config=sees, image_token_id=picture, projector_hidden_size=16, downsample_factor=2
        )
    sees = {"depth": 2, "hidden_size": 32, "embed_dim": 32, "intermediate_size": 32, "num_heads": 2, "mlp_ratio": 1}
    sees |= {"out_hidden_size": 32, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
    sees |= {"fullatt_block_indexes": [1], "window_size": 28, "in_channels": 3, "in_chans": 3}
    sees |= {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}
    text = _text(width, rope_parameters=turned)
    if kind == "qwen3_5":
        text |= {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2}
        text |= {f"linear_num_{which}_heads": 2 for which in ("value", "key")}
        text |= {f"linear_{which}_head_dim": 8 for which in ("value", "key")}
        text["rope_parameters"] = {**turned, "partial_rotary_factor": 1.0, "mrope_interleaved": True}
    configs = {"qwen2_vl": T.Qwen2VLConfig, "qwen2_5_vl": T.Qwen2_5_VLConfig, "qwen3_vl": T.Qwen3VLConfig}
    return (configs | {"qwen3_5": T.Qwen3_5Config})[kind](
        text_config=text, vision_config=sees, image_token_id=picture, **marks
    )


def build_seer(kind: str, *, vocabulary: int = VOCABULARY, picture: int = PICTURE, seed: int = 0) -> PreTrainedModel:
    """A new model of this kind, random; with a small vocabulary its marks come last."""
    torch.manual_seed(seed)
    model = T.AutoModelForMultimodalLM.from_config(_config(kind, vocabulary, picture)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5)
    model.tie_weights()
    own = model.generation_config
    own.pad_token_id, own.bos_token_id, own.eos_token_id = 0, None, None
    return model


@cache
def seer(kind: str) -> PreTrainedModel:
    """One that all tests share: not to be changed."""
    return build_seer(kind)


@cache
def noisy_seer(kind: str, amount: float = 0.1) -> PreTrainedModel:
    """The same with other weights: a drafter that is often right."""
    model = copy.deepcopy(seer(kind))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter += amount * parameter.std() * torch.randn_like(parameter)
    return model


def pictured(
    kind: str,
    rows: int = 1,
    *,
    padded: bool = False,
    length: int = 12,
    most: int = 55,
    picture: int = PICTURE,
    seed: int = 1,
) -> dict[str, Tensor]:
    """Prompts of so many tokens and a picture (a sound) each, behind their second token."""
    torch.manual_seed(seed)
    columns, given = 4, {"pixel_values": torch.randn(rows, 3, 28, 28)}
    if kind in COUNTED:
        given = {
            "pixel_values": torch.randn(rows * 16, 3 * 2 * 14 * 14),
            "image_grid_thw": torch.tensor([[1, 4, 4]] * rows),
        }
    elif kind == "smolvlm":
        seen = torch.ones((rows, 1, 28, 28), dtype=torch.bool)
        given = {"pixel_values": torch.randn(rows, 1, 3, 28, 28), "pixel_attention_mask": seen}
    elif kind == "qwen2_audio":
        columns, heard = 8, torch.ones((rows, 32), dtype=torch.long)
        given = {"input_features": torch.randn(rows, 8, 32), "feature_attention_mask": heard}
    elif kind == "lfm2_vl":
        given = {"pixel_values": torch.randn(rows, 16, 48), "spatial_shapes": torch.tensor([[4, 4]] * rows)}
        given["pixel_attention_mask"] = torch.ones((rows, 16), dtype=torch.long)
    ids = torch.randint(1, most, (rows, length + columns))
    mask = torch.ones_like(ids)
    for row in range(rows):
        first = 2 * row + 2 if padded else 2
        ids[row, : first - 2], mask[row, : first - 2] = 0, 0
        if kind in COUNTED:
            ids[row, first - 1], ids[row, first + columns] = picture + 2, picture + 3
        ids[row, first : first + columns] = picture
    own = {"gemma3": "token_type_ids"} | dict.fromkeys(COUNTED, "mm_token_type_ids")
    if kind in own:
        given[own[kind]] = (ids == picture).long()
    return {"input_ids": ids, "attention_mask": mask, **given}
