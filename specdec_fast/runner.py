"""One causal language model with a cache whose rows advance and roll back independently."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec_fast import attention, trees
from specdec_fast.cache import RaggedCache, cache_argument, ragged_layers, takes
from specdec_fast.lean import Choosing, Drafted, LeanModel
from specdec_fast.lean_ops import Choices, Index, Judged, Judging, Told
from specdec_fast.masks import level_mask, positions_of, ragged_masks, text_positions, windows_of
from specdec_fast.memory import Memory
from specdec_fast.staging import moved
from specdec_fast.trees import Climbed, Climbing, Growing, Grown, Tree
from specdec_fast.trial import distance, trial_ids

__all__ = ["Runner", "left_align", "supports_ragged_batches"]

Head = Callable[[Tensor], Tensor]

WORTH_COPYING = 16  # tokens that need no pass of their own: fewer do not pay for cutting a pass in two


class Runner:
    """Feeds tokens of ``rows`` rows to a model, each row at its own column, and keeps what it computed.

    Rows whose lengths are equal go through the model exactly as in ``model.generate`` (its own masks). Rows at
    different columns share one forward pass with an explicit mask and positions of their own, where the model allows
    that; where it does not (ALiBi, FlashAttention, unknown attention patterns), each row has a pass of its own.

    Args:
        model: a decoder-only model.
        rows: how many rows.
        visible: ``[rows, P]`` bool, the prompt columns that are not padding; None where all are.
        use_cache: False: everything is computed anew in each pass, as ``generate(use_cache=False)`` does.
        prefill_chunk: feed long inputs in pieces of this many columns; None: as suits ``lean``.
        head: replaces the model's LM head: maps ``[.., H]`` final hidden states to logits.
        joint: whether rows share a forward pass; None: find out.
        lean: takes the model's place in short passes, where padding is on the left; its logits are those of ``head``.
        most: how many columns a row can come to have, 0: unknown.
        window: the most positions to be used, None: as many as the model was made for.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rows: int,
        *,
        visible: Tensor | None = None,
        use_cache: bool = True,
        prefill_chunk: int | None = None,
        head: Head | None = None,
        joint: bool | None = None,
        lean: LeanModel | None = None,
        most: int = 0,
        window: int | None = None,
    ):
        self.model = model
        self.rows = rows
        self.length = [0] * rows
        """Columns of each row that the cache holds."""
        self.use_cache = use_cache
        self.prefill_chunk = prefill_chunk
        self.head = head
        self._visible = self._padding = None if visible is None or bool(visible.all()) else visible.to(model.device)
        self.positions = positions_of(model) if window is None else min(positions_of(model), window)
        """How many positions are used at most: those the model was made for, or fewer."""
        self.vocabulary: int | None = getattr(model.get_input_embeddings(), "num_embeddings", None)
        """How many ids the model can read, None where it does not say."""
        padded_left = visible is None or bool((visible.long().diff(dim=1) >= 0).all())
        self._lean = lean if padded_left and use_cache else None
        self.hidden = [0] * rows if visible is None else (~visible).sum(1).tolist()
        """How many columns of each row's prompt are padding."""
        self._further: Tensor | None = None
        self._history: list[list[int]] = [[] for _ in range(rows)]  # filled only where nothing is cached
        if joint is None:
            joint = rows == 1 or supports_ragged_batches(model)
        self.again = 0  # tokens that a pass which scores a draft has to read once more, in the mean
        self._units = self._make_caches([list(range(rows))] if joint else [[row] for row in range(rows)])
        for _, unit in self._units:
            unit.window.most, unit.window.model = most, type(model).__name__

    def _make_caches(self, groups: list[list[int]]) -> list[tuple[list[int], RaggedCache]]:
        layers = ragged_layers(self.model.config)
        if layers is None:
            raise ValueError(f"{type(self.model).__name__} has layers that cannot be rolled back")
        return [(group, RaggedCache(len(group), layers)) for group in groups]

    @property
    def caches(self) -> list[tuple[list[int], RaggedCache]]:
        """The caches and the rows each one holds."""
        return self._units

    @property
    def joint(self) -> bool:
        """Whether rows at different columns share a forward pass."""
        return len(self._units) == 1

    def go_ahead(self, places: list[int]) -> None:
        """Counts the positions of what is fed from here on so much further, a number a row: a picture may take up fewer
        or more than it has columns."""
        self._further = torch.tensor(places, device=self.model.device).unsqueeze(1) if any(places) else None

    def rollback(self, row: int, length: int) -> None:
        """Forgets the columns of a row from ``length`` on."""
        self.length[row] = min(self.length[row], length)

    @torch.no_grad()
    def feed(
        self,
        rows: Sequence[int],
        tokens: Tensor,
        count: Sequence[int],
        tail: Sequence[int],
        *,
        embeds: Tensor | None = None,
    ) -> Tensor:
        """Appends tokens to rows and returns the logits after the last few of them.

        Args:
            rows: ``R`` different row numbers, ascending.
            tokens: ``[R, n]`` int64, left-aligned; lanes behind a row's count are ignored. An id that the model does
                not have (drafts of a wider drafter, text of a wider target, -1 for none) is read as another one.
            count: how many of its lanes each row appends; 0 for a row that only keeps its place, not for all.
            tail: the logits of how many last lanes each row wants, at most its count.
            embeds: ``[R, n, H]`` used instead of ``tokens`` (prompts given as embeddings).

        Returns:
            ``[R, max(tail), V]`` logits in the model's type, left-aligned: entry ``[r, j]`` follows lane
            ``count[r] - tail[r] + j``.
        """
        tokens = tokens.to(self.model.device)
        if self.vocabulary is not None:
            tokens = tokens.clamp(0, self.vocabulary - 1)
        if not self.use_cache:
            tokens, count = self._with_history(rows, tokens, count)
        elif embeds is None and self.joint and len(rows) > 1 and not any(self.length[row] for row in rows):
            tokens, count = self._read_once(rows, tokens, list(count), max(tail))
        most = self.prefill_chunk or (self._lean.piece(len(rows)) if self._lean is not None else 0)
        if most and tokens.shape[1] > most and embeds is None:
            done = min(count) - max(tail)
            if not self.prefill_chunk:  # pieces alike, the last of which goes with the rest
                pieces = -(-tokens.shape[1] // most)
                most = -(-tokens.shape[1] // pieces)
                done = min((pieces - 1) * most, done // most * most)
            for first in range(0, done, most):
                piece = tokens[:, first : min(first + most, done)]
                self._feed(rows, piece, [piece.shape[1]] * len(rows), [1] * len(rows), None)
            if done > 0:
                tokens, count = tokens[:, done:], [c - done for c in count]
        return self._feed(rows, tokens, list(count), list(tail), embeds)

    def quick(self, count: list[int]) -> bool:
        """Whether :meth:`read` runs such a pass, with so many tokens a row, as one operation."""
        return self._lean is not None and self.joint and min(count) > 0 and all(self._lean.takes(count))

    @torch.no_grad()
    def read(self, rows: Sequence[int], texts: list[list[int]], tail: list[int]) -> Tensor:
        """:meth:`feed` for tokens that are on the host: one list a row, none of them empty."""
        count = [len(text) for text in texts]
        if self._lean is None or not self.quick(count):
            tokens = [torch.tensor(text, dtype=torch.long) for text in texts]
            return self.feed(rows, torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True), count, tail)
        texts = self._readable(texts)
        start, hidden = [self.length[row] for row in rows], [self.hidden[row] for row in rows]
        logits = self._lean.read(texts, list(rows), start, hidden, self._units[0][1], tail)
        for row, n in zip(rows, count, strict=True):
            self.length[row] += n
        return logits

    def judge(
        self,
        rows: list[int],
        first: list[int],
        told: Told,
        count: list[int],
        judging: Judging,
        keys: tuple[list[int], list[int]],
    ) -> Judged:
        """Feeds each row one token and its draft, and judges the drafts, in one operation: :meth:`LeanModel.judge`.

        Only where such a pass is :meth:`quick`.

        Args:
            keys: seed and position of the numbers, ``[R]`` each.
        """
        assert self._lean is not None
        length = self.length
        start, hidden = [length[row] for row in rows], [self.hidden[row] for row in rows]
        judged = self._lean.judge(first, told, count, rows, start, hidden, self._units[0][1], judging, *keys)
        for row, n in zip(rows, count, strict=True):
            length[row] += n + 1
        return judged

    def climb(
        self, rows: list[int], first: list[int], tree: Tree, climbing: Climbing, keys: tuple[list[int], list[int]]
    ) -> Climbed:
        """Feeds each row one token and a tree, and judges the tree, in one operation: :func:`specdec_fast.trees.climb`.

        Only where such a pass is :meth:`quick`. Nodes that do not stay are not in the cache afterwards.
        """
        assert self._lean is not None
        start, hidden = [self.length[row] for row in rows], [self.hidden[row] for row in rows]
        climbed = trees.climb(self._lean, first, tree, rows, start, hidden, self._units[0][1], climbing, *keys)
        for row, passed in zip(rows, climbed.passed, strict=True):
            self.length[row] += 1 + len(passed)
        return climbed

    def branch(
        self,
        rows: list[int],
        texts: list[list[int]],
        choosing: Choosing,
        choices: Choices | None,
        index: Index | None,
        growing: list[Growing],
        least: float,
        keys: tuple[list[int], list[int]],
        memory: Memory | None = None,
        drawn: bool = False,
    ) -> Grown:
        """Feeds tokens to rows and drafts trees behind them in one operation: :func:`specdec_fast.trees.branch`.

        Nothing of a tree is in the cache afterwards. Only where the texts' pass is :meth:`quick`.
        """
        assert self._lean is not None
        texts = self._readable(texts)
        start, hidden = [self.length[row] for row in rows], [self.hidden[row] for row in rows]
        cache = self._units[0][1]
        written = trees.branch(
            self._lean,
            texts,
            rows,
            start,
            hidden,
            cache,
            choosing,
            choices,
            index,
            growing,
            least,
            *keys,
            memory,
            drawn,
        )
        for row, text in zip(rows, texts, strict=True):
            self.length[row] += len(text)
        return written

    def draft(
        self,
        rows: list[int],
        texts: list[list[int]],
        steps: list[int],
        choosing: Choosing,
        choices: Choices | None,
        seed: list[int],
        position: list[int],
        stops: list[tuple[list[float], list[float]]] | None = None,
        memory: Memory | None = None,
    ) -> Drafted:
        """Feeds tokens to rows and drafts behind them in one operation: :meth:`LeanModel.draft`.

        All but the last token of a draft are fed too and count. Only where the texts' pass is :meth:`quick`.
        """
        assert self._lean is not None
        texts = self._readable(texts)
        start, hidden = [self.length[row] for row in rows], [self.hidden[row] for row in rows]
        drafted = self._lean.draft(
            texts, rows, start, hidden, self._units[0][1], steps, choosing, choices, seed, position, stops, memory
        )
        for row, text, count in zip(rows, texts, drafted.counts, strict=True):
            self.length[row] += len(text) + count - 1
        return drafted

    def steps(self, rows: list[int], most: int) -> Callable[[Tensor], Tensor] | None:
        """A function that feeds one token to each row, ``[R]`` int64 ids it has, and returns logits ``[R, V]``.

        For at most ``most`` calls in a row, with no other pass between them. The rows' lengths stay: :meth:`advance`
        says how much of it is kept. None where passes do not run as one operation.
        """
        if self._lean is None or not self.joint:
            return None
        start, hidden = [self.length[row] for row in rows], [self.hidden[row] for row in rows]
        return self._lean.steps(rows, start, hidden, self._units[0][1], most)

    def _readable(self, texts: list[list[int]]) -> list[list[int]]:
        """An id that the model does not have is read as another one."""
        if self.vocabulary is None or all(min(text) >= 0 and max(text) < self.vocabulary for text in texts):
            return texts
        last = self.vocabulary - 1
        return [[min(max(token, 0), last) for token in text] for text in texts]

    def advance(self, row: int, columns: int) -> None:
        """Keeps so many of the columns that :meth:`steps` has fed to a row."""
        self.length[row] += columns

    def _read_once(self, rows: Sequence[int], tokens: Tensor, count: list[int], tail: int) -> tuple[Tensor, list[int]]:
        """Reads prompts that several empty rows begin with once and copies their columns; returns what is left."""
        columns = min(count) - tail
        if columns < 1:
            return tokens, count
        same = tokens[:, :columns]
        if self._padding is not None:
            same = torch.cat([same, self._padding[list(rows)].long()], 1)
        first: dict[tuple[int, ...], int] = {}
        source = [first.setdefault(tuple(text), r) for r, text in enumerate(same.tolist())]
        others = [r for r, s in enumerate(source) if s != r]
        if len(others) * columns < WORTH_COPYING:
            return tokens, count
        some = sorted(first.values())
        self.feed([rows[r] for r in some], tokens[some, :columns], [columns] * len(some), [1] * len(some))
        self._units[0][1].repeat([rows[source[r]] for r in others], [rows[r] for r in others], columns)
        for r in others:
            self.length[rows[r]] = columns
        return tokens[:, columns:], [c - columns for c in count]

    def _with_history(self, rows: Sequence[int], tokens: Tensor, count: Sequence[int]) -> tuple[Tensor, list[int]]:
        """Puts all earlier tokens of the rows in front and forgets their cached columns."""
        histories = []
        for r, row in enumerate(rows):
            kept = self._history[row][: self.length[row]]
            self._history[row] = kept + tokens[r, : count[r]].tolist()
            histories.append(torch.tensor(self._history[row], dtype=torch.long))
            self.length[row] = 0
        padded = torch.nn.utils.rnn.pad_sequence(histories, batch_first=True).to(tokens.device)
        return padded, [len(history) for history in histories]

    def _feed(
        self, rows: Sequence[int], tokens: Tensor, count: list[int], tail: list[int], embeds: Tensor | None
    ) -> Tensor:
        takes = [False] * len(rows) if self._lean is None or embeds is not None else self._lean.takes(count)
        if len(self._units) == 1 and len(set(takes)) == 1:
            return self._forward(self._units[0][1], list(rows), list(rows), tokens, count, tail, embeds, takes[0])
        width = max(tail)
        parts: list[Tensor | None] = [None] * len(rows)
        if len(self._units) == 1:
            groups = [[r for r, taken in enumerate(takes) if taken is lean and count[r]] for lean in (True, False)]
        else:
            groups = [[r] for r in range(len(rows)) if count[r]]
        for group in filter(None, groups):
            own = [rows[r] for r in group]
            unit, places = (self._units[0][1], own) if len(self._units) == 1 else (self._units[own[0]][1], [0])
            lanes, wanted = [count[r] for r in group], [tail[r] for r in group]
            piece = None if embeds is None else embeds[group, : max(lanes)]
            logits = self._forward(
                unit, own, places, tokens[group, : max(lanes)], lanes, wanted, piece, takes[group[0]]
            )
            logits = torch.nn.functional.pad(logits, (0, 0, 0, width - logits.shape[1]))
            for r, part in zip(group, logits.split(1), strict=True):
                parts[r] = part.float() if len(set(takes)) > 1 else part
        some = next(part for part in parts if part is not None)
        return torch.cat([torch.zeros_like(some) if part is None else part for part in parts])

    def _forward(
        self,
        unit: RaggedCache,
        rows: list[int],
        places: list[int],
        tokens: Tensor,
        count: list[int],
        tail: list[int],
        embeds: Tensor | None,
        lean: bool,
    ) -> Tensor:
        """One forward pass of rows that share a cache; ``places`` are their rows in that cache."""
        device = tokens.device
        start = [self.length[row] for row in rows]
        n = tokens.shape[1]
        window = unit.window
        whole = len(places) == unit.rows
        window.rows = None if whole else torch.tensor(places, device=device)
        window.start, window.end = min(start), max(start) + n
        level = min(start) == max(start)
        if level:
            window.columns = None
            columns = torch.arange(start[0], start[0] + n, device=device).expand(len(rows), n)
        else:
            columns = torch.tensor(start, device=device).unsqueeze(1) + torch.arange(n, device=device)
            window.columns = columns
        lanes = sorted({c - t + j for c, t in zip(count, tail, strict=True) for j in range(t)})
        if lean and self._lean is not None:
            logits = self._lean(tokens, columns, [self.hidden[row] for row in rows], unit, lanes)
        else:
            logits = self._model_forward(rows, tokens, columns, count, unit, embeds, lanes)
        for row, advance in zip(rows, count, strict=True):
            self.length[row] += advance
        return left_align(logits, lanes, count, tail)

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
        """Logits of some lanes, ``[R, len(lanes), V]``, by the model's own forward."""
        n = tokens.shape[1]
        level = unit.window.columns is None
        visible = None if self._visible is None else self._visible[rows]
        cache = cache_argument(type(self.model))
        arguments: dict[str, Any] = {"use_cache": True, cache: unit.cache, "return_dict": True}
        arguments.update({"input_ids": tokens} if embeds is None else {"inputs_embeds": embeds})
        if takes(self.model, "position_ids"):
            own = text_positions(self._read_columns(rows, columns, count), visible)
            arguments["position_ids"] = own if self._further is None else own + self._further[rows]
        arguments["attention_mask"] = (
            level_mask(unit.window.end, visible)
            if level
            else ragged_masks(self.model, columns, unit.window.end, visible)
        )
        return self._logits(arguments, lanes, n)

    def _read_columns(self, rows: list[int], columns: Tensor, count: list[int]) -> Tensor:
        """Columns of a pass, for positions. Lanes behind a row's count are ignored, but a learned one must exist."""
        used = torch.tensor([self.length[row] + n for row, n in zip(rows, count, strict=True)], device=columns.device)
        return torch.minimum(columns, used.clamp(min=1).unsqueeze(1) - 1)

    def _logits(self, arguments: dict[str, Any], lanes: list[int], n: int) -> Tensor:
        """Logits of some lanes, ``[R, len(lanes), V]``."""
        last = lanes == list(range(n - len(lanes), n))
        keep: int | Tensor = len(lanes) if last else torch.tensor(lanes, device=self.model.device)
        if self.head is not None:
            base = self.model.base_model
            hidden = base(**arguments).last_hidden_state
            return self.head(hidden[:, n - len(lanes) :] if last else hidden[:, keep])
        if takes(self.model, "logits_to_keep"):
            return self.model(**arguments, logits_to_keep=keep).logits
        logits = self.model(**arguments).logits
        return logits[:, n - len(lanes) :] if last else logits[:, keep]


def left_align(logits: Tensor, lanes: list[int], count: list[int], tail: list[int]) -> Tensor:
    """Picks each row's own last lanes out of the lanes computed: ``[R, max(tail), V]``."""
    width = max(tail)
    place = {lane: index for index, lane in enumerate(lanes)}
    first = [place[c - t] for c, t in zip(count, tail, strict=True)]
    if all(f == 0 for f in first):
        return logits[:, :width]
    index = torch.tensor([[min(f + j, len(lanes) - 1) for j in range(width)] for f in first], device="cpu")
    return logits[torch.arange(len(logits), device=logits.device).unsqueeze(1), moved(index, logits.device)]


_probed: weakref.WeakKeyDictionary[PreTrainedModel, dict[str, bool]] = weakref.WeakKeyDictionary()
_probing = threading.Lock()


def supports_ragged_batches(model: PreTrainedModel) -> bool:
    """Whether one forward pass may hold rows at different columns; tried once a model.

    A mask of four dimensions is ignored by some models (MPT), breaks others (Bloom, Falcon) and means something else
    under FlashAttention; two rows at different columns are therefore run once and compared with plain passes.
    """
    with _probing:
        found = _probed.setdefault(model, {})
        implementation = str(model.config._attn_implementation)  # can be changed on a loaded model
        if implementation not in found:
            found[implementation] = _probe(model)
        return found[implementation]


@torch.no_grad()
def _probe(model: PreTrainedModel) -> bool:
    implementation = model.config._attn_implementation
    if implementation not in ("sdpa", "eager", attention.NAME) or not takes(model, "position_ids"):
        return False
    try:
        windows_of(model)
    except ValueError:
        return False
    # A mask of the model's own for a window counts from the last column of a pass, which is not every row's (GPT-Neo)
    if any(mask.dtype == torch.bool and mask.ndim == 4 and not mask[..., -1, 0].all() for mask in model.buffers()):
        return False
    ids = trial_ids(model)
    visible = torch.tensor([[True, True], [False, True]])
    try:
        runner = Runner(model, 2, visible=visible, joint=True)
        runner.feed([0, 1], ids[:, :5], [5, 3], [1, 1])
        last = runner.feed([0, 1], torch.stack([ids[0, 5:], ids[1, 3:5]]), [2, 2], [2, 2])
        for row, text in enumerate([ids[:1], ids[1:, 1:5]]):
            place = torch.arange(text.shape[1], device=ids.device).unsqueeze(0)
            plain = model(input_ids=text, position_ids=place, use_cache=False).logits[0, -2:]
            if distance(plain, last[row]) > 1:
                return False
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError):
        return False
    return True
