"""Models that read a source, at the edges: tables that end, models that change, sources that cannot be read, seeds."""

import copy

import pytest
import torch
import transformers
from sources import START, build_writer, decoder_of, noisy_writer, source, taught_writer, writer
from tiny import PAD, make_noisy, model, same
from transformers import GenerationMixin

from specdec_fast import decoding_loop, encoded, fast_generate, last_speculation
from specdec_fast.apart import twin_apart
from specdec_fast.cache import cache_argument, cache_of
from specdec_fast.encoded import why_not_encoded
from specdec_fast.encoding import Encoded

LOOKUP = {"prompt_lookup_num_tokens": 4}


def resized(kind, **changes):
    """A model of another size."""
    whole = writer(kind)
    config = copy.deepcopy(whole.config)
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        for name, value in changes.items():
            if hasattr(part, name):
                setattr(part, name, value)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = type(whole)(config).eval()
        for parameter in made.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5)
    made.tie_weights()
    made.generation_config = copy.deepcopy(whole.generation_config)
    return made


@pytest.mark.parametrize("kind", ["bart", "marian", "trocr"])
def test_rows_apart_at_the_end_of_a_table_of_positions(kind):
    target = resized(kind, max_position_embeddings=32)
    own = {"assistant_model": make_noisy(target, 0.06), "num_assistant_tokens": 10}
    same(target, source(kind, 5), own, max_new_tokens=31)
    drafter = resized("bart", max_position_embeddings=24)
    if kind == "bart":
        same(writer("t5"), source("t5", 4), {"assistant_model": drafter, "num_assistant_tokens": 10}, max_new_tokens=60)


# Models that change --------------------------------------------------------------------------------------------------


def test_a_module_at_the_address_of_one_that_is_gone():
    target, inputs = build_writer("bart"), source("bart", 2)
    for turn in range(8):
        torch.manual_seed(turn)
        layer = target.model.decoder.layers[1]
        del layer.fc1
        layer.fc1 = torch.nn.Linear(32, 48)
        torch.nn.init.normal_(layer.fc1.weight, std=0.5)
        target.lm_head = None
        target.lm_head = torch.nn.Linear(32, target.config.vocab_size, bias=False)
        same(target, inputs, LOOKUP, max_new_tokens=12)


def test_numbers_and_attention_that_are_set_between_calls():
    target, inputs = build_writer("bart"), source("bart", 2)
    same(target, inputs, LOOKUP, max_new_tokens=12)
    target.model.decoder.embed_tokens.embed_scale = 5.0
    same(target, inputs, LOOKUP, max_new_tokens=12)
    target.model.decoder.layers[0].self_attn.scaling = 3.0
    same(target, inputs, LOOKUP, max_new_tokens=12)
    for name in ("eager", "sdpa"):
        target.set_attn_implementation(name)
        same(target, inputs, LOOKUP, max_new_tokens=12)
        assert twin_apart(target).config._attn_implementation == name


def test_a_model_in_training_mode_is_told_so():
    target = build_writer("bart")
    target.config.dropout = 0.3
    target = type(target)(target.config).train()
    with pytest.raises(ValueError, match=r"training mode, so call model.eval"):
        fast_generate(target, **source("bart"), max_new_tokens=4)


@torch.inference_mode()
def made_without_versions():
    return build_writer("t5"), make_noisy(build_writer("t5"), 0.1)


def test_weights_without_versions():
    target, drafter = made_without_versions()
    assert fast_generate(target, **source("t5"), assistant_model=drafter, max_new_tokens=8).shape == (1, 9)


# Texts that are masked, or begun without a mask ----------------------------------------------------------------------


def led():
    small = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    more = {"max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64, "attention_window": 8}
    special = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": PAD, "decoder_start_token_id": START}
    wide = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 61}
    made = transformers.LEDForConditionalGeneration(transformers.LEDConfig(**small, **more, **special, **wide)).eval()
    made.generation_config.forced_eos_token_id = None
    return made


def test_a_model_that_reads_several_tokens_wrongly_behind_a_mask():
    target = led()
    same(target, source("t5", 2), LOOKUP, max_new_tokens=20)
    ids, mask = torch.tensor([[0, 0, START, 5, 7]]), torch.tensor([[0, 0, 1, 1, 1]])
    with pytest.raises(ValueError, match=r"^decoder_attention_mask: LEDFor.* leave it out"):
        fast_generate(
            target, **source("t5"), decoder_input_ids=ids, decoder_attention_mask=mask, max_new_tokens=5, **LOOKUP
        )


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_without_a_mask_ids_go_on_behind_a_cache(kind):
    target, inputs, name = writer(kind), source(kind, 2), cache_argument(type(writer(kind)))
    made = target.generate(**inputs, max_new_tokens=6, return_dict_in_generate=True)
    new = torch.cat([made.sequences[:, -1:], torch.tensor([[7, 8], [9, 10]])], 1)
    for ids in (new, made.sequences):  # the latter are fed again, as generate does
        more = {**inputs, "decoder_input_ids": ids, "decoder_start_token_id": int(ids[0, 0]), "max_new_tokens": 6}
        expected = target.generate(**more, **{name: copy.deepcopy(cache_of(made))})
        own = {"assistant_model": noisy_writer(kind), name: copy.deepcopy(cache_of(made))}
        assert torch.equal(fast_generate(target, **more, **own), expected)


@pytest.mark.parametrize("kind", ["m2m", "t5gemma", "bart"])
def test_padding_inside_a_text_without_a_cache(kind):
    ids = torch.tensor([[START, 59, PAD, 8, 5, PAD, 9, 50, 41]])
    more = {**source(kind), "decoder_input_ids": ids, "use_cache": False, "max_new_tokens": 8}
    more |= {"return_dict_in_generate": True, "output_logits": True}
    expected = writer(kind).generate(**more)
    got = fast_generate(writer(kind), **more, assistant_model=noisy_writer(kind), num_assistant_tokens=3)
    assert torch.equal(got.sequences, expected.sequences)
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(got.logits, expected.logits, strict=True))


def test_positions_of_an_encoder_are_not_the_decoders():
    place = torch.arange(17).expand(2, 17) * 2
    same(writer("t5gemma"), {**source("t5gemma", 2), "position_ids": place}, LOOKUP, max_new_tokens=8)


# Sources that cannot be read -----------------------------------------------------------------------------------------


def test_a_source_of_no_numbers_says_nothing_of_the_model():
    target, inputs = build_writer("bart"), source("bart")
    with torch.no_grad():
        embeds = target.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(RuntimeError, match="NaN"):
        fast_generate(target, inputs_embeds=embeds * torch.nan, max_new_tokens=4)
    assert torch.equal(
        fast_generate(target, inputs_embeds=embeds, max_new_tokens=8), target.generate(**inputs, max_new_tokens=8)
    )


@pytest.mark.parametrize("tried", [False, True], ids=["first", "later"])
def test_a_drafter_whose_encoder_cannot_read_the_source(tried):
    drafter = resized("bart", max_position_embeddings=20)
    own = {"assistant_model": drafter, "num_assistant_tokens": 4, "max_new_tokens": 6}
    inputs = source("t5")
    if tried:
        fast_generate(writer("t5"), **inputs, **own)
    long = {name: torch.cat([part] * 3, 1) for name, part in inputs.items()}
    with pytest.raises(ValueError, match=r"^assistant_model: the encoder of Bart.* cannot read the source .*shorter"):
        fast_generate(writer("t5"), **long, **own)
    fast_generate(writer("t5"), **inputs, **own)
    assert last_speculation().drafted
    heard = resized("whisper", num_mel_bins=5)
    with pytest.raises(ValueError, match=r"^assistant_model: the encoder of Whisper.* cannot read the source"):
        fast_generate(writer("whisper"), **source("whisper"), assistant_model=heard, max_new_tokens=4)


def test_a_source_without_text():
    target, own = taught_writer("target", "t5")
    drafter, others = taught_writer("drafter", "bart")
    pair = {"assistant_model": drafter, "tokenizer": own, "assistant_tokenizer": others, "method": "tli"}
    ids = torch.full((1, 2), own.eos_token_id)
    same(target, {"input_ids": ids}, {**pair, "num_assistant_tokens": 3}, max_new_tokens=10)


def test_an_encoding_as_a_tuple_beside_a_mask():
    target, inputs = writer("bart"), source("bart", 2, padded=True)
    with torch.no_grad():
        made = target.get_encoder()(**inputs)
    given = {"encoder_outputs": (made.last_hidden_state,), "attention_mask": inputs["attention_mask"]}
    starts = {"decoder_input_ids": torch.full((2, 1), START)}
    expected = target.generate(**inputs, max_new_tokens=8)
    assert torch.equal(fast_generate(target, **given, **starts, **LOOKUP, max_new_tokens=8), expected)
    (reads, own), (drafter, others) = taught_writer("target", "t5"), taught_writer("drafter", "bart")
    pair = {"assistant_model": drafter, "tokenizer": own, "assistant_tokenizer": others, "method": "tli"}
    with torch.no_grad():
        made = reads.get_encoder()(**inputs)
    starts = {"decoder_input_ids": torch.full((2, 1), reads.config.decoder_start_token_id)}
    with pytest.raises(ValueError, match=r"^assistant_model: Bart.* needs the source itself"):
        fast_generate(reads, encoder_outputs=made, attention_mask=inputs["attention_mask"], **starts, **pair)


def test_ids_of_the_trial_are_no_padding():
    target = build_writer("m2m", vocabulary=8)
    made = Encoded(target.get_encoder()(input_ids=torch.tensor([[3, 4, 5]])), None)
    assert why_not_encoded(target, made) is None and encoded.found_of(target, made).stumbles == PAD


# A generate of the model's own ---------------------------------------------------------------------------------------


def deaf():
    """A Whisper that hears nothing, so that every window has the same law."""
    target = copy.deepcopy(writer("whisper"))
    with torch.no_grad():
        for layer in target.model.decoder.layers:
            layer.encoder_attn.out_proj.weight.zero_()
            layer.encoder_attn.out_proj.bias.zero_()
    target.generation_config.no_timestamps_token_id = 40
    target.generation_config.eos_token_id = target.config.eos_token_id = 5
    return target


@pytest.mark.parametrize("seed", [None, 3])
def test_windows_of_a_recording_draw_numbers_of_their_own(seed):
    target, alike, pairs = deaf(), 0, 0
    sound = torch.randn(1, 8, 160, generator=torch.Generator().manual_seed(0))
    more = {"attention_mask": torch.ones(1, 160, dtype=torch.long), "return_timestamps": True, "return_segments": True}
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "max_new_tokens": 10}
    texts = []
    for turn in range(6):
        own = {} if seed is None else {"seed": seed + turn}
        for _ in range(2):
            made = fast_generate(target, sound, **more, **sampling, **own, assistant_model=make_noisy(target, 0.1))
            texts.append([segment["tokens"].tolist() for segment in made["segments"][0]])
        if seed is not None:
            assert texts[-1] == texts[-2]
        pairs += len(texts[-1]) - 1
        alike += sum(a == b for a, b in zip(texts[-1], texts[-1][1:], strict=False))
    assert pairs > 6 and alike < pairs / 3


def test_seeds_a_row_are_not_for_rows_that_come_and_go():
    with pytest.raises(ValueError, match=r"^seed: WhisperFor.* give one int"):
        fast_generate(writer("whisper"), **source("whisper", 2), do_sample=True, seed=[1, 2], max_new_tokens=4)


def test_beams_go_to_the_models_own_generate():
    more = {**source("whisper"), "num_beams": 2, "max_new_tokens": 5}
    assert torch.equal(fast_generate(writer("whisper"), **more), writer("whisper").generate(**more))


def test_a_generate_that_takes_no_loop_is_refused():
    class Own(type(writer("bart"))):
        def generate(self, *arguments, custom_generate=None, **more):
            return GenerationMixin.generate(self, *arguments, **more)

    target = Own(copy.deepcopy(writer("bart").config)).eval()
    with pytest.raises(ValueError, match=r"^model: Own has a generate of its own that takes no other"):
        fast_generate(target, **source("bart"), assistant_model=noisy_writer("bart"), max_new_tokens=4)


def test_a_loop_that_serves_again_gives_the_same():
    """A loop of the caller's repeats with its seed, where each call is one of its own."""
    loop = decoding_loop(assistant_model=noisy_writer("bart"), seed=3)
    calls = [
        writer("bart").generate(**source("bart"), custom_generate=loop, do_sample=True, max_new_tokens=12)
        for _ in range(2)
    ]
    assert torch.equal(*calls)


def test_a_decoder_alone_is_no_target_with_a_source():
    with pytest.raises(ValueError, match=r"^encoder_outputs is not supported"):
        fast_generate(decoder_of(), torch.tensor([[START]]), encoder_outputs=torch.ones(1, 4, 32), max_new_tokens=2)
    assert (
        fast_generate(model("llama"), torch.tensor([[3]]), assistant_model=decoder_of(), max_new_tokens=4).numel() == 5
    )
