"""Data of the drafter's training: shards of the target's samples, and what they are in the drafter's tokens."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from drafter_prompts import Overlap, Prompt
from drafter_sampler import Sample
from torch import Tensor
from transformers import PreTrainedTokenizerFast


def evaluation_texts(paths: list[Path]) -> Iterator[str]:
    """Every string of some JSON-lines files."""

    def strings(value):
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            for inner in value.values() if isinstance(value, dict) else value:
                yield from strings(inner)

    for path in paths:
        for line in path.read_text("utf-8").splitlines():
            yield from strings(json.loads(line))


def encode_prompt(tokenizer, prompt: Prompt) -> list[int]:
    text = prompt.text
    if prompt.chat:
        messages = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


def save_shard(path: Path, samples: list[Sample]) -> None:
    np.savez(
        path,
        ids=np.concatenate([s.ids for s in samples]),
        length=np.array([len(s.ids) for s in samples], np.int32),
        prompt_length=np.array([s.prompt_length for s in samples], np.int32),
        temperature=np.array([s.temperature for s in samples], np.float32),
        top_ids=np.concatenate([s.top_ids for s in samples]),
        top_probs=np.concatenate([s.top_probs for s in samples]),
    )


def load_shards(folders: list[Path], known: set[Path] | None = None) -> Iterator[Sample]:
    """The samples of all shards, less those of `known` shards; what is read becomes known."""
    known = set() if known is None else known
    for path in sorted(p for folder in folders for p in folder.glob("*.npz") if p not in known):
        known.add(path)
        with np.load(path) as shard:
            data = {name: shard[name] for name in shard.files}
        at = top = 0
        for n, m, t in zip(data["length"], data["prompt_length"], data["temperature"], strict=True):
            ids, k = data["ids"][at : at + n], n - m
            yield Sample(ids, int(m), float(t), data["top_ids"][top : top + k], data["top_probs"][top : top + k])
            at, top = at + n, top + k


# --- training data in the drafter's tokens -------------------------------------------------------


@dataclass
class Tokens:
    """A stream of drafter tokens `[N]` and, for each, the sparse law it was drawn from: `[N, K]` ids and weights."""

    ids: np.ndarray
    law_ids: np.ndarray
    law_weights: np.ndarray


class Translation:
    """The target's tokens in the drafter's: `pieces` of each, its `first` piece, whether it is a `single` one."""

    def __init__(self, target_folder: Path, drafter: PreTrainedTokenizerFast):
        spec = json.loads((target_folder / "tokenizer.json").read_text("utf-8"))
        vocab = drafter.get_vocab()
        special = {t["id"]: t["content"] for t in spec["added_tokens"]}
        texts = {i: token for token, i in spec["model"]["vocab"].items()} | special
        backend = drafter.backend_tokenizer.model
        self.pieces: list[list[int]] = []  # the drafter's tokens of each target token
        for i in range(max(texts) + 1):
            token = texts[i]
            if token in vocab:
                self.pieces.append([vocab[token]])
            elif i in special:
                self.pieces.append([vocab["<|endoftext|>"]])
            else:
                self.pieces.append([p.id for p in backend.tokenize(token)])
        self.first = np.array([p[0] for p in self.pieces])
        self.single = np.array([len(p) == 1 for p in self.pieces])

    def __call__(self, item: Sample, prompt_weight: float) -> Tokens:
        """Each target token becomes its pieces.

        The law of a first piece is the target's law summed over the tokens that begin with that piece;
        of a later piece, the same among the target tokens that begin with the pieces so far.
        """
        k = item.top_ids.shape[1]
        n = item.prompt_length
        probs = item.top_probs.astype(np.float32)
        answer = item.ids[n:]
        # What the top K leave goes to the emitted token, if it is not among them.
        missed = (item.top_ids != answer[:, None]).all(1)
        top_ids = item.top_ids.copy()
        top_ids[missed, -1] = answer[missed]
        probs[missed, -1] = np.maximum(0, 1 - probs[missed, :-1].sum(1))
        probs /= probs.sum(1, keepdims=True)

        ids: list[int] = []
        law_ids: list[np.ndarray] = []
        law_weights: list[np.ndarray] = []
        for token in item.ids[:n]:
            for piece in self.pieces[token]:
                ids.append(piece)
                law_ids.append(np.full(k, piece))
                law_weights.append(np.full(k, prompt_weight / k))
        first = self.first[top_ids]
        for i, token in enumerate(answer):
            pieces = self.pieces[token]
            ids.append(pieces[0])
            law_ids.append(first[i])
            law_weights.append(probs[i])
            for j in range(1, len(pieces)):
                paths = [self.pieces[t] for t in top_ids[i]]
                fits = [len(p) > j and p[:j] == pieces[:j] for p in paths]
                weights = np.where(fits, probs[i], 0)
                ids.append(pieces[j])
                law_ids.append(np.array([p[j] if f else 0 for p, f in zip(paths, fits, strict=True)]))
                law_weights.append(weights / max(weights.sum(), 1e-9))
        return Tokens(
            np.array(ids, np.int32), np.stack(law_ids).astype(np.int32), np.stack(law_weights).astype(np.float16)
        )


def plain_texts(
    paths: list[Path], tokenizer: PreTrainedTokenizerFast, excluded: Overlap, k: int, length: int = 384
) -> list[Tokens]:
    """Pieces of files, each token its own law."""
    found = []
    for path in paths:
        text = path.read_text("utf-8", errors="replace")
        ids = np.array(tokenizer.encode(text, add_special_tokens=False), np.int32)
        for piece in np.split(ids, range(length, len(ids), length)):
            if len(piece) > 32 and not excluded(tokenizer.decode(piece)):
                law_ids = np.repeat(piece[:, None], k, 1)
                found.append(Tokens(piece, law_ids, np.full(law_ids.shape, 1 / k, np.float16)))
    return found


@dataclass
class Batch:
    """Items side by side, padded on the right: ids `[B, N]`, laws `[B, N, K]` (weight 0: nothing to learn)."""

    ids: Tensor
    law_ids: Tensor
    law_weights: Tensor


def join(items: list[Tokens]) -> Tokens:
    return Tokens(*(np.concatenate([getattr(i, name) for i in items]) for name in ("ids", "law_ids", "law_weights")))


def alike(items: list[Any], size: int, rng: random.Random) -> list[list[Any]]:
    """Groups of items whose `ids` are of like length, about `size` of these a group, in random order."""
    groups = []
    for start in range(0, len(items), 512):
        group: list[Any] = []
        for item in sorted(items[start : start + 512], key=lambda i: len(i.ids)):
            if group and (len(group) + 1) * len(item.ids) > size:
                groups.append(group)
                group = []
            group.append(item)
        groups.append(group)
    rng.shuffle(groups)
    return groups


def batches(items: list[Tokens], size: int, rng: random.Random, long_share: float = 0.1) -> Iterator[Batch]:
    """Batches of about `size` tokens, items of like length together, for ever.

    A share of the items is joined by fours, so that longer contexts occur as well.
    """

    def collate(group: list[Tokens]) -> Batch:
        width, k = max(len(i.ids) for i in group), group[0].law_ids.shape[1]
        ids = torch.zeros(len(group), width, dtype=torch.long)
        law_ids = torch.zeros(len(group), width, k, dtype=torch.long)
        law_weights = torch.zeros(len(group), width, k)
        for row, item in enumerate(group):
            n = len(item.ids)
            ids[row, :n] = torch.from_numpy(item.ids)
            law_ids[row, :n] = torch.from_numpy(item.law_ids)
            law_weights[row, :n] = torch.from_numpy(item.law_weights)
        return Batch(ids, law_ids, law_weights)

    while True:
        order = rng.sample(items, len(items))
        cut = int(len(order) * long_share)
        pool = [join(order[i : i + 4]) for i in range(0, cut, 4)] + order[cut:]
        rng.shuffle(pool)
        yield from map(collate, alike(pool, size, rng))
