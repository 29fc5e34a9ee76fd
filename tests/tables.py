"""Models whose logits are read from a table, and vocabularies of a few tokens, for the enumeration tests.

A table model is a real model to the code under test: it has a cache, masks and positions, and its logits depend on the
whole text before them. Tables hold exact zeros, point masses and ties, which weights cannot be made to yield.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import GenerationMixin, LlamaConfig, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["PAIRS", "Pair", "TableModel", "exact_laws", "tokenizer"]

ROWS, BASE = 4093, 1543  # primes: rows of a table, and the base texts are hashed with
INF = float("inf")


class TableModel(PreTrainedModel, GenerationMixin):
    """Logits are the row of a table that the text's hash names.

    The cache's keys are the ids themselves, so what a pass sees of the text before is what the cache and the mask show.

    Args:
        table: ``[ROWS, V]`` float32.
    """

    config_class = LlamaConfig
    _supports_sdpa = True

    def __init__(self, table: Tensor):
        config = LlamaConfig(
            vocab_size=table.shape[1],
            hidden_size=1,
            num_hidden_layers=1,
            num_attention_heads=1,
            max_position_embeddings=256,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
        super().__init__(config)
        self.embedding = torch.nn.Embedding(table.shape[1], 1)
        self.table = table

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return self.embedding

    def get_output_embeddings(self) -> None:
        return None

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
    ) -> Any:
        n = input_ids.shape[1]
        start, text = 0, input_ids
        if past_key_values is not None:
            start = past_key_values.get_seq_length()
            keys = input_ids[:, None, :, None].float()
            text = past_key_values.update(keys, keys, 0)[0][:, 0, :, 0].long()
        columns = torch.arange(text.shape[1])
        if attention_mask is not None and attention_mask.ndim == 4:
            seen = attention_mask[:, 0]
        else:
            seen = (columns <= start + torch.arange(n).unsqueeze(1)).expand(len(text), -1, -1)
            if attention_mask is not None:
                seen = seen & attention_mask.bool().unsqueeze(1)
        lanes = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        seen = seen[:, lanes].long()
        place = seen.cumsum(-1) - 1
        code = (seen * (text + 1).unsqueeze(1) * _powers()[place.clamp(min=0)]).sum(-1) % ROWS
        return SimpleNamespace(logits=self.table[code])


@cache
def _powers() -> Tensor:
    powers = [1]
    while len(powers) < 512:
        powers.append(powers[-1] * BASE % ROWS)
    return torch.tensor(powers)


def exact_laws(
    table: Tensor, prompt: Sequence[int], steps: int, chain: LogitsProcessorList
) -> dict[tuple[int, ...], list[float]]:
    """The target's next-token law behind every continuation of a prompt by less than ``steps`` tokens.

    Computed from the table alone, with Transformers' own processors.
    """
    width = table.shape[1]
    texts = [c for n in range(steps) for c in itertools.product(range(width), repeat=n)]
    code = [sum((t + 1) * pow(BASE, i, ROWS) for i, t in enumerate([*prompt, *c])) % ROWS for c in texts]
    scores = table[code]
    if chain:
        scores = chain(torch.zeros((len(code), 1), dtype=torch.long), scores.clone())
    return dict(zip(texts, scores.double().softmax(-1).tolist(), strict=True))


@cache
def tokenizer(pieces: tuple[str, ...], *, opening: bool = False) -> PreTrainedTokenizerFast:
    """A BPE whose id ``i`` is ``pieces[i]``, merges as they come.

    Args:
        pieces: in GPT-2's byte alphabet, or with byte fallback where one of them is ``<0xNN>``. ``</s>`` is the eos.
        opening: ``<s>``, which must be among them, is put before every text.
    """
    specials = [piece for piece in ("<s>", "</s>") if piece in pieces]
    merges = [
        [piece[:i], piece[i:]]
        for piece in pieces
        if not piece.startswith("<")
        for i in range(1, len(piece))
        if piece[:i] in pieces and piece[i:] in pieces
    ]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    fallback = any(piece.startswith("<0x") for piece in pieces)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(pair) for pair in merges], byte_fallback=fallback))
    if fallback:
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
    roles = {"<s>": "bos_token", "</s>": "eos_token"}
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **{roles[piece]: piece for piece in specials})
    if opening:
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocab["<s>"])]
        )
    return made


@dataclass(frozen=True)
class Pair:
    """Two vocabularies of 3 to 6 tokens.

    Args:
        target, drafter: pieces by id.
        opening: the drafter's tokenizer puts ``<s>`` before a text.
    """

    target: tuple[str, ...]
    drafter: tuple[str, ...]
    opening: bool = False

    @property
    def tokenizers(self) -> dict[str, PreTrainedTokenizerFast]:
        return {
            "tokenizer": tokenizer(self.target),
            "assistant_tokenizer": tokenizer(self.drafter, opening=self.opening),
        }


# é is the bytes 0xC3 0xA9, which GPT-2's alphabet writes Ã and ©
PAIRS = {
    "small": Pair(("a", "b", "ab"), ("b", "a", "ba")),
    "crossing": Pair(("a", "b", "c", "ab"), ("c", "b", "a", "bc", "ca")),
    "larger": Pair(("</s>", "a", "b", "ba"), ("a", "b", "</s>", "ab", "bb", "aba")),
    "same bytes": Pair(("a", "<0x61>", "b"), ("<0x62>", "b", "a", "ab")),
    "inside a character": Pair(("a", "Ã", "©", "Ã©"), ("Ã", "a", "©", "©a", "aÃ")),
}

KINDS = ("dense", "common", "first half", "second half", "one-hot", "holes", "ties", "flat")
_MIXTURE = torch.tensor([0.55, 0.12, 0.06, 0.06, 0.05, 0.12, 0.04, 0.0])


@cache
def tables(
    target: tuple[str, ...], drafter: tuple[str, ...], seed: int, target_kind: str = "", drafter_kind: str = ""
) -> tuple[Tensor, Tensor]:
    """Scores of target and drafter, ``[ROWS, V]`` and ``[ROWS, K]``, every row of a kind of its own.

    *common*: one law for all such rows, on the pieces both have, the same on both sides. *first half*, *second half*:
    random, on that half of the pieces both have; two tables of these kinds have disjoint supports. *holes*: random,
    each piece forbidden with probability 0.4. *ties*: the same score on two pieces, nothing elsewhere. *flat*: the same
    score on all.

    Args:
        target, drafter: pieces by id. Where they are the same, some rows are the same on both sides.
        seed: of everything random.
        target_kind, drafter_kind: one of `KINDS` for all rows of a side; empty: a mixture.
    """
    generator = torch.Generator().manual_seed(seed)
    spoken = [[_spoken(piece) for piece in pieces] for pieces in (target, drafter)]
    both = [piece for piece in dict.fromkeys(spoken[0]) if piece in spoken[1]]
    common = dict(zip(both, torch.randn(len(both), generator=generator).tolist(), strict=True))
    made = []
    for pieces, kind in zip(spoken, (target_kind, drafter_kind), strict=True):
        shape = (ROWS, len(pieces))
        dense = torch.randn(shape, generator=generator) * 1.5
        half = len(both) // 2 or 1
        kinds = {
            "dense": dense,
            "common": torch.tensor([common.get(piece, -INF) for piece in pieces]).expand(shape),
            "first half": _only(dense, [piece in both[:half] for piece in pieces]),
            "second half": _only(dense, [piece in both[half:] for piece in pieces]),
            "one-hot": _keep(dense, 1),
            "holes": dense.masked_fill(torch.rand(shape, generator=generator) < 0.4, -INF),
            "ties": torch.zeros(shape).masked_fill(_keep(dense, 2) == -INF, -INF),
            "flat": torch.zeros(shape),
        }
        picked = torch.multinomial(_MIXTURE, ROWS, replacement=True, generator=generator)
        if kind:
            picked[:] = KINDS.index(kind)
        rows = torch.stack([kinds[name] for name in KINDS])[picked, torch.arange(ROWS)]
        empty = rows.amax(-1, keepdim=True) == -INF
        made.append(torch.where(empty, dense, rows).contiguous())
    if target == drafter:
        same = torch.rand(ROWS, generator=generator) < (0.0 if target_kind else 0.15)
        made[1][same] = made[0][same]
    return made[0], made[1]


def _spoken(piece: str) -> str:
    return chr(int(piece[3:5], 16)) if piece.startswith("<0x") else piece


def _only(scores: Tensor, allowed: list[bool]) -> Tensor:
    return scores.masked_fill(~torch.tensor(allowed), -INF)


def _keep(scores: Tensor, count: int) -> Tensor:
    """Each row's largest entries, nothing elsewhere."""
    least = scores.topk(count, -1).values[:, -1:]
    return torch.where(scores >= least, scores, -INF)
