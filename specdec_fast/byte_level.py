"""A byte-level BPE tokenizer's step from text to ids in C++ (``csrc/bpe.h``), where it is certain to be the same.

`native_bpe` reads what a backend declares. Everything that it does not know is refused: another normalizer than NFC,
another pre-tokenizer than the four patterns below, options of the model. What it knows is then tried against the
backend on a few texts. Which characters are letters, numbers and spaces the tokenizers library says itself, once a
process. Of single texts the native step says when it is not sure (an added token spelled out, rare characters,
characters that NFC may change, very long words); those go to the tokenizer.
"""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

from specdec_fast.native import load_text

__all__ = ["NativeBpe", "native_bpe"]

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LATER = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {GPT2: "GPT2", LATER % r"\p{N}": "ONE_DIGIT", LATER % r"\p{N}{1,3}": "THREE_DIGITS"}

_POINTS = 0x20000  # the planes with nearly all living scripts
_OTHER, _LETTER, _NUMBER, _SPACE, _UNSURE = range(5)  # csrc/bpe.h has the same


@dataclass(frozen=True)
class NativeBpe:
    """What `native_bpe` makes.

    Attributes:
        bpe: ``_text.ByteLevelBpe``.
        pieces: ``_text.Pieces``, the bytes of each id.
        plain_markers: added tokens, id to text, behind which a text is encoded as if it stood alone.
    """

    bpe: Any
    pieces: Any
    plain_markers: dict[int, str]


def native_bpe(backend: Tokenizer, token_bytes: Sequence[bytes | None], pieces: Any) -> NativeBpe | None:
    """The native step of a backend, or None where it would not be certain to give the backend's ids.

    Args:
        backend: of a fast tokenizer, without padding and truncation.
        token_bytes: the bytes of each id, None for specials.
        pieces: the same as ``_text.Pieces``.
    """
    text = load_text()
    if text is None:
        return None
    state = json.loads(backend.to_str())
    pattern, model = _pattern(state["pre_tokenizer"]), state["model"]
    nfc = state["normalizer"] is not None
    if pattern is None or state["normalizer"] not in (None, {"type": "NFC"}) or not _plain(model):
        return None
    vocab = model["vocab"]
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    letters = [vocab.get(letter, -1) for letter in _alphabet()]
    try:
        merges = [(vocab[left], vocab[right], vocab[left + right]) for left, right in pairs]
    except KeyError:
        return None
    if not _spelled(letters, merges, token_bytes):
        return None
    whole = [(data, i) for i in vocab.values() if (data := token_bytes[i])] if model.get("ignore_merges") else []
    added = backend.get_added_tokens_decoder()
    marked = {token.content for token in added.values()}
    if nfc:
        marked |= {backend.normalizer.normalize_str(content) for content in marked}
    made = text.ByteLevelBpe(
        pieces, getattr(text.Pattern, pattern), _classes(nfc), letters, merges, whole, sorted(marked - {""})
    )
    plain = {} if backend.encode_special_tokens else {i: t.content for i, t in added.items() if _apart(t, marked)}
    return NativeBpe(made, pieces, plain) if _same(backend, made) else None


def _pattern(state: dict[str, Any] | None) -> str | None:
    """Which of the patterns a pre-tokenizer is, as it declares itself."""
    if state is None:
        return None
    parts = state["pretokenizers"] if state["type"] == "Sequence" else [state]
    last = parts[-1]
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    if last.get("use_regex", True):
        if len(parts) == 1:
            return "GPT2"
        digits = len(parts) == 2 and parts[0] == {"type": "Digits", "individual_digits": True}
        return "GPT2_DIGITS" if digits else None
    if len(parts) != 2 or parts[0]["type"] != "Split":
        return None
    split = parts[0]
    usual = split["behavior"] == "Isolated" and not split["invert"]
    return _SPLITS.get(split["pattern"].get("Regex", "")) if usual else None


def _plain(model: dict[str, Any]) -> bool:
    """Whether a model is BPE without options that change what merges give."""
    unset = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    return model["type"] == "BPE" and not any(model.get(option) for option in unset)


def _spelled(
    letters: Sequence[int], merges: Sequence[tuple[int, int, int]], token_bytes: Sequence[bytes | None]
) -> bool:
    """Whether letters and merges give tokens of the bytes they are put together from."""
    if any(i >= 0 and token_bytes[i] != bytes([byte]) for byte, i in enumerate(letters)):
        return False
    for left, right, made in merges:
        first, second = token_bytes[left], token_bytes[right]
        if first is None or second is None or token_bytes[made] != first + second:
            return False
    return True


def _apart(token: Any, marked: set[str]) -> bool:
    """Whether a marker takes nothing from the text behind it, and no other one begins inside it."""
    text = token.content
    if not text or token.lstrip or token.rstrip or token.single_word:
        return False
    ends = [text[k:] for k in range(len(text))]
    return not any(len(other) > len(end) and other.startswith(end) for end in ends for other in marked)


@cache
def _alphabet() -> list[str]:
    """The letter that stands for each byte: itself where it is printable Latin-1, U+0100 and up elsewhere."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(hidden)) for byte in range(256)]


@cache
def _classes(nfc: bool) -> bytes:
    """The class of each code point; with NFC before, those that it may change are not sure."""
    if not nfc:
        return _library_classes()
    table = bytearray(_classes(False))
    for point in _moved():
        table[point] = _UNSURE
    return bytes(table)


def _library_classes() -> bytes:
    """The same by the library's own regular expressions."""
    points = _characters()
    text = "".join(map(chr, points))
    table = bytearray(_POINTS)
    for kind, pattern in ((_LETTER, r"\p{L}+"), (_NUMBER, r"\p{N}+"), (_SPACE, r"\s+")):
        found = pre_tokenizers.Split(Regex(pattern), "removed", invert=True).pre_tokenize_str(text)
        for _, (begin, end) in found:
            for point in points[begin:end]:
                table[point] = kind
    alone = pre_tokenizers.Digits(individual_digits=True).pre_tokenize_str("".join(f"aa{char}" for char in text))
    numeric = {begin // 3 for _, (begin, end) in alone if end - begin == 1 and begin % 3 == 2}
    for k, point in enumerate(points):
        if (k in numeric) != (table[point] == _NUMBER):
            table[point] = _UNSURE
    table[0xD800:0xE000] = bytes([_UNSURE]) * 0x800
    for point in (0x17F, 0xFB05, 0xFB06):  # an s to who ignores case
        table[point] = _UNSURE
    return bytes(table)


def _characters() -> list[int]:
    """The code points that have a class: surrogates are none."""
    return [point for point in range(_POINTS) if not 0xD800 <= point < 0xE000]


def _moved() -> set[int]:
    """Code points that NFC may change, or join to the one before them."""
    points = _characters()
    moved = {*range(0x1161, 0x1176), *range(0x11A8, 0x11C3)}
    for point in points:
        char = chr(point)
        parts = unicodedata.decomposition(char)
        if parts and not parts.startswith("<"):
            moved.update(int(part, 16) for part in parts.split()[1:])
        if (
            unicodedata.combining(char)
            or unicodedata.category(char) == "Cn"
            or not unicodedata.is_normalized("NFC", char)
        ):
            moved.add(point)
    kept = "".join(chr(point) for point in points if point not in moved)
    return moved if normalizers.NFC().normalize_str(kept) == kept else set(points)


def _same(backend: Tokenizer, bpe: Any) -> bool:
    """Whether both say the same of some texts: spaces, digits, contractions, scripts, and pieces of all of it."""
    draw = random.Random(0)
    signs = [" ", "  ", "\n", "\r\n", "\t", "'s", "'LL", "'re", "12", "3456", "½", "a", "The", " word", "é", "ß"]
    signs += [
        "人工",
        "智能",
        "かな",
        "привет",
        " ",
        "\u3000",
        "\u2028",
        "_",
        "--",
        "(){}",
        "...",
        "€",
        "👍",
        "<|",
        "\x00",
        "Ⅷ",
    ]
    texts = ["".join(draw.choices(signs, k=12)) for _ in range(200)]
    found = [bpe.encode(text) for text in texts]
    if not any(found):
        return False
    for text, ours in zip(texts, found, strict=True):
        theirs = backend.encode(text, add_special_tokens=False)
        if ours is not None and ours != (theirs.ids, [start for start, _ in theirs.offsets]):
            return False
    return True
