"""What the ids of a tokenizer stand for, in bytes, and which ids of two tokenizers mean the same."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from specdec_fast.byte_level import NativeBpe
from specdec_fast.encoder import Encoder
from specdec_fast.native import load_text
from specdec_fast.pieces import backend_reading, guessed_reading, listed_pieces

__all__ = ["Intersection", "Vocabulary", "intersection", "match_specials", "same_tokenizer", "shared_markers"]

_ROLES = ("bos", "eos", "pad", "unk")


class Vocabulary:
    """What bytes each id of a tokenizer stands for.

    A piece that starts a word stands for its text in mid-sentence, the space included: SentencePiece's
    ``▁the``, byte-level ``Ġthe`` and WordPiece's ``the`` are all ``b" the"``, WordPiece's ``##ing`` is
    ``b"ing"``. (WordPiece punctuation that the tokenizer's own clean-up joins to the word before has no
    space.) The space that opens a text is the tokenizer's, not the text's: see ``prefix_space``.

    Attributes:
        size: highest id + 1.
        token_bytes: ``[size]``, the bytes of each id; None for specials and for ids that do not exist.
        specials: control tokens (bos, eos, pad, unk, chat markers), id to exact text.
        roles: ids of "bos", "eos", "pad", "unk", or None. One id may have several roles.
        added: ids that were added to the trained vocabulary, specials or plain text.
        aliases: bytes that several ids share, to those ids in ascending order.
        prefix_space: the encoder puts a space of its own before a text.
        prefix_space_after_special: ... and before text that follows a special token.
        encoder: the tokenizer's text-to-ids step; None for a vocabulary made by hand.
    """

    def __init__(
        self,
        token_bytes: Sequence[bytes | None],
        *,
        specials: Mapping[int, str] | None = None,
        roles: Mapping[str, int | None] | None = None,
        added: Iterable[int] = (),
        encoder: Encoder | None = None,
    ) -> None:
        self.specials = dict(specials or {})
        self.size = max(len(token_bytes), max(self.specials, default=-1) + 1)
        self.token_bytes: list[bytes | None] = [*token_bytes, *[None] * (self.size - len(token_bytes))]
        for i in self.specials:
            self.token_bytes[i] = None
        self.roles: dict[str, int | None] = {role: (roles or {}).get(role) for role in _ROLES}
        self.added = frozenset(added) | self.specials.keys()
        self.encoder = encoder
        if encoder is not None:
            encoder.use_pieces(self.token_bytes)
        self._id_of: dict[bytes, int] = {}
        self._matched: weakref.WeakKeyDictionary[Vocabulary, dict[int, int]] = weakref.WeakKeyDictionary()
        self.aliases: dict[bytes, list[int]] = {}
        self._index()
        self.prefix_space = self._adds_space("")
        self.prefix_space_after_special = any(
            self._adds_space(text) for i, text in self.specials.items() if i == self.roles["eos"]
        )

    @classmethod
    def of(cls, tokenizer: Any) -> Vocabulary:
        """The vocabulary of a Transformers tokenizer, made once per tokenizer object and kept weakly.

        Tokens added later, or declared special later, make a new one. The tokenizer is not changed.
        """
        state = (len(tokenizer), tuple(sorted(tokenizer.all_special_ids)))
        with _lock:
            try:
                entry = _cache.get(tokenizer)
            except TypeError:  # not hashable
                return _read(tokenizer)
            if entry is None or entry[0] != state:
                entry = (state, _read(tokenizer))
                _cache[tokenizer] = entry
            return entry[1]

    def bytes_of(self, ids: Iterable[int]) -> bytes:
        """The bytes that ``ids`` stand for in mid-text; specials and unknown ids contribute nothing."""
        table, size = self.token_bytes, self.size
        return b"".join([table[i] or b"" for i in ids if 0 <= i < size])

    def id_of(self, data: bytes) -> int | None:
        """The id that stands for ``data``: where several do, the one the encoder yields, else the lowest."""
        return self._id_of.get(data)

    @cached_property
    def pieces(self) -> Any:
        """``token_bytes`` for the compiled text part, None where there is none."""
        text = load_text()
        return None if text is None else text.Pieces(self.token_bytes)

    @cached_property
    def native(self) -> NativeBpe | None:
        """The encoder's step in C++, None where it is not certain to give the encoder's ids."""
        if not isinstance(self.encoder, Encoder) or self.pieces is None or self.prefix_space:
            return None
        return self.encoder.native(self.token_bytes, self.pieces)

    @property
    def unknown(self) -> int | None:
        """The id of the unknown token, unless it also marks the beginning or the end (GPT-2)."""
        unk = self.roles["unk"]
        return None if unk in (self.roles["bos"], self.roles["eos"]) else unk

    def opens_text(self, i: int) -> bool:
        """Whether ``i`` marks the beginning of a text: bos, or what the tokenizer puts there (BERT's cls)."""
        return i == self.roles["bos"] or (self.encoder is not None and i in self.encoder.opening)

    def encode(self, text: str) -> tuple[list[int], list[int]]:
        """Ids of ``text`` as the tokenizer writes a text of its own, and the character where each begins.

        Without unk: what the tokenizer cannot say is left out.
        """
        if self.encoder is None:
            raise ValueError("this vocabulary was made by hand; Vocabulary.of(tokenizer) can encode")
        if self.native is not None and (found := self.native.bpe.encode(text)) is not None:
            return found
        return self._without_unknown(*self.encoder.encode(text))

    def encode_inside(self, text: str) -> tuple[list[int], list[int]]:
        """The same for ``text`` that follows other text: without the space the encoder puts before one."""
        if not self.prefix_space:
            return self.encode(text)
        if text.startswith(" "):  # the encoder's space takes the place of the text's
            ids, starts = self.encode(text[1:])
            return ids, [start + 1 if k else 0 for k, start in enumerate(starts)]
        for anchor in ("\n", ".", "0", "a"):  # something before it, to be cut off where a token begins there
            ids, starts = self.encode(anchor + text)
            if 1 in starts:
                k = starts.index(1)
                if not (self.token_bytes[ids[k]] or b"").startswith(b" "):
                    return ids[k:], [start - 1 for start in starts[k:]]
        return self.encode(text)

    def _without_unknown(self, ids: list[int], starts: list[int]) -> tuple[list[int], list[int]]:
        if self.unknown not in ids:
            return ids, starts
        kept = [k for k, i in enumerate(ids) if i != self.unknown]
        return [ids[k] for k in kept], [starts[k] for k in kept]

    def _index(self) -> None:
        index = self._id_of
        for i, data in enumerate(self.token_bytes):
            if data and index.setdefault(data, i) != i:
                self.aliases.setdefault(data, [index[data]]).append(i)
        if self.encoder is None:
            return
        for data, ids in self.aliases.items():
            index[data] = self._canonical(data, ids)

    def _canonical(self, data: bytes, ids: list[int]) -> int:
        """The one of ``ids`` that the encoder yields for their common bytes, in some context."""
        try:
            text = data.decode()
        except UnicodeDecodeError:
            return ids[0]
        for before in ("a", "", "\n", ".", "1", " "):
            last = self._encode(before + text)[-1:]
            if last and last[0] in ids:
                return last[0]
        return ids[0]

    def _encode(self, text: str) -> list[int]:
        return [] if self.encoder is None else self.encoder.encode(text)[0]

    def _adds_space(self, marker: str) -> bool:
        ids = self._encode(marker + "a")
        if marker and self.specials.get(ids[0] if ids else -1) != marker:
            return False
        return self.bytes_of(ids).startswith(b" ")


_cache: weakref.WeakKeyDictionary[Any, tuple[Any, Vocabulary]] = weakref.WeakKeyDictionary()
_lock = threading.RLock()


def _read(tokenizer: Any) -> Vocabulary:
    encoder = Encoder(tokenizer)
    added, special = {}, set(tokenizer.all_special_ids)
    for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items():
        added[i] = token.content
        if token.special:
            special.add(i)
    if encoder.fast:
        backend = tokenizer.backend_tokenizer
        pieces: dict[int, Any] = {i: piece for piece, i in backend.get_vocab(with_added_tokens=True).items()}
        to_bytes = backend_reading(backend)
    else:
        size = max([len(tokenizer) - 1, *tokenizer.get_vocab().values(), *added]) + 1
        pieces = dict(enumerate(listed_pieces(tokenizer, size)))
        to_bytes = guessed_reading(tokenizer, [piece for piece in pieces.values() if isinstance(piece, str)])
    roles = {role: getattr(tokenizer, f"{role}_token_id", None) for role in _ROLES}
    model_unk = getattr(tokenizer.backend_tokenizer.model, "unk_token", None) if encoder.fast else None
    unk = next((i for i, piece in pieces.items() if model_unk and piece == model_unk), None)
    if unk is not None:  # a model's unk is a control token even where the wrapper was not told
        special.add(unk)
        roles["unk"] = unk if roles["unk"] is None else roles["unk"]

    table: list[bytes | None] = [None] * (max([*pieces, *added], default=-1) + 1)
    for i, piece in pieces.items():
        if isinstance(piece, bytes):
            table[i] = piece
        elif piece is not None:
            table[i] = to_bytes(piece)
    for i, text in added.items():
        table[i] = text.encode()
    names = {i: added.get(i) or pieces.get(i) for i in special if i < len(table)}
    specials = {i: name for i, name in names.items() if isinstance(name, str)}
    return Vocabulary(table, specials=specials, roles=roles, added=added, encoder=encoder)


def same_tokenizer(a: Vocabulary, b: Vocabulary, a_size: int | None = None, b_size: int | None = None) -> bool:
    """Whether an id of one means the same to the other, so that ids can be passed without translation.

    Decided by content over the ids both use: token bytes, and the exact text of specials. Either may have
    added tokens that the other lacks; a trained token that only one has makes them different, and so does
    an id beyond the other model's logits. Padding of the logits beyond the vocabulary does not count.

    Args:
        a, b: the vocabularies.
        a_size, b_size: width of the models' logits; the vocabulary's own size where None.
    """
    used_a, used_b = min(a.size, a_size or a.size), min(b.size, b_size or b.size)
    if (b_size is not None and used_a > b_size) or (a_size is not None and used_b > a_size):
        return False
    agreed = False
    for i in range(max(used_a, used_b)):
        left, right = _content(a, i, used_a), _content(b, i, used_b)
        if left is not None and right is not None:
            if left != right:
                return False
            agreed = True
        elif (left is not None and i not in a.added) or (right is not None and i not in b.added):
            return False
    return agreed


def _content(vocabulary: Vocabulary, i: int, used: int) -> bytes | None:
    if i >= used:
        return None
    data = vocabulary.token_bytes[i]
    return vocabulary.specials[i].encode() if data is None and i in vocabulary.specials else data


def match_specials(source: Vocabulary, destination: Vocabulary) -> dict[int, int]:
    """The destination's special that a reader is given for each of the source's: same text, else same role.

    Text goes first because roles are set loosely: a chat model's opening marker is often declared its bos.
    The destination's unk is never given, nor its pad for anything but a pad or a marker of that text.
    """
    known = source._matched.get(destination)
    if known is not None:
        return known
    by_text = {text: i for i, text in destination.specials.items() if i != destination.unknown}
    matched: dict[int, int] = {}
    for i, text in source.specials.items():
        roles = [role for role in ("eos", "bos", "pad") if source.roles[role] == i]
        same_role = [destination.roles[role] for role in roles]
        for candidate in (by_text.get(text), *same_role):
            if candidate is not None and candidate != destination.unknown:
                matched[i] = candidate
                break
    source._matched[destination] = matched
    return matched


@dataclass(frozen=True)
class Intersection:
    """Ids of two vocabularies that stand for the same bytes.

    Attributes:
        target_ids: int64 ``[K]``, ascending.
        drafter_ids: int64 ``[K]``; ``drafter_ids[i]`` means what ``target_ids[i]`` means.
    """

    target_ids: torch.Tensor
    drafter_ids: torch.Tensor


def intersection(target: Vocabulary, drafter: Vocabulary, *, target_size: int, drafter_size: int) -> Intersection:
    """What both vocabularies can say: one pair of ids for each byte string, and one for each shared marker.

    Made once a pair and kept weakly. Where several ids share bytes, the id the encoder yields stands for them
    (`Vocabulary.id_of`). Markers are those of `shared_markers`, each id once: unk and pad never (unless they are
    also the eos), nor bos, which no model should write. Nothing in common gives K = 0.

    Args:
        target, drafter: the vocabularies.
        target_size, drafter_size: width of the models' logits; ids beyond them are left out.
    """
    with _lock:
        made = _shared.setdefault(target, weakref.WeakKeyDictionary()).setdefault(drafter, {})
        if (target_size, drafter_size) not in made:
            made[target_size, drafter_size] = _intersection(target, drafter, target_size, drafter_size)
        return made[target_size, drafter_size]


_Made = weakref.WeakKeyDictionary[Vocabulary, dict[tuple[int, int], Intersection]]
_shared: weakref.WeakKeyDictionary[Vocabulary, _Made] = weakref.WeakKeyDictionary()


def _intersection(target: Vocabulary, drafter: Vocabulary, target_size: int, drafter_size: int) -> Intersection:
    shared = target._id_of.keys() & drafter._id_of.keys()
    pairs = {target._id_of[data]: drafter._id_of[data] for data in shared}
    for d, t in shared_markers(target, drafter).items():
        pairs.setdefault(t, d)
    kept = sorted((t, d) for t, d in pairs.items() if t < target_size and d < drafter_size)
    table = torch.tensor(kept, dtype=torch.int64).reshape(-1, 2)
    return Intersection(table[:, 0].contiguous(), table[:, 1].contiguous())


def shared_markers(target: Vocabulary, drafter: Vocabulary) -> dict[int, int]:
    """The target's id for each special that a drafter may write: the same text, else eos for eos."""
    by_text = {text: i for i, text in target.specials.items() if _may_write(target, i)}
    written = {i: text for i, text in drafter.specials.items() if _may_write(drafter, i)}
    markers = {i: by_text[text] for i, text in written.items() if text in by_text}
    ends = target.roles["eos"], drafter.roles["eos"]
    if ends[0] is not None and ends[1] is not None:
        markers.setdefault(ends[1], ends[0])
    return markers


def _may_write(vocabulary: Vocabulary, i: int) -> bool:
    return i == vocabulary.roles["eos"] or i not in (vocabulary.roles[role] for role in ("bos", "pad", "unk"))
