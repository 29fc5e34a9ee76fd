"""Whether layers run fused is found out by trying: what is faster and right is taken, whatever fails is not."""

import copy

import pytest
import torch
from tiny import build_model, model, noisy, prompts

from specdec_fast import attention, fast_generate, fused_layers, last_speculation, static_model
from specdec_fast.dispatch import check_default, layers
from specdec_fast.fused_layers import fused_count
from specdec_fast.static_model import for_passes

SAID = "one attention in the place of another"


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Our attention on a CPU, and kernels that are there in the form of their reference."""
    monkeypatch.setattr(attention, "for_static_cache", lambda one: (attention.twin(one, attention.NAME), SAID))
    monkeypatch.setattr(static_model, "_can_fuse", lambda _: True)
    monkeypatch.setattr(static_model, "why_no_kernels", lambda _: None)
    fuse = fused_layers.fuse_layers
    monkeypatch.setattr(fused_layers, "fuse_layers", lambda one: fuse(one, "reference"))


@pytest.fixture
def paced(monkeypatch):
    """Seconds of passes, by whether layers are fused; returns what was timed."""

    def pace(fused):
        timed = []

        def timer(run, device):
            kinds = run.__closure__  # a pass closes over its runner
            (runner,) = [cell.cell_contents for cell in kinds if hasattr(cell.cell_contents, "score")]
            seconds = fused if fused_count(runner.model) else 1.0
            return lambda: timed.append(seconds) or seconds

        monkeypatch.setattr(static_model, "timer", timer)
        return timed

    return pace


def test_the_faster_way_is_taken_and_found_out_once(paced):
    for seconds, count, said in (
        (0.8, 2, "fused layers: they take 0.80 of the time of its own"),
        (0.99, 0, "the model's own layers: fused ones take 0.99 of their time"),
        (1.3, 0, "the model's own layers: fused ones take 1.30 of their time"),
    ):
        timed, original = paced(seconds), build_model("llama")
        made, told = for_passes(original)
        assert fused_count(made) == count
        assert told == f"{SAID}; {said}"
        assert len(timed) == 2 * len(static_model.LANES) * static_model.TIMES
        assert for_passes(original) == (made, told)
        assert len(timed) == 2 * len(static_model.LANES) * static_model.TIMES
        assert not fused_count(original)


def test_another_hook_asks_again(paced):
    paced(0.5)
    original = build_model("llama")
    assert fused_count(for_passes(original)[0]) == 2
    original.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert fused_count(for_passes(original)[0]) == 1


def test_layers_that_give_other_logits_are_not_taken(paced, monkeypatch):
    timed, right = paced(0.5), fused_layers.layer_product
    monkeypatch.setattr(
        fused_layers, "layer_product", lambda *given, **named: right(*given, **named) * (0.1 if "gated" in named else 1)
    )
    made, said = for_passes(build_model("llama"))
    assert not fused_count(made)
    assert said.endswith("the model's own layers: fused ones give other logits")
    assert not timed


def test_layers_that_fail_are_not_taken(paced, monkeypatch):
    paced(0.5)

    def fails(*given, **named):
        raise RuntimeError("layer_product does not run on cuda:0: out of resource\nand more")

    monkeypatch.setattr(fused_layers, "layer_product", fails)
    made, said = for_passes(build_model("llama"))
    assert not fused_count(made)
    assert said.endswith("own layers: fused ones fail (layer_product does not run on cuda:0: out of resource)")


@pytest.mark.parametrize("error", [TypeError("a forward of its own"), RuntimeError(), IndexError("far")])
def test_whatever_fails_is_said_and_costs_nothing_else(paced, monkeypatch, error):
    paced(0.5)

    def fails(*given, **named):
        raise error

    monkeypatch.setattr(fused_layers, "layer_heads", fails)
    made, said = for_passes(build_model("llama"))
    assert not fused_count(made)
    assert said.endswith(f"own layers: fused ones fail ({str(error) or 'RuntimeError'})")


def test_a_twin_is_held_against_the_model(monkeypatch):
    original = build_model("llama")
    assert static_model._alike(original, attention.twin(original, attention.NAME))
    for fault in ("turns", "type"):
        made = attention.twin(build_model("llama"), attention.NAME)
        if fault == "turns":
            made.model.rotary_emb.attention_scaling = 1.5
        else:
            monkeypatch.setattr(type(made), "forward", lambda *given, **named: (1, 2))
        assert not static_model._alike(original, made)
        assert not static_model._alike(original, made), "kept"


def test_float16_is_not_offered_fused_layers(monkeypatch):
    """A norm's square ends before its range does."""
    monkeypatch.undo()

    class Made:
        device = torch.device("cuda")
        config = type("Config", (), {"_attn_implementation": attention.NAME})

    for dtype, able in ((torch.bfloat16, True), (torch.float16, False), (torch.float32, False)):
        Made.dtype = dtype
        assert static_model._can_fuse(Made) == able


def test_a_model_of_another_kind_keeps_its_layers(paced):
    paced(0.5)
    made, said = for_passes(build_model("gpt2"))
    assert not fused_count(made)
    assert said.endswith("the model's own layers: none of them can be fused")


def test_kernels_that_are_not_there_are_said(paced, monkeypatch):
    paced(0.5)
    monkeypatch.setattr(static_model, "why_no_kernels", lambda _: "there is no Triton")
    for setting in ("auto", "fused"):
        monkeypatch.setenv("SPECDEC_FAST_LAYERS", setting)
        original = build_model("llama")
        if setting == "fused":
            with pytest.warns(UserWarning, match="layers run as they are, which only costs speed: there is no Triton"):
                made, said = for_passes(original)
        else:
            made, said = for_passes(original)
        assert not fused_count(made)
        assert said == f"{SAID}; the model's own layers: there is no Triton"


def test_a_setting_is_followed(paced, monkeypatch):
    timed, original = paced(0.5), build_model("llama")
    assert layers() == "auto"
    assert not fused_count(for_passes(original, compiled=True)[0]), "inductor joins operations itself"
    monkeypatch.setenv("SPECDEC_FAST_LAYERS", "plain")
    assert for_passes(original)[1] == SAID
    monkeypatch.setenv("SPECDEC_FAST_LAYERS", "fused")
    for compiled in (False, True):
        assert fused_count(for_passes(original, compiled)[0]) == 2
    assert not timed
    monkeypatch.setenv("SPECDEC_FAST_LAYERS", "quick")
    with pytest.raises(ValueError, match="SPECDEC_FAST_LAYERS must be auto, plain or fused, not 'quick'"):
        check_default("cpu")


def test_without_a_gpu_nothing_is_tried(monkeypatch):
    monkeypatch.undo()
    original = build_model("llama").to(torch.bfloat16)
    assert for_passes(original) == (original, None)


@pytest.mark.parametrize("fused", [0.5, 2.0])
def test_generation_says_which_layers_ran(paced, fused):
    paced(fused)
    target, drafter = (copy.deepcopy(one) for one in (model("llama"), noisy("llama")))
    asked = {**prompts(2, padded=True), "max_new_tokens": 8, "do_sample": False}
    output = fast_generate(target, **asked, assistant_model=drafter, num_assistant_tokens=3, compile="static")
    assert torch.equal(output, target.generate(**asked))
    statistics = last_speculation()
    assert statistics.loop == "device"
    assert ("fused layers: they take" in statistics.attention) == (fused < 1)


def test_a_pass_is_timed_by_running_it():
    ran = []
    seconds = static_model.timer(lambda: ran.append(1), torch.device("cpu"))()
    assert ran and 0 <= seconds < 60
