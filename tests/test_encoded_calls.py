"""Whole calls of models that read a source: text as ``generate``'s, every method and knob, caches, the law."""

import copy
import functools

import pytest
import torch
from laws import DRAFTER_PIECES, TARGET_PIECES, chi_square, joint_law, pair_counts, tokenizer
from sources import START, TEXTUAL, WRITERS, build_writer, decoder_of, noisy_writer, source, taught_writer, writer
from tiny import PAD, VOCABULARY, make_noisy, model, same, taught
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteriaList,
)
from transformers.modeling_outputs import BaseModelOutput

from specdec_fast import decoding_loop, fast_generate, last_speculation, prepare
from specdec_fast.cache import RaggedLayer, cache_argument, cache_of

WIDTH = len(TARGET_PIECES)


def begun(rows, length=5, *, padded=False, seed=7):
    """Beginnings of the decoder's text; ``padded``: of different lengths, padding on the left."""
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = START
    mask = torch.ones_like(ids)
    if padded:
        for row in range(rows):
            hidden = (row + 1) % (length - 1)
            ids[row, hidden], ids[row, :hidden], mask[row, :hidden] = START, PAD, 0
    return {"decoder_input_ids": ids, "decoder_attention_mask": mask}


@pytest.mark.parametrize("padded", [False, True], ids=["level", "padded"])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("kind", WRITERS)
def test_greedy_text_is_generates(kind, rows, padded):
    own = {"assistant_model": noisy_writer(kind), "num_assistant_tokens": 4}
    statistics = same(writer(kind), source(kind, rows, padded=padded), own, max_new_tokens=40)
    assert statistics.drafted and statistics.forward == "eager"
    if kind == "t5gemma":
        return  # its random weights draft all or nothing
    assert statistics.accepted
    if rows > 1:
        assert statistics.accepted < statistics.drafted


@pytest.mark.parametrize("kind", ["t5", "bart", "t5gemma", "whisper"])
@pytest.mark.parametrize(
    "options",
    [
        {"method": "autoregressive"},
        {"method": "prompt_lookup", "prompt_lookup_num_tokens": 4},
        {"assistant_model": "own"},
        {"assistant_model": "llama", "num_assistant_tokens": 6},
        {"assistant_model": "own", "assistant_confidence_threshold": 0.4},
        {"assistant_model": "own", "assistant_window": 6},
        {"assistant_model": "own", "use_cache": False},
        {"assistant_model": "own", "compile": "static"},
        {"assistant_model": "own", "compile": "off"},
        {"assistant_model": "own", "repetition_penalty": 1.3},
        {"assistant_model": "own", "return_dict_in_generate": False, "num_return_sequences": 1},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_every_knob(options, kind):
    own = {**options}
    names = ("use_cache", "repetition_penalty", "return_dict_in_generate", "num_return_sequences")
    both = {name: own.pop(name) for name in names if name in own}
    if "assistant_model" in own:
        own["assistant_model"] = noisy_writer(kind) if own["assistant_model"] == "own" else model("llama")
    statistics = same(writer(kind), source(kind, 3, padded=True), own, max_new_tokens=30, **both)
    assert statistics.forward == ("static" if options.get("compile") == "static" else "eager")


@pytest.mark.parametrize("padded", [False, True], ids=["level", "padded"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", [*TEXTUAL, "moonshine"])
def test_the_decoders_text_may_be_begun(kind, rows, padded):
    both = {**source(kind, rows, padded=True), **begun(rows, padded=padded)}
    statistics = same(writer(kind), both, {"assistant_model": noisy_writer(kind)}, max_new_tokens=25)
    assert statistics.accepted
    whole = {**both, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    expected = writer(kind).generate(**whole, max_new_tokens=12)
    got = fast_generate(writer(kind), **whole, max_new_tokens=12, assistant_model=noisy_writer(kind))
    assert torch.equal(got.sequences, expected.sequences)
    for name in ("scores", "logits"):
        pairs = zip(getattr(got, name), getattr(expected, name), strict=True)
        assert all(torch.allclose(a, b, atol=1e-3) for a, b in pairs)


@pytest.mark.parametrize("rows", [1, 3])
def test_padding_before_a_text_whose_positions_generate_counts(rows):
    """Whisper's own ``generate`` pads the texts that it goes on from in a long recording."""
    inputs, more = source("whisper", rows), begun(rows, padded=True)
    target, drafter = writer("whisper"), noisy_writer("whisper")
    generate = super(type(target), target).generate.__func__
    expected = generate(target, **inputs, **more, max_new_tokens=25)
    loop = decoding_loop(assistant_model=drafter, num_assistant_tokens=4)
    got = generate(target, **inputs, **more, max_new_tokens=25, custom_generate=loop)
    assert torch.equal(got, expected) and last_speculation().accepted


@pytest.mark.parametrize("rows", [1, 3])
def test_transcripts_with_times(rows):
    """Whisper's rules about time stamps hang on a row's own text alone."""
    target = copy.deepcopy(writer("whisper"))
    target.generation_config.no_timestamps_token_id = 40
    own = {"assistant_model": make_noisy(target, 0.05), "num_assistant_tokens": 4}
    inputs = {**source("whisper", rows), "return_timestamps": True}
    statistics = same(target, inputs, own, max_new_tokens=30)
    assert 0 < statistics.accepted < statistics.drafted
    text = fast_generate(target, **inputs, **own, max_new_tokens=30)
    assert (text > 40).any() and not (text == 40).any()
    assert statistics.row_rounds < sum(30 for _ in range(rows))


@pytest.mark.parametrize("rows", [1, 3])
def test_a_long_recording(rows):
    """It is heard in windows, each of which goes on from what was written before."""
    target = copy.deepcopy(writer("whisper"))
    target.generation_config.no_timestamps_token_id = 40
    target.generation_config.prev_sot_token_id = 3
    target.generation_config.eos_token_id = target.config.eos_token_id = 5
    sound = torch.randn(rows, 8, 100, generator=torch.Generator().manual_seed(1))
    both = {
        "input_features": sound,
        "attention_mask": torch.ones(rows, 100, dtype=torch.long),
        "return_timestamps": True,
        "condition_on_prev_tokens": True,
        "max_new_tokens": 12,
        "temperature": 0.0,
    }
    expected = target.generate(**both)
    got = fast_generate(target, **both, assistant_model=make_noisy(target, 0.05), num_assistant_tokens=4)
    assert torch.equal(got, expected)


@pytest.mark.parametrize(("kind", "implementation"), [("bart", "eager"), ("bart", "sdpa"), ("t5gemma", "eager")])
def test_attention_implementations(kind, implementation):
    target = copy.deepcopy(writer(kind))
    target.set_attn_implementation(implementation)
    same(target, source(kind, 3, padded=True), {"assistant_model": noisy_writer(kind)}, max_new_tokens=16)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_decoder_alone_drafts_for_its_encoder(rows):
    own = {"assistant_model": decoder_of(), "num_assistant_tokens": 4}
    statistics = same(writer("whisper"), source("whisper", rows), own, max_new_tokens=30)
    assert 0 < statistics.accepted < statistics.drafted


@pytest.fixture
def encoded(monkeypatch):
    """Which encoders run, in order."""
    found, forward = [], type(writer("bart").get_encoder()).forward

    def counted(self, *arguments, **more):
        found.append(self)
        return forward(self, *arguments, **more)

    monkeypatch.setattr(type(writer("bart").get_encoder()), "forward", counted)
    return found


def test_an_encoder_of_the_same_weights_runs_once(encoded):
    """A drafter that was distilled keeps its target's encoder."""
    target = writer("bart")
    drafter = copy.deepcopy(target)
    drafter.model.decoder.layers = drafter.model.decoder.layers[:1]
    own = {"assistant_model": drafter, "num_assistant_tokens": 3, "max_new_tokens": 12}
    inputs = source("bart", 2, padded=True)
    text = fast_generate(target, **inputs, **own)
    assert encoded == [target.get_encoder()] and last_speculation().drafted
    assert torch.equal(text, target.generate(**inputs, max_new_tokens=12))
    with torch.no_grad():
        drafter.get_encoder().layers[0].fc1.bias[0] += 1
    del encoded[:]
    assert torch.equal(fast_generate(target, **inputs, **own), text)
    assert encoded == [target.get_encoder(), drafter.get_encoder()]


def test_sources_repeat_for_several_sequences():
    """Rows that begin alike have sources of their own, and each of them several rows."""
    inputs = source("bart", 2, padded=True)
    twice = {name: part.repeat_interleave(3, 0) for name, part in inputs.items()}
    own = {"assistant_model": noisy_writer("bart"), "do_sample": True, "top_k": 0, "max_new_tokens": 16}
    seeds = [3, 4, 5, 6, 7, 8]
    together = fast_generate(writer("bart"), **inputs, **own, num_return_sequences=3, seed=seeds)
    assert torch.equal(together, fast_generate(writer("bart"), **twice, **own, seed=seeds))
    assert len(set(map(tuple, together.tolist()))) == 6
    for row in (1, 5):
        alone = {name: part[row : row + 1] for name, part in twice.items()}
        assert torch.equal(fast_generate(writer("bart"), **alone, **own, seed=seeds[row : row + 1])[0], together[row])


def test_encodings_in_the_place_of_sources():
    target, inputs = writer("bart"), source("bart", 2, padded=True)
    with torch.no_grad():
        made = target.get_encoder()(**inputs)
        embeds = target.get_input_embeddings()(inputs["input_ids"])
    mask = {"attention_mask": inputs["attention_mask"]}
    expected = target.generate(**inputs, max_new_tokens=20)
    lookup = {"prompt_lookup_num_tokens": 4}
    for given in ({"encoder_outputs": made}, {"inputs_embeds": embeds}):
        got = fast_generate(target, **copy.deepcopy(given), **mask, max_new_tokens=20, **lookup)
        assert torch.equal(got, expected)
        with pytest.raises(ValueError, match=r"^assistant_model: .* has an encoder of its own"):
            fast_generate(
                target, **copy.deepcopy(given), **mask, max_new_tokens=4, assistant_model=noisy_writer("bart")
            )
    pair = (made.last_hidden_state,)
    assert torch.equal(
        fast_generate(target, encoder_outputs=BaseModelOutput(*pair), **mask, max_new_tokens=20), expected
    )


def test_prompt_lookup_looks_in_the_source_too():
    (target, own), text = taught_writer("target", "t5"), "One evening in October he counted eight. He counted again"
    inputs = {"input_ids": own(text, return_tensors="pt", add_special_tokens=False)["input_ids"]}
    more = {"max_new_tokens": 2, "prompt_lookup_num_tokens": 4}
    tokens = inputs["input_ids"][0].tolist()
    first = torch.tensor([[target.config.decoder_start_token_id, *tokens[2:5]]])
    fast_generate(target, **inputs, decoder_input_ids=first, **more)
    assert last_speculation().drafted == 1  # nothing of it stood in the decoder's text before
    fast_generate(target, input_ids=inputs["input_ids"][:, :1], decoder_input_ids=first, **more)
    assert not last_speculation().drafted


@pytest.mark.parametrize("method", ["tli", "slem", "projection", "slrs"])
@pytest.mark.parametrize("drafter", ["t5", "bart", "llama"])
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_across_vocabularies(method, drafter, kind):
    target, own = taught_writer("target", kind)
    other, others = taught("drafter") if drafter == "llama" else taught_writer("drafter", drafter)
    options = {"assistant_model": other, "tokenizer": own, "assistant_tokenizer": others, "method": method}
    texts = ["The old lighthouse keeper counted", "One evening in October he"]
    inputs = own(texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    statistics = same(target, inputs, {**options, "num_assistant_tokens": 4}, max_new_tokens=40)
    assert 0 < statistics.accepted <= statistics.drafted
    if drafter != "llama":  # it reads the source as its own tokenizer spells it
        assert statistics.accepted > statistics.drafted / 8
    with pytest.warns(UserWarning, match="has no effect") if method == "never" else pytest.MonkeyPatch.context():
        fast_generate(target, **inputs, **options, do_sample=True, seed=0, max_new_tokens=20)
    assert last_speculation().drafted


def test_auto_across_vocabularies():
    target, own = taught_writer("target", "t5")
    drafter, others = taught_writer("drafter", "bart")
    pair = {"assistant_model": drafter, "tokenizer": own, "assistant_tokenizer": others}
    inputs = {"input_ids": own("One evening in October", return_tensors="pt", add_special_tokens=False)["input_ids"]}
    same(target, inputs, pair, max_new_tokens=30)
    assert last_speculation().method == "slem"
    fast_generate(target, **inputs, **pair, do_sample=True, max_new_tokens=30)
    assert last_speculation().method in ("tli", "projection")


def test_stops_streams_and_custom_processors():
    target, inputs, own = writer("bart"), source("bart", 2), {"assistant_model": noisy_writer("bart")}
    plain = target.generate(**inputs, max_new_tokens=24)
    ends = {"eos_token_id": [int(plain[0, -15]), int(plain[1, -6])]}
    same(target, inputs, own, max_new_tokens=24, **ends)

    class Favours(LogitsProcessor):
        def __call__(self, ids, scores):
            scores = scores.clone()
            scores[:, ids.shape[1] % 50] += 3
            return scores

    seen = []
    both = {
        "logits_processor": LogitsProcessorList([Favours()]),
        "stopping_criteria": StoppingCriteriaList([lambda ids, scores, **_: ids[:, -1] == 31]),
    }
    same(target, inputs, own, max_new_tokens=20, **both)

    class Streamer:
        def put(self, value):
            seen.append(value.tolist())

        def end(self):
            seen.append("end")

    text = fast_generate(target, **source("bart"), max_new_tokens=6, streamer=Streamer(), **own)
    assert seen == [[[START]], *([token] for token in text[0, 1:].tolist()), "end"]


@pytest.mark.parametrize("padded", [False, True], ids=["level", "padded"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", ["t5", "bart", "t5gemma", "moonshine"])
def test_a_cache_is_handed_back_and_gone_on_with(kind, rows, padded):
    target, inputs = writer(kind), source(kind, rows, padded=True)
    own = {"assistant_model": noisy_writer(kind), "num_assistant_tokens": 4}
    both = {**begun(rows, padded=padded), "max_new_tokens": 14, "return_dict_in_generate": True}
    theirs, ours = target.generate(**inputs, **both), fast_generate(target, **inputs, **both, **own)
    assert torch.equal(theirs.sequences, ours.sequences)
    longer = torch.cat([ours.sequences, begun(rows, 4, seed=3)["decoder_input_ids"]], 1)
    hidden = both["decoder_attention_mask"]
    mask = torch.nn.functional.pad(hidden, (0, longer.shape[1] - hidden.shape[1]), value=1)
    second = {**inputs, "decoder_input_ids": longer, "decoder_attention_mask": mask, "max_new_tokens": 14}
    name = cache_argument(type(target))
    expected = target.generate(**second, **{name: copy.deepcopy(cache_of(theirs))})
    for cache in (cache_of(theirs), cache_of(ours)):  # Transformers' own, and what was handed back
        assert torch.equal(fast_generate(target, **second, **{name: copy.deepcopy(cache)}, **own), expected)
        assert torch.equal(target.generate(**second, **{name: copy.deepcopy(cache)}), expected)
    decoder = target.config.get_text_config(decoder=True)
    given = EncoderDecoderCache(DynamicCache(config=decoder), DynamicCache(config=decoder))
    first = fast_generate(target, **inputs, **both, **own, **{name: given})
    assert torch.equal(first.sequences, theirs.sequences) and cache_of(first) is given
    assert torch.equal(fast_generate(target, **second, **{name: given}, **own), expected)


def test_a_source_in_a_cache_is_the_one_that_counts():
    target, name = writer("bart"), cache_argument(type(writer("bart")))
    more = {**begun(2), "max_new_tokens": 8, "return_dict_in_generate": True}
    made = target.generate(**source("bart", 2, seed=1), **more)
    second = {**source("bart", 2), "decoder_input_ids": made.sequences, "max_new_tokens": 8}
    second["decoder_attention_mask"] = torch.ones_like(made.sequences)
    expected = target.generate(**second, **{name: copy.deepcopy(cache_of(made))})
    got = fast_generate(target, **second, **{name: copy.deepcopy(cache_of(made))}, assistant_model=noisy_writer("bart"))
    assert torch.equal(got, expected)
    assert not torch.equal(target.generate(**second), expected)


def test_a_static_cache_takes_the_result():
    target, inputs = writer("bart"), source("bart", 2)
    name = cache_argument(type(target))
    config = target.config.get_text_config(decoder=True)
    given = EncoderDecoderCache(
        StaticCache(config=config, max_cache_len=30), StaticCache(config=config, max_cache_len=17)
    )
    more = {"max_new_tokens": 14, "return_dict_in_generate": True}
    got = fast_generate(target, **inputs, **more, **{name: given}, assistant_model=noisy_writer("bart"))
    assert torch.equal(got.sequences, target.generate(**inputs, max_new_tokens=14))
    assert int(given.get_seq_length()) == 14
    short = EncoderDecoderCache(
        StaticCache(config=config, max_cache_len=9), StaticCache(config=config, max_cache_len=17)
    )
    with pytest.raises(ValueError, match=f"^{name} is a static cache of 9 columns, this call may need 14"):
        fast_generate(target, **inputs, max_new_tokens=14, **{name: short})


def test_what_cannot_be_is_refused_by_name():
    target, inputs, name = writer("bart"), source("bart", 2), cache_argument(type(writer("bart")))
    two = cache_of(target.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True))
    begin = {"decoder_input_ids": begun(1, 8)["decoder_input_ids"]}
    with pytest.raises(ValueError, match=f"^{name} has 2 rows, the call 1"):
        fast_generate(target, **source("bart"), **begin, **{name: two}, max_new_tokens=4)
    with pytest.raises(ValueError, match=f"^{name} must be an EncoderDecoderCache, not DynamicCache"):
        fast_generate(target, **inputs, **{name: DynamicCache(config=target.config)}, max_new_tokens=4)
    with pytest.raises(ValueError, match=r"^decoder_input_ids holds 99, the model reads ids from 0 to 60"):
        fast_generate(target, **source("bart"), decoder_input_ids=torch.tensor([[START, 99]]), max_new_tokens=4)
    with pytest.raises(ValueError, match=r"^decoder_position_ids is not supported"):
        fast_generate(writer("whisper"), **source("whisper"), decoder_position_ids=torch.zeros(1, 1), max_new_tokens=4)
    with pytest.raises(
        ValueError, match=r"^assistant_model: Bart.* is an encoder-decoder model, and the target reads no"
    ):
        fast_generate(model("llama"), torch.ones((1, 3), dtype=torch.long), assistant_model=target, max_new_tokens=4)
    with pytest.raises(ValueError, match=r"^assistant_model: Whisper.* reads input_features, and the target input_ids"):
        fast_generate(target, **inputs, assistant_model=writer("whisper"), max_new_tokens=4)
    wider = build_writer("whisper").__class__
    config = copy.deepcopy(writer("whisper").config)
    config.d_model, config.encoder_attention_heads = 48, 4
    with pytest.raises(ValueError, match=r"^assistant_model: WhisperForCausalLM cannot be rolled back .* Pass another"):
        fast_generate(wider(config).eval(), **source("whisper"), assistant_model=decoder_of(), max_new_tokens=4)


def test_a_prepared_pair():
    target, inputs = writer("t5"), source("t5", 2)
    pair = prepare(target, assistant_model=noisy_writer("t5"))
    assert torch.equal(pair.generate(**inputs, max_new_tokens=20), target.generate(**inputs, max_new_tokens=20))
    heard = prepare(writer("whisper"), assistant_model=decoder_of(), inputs=source("whisper")["input_features"])
    expected = writer("whisper").generate(**source("whisper", 2), max_new_tokens=20)
    assert torch.equal(heard.generate(**source("whisper", 2), max_new_tokens=20), expected)
    with pytest.raises(ValueError, match=r"^inputs: .*WhisperForConditionalGeneration reads input_features"):
        prepare(writer("whisper"))


def test_half_precision():
    target = copy.deepcopy(writer("bart")).to(torch.bfloat16)
    text = fast_generate(target, **source("bart", 2), assistant_model=make_noisy(target, 0.02), max_new_tokens=20)
    assert text.shape == (2, 21) and last_speculation().accepted


# The law ------------------------------------------------------------------------------------------------------------

STEPS = 4
READ = {"input_ids": torch.tensor([[1, 2, 5, 3, 4, 1, 2]])}


@functools.cache
def small(kind, width, seed):
    made = build_writer(kind, vocabulary=width, seed=seed)
    made.lm_head = torch.nn.Linear(32, width, bias=False)
    spread = 1.4 if kind == "t5" else 0.25  # T5 divides what it gives the head
    torch.nn.init.normal_(made.lm_head.weight, std=spread, generator=torch.Generator().manual_seed(seed))
    return made


class Behind(torch.nn.Module):
    """A model that reads the source, as one whose text is all that it reads."""

    def __init__(self, whole):
        super().__init__()
        self.whole, self.config, self.device = whole, whole.config, torch.device("cpu")

    def forward(self, input_ids, **_):
        return self.whole(input_ids=READ["input_ids"].expand(len(input_ids), -1), decoder_input_ids=input_ids)


@functools.cache
def exact(kind):
    start = torch.tensor([[START]])
    return joint_law(Behind(small(kind, WIDTH, 3)), start, STEPS, LogitsProcessorList())


def p_values(kind, method, rule, seed=0, **more):
    names = {"tokenizer": tokenizer(TARGET_PIECES), "assistant_tokenizer": tokenizer(DRAFTER_PIECES)}
    output = fast_generate(
        small(kind, WIDTH, 3),
        **READ,
        assistant_model=small(kind, WIDTH if method == "model" else len(DRAFTER_PIECES), 4),
        method=method,
        verification=rule,
        do_sample=True,
        top_k=0,
        seed=seed,
        num_assistant_tokens=2,
        max_new_tokens=STEPS,
        num_return_sequences=4000,
        **({} if method == "model" else names),
        **more,
    )
    tokens, law = output[:, 1:], exact(kind)
    pairs = pair_counts(tokens, 0, WIDTH), pair_counts(tokens, STEPS - 2, WIDTH)
    return [chi_square(pair, law.sum(axes)) for pair, axes in zip(pairs, ((2, 3), (0, 1)), strict=True)]


@pytest.mark.parametrize(
    ("kind", "method", "rule"),
    [("bart", "model", "match"), ("bart", "tli", "block"), ("t5", "model", "block"), ("t5", "tli", "token")],
)
def test_the_output_has_the_targets_law(kind, method, rule):
    assert min(p_values(kind, method, rule)) > 1e-4


def stays(self, buffer, states, own=RaggedLayer._write):
    """A column that was written once is not written again."""
    before = buffer.clone()
    after, n = own(self, buffer, states), before.shape[2]
    written = before.abs().sum((1, 3)) > 0
    after[:, :, :n] = torch.where(written[:, None, :, None], before, after[:, :, :n])
    return after


def test_rejected_tokens_that_stay_change_the_law(monkeypatch, kind="bart"):
    p_values(kind, "model", "token")  # the trial would find it

    monkeypatch.setattr(RaggedLayer, "_write", stays)
    assert min(p_values(kind, "model", "token")) < 1e-6
