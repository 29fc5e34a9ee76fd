"""Batched sampling from a Llama target, with its most probable next tokens kept beside every token.

`model.generate` appends to its cache by copying it, which is half of the time on a CPU, and waits
for the longest row. Here the cache is written in place and a finished row is refilled at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM

__all__ = ["Sample", "sample_stream"]


@dataclass
class Sample:
    """A prompt of `prompt_length` tokens and the target's continuation, `[N]` token ids together.

    `top_ids` and `top_probs` are `[N - prompt_length, K]`: the target's K most probable tokens (at
    temperature 1) for each token of the continuation.
    """

    ids: np.ndarray
    prompt_length: int
    temperature: float
    top_ids: np.ndarray
    top_probs: np.ndarray


class Rows:
    """Rows of a preallocated KV cache, each with a length of its own."""

    def __init__(self, model: LlamaForCausalLM, batch: int, max_length: int):
        config = model.config
        self.model = model
        self.kv_heads = config.num_key_value_heads
        self.groups = config.num_attention_heads // self.kv_heads
        self.head_dim = model.model.layers[0].self_attn.head_dim
        shape = (config.num_hidden_layers, batch, self.kv_heads, max_length, self.head_dim)
        self.keys = torch.zeros(shape, dtype=model.dtype)
        self.values = torch.zeros(shape, dtype=model.dtype)
        self.length = torch.zeros(batch, dtype=torch.long)
        positions = torch.arange(max_length)[None]
        cos, sin = model.model.rotary_emb(self.keys, positions)
        self.cos, self.sin = cos[0], sin[0]  # [max_length, head_dim]

    def prefill(self, rows: list[int], prompts: list[list[int]]) -> Tensor:
        """Fill `rows` with `prompts`; the logits of the next token, `[len(rows), V]`."""
        width = max(map(len, prompts))
        ids = torch.tensor([p + [0] * (width - len(p)) for p in prompts])
        output = self.model.model(ids, use_cache=True)  # causal: what stands right of a prompt's end is never seen
        index = torch.tensor(rows)
        for i, layer in enumerate(output.past_key_values.layers):
            self.keys[i, index, :, :width] = layer.keys
            self.values[i, index, :, :width] = layer.values
        ends = torch.tensor([len(p) for p in prompts])
        self.length[index] = ends
        return self.model.lm_head(output.last_hidden_state[torch.arange(len(rows)), ends - 1])

    def step(self, ids: Tensor) -> Tensor:
        """Append one token to every row; the logits of the next one, `[B, V]`."""
        batch = len(ids)
        rows, at = torch.arange(batch), self.length
        reach = int(at.max()) + 1
        mask = (torch.arange(reach)[None] <= at[:, None])[:, None, None]  # [B, 1, 1, reach]
        mask = torch.zeros(mask.shape, dtype=self.keys.dtype).masked_fill_(~mask, float("-inf"))
        mask = mask.expand(batch, 1, self.groups, reach)
        cos, sin = self.cos[at][:, None], self.sin[at][:, None]  # [B, 1, head_dim]

        def rotate(x: Tensor) -> Tensor:
            half = self.head_dim // 2
            return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin

        h = self.model.model.embed_tokens(ids)
        for i, layer in enumerate(self.model.model.layers):
            x, attention = layer.input_layernorm(h), layer.self_attn
            q = rotate(attention.q_proj(x).view(batch, -1, self.head_dim))
            self.keys[i, rows, :, at] = rotate(attention.k_proj(x).view(batch, -1, self.head_dim))
            self.values[i, rows, :, at] = attention.v_proj(x).view(batch, -1, self.head_dim)
            # The heads that share a key are queries of one attention: [B, kv_heads, groups, head_dim].
            q = q.view(batch, self.kv_heads, self.groups, self.head_dim)
            x = F.scaled_dot_product_attention(q, self.keys[i, :, :, :reach], self.values[i, :, :, :reach], mask)
            h = h + attention.o_proj(x.reshape(batch, -1))
            h = h + layer.mlp(layer.post_attention_layernorm(h))
        self.length = at + 1
        return self.model.lm_head(self.model.model.norm(h))


def choose(
    logits: Tensor, temperature: Tensor, top_k: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Next tokens `[B]` (temperature 0: the argmax), and the top `[B, K]` ids and probabilities at temperature 1."""
    logits = logits.float()
    top_logits, top_ids = logits.topk(top_k, -1)
    top_probs = (top_logits - logits.logsumexp(-1, keepdim=True)).exp()
    tokens = top_ids[:, 0].clone()
    drawn = temperature > 0
    if drawn.any():
        cumulative = (logits[drawn] / temperature[drawn, None]).softmax(-1).cumsum(-1)
        u = torch.rand(len(cumulative), 1, generator=generator) * cumulative[:, -1:]
        tokens[drawn] = torch.searchsorted(cumulative, u).squeeze(1).clamp_(max=logits.shape[1] - 1)
    return tokens, top_ids, top_probs


@torch.inference_mode()
def sample_stream(
    model: LlamaForCausalLM,
    prompts: Iterator[tuple[list[int], float]],
    *,
    stop_id: int,
    batch: int = 96,
    refill: int = 8,
    max_prompt: int = 176,
    max_new_tokens: int = 192,
    top_k: int = 12,
    seed: int = 0,
) -> Iterator[Sample]:
    """Yield samples for ever; `prompts` gives (token ids, temperature)."""
    generator = torch.Generator().manual_seed(seed)
    cache = Rows(model, batch, max_prompt + max_new_tokens + 1)
    logits = torch.zeros(batch, model.config.vocab_size, dtype=model.dtype)
    temperature = torch.zeros(batch)
    prompt: list[list[int]] = [[] for _ in range(batch)]
    history: list[list[tuple[int, np.ndarray, np.ndarray]]] = [[] for _ in range(batch)]
    free = list(range(batch))
    while True:
        while len(free) >= refill:
            rows, free = free[:refill], free[refill:]
            fresh = []
            for row in rows:
                while True:
                    ids, t = next(prompts)
                    if len(ids) <= max_prompt:
                        break
                prompt[row], history[row] = ids, []
                temperature[row] = t
                fresh.append(ids)
            logits[rows] = cache.prefill(rows, fresh)
        tokens, top_ids, top_probs = choose(logits, temperature, top_k, generator)
        listed, ids_np, probs_np = (
            tokens.tolist(),
            top_ids.numpy().astype(np.uint16),
            top_probs.numpy().astype(np.float16),
        )
        idle = set(free)
        for row in range(batch):
            if row in idle:
                cache.length[row] = 0
                continue
            history[row].append((listed[row], ids_np[row], probs_np[row]))
            if listed[row] == stop_id or len(history[row]) == max_new_tokens:
                tokens_out, a, b = zip(*history[row], strict=True)
                yield Sample(
                    np.array(prompt[row] + list(tokens_out), np.uint16),
                    len(prompt[row]), float(temperature[row]), np.stack(a), np.stack(b),
                )  # fmt: skip
                free.append(row)
        logits = cache.step(tokens)
