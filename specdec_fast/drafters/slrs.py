"""String-level rejection sampling (SLRS; Timor et al., arXiv 2502.05202) with an exact law, by the cover walk.

The drafter writes text with its own tokens, and the walk (:mod:`specdec_fast.walk`) makes target tokens of it. The law
of each can be asked for any token: at no cost along the path that was drawn, for one drafter pass over the token's own
path elsewhere. The paper sums the probabilities of all ways to write a token, which is no distribution; here the map
from draws to tokens comes first, and its law follows. ``docs/slrs.md`` has the proofs.
"""

from __future__ import annotations

import codecs
import math
import time
from collections.abc import Callable, Sequence
from itertools import count

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

from specdec_fast import reference, sampling
from specdec_fast.drafters.base import Passes
from specdec_fast.drafters.model import Context, Watcher
from specdec_fast.encoding import Encoded
from specdec_fast.lean import MOST_LANES, lean_model
from specdec_fast.proposal import Proposal
from specdec_fast.runners import runner_for
from specdec_fast.spelling import Path, Spelling
from specdec_fast.state import Rows
from specdec_fast.verification import Draws
from specdec_fast.vocab import Vocabulary
from specdec_fast.walk import Certain, Masses, Walk, Weights

__all__ = ["SlrsDrafter", "TextModel", "WalkLaw"]

CHARACTER = 4  # bytes of a character, at most


class TextModel:
    """A drafter model that tells its law behind any text, and keeps what it computed of each row's last one.

    Args:
        model: the drafter.
        rows: how many rows.
        warpers: the drafter's sampling; None: its argmax.
        ids: ``[K]`` int64 ids of the drafter it may draw, called entries.
        window: how many tokens a text may have, None: as many as the model has positions for.
        passes: runs a model that has no native form; None: it runs as it is.
        encoded: what it reads beside the text; None: nothing.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rows: int,
        *,
        warpers: LogitsProcessorList | None,
        ids: Tensor,
        window: int | None = None,
        passes: Passes | None = None,
        encoded: Encoded | None = None,
    ):
        self.warpers = warpers
        self._ids = ids.to(model.device)
        lean, runner = None if encoded is not None else lean_model(model), None
        if lean is None and passes is not None:
            runner = passes.runner(model, rows, head=None, ids=None, window=window, encoded=encoded)
        self._runner = runner or runner_for(model, rows, lean=lean, window=window, encoded=encoded)
        self._cached: list[list[int]] = [[] for _ in range(rows)]

    @property
    def positions(self) -> int:
        """How many tokens a text may have."""
        return self._runner.positions

    def laws(self, rows: Sequence[int], texts: Sequence[list[int]], tails: Sequence[int]) -> list[list[Weights]]:
        """The laws of the entries behind the last few tokens of texts.

        Args:
            rows: different row numbers, ascending.
            texts: a text for each, in drafter ids.
            tails: behind how many last tokens of each a law is wanted, at least 1.

        Returns:
            for each row one law a token asked for.
        """
        missing = []
        for row, text, tail in zip(rows, texts, tails, strict=True):
            kept = min(_common(self._cached[row], text), len(text) - tail)
            self._runner.rollback(row, kept)
            missing.append(torch.tensor(text[kept:], dtype=torch.long))
            self._cached[row] = text
        # Tokens that a later look may feed again always pass alone: a long pass computes in another precision
        early = [r for r, (piece, tail) in enumerate(zip(missing, tails, strict=True)) if len(piece) > tail]
        if any(len(missing[r]) > MOST_LANES for r in early):
            heads = [missing[r][: -tails[r]] for r in early]
            widths = [len(head) for head in heads]
            padded = torch.nn.utils.rnn.pad_sequence(heads, batch_first=True)
            self._runner.feed([rows[r] for r in early], padded, widths, [1] * len(early))
            missing = [piece[-tail:] for piece, tail in zip(missing, tails, strict=True)]
        lanes = [len(piece) for piece in missing]
        tokens = torch.nn.utils.rnn.pad_sequence(missing, batch_first=True)
        logits = self._runner.feed(list(rows), tokens, lanes, list(tails))
        wanted = torch.arange(logits.shape[1]).unsqueeze(0) < torch.tensor(tails).unsqueeze(1)
        laws = iter(self._laws(logits[wanted.to(logits.device)]))
        return [[next(laws) for _ in range(tail)] for tail in tails]

    def _laws(self, logits: Tensor) -> list[Weights]:
        scores = logits[:, self._ids].float()
        if self.warpers:
            scores = sampling.warp(self.warpers, scores)
        if self.warpers is None:
            peak, entry = scores.max(-1)
            sound = peak.isfinite().tolist()
            return [Certain(k if ok else -1) for k, ok in zip(entry.tolist(), sound, strict=True)]
        return [Masses(q) for q in reference.masses(scores).cpu().numpy()]


class WalkLaw:
    """The law of tokens that walks proposed (a :class:`~specdec_fast.proposal.LazyLaw`).

    Args:
        walks: one a row.
        look: ``look(r, depth, path)`` gives the laws behind every beginning of ``path``, from the first ``depth``
            entries that row r fed.
        device: of the target.
        base: drafted position that position 0 stands for.
        width: how many positions.
    """

    def __init__(
        self,
        walks: Sequence[Walk],
        look: Callable[[int, int, Path], list[Weights]],
        device: torch.device,
        *,
        base: int = 0,
        width: int | None = None,
    ):
        self._walks = walks
        self._look = look
        self._device = device
        self._base = base
        self._width = max((len(walk.drawn) for walk in walks), default=0) if width is None else width

    def log_q(self, tokens: Tensor) -> Tensor:
        result = torch.zeros((len(self._walks), self._width), dtype=torch.float64)
        for r, walk in enumerate(self._walks):
            for i, drawn in enumerate(walk.drawn[self._base : self._base + self._width]):
                mass = self.mass(r, i, drawn.token)
                result[r, i] = math.log(mass) if mass > 0 else -math.inf
        return result.to(self._device)

    def mass(self, row: int, position: int, token: int) -> float:
        law = self._walks[row].drawn[self._base + position].law
        return min(law.mass(token, lambda depth, path: self._look(row, depth, path)), 1.0)

    def at(self, position: int) -> WalkLaw:
        width = int(position < self._width)
        return WalkLaw(self._walks, self._look, self._device, base=self._base + position, width=width)


class SlrsDrafter:
    """Proposes target tokens by the cover walk.

    Args:
        model: a drafter model on its whole vocabulary.
        contexts: each row's text in the drafter's ids.
        spelling: of the two vocabularies.
        target: the target's vocabulary.
        warpers: the drafter's sampling; None: its argmax, and the proposal is a certainty.
        confidence: stop a row's draft behind a token whose mass is below this, as far as the walk knows it; 0: never.
        watcher: asked behind every token, with that mass, whether the row drafts on, in place of ``confidence``.
        window: how much it reads of a text, in its tokens; None: as much as it has positions for.
        passes, encoded: as for :class:`TextModel`.
        device: of the target.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        contexts: Sequence[Context],
        spelling: Spelling,
        target: Vocabulary,
        *,
        warpers: LogitsProcessorList | None,
        confidence: float,
        device: torch.device,
        watcher: Watcher | None = None,
        window: int | None = None,
        passes: Passes | None = None,
        encoded: Encoded | None = None,
    ):
        ids = torch.tensor(spelling.ids, dtype=torch.long)
        self._model = TextModel(
            model, len(contexts), warpers=warpers, ids=ids, window=window, passes=passes, encoded=encoded
        )
        self._contexts = contexts
        self._spelling = spelling
        self._target = target
        self._confidence = confidence
        self._watcher = watcher
        self._device = device
        self._read = [0] * len(contexts)
        self._first = [0] * len(contexts)
        self.translate_seconds = 0.0

    def propose(self, rows: Rows, active: list[int], limit: list[int], draws: Draws) -> Proposal:
        begin = time.perf_counter()
        for row in active:
            self._contexts[row].append(rows.tokens[row][self._read[row] :])
            self._read[row] = len(rows.tokens[row])
        self.translate_seconds += time.perf_counter() - begin
        numbers = _Numbers(draws)
        walks, texts = [], []
        for r, (row, most) in enumerate(zip(active, limit, strict=True)):
            room = self._room(row, most)
            text = self._contexts[row].ids[self._first[row] :]
            held = _unfinished(self._target, rows.tokens[row])
            last = rows.tokens[row][-1]
            ending = self._spelling.entry_of.get(text[-1]) if len(text) > 1 and not held else None
            if ending is not None and self._spelling.longer(ending, last) is None:
                ending = None
            walks.append(
                Walk(
                    self._spelling,
                    most,
                    room + (ending is not None),
                    numbers.of(r),
                    last=last,
                    held=held,
                    ending=ending,
                    goes_on=self._goes_on(row),
                )
            )
            texts.append(text if ending is None else text[:-1])
        going = [r for r, walk in enumerate(walks) if walk.able and texts[r] and self._spelling.ids]
        while going:
            fed = [self._behind(texts[r], walks[r].fed) for r in going]
            laws = self._model.laws([active[r] for r in going], fed, [walks[r].wanted for r in going])
            going = [r for r, own in zip(going, laws, strict=True) if walks[r].advance(*reversed(own))]
        return self._proposal(active, texts, walks)

    def _goes_on(self, row: int) -> Callable[[int, float], bool] | None:
        """Whether a row's walk goes on behind so many tokens, the newest of this mass; None: always."""
        watcher, least = self._watcher, self._confidence
        if watcher is not None:
            return lambda drafted, mass: watcher.further(row, drafted, mass)
        return (lambda _, mass: mass >= least) if least else None

    def _proposal(self, active: list[int], texts: list[list[int]], walks: list[Walk]) -> Proposal:
        proposal = Proposal.of_lists([[drawn.token for drawn in walk.drawn] for walk in walks], self._device)
        if self._model.warpers is None:
            return proposal

        def look(r: int, depth: int, path: Path) -> list[Weights]:
            text = self._behind(texts[r], [*walks[r].fed[:depth], *path])
            return self._model.laws([active[r]], [text], [len(path)])[0]

        return Proposal(proposal.tokens, proposal.count, WalkLaw(walks, look, self._device))

    def _behind(self, text: list[int], entries: Sequence[int]) -> list[int]:
        return text + [self._spelling.ids[k] for k in entries]

    def _room(self, row: int, most: int) -> int:
        """Slides a row's window where its text might leave the drafter's positions; returns how much may be fed."""
        length, positions = len(self._contexts[row].ids), self._model.positions
        if length - self._first[row] + (most + 1) * self._spelling.longest > positions:
            self._first[row] = max(length - max(positions // 2, 1), 0)
        return positions - (length - self._first[row])


class _Numbers:
    """Uniform numbers for drafting, a stream a row: how many a row draws does not depend on the others."""

    def __init__(self, draws: Draws):
        self._draws = draws
        self._drawn: list[list[float]] = []

    def of(self, row: int) -> Callable[[], float]:
        used = count()

        def number() -> float:
            offset = next(used)
            if offset == len(self._drawn):
                self._drawn.append(self._draws.draft(offset).tolist())
            return self._drawn[offset][row]

        return number


def _unfinished(vocabulary: Vocabulary, tokens: Sequence[int]) -> bytes:
    """The bytes of a character that a text's end has only begun."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(vocabulary.bytes_of(tokens[-CHARACTER:]))
    return decoder.getstate()[0]


def _common(left: list[int], right: list[int]) -> int:
    """Length of the common start of two sequences."""
    most = min(len(left), len(right))
    if left[:most] == right[:most]:
        return most
    return next(i for i in range(most) if left[i] != right[i])
