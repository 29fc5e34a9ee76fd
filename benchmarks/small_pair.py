"""A small target and two small drafters, trained in minutes on the Python sources of any machine.

The target and one drafter share a byte-level tokenizer, the other drafter has one of its own. They stand behind the
models of real shapes in ``end_to_end.py``: what they accept from each other is real, if on Python sources alone. Both
drafters begin as the target's first and last layer and its embeddings, as pruned ones do. The one that shares the
tokenizer learns from the target's distributions, as shipped drafters do, the other from text.
"""

from __future__ import annotations

import math
import random
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|end|>"
HELD_OUT = 20  # every so many files, for prompts


@dataclass(frozen=True)
class Recipe:
    """Sizes of a small model; two key heads, so that every real shape has room for it."""

    hidden: int
    layers: int
    heads: int
    vocab: int

    def config(self, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=2,
            head_dim=64,
            intermediate_size=self.hidden * 3,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            rms_norm_eps=1e-5,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )


TARGET, DRAFTER, OTHER = Recipe(384, 6, 6, 8192), Recipe(384, 2, 6, 8192), Recipe(384, 2, 6, 5000)
TINY = Recipe(128, 1, 2, 400)  # for trying the steps
ROLES = ("target", "drafter", "other")


def sources(most: int) -> list[str]:
    """Texts of Python files, the same order everywhere, about ``most`` characters."""
    folders = [Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib")]
    files = sorted({file for folder in folders if folder.is_dir() for file in folder.rglob("*.py")})
    random.Random(0).shuffle(files)
    texts, total = [], 0
    for file in files:
        text = file.read_text("utf-8", errors="ignore")
        if 1000 < len(text) < 200_000:
            texts.append(text)
            total += len(text)
        if total > most:
            break
    return texts


def split(texts: list[str]) -> tuple[list[str], list[str]]:
    """For training and for prompts."""
    return [t for i, t in enumerate(texts) if i % HELD_OUT], texts[::HELD_OUT]


def make_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of its own."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )


def train(
    model: LlamaForCausalLM,
    ids: Tensor,
    seconds: float,
    *,
    batch: int,
    length: int,
    teacher: LlamaForCausalLM | None = None,
) -> float:
    """Training until the time is up, on the next token or, with a teacher, on its distribution of it.

    Returns:
        the mean loss of the last tenth, cross entropy in both cases.
    """
    device = model.device
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.05)
    generator = torch.Generator().manual_seed(0)
    begin, losses = time.monotonic(), [(0.0, math.log(model.config.vocab_size))]
    ids = ids.to(device)
    model.train()
    while (share := (time.monotonic() - begin) / seconds) < 1:
        for group in optimizer.param_groups:
            warm = min(1.0, len(losses) / 100)
            group["lr"] = 1.5e-3 * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))
        starts = torch.randint(0, len(ids) - length, (batch, 1), generator=generator)
        rows = ids[(starts + torch.arange(length)).to(device)]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(rows, labels=rows).loss if teacher is None else _taught(model(rows).logits, teacher, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append((share, loss.item()))
    model.eval()
    last = [loss for share, loss in losses if share >= 0.9] or [losses[-1][1]]
    return sum(last) / len(last)


def _taught(logits: Tensor, teacher: LlamaForCausalLM, rows: Tensor) -> Tensor:
    """Cross entropy from the teacher's distributions."""
    with torch.no_grad():
        wanted = teacher(rows).logits.float().softmax(-1)
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), wanted.flatten(0, 1))


@torch.no_grad()
def begin(
    drafter: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    target: LlamaForCausalLM,
    own: PreTrainedTokenizerFast,
) -> None:
    """Gives a drafter of the target's widths its first and last layer, and its embeddings of the same text.

    Args:
        tokenizer, own: of the drafter and of the target; a token has the mean of those that spell it.
    """
    layers = target.model.layers
    for mine, theirs in zip(drafter.model.layers, (layers[0], layers[-1]), strict=False):
        mine.load_state_dict(theirs.state_dict())
    drafter.model.norm.load_state_dict(target.model.norm.state_dict())
    table, words = target.model.embed_tokens.weight, drafter.model.embed_tokens.weight
    if tokenizer is own:
        words.copy_(table)
        return
    for token in range(len(tokenizer)):
        spelled = own(tokenizer.decode([token]), add_special_tokens=False)["input_ids"]
        if spelled:
            words[token] = table[spelled].mean(0)


def prepare(folder: Path, device: torch.device, seconds: float, *, tiny: bool) -> Iterator[str]:
    """Trains what is not there yet, and says so; a model a step.

    Args:
        folder: a folder a role below it, in Hugging Face layout; ``prompts.txt`` pieces of held-out files.
        device: trained there.
        seconds: for the target; a drafter gets half.
        tiny: sizes for trying the steps.
    """
    recipes = dict.fromkeys(ROLES, TINY) if tiny else dict(zip(ROLES, (TARGET, DRAFTER, OTHER), strict=True))
    if tiny:
        recipes["other"] = Recipe(128, 1, 2, 350)
    if all((folder / role / "config.json").exists() for role in ROLES):
        return
    learnt, _ = split(sources(400_000 if tiny else 60_000_000))
    sample = learnt[:40] if tiny else learnt[:2000]
    shared = make_tokenizer(sample, recipes["target"].vocab)
    tokenizers = {"target": shared, "drafter": shared, "other": make_tokenizer(sample[::2], recipes["other"].vocab)}
    for role in ROLES:
        if (folder / role / "config.json").exists():
            continue
        tokenizer = tokenizers[role]
        encoded = tokenizer(learnt, add_special_tokens=False)["input_ids"]
        end = tokenizer.eos_token_id
        ids = torch.tensor([i for text in encoded for i in (*text, end)])
        torch.manual_seed(0)
        model = LlamaForCausalLM(recipes[role].config(tokenizer)).to(device)
        size = dict(zip(("batch", "length"), (2, 64) if tiny else (48, 512), strict=True))
        teacher = None
        if role != "target":
            target = LlamaForCausalLM.from_pretrained(folder / "target").eval().to(device)
            begin(model, tokenizer, target, shared)
            teacher = target if role == "drafter" else None
        loss = train(model, ids, seconds if role == "target" else seconds / 2, **size, teacher=teacher)
        model.cpu().save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)
        yield f"{role}: {model.num_parameters() / 1e6:.1f} M parameters, {len(ids)} tokens of text, loss {loss:.2f}"


def prompts(count: int, length: int, *, tiny: bool) -> list[str]:
    """Beginnings of held-out files, cut at a line."""
    _, held = split(sources(400_000 if tiny else 60_000_000))
    found = [text[: text.rindex("\n", 0, length) + 1] for text in held if "\n" in text[:length]]
    return [text for text in found if text.strip()][:count]
