"""What a target said mends a drafter's scores: natively as the reference says, and without moving the output's law."""

import copy

import pytest
import torch
from laws import DRAFTER_PIECES, TARGET_PIECES, chi_square, joint_law, model, pair_counts, tokenizer, warpers
from test_lean import FAMILIES, made
from transformers import LogitsProcessor, LogitsProcessorList

from specdec_fast import fast_generate, last_speculation, memory, methods, native, reference, trees, warmup
from specdec_fast.cache import RaggedCache, ragged_layers
from specdec_fast.costs import constant_costs
from specdec_fast.drafters.model import ModelWriter
from specdec_fast.lean import LeanModel, lean_model
from specdec_fast.lean_ops import Choices, Choosing, Index, Judging, Laws, Told
from specdec_fast.memory import Memory, mended
from specdec_fast.proposal import Proposal
from specdec_fast.randomness import Philox, Purpose
from specdec_fast.trees import Climbing, Growing, Tree

pytestmark = pytest.mark.skipif(not native.load_ops(), reason="needs the native ops")

WIDTH = len(TARGET_PIECES)
PROMPT = torch.tensor([[1, 2, 5, 3, 4, 1, 2]])
DRAFT = LeanModel.draft
ENTRIES = torch.tensor([3, 4, 8, 12, 31, 60, 61, 96])
NAMES = torch.tensor([1, 5, 9, 10, 33, 70, 71, 90])


def parties(kind):
    if kind == "model":
        return {"method": "model", "assistant_model": model(WIDTH, 32, sharpness=0.8)}
    return {
        "method": "tli",
        "assistant_model": model(len(DRAFTER_PIECES), 33, sharpness=0.8),
        "tokenizer": tokenizer(TARGET_PIECES),
        "assistant_tokenizer": tokenizer(DRAFTER_PIECES),
    }


class Mirror:
    """A drafter without rounding, whose memory is also kept in plain tensors."""

    def __init__(self, rows, restricted):
        self.model = made(FAMILIES["llama"])
        self.entries = ENTRIES if restricted else torch.arange(self.model.config.vocab_size)
        self.names = NAMES if restricted else self.entries
        lean = lean_model(self.model, rounded=False)
        self.lean = lean.restricted(ENTRIES) if restricted else lean
        self.choices = Choices(ENTRIES) if restricted else None
        self.memory = self.lean.memory(rows, NAMES if restricted else None)
        self.caches = RaggedCache(rows, ragged_layers(self.model.config))
        self.kept = [[] for _ in range(rows)]

    @torch.no_grad()
    def place(self, text):
        """Logits and hidden state behind a text."""
        hidden = self.model.base_model(torch.tensor([text])).last_hidden_state[0, -1]
        return self.model.lm_head(hidden)[self.entries], hidden

    def expected(self, row, text, position):
        logits, hidden = self.place(text)
        if not self.kept[row]:
            return logits
        apart, hiddens, positions = zip(*self.kept[row], strict=True)
        return mended(logits, hidden, position, torch.stack(apart), torch.stack(hiddens), positions)

    def keep(self, row, text, position, said):
        logits, hidden = self.place(text)
        self.kept[row].append((said[self.names] - logits, hidden, position))

    def draft(self, texts, steps, position):
        rows, none = list(range(len(texts))), [0] * len(texts)
        return self.lean.draft(
            texts, rows, none, none, self.caches, steps, Choosing(1.0), self.choices, [7] * len(rows), position,
            memory=self.memory,
        )  # fmt: skip

    def ids(self, drawn):
        return self.entries[drawn].tolist()


@pytest.mark.parametrize("restricted", [False, True], ids=["whole", "restricted"])
@pytest.mark.parametrize("heard", ["judge", "hear"])
def test_chains_are_mended_as_the_reference_says(restricted, heard):
    target, mirror = made(FAMILIES["qwen3"]), Mirror(2, restricted)
    scoring, scored = lean_model(target, rounded=False), RaggedCache(2, ragged_layers(target.config))
    texts, changed = [[5, 9, 31, 4], [7, 11, 2, 90, 3, 8, 17]], 0.0
    for _ in range(45):  # more places than there are slots
        position = [100 + len(text) for text in texts]
        written = mirror.draft(texts, [3, 2], position)
        drafts = [mirror.ids(line[:n]) for line, n in zip(written.drawn, written.counts, strict=True)]
        for r, (text, draft) in enumerate(zip(texts, drafts, strict=True)):
            for i in range(len(draft)):
                expected = mirror.expected(r, text + draft[:i], position[r] + i)
                found = written.laws.scores[r, i]
                assert torch.allclose(found - found.mean(), expected - expected.mean(), atol=0.03)
                changed = max(changed, float((expected - mirror.place(text + draft[:i])[0]).std()))
        named = [mirror.names[line[:n]].tolist() for line, n in zip(written.drawn, written.counts, strict=True)]
        width = max(map(len, named))
        with torch.no_grad():
            both = zip(texts, named, strict=True)
            said = [target(torch.tensor([text + line])).logits[0, len(text) - 1 :] for text, line in both]
        if heard == "judge":
            scoring.read([text[:-1] for text in texts], [0, 1], [0, 0], [0, 0], scored, [1, 1])
            told = Told(named, written.drawn, written.laws, Index(NAMES) if restricted else None, mirror.memory)
            first, start = [text[-1] for text in texts], [len(text) - 1 for text in texts]
            where = [0, 1], start, [0, 0], scored
            judging = Judging(1.0, 0, 1.0, 0.0, 2)
            judged = scoring.judge(first, told, written.counts, *where, judging, [7, 7], position)
            accepted, tokens = judged.accepted, judged.token
        else:
            accepted, tokens = [1, 2], [12, 40]
            padded = torch.stack([torch.nn.functional.pad(one, (0, 0, 0, width + 1 - len(one))) for one in said])
            mirror.memory.hear([0, 1], position, accepted, padded)
        for r, n in enumerate(accepted):
            for i in range(min(n, len(drafts[r]) - 1) + 1):  # what follows the last token was not drawn by the drafter
                mirror.keep(r, texts[r] + drafts[r][:i], position[r] + i, said[r][i])
            # The text goes on in the drafter's ids; that they mean the same does not matter here
            texts[r] = [*texts[r], *drafts[r][:n], tokens[r] % 97][-100:]
    assert changed > 0.3 and min(map(len, mirror.kept)) > (memory.SLOTS if heard == "hear" else 30)


def test_trees_are_mended_at_their_nodes():
    target, mirror = made(FAMILIES["llama"]), Mirror(1, False)
    target.lm_head.weight.data += 0.2 * torch.randn(97, 48, generator=torch.Generator().manual_seed(2))
    scoring, scored = lean_model(target, rounded=False), RaggedCache(1, ragged_layers(target.config))
    text, stayed = [5, 9, 31, 4], 0
    growing = Growing(3, 6, [(level + 1) / 13 for level in range(12)], [0.0] * 3)
    for _ in range(20):
        position = [len(text)]
        shape = [0], [0], [0]
        entries, parents, levels, _, passes, _ = trees.branch(
            mirror.lean, [text], *shape, mirror.caches, Choosing(1.0), None, None, [growing], 0.0, [7], position,
            mirror.memory,
        )  # fmt: skip
        scoring.read([text[:-1]], *shape, scored, [1])
        tree = Tree(entries, parents, levels, passes, mirror.memory)
        climbed = trees.climb(
            scoring, [text[-1]], tree, [0], [len(text) - 1], [0], scored, Climbing(1.0, 0, 1.0, 0.0), [7], position
        )
        passed = climbed.passed[0]
        way = [entries[0][node] for node in passed]
        stayed += len(passed)
        with torch.no_grad():
            said = target(torch.tensor([text + way])).logits[0, len(text) - 1 :]
        before, longer = list(mirror.kept[0]), [*text, *way, climbed.token[0]]
        written = mirror.draft([longer], [1], [len(longer)])  # a chain shows what is kept
        found = written.laws.scores[0, 0]
        close = []
        # A node may have been looked behind without a child that was good enough to stay
        inner = sum(node in parents[0] for node in passed)
        for behind in range(inner, len(passed) + 1):
            mirror.kept[0] = list(before)
            for i in range(behind + 1):
                mirror.keep(0, text + way[:i], position[0] + i, said[i])
            expected = mirror.expected(0, longer, len(longer))
            close.append(torch.allclose(found - found.mean(), expected - expected.mean(), atol=0.03))
            if close[-1]:
                break
        assert close[-1]
        text = longer
    assert stayed > 3


def test_what_is_no_number_or_another_place_is_not_kept():
    mirror, text = Mirror(1, False), [5, 9, 31, 4]
    logits = torch.randn(1, 2, 97) * 3
    plain = mirror.draft([text], [1], [4]).laws.scores.clone()
    for position, broken in ((9, 0.0), (4, torch.nan), (4, torch.inf)):
        mirror.draft([text], [1], [4])
        said = logits.clone()
        said[0, 0, 50] += broken
        mirror.memory.hear([0], [position], [0], said)
        assert torch.equal(mirror.draft([text], [1], [4]).laws.scores, plain)
    mirror.memory.hear([0], [4], [0], logits[..., :90])  # a target without some of the entries
    assert torch.equal(mirror.draft([text], [1], [4]).laws.scores, plain)
    mirror.memory.hear([0], [4], [0], logits)
    assert not torch.equal(mirror.draft([text], [1], [4]).laws.scores, plain)


def test_more_is_said_at_once_than_is_kept():
    """The last places stay, by however many threads they are written."""
    found, length = [], memory.SLOTS + 30
    said = 3 * torch.randn(1, length, 97, generator=torch.Generator().manual_seed(3))
    for threads in (1, 2):
        mirror, before = Mirror(1, False), torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            written = mirror.draft([[5]], [length], [1])
            mirror.memory.hear([0], [1], [length - 1], said)
            draft = mirror.ids(written.drawn[0])
            found.append(mirror.draft([[5, *draft[:9]]], [1], [10]).laws.scores[0, 0].clone())
        finally:
            torch.set_num_threads(before)
    for i in range(length):
        mirror.keep(0, [5, *draft[:i]], 1 + i, said[0, i])
    expected = mirror.expected(0, [5, *draft[:9]], 10)
    assert torch.equal(*found)
    assert torch.allclose(found[0] - found[0].mean(), expected - expected.mean(), atol=0.03)


def test_what_bfloat16_cannot_hold_is_not_kept():
    mirror, text = Mirror(1, False), [5, 9, 31, 4]
    plain = mirror.draft([text], [1], [4]).laws.scores.clone()
    said = torch.randn(1, 2, 97)
    said[0, 0, 50] = torch.finfo(torch.float32).min
    mirror.memory.hear([0], [4], [0], said)
    assert torch.equal(mirror.draft([text], [1], [4]).laws.scores, plain)


def test_proposals_of_several_drafters_name_each_memory():
    device, mine = torch.device("cpu"), Memory(4, 48, 97, None)
    one = Proposal.of_told(Told([[1], [2]], memory=mine), [1, 1], device)
    other = Proposal.of_lists([[3]], device)
    assert one.memories() == [([0, 1], mine)] and not other.memories()
    assert Proposal.joined([([0, 2], one), ([1], other)]).memories() == [([0, 2], mine)]


def test_a_memory_of_another_shape_is_an_error_and_no_crash():
    mirror, text = Mirror(1, False), [5, 9, 31, 4]
    for other in (Memory(1, 16, 97, None), Memory(1, 48, 8, None)):
        mirror.memory = other
        with pytest.raises(RuntimeError, match="a memory of another model"):
            mirror.draft([text], [1], [4])
    mirror = Mirror(2, False)
    mirror.memory = Memory(1, 48, 97, None)
    with pytest.raises(RuntimeError, match="no room"):
        mirror.draft([text, text], [1, 1], [4, 4])
    with pytest.raises(RuntimeError, match="index"):
        Memory(1, 48, 2, torch.tensor([-1, 3]))


class Nothing(LogitsProcessor):
    """A processor that nobody knows."""

    def __call__(self, input_ids, scores):
        return scores


# In a call -------------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    """Drafts that a memory took part in."""
    found = []

    def draft(self, *arguments):
        found.append(arguments[-1])
        return DRAFT(self, *arguments)

    monkeypatch.setattr(LeanModel, "draft", draft)
    return found


@pytest.mark.parametrize("tree", ["on", "off"])
@pytest.mark.parametrize("kind", ["model", "tli"])
@pytest.mark.parametrize("rows", [1, 3])
def test_greedy_text_is_the_targets(kind, tree, rows, counted, monkeypatch):
    target = model(WIDTH, 31, sharpness=0.8)
    prompt = torch.cat([PROMPT, PROMPT.flip(1), PROMPT])[:rows]
    shared = {"do_sample": False, "max_new_tokens": 40, "attention_mask": torch.ones_like(prompt), "pad_token_id": 0}
    how = {"num_assistant_tokens": 3, **parties(kind)}
    if tree == "on":
        monkeypatch.setattr(warmup, "constant_costs", lambda *_: constant_costs(10**9, 10**6))  # else nothing pays
        how = {"draft_tree": "on", "seed": 5, **parties(kind)}
        branch = trees.branch
        monkeypatch.setattr(trees, "branch", lambda *given: [counted.append(given[-2]), branch(*given)][1])
    text = fast_generate(target, prompt, draft_memory="on", **how, **shared)
    assert torch.equal(text, target.generate(prompt, **shared))
    assert counted and counted[-1] is not None
    assert tree == "off" or last_speculation().nodes


@pytest.mark.parametrize("kind", ["model", "tli"])
def test_races_give_the_same_text(kind):
    target = model(WIDTH, 31, sharpness=0.8)
    shared = {"do_sample": True, "top_k": 0, "seed": 5, "max_new_tokens": 50, **parties(kind)}
    texts, kept = [], []
    for how in ("auto", "off"):
        texts.append(fast_generate(target, PROMPT, draft_tree="on", draft_memory=how, **shared))
        kept.append(last_speculation().accepted)
    assert torch.equal(*texts) and kept[0] > kept[1]


def p_value(kind, rule, rows=6000, gamma=1, **sampling):
    target = model(WIDTH, 31, sharpness=0.8)
    text = fast_generate(
        target, PROMPT, do_sample=True, max_new_tokens=4, num_return_sequences=rows, verification=rule,
        num_assistant_tokens=gamma, seed=11, draft_memory="on", **parties(kind), **sampling,
    )  # fmt: skip
    law = joint_law(target, PROMPT[0], 4, warpers(**sampling))
    parts = law.sum((2, 3)), law.sum((0, 3)), law.sum((0, 1))
    counts = [pair_counts(text, PROMPT.shape[1] + first, WIDTH) for first in range(3)]
    return min(chi_square(counted, part) for counted, part in zip(counts, parts, strict=True))


@pytest.fixture
def natively(monkeypatch):
    """Batches of any size are judged by the native operation."""
    monkeypatch.setattr(LeanModel, "takes", lambda self, count: [True] * len(count))


@pytest.mark.parametrize("how", ["native", "plain"])
@pytest.mark.parametrize(("kind", "rule"), [("model", "block"), ("tli", "token"), ("tli", "block"), ("model", "token")])
def test_the_output_has_the_targets_law(kind, rule, how, counted, request):
    if how == "native":
        request.getfixturevalue("natively")
    assert p_value(kind, rule) > 1e-4
    assert counted and counted[-1] is not None


@pytest.mark.parametrize("how", ["native", "plain"])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.3, "top_p": 0.9}, {"top_k": 5}], ids=str)
@pytest.mark.parametrize("kind", ["model", "tli"])
def test_longer_drafts_have_it_too(kind, sampling, how, request):
    """Rule block judges drafts of two tokens at once, by laws that were mended at each."""
    if how == "native":
        request.getfixturevalue("natively")
    assert p_value(kind, "block", gamma=2, **sampling) > 1e-4


@pytest.mark.parametrize("law", [Choosing(1.0), Choosing(0.7, 9), Choosing(1.4, 0, 0.8, 0.02)])
def test_a_token_is_drawn_from_the_law_that_is_told(law):
    mirror, texts = Mirror(3, False), [[5, 9, 31, 4], [7, 11, 2], [1]]
    torch.manual_seed(2)
    for _ in range(12):
        position = [len(text) for text in texts]
        none = [0, 0, 0]
        written = mirror.lean.draft(
            texts, [0, 1, 2], none, none, mirror.caches, [4, 1, 3], law, None, [7, 8, 9], position, memory=mirror.memory
        )
        for r, count in enumerate(written.counts):
            for i in range(count):
                u = Philox().uniform(torch.tensor(7 + r), torch.tensor(position[r]), torch.tensor(i), Purpose.DRAFT)
                drawn = reference.draw(reference.masses(written.laws.scores[r, i].unsqueeze(0)), u.reshape(1))
                assert int(drawn) == written.drawn[r][i]
        mirror.memory.hear([0, 1, 2], position, [2, 0, 1], 3 * torch.randn(3, 5, 97))
        texts = [[*text, *line[:1]] for text, line in zip(texts, written.drawn, strict=True)]


@pytest.mark.parametrize(("kind", "how"), [("model", "native"), ("tli", "plain")])
def test_a_law_from_before_it_was_mended_is_found(kind, how, monkeypatch, request):
    if how == "native":
        request.getfixturevalue("natively")

    def draft(self, *arguments):
        own = DRAFT(self, *arguments[:-1], None)
        laws = Laws(own.laws.scores, own.laws.logsumexp)
        return DRAFT(self, *arguments)._replace(laws=laws)

    monkeypatch.setattr(LeanModel, "draft", draft)
    assert p_value(kind, "token", 12000) < 1e-6


def test_a_seed_repeats_whatever_shares_the_batch():
    target = model(WIDTH, 31, sharpness=0.8)
    prompt = torch.cat([PROMPT, PROMPT.flip(1), PROMPT])
    shared = {"do_sample": True, "top_k": 0, "max_new_tokens": 40, "pad_token_id": 0, **parties("tli")}
    shared |= {"num_assistant_tokens": 3, "attention_mask": torch.ones_like(prompt), "draft_memory": "on"}
    text = fast_generate(target, prompt, seed=[5, 6, 7], **shared)
    assert torch.equal(text, fast_generate(target, prompt, seed=[5, 6, 7], **shared))
    shared["attention_mask"] = shared["attention_mask"][:1]
    for row in range(3):
        assert torch.equal(text[row : row + 1], fast_generate(target, prompt[row : row + 1], seed=[5 + row], **shared))


def test_processors_and_recorded_scores_tell_it_too(counted):
    """What an operation judges, and what is judged otherwise, mends the same drafts."""
    target = model(WIDTH, 31, sharpness=0.8)
    shared = {"do_sample": True, "top_k": 0, "seed": 5, "max_new_tokens": 40, "num_assistant_tokens": 3}
    shared |= {"temperature": 0.8, "draft_memory": "on", **parties("tli")}
    text = fast_generate(target, PROMPT, **shared)
    out = fast_generate(target, PROMPT, return_dict_in_generate=True, output_scores=True, **shared)
    assert torch.equal(out.sequences, text)
    assert torch.equal(fast_generate(target, PROMPT, compile="off", **shared), text)
    assert counted and all(kept is not None for kept in counted)


def test_more_is_accepted_where_a_drafter_is_wrong_in_the_same_way():
    """Of a drafter that leans away from one half of the tokens."""
    target = model(WIDTH, 31, sharpness=0.8)
    drafter = copy.deepcopy(target)
    leaning = torch.nn.Linear(16, WIDTH, bias=True)
    leaning.weight.data.copy_(target.lm_head.weight)
    leaning.bias.data.copy_(torch.where(torch.arange(WIDTH) % 2 == 0, 3.0, -3.0))
    drafter.lm_head = leaning
    kept = []
    for how in ("on", "off"):
        fast_generate(
            target, PROMPT.repeat(4, 1), do_sample=True, top_k=0, seed=5, max_new_tokens=50, num_assistant_tokens=3,
            assistant_model=drafter, method="model", draft_memory=how, pad_token_id=0,
            attention_mask=torch.ones(4, PROMPT.shape[1], dtype=torch.long),
        )  # fmt: skip
        kept.append(last_speculation().acceptance_rate)
    assert kept[0] > 1.3 * kept[1]


@pytest.mark.parametrize(
    ("given", "has"),
    [
        ({}, True),
        ({"seed": 5}, False),
        ({"seed": 5, "verification": "token"}, False),
        ({"seed": 5, "draft_memory": "on"}, True),
        ({"do_sample": False}, False),
        ({"do_sample": False, "draft_memory": "on"}, True),
        ({"draft_memory": "off"}, False),
        ({"num_return_sequences": 3}, True),
        ({"num_return_sequences": 3, "budget": 2000}, False),
        ({"num_return_sequences": 3, "budget": 2000, "draft_memory": "on"}, True),
        ({"logits_processor": LogitsProcessorList([Nothing()])}, False),
    ],
)
def test_who_has_one(given, has, counted, monkeypatch):
    """A seed gives the same tokens by every backend, which have none; and an argmax is not worth it."""
    monkeypatch.setattr(methods, "MOST_REMEMBERED", given.get("budget", methods.MOST_REMEMBERED))
    given = {name: value for name, value in given.items() if name != "budget"}
    shared = {"do_sample": True, "top_k": 0, "max_new_tokens": 9, "num_assistant_tokens": 2, **parties("tli"), **given}
    fast_generate(model(WIDTH, 31), PROMPT, **shared)
    assert counted and all((kept is not None) == has for kept in counted)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"draft_memory": "always"}, "'auto', 'on', 'off'"),
        ({"draft_memory": "on", "method": "slem"}, "needs method 'model' or 'tli'"),
    ],
)
def test_what_cannot_be_is_refused(change, why):
    with pytest.raises(ValueError, match="draft_memory") as error:
        fast_generate(model(WIDTH, 31), PROMPT, max_new_tokens=4, **{**parties("tli"), **change})
    assert why in str(error.value)


def test_a_drafter_that_is_not_native_has_none(monkeypatch):
    monkeypatch.setattr("specdec_fast.drafters.model.lean_model", lambda model: None)
    writer = ModelWriter(model(WIDTH, 32), [], warpers=None, remembers=True)
    assert writer.memory is None
    monkeypatch.setattr("specdec_fast.methods.why_not_lean", lambda model: "it is another kind")
    with pytest.raises(ValueError, match="runs natively: it is another kind"):
        fast_generate(model(WIDTH, 31), PROMPT, max_new_tokens=4, draft_memory="on", **parties("tli"))
