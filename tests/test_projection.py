"""Projection: one round is enumerated exactly through ``fast_generate``, and planted faults are seen.

The drafter's own draws are enumerated as well: the law it reports at each position is the conditional law of the token
there, given what was revealed before it.
"""

import itertools

import pytest
import tables
import torch
from enumeration import laws_of
from rounds import Setting, distance, prompts
from tables import Pair, TableModel

from specdec_fast.drafters import projection
from specdec_fast.drafters.model import SameText
from specdec_fast.drafters.projection import Draft, ProjectionDrafter, ProjectionWriter
from specdec_fast.proposal import ProjectedLaw, Proposal
from specdec_fast.randomness import Purpose
from specdec_fast.reference import masses
from specdec_fast.state import Rows
from specdec_fast.token_map import TokenMap
from specdec_fast.verification import Draws

EXACT = 1e-8
RULES = ("token", "block")  # those that look at the law
PAIRS = {
    "no token in common": Pair(("a", "b", "ab"), ("<s>", "aab", "abb", "ba", "bb"), opening=True),
    "long tokens": Pair(("a", "b", "c"), ("a", "b", "c", "aab", "aac", "ab")),
    "some of both": Pair(("a", "b", "ab"), ("a", "b", "aab", "abb", "ba", "bba")),
    "one text, several ids": Pair(("a", "b"), ("a", "<0x61>", "b", "ab", "<0x62>")),
    "target cannot say c": Pair(("a", "b", "ab"), ("a", "b", "c", "bc", "abc", "ba")),
}


@pytest.fixture(autouse=True)
def _pairs(monkeypatch):
    for name, pair in PAIRS.items():
        monkeypatch.setitem(tables.PAIRS, name, pair)


DENSE = "dense", "dense"
ADAPTIVE = {"num_assistant_tokens_schedule": "adaptive"}


def round_distance(rule, pair, gamma, *, sampling="plain", count=3, kinds=DENSE, **more):
    setting = Setting("projection", rule, sampling, pair, gamma, kinds=kinds, **more)
    cases = [(prompt,) for prompt in prompts(setting, count)]
    laws = laws_of(setting.one_round, cases)
    return max(distance(setting, law, case, gamma + 1) for law, case in zip(laws, cases, strict=True))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("gamma", [1, 2])
@pytest.mark.parametrize("pair", PAIRS)
def test_a_round_has_the_targets_law(pair, gamma, rule):
    assert round_distance(rule, pair, gamma) < EXACT


@pytest.mark.parametrize("pair", ["no token in common", "target cannot say c"])
def test_rule_match_needs_no_law(pair):
    assert round_distance("match", pair, 2, count=1) < EXACT


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("pair", [*PAIRS, "crossing", "inside a character"])
def test_laws_with_holes_certainties_and_ties(pair, rule):
    assert round_distance(rule, pair, 2, kinds=("", ""), count=4) < EXACT


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("pair", ["no token in common", "long tokens"])
def test_a_long_round_has_the_targets_law(pair, rule):
    assert round_distance(rule, pair, 3, count=1) < EXACT


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sampling", ["top_p", "top_k"])
def test_filters_are_the_drafters_own(sampling, rule):
    assert round_distance(rule, "long tokens", 2, sampling=sampling) < EXACT


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "more",
    [
        {"assistant_confidence_threshold": 0.4},
        {"assistant_temperature": 0.0},
        {"assistant_temperature": 0.0, "assistant_confidence_threshold": 0.7},
        ADAPTIVE,
        {"assistant_temperature": 0.0, **ADAPTIVE},
    ],
    ids=["confidence", "certain", "certain and confident", "adaptive", "certain and adaptive"],
)
def test_no_knob_of_the_drafter_changes_the_law(more, rule):
    assert round_distance(rule, "long tokens", 2, count=2, more=more) < EXACT


def test_masses_of_ranges_need_only_the_sum_of_a_row():
    scores = torch.randn(3, 40, generator=torch.Generator().manual_seed(1)) * 4
    ranges = [(0, 3, 9), (0, 0, 0), (2, 5, 6), (2, 4, 30), (1, 0, 40), (1, 0, 0), (1, 2, 2), (1, 0, 0)]
    shares = projection._shares(scores, None, ranges)
    assert torch.allclose(projection._shares(scores, scores.double().logsumexp(-1), ranges), shares, rtol=1e-12)
    assert shares[2:].tolist() == pytest.approx([1.0, 0.0], abs=1e-12)
    assert shares[0] == pytest.approx(float(masses(scores)[0, 3:9].sum()), abs=1e-12)
    endless = scores.clone()
    endless[1, 7] = torch.inf
    assert projection._shares(endless, endless.double().logsumexp(-1), [(1, 7, 8), (1, 0, 0)]).tolist() == [1.0]


@pytest.mark.parametrize("rule", RULES)
def test_two_rounds_and_more(rule):
    setting = Setting("projection", rule, "plain", "no token in common", 1, kinds=DENSE)
    (case,) = [(prompt,) for prompt in prompts(setting, 1)]
    (law,) = laws_of(setting.end_to_end, [case])
    assert distance(setting, law, case, setting.gamma + 3) < 1e-6


# What the drafter reports


def scores_behind(model, context, drawn):
    """The drafter's scores behind each row's tokens."""
    return model(torch.tensor([[*context, *row] for row in drawn])).logits[:, -1]


def reported(pair, gamma, seed=0):
    """Every way the drafter's own draws can fall in one round.

    Yields:
        weight, tokens, what had been revealed before each of them, and the law reported for each, ``[V]``.
    """
    pieces = PAIRS[pair].target, PAIRS[pair].drafter
    model = TableModel(tables.tables(*pieces, seed, "dense", "dense")[1])
    texts = {d: said(PAIRS[pair], d) for d in range(len(pieces[1]))}
    table = TokenMap.of((tokens, d) for d, tokens in texts.items() if tokens)
    entries = table.drafter_ids.tolist()
    ways = list(itertools.product(range(len(entries)), repeat=gamma))
    context = SameText()
    context.append([0, 1])
    numbers, weights = torch.zeros(len(ways), gamma, dtype=torch.float64), torch.ones(len(ways), dtype=torch.float64)
    for step in range(gamma):
        drawn = [[entries[k] for k in way[:step]] for way in ways]
        q = scores_behind(model, context.ids, drawn)[:, entries].double().softmax(-1)
        chosen = torch.tensor([way[step] for way in ways]).unsqueeze(1)
        numbers[:, step] = (q.cumsum(-1) - q / 2).gather(1, chosen).squeeze(1)
        weights *= q.gather(1, chosen).squeeze(1)
    contexts = [SameText() for _ in ways]
    writer = ProjectionWriter(model, contexts, warpers=[], choices=table.drafter_ids)
    rows = Rows(torch.tensor([[0, 1]] * len(ways)), None, torch.arange(len(ways)), 100, 0)
    draws = Draws(Table(numbers), torch.arange(len(ways)), torch.zeros(len(ways), dtype=torch.long))
    drafter = ProjectionDrafter(writer, table, torch.device("cpu"))
    proposal = drafter.propose(rows, list(range(len(ways))), [gamma] * len(ways), draws)
    assert proposal.count == [gamma] * len(ways)
    laws = []
    for i in range(gamma):
        empty = torch.zeros(len(ways), len(pieces[0]), dtype=torch.float64)
        laws.append(-proposal.law.subtract_from(empty, torch.full((len(ways),), i)))
    told = proposal.law.log_q(proposal.tokens).exp()
    for r, way in enumerate(ways):
        tokens = proposal.tokens[r].tolist()
        own = torch.stack([law[r] for law in laws])
        assert torch.allclose(own.gather(1, proposal.tokens[r].unsqueeze(1)).squeeze(1), told[r], rtol=0, atol=1e-14)
        yield float(weights[r]), tokens, revealed([entries[k] for k in way], texts, gamma), own


class Table:
    """Drafting numbers by row (its seed) and step."""

    def __init__(self, numbers):
        self._numbers = numbers

    def uniform(self, seed, position, offset, purpose, trial=0):
        assert purpose is Purpose.DRAFT
        return self._numbers[seed, offset]


def said(pair, d):
    """The target's ids of a drafter token: whole, else as its tokenizer writes it, else the longest pieces."""
    piece = {"<0x61>": "a", "<0x62>": "b", "<s>": ""}.get(pair.drafter[d], pair.drafter[d])
    if piece in pair.target:
        return (pair.target.index(piece),)
    if set(piece) <= set(pair.target):
        return tuple(pair.tokenizers["tokenizer"](piece).input_ids)
    ids = []
    while piece:
        begun = [t for t in pair.target if piece.startswith(t)]
        if not begun:
            break
        ids.append(pair.target.index(max(begun, key=len)))
        piece = piece[len(max(begun, key=len)) :]
    return tuple(ids)


def revealed(drawn, texts, gamma):
    """What a reader of the draft knows before each token: the tokens so far, whether each drafter token had text left
    behind them, and those drafter tokens that had none."""
    known, history = [], []
    for d in drawn:
        for level, token in enumerate(texts[d]):
            known.append(tuple(history))
            history.append(token)
            history.append("left" if level + 1 < len(texts[d]) else ("over", d))
    return known[:gamma]


@pytest.mark.parametrize("gamma", [1, 2, 3])
@pytest.mark.parametrize("pair", PAIRS)
def test_the_law_reported_is_that_of_the_token_given_what_was_revealed(pair, gamma):
    true, claimed = {}, {}
    for weight, tokens, known, laws in reported(pair, gamma):
        for i in range(gamma):
            key = known[i]
            true.setdefault(key, torch.zeros(len(PAIRS[pair].target), dtype=torch.float64))[tokens[i]] += weight
            assert torch.allclose(claimed.setdefault(key, laws[i]), laws[i], rtol=0, atol=1e-14)
    for key, counts in true.items():
        assert torch.allclose(counts / counts.sum(), claimed[key], rtol=0, atol=1e-12)
    assert gamma == 1 or any("left" in key for key in true)


# Planted faults


class Wrong(ProjectedLaw):
    """Behind the first token of a text, a law that is not the one drawn from.

    A subclass has ``law(q, place, token)``: ``[V]`` at a place, from the masses of all entries and the token drafted.
    """

    def of(self, entries, level, q):
        """The law of the token at a level, entries weighing q."""
        tokens = self.table.tokens[self.table.start[entries] + level]
        return torch.zeros(len(self.table.heads), dtype=torch.float64).index_add(0, tokens, q)

    def _law(self, row, i):
        place = self.places[row][i]
        q = masses(self.scores[place.lane])
        return self.law(q, place, self.drawn[row, i]) if place.level else self.of(torch.arange(len(q)), 0, q)

    def log_q(self, tokens):
        result = torch.zeros(tokens.shape, dtype=torch.float64)
        for row, places in enumerate(self.places):
            for i in range(len(places)):
                result[row, i] = self._law(row, i)[tokens[row, i]].log()
        return result

    def subtract_from(self, p, position):
        result = p.clone()
        for row, i in enumerate(position.tolist()):
            if i < len(self.places[row]):
                result[row] -= self._law(row, i)
        return result


class NotConditioned(Wrong):
    """The rest of a text whatever its first token."""

    def law(self, q, place, token):
        entries = (self.table.start.diff() > place.level).nonzero().squeeze(1)
        law = self.of(entries, place.level, q[entries])
        return law / law.sum()


class FreshDraw(Wrong):
    """The rest of a text as if it were a draw of its own."""

    def law(self, q, place, token):
        return self.of(torch.arange(len(q)), 0, q)


class WholeTextRevealed(Wrong):
    """No fault: the rest of a text is revealed with its first token, and certain from there on."""

    def law(self, q, place, token):
        return torch.nn.functional.one_hot(token, len(self.table.heads)).double()


class CertainWhenTested(WholeTextRevealed):
    """The rest of a text is a certainty for the acceptance test, though which text it is stays hidden."""

    def subtract_from(self, p, position):
        return ProjectedLaw.subtract_from(self, p, position)


class CertainWhenRejected(WholeTextRevealed):
    """The other way round."""

    def log_q(self, tokens):
        return self.log_mass


class TextLeftUnknown(Wrong):
    """The rest of a text as a share of all texts that begin so, those that have ended among them."""

    def law(self, q, place, token):
        entries = torch.arange(place.low, place.high)
        heads = self.table.tokens[self.table.start[:-1]]
        return self.of(entries, place.level, q[entries]) / q[heads == heads[place.low]].sum()


def with_law(kind):
    def plant(patch):
        propose = ProjectionDrafter.propose

        def changed(self, *arguments):
            proposal = propose(self, *arguments)
            if not isinstance(proposal.law, ProjectedLaw):
                return proposal
            law = proposal.law
            wrong = kind(law.scores, law.table, law.places, law.log_mass)
            object.__setattr__(wrong, "drawn", proposal.tokens)
            return Proposal(proposal.tokens, proposal.count, wrong)

        patch.setattr(ProjectionDrafter, "propose", changed)

    plant.__name__ = kind.__name__
    return plant


class Rolled(ProjectedLaw):
    """q permuted by one entry: the residual's, not the one that was drawn from."""

    def subtract_from(self, p, position):
        return ProjectedLaw(self.scores.roll(1, -1), self.table, self.places, self.log_mass).subtract_from(p, position)


def fault_one_entrys_mass(patch):
    """q(d) where the mass of all that begin with the same token belongs."""
    tell = projection._tell

    def one(draft, table, entry, *rest):
        (row, _, _), *others = tell(draft, table, entry, *rest)
        return [(row, entry, entry + 1), *others]

    patch.setattr(projection, "_tell", one)


def fault_drops_after_a_look(patch):
    """The improbable token that ends a draft is dropped."""
    end = Draft.end_behind
    patch.setattr(Draft, "end_behind", lambda self, length: end(self, length - 1))


CONFIDENT = {"assistant_confidence_threshold": 0.4}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "plant, more",
    [
        (with_law(NotConditioned), {}),
        (with_law(FreshDraw), {}),
        (with_law(CertainWhenTested), {}),
        (with_law(CertainWhenRejected), {}),
        (with_law(TextLeftUnknown), {}),
        (with_law(Rolled), {}),
        (fault_one_entrys_mass, {}),
        (fault_drops_after_a_look, CONFIDENT),
        (fault_drops_after_a_look, ADAPTIVE),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_planted_fault_is_seen(plant, more, rule, monkeypatch):
    plant(monkeypatch)
    assert round_distance(rule, "some of both", 2, more=more) > 1e-3


@pytest.mark.parametrize("rule", RULES)
def test_more_may_be_revealed(rule, monkeypatch):
    with_law(WholeTextRevealed)(monkeypatch)
    assert round_distance(rule, "some of both", 2) < EXACT
