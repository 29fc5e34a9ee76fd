"""The Triton kernels against the reference: compiled where there is a GPU, through the interpreter elsewhere."""

import importlib
import types

import numpy as np
import pytest
import torch
from op_cases import DTYPES, INF, NAN, differing, edge_rows, filters, proposal

from specdec_fast import ops
from specdec_fast.randomness import Purpose, philox_reference

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = pytest.importorskip("triton.language")
launch = pytest.importorskip("specdec_fast.triton_kernels.launch", reason="no Triton kernels beside this package")
filter_kernels, finish, judge, laws, numbers, row_kernels = (
    importlib.import_module(f"specdec_fast.triton_kernels.{name}")
    for name in ("filters", "finish", "judge", "laws", "numbers", "rows")
)

COMPILED = not triton.knobs.runtime.interpret  # conftest.py asks for the interpreter where there is no GPU
DEVICE = "cuda" if COMPILED else "cpu"
RULES = ("match", "token", "block")
LAWS = ("point", "dense", "wide", "compact", "heads", "sparse")
interpreted = pytest.mark.skipif(COMPILED, reason="a compiled kernel keeps the constants it was compiled with")


@pytest.fixture(autouse=True, scope="module")
def patched_once():
    """The interpreter patches triton.language for every device function it calls; once a launch is enough."""
    if COMPILED:
        yield
        return
    from triton.runtime import interpreter

    patch, active = interpreter._patch_lang, []

    def once(fn):
        if active:
            return None
        scope = patch(types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        active.append(scope)
        return types.SimpleNamespace(restore=lambda: active.pop().restore())

    interpreter._patch_lang = once
    yield
    interpreter._patch_lang = patch


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that is not written holds NaN or the largest integer: outputs and workspace alike."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # the reference has no deterministic form on a GPU
    with np.errstate(all="ignore"):
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(launch, "BLOCK", 16)
    monkeypatch.setattr(launch, "SPAN", 1)


@pytest.fixture
def wide_digits(monkeypatch):
    """Fewer launches: the interpreter takes milliseconds for each row of one."""
    monkeypatch.setattr(launch, "DIGIT", 8)


def moved(arguments):
    return {name: a.to(DEVICE) if isinstance(a, torch.Tensor) else a for name, a in arguments.items()}


def back(result):
    return type(result)(*(part.cpu() for part in result))


def sampled(logits, backend="triton", **options):
    return back(ops.sample(logits.to(DEVICE), **moved(options), backend=backend))


def verified(case, backend="triton", **options):
    return back(ops.verify(**moved(case), **moved(options), log_probs=True, backend=backend))


def keys(rows):
    return {"seed": torch.arange(rows) * 2**40 - 5, "position": torch.arange(rows) * 2**31}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noticed(expected, result):
    """Whether a result is told from what it should be."""
    try:
        return differing(expected, result) > 0
    except AssertionError:
        return True


@triton.jit
def uniforms(seed, position, offset, out, PURPOSE: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, numbers.uniform(tl.load(seed + i), tl.load(position + i), tl.load(offset + i), PURPOSE))


@triton.jit
def only_one_tile(top, total, mass):
    return top, tl.max(mass, 0), mass


@triton.jit
def exponentials(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, numbers.exponential(tl.load(x + i)))


def test_uniforms_are_the_keyed_ones_bit_for_bit():
    seed, position, offset = torch.randint(-(2**63), 2**63 - 1, (3, 256), generator=generator())
    seed[:2], position[2:4], offset = torch.tensor([-1, 0]), torch.tensor([-(2**63), 2**63 - 1]), offset % 2**24
    out = torch.empty(256, dtype=torch.float64, device=DEVICE)
    uniforms[(1,)](seed.to(DEVICE), position.to(DEVICE), offset.to(DEVICE), out, PURPOSE=2, N=256)
    assert torch.equal(out.cpu(), philox_reference(seed, position, offset, Purpose.RESIDUAL, 0))


def test_the_exponential_is_as_good_as_it_says():
    x = torch.cat([-torch.rand(4000, generator=generator(), dtype=torch.float64) * 700, torch.linspace(-1, 0, 96)])
    out = torch.empty_like(x, device=DEVICE)
    exponentials[(1,)](x.to(DEVICE), out, N=4096)
    torch.testing.assert_close(out.cpu(), x.exp(), rtol=1e-11, atol=0)


# 2 * 21 * 9 rows
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 2, 15, 16, 17, 33, 111])
def test_sample_draws_the_references_tokens(small_tiles, monkeypatch, width, dtype):
    monkeypatch.setattr(launch, "SPAN", 3)
    rows = 9
    logits = edge_rows((torch.randn(rows, width, generator=generator()) * 4).to(dtype))
    for setting in ({}, {"temperature": filters(rows, generator())["temperature"]}):
        expected = sampled(logits, "reference", **keys(rows), **setting)
        assert differing(expected, sampled(logits, **keys(rows), **setting)) == 0


# 18 * 8 rows
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("rule", RULES)
def test_verify_decides_as_the_reference(rule, law):
    """Mixed temperatures, ragged counts, and in both models' logits what libraries have tripped over."""
    rows, gamma = 8, 2
    dtype = DTYPES[(RULES.index(rule) + LAWS.index(law)) % 3]
    case = proposal(law, rows, gamma, 37, dtype, generator(LAWS.index(law)))
    edge_rows(case["logits"][:, 1])
    case["count"][:6] = gamma
    if "draft_logits" in case:
        case["draft_logits"][2, 0, 0], case["draft_logits"][3, 1] = NAN, -INF
        case["draft_logits"][4, 0, 5] = INF
    if "sparse_log_q" in case:
        case["sparse_log_q"][2, 0, 1] = NAN
    case["tokens"][4, 1], case["tokens"][5, 0] = 37, -1
    every = filters(rows, generator())
    heat = {"temperature": every["temperature"], "draft_temperature": every["temperature"].flip(0)}
    assert differing(verified(case, "reference", rule=rule, **heat), verified(case, rule=rule, **heat)) == 0


# 9 * 6 rows
@pytest.mark.parametrize("width", [47, 48, 49])
@pytest.mark.parametrize("rule", RULES)
def test_both_sides_of_a_tile_boundary(small_tiles, rule, width):
    case = proposal(("dense", "wide", "compact")[width % 3], 6, 1, width, torch.float32, generator(width))
    case["count"][:4] = 1
    assert differing(verified(case, "reference", rule=rule), verified(case, rule=rule)) == 0


@pytest.mark.parametrize("rule", ["token", "block"])
def test_what_the_drafter_hands_over_and_what_is_left_out(rule):
    """Its logsumexp, no entry drawn, mixed kinds, a base, and fewer positions scored than drafted."""
    case = proposal("compact", 6, 3, 40, torch.float32, generator(3))
    sparse = proposal("sparse", 6, 3, 40, torch.float32, generator(3))
    case |= {name: sparse[name] for name in ("sparse_ids", "sparse_log_q")}
    case |= {"kind": torch.arange(18, dtype=torch.int32).view(6, 3) % 4, "base": 2, "logits": case["logits"][:, :2]}
    del case["drawn"]
    expected = verified(case, "reference", rule=rule)
    assert differing(expected, verified(case, rule=rule)) == 0
    known = case["draft_logits"].double().logsumexp(-1)
    known[0] = NAN  # unknown there
    assert differing(expected, verified(case, rule=rule, draft_logsumexp=known)) == 0
    assert int((expected.token == -1).sum()) > 0  # every position given is used up somewhere


@pytest.mark.parametrize("rule", ["token", "block"])
def test_pinned_outcomes(rule):
    """Equal one-hot laws keep everything, disjoint ones nothing, a residual with one entry leaves no choice."""
    sure = torch.full((1, 3, 9), -INF)
    sure[..., 4] = 0
    base = {"count": torch.tensor([2]), "seed": torch.tensor([1]), "start": torch.tensor([5])}
    same = base | {"logits": sure, "draft_logits": sure[:, :2], "tokens": torch.tensor([[4, 4]])}
    result = verified(same, rule=rule)
    assert (result.accepted.item(), result.token.item()) == (2, 4)
    other = same | {"draft_logits": sure[:, :2].roll(1, -1), "tokens": torch.tensor([[5, 5]])}
    result = verified(other, rule=rule)
    assert (result.accepted.item(), result.token.item()) == (0, 4)
    half = torch.tensor([0.5, 0.5, 0, 0, 0, 0, 0, 0, 0]).log()
    q = torch.tensor([0.9, 0.1, 0, 0, 0, 0, 0, 0, 0]).log()
    for seed in range(8):
        case = base | {"seed": torch.tensor([seed]), "tokens": torch.tensor([[0, 0]])}
        result = verified(case | {"logits": half.expand(1, 3, 9), "draft_logits": q.expand(1, 2, 9)}, rule=rule)
        assert result.accepted.item() == 2 or result.token.item() == 1


def test_no_bit_depends_on_the_batch_or_on_strides(small_tiles):
    case = proposal("dense", 3, 1, 40, torch.float32, generator(1))
    whole = verified(case, rule="token")
    for row in range(3):
        alone = verified({name: tensor[row : row + 1] for name, tensor in case.items()}, rule="token")
        assert all(torch.equal(a[row : row + 1], b) for a, b in zip(whole, alone, strict=True))
    wide = torch.cat([case["logits"], torch.full((3, 2, 5), NAN)], -1)[..., :40]
    for logits in (wide, case["logits"].transpose(1, 2).contiguous().transpose(1, 2)):
        other = verified(case | {"logits": logits}, rule="token")
        assert all(torch.equal(*pair) for pair in zip(whole, other, strict=True))


def test_nothing_to_do():
    assert all(part.shape == (0,) for part in sampled(torch.zeros(0, 5), **keys(0)))
    empty = {name: t[:0] for name, t in proposal("dense", 1, 2, 9, torch.float32, generator()).items()}
    assert verified(empty, rule="token").log_prob.shape == (0, 3)
    plain = proposal("point", 3, 0, 9, torch.float32, generator())
    for rule in RULES:
        assert differing(verified(plain, "reference", rule=rule), verified(plain, rule=rule)) == 0


# 6 * 18 rows
@pytest.mark.parametrize("width", [1, 15, 16, 17, 33, 111])
def test_filters_keep_what_the_references_keep(small_tiles, wide_digits, monkeypatch, width):
    """Each filter alone and all together, off in some rows, with every edge row."""
    monkeypatch.setattr(launch, "BLOCK", 16 if width < 20 else 64)
    rows = 6
    logits = edge_rows((torch.randn(2 * rows, width, generator=generator()) * 4).to(DTYPES[width % 3]))
    every = filters(2 * rows, generator(width))
    for setting in ({"top_k"}, {"top_p"}, {"min_p"}, set(every)):
        here = slice(None) if len(setting) > 1 else slice(4, 12, 3)
        given = {name: every[name][here] for name in setting}
        key = keys(len(logits[here]))
        expected = sampled(logits[here], "reference", **key, **given)
        assert differing(expected, sampled(logits[here], **key, **given)) == 0


# 18 * 8 rounds of up to 5 rows
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("rule", RULES)
def test_filtered_rounds_are_decided_as_by_the_reference(wide_digits, monkeypatch, rule, law):
    """Filters on both sides, on in some rows, with temperature 0, ragged counts and undefined rows among them."""
    monkeypatch.setattr(launch, "BLOCK", 64)
    rows, gamma = 8, 2
    case = proposal(law, rows, gamma, 37, DTYPES[(RULES.index(rule) + LAWS.index(law)) % 3], generator(9))
    edge_rows(case["logits"][:, 1])
    case["count"][:5] = gamma
    if "draft_logits" in case:
        case["draft_logits"][2, 0, 0] = NAN
    every = filters(rows, generator(4))
    every["top_k"][1::3], every["top_p"][::3], every["min_p"][2] = 0, 1, 0
    every |= {f"draft_{name}": value.flip(0) for name, value in every.items()}
    assert differing(verified(case, "reference", rule=rule, **every), verified(case, rule=rule, **every)) == 0


@pytest.mark.parametrize("top_p", [-1.0, 0.0, 0.25, 0.5, 0.51, 0.999, 1.0])
def test_of_equal_scores_top_p_drops_the_lowest_ids(small_tiles, wide_digits, top_p):
    """Where the mass dropped is exactly what may be dropped, too; entries of zero count with those of minus zero."""
    few = torch.randint(-1, 2, (2, 24), generator=generator()) * torch.tensor([[1.0], [-0.0]])
    logits = torch.cat([few, few.abs() * INF]).nan_to_num(nan=0.0, posinf=INF).to(DEVICE)
    expected, result = (ops.softmax(logits, top_p=top_p, backend=backend) for backend in ("reference", "triton"))
    torch.testing.assert_close(result, expected, rtol=1e-11, atol=0)


def test_filters_as_they_are_launched_on_a_gpu(monkeypatch):
    """Digits of the real size, several tiles a program and several programs a row."""
    monkeypatch.setattr(launch, "BLOCK", 256)
    case = proposal("compact", 1, 1, 700, torch.bfloat16, generator(8))
    case["count"][:] = 1
    given = {"top_k": 600, "top_p": 0.9, "min_p": 1e-4, "draft_top_p": 0.9, "rule": "token"}
    assert differing(verified(case, "reference", **given), verified(case, **given)) == 0


def test_softmax(small_tiles):
    rows = 9
    logits = edge_rows(torch.randn(rows, 33, generator=generator()) * 4).to(DEVICE)
    heat = filters(rows, generator())["temperature"].to(DEVICE)
    for temperature in (None, heat):
        expected, result = (ops.softmax(logits, temperature=temperature, backend=b) for b in ("reference", "triton"))
        torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-300, equal_nan=True)


def test_maps(small_tiles):
    q = torch.rand(3, 50, generator=generator())
    index = torch.randint(-1, 40, (50,), generator=generator())
    row_start, column = ops.reference_ops.compressed_rows(index, 37)
    order = torch.randperm(50, generator=generator())[:41].int()
    ends = torch.randint(-3, 60, (2, 3, 7), generator=generator())
    for kind in (torch.float32, torch.float64):
        given = [q.to(kind).to(DEVICE), row_start.to(DEVICE), column.to(DEVICE)]
        torch.testing.assert_close(
            *(ops.project(*given, backend=b) for b in ("triton", "reference")), rtol=0, atol=1e-15
        )
        for listed in (None, order.to(DEVICE)):
            low, high = ends.to(DEVICE)
            sums = [ops.range_sums(given[0], low, high, order=listed, backend=b) for b in ("triton", "reference")]
            torch.testing.assert_close(*sums, rtol=0, atol=1e-13)


def test_the_operators_are_sound():
    case = moved(proposal("dense", 2, 1, 20, torch.float32, generator()))
    none = [None] * 4
    checks = ("test_schema", "test_faketensor")
    key = [case["seed"], case["start"]]
    sample = (case["logits"][:, 0], *none, *key, None, 3)
    torch.library.opcheck(torch.ops.specdec_fast.sample.triton, sample, test_utils=checks)
    verify = (case["logits"], *none, case["tokens"], case["count"], None, case["draft_logits"], *none)
    verify = (*verify, None, case["drawn"], None, None, None, *key, 0, 1, True)
    torch.library.opcheck(torch.ops.specdec_fast.verify.triton, verify, test_utils=checks)


def test_workspace_is_a_few_numbers_a_tile():
    class Allocations(torch.utils._python_dispatch.TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if "new_" in str(func):
                self.total += result.numel() * result.element_size()
            return result

    case = moved(proposal("dense", 1, 1, 20000, torch.bfloat16, generator()))
    filtered = [None, torch.full((1,), 50, dtype=torch.int32, device=DEVICE), None, torch.ones(1, device=DEVICE)]
    for law in ([None] * 4, filtered):
        with Allocations() as seen:
            launch.verify(
                case["logits"], *law, case["tokens"], case["count"], None, case["draft_logits"], *law, None,
                case["drawn"], None, None, None, case["seed"], case["start"], 0, 2, True,
            )  # fmt: skip
        assert 0 < seen.total < 20000 / 10


@pytest.mark.parametrize(
    "fault",
    [
        "last tile",
        "p and q swapped",
        pytest.param("shared noise", marks=interpreted),
        pytest.param("nothing subtracted", marks=interpreted),
        pytest.param("missing reduction", marks=interpreted),
        "filter left out",
        pytest.param("order of ties", marks=interpreted),
        pytest.param("mass of what top-k dropped", marks=interpreted),
    ],
)
def test_planted_faults_are_noticed(small_tiles, wide_digits, monkeypatch, fault):
    case = proposal("dense", 12, 1, 40, torch.float32, generator(5))
    case["count"][:] = 1
    if fault in ("filter left out", "order of ties", "mass of what top-k dropped"):
        monkeypatch.setattr(launch, "BLOCK", 64)
        case = proposal("dense", 12, 0, 40, torch.float32, generator(5))
        case["logits"] = case["logits"].round()
        case |= {"temperature": 4.0, "top_k": 12, "top_p": 0.5}
    expected = verified(case, "reference", rule="token")
    if fault == "last tile":
        splits = launch._splits
        monkeypatch.setattr(launch, "_splits", lambda width: splits(width) - 1)
    elif fault == "p and q swapped":
        p, q = case["logits"].clone(), case["draft_logits"]
        case |= {"logits": torch.cat([q, p[:, 1:]], 1), "draft_logits": p[:, :1]}
    elif fault == "shared noise":
        monkeypatch.setattr(finish, "RESIDUAL", judge.ACCEPT)
    elif fault == "filter left out":
        limits = launch._limits
        monkeypatch.setattr(launch, "_limits", lambda *given: limits(*given[:3], None, *given[4:]))
    elif fault == "order of ties":
        order = row_kernels.order_of
        monkeypatch.setattr(filter_kernels, "order_of", lambda scores, ids: order(scores, ids ^ 1023))
    elif fault == "mass of what top-k dropped":
        kernel = launch.narrow_kernel

        class Fault:
            def __getitem__(self, grid):
                return lambda *given, **options: kernel[grid](*given[:11], None, *given[12:], **options)

        monkeypatch.setattr(launch, "narrow_kernel", Fault())
    elif fault == "nothing subtracted":
        monkeypatch.setattr(laws, "entry_of", lambda ids, *rest: ids * 0 - 1)
    else:
        monkeypatch.setattr(judge, "merge", lambda *arguments: only_one_tile(*row_kernels.merge(*arguments)))
    assert noticed(expected, verified(case, rule="token"))


@pytest.mark.skipif(not COMPILED, reason="needs 8 GB of memory, which a GPU has")
def test_offsets_beyond_32_bits():
    whole = torch.zeros(2**32 + 512, dtype=torch.bfloat16, device=DEVICE)
    logits = whole.as_strided((9, 512), (2**29, 1))
    logits[-1] = torch.linspace(-3, 3, 512)
    expected, result = (sampled(logits, backend, **keys(9)) for backend in ("reference", "triton"))
    assert differing(expected, result) == 0


def test_a_tensor_elsewhere_is_refused(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        ops.sample(torch.zeros(1, 4), **keys(1), backend="triton")
