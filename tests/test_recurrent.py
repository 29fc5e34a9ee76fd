"""Models whose layers keep a state: rolled back by going on from older states, and read several tokens at once."""

import copy
import random

import pytest
import torch
import transformers
from tiny import PAD, RECURRENT, VOCABULARY, build_model, model, prompts
from transformers.models.qwen3_5 import modeling_qwen3_5

from specdec_fast import fast_generate, methods, recurrent, trial, warmup
from specdec_fast.cache import cache_argument, cache_of
from specdec_fast.recurrent import REPLAYED, RecurrentRunner, why_not_recurrent
from specdec_fast.states import Row


def known(architecture):
    if not cache_argument(type(model(architecture))):
        pytest.skip("needs a Transformers whose Mamba-2 takes a cache: before, its forward takes cache_params alone")
    return model(architecture)


# What a runner gives ------------------------------------------------------------------------------------------------


def walk(target, rows, *, padded, moves=40, seed=0, runner=RecurrentRunner, **settings):
    """Feeds and rolls back at random; the largest difference to plain passes over the same texts."""
    dice = random.Random(seed)
    inputs = prompts(rows, padded=padded, length=12)
    ids, visible = inputs["input_ids"], inputs["attention_mask"].bool()
    runner = runner(target, rows, visible=visible, **settings)
    texts, worst = ids.tolist(), 0.0
    runner.feed(range(rows), ids, [12] * rows, [1] * rows)
    for _ in range(moves):
        some = sorted(dice.sample(range(rows), dice.randint(1, rows)))
        for row in some:
            length = max(len(texts[row]) - dice.choice([0, 0, 1, 2, 3, 5, 30]), 12)
            del texts[row][length:]
            runner.rollback(row, length)
        count = [dice.choice([1, 1, 2, 3, 5, 20]) for _ in some]
        tail = [1] * len(some) if dice.random() < 0.4 else [dice.randint(1, n) for n in count]
        new = [[dice.randrange(1, VOCABULARY) for _ in range(n)] for n in count]
        tokens = torch.tensor([line + [PAD] * (max(count) - len(line)) for line in new])
        got = runner.feed(some, tokens, count, tail)
        for r, row in enumerate(some):
            texts[row] += new[r]
            hidden = int((~visible[row]).sum())
            with torch.no_grad():
                plain = target(input_ids=torch.tensor([texts[row][hidden:]]), use_cache=False).logits[0, -tail[r] :]
            worst = max(worst, float((plain - got[r, : tail[r]]).abs().max()))
        for row in runner.own:
            assert len(row.marks) <= 40
    return worst


@pytest.mark.parametrize("joint", [True, False], ids=["joint", "alone"])
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "level"])
@pytest.mark.parametrize("architecture", RECURRENT)
def test_a_row_gives_what_plain_passes_over_its_text_give(architecture, padded, joint):
    assert walk(known(architecture), 3, joint=joint, padded=padded) < 1e-3


def forgets(self, length):
    """A row that is rolled back keeps what it has taken in."""
    self.stands = min(self.stands, length)
    return []


def skips(self, length, own=Row.go_back):
    """What was accepted behind the older state is not read again."""
    own(self, length)
    self.stands = min(self.stands, length)
    return []


@pytest.mark.parametrize("fault", [forgets, skips])
@pytest.mark.parametrize("architecture", ["lfm2", "qwen3_5", "falcon_h1"])
def test_a_state_that_is_not_rolled_back_is_found(architecture, fault, monkeypatch):
    monkeypatch.setattr(Row, "go_back", fault)
    assert walk(model(architecture), 3, joint=True, padded=False) > 0.05


def test_what_is_fed_again_stays_short(passes):
    """However many rounds reject something: at most so many tokens stand in front of a draft."""
    runner = RecurrentRunner(model("lfm2"), 1)
    runner.feed([0], torch.ones((1, 100), dtype=torch.long), [100], [5])
    assert passes == [[95], [5]]  # what is certain first, so that a rejection does not cost the prompt
    del passes[:]
    for length in range(96, 196):
        runner.rollback(0, length)
        runner.feed([0], torch.ones((1, 5), dtype=torch.long), [5], [5])
    assert max(max(line) for line in passes) == REPLAYED + 5 and 100 < len(passes) < 100 * (1 + 1.5 / REPLAYED)
    assert len(runner.own[0].marks) <= 5


def test_rows_are_brought_forward_together(passes):
    """Rows that keep different numbers of tokens: what they read again costs by rows, so it is shorter, and one pass a
    few rounds brings several of them forward."""
    dice, kept = random.Random(0), [20] * 4
    runner = RecurrentRunner(model("lfm2"), 4, joint=True)
    runner.feed(range(4), torch.ones((4, 20), dtype=torch.long), [20] * 4, [1] * 4)
    del passes[:]
    for _ in range(60):
        for row in range(4):
            runner.rollback(row, kept[row])
        runner.feed(range(4), torch.ones((4, 5), dtype=torch.long), [5] * 4, [5] * 4)
        kept = [length + dice.choice([1, 2, 4]) for length in kept]
    most = REPLAYED // 2
    assert runner.again == most // 2
    assert 60 < len(passes) < 60 + 60 // 2
    assert max(len(line) for line in passes) == 4 and max(map(max, passes)) <= most + 5


def test_costs_are_those_of_passes_that_read_something_again(passes):
    target, texts = model("lfm2"), [[row + 1] * 40 for row in range(4)]
    assert recurrent._found(target).joint
    del passes[:]
    drafter = methods.NoDrafter(torch.device("cpu"))
    warmup.measure(lambda: RecurrentRunner(target, 4), drafter, texts, torch.device("cpu"), budget=1e9)
    again = REPLAYED // 4
    assert passes[0] == [40 - again] * 4
    assert {line[0] for line in passes[1:]} == {1, *(size + again for size in warmup.SIZES)}


def test_a_drafters_steps_are_undone_without_reading_again(passes):
    runner = RecurrentRunner(model("qwen3_5"), 1)
    runner.feed([0], torch.ones((1, 50), dtype=torch.long), [50], [1])
    for length in range(50, 80):
        runner.rollback(0, length)
        del passes[:]
        for _ in range(6):
            runner.feed([0], torch.ones((1, 1), dtype=torch.long), [1], [1])
        assert passes == [[1]] * 6
        assert len(runner.own[0].marks) <= 12


@pytest.fixture
def passes(monkeypatch):
    """The lengths of the texts that rows read, pass by pass."""
    found, own = [], RecurrentRunner._pass

    def counted(self, rows, texts, tail, embeds):
        found.append([len(text) for text in texts])
        return own(self, rows, texts, tail, embeds)

    monkeypatch.setattr(RecurrentRunner, "_pass", counted)
    return found


def test_equal_prompts_are_read_once(passes):
    target, ids = model("qwen3_5"), prompts(2, length=40)["input_ids"].repeat_interleave(3, 0)
    mask = torch.ones_like(ids).bool()
    mask[1, :3] = False  # the same ids, and another text
    mask[3:, :5] = False
    assert recurrent._found(target).joint  # the trial has passes, too
    for visible, expected in ((None, [[39] * 2, [1] * 6]), (mask, [[39], [36], [34], [1] * 6])):
        del passes[:]
        got = RecurrentRunner(target, 6, visible=visible).feed(range(6), ids, [40] * 6, [1] * 6)[:, 0]
        assert sorted(passes, key=len) == expected
        for row in range(6):
            text = ids[row : row + 1] if visible is None else ids[row : row + 1, visible[row]]
            with torch.no_grad():
                assert torch.allclose(got[row], target(input_ids=text).logits[0, -1], atol=1e-4)


def test_rows_share_a_pass_where_a_draft_is_scored(passes):
    runner = RecurrentRunner(model("qwen3_5"), 3, joint=True)
    runner.feed([0, 1, 2], torch.ones((3, 20), dtype=torch.long), [20, 18, 20], [1, 1, 1])
    del passes[:]
    runner.feed([0, 1, 2], torch.ones((3, 5), dtype=torch.long), [5, 1, 3], [5, 1, 3])
    runner.feed([0, 2], torch.ones((2, 1), dtype=torch.long), [1, 1], [1, 1])
    assert passes == [[5, 1, 3], [1], [4]]  # the last row lost what its text was filled up with


def test_text_that_changes_a_little_behind_is_not_read_anew(passes):
    runner = RecurrentRunner(model("lfm2"), 1)
    runner.feed([0], torch.ones((1, 500), dtype=torch.long), [500], [1])
    length = 500
    for turn in range(60):
        runner.rollback(0, length - (6 if turn % 7 == 6 else 0))
        runner.feed([0], torch.ones((1, 3), dtype=torch.long), [3], [3])
        length = runner.length[0]
        assert len(runner.own[0].marks) <= 8
    assert max(max(line) for line in passes[1:]) < 32


def test_few_states_are_kept_of_a_long_draft_and_of_short_pieces():
    runner = RecurrentRunner(model("lfm2"), 1, prefill_chunk=1)
    runner.feed([0], torch.ones((1, 400), dtype=torch.long), [400], [1])
    assert len(runner.own[0].marks) < 80
    runner.rollback(0, 400)
    for _ in range(160):
        runner.feed([0], torch.ones((1, 1), dtype=torch.long), [1], [1])
    assert len(runner.own[0].marks) < 45


def test_a_given_text_is_no_place_to_go_back_to():
    target = model("lfm2")
    given = cache_of(target.generate(**prompts(1), max_new_tokens=4, return_dict_in_generate=True))
    runner = RecurrentRunner(target, 1)
    runner.load(given, 12)
    runner.feed([0], torch.ones((1, 9), dtype=torch.long), [9], [9])
    runner.rollback(0, 12)
    runner.feed([0], torch.ones((1, 1), dtype=torch.long), [1], [1])
    runner.rollback(0, 11)
    with pytest.raises(RuntimeError, match="given as a cache"):
        runner.feed([0], torch.ones((1, 1), dtype=torch.long), [1], [1])


# Which models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", RECURRENT)
def test_which_models_go_on_from_their_states(architecture):
    target = known(architecture)
    assert why_not_recurrent(target) is None
    assert recurrent._found(target).joint


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": VOCABULARY, "state_size": 8}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Mamba", SMALL),
        ("FalconMamba", SMALL),
        ("Jamba", {**SMALL, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}),
    ],
)
def test_models_that_read_several_tokens_without_their_state_are_refused(name, settings):
    more = {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False} if name == "Jamba" else {}
    config = getattr(transformers, f"{name}Config")(**settings, **more)
    target = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ValueError, match=r"^model: .*recurrent state.*rolled back.*Use model\.generate"):
        fast_generate(target, torch.ones((1, 4), dtype=torch.long), max_new_tokens=2)


def test_a_part_of_the_state_that_is_not_read_is_found(monkeypatch):
    """However little it would change: a tolerance for rounding does not tell."""
    rule = modeling_qwen3_5.torch_chunk_gated_delta_rule

    def blind(*arguments, initial_state=None, **more):
        return rule(*arguments, initial_state=None, **more)

    monkeypatch.setattr(trial, "EXACT", 1e9)
    assert why_not_recurrent(copy.deepcopy(model("qwen3_5"))) is None
    monkeypatch.setattr(modeling_qwen3_5, "torch_chunk_gated_delta_rule", blind)
    assert "without a part of its state" in why_not_recurrent(copy.deepcopy(model("qwen3_5")))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_steps_that_are_clamped_for_several_tokens_alone_are_refused(precision):
    """Transformers' Mamba-2 layers keep ``time_step_limit`` in passes over several tokens and not in single ones."""
    target = build_model("granite")
    mixer = target.model.layers[0].mamba
    assert mixer.time_step_limit == (0.0, float("inf"))
    mixer.time_step_limit = (0.5, float("inf"))
    assert why_not_recurrent(target.to(precision)) is not None


def test_half_precision_hides_no_state():
    """What a part of the state changes may be too little for bfloat16."""
    for seed in range(6):
        assert why_not_recurrent(build_model("qwen3_5", seed=seed).to(torch.bfloat16)) is None


def test_what_says_nothing_of_a_model_is_not_remembered(monkeypatch):
    target, forward = copy.deepcopy(model("lfm2")), RecurrentRunner._model_forward

    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(RecurrentRunner, "_model_forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        why_not_recurrent(target)
    monkeypatch.setattr(RecurrentRunner, "_model_forward", forward)
    assert why_not_recurrent(target) is None
    target.model.layers[0].register_forward_hook(
        lambda module, inputs, output: output + torch.rand(()) * module.training
    )
    assert why_not_recurrent(target.train()) is not None
    assert why_not_recurrent(target.eval()) is None


@pytest.mark.parametrize("hidden", [slice(-2, None), slice(None)], ids=["right", "all"])
def test_padding_that_a_state_would_take_in_is_refused(hidden):
    inputs = prompts(2)
    inputs["attention_mask"][0, hidden] = 0
    with pytest.raises(ValueError, match=r"^attention_mask: .*on the left"):
        fast_generate(model("lfm2"), **inputs, max_new_tokens=4)
