"""Sampling and logits processors: the same draws as plain decoding, the same scores as ``generate``."""

import warnings

import pytest
import torch
from tiny import PAD, VOCABULARY, drafters, make_noisy, model, noisy, prompts, same, taught, taught_prompts
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
)

from specdec_fast import fast_generate, last_speculation

DRAFTERS = ("model", "tli", "slem", "prompt_lookup")
MANNERS = {
    "plain": {"top_k": 0},
    "nucleus": {"temperature": 0.7, "top_p": 0.9, "top_k": 0},
    "top_k": {"temperature": 1.3, "top_k": 12},
    "min_p": {"min_p": 0.05, "top_k": 0},
    "penalty": {"repetition_penalty": 1.3, "temperature": 0.9},
}


def sampled(target, inputs, own, **settings):
    return fast_generate(target, **inputs, **own, **{"do_sample": True, "seed": 7, "max_new_tokens": 24, **settings})


# Rule match draws what plain decoding draws --------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("method", DRAFTERS)
def test_match_repeats_plain_decoding(method, rows):
    target, _ = taught()
    inputs = taught_prompts(rows, padded=True)
    plain = sampled(target, inputs, {}, temperature=0.7, top_p=0.9)
    got = sampled(target, inputs, {**drafters()[method], "verification": "match"}, temperature=0.7, top_p=0.9)
    assert torch.equal(got, plain)
    assert last_speculation().verification == "match"
    assert 0 < last_speculation().accepted + (method == "prompt_lookup") < last_speculation().drafted


@pytest.mark.parametrize("manner", MANNERS)
@pytest.mark.parametrize("architecture", ["llama", "bloom"])
def test_match_repeats_plain_decoding_in_every_manner(architecture, manner):
    target, inputs = model(architecture), prompts(3, padded=True)
    plain = sampled(target, inputs, {}, **MANNERS[manner])
    options = {"assistant_model": noisy(architecture), "verification": "match", "num_assistant_tokens": 5}
    assert torch.equal(sampled(target, inputs, options, **MANNERS[manner]), plain)
    assert last_speculation().accepted > 0


@pytest.mark.parametrize("rule", ["match", "token", "block"])
def test_sampled_results_repeat_and_depend_on_the_seed(rule):
    options = {"assistant_model": noisy(), "verification": rule}
    first = sampled(model(), prompts(2), options)
    assert torch.equal(sampled(model(), prompts(2), options), first)
    assert not torch.equal(sampled(model(), prompts(2), options, seed=8), first)
    torch.manual_seed(3)
    free = sampled(model(), prompts(2), options, seed=None)
    assert not torch.equal(sampled(model(), prompts(2), options, seed=None), free)
    torch.manual_seed(3)
    assert torch.equal(sampled(model(), prompts(2), options, seed=None), free)


@pytest.mark.parametrize("method", DRAFTERS)
@pytest.mark.parametrize("rule", ["match", "token", "block"])
def test_a_row_does_not_depend_on_batch_slot_or_padding(method, rule):
    target, _ = taught()
    options = {**drafters()[method], "verification": rule, "temperature": 0.8}
    inputs = taught_prompts(3, padded=True)
    together = sampled(target, inputs, options, seed=[5, 6, 7])
    columns = inputs["input_ids"].shape[1]
    for row in range(3):
        shown = inputs["attention_mask"][row].bool()
        alone = {name: tensor[row : row + 1, shown] for name, tensor in inputs.items()}
        single = sampled(target, alone, options, seed=[5 + row])
        assert single[0, shown.sum() :].tolist() == together[row, columns:].tolist()
    backwards = {name: tensor.flip(0) for name, tensor in inputs.items()}
    assert torch.equal(sampled(target, backwards, options, seed=[7, 6, 5]).flip(0), together)


def test_num_return_sequences_gives_each_its_own_draws():
    options = {"assistant_model": noisy()}
    inputs = prompts(2)
    got = sampled(model(), inputs, options, num_return_sequences=3)
    assert got.shape[0] == 6
    assert len({tuple(row) for row in got.tolist()}) == 6
    repeated = {name: tensor.repeat_interleave(3, 0) for name, tensor in inputs.items()}
    assert torch.equal(sampled(model(), repeated, options), got)
    listed = sampled(model(), inputs, options, num_return_sequences=3, seed=[1, 2, 3, 4, 5, 6])
    assert torch.equal(sampled(model(), repeated, options, seed=[1, 2, 3, 4, 5, 6]), listed)
    with pytest.raises(ValueError, match="6 needed, 2 given"):
        sampled(model(), inputs, options, num_return_sequences=3, seed=[1, 2])


@pytest.mark.parametrize("rule", ["match", "token", "block"])
@pytest.mark.parametrize("method", DRAFTERS)
def test_filters_hold_under_speculation(method, rule):
    """A token that the target's filters forbid never comes out, whoever proposed it."""
    target, _ = taught()
    output = sampled(
        target,
        taught_prompts(3),
        {**drafters()[method], "verification": rule, "assistant_temperature": 1.5},
        top_k=3,
        return_dict_in_generate=True,
        output_scores=True,
    )
    chosen = output.sequences[:, -len(output.scores) :]
    for step, scores in enumerate(output.scores):
        assert (scores.isfinite().sum(-1) <= 3).all()
        assert scores.gather(1, chosen[:, step : step + 1]).isfinite().all()


def test_near_zero_temperature_is_greedy():
    greedy = fast_generate(model(), **prompts(2), max_new_tokens=16)
    for rule in ("match", "token", "block"):
        got = sampled(
            model(), prompts(2), {"assistant_model": noisy(), "verification": rule}, temperature=1e-4, max_new_tokens=16
        )
        assert torch.equal(got, greedy)


def test_the_law_of_the_first_token_is_the_targets():
    """Coarse, end to end: frequencies of 3000 draws against softmax, for a drafter that is far off."""
    target = model()
    drafter = make_noisy(target, 0.6)
    inputs = {name: tensor.repeat(3000, 1) for name, tensor in prompts(1, length=5).items()}
    p = target(**prompts(1, length=5)).logits[0, -1].softmax(-1)
    for rule in ("match", "token", "block"):
        got = fast_generate(
            target,
            **inputs,
            assistant_model=drafter,
            verification=rule,
            do_sample=True,
            top_k=0,
            seed=1,
            max_new_tokens=2,
            num_assistant_tokens=1,
        )
        counts = torch.bincount(got[:, 5], minlength=VOCABULARY)
        spread = (3000 * p * (1 - p)).sqrt() + 1
        assert ((counts - 3000 * p).abs() < 5 * spread).all()


# Processors ----------------------------------------------------------------------------------------------------------

PROCESSORS = {
    "repetition_penalty": {"repetition_penalty": 1.4},
    "no_repeat_ngram": {"no_repeat_ngram_size": 2},
    "bad_words": {"bad_words_ids": [[5], [6, 7], [40, 54]]},
    "sequence_bias": {"sequence_bias": [[[5], -3.0], [[40, 54], -9.0], [[31], 2.0]]},
    "min_length": {"min_length": 20, "eos_token_id": [54, 40, 14]},
    "min_new_tokens": {"min_new_tokens": 9, "eos_token_id": [54, 40, 14]},
    "forced_eos": {"forced_eos_token_id": 3, "eos_token_id": 3},
    "forced_bos": {"forced_bos_token_id": 4},
    "suppress": {"suppress_tokens": [54, 40, 1]},
    "begin_suppress": {"begin_suppress_tokens": list(range(40, 60))},
    "exponential_decay": {"exponential_decay_length_penalty": (5, 1.6), "eos_token_id": 3},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.5},
    "encoder_no_repeat_ngram": {"encoder_no_repeat_ngram_size": 2},
    "prefix_fn": {"prefix_allowed_tokens_fn": lambda row, ids: range(1 + (len(ids) + row) % 3, VOCABULARY, 3)},
    "watermark": {"watermarking_config": WatermarkingConfig(bias=4.0, seeding_scheme="selfhash", context_width=2)},
    "synth_id": {"watermarking_config": SynthIDTextWatermarkingConfig(keys=[3, 1, 4], ngram_len=3)},
    "renormalize": {"renormalize_logits": True, "remove_invalid_values": True},
    "several": {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "suppress_tokens": [1], "min_new_tokens": 4},
}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", PROCESSORS)
def test_processors_greedy(name, rows):
    inputs = prompts(rows, padded=rows > 1)
    for own in (
        {"assistant_model": noisy(), "num_assistant_tokens": 4},
        {"prompt_lookup_num_tokens": 3},
    ):
        statistics = same(model(), inputs, own, max_new_tokens=18, **PROCESSORS[name])
        assert statistics.drafted > 0


@pytest.mark.parametrize("method", DRAFTERS)
@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.4, "no_repeat_ngram_size": 3},
        {"bad_words_ids": [[60], [61, 62]], "suppress_tokens": [70, 71], "min_new_tokens": 20, "eos_token_id": 33},
        {"prefix_allowed_tokens_fn": lambda row, ids: range(len(ids) % 2, 420, 2)},
    ],
    ids=["prefix", "words", "in order"],
)
def test_processors_with_every_drafter(method, settings):
    same(taught()[0], taught_prompts(3, padded=True), drafters()[method], max_new_tokens=24, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"typical_p": 0.8},
        {"epsilon_cutoff": 0.02},
        {"eta_cutoff": 0.02},
        {"top_h": 0.5},
        {"min_p": 0.1, "temperature": 1.5},
        {"top_k": 5, "top_p": 0.8, "temperature": 0.6},
        {"watermarking_config": WatermarkingConfig(bias=2.0)},
        {"no_repeat_ngram_size": 2},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_warpers_sampled(settings):
    """The scores are ``generate``'s own for the same text, and the draws are those of plain decoding."""
    target, inputs = model(), prompts(2, padded=True)
    settings = {"top_k": 0, **settings, "return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 12}
    plain = sampled(target, inputs, {}, **settings)
    for rule in ("match", "token"):
        got = sampled(target, inputs, {"assistant_model": noisy(), "verification": rule}, **settings)
        if rule == "match":
            assert torch.equal(got.sequences, plain.sequences)
        replay = Replay(got.sequences)
        expected = target.generate(
            **inputs, do_sample=True, **settings, logits_processor=LogitsProcessorList([]), stopping_criteria=[replay]
        )
        # `generate` drew tokens of its own; up to the first difference the text, and so the scores, are the same
        for step in range(12):
            columns = inputs["input_ids"].shape[1] + step
            alike = (expected.sequences[:, :columns] == got.sequences[:, :columns]).all(1)
            ours, theirs = got.scores[step][alike], expected.scores[step][alike]
            assert torch.equal(ours.isneginf(), theirs.isneginf())
            torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3)


class Replay:
    """A criterion that writes the given text over what was drawn, so that both runs see the same prefixes."""

    def __init__(self, sequences):
        self.sequences = sequences

    def __call__(self, input_ids, scores, **kwargs):
        input_ids[:, -1] = self.sequences[:, input_ids.shape[1] - 1]
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class Stateless(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores.roll(1, -1) - 0.01 * input_ids[:, -1:]


class Witness(LogitsProcessor):
    """Notes what it is called with; forbids every token that is 2 modulo the number of calls so far modulo 3."""

    def __init__(self):
        self.calls = []

    def __call__(self, input_ids, scores):
        self.calls.append(input_ids.tolist())
        banned = torch.arange(scores.shape[-1]) % 3 == len(self.calls) % 3
        return scores.masked_fill(banned, -torch.inf)


class Brackets(LogitsProcessor):
    """A toy grammar with a state of its own: advances by the newest token of each row, forbids closing what is shut."""

    OPEN, CLOSE = 4, 5

    def __init__(self):
        self.depth = None
        self.length = None

    def __call__(self, input_ids, scores):
        if self.depth is None:
            self.depth = [0] * input_ids.shape[0]
        else:
            assert input_ids.shape[1] == self.length + 1, "called twice for a position, or one was left out"
            for row, token in enumerate(input_ids[:, -1].tolist()):
                self.depth[row] += (token == self.OPEN) - (token == self.CLOSE)
        self.length = input_ids.shape[1]
        scores = scores.clone()
        scores[:, self.OPEN] += 4
        scores[:, self.CLOSE] += 4
        for row, depth in enumerate(self.depth):
            scores[row, self.CLOSE if depth == 0 else PAD] = -torch.inf
            if depth >= 2:
                scores[row, self.OPEN] = -torch.inf
        return scores


@pytest.mark.parametrize("kind", [Stateless, Witness, Brackets])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("drafter", ["perfect", "noisy", "prompt_lookup"])
def test_custom_processors_are_called_as_in_plain_decoding(kind, rows, drafter):
    inputs = prompts(rows, padded=rows > 1)
    own = {
        "perfect": {"assistant_model": model()},
        "noisy": {"assistant_model": noisy()},
        "prompt_lookup": {"prompt_lookup_num_tokens": 3},
    }[drafter]
    theirs, ours = kind(), kind()
    expected = model().generate(**inputs, logits_processor=LogitsProcessorList([theirs]), max_new_tokens=16)
    got = fast_generate(model(), **inputs, logits_processor=LogitsProcessorList([ours]), max_new_tokens=16, **own)
    assert torch.equal(got, expected)
    assert vars(ours) == vars(theirs)


@pytest.mark.parametrize("kind", [Stateless, Witness, Brackets])
def test_custom_processors_sampled(kind):
    settings = {"temperature": 0.8, "max_new_tokens": 16}
    plain = sampled(model(), prompts(3, padded=True), {"logits_processor": [kind()]}, **settings)
    own = {"assistant_model": noisy(), "verification": "match", "logits_processor": [kind()]}
    assert torch.equal(sampled(model(), prompts(3, padded=True), own, **settings), plain)
    # Rule token draws other tokens, from the same law: here only that it obeys
    own = {"assistant_model": noisy(), "verification": "token", "logits_processor": [Brackets()]}
    text = sampled(model(), prompts(3, padded=True), own, **settings)[:, 9:]
    depth = ((text == Brackets.OPEN).long() - (text == Brackets.CLOSE).long()).cumsum(1)
    assert depth.min() >= 0
    assert depth.max() <= 2


def test_custom_processors_with_rows_that_end_early():
    inputs = prompts(3, padded=True)
    free = model().generate(**inputs, logits_processor=[Witness()], max_new_tokens=16)
    stop = [int(free[0, 12]), int(free[1, 15])]
    theirs, ours = Witness(), Witness()
    settings = {"max_new_tokens": 16, "eos_token_id": stop, "return_dict_in_generate": True, "output_scores": True}
    expected = model().generate(**inputs, logits_processor=[theirs], **settings)
    got = fast_generate(model(), **inputs, logits_processor=[ours], **settings, assistant_model=noisy())
    assert torch.equal(got.sequences, expected.sequences)
    assert ours.calls == theirs.calls
    for mine, other in zip(got.scores, expected.scores, strict=True):
        torch.testing.assert_close(mine, other, atol=2e-4, rtol=1e-3)


def test_a_subclass_of_a_known_processor_is_custom():
    from transformers import SuppressTokensLogitsProcessor

    class Odd(SuppressTokensLogitsProcessor):
        calls = 0

        def __call__(self, input_ids, scores):
            self.calls += 1
            return super().__call__(input_ids, scores) - (torch.arange(scores.shape[-1]) == self.calls) * 99.0

    def make():
        return LogitsProcessorList([Odd([1, 2], device="cpu")])

    expected = model().generate(**prompts(2), logits_processor=make(), max_new_tokens=12)
    got = fast_generate(model(), **prompts(2), logits_processor=make(), max_new_tokens=12, assistant_model=noisy())
    assert torch.equal(got, expected)


@pytest.mark.parametrize("method", ["model", "prompt_lookup"])
def test_guidance_runs_without_speculation_and_says_so(method):
    own = {"assistant_model": noisy()} if method == "model" else {"prompt_lookup_num_tokens": 3}
    target, inputs = model(), prompts(1)
    settings = {"guidance_scale": 1.7, "negative_prompt_ids": prompts(1, seed=5)["input_ids"], "max_new_tokens": 12}
    expected = target.generate(**inputs, **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = fast_generate(target, **inputs, **settings, **own)
    assert torch.equal(got, expected)
    assert [str(w.message) for w in caught if "drafter" in str(w.message)] == [
        "decoding without a drafter: a guidance processor runs a model of its own at every token; "
        "greedy decoding keeps what equals the argmax"
    ]
    assert last_speculation().method == "autoregressive"
    assert last_speculation().drafted == 0


def test_no_warning_where_nothing_was_given_up():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast_generate(model(), **prompts(), max_new_tokens=4)
        fast_generate(model(), **prompts(), max_new_tokens=4, assistant_model=noisy())
        fast_generate(model(), **prompts(), max_new_tokens=4, guidance_scale=1.5)


# Knobs ---------------------------------------------------------------------------------------------------------------


def drafted(**settings):
    if "generation_config" not in settings:
        settings["max_new_tokens"] = 31
    fast_generate(model(), **prompts(), **{"assistant_model": model(), **settings})
    return last_speculation()


def test_num_assistant_tokens_counts():
    assert drafted(num_assistant_tokens=2).drafted_per_position == [10, 10]
    assert drafted(num_assistant_tokens=9).drafted_per_position == [3] * 9
    assert len(drafted(num_assistant_tokens_schedule="constant").drafted_per_position) == 5
    config = GenerationConfig(num_assistant_tokens=3, max_new_tokens=31, pad_token_id=PAD)
    assert len(drafted(generation_config=config).drafted_per_position) == 3
    assert len(drafted(generation_config=config, num_assistant_tokens=7).drafted_per_position) == 7
    transformers_default = GenerationConfig(num_assistant_tokens=20, max_new_tokens=32, pad_token_id=PAD)
    assert len(drafted(generation_config=transformers_default).drafted_per_position) == 20


def test_the_drafters_own_config_counts_as_in_transformers():
    drafter = make_noisy(model(), 0.0)
    drafter.generation_config.num_assistant_tokens = 4
    assert len(drafted(assistant_model=drafter).drafted_per_position) == 4
    assert len(drafted(assistant_model=drafter, num_assistant_tokens=6).drafted_per_position) == 6


def test_schedules_count():
    assert drafted(num_assistant_tokens=2, num_assistant_tokens_schedule="constant").rounds == 11
    for schedule in ("heuristic", "heuristic_transient"):
        grown = drafted(num_assistant_tokens=2, num_assistant_tokens_schedule=schedule)
        assert grown.rounds == 5  # 3 + 5 + 7 + 9 + 7
        assert len(grown.drafted_per_position) == 8
    shrunk = drafted(assistant_model=model(seed=9), num_assistant_tokens=6, num_assistant_tokens_schedule="heuristic")
    assert shrunk.drafted_per_position[:2] > shrunk.drafted_per_position[2:4] > shrunk.drafted_per_position[4:6]


def test_confidence_threshold_counts():
    everything = drafted(num_assistant_tokens=6)
    some = drafted(num_assistant_tokens=6, assistant_confidence_threshold=0.2)
    none = drafted(num_assistant_tokens=6, assistant_confidence_threshold=1.0)
    assert none.drafted_per_position == [none.rounds - (none.drafted < none.rounds)]  # the unsure token itself stays
    assert none.rounds > some.rounds > everything.rounds
    config = GenerationConfig(assistant_confidence_threshold=1.0, max_new_tokens=31, pad_token_id=PAD)
    assert len(drafted(generation_config=config).drafted_per_position) == 1


def test_assistant_temperature_counts():
    def accepted(temperature):
        own = {"assistant_model": make_noisy(model(), 0.05), "assistant_temperature": temperature}
        sampled(model(), prompts(4), own, temperature=0.3, max_new_tokens=30, verification="token")
        return last_speculation().acceptance_rate

    assert accepted(None) > accepted(5.0) + 0.1
    assert accepted(0) > accepted(5.0) + 0.1


def test_prompt_lookup_knobs_count():
    ids = torch.tensor([[7, 8, 9, 10, 11, 12, 13, 14, 9, 7, 8]])

    def lookup(**own):
        fast_generate(model(), ids, max_new_tokens=8, method="prompt_lookup", **own)
        return last_speculation()

    assert lookup(prompt_lookup_num_tokens=2).drafted_per_position[:2][0] > 0
    assert len(lookup(prompt_lookup_num_tokens=2).drafted_per_position) == 2
    assert len(lookup(prompt_lookup_num_tokens=6).drafted_per_position) == 6
    assert len(lookup(num_assistant_tokens=3).drafted_per_position) == 3


def test_max_matching_ngram_size_counts():
    # The last two tokens stood at the start, followed by 9; the last one also stood later, followed by 20
    ids = torch.tensor([[7, 8, 9, 10, 11, 30, 8, 20, 21, 7, 8]])

    class See(LogitsProcessor):
        """Makes the target follow the short match."""

        def __call__(self, input_ids, scores):
            return scores + 1e4 * (torch.arange(scores.shape[-1]) == 20)

    def accepted(size):
        fast_generate(
            model(),
            ids,
            max_new_tokens=2,
            prompt_lookup_num_tokens=1,
            max_matching_ngram_size=size,
            logits_processor=[See()],
        )
        return last_speculation().accepted

    assert accepted(1) == 1
    assert accepted(2) == 0
