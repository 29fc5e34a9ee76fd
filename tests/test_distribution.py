"""End to end: what ``fast_generate`` samples on real models has the target's law, and planted faults are seen.

The first round is enumerated, so that its law is computed, not sampled. For everything else tokens 1 and 2,
and the last two of γ + 3, which lie in different rounds, are counted and compared with their exact joint law by
chi-square. Seeds are fixed, so nothing here fails by chance.
"""

import itertools

import pytest
import torch
from laws import (
    DRAFTER_PIECES,
    SAMPLING,
    TARGET_PIECES,
    Problem,
    Reading,
    block_ways,
    cells,
    chi_square,
    exact_drafters,
    joint_law,
    match_ways,
    model,
    pair_counts,
    plain_rules,
    token_ways,
    tokenizer,
    total_variation,
    warpers,
)
from transformers import LogitsProcessor, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from specdec_fast import fast_generate, last_speculation, reference
from specdec_fast.drafters.model import CompactDrafter, ModelWriter
from specdec_fast.proposal import CompactLaw, Proposal
from specdec_fast.randomness import Purpose
from specdec_fast.verification import Match, Token

GAMMA = 2
STEPS = GAMMA + 3
WIDTH = len(TARGET_PIECES)
PROMPT = torch.tensor([[1, 2, 5, 3, 4, 1, 2]])
SOUND, FAULTY = 1e-4, 1e-6

METHODS = ("autoregressive", "model", "tli", "slem", "prompt_lookup")


def target():
    return model(WIDTH, 31, sharpness=0.8)


def parties(method):
    """The arguments that choose a drafter."""
    if method == "model":
        return {"method": method, "assistant_model": model(WIDTH, 32, sharpness=0.8)}
    if method in ("tli", "slem"):
        return {
            "method": method,
            "assistant_model": model(len(DRAFTER_PIECES), 33, sharpness=0.8),
            "tokenizer": tokenizer(TARGET_PIECES),
            "assistant_tokenizer": tokenizer(DRAFTER_PIECES),
        }
    return {"method": method}


def generate(method, rule, *, rows=2560, seeds=(0,), prompt=PROMPT, **arguments):
    """Sampled tokens ``[rows * len(seeds) * B, STEPS]``, ``B`` being the number of prompts."""
    parts = []
    settings = {"top_k": 0, "num_assistant_tokens": GAMMA, **parties(method), **arguments}
    for seed in seeds:
        output = fast_generate(
            target(),
            prompt,
            do_sample=True,
            max_new_tokens=STEPS,
            num_return_sequences=rows,
            verification=rule,
            seed=seed,
            **settings,
        )
        parts.append(output[:, prompt.shape[1] :])
    return torch.cat(parts)


def p_values(tokens, law):
    """Of the first pair and of the last one."""
    first = law.sum(tuple(range(2, STEPS)))
    last = law.sum(tuple(range(STEPS - 2)))
    return chi_square(pair_counts(tokens, 0, WIDTH), first), chi_square(pair_counts(tokens, STEPS - 2, WIDTH), last)


_laws = {}


def exact_law(eos=None, **sampling):
    key = (eos, *sorted(sampling.items()))
    if key not in _laws:
        _laws[key] = joint_law(target(), PROMPT[0], STEPS, warpers(**sampling), eos)
    return _laws[key]


class FirstRound:
    """Numbers of the first round read from a table by row (its seed); later ones do not matter."""

    def __init__(self, numbers, start):
        self._numbers, self._start = numbers, start

    def uniform(self, seed, position, offset, purpose, trial=0):
        seed, position, offset = torch.broadcast_tensors(seed, position, offset)
        later = position != self._start
        if purpose is Purpose.TARGET:
            offset = position - self._start
            later = offset > GAMMA
        return torch.where(later, 0.5, self._numbers[purpose][seed, offset.clamp(max=GAMMA)])


@torch.no_grad()
def first_round(method, sampling):
    """The laws of the first round: of the target, and of the drafter on the tokens it may draw."""
    chain, drafter = warpers(**sampling), parties(method)["assistant_model"]
    if method == "tli":
        shared = [(t, DRAFTER_PIECES.index(piece)) for t, piece in enumerate(TARGET_PIECES) if piece in DRAFTER_PIECES]
        text = "".join(TARGET_PIECES[t] for t in PROMPT[0].tolist())
        context = torch.tensor(tokenizer(DRAFTER_PIECES)(text).input_ids)
        index, picks = (torch.tensor(ids) for ids in zip(*shared, strict=True))
        names = dict(shared)
    else:
        index, picks, context, names = None, slice(None), PROMPT[0], {t: t for t in range(WIDTH)}

    def laws(party, prompt, steps, choices, names):
        tables = []
        for step in range(steps):
            prefixes = [[names.get(t, 0) for t in prefix] for prefix in itertools.product(range(WIDTH), repeat=step)]
            ids = torch.cat([prompt.expand(len(prefixes), -1), torch.tensor(prefixes).long()], 1)
            scores = chain(ids, party(input_ids=ids, use_cache=False).logits[:, -1, choices])
            tables.append(scores.reshape(*[WIDTH] * step, -1))
        return tables

    everything = {t: t for t in range(WIDTH)}
    p = laws(target(), PROMPT[0], GAMMA + 1, slice(None), everything)
    return Problem(p, laws(drafter, context, GAMMA, picks, names), index)


def enumerated(problem, method, rule, sampling, numbered=lambda source: {"source": source}):
    """Blocks of the first round and their weights, each way it can go being a row of one call.

    Args:
        numbered: makes arguments of ``fast_generate`` of the source of numbers.
    """
    ways = {"token": token_ways, "match": match_ways, "block": block_ways}[rule]
    plan = []
    for chosen, tokens, weight, count in problem.drafts():
        drafts = []
        for i, k in enumerate(chosen):
            low, high = next(cell[1:] for cell in cells(problem.q_mass[i][tokens[:i]].tolist()) if cell[0] == k)
            drafts.append((Purpose.DRAFT, i, (low, high)))
        plan.extend((drafts + spans, spans, weight * chance) for spans, chance in ways(problem, tokens, count))
    numbers = {purpose: torch.full((2 * len(plan), GAMMA + 1), 0.5, dtype=torch.float64) for purpose in Purpose}
    for row, (spans, _, _) in enumerate(plan):
        for purpose, offset, (low, high) in spans:
            # The models' float32 is only as exact as the shape of the batch lets it be
            numbers[purpose][2 * row : 2 * row + 2, offset] = torch.tensor([0.001, 0.999]).double() * (high - low) + low
    output = fast_generate(
        target(),
        PROMPT,
        do_sample=True,
        max_new_tokens=GAMMA + 1,
        num_return_sequences=2 * len(plan),
        num_assistant_tokens=GAMMA,
        verification=rule,
        seed=list(range(2 * len(plan))),
        **numbered(FirstRound(numbers, PROMPT.shape[1])),
        **{"top_k": 0, **parties(method), **sampling},
    )
    blocks = {}
    for row, tokens in enumerate(output[:, PROMPT.shape[1] :].tolist()):
        _, spans, weight = plan[row // 2]
        # One number for each token of the block, and under rule "token" one for the coin of a rejection
        length = 1 + spans[-1][1]
        block = tuple(tokens[:length])
        blocks[block] = blocks.get(block, 0.0) + weight / 2
    return blocks


@pytest.mark.parametrize("rule", ["match", "token", "block"])
@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("method", ["model", "tli"])
def test_the_first_round_has_exactly_the_targets_law(method, sampling, rule, monkeypatch):
    exact_drafters(monkeypatch)
    problem = first_round(method, SAMPLING[sampling])
    blocks = enumerated(problem, method, rule, SAMPLING[sampling])
    assert total_variation(problem.completed(blocks), problem.joint()) < 1e-6


@pytest.mark.parametrize("rule", ["match", "token", "block"])
@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("method", METHODS)
def test_the_output_has_the_targets_law(method, sampling, rule):
    settings = SAMPLING[sampling]
    ending = {"eos_token_id": 0, "pad_token_id": 0} if sampling == "top_p" else {}
    tokens = generate(method, rule, seeds=(0, 1), **settings, **ending)
    if method != "autoregressive":
        assert last_speculation().accepted > 100
    law = exact_law(ending.get("eos_token_id"), **settings)
    assert min(p_values(tokens, law)) > SOUND


@pytest.mark.parametrize("rule", ["match", "token", "block"])
@pytest.mark.parametrize(
    "method, arguments",
    [
        ("model", {"assistant_temperature": 1.7}),
        ("model", {"assistant_temperature": 0.0}),
        ("model", {"assistant_confidence_threshold": 0.3}),
        ("tli", {"assistant_confidence_threshold": 0.3, "num_assistant_tokens": 4}),
        ("tli", {"num_assistant_tokens_schedule": "heuristic", "num_assistant_tokens": 1}),
        ("slem", {"assistant_temperature": 0.5, "assistant_confidence_threshold": 0.4, "num_assistant_tokens": 4}),
        ("prompt_lookup", {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1}),
    ],
)
def test_no_knob_of_the_drafter_changes_the_law(method, arguments, rule):
    tokens = generate(method, rule, **arguments)
    assert min(p_values(tokens, exact_law())) > SOUND


@pytest.mark.parametrize("rule", ["match", "token", "block"])
@pytest.mark.parametrize("method", ["model", "tli", "slem"])
def test_rows_of_different_prompts(method, rule):
    """Left-padded: each prompt's rows have that prompt's own law."""
    texts = [[3, 1, 2], [1, 2, 5, 3, 4, 1, 2], [4]]
    longest = max(map(len, texts))
    ids = torch.tensor([[0] * (longest - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
    tokens = generate(method, rule, prompt=ids, rows=1200, attention_mask=mask, pad_token_id=0)
    for text, own in zip(texts, tokens.split(1200), strict=True):
        law = joint_law(target(), torch.tensor(text), STEPS, warpers())
        assert min(p_values(own, law)) > SOUND


class Lean(LogitsProcessor):
    """A processor of the caller's own, which nobody may call out of order: it leans on the text's last token."""

    def __call__(self, input_ids, scores):
        lean = torch.nn.functional.one_hot((input_ids[:, -1] + 1) % WIDTH, WIDTH)
        return scores + 1.5 * lean


@pytest.mark.parametrize(
    "method, rule", [("model", "match"), ("model", "token"), ("model", "block"), ("tli", "block"), ("slem", "match")]
)
def test_processors_that_read_the_text(method, rule):
    penalty = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(3.0)])
    tokens = generate(method, rule, logits_processor=penalty)
    assert min(p_values(tokens, joint_law(target(), PROMPT[0], STEPS, penalty))) > SOUND


@pytest.mark.parametrize("rule", ["match", "token"])
def test_a_processor_that_is_called_in_order(rule):
    # Positions in order keep a batch in step until one of its rows rejects: in large ones no draft would get far
    own = LogitsProcessorList([Lean()])
    tokens = generate("model", rule, rows=4, seeds=range(300), logits_processor=own)
    assert min(p_values(tokens, joint_law(target(), PROMPT[0], STEPS, own))) > SOUND


# Planted faults


def fault_rolled_law(patch):
    """q permuted by one entry."""
    _replace_law(patch, lambda law: CompactLaw(law.scores.roll(1, -1), law.index, law.drawn))


def fault_rolled_map(patch):
    """The index map permuted by one entry: the residual loses the mass of other tokens."""
    _replace_law(patch, lambda law: CompactLaw(law.scores, law.index.roll(1), law.drawn))


def fault_warped_twice(patch):
    """The drafter's law is sharpened once more before it is verified."""
    _replace_law(patch, lambda law: CompactLaw(law.scores / 0.7, law.index, law.drawn))


def _replace_law(patch, change):
    propose = CompactDrafter.propose

    def changed(self, *arguments):
        proposal = propose(self, *arguments)
        law = proposal.law
        return Proposal(proposal.tokens, proposal.count, change(law) if isinstance(law, CompactLaw) else law)

    patch.setattr(CompactDrafter, "propose", changed)


def fault_law_of_another_position(patch):
    """The residual is taken with the drafter's law of the position behind."""
    subtract = CompactLaw.subtract_from
    patch.setattr(
        CompactLaw,
        "subtract_from",
        lambda law, p, position: subtract(law, p, (position + 1).clamp(max=law.scores.shape[1] - 1)),
    )


def fault_residual_of_another_row(patch):
    """The residual is taken with the target's law of the position behind."""
    _shift_row(patch, lambda accepted, rejected: torch.where(rejected, accepted + 1, accepted))


def fault_bonus_of_another_row(patch):
    """The bonus token is drawn from the law of the last draft token's position."""
    _shift_row(patch, lambda accepted, rejected: torch.where(rejected, accepted, (accepted - 1).clamp(min=0)))


def _shift_row(patch, place):
    next_token = Token._next_token

    def shifted(scores, law, accepted, rejected, draws):
        rows = torch.arange(len(scores))
        moved = scores.clone()
        moved[rows, accepted] = scores[rows, place(accepted, rejected)]
        return next_token(moved, law, accepted, rejected, draws)

    patch.setattr(Token, "_next_token", staticmethod(shifted))


def fault_swapped_laws(patch):
    accept = reference.accept
    patch.setattr(reference, "accept", lambda log_p, log_q, u: accept(log_q, log_p, u))


def fault_no_residual(patch):
    patch.setattr(reference, "residual", lambda p, difference: p)


def fault_law_over_the_whole_vocabulary(patch):
    """TLI: verified with the drafter's law over D, though it drew from the one over the intersection."""
    patch.setattr("specdec_fast.drafters.model.lean_model", lambda model: None)  # it would leave out the other logits
    shares = []
    scores_of, propose = ModelWriter._scores, CompactDrafter.propose

    def scores(self, logits):
        shares.append(logits.double().softmax(-1)[:, self._choices].sum(-1))
        return scores_of(self, logits)

    class Smaller(CompactLaw):
        def log_q(self, tokens):
            return super().log_q(tokens) + self.share.log()

    def changed(self, rows, active, limit, draws):
        shares.clear()
        proposal = propose(self, rows, active, limit, draws)
        if not isinstance(proposal.law, CompactLaw):
            return proposal
        law = Smaller(proposal.law.scores, proposal.law.index, proposal.law.drawn)
        share = torch.ones(proposal.tokens.shape, dtype=torch.float64)
        share[[r for r, most in enumerate(limit) if most]] = torch.stack(shares, 1)
        object.__setattr__(law, "share", share)
        return Proposal(proposal.tokens, proposal.count, law)

    patch.setattr(ModelWriter, "_scores", scores)
    patch.setattr(CompactDrafter, "propose", changed)


def fault_dropped_after_a_look(patch):
    """The improbable token that ends a draft is dropped."""
    write = ModelWriter._write

    def dropping(self, active, count, draws):
        written = write(self, active, count, draws)
        mass = reference.log_prob(written.scores, written.drawn).exp()
        kept = [c - int(mass[r, c - 1] < self._confidence) for r, c in enumerate(written.count)]
        return type(written)(written.drawn, written.scores, kept)

    patch.setattr(ModelWriter, "_write", dropping)


def fault_match_keeps_one_more(patch):
    verify = Match.verify

    def longer(self, scores, proposal, draws):
        verdict = verify(self, scores, proposal, draws)
        accepted = torch.minimum(verdict.accepted + 1, torch.tensor(proposal.count))
        own = self.choose(scores, draws)
        return verdict._replace(accepted=accepted, token=own.gather(1, accepted.unsqueeze(1)).squeeze(1))

    patch.setattr(Match, "verify", longer)


def fault_match_takes_the_row_before(patch):
    verify = Match.verify

    def earlier(self, scores, proposal, draws):
        verdict = verify(self, scores, proposal, draws)
        own = self.choose(scores, draws)
        return verdict._replace(token=own.gather(1, (verdict.accepted - 1).clamp(min=0).unsqueeze(1)).squeeze(1))

    patch.setattr(Match, "verify", earlier)


ACCEPT, RESIDUAL, DRAFT = Purpose.ACCEPT, Purpose.RESIDUAL, Purpose.DRAFT
CONFIDENT = {"assistant_confidence_threshold": 0.3}


@pytest.mark.parametrize(
    "fault, method, rule, arguments",
    [
        (fault_rolled_law, "model", "token", {}),
        (fault_rolled_law, "tli", "token", {}),
        (fault_rolled_map, "tli", "token", {}),
        (fault_warped_twice, "model", "token", {}),
        (fault_warped_twice, "tli", "token", SAMPLING["top_p"]),
        (fault_law_of_another_position, "model", "token", {}),
        (fault_residual_of_another_row, "model", "token", {}),
        (fault_bonus_of_another_row, "model", "token", {}),
        (fault_bonus_of_another_row, "tli", "token", {}),
        (fault_swapped_laws, "model", "token", {}),
        (fault_no_residual, "tli", "token", {}),
        (fault_no_residual, "prompt_lookup", "token", {}),
        (fault_law_over_the_whole_vocabulary, "tli", "token", {}),
        (fault_dropped_after_a_look, "model", "token", CONFIDENT),
        (fault_dropped_after_a_look, "tli", "token", CONFIDENT),
        (fault_rolled_law, "tli", "block", {}),
        (fault_warped_twice, "model", "block", {}),
        (fault_law_of_another_position, "tli", "block", {}),
        (fault_no_residual, "tli", "block", {}),
        (fault_law_over_the_whole_vocabulary, "tli", "block", {}),
        (fault_dropped_after_a_look, "model", "block", CONFIDENT),
        (fault_match_keeps_one_more, "model", "match", {}),
        (fault_match_keeps_one_more, "slem", "match", {}),
        (fault_match_takes_the_row_before, "tli", "match", {}),
        ({RESIDUAL: ACCEPT}, "model", "token", {}),
        ({RESIDUAL: DRAFT}, "model", "token", {}),
        ({ACCEPT: DRAFT}, "tli", "token", {}),
        ({RESIDUAL: ACCEPT}, "model", "block", {}),
        ({ACCEPT: DRAFT}, "tli", "block", {}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_planted_fault_is_seen(fault, method, rule, arguments, monkeypatch):
    if isinstance(fault, dict):
        arguments = {**arguments, "source": Reading(lambda purpose: fault.get(purpose, purpose))}
        sampling = {}
    else:
        plain_rules(monkeypatch)
        fault(monkeypatch)
        sampling = {name: value for name, value in arguments.items() if name in SAMPLING["top_p"]}
    tokens = generate(method, rule, **arguments)
    assert min(p_values(tokens, exact_law(**sampling))) < FAULTY


@pytest.mark.parametrize(
    "fault, rule",
    [
        (fault_rolled_law, "token"),
        (fault_rolled_map, "token"),
        (fault_warped_twice, "token"),
        (fault_law_of_another_position, "token"),
        (fault_residual_of_another_row, "token"),
        (fault_bonus_of_another_row, "token"),
        (fault_swapped_laws, "token"),
        (fault_no_residual, "token"),
        (fault_law_over_the_whole_vocabulary, "token"),
        (fault_rolled_law, "block"),
        (fault_rolled_map, "block"),
        (fault_warped_twice, "block"),
        (fault_law_over_the_whole_vocabulary, "block"),
        (fault_match_keeps_one_more, "match"),
        (fault_match_takes_the_row_before, "match"),
    ],
)
def test_a_planted_fault_is_seen_in_the_first_round(fault, rule, monkeypatch):
    exact_drafters(monkeypatch)
    problem = first_round("tli", {})
    fault(monkeypatch)
    blocks = enumerated(problem, "tli", rule, {})
    assert total_variation(problem.completed(blocks), problem.joint()) > 1e-3


@pytest.mark.parametrize(("method", "rule"), [("model", "block"), ("tli", "token"), ("slem", "match")])
def test_a_drafter_that_reads_the_end_of_the_text_only_leaves_the_targets_law(method, rule):
    tokens = generate(method, rule, assistant_window=4)
    assert min(p_values(tokens, exact_law())) > SOUND
    assert last_speculation().accepted
