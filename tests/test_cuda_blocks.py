"""The CUDA kernels' own code, compiled for the host: its parts against float64, its ops against the reference.

Blocks run as threads of the host, so that everything but the loads, shuffles and fences of the device is tested; the
ops' host side is the one a device build has. A tile has 512 entries here and 4096 on a device.
"""

import ctypes
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from op_cases import DTYPES, INF, NAN, differing, edge_rows, filters, proposal, run_both, verify_both
from torch.utils.cpp_extension import include_paths, library_paths

from specdec_fast import dispatch, ops, reference
from specdec_fast.reference_ops import compressed_rows

ROOT = Path(__file__).parent.parent
HERE = Path(__file__).parent
TILE = 512
WIDTHS = (1, 17, 111, TILE - 1, TILE, TILE + 1, 3 * TILE + 5)
FLAGS = ["-std=c++17", "-ffp-contract=off", "-fPIC", "-Wno-unknown-pragmas", "-fvisibility=hidden"]
pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or sys.platform != "linux", reason="g++ on Linux builds the host copy of the kernels"
)


def compile_blocks(source, target, optimise="-O1"):
    """The ops over the kernels of `source`, a copy of the repository's folders, as a library of the CPU."""
    include = [f"-I{path}" for path in include_paths()] + [f"-L{path}" for path in library_paths()]
    defines = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DSPECDEC_KEY=CPU", "-DSPECDEC_THREADS=32"]
    defines.append(f"-DSPECDEC_LIBRARY={target.stem}")
    files = [str(source / "csrc" / "cuda_ops.cpp"), str(source / "tests" / "cuda_blocks.cpp")]
    command = ["g++", optimise, "-shared", *FLAGS, *defines, *include, *files, "-o", str(target)]
    done = subprocess.run([*command, "-ltorch", "-ltorch_cpu", "-lpthread"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    library = torch.library.Library(target.stem, "FRAGMENT")
    for op in dispatch._WRITTEN["cuda"]:
        library.define(op + ops._SCHEMAS[op])
    torch.ops.load_library(str(target))
    return library


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    target = tmp_path_factory.mktemp("blocks") / "specdec_fast_blocks.so"
    return compile_blocks(ROOT, target), ctypes.CDLL(str(target))


@pytest.fixture
def parts(built):
    return built[1]


def use(library, monkeypatch):
    """Calls with `backend="cuda"` run on the host copy."""
    usual, own = ops.overload, getattr(torch.ops, library.ns)

    def overload(op, like, backend):
        return getattr(own, op).default if backend == "cuda" else usual(op, like, backend)

    monkeypatch.setattr(ops, "overload", overload)


@pytest.fixture
def blocks(built, monkeypatch):
    """Blocks and a queue, whatever the shape."""
    use(built[0], monkeypatch)
    monkeypatch.setenv("SPECDEC_FAST_CUDA_TEAM", "0")
    return "cuda"


@pytest.fixture(params=[0, 1, 3, 8], ids="team{}".format)
def teams(request, blocks, monkeypatch):
    """And clusters of every kind of size; a shelf holds 2 float32 tiles or 5 of 16 bits."""
    monkeypatch.setenv("SPECDEC_FAST_CUDA_TEAM", str(request.param))
    return blocks


def pointer(array):
    return array.ctypes.data_as(ctypes.c_void_p)


# --- the parts ---


@pytest.mark.parametrize("peak", [0.0, 0.3, 11.7, 88.0, -40.2, 2047.9, -2047.9, 2048.0, 6000.5, -3e4, 3e38])
def test_the_exponential_in_fixed_point(parts, peak):
    generator = np.random.default_rng(0)
    peak = np.float32(peak)
    scores = np.float32(np.float64(peak) - generator.exponential(7, 20000))
    scores = scores[np.float64(peak) - np.float64(scores) < 20]
    if scores.size == 0:
        scores = np.array([peak])
    out, shift, exponent = np.empty(len(scores), np.uint64), ctypes.c_float(), ctypes.c_int()
    parts.block_weights(
        ctypes.c_float(peak), pointer(scores), ctypes.c_int64(len(scores)), pointer(out), ctypes.byref(shift),
        ctypes.byref(exponent),
    )  # fmt: skip
    # exp(score - shift) against its weight, both with the exponent taken out
    x = (scores.astype(np.longdouble) - shift.value) - (exponent.value - 61) * np.log(np.longdouble(2))
    np.testing.assert_allclose(out.astype(np.longdouble), np.exp(x), rtol=4e-11, atol=2)
    order = np.argsort(scores)
    assert (np.diff(out[order].astype(np.float64)) >= -4e-11 * out[order][:-1] - 2).all()


@pytest.mark.parametrize("peak", [0.0, 30.0, -2047.0, 5000.0])
def test_entries_without_mass_weigh_nothing(parts, peak):
    scores = np.array([-INF, -3e38, peak - 200, NAN], np.float32)
    out = np.full(4, 7, np.uint64)
    parts.block_weights(
        ctypes.c_float(peak), pointer(scores), ctypes.c_int64(4), pointer(out), pointer(np.empty(1, np.float32)),
        pointer(np.empty(1, np.int32)),
    )  # fmt: skip
    assert out.tolist() == [0] * 4


@pytest.mark.parametrize("temperature", [0.7, 1.3, 0.01, 100.0, 3.0, 1e-30, 1e30])
def test_division_by_the_temperature_is_ieee_division(parts, temperature):
    generator = np.random.default_rng(1)
    x = np.concatenate(
        [
            generator.normal(0, 20, 200000),
            np.ldexp(generator.uniform(-2, 2, 5000), generator.integers(-149, 127, 5000)),
            [0.0, -0.0, INF, -INF],
        ]
    ).astype(np.float32)
    out = np.empty_like(x)
    parts.block_divide(ctypes.c_float(temperature), pointer(x), ctypes.c_int64(len(x)), pointer(out))
    with np.errstate(over="ignore", under="ignore"):
        expected = x / np.float32(temperature)
    assert (out.view(np.uint32) == expected.view(np.uint32)).all()


@pytest.mark.parametrize("kind, dtype", [(1, torch.bfloat16), (2, torch.float16)])
def test_every_16_bit_number_becomes_its_float(parts, kind, dtype):
    bits = np.arange(65536, dtype=np.uint16)
    out = np.empty(65536, np.float32)
    parts.block_floats(kind, pointer(bits), ctypes.c_int64(65536), pointer(out))
    expected = torch.from_numpy(bits.view(np.int16)).view(dtype).float().numpy()
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("logsumexp", [0.0, 7.3, -50.0, 2049.0, 1e5])
def test_probabilities_as_integers(parts, logsumexp):
    scores = np.float32(logsumexp - np.linspace(0, 25, 500))
    scores = scores[scores <= logsumexp]
    for scale in (1.0, 0.37):
        out = np.empty(len(scores), np.uint64)
        parts.block_probabilities(
            ctypes.c_double(logsumexp),
            ctypes.c_double(scale),
            pointer(scores),
            ctypes.c_int64(len(scores)),
            pointer(out),
        )
        expected = scale * np.exp(scores.astype(np.float64) - logsumexp)
        np.testing.assert_allclose(out * 2.0**-60, expected, rtol=5e-11, atol=4e-18)


def test_tiles_merge_in_any_order_to_the_same_bits(parts):
    generator = np.random.default_rng(2)
    peaks = generator.normal(0, 9, 40).astype(np.float32)
    peaks[7] = 2300.0  # a peak from which on scores are shifted
    peaks[8] = 2299.0
    peaks[9] = -INF
    masses = generator.integers(2**50, 2**60, 40).astype(np.uint64)
    masses[9] = 0
    results = set()
    for _ in range(5):
        order, out = generator.permutation(40), np.empty(3)
        peak, mass = peaks[order], masses[order]
        parts.block_merge(pointer(peak), pointer(mass), 40, pointer(out))
        results.add(out.tobytes())
    assert len(results) == 1


def test_the_first_entry_above_a_level(parts):
    generator = np.random.default_rng(3)
    weights = generator.integers(0, 3, TILE).astype(np.uint64) * generator.integers(0, 2**50, TILE).astype(np.uint64)
    edges = np.cumsum(weights)
    levels = [0, int(edges[-1]) - 1, *(int(e) for e in edges[generator.integers(0, TILE, 50)] if e < edges[-1])]
    for level in levels:
        place = parts.block_find(pointer(weights), TILE, ctypes.c_uint64(level))
        assert place == np.searchsorted(edges, np.uint64(level), side="right")
        assert weights[place] > 0


@pytest.mark.parametrize("size", [0, 1, 6, 32, 33, 1000, 5000])
def test_the_entries_that_stand_for_a_token(parts, size):
    parts.block_first.restype = ctypes.c_int64
    ids = np.sort(np.random.default_rng(size).integers(-1, max(size // 2, 1), size)).astype(np.int32)
    for target in (-2, -1, 0, 1, size // 4, size // 2, size):
        place = parts.block_first(pointer(ids), ctypes.c_int64(size), ctypes.c_int64(target))
        assert place == np.searchsorted(ids, target)


def test_a_row_settles_once_however_its_positions_arrive(parts):
    """Exactly one decision settles a row, and what it says is the definition: the first stop behind none undecided."""
    parts.block_stopped_before.restype = ctypes.c_bool
    for stops in itertools.product([0, 1], repeat=4):
        expected = stops.index(1) if 1 in stops else 4
        for order in itertools.permutations(range(4)):
            state, settled = 0, []
            for i in order:
                before = state
                assert not (parts.block_stopped_before(ctypes.c_uint64(before), i) and i <= expected)
                state |= 1 << i | stops[i] << 32 + i
                if parts.block_settled(ctypes.c_uint64(before), 4) < 0:
                    settled.append(parts.block_settled(ctypes.c_uint64(state), 4))
            assert [kept for kept in settled if kept >= 0] == [expected]


def test_the_acceptance_test_is_the_references(parts):
    parts.block_accepts.restype = ctypes.c_bool
    values = [-INF, -1e300, -3.0, -1.0, -0.5, 0.0, NAN]
    for log_p, log_q, u in itertools.product(values, values, [2.0**-54, 0.3, 1 - 2.0**-53]):
        expected = reference.accept(*(torch.tensor(x, dtype=torch.float64) for x in (log_p, log_q, u)))
        assert parts.block_accepts(*map(ctypes.c_double, (log_p, log_q, u))) == bool(expected)


# --- the ops ---


def keys(rows):
    return {"seed": torch.arange(rows) - 5, "position": torch.arange(rows) * 2**31}


@pytest.mark.parametrize("width", WIDTHS)
def test_sample_is_the_references(teams, width):
    for dtype in DTYPES:
        generator = torch.Generator().manual_seed(width)
        logits = edge_rows((torch.randn(14, width, generator=generator) * 4).to(dtype))
        setting = filters(14, generator)
        for case in ({}, {"temperature": setting["temperature"]}, setting):
            assert differing(*run_both(teams, logits, **keys(14), **case)) == 0


@pytest.mark.parametrize("rule", ["match", "token", "block"])
@pytest.mark.parametrize("kind", ["point", "dense", "wide", "compact", "heads", "sparse"])
def test_verify_is_the_references(teams, rule, kind):
    for dtype, width in zip((*DTYPES, DTYPES[0]), (TILE + 1, 3 * TILE, 111, 16), strict=True):
        generator = torch.Generator().manual_seed(width)
        case = proposal(kind, 20, 4, width, dtype, generator)
        case["logits"][:6, 1] = edge_rows(case["logits"][:6, 1].clone())
        law, draft_law = filters(20, generator), filters(20, generator, "draft_")
        draft_law["draft_temperature"] = draft_law["draft_temperature"].flip(0)
        for setting in ({}, {"temperature": law["temperature"]}, law, law | draft_law):
            assert differing(*verify_both(teams, **case, **setting, rule=rule)) == 0


def test_filters_on_rows_that_are_all_ties_or_nearly_so(teams):
    """The k-th largest and top-p's edge lie among equals, in one tile and across several."""
    generator = torch.Generator().manual_seed(12)
    logits = torch.randint(0, 3, (24, 4 * TILE + 9), generator=generator).float()
    logits[:4], logits[4] = 4.25, -0.0
    logits[4, ::2] = 0
    logits[5, 7:] = -INF
    logits[6, 3] = logits[6, 3000 % logits.shape[1]] = INF
    top_p = torch.tensor([0.5, 0.25, 0.1, 0.9]).repeat(6)
    top_k = torch.tensor([1, 5, 700, 2049] * 6, dtype=torch.int32)
    for setting in (
        {"top_p": top_p},
        {"top_k": top_k},
        {"top_p": top_p, "top_k": top_k},
        {"top_p": torch.zeros(24)},
        {"min_p": torch.full((24,), 0.37)},
        {"top_p": top_p, "min_p": torch.full((24,), 1.5)},
    ):
        for start in range(3):
            key = keys(24) | {"offset": torch.arange(24) + 24 * start}
            assert differing(*run_both(teams, logits, **key, **setting)) == 0


@pytest.mark.parametrize("width", [30, 2 * TILE + 3])
def test_softmax_is_the_references(teams, width):
    generator = torch.Generator().manual_seed(13)
    logits = edge_rows(torch.randn(14, width, generator=generator) * 4)
    setting = filters(14, generator)
    for case in ({}, {"temperature": setting["temperature"]}, setting):
        expected, result = (ops.softmax(logits, **case, backend=name) for name in ("reference", teams))
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-15, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_project_and_range_sums_are_the_references(blocks, dtype):
    generator = torch.Generator().manual_seed(14)
    size = 3 * TILE + 5
    q = torch.randn(3, size, generator=generator).to(dtype).softmax(-1)
    row_start, column = compressed_rows(torch.randint(-1, 300, (size,), generator=generator), 300)
    low, high = torch.randint(-5, size + 9, (2, 3, 40), generator=generator)
    order = torch.randperm(size, generator=generator)[: size - 7].int()
    for op, arguments in (
        (ops.project, {"row_start": row_start, "column": column}),
        (ops.range_sums, {"low": low, "high": high}),
        (ops.range_sums, {"low": low, "high": high, "order": order}),
    ):
        expected, result = (op(q, **arguments, backend=name) for name in ("reference", blocks))
        torch.testing.assert_close(result, expected, rtol=0, atol=2e-15)


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("kind", ["dense", "compact"])
def test_an_undefined_draft_row_and_one_of_infinities(blocks, rule, kind):
    generator = torch.Generator().manual_seed(1)
    case = proposal(kind, 12, 3, 700, torch.float32, generator)
    case["draft_logits"][:6, 1] = edge_rows(case["draft_logits"][:6, 1].clone())
    assert differing(*verify_both(blocks, **case, rule=rule)) == 0


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("kind", ["dense", "compact"])
def test_what_the_drafters_sample_hands_over_changes_nothing(blocks, rule, kind):
    """With its logsumexp known a drafter's row is read only where something is subtracted."""
    case = proposal(kind, 60, 3, 1100, torch.bfloat16, torch.Generator().manual_seed(4))
    temperature = torch.full((60,), 0.9)
    flat = case["draft_logits"].flatten(0, 1)
    drawn = ops.sample(flat, **keys(180), temperature=0.9, backend=blocks)
    handed = drawn.logsumexp.view(60, 3).clone()
    handed[5, 0] = NAN  # not known there
    case |= {"draft_temperature": temperature, "draft_logsumexp": handed}
    assert differing(*verify_both(blocks, **case, rule=rule)) == 0


def test_a_padded_index_of_more_than_a_tile(blocks):
    """Ids below 0 fill more than a tile in front of the first entry that stands for a token."""
    generator = torch.Generator().manual_seed(5)
    case = proposal("compact", 40, 3, 1000, torch.float32, generator)
    front, behind = 3 * TILE + 7, TILE + 3
    index = torch.cat([torch.full((front,), -1), case["index"][1:-1], torch.full((behind,), 1000)])
    draft = torch.cat([torch.randn(40, 3, part, generator=generator) - 5 for part in (front, behind)], -1)
    case["draft_logits"] = torch.cat([draft[..., :front], case["draft_logits"][..., 1:-1], draft[..., front:]], -1)
    case |= {"index": index.int(), "drawn": None}
    for rule in ("token", "block"):
        assert differing(*verify_both(blocks, **case, rule=rule)) == 0


@pytest.mark.parametrize("rule", ["token", "block"])
def test_mixed_kinds_ragged_counts_and_fewer_positions(blocks, rule):
    generator = torch.Generator().manual_seed(6)
    case = proposal("dense", 40, 4, 600, torch.float32, generator)
    sparse = proposal("sparse", 40, 4, 600, torch.float32, generator)
    case |= {name: sparse[name] for name in ("sparse_ids", "sparse_log_q")}
    case["kind"] = torch.randint(0, 3, (40, 4), generator=generator).int()
    case["tokens"][3, 1], case["tokens"][4, 0] = -7, 600
    for positions in (1, 3, 5):
        assert differing(*verify_both(blocks, **case | {"logits": case["logits"][:, :positions]}, rule=rule)) == 0


@pytest.mark.parametrize("rule", ["match", "token", "block"])
def test_bits_do_not_depend_on_schedule_slot_or_batch(blocks, rule):
    case = proposal("dense", 16, 4, 4 * TILE + 9, torch.float32, torch.Generator().manual_seed(9))
    first = ops.verify(**case, rule=rule, log_probs=True, backend=blocks)
    for _ in range(5):
        again = ops.verify(**case, rule=rule, log_probs=True, backend=blocks)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for row in (0, 7, 15):
        own = {name: value[row : row + 1] for name, value in case.items()}
        alone = ops.verify(**own, rule=rule, log_probs=True, backend=blocks)
        assert all(torch.equal(a[row : row + 1], b) for a, b in zip(first, alone, strict=True))


def test_no_buffer_is_as_long_as_a_row(blocks):
    """At 64 rows, 8 draft tokens and 151936 entries the memory of a call stays below 1 MB, with the device's tiles."""
    rows, gamma, width = 64, 8, 151936
    case = {
        "logits": torch.zeros(1, 1, width, dtype=torch.bfloat16).expand(rows, gamma + 1, -1),
        "draft_logits": torch.zeros(1, 1, width, dtype=torch.bfloat16).expand(rows, gamma, -1),
        "tokens": torch.zeros(rows, gamma, dtype=torch.int64),
        "count": torch.zeros(rows, dtype=torch.int64),
        "seed": torch.arange(rows),
        "start": torch.arange(rows),
    }
    with torch.profiler.profile(profile_memory=True) as profile:
        ops.verify(**case, rule="token", backend=blocks)
    taken = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    fixed = 100_000  # outputs, counters, decisions
    assert 0 < (taken - fixed) * TILE / 4096 + fixed < 1_000_000


@pytest.mark.parametrize("rule", ["match", "token", "block"])
@pytest.mark.parametrize("gamma", [1, 3])
def test_narrow_vocabularies_whose_drafter_ranks_the_other_way_round(blocks, rule, gamma):
    rows, width = 3000, 24
    p = torch.linspace(-2, 2, width)
    keys_of = {"seed": torch.full((rows,), 5), "position": torch.arange(rows)}
    drawn = [
        ops.sample(
            p.flip(0).expand(rows, -1), **keys_of, offset=torch.full((rows,), i), purpose=0, backend=blocks
        ).token
        for i in range(gamma)
    ]
    case = {
        "logits": p.expand(rows, gamma + 1, -1),
        "tokens": torch.stack(drawn, 1),
        "count": torch.full((rows,), gamma),
        "draft_logits": p.flip(0).expand(rows, gamma, -1),
        "seed": keys_of["seed"],
        "start": keys_of["position"],
    }
    expected, result = verify_both(blocks, **case, rule=rule)
    assert differing(expected, result) == 0
    assert 0 < int(result.accepted.sum()) < rows * gamma
    swapped = ops.verify(**case | {"draft_logits": case["logits"][:, 1:]}, rule=rule, backend=blocks)
    assert rule == "match" or int((swapped.accepted != result.accepted).sum()) > 100


# --- what the tests would notice ---

FAULTS = {
    "a missing reduction": ("block.cuh", "int t = 1; t < kThreads", "int t = 2; t < kThreads"),
    "a dropped last tile": ("sequence.cuh", "tile < end; ++tile", "tile + 1 < end; ++tile"),
    "shared noise": ("sequence.cuh", "number(call.start(b), call.base + i, kResidual)", "accept_number(i)"),
    "a tie dropped from the wrong side": ("scores.cuh", "id >= first", "id <= first"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(tmp_path, monkeypatch, fault):
    for folder in ("csrc", "kernels/cuda", "tests"):
        (tmp_path / folder).mkdir(parents=True)
        for file in (ROOT / folder).glob("*.*"):
            if file.suffix in (".cpp", ".h", ".cuh"):
                shutil.copy(file, tmp_path / folder)
    name, sound, faulty = FAULTS[fault]
    header = tmp_path / "kernels" / "cuda" / name
    assert header.read_text().count(sound) == 1
    header.write_text(header.read_text().replace(sound, faulty))
    library = compile_blocks(tmp_path, tmp_path / f"faulty_{list(FAULTS).index(fault)}.so", "-O0")
    use(library, monkeypatch)
    monkeypatch.setenv("SPECDEC_FAST_CUDA_TEAM", "0")
    case = proposal("dense", 60, 3, TILE + 200, torch.float32, torch.Generator().manual_seed(10))
    if "tie" in fault:
        case |= {"logits": case["logits"].round(), "top_p": torch.full((60,), 0.9)}
    expected, result = (ops.verify(**case, rule="token", backend=name) for name in ("reference", "cuda"))
    assert int((expected.token != result.token).sum()) > 3


# --- races ---


def race(tmp_path, headers):
    target, sanitised = tmp_path / "race", ["g++", "-O1", "-g", "-fsanitize=thread"]
    nothing = tmp_path / "nothing.cpp"
    nothing.write_text("int main() {}\n")
    if subprocess.run([*sanitised, str(nothing), "-o", str(tmp_path / "nothing")], capture_output=True).returncode:
        pytest.skip("needs a compiler with ThreadSanitizer")
    command = [*sanitised, "-Wno-tsan", *FLAGS, "-DSPECDEC_THREADS=64", str(headers), "-o", str(target), "-lpthread"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


def outcome(target, team):
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run([str(target), str(team)], capture_output=True, text=True, timeout=120, env=environment)


def test_threads_of_blocks_and_clusters_meet_at_barriers(tmp_path):
    """One thread of the host for each of a block's threads, several blocks at once, watched by a race checker."""
    target = race(tmp_path, HERE / "cuda_race.cpp")
    said = set()
    for team in (0, 2):
        done = outcome(target, team)
        assert done.returncode == 0, done.stderr[:4000]
        assert len(done.stdout.splitlines()) == 10
        said.add(done.stdout)
    assert len(said) == 1, "clusters decide otherwise than the queue"


BARRIERS = {
    "of a block": ("draw.cuh", "add_up() {\n    sync();", "add_up() {", 0),
    "of a cluster": ("cluster.cuh", "room.draft_tiles, desk);\n  desk.team.meet();", "room.draft_tiles, desk);", 2),
}


@pytest.mark.parametrize("barrier", BARRIERS)
def test_a_missing_barrier_is_noticed(tmp_path, barrier):
    for folder in ("kernels/cuda", "tests"):
        (tmp_path / folder).mkdir(parents=True)
    for file in (ROOT / "kernels" / "cuda").glob("*.cuh"):
        shutil.copy(file, tmp_path / "kernels" / "cuda")
    shutil.copy(HERE / "cuda_race.cpp", tmp_path / "tests")
    name, sound, faulty, team = BARRIERS[barrier]
    header = tmp_path / "kernels" / "cuda" / name
    text = header.read_text()
    assert text.count(sound) == 1
    header.write_text(text.replace(sound, faulty))
    assert "data race" in outcome(race(tmp_path, tmp_path / "tests" / "cuda_race.cpp"), team).stderr
