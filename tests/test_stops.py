"""Every stop takes effect at the very token where it occurs, inside a block of accepted tokens too."""

import time

import pytest
import torch
from tiny import PAD, VOCABULARY, build_model, drafters, make_noisy, model, noisy, prompts, same, taught, taught_prompts
from transformers import MaxLengthCriteria, StoppingCriteria, StoppingCriteriaList

from specdec_fast import fast_generate, last_speculation

PERFECT = {"num_assistant_tokens": 6}  # whole blocks of seven are accepted


def perfect(architecture="llama"):
    return {"assistant_model": model(architecture), **PERFECT}


def free(target, inputs, tokens=24, **settings):
    return target.generate(**inputs, max_new_tokens=tokens, **settings)[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("place", range(9))
@pytest.mark.parametrize("own", [perfect(), {"assistant_model": noisy()}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_eos_at_every_place_of_a_block(place, own):
    inputs = prompts()
    eos = int(free(model(), inputs)[0, place])
    same(model(), inputs, own, max_new_tokens=24, eos_token_id=eos)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom"])
def test_several_eos_ids(architecture, rows):
    target, inputs = model(architecture), prompts(rows, padded=True)
    text = free(target, inputs)
    eos = [int(text[row, 3 + 4 * row]) for row in range(rows)]
    for own in (perfect(architecture), {"assistant_model": noisy(architecture)}):
        same(target, inputs, own, max_new_tokens=24, eos_token_id=eos)
        same(target, inputs, own, max_new_tokens=24, eos_token_id=eos, pad_token_id=17)


@pytest.mark.parametrize("method", ["model", "tli", "slem", "prompt_lookup"])
def test_eos_with_every_drafter(method):
    target, inputs = taught()[0], taught_prompts(4, padded=True)
    text = free(target, inputs)
    same(target, inputs, drafters()[method], max_new_tokens=24, eos_token_id=[int(text[0, 4]), int(text[2, 9])])


def test_eos_as_the_very_first_token():
    inputs = prompts()
    eos = int(free(model(), inputs)[0, 0])
    same(model(), inputs, perfect(), max_new_tokens=24, eos_token_id=eos)
    assert last_speculation().committed == 1
    rows = prompts(3)
    same(model(), rows, perfect(), max_new_tokens=24, eos_token_id=free(model(), rows)[:, 0].tolist())
    assert last_speculation().committed == 3


def test_eos_without_a_pad_token():
    target = build_model("llama")
    target.generation_config.pad_token_id = None
    inputs = prompts(3)
    eos = int(free(target, inputs, pad_token_id=PAD)[0, 2])
    same(target, inputs, perfect(), max_new_tokens=24, eos_token_id=eos)


@pytest.mark.parametrize("tokens", [1, 2, 6, 7, 8])
def test_max_new_tokens(tokens):
    for rows in (1, 3):
        same(model(), prompts(rows), perfect(), max_new_tokens=tokens)
        assert last_speculation().committed == rows * tokens
        same(model(), prompts(rows), {"assistant_model": noisy()}, max_length=9 + tokens)


def test_lengths_that_generate_refuses_are_refused_with_its_words():
    for settings in ({"max_new_tokens": 0}, {"max_length": 9}, {"max_length": 5}):
        with pytest.raises(ValueError) as theirs:
            model().generate(**prompts(), **settings)
        with pytest.raises(ValueError) as ours:
            fast_generate(model(), **prompts(), **settings, **perfect())
        assert str(ours.value) == str(theirs.value)


def test_the_default_length_is_generates():
    same(model(), prompts(), perfect())


def test_a_length_nobody_will_reach_costs_nothing():
    inputs = prompts(2)
    eos = int(free(model(), inputs)[0, 5])
    expected = free(model(), inputs, 400, eos_token_id=[eos, int(free(model(), inputs)[1, 7])])
    got = fast_generate(
        model(),
        **inputs,
        **perfect(),
        max_new_tokens=1 << 40,
        eos_token_id=[eos, int(free(model(), inputs)[1, 7])],
    )
    assert torch.equal(got[:, 9:], expected)


def test_more_text_than_the_first_buffer_holds():
    same(model(), prompts(2, padded=True), {"assistant_model": noisy(), **PERFECT}, max_new_tokens=290)


@pytest.mark.parametrize("own", [{}, perfect()], ids=["plain", "perfect"])
def test_a_length_criterion_of_the_callers(own):
    for limit in (12, 9, 4):  # plain decoding draws a token before it looks
        criteria = StoppingCriteriaList([MaxLengthCriteria(limit)])
        same(model(), prompts(2), own, max_new_tokens=24, stopping_criteria=criteria)


def test_an_eos_that_is_not_met_and_one_met_by_padding():
    inputs = prompts(3, padded=True)
    same(model(), inputs, perfect(), max_new_tokens=16, eos_token_id=PAD, pad_token_id=PAD)


# Stop strings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("method", ["autoregressive", "perfect", "model", "tli", "slem", "prompt_lookup"])
def test_stop_strings(method, rows):
    target, tokenizer = taught()
    inputs = taught_prompts(rows, padded=True)
    own = {"assistant_model": target, **PERFECT} if method == "perfect" else drafters()[method]
    for stops in (["ever"], [" e", "wer", "horiz"], "counted ei"):
        expected = target.generate(**inputs, max_new_tokens=24, stop_strings=stops, tokenizer=tokenizer)
        got = fast_generate(target, **inputs, max_new_tokens=24, stop_strings=stops, **{"tokenizer": tokenizer, **own})
        assert torch.equal(got, expected)
        if method == "perfect" and rows == 1 and stops != "counted ei":
            assert got.shape[1] < inputs["input_ids"].shape[1] + 24


def test_stop_strings_with_an_eos_pad_the_rows_that_ended():
    target, tokenizer = taught()
    inputs = taught_prompts(4, padded=True)
    eos = int(free(target, inputs)[3, 15])
    settings = {"max_new_tokens": 24, "stop_strings": ["ever", "counted ei"], "eos_token_id": eos}
    expected = target.generate(**inputs, **settings, tokenizer=tokenizer)
    got = fast_generate(target, **inputs, **settings, tokenizer=tokenizer, assistant_model=target, **PERFECT)
    assert torch.equal(got, expected)
    assert (got[:, -1] == tokenizer.pad_token_id).any()


# Criteria of the caller's --------------------------------------------------------------------------------------------


class SumReached(StoppingCriteria):
    """Stateful: adds up what comes and notes every call."""

    def __init__(self, limit):
        self.limit = limit
        self.sums = None
        self.calls = []

    def __call__(self, input_ids, scores, **kwargs):
        self.calls.append((input_ids.tolist(), None if scores is None else len(scores)))
        newest = input_ids[:, -1]
        self.sums = newest.clone() if self.sums is None else self.sums + newest
        return self.sums >= self.limit


@pytest.mark.parametrize("scores", [False, True])
@pytest.mark.parametrize("eos", [None, 54])
@pytest.mark.parametrize("rows", [1, 3])
def test_custom_criteria_are_called_as_in_plain_decoding(rows, eos, scores):
    inputs = prompts(rows, padded=rows > 1)
    settings = {"max_new_tokens": 24, "eos_token_id": eos}
    if scores:
        settings |= {"return_dict_in_generate": True, "output_scores": True}
    for own in (perfect(), {"assistant_model": noisy()}, {"prompt_lookup_num_tokens": 3}):
        theirs, ours = SumReached(300), SumReached(300)
        expected = model().generate(**inputs, stopping_criteria=StoppingCriteriaList([theirs]), **settings)
        got = fast_generate(model(), **inputs, stopping_criteria=StoppingCriteriaList([ours]), **settings, **own)
        if scores:
            got, expected = got.sequences, expected.sequences
        assert torch.equal(got, expected)
        assert ours.calls == theirs.calls


def test_a_criterion_may_answer_with_one_word_for_all_rows():
    class Once(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 14, dtype=torch.bool)

    same(model(), prompts(2), perfect(), max_new_tokens=24, stopping_criteria=StoppingCriteriaList([Once()]))
    assert last_speculation().committed == 10


def test_max_time():
    class Slow(torch.nn.Module):
        def __init__(self, head):
            super().__init__()
            self.head = head

        def forward(self, hidden):
            time.sleep(0.02)
            return self.head(hidden)

    target = make_noisy(model(), 0.0)
    target.lm_head = Slow(target.lm_head)
    for rows in (1, 2):
        begin = time.perf_counter()
        got = fast_generate(target, **prompts(rows), max_time=0.2, max_new_tokens=400, assistant_model=model())
        assert time.perf_counter() - begin < 4
        length = got.shape[1]
        assert 9 < length < 200
        expected = fast_generate(target, **prompts(rows), max_new_tokens=length - 9, assistant_model=model())
        assert torch.equal(got, expected)
    assert fast_generate(target, **prompts(), max_time=0.0, max_new_tokens=400, assistant_model=model()).shape[1] == 10


# Short and long prompts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["autoregressive", "model", "tli", "slem", "prompt_lookup"])
def test_prompts_of_one_token(method):
    target, _ = taught()
    same(target, {"input_ids": torch.tensor([[70]])}, drafters()[method], max_new_tokens=16)
    inputs = {"input_ids": torch.tensor([[PAD, 70], [80, 90]]), "attention_mask": torch.tensor([[0, 1], [1, 1]])}
    same(target, inputs, drafters()[method], max_new_tokens=16)


def test_no_prompt_but_a_bos_token():
    same(model(), {}, perfect(), max_new_tokens=8, bos_token_id=4)


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
@pytest.mark.parametrize("rows", [1, 3])
def test_up_to_the_last_learned_position(architecture, rows):
    """Rows that accept different counts stand at different columns; ignored lanes must not leave the positions."""
    target = model(architecture)
    inputs = prompts(rows, padded=rows > 1, length=100)
    columns = 128 - 100 + 1  # the last token is never fed
    for own in (perfect(architecture), {"assistant_model": noisy(architecture), **PERFECT}):
        same(target, inputs, own, max_new_tokens=columns)
    full = prompts(rows, length=128)
    same(target, full, {"assistant_model": noisy(architecture)}, max_new_tokens=1)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_drafter_with_a_shorter_context_than_the_text(rows):
    for positions in (8, 20, 33):
        drafter = build_model("gpt2", n_positions=positions, seed=3)
        same(model(), prompts(rows, padded=rows > 1, length=24), {"assistant_model": drafter}, max_new_tokens=30)
        assert last_speculation().drafted > 0


@pytest.mark.parametrize("method", ["tli", "slem"])
def test_a_short_drafter_with_another_tokenizer(method):
    target, tokenizer = taught()
    _, own = taught("drafter")
    drafter = build_model("gpt2", n_positions=16, vocabulary=len(own))
    both = {"assistant_model": drafter, "tokenizer": tokenizer, "assistant_tokenizer": own, "method": method}
    same(target, taught_prompts(3, padded=True), both, max_new_tokens=30)
    assert last_speculation().drafted > 0


def test_the_vocabulary_is_used_to_its_end():
    """Ids at both ends of the vocabulary are ordinary tokens."""
    ids = torch.tensor([[VOCABULARY - 1, 0, VOCABULARY - 1, 0, 5]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    same(model(), inputs, {"prompt_lookup_num_tokens": 3}, max_new_tokens=8, pad_token_id=1)


def test_drafts_stay_within_learned_positions_before_an_eos():
    """The caller allows more tokens than the model has positions for, and the text ends in time."""
    small = build_model("gpt2", n_positions=32)
    inputs = {"input_ids": prompts()["input_ids"][:, :9]}
    free = small.generate(**inputs, max_new_tokens=22, do_sample=False)
    eos = int(free[0, 28])
    expected = small.generate(**inputs, max_new_tokens=200, do_sample=False, eos_token_id=eos)
    got = fast_generate(
        small,
        **inputs,
        assistant_model=make_noisy(small, 0.0),
        num_assistant_tokens=12,
        max_new_tokens=200,
        do_sample=False,
        eos_token_id=eos,
    )
    assert torch.equal(got, expected)
