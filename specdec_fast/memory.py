"""What a target said where a drafter drew, kept to mend the drafter's scores at the places to come.

A target that has judged a draft has told its whole law at every place that stays, of which speculative decoding uses
one token. What it thought better than the drafter there it mostly thinks at like places of the same text as well: the
next one, and those where the drafter's hidden state points the same way. So a drafter's logits ``d`` at a place become

    d + sum_s w_s (t_s - d_s) / (DOUBT + sum_s w_s),
    w_s = exp(SHARPNESS (cos(h, h_s) - 1)) + RECENT exp(-(n - n_s - 1) / FADING),

over the ``MOST`` heaviest of the last ``SLOTS`` places s of the row, t_s and d_s being the target's and the drafter's
logits there, h the drafter's final hidden states and n the places' positions. Nothing is trained. The draft is drawn
from, and judged by, the law that comes of this; it is settled before the token is drawn, so the output's law is the
target's under every rule (``docs/memory.md``).

The native operations do this where they write drafts (``csrc/memory.h``); :func:`mended` is what they are held to.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["DOUBT", "FADING", "MOST", "RECENT", "SHARPNESS", "SLOTS", "Memory", "footprint", "mended", "number_of"]

# csrc/memory.cpp has the same
SLOTS, MOST = 64, 8
SHARPNESS, RECENT, FADING, DOUBT = 12.0, 0.035, 2.0, 0.125


def footprint(entries: int) -> int:
    """Bytes of what a row keeps at most, but for its hidden states, which are small beside ``entries``."""
    return SLOTS * 2 * entries


class Memory:
    """The memory of a drafter's rows, kept natively for as long as this object lives.

    A row takes :func:`footprint` bytes, and ``4 K`` more for each token of its longest draft, with ``K`` entries.

    Args:
        rows: of the batch.
        hidden, entries: of a drafter's hidden state, and of its logits.
        index: ``[K]`` the target's id of each of these; None: its place.
    """

    def __init__(self, rows: int, hidden: int, entries: int, index: Tensor | None):
        narrow = None if index is None else index.cpu().int().contiguous()
        self.number: int = torch.ops.specdec_fast.llama_memory(rows, hidden, entries, narrow)
        weakref.finalize(self, torch.ops.specdec_fast.llama_memory_forget, self.number)

    def hear(self, rows: Sequence[int], position: Sequence[int], accepted: Sequence[int], logits: Tensor) -> None:
        """Tells it what the target said of drafts, where no native operation has.

        Args:
            rows: ``[R]`` that were drafted for.
            position: ``[R]`` of each draft's first token.
            accepted: ``[R]`` how many of its tokens stay.
            logits: ``[R, >= G+1, V]`` of the target, before any processing.
        """
        places = [(r, i) for r, n in enumerate(accepted) for i in range(n + 1)]
        said = logits[[r for r, _ in places], [i for _, i in places]].float().cpu().contiguous()
        names = [rows[r] for r, _ in places], [i - 1 for _, i in places], [position[r] + i for r, i in places]
        torch.ops.specdec_fast.llama_memory_hear(self.number, *names, said)


def number_of(memory: Memory | None) -> int:
    """By which the native operations know it; 0: there is none."""
    return 0 if memory is None else memory.number


def mended(
    logits: Tensor, hidden: Tensor, position: int, apart: Tensor, hiddens: Tensor, positions: Sequence[int]
) -> Tensor:
    """A drafter's logits at one place, mended by ``S`` places before it: the reference.

    Args:
        logits: ``[K]``, the drafter's.
        hidden: ``[H]``, its final hidden state.
        position: of the place.
        apart: ``[S, K]`` the target's logits less the drafter's, the oldest place first.
        hiddens, positions: ``[S, H]`` and ``[S]`` of those places.

    Returns:
        ``[K]`` float32.
    """
    apart, hiddens, positions = apart[-SLOTS:].float(), hiddens[-SLOTS:].float(), positions[-SLOTS:]
    if not len(positions):
        return logits.float()
    cosine = torch.nn.functional.cosine_similarity(hidden.float().unsqueeze(0), hiddens)
    between = (position - torch.tensor(positions) - 1).clamp(min=0)
    weight = (SHARPNESS * (cosine - 1)).exp() + RECENT * (-between / FADING).exp()
    weight, heaviest = weight.topk(min(MOST, len(positions)))
    return logits.float() + weight @ apart[heaviest] / (DOUBT + weight.sum())
