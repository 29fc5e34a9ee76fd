"""Drafters of the loop on the host at fixed shapes, on a GPU captured as CUDA graphs.

On a GPU a pass by a model's own Python takes as long as many replays of the same pass, and a draft is several passes.
So drafters run over a static cache there too, and where nobody asks for the law that tokens were drawn from (SLEM,
whose proposals are certain; an argmax), reading what is new and all steps with their draws are one function
(:class:`HostDraft`): the host waits once a draft, for the tokens whose text it has to translate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

from specdec_fast.compiled import Compilation, Pair, capture, notice
from specdec_fast.device_law import DeviceLaw
from specdec_fast.device_round import BUCKETS, Begun, DeviceWriter, State, bucket_of
from specdec_fast.device_text import read_texts
from specdec_fast.drafters.base import RowDraft
from specdec_fast.encoding import Encoded
from specdec_fast.host_model import HostModel
from specdec_fast.runner import Head, Runner
from specdec_fast.staging import upload
from specdec_fast.static_model import for_passes
from specdec_fast.static_recurrent import StaticRecurrentRunner
from specdec_fast.static_runner import StaticRunner
from specdec_fast.static_runners import why_not_rounds, why_not_static

__all__ = ["HostDraft", "HostPasses"]


class HostPasses:
    """Takes drafters out for the loop on the host (:class:`specdec_fast.drafters.base.Passes`).

    Args:
        how: passes run.
        device: of the target; drafters elsewhere run as they are.
        columns, prompt: the longest text of the call and its prompt, in the target's tokens.
        ready: draft tokens up to which everything is captured at once, as for a prepared pair.

    Attributes:
        target: whether the target of the call runs so too.
    """

    def __init__(self, how: Compilation, device: torch.device, columns: int, prompt: int, ready: int = 0):
        self._how, self._device, self._sizes, self._ready = how, device, (columns, prompt), ready
        self.target = False
        self._taken: list[HostModel] = []
        self._small: list[HostModel] = []  # those that no call wants

    @property
    def compiled(self) -> bool:
        """Whether passes are compiled, which takes seconds a shape."""
        return self._how.compiled

    def why_not(self, model: PreTrainedModel, encoded: Encoded | None = None) -> str | None:
        """Why a model cannot run passes of fixed shape; None where it can.

        Args:
            encoded: what it reads beside the text; None: nothing.
        """
        if model.device != self._device:
            return f"it is on {model.device}"
        if self._how.compiled and (reason := why_not_rounds(model, encoded)):
            return f"{reason}, and such passes are not compiled"
        return why_not_static(for_passes(model, self._how.compiled)[0], encoded)

    def runner(
        self,
        model: PreTrainedModel,
        rows: int,
        *,
        head: Head | None = None,
        ids: Tensor | None = None,
        window: int | None = None,
        columns: int = 0,
        encoded: Encoded | None = None,
    ) -> Runner | None:
        """A runner for so many rows, until :meth:`close`; None where the model cannot run so.

        Args:
            ids: ``[K]`` int64, what the head's logits are of.
            columns: of its texts, 0: as many as the call's.
            encoded: what it reads beside the text; None: nothing.
        """
        if self.why_not(model, encoded) is not None:
            return None
        own, sizes = for_passes(model, self._how.compiled)[0], (columns, columns) if columns else self._sizes
        if window is not None:  # no text is longer, and a draft behind it
            sizes = min(sizes[0], window + BUCKETS[-1] + 1), min(sizes[1], window)
        ready = self._ready and self._ready + 1
        given: dict[str, Any] = {"head": head, "ids": ids, "window": window, "encoded": encoded}
        self._taken.append(HostModel(own, self._how, rows, *sizes, **given, ready=ready))
        if columns:
            self._small.append(self._taken[-1])
        return self._taken[-1].runner

    def drafting(
        self, runner: Runner, warpers: LogitsProcessorList | None, confidence: float, watched: bool
    ) -> HostDraft | None:
        """Whole drafts on a runner that was made here; None where it rolls back on the host."""
        if isinstance(runner, StaticRecurrentRunner):
            return None
        host = next(one for one in self._taken if one.runner is runner)
        made = HostDraft(host, confidence, watched)
        if self._ready:
            made.make(warpers, 2 * self._ready)  # several tokens of a drafter may be one of the target
        return made

    def apart(self) -> HostPasses:
        """Another one for the same call, to be closed before it."""
        made = HostPasses(self._how, self._device, *self._sizes)
        made.target = self.target
        return made

    def close(self, *, small: bool = True) -> None:
        """Gives back all that was taken.

        Args:
            small: keep for later what was taken for fewer columns than the call's.
        """
        while self._taken:
            own = self._taken.pop()
            own.close(kept=small or own not in self._small)


class HostDraft:
    """A draft as one function of fixed shape (:class:`specdec_fast.drafters.base.Drafting`).

    Args:
        host: the drafter model, with its own head.
        confidence, watched: as for :class:`DeviceWriter`.
    """

    def __init__(self, host: HostModel, confidence: float, watched: bool):
        assert isinstance(host.runner, StaticRunner)
        self._host, self._runner = host, host.runner
        self._ends: dict[str, Any] = {"confidence": confidence, "watched": watched}
        self._law: DeviceLaw | None = None
        self._pair: Pair | None = None
        self._writer: DeviceWriter | None = None

    def __call__(
        self,
        texts: Sequence[list[int]],
        first: Sequence[int],
        active: Sequence[int],
        steps: Sequence[int],
        keys: tuple[list[int], list[int]],
        warpers: LogitsProcessorList | None,
        stops: Sequence[tuple[list[float], list[float]]] | None,
    ) -> list[RowDraft] | None:
        law = DeviceLaw.of(warpers, do_sample=warpers is not None)
        if law.processors or max(steps) > BUCKETS[-1]:
            return None
        runner, gamma = self._runner, bucket_of(max(steps))
        length = [len(text) - at for text, at in zip(texts, first, strict=True)]
        self._host.reserve(max(length) + gamma + 1)
        behind = [row for row in active if length[row] - runner.length[row] > State.TAIL]
        read_texts(runner, behind, [texts[row][first[row] + runner.length[row] : -1] for row in behind])
        state = self._bound(law)
        tails = [text[max(len(text) - State.TAIL, at) :] for text, at in zip(texts, first, strict=True)]
        upload([tail + [0] * (State.TAIL - len(tail)) for tail in tails], state.tail)
        upload(length, state.text)
        for values, to in zip((steps, *keys), (state.limit, state.seed, state.length), strict=True):
            each = [0] * runner.rows
            for row, value in zip(active, values, strict=True):
                each[row] = value
            upload(each, to)
        for row, (sure, worth) in zip(active, stops or [], strict=False):
            upload([sure], state.sure[row : row + 1])
            upload([worth + [torch.inf] * (state.worth.shape[1] - len(worth))], state.worth[row : row + 1])
        report = self._run(state, gamma, law).tolist()
        told = []
        for row in active:
            count, *rest = report[row]
            width = len(rest) // (1 + self._ends["watched"])
            told.append(RowDraft(rest[:count], rest[width : width + count]))
            runner.length[row] = length[row] + count - 1  # the last one has not been read
        for row in set(range(runner.rows)).difference(active):  # steps were written behind every row's text
            runner.rollback(row, length[row])
        return told

    @torch.no_grad()
    def make(self, warpers: LogitsProcessorList | None, most: int) -> None:
        """Captures drafts of up to so many tokens; to be asked before anything is fed, as :meth:`HostModel.make`."""
        law, how = DeviceLaw.of(warpers, do_sample=warpers is not None), self._host.how
        if law.processors or not how.captured or how.compiled:
            return
        state = self._bound(law)
        for bucket in BUCKETS:
            if 0 < bucket <= most:
                self._run(state, bucket, law)

    def _bound(self, law: DeviceLaw) -> State:
        """The state of the present cache, with a writer over it."""
        pair = self._host.pair
        if pair is not self._pair or law != self._law:
            self._pair, self._law, how = pair, law, self._host.how
            self._writer = DeviceWriter(
                self._runner,
                law,
                parameters=pair.set_parameters(0, law.values),
                eager=not (how.compiled or how.captured),
                told=True,
                **self._ends,
            )
        return pair.state

    def _run(self, state: State, gamma: int, law: DeviceLaw) -> Tensor:
        """``[B, N]`` int64: tokens drawn, the tokens, and where the lookahead asks their steps of confidence."""
        if not self._host.how.captured:
            return self._draft(state, gamma)
        graphs = self._host.pair.graphs
        key = ("draft", gamma, law.key, *self._ends.values(), self._host.runner.positions)
        if key not in graphs:
            with notice(f"capturing a draft of {gamma} tokens"):
                graphs[key], _ = capture(lambda: self._draft(state, gamma), state.ids.device)
        if graphs[key] is None:
            return self._draft(state, gamma)
        graph, report = graphs[key]
        graph.replay()
        return report

    def _draft(self, state: State, gamma: int) -> Tensor:
        assert self._writer is not None
        begun = Begun(state.limit, state.tail[:, :1], state.text, state.length)
        draft = self._writer.draft(state, gamma, begun, False)
        return torch.cat([draft.drafted.unsqueeze(1), draft.tokens, *([] if draft.sure is None else [draft.sure])], 1)
