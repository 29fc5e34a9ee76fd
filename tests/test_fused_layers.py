"""Layers of few operations: against plain layers over a static cache, kernels against torch, what is refused."""

import copy

import pytest
import torch
from tiny import build_model, model, noisy, prompts
from torch.nn.functional import rms_norm, silu
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

from specdec_fast import attention, device_plan, fast_generate, fused_layers, last_speculation
from specdec_fast.fused_layers import fuse_layers, fuse_norms, why_not_fused
from specdec_fast.layer_ops import GROUP, layer_heads, layer_product, layer_product_scaled, layer_scale
from specdec_fast.static_runner import StaticRunner, empty_cache

CLOSE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ARCHITECTURES = ("llama", "qwen2", "qwen2_windows", "mistral", "qwen3")


@pytest.fixture(params=["reference", "triton"])
def backend(request):
    if request.param == "triton":
        launch = pytest.importorskip("specdec_fast.triton_kernels.launch_layers", reason="no Triton kernels here")
        assert launch.triton.knobs.runtime.interpret or DEVICE == "cuda"
    with torch.device(DEVICE):
        yield request.param


def built(architecture):
    if architecture != "qwen3":
        found = build_model(architecture)
    else:
        sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=16)
        found = Qwen3ForCausalLM(Qwen3Config(vocab_size=61, num_key_value_heads=2, pad_token_id=0, **sizes)).eval()
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(torch.rand(parameter.shape) - 0.5)
    return found.to(DEVICE)


@torch.no_grad()
def passes(made, head=None):
    """Logits of passes of one and of four lanes over a ragged static cache, the second rolled back and run again."""
    ids = torch.randint(1, 60, (2, 11), generator=torch.Generator().manual_seed(1), device="cpu").to(DEVICE)
    visible = torch.tensor([[True] * 5, [False, False, True, True, True]])
    runner = StaticRunner(made, empty_cache(made, 2, 32), 2, visible=visible.to(DEVICE))
    runner.feed([0, 1], ids[:, :5], [5, 5], [1, 1])
    found = [runner.score(ids[:, 5:6], torch.tensor([5, 5], device=DEVICE))]
    found.append(runner.score(ids[:, 6:10], torch.tensor([6, 6], device=DEVICE)))
    found.append(runner.score(ids[:, 7:11], torch.tensor([7, 6], device=DEVICE)))
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fused_layers_compute_what_plain_ones_do(backend, architecture):
    original = built(architecture)
    expected = passes(attention.twin(original, "sdpa"))
    made = attention.twin(original, attention.NAME)
    assert fuse_layers(made, backend) == 2
    for got, right in zip(passes(made), expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4)


def test_the_operations_are_what_runs(backend, monkeypatch):
    """Short passes of fixed shape run them, a prompt and passes at many positions do not."""
    seen = []

    def watch(name):
        run = getattr(fused_layers, name)

        def watched(*arguments, **options):
            seen.append((name, arguments[0].shape[0]))
            return run(*arguments, **options)

        monkeypatch.setattr(fused_layers, name, watched)

    for name in ("layer_scale", "layer_product", "layer_product_scaled", "layer_heads"):
        watch(name)
    made = attention.twin(built("llama"), attention.NAME)
    fuse_layers(made, backend)
    passes(made)
    start, common = ["layer_scale"], ["layer_product", "layer_heads", "layer_product_scaled", "layer_product"]
    one = [*start, *common, "layer_product_scaled", *common, "layer_product"]  # two layers, one norm between them
    assert seen == [(name, rows) for rows in (2, 8, 8) for name in one]
    monkeypatch.setattr(fused_layers, "MOST_ROWS", 7)
    seen.clear()
    passes(made)
    assert seen == [(name, 2) for name in one]


def test_what_a_layer_leaves_is_for_its_own_states_alone(backend):
    """States that something changed between two layers are scaled anew, and nothing is kept behind a pass."""
    original = built("llama")
    made = attention.twin(original, attention.NAME)
    fuse_layers(made, backend)
    expected = passes(made)
    second = made.model.layers[1]
    kind = type(second)

    class Doubled(kind):
        def forward(self, hidden_states, *rest, **named):
            return kind.forward(self, hidden_states * 2, *rest, **named)

    second.__class__ = Doubled
    changed = passes(made)
    second.__class__ = kind
    plain = attention.twin(original, "sdpa").model.layers[1]
    plain.register_forward_pre_hook(lambda _, given, named: ((given[0] * 2, *given[1:]), named), with_kwargs=True)
    for got, right, before in zip(changed, passes(attention.twin(original, "sdpa")), expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(got, before, rtol=1e-2)


def test_nothing_is_kept_behind_a_pass(backend):
    made = attention.twin(built("llama"), attention.NAME)
    fuse_layers(made, backend)
    runner = StaticRunner(made, empty_cache(made, 1, 32), 1)
    with torch.no_grad():
        runner.score(torch.ones(1, 2, dtype=torch.long, device=DEVICE), torch.zeros(1, dtype=torch.long, device=DEVICE))
    assert runner.cache.place.scaled is None and runner.cache.place.lanes is None


def test_heads_that_are_turned_in_part_are_left_to_the_plain_layer(backend, monkeypatch):
    """Cosines for fewer entries than a head has: what is written then would be read beyond their end."""
    made = attention.twin(built("llama"), attention.NAME)
    fuse_layers(made, backend)
    layer, seen = made.model.layers[0], []
    kind = type(layer)
    cache = empty_cache(made, 1, 32)
    cache.place.fixed = True
    monkeypatch.setattr(kind.__mro__[1], "forward", lambda self, *given, **named: seen.append(1))
    hidden = torch.zeros(1, 2, made.config.hidden_size, device=DEVICE)
    half = torch.zeros(1, 2, layer.self_attn.head_dim // 2, device=DEVICE)
    kind.forward(layer, hidden, **{cache.argument: cache.cache}, position_embeddings=(half, half))
    assert seen


@torch.no_grad()
def test_in_bfloat16_the_difference_is_rounding(backend):
    original = built("llama").to(torch.bfloat16)
    made = attention.twin(original, attention.NAME)
    before = passes(attention.twin(original, "sdpa"))
    fuse_layers(made, backend)
    for got, right in zip(passes(made), before, strict=True):
        assert 0 < (got - right).float().abs().max() < 0.15 * right.float().std()


@torch.no_grad()
def test_what_a_position_gets_does_not_depend_on_the_others():
    pytest.importorskip("specdec_fast.triton_kernels.launch_layers", reason="no Triton kernels here")
    x, norm = torch.randn(9, 40, device=DEVICE).bfloat16(), torch.rand(40, device=DEVICE).bfloat16()
    weights = [torch.randn(n, 40, device=DEVICE).bfloat16() for n in (24, 8, 8)]

    def results(x):
        scaled, squares = layer_scale(x, norm, backend="triton")
        product = layer_product(scaled, weights, squares=squares, epsilon=1e-5, backend="triton")
        return product, *layer_product_scaled(x, weights[0], norm=norm[:24], backend="triton")

    whole = results(x)
    for rows in (1, 4, 8):
        changed = x[:rows] + torch.arange(rows, device=DEVICE).bfloat16().flip(0)[:, None]  # all but the last one
        for got, right in zip(results(changed), whole, strict=True):
            assert torch.equal(got[-1], right[rows - 1])


@torch.no_grad()
def test_a_twin_alone_is_changed():
    original = built("llama").to(torch.bfloat16)
    ids = torch.arange(3, 15, device=DEVICE).view(1, -1)
    before = original(ids).logits
    kinds = [type(module) for module in original.modules()]
    made = attention.twin(original, attention.NAME)
    assert fuse_norms(made) == 2 * original.config.num_hidden_layers + 1
    assert fuse_layers(made) == original.config.num_hidden_layers
    assert [type(module) for module in original.modules()] == kinds
    assert torch.equal(original(ids).logits, before)
    difference = (made(ids).logits - before).float()
    assert 0 < difference.abs().max() < 0.1 * before.float().std()
    weights = [next(m for m in one.modules() if "RMSNorm" in type(m).__name__).weight for one in (original, made)]
    assert weights[0] is weights[1]


SHAPES = [
    (1, 16, (16,)),
    (4, 32, (16, 24)),
    (3, 40, (24, 8, 8)),
    (16, 300, (33,)),
    (5, 64, (20, 4, 12)),
    (2, 512, (64,)),
]


def product_case(rows, inner, counts, dtype, gated=False, residual=True, norm=True, bias=True):
    counts = (counts[0], counts[0]) if gated else counts
    outputs = counts[0] if gated else sum(counts)
    draw = lambda *shape: torch.randn(shape).to(dtype)  # noqa: E731
    return {
        "x": 3 * draw(rows, inner + 3)[:, :inner],
        "weights": [draw(n, inner) * inner**-0.5 for n in counts],
        "biases": [draw(n) if bias else None for n in counts],
        "squares": torch.rand(rows, 5) * inner if norm else None,
        "epsilon": 1e-2,
        "residual": draw(rows, outputs + 5)[:, :outputs] if residual else None,
        "gated": gated,
    }


def plain_product(x, weights, biases, squares, epsilon, residual, gated):
    x, residual = x.double(), None if residual is None else residual.double()
    if squares is not None:
        x = x / (squares.double().sum(1, keepdim=True) / x.shape[1] + epsilon).sqrt()
    parts = [x @ w.double().T + (0 if b is None else b.double()) for w, b in zip(weights, biases, strict=True)]
    result = silu(parts[0]) * parts[1] if gated else torch.cat(parts, 1)
    return result if residual is None else result + residual


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_torch(backend, shape, gated, dtype):
    for options in ({}, {"residual": False, "norm": False}, {"bias": False}):
        case = product_case(*shape, dtype, gated, **options)
        got = layer_product(**case, backend=backend)
        assert got.dtype == dtype
        assert got.is_contiguous()
        close = CLOSE[dtype] * 4
        torch.testing.assert_close(got.double(), plain_product(**case), rtol=close, atol=close)


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_a_norm_reads_is_left_beside_a_product(backend, shape, dtype):
    """The result is that of a product alone, what lies beside it that of a kernel alone, and both make an RMS norm."""
    rows, inner, (count, *_) = shape
    for options in ({}, {"residual": False, "norm": False, "bias": False}):
        case = product_case(rows, inner, (count,), dtype, **options)
        norm, following = torch.randn(count).to(dtype), torch.randn(24, count).to(dtype) * count**-0.5
        (weight,), (bias,) = case["weights"], case["biases"]
        given = {name: case[name] for name in ("x", "squares", "epsilon", "residual")}
        result, scaled, squares = layer_product_scaled(**given, weight=weight, bias=bias, norm=norm, backend=backend)
        assert torch.equal(result, layer_product(**case, backend=backend))
        assert squares.shape == (rows, -(-count // GROUP))
        unit = torch.finfo(dtype).eps  # Triton's interpreter cuts where a GPU rounds
        torch.testing.assert_close(scaled, (result.float() * norm.float()).to(dtype), rtol=unit, atol=0)
        torch.testing.assert_close(squares.sum(1), result.float().square().sum(1), rtol=1e-5, atol=1e-5)
        for got, right in zip(layer_scale(result, norm, backend=backend), (scaled, squares), strict=True):
            torch.testing.assert_close(got, right, rtol=1e-6, atol=1e-6)
        got = layer_product(scaled, [following], squares=squares, epsilon=1e-2, backend=backend)
        right = rms_norm(result.double(), norm.shape, norm.double(), 1e-2) @ following.double().T
        torch.testing.assert_close(got.double(), right, rtol=4 * CLOSE[dtype], atol=4 * CLOSE[dtype])


def among_nans(tensor):
    """The same numbers, contiguous, in the middle of a buffer of NaNs."""
    around = torch.full((tensor.numel() + 2048,), torch.nan, dtype=tensor.dtype)
    return around[1024 : 1024 + tensor.numel()].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gated", [False, True])
def test_products_read_and_write_inside_their_tensors_alone(shape, gated):
    launch = pytest.importorskip("specdec_fast.triton_kernels.launch_layers", reason="no Triton kernels here")
    with torch.device(DEVICE):
        check_inside(launch, shape, gated)


def check_inside(launch, shape, gated):
    case = product_case(*shape, torch.float32, gated)
    names = ("x", "squares", "residual")
    given = {name: among_nans(case[name]) for name in names}
    weights, biases = ([among_nans(t) for t in case[name]] for name in ("weights", "biases"))
    rows, outputs = case["residual"].shape
    alone = not gated and len(weights) == 1
    written = [torch.zeros(rows, outputs), torch.zeros(rows, outputs), torch.zeros(rows, -(-outputs // GROUP))]
    held = [torch.full((t.numel() + 2048,), 7.0) for t in written]
    out, scaled, parts = (
        buffer[1024 : 1024 + t.numel()].view(t.shape) for buffer, t in zip(held, written, strict=True)
    )
    last = (among_nans(torch.rand(outputs)), scaled, parts) if alone else (None, None, None)
    launch._launch(given["x"], given["squares"], case["epsilon"], weights, biases, given["residual"], gated, out, *last)
    torch.testing.assert_close(out.double(), plain_product(**case), rtol=1e-4, atol=1e-4)
    assert not alone or (scaled.isfinite().all() and parts.isfinite().all())
    for buffer, t in zip(held, written, strict=True):
        assert (buffer[:1024] == 7).all() and (buffer[1024 + t.numel() :] == 7).all()


def test_long_rows_are_scaled_by_several_programs(backend):
    x, norm = torch.randn(3, 2100), torch.randn(2100)
    scaled, squares = layer_scale(x[:, :2090].T.contiguous().T, norm[:2090], backend=backend)
    assert torch.equal(scaled, x[:, :2090] * norm[:2090])
    assert squares.shape == (3, 131)
    torch.testing.assert_close(squares.sum(1), x[:, :2090].square().sum(1))


def heads_case(dtype=torch.float32, rows=2, lanes=3, heads=4, kv_heads=2, dim=12, norms=True):
    angle = torch.rand(rows * lanes, dim // 2).repeat(1, 2) * 6
    keys, values = torch.randn(2, rows, kv_heads, 9, dim).to(dtype)
    return {
        "fused": torch.randn(rows * lanes, (heads + 2 * kv_heads) * dim).to(dtype),
        "cosine": angle.cos().to(dtype),
        "sine": angle.sin().to(dtype),
        "columns": torch.tensor([[0, 1, 2], [6, 7, 8]]),
        "keys": keys,
        "values": values,
        "heads": heads,
        "query_norm": torch.rand(dim).to(dtype) if norms else None,
        "key_norm": torch.rand(dim).to(dtype) if norms else None,
        "epsilon": 1e-3,
    }


def turned(head, case, norm):
    """By complex numbers: entry j with entry j + d / 2."""
    head = head.double()
    if norm is not None:
        head = rms_norm(head, norm.shape, norm.double(), case["epsilon"])
    half = head.shape[-1] // 2
    number = torch.complex(head[..., :half], head[..., half:])
    cosine, sine = (case[name].double().view(2, 3, 1, -1)[..., :half] for name in ("cosine", "sine"))
    number = number * torch.complex(cosine, sine)
    return torch.cat([number.real, number.imag], -1).transpose(1, 2)


def test_views_are_read_where_they_lie(backend):
    """Not every view has its entries side by side: turned ones, and rows or columns that are one number repeated."""
    case = product_case(3, 24, (16,), torch.float32)
    expected = plain_product(**case)
    for name in ("x", "residual"):
        case[name] = case[name].T.contiguous().T
    case["weights"] = [case["weights"][0].T.contiguous().T]
    torch.testing.assert_close(layer_product(**case, backend=backend).double(), expected, rtol=1e-4, atol=1e-4)
    case = heads_case()
    case["columns"] = torch.arange(24).view(2, 12)[:, 1:4].clamp(max=8)
    for name in ("cosine", "sine"):
        case[name] = case[name][:1].expand(6, -1)
    wanted = heads_expected({**case, "keys": case["keys"].clone(), "values": case["values"].clone()})
    query = layer_heads(**case, backend=backend)
    torch.testing.assert_close(query.double(), wanted[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(case["keys"][0].double(), wanted[1][0], rtol=1e-4, atol=1e-4)


def test_a_bias_for_some_weights_alone_is_refused(backend):
    case = product_case(2, 16, (16, 4, 4), torch.float32)
    case["biases"][1] = None
    with pytest.raises(ValueError, match="biases must be there for all weights or for none"):
        layer_product(**case, backend=backend)


def heads_expected(case):
    query, key, value = case["fused"].view(2, 3, 8, 12).split([4, 2, 2], 2)
    keys, values = case["keys"].double(), case["values"].double()
    for row, columns in enumerate(case["columns"]):
        keys[row, :, columns] = turned(key, case, case["key_norm"])[row]
        values[row, :, columns] = value[row].double().transpose(0, 1)
    return turned(query, case, case["query_norm"]), keys, values


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("dtype", CLOSE)
def test_heads_are_turned_and_written(backend, dtype, norms):
    case = heads_case(dtype, norms=norms)
    expected = heads_expected(case)
    query = layer_heads(**case, backend=backend)
    for got, right in zip((query, case["keys"], case["values"]), expected, strict=True):
        torch.testing.assert_close(got.double(), right, rtol=CLOSE[dtype], atol=CLOSE[dtype])


@pytest.mark.parametrize("fault", ["other column", "sine turned round", "heads swapped", "norm left out"])
def test_planted_faults_of_heads_are_noticed(backend, fault):
    case = heads_case()
    expected = heads_expected(case)
    if fault == "other column":
        case["columns"] = case["columns"] - 1 + (case["columns"] == 0).long()
    elif fault == "sine turned round":
        case["sine"] = -case["sine"]
    elif fault == "heads swapped":
        case["fused"] = case["fused"].view(6, 8, 12)[:, [1, 0, 2, 3, 4, 5, 6, 7]].reshape(6, 96)
    else:
        case["query_norm"] = None
    query = layer_heads(**case, backend=backend)
    with pytest.raises(AssertionError):
        for got, right in zip((query, case["keys"], case["values"]), expected, strict=True):
            torch.testing.assert_close(got.double(), right, rtol=1e-3, atol=1e-3)


def test_no_rows_compute_nothing(backend):
    case = product_case(2, 16, (16,), torch.float32)
    case["x"], case["residual"], case["squares"] = case["x"][:0], case["residual"][:0], case["squares"][:0]
    assert layer_product(**case, backend=backend).shape == (0, 16)
    assert [t.shape for t in layer_scale(case["x"], torch.ones(16), backend=backend)] == [(0, 16), (0, 1)]


def test_the_operators_are_sound(backend):
    case = product_case(2, 16, (16, 4, 4), torch.float32)
    given = (case["x"], case["squares"], 0.1, case["weights"], case["biases"], case["residual"], False)
    checks = {"test_utils": ("test_schema", "test_faketensor")}
    operators = torch.ops.specdec_fast
    torch.library.opcheck(getattr(operators.layer_product, backend), given, **checks)
    given = (case["x"], case["squares"], 0.1, case["weights"][0], case["biases"][0], None, torch.ones(16))
    torch.library.opcheck(getattr(operators.layer_product_scaled, backend), given, **checks)
    torch.library.opcheck(getattr(operators.layer_scale, backend), (case["x"], torch.ones(16)), **checks)
    case = heads_case()
    names = ["fused", "cosine", "sine", "query_norm", "key_norm", "epsilon", "columns", "keys", "values", "heads"]
    given = tuple(case[name] for name in names)
    torch.library.opcheck(getattr(operators.layer_heads, backend), given, **checks)


class Hidden(torch.Tensor):
    """As a quantized weight is one: another type of tensor in a plain module."""


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda layer: layer.mlp.register_forward_hook(lambda *_: None), "hooks"),
        (lambda layer: setattr(layer.mlp, "act_fn", torch.nn.GELU()), "gate"),
        (lambda layer: setattr(layer.self_attn.k_proj, "bias", torch.nn.Parameter(torch.ones(16))), "bias"),
        (lambda layer: setattr(layer.mlp, "__class__", type("LlamaMLP", (type(layer.mlp),), {})), "LlamaMLP"),
        (lambda layer: setattr(layer.self_attn.config, "_attn_implementation", "eager"), "eager"),
        (lambda layer: setattr(layer.self_attn, "q_proj", torch.nn.Sequential(layer.self_attn.q_proj)), "matrices"),
        (lambda layer: setattr(layer, "input_layernorm", torch.nn.LayerNorm(32)), "norms"),
        (
            lambda layer: setattr(layer.mlp.up_proj, "weight", torch.nn.Parameter(Hidden(torch.ones(48, 32)))),
            "matrices",
        ),
    ],
)
def test_other_layers_run_as_they_are(change, reason):
    original = built("llama")
    assert why_not_fused(original.model.layers[0]) is None
    change(original.model.layers[0])
    assert reason in why_not_fused(original.model.layers[0])
    if reason != "eager":  # which all layers share
        assert fuse_layers(attention.twin(original, attention.NAME)) == 1


def test_kernels_are_tried_before_a_layer_is_given_to_them(monkeypatch):
    pytest.importorskip("specdec_fast.triton_kernels.launch_layers", reason="no Triton kernels here")
    tried = fused_layers.why_no_kernels.__wrapped__
    assert tried(DEVICE) is None
    monkeypatch.setattr(fused_layers, "layer_heads", lambda *given, **named: layer_heads(*given, **named) + 1)
    assert tried(DEVICE) is None  # both are wrong alike
    calls = []

    def wrong(*given, **named):
        calls.append(named["backend"])
        return layer_product(*given, **named) * (1.5 if named["backend"] == "triton" else 1)

    monkeypatch.setattr(fused_layers, "layer_product", wrong)
    assert "other values" in tried(DEVICE)
    monkeypatch.setattr(fused_layers, "layer_product", lambda *given, **named: 1 / 0)
    assert "fail (ZeroDivisionError" in tried(DEVICE)
    assert calls


def test_a_twin_is_made_again_where_a_hook_was_put_on_the_model():
    original = built("llama")
    first = attention.twin(original, attention.NAME)
    assert attention.twin(original, attention.NAME) is first
    handle = original.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert attention.twin(original, attention.NAME) is not first
    handle.remove()


@torch.no_grad()
def test_a_cache_that_grows_is_left_to_the_plain_layer(backend):
    original = built("llama")
    made = attention.twin(original, attention.NAME)
    fuse_layers(made, backend)
    ids = torch.arange(3, 9, device=DEVICE).view(1, -1)
    torch.testing.assert_close(made(ids, past_key_values=DynamicCache()).logits, original(ids).logits)


def asked():
    return {name: value.to(DEVICE) for name, value in prompts(2, padded=True).items()}


def generated(monkeypatch, target, backend, **options):
    """What ``fast_generate`` gives with the target's and the drafter's layers fused, in rounds on the device."""

    def fused(one, compiled):
        made = attention.twin(one, attention.NAME)
        assert fuse_layers(made, backend)
        return made, "fused"

    monkeypatch.setattr(device_plan, "for_passes", fused)
    result = fast_generate(target, **asked(), **options)
    assert last_speculation().loop == "device"
    return result


def test_generation_is_that_of_plain_layers(backend, monkeypatch):
    """Greedy text is that of ``generate``; sampled tokens of a seed are those of plain layers, so their law is too."""
    target, drafter = (copy.deepcopy(one).to(DEVICE) for one in (model("llama"), noisy("llama")))
    pair = {"assistant_model": drafter, "num_assistant_tokens": 2, "compile": "static", "max_new_tokens": 4}
    greedy, sampled = pair | {"do_sample": False}, pair | {"do_sample": True, "top_k": 0, "seed": 3}
    expected = target.generate(**asked(), max_new_tokens=4, do_sample=False)
    plain = fast_generate(target, **asked(), **sampled)
    assert torch.equal(generated(monkeypatch, target, backend, **greedy), expected)
    assert torch.equal(generated(monkeypatch, target, backend, **sampled), plain)

    def without_half(*given, gated=False, **named):
        return layer_product(*given, gated=gated, **named) * (0.1 if gated else 1.0)

    monkeypatch.setattr(fused_layers, "layer_product", without_half)
    assert not torch.equal(generated(monkeypatch, target, backend, **greedy), expected)
    assert not torch.equal(generated(monkeypatch, target, backend, **sampled), plain)
