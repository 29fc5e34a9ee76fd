"""``specdec-fast bench kernels``: everybody on the same inputs and held to the reference; no clock is asked."""

import importlib.util
import json
import sys

import pytest
import torch
from typer.testing import CliRunner

from specdec_fast.cli import app
from specdec_fast.microbench import LAWS, OPS, RULES, cases, clock, measure, peers, report, variants

CPU = torch.device("cpu")
SMALL = ["--device", "cpu", "--vocab", "300", "--gamma", "2", "--repetitions", "2", "--no-compiled"]


@pytest.fixture
def untested(monkeypatch):
    """Without the ops' tests, which this suite runs anyway, and with a copy too small to wait for."""
    monkeypatch.setattr(measure, "test_files", lambda ops, device: [])
    monkeypatch.setitem(clock.COPY_BYTES, "cpu", 2**12)
    monkeypatch.setattr(clock, "_last_cache", lambda: 2**12)


def run(*options):
    return CliRunner().invoke(app, ["bench", "kernels", *SMALL, *map(str, options)])


def rows_of(tmp_path, *options):
    result = run(*options, "--json", tmp_path / "rows.json")
    assert result.exit_code == 0, result.output
    return json.loads((tmp_path / "rows.json").read_text())


@pytest.mark.parametrize("filters", [False, True])
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("rule", RULES)
def test_the_inputs_accept_what_they_are_built_for(rule, law, filters):
    for dtype in ("float32", "bfloat16"):
        case = cases.Case("verify", dtype, 7, 4, 2000, rule=rule, law=law, filters=filters, acceptance=0.6)
        inputs = cases.build(case, CPU)
        found = variants.variants(case, [inputs], peers=(), compiled=False)
        variants.check(case, found, inputs)
        kept = cases.accepted(case)
        assert found[0].calls[0]().accepted.tolist() == kept
        assert len(set(kept)) > 2


def test_the_accepted_lengths_follow_the_law():
    for acceptance in (0.6, 0.8, 0.9):
        case = cases.Case("verify", "float32", 256, 8, 64, rule="token", law="dense", acceptance=acceptance)
        kept = cases.accepted(case)
        for length in range(1, 9):
            assert sum(n >= length for n in kept) / 256 == pytest.approx(acceptance**length, abs=1 / 256)


def test_the_drafters_law_overlaps_as_asked():
    case = cases.Case("verify", "float32", 1, 1, 5000, rule="token", law="dense", acceptance=0.7)
    inputs = cases.build(case, CPU)
    p = inputs["logits"][0, 0].double().softmax(0)
    q = inputs["draft_logits"][0, 0].double().softmax(0)
    # the one token that is made impossible or not moves this a little
    assert float(torch.minimum(p, q).sum()) == pytest.approx(0.7, abs=0.06)


def test_bytes_count_what_must_be_read():
    shape = {"op": "verify", "dtype": "bfloat16", "batch": 1, "gamma": 4, "vocab": 1000, "acceptance": 0.8}
    assert cases.accepted(cases.Case(rule="token", law="dense", **shape)) == [3]
    needed = {
        ("token", "dense"): 4 + 4,
        ("token", "handed"): 4 + 1,
        ("match", "point"): 4,
        ("block", "dense"): 5 + 4,
        ("token", "compact"): 4 + 4 * cases.SHARED,
    }
    for (rule, law), rows in needed.items():
        assert cases.Case(rule=rule, law=law, **shape).bytes_needed() == pytest.approx(rows * 1000 * 2)


def test_every_op_has_rows_that_say_how_to_repeat_them(tmp_path, untested):
    rows = rows_of(tmp_path, *(f"--op={op}" for op in OPS), "--batch", 2, "--dtype", "float32")
    assert {row["op"] for row in rows} == set(OPS)
    assert {row["backend"] for row in rows} >= {"reference"}
    for row in rows:
        assert row["dtype"] == "float32" and row["batch"] == 2 and row["gamma"] == 2 and row["vocab"] == 300
        assert row["gigabytes_per_second"] == pytest.approx(row["bytes"] / row["microseconds"] / 1e3, rel=1e-3)
        assert row["low"] <= row["microseconds"] <= row["high"] and row["samples"] >= 2
        assert row["ratio_to_reference"] == 1.0 or row["backend"] != "reference"
        assert row["state"] in clock.STATES and row["reproduce"].startswith("specdec-fast bench kernels --device cpu")
    again = rows_of(tmp_path, *rows[0]["reproduce"].split()[5:])
    assert [measure.key(row) for row in again] == [measure.key(row) for row in rows if row["op"] == "verify"]


def test_a_shared_vocabulary_is_compared_with_both_other_ways(tmp_path, untested):
    rows = rows_of(tmp_path, "--law", "compact", "--batch", 1)
    assert {variants.SAME, variants.SCATTER} <= {row["backend"] for row in rows}
    assert all(row["ratio_to_same_vocabulary"] and row["ratio_to_scatter"] for row in rows)


def test_the_compiled_reference_takes_the_ops_arguments(tmp_path, monkeypatch, untested):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(variants, "_compiled_ops", {})
    shapes = [*(f"--op={op}" for op in OPS), *(f"--law={law}" for law in LAWS), "--rule=token", "--rule=match"]
    rows = rows_of(tmp_path, *shapes, "--filters", "--batch", 3, "--compiled")
    assert all(row["ratio_to_compiled"] for row in rows)
    case = cases.Case("verify", "float32", 4, 3, 200, rule="block", law="compact", filters=True, acceptance=0.8)
    inputs = cases.build(case, CPU)
    reference, compiled, *_ = variants.variants(case, [inputs], peers=(), compiled=True)
    accepted, token, *_ = compiled.calls[0]()
    expected = reference.calls[0]()
    assert torch.equal(accepted, expected.accepted) and torch.equal(token, expected.token)


def test_what_was_measured_is_kept_and_a_limit_leaves_the_rest(tmp_path, untested):
    first = rows_of(tmp_path, "--batch", 1)
    kept = rows_of(tmp_path, "--batch", 1, "--batch", 2, "--resume")
    assert kept[: len(first)] == first and {row["batch"] for row in kept} == {1, 2}
    result = run("--batch", 1, "--minutes", 1e-9)
    assert result.exit_code == 0 and "1 shapes are left" in " ".join(result.output.split())


def test_markdown_and_plot(tmp_path, untested):
    options = ["--batch", 1, "--markdown", tmp_path / "rows.md"]
    drawable = importlib.util.find_spec("matplotlib") is not None
    result = run(*options, *(["--plot", tmp_path / "rows.svg"] if drawable else []))
    assert result.exit_code == 0, result.output
    text = (tmp_path / "rows.md").read_text()
    assert "verify token dense, bfloat16, B=1 γ=2 V=300" in text and "Command: `" in text
    assert (tmp_path / "rows.svg").exists() == drawable


def test_nothing_is_reported_where_a_backend_is_wrong(monkeypatch, untested):
    own = variants._bound

    def wrong(function, inputs, backend):
        moved = inputs if backend == "reference" else inputs | {"start": inputs["start"] + 1}
        return own(function, moved, backend)

    if not variants.backends("verify", CPU):
        pytest.skip("needs a backend beside the reference: without a C++ compiler none was built")
    monkeypatch.setattr(variants, "_bound", wrong)
    result = run("--batch", 64)
    assert result.exit_code == 2 and "returns the reference's" in " ".join(result.output.split())
    assert "cold" not in result.output


def test_nothing_is_measured_where_the_tests_are_red(tmp_path, monkeypatch):
    red = tmp_path / "tests" / "test_red.py"
    red.parent.mkdir()
    red.write_text("def test_red():\n    assert False\n")
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)  # may leave failures out of the inner summary
    monkeypatch.setattr(measure, "test_files", lambda ops, device: [red])
    result = run("--batch", 1, "--json", tmp_path / "rows.json")
    assert result.exit_code == 2 and "test_red" in result.output
    assert not (tmp_path / "rows.json").exists()


def test_the_ops_own_tests_are_those_that_run():
    names = [file.name for file in measure.test_files(["verify", "sample"], CPU)]
    assert names == ["test_ops_verify.py", "test_ops_sample.py"]
    assert "test_cuda_device.py" in [f.name for f in measure.test_files(["verify"], torch.device("cuda"))]


def test_the_grids_hold_the_goals():
    for chosen in (cases.quick_grid(), cases.grid("cpu"), cases.grid("cuda")):
        assert len(chosen) > 10 and len(set(chosen)) == len(chosen)
        for batch in (1, 8):
            for dtype in ("float32", "bfloat16"):
                shape = {"dtype": dtype, "batch": batch, "gamma": 4, "vocab": 151936}
                assert cases.Case("verify", rule="token", law="dense", acceptance=0.8, **shape) in chosen
                assert cases.Case("sample", **shape) in chosen
    everywhere = cases.grid("cuda")
    assert {case.vocab for case in everywhere} == set(cases.VOCABULARIES)
    assert {case.batch for case in everywhere} == set(cases.BATCHES)
    assert {(case.rule, case.law) for case in everywhere if case.op == "verify"} >= {("match", "point")}
    assert max(case.batch for case in cases.grid("cpu")) == 16


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--op", "magic"], "magic"),
        (["--rule", "magic"], "magic"),
        (["--batch", "0"], "--batch"),
        (["--acceptance", "1.5"], "--acceptance"),
        (["--quick"], "--quick"),
        (["--resume"], "--json"),
        (["--minutes", "0"], "--minutes"),
        (["--device", "tpu"], "tpu"),
        (["--vllm", "nowhere"], "--vllm"),
    ],
)
def test_mistakes_are_named(options, named):
    result = run(*options)
    assert result.exit_code == 2 and named in result.output


class TestPeers:
    """A folder that looks like a project, with the kernel's signature and a plain implementation."""

    VLLM = """
import torch
from vllm.triton_utils import tl, triton
from vllm.v1.worker.gpu.sample.gumbel import SCALE
def rejection_sample(target_logits, draft_logits, draft_sampled, cu_num_logits, pos, idx_mapping, expanded_idx_mapping,
                     expanded_local_pos, temperature, seed, num_speculative_steps, use_block_verification=False):
    batch = cu_num_logits.shape[0] - 1
    p = target_logits.view(batch, num_speculative_steps + 1, -1).double().softmax(-1)
    q = torch.ones_like(p) if draft_logits is None else draft_logits.double().softmax(-1)
    drafted = draft_sampled.view(batch, -1)[:, 1:]
    out, count = drafted.new_full((batch, num_speculative_steps + 1), -1), drafted.new_zeros(batch)
    for b in range(batch):
        i = 0
        while i < num_speculative_steps and p[b, i, drafted[b, i]] >= q[b, i, drafted[b, i]] * SCALE:
            out[b, i] = drafted[b, i]
            i += 1
        out[b, i], count[b] = p[b, i].argmax(), i + 1
    return out, count
"""

    def folder(self, tmp_path):
        place = tmp_path / "release" / "vllm" / "v1" / "worker" / "gpu"
        for name in ("spec_decode", "sample"):
            (place / name).mkdir(parents=True)
        (tmp_path / "release" / "vllm" / "triton_utils").mkdir()
        (tmp_path / "release" / "vllm" / "__init__.py").write_text("raise ImportError('the whole project')\n")
        (place / "spec_decode" / "rejection_sampler_utils.py").write_text(self.VLLM)
        (place / "sample" / "gumbel.py").write_text("SCALE = 0.9\n")
        return tmp_path

    def test_a_project_runs_from_its_folder_and_leaves_nothing_behind(self, tmp_path, untested):
        pytest.importorskip("triton")
        folder = self.folder(tmp_path)
        rows = rows_of(tmp_path, "--vllm", folder, "--batch", 5, "--law", "point", "--law", "dense")
        assert {row["law"] for row in rows if row["backend"] == "vllm"} == {"point", "dense"}
        assert all(row["ratio_to_vllm"] for row in rows)
        assert not [name for name in sys.modules if name.startswith("vllm")]

    def test_a_project_that_accepts_something_else_is_refused(self, tmp_path, untested):
        pytest.importorskip("triton")
        folder = self.folder(tmp_path)
        file = next(folder.glob("**/gumbel.py"))
        file.write_text("SCALE = 1e9\n")
        result = run("--vllm", folder, "--batch", 5)
        assert result.exit_code == 2 and "vllm" in result.output

    def test_a_folder_of_something_else_is_refused(self, tmp_path):
        for name in peers.PEERS:
            result = run(f"--{name}", tmp_path)
            assert result.exit_code == 2 and f"--{name}" in result.output


def test_the_clock_times_every_variant_cold_and_warm(monkeypatch):
    monkeypatch.setattr(clock, "_seconds", lambda call: call() or 1e-3)
    used = []
    calls = [lambda i=i: used.append(i) for i in range(3)]
    times = clock.HostClock().run([clock.Variant("a", calls), clock.Variant("b", calls[:1])], 4)
    assert set(times) == {(name, state) for name in "ab" for state in clock.STATES}
    assert times["a", "cold"].median() == pytest.approx(1000.0)
    assert set(used) == {0, 1, 2}


def test_copies_pass_twice_the_cache():
    timer = clock.HostClock()
    timer.cache = 1000
    assert timer.copies(100, 100) == 21 and timer.copies(5000, 5000) == 2
    assert timer.copies(100, 2**29) == 2 and timer.copies(1, 2**40) == 1


def test_json_holds_numbers_that_can_be_read_back():
    rows = [{"a": 1.23456789, "b": None, "c": "x", "d": True}]
    assert json.loads(report.as_json(rows)) == [{"a": 1.23457, "b": None, "c": "x", "d": True}]
