"""Small real tokenizers of every kind, trained in milliseconds on the texts below.

``build(kind)`` gives a fresh ``PreTrainedTokenizerFast`` (about 400 ids); ``KINDS`` lists the kinds. (Not
called ``tokenizers``: beside the tests it would hide the library of that name.)
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

__all__ = ["BYTE_LEVEL", "CODE", "ENGLISH", "KINDS", "MARKERS", "OTHER", "TEXTS", "build"]

MARKERS = ("<|im_start|>", "<|im_end|>")

ENGLISH = """The old lighthouse keeper counted the ships every evening. There were never more than seven of
them, and on most evenings there were fewer; still he wrote the number into his book, because his father
had done so before him. "Numbers don't lie," he used to say, "but they don't talk either."

One evening in October he counted eight. He counted again, slowly, from the harbour to the horizon, and
there were eight ships again. The eighth was larger than the others and showed no light. It's nothing, he
thought, and wrote an 8 where the 7 had always been. In the morning there were 7 ships in the bay, 12
boats at the quay, and the page on which he'd written was gone.
"""

CODE = '''from collections import Counter


def count_words(text, *, lower=True, minimum=2):
    """Count the words of a text; rare ones are left out."""
    words = text.lower().split() if lower else text.split()
    counts = Counter(word.strip(".,;:!?") for word in words)
    return {word: n for word, n in counts.items() if n >= minimum}


class Table:
    def __init__(self, rows=None):
        self.rows = list(rows or [])
        self._width = max((len(row) for row in self.rows), default=0)

    def __iter__(self):
        for row in self.rows:
            if row[0] != "#":
                yield [cell.strip() for cell in row[:self._width]]


if __name__ == "__main__":
    print(count_words("the cat and the dog and the bird", minimum=1))
'''

OTHER = (
    "naïve café, Straße, œuvre — 100 €\t人工智能是计算机科学的一个分支。日本語のテキスト。Привет, мир! 😀👍🏽 ﬁne ½\n"
)

TEXTS = {"english": ENGLISH, "code": CODE, "other": OTHER * 3, "all": ENGLISH + CODE + OTHER + CODE}


def _byte_level(texts: list[str], size: int, *, missing: bytes = b"", shuffle: int | None = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    state = json.loads(tokenizer.to_str())
    letters = bytes_to_unicode()
    gone = {letters[byte] for byte in missing}
    pieces = [piece for piece in state["model"]["vocab"] if not gone & set(piece)]
    if shuffle is not None:
        random.Random(shuffle).shuffle(pieces)
    state["model"]["vocab"] = {piece: i for i, piece in enumerate(pieces)}
    state["model"]["merges"] = [pair for pair in state["model"]["merges"] if not gone & set("".join(pair))]
    return Tokenizer.from_str(json.dumps(state))


def _sentencepiece(prefix: str) -> Tokenizer:
    """BPE over ``▁`` with byte fallback; ``prefix`` is a prepend scheme, or "legacy" for Llama 2's way."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    trained.train_from_iterator(
        [ENGLISH.replace("\n", " "), CODE.replace("\n", " "), OTHER[:20]],
        trainers.BpeTrainer(vocab_size=350, show_progress=False),
    )
    model = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], *model["vocab"]]
    merges = [tuple(pair) for pair in model["merges"]]
    for spaces in ("▁▁", "▁▁▁▁"):
        pieces.append(spaces)
        merges.append((spaces[: len(spaces) // 2],) * 2)
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=False)
    if prefix != "never":
        steps.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Replace("\n", " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=350, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([ENGLISH, CODE, OTHER], trainer)
    return tokenizer


def _wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[PAD]", "[UNK]"], show_progress=False)
    tokenizer.train_from_iterator([ENGLISH, CODE], trainer)
    return tokenizer


def _nfkc() -> Tokenizer:
    tokenizer = _byte_level([ENGLISH, CODE], 350)
    tokenizer.normalizer = normalizers.NFKC()
    return tokenizer


# SmolLM2 has no token for these; nor has any text, but for the control characters.
_MISSING = bytes([0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)])

_MADE: dict[str, tuple[Callable[[], Tokenizer], dict[str, str]]] = {
    "byte_a": (
        lambda: _byte_level([ENGLISH, CODE, OTHER], 420),
        {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
    ),
    "byte_b": (
        lambda: _byte_level([CODE, ENGLISH[:300]], 380, shuffle=1),
        {"eos_token": "<|end|>", "pad_token": "<|pad|>"},
    ),
    "byte_gaps": (
        lambda: _byte_level([ENGLISH, CODE], 400, missing=_MISSING, shuffle=2),
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
    ),
    "nfkc": (_nfkc, {"eos_token": "<eos>", "pad_token": "<pad>"}),
    **{
        f"sentencepiece_{prefix}": (
            lambda prefix=prefix: _sentencepiece(prefix),  # type: ignore[misc]
            {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        )
        for prefix in ("first", "always", "never", "legacy")
    },
    "unigram": (_unigram, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
    "wordpiece": (
        _wordpiece,
        {"bos_token": "[CLS]", "eos_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"},
    ),
}

KINDS = tuple(_MADE)
BYTE_LEVEL = ("byte_a", "byte_b")  # those that say any bytes, and every text back exactly


@cache
def _state(kind: str) -> str:
    return _MADE[kind][0]().to_str()


def build(kind: str, *, markers: bool = True, opening: bool | None = None) -> PreTrainedTokenizerFast:
    """A fresh tokenizer of ``kind``.

    Args:
        kind: one of `KINDS`.
        markers: add the chat markers as special tokens.
        opening: put bos before every text; by default SentencePiece kinds and WordPiece do.
    """
    roles = _MADE[kind][1]
    backend = Tokenizer.from_str(_state(kind))
    extra = [marker for marker in MARKERS if markers and marker not in roles.values()]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, extra_special_tokens=extra, **roles)
    if opening is None:
        opening = kind.startswith("sentencepiece") or kind == "wordpiece"
    if opening and tokenizer.bos_token is not None:
        bos = tokenizer.bos_token
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
    return tokenizer
