"""Every causal model that Transformers has, made small: greedy text by ``fast_generate`` beside ``generate``'s.

``python tests/every_model.py [KIND ...]`` (kinds are Transformers' model types, all by default) prints a line a kind
and exits with 1 if one differs or fails. It takes half an hour, so it is no test of the suite: run it after an update
of Transformers, or after a change to passes, masks, positions or caches. Kinds that cannot be made small in this
general way, or that ``generate`` itself fails on, are named and left out.
"""

from __future__ import annotations

import argparse
import signal
import sys
import warnings
from typing import Any

import torch
import transformers
from tiny import VOCABULARY, make_noisy, prompts
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from specdec_fast import fast_generate, last_speculation

SECONDS, MOST_PARAMETERS, TOKENS = 240, 60_000_000, 40
# Windows are shorter than the texts, and what is chosen among positions is fewer than those
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "decoder_ffn_dim", "dim_ff"), 48),
    **dict.fromkeys(("ffn_hidden_size", "mlp_hidden_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "linear_num_value_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "decoder_layers", "num_experts_per_tok", "num_experts_per_token"), 2),
    **dict.fromkeys(("linear_num_key_heads", "num_global_key_value_heads", "index_n_heads"), 2),
    **dict.fromkeys(("head_dim", "dim_head", "kv_channels", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_d_head", "mamba_d_state", "mamba_chunk_size", "index_head_dim"), 8),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_head_dim", "global_head_dim"), 16),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "mamba_n_groups"), 1),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "window_size", "attention_chunk_size"), 6),
    **dict.fromkeys(("rotary_dim", "index_block_size"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 256),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    "local_attention": 12,
    "index_topk_blocks": 2,
    "num_kv_shared_layers": 0,
}
LATENT = (
    "deepseek",
    "axk",
    "bailing",
    "glm4_moe_lite",
    "longcat",
    "minicpm3",
    "sarvam_mla",
    "youtu",
)  # heads are equal
OWN: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gemma4_text": {"per_layer_config": {"01": {"head_dim": 16}, "03": {"head_dim": 16}}, "num_kv_shared_layers": 2},
}
# Beyond Moshi's window generate gives a cache that forgets a mask that does not: its text is not the model's own there
KNOWN = {"moshi"}
SPECIAL = (dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")), {"bos_token_id": 1, "eos_token_id": 2})


class Late(Exception):
    """A kind takes too long."""


def small(kind: str) -> PreTrainedConfig:
    """A small configuration of a kind; raises what its class raises where no way to make one is found."""
    whole: Any = CONFIG_MAPPING[kind]().get_text_config(decoder=True)
    made: dict[str, Any] = {}
    for name, size in SIZES.items():
        try:
            known = getattr(whole, name, None) is not None
        except Exception:  # of layers that differ: their own sizes stay
            continue
        if known or name == "head_dim":
            made[name] = size
    if kind.startswith(LATENT):
        made["num_key_value_heads"] = SIZES["num_attention_heads"]
    for name in ("layer_types", "mlp_layer_types"):
        if found := getattr(whole, name, None):
            made[name] = (list(dict.fromkeys(found)) * 4)[:4]
    if hasattr(whole, "is_decoder"):
        made["is_decoder"] = True
    made |= OWN.get(kind, {})
    failed: Exception | None = None
    for special in SPECIAL:
        for without in ((), ("head_dim",), ("layer_types",), ("mlp_layer_types",), ("num_key_value_heads", "head_dim")):
            try:
                given = {name: size for name, size in made.items() if name not in without}
                return type(whole)(**given, **special)
            except Exception as error:  # each configuration class checks in its own way
                failed = failed or error
    assert failed is not None
    raise failed


def built(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small(kind)).eval()
    if model.num_parameters() > MOST_PARAMETERS:
        raise ValueError(f"{model.num_parameters()} parameters")
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 * 1.5)
    model.tie_weights()
    own = model.generation_config
    own.pad_token_id, own.bos_token_id, own.eos_token_id = 0, None, None
    return model


def compared(kind: str) -> tuple[str, bool]:
    """What there is to say of a kind, and whether its text is ``generate``'s."""
    model = built(kind)
    drafter, said = make_noisy(model), ""
    for rows in (1, 3):
        inputs = prompts(rows, padded=rows > 1)
        expected = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        for compile in ("off", "auto", "static"):
            for method in ("autoregressive", "model"):
                own = {"assistant_model": drafter, "num_assistant_tokens": 3} if method == "model" else {}
                settings = {"method": method, "compile": compile, "max_new_tokens": TOKENS, "do_sample": False}
                try:
                    found = fast_generate(model, **inputs, **settings, **own)
                except Exception as error:
                    refused = isinstance(error, ValueError) and "use model.generate" in str(error).replace("Use", "use")
                    return f"{'refused' if refused else 'FAILS'}: {type(error).__name__}: {error}", refused
                statistics = last_speculation()
                said = f"{statistics.forward}/{statistics.loop} {statistics.loop_reason}"
                if not torch.equal(found, expected):
                    return f"DIFFERS with {rows} rows, compile={compile}, method={method}: {said}", False
    return said, True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND")
    kinds = parser.parse_args().kinds or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

    def late(*_: Any) -> None:
        raise Late

    signal.signal(signal.SIGALRM, late)
    right = True
    for kind in kinds:
        signal.alarm(SECONDS)
        try:
            said, same = compared(kind)
        except Exception as error:  # what a model of a general configuration raises has no common base
            said, same = f"left out: {type(error).__name__}: {str(error)[:120]!r}", True
        finally:
            signal.alarm(0)
        right = right and (same or kind in KNOWN)
        print(f"{kind}: {said}{' (known)' if kind in KNOWN and not same else ''}", flush=True)
    return 0 if right else 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity(50)
    warnings.simplefilter("ignore")
    sys.exit(main())
