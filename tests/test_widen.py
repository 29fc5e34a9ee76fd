"""Widened models: the small one's logits, at the large one's sizes."""

import pathlib
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "benchmarks"))
import widen
from widen import SHAPES, Shape


def small_model(heads=4, kv_heads=2):
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=90, hidden_size=32, num_hidden_layers=2, intermediate_size=48, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=8, initializer_range=0.3, tie_word_embeddings=True, rms_norm_eps=1e-5,
        max_position_embeddings=256,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


IDS = torch.randint(0, 90, (2, 40), generator=torch.Generator().manual_seed(2))
LARGE = Shape(hidden=96, layers=4, heads=12, kv_heads=3, head_dim=16, intermediate=100, vocab=300)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize(
    "shape",
    [
        LARGE,
        Shape(hidden=33, layers=2, heads=4, kv_heads=2, head_dim=8, intermediate=48, vocab=91),
        Shape(hidden=64, layers=2, heads=4, kv_heads=2, head_dim=8, intermediate=48, vocab=90),
        Shape(hidden=32, layers=3, heads=4, kv_heads=2, head_dim=24, intermediate=48, vocab=90),
        Shape(hidden=32, layers=2, heads=16, kv_heads=4, head_dim=8, intermediate=64, vocab=90),
    ],
)
def test_widening_keeps_the_function(shape):
    small = small_model()
    large = widen.widen(small, shape, dtype=torch.float32, device="cpu")
    assert Shape.of(large.config) == shape
    expected, found = logits(small), logits(large)
    torch.testing.assert_close(found[..., :90], expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 1
    if shape.vocab > 90:
        assert float(found[..., 90:].max()) < -100


def test_every_matrix_has_the_size_it_should():
    large = widen.widen(small_model(), LARGE, dtype=torch.float32, device="cpu")
    read = sum(p.numel() for name, p in large.named_parameters() if p.ndim == 2 and "embed" not in name)
    assert read == LARGE.parameters_read()
    expected = {"0.5B": 0.49, "1B": 1.24, "8B": 7.5}  # billions, the embedding table left out
    for name, shape in SHAPES.items():
        assert shape.parameters_read() / 1e9 == pytest.approx(expected[name], abs=0.02)


@pytest.mark.parametrize("fault", ["norm", "heads", "rotary", "constant"])
def test_a_fault_in_widening_is_noticed(monkeypatch, fault):
    if fault == "norm":
        monkeypatch.setattr(widen, "_norm", lambda small, large: large[: small.shape[0]].copy_(small))
    elif fault == "heads":
        monkeypatch.setattr(widen, "_heads", lambda heads, group, wide: torch.arange(heads))
    elif fault == "rotary":
        monkeypatch.setattr(widen, "_rotary", lambda small, large: torch.arange(small))
    else:
        monkeypatch.setattr(widen, "LOW", 1.0)
    small = small_model()
    large = widen.widen(small, LARGE, dtype=torch.float32, device="cpu")
    expected = torch.nn.functional.pad(logits(small).softmax(-1), (0, 210))
    assert float((logits(large).softmax(-1) - expected).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden": 16}, "hidden"),
        ({"head_dim": 12}, "head_dim"),
        ({"heads": 3}, "heads"),
        ({"kv_heads": 12}, "query heads"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, named):
    with pytest.raises(ValueError, match=named):
        widen.widen(small_model(), Shape(**(vars(LARGE) | change)), dtype=torch.float32, device="cpu")
