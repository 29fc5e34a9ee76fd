"""Planted faults: the enumeration must find each of them, far above what it allows."""

import pytest
import torch
from enumeration import laws_of, laws_on_a_grid
from rounds import Setting, distance, prompts

from specdec_fast import block, reference
from specdec_fast.drafters.model import CompactDrafter, ModelWriter
from specdec_fast.proposal import CompactLaw, Proposal
from specdec_fast.randomness import Purpose

FOUND = 1e-3
CONFIDENT = {"assistant_confidence_threshold": 0.4}
ADAPTIVE = {"num_assistant_tokens_schedule": "adaptive"}


def worst(setting, *, whole=False, count=4, **how):
    """The largest distance among some prompts, of one round or of whole generations."""
    cases = [(prompt,) for prompt in prompts(setting, count)]
    run, steps = (setting.end_to_end, setting.gamma + 3) if whole else (setting.one_round, setting.gamma + 1)
    return max(distance(setting, law, case, steps) for law, case in zip(laws_of(run, cases, **how), cases, strict=True))


def with_law(patch, change):
    """Proposals of a model with another law than they were drawn from."""
    propose = CompactDrafter.propose

    def changed(self, *arguments):
        proposal = propose(self, *arguments)
        return Proposal(proposal.tokens, proposal.count, change(proposal.law))

    patch.setattr(CompactDrafter, "propose", changed)


def q_permuted(patch):
    with_law(patch, lambda law: CompactLaw(law.scores.roll(1, -1), law.index, law.drawn))


def map_permuted(patch):
    with_law(patch, lambda law: CompactLaw(law.scores, law.index.roll(1), law.drawn))


def renormalised_over_the_wrong_set(patch):
    """TLI draws on the intersection, and is verified with the drafter's law on its whole vocabulary."""
    shares = []
    scores_of = ModelWriter._scores

    def scores(self, logits):
        shares.append(logits.double().softmax(-1)[:, self._choices].sum(-1))
        return scores_of(self, logits)

    class OnTheWholeVocabulary(CompactLaw):
        def log_q(self, tokens):
            return super().log_q(tokens) + self.log_share

    def changed(law):
        made = OnTheWholeVocabulary(law.scores, law.index, law.drawn)
        object.__setattr__(made, "log_share", torch.stack(shares, 1).log())
        shares.clear()
        return made

    patch.setattr(ModelWriter, "_scores", scores)
    with_law(patch, changed)


def dropped_after_a_look(patch):
    """The improbable token that ends a draft is dropped."""
    write = ModelWriter._write

    def dropping(self, active, count, draws):
        written = write(self, active, count, draws)
        mass = reference.log_prob(written.scores, written.drawn).exp()
        kept = [c - int(mass[r, c - 1] < self._confidence) for r, c in enumerate(written.count)]
        return type(written)(written.drawn, written.scores, kept)

    patch.setattr(ModelWriter, "_write", dropping)


def dropped_where_it_ends(patch):
    """The token behind which the adaptive lookahead ends a draft is dropped."""
    asked = ModelWriter._asked

    def dropping(self, active, count, drafted, scores, token):
        kept = asked(self, active, count, drafted, scores, token)
        return [k - 1 if k == drafted < c else k for k, c in zip(kept, count, strict=True)]

    patch.setattr(ModelWriter, "_asked", dropping)


def weights_of_the_position_before(patch):
    right = reference.block_weights
    patch.setattr(reference, "block_weights", lambda *laws: right(*laws)[:, [0, *range(right(*laws).shape[1] - 1)]])


def weights_of_the_position_behind(patch):
    right = reference.block_weights
    patch.setattr(reference, "block_weights", lambda *laws: right(*laws)[:, [*range(1, right(*laws).shape[1]), -1]])


def no_residual(patch):
    patch.setattr(reference, "residual", lambda p, difference: p)


@pytest.mark.parametrize(
    "fault, method, rule, more",
    [
        (q_permuted, "model", "token", {}),
        (q_permuted, "model", "block", {}),
        (q_permuted, "tli", "token", {}),
        (q_permuted, "tli", "block", {}),
        (map_permuted, "tli", "token", {}),
        (map_permuted, "tli", "block", {}),
        (renormalised_over_the_wrong_set, "tli", "token", {}),
        (renormalised_over_the_wrong_set, "tli", "block", {}),
        (dropped_after_a_look, "model", "token", CONFIDENT),
        (dropped_after_a_look, "model", "block", CONFIDENT),
        (dropped_after_a_look, "tli", "token", CONFIDENT),
        (dropped_where_it_ends, "model", "token", ADAPTIVE),
        (dropped_where_it_ends, "model", "block", ADAPTIVE),
        (dropped_where_it_ends, "tli", "token", ADAPTIVE),
        (weights_of_the_position_before, "model", "block", {}),
        (weights_of_the_position_behind, "tli", "block", {}),
        (no_residual, "model", "token", {}),
        (no_residual, "prompt_lookup", "token", {}),
    ],
)
def test_a_fault_of_one_round_is_found(fault, method, rule, more, monkeypatch):
    setting = Setting(method, rule, "plain", "crossing" if method == "tli" else 4, 2, ("dense", "dense"), more=more)
    assert worst(setting) < 1e-12
    fault(monkeypatch)
    assert worst(setting) > FOUND


class OtherKeys:
    """A source that is asked for other keys than the code wanted."""

    def __init__(self, source, change):
        self._source, self._change = source, change

    def uniform(self, *key):
        return self._source.uniform(*self._change(*key))


def by_position_alone(seed, position, offset, purpose, trial=0):
    """Later rounds get the numbers that this one has looked at."""
    return seed, position + offset, torch.zeros_like(offset), purpose, trial


def shared(one, other):
    def change(seed, position, offset, purpose, trial=0):
        return seed, position, offset, other if purpose is one else purpose, trial

    return change


@pytest.mark.parametrize("rule", ["block", "token"])
def test_keys_by_position_alone_are_found(rule):
    """They are a fault of rule *block*; rule *token* survives them."""
    setting = Setting("model", rule, "plain", 3, 2, ("dense", "one-hot"))
    found = worst(setting, whole=True, count=1, fault=lambda source: OtherKeys(source, by_position_alone))
    assert found > FOUND if rule == "block" else found < 1e-12


@pytest.mark.parametrize(
    "one, other, rule",
    [
        (Purpose.RESIDUAL, Purpose.DRAFT, "token"),
        (Purpose.RESIDUAL, Purpose.DRAFT, "block"),
        (Purpose.RESIDUAL, Purpose.ACCEPT, "token"),
        (Purpose.ACCEPT, Purpose.DRAFT, "token"),
        (Purpose.ACCEPT, Purpose.DRAFT, "block"),
    ],
)
def test_shared_noise_is_found(one, other, rule):
    setting = Setting("model", rule, "plain", 4, 2, ("dense", "dense"))
    assert worst(setting, count=2, fault=lambda source: OtherKeys(source, shared(one, other))) > FOUND


def test_rule_match_may_share_its_noise():
    """No fault: the output is the target's own draws, whatever was drafted."""

    def change(seed, position, offset, purpose, trial=0):
        return seed, position + offset, torch.zeros_like(offset), Purpose.TARGET, trial

    setting = Setting("model", "match", "plain", 3, 1, ("dense", "dense"))
    assert worst(setting, whole=True, count=1, fault=lambda source: OtherKeys(source, change)) < 1e-12


# `<=` for `<`: no law on the continuum changes by it, but numbers come from a grid, of 2^53 points or of four


def accepts_at_the_edge(patch):
    patch.setattr(reference, "accept", lambda log_p, log_q, u: (log_p >= u.log() + log_q) & (log_q > -torch.inf))


def draws_at_the_edge(patch):
    def draw(weights, u):
        return torch.searchsorted(weights.cumsum(-1), (u * weights.sum(-1)).unsqueeze(-1), right=False).squeeze(-1)

    patch.setattr(reference, "draw", draw)


def wins_at_the_edge(patch):
    right = block._coin
    patch.setattr(block, "_coin", lambda coins, place: right(coins, place).nextafter(torch.tensor(0.0).double()))


@pytest.mark.parametrize(
    "fault, rule, gamma",
    [
        (accepts_at_the_edge, "token", 1),
        (accepts_at_the_edge, "token", 2),
        (draws_at_the_edge, "token", 1),
        (draws_at_the_edge, "match", 2),
        (draws_at_the_edge, "block", 1),
        (wins_at_the_edge, "block", 1),
    ],
)
def test_an_edge_on_the_wrong_side_is_found(fault, rule, gamma, monkeypatch):
    setting = Setting("model", rule, "plain", 4, gamma, ("flat", "ties"))
    cases = [(prompt,) for prompt in prompts(setting, 2)]

    def largest():
        laws = laws_on_a_grid(setting.one_round, cases, bits=2)
        return max(distance(setting, law, case, gamma + 1) for law, case in zip(laws, cases, strict=True))

    assert largest() < 1e-12
    fault(monkeypatch)
    assert largest() > FOUND
