"""``benchmarks/gpu.sh``: its steps, in small and on the CPU, and what they leave behind."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "benchmarks"))
import end_to_end
import widen

ROOT = pathlib.Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
STEPS = ("build", "test", "kernels", "e2e", "sources")


def run(step, out, work):
    settings = {**os.environ, "SPECDEC_FAST_DEVICE": "cpu", "SPECDEC_FAST_WORK": str(work), "PYTHON": sys.executable}
    settings |= {"OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", SCRIPT, step, out], env=settings, capture_output=True, text=True, timeout=400)


def test_every_step_runs_and_leaves_few_small_files(tmp_path):
    out, work = tmp_path / "out", tmp_path / "work"
    untouched = {path for path in ROOT.iterdir()}
    early = run("test", out, work)
    assert early.returncode == 1 and "nothing is built yet" in early.stderr
    for step in STEPS:
        done = run(step, out, work)
        assert done.returncode == 0, f"{step}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        assert f"{step}: done" in done.stdout.splitlines()[-1]
    files = {path.name for path in out.iterdir()}
    assert files == {
        "environment.json", "build.txt", "tests.txt", "first.json", "kernels.json", "kernels.md", "e2e.json",
        "summary.txt", "sources_whisper.json", "sources_t5.json",
    }  # fmt: skip
    assert all(path.stat().st_size < 200_000 for path in out.iterdir())
    assert "test: green" in (out / "tests.txt").read_text()
    rows = json.loads((out / "kernels.json").read_text())
    assert {row["op"] for row in rows} == {"project"}
    whole = json.loads((out / "e2e.json").read_text())
    found = {(row["pair"], row["system"], row["method"]) for row in whole}
    assert ("other tokenizer", "specdec_fast", "tli") in found and ("same tokenizer", "specdec_fast", "model") in found
    assert {row["temperature"] for row in whole} == {0.0, 1.0}
    plain = [row for row in whole if row["method"] == "autoregressive"]
    assert all(row["share_of_limit_with_prompt"] for row in plain)
    assert all((row["share_of_limit"] is None) == (row["system"] == "transformers") for row in plain)
    heard = json.loads((out / "sources_whisper.json").read_text())
    assert heard["fixed_passes_ms_1_rows"]["5 positions"] > 0 and heard["calls_ms_1_rows"]["drafted, T=0"] > 0
    assert "whisper B=1: generate, T=0" in (out / "summary.txt").read_text()
    assert {path for path in ROOT.iterdir()} == untouched


def test_cells_that_are_done_are_not_measured_again(tmp_path, capsys):
    cells = end_to_end.cells(["tiny"], [1])
    done = [{**vars(cell), "compile": "off", "layers": "auto"} for cell in cells]
    rest = end_to_end.run(tmp_path, torch.device("cpu"), done, float("inf"), tiny=True, compile="off")
    assert list(rest) == []
    assert "left" not in capsys.readouterr().out
    otherwise = [{**row, "layers": "fused"} for row in done]
    assert list(end_to_end.run(tmp_path, torch.device("cpu"), otherwise, 0.0, tiny=True, compile="off")) == []
    assert f"{len(cells)} cells are left" in capsys.readouterr().out


def test_the_bandwidth_limit_counts_weights_and_the_valid_cache():
    shape = widen.Shape(hidden=64, layers=2, heads=2, kv_heads=1, head_dim=32, intermediate=128, vocab=1000)
    weights = 2 * (64 * 32 * 2 * (2 + 1) + 3 * 64 * 128) + 1000 * 64
    cache = 2 * 2 * 32 * 100  # of one row of 100 columns
    assert end_to_end.limit(shape, 1, 100, 1.0) == pytest.approx(1e9 / 2 / (weights + cache))
    assert end_to_end.limit(shape, 4, 100, 1.0) == pytest.approx(4e9 / 2 / (weights + 4 * cache))


def test_the_script_is_sound():
    assert subprocess.run(["bash", "-n", SCRIPT]).returncode == 0
    usage = subprocess.run(["bash", SCRIPT], capture_output=True, text=True)
    assert usage.returncode == 2 and "build OUT" in usage.stdout
    if shutil.which("shellcheck"):
        assert subprocess.run(["shellcheck", SCRIPT]).returncode == 0


def test_the_pace_is_that_behind_the_prompt(monkeypatch):
    """Calls that take 5 s for a prompt and a tenth of a second a token."""
    clock = [0.0]
    monkeypatch.setattr(end_to_end.time, "perf_counter", lambda: clock[0])

    def run(count):
        clock[0] += 5 + count / 10

    assert end_to_end.pace(run, 96, 4, lambda: None, 3) == pytest.approx(40)
