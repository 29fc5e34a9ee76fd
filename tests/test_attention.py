"""The attention that Transformers models are given: passes over static caches, and models left as they were."""

import gc
import weakref

import pytest
import torch
from tiny import build_model, model
from transformers import StaticCache

from specdec_fast import attention
from specdec_fast.attention import NAME, attend, for_static_cache, places, twin, why_no_twin

SWITCHED = ("llama", "qwen2_windows", "mistral", "gemma3", "gpt2", "opt", "gpt_neox")


@pytest.fixture(params=["torch", "kernel"])
def how(request, monkeypatch):
    """Torch's attention with a mask, and the kernel through the interpreter."""
    if request.param == "kernel":
        launch = pytest.importorskip("specdec_fast.triton_kernels.launch_attention", reason="no Triton kernels here")
        if not launch.triton.knobs.runtime.interpret:
            pytest.skip(
                "needs Triton's interpreter: with a GPU the kernel is compiled, and these tensors are on the CPU"
            )
        monkeypatch.setattr(attention, "why_no_kernel", lambda device, dim: None)
    return request.param


@torch.no_grad()
def fed(target, cache, ids, **options):
    return target(input_ids=ids, past_key_values=cache, use_cache=True, **options).logits


def static_columns(start, n):
    return start.unsqueeze(1) + torch.arange(n)


class Rows(StaticCache):
    """Transformers' static cache, with rows that write where they are told to."""

    def __init__(self, target, columns):
        super().__init__(config=target.config, max_cache_len=columns)
        self.start = None

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        layer = self.layers[layer_idx]
        if not layer.is_initialized:
            layer.lazy_initialization(key_states, value_states)
        columns = static_columns(self.start, key_states.shape[2])[:, None, :, None]
        layer.keys.scatter_(2, columns.expand(key_states.shape), key_states)
        layer.values.scatter_(2, columns.expand(value_states.shape), value_states)
        return layer.keys, layer.values


def ragged_error(architecture, told):
    """How far the logits of ragged rows are from those of plain passes, ``told`` what they see.

    Rows stand at different columns, one has padding, and both are rolled back once.
    """
    plain = model(architecture)
    ours = twin(plain, NAME)
    ids = torch.randint(1, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    hidden = torch.tensor([0, 2])
    cache = Rows(plain, 24)
    for start, lanes in (
        (hidden, ids[:, :5]),
        (torch.tensor([3, 6]), ids[:, 5:8]),
        (torch.tensor([3, 5]), ids[:, 3:7]),
    ):
        cache.start = start
        columns = static_columns(start, lanes.shape[1])
        got = fed(ours, cache, lanes, attention_mask=told(start, hidden), position_ids=columns - hidden.unsqueeze(1))
    with torch.no_grad():
        return float((got - plain(input_ids=ids[:, :7]).logits[:, -4:]).abs().max())


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_ragged_rows_of_a_static_cache_get_the_logits_of_plain_passes(how, architecture):
    assert ragged_error(architecture, places) < 1e-4
    assert ragged_error(architecture, lambda start, hidden: places(start)) > 1e-2, "padding that is seen must show"
    assert ragged_error(architecture, lambda start, hidden: places(start + 1, hidden)) > 1e-2


@pytest.mark.parametrize("architecture", SWITCHED)
def test_a_twin_generates_what_the_model_does(architecture):
    plain = model(architecture)
    ours = twin(plain, NAME)
    ids = torch.randint(1, 60, (2, 5), generator=torch.Generator().manual_seed(2))
    for options in ({}, {"cache_implementation": "static"}, {"attention_mask": (ids != ids[0, 0]).long()}):
        options |= {"max_new_tokens": 6, "do_sample": False}
        assert torch.equal(ours.generate(ids, **options), plain.generate(ids, **options))


def test_static_caches_of_transformers_are_read_without_a_mask(how, monkeypatch):
    plain = model("llama")
    ours = twin(plain, NAME)
    seen = []
    wrapped = attention.places
    monkeypatch.setattr(attention, "places", lambda *given: seen.append(1) or wrapped(*given))
    ids = torch.randint(1, 60, (1, 5), generator=torch.Generator().manual_seed(3))
    caches = [StaticCache(config=plain.config, max_cache_len=20) for _ in range(2)]
    for lanes in (ids, ids[:, :2], ids[:, 1:4]):
        logits = [fed(one, cache, lanes) for one, cache in zip((plain, ours), caches, strict=True)]
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    assert seen


def test_windows_and_caps_reach_the_kernel(how):
    generator = torch.Generator().manual_seed(4)
    query, key, value = (torch.randn(2, heads, n, 16, generator=generator) for heads, n in ((4, 3), (2, 20), (2, 20)))
    start = torch.tensor([4, 15])
    for window, softcap in ((None, None), (5, None), (5, 2.0)):
        got, _ = attend(None, query, key, value, places(start, None, window), scaling=0.3, softcap=softcap)
        right = attention.decode_attention(
            query, key, value, start, window=window, scale=0.3, softcap=softcap, backend="reference"
        )
        torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5)


def test_capped_scores_with_a_mask_are_those_of_the_eager_attention():
    generator = torch.Generator().manual_seed(5)
    query, key, value = (torch.randn(2, heads, 6, 16, generator=generator) for heads in (4, 2, 2))
    start = torch.zeros(2, dtype=torch.int64)
    right = attention.decode_attention(query, key, value, start, softcap=2.0, backend="reference")
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    for mask in (None, causal, torch.where(causal, 0.0, -torch.inf)):
        got, _ = attend(None, query, key, value, mask, softcap=2.0)
        torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["s_aux", "position_bias"])
def test_what_the_kernel_does_not_know_is_refused_by_name(name):
    states = torch.zeros(1, 2, 3, 16)
    with pytest.raises(ValueError, match=name):
        attend(None, states, states, states, None, **{name: torch.zeros(2)})


def test_a_twin_changes_nothing_of_the_model_and_shares_its_weights():
    plain = build_model("llama")
    before = {name: dict(vars(module)) for name, module in plain.named_modules()}
    settings = plain.config.to_dict()
    ours = twin(plain, NAME)
    assert twin(plain, NAME) is ours
    assert plain.config.to_dict() == settings
    assert plain.config._attn_implementation == "sdpa"
    assert {name: dict(vars(module)) for name, module in plain.named_modules()} == before
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        plain.lm_head.weight.mul_(2)
    plain.lm_head.weight = torch.nn.Parameter(plain.lm_head.weight * 2)
    assert torch.equal(ours(ids).logits, plain(ids).logits)
    plain.lm_head = torch.nn.Linear(32, 61)
    assert torch.equal(twin(plain, NAME)(ids).logits, plain(ids).logits), "a new module makes a new twin"


def test_a_twin_goes_with_its_model():
    plain = build_model("llama")
    gone = weakref.ref(twin(plain, NAME))
    del plain
    gc.collect()
    assert gone() is None


def test_models_that_cannot_be_switched_say_why():
    assert "attention of its own" in why_no_twin(model("bloom"))
    replaced = build_model("llama")
    replaced.model.layers[0].forward = lambda *_: None
    assert "replaced" in why_no_twin(replaced)
    with pytest.raises(ValueError, match="attn_implementation='specdec_fast' is not possible"):
        twin(replaced, NAME)


def test_a_target_set_to_flash_attention_runs_static_passes_with_another():
    plain = build_model("llama")
    assert for_static_cache(plain) == (plain, None)
    plain.config._attn_implementation = "flash_attention_2"
    ours, said = for_static_cache(plain)
    assert said == "sdpa attention in the place of flash_attention_2"
    assert ours.config._attn_implementation == "sdpa"
    assert plain.config._attn_implementation == "flash_attention_2"
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    assert torch.equal(ours(ids).logits, build_model("llama")(ids).logits)


def test_where_the_kernel_runs_static_passes_have_it(monkeypatch):
    monkeypatch.setattr(attention, "why_no_kernel", lambda device, dim: None)
    for implementation in ("sdpa", "flash_attention_2"):
        plain = build_model("llama")
        plain.config._attn_implementation = implementation
        ours, said = for_static_cache(plain)
        assert ours.config._attn_implementation == NAME
        assert said == f"specdec_fast attention in the place of {implementation}"
    plain.config._attn_implementation = "eager"
    assert for_static_cache(plain) == (plain, None)
