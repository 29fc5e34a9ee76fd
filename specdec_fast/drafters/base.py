"""What the engine asks of a drafter, and a drafter of who runs its model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

from specdec_fast.encoding import Encoded
from specdec_fast.proposal import Proposal
from specdec_fast.runner import Head, Runner
from specdec_fast.state import Rows
from specdec_fast.verification import Draws

__all__ = ["Drafter", "Drafting", "Passes", "RowDraft"]


class Drafter(Protocol):
    """Proposes draft tokens in target ids and says by what law it drew them.

    A drafter reads ``rows.tokens`` and keeps what state it likes; whatever it proposes, the output is the target's.
    """

    @property
    def translate_seconds(self) -> float:
        """Time spent so far on turning text from one tokenizer's ids into the other's."""

    def propose(self, rows: Rows, active: list[int], limit: list[int], draws: Draws) -> Proposal:
        """Drafts for the active rows.

        Args:
            rows: every row's committed text.
            active: the ``R`` rows to draft for.
            limit: how many tokens each of them may draft at most, 0 included.
            draws: this round's numbers, ``R`` rows.

        Returns:
            ``R`` rows on the target's device.
        """


class RowDraft(NamedTuple):
    """One row's draft as the host reads it: what was drawn (-1: from scores that are no law), and where the lookahead
    asks for it the level of confidence of each."""

    drawn: list[int]
    levels: list[int]


class Drafting(Protocol):
    """Writes whole drafts of a model on its own vocabulary, without the law that they were drawn from."""

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
        """Drafts behind texts; all but a draft's last token count as read.

        Args:
            texts: of all rows, in the model's ids; each is read from its ``first`` on.
            active: the ``R`` rows that draft, none of whose texts is empty.
            steps: how many tokens each drafts at most, 1 or more.
            keys: seed and position of Philox's numbers, ``R`` each.
            warpers: the model's sampling; None: its argmax.
            stops: where each draft ends, of a lookahead that watches.

        Returns:
            one a row; None where this has to be done otherwise, and nothing was done.
        """


class Passes(Protocol):
    """Runs models at fixed shapes (:class:`specdec_fast.host_passes.HostPasses`)."""

    def runner(
        self,
        model: PreTrainedModel,
        rows: int,
        *,
        head: Head | None,
        ids: Tensor | None,
        window: int | None,
        encoded: Encoded | None,
    ) -> Runner | None:
        """A runner for so many rows; None where the model cannot run so.

        Args:
            head, window: as for :class:`~specdec_fast.runner.Runner`.
            ids: ``[K]`` int64, what the head's logits are of.
            encoded: what the model reads beside the text; None: nothing.
        """

    def drafting(
        self, runner: Runner, warpers: LogitsProcessorList | None, confidence: float, watched: bool
    ) -> Drafting | None:
        """Whole drafts on a runner that was made here; None where they cannot be.

        Args:
            warpers: the model's sampling, as far as it is known by now.
            confidence: a draft ends behind a token whose probability is below this.
            watched: drafts end where a lookahead says so.
        """
