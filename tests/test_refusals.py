"""What cannot be done is refused before any forward pass, with the argument's name, and leaves everything as it was."""

import copy
import functools
import re
import warnings

import pytest
import torch
import transformers
from tables import tokenizer
from tiny import PAD, VOCABULARY, build_model, make_noisy, model, noisy, prompts, taught, taught_prompts
from transformers import CompileConfig, DynamicCache, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from specdec_fast import decoding_loop, fast_generate, last_speculation
from specdec_fast.trial import sees_ahead


class Ran(Exception):
    """A forward pass was run."""


class Untouched(BaseStreamer):
    def put(self, value):
        raise Ran

    end = put


def unrunnable(original):
    """A copy whose forward pass raises."""
    copied = make_noisy(original, 0.0)

    def forward(*args, **kwargs):
        raise Ran

    copied.forward = forward
    return copied


@pytest.fixture(scope="module")
def target():
    return unrunnable(model())


@pytest.fixture(scope="module")
def drafter():
    return unrunnable(noisy())


def small(name, **arguments):
    """A tiny model of a class that cannot be decoded here."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(transformers, arguments.pop("config"))(vocab_size=VOCABULARY, **arguments)
        return getattr(transformers, name)(config)


UNFIT = {
    "no key-value cache": lambda: small(
        "OpenAIGPTLMHeadModel", config="OpenAIGPTConfig", n_embd=16, n_layer=1, n_head=2, n_positions=64
    ),
    "cannot generate": lambda: small(
        "BertForMaskedLM",
        config="BertConfig",
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    ),
    "recurrent state": lambda: small(
        "MambaForCausalLM", config="MambaConfig", hidden_size=16, num_hidden_layers=1, state_size=4
    ),
    "keeps a recurrent state": lambda: small(
        "RecurrentGemmaForCausalLM",
        config="RecurrentGemmaConfig",
        hidden_size=16,
        num_hidden_layers=3,
        intermediate_size=32,
        num_attention_heads=2,
        lru_width=16,
    ),
}


@pytest.mark.parametrize("why", UNFIT)
def test_models_that_cannot_be_decoded_are_named(why, target):
    unfit = unrunnable(UNFIT[why]())
    name = type(unfit).__name__
    with pytest.raises(ValueError, match=f"^model: {name}.*{why}"):
        fast_generate(unfit, **prompts(), max_new_tokens=4)
    with pytest.raises(ValueError, match=f"^model: {name}.*{why}"):
        fast_generate(unfit, **prompts(), max_new_tokens=4, assistant_model=target)
    with pytest.raises(ValueError, match=f"^assistant_model: {name}.*{why}"):
        fast_generate(target, **prompts(), max_new_tokens=4, assistant_model=unfit)


def test_a_model_that_sees_ahead_is_named(target):
    """A prompt alone may be read both ways, as PaliGemma does, but not what is written."""
    both = build_model("gemma3", use_bidirectional_attention=True)
    with pytest.raises(ValueError, match=r"^model: Gemma3ForCausalLM gives other logits where text is read apart"):
        fast_generate(both, **prompts(), max_new_tokens=4)
    with pytest.raises(ValueError, match=r"^assistant_model: a token of Gemma3ForCausalLM sees those behind it"):
        fast_generate(target, **prompts(), max_new_tokens=4, assistant_model=both)
    assert not sees_ahead(build_model("gemma3"))


def test_a_model_that_counts_positions_in_its_own_way_is_named():
    """Kosmos-2's text model makes positions of the ids it reads, padding among them."""
    from transformers.models.kosmos2.configuration_kosmos2 import Kosmos2TextConfig
    from transformers.models.kosmos2.modeling_kosmos2 import Kosmos2TextForCausalLM

    config = Kosmos2TextConfig(vocab_size=VOCABULARY, embed_dim=16, layers=1, ffn_dim=32, attention_heads=2)
    with pytest.raises(ValueError, match="model: Kosmos2TextForCausalLM counts positions"):
        fast_generate(Kosmos2TextForCausalLM(config).eval(), **prompts(), max_new_tokens=4)


def test_a_model_that_is_told_no_positions_and_counts_as_usual_is_decoded(monkeypatch):
    target = build_model("llama")
    prepare = target.prepare_inputs_for_generation

    @functools.wraps(prepare)
    def untold(*given, **named):
        return prepare(*given, **named) | {"position_ids": None}

    monkeypatch.setattr(target, "prepare_inputs_for_generation", untold)
    inputs = prompts()
    expected = target.generate(**inputs, max_new_tokens=8)
    assert torch.equal(fast_generate(target, **inputs, max_new_tokens=8), expected)


@pytest.mark.parametrize("compile", ["auto", "off", "static"])
def test_a_model_that_keeps_more_than_the_text_is_named(compile):
    """CPM-Ant puts tokens of its own before the text, in every pass anew."""
    own = {"hidden_size": 16, "num_attention_heads": 2, "dim_head": 8, "dim_ff": 32, "num_hidden_layers": 1}
    unfit = small("CpmAntForCausalLM", config="CpmAntConfig", prompt_length=3, **own)
    with pytest.raises(ValueError, match=r"CpmAntForCausalLM keeps \d+ keys of \d+ tokens.*use model.generate"):
        fast_generate(unfit, **prompts(), max_new_tokens=4, compile=compile)


def test_rwkv_is_refused(target):
    arguments = {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2, "context_length": 32}
    rwkv = small("RwkvForCausalLM", config="RwkvConfig", **arguments)
    with pytest.raises(ValueError, match=r"^assistant_model: RwkvForCausalLM"):
        fast_generate(target, **prompts(), max_new_tokens=4, assistant_model=rwkv)


@pytest.mark.parametrize("thing", [None, "gpt2", torch.nn.Linear(2, 2)], ids=str)
def test_things_that_are_no_model(thing, target):
    with pytest.raises(TypeError, match="model must be a Transformers model"):
        fast_generate(thing, **prompts(), max_new_tokens=4)
    if thing is not None:
        with pytest.raises(TypeError, match="assistant_model must be a Transformers model"):
            fast_generate(target, **prompts(), max_new_tokens=4, assistant_model=thing)


BAD = [
    ({"compile": CompileConfig()}, "compile takes a name: give a CompileConfig as compile_config"),
    ({"method": "magic"}, "method='magic'.*'tli'"),
    ({"verification": "hope"}, "verification='hope'.*'match'"),
    ({"num_assistant_tokens_schedule": "wild"}, "num_assistant_tokens_schedule='wild'"),
    *[
        ({name: value}, f"{name}.*{value!r}")
        for name in (
            "num_assistant_tokens",
            "prompt_lookup_num_tokens",
            "max_matching_ngram_size",
            "target_lookbehind",
            "assistant_lookbehind",
        )
        for value in (0, -3, 2.5, "3", True)
    ],
    *[({"assistant_window": value}, f"assistant_window.*{value!r}") for value in (0, 1, 2.5, "3", True)],
    *[({"assistant_confidence_threshold": value}, "assistant_confidence_thr") for value in (-0.1, 1.1, "x", True)],
    *[({"assistant_temperature": value}, "assistant_temperature") for value in (-1.0, float("nan"), "x", True)],
    *[({"seed": value}, "seed must be") for value in (1.5, "7", True, [1, 2, 3], [1.0])],
    ({"method": "model"}, "method='model' needs a drafter: pass assistant_model"),
    ({"method": "tli"}, "method='tli' needs a drafter"),
    ({"method": "slem"}, "method='slem' needs a drafter"),
    ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions is not supported"),
    ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states is not supported"),
    ({"nonsense": 3}, "nonsense"),
    ({"pixel_values": torch.zeros(1, 3, 4, 4)}, "pixel_values"),
    ({"token_type_ids": torch.zeros(1, 9, dtype=torch.long)}, "token_type_ids"),
    ({"synced_gpus": True}, "synced_gpus is not supported"),
    ({"token_healing": True}, "token_healing is not supported"),
    ({"custom_generate": lambda *_, **__: None}, "custom_generate"),
    ({"stop_strings": ["x"]}, "stop_strings needs the target's tokenizer: pass tokenizer"),
    ({"assistant_early_exit": 1}, "assistant_early_exit"),
    ({"use_mtp": True}, "use_mtp"),
    ({"generation_config": GenerationConfig(speculation_type="dflash", pad_token_id=PAD)}, "speculation_type"),
    ({"generation_config": GenerationConfig(token_healing=True, pad_token_id=PAD)}, "token_healing"),
    ({"generation_config": GenerationConfig(num_assistant_tokens=0, pad_token_id=PAD)}, "num_assistant_tokens=0"),
    ({"eos_token_id": 3, "pad_token_id": None, "stop_strings": "x"}, "stop_strings needs"),
    ({"past_key_values": "cache"}, "past_key_values"),
    ({"input_ids": torch.tensor([[1, VOCABULARY]])}, f"input_ids holds {VOCABULARY}, the model reads ids from 0 to 60"),
    ({"input_ids": torch.tensor([[1, -100]])}, "input_ids holds -100"),
]


@pytest.mark.parametrize(("wrong", "words"), BAD, ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.parametrize("rows", [1, 2])
def test_bad_arguments_are_named_before_anything_runs(wrong, words, rows, target):
    inputs = {**prompts(rows), "max_new_tokens": 4, "streamer": Untouched()}
    if "input_ids" in wrong:
        del inputs["attention_mask"]
    with pytest.raises((ValueError, TypeError), match=words) as error:
        fast_generate(target, **{**inputs, **wrong})
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"method": "autoregressive"}, "method='autoregressive' uses no drafter model.*assistant_model"),
        ({"method": "prompt_lookup"}, "method='prompt_lookup' uses no drafter model.*assistant_model"),
        ({"prompt_lookup_num_tokens": 3}, "assistant_model and prompt_lookup_num_tokens"),
        ({"method": "tli"}, "method='tli' needs both tokenizers: pass tokenizer and assistant_tokenizer"),
        ({"method": "slem", "tokenizer": object()}, "method='slem' needs both tokenizers: pass assistant_tokenizer"),
        ({"past_key_values": DynamicCache(), "use_cache": True, "num_beams": 2}, "num_beams cannot be combined"),
    ],
)
def test_contradictions_are_named(wrong, words, target, drafter):
    for rows in (1, 2):
        with pytest.raises(ValueError, match=words):
            fast_generate(target, **prompts(rows), max_new_tokens=4, assistant_model=drafter, **wrong)


def test_vocabularies_of_different_sizes_need_both_tokenizers(target):
    other = unrunnable(model(vocabulary=80))
    for rows in (1, 2):
        with pytest.raises(ValueError, match=r"61 logits .*80.*pass tokenizer and assistant_tokenizer"):
            fast_generate(target, **prompts(rows), max_new_tokens=4, assistant_model=other)
    with pytest.raises(ValueError, match=r"needs both tokenizers: pass assistant_tokenizer"):
        fast_generate(target, **prompts(), max_new_tokens=4, assistant_model=other, tokenizer=object())
    with pytest.raises(ValueError, match=r"needs both tokenizers: pass tokenizer"):
        fast_generate(target, **prompts(), max_new_tokens=4, assistant_model=other, assistant_tokenizer=object())


def test_method_model_needs_one_tokenizer():
    (target, tokenizer), (drafter, own) = taught(), taught("drafter")
    with pytest.raises(ValueError, match=r"method='model' needs a drafter with the target's tokenizer.*'tli'"):
        fast_generate(
            unrunnable(target),
            **taught_prompts(2),
            method="model",
            assistant_model=unrunnable(drafter),
            tokenizer=tokenizer,
            assistant_tokenizer=own,
        )


def strangers(**pieces):
    """Arguments of a target and a drafter whose tokenizers are made of these pieces."""
    sides = {side: tokenizer(own) for side, own in pieces.items()}
    models = {side: build_model("llama", vocabulary=len(own)) for side, own in sides.items()}
    target, drafter = models["target"], models["drafter"]
    return {
        "model": target,
        "inputs": torch.tensor([[1, 2, 1], [2, 2, 1]]),
        "assistant_model": drafter,
        "tokenizer": sides["target"],
        "assistant_tokenizer": sides["drafter"],
        "max_new_tokens": 6,
    }


@pytest.mark.parametrize("compile", ["off", "auto", "static"])
@pytest.mark.parametrize(
    ("method", "missing", "drafts"),
    [
        ("tli", "tokens", ("c", "d", "cd")),
        ("tli", "tokens", ("ba", "aa")),
        *((method, "text", ("c", "d", "cd")) for method in ("projection", "slem", "slrs", "slrs_literal")),
    ],
)
def test_vocabularies_with_nothing_to_draft_are_refused(method, missing, drafts, compile):
    pair = strangers(target=("x", "a", "b", "ab"), drafter=drafts)
    pair |= {name: unrunnable(pair[name]) for name in ("model", "assistant_model")}
    with pytest.raises(
        ValueError, match=f"^method='{method}' .*tokenizer.* no {missing} in common: pass another assis"
    ):
        fast_generate(**pair, method=method, compile=compile)


@pytest.mark.parametrize("compile", ["off", "static"])
@pytest.mark.parametrize(
    ("drafts", "do_sample", "method"),
    [
        (("c", "d", "cd"), True, "autoregressive"),
        (("c", "d", "cd"), False, "autoregressive"),
        (("ba", "aa"), True, "projection"),
        (("ba", "aa"), False, "slem"),
    ],
    ids=["nothing", "nothing, greedily", "text", "text, greedily"],
)
def test_auto_takes_what_the_vocabularies_allow(drafts, do_sample, method, compile):
    pair = strangers(target=("x", "a", "b", "ab"), drafter=drafts)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fast_generate(**pair, do_sample=do_sample, seed=3, compile=compile)
    assert last_speculation().method == method
    own = [str(w.message) for w in told if "decoding without a drafter" in str(w.message)]
    assert len(own) == (method == "autoregressive") and all("no text in common" in message for message in own)


@pytest.mark.parametrize(
    "strategy",
    [
        {"num_beams": 3},
        {"num_beams": 2, "do_sample": True},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "low"},
        {"force_words_ids": [[5]]},
        {"cache_implementation": "paged"},
    ],
    ids=lambda strategy: next(iter(strategy)),
)
@pytest.mark.parametrize(
    "own",
    [
        {"assistant_model": noisy()},
        {"prompt_lookup_num_tokens": 3},
        {"method": "prompt_lookup"},
        {"seed": 3},
        {"num_assistant_tokens": 3},
    ],
    ids=lambda own: next(iter(own)),
)
def test_other_strategies_do_not_go_with_ours(strategy, own, target):
    name = next(iter(strategy))
    with pytest.raises(ValueError, match=f"{name}.* cannot be combined with {next(iter(own))}"):
        fast_generate(target, **prompts(), max_new_tokens=4, **strategy, **own)
    config = GenerationConfig(**strategy, max_new_tokens=4, pad_token_id=PAD)
    with pytest.raises(ValueError, match=f"{name}.* cannot be combined with {next(iter(own))}"):
        fast_generate(target, **prompts(), generation_config=config, **own)


def test_beams_without_a_drafter_are_generates():
    inputs = prompts(2, padded=True)
    settings = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 8}
    expected = model().generate(**inputs, **settings)
    assert torch.equal(fast_generate(model(), **inputs, **settings), expected)
    config = GenerationConfig(**settings, pad_token_id=PAD)
    assert torch.equal(fast_generate(model(), **inputs, generation_config=config), expected)
    eight = {"stop_strings": "counted", "num_beams": 2, "max_new_tokens": 8, "tokenizer": taught()[1]}
    expected = taught()[0].generate(**taught_prompts(2), **eight)
    assert torch.equal(fast_generate(taught()[0], **taught_prompts(2), **eight), expected)


def test_beams_in_the_models_own_config():
    target = build_model("llama")
    target.generation_config.num_beams = 2
    with pytest.raises(ValueError, match="num_beams cannot be combined with assistant_model"):
        fast_generate(target, **prompts(), max_new_tokens=4, assistant_model=noisy())
    got = fast_generate(target, **prompts(), max_new_tokens=4, assistant_model=noisy(), num_beams=1)
    assert torch.equal(got, model().generate(**prompts(), max_new_tokens=4))


def test_the_loop_knows_its_arguments(target):
    with pytest.raises(TypeError, match=r"decoding_loop does not know gamma, sead: it takes assistant_confidence"):
        decoding_loop(sead=3, gamma=2)
    with pytest.raises(ValueError, match="num_assistant_tokens=0"):
        decoding_loop(num_assistant_tokens=0)
    with pytest.raises(ValueError, match="output_attentions"):
        settings = {"output_attentions": True, "return_dict_in_generate": True, "max_new_tokens": 4}
        target.generate(**prompts(), custom_generate=decoding_loop(), **settings)


def test_a_refused_call_changes_nothing():
    (target, tokenizer), (drafter, own) = taught(), taught("drafter")
    cache = target.generate(**taught_prompts(2), return_dict_in_generate=True, max_new_tokens=3).past_key_values
    config = GenerationConfig(max_new_tokens=4, pad_token_id=tokenizer.pad_token_id, stop_strings=["x"])
    inputs = taught_prompts(2)
    kwargs = {
        **inputs,
        "past_key_values": cache,
        "generation_config": config,
        "tokenizer": tokenizer,
        "assistant_tokenizer": own,
        "assistant_model": drafter,
        "method": "tli",
    }

    def state():
        tensors = [*target.state_dict().values(), *drafter.state_dict().values(), *inputs.values()]
        tensors += [layer.keys for layer in cache.layers]
        return (
            [tensor.clone() for tensor in tensors],
            copy.deepcopy([m.config.to_dict() for m in (target, drafter)]),
            copy.deepcopy([c.__dict__ for c in (config, target.generation_config, drafter.generation_config)]),
            [len(tokenizer), len(own), tokenizer.padding_side, own.padding_side],
            list(kwargs),
        )

    before = state()
    positions = inputs["input_ids"]
    for wrong in ({"output_attentions": True}, {"seed": [1, 2, 3]}, {"num_beams": 2}, {"position_ids": positions}):
        with pytest.raises(ValueError):
            fast_generate(target, **kwargs, **wrong)
    after = state()
    assert after[1:] == before[1:]
    assert all(torch.equal(a, b) for a, b in zip(after[0], before[0], strict=True))
    assert int(cache.get_seq_length()) == inputs["input_ids"].shape[1] + 2


def test_messages_name_the_way_out():
    """One sentence each, with a colon in front of what to do."""
    with pytest.raises(ValueError) as error:
        fast_generate(model(), **prompts(), method="tli", max_new_tokens=4)
    assert re.search(r": pass assistant_model$", str(error.value))


def test_rotary_frequencies_that_change_with_the_length_are_refused_where_they_do():
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    scaled = build_model("llama", rope_parameters=rope, max_position_embeddings=24)
    inputs = {"input_ids": prompts()["input_ids"][:1, :9]}
    with pytest.raises(ValueError, match=r"dynamic rotary scaling .* beyond 24 tokens.* lower max_new_tokens"):
        fast_generate(scaled, **inputs, assistant_model=make_noisy(scaled), max_new_tokens=60)
    expected = scaled.generate(**inputs, max_new_tokens=15, do_sample=False)
    got = fast_generate(
        scaled, **inputs, assistant_model=make_noisy(scaled), num_assistant_tokens=5, max_new_tokens=15, do_sample=False
    )
    assert torch.equal(got, expected)


def test_a_choice_that_hangs_on_the_pass_is_refused_where_it_begins():
    """Doge chooses what a token sees among all columns of a pass, beyond a length."""
    own = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    doge = small("DogeForCausalLM", config="DogeConfig", num_key_value_heads=1, keep_window_size=16, **own)
    inputs = {"input_ids": prompts()["input_ids"][:1, :9] % 20}
    with pytest.raises(ValueError, match=r"DogeForCausalLM sees other tokens .* beyond 16 .* lower max_new_tokens"):
        fast_generate(doge, **inputs, max_new_tokens=8)
    expected = doge.generate(**inputs, max_new_tokens=7, do_sample=False)
    got = fast_generate(doge, **inputs, assistant_model=make_noisy(doge), max_new_tokens=7, do_sample=False)
    assert torch.equal(got, expected)


def test_knobs_without_a_drafter_are_not_passed_over_in_silence():
    with pytest.warns(UserWarning, match="num_assistant_tokens has no effect without a drafter"):
        fast_generate(model(), **prompts(), num_assistant_tokens=3, max_new_tokens=2)


@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
def test_a_cache_that_is_not_used_is_said(kind):
    target, inputs = model(), prompts()
    plain = fast_generate(target, **inputs, max_new_tokens=4, method="autoregressive")
    with pytest.warns(UserWarning, match=f"cache_implementation='{kind}' is not used"):
        kept = fast_generate(target, **inputs, max_new_tokens=4, method="autoregressive", cache_implementation=kind)
    assert torch.equal(kept, plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast_generate(target, **inputs, max_new_tokens=4, method="autoregressive", cache_implementation="static")
