"""Prompts with pictures and sounds: the text behind them is ``generate``'s, whatever drafts and however passes run."""

import copy
import functools

import graphs
import pytest
import torch
import transformers
from laws import TARGET_PIECES, chi_square, joint_law, pair_counts
from packaging.version import Version
from pictures import COUNTED, KINDS, PICTURE, VOCABULARY, build_seer, noisy_seer, pictured, seer
from tiny import build_model, model
from transformers import LogitsProcessorList

from specdec_fast import decoding_loop, fast_generate, last_speculation, pictures
from specdec_fast.cache import cache_argument, cache_of
from specdec_fast.lean import why_not_lean
from specdec_fast.pictures import Prompt, Shown
from specdec_fast.runner import Runner
from specdec_fast.static_runner import StaticRunner

STATIC = {"compile": "static"}
IN_PIECES = pytest.param(
    {"prefill_chunk_size": 5},
    marks=pytest.mark.skipif(
        Version(transformers.__version__) < Version("5.24"),
        reason="needs Transformers 5.24, whose generate can read a prompt with pictures in pieces",
    ),
)
STATES = ("lfm2_vl", "qwen3_5")
DRAFTING = [kind for kind in KINDS if kind != "paligemma"]  # no drafter sees what is behind a token


def expected(kind, inputs, **more):
    return seer(kind).generate(**inputs, do_sample=False, **{"max_new_tokens": 20, **more})


def written(kind, inputs, **more):
    given = {name: value.clone() for name, value in inputs.items()}
    text = fast_generate(seer(kind), **given, do_sample=False, **{"max_new_tokens": 20, **more})
    for name, value in inputs.items():
        assert torch.equal(given[name], value)
    return text


def own(how, kind):
    return {
        "plain": {},
        "reads text": {"assistant_model": model("llama", vocabulary=VOCABULARY), "num_assistant_tokens": 3},
        "sees": {"assistant_model": noisy_seer(kind), "num_assistant_tokens": 3} if kind in DRAFTING else {},
        "lookup": {"prompt_lookup_num_tokens": 3},
    }[how]


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_have_a_part_in_what_is_written(kind):
    one, other = pictured(kind), pictured(kind, seed=2)
    other["input_ids"] = one["input_ids"]
    logits = [seer(kind)(**inputs).logits[0, -1] for inputs in (one, other)]
    assert (logits[0] - logits[1]).abs().max() > 0.05 * logits[0].std()


@pytest.mark.parametrize(
    ("rows", "how", "compile"),
    [(1, "plain", "auto"), (1, "sees", "off"), (1, "reads text", "static")]
    + [(3, how, compile) for how in ("plain", "reads text", "sees") for compile in ("off", "auto", "static")]
    + [(3, "lookup", "auto"), (3, "lookup", "static")],
)
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_is_generates(kind, rows, how, compile):
    inputs = pictured(kind, rows, padded=True)
    assert torch.equal(written(kind, inputs, compile=compile, **own(how, kind)), expected(kind, inputs))
    told = last_speculation()
    assert how == "plain" or kind == "paligemma" or told.drafted
    if compile == "static" and kind != "paligemma" and how != "lookup":
        assert (told.forward, told.loop) == ("static", "host" if kind in STATES else "device")
    elif compile == "auto":
        assert told.forward == ("native" if kind in ("llava", "smolvlm", "gemma3", "qwen2_audio") else "eager")


@pytest.mark.parametrize("compile", ["off", "static"])
@pytest.mark.parametrize("kind", DRAFTING)
def test_a_drafter_of_its_kind_sees_what_the_target_sees(kind, compile, monkeypatch, plain_drafters):
    """The target as its own drafter is always right, unless it is shown nothing."""
    inputs = pictured(kind, 3, padded=True)
    drafting = {"assistant_model": seer(kind), "num_assistant_tokens": 3, "compile": compile}
    assert torch.equal(written(kind, inputs, **drafting), expected(kind, inputs))
    told = last_speculation()
    assert told.accepted == told.drafted > 0 and "sees what the target sees" in told.reason
    monkeypatch.setattr(Prompt, "read_by", lambda *_: None)
    assert torch.equal(written(kind, inputs, **drafting), expected(kind, inputs))
    told = last_speculation()
    assert told.accepted < told.drafted and "reads the text alone" in told.reason


def test_a_drafter_that_cannot_see_reads_text():
    inputs = pictured("llava", 2, padded=True)
    blind = {"assistant_model": noisy_seer("llava"), "num_assistant_tokens": 2}
    for drafting in (own("reads text", "llava"), {**blind, "assistant_window": 8}):
        assert torch.equal(written("llava", inputs, **drafting), expected("llava", inputs))
        assert "reads the text alone" in last_speculation().reason
    drafter = copy.deepcopy(noisy_seer("llava"))  # whose pictures have another size
    drafter.model.vision_tower.embeddings.position_embedding = torch.nn.Embedding(2, 16)
    drafter.model.vision_tower.embeddings.position_ids = torch.arange(2).unsqueeze(0)
    assert torch.equal(
        written("llava", inputs, assistant_model=drafter, num_assistant_tokens=2), expected("llava", inputs)
    )
    assert last_speculation().drafted and "reads the text alone" in last_speculation().reason


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
def test_drafters_of_text_are_not_told_of_placeholders(kind, monkeypatch, plain_drafters):
    seen, plain, drafter = [], Runner.feed, model("llama", vocabulary=VOCABULARY)

    def feed(self, rows, tokens, *rest, **more):
        if self.model is drafter:
            seen.append(tokens)
        return plain(self, rows, tokens, *rest, **more)

    monkeypatch.setattr(Runner, "feed", feed)
    written(kind, pictured(kind), compile="off", assistant_model=drafter, num_assistant_tokens=2)
    assert seen[0].shape[1] == 12 and not bool((seen[0] == PICTURE).any())


@pytest.mark.parametrize(
    "knobs", [IN_PIECES, {"num_beams": 2}, {"repetition_penalty": 1.3}, {"min_new_tokens": 4}], ids=str
)
def test_other_settings(knobs):
    inputs = pictured("qwen2_5_vl", 2, padded=True)
    given = {} if "num_beams" in knobs else own("sees", "qwen2_5_vl")
    assert torch.equal(written("qwen2_5_vl", inputs, **given, **knobs), expected("qwen2_5_vl", inputs, **knobs))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_text_alone(kind, rows):
    """PaliGemma reads such a prompt both ways too, and counts its positions from 1."""
    inputs = {
        name: value for name, value in pictured(kind, rows, padded=True).items() if "mask" in name or "ids" in name
    }
    inputs = {"input_ids": torch.where(inputs["input_ids"] < 55, inputs["input_ids"], 5)} | {
        "attention_mask": inputs["attention_mask"]
    }
    for compile in ("off", "static"):
        assert torch.equal(written(kind, inputs, compile=compile, **own("sees", kind)), expected(kind, inputs))
    assert "sees" not in last_speculation().reason and "text alone" not in last_speculation().reason


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_vl", "lfm2_vl"])
def test_generate_takes_the_loop(kind):
    inputs = pictured(kind, 2)
    loop = decoding_loop(assistant_model=noisy_seer(kind), num_assistant_tokens=3)
    got = seer(kind).generate(**inputs, max_new_tokens=20, do_sample=False, custom_generate=loop)
    assert torch.equal(got, expected(kind, inputs)) and last_speculation().drafted


@pytest.mark.parametrize("how", [("off", "static"), ("static", "off"), ("off", "generate"), ("generate", "static")])
@pytest.mark.parametrize("kind", DRAFTING)
def test_a_cache_is_handed_back_and_gone_on_with(kind, how):
    """The second turn has no picture; where the first one's takes up fewer positions, its text has to know."""
    target, inputs = seer(kind), pictured(kind, 2, padded=True)
    never = {"suppress_tokens": [*range(PICTURE, PICTURE + 4)]}  # which would stand for pictures in the second turn
    first = {**inputs, **never, "max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    if how[0] == "generate":
        made = target.generate(**first)
    else:
        made = fast_generate(target, **first, **own("sees", kind), compile=how[0])
    longer = torch.cat([made.sequences, torch.tensor([[7, 8, 9], [4, 3, 2]])], 1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 9), value=1)
    whole = {"input_ids": longer, "attention_mask": mask, **never, "max_new_tokens": 8, "do_sample": False}
    types = {
        name: torch.nn.functional.pad(inputs[name], (0, 9))
        for name in ("token_type_ids", "mm_token_type_ids")
        if name in inputs
    }
    wanted = target.generate(**{**inputs, **whole, **types})
    kept = {cache_argument(type(target)): cache_of(made)}
    assert cache_of(made).get_seq_length() == made.sequences.shape[1] - 1
    if how[1] == "generate":
        got = target.generate(**whole, **kept)
    else:
        got = fast_generate(target, **whole, **kept, **own("reads text", kind), compile=how[1])
        assert last_speculation().drafted
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl", "lfm2_vl"])
def test_a_picture_in_the_second_turn(kind):
    target, one, other = seer(kind), pictured(kind, 1), pictured(kind, 1, seed=2)
    never = {"suppress_tokens": [*range(PICTURE, PICTURE + 4)], "do_sample": False}
    first = fast_generate(target, **one, **never, max_new_tokens=6, return_dict_in_generate=True, **own("sees", kind))
    longer = torch.cat([first.sequences, other["input_ids"]], 1)
    whole = {"input_ids": longer, "attention_mask": torch.ones_like(longer), "max_new_tokens": 8, **never}
    if kind in COUNTED:
        whole["mm_token_type_ids"] = (longer == PICTURE).long()
    both = {name: torch.cat([one[name], other[name]]) for name in one if name not in whole}
    wanted = target.generate(**whole, **both)
    kept = {cache_argument(type(target)): cache_of(first)}
    rest = both if kind in COUNTED else {name: other[name] for name in both}  # positions are of all pictures
    if kind in COUNTED:
        rest["pixel_values"] = other["pixel_values"]
    try:
        theirs = target.generate(**whole, **rest, **{name: copy.deepcopy(held) for name, held in kept.items()})
    except Exception as error:  # what Transformers itself cannot do
        with pytest.raises(type(error)):
            fast_generate(target, **whole, **rest, **kept)
        return
    got = fast_generate(target, **whole, **rest, **kept, **own("reads text", kind))
    assert torch.equal(got, theirs) and last_speculation().drafted
    assert kind in COUNTED or torch.equal(theirs, wanted)


def test_several_texts_of_a_prompt_and_seeds():
    inputs = pictured("qwen2_5_vl", 2, padded=True)
    settings = {"do_sample": True, "top_k": 0, "temperature": 0.7, "max_new_tokens": 12, **own("sees", "qwen2_5_vl")}
    target = seer("qwen2_5_vl")
    text = fast_generate(target, **inputs, seed=[5, 6, 7, 8], num_return_sequences=2, **settings)
    for row in range(2):
        alone = {name: value[row : row + 1] for name, value in inputs.items() if name != "pixel_values"}
        alone["pixel_values"] = inputs["pixel_values"].view(2, 16, -1)[row]
        got = fast_generate(target, **alone, seed=[5 + 2 * row, 6 + 2 * row], num_return_sequences=2, **settings)
        assert torch.equal(got, text[2 * row : 2 * row + 2])
    for compile in ("static", "off"):
        assert torch.equal(
            fast_generate(target, **inputs, seed=[5, 6, 7, 8], num_return_sequences=2, compile=compile, **settings),
            text,
        )


# Kept caches, graphs, native passes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("processed", [False, True], ids=["device", "host"])
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_5", "gemma3"])
def test_kept_caches_forget_how_far_a_text_was_ahead(kind, processed, captured, monkeypatch):
    if captured:
        graphs.imitate(monkeypatch)
    inputs, text = pictured(kind, 2, padded=True), pictured(kind, 2, most=50, seed=4)
    text = {name: text[name].clone() for name in ("input_ids", "attention_mask")}
    text["input_ids"][text["input_ids"] >= PICTURE] = 5
    more = {"repetition_penalty": 1.2} if processed else {}
    for given in (inputs, text, inputs, pictured(kind, 2, seed=9)):
        got = written(kind, given, **STATIC, **own("sees", kind), **more)
        assert torch.equal(got, expected(kind, given, **more))


def test_a_text_that_outgrows_its_cache(monkeypatch):
    monkeypatch.setattr("specdec_fast.static_cache.LEAST_CAPACITY", 8)
    monkeypatch.setattr("specdec_fast.static_cache.ALLOWANCE", 4)
    for kind in ("qwen2_vl", "qwen3_5"):
        inputs = pictured(kind, 2, padded=True)
        got = written(kind, inputs, **STATIC, **own("sees", kind), max_new_tokens=60)
        assert torch.equal(got, expected(kind, inputs, max_new_tokens=60))


def test_hooks_that_do_nothing_keep_no_model_from_native_passes():
    target = copy.deepcopy(model("llama"))
    target(input_ids=torch.tensor([[1, 2]]), output_hidden_states=True, output_attentions=True)
    assert any(module._forward_hooks for module in target.modules())
    assert why_not_lean(target, rounded=False) is None
    handle = target.model.layers[0].register_forward_hook(lambda *_: None)
    assert "hooks" in why_not_lean(target, rounded=False)
    handle.remove()
    assert why_not_lean(target, rounded=False) is None
    seeing = copy.deepcopy(seer("llava"))
    seeing.model.register_forward_hook(lambda *_: None)
    assert "hooks" in why_not_lean(seeing, rounded=False)


# What cannot be -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_cache": False}, "use_cache=False is not supported for prompts with pictures"),
        ({"labels": torch.ones((1, 16), dtype=torch.long)}, "labels"),
    ],
    ids=["cache", "labels"],
)
def test_what_cannot_be_is_refused_by_name(changes, words):
    with pytest.raises(ValueError, match=words):
        fast_generate(seer("qwen2_5_vl"), **pictured("qwen2_5_vl"), **changes)


def test_a_prompt_that_ends_with_a_picture():
    inputs = pictured("llava")
    inputs["input_ids"] = inputs["input_ids"][:, :6]
    inputs["attention_mask"] = inputs["attention_mask"][:, :6]
    with pytest.raises(ValueError, match=r"ends with 60.*put text behind it"):
        fast_generate(seer("llava"), **inputs)


def test_embeddings_beside_pictures():
    inputs = pictured("llava")
    embeds = seer("llava").get_input_embeddings()(inputs.pop("input_ids"))
    with pytest.raises(ValueError, match="inputs_embeds is not supported for prompts with pictures"):
        fast_generate(seer("llava"), inputs_embeds=embeds, **inputs)


def test_a_language_model_reads_text_alone():
    with pytest.raises(ValueError, match="token_type_ids is not supported: only text prompts are"):
        fast_generate(build_model("gpt2"), torch.tensor([[1, 2]]), token_type_ids=torch.tensor([[0, 1]]))


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "llava"])
def test_a_model_that_goes_on_otherwise_is_refused(kind, monkeypatch):
    """Told by the first call with a picture, which reads the last token twice."""
    target = build_seer(kind)
    if kind == "qwen2_5_vl":
        monkeypatch.setattr(Runner, "go_ahead", lambda *_: None)
    else:
        monkeypatch.setattr("specdec_fast.continuation.read_cache", lambda source, own: _blank(source, own))
    with pytest.raises(ValueError, match="gives other logits where text is read apart from the prompt"):
        fast_generate(target, **pictured(kind), max_new_tokens=4)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="gives other logits"):  # remembered
        fast_generate(target, **pictured(kind), max_new_tokens=4)


def _blank(source, own):
    from specdec_fast.cache import read_cache

    for layer in source.layers:
        layer.keys = layer.keys * 0.5
    read_cache(source, own)


# The law ------------------------------------------------------------------------------------------------------------

WIDTH, STEPS = len(TARGET_PIECES), 4
SMALL = {"vocabulary": WIDTH + 4, "picture": WIDTH}


class Behind(torch.nn.Module):
    """A model that sees a picture, as one whose text is all that it reads. Its marks are written by nobody."""

    def __init__(self, kind):
        super().__init__()
        self.whole, self.kind = small(kind, 3), kind
        self.config = copy.copy(self.whole.config.get_text_config(decoder=True))
        self.config.vocab_size = WIDTH

    def forward(self, input_ids, **_):
        rows, columns = input_ids.shape
        given = {name: value.repeat(rows, *[1] * (value.ndim - 1)) for name, value in one(self.kind).items()}
        for name in ("attention_mask", "token_type_ids", "mm_token_type_ids"):
            if name in given:
                last = int(name == "attention_mask")
                given[name] = torch.nn.functional.pad(given[name], (0, columns - given[name].shape[1]), value=last)
        made = self.whole(**{**given, "input_ids": input_ids}, use_cache=False)
        made.logits = made.logits[..., :WIDTH]
        return made


@functools.cache
def small(kind, seed):
    return build_seer(kind, **SMALL, seed=seed)


def one(kind):
    return pictured(kind, most=WIDTH, picture=WIDTH, length=5)


@functools.cache
def exact(kind):
    return joint_law(Behind(kind), one(kind)["input_ids"][0], 3, LogitsProcessorList())


def p_values(kind, rule, rows=3000, **more):
    drafting = {"assistant_model": small(kind, 4), "method": "model", "num_assistant_tokens": 2}
    output = fast_generate(
        small(kind, 3),
        **one(kind),
        **drafting,
        verification=rule,
        do_sample=True,
        top_k=0,
        seed=1,
        suppress_tokens=[*range(WIDTH, WIDTH + 4)],
        max_new_tokens=3,
        num_return_sequences=rows,
        **more,
    )
    tokens, law = output[:, -3:], exact(kind)
    pairs = pair_counts(tokens, 0, WIDTH), pair_counts(tokens, 1, WIDTH)
    return [chi_square(pair, law.sum(axes)) for pair, axes in zip(pairs, (2, 0), strict=True)]


@pytest.mark.parametrize(
    ("kind", "rule", "compile"),
    [
        ("llava", "block", "auto"),
        ("qwen2_5_vl", "block", "off"),
        ("qwen2_5_vl", "token", "static"),
        ("gemma3", "match", "static"),
        ("lfm2_vl", "block", "static"),
    ],
)
def test_the_output_has_the_targets_law(kind, rule, compile, monkeypatch):
    monkeypatch.setattr("specdec_fast.static_cache.LEAST_CAPACITY", 16)
    assert min(p_values(kind, rule, compile=compile)) > 1e-4
    assert last_speculation().accepted


@pytest.mark.parametrize(("where", "compile"), [(Runner, "off"), (StaticRunner, "static")])
def test_positions_of_their_own_are_part_of_the_law(where, compile, monkeypatch):
    monkeypatch.setattr("specdec_fast.static_cache.LEAST_CAPACITY", 16)
    p_values("qwen2_5_vl", "block", rows=200, compile=compile)  # the trial would find it
    monkeypatch.setattr(where, "go_ahead", lambda *_: None)
    assert min(p_values("qwen2_5_vl", "block", compile=compile)) < 1e-6


def test_what_a_drafter_sees_is_no_part_of_it(monkeypatch):
    monkeypatch.setattr(Shown, "load", lambda self, runner: runner.go_ahead([3] * runner.rows))
    assert min(p_values("qwen2_5_vl", "block", compile="off")) > 1e-4
    assert pictures.placeholders(small("qwen2_5_vl", 3)) == {WIDTH, WIDTH + 1}
