"""Batched sampling from a Llama target, with its most probable next tokens kept beside every token.

Rows have lengths of their own and one cache, so a finished row is refilled at once; a step of all rows is one native
call (``specdec_fast/lean.py``) that reads of each row what it holds, not the longest row's width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from specdec_fast.cache import RaggedCache
from specdec_fast.lean import lean_model

__all__ = ["Sample", "sample_stream"]

LANES = 192  # positions of a native pass that fills prompts in


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
    """Rows of one key-value cache, each with a length of its own.

    Raises:
        RuntimeError: the model has no native pass here.
    """

    def __init__(self, model: LlamaForCausalLM, batch: int, max_length: int):
        lean = lean_model(model, rounded=False)
        if lean is None:
            raise RuntimeError("this model has no native pass: build the package's native code, on a CPU")
        self.lean = lean
        self.cache = RaggedCache(batch, model.config.num_hidden_layers)
        self.cache.window.end = max_length
        self.length = torch.zeros(batch, dtype=torch.long)

    def fill(self, rows: list[int], texts: list[list[int]]) -> None:
        """Begin `rows` with `texts` (of at least one token), less the last token of each, which the next step reads."""
        width = max(map(len, texts)) - 1
        ids = torch.tensor([t[:-1] + [0] * (width + 1 - len(t)) for t in texts])
        window, share = self.cache.window, max(1, LANES // len(rows))
        window.rows = torch.tensor(rows)
        for first in range(0, width, share):  # what stands right of a text's end is overwritten before it is seen
            columns = torch.arange(first, min(first + share, width)).expand(len(rows), -1)
            self.lean(ids[:, first : first + share], columns, [0] * len(rows), self.cache, [0])
        window.rows = None
        self.length[rows] = torch.tensor([len(t) - 1 for t in texts])

    def step(self, ids: Tensor) -> Tensor:
        """Append one token to every row; the logits of the next one, `[B, V]` float32."""
        logits = self.lean(ids[:, None], self.length[:, None], [0] * len(ids), self.cache, [0])
        self.length += 1
        return logits[:, 0]


def choose(
    logits: Tensor, temperature: Tensor, top_k: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Next tokens `[B]` (temperature 0: the argmax), and the top `[B, K]` ids and probabilities at temperature 1."""
    top_logits, top_ids = logits.topk(top_k, -1)
    probs = (logits - top_logits[:, :1]).exp_()
    top_probs = probs.gather(1, top_ids) / probs.sum(-1, keepdim=True)
    tokens = top_ids[:, 0].clone()
    drawn = (temperature > 0).nonzero()[:, 0]
    if len(drawn):
        weights = probs[drawn]
        cooled = (temperature[drawn] != 1).nonzero()[:, 0]
        weights[cooled] = weights[cooled].pow_(1 / temperature[drawn][cooled, None])
        cumulative = weights.cumsum(-1)
        u = torch.rand(len(drawn), 1, generator=generator) * cumulative[:, -1:]
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
    ahead: int = 64,
    max_prompt: int = 176,
    max_new_tokens: int = 192,
    top_k: int = 12,
    seed: int = 0,
) -> Iterator[Sample]:
    """Yield samples for ever; `prompts` gives (token ids, temperature).

    `refill` prompts of like length, of the next `ahead`, are filled in at once.
    """
    generator = torch.Generator().manual_seed(seed)
    cache = Rows(model, batch, max_prompt + max_new_tokens + 1)
    temperature = torch.zeros(batch)
    last = torch.zeros(batch, dtype=torch.long)
    prompt: list[list[int]] = [[] for _ in range(batch)]
    history: list[list[tuple[int, np.ndarray, np.ndarray]]] = [[] for _ in range(batch)]
    free = list(range(batch))
    waiting: list[tuple[list[int], float]] = []
    fitting = ((ids, t) for ids, t in prompts if len(ids) <= max_prompt)
    while True:
        while len(free) >= refill:
            rows, free = sorted(free[:refill]), free[refill:]
            if len(waiting) < refill:
                waiting += islice(fitting, ahead)
                waiting.sort(key=lambda item: len(item[0]))
            at = torch.randint(max(1, len(waiting) - refill + 1), (), generator=generator).item()
            taken, waiting[at : at + refill] = waiting[at : at + refill], []
            for row, (ids, t) in zip(rows, taken, strict=True):
                prompt[row], history[row] = ids, []
                temperature[row], last[row] = t, ids[-1]
            cache.fill(rows, [ids for ids, _ in taken])
        cache.length[free] = 0
        last, top_ids, top_probs = choose(cache.step(last), temperature, top_k, generator)
        listed, ids_np, probs_np = (
            last.tolist(),
            top_ids.numpy().astype(np.uint16),
            top_probs.numpy().astype(np.float16),
        )
        idle = set(free)
        for row in range(batch):
            if row in idle:
                continue
            history[row].append((listed[row], ids_np[row], probs_np[row]))
            if listed[row] == stop_id or len(history[row]) == max_new_tokens:
                tokens_out, a, b = zip(*history[row], strict=True)
                yield Sample(
                    np.array(prompt[row] + list(tokens_out), np.uint16),
                    len(prompt[row]), float(temperature[row]), np.stack(a), np.stack(b),
                )  # fmt: skip
                free.append(row)
