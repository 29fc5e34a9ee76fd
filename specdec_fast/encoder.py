"""The bare text-to-ids step of a tokenizer, without its padding, truncation and templates."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from tokenizers import Tokenizer

from specdec_fast.byte_level import NativeBpe, native_bpe

__all__ = ["Encoder"]


class Encoder:
    """Encodes text as ``tokenizer(text, add_special_tokens=False)`` would, and leaves the tokenizer alone.

    A fast tokenizer's backend carries state that a call of the user may have left behind: padding to a
    fixed length, truncation. So the encoder is a backend of its own, which shares the model (the large
    part) and copies the rest. A tokenizer without a backend is called as it is, through a weak reference:
    whoever uses the encoder keeps the tokenizer alive.

    Special tokens spelled out in the text are recognised, as the tokenizer does.

    Attributes:
        fast: whether there is a backend.
        opening: ids that the tokenizer puts before a text of its own accord, ``[bos]`` or ``[cls]`` or none.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        self.fast = isinstance(backend, Tokenizer)
        self._pieces: Sequence[bytes | None] = ()
        if self.fast:
            self._backend = _copy(backend)
            self.opening = _opening_fast(backend)
        else:
            self._tokenizer = weakref.ref(tokenizer)
            self.opening = _opening_slow(tokenizer)

    def use_pieces(self, pieces: Sequence[bytes | None]) -> None:
        """Tell the bytes of each id: a tokenizer without a backend has no offsets, so they are counted."""
        self._pieces = pieces

    def native(self, token_bytes: Sequence[bytes | None], pieces: Any) -> NativeBpe | None:
        """The same step in C++, where it is certain to be the same; arguments of `native_bpe`."""
        return native_bpe(self._backend, token_bytes, pieces) if self.fast else None

    def encode(self, text: str) -> tuple[list[int], list[int]]:
        """Ids of ``text``, and the character of ``text`` at which each begins (never decreasing)."""
        if self.fast:
            encoding = self._backend.encode(text, add_special_tokens=False)
            return encoding.ids, [start for start, _ in encoding.offsets]
        tokenizer = self._tokenizer()
        if tokenizer is None:
            raise RuntimeError("the tokenizer of this encoder no longer exists")
        ids = list(tokenizer.encode(text, add_special_tokens=False))
        return ids, self._count_starts(text, ids)

    def _count_starts(self, text: str, ids: Sequence[int]) -> list[int]:
        known = self._pieces
        lengths = [len((known[i] if 0 <= i < len(known) else None) or b"") for i in ids]
        char_of_byte = [k for k, char in enumerate(text) for _ in range(len(char.encode("utf-8", "replace")))]
        surplus = sum(lengths) - len(char_of_byte)  # 1 where the tokenizer put a space before the text
        starts, position = [], -surplus if surplus in (0, 1) else -sum(lengths)
        for length in lengths:
            starts.append(char_of_byte[position] if 0 <= position < len(char_of_byte) else 0)
            position += length
        return starts


def _copy(backend: Tokenizer) -> Tokenizer:
    copy = Tokenizer(backend.model)
    if backend.normalizer is not None:
        copy.normalizer = backend.normalizer
    if backend.pre_tokenizer is not None:
        copy.pre_tokenizer = backend.pre_tokenizer
    if backend.decoder is not None:
        copy.decoder = backend.decoder
    added = backend.get_added_tokens_decoder()
    for _, token in sorted(added.items()):
        (copy.add_special_tokens if token.special else copy.add_tokens)([token])
    if any(copy.token_to_id(token.content) != i for i, token in added.items()):
        # Ids with holes between them cannot be given again one by one; this way costs a second.
        copy = Tokenizer.from_str(backend.to_str())
        copy.no_padding()
        copy.no_truncation()
    copy.encode_special_tokens = backend.encode_special_tokens
    return copy


def _opening_fast(backend: Tokenizer) -> list[int]:
    if backend.post_processor is None:
        return []
    probe = _copy(backend)
    probe.post_processor = backend.post_processor
    encoding = probe.encode("a", add_special_tokens=True)
    marked = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
    return [i for i, _ in takewhile(lambda pair: pair[1], marked)]


def _opening_slow(tokenizer: Any) -> list[int]:
    bare = list(tokenizer.encode("a", add_special_tokens=False))
    full = list(tokenizer.encode("a", add_special_tokens=True))
    for k in range(len(full)):
        if full[k : k + len(bare)] == bare:
            return full[:k]
    return []
