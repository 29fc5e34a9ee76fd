"""What a call did: the numbers behind its speed."""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Speculation", "last_speculation", "remember"]


@dataclass
class Speculation:
    """Statistics of one generation, summed over its rows.

    A *round* is one pass of draft, score, verify, commit over all rows that are not done.
    """

    method: str
    """The method that ran, as the argument names it."""
    verification: str
    """The rule that ran: match, gumbel, token or block."""
    reason: str
    """Why these two."""
    forward: str = "eager"
    """How short passes of the target ran: native (one operation a pass), eager (the model's own forward), static (the
    same at fixed shapes over a static cache) or inductor (those compiled)."""
    attention: str = ""
    """Which attention took the place of the target's own in passes over a static cache, and how its layers ran there
    where that was a choice."""
    loop: str = "host"
    """Where rounds lived: on the host, which waits for the device in between, or on the device."""
    loop_reason: str = ""
    """Why not as ``compile`` asked for, or why rounds were not captured as graphs."""
    static_bytes: int = 0
    """Memory of static caches and rows of this call, kept for the next one of that shape."""
    rounds: int = 0
    row_rounds: int = 0
    """Rounds summed over the rows that took part in each."""
    committed: int = 0
    """Tokens added to the rows, padding not counted."""
    drafted: int = 0
    """Draft tokens; of a tree, levels that the target came by."""
    accepted: int = 0
    nodes: int = 0
    """Draft tokens of trees."""
    drafted_per_position: list[int] = field(default_factory=list)
    accepted_per_position: list[int] = field(default_factory=list)
    """How many draft tokens of each position were accepted (entry 0: the first of a draft)."""
    draft_seconds: float = 0.0
    """Writing proposals, ``translate_seconds`` included."""
    verify_seconds: float = 0.0
    """The target's forward passes and the verification."""
    translate_seconds: float = 0.0
    """Turning one tokenizer's ids into the other's."""
    total_seconds: float = 0.0

    @property
    def acceptance_rate(self) -> float:
        """Accepted over drafted tokens; 0 where nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def block_efficiency(self) -> float:
        """Committed tokens per round and row, the bonus token included; 0 before the first round."""
        return self.committed / self.row_rounds if self.row_rounds else 0.0

    def count(self, drafted: int, accepted: int, committed: int) -> None:
        """Takes note of one row's round."""
        self.row_rounds += 1
        self.drafted += drafted
        self.accepted += accepted
        self.committed += committed
        missing = drafted - len(self.drafted_per_position)
        if missing > 0:
            self.drafted_per_position.extend([0] * missing)
            self.accepted_per_position.extend([0] * missing)
        for i in range(drafted):
            self.drafted_per_position[i] += 1
            self.accepted_per_position[i] += i < accepted

    def to_dict(self) -> dict[str, Any]:
        """Everything, the two rates included, ready for JSON."""
        return {**asdict(self), "acceptance_rate": self.acceptance_rate, "block_efficiency": self.block_efficiency}


_last = threading.local()


def remember(speculation: Speculation) -> None:
    """Keeps the statistics of this thread's newest call."""
    _last.speculation = speculation


def last_speculation() -> Speculation | None:
    """Statistics of the newest generation that this thread finished; None before the first.

    The way to them where ``fast_generate`` returns a plain tensor.
    """
    return getattr(_last, "speculation", None)
