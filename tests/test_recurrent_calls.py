"""Whole calls of models whose layers keep a state: text as ``generate``'s, caches in and out, the law."""

import copy
import functools

import pytest
import torch
from laws import DRAFTER_PIECES, TARGET_PIECES, chi_square, joint_law, pair_counts, tokenizer
from test_recurrent import forgets, known
from tiny import RECURRENT, build_model, make_noisy, model, noisy, prompts, same, taught
from transformers import DynamicCache, LogitsProcessorList, StaticCache

from specdec_fast import fast_generate, last_speculation, prepare, recurrent
from specdec_fast.cache import cache_argument, cache_of
from specdec_fast.recurrent import why_not_recurrent
from specdec_fast.states import Row

WIDTH = len(TARGET_PIECES)


# Whole calls --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True], ids=["level", "padded"])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("architecture", RECURRENT)
def test_greedy_text_is_generates(architecture, rows, padded):
    options = {"assistant_model": noisy(architecture), "num_assistant_tokens": 4}
    statistics = same(known(architecture), prompts(rows, padded=padded), options, max_new_tokens=40)
    assert 0 < statistics.accepted < statistics.drafted and statistics.forward == "eager"


@pytest.mark.parametrize("architecture", ["lfm2", "qwen3_5"])
@pytest.mark.parametrize(
    "options",
    [
        {"method": "autoregressive"},
        {"method": "prompt_lookup", "prompt_lookup_num_tokens": 4},
        {"assistant_model": "own"},
        {"assistant_model": "llama", "num_assistant_tokens": 20},
        {"assistant_model": "own", "assistant_confidence_threshold": 0.4},
        {"assistant_model": "own", "assistant_window": 6},
        {"assistant_model": "own", "use_cache": False},
        {"assistant_model": "own", "prefill_chunk_size": 4},
        {"assistant_model": "own", "compile": "static"},
        {"assistant_model": "own", "compile": "off"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_every_knob(options, architecture):
    own = {**options}
    both = {name: own.pop(name) for name in ("use_cache", "prefill_chunk_size") if name in own}
    if "assistant_model" in own:
        own["assistant_model"] = noisy(architecture) if own["assistant_model"] == "own" else model("llama")
    statistics = same(model(architecture), prompts(3, padded=True), own, max_new_tokens=30, **both)
    assert statistics.forward == ("static" if options.get("compile") == "static" else "eager")


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations(implementation):
    target = copy.deepcopy(model("qwen3_5"))
    target.set_attn_implementation(implementation)
    assert recurrent._found(target).joint
    same(target, prompts(3, padded=True), {"assistant_model": noisy("qwen3_5")}, max_new_tokens=16)


@functools.cache
def recurrent_pair(architecture):
    """A target and a drafter that were taught the same text, with tokenizers of their own."""
    return taught("target", architecture), taught("drafter", architecture)


@pytest.mark.parametrize("sides", ["target", "drafter", "both"])
@pytest.mark.parametrize("method", ["tli", "slem", "projection", "slrs"])
def test_across_vocabularies(method, sides):
    target, own = recurrent_pair("lfm2")[0] if sides != "drafter" else taught("target")
    drafter, others = recurrent_pair("lfm2")[1] if sides != "target" else taught("drafter")
    options = {"assistant_model": drafter, "tokenizer": own, "assistant_tokenizer": others, "method": method}
    texts = ["The old lighthouse keeper counted", "One evening in October he"]
    inputs = own(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    statistics = same(target, inputs, {**options, "num_assistant_tokens": 4}, max_new_tokens=40)
    assert 0 < statistics.accepted < statistics.drafted


def test_embeddings_stops_and_scores():
    target, inputs = model("qwen3_5"), prompts(2, padded=True)
    own = {"assistant_model": noisy("qwen3_5"), "num_assistant_tokens": 4}
    embeds = target.get_input_embeddings()(inputs["input_ids"]).detach()
    same(target, {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}, own, max_new_tokens=20)
    plain = target.generate(**inputs, max_new_tokens=24)
    ends = {"eos_token_id": [int(plain[0, -15]), int(plain[1, -6])]}
    same(target, inputs, own, max_new_tokens=24, **ends)
    more = {"max_new_tokens": 24, "return_dict_in_generate": True, "output_scores": True, **ends}
    expected, got = target.generate(**inputs, **more), fast_generate(target, **inputs, **more, **own)
    assert torch.equal(expected.sequences, got.sequences)
    assert len(expected.scores) == len(got.scores)
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(expected.scores, got.scores, strict=True))


@pytest.mark.parametrize("padded", [False, True], ids=["level", "padded"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    "architecture", [kind for kind in RECURRENT if kind in ("lfm2", "lfm3", "qwen3_5", "falcon_h1", "olmo_hybrid")]
)
def test_a_cache_is_handed_back_and_gone_on_with(architecture, rows, padded):
    target, inputs = model(architecture), prompts(rows, padded=padded)
    own = {"assistant_model": noisy(architecture), "num_assistant_tokens": 4}
    both = {"max_new_tokens": 14, "return_dict_in_generate": True}
    theirs, ours = target.generate(**inputs, **both), fast_generate(target, **inputs, **both, **own)
    assert torch.equal(theirs.sequences, ours.sequences)
    longer = torch.cat([ours.sequences, prompts(rows, length=4, seed=3)["input_ids"]], 1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, longer.shape[1] - 9), value=1)
    second = {"input_ids": longer, "attention_mask": mask, "max_new_tokens": 14}
    name = cache_argument(type(target))
    expected = target.generate(**second, **{name: copy.deepcopy(cache_of(theirs))})
    for cache in (cache_of(theirs), cache_of(ours)):  # Transformers' own, and what was handed back
        assert torch.equal(fast_generate(target, **second, **{name: copy.deepcopy(cache)}, **own), expected)
        assert torch.equal(target.generate(**second, **{name: copy.deepcopy(cache)}), expected)
    given = DynamicCache(config=target.config)
    first = fast_generate(target, **inputs, **both, **own, **{name: given})
    assert torch.equal(first.sequences, theirs.sequences) and cache_of(first) is given
    assert torch.equal(fast_generate(target, **second, **{name: given}, **own), expected)


def test_rows_that_ran_past_the_common_end_go_back_before_their_cache_is_handed_back():
    """Without an EOS rows run on until all have stopped, and are cut there."""
    (target, own), inputs = recurrent_pair("lfm2")[0], {}
    texts = ["The old lighthouse keeper counted", "One evening in October he", "def count_words(text"]
    ids = [own(text, add_special_tokens=False)["input_ids"] for text in texts]
    inputs["input_ids"] = torch.tensor([line[: min(map(len, ids))] for line in ids])
    name, drafter = cache_argument(type(target)), make_noisy(target, 0.2)
    more = {"return_dict_in_generate": True}
    first = target.generate(**inputs, max_new_tokens=4, **more)
    dropped = 0
    for stop in ("e", "s", "t", "."):
        given = {"max_new_tokens": 60, "stop_strings": [stop], "tokenizer": own, **more}
        expected = target.generate(first.sequences, **given, **{name: copy.deepcopy(cache_of(first))})
        drafted = {"assistant_model": drafter, "num_assistant_tokens": 12}
        got = fast_generate(target, first.sequences, **given, **drafted, **{name: copy.deepcopy(cache_of(first))})
        assert torch.equal(got.sequences, expected.sequences)
        dropped += last_speculation().drafted
        states = [cache_of(output).layers[0].conv_states[0] for output in (got, expected)]
        assert torch.allclose(*states, atol=1e-4)
    assert dropped


def test_caches_that_do_not_fit_are_refused():
    target, inputs = model("qwen3_5"), prompts(2)
    name = cache_argument(type(target))
    more = {"max_new_tokens": 4, "return_dict_in_generate": True}
    two = cache_of(target.generate(**inputs, **more))
    other = cache_of(model("llama").generate(**inputs, **more))
    longer = torch.cat([prompts(2)["input_ids"]] * 2, 1)
    for cache, says in ((other, "pass a cache that it returned"), (DynamicCache(), "config=model.config")):
        with pytest.raises(ValueError, match=f"^{name} .*{says}"):
            fast_generate(target, longer, **{name: cache}, max_new_tokens=4)
    with pytest.raises(ValueError, match=f"^{name} has 2 rows, the call 1"):
        fast_generate(target, longer[:1], **{name: two}, max_new_tokens=4)
    both = model("falcon_h1")
    with pytest.raises(ValueError, match=f"^{name} is a static cache of 12 columns, this call may need 19"):
        short = StaticCache(config=both.config, max_cache_len=12)
        fast_generate(both, prompts(2, length=15)["input_ids"], **{name: short}, max_new_tokens=5)
    two.layers[0].record_past = True
    with pytest.raises(ValueError, match=f"^{name} records past states"):
        fast_generate(target, longer, **{name: two}, max_new_tokens=4)


def test_a_cache_without_a_length_is_refused():
    target = known("mamba2")
    name = cache_argument(type(target))
    given = cache_of(target.generate(**prompts(1), max_new_tokens=4, return_dict_in_generate=True))
    with pytest.raises(ValueError, match=f"^{name} has no layer that says how long"):
        fast_generate(target, prompts(1, length=20)["input_ids"], **{name: given}, max_new_tokens=4)


def test_a_prepared_pair():
    target, inputs = model("lfm2"), prompts(2)
    pair = prepare(target, assistant_model=noisy("lfm2"))
    assert torch.equal(pair.generate(**inputs, max_new_tokens=20), target.generate(**inputs, max_new_tokens=20))


def test_half_precision():
    target = copy.deepcopy(model("qwen3_5")).to(torch.bfloat16)
    assert why_not_recurrent(target) is None
    drafter = make_noisy(target, 0.02)
    text = fast_generate(target, **prompts(2), assistant_model=drafter, max_new_tokens=20)
    assert text.shape == (2, 29) and last_speculation().accepted


# The law ------------------------------------------------------------------------------------------------------------


@functools.cache
def small(architecture, width, seed):
    made = build_model(architecture, vocabulary=width, seed=seed)
    torch.nn.init.normal_(made.lm_head.weight, std=0.25, generator=torch.Generator().manual_seed(seed))
    return made


@functools.cache
def exact(architecture):
    return joint_law(small(architecture, WIDTH, 3), PROMPT, STEPS, LogitsProcessorList())


PROMPT = torch.tensor([[1, 2, 5, 3, 4, 1, 2]])
STEPS = 4


def p_values(architecture, method, rule, seed=0, **more):
    drafter = small(architecture, WIDTH if method == "model" else len(DRAFTER_PIECES), 4)
    names = {"tokenizer": tokenizer(TARGET_PIECES), "assistant_tokenizer": tokenizer(DRAFTER_PIECES)}
    output = fast_generate(
        small(architecture, WIDTH, 3),
        PROMPT,
        assistant_model=drafter,
        method=method,
        verification=rule,
        do_sample=True,
        top_k=0,
        seed=seed,
        num_assistant_tokens=2,
        max_new_tokens=STEPS,
        num_return_sequences=2000,
        **({} if method == "model" else names),
        **more,
    )
    tokens, law = output[:, PROMPT.shape[1] :], exact(architecture)
    pairs = pair_counts(tokens, 0, WIDTH), pair_counts(tokens, STEPS - 2, WIDTH)
    return [chi_square(pair, law.sum(axes)) for pair, axes in zip(pairs, ((2, 3), (0, 1)), strict=True)]


@pytest.mark.parametrize(
    ("architecture", "method", "rule"),
    [("lfm2", "model", "match"), ("lfm2", "tli", "block"), ("qwen3_5", "model", "block"), ("qwen3_5", "tli", "token")],
)
def test_the_output_has_the_targets_law(architecture, method, rule):
    assert min(p_values(architecture, method, rule)) > 1e-4


@pytest.mark.parametrize("architecture", ["lfm2", "qwen3_5"])
def test_a_state_that_keeps_rejected_tokens_changes_the_law(architecture, monkeypatch):
    for seed in (3, 4):  # the trial would find it
        assert why_not_recurrent(small(architecture, WIDTH, seed)) is None
    monkeypatch.setattr(Row, "go_back", forgets)
    assert min(p_values(architecture, "model", "token")) < 1e-6


def test_a_seed_gives_the_same_tokens_alone_and_in_a_batch():
    target, own = model("qwen3_5"), {"assistant_model": noisy("qwen3_5"), "do_sample": True, "max_new_tokens": 20}
    inputs = prompts(3, padded=True)
    together = fast_generate(target, **inputs, seed=[3, 4, 5], **own)
    hidden = int((inputs["attention_mask"][2] == 0).sum())
    alone = fast_generate(target, inputs["input_ids"][2:, hidden:], seed=[5], **own)
    assert torch.equal(alone[0], together[2, hidden:])
