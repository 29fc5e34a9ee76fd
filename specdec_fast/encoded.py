"""Models that read what an encoder made beside the text: encoder-decoder models, and decoders of their kind.

The text is the decoder's; what the encoder made of a row's source is read by every pass and never changes, so it has
no part in drafting and rolling back: its keys and values are computed in a row's first pass and kept.

Few of these models take positions. A twin is told where rows stand in their place (:mod:`specdec_fast.apart`). Where
that does not give a model's own scores, rows at different columns share passes nevertheless: those that are ahead read
their last few tokens again, from the column of the row that is furthest behind. A pass over a few positions more takes
little longer, and one a row would take several times as long.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, EncoderDecoderCache

from specdec_fast.apart import placed, told_apart, twin_apart
from specdec_fast.cache import RaggedCache, cache_argument, empty, ragged_layers, read_cache, takes, write_cache
from specdec_fast.encoding import (
    CrossLayer,
    Encoded,
    counts_text,
    layer_count,
    readable,
    source_in,
)
from specdec_fast.lean import LeanModel
from specdec_fast.masks import level_mask, ragged_masks, text_positions
from specdec_fast.runner import Runner
from specdec_fast.trial import alike, trial_ids

__all__ = ["EncodedRunner", "form_of", "found_of", "ids_to_try", "why_not_encoded"]

AHEAD = 16  # tokens that a row reads again at most, to share a pass of two rows with one behind it


class EncodedRunner(Runner):
    """A runner of a model that reads what an encoder made; other arguments are :class:`Runner`'s.

    Args:
        encoded: of as many rows.
        twin: whether passes are those of :func:`specdec_fast.apart.twin_apart`; None: what was found out.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rows: int,
        *,
        encoded: Encoded,
        twin: bool | None = None,
        joint: bool | None = None,
        lean: LeanModel | None = None,
        **settings: Any,
    ):
        assert lean is None, "lean forms are of models that read nothing but the text"
        self._encoded = encoded
        made = twin_apart(model) if twin or (twin is None and found_of(model, encoded).twin) else None
        self._twin, self._own = made is not None, made or model
        self._prefix = "decoder_" if model.config.is_encoder_decoder else ""
        super().__init__(model, rows, joint=True, **settings)
        self.vocabulary = readable(model)
        self._apart = joint if joint is not None else rows > 1 and _shares(model, encoded, self._twin)
        # Reading again costs by positions, which rows multiply
        self._ahead = int(AHEAD / math.sqrt(rows))
        self.again = 0 if rows == 1 or self._apart else self._ahead // 2
        if self._visible is not None and not found_of(model, encoded).masks:
            raise ValueError(
                f"decoder_attention_mask: {type(model).__name__} gives other logits for several tokens than for one "
                "after the other where it hides something: leave it out, or use model.generate"
            )
        self._counts = self._visible is not None and counts_text(model)
        self._text: list[list[int]] = [[] for _ in range(rows)]
        self._stumbles = found_of(model, encoded).stumbles
        self._begun: set[int] = set()  # rows that have read something
        self._known = [False] * rows  # rows whose source has keys and values

    def _make_caches(self, groups: list[list[int]]) -> list[tuple[list[int], RaggedCache]]:
        (group,), layers = groups, layer_count(self.model)
        unit = RaggedCache(len(group), layers)
        self._cross = [CrossLayer(len(group)) for _ in range(layers)]
        self._cache = EncoderDecoderCache(unit.cache, Cache(layers=list(self._cross)))
        return [(group, unit)]

    def _read_once(self, rows: Sequence[int], tokens: Tensor, count: list[int], tail: int) -> tuple[Tensor, list[int]]:
        """Prompts that are alike have sources that are not."""
        return tokens, count

    def _feed(
        self, rows: Sequence[int], tokens: Tensor, count: list[int], tail: list[int], embeds: Tensor | None
    ) -> Tensor:
        for row, line, n in zip(rows, tokens.tolist(), count, strict=True):
            self._text[row][self.length[row] :] = line[:n]
        if self._stumbles is not None and self.use_cache:
            begin = min(self.length[row] for row in rows)
            if any(self._stumbles in self._text[row][begin:-1] for row in rows):
                return self._in_pieces(rows, tokens, count, tail, self._stumbles)
        self._begun.update(row for row, n in zip(rows, count, strict=True) if n)
        return self._in_passes(rows, tokens, count, tail)

    def _in_pieces(
        self, rows: Sequence[int], tokens: Tensor, count: list[int], tail: list[int], stumbles: int
    ) -> Tensor:
        """The same with passes that end where ``generate``'s do: behind a prompt, and behind padding."""
        width = max(tail)
        parts: list[Tensor | None] = []
        for r, (row, n) in enumerate(zip(rows, count, strict=True)):
            line = tokens[r, :n].tolist()
            prompt = 0 if row in self._begun else n - tail[r] + 1
            cuts = {prompt, n, *(i + 1 for i in range(prompt, n) if line[i] == stumbles)} - {0}
            ends = sorted(cuts)
            pieces = []
            for first, end in zip([0, *ends], ends, strict=False):
                self._text[row][self.length[row] :] = line[first:end]
                lanes = [end - first]
                pieces.append(self._in_passes([row], tokens[r : r + 1, first:end], lanes, lanes))
            if n:
                self._begun.add(row)
                logits = torch.cat(pieces, 1)[:, -tail[r] :]
                parts.append(torch.nn.functional.pad(logits, (0, 0, 0, width - logits.shape[1])))
            else:
                parts.append(None)
        none = torch.zeros_like(next(part for part in parts if part is not None))
        return torch.cat([none if part is None else part for part in parts])

    def _in_passes(self, rows: Sequence[int], tokens: Tensor, count: list[int], tail: list[int]) -> Tensor:
        wanted, width = dict(zip(rows, tail, strict=True)), max(tail)
        parts: dict[int, Tensor] = {}
        for group in self._together([row for row, n in zip(rows, count, strict=True) if n]):
            begin = min(self.length[row] for row in group)
            if not self._apart:
                for row in group:  # what those ahead have behind it is read again
                    self.length[row] = begin
            texts = [self._text[row][self.length[row] :] for row in group]
            lanes = [len(text) for text in texts]
            filled = [text + text[-1:] * (max(lanes) - len(text)) for text in texts]
            logits = self._forward(
                self._units[0][1],
                group,
                group,
                torch.tensor(filled, device=tokens.device),
                lanes,
                [wanted[row] for row in group],
                None,
                False,
            )
            logits = torch.nn.functional.pad(logits, (0, 0, 0, width - logits.shape[1]))
            parts.update(zip(group, logits.split(1), strict=True))
        none = torch.zeros_like(next(iter(parts.values())))
        return torch.cat([parts.get(row, none) for row in rows])

    def _together(self, rows: list[int]) -> list[list[int]]:
        """Rows that share a pass: those at nearly the same column, where the model does not take positions."""
        groups: list[list[int]] = []
        ranked = sorted(rows, key=lambda row: (self._known[row], 0 if self._apart else self.length[row]))
        for row in ranked:
            first = groups[-1][0] if groups else row
            near = self._apart or self.length[row] - self.length[first] <= self._ahead
            if groups and self._known[row] == self._known[first] and near:
                groups[-1].append(row)
            else:
                groups.append([row])
        return [sorted(group) for group in groups]

    def _model_forward(
        self,
        rows: list[int],
        tokens: Tensor,
        columns: Tensor,
        count: list[int],
        unit: RaggedCache,
        embeds: Tensor | None,
        lanes: list[int],
    ) -> Tensor:
        model, known = self.model, self._known[rows[0]]
        for layer in self._cross:
            layer.choose(rows)
        self._cache.is_updated = dict.fromkeys(range(len(self._cross)), known)
        outputs, mask = self._encoded.of(rows)
        level, prefix = unit.window.columns is None, self._prefix
        visible = None if self._visible is None else self._visible[rows]
        arguments: dict[str, Any] = {
            f"{prefix}input_ids": tokens,
            "encoder_outputs": outputs,
            "use_cache": self.use_cache,
            "return_dict": True,
        }
        if self.use_cache:
            arguments[cache_argument(type(model))] = self._cache
        if mask is not None:
            arguments["attention_mask"] = mask
        end = unit.window.end
        hidden = level_mask(end, visible) if level else ragged_masks(model.get_decoder(), columns, end, visible)
        if hidden is not None:
            arguments[f"{prefix}attention_mask"] = hidden
        position = f"{prefix}position_ids"
        if self._counts or (not level and takes(model, position)):
            place = self._read_columns(rows, columns, count)
            arguments[position] = text_positions(place, visible if self._counts else None)
        with placed([self.length[row] for row in rows], count, lanes):
            logits = self._own(**arguments).logits
        if logits.shape[1] > len(lanes):
            logits = logits[:, lanes]
        for row in rows:
            self._known[row] = True
        return logits

    def load(self, cache: Any, past: int) -> None:
        """Goes on behind a caller's cache of ``past`` columns, found readable by ``check_cache``."""
        read_cache(cache.self_attention_cache, self._units[0][1])
        everyone = list(range(self.rows))
        self._text = [[0] * past for _ in everyone]  # never read again: no row goes back to it
        self.length = [past] * self.rows
        if held := source_in(cache):
            for mine, parts in zip(self._cross, held, strict=False):
                mine.choose(everyone)
                mine.update(*(part.clone() for part in parts))
            self._known = [True] * self.rows

    def store(self, cache: Any, columns: int) -> None:
        """Writes the columns of the result, and the source's keys and values, into a Transformers cache."""
        write_cache(self._units[0][1], cache.self_attention_cache, columns)
        empty(cache.cross_attention_cache)
        for index, layer in enumerate(self._cross):
            if layer.everything is not None:
                cache.cross_attention_cache.update(*(part.clone() for part in layer.everything), index)
                cache.is_updated[index] = True


class _Found(NamedTuple):
    """What was found out of a model.

    Args:
        why_not: it cannot be decoded.
        twin: its passes are those of a twin (:mod:`specdec_fast.apart`).
        masks: columns of its text may be hidden.
        stumbles: an id behind which its positions hang on where a pass began; None: there is none.
    """

    why_not: str | None = None
    twin: bool = False
    masks: bool = True
    stumbles: int | None = None


_probed: weakref.WeakKeyDictionary[PreTrainedModel, dict[str, _Found]] = weakref.WeakKeyDictionary()
_apart: weakref.WeakKeyDictionary[PreTrainedModel, dict[str, bool]] = weakref.WeakKeyDictionary()
_probing = threading.Lock()


def form_of(model: PreTrainedModel, encoded: Encoded) -> str:
    """What a trial's outcome hangs on: kernels, dropout, and for a decoder alone how wide what it reads is."""
    width = "" if model.config.is_encoder_decoder else encoded.outputs[0].shape[-1]
    return f"{model.device.type} {model.dtype} {model.config._attn_implementation} {model.training} {width}"


def why_not_encoded(model: PreTrainedModel, encoded: Encoded) -> str | None:
    """Why a model that reads what an encoder made cannot be decoded; None where it can. Tried once a model.

    Several tokens behind others, and again after a rollback, must give what reading them one by one does, and what a
    pass of the model itself without a cache does.

    Args:
        encoded: of any source. Where it holds no numbers it says nothing of the model, which is then not tried.
    """
    with _probing:
        found, form = _probed.setdefault(model, {}), form_of(model, encoded)
        if form not in found:
            part, twin = encoded.part([0]), twin_apart(model) is not None
            if not bool(part.outputs[0].isfinite().all()):
                return None
            why_not = _tried(model, part, twin)
            if why_not and twin:
                twin, why_not = False, _tried(model, part, False)
            if why_not:
                found[form] = _Found(why_not)
            else:
                masks = _tried(model, part, twin, hidden=2) is None
                found[form] = _Found(None, twin, masks, _stumbling(model, part, twin))
        return found[form].why_not


def found_of(model: PreTrainedModel, encoded: Encoded) -> _Found:
    """What is known of a model so far."""
    return _probed.get(model, {}).get(form_of(model, encoded), _Found())


@torch.no_grad()
def _stumbling(model: PreTrainedModel, encoded: Encoded, twin: bool) -> int | None:
    """The id of padding, where positions behind it are counted anew in each pass (M2M100's are)."""
    pad = _pad_of(model)
    if pad is None:
        return None
    ids = ids_to_try(model)
    ids[0, 5] = pad
    steps, spans = (EncodedRunner(model, 1, encoded=encoded, twin=twin) for _ in range(2))
    steps.feed([0], ids[:, :4], [4], [1])
    one_by_one = torch.cat([steps.feed([0], ids[:, i : i + 1], [1], [1]) for i in range(4, 10)], 1)[0]
    spans.feed([0], ids[:, :4], [4], [1])
    return None if alike(model, one_by_one, spans.feed([0], ids[:, 4:10], [6], [6])[0]) else pad


def _pad_of(model: PreTrainedModel) -> int | None:
    pad = getattr(model.config.get_text_config(decoder=True), "pad_token_id", None)
    return pad if isinstance(pad, int) and 0 <= pad < (readable(model) or 0) else None


def ids_to_try(model: PreTrainedModel) -> Tensor:
    """A text ``[1, 14]`` without padding."""
    ids, pad = trial_ids(model).flatten().unsqueeze(0), _pad_of(model)
    return ids if pad is None else torch.where(ids == pad, (pad + 1) % (readable(model) or 1), ids)


@torch.no_grad()
def _tried(model: PreTrainedModel, encoded: Encoded, twin: bool, hidden: int = 0) -> str | None:
    """Why a model's passes are of no use; None where they are.

    Args:
        hidden: so many first columns.
    """
    if not cache_argument(type(model)):
        return "it has no key-value cache to roll back"
    if ragged_layers(model.config.get_text_config(decoder=True)) is None:
        return "its cache holds more than keys and values"
    ids = ids_to_try(model)
    visible = torch.arange(4).unsqueeze(0) >= hidden if hidden else None
    try:
        steps, spans = (EncodedRunner(model, 1, encoded=encoded, twin=twin, visible=visible) for _ in range(2))
        whole = EncodedRunner(model, 1, encoded=encoded, twin=False, visible=visible, use_cache=False)
        steps.feed([0], ids[:, :4], [4], [1])
        one_by_one = torch.cat([steps.feed([0], ids[:, i : i + 1], [1], [1]) for i in range(4, 10)], 1)[0]
        spans.feed([0], ids[:, :4], [4], [1])
        at_once = spans.feed([0], ids[:, 4:10], [6], [6])
        spans.rollback(0, 6)
        behind = spans.feed([0], ids[:, 6:10], [4], [4])
        anew = whole.feed([0], ids[:, :10], [10], [6])
        found = [(one_by_one, at_once[0]), (one_by_one[2:], behind[0]), (anew[0], one_by_one)]
        if not all(alike(model, plain, got) for plain, got in found):
            dropped = "; it is in training mode, so call model.eval()" if model.training else ""
            return f"it gives other logits for several tokens than for one after the other{dropped}"
    except torch.OutOfMemoryError:
        raise  # says nothing of the model
    except Exception as error:  # what a forward of its own kind can throw
        if "memory" in str(error).lower():
            raise
        return f"its passes do not go on from a cache ({type(error).__name__}: {error})".split("\n")[0]
    return None


def _shares(model: PreTrainedModel, encoded: Encoded, twin: bool) -> bool:
    """Whether a pass over rows at different columns gives what passes of their own do. Tried once a model."""
    with _probing:
        found, form = _apart.setdefault(model, {}), f"{form_of(model, encoded)} {twin}"
        if form not in found:
            found[form] = _tried_apart(model, encoded, twin)
        return found[form]


@torch.no_grad()
def _tried_apart(model: PreTrainedModel, encoded: Encoded, twin: bool) -> bool:
    prefix = "decoder_" if model.config.is_encoder_decoder else ""
    if not (told_apart(model) if twin else takes(model, f"{prefix}position_ids")):
        return False
    ids = ids_to_try(model).view(2, 7)
    both = encoded.part([0, encoded.rows - 1])
    try:
        runner = EncodedRunner(model, 2, encoded=both, joint=True, twin=twin)
        runner.feed([0, 1], ids[:, :5], [5, 3], [1, 1])
        last = runner.feed([0, 1], torch.stack([ids[0, 5:], ids[1, 3:5]]), [2, 2], [2, 2])
        for row, n in enumerate((7, 5)):
            alone = EncodedRunner(model, 1, encoded=both.part([row]), twin=False)
            plain = alone.feed([0], ids[row : row + 1, :n], [n], [2])[0]
            if not alike(model, plain, last[row]):
                return False
    except Exception:  # what a forward of its own kind can throw
        return False
    return True
