"""A drafter's steps as one native operation: what the loop of single passes writes, token by token and bit by bit."""

import sys
from pathlib import Path

import pytest
import torch
from laws import DRAFTER_PIECES, TARGET_PIECES, Recorder, pairs_p_value, tokenizer, warpers
from laws import model as law_model
from test_lean import FAMILIES, SHAPE, made
from transformers import LogitsProcessorList, MinPLogitsWarper, Qwen2Config, TypicalLogitsWarper

from specdec_fast import dispatch, fast_generate, last_speculation, native
from specdec_fast.costs import Costs, Outlook
from specdec_fast.drafters import model as drafters
from specdec_fast.drafters.model import ModelWriter, SameText
from specdec_fast.lean import LeanModel, lean_model
from specdec_fast.lean_ops import Laws, Session
from specdec_fast.lookahead import Adaptive
from specdec_fast.randomness import Philox
from specdec_fast.rule import Draws
from specdec_fast.runner import Runner

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import profile_round
from profile_round import Profile
from round_overhead import Clock

pytestmark = pytest.mark.skipif(not native.load_ops(), reason="needs the native ops")

TEXTS = ([5, 9, 31], [7, 11, 2, 90, 3, 8], [1])
WARPERS = {
    "argmax": None,
    "plain": warpers(),
    "warm": warpers(0.7),
    "top_k": warpers(1.3, 9),
    "top_p": warpers(0.9, 40, 0.8),
    "min_p": LogitsProcessorList([*warpers(1.7), MinPLogitsWarper(0.05)]),
}
PROMPT = torch.tensor([[1, 2, 5, 3, 4, 1, 2]])


@pytest.fixture
def apart(monkeypatch):
    """A context in which every step is a pass and a choice of its own."""

    def run(function):
        with monkeypatch.context() as patch:
            patch.setattr(drafters, "draws_natively", lambda *_: False)
            patch.setattr(LeanModel, "draft", lambda *_: pytest.fail("not apart"))
            return function()

    return run


@pytest.fixture
def loops(monkeypatch):
    """How many drafts were written by the operation."""
    found = []
    draft = LeanModel.draft

    def counted(self, *arguments):
        found.append(draft(self, *arguments))
        return found[-1]

    monkeypatch.setattr(LeanModel, "draft", counted)
    return found


def draws(rows, start=3):
    return Draws(Philox(), torch.arange(rows) * 7 - 9, torch.arange(rows) * 5 + start)


def writer(model, texts=TEXTS, **settings):
    contexts = [SameText() for _ in texts]
    for context, text in zip(contexts, texts, strict=True):
        context.append(text)
    return ModelWriter(model, contexts, **settings)


def rounds(model, steps, **settings):
    """Two rounds, a text growing by part of its draft in between."""
    made_ = writer(model, **settings)
    rows, results = list(range(len(TEXTS))), []
    for start in (3, 8):
        results.append(made_.write(rows, steps, draws(len(rows), start)))
        for row, (context, count) in enumerate(zip(made_.contexts, results[-1].count, strict=True)):
            context.append([*made_._drafted[row][: min(row + 1, count - 1)], 12])
    return results, made_._runner.length


def sharp():
    """A drafter that is sure of some tokens and of others not."""
    model = made(FAMILIES["llama"])
    with torch.no_grad():
        model.lm_head.weight *= 3
    return model


def same(one, other):
    """Counts, and within them tokens, scores and their sums."""
    assert one.count == other.count
    for r, n in enumerate(one.count):
        assert torch.equal(one.drawn[r, :n], other.drawn[r, :n])
        assert (one.scores is None) == (other.scores is None)
        if one.scores is not None:
            assert torch.equal(one.scores[r, :n], other.scores[r, :n])
            assert torch.equal(one.logsumexp[r, :n], other.logsumexp[r, :n])


@pytest.mark.parametrize("choices", [None, torch.tensor([3, 4, 8, 12, 31, 60, 61, 96])], ids=["whole", "restricted"])
@pytest.mark.parametrize("name", WARPERS)
def test_the_same_drafts(name, choices, apart, loops):
    settings = {"warpers": WARPERS[name], "choices": choices}
    for family, dtype in (("llama", torch.bfloat16), ("mistral_window", torch.float32)):
        model = made(FAMILIES[family], dtype)
        (first, second), length = rounds(model, [5, 2, 4], **settings)
        assert len(loops) == 2
        loops.clear()
        (one, two), other = apart(lambda model=model: rounds(model, [5, 2, 4], **settings))
        same(first, one)
        same(second, two)
        assert length == other
        assert len({tuple(drawn) for drawn in first.drawn.tolist()}) == 3


@pytest.mark.parametrize(("name", "least"), [("argmax", 0.45), ("warm", 0.2)])
def test_drafts_end_where_the_drafter_is_unsure(name, least, apart, loops):
    model = sharp()
    settings = {"warpers": WARPERS[name], "confidence": least}
    (first, second), _ = rounds(model, [6, 6, 3], **settings)
    (one, two), _ = apart(lambda: rounds(model, [6, 6, 3], **settings))
    same(first, one)
    same(second, two)
    assert loops and min(first.count + second.count) < 3 < max(first.count + second.count)


@pytest.mark.parametrize("name", ["argmax", "top_k"])
def test_drafts_end_where_the_lookahead_would_say_so(name, apart, loops):
    """What it is asked behind each token where steps are apart, and what it says beforehand."""
    model = sharp()

    def run():
        lookahead = Adaptive(3, 8, Outlook(Costs((1.0,), step=0.1)), watched=True)
        for row in range(3):
            lookahead.update(row, 6, 2 * row)
        own = writer(model, warpers=WARPERS[name], watcher=lookahead)
        written = own.write([0, 1, 2], [lookahead[row] for row in range(3)], draws(3))
        return written, [lookahead._rows[row].sure for row in range(3)]

    written, sure = run()
    other, told = apart(run)
    same(written, other)
    assert loops and sure == told and [len(steps) for steps in sure] == written.count
    assert any(sure) and len(set(written.count)) > 1


def test_scores_that_are_no_law_are_no_token(apart, loops):
    model = made(FAMILIES["llama"])
    with torch.no_grad():
        model.lm_head.weight[:] = float("nan")
    lean = LeanModel(model, rounded=True)  # a trial would refuse it
    for warp, token in ((None, 0), (warpers(), -1), (warpers(0.9, 5), -1)):
        results = []
        for run in (lambda f: f(), apart):
            own = writer(made(FAMILIES["llama"]), warpers=warp)
            own._runner = Runner(model, 3, lean=lean)
            results.append(run(lambda own=own: own.write([0, 1, 2], [2, 2, 2], draws(3))))
        assert results[0].drawn.tolist() == results[1].drawn.tolist() == [[token] * 2] * 3
    assert len(loops) == 3


def test_texts_of_any_lengths_share_a_pass():
    for rounded, dtype in ((False, torch.float32), (False, torch.bfloat16), (True, torch.float32)):
        model = made(FAMILIES["qwen3"], dtype)
        lean = lean_model(model, rounded=rounded)
        together, apart_ = Runner(model, 3, lean=lean), Runner(model, 3, lean=lean)
        exact = rounded or dtype == torch.bfloat16
        for texts, tail in ((TEXTS, [2, 3, 1]), (([3], [4, 5, 6], [7, 8]), [1, 1, 2])):
            # Without bfloat16 in vectors a pass of many lanes is the model's own, which rounds elsewhere
            exact = exact and (rounded or together.quick([len(text) for text in texts]))
            slack = 0.0 if exact else 1e-5 if dtype == torch.float32 else 0.15
            logits = together.read([0, 1, 2], [list(text) for text in texts], tail)
            assert logits.shape[1] == max(tail)
            for row, text in enumerate(texts):
                alone = apart_.feed([row], torch.tensor([text]), [len(text)], [tail[row]])[0]
                assert torch.allclose(logits[row, : tail[row]].float(), alone.float(), rtol=slack, atol=slack)


def parties(kind):
    if kind == "tli":
        names = {"tokenizer": tokenizer(TARGET_PIECES), "assistant_tokenizer": tokenizer(DRAFTER_PIECES)}
        return {"method": kind, "assistant_model": law_model(len(DRAFTER_PIECES), 33, sharpness=0.8), **names}
    return {"method": kind, "assistant_model": law_model(len(TARGET_PIECES), 32, sharpness=0.8)}


PADDED = {
    "inputs": torch.tensor([[0, 0, 0, 0, 3, 1, 2], [1, 2, 5, 3, 4, 1, 2], [0, 4, 1, 2, 4, 1, 2]]),
    "attention_mask": torch.tensor([[0, 0, 0, 0, 1, 1, 1], [1] * 7, [0] + [1] * 6]),
    "pad_token_id": 0,
    "eos_token_id": 0,
}
CALLS = {
    "greedy": {"do_sample": False},
    "adaptive": {"seed": 4, "num_assistant_tokens": None, "max_new_tokens": 40},
    "top_p": {"temperature": 0.7, "top_p": 0.9},
    "top_k": {"top_k": 3},
    "confidence": {"assistant_confidence_threshold": 0.3},
    "rows that end": {
        "inputs": torch.tensor([[0, 0, 0, 0, 3, 1, 2], [1, 2, 5, 3, 4, 1, 2], [0, 4, 1, 2, 4, 1, 2]]),
        **PADDED,
    },
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", ["model", "tli"])
def test_a_call_gives_the_same_text(kind, call, apart, loops):
    target = law_model(len(TARGET_PIECES), 31, sharpness=0.8)
    settings = {"inputs": PROMPT, "do_sample": True, "top_k": 0, "max_new_tokens": 24, "seed": 5}
    settings |= {"num_assistant_tokens": 3, **parties(kind), **CALLS[call]}

    def run():
        text = fast_generate(target, **settings)
        counts = last_speculation()
        return text, (counts.rounds, counts.drafted, counts.accepted)

    text, counts = run()
    assert loops
    other, others = apart(run)
    assert torch.equal(text, other) and counts == others


def test_what_the_operation_cannot_say_is_written_step_by_step(monkeypatch):
    monkeypatch.setattr(LeanModel, "draft", lambda *_: pytest.fail("not what was asked for"))
    model = made(FAMILIES["llama"])
    unusual = LogitsProcessorList([TypicalLogitsWarper(0.9)])
    assert writer(model, warpers=unusual).write([0, 1, 2], [2, 2, 2], draws(3)).count == [2, 2, 2]
    recorder = Recorder()
    numbers = Draws(recorder, torch.arange(3), torch.arange(3))
    writer(model, warpers=warpers()).write([0, 1, 2], [2, 2, 2], numbers)
    assert len(recorder.keys) == 6
    monkeypatch.setattr(lean_model(model), "_most", 16)  # what the machine can do differs
    long = ([1, 2] * 20, [3], [4])
    writer(model, long, warpers=warpers()).write([0, 1, 2], [2, 2, 2], draws(3))
    monkeypatch.setattr(dispatch, "DEFAULT", "reference")
    writer(model, warpers=warpers()).write([0, 1, 2], [2, 2, 2], draws(3))


@pytest.mark.parametrize("change", ["token", "rows", "columns", "steps", "stops", "choices", "drawn"])
def test_arguments_that_do_not_fit_are_an_error(change):
    model = made(Qwen2Config(**SHAPE))
    lean, cache = lean_model(model), Runner(model, 1).caches[0][1]
    arguments = {"tokens": [1], "lengths": [1], "rows": [0], "columns": [0], "hidden": [0], "steps": [2]}
    rest = {"choices": None, "levels": 0, "stops": []}
    session = lean.session(cache, 4).number
    changed = {
        "token": {"tokens": [5000]},
        "rows": {"rows": [7]},
        "columns": {"columns": [9000]},
        "steps": {"steps": [0]},
        "stops": {"levels": 8, "stops": [0.5]},
        "choices": {"choices": torch.arange(3)},
        "drawn": {"choices": torch.full((97,), 4000)},
    }[change]
    values = {**arguments, **rest, **changed}
    with pytest.raises(RuntimeError, match="llama"):
        torch.ops.specdec_fast.llama_draft(
            session,
            *(values[name] for name in (*arguments, "choices")),
            *([1], [1], 0.0, 0, 1.0, 0.0, 0.0),
            *(values[name] for name in ("levels", "stops")),
        )


# What is drawn has the law it is verified with --------------------------------------------------------------------


def fault_number_of_another_position(self, *arguments):
    *front, position, stops, memory = arguments
    return DRAFT(self, *front, [place + 1 for place in position], stops, memory)


def fault_number_of_the_first_step(self, *arguments):
    """Every step with one number: drafts whose tokens know of one another."""
    texts, places, start, hidden, cache, steps, *rest = arguments
    first = DRAFT(self, texts, places, start, hidden, cache, [1] * len(steps), *rest)
    tokens = [[*text, token] for text, (token,) in zip(texts, first.drawn, strict=True)]
    second = DRAFT(self, tokens, places, start, hidden, cache, [1] * len(steps), *rest)
    drawn = [one + two for one, two in zip(first.drawn, second.drawn, strict=True)]
    laws = Laws(
        *(torch.cat([getattr(one.laws, name) for one in (first, second)], 1) for name in ("scores", "logsumexp"))
    )
    return type(first)(drawn, laws, [2] * len(steps), None)


def fault_law_of_another_step(self, *arguments):
    found = DRAFT(self, *arguments)
    return found._replace(laws=Laws(found.laws.scores.roll(1, 1), found.laws.logsumexp.roll(1, 1)))


def fault_sums_too_large(self, *arguments):
    found = DRAFT(self, *arguments)
    return found._replace(laws=Laws(found.laws.scores, found.laws.logsumexp + 0.2))


DRAFT = LeanModel.draft
GAMMA, WIDTH = 2, len(TARGET_PIECES)


def p_value(kind, rule):
    target = law_model(WIDTH, 31, sharpness=0.8)
    text = fast_generate(
        target,
        PROMPT,
        do_sample=True,
        top_k=0,
        max_new_tokens=4,
        num_return_sequences=6000,
        num_assistant_tokens=GAMMA,
        verification=rule,
        seed=11,
        **parties(kind),
    )
    return pairs_p_value(target, PROMPT, text, WIDTH)


@pytest.mark.parametrize(("kind", "rule"), [("model", "block"), ("tli", "token")])
def test_the_output_has_the_targets_law(kind, rule, loops):
    assert p_value(kind, rule) > 1e-4
    assert loops


@pytest.mark.parametrize("fault", [fault_number_of_the_first_step, fault_law_of_another_step, fault_sums_too_large])
def test_a_planted_fault_changes_the_law(fault, monkeypatch):
    monkeypatch.setattr(LeanModel, "draft", fault)
    assert p_value("model", "token") < 1e-6


@pytest.mark.parametrize("fault", [fault_number_of_another_position, fault_law_of_another_step])
def test_a_planted_fault_is_no_draft_of_the_steps_apart(fault, apart, monkeypatch):
    model = made(FAMILIES["llama"])
    (one, _), _ = apart(lambda: rounds(model, [4, 4, 4], warpers=warpers()))
    monkeypatch.setattr(LeanModel, "draft", fault)
    (first, _), _ = rounds(model, [4, 4, 4], warpers=warpers())
    with pytest.raises(AssertionError):
        same(first, one)


# What the benchmark takes for a pass -----------------------------------------------------------------------------


def test_the_benchmark_counts_choosing_inside_the_operation_as_overhead(monkeypatch):
    """Of an operation that drafts, what it reports of its passes is a forward, and nothing else of it is."""
    clock, reported = Clock(), []
    draft = Session.draft

    def known(*arguments):
        result = draft(*arguments)
        reported.append(result[-1])
        assert reported[-1] > 0
        result[-1] = 1000 * len(reported)
        return result

    monkeypatch.setattr(Session, "draft", known)
    monkeypatch.setattr(clock, "wrap", lambda function: function)
    with clock.running():
        rounds(made(FAMILIES["llama"]), [3, 3, 3], warpers=warpers())
    assert len(reported) == 2
    assert clock.seconds == pytest.approx(3e-6)


def test_a_profile_counts_each_parts_own_time(monkeypatch):
    """Parts inside parts, a draft operation told apart from its passes, and a round for each round there was."""
    profile, now = Profile(), [0.0]
    monkeypatch.setattr(profile_round.time, "perf_counter", lambda: now[0])

    def taking(seconds, *inner):
        def call():
            now[0] += seconds
            return [function() for function in inner] or [2_000_000_000]

        return call

    draft = profile.part(profile_round.CHOOSING, taking(3.0), lambda result: result[-1])
    reading = profile.part(profile_round.TARGET, taking(5.0))
    drafting = profile.part(profile_round.DRAFTING, taking(1.0, draft, reading))
    round_ = profile.part(profile_round.REST, taking(0.5, drafting, reading))
    round_()
    round_()
    own = {name: profile.rounds[1][name] for name in profile_round.PARTS if profile.rounds[1][name]}
    assert own == {"drafter's passes": 7.0, "choosing": 1.0, "rest of drafting": 1.0, "target's pass": 5.0} | {
        "rest of the round": 0.5
    }
    assert len(profile.rounds) == 3 and profile.rounds[1] == profile.rounds[2]


def test_a_warper_that_is_set_to_another_value_is_asked_again(loops, apart):
    model, rows = made(FAMILIES["llama"]), [0, 1, 2]

    def written():
        warping = warpers(0.9)
        ours = writer(model, warpers=warping)
        ours.write(rows, [3, 3, 3], draws(3))
        warping[0].temperature = 0.3
        return ours.write(rows, [3, 3, 3], draws(3, 8))

    together = written()
    assert len(loops) == 2
    same(together, apart(written))
