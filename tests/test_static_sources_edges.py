"""Models that read a source, in passes of fixed shape: what changes between calls, odd masks, caches and lengths."""

import copy

import graphs
import pytest
import torch
import transformers
from sources import START, build_writer, noisy_writer, source, writer
from test_encoded import read
from tiny import PAD, VOCABULARY, make_noisy, same
from transformers.modeling_outputs import BaseModelOutput

from specdec_fast import encoded, fast_generate, last_speculation
from specdec_fast.cache import cache_argument, cache_of
from specdec_fast.encoded import why_not_encoded
from specdec_fast.encoding import Encoded
from specdec_fast.static_sources import shape_of, why_not_static

STATIC = {"compile": "static"}
PLAIN = {"method": "autoregressive", **STATIC}


@pytest.fixture
def made(monkeypatch):
    return graphs.imitate(monkeypatch)


def both_of_bert(dtype):
    """A model whose decoder looks its positions up in a way that no twin is told."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": 512, **shape}
    reading = transformers.BertConfig(**sizes)
    writing = transformers.BertConfig(**sizes, is_decoder=True, add_cross_attention=True)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(reading, writing)
    config.decoder_start_token_id, config.pad_token_id = START, PAD
    target = transformers.EncoderDecoderModel(config).eval()
    target.generation_config.decoder_start_token_id, target.generation_config.pad_token_id = START, PAD
    return target.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positions_that_cannot_be_told_are_not_left_to_a_trial(dtype):
    """In half precision it takes small differences for rounding."""
    target = both_of_bert(dtype)
    made = read(target, "bart", 2)
    assert why_not_encoded(target, made) is None
    assert "positions that it cannot be told" in why_not_static(target, made)
    assert not encoded._shares(target, made, True)
    got = fast_generate(
        target, **source("bart", 2), assistant_model=make_noisy(target, 0.05), max_new_tokens=12, **STATIC
    )
    assert torch.equal(got, target.generate(**source("bart", 2), max_new_tokens=12))
    assert last_speculation().forward == "eager"


# What graphs were captured from -------------------------------------------------------------------------------------


def hooked(target):
    target.model.decoder.layers[-1].final_layer_norm.register_forward_hook(lambda module, given, out: out.flip(-1))


def coarser(target):
    for layer in target.model.decoder.layers:
        layer.self_attn_layer_norm.eps = 3.0


def otherwise_active(target):
    for layer in target.model.decoder.layers:
        del layer.activation_fn
        layer.activation_fn = torch.nn.functional.softplus


def biased(target):
    bias = torch.zeros_like(target.final_logits_bias)
    bias[:, 30:] = -50.0
    target.final_logits_bias = bias


def scaled(target):
    with torch.no_grad():
        target.model.decoder.layers[0].fc2.weight.mul_(-2)


def replaced(target):
    product = target.model.decoder.layers[0].fc2
    product.weight = torch.nn.Parameter(-2 * product.weight.detach())


@pytest.mark.parametrize("change", [hooked, coarser, otherwise_active, biased, scaled, replaced])
@pytest.mark.parametrize("processed", [False, True], ids=["device", "host"])
def test_a_model_that_has_changed_since_its_graphs_were_captured(change, processed, made):
    target = build_writer("bart", seed=9)
    more = {"repetition_penalty": 1.1} if processed else {}
    same(target, source("bart", 2), PLAIN, max_new_tokens=16, **more)
    before = target.generate(**source("bart", 2), max_new_tokens=16, **more)
    change(target)
    assert same(target, source("bart", 2), PLAIN, max_new_tokens=16, **more).forward == "static"
    assert made and not torch.equal(target.generate(**source("bart", 2), max_new_tokens=16, **more), before)


def test_a_table_of_positions_that_was_made_anew(made):
    """M2M100's grows in a forward of its own."""
    target = build_writer("m2m", seed=9)
    same(target, source("m2m", 2), PLAIN, max_new_tokens=12)
    table = target.model.decoder.embed_positions
    table.weights = torch.cat([table.weights.flip(0), table.weights])
    assert same(target, source("m2m", 2), PLAIN, max_new_tokens=12).forward == "static"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_drafter_in_another_precision_since(dtype):
    drafter = make_noisy(writer("bart"), 0.1)
    own = {"assistant_model": drafter, "num_assistant_tokens": 3, **STATIC}
    same(writer("bart"), source("bart", 2), own, max_new_tokens=12)
    drafter.to(dtype)
    same(writer("bart"), source("bart", 2), own, max_new_tokens=12)


def test_the_end_of_a_table_of_positions():
    """Lanes of a draft stand behind it, and columns of the buffers go on."""
    own = {"assistant_model": noisy_writer("bart"), "num_assistant_tokens": 5, **STATIC}
    statistics = same(writer("bart"), source("bart", 3), own, max_new_tokens=126)
    assert (statistics.loop, statistics.forward) == ("device", "static")


# Masks and lengths --------------------------------------------------------------------------------------------------


def listener():
    """A model whose mask is of a recording, which its decoder looks at."""
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    config = transformers.Speech2TextConfig(
        **sizes,
        vocab_size=VOCABULARY,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        input_feat_per_channel=8,
        input_channels=1,
        conv_channels=16,
        max_source_positions=200,
        max_target_positions=128,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=PAD,
        decoder_start_token_id=START,
    )
    target = transformers.Speech2TextForConditionalGeneration(config).eval()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for parameter in target.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 * 1.5)
    target.tie_weights()
    target.generation_config.num_beams = 1
    return target


def recording(frames, shown=None, seed=0):
    mask = torch.ones(2, frames, dtype=torch.long)
    mask[1, frames if shown is None else shown :] = 0
    heard = torch.randn(2, frames, 8, generator=torch.Generator().manual_seed(seed))
    return {"input_features": 3 * heard, "attention_mask": mask}


def test_a_short_recording_says_nothing_of_masks():
    target = listener()
    assert same(target, recording(4, 3), PLAIN, max_new_tokens=12).forward == "eager"
    for seed in range(3):
        statistics = same(target, recording(80, 16, seed), PLAIN, max_new_tokens=30)
        assert statistics.forward == "eager" and "mask that is not of what its encoder made" in statistics.loop_reason
    assert same(target, recording(80), PLAIN, max_new_tokens=30).forward == "static"


def test_a_source_of_no_numbers_says_nothing_of_masks():
    target = listener()
    made = target.get_encoder()(**recording(80))[0].detach()
    mask = recording(80)["attention_mask"]
    assert shape_of(target, Encoded(BaseModelOutput(last_hidden_state=made * torch.nan), mask)) is None
    assert why_not_encoded(target, Encoded(BaseModelOutput(last_hidden_state=made), mask)) is None
    assert shape_of(target, Encoded(BaseModelOutput(last_hidden_state=made), mask)) is not None


def test_lengths_that_come_once_are_not_captured(made):
    """Where nothing can be hidden each has passes of its own."""
    target = listener()
    for frames, forward in ((80, "eager"), (96, "eager"), (80, "static"), (80, "static")):
        before = len(made)
        statistics = same(target, recording(frames), PLAIN, max_new_tokens=12)
        assert statistics.forward == forward
        assert (len(made) == before) == (forward == "eager" or made[-1:] == made[before - 1 : before])
        assert forward == "static" or "each length has passes of its own" in statistics.loop_reason


def test_sources_of_many_lengths_keep_their_graphs(made):
    target = build_writer("t5", seed=9)
    own = {"assistant_model": make_noisy(target, 0.1), "num_assistant_tokens": 3, **STATIC}
    for turn in range(2):
        for columns in (10, 60, 90, 130, 300, 600):
            before, ids = len(made), torch.randint(3, VOCABULARY, (1, columns))
            same(target, {"input_ids": ids}, own, max_new_tokens=12)
            assert not turn or len(made) == before


def test_a_forward_that_was_replaced_is_the_reason_told():
    target = build_writer("moonshine", seed=9)
    target.forward = target.forward
    same(target, {**source("moonshine", 2), "attention_mask": torch.ones(2, 2000).long()}, PLAIN, max_new_tokens=9)
    assert "forward that was replaced" in last_speculation().loop_reason


@pytest.mark.parametrize("columns", [5, 17, 90])
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_a_cache_of_another_source_than_the_one_encoded(kind, columns):
    target, name = writer(kind), cache_argument(type(writer(kind)))
    first = fast_generate(
        target, **source(kind, 2), method="autoregressive", max_new_tokens=6, return_dict_in_generate=True
    )
    more = {"decoder_input_ids": first.sequences, "decoder_attention_mask": torch.ones_like(first.sequences)}

    def given():
        outputs = BaseModelOutput(last_hidden_state=torch.zeros(2, columns, 32))
        return {**more, "encoder_outputs": outputs, name: copy.deepcopy(cache_of(first)), "max_new_tokens": 6}

    assert torch.equal(fast_generate(target, **given(), **PLAIN), target.generate(**given()))
    assert last_speculation().forward == ("static" if columns == 17 else "eager")
