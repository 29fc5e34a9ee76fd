"""``method="auto"``: what it takes and why, and that changing its mind in the middle of a row changes no law."""

import gc
import warnings
import weakref

import pytest
import tiny
import torch
from enumeration import laws_of
from rounds import Setting, distance, prompts
from tables import PAIRS, ROWS, TableModel
from transformers import LogitsProcessor, LogitsProcessorList

from specdec_fast import choice, fast_generate, last_speculation
from specdec_fast.choice import Choice, across_vocabularies, repetition
from specdec_fast.drafters.auto import AutoDrafter, Candidate, History
from specdec_fast.intersection_mass import intersection_mass
from specdec_fast.options import Options
from specdec_fast.proposal import Proposal
from specdec_fast.rule import Draws
from specdec_fast.vocab import Vocabulary

CROSSING = PAIRS["crossing"]  # the drafter's bc and ca are no tokens of the target
EXACT = 1e-6


def constant(*masses):
    """A model of one law, whatever the text."""
    return TableModel(torch.tensor(masses).log().expand(ROWS, -1).contiguous())


def drafter(shared):
    """That share of its law on c, b and a, the rest on bc and ca."""
    return constant(*[shared / 3] * 3, *[(1 - shared) / 2] * 2)


def call(assistant, prompt=((0, 1, 2, 0),), **arguments):
    settings = {"do_sample": True, "top_k": 0, "seed": 0, "max_new_tokens": 6, "pad_token_id": 0}
    fast_generate(
        constant(0.3, 0.3, 0.2, 0.2),
        torch.tensor(prompt),
        assistant_model=assistant,
        **CROSSING.tokenizers,
        **{**settings, **arguments},
    )
    return last_speculation()


# The measured intersection mass


def measured(model):
    target, own = (Vocabulary.of(tokenizer) for tokenizer in CROSSING.tokenizers.values())
    return intersection_mass(model, own, target, target_size=4, drafter_size=5)


@pytest.mark.parametrize("shared", [0.0, 0.25, 1.0])
def test_the_measure_is_the_mass_on_the_intersection(shared):
    assert measured(drafter(shared)).shared == pytest.approx(shared, abs=1e-6)


def test_positions_without_a_law_do_not_count():
    model = drafter(0.25)
    model.table[: ROWS // 2] = float("nan")
    assert measured(model).shared == pytest.approx(0.25)
    model = drafter(0.25)
    model.table[:] = float("nan")
    assert measured(model).shared == 3 / 5  # of its ids


def test_a_drafter_is_measured_once_and_not_kept_alive(monkeypatch):
    model, passes = drafter(0.5), []
    forward = TableModel.forward
    monkeypatch.setattr(TableModel, "forward", lambda *args, **more: passes.append(1) or forward(*args, **more))
    assert measured(model) is measured(model)
    assert len(passes) == 1
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("roles", [("byte_a", "byte_b"), ("byte_b", "byte_a")])
def test_merges_are_counted_where_the_target_writes_longer_tokens(roles):
    """byte_a was trained on all texts, byte_b on code and little English."""
    from toy_tokenizers import build

    target, own = (Vocabulary.of(build(kind)) for kind in roles)
    mass = intersection_mass(tiny.model(vocabulary=own.size), own, target, target_size=500, drafter_size=own.size)
    assert (mass.merged > choice.MERGING) == (roles[0] == "byte_a")


# The decision


@pytest.mark.parametrize(
    "shared, method, reason",
    [
        (0.999, "tli", "99.9% of the drafter's mass is on tokens that both have: TLI throws hardly any of it away"),
        (0.7, "projection", "70.0% of the drafter's mass is on tokens that both have: projection keeps"),
        (0.0, "projection", "0.0% of the drafter's mass"),
    ],
)
def test_sampling_goes_by_the_measure(shared, method, reason):
    statistics = call(drafter(shared))
    assert statistics.method == method
    assert statistics.verification == "block"
    assert reason in statistics.reason


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ({"do_sample": False}, "greedy"),
        ({"assistant_temperature": 0}, "argmax"),
        ({"verification": "match"}, "own draws"),
        (
            {
                "logits_processor": LogitsProcessorList(
                    [type("Own", (LogitsProcessor,), {"__call__": lambda *a: a[2]})()]
                )
            },
            "",
        ),
    ],
    ids=["greedy", "certain drafter", "match", "in order"],
)
def test_nothing_is_measured_where_no_law_is_needed(arguments, reason, monkeypatch):
    monkeypatch.setattr(choice, "intersection_mass", None)
    statistics = call(drafter(0.5), **arguments)
    assert (statistics.method, statistics.verification) == ("slem", "match")
    assert reason in statistics.reason


@pytest.mark.parametrize("shared, others", [(1.0, ()), (0.96, ("projection",)), (0.5, ("tli",))])
def test_nothing_else_is_tried_where_nothing_is_lost(shared, others):
    options = Options(assistant_model=drafter(shared), **CROSSING.tokenizers)
    found = across_vocabularies(options, True, False, (4, 5), 0.01).others
    assert tuple(method for method in found if shared == 1 or method != "slrs") == others


def test_slrs_is_a_candidate_where_the_target_merges():
    (target, tokenizer), (model, own) = tiny.taught(), tiny.taught("drafter")
    options = Options(assistant_model=model, tokenizer=tokenizer, assistant_tokenizer=own)
    widths = target.config.vocab_size, model.config.vocab_size
    assert "slrs" in across_vocabularies(options, True, False, widths, choice.SMALL).others
    assert "slrs" not in across_vocabularies(options, True, False, widths, 0.3).others  # its own looks would cost more
    # Rows in step are no rows of their own
    assert across_vocabularies(options, True, True, widths, choice.SMALL).others == ()


# The running acceptance


def history(*hopes, handicap=0.0):
    return History([Candidate(str(i), lambda: None, hope, handicap if i else 0.0) for i, hope in enumerate(hopes)])


def rounds(row, accepted, count=40):
    for _ in range(count):
        row.learn(4, accepted)
    return row.current


def test_a_good_candidate_is_kept():
    assert rounds(history(0.5, 0.5), 3) == 0


def test_a_bad_one_is_left_for_one_that_turns_out_better():
    row = history(0.5, 0.5)
    assert rounds(row, 0, 15) == 0  # too few tokens tested
    assert rounds(row, 0, 1) == 1
    assert rounds(row, 2) == 1
    assert row.changes == 1


def test_one_that_turns_out_worse_is_left_again():
    row = history(0.5, 0.5)
    rounds(row, 0, 8)
    for _ in range(200):
        row.learn(4, 1 if row.current == 0 else 0)
    assert row.current == 0
    assert row.tested[1] > 0
    before = row.changes
    assert rounds(row, 1, 200) == 0
    assert row.changes == before


def test_what_costs_more_must_be_better_by_that():
    cheap, dear = history(0.5, 0.65, handicap=0.08), history(0.5, 0.65, handicap=0.2)
    assert (rounds(cheap, 1), rounds(dear, 1)) == (0, 0)
    assert (cheap.changes, dear.changes) == (2, 0)  # one was tried, accepted no more, and was left


# Changing the method


@pytest.fixture
def eager(monkeypatch):
    """Rows that change as soon as a candidate has been tested once, among drafters of both kinds of laws."""
    monkeypatch.setattr(History, "LEAST", 1)
    monkeypatch.setattr(History, "WEIGHT", 0.5)
    monkeypatch.setattr(History, "MARGIN", 0.01)
    monkeypatch.setattr("specdec_fast.methods.LOOKING", 0.04)  # as for a small drafter
    chosen = Choice("projection", "for the test", ("slrs", "tli"))
    monkeypatch.setattr("specdec_fast.methods.across_vocabularies", lambda *_: chosen)


def setting(rule, sampling="plain", vocabulary="small", gamma=1, **more):
    return Setting("auto", rule, sampling, vocabulary, gamma, more={**PAIRS[vocabulary].tokenizers, **more})


def law_distance(own):
    (case,) = [(prompt,) for prompt in prompts(own, 1)]
    (law,) = laws_of(own.end_to_end, [case])
    return distance(own, law, case, own.gamma + 3)


@pytest.mark.parametrize("sampling", ["plain", "top_k"])
@pytest.mark.parametrize("rule", ["token", "block"])
def test_rows_that_change_have_the_targets_law(rule, sampling, eager):
    vocabulary = "small" if sampling == "plain" else "inside a character"
    own = setting(rule, sampling, vocabulary)
    assert law_distance(own) < EXACT
    assert "the running acceptance changed the method" in last_speculation().reason


@pytest.mark.parametrize("looks", [False, True])
@pytest.mark.parametrize("rule", ["token", "block"])
def test_a_choice_made_after_looking_at_the_draft_is_seen(rule, looks, eager, monkeypatch):
    """The fault: a draft that looks poor is thrown away, and another candidate drafts in its place.

    The same by a look at the row's length alone is none.
    """

    def propose(self, rows, active, limit, draws):
        def draft(candidate, places, draws):
            own = [active[r] for r in places], [limit[r] for r in places]
            return self.candidates[candidate].build().propose(rows, *own, draws.rows(places))

        everything = list(range(len(active)))
        seen = draft(0, everything, draws).tokens
        signs = seen[:, 0].tolist() if looks and seen.shape[1] else [rows.length[row] % 2 for row in active]
        poor, good = ([r for r in everything if (signs[r] == 0) == kind] for kind in (True, False))
        other = Draws(draws.source, draws.seed, draws.start + 1000)  # numbers that nobody has looked at
        parts = [(places, draft(c, places, d)) for c, places, d in ((0, good, draws), (2, poor, other)) if places]
        return Proposal.joined(parts)

    monkeypatch.setattr(AutoDrafter, "propose", propose)
    apart = law_distance(setting(rule))
    assert apart > 1e-3 if looks else apart < EXACT


@pytest.mark.parametrize("rule", ["token", "block"])
def test_a_row_does_not_notice_what_the_others_do(rule, eager):
    own = setting(rule, vocabulary="crossing", gamma=2)
    texts = prompts(own, 12)
    seeds = list(range(12))

    def output(rows):
        tokens = own.generate([texts[r] for r in rows], [seeds[r] for r in rows], None, 24)
        return dict(zip(rows, tokens.tolist(), strict=True)), last_speculation().reason

    together, reason = output(list(range(12)))
    assert "12 rows" in reason
    assert all(method in reason for method in ("projection", "slrs", "tli"))
    for rows in ([0], [5], [11, 3], [7, 8, 9, 10]):
        assert output(rows)[0].items() <= together.items()
    assert output(list(range(12)))[0] == together


def test_greedy_output_is_the_targets_own():
    target, _ = tiny.taught()
    arguments = {k: v for k, v in tiny.drafters()["slem"].items() if k != "method"}
    statistics = tiny.same(target, tiny.taught_prompts(3, padded=True), arguments, max_new_tokens=24, do_sample=False)
    assert statistics.method == "slem"


# No drafter


LOOP = [5, 9, 2, 7, 11, 3] * 4
PLAIN = list(range(1, 25))


def without_drafter(*texts, **arguments):
    settings = {"do_sample": False, "max_new_tokens": 16, **arguments}
    output = fast_generate(tiny.model(), torch.tensor(texts), **settings)
    return output, last_speculation()


def test_the_measure_of_repetition():
    assert repetition(PLAIN, 3) == (0.0, 0)
    assert repetition([1, 2, 3, 9, 1, 2, 3], 3) == (1 / 5, 1)
    assert repetition([1], 3) == (0.0, 0)


def test_a_prompt_that_repeats_itself_is_looked_up():
    output, statistics = without_drafter(LOOP)
    assert statistics.method == "prompt_lookup"
    assert statistics.drafted > 0
    assert "the prompt repeats itself" in statistics.reason
    assert torch.equal(output, tiny.model().generate(torch.tensor([LOOP]), do_sample=False, max_new_tokens=16))


def test_others_are_decoded_plainly_and_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for texts, more in (([PLAIN], {}), ([LOOP], {"method": "autoregressive"}), ([[3, 4, 3, 4]], {})):
            _, statistics = without_drafter(*texts, **more)
            assert (statistics.method, statistics.rounds) == ("autoregressive", 16)


def test_padding_is_no_repetition():
    text = [0] * 20 + PLAIN[:10]
    mask = torch.tensor([[0] * 20 + [1] * 10])
    _, statistics = without_drafter(text, attention_mask=mask)
    assert statistics.method == "autoregressive"


@pytest.mark.parametrize("rule", ["auto", "token"])
def test_a_row_looks_up_for_its_own_prompt(rule):
    arguments = {"do_sample": True, "top_k": 0, "verification": rule}
    both, statistics = without_drafter(LOOP, PLAIN, seed=[1, 2], **arguments)
    assert statistics.method == "prompt_lookup"
    assert "1 of 2 prompts repeat themselves" in statistics.reason
    for row, text in enumerate((LOOP, PLAIN)):
        alone, _ = without_drafter(text, seed=[row + 1], **arguments)
        assert torch.equal(alone[0], both[row])


def test_a_custom_callable_is_called_as_in_plain_decoding():
    class Own(LogitsProcessor):
        def __call__(self, ids, scores):
            return scores

    _, statistics = without_drafter(LOOP, logits_processor=LogitsProcessorList([Own()]))
    assert statistics.method == "autoregressive"
