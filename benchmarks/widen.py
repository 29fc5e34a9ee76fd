"""Models of real shapes with the function of a small one: what speculation costs there, at an acceptance that is real.

A small Llama is widened in every direction without changing a logit:

- hidden size: the new entries of the residual stream stay zero, because nothing writes to them. RMSNorm divides by the
  mean over more entries, so with ``h`` of ``H`` entries in use its weight becomes ``sqrt(h / H) w`` and its epsilon
  ``eps h / H``;
- heads and MLP units: new ones have weights as usual and columns of zeros in ``o_proj`` and ``down_proj``. A small
  model's query heads keep their key and value head. A head of twice the size puts rotary pair ``j`` where its frequency
  is, at ``2 j``, and scales the query by ``sqrt(2)``, since scores are divided by the root of the size;
- layers: new ones write nothing, their ``o_proj`` and ``down_proj`` are zero;
- vocabulary: the logits of new entries must be low wherever the model goes. One entry of the residual stream holds a
  small constant ``c`` with ``c^2 <= eps h``, which the final norm's epsilon gives up for it; the final norm's weight
  makes it large, and the new rows of the head read nothing else.

All matrices are as large, and read as often, as those of the large model; the law is the small one's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

LOW = 1e6  # weight of the constant in the final norm: new logits lie below -100 wherever the stream is shorter than 500


@dataclass(frozen=True)
class Shape:
    """The sizes of a model; the last three as ``LlamaConfig`` names them."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int

    @classmethod
    def of(cls, config: LlamaConfig) -> Shape:
        """Of a model there is."""
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = config.num_attention_heads, config.num_key_value_heads, head
        return cls(config.hidden_size, config.num_hidden_layers, *heads, config.intermediate_size, config.vocab_size)

    def parameters_read(self) -> int:
        """Weights that a pass reads: all but the embedding table."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate) + self.vocab * self.hidden

    def cache_entries(self) -> int:
        """Numbers that one position keeps in the cache."""
        return 2 * self.layers * self.kv_heads * self.head_dim


SHAPES = {  # of Qwen2.5-0.5B, Llama-3.2-1B and Llama-3.1-8B
    "0.5B": Shape(896, 24, 14, 2, 64, 4864, 151936),
    "1B": Shape(2048, 16, 32, 8, 64, 8192, 128256),
    "8B": Shape(4096, 32, 32, 8, 128, 14336, 128256),
}


@torch.no_grad()
def widen(small: LlamaForCausalLM, shape: Shape, *, dtype: torch.dtype, device: torch.device | str) -> LlamaForCausalLM:
    """A model of ``shape`` with the logits of ``small`` on its vocabulary, and low ones behind it.

    Args:
        small: without biases; its rotary embedding as it is by default.
        shape: at least as large in everything; heads of a multiple of the size, and as many query heads a key head.
        dtype, device: of the result, which is built in place.

    Raises:
        ValueError: a size that is too small or does not divide.
    """
    own = Shape.of(small.config)
    _check(own, shape)
    config = _config(small.config, own, shape)
    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            large = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(previous)
    large.eval()
    constant = math.sqrt(small.config.rms_norm_eps * own.hidden) * 0.9 if shape.vocab > own.vocab else 0.0
    _embed(small, large, constant)
    for number, layer in enumerate(large.model.layers):
        # Nothing is written but what the small model's layer of that number writes
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        if number < own.layers:
            _layer(small.model.layers[number], layer, own, shape)
    _final(small, large, constant)
    return large


def _check(own: Shape, shape: Shape) -> None:
    for name in ("hidden", "layers", "heads", "kv_heads", "head_dim", "intermediate", "vocab"):
        if getattr(shape, name) < getattr(own, name):
            raise ValueError(f"{name} {getattr(shape, name)} is less than the small model's {getattr(own, name)}")
    if shape.head_dim % own.head_dim:
        raise ValueError(f"head_dim {shape.head_dim} is no multiple of {own.head_dim}")
    if shape.heads // shape.kv_heads < own.heads // own.kv_heads:
        raise ValueError("there are fewer query heads a key head than in the small model")
    if shape.vocab > own.vocab and shape.hidden == own.hidden:
        raise ValueError("a larger vocabulary needs a larger hidden size")


def _config(small: LlamaConfig, own: Shape, shape: Shape) -> LlamaConfig:
    config = LlamaConfig.from_dict(small.to_dict())
    config.hidden_size, config.num_hidden_layers, config.vocab_size = shape.hidden, shape.layers, shape.vocab
    config.num_attention_heads, config.num_key_value_heads = shape.heads, shape.kv_heads
    config.head_dim, config.intermediate_size = shape.head_dim, shape.intermediate
    config.tie_word_embeddings = False
    config.rms_norm_eps = small.rms_norm_eps * own.hidden / shape.hidden
    return config


def _embed(small: LlamaForCausalLM, large: LlamaForCausalLM, constant: float) -> None:
    table, own = large.model.embed_tokens.weight, small.model.embed_tokens.weight
    table.zero_()
    table[: own.shape[0], : own.shape[1]] = own
    if constant:
        table[:, own.shape[1]] = constant


def _norm(small: Tensor, large: Tensor) -> None:
    large.zero_()  # the constant of the stream is read by nobody but the head
    large[: small.shape[0]] = small * math.sqrt(small.shape[0] / large.shape[0])


def _layer(small: LlamaForCausalLM, large: LlamaForCausalLM, own: Shape, shape: Shape) -> None:
    _norm(small.input_layernorm.weight, large.input_layernorm.weight)
    _norm(small.post_attention_layernorm.weight, large.post_attention_layernorm.weight)
    query = _heads(own.heads, own.heads // own.kv_heads, shape.heads // shape.kv_heads)
    rotary, plain = _rotary(own.head_dim, shape.head_dim), torch.arange(own.head_dim)
    places = {
        "q_proj": _rows(query, rotary, shape.head_dim),
        "k_proj": _rows(torch.arange(own.kv_heads), rotary, shape.head_dim),
        "v_proj": _rows(torch.arange(own.kv_heads), plain, shape.head_dim),
    }
    # What a wider head has beside the small one's entries must not reach its scores
    wide = large.self_attn.q_proj.weight
    wide.view(shape.heads, shape.head_dim, -1)[query.to(wide.device)] = 0
    for name, rows in places.items():
        weight = getattr(small.self_attn, name).weight
        if name == "q_proj":
            weight = weight * math.sqrt(shape.head_dim / own.head_dim)
        _put(getattr(large.self_attn, name).weight, weight, rows)
    columns = _rows(query, plain, shape.head_dim)
    _put(large.self_attn.o_proj.weight.T, small.self_attn.o_proj.weight.T, columns)
    units = torch.arange(own.intermediate)
    for name in ("gate_proj", "up_proj"):
        _put(getattr(large.mlp, name).weight, getattr(small.mlp, name).weight, units)
    _put(large.mlp.down_proj.weight.T, small.mlp.down_proj.weight.T, units)


def _heads(heads: int, group: int, wide: int) -> Tensor:
    """Where query heads go: the same key head, in groups of ``wide`` in place of ``group``."""
    number = torch.arange(heads)
    return number // group * wide + number % group


def _rotary(small: int, large: int) -> Tensor:
    """Where the entries of a head go, so that each keeps its frequency: pairs are ``(j, j + size / 2)``."""
    pair = torch.arange(small // 2) * (large // small)
    return torch.cat([pair, pair + large // 2])


def _rows(heads: Tensor, entries: Tensor, size: int) -> Tensor:
    return (heads.unsqueeze(1) * size + entries).reshape(-1)


def _put(large: Tensor, small: Tensor, rows: Tensor) -> None:
    """``small [r, c]`` into the first ``c`` columns of these rows."""
    large[rows.to(large.device), : small.shape[1]] = small.to(large)


def _final(small: LlamaForCausalLM, large: LlamaForCausalLM, constant: float) -> None:
    own, head = small.lm_head.weight, large.lm_head.weight
    width = own.shape[1]
    _norm(small.model.norm.weight, large.model.norm.weight)
    head.zero_()
    head[: own.shape[0], :width] = own
    if constant:
        large.model.norm.weight[width] = LOW
        head[own.shape[0] :, width] = -1.0
        large.model.norm.variance_epsilon -= constant**2 / large.config.hidden_size
        for layer in large.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.variance_epsilon -= constant**2 / large.config.hidden_size
