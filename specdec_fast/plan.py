"""What speculation can bring a pair: expected speed beside plain decoding, from costs and acceptance.

The arithmetic of ``docs/lookahead.md``: a round that drafts γ tokens commits ``T(γ) = 1 + a_1 + a_1 a_2 + ...`` of them
and costs ``C(γ)``; plain decoding commits one for ``C(0)``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from specdec_fast.costs import Costs
from specdec_fast.lookahead import best_lookahead
from specdec_fast.prepared import Prepared
from specdec_fast.stats import last_speculation

__all__ = ["Acceptance", "Forecast", "forecast", "measure_acceptance", "speedup"]

ACCEPTANCES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
LONGEST = 15  # lookahead


@dataclass(frozen=True)
class Acceptance:
    """Acceptance of each position of a draft, given that the positions before it were accepted.

    Args:
        positions: a_1, a_2, ...
        tested: draft tokens behind each; empty where it was assumed.
    """

    positions: tuple[float, ...]
    tested: tuple[int, ...] = ()

    @classmethod
    def even(cls, share: float) -> Acceptance:
        """The same at every position."""
        return cls((share,) * LONGEST)


@dataclass(frozen=True)
class Forecast:
    """What a pair can reach.

    Args:
        costs: of a round's parts.
        gammas: lookaheads of the table, ascending.
        table: by acceptance (the same at every position), the speed at each of ``gammas``, plain decoding being 1.
        best_of: by acceptance, the best lookahead and its speed.
        acceptance: measured or assumed, None: neither.
        speeds: at that acceptance, the speed at lookaheads 0, 1, 2, ...
        best: at that acceptance, the best lookahead and its speed: no constant lookahead does better.
    """

    costs: Costs
    gammas: tuple[int, ...]
    table: dict[float, tuple[float, ...]]
    best_of: dict[float, tuple[int, float]]
    acceptance: Acceptance | None = None
    speeds: tuple[float, ...] = ()
    best: tuple[int, float] | None = None
    about: dict[str, Any] = field(default_factory=dict)
    """Names and settings, for whoever prints it."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON; times in seconds."""
        return {
            **self.about,
            "costs": asdict(self.costs),
            "gammas": list(self.gammas),
            "speedup": [{"acceptance": a, "by_gamma": list(row)} for a, row in self.table.items()],
            "best": [{"acceptance": a, "gamma": g, "speedup": s} for a, (g, s) in self.best_of.items()],
            "acceptance": None if self.acceptance is None else asdict(self.acceptance),
            "speedup_at_acceptance": list(self.speeds),
            "best_at_acceptance": None if self.best is None else {"gamma": self.best[0], "speedup": self.best[1]},
        }


def speedup(acceptance: Sequence[float], costs: Costs, gamma: int) -> float:
    """Tokens a second at a lookahead, plain decoding being 1."""
    tokens, reach = 1.0, 1.0
    for accepted in acceptance[:gamma]:
        reach *= accepted
        tokens += reach
    return tokens * costs.round(0) / costs.round(gamma)


def forecast(
    costs: Costs,
    acceptance: Acceptance | None = None,
    *,
    gammas: Iterable[int] = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15),
    acceptances: Iterable[float] = ACCEPTANCES,
) -> Forecast:
    """The model of a pair, at these costs and this acceptance."""
    chosen = tuple(gammas)
    shares = tuple(acceptances)
    best_of = {share: _best(Acceptance.even(share), costs) for share in shares}
    table = {share: tuple(speedup((share,) * gamma, costs, gamma) for gamma in chosen) for share in shares}
    if acceptance is None:
        return Forecast(costs, chosen, table, best_of)
    speeds = tuple(speedup(acceptance.positions, costs, gamma) for gamma in range(len(acceptance.positions) + 1))
    return Forecast(costs, chosen, table, best_of, acceptance, speeds, _best(acceptance, costs))


def _best(acceptance: Acceptance, costs: Costs) -> tuple[int, float]:
    gamma, _ = best_lookahead(acceptance.positions, costs)
    return gamma, speedup(acceptance.positions, costs, gamma)


def measure_acceptance(pair: Prepared, prompts: Iterable[dict[str, Tensor]], **call: Any) -> Acceptance:
    """The acceptance of a pair on prompts, by constant drafts of :data:`LONGEST` tokens.

    Args:
        pair: made ready.
        prompts: what a call takes, ``input_ids`` and ``attention_mask``.
        **call: ``max_new_tokens``, sampling.

    Returns:
        as many positions as were reached.

    Raises:
        ValueError: nothing was drafted.
    """
    drafted, accepted = [0] * LONGEST, [0] * LONGEST
    for inputs in prompts:
        pair.generate(**inputs, num_assistant_tokens=LONGEST, num_assistant_tokens_schedule="constant", **call)
        speculation = last_speculation()
        assert speculation is not None
        for i, (d, a) in enumerate(
            zip(speculation.drafted_per_position, speculation.accepted_per_position, strict=True)
        ):
            drafted[i] += d
            accepted[i] += a
    positions, tested = [], []
    for i in range(LONGEST):
        # Drafts that ended before this position say nothing of it, so the two shares are of different drafts
        reached = min(drafted[i], accepted[i - 1]) if i else drafted[0]
        if not reached:
            break
        positions.append(accepted[i] / reached)
        tested.append(reached)
    if not positions:
        raise ValueError("nothing was drafted on these prompts: give others, or an acceptance")
    return Acceptance(tuple(min(share, 1.0) for share in positions), tuple(tested))
