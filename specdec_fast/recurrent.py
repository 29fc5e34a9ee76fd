"""Models with layers that keep a state: short convolutions, Mamba, gated linear attention, alone or beside attention.

Keys and values of a rejected token are rolled back by lowering a number. A state cannot be: it is one sum over all
tokens. So copies of it are kept from before passes whose tokens may be rejected, and a row that was rolled back goes on
from the newest copy that holds none of what is gone. What was accepted behind that copy is fed again, together with
the next tokens. A pass over a few positions takes little longer than one over one, so this costs little. Where more
than :data:`REPLAYED` tokens would be fed again (fewer for several rows), a pass of their own moves the copy on.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from specdec_fast.cache import RaggedCache, RaggedLayer, Window, cache_argument, empty, has_state
from specdec_fast.lean import LeanModel
from specdec_fast.runner import Runner, left_align
from specdec_fast.states import TENSORS, Unit, changed, layers_of, row_of, set_state, side_by_side, state_of
from specdec_fast.trial import alike, exact, trial_ids

__all__ = ["RecurrentRunner", "form_of", "shares_passes", "why_not_recurrent"]

REPLAYED = 16  # tokens fed again in front of a draft at most, in a pass of one row


class RecurrentRunner(Runner):
    """A runner of a model with states; the arguments are :class:`Runner`'s.

    Rows that read equally much share a pass, and so do all rows whose tail may be rejected anyway: there shorter ones
    are filled up with tokens that are rolled back.

    Raises:
        ValueError: padding is not on the left, or a row is nothing else.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rows: int,
        *,
        visible: Tensor | None = None,
        joint: bool | None = None,
        lean: LeanModel | None = None,
        **settings: Any,
    ):
        assert lean is None, "lean forms are of models without states"
        if visible is not None and (bool((visible.long().diff(dim=1) < 0).any()) or not bool(visible[:, -1].all())):
            name = type(model).__name__
            raise ValueError(f"attention_mask: {name} keeps a state: pad on the left, with text behind it")
        if joint is None:
            joint = rows == 1 or _found(model).joint
        super().__init__(model, rows, visible=visible, joint=joint, **settings)
        self._visible = None  # padding is never fed
        # Reading again costs by positions, which rows multiply, and a pass of its own hardly does
        self._most = int(REPLAYED / math.sqrt(rows if joint else 1))
        self.again = self._most // 2

    def _make_caches(self, groups: list[list[int]]) -> list[tuple[list[int], RaggedCache]]:
        units = [Unit(self.model.config, len(group)) for group in groups]
        self._unit_of = {row: unit for group, unit in zip(groups, units, strict=True) for row in group}
        self.own = [row for unit in units for row in unit.own]
        return list(zip(groups, units, strict=True))

    def rollback(self, row: int, length: int) -> None:
        super().rollback(row, length)
        self.own[row].anchor = self._seen(row)

    def _seen(self, row: int) -> int:
        """Tokens of a row that have been read and not rolled back."""
        return max(self.length[row] - self.hidden[row], 0)

    def _feed(
        self, rows: Sequence[int], tokens: Tensor, count: list[int], tail: list[int], embeds: Tensor | None
    ) -> Tensor:
        texts: dict[int, list[int]] = {}
        early: dict[int, list[int]] = {}
        certain: dict[int, int] = {}  # tokens in front of the tail, which is a draft with the token before it
        lines = tokens.tolist()
        for r, row in enumerate(rows):
            own, start = self.own[row], self._seen(row)
            first = min(max(self.hidden[row] - self.length[row], 0), count[r])  # padding
            self.length[row] += count[r]
            if first == count[r]:
                continue
            missing = own.go_back(start)
            line = lines[r][first : count[r]]
            own.tokens[start:] = line
            if len(line) > 1:  # single tokens may be a draft's, behind which nothing is certain
                own.anchor = max(own.anchor, start)
            texts[row] = missing + line
            if tail[r] > 1:
                certain[row] = len(texts[row]) - tail[r]
        for row, n in self._worth_a_pass(certain).items():
            early[row], texts[row] = texts[row][:n], texts[row][n:]
        for group in self._together(early, exactly=True):
            self._pass(group, [early[row] for row in group], [1] * len(group), None)
        wanted = dict(zip(rows, tail, strict=True))
        parts: dict[int, Tensor] = {}
        for group in self._together(texts, exactly=max(tail) == 1 or embeds is not None):
            piece = None
            if embeds is not None:
                piece = embeds[[list(rows).index(row) for row in group], -len(texts[group[0]]) :]
            logits = self._pass(group, [texts[row] for row in group], [wanted[row] for row in group], piece)
            if embeds is not None:
                for own in map(self.own.__getitem__, group):
                    own.begin(own.stands, own.state)
            parts.update(zip(group, logits.split(1), strict=True))
        width = max(tail)
        some = next(iter(parts.values()), tokens.new_zeros((1, width, 1)))
        none = some.new_zeros((1, width, some.shape[2]))
        whole = [torch.nn.functional.pad(part, (0, 0, 0, width - part.shape[1])) for part in parts.values()]
        parts = dict(zip(parts, whole, strict=True))
        return torch.cat([parts.get(row, none) for row in rows])

    def _worth_a_pass(self, certain: dict[int, int]) -> dict[int, int]:
        """How many tokens of which rows are read before all others, so that none has more than a few in front of its
        tail. Rows that have read something share that pass, over equally many tokens of each."""
        begun = {row: n for row, n in certain.items() if self.own[row].stands}
        worth = {row: n for row, n in certain.items() if n > self._most and (row not in begun or not self.joint)}
        if self.joint and max(begun.values(), default=0) > self._most:
            left = {c: max(n - c if n >= c else n for n in begun.values()) for c in begun.values() if c}
            cut = min(left, key=lambda c: (left[c], c))
            worth.update({row: cut for row, n in begun.items() if n >= cut})
        return worth

    def _together(self, texts: dict[int, list[int]], *, exactly: bool) -> list[list[int]]:
        """Rows that can share a pass over these; ``exactly``: over texts of one length only."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for row, text in texts.items():
            blank = self.own[row].stands == 0  # has no state yet that could stand beside another row's
            key = (blank, len(text) if exactly or blank else 0) if self.joint else (row,)
            groups.setdefault(key, []).append(row)
        return list(groups.values())

    def _pass(self, rows: list[int], texts: list[list[int]], tail: list[int], embeds: Tensor | None) -> Tensor:
        """One pass from where the states stand: logits ``[R, max(tail), V]``, left-aligned."""
        unit, device = self._unit_of[rows[0]], self.model.device
        own, window = [self.own[row] for row in rows], unit.window
        count = [len(text) for text in texts]
        n = max(count)
        tokens = torch.tensor([text + text[-1:] * (n - len(text)) for text in texts], device=device)
        for one in own:
            one.mark()
        unit.put(own)
        places = rows if self.joint else [0]
        window.rows = None if len(rows) == unit.rows else torch.tensor(places, device=device)
        start = [one.stands for one in own]
        window.start, window.end = min(start), max(start) + n
        columns = torch.tensor(start, device=device).unsqueeze(1) + torch.arange(n, device=device)
        window.columns = None if min(start) == max(start) else columns
        lanes = sorted({c - t + j for c, t in zip(count, tail, strict=True) for j in range(t)})
        logits = self._model_forward(rows, tokens, columns, [n] * len(rows), unit, embeds, lanes)
        unit.collect(own)
        for one in own:
            one.stands += n
        return left_align(logits, lanes, count, tail)

    def load(self, cache: Any, past: int) -> None:
        """Goes on behind a caller's cache of ``past`` columns, found readable by ``check_cache``."""
        layers = [layer for layer in cache.layers if has_state(layer)]
        for number, own in enumerate(self.own):
            read = past - min(self.hidden[number], past)
            own.begin(read, [changed(state_of(layer), partial(row_of, row=number)) for layer in layers])
            unit = self._unit_of[number]
            place = unit.own.index(own)
            unit.window.rows = torch.tensor([place])
            unit.window.columns, unit.window.start, unit.window.end = None, 0, read
            for mine, theirs in zip(unit.cache.layers, cache.layers, strict=True):
                if isinstance(mine, RaggedLayer) and theirs.is_initialized and read:
                    # A sliding-window layer keeps its last columns only; what it dropped, its window hides for good
                    filled = [part[number : number + 1, :, :past] for part in (theirs.keys, theirs.values)]
                    kept = min(read, filled[0].shape[2])
                    last = [torch.nn.functional.pad(part[:, :, -kept:], (0, 0, read - kept, 0)) for part in filled]
                    mine.update(*last)
            self.length[number] = past

    def store(self, cache: Cache, columns: int) -> None:
        """Writes what the rows have read, ``columns`` each, into a Transformers cache."""
        for number, own in enumerate(self.own):
            missing = own.go_back(self._seen(number))
            if missing:
                self._pass([number], [missing], [1], None)
        empty(cache)
        stateful = [layer for layer in cache.layers if has_state(layer)]
        for index, layer in enumerate(stateful):
            set_state(layer, side_by_side([own.state[index] for own in self.own]))
            mine: Any = self._unit_of[0].stateful[index]
            layer.device, layer.dtype = mine.device, mine.dtype  # type: ignore[union-attr]
        units: list[Any] = [unit for _, unit in self._units]
        sizes = [len(group) for group, _ in self._units]  # a cache of fixed size may have more rows
        for index in range(len(cache.layers)):
            parts = [unit.cache.layers[index] for unit in units]
            if isinstance(parts[0], RaggedLayer) and parts[0].keys is not None:
                keys, values = (
                    torch.cat([getattr(part, name)[:n, :, :columns] for part, n in zip(parts, sizes, strict=True)])
                    for name in ("keys", "values")
                )
                cache.update(self._padded(keys, columns), self._padded(values, columns), index)

    def _padded(self, part: Tensor, columns: int) -> Tensor:
        """Columns of padding in front of each row's."""
        pad = torch.nn.functional.pad
        rows = [pad(row[:, :, : columns - n], (0, 0, n, 0)) for row, n in zip(part.split(1), self.hidden, strict=True)]
        return torch.cat(rows)


def shares_passes(model: PreTrainedModel) -> bool:
    """Whether rows of a model that :func:`why_not_recurrent` has nothing against share passes at different columns."""
    return _found(model).joint


class _Found(NamedTuple):
    """Why a model cannot be decoded, and whether its rows share passes at different columns."""

    why_not: str | None
    joint: bool


_probed: weakref.WeakKeyDictionary[PreTrainedModel, dict[str, _Found]] = weakref.WeakKeyDictionary()
_probing = threading.Lock()


def why_not_recurrent(model: PreTrainedModel) -> str | None:
    """Why a model with layers of other kinds than attention cannot be decoded; None where it can. Tried once a model.

    Several models of Transformers read more than one token as if nothing had been read before, or with a part of the
    state only. So a few tokens are read behind others, again after a rollback, and once more with each part of the
    state no number: the first two must give what reading them one by one does, and the last must give none.
    """
    return _found(model).why_not


def form_of(model: PreTrainedModel) -> str:
    """What a trial's outcome hangs on: kernels, precision, and dropout."""
    rounded = torch.is_autocast_enabled(model.device.type)
    return f"{model.device.type} {model.dtype} {rounded} {model.config._attn_implementation} {model.training}"


def _found(model: PreTrainedModel) -> _Found:
    with _probing:
        found, form = _probed.setdefault(model, {}), form_of(model)
        if form not in found:
            found[form] = _probe(model)
        return found[form]


@torch.no_grad()
def _probe(model: PreTrainedModel) -> _Found:
    if not cache_argument(type(model)):
        return _Found("its forward takes the state by a name of its own", False)
    if layers_of(model.config, Window()) is None:
        return _Found("it is of a kind that cannot be copied", False)
    if not exact(model) and any(_limits_steps(module) for module in model.modules()):
        return _Found("time_step_limit holds for passes over several tokens and not for single ones", False)
    ids = trial_ids(model).flatten().unsqueeze(0)
    try:
        steps, spans = RecurrentRunner(model, 1), RecurrentRunner(model, 1)
        steps.feed([0], ids[:, :4], [4], [1])
        one_by_one = torch.cat([steps.feed([0], ids[:, i : i + 1], [1], [1]) for i in range(4, 10)], 1)[0]
        spans.feed([0], ids[:, :4], [4], [1])
        at_once = spans.feed([0], ids[:, 4:10], [6], [6])
        spans.rollback(0, 6)
        behind = spans.feed([0], ids[:, 6:10], [4], [4])
        if not (alike(model, one_by_one, at_once[0]) and alike(model, one_by_one[2:], behind[0])):
            return _Found("the model gives other logits for several tokens than for one after the other", False)
        for name in TENSORS:
            spans.rollback(0, 4)
            own = spans.own[0]
            own.go_back(4)
            if all(tensor is None for state in own.state for tensor in state[name].values()):
                continue
            own.state = [{**state, name: changed(state, _no_number)[name]} for state in own.state]
            if not bool(spans.feed([0], ids[:, 4:10], [6], [6]).isnan().any()):
                return _Found("the model reads several tokens without a part of its state", False)
    except torch.OutOfMemoryError:
        raise  # says nothing of the model
    except Exception as error:  # what a forward of its own kind can throw
        return _Found(f"the model does not go on from a state ({type(error).__name__})", False)
    return _Found(None, _shares(model, ids, one_by_one))


def _shares(model: PreTrainedModel, ids: Tensor, one_by_one: Tensor) -> bool:
    """Whether a pass over rows at different columns gives what passes of their own do."""
    text = ids[:, 3:9]
    try:
        alone, shared = RecurrentRunner(model, 1), RecurrentRunner(model, 2, joint=True)
        alone.feed([0], text[:, :2], [2], [1])
        own = alone.feed([0], text[:, 2:4], [2], [2])[0]
        shared.feed([0, 1], torch.cat([ids[:, :4], text[:, :4]]), [4, 2], [1, 1])
        got = shared.feed([0, 1], torch.cat([ids[:, 4:7], text[:, 2:5]]), [3, 2], [3, 2])
    except Exception:  # what a forward of its own kind can throw
        return False
    return alike(model, one_by_one[:3], got[0]) and alike(model, own, got[1, :2])


def _no_number(tensor: Tensor) -> Tensor:
    return torch.full_like(tensor, math.nan)


def _limits_steps(module: Any) -> bool:
    """Whether a Mamba-2 layer clamps its time steps: Transformers does so for several tokens, and not for single ones.

    In half precision rounding hides that from a trial.
    """
    least, most = getattr(module, "time_step_limit", None) or (0.0, math.inf)
    return least > 0 or most < math.inf
