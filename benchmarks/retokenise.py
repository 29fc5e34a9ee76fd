"""What the host does between two rounds on the device for a drafter with a tokenizer of its own: a block's text, anew.

    python benchmarks/retokenise.py TARGET DRAFTER TEXT

A text is committed in blocks of a few target tokens. For each, the time of bringing the drafter's ids up to date, and
whether ids in front of the block have changed by it (a merge across its beginning).
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Annotated

import typer
from transformers import AutoTokenizer

from specdec_fast.options import LOOKBEHIND
from specdec_fast.text import Reader
from specdec_fast.vocab import Vocabulary


def main(
    target: Annotated[Path, typer.Argument(help="Folder of the target's tokenizer.")],
    drafter: Annotated[Path, typer.Argument(help="Folder of the drafter's.")],
    text: Annotated[Path, typer.Argument(help="A file of text.")],
    block: Annotated[int, typer.Option(help="Target tokens a round commits.")] = 3,
    most: Annotated[int, typer.Option(help="Blocks at most.")] = 1000,
) -> None:
    """Prints microseconds a block, and the share of blocks that change earlier ids."""
    theirs, own = (AutoTokenizer.from_pretrained(folder) for folder in (target, drafter))
    reader = Reader(Vocabulary.of(theirs), own, Vocabulary.of(own), lookbehind=LOOKBEHIND)
    ids = theirs(text.read_text(), add_special_tokens=False)["input_ids"]
    seconds, changed = [], 0
    for first in range(0, min(len(ids), block * most), block):
        before, begin = len(reader.ids), time.perf_counter()
        kept = reader.append(ids[first : first + block])
        seconds.append(time.perf_counter() - begin)
        changed += kept < before
    middle, high = (statistics.quantiles(seconds, n=10)[i] * 1e6 for i in (4, 8))
    print(f"{len(seconds)} blocks: median {middle:.0f} us, 90 % below {high:.0f} us", end="; ")
    print(f"{changed / len(seconds):.0%} change ids in front of them")


if __name__ == "__main__":
    typer.run(main)
