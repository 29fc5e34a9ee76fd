"""Models for the loop on the host whose short passes have fixed shapes, on a GPU each captured as a CUDA graph.

The target of a call whose rounds need the host runs so, and so does its drafter
(:class:`specdec_fast.host_passes.HostPasses`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec_fast import static_cache
from specdec_fast.compiled import Captured, Compilation, Pair, check_out, forget, hand_back, handing_back
from specdec_fast.device_round import bucket_of
from specdec_fast.encoding import Encoded
from specdec_fast.prompt_passes import capture_all, read_prompts
from specdec_fast.runner import Head
from specdec_fast.static_cache import capacity_for, rows_for
from specdec_fast.static_recurrent import LONGEST, StaticRecurrentRunner
from specdec_fast.static_runner import Forward
from specdec_fast.static_runners import host_runner_for

__all__ = ["HostModel", "lanes_for"]

MOST = 24  # lanes of a pass of fixed shape


class HostModel:
    """A model over a static cache that is taken out for a call.

    Args:
        model: that :func:`why_not_static` has nothing against.
        how: passes run.
        batch: rows of the call.
        columns: the longest text the cache may have to hold, of which the first ``prompt`` come at once.
        visible, prefill_chunk, head, window: as for :class:`StaticRunner`.
        ids: ``[K]`` int64, what the head's logits are of, where it is not the model's own.
        ready: passes of up to so many lanes are captured at once (:meth:`make`), 0: at their first use.
        encoded: what the model reads beside the text; None: nothing.

    Attributes:
        runner: feeds it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        how: Compilation,
        batch: int,
        columns: int,
        prompt: int,
        *,
        visible: Tensor | None = None,
        prefill_chunk: int | None = None,
        head: Head | None = None,
        ids: Tensor | None = None,
        window: int | None = None,
        ready: int = 0,
        encoded: Encoded | None = None,
    ):
        self.how = how
        self._model, self._batch, self._columns = model, batch, columns
        self._own: dict[str, Any] = {
            "encoded": (encoded, None),
            "head": head,
            "choices": {} if head is None or ids is None else {"choices": ids},
        }
        self.pair = self._check_out(min(columns, prompt + static_cache.ALLOWANCE))
        with handing_back(self.pair):
            self.runner = host_runner_for(
                model,
                self.pair.target,
                batch,
                visible=visible,
                prefill_chunk=prefill_chunk,
                head=head,
                window=window,
                forward=self._forward(),
                room=self._room,
                encoded=encoded,
            )
            if how.captured and prefill_chunk is None and not isinstance(self.runner, StaticRecurrentRunner):
                self.runner.reader = read_prompts
            if ready:
                self.make(ready)

    @property
    def bytes(self) -> int:
        """Memory of the cache and rows."""
        return self.pair.bytes

    def close(self, *, kept: bool = True) -> None:
        """Gives the cache back, for another call or for good."""
        hand_back(self.pair)
        if not kept:
            forget(self._model, self.pair)

    @torch.no_grad()
    def make(self, most: int) -> None:
        """Captures passes of a prompt, and of every number of lanes up to ``most``: no call has to wait for them.

        To be asked before anything is fed. Not where passes are compiled besides, which takes minutes for all of them.
        """
        if not self.how.captured or self.how.compiled:
            return
        cache = self.pair.target
        nobodys = torch.full((cache.rows,), cache.capacity - 1, device=cache.device)
        sizes = {lanes_for(n) for n in range(1, most + 1)}
        if isinstance(self.runner, StaticRecurrentRunner):  # as many lanes as tokens, those that are read again too
            sizes = set(range(1, min(most + 2 * self.runner.again, LONGEST) + 1))
        else:
            capture_all(self.runner)
        for lanes in sorted(sizes):
            self.runner.score(nobodys.new_zeros((cache.rows, lanes)), nobodys)

    def reserve(self, columns: int) -> None:
        """Moves to a larger cache where texts of so many columns would not fit."""
        if columns < self.pair.target.capacity:
            return
        old = self.pair
        self.pair = self._check_out(max(min(columns + static_cache.ALLOWANCE, self._columns), columns))
        try:
            self.pair.target.take(old.target)
            self.runner.move(self.pair.target, self._forward())
        finally:
            hand_back(old)

    def _check_out(self, columns: int) -> Pair:
        capacity = capacity_for(columns)
        return check_out(self._model, None, rows_for(self._batch), (capacity, capacity), self.how, **self._own)

    def _forward(self) -> Forward:
        forward = self.pair.forwards[0]
        return Captured(forward, self.pair.graphs) if self.how.captured else forward

    def _room(self, columns: int, lanes: int) -> int:
        self.reserve(columns)
        return lanes_for(lanes)


def lanes_for(lanes: int) -> int:
    """Lanes of a pass of fixed shape that holds so many; 0: it is long, rare and bound by arithmetic."""
    return bucket_of(lanes - 1) + 1 if lanes <= MOST else 0
