"""A pass and the rule behind it as one operation: what the two would say one after the other, bit by bit."""

import copy

import pytest
import torch
from laws import DRAFTER_PIECES, TARGET_PIECES, model, pairs_p_value, tokenizer

from specdec_fast import fast_generate, fused, last_speculation, native
from specdec_fast.lean import LeanModel, lean_model
from specdec_fast.lean_ops import Choosing, Index, Judging, Laws, Session, Told
from specdec_fast.proposal import Proposal
from specdec_fast.randomness import Philox
from specdec_fast.rule import Draws
from specdec_fast.runner import Runner
from specdec_fast.verification import rule_for

pytestmark = pytest.mark.skipif(not native.load_ops(), reason="needs the native ops")

WIDTH, OWN = len(TARGET_PIECES), len(DRAFTER_PIECES)
PROMPT = torch.tensor([[1, 2, 5, 3, 4, 1, 2]])
JUDGE = LeanModel.judge
SAMPLINGS = {
    "greedy": {"do_sample": False},
    "match": {"do_sample": True, "verification": "match", "top_k": 0},
    "token": {"do_sample": True, "verification": "token", "top_k": 0, "temperature": 0.8},
    "block": {"do_sample": True, "verification": "block", "top_k": 0},
    "filtered": {"do_sample": True, "top_k": 9, "top_p": 0.9, "min_p": 0.02, "temperature": 1.2},
}


def parties(kind):
    if kind == "autoregressive":
        return {"method": kind}
    if kind == "model":
        return {"method": kind, "assistant_model": model(WIDTH, 32, sharpness=0.8)}
    names = {"tokenizer": tokenizer(TARGET_PIECES), "assistant_tokenizer": tokenizer(DRAFTER_PIECES)}
    return {"method": kind, "assistant_model": model(OWN, 33, sharpness=0.8), **names}


@pytest.fixture
def judged(monkeypatch):
    """What the operation said, call by call."""
    found = []

    def counted(self, *arguments):
        found.append(JUDGE(self, *arguments))
        return found[-1]

    monkeypatch.setattr(LeanModel, "judge", counted)
    return found


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("kind", ["autoregressive", "model", "tli", "slem"])
def test_the_same_tokens_as_pass_and_rule_apart(kind, sampling, rows, judged, monkeypatch):
    target = model(WIDTH, 31, sharpness=0.8)
    shared = {**SAMPLINGS[sampling], **parties(kind), "seed": 5, "max_new_tokens": 24}
    if kind != "autoregressive":
        shared["num_assistant_tokens"] = 3
    # A row that is padded, and one whose text is another's
    prompt = torch.cat([PROMPT, PROMPT.flip(1), PROMPT])[:rows]
    mask = torch.ones_like(prompt)
    mask[-1, :2] = 0 if rows > 1 else 1
    run = lambda: fast_generate(target, prompt, attention_mask=mask, pad_token_id=0, **shared)  # noqa: E731
    text, counts = run(), last_speculation()
    assert len(judged) == counts.rounds - 1, "but for the prompt's pass"
    judged.clear()
    monkeypatch.setattr(fused.Fused, "judging", lambda *_: None)
    assert torch.equal(run(), text) and not judged
    other = last_speculation()
    assert (other.rounds, other.drafted, other.accepted) == (counts.rounds, counts.drafted, counts.accepted)


@pytest.mark.parametrize("name", ["match", "token", "block"])
@pytest.mark.parametrize("law", ["certain", "whole", "restricted"])
def test_ragged_drafts_with_strange_ids(name, law):
    """Drafts of 3, 0 and 2 tokens, one of which the target has no id for."""
    own = model(WIDTH, 31, sharpness=0.8)
    lean = lean_model(own, rounded=False)
    torch.manual_seed(3)
    counts, texts = [3, 0, 2], [[1, 2, 3], [4], [5, 1]]
    index = {"certain": None, "whole": None, "restricted": torch.arange(0, WIDTH, 2)}[law]
    entries = torch.randint(0, WIDTH // 2, (3, 3))
    tokens = entries if index is None else index[entries]
    told = Told(tokens.tolist())
    if law == "certain":
        told.tokens[2][1] = WIDTH + 5
    else:
        scores = torch.randn(3, 4, WIDTH if index is None else len(index))
        laws = Laws(scores, scores.double().logsumexp(-1))
        told = Told(tokens.tolist(), entries.tolist(), laws, None if index is None else Index(index))
    proposal = Proposal.of_told(told, counts, torch.device("cpu"))
    draws = Draws(Philox(), torch.tensor([7, -3, 2**40]), torch.tensor([3, 1, 2]))
    rule = fused.Fused(rule_for(name, do_sample=True))
    judging = rule.judging(proposal, draws)
    assert judging == Judging(1.0, 0, 1.0, 0.0, ["match", "token", "block"].index(name))
    apart, together = Runner(own, 3, lean=lean), Runner(own, 3, lean=lean)
    for runner in (apart, together):
        runner.read([0, 1, 2], [list(text) for text in texts], [1, 1, 1])
    fed = [[9, *line[:n]] for line, n in zip(told.tokens, counts, strict=True)]
    logits = apart.read([0, 1, 2], fed, [n + 1 for n in counts])
    verdict = rule.verify(logits, proposal, draws)
    said = together.judge([0, 1, 2], [9, 9, 9], told, counts, judging, draws.keys)
    assert (said.accepted, said.token) == (verdict.accepted.tolist(), verdict.token.tolist())
    assert together.length == apart.length == [len(text) + n + 1 for text, n in zip(texts, counts, strict=True)]


def test_scores_that_are_no_law_have_no_next_token():
    own = copy.deepcopy(model(WIDTH, 31, sharpness=0.8))
    lean = lean_model(own, rounded=False)
    runner = Runner(own, 1, lean=lean)
    with torch.no_grad():
        own.lm_head.weight[3] = float("nan")
    for temperature, rule in ((0.0, 0), (1.0, 1), (1.0, 2)):
        said = runner.judge([0], [1], Told([[2]]), [1], Judging(temperature, 0, 1.0, 0.0, rule), ([0], [1]))
        assert (said.accepted, said.token) == ([0], [-1])
        runner.rollback(0, 0)


@pytest.mark.parametrize("change", ["counts", "drafts", "drawn", "scores", "session", "rows"])
def test_arguments_that_do_not_fit_are_an_error(change):
    own = model(WIDTH, 31, sharpness=0.8)
    lean, cache = lean_model(own, rounded=False), Runner(own, 1).caches[0][1]
    given = {
        "session": lean.session(cache, 4).number,
        "first": [1],
        "drafts": [2, 3],
        "counts": [2],
        "rows": [0],
        "columns": [0],
        "hidden": [0],
        "drawn": [2, 3],
        "scores": torch.zeros(1, 2, WIDTH),
        "logsumexp": torch.zeros(1, 2, dtype=torch.float64),
    }
    given |= {
        "counts": {"counts": [-1]},
        "drafts": {"drafts": [2]},
        "drawn": {"drawn": [2]},
        "scores": {"scores": torch.zeros(1, 1, WIDTH), "logsumexp": None},
        "session": {"session": 10**9},
        "rows": {"rows": [4]},
    }[change]
    with pytest.raises(RuntimeError, match="llama"):
        torch.ops.specdec_fast.llama_judge(*given.values(), None, [1], [1], 1.0, 0, 1.0, 0.0, 1)


def test_what_goes_in_without_the_dispatcher_is_what_the_operation_takes(monkeypatch):
    """One call of each kind, once with the entry and once without; and a fault of the entry's is seen."""
    target, entries = model(WIDTH, 31, sharpness=0.8), (Session.judge, Session.draft)

    def written(judge, draft):
        monkeypatch.setattr(Session, "judge", judge)
        monkeypatch.setattr(Session, "draft", draft)
        shared = {"seed": 5, "max_new_tokens": 40, "num_assistant_tokens": 3, "pad_token_id": 0}
        return [
            fast_generate(target, PROMPT.repeat(2, 1), **SAMPLINGS[sampling], **parties(kind), **shared).tolist()
            for kind, sampling in (("model", "block"), ("tli", "filtered"), ("slem", "greedy"))
        ]

    used = []

    def judge(self, *given):
        used.append(entries[0](self, *given))
        return used[-1]

    def faulty(self, numbers, *given):
        seed = 10 + 5 * numbers[1]  # the first row's
        return entries[0](self, [*numbers[:seed], numbers[seed] + 1, *numbers[seed + 1 :]], *given)

    expected = written(judge, entries[1])
    assert used and all(report is not None for report in used)
    assert written(lambda *_: None, lambda *_: None) == expected
    assert written(faulty, entries[1]) != expected


def test_laws_that_somebody_holds_are_not_written_over():
    own = model(WIDTH, 31, sharpness=0.8)
    lean = lean_model(own)
    runner = Runner(own, 1, lean=lean)
    drafts = []
    for position in (3, 9):
        drafts.append(runner.draft([0], [[1, 2]], [4], Choosing(1.0), None, [5], [position]))
        runner.rollback(0, 0)
    first, second = (draft.laws for draft in drafts)
    assert first.room is not second.room
    kept = first.scores.clone()
    del first, drafts
    third = runner.draft([0], [[1, 2]], [4], Choosing(1.0), None, [5], [3]).laws
    assert torch.equal(third.scores[:, :1], kept[:, :1])
    assert third.room is not second.room


# The output's law ------------------------------------------------------------------------------------------------


def p_value(kind, rule, monkeypatch):
    """Of the text of many rows, whose passes all run as the operation."""
    target = model(WIDTH, 31, sharpness=0.8)
    monkeypatch.setattr(lean_model(target, rounded=False), "_most", 1 << 20)
    text = fast_generate(
        target,
        PROMPT,
        do_sample=True,
        top_k=0,
        max_new_tokens=4,
        num_return_sequences=6000,
        num_assistant_tokens=2,
        verification=rule,
        seed=11,
        **parties(kind),
    )
    return pairs_p_value(target, PROMPT, text, WIDTH)


@pytest.mark.parametrize(("kind", "rule"), [("model", "block"), ("tli", "token"), ("slem", "match")])
def test_the_output_has_the_targets_law(kind, rule, monkeypatch, judged):
    assert p_value(kind, rule, monkeypatch) > 1e-4
    assert judged


def fault_law_of_another_token(self, first, told, *rest):
    if told.laws is not None:
        told = told._replace(laws=Laws(told.laws.scores.roll(1, 1), told.laws.logsumexp))
    return JUDGE(self, first, told, *rest)


def fault_one_more_stays(self, first, told, count, *rest):
    said = JUDGE(self, first, told, count, *rest)
    return said._replace(accepted=[min(n + 1, c) for n, c in zip(said.accepted, count, strict=True)])


def fault_numbers_of_the_drafts(self, *arguments):
    """Coins that the drafts were drawn with: a seed of none of the rows' own gives them all one number."""
    *front, seed, position = arguments
    return JUDGE(self, *front, [seed[0]] * len(seed), [position[0]] * len(position))


@pytest.mark.parametrize("fault", [fault_law_of_another_token, fault_one_more_stays, fault_numbers_of_the_drafts])
def test_a_planted_fault_changes_the_law(fault, monkeypatch):
    monkeypatch.setattr(LeanModel, "judge", fault)
    assert p_value("model", "token", monkeypatch) < 1e-6


def test_a_cache_that_another_pass_has_grown_is_read_anew():
    """Passes of the model's own put other buffers in place of those that an operation has seen."""
    own = model(WIDTH, 31, sharpness=0.8)
    lean = lean_model(own, rounded=False)
    mixed, plain = Runner(own, 1, lean=lean), Runner(own, 1)
    long = torch.arange(700).remainder(WIDTH).unsqueeze(0)
    steps = ((torch.tensor([[1, 2]]), 2), (long, 700), (torch.tensor([[3, 1]]), 2))
    for tokens, n in steps:
        one, other = (runner.feed([0], tokens, [n], [1]) for runner in (mixed, plain))
        assert torch.allclose(one, other, atol=1e-4)
    said = mixed.judge([0], [1], Told([[]]), [0], Judging(0.0, 0, 1.0, 0.0, 0), ([0], [0]))
    assert said.token == plain.feed([0], torch.tensor([[1]]), [1], [1]).argmax(-1)[0].tolist()
