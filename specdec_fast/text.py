"""Text between two tokenizers, token by token: what a drafter reads, and what it wrote.

`Reader` gives a row's text, written by one tokenizer, as another would have written it; `TextProposer`
continues a row with text that another tokenizer wrote (SLEM of Timor et al., arXiv 2502.05202). Both look
back over a window of tokens and never encode a whole sequence again.

Nothing here can make generation lossy: wrong text is only rejected more often. So odd input (bytes that
are no text, tokenizers that lower-case or drop what they do not know) never raises.
"""

from __future__ import annotations

import codecs
import weakref
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from specdec_fast.native import load_text
from specdec_fast.vocab import Vocabulary, match_specials, shared_markers

__all__ = ["Reader", "TextProposer", "retokenise"]

_WINDOW_GROWTH = (1, 4, 16)
_AGREEMENT = 3  # tokens in a row that prove a window cut at an arbitrary token to be in step again
_CHARS_A_TOKEN = 32  # more text than this a token behind the window: the destination writes none of it


def retokenise(ids: Sequence[int], source: Vocabulary, tokenizer: Any, vocabulary: Vocabulary) -> list[int]:
    """``ids`` of ``source`` as ids of ``tokenizer``, whose vocabulary is ``vocabulary``; see `Reader`."""
    reader = Reader(source, tokenizer, vocabulary)
    reader.append(ids)
    return reader.ids


class Reader:
    """Keeps one row's text, given as ids of ``source``, as ids of another tokenizer.

    The ids are those the destination's tokenizer gives for the text so far, begun as it begins a text (its
    bos, if it puts one there, exactly once). Each append encodes a window of the last tokens and the new
    text again. The window begins where a word does, at a boundary that later text cannot move; without
    such a boundary (CJK, long runs) it is cut anywhere and used from where it agrees with what is there.

    Specials become the destination's special of the same text, else of the same role, else their text as
    plain text. Two have no text to be kept: what opens a row (bos), if the destination has none, and pads.
    Bytes that end inside a UTF-8 character are held back until it is complete.

    Args:
        source: vocabulary of the ids given.
        tokenizer: the destination.
        vocabulary: ``Vocabulary.of(tokenizer)``.
        lookbehind: least number of tokens a window looks back.
        native: let C++ do it (``csrc/reader.h``), where the destination has a native encoder; the ids are the same.

    Attributes:
        ids: destination ids of everything appended so far.

    Raises:
        ValueError: ``vocabulary`` was made by hand and cannot encode.
    """

    def __init__(
        self, source: Vocabulary, tokenizer: Any, vocabulary: Vocabulary, *, lookbehind: int = 10, native: bool = True
    ) -> None:
        if vocabulary.encoder is None:
            raise ValueError("vocabulary must come from Vocabulary.of(tokenizer)")
        self._source = source
        self._tokenizer = tokenizer  # kept alive: a tokenizer without a backend is only referred to weakly
        self._vocabulary = vocabulary
        self._lookbehind = max(1, lookbehind)
        self._specials = match_specials(source, vocabulary)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_row_start = True
        self.ids: list[int] = list(vocabulary.encoder.opening)
        self._starts = [0] * len(self.ids)  # [len(ids)] character of the segment where each id begins
        self._drop_space = source.prefix_space  # the source's own space before a text is still to come
        self._open_segment("")
        self._native = self._made_native() if native else None

    def _made_native(self) -> Any:
        module, native, source = load_text(), self._vocabulary.native, self._source
        if module is None or native is None:
            return None
        specials = {}
        for i, text in source.specials.items():
            mapped = self._specials.get(i, -1)
            marker = self._vocabulary.specials.get(mapped, "")
            unsaid = i == source.roles["pad"] and i != source.roles["eos"]
            plain = native.plain_markers.get(mapped) == marker
            specials[i] = module.Special(mapped, source.opens_text(i), unsaid, text, marker, plain)
        return module.Reader(
            native.bpe,
            source.pieces,
            _slow(self._vocabulary),
            specials,
            self.ids,
            source.prefix_space,
            source.prefix_space_after_special,
            self._lookbehind,
        )

    def append(self, source_ids: Sequence[int]) -> int:
        """Read on; returns how many of the ids before are unchanged: caches roll back to there."""
        if self._native is not None:
            unchanged, behind = self._native.append(source_ids)
            self.ids[unchanged:] = behind
            return unchanged
        unchanged = len(self.ids)
        table, size = self._source.token_bytes, self._source.size
        run: list[bytes] = []
        for i in source_ids:
            data = table[i] if 0 <= i < size else b""
            if data is not None:
                run.append(data)
            elif i in self._source.specials:
                unchanged = min(unchanged, self._append_bytes(b"".join(run), final=True))
                unchanged = min(unchanged, self._append_special(i))
                run = []
        return min(unchanged, self._append_bytes(b"".join(run)))

    def _append_bytes(self, data: bytes, *, final: bool = False) -> int:
        text = self._decoder.decode(data, final)
        if final:
            self._decoder.reset()
        if not text:
            return len(self.ids)
        if self._drop_space:
            self._drop_space = False
            text = text.removeprefix(" ")
        self._at_row_start = False
        return self._append_text(text) if text else len(self.ids)

    def _append_special(self, i: int) -> int:
        source, mapped = self._source, self._specials.get(i)
        opening = self._at_row_start and source.opens_text(i)
        if opening and (mapped is None or mapped in self.ids):
            return len(self.ids)
        self._at_row_start = False
        if not opening:
            self._drop_space = source.prefix_space_after_special
        if mapped is not None:
            self.ids.append(mapped)
            self._starts.append(0)
            self._open_segment(self._vocabulary.specials.get(mapped, ""))
            return len(self.ids) - 1
        if i == source.roles["pad"] and i != source.roles["eos"]:
            return len(self.ids)
        return self._append_text(source.specials[i])

    def _open_segment(self, marker: str) -> None:
        self._first = len(self.ids)
        self._marker = marker  # text of the special before the segment
        self._text, self._offset = "", 0  # the segment's text from character _offset on

    def _append_text(self, text: str) -> int:
        before = len(self._text) + self._offset
        self._text += text
        at, ids, starts = self._encode_window(text, before)
        old = self.ids[at:]
        pairs = zip(old, ids, strict=False)
        same = next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(old), len(ids)))
        self.ids[at:] = ids
        self._starts[at:] = starts
        self._forget()
        return at + same

    def _encode_window(self, text: str, before: int) -> tuple[int, list[int], list[int]]:
        """Where to splice, and the ids and starts from there on; ``text`` stands at ``before``."""
        for growth in _WINDOW_GROWTH:
            width = growth * self._lookbehind
            at, firm = self._window(width)
            start = self._starts[at] if at > self._first else 0
            if start < self._offset or before - start > 4 * width * _CHARS_A_TOKEN:
                break
            ids, starts = self._encode_from(at, start)
            if firm:
                return at, ids, starts
            if (step := self._in_step(at, ids, starts)) is not None:
                k, j = step
                return k, ids[j:], starts[j:]
        ids, starts = self._vocabulary.encode_inside(text)
        return len(self.ids), ids, [before + s for s in starts]

    def _window(self, width: int) -> tuple[int, bool]:
        """Index of a token at least ``width`` back, and whether the boundary before it is there to stay."""
        latest = len(self.ids) - width
        if latest <= self._first:
            return self._first, True
        table = self._vocabulary.token_bytes
        lowest = max(self._first, latest - 3 * width)
        for at in range(latest, lowest, -1):
            data = table[self.ids[at]]
            if data is None or _begins_word(data):
                return at, True
        if lowest == self._first:
            return self._first, True
        while latest > lowest and b"\x80" <= (table[self.ids[latest]] or b"")[:1] < b"\xc0":
            latest -= 1  # not inside a character
        return latest, False

    def _encode_from(self, at: int, start: int) -> tuple[list[int], list[int]]:
        text, vocabulary = self._text[start - self._offset :], self._vocabulary
        if at == self._first:
            ids, starts = self._encode_opening(text)
        elif vocabulary.prefix_space and text.startswith(" "):
            ids, starts = vocabulary.encode_inside(text)
        else:
            ids, starts = vocabulary.encode(text)
        return ids, [start + s for s in starts]

    def _encode_opening(self, text: str) -> tuple[list[int], list[int]]:
        """A segment's first text, in the sight of the special before it (whether a space goes between)."""
        if self._marker:
            ids, starts = self._vocabulary.encode(self._marker + text)
            if ids and ids[0] == self.ids[self._first - 1]:
                width = len(self._marker)
                return ids[1:], [max(0, start - width) for start in starts[1:]]
        return self._vocabulary.encode(text)

    def _in_step(self, at: int, ids: list[int], starts: list[int]) -> tuple[int, int] | None:
        """First ``(k, j)`` from where the old tokens at k and the new ones at j agree for some tokens."""
        old_ids, old_starts = self.ids, self._starts
        where = {pair: at + k for k, pair in enumerate(zip(old_starts[at:], old_ids[at:], strict=True))}
        for j in range(int(self._vocabulary.prefix_space), len(ids)):
            k = where.get((starts[j], ids[j]))
            if k is not None and k + _AGREEMENT <= len(old_ids):
                here, there = slice(j, j + _AGREEMENT), slice(k, k + _AGREEMENT)
                if ids[here] == old_ids[there] and starts[here] == old_starts[there]:
                    return k, j
        return None

    def _forget(self) -> None:
        """Drop text that no window can reach."""
        reach = 5 * _WINDOW_GROWTH[-1] * self._lookbehind
        if len(self._text) > 2 * _CHARS_A_TOKEN * reach:
            last = len(self.ids) - reach
            end = self._offset + len(self._text)
            keep = self._starts[last] if last > self._first else end - _CHARS_A_TOKEN * reach
            keep = max(self._offset, keep, end - _CHARS_A_TOKEN * reach)
            self._text, self._offset = self._text[keep - self._offset :], keep


class TextProposer:
    """Turns text that a drafter wrote after a committed context into target ids (SLEM).

    The tail of the committed ids and the new text are encoded together, and what follows the committed
    part is proposed: the target's own way of going on. Where the encoding merges across the boundary, or
    the committed part is no text, the new text is encoded on its own. A character left incomplete at the
    end is not proposed; the draft ends after an eos, and before a special that the target lacks.

    Args:
        target_tokenizer: the target's.
        target: ``Vocabulary.of(target_tokenizer)``.
        drafter: vocabulary of the drafter's tokenizer.
        lookbehind: least number of committed tokens to encode again.
        native: let C++ do the usual cases (``csrc/reader.h``), where the target has a native encoder.

    Raises:
        ValueError: ``target`` was made by hand and cannot encode.
    """

    def __init__(
        self,
        target_tokenizer: Any,
        target: Vocabulary,
        drafter: Vocabulary,
        *,
        lookbehind: int = 10,
        native: bool = True,
    ) -> None:
        if target.encoder is None:
            raise ValueError("target must come from Vocabulary.of(target_tokenizer)")
        self._tokenizer = target_tokenizer  # kept alive, as in `Reader`
        self._target = target
        self._drafter = drafter
        self._lookbehind = max(1, lookbehind)
        self._markers = shared_markers(target, drafter)
        module, encoder = load_text(), target.native if native else None
        self._native: Any = None
        if module is not None and encoder is not None:
            self._native = module.Proposer(encoder.bpe, drafter.pieces, self._lookbehind)

    def propose(self, committed: Sequence[int], drafter_context: Sequence[int], drafted: Sequence[int]) -> list[int]:
        """Target ids that go on from ``committed`` with the text of ``drafted``.

        Args:
            committed: the row's target ids; only the tail is looked at.
            drafter_context: the drafter ids that ``drafted`` goes on from, `Reader.ids`. It may end before
                the committed text does (held-back bytes, a last token taken back); the draft must then
                begin with what is missing, which is taken off it, or nothing is proposed.
            drafted: new drafter ids.
        """
        if self._native is not None:
            most = 4 * self._lookbehind
            found: list[int] | None = self._native.propose(committed[-most:], drafter_context[-most:], drafted)
            if found is not None:
                return found
        tail = _after_special(self._target, committed, 4 * self._lookbehind)
        runs = _split(self._drafter, drafted)
        first = self._new_text(tail, drafter_context, runs[0][0])
        if first is None:
            return []
        proposal = self._continue(tail, first) if tail else self._open(committed, first)
        for (_, special), (data, _) in pairwise(runs):
            mapped = self._markers.get(special) if special is not None else None
            if mapped is None:
                break
            proposal.append(mapped)
            if mapped == self._target.roles["eos"]:
                break
            if self._drafter.prefix_space_after_special:
                data = data.removeprefix(b" ")
            proposal += self._open(proposal, data)
        return proposal

    def _new_text(self, tail: Sequence[int], context: Sequence[int], data: bytes) -> bytes | None:
        """``data`` without what the committed text already has beyond the drafter's context."""
        drafter, target = self._drafter, self._target
        read_ids = _after_special(drafter, context, 4 * self._lookbehind)
        read, behind = drafter.bytes_of(read_ids), target.bytes_of(tail)
        if not read:
            opens_row = len(context) <= len(drafter.encoder.opening if drafter.encoder else ())
            if drafter.prefix_space if opens_row else drafter.prefix_space_after_special:
                data = data.removeprefix(b" ")
        end = read[-16:] if len(read) >= 16 else read.removeprefix(b" ")
        at = behind.rfind(end) if end else -1
        missing = behind[at + len(end) :] if at >= 0 else _incomplete(behind)
        return data[len(missing) :] if data.startswith(missing) else None

    def _continue(self, tail: Sequence[int], data: bytes) -> list[int]:
        window = self._window(tail)
        behind = self._target.bytes_of(window)
        try:
            text = codecs.getincrementaldecoder("utf-8")().decode(behind + data)
        except UnicodeDecodeError:
            return self._alone(data)
        if not text:
            return []
        ids, _ = self._target.encode_inside(text)
        return self._cut(ids, len(behind), len(text.encode())) or self._alone(data)

    def _window(self, tail: Sequence[int]) -> Sequence[int]:
        table = self._target.token_bytes
        latest = max(0, len(tail) - self._lookbehind)
        for at in range(latest, -1, -1):
            if _begins_word(table[tail[at]]):
                return tail[at:]
        while latest and b"\x80" <= (table[tail[latest]] or b"")[:1] < b"\xc0":
            latest -= 1  # not inside a character
        return tail[latest:]

    def _cut(self, ids: list[int], behind: int, total: int) -> list[int] | None:
        """The ids after the first ``behind`` bytes of ``total``, if a token ends there."""
        table, specials = self._target.token_bytes, self._target.specials
        ends, end = [0], 0
        for i in ids:
            data = table[i]
            end += len(specials[i].encode() if data is None else data)
            ends.append(end)
        if end != total:  # the encoder changed the text
            return None
        return ids[ends.index(behind) :] if behind in ends else None

    def _alone(self, data: bytes) -> list[int]:
        ids: list[int] = []
        while data and 0x80 <= data[0] < 0xC0:  # the rest of a character that the committed text began
            i = self._target.id_of(data[:1])
            if i is None:
                return ids
            ids.append(i)
            data = data[1:]
        text = _complete(data)
        return ids + self._target.encode_inside(text)[0] if text else ids

    def _open(self, before: Sequence[int], data: bytes) -> list[int]:
        """A text's beginning: at the row's start, or after a special, in whose sight it is encoded."""
        text = _complete(data)
        marker = self._target.specials.get(before[-1], "") if before else ""
        if not text:
            return []
        encoder = self._target.encoder
        if marker and encoder is not None and list(before) != encoder.opening:
            ids, _ = self._target.encode(marker + text)
            if ids[:1] == [before[-1]]:
                return ids[1:]
        return self._target.encode(text)[0]


def _slow(vocabulary: Vocabulary) -> Callable[[str], tuple[list[int], list[int]]]:
    """The tokenizer's own encoding, for texts the native one is not sure of; does not keep the vocabulary alive."""
    known = weakref.ref(vocabulary)

    def encode(text: str) -> tuple[list[int], list[int]]:
        found = known()
        assert found is not None  # the reader holds it
        return found.encode(text)

    return encode


def _begins_word(data: bytes | None) -> bool:
    """A space and a letter: all pre-tokenisers, and all merge lists, begin a token there."""
    return data is not None and data[:1] == b" " and data[1:2].isalpha()


def _after_special(vocabulary: Vocabulary, ids: Sequence[int], most: int) -> Sequence[int]:
    """The last ``most`` ids, from after the last special among them on."""
    tail = list(ids[-most:])
    for k in range(len(tail) - 1, -1, -1):
        if not 0 <= tail[k] < vocabulary.size or vocabulary.token_bytes[tail[k]] is None:
            return tail[k + 1 :]
    return tail


def _split(vocabulary: Vocabulary, ids: Sequence[int]) -> list[tuple[bytes, int | None]]:
    """Runs of text, each with the special that ends it (None for the last)."""
    runs: list[tuple[bytes, int | None]] = []
    begin = 0
    for k, i in enumerate(ids):
        if i in vocabulary.specials:
            runs.append((vocabulary.bytes_of(ids[begin:k]), i))
            begin = k + 1
    return [*runs, (vocabulary.bytes_of(ids[begin:]), None)]


def _complete(data: bytes) -> str:
    """``data`` as text, without a character only begun at the end."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(data)


def _incomplete(data: bytes) -> bytes:
    """The begun character at the end of ``data``, if any."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(data[-4:])
    return decoder.getstate()[0]
