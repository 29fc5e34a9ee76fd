"""What a block's text costs in another tokenizer's ids, where target and drafter have one each.

    python benchmarks/retokenise.py TARGET DRAFTER TEXT

A text is committed in blocks of a few target tokens: `read` brings the drafter's ids up to date, `propose` gives the
target's ids of what the drafter wrote next (SLEM). Native code and Python over the tokenizers library take turns, block
by block, warm and cold (caches swept before each). Also: whether ids in front of a block have changed by it (a merge
across its beginning).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from transformers import AutoTokenizer

from specdec_fast.options import LOOKBEHIND
from specdec_fast.text import Reader, TextProposer
from specdec_fast.vocab import Vocabulary, _read


def main(
    target: Annotated[Path, typer.Argument(help="Folder of the target's tokenizer.")],
    drafter: Annotated[Path, typer.Argument(help="Folder of the drafter's.")],
    text: Annotated[Path, typer.Argument(help="A file of text.")],
    block: Annotated[int, typer.Option(help="Target tokens a round commits.")] = 3,
    most: Annotated[int, typer.Option(help="Blocks at most.")] = 300,
    sweep: Annotated[int, typer.Option(help="Megabytes written between two blocks when cold.")] = 270,
) -> None:
    """Prints microseconds a block, and the share of blocks that change earlier ids."""
    theirs, own = (AutoTokenizer.from_pretrained(folder) for folder in (target, drafter))
    written = text.read_text()[: 40 * block * most]
    ids: list[int] = theirs(written, add_special_tokens=False)["input_ids"][: block * most]
    waste = np.zeros(sweep * 2**20 // 8)
    for cold in (False, True):
        rows = {kind: _Row(theirs, own, kind == "native") for kind in ("native", "Python")}
        seconds: dict[tuple[str, str], list[float]] = {}
        changed = 0
        for first in range(0, len(ids) - 2 * block, block):
            for kind, row in rows.items():
                before = len(row.reader.ids)
                new, next_ids = ids[first : first + block], ids[first + block : first + 2 * block]
                took = row.round(ids[: first + block], new, next_ids, waste if cold else None)
                seconds.setdefault((kind, "read"), []).append(took[0])
                seconds.setdefault((kind, "propose"), []).append(took[1])
                changed += kind == "native" and row.kept < before
        assert rows["native"].reader.ids == rows["Python"].reader.ids
        for (kind, part), times in seconds.items():
            middle, high = (statistics.quantiles(times, n=10)[i] * 1e6 for i in (4, 8))
            heat = "cold" if cold else "warm"
            print(f"{heat} {kind:6} {part:7}: {len(times)} blocks, median {middle:.0f} us, 90 % below {high:.0f} us")
    print(f"{changed / len(times):.0%} of blocks change ids in front of them")


class _Row:
    """A row's text both ways, by native code or by Python over the tokenizers library."""

    def __init__(self, theirs: Any, own: Any, native: bool):
        self.target, self.drafter = (_vocabulary(tokenizer, native) for tokenizer in (theirs, own))
        self.reader = Reader(self.target, own, self.drafter, lookbehind=LOOKBEHIND, native=native)
        self.proposer = TextProposer(theirs, self.target, self.drafter, lookbehind=LOOKBEHIND, native=native)
        self.kept = 0

    def round(
        self, committed: list[int], new: list[int], ahead: list[int], waste: np.ndarray | None
    ) -> tuple[float, float]:
        """Seconds of reading a block, and of proposing what follows where the drafter writes it in its own ids."""
        drafted, _ = self.drafter.encode_inside(self.target.bytes_of(ahead).decode("utf-8", "ignore"))
        if waste is not None:
            waste += 1
        read = _clock(lambda: setattr(self, "kept", self.reader.append(new)))
        if waste is not None:
            waste += 1
        return read, _clock(lambda: self.proposer.propose(committed, self.reader.ids, drafted))


def _vocabulary(tokenizer: Any, native: bool) -> Vocabulary:
    if not native:
        vocabulary = _read(tokenizer)
        vocabulary.__dict__["native"] = None
        return vocabulary
    vocabulary = Vocabulary.of(tokenizer)
    if vocabulary.native is None:
        raise typer.BadParameter(f"native code does not know the tokenizer of {tokenizer.name_or_path}")
    return vocabulary


def _clock(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


if __name__ == "__main__":
    typer.run(main)
