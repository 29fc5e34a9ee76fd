"""A small drafter's pass in one native call: the model's own logits up to 8-bit weights, or the model as it is."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from laws import pairs_p_value
from tiny import model as tiny_model
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MinistralConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SeedOssConfig,
    SmolLM3Config,
)

from specdec_fast import fast_generate, last_speculation, native
from specdec_fast import lean as lean_module
from specdec_fast.lean import CAPABILITIES, lean_model, why_not_lean
from specdec_fast.runner import Runner

pytestmark = pytest.mark.skipif(not native.load_ops(), reason="needs the native ops")

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
FAMILIES = {
    "llama": LlamaConfig(**SHAPE),
    "llama_bias": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-3),
    "odd_heads": LlamaConfig(**SHAPE, head_dim=6),
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
    "mistral_window": MistralConfig(**SHAPE, head_dim=12, sliding_window=4),
    "ministral": MinistralConfig(
        **SHAPE, head_dim=12, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
    ),
    "smollm3": SmolLM3Config(**SHAPE, no_rope_layers=[1, 0], pad_token_id=0),
    "smollm3_window": SmolLM3Config(
        **SHAPE,
        no_rope_layers=[0, 1],
        pad_token_id=0,
        use_sliding_window=True,
        sliding_window=4,
        layer_types=["full_attention", "sliding_attention"],
    ),
    "seed_oss": SeedOssConfig(**SHAPE, head_dim=12),
    "gemma3": Gemma3TextConfig(
        **SHAPE, head_dim=12, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
    ),
}


def made(config, dtype=torch.float32, seed=3):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.data.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.data.normal_(0.0, 0.3)
    return model.to(dtype)


def rounded(model):
    """The same model with its matrices rounded to 8 bits a row, the embedding left as it is."""
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            step = module.weight.data.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
            module.weight.data = (module.weight.data / step).round() * step
    return model


def on(capability, model, rounded_):
    """The lean form on one instruction set; skips where the machine has not got it."""
    lean = copy.copy(lean_model(model, rounded=rounded_))
    lean.capability = CAPABILITIES.index(capability)
    try:
        Runner(model, 1, lean=lean).feed([0], torch.tensor([[1]]), [1], [1])
    except RuntimeError as error:
        if "this machine cannot run" not in str(error):
            raise
        pytest.skip(f"needs a CPU with {capability}")
    return lean


def feed(runner, ids):
    """Rows advance by different counts, roll back, and leave."""
    parts = [runner.feed([0, 1], ids[:, :4], [4, 3], [2, 3])]
    parts.append(runner.feed([0, 1], torch.stack([ids[0, 4:7], ids[1, 3:6]]), [3, 1], [3, 1])[:, :1])
    runner.rollback(0, 5)
    parts.append(runner.feed([0], ids[:1, 5:8], [3], [1]))
    return torch.cat([part.reshape(-1, part.shape[-1])[:2] for part in parts])


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_rounded_weights(family):
    model = made(FAMILIES[family])
    lean = lean_model(model)
    assert lean is not None
    ids = torch.randint(97, (2, 8), generator=torch.Generator().manual_seed(0))
    own = feed(Runner(model, 2, lean=lean), ids)
    # Inputs have 16 bits where the machine multiplies bytes; 8 would differ by a tenth
    assert torch.allclose(own, feed(Runner(rounded(model), 2), ids), atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_targets_logits_are_its_own(family, padded):
    model = made(FAMILIES[family])
    visible = torch.tensor([[False, False, True], [True, True, True]]) if padded else None
    ids = torch.randint(97, (2, 8), generator=torch.Generator().manual_seed(0))
    lean = lean_model(model, rounded=False)
    assert lean is not None
    own = feed(Runner(model, 2, lean=lean, visible=visible), ids)
    assert torch.allclose(own, feed(Runner(model, 2, visible=visible), ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("capability", ["avx2", "dot"])
@pytest.mark.parametrize("rounded_", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral_window", "gemma3"])
def test_a_position_gets_the_same_bits_whatever_shares_its_pass(family, rounded_, capability):
    model = made(FAMILIES[family], torch.bfloat16)
    lean = on(capability, model, rounded_)
    ids = torch.randint(97, (1, 150), generator=torch.Generator().manual_seed(2))
    together, apart = Runner(model, 1, lean=lean), Runner(model, 1, lean=lean)
    long = 150 if lean.takes([18])[0] else 148  # where the machine has the products for it
    for begin, end in ((0, 7), (7, 20), (125, 132), (132, long)):  # the last ones see columns on both sides of a span
        for runner in (together, apart):
            if runner.length[0] < begin:
                runner.feed([0], ids[:, runner.length[0] : begin], [begin - runner.length[0]], [1])
        n = end - begin
        whole = together.feed([0], ids[:, begin:end], [n], [n])[0]
        steps = torch.cat([apart.feed([0], ids[:, i : i + 1], [1], [1])[0] for i in range(begin, end)])
        assert torch.equal(whole, steps)


@pytest.mark.parametrize(("hidden", "inner"), [(536, 1100), (2048, 2508), (88, 5000), (1024, 1056)])
def test_many_positions_get_the_bits_of_few(hidden, inner):
    """Matrices wide enough for blocks of rows and parts of columns, in numbers that none of them divides."""
    wide = SHAPE | {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": 1}
    model = made(LlamaConfig(**wide), torch.bfloat16)
    lean = on("dot", model, False)
    ids = torch.randint(97, (1, 93), generator=torch.Generator().manual_seed(2))
    assert lean.takes([93])[0]
    whole = Runner(model, 1, lean=lean).feed([0], ids, [93], [93])[0]
    runner = Runner(model, 1, lean=lean)
    for size in (1, 3, 5, 7, 8, 9, 12, 17, 24):  # spans of inputs of every kind
        runner.rollback(0, 0)
        few = [runner.feed([0], part, [part.shape[1]], [part.shape[1]])[0] for part in ids.split(size, 1)]
        assert torch.equal(whole, torch.cat(few))


@pytest.mark.parametrize("group", [1, 2, 3, 5])
@pytest.mark.parametrize("dim", [32, 40, 64, 96])
def test_bfloat16_columns_are_read_in_pairs(dim, group):
    """Odd and even numbers of columns, from the first and, behind padding, from a later one."""
    heads = {"hidden_size": 60, "head_dim": dim, "num_attention_heads": 2 * group, "num_key_value_heads": 2}
    model = made(LlamaConfig(**SHAPE | heads), torch.bfloat16)
    pairs, single = on("dot", model, False), on("avx2", model, False)
    visible = torch.tensor([[False, False, True], [True, True, True]])
    ids = torch.randint(97, (2, 8), generator=torch.Generator().manual_seed(4))
    exact = feed(Runner(made(LlamaConfig(**SHAPE | heads)), 2, visible=visible), ids)
    for lean in (pairs, single):
        error = feed(Runner(model, 2, lean=lean, visible=visible), ids) - exact
        assert error.square().mean().sqrt() < 0.03 * exact.std()


def attending(heads, kv_heads, dim, window=0, **more):
    """One whose attention matters, in bfloat16, and the same in float32."""
    sizes = {"hidden_size": 8 * heads, "head_dim": dim, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    shape = SHAPE | sizes | {"max_position_embeddings": 600} | more
    config = MistralConfig(**shape, sliding_window=window) if window else LlamaConfig(**shape)
    exact = made(config)
    for layer in exact.model.layers:
        layer.self_attn.q_proj.weight.data *= 3
    model = copy.deepcopy(exact).to(torch.bfloat16)
    for mine, its in zip(exact.parameters(), model.parameters(), strict=True):
        mine.data = its.data.float()
    return model, exact


@pytest.fixture
def usual_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


HEADS = [(2, 2, 32, 0), (6, 2, 64, 0), (7, 1, 96, 0), (4, 1, 160, 0), (4, 2, 32, 5), (6, 2, 64, 130), (3, 1, 128, 40)]


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "window"), HEADS)
def test_lanes_that_share_what_is_read_get_the_bits_of_single_ones(heads, kv_heads, dim, window, usual_threads):
    """Two rows, one behind padding, by passes of many sizes: within a span of columns, across its end, behind it."""
    model, exact = attending(heads, kv_heads, dim, window)
    lean = on("dot", model, False)
    visible = torch.ones(2, 9, dtype=torch.bool)
    visible[0, :5] = False
    ids = torch.randint(97, (2, 300), generator=torch.Generator().manual_seed(6))
    single = Runner(model, 2, lean=lean, visible=visible)
    steps = [single.feed([0, 1], ids[:, i : i + 1], [1, 1], [1, 1]) for i in range(300)]
    alone = torch.cat(steps, 1)
    for size, threads in ((3, 2), (8, 2), (8, 1), (17, 3), (100, 2)):
        torch.set_num_threads(threads)
        runner, at, parts = Runner(model, 2, lean=lean, visible=visible), 0, []
        while at < 300:
            n = min(size, 300 - at)
            parts.append(runner.feed([0, 1], ids[:, at : at + n], [n, n], [n, n]))
            at += n
        together = torch.cat(parts, 1)
        assert torch.equal(together[0, 5:], alone[0, 5:]) and torch.equal(together[1], alone[1])
    wanted, its = (Runner(one, 2, visible=visible).feed([0, 1], ids, [300] * 2, [300] * 2) for one in (exact, model))
    error, usual = ((one.float() - wanted)[:, 5:].square().mean() for one in (alone, its))
    assert error < 1.5 * usual


def test_inputs_of_every_width_have_room():
    """Those of 1,024 columns lie further apart than those of 1,056. In a thread where no earlier pass made room."""
    wide = SHAPE | {"hidden_size": 1024, "intermediate_size": 1056, "num_hidden_layers": 1}
    model = made(LlamaConfig(**wide), torch.bfloat16)
    runner = Runner(model, 1, lean=on("dot", model, False))
    ids = torch.randint(97, (1, 100), generator=torch.Generator().manual_seed(2))
    said = []

    def run():
        few = [runner.feed([0], part, [1], [1])[0] for part in ids.split(1, 1)]
        runner.rollback(0, 0)
        said.append(torch.equal(runner.feed([0], ids, [100], [100])[0], torch.cat(few)))

    alone = threading.Thread(target=run)
    alone.start()
    alone.join()
    assert said == [True]


def test_long_prompts_are_read_in_pieces(monkeypatch):
    """Where the operation is faster than the model's own passes at every length."""
    model, _ = attending(6, 2, 64)
    lean = on("dot", model, False)
    if not lean.piece(1):
        pytest.skip("needs a CPU that multiplies bfloat16 in vectors and has no tiles for it")
    ids = torch.randint(97, (2, 500), generator=torch.Generator().manual_seed(6))
    own = Runner._model_forward
    monkeypatch.setattr(Runner, "_model_forward", None)
    sizes, read = [], type(lean).__call__
    monkeypatch.setattr(type(lean), "__call__", lambda *given: sizes.append(given[1].shape[1]) or read(*given))
    said = Runner(model, 2, lean=lean, joint=True).feed([0, 1], ids, [500, 490], [2, 1])
    assert sizes == [125, 125, 125, 125]
    sizes.clear()
    longer = torch.randint(97, (1, 517), generator=torch.Generator().manual_seed(6))
    whole = Runner(model, 1, lean=lean).feed([0], longer, [517], [6])  # 5 of them a draft
    assert sizes == [173, 173, 171]
    steps = Runner(model, 1, lean=lean, prefill_chunk=32).feed([0], longer, [517], [6])
    assert torch.equal(whole, steps)
    sizes.clear()
    some = Runner(model, 1, lean=lean, prefill_chunk=200).feed([0], ids[:1], [500], [2])
    assert sizes == [200, 200, 98, 2] and torch.equal(some[0], said[0])
    monkeypatch.setattr(Runner, "_model_forward", own)
    Runner(model, 2, lean=lean, joint=True).feed([0, 1], ids, [500, 90], [1, 1])  # too short a row to share pieces
    assert len(sizes) == 4


@pytest.mark.parametrize("place", [8, 9, 127, 128, 130])
def test_a_position_is_not_touched_by_what_comes_behind_it(place):
    """A draft may hold anything: what is no number stays behind the position it comes with."""
    model, _ = attending(6, 2, 64)
    model.model.embed_tokens.weight.data[96] = float("nan")
    lean = on("dot", model, False)
    ids = torch.randint(96, (1, 140), generator=torch.Generator().manual_seed(6))
    wanted = Runner(model, 1, lean=lean).feed([0], ids, [140], [140])[0]
    ids[0, place] = 96
    for size in (7, 140):
        runner = Runner(model, 1, lean=lean)
        parts = [runner.feed([0], part, [part.shape[1]], [part.shape[1]])[0] for part in ids.split(size, 1)]
        said = torch.cat(parts)
        assert torch.equal(said[:place], wanted[:place]) and said[place:].isnan().all()


def test_a_position_is_not_touched_by_what_it_does_not_see():
    """Padding, and what has left a window: one layer, so nobody in between hands it on."""
    model, _ = attending(6, 2, 64, window=40, num_hidden_layers=1)
    model.model.embed_tokens.weight.data[96] = float("nan")
    lean = on("dot", model, False)
    visible = torch.ones(1, 5, dtype=torch.bool)
    visible[0, :5] = torch.tensor([False, False, False, True, True])
    ids = torch.randint(96, (1, 200), generator=torch.Generator().manual_seed(6))
    wanted = Runner(model, 1, lean=lean, visible=visible).feed([0], ids, [200], [200])[0]
    ids[0, :3], ids[0, 101] = 96, 96
    for size in (1, 7, 200):
        runner = Runner(model, 1, lean=lean, visible=visible)
        parts = [runner.feed([0], part, [part.shape[1]], [part.shape[1]])[0] for part in ids.split(size, 1)]
        said = torch.cat(parts)
        clean = [*range(3, 101), *range(141, 200)]
        assert torch.equal(said[clean], wanted[clean]) and said[101:141].isnan().all()


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("family", ["llama_bias", "odd_heads", "gemma3"])
def test_every_instruction_set_gives_these_logits(family, capability):
    model = made(FAMILIES[family])
    ids = torch.randint(97, (2, 8), generator=torch.Generator().manual_seed(0))
    for form, same, atol in ((True, rounded(made(FAMILIES[family])), 2e-3), (False, model, 1e-4)):
        lean = on(capability, model, form)
        own = feed(Runner(model, 2, lean=lean), ids)
        assert torch.allclose(own, feed(Runner(same, 2), ids), atol=atol, rtol=1e-3)


def test_bfloat16_models_keep_a_bfloat16_cache(monkeypatch):
    model = made(FAMILIES["llama"], torch.bfloat16)
    lean = lean_model(model)
    monkeypatch.setattr(lean, "_most", 16)
    runner = Runner(model, 1, lean=lean)
    ids = torch.randint(97, (1, 40), generator=torch.Generator().manual_seed(1))
    runner.feed([0], ids[:, :30], [30], [1])  # by the model itself
    own = runner.feed([0], ids[:, 30:], [10], [10])[0]
    assert runner.caches[0][1].ragged[0].keys.dtype == torch.bfloat16
    whole = model(input_ids=ids, use_cache=False).logits[0, 30:].float()
    assert (own - whole).square().mean().sqrt() < 0.05 * whole.std()


def test_a_restricted_head_gives_the_same_numbers():
    model = made(FAMILIES["qwen2"])
    lean = lean_model(model)
    ids, wanted = torch.tensor([[5, 6, 7]]), torch.tensor([3, 96, 10])
    whole = Runner(model, 1, lean=lean).feed([0], ids, [3], [1])
    some = Runner(model, 1, lean=lean.restricted(wanted)).feed([0], ids, [3], [1])
    assert torch.allclose(some, whole[..., wanted], rtol=1e-5, atol=1e-5)


def test_changed_weights_are_read_again():
    model = made(FAMILIES["llama"])
    before = lean_model(model)
    assert lean_model(model) is before
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    after = lean_model(model)
    ids = torch.tensor([[1, 2]])
    logits = [Runner(model, 1, lean=lean).feed([0], ids, [2], [1]) for lean in (before, after)]
    assert torch.allclose(2 * logits[0], logits[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "name", "fault"),
    [
        ("gemma3", "gates", lambda *_: False),  # SiLU in GELU's place
        ("gemma3", "embedded", lambda module: (module.weight.detach().contiguous(), 1.0)),
        ("gemma3", "layer_kind", lambda rotary, layer: "full_attention"),  # one table for all layers
        ("smollm3", "layer_kind", lambda rotary, layer: ""),  # layers without turns are turned
    ],
)
def test_a_pass_of_another_model_is_found(family, name, fault, monkeypatch):
    monkeypatch.setattr(lean_module, name, fault)
    model = made(FAMILIES[family])
    assert lean_model(model, rounded=False) is None and "other logits" in why_not_lean(model, rounded=False)


@pytest.mark.parametrize("rule", ["match", "block"])
@pytest.mark.parametrize("family", ["gemma3", "smollm3"])
def test_the_output_has_the_targets_law(family, rule):
    config = copy.deepcopy(FAMILIES[family])
    config.vocab_size, config.pad_token_id, config.initializer_range = 8, None, 0.3
    config.bos_token_id = config.eos_token_id = None
    target, drafter, prompt = made(config), made(config, seed=4), torch.tensor([[1, 2, 5]])
    given = {"do_sample": True, "top_k": 0, "max_new_tokens": 4, "num_return_sequences": 3000, "seed": 0}
    pair = {"assistant_model": drafter, "num_assistant_tokens": 2, "verification": rule}
    text = fast_generate(target, prompt, **given, **pair)
    assert last_speculation().forward == "native"
    assert pairs_p_value(target, prompt, text, 8) > 1e-4
    if rule == "block":  # the law of another model is none of this one's
        assert pairs_p_value(drafter, prompt, text, 8) < 1e-6


def test_other_structures_run_as_they_are():
    for family in ("gpt2", "gpt_neox"):
        assert lean_model(tiny_model(family)) is None
    for change in (
        {"attn_logit_softcapping": 50.0},
        {"use_bidirectional_attention": True},
        {"hidden_activation": "relu"},
    ):
        assert lean_model(made(Gemma3TextConfig(**SHAPE, head_dim=12, **change))) is None
    hooked = made(FAMILIES["llama"])
    hooked.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, inputs, output: output + 1)
    assert lean_model(hooked) is None
    scaled = made(FAMILIES["llama"])
    scaled.forward = lambda *args, **kwargs: (
        type(scaled)
        .forward(scaled, *args, **kwargs)
        .__class__(logits=type(scaled).forward(scaled, *args, **kwargs).logits.flip(-1))
    )
    assert lean_model(scaled) is None


def test_the_statistics_say_why_passes_are_the_models_own():
    ids = torch.tensor([[5, 9, 3]])
    plain = {"max_new_tokens": 3, "do_sample": False, "method": "autoregressive"}
    hooked = made(FAMILIES["llama"])
    hooked.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, inputs, output: None)
    name = type(tiny_model("gpt2")).__name__
    for model, why in (
        (tiny_model("gpt2"), f"passes are the model's own: {name} is not built like Llama"),
        (hooked, f"passes are the model's own: something hooks into the modules of {type(hooked).__name__}"),
        (made(FAMILIES["llama"]), ""),
    ):
        fast_generate(model, ids, **plain)
        assert last_speculation().loop_reason == why
        assert (why_not_lean(model, rounded=False) is None) == (lean_model(model, rounded=False) is not None)
    fast_generate(tiny_model("gpt2"), ids, **plain, compile="off")
    assert last_speculation().loop_reason == ""  # as it was asked for


def test_what_is_out_of_range_is_an_error_and_no_crash():
    model = made(FAMILIES["llama"])
    lean = lean_model(model)
    runner = Runner(model, 1, lean=lean)
    logits = runner.feed([0], torch.tensor([[5000]]), [1], [1])  # read as another id, as everywhere
    assert logits.isfinite().all()
    cache = runner.caches[0][1]
    cache.window.start, cache.window.end = 1, 2
    with pytest.raises(RuntimeError, match="out of range"):
        lean(torch.tensor([[-1]]), torch.tensor([[1]]), [0], cache, [0])


@pytest.mark.parametrize("change", ["norm", "bias", "matrix", "frequencies", "scaling"])
def test_changes_that_leave_no_trace_are_noticed(change):
    model = made(FAMILIES["llama_bias"])
    ids = torch.tensor([[1, 2, 3]])
    Runner(model, 1, lean=lean_model(model, rounded=False)).feed([0], ids, [3], [3])
    layer = model.model.layers[0]
    if change == "norm":
        layer.input_layernorm.weight.data.mul_(1.7)
    elif change == "bias":
        layer.self_attn.o_proj.bias.data.add_(0.3)
    elif change == "matrix":
        layer.mlp.down_proj.weight.data.mul_(-1.0)
    elif change == "frequencies":
        model.model.rotary_emb.inv_freq.mul_(0.1)
    else:
        layer.self_attn.scaling *= 2
    for rounded_ in (False, True):
        lean = lean_model(model, rounded=rounded_)
        if lean is None:
            continue
        own = Runner(model, 1, lean=lean).feed([0], ids, [3], [3])
        whole = model(input_ids=ids, use_cache=False).logits
        assert (own - whole).square().mean().sqrt() < (0.3 if rounded_ else 1e-4) * whole.std()


def test_models_made_in_inference_mode_run():
    with torch.inference_mode():
        model = made(FAMILIES["llama"])
    assert lean_model(model) is not None


def test_what_a_short_trial_cannot_tell_is_refused():
    """Llama knows no window, whatever its configuration holds; unknown attention may scale by position."""
    assert lean_model(made(LlamaConfig(**SHAPE, sliding_window=20))) is None
    other = made(FAMILIES["llama"])
    for layer in other.model.layers:
        layer.self_attn.__class__ = type("OtherAttention", (type(layer.self_attn),), {})
    assert lean_model(other) is None


def test_a_model_that_has_moved_leaves_nothing_behind():
    model = made(FAMILIES["llama"])
    kept = weakref.ref(lean_model(model, rounded=False))
    model.to("meta")
    assert lean_model(model) is None
    gc.collect()
    assert kept() is None
