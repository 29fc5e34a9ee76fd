"""From a tokenizer's vocabulary strings to the bytes they stand for, as its own decoder reads them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["backend_reading", "guessed_reading", "listed_pieces"]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_METASPACE = "\u2581"


def listed_pieces(tokenizer: Any, size: int) -> list[Any]:
    """The piece of each id below ``size`` (text, or bytes), None where there is none to be had."""
    pieces: list[Any] = []
    for i in range(size):
        try:
            pieces.append(tokenizer.convert_ids_to_tokens(i))
        except Exception:  # whatever a tokenizer of the user's own raises for an id it does not have
            pieces.append(None)
    # Several pieces that read the same with a replacement character are bytes the tokenizer could not show.
    shown = Counter(piece for piece in pieces if isinstance(piece, str) and "\ufffd" in piece)
    return [None if shown.get(piece, 0) > 1 else piece for piece in pieces]


def backend_reading(backend: Any) -> Callable[[str], bytes]:
    """How the backend's decoder reads a piece in mid-sentence."""
    decoder = backend.decoder
    kinds = _components(decoder if decoder is not None else backend.pre_tokenizer)
    names = {part["type"] for part in kinds}
    if "ByteLevel" in names:
        return _read_byte_level
    replaced = [part for part in kinds if part["type"] == "Replace" and "String" in part.get("pattern", {})]
    metaspace = [part["replacement"] for part in kinds if part["type"] == "Metaspace"]
    if metaspace or "ByteFallback" in names or replaced:
        swaps = [(part["pattern"]["String"], part["content"]) for part in replaced]
        swaps += [(mark, " ") for mark in metaspace]
        fallback = "ByteFallback" in names or bool(getattr(backend.model, "byte_fallback", False))
        return lambda piece: _read_sentencepiece(piece, swaps, fallback)
    if decoder is None:
        return lambda piece: f" {piece}".encode()  # what a backend without a decoder joins with
    return _reading_between(decoder)


def guessed_reading(tokenizer: Any, pieces: Sequence[str]) -> Callable[[str], bytes]:
    """The same for a tokenizer that does not say: by the marks its pieces carry."""
    starts = {mark: sum(piece.startswith(mark) for piece in pieces) for mark in ("\u0120", _METASPACE, "##")}
    mark = max(starts, key=lambda key: starts[key])
    if hasattr(tokenizer, "byte_decoder") or (starts[mark] and mark == "\u0120"):
        return _read_byte_level
    if starts[mark] and mark == "##":
        return lambda piece: piece[2:].encode() if piece.startswith("##") else f" {piece}".encode()
    if {chr(byte) for byte in range(256)}.issubset(pieces):  # one piece a byte (ByT5)
        return lambda piece: piece.encode("latin-1" if len(piece) == 1 and piece < "\u0100" else "utf-8")
    return lambda piece: _read_sentencepiece(piece, [(_METASPACE, " ")], True)


def _components(part: Any) -> list[dict[str, Any]]:
    """The component's own settings, a sequence flattened."""
    if part is None:
        return []

    def flat(node: dict[str, Any]) -> list[dict[str, Any]]:
        inner = node.get("decoders") or node.get("pretokenizers") or []
        return [leaf for child in inner for leaf in flat(child)] if node["type"] == "Sequence" else [node]

    return flat(json.loads(part.__getstate__()))


def _byte_level_table() -> dict[int, int]:
    """GPT-2's alphabet backwards: printable Latin-1 stands for itself, other bytes for U+0100 and up."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    table = {0x100 + k: byte for k, byte in enumerate(hidden)}
    return table | {byte: 0xFFFD for byte in hidden}  # no letters of the alphabet: make encoding them fail


_BYTE_LEVEL = _byte_level_table()


def _read_byte_level(piece: str) -> bytes:
    try:
        return piece.translate(_BYTE_LEVEL).encode("latin-1")
    except UnicodeEncodeError:  # as the byte-level decoder does with a piece outside its alphabet
        return piece.encode("utf-8", "replace")


def _read_sentencepiece(piece: str, swaps: Sequence[tuple[str, str]], fallback: bool) -> bytes:
    if fallback and (byte := _BYTE_TOKEN.fullmatch(piece)):
        return bytes([int(byte[1], 16)])
    for old, new in swaps:
        piece = piece.replace(old, new)
    return piece.encode("utf-8", "replace")


def _reading_between(decoder: Any) -> Callable[[str], bytes]:
    """What a piece adds between two others: so any decoder (WordPiece, BPE with suffixes) can be asked."""
    before, after = decoder.decode(["a"]), decoder.decode(["a", "a"])[1:]

    def read(piece: str) -> bytes:
        whole = decoder.decode(["a", piece, "a"])
        return whole.removeprefix(before).removesuffix(after).encode("utf-8", "replace")

    return read
