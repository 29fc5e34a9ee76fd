"""``specdec-fast bench generate``: every system on the same prompts, one row each."""

import json

import pytest
from tiny import taught
from typer.testing import CliRunner

from specdec_fast import bench, console
from specdec_fast.cli import app


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    for role in ("target", "drafter"):
        model, tokenizer = taught(role)
        model.save_pretrained(root / role)
        tokenizer.save_pretrained(root / role)
    (root / "prompts.txt").write_text("def count_words(text\nThe capital of\n\n")
    return root


def run(folders, *options):
    file = folders / "rows.json"
    fixed = ["--target", folders / "target", "--drafter", folders / "drafter", "--prompts", folders / "prompts.txt"]
    fixed += ["--dtype", "float32", "--no-chat", "--tokens", "6", "--repetitions", "2", "--json", file]
    result = CliRunner().invoke(app, ["bench", "generate", *map(str, fixed), *options])
    assert result.exit_code == 0, result.output
    return json.loads(file.read_text())


def test_a_row_for_every_system(folders):
    rows = run(folders, "--methods", "auto,tli", "--temperature", "0", "--temperature", "1")
    greedy, sampled = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    assert [(row["system"], row["method"]) for row in greedy] == [
        ("transformers", "autoregressive"),
        ("transformers", "assisted"),
        ("specdec_fast", "autoregressive"),
        ("specdec_fast", "auto"),
        ("specdec_fast", "tli"),
    ]
    assert all(row["temperature"] == 0.0 and row["identical_to_plain"] for row in greedy if row["method"] != "assisted")
    assert all(row["temperature"] == 1.0 and row["identical_to_plain"] is None for row in sampled)
    plain, _, ours, _, tli = sampled
    assert plain["ratio_to_transformers"] == plain["ratio_to_plain"] == ours["ratio_to_plain"] == 1.0
    assert plain["verification"] is None and plain["block_efficiency"] is None
    assert tli["verification"] == "block"
    assert tli["block_efficiency"] >= 1.0 and 0.0 <= tli["acceptance_rate"] <= 1.0
    assert all(row["lowest"] <= row["tokens_per_second"] <= row["highest"] for row in rows)


def test_batches_leave_out_what_transformers_refuses(folders):
    rows = run(folders, "--methods", "slem", "--temperature", "0", "--batch", "2")
    assert [row["method"] for row in rows] == ["autoregressive", "autoregressive", "slem"]
    assert all(row["batch"] == 2 and row["identical_to_plain"] for row in rows)


def test_rounds_on_the_device_are_measured_too(folders):
    rows = run(folders, "--methods", "tli,slem", "--temperature", "0", "--compile", "static")
    assert [row["passes"] for row in rows][2:] == ["static, device", "static, device", "static, host"]
    assert all(row["identical_to_plain"] for row in rows[2:])


def test_what_first_calls_make_is_made_before_the_clock_runs(folders, monkeypatch):
    ready, prepare = [], bench.prepare
    monkeypatch.setattr(bench, "prepare", lambda *a, **k: ready.append(k["method"]) or prepare(*a, **k))
    monkeypatch.setattr(bench, "_note", lambda system: ready.append("timed"))
    run(folders, "--methods", "auto,tli", "--temperature", "1")
    assert ready[:3] == ["autoregressive", "auto", "tli"] and set(ready[3:]) == {"timed"}


def test_an_unknown_method_is_refused_before_a_model_is_loaded(folders, monkeypatch):
    monkeypatch.setattr(console, "open_session", lambda *_: pytest.fail("loaded"))
    result = CliRunner().invoke(app, ["bench", "generate", "--methods", "auto,magic"])
    assert result.exit_code == 2 and "magic" in result.output


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--compile", "fast"], "--compile fast"),
        (["--methods", "magic"], "magic"),
        (["--temperature", "-1"], "--temperature"),
        (["--tokens", "0"], "--tokens"),
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_mistakes_are_named(folders, options, named):
    pair = ["--target", str(folders / "target"), "--drafter", str(folders / "drafter")]
    result = CliRunner().invoke(app, ["bench", "generate", *pair, *options])
    assert result.exit_code == 2
    assert named in result.output
