"""Random numbers: no key is drawn twice, and a row's numbers are its own.

Only the target's own draws (rule *match*, plain decoding) are keyed by absolute position and may be drawn again in a
later round: of those, each is looked at for one committed token alone, so they are checked against the output instead.
"""

import itertools

import pytest
import torch
from laws import DRAFTER_PIECES, TARGET_PIECES, Recorder, model, tokenizer
from transformers import LogitsProcessor, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from specdec_fast import fast_generate, last_speculation, reference
from specdec_fast.randomness import Purpose, row_seeds

WIDTH = len(TARGET_PIECES)
PROMPT = torch.tensor([[1, 2, 5, 3, 4, 1, 2]])
NEW = 24


def target():
    return model(WIDTH, 31, sharpness=0.8)


def parties(method):
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


def generate(method, rule, prompt=PROMPT, **arguments):
    settings = {"top_k": 0, "max_new_tokens": NEW, "num_assistant_tokens": 3, "seed": 5, **parties(method)}
    return fast_generate(target(), prompt, do_sample=True, verification=rule, **{**settings, **arguments})


class Nothing(LogitsProcessor):
    """A processor of the caller's own that does nothing: it makes the rounds go in order."""

    def __call__(self, input_ids, scores):
        return scores


LEFT_PADDED = {
    "prompt": torch.tensor([[0, 0, 0, 0, 3, 1, 2], [1, 2, 5, 3, 4, 1, 2], [0, 4, 1, 2, 4, 1, 2]]),
    "attention_mask": torch.tensor([[0, 0, 0, 0, 1, 1, 1], [1] * 7, [0] + [1] * 6]),
    "pad_token_id": 0,
}
CALLS = {
    "one row": {},
    "a batch": {"num_return_sequences": 6},
    "rows that end": {"num_return_sequences": 6, "eos_token_id": 0, "pad_token_id": 0},
    "left-padded": LEFT_PADDED,
    "confidence": {"num_return_sequences": 6, "assistant_confidence_threshold": 0.3},
    "heuristic": {"num_return_sequences": 6, "num_assistant_tokens_schedule": "heuristic"},
    "prefix": {
        "num_return_sequences": 3,
        "logits_processor": LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.5)]),
    },
    "in order, one row": {"logits_processor": LogitsProcessorList([Nothing()])},
    "in order": {"num_return_sequences": 3, "logits_processor": LogitsProcessorList([Nothing()])},
    "in order, rows that end": {
        "num_return_sequences": 3,
        "logits_processor": LogitsProcessorList([Nothing()]),
        "eos_token_id": 0,
        "pad_token_id": 0,
    },
    "no cache": {"num_return_sequences": 2, "use_cache": False},
}
METHODS = ("autoregressive", "model", "tli", "slem", "prompt_lookup")


@pytest.mark.parametrize(
    "method, rule, call",
    [
        (method, rule, call)
        for method, rule, call in itertools.product(METHODS, ("match", "token", "block"), CALLS)
        if rule != "block" or "in order" not in call  # refused: it judges a whole draft at once
    ],
)
def test_no_key_is_drawn_twice(method, rule, call):
    source = Recorder()
    generate(method, rule, source=source, **CALLS[call])
    assert not source.repeated(but=Purpose.TARGET)
    drawn = {key[3] for key in source.keys}
    own = {Purpose.TARGET} if rule == "match" else {Purpose.RESIDUAL}
    if method == "autoregressive":
        assert drawn == own
    if rule != "match" and method in ("model", "tli"):
        assert drawn == {Purpose.DRAFT, Purpose.ACCEPT, Purpose.RESIDUAL}
    assert own <= drawn
    if rule != "match":
        assert Purpose.TARGET not in drawn


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("method", ["model", "tli"])
def test_keys_by_position_alone_are_seen(method, rule):
    """A planted fault: a later round would get the numbers that this one has looked at."""
    source = Recorder(forget_round=True)
    generate(method, rule, source=source)
    assert source.repeated(but=Purpose.TARGET)


def test_the_same_prompt_row_seed_and_call_draw_the_same_keys():
    one, other = Recorder(), Recorder()
    assert torch.equal(generate("tli", "token", source=one), generate("tli", "token", source=other))
    assert one.keys == other.keys


@pytest.mark.parametrize("call", ["one row", "a batch", "left-padded", "prefix", "in order", "confidence"])
@pytest.mark.parametrize("method", METHODS)
def test_rule_match_gives_the_targets_own_draws(method, call):
    """Whatever was drafted: each token is the one that its own number draws from the target's law."""
    source = Recorder()
    output = generate(method, "match", source=source, **CALLS[call])
    plain = generate("autoregressive", "match", **CALLS[call])
    assert torch.equal(output, plain)
    positions = {key[1] for key in source.keys if key[3] is Purpose.TARGET}
    assert positions <= set(range(3, 7 + NEW + 3))


def test_each_token_is_drawn_with_the_number_of_its_position():
    output = generate("tli", "match")[0]
    seed = row_seeds(5, 1)
    with torch.no_grad():
        scores = target()(input_ids=output.unsqueeze(0)).logits[0]
    for place in range(7, len(output)):
        u = Recorder().uniform(seed, torch.tensor([place]), torch.tensor([0]), Purpose.TARGET)
        assert reference.draw(reference.masses(scores[place - 1 : place]), u).item() == output[place]


@pytest.mark.parametrize("rule", ["match", "token", "block"])
@pytest.mark.parametrize("method", METHODS)
def test_a_row_does_not_depend_on_its_batch(method, rule):
    seeds = [11, 22, 33]
    batch = generate(method, rule, seed=seeds, **LEFT_PADDED)
    for row, seed in enumerate(seeds):
        text = LEFT_PADDED["prompt"][row][LEFT_PADDED["attention_mask"][row].bool()]
        alone = generate(method, rule, prompt=text.unsqueeze(0), seed=[seed])
        assert alone[0, len(text) :].tolist() == batch[row, 7:].tolist()


@pytest.mark.parametrize("rule", ["match", "token", "block"])
@pytest.mark.parametrize("method", METHODS)
def test_seeds(method, rule):
    rows = {"num_return_sequences": 4}
    once = generate(method, rule, seed=1, **rows)
    assert torch.equal(once, generate(method, rule, seed=1, **rows))
    assert not torch.equal(once, generate(method, rule, seed=2, **rows))
    assert len({tuple(row) for row in once.tolist()}) == 4
    assert torch.equal(once, generate(method, rule, seed=row_seeds(1, 4).tolist(), **rows))
    same = generate(method, rule, seed=[7, 7], num_return_sequences=2)
    assert torch.equal(same[0], same[1])


def test_without_a_seed_the_global_generator_decides():
    torch.manual_seed(3)
    once = generate("model", "token", seed=None)
    torch.manual_seed(3)
    assert torch.equal(once, generate("model", "token", seed=None))
    assert not torch.equal(once, generate("model", "token", seed=None))


def test_continuing_a_text_draws_fresh_keys():
    """The same seed on a longer text: no number of the first call comes back."""
    source = Recorder()
    text = generate("model", "token", source=source)
    generate("model", "token", prompt=text, source=source)
    assert not source.repeated()
    assert last_speculation().accepted
