"""Tiny models to generate with: random ones of many architectures, and a pair that was taught a text.

Random weights are drawn wide enough that the argmax has clear margins and the text does not fall into a loop at once.
``noisy`` makes a drafter of a model: near enough to be accepted often, far enough to be rejected often.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
import transformers
from torch import Tensor
from toy_tokenizers import CODE, ENGLISH, build
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from specdec_fast import fast_generate, last_speculation

__all__ = [
    "ARCHITECTURES",
    "PAD",
    "RECURRENT",
    "VOCABULARY",
    "drafters",
    "model",
    "noisy",
    "prompts",
    "same",
    "taught",
    "taught_prompts",
]

VOCABULARY = 61
PAD = 0

_LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**_LLAMA, "num_key_value_heads": 2, "max_position_embeddings": 512}),
    "qwen2": ("Qwen2", {**_LLAMA, "num_key_value_heads": 2, "max_position_embeddings": 512}),
    "qwen2_windows": (
        "Qwen2",
        {
            **_LLAMA,
            "num_key_value_heads": 2,
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 1,
            "max_position_embeddings": 512,
        },
    ),
    "mistral": (
        "Mistral",
        {**_LLAMA, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6, "max_position_embeddings": 512},
    ),
    "gemma3": (
        "Gemma3",
        {
            **_LLAMA,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
            "max_position_embeddings": 512,
        },
    ),
    "gemma4": (  # its last two layers read the keys of those before, and layers differ in heads
        "Gemma4",
        {
            **_LLAMA,
            "num_hidden_layers": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "per_layer_config": {"01": {"head_dim": 16}, "03": {"head_dim": 16}},
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
            "max_position_embeddings": 512,
        },
    ),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "gpt_neo": (
        "GPTNeo",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 5,
            "max_position_embeddings": 128,
        },
    ),
    "opt": (
        "OPT",
        {
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 32,
            "max_position_embeddings": 128,
        },
    ),
    "gpt_neox": ("GPTNeoX", {**_LLAMA, "max_position_embeddings": 512}),
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon": (
        "Falcon",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True, "multi_query": False},
    ),
    "mpt": ("Mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 512}),
}
ARCHITECTURES = tuple(kind for kind, (name, _) in _KINDS.items() if hasattr(transformers, f"{name}Config"))

_HYBRID = {**_LLAMA, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512}
_DELTA = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_SSM = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
# Models with layers that keep a state
_RECURRENT: dict[str, tuple[str, dict[str, Any]]] = {
    "lfm2": ("Lfm2", {**_HYBRID, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "lfm3": (
        "Lfm3",
        {
            **_HYBRID,
            "num_hidden_layers": 3,
            "layer_types": ["conv", "sliding_attention", "full_attention"],
            "sliding_window": 6,
        },
    ),
    "qwen3_5": ("Qwen3_5", {**_HYBRID, **_DELTA}),
    "qwen3_next": ("Qwen3Next", {**_HYBRID, **_DELTA, **_EXPERTS, "shared_expert_intermediate_size": 16}),
    "olmo_hybrid": ("OlmoHybrid", {**_HYBRID, **_DELTA}),
    "falcon_h1": ("FalconH1", {**_HYBRID, **_SSM, "mamba_d_ssm": 64}),
    "bamba": ("Bamba", {**_HYBRID, **_SSM, "attn_layer_indices": [1]}),
    "granite": (
        "GraniteMoeHybrid",
        {
            **_HYBRID,
            **_SSM,
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 16,
        },
    ),
    "kimi": (
        "KimiLinear",
        {
            **_HYBRID,
            "num_key_value_heads": 4,
            "layer_types": ["linear_attention", "full_attention"],
            "mlp_layer_types": ["dense", "dense"],
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "linear_head_dim": 8,
            "linear_num_heads": 4,
            "num_experts": 4,
            "num_experts_per_token": 2,
            "moe_intermediate_size": 16,
        },
    ),
    "mamba2": (
        "Mamba2",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 8,
            "expand": 2,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 1,
            "chunk_size": 8,
        },
    ),
}
RECURRENT = tuple(kind for kind, (name, _) in _RECURRENT.items() if hasattr(transformers, f"{name}Config"))


def build_model(architecture: str, *, vocabulary: int = VOCABULARY, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A fresh random model, in eval mode, that never meets an EOS of its own."""
    name, arguments = {**_KINDS, **_RECURRENT}[architecture]
    config_class = getattr(
        transformers, f"{name}TextConfig" if name in ("Gemma3", "Gemma4", "Qwen3_5") else f"{name}Config"
    )
    nothing = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = config_class(**{**arguments, "vocab_size": vocabulary, "tie_word_embeddings": False, **nothing, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        built = AutoModelForCausalLM.from_config(config).eval()
        for parameter in built.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 * 1.5)
    built.tie_weights()
    built.generation_config.pad_token_id = PAD
    built.generation_config.bos_token_id = built.generation_config.eos_token_id = None
    return built


@functools.cache
def model(architecture: str = "llama", *, vocabulary: int = VOCABULARY, seed: int = 0) -> PreTrainedModel:
    """A random model, shared by all tests: none may change it."""
    return build_model(architecture, vocabulary=vocabulary, seed=seed)


@torch.no_grad()
def make_noisy(original: PreTrainedModel, amount: float = 0.1, seed: int = 1) -> PreTrainedModel:
    """A copy with noise of that share of each weight's spread."""
    copied = copy.deepcopy(original)
    generator = torch.Generator().manual_seed(seed)
    for parameter in copied.parameters():
        if parameter.ndim > 1:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.to(parameter.device) * (amount * parameter.std()))
    return copied


@functools.cache
def noisy(architecture: str = "llama", amount: float = 0.1) -> PreTrainedModel:
    """The shared noisy copy of ``model(architecture)``."""
    return make_noisy(model(architecture), amount)


def prompts(rows: int = 1, *, padded: bool = False, length: int = 9, seed: int = 0) -> dict[str, Tensor]:
    """Random prompts of ``model(...)``; ``padded``: of different lengths, padding on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (rows, length), generator=generator)
    ids[:, -3:] = ids[:, :3].clone()  # something for prompt lookup to find
    mask = torch.ones_like(ids)
    if padded:
        for row in range(rows):
            hidden = (2 * row + 1) % (length - 1)
            ids[row, :hidden] = PAD
            mask[row, :hidden] = 0
    return {"input_ids": ids, "attention_mask": mask}


@functools.cache
def _taught(kind: str, seed: int, steps: int, architecture: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    tokenizer = build(kind)
    built = build_model(architecture, vocabulary=len(tokenizer), seed=seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for parameter in built.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.08)
        ids = torch.tensor(tokenizer((ENGLISH + CODE) * 2, add_special_tokens=False)["input_ids"])
        optimizer = torch.optim.AdamW(built.parameters(), lr=1e-2)
        built.train()
        for _ in range(steps):
            starts = torch.randint(0, len(ids) - 49, (8,))
            batch = torch.stack([ids[first : first + 48] for first in starts.tolist()])
            loss = built(input_ids=batch, labels=batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    built.eval().requires_grad_(False)
    built.generation_config.pad_token_id = tokenizer.pad_token_id
    return built, tokenizer


def taught(role: str = "target", architecture: str = "llama") -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A model and its tokenizer that know the same text as the other role's, with another vocabulary."""
    own = ("byte_a", 0, 120) if role == "target" else ("byte_b", 1, 90)
    return _taught(*own, architecture)


def taught_prompts(rows: int = 1, *, padded: bool = False) -> dict[str, Tensor]:
    """Beginnings of sentences for ``taught``; of one length, or left-padded."""
    _, tokenizer = taught()
    texts = [
        "The old lighthouse keeper counted the ships",
        "One evening in October he",
        "def count_words(text, *, lower",
        "He counted again, slowly, from the harbour",
    ][:rows]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    if not padded:
        shortest = min(map(len, ids))
        ids = [text[:shortest] for text in ids]
    width = max(map(len, ids)) + padded  # one row of padding at least, for a single row too
    pad = tokenizer.pad_token_id
    return {
        "input_ids": torch.tensor([[pad] * (width - len(text)) + text for text in ids]),
        "attention_mask": torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in ids]),
    }


def drafters() -> dict[str, dict[str, Any]]:
    """Arguments of ``fast_generate(taught("target")[0], ...)`` for every method."""
    _, tokenizer = taught()
    drafter, own = taught("drafter")
    both = {"assistant_model": drafter, "tokenizer": tokenizer, "assistant_tokenizer": own}
    return {
        "autoregressive": {"method": "autoregressive"},
        "model": {"method": "model", "assistant_model": _noisy_taught()},
        "tli": {"method": "tli", **both},
        "projection": {"method": "projection", **both},
        "slem": {"method": "slem", **both},
        "prompt_lookup": {"method": "prompt_lookup", "prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 2},
    }


@functools.cache
def _noisy_taught() -> PreTrainedModel:
    return make_noisy(taught()[0], 0.3)


def same(target: PreTrainedModel, inputs: dict[str, Tensor], own: dict[str, Any], **both: Any) -> Any:
    """Asserts that ``fast_generate`` gives what ``generate`` gives; returns the statistics."""
    expected = target.generate(**inputs, **both)
    got = fast_generate(target, **inputs, **both, **own)
    assert torch.equal(got, expected), (got.tolist(), expected.tolist())
    return last_speculation()
