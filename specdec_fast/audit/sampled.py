"""Sampled output against the target's law, by chi-square.

Two kinds of tests, corrected for their number together:

- the *first tokens* of each prompt, counted in the cells of :mod:`specdec_fast.audit.law`, and the same for all prompts
  together (statistics and degrees of freedom add up), and for those samples among them that were drawn in small
  batches, where passes run by other code than in large ones;
- every *pair of neighbouring positions*, over all prompts, as numbers that would be uniform and independent
  (:mod:`specdec_fast.audit.transform`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

import specdec_fast.audit.statistics as statistics
from specdec_fast import fast_generate
from specdec_fast.audit.common import EXACT, Generate, Progress, check, name_of, new_tokens, quiet
from specdec_fast.audit.law import Cells, Scorer, cells_of
from specdec_fast.audit.transform import BINS, Grid, add_samples, empty_grids
from specdec_fast.sources import beginning

__all__ = ["RESOLUTION", "SIGNIFICANCE", "SampledTest", "SamplingAudit", "audit_sampling"]

RESOLUTION = 0.03  # total variation; an audit that would have overlooked more is inconclusive
SIGNIFICANCE = 0.01
CELLS = 12  # the least mass of a cell is one over this
THIN = 25  # expected counts below this are put together: chi-square's tail holds its level no better than this
SMALL = 2  # rows of a small batch: its passes are short enough for the native one
FALLBACK_SAMPLES = 1 << 14  # where no number of samples reaches the resolution
MOST_FOR_ROUNDING = 4  # times the samples that would do without rounding
HEADROOM = 1.1  # in low precision: what the pairs have to allow for is known behind the samples only


@dataclass(frozen=True)
class SampledTest:
    """One chi-square test."""

    of: str
    """all prompts, prompt, small batches, or positions."""
    prompt: int | None
    """Which prompt; None: all of them together."""
    positions: tuple[int, int]
    """First and last new token that the test looks at, from 1."""
    samples: int
    cells: int
    """How many outcomes are told apart; where it is one a prompt there is nothing to test."""
    statistic: float
    degrees: int
    p_value: float
    corrected: float
    """p-value corrected for the number of tests (Holm)."""
    detectable: float
    """Smallest total variation over the cells that is found with 99 % power; over prompts, its root mean square."""
    spread: float
    """Total variation of the target's own law between one position at a time and the other shapes, over the cells."""


@dataclass(frozen=True)
class SamplingAudit:
    """Sampled output tested against the target's law."""

    verdict: str
    """pass, fault or inconclusive."""
    reason: str
    dtype: str
    tokens: int
    """How many new tokens were looked at."""
    samples: int
    """Of all prompts."""
    significance: float
    resolution: float
    detectable: float
    """The largest of the tests that look at all samples: what the verdict stands on."""
    spread: float
    """The largest of the tests."""
    impossible: int
    """Samples with a token to which the target's law gives no mass."""
    split: list[float]
    """How much of the law the cells of the first tokens tell apart at each position."""
    tests: list[SampledTest]

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return asdict(self)


class _Counted(NamedTuple):
    """A test before its p-value."""

    of: str
    prompt: int | None
    positions: tuple[int, int]
    samples: int
    cells: int
    statistic: float
    degrees: int
    allowance: float
    spread: float


def audit_sampling(
    model: PreTrainedModel,
    prompts: Sequence[Tensor],
    *,
    generate: Generate = fast_generate,
    sampling: dict[str, Any] | None = None,
    arguments: dict[str, Any] | None = None,
    tokens: int = 3,
    samples: int | None = None,
    batch: int = 64,
    small: int = 128,
    positions: int = 6,
    cells: int = CELLS,
    seed: int = 0,
    significance: float = SIGNIFICANCE,
    progress: Progress = quiet,
) -> SamplingAudit:
    """Tests the joint law of the first sampled tokens.

    Args:
        model: the target.
        prompts: ids ``[1, P]`` each, on the target's device; of an encoder-decoder model what it
            reads. Laws that are neither flat nor one-hot say most.
        generate: what is audited.
        sampling: what chooses the law: ``temperature``, ``top_k``, ``top_p`` and so on, as for ``model.generate``.
        arguments: more arguments of ``generate``, such as ``assistant_model``.
        tokens: how many first tokens, at least 2.
        samples: of each prompt. None: as many as :data:`RESOLUTION` needs.
        batch: rows of one call.
        small: how many samples of each prompt are drawn two rows a call, of which a test is made; an eighth of all at
            most, 0: none.
        positions: γ+1, how many positions a round scores.
        cells: most cells of a prompt, about.
        seed: of torch's global generator, set anew before each call and put back at the end.
        significance: chance of a false alarm.
        progress: told of every call.

    Raises:
        ValueError: a number is out of range, or ``generate`` returned no continuation of a prompt.
        ImportError: scipy is missing.
    """
    check(prompts, samples=samples, batch=batch, positions=positions)
    if tokens < 2:
        raise ValueError(f"tokens={tokens} is out of range: use 2 or more, a joint law needs two tokens")
    if cells < 2:
        raise ValueError(f"cells={cells} is out of range: use 2 or more")
    if small < 0:
        raise ValueError(f"small={small} is out of range: use 0 or more, 0 for none")
    if seed < 0:
        raise ValueError(f"seed={seed} is out of range: use 0 or more")
    if not 0 < significance < 1:
        raise ValueError(f"significance={significance} is out of range: use a number between 0 and 1")
    statistics.need_scipy()
    chosen = {**(sampling or {}), "do_sample": True}
    partitions, scorers = [], []
    for number, prompt in enumerate(prompts):
        progress("target's law", number, len(prompts))
        scorers.append(Scorer(model, prompt, chosen, tokens=tokens, positions=positions))
        partitions.append(cells_of(scorers[-1], tokens, 1.0 / cells))
    progress("target's law", len(prompts), len(prompts))
    exact = model.dtype in EXACT
    level = significance / (len(prompts) + 2 + len(empty_grids(tokens)))  # Bonferroni
    if samples is None:
        samples = _enough(partitions, level, batch, 1.0 if exact else HEADROOM)
    few = min(small, samples // 8) if batch > SMALL else 0
    drawn = []
    whole = len(prompts) * samples
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        for number, (prompt, scorer) in enumerate(zip(prompts, scorers, strict=True)):
            rows: list[list[int]] = []
            while len(rows) < samples:
                done = number * samples + len(rows)
                progress("samples", done, whole)
                # Hashed: torch's generator on the CPU looks at the lower 32 bits alone
                torch.manual_seed(int(np.random.SeedSequence((seed, done)).generate_state(1)[0]))
                count = min(SMALL, few - len(rows)) if len(rows) < few else min(batch, samples - len(rows))
                ids = prompt.expand(count, -1)
                given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": tokens, **chosen}
                output = generate(model, ids, **given, **(arguments or {}))
                rows.extend(
                    _whole(row, tokens, scorer.ends) for row in new_tokens(output, beginning(model, ids)).tolist()
                )
            drawn.append(rows)
    progress("samples", whole, whole)
    random = np.random.default_rng(seed)
    counted, impossible = _first_tokens(drawn, partitions, tokens)
    if few:
        together = _first_tokens([rows[:few] for rows in drawn], partitions, tokens)[0][0]
        counted.append(together._replace(of="small batches"))
    grids = empty_grids(tokens)
    for number, (rows, scorer) in enumerate(zip(drawn, scorers, strict=True)):
        progress("laws behind the samples", number, len(prompts))
        add_samples(grids, scorer, rows, random, exact=exact)
    progress("laws behind the samples", len(prompts), len(prompts))
    counted += _pairs(grids)
    p_values = [statistics.p_value(test.statistic, test.degrees, test.allowance) for test in counted]
    tests = [
        SampledTest(
            of=test.of,
            prompt=test.prompt,
            positions=test.positions,
            samples=test.samples,
            cells=test.cells,
            statistic=test.statistic,
            degrees=test.degrees,
            p_value=p_value,
            corrected=corrected,
            detectable=statistics.detectable(test.samples, test.degrees, level, test.allowance),
            spread=test.spread,
        )
        for test, p_value, corrected in zip(counted, p_values, statistics.holm(p_values), strict=True)
    ]
    detectable = max(test.detectable for test in tests if test.of in ("all prompts", "positions"))
    spread = max(test.spread for test in tests)
    verdict, reason = _judged(tests, detectable, spread, impossible, exact, significance)
    return SamplingAudit(
        verdict=verdict,
        reason=reason,
        dtype=name_of(model.dtype),
        tokens=tokens,
        samples=whole,
        significance=significance,
        resolution=RESOLUTION,
        detectable=detectable,
        spread=spread,
        impossible=impossible,
        split=[float(part) for part in np.mean([partition.split for partition in partitions], axis=0)],
        tests=tests,
    )


def _enough(partitions: list[Cells], level: float, batch: int, headroom: float) -> int:
    """Samples a prompt, in whole batches."""
    degrees = max(sum(partition.count - 1 for partition in partitions), BINS**2 - 1)
    spread = float(np.mean([partition.noncentrality for partition in partitions]))
    whole = statistics.samples_for(RESOLUTION, degrees, level, spread)
    without = statistics.samples_for(RESOLUTION, degrees, level) or FALLBACK_SAMPLES
    if whole is None or whole > MOST_FOR_ROUNDING * without:
        whole = without  # rounding puts it out of reach; as many as without it find a fault that is not small
    return math.ceil(headroom * whole / len(partitions) / batch) * batch


def _whole(row: list[int], tokens: int, ends: frozenset[int]) -> list[int]:
    """A sample, checked to be as long as it has to be."""
    if len(row) < tokens and not ends.intersection(row):
        raise ValueError(f"generate returned {len(row)} new tokens where {tokens} were asked for and no row had ended")
    return row[:tokens]


def _first_tokens(drawn: list[list[list[int]]], partitions: list[Cells], tokens: int) -> tuple[list[_Counted], int]:
    """The test of all prompts, then each one's; and how many samples cannot be."""
    single, impossible = [], 0
    for number, (rows, cells) in enumerate(zip(drawn, partitions, strict=True)):
        partition = cells.merged(THIN / len(rows))
        counts = np.zeros(partition.count)
        for row in rows:
            place, possible = partition.place(row)
            counts[place] += 1
            impossible += not possible
        single.append(
            _Counted(
                of="prompt",
                prompt=number,
                positions=(1, tokens),
                samples=len(rows),
                cells=partition.count,
                statistic=statistics.chi_square(counts, partition.centre),
                degrees=partition.count - 1,
                allowance=partition.noncentrality * len(rows),
                spread=partition.spread,
            )
        )
    together = _Counted(
        of="all prompts",
        prompt=None,
        positions=(1, tokens),
        samples=sum(test.samples for test in single),
        cells=sum(test.cells for test in single),
        statistic=sum(test.statistic for test in single),
        degrees=sum(test.degrees for test in single),
        allowance=sum(test.allowance for test in single),
        spread=max(test.spread for test in single),
    )
    return [together, *single], impossible


def _pairs(grids: list[Grid]) -> list[_Counted]:
    even = np.full(BINS**2, 1 / BINS**2)
    return [
        _Counted(
            of="positions",
            prompt=None,
            positions=(place + 1, place + 2),
            samples=int(grid.counts.sum()),
            cells=BINS**2,
            statistic=statistics.chi_square(grid.counts.reshape(-1), even),
            degrees=BINS**2 - 1,
            allowance=grid.noncentrality * float(grid.counts.sum()),
            spread=grid.spread,
        )
        for place, grid in enumerate(grids)
    ]


def _judged(
    tests: list[SampledTest], detectable: float, spread: float, impossible: int, exact: bool, significance: float
) -> tuple[str, str]:
    worst = min(tests, key=lambda test: test.p_value)
    if worst.corrected < significance:
        where = {
            "prompt": f"at prompt {(worst.prompt or 0) + 1}",
            "positions": f"at tokens {worst.positions[0]} and {worst.positions[1]}",
            "small batches": "in small batches",
        }.get(worst.of, "over all prompts")
        return "fault", (
            f"the samples do not have the target's law: chi-square {worst.statistic:.0f} on {worst.degrees} degrees of "
            f"freedom {where}, corrected p-value {worst.corrected:.2g}"
        )
    if impossible and exact:  # in low precision a filter's edge may lie elsewhere in a pass of yet another shape
        return "fault", f"{impossible} samples hold a token to which the target's law gives no mass"
    if not tests[0].degrees:
        return "inconclusive", (
            "nothing to tell apart at these prompts, one outcome being nearly certain or all of them rare: use others, "
            "or another temperature"
        )
    if detectable > RESOLUTION:
        way = "take more samples" if spread < RESOLUTION / 10 else "take more samples, or the target in float32"
        return "inconclusive", (
            f"a total variation up to {detectable:.3f} could have gone unnoticed, more than {RESOLUTION}: {way}"
        )
    return "pass", f"no difference found; a total variation of {detectable:.3f} would have been, with 99 % power"
