"""``specdec-fast verify``: exit status, JSON, what people see, other implementations, one line for every mistake."""

import functools
import json
import os
import signal
import subprocess
import sys
import warnings

import pytest
from laws import DRAFTER_PIECES, TARGET_PIECES, model, tokenizer
from rich.cells import cell_len
from transformers.utils import logging
from typer.testing import CliRunner

from specdec_fast import cli, cli_verify, console
from specdec_fast.audit import RESOLUTION

ADAPTER = '''
def backwards(tokenizer):
    """Vocabularies come in an order of their own in every process; by how much the law is missed hangs on it."""
    known = sorted(type(tokenizer).get_vocab(tokenizer).items(), key=lambda pair: -pair[1])
    tokenizer.get_vocab = lambda: dict(known)


def assisted(model, input_ids, **arguments):
    backwards(arguments["tokenizer"])
    backwards(arguments["assistant_tokenizer"])
    return model.generate(input_ids, **arguments)


def wrong_at_once(model, input_ids, **arguments):
    output = model.generate(input_ids, do_sample=False, max_new_tokens=arguments["max_new_tokens"])
    output[:, -2] = (output[:, -2] + 1) % 8
    return output


number = 7
'''


def save(folder, pieces, seed):
    model(len(pieces), seed, sharpness=0.8).save_pretrained(folder)
    tokenizer(pieces).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Target, a drafter with another tokenizer, and prompts."""
    folder = tmp_path_factory.mktemp("audit")
    prompts = folder / "prompts.json"
    prompts.write_text(json.dumps(["abcab", "dab"]))
    target, drafter = save(folder / "target", TARGET_PIECES, 31), save(folder / "drafter", DRAFTER_PIECES, 33)
    return ["--target", target, "--drafter", drafter, "--prompts", str(prompts), "--dtype", "float32"]


@pytest.fixture
def adapter(tmp_path, monkeypatch):
    """A module in the working folder."""
    (tmp_path / "adapter.py").write_text(ADAPTER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "adapter"
    sys.modules.pop("adapter", None)


def run(*arguments, **environment):
    verbosity = logging.get_verbosity()
    environment = {"COLUMNS": "80", "SPECDEC_FAST_TRACEBACK": None} | environment
    with warnings.catch_warnings():
        result = CliRunner().invoke(cli.app, ["verify", *map(str, arguments)], env=environment)
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()
    return result


SAMPLED = ("--sample", "--top-k", 0)
QUICK = ("--samples", 64, "--max-new-tokens", 8)


def test_a_lossless_pair_exits_with_0(given):
    result = run(*given, "--top-k", 0, "--batch", 2048, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report.keys() == {"verdict", "reason", "greedy", "sampling", "speculation", "prompts", "settings"}
    assert (report["verdict"], report["greedy"]) == ("pass", None)
    sampling = report["sampling"]
    assert sampling["detectable"] <= RESOLUTION
    assert sampling["samples"] > 10_000 and sampling["tokens"] == 3
    for test in sampling["tests"]:
        assert {"samples", "statistic", "degrees", "p_value", "corrected", "detectable", "spread"} <= test.keys()
    assert report["speculation"]["drafted"] > 1000
    assert report["settings"]["top_k"] == 0 and report["settings"]["do_sample"]


def test_assisted_generation_of_transformers_exits_with_1(given, adapter):
    """The same pair and settings as above."""
    audited = ("--generate", f"{adapter}:assisted", "--samples", 500, "--json")
    result = run(*given, "--top-k", 0, *audited)
    assert result.exit_code == 1, result.output
    report = json.loads(result.stdout)
    assert report["verdict"] == "fault" and "do not have the target's law" in report["reason"]
    assert report["speculation"] is None
    assert report["settings"]["generate"] == f"{adapter}:assisted"


def test_tokens_reach_beyond_the_first_round(given):
    def tested(*arguments):
        return json.loads(run(*given, *QUICK, *SAMPLED, *arguments, "--json").stdout)["sampling"]["tokens"]

    assert tested() == 3
    assert tested("--num-assistant-tokens", 2) == 4
    assert tested("--tokens", 2) == 2


def test_both_are_audited_unless_one_is_asked_for(given):
    def parts(*arguments):
        report = json.loads(run(*given, *QUICK, *arguments, "--json").stdout)
        return [name for name in ("greedy", "sampling") if report[name] is not None]

    assert parts() == ["greedy", "sampling"]
    assert parts("--greedy") == parts("--temperature", 0) == ["greedy"]
    assert parts("--sample") == parts("--temperature", 0.7) == ["sampling"]


def test_too_few_samples_exit_with_1_and_say_so(given):
    result = run(*given, *QUICK)
    assert result.exit_code == 1
    assert "greedy: pass" in result.stdout
    assert "sampling: inconclusive" in result.stdout and "take more samples" in result.stdout
    assert result.stdout.splitlines()[-1] == "verdict: inconclusive"
    assert [line for line in result.stderr.splitlines() if line.startswith("Auditing")] == [
        "Auditing: greedy",
        "Auditing: target's law",
        "Auditing: samples",
        "Auditing: laws behind the samples",
    ]


@pytest.mark.parametrize("columns", [80, 120])
def test_what_people_see(given, columns):
    result = run(*given, *QUICK, "--greedy", COLUMNS=str(columns))
    assert result.exit_code == 0, result.output
    assert "8 tokens, all the same" in result.stdout
    assert "\x1b" not in result.stdout + result.stderr
    result = run(*given, *QUICK, *SAMPLED, COLUMNS=str(columns))
    for text in ("all prompts", "prompt 2", "tokens 2 and 3", "chi-square", "with rule block"):
        assert text in result.stdout
    reasons = [line for line in result.stdout.splitlines() if not line.startswith("sampling: ")]
    assert max(map(cell_len, reasons)) <= columns


def test_a_greedy_fault_shows_its_margin(given, adapter):
    result = run(*given, "--greedy", "--max-new-tokens", 8, "--generate", f"{adapter}:wrong_at_once")
    assert result.exit_code == 1
    assert "token 7 differs" in result.stdout and "no tie" in result.stdout
    assert "greedy: fault, 2 of 2 outputs differ from plain decoding in float32" in result.stdout


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        (["--tokens", 1], "--tokens 1 is out of range"),
        (["--samples", 0], "--samples 0 is out of range"),
        (["--batch", 0], "--batch 0 is out of range"),
        (["--seed", -1], "--seed -1 is out of range"),
        (["--significance", 2], "--significance 2.0 is out of range"),
        (["--top-p", 1.5], "--top-p 1.5 is out of range"),
        (["--greedy", "--top-k", 5], "exclude each other"),
        (["--generate", "adapter"], "write module:function"),
        (["--generate", "no_such_module:f"], "no_such_module:f was not found"),
        (["--generate", "adapter:missing"], "adapter:missing was not found"),
        (["--generate", "adapter:number"], "adapter:number is no function"),
        (["--generate", "adapter:assisted", "--method", "tli"], "leave them out"),
        (["--prompts", "no-such-file"], "No such file or directory: no-such-file"),
    ],
)
def test_mistakes_on_the_command_line(mistake, says, adapter):
    result = run(*mistake)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1 and says in result.stderr


@pytest.mark.parametrize(("name", "text"), [("p.json", '{"a": 1}'), ("p.json", "[1]"), ("p.txt", "\n \n")])
def test_prompt_files_that_hold_none(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    result = run("--prompts", tmp_path / name)
    assert result.exit_code == 2 and "--prompts" in result.stderr


def test_prompt_files(tmp_path):
    (tmp_path / "p.txt").write_text("one\n\ntwo two\n")
    (tmp_path / "p.json").write_text('["one", {"kind": "code", "text": "two two"}]')
    for name in ("p.txt", "p.json"):
        assert console.read_prompts(str(tmp_path / name)) == ["one", "two two"]
    assert len(cli_verify.PROMPTS) >= 2


def test_help_fits_80_columns():
    result = run("--help")
    assert result.exit_code == 0 and "…" not in result.stdout
    assert max(map(cell_len, result.stdout.splitlines())) <= 80


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
def test_ctrl_c_is_quiet(given):
    command = [sys.executable, "-m", "specdec_fast.cli", "verify", *given, "--batch", "1"]
    attended = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=attended)
    for line in process.stderr:
        if line.startswith("Auditing: samples"):
            break
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (output, errors.strip()) == ("", "")
