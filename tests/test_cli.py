"""The command line: what goes to stdout and stderr, what repeats, and one line for every mistake."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import toy_tokenizers
from rich.cells import cell_len
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging
from typer.testing import CliRunner

from specdec_fast import __version__, cli, console, demo, environment, options, pretrained

TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"


def save(folder, kind, seed, template=None):
    """A tiny random model with a tokenizer of some kind, as a folder."""
    tokenizer = toy_tokenizers.build(kind)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        eos_token_id=None,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Target, with a chat template, and drafter with another tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    target = save(folder / "target", toy_tokenizers.KINDS[0], 0, TEMPLATE)
    return ["--target", target, "--drafter", save(folder / "drafter", toy_tokenizers.KINDS[-1], 1)]


@pytest.fixture
def target(pair, tmp_path):
    """A target of one's own, to damage."""
    return Path(shutil.copytree(pair[1], tmp_path / "target"))


@pytest.fixture(autouse=True)
def leave_no_trace():
    """The commands silence Transformers for their whole process, which here is pytest's."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with warnings.catch_warnings():
        yield
    logging.set_verbosity(verbosity)
    if bars:
        logging.enable_progress_bar()


def run(*arguments, stdin=None, columns=80, **environment):
    environment = {"COLUMNS": str(columns), **environment}
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], input=stdin, env=environment)


def run_json(*arguments, stdin=None):
    result = run("generate", *arguments, "--json", stdin=stdin)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout)


SHORT = ("--max-new-tokens", 12, "--dtype", "float32")


# generate ------------------------------------------------------------------------------------------------------------


def test_generate_writes_the_text_to_stdout_and_the_rest_to_stderr(pair):
    report = run_json("two ships", *pair, *SHORT)
    for stream in ("--stream", "--no-stream"):
        result = run("generate", "two ships", *pair, *SHORT, stream)
        assert result.exit_code == 0
        assert result.stdout == report["text"] + "\n"
        for figure in ("tokens/s", "rule match", "block efficiency", "verify"):
            assert figure in result.stderr
        assert "\x1b" not in result.stdout + result.stderr


def test_generate_json_says_what_was_done(pair):
    report = run_json("two ships", *pair, *SHORT, "--top-p", 0.9, "--seed", 3, "--num-assistant-tokens", 2)
    assert report["new_tokens"] == report["speculation"]["committed"] == 12
    assert report["prompt_tokens"] > 2
    assert report["tokens_per_second"] == pytest.approx(12 / report["seconds"])
    assert report["speculation"]["method"] in options.METHODS
    assert {"acceptance_rate", "block_efficiency"} <= report["speculation"].keys()
    settings = report["settings"]
    assert (settings["target"], settings["drafter"]) == (pair[1], pair[3])
    assert settings["do_sample"] and settings["top_p"] == 0.9
    assert settings["temperature"] == 1.0 and settings["top_k"] == 50, "defaults are spelled out"
    assert (settings["dtype"], settings["device"], settings["chat"]) == ("float32", "cpu", True)


def test_every_way_to_give_a_prompt_is_the_same(pair, tmp_path):
    text = "naïve café, 人工智能\nand 7 ships"
    file = tmp_path / "prompt.txt"
    file.write_text(text + "\n", encoding="utf-8")
    wanted = run_json(text, *pair, *SHORT)["text"]
    assert run_json("--file", file, *pair, *SHORT)["text"] == wanted
    assert run_json("-", *pair, *SHORT, stdin=text)["text"] == wanted
    assert run_json("--file", "-", *pair, *SHORT, stdin=text + "\n")["text"] == wanted


def test_a_prompt_typed_in_a_locale_that_is_not_utf_8():
    typed = "naïve 😀".encode().decode("ascii", "surrogateescape")
    assert cli._read_prompt(typed, None) == "naïve 😀"


def test_seeds_repeat(pair):
    def sampled(seed):
        return run_json("two ships", *pair, *SHORT, "--temperature", 1, "--seed", seed)["text"]

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


@pytest.mark.parametrize(
    ("given", "sampling"),
    [
        ([], False),
        (["--greedy"], False),
        (["--temperature", 0], False),
        (["--sample"], True),
        (["--min-p", 0.1], True),
        (["--temperature", 0.5], True),
    ],
)
def test_when_it_samples(pair, given, sampling):
    report = run_json("two ships", *pair[:2], "--method", "autoregressive", *SHORT, *given)
    assert report["settings"]["do_sample"] is sampling


def test_methods_without_a_drafter_load_none(pair):
    plain = run_json("two ships", *pair[:2], *SHORT, "--method", "autoregressive")
    lookup = run_json("two ships", *pair[:2], *SHORT, "--method", "prompt_lookup")
    assert plain["text"] == lookup["text"] == run_json("two ships", *pair, *SHORT)["text"]
    assert plain["settings"]["drafter"] is None


def test_the_chat_template_is_used_where_there_is_one(pair):
    def length(*given):
        return run_json("two ships", *given, *SHORT, "--method", "autoregressive")["prompt_tokens"]

    with_template, without = pair[:2], ["--target", pair[3]]
    assert length(*with_template) == length(*with_template, "--chat") == length(*with_template, "--no-chat") + 2
    assert length(*without) == length(*without, "--no-chat")


def test_help_names_every_method_and_rule():
    text = " ".join(re.sub(r"[│\n]", " ", run("generate", "--help", columns=200).stdout).split())
    for name in (*options.METHODS, *options.VERIFICATIONS, *console.DTYPES):
        assert re.search(rf"\b{name}\b", text), name


def test_help_fits_80_columns():
    for command in ([], ["generate"], ["demo"], ["env"]):
        result = run(*command, "--help")
        assert result.exit_code == 0
        assert "…" not in result.stdout
        assert max(map(cell_len, result.stdout.splitlines())) <= 80


# Streaming -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", toy_tokenizers.KINDS)
def test_a_streamed_text_is_the_text(kind):
    tokenizer = toy_tokenizers.build(kind)
    tokens = tokenizer(toy_tokenizers.TEXTS["all"], add_special_tokens=False)["input_ids"]
    pieces = []
    stream = console.TextStream(tokenizer, pieces.append)
    stream.put(torch.tensor([[1, 2, 3]]))
    for token in tokens:
        stream.put(torch.tensor([token]))
    stream.end()
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    assert "".join(pieces) == text
    assert len(pieces) > 100
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(pieces)


def test_a_stream_that_ends_within_a_character():
    tokenizer = toy_tokenizers.build(toy_tokenizers.BYTE_LEVEL[0])
    tokens = tokenizer("😀", add_special_tokens=False)["input_ids"][:1]
    pieces = []
    stream = console.TextStream(tokenizer, pieces.append)
    stream.put(torch.tensor([[1]]))
    stream.put(torch.tensor(tokens))
    assert pieces == []
    stream.end()
    assert pieces == ["\ufffd"]


# Mistakes ------------------------------------------------------------------------------------------------------------


def refused(*arguments, says, stdin=None):
    """The command fails with one line, behind at most lines of progress, and says ``says`` in it."""
    result = run(*arguments, stdin=stdin)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    *progress, last = result.stderr.splitlines()
    assert last.startswith("error: ") and re.search(says, last), last
    assert all(line.startswith(("Importing", "Loading")) for line in progress), progress
    return last


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "there is no prompt"),
        (["a", "--file", "b"], "two prompts"),
        ([" "], "prompt is empty"),
        (["--file", "no-such-file"], "No such file or directory: no-such-file"),
        (["a", "--bogus"], "--bogus"),
        (["a", "--max-new-tokens", "x"], "max-new-tokens"),
        (["a", "--max-new-tokens", 0], "--max-new-tokens 0 is out of range: use a number 1 or more"),
        (["a", "--top-p", 1.5], "--top-p 1.5 is out of range: use a number from 0 to 1"),
        (["a", "--method", "magic"], "'magic' is not known: use one of .*'slem'"),
        (["a", "--verification", "magic"], "'magic' is not known"),
        (["a", "--dtype", "float3"], "--dtype float3 is not known: use one of auto"),
        (["a", "--device", "abacus"], "--device abacus is not usable here"),
        (["a", "--greedy", "--top-k", 5], "--greedy and --top-k exclude each other"),
        (["a", "--temperature", 0, "--sample"], "--temperature 0 is greedy decoding.*--sample"),
        (["a", "--method", "prompt_lookup", "--drafter", "x"], "uses no drafter"),
        (["a", "--target", "./no-such-folder", "--method", "autoregressive"], "there is no folder ./no-such-folder"),
        (["a", "--drafter", "./no-such-folder"], "there is no folder ./no-such-folder"),
    ],
)
def test_mistakes_on_the_command_line(given, says):
    refused("generate", *given, says=says)


def test_an_unknown_command():
    refused("generat", "a", says="generat")


def test_a_prompt_that_is_not_text(pair):
    refused("generate", "-", *pair, stdin=b"\xff\xfe", says="not UTF-8")


def test_no_room_for_the_answer(pair):
    refused("generate", "ships", *pair, "--max-new-tokens", 300, says="do not fit the target's 256 positions")


def test_a_template_that_is_not_there(pair):
    refused("generate", "a", "--target", pair[3], "--method", "autoregressive", "--chat", says="no chat template")


def test_a_method_the_pair_cannot_run(pair):
    refused("generate", "a", *pair, *SHORT, "--method", "model", says="tokenizer")


def test_pickles_are_read_when_asked_for(pair, target):
    model = LlamaForCausalLM.from_pretrained(target)
    torch.save(model.state_dict(), target / "pytorch_model.bin")
    (target / "model.safetensors").unlink()
    given = ("a", "--target", target, "--method", "autoregressive", *SHORT)
    refused("generate", *given, says="pickle only.*--allow-pickle")
    assert run_json(*given, "--allow-pickle")["text"] == run_json("a", *pair, *SHORT)["text"]


def test_remote_code_is_named_by_its_option(target):
    config = json.loads((target / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "code.Own", "AutoModelForCausalLM": "code.Own"}}
    (target / "config.json").write_text(json.dumps(config))
    refused("generate", "a", "--target", target, "--method", "autoregressive", says="--trust-remote-code to run it")


def test_damaged_weights(target):
    (target / "model.safetensors").write_bytes(b"damaged")
    refused("generate", "a", "--target", target, "--method", "autoregressive", says=r"\S")


def test_a_package_without_a_drafter(monkeypatch, tmp_path, pair):
    monkeypatch.setattr(pretrained, "__file__", str(tmp_path / "pretrained.py"))
    refused("generate", "a", *pair[:2], says="no drafter.*--drafter, or use --method prompt_lookup")


@pytest.mark.parametrize("how", ["option", "environment"])
def test_a_traceback_when_asked_for(how):
    given = ["generate", "a", "--drafter", "./no-such-folder"]
    result = run(*given, "--traceback") if how == "option" else run(*given, SPECDEC_FAST_TRACEBACK="1")
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: there is no folder")


def test_an_error_nobody_expected_says_its_type(monkeypatch):
    def fail():
        raise KeyError("x")

    monkeypatch.setattr(environment, "report", fail)
    assert refused("env", says="KeyError") == "error: KeyError: 'x' (--traceback shows where)"


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
def test_ctrl_c_is_quiet(pair):
    command = [sys.executable, "-m", "specdec_fast.cli", "generate", "ships", *pair, "--max-new-tokens", "240"]
    # A background job of a shell hands down an ignored SIGINT
    attended = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=attended)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("Loading the target"):
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip() == ""


# env -----------------------------------------------------------------------------------------------------------------


def test_env_json(tmp_path):
    result = run("env", "--json", SPECDEC_FAST_CACHE=str(tmp_path))
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report.keys() == {"versions", "devices", "native", "backends", "problem", "models"}
    assert report["problem"] is None
    assert report["versions"]["specdec_fast"] == __version__
    assert report["versions"]["torch"] == torch.__version__
    assert {"python", "transformers", "tokenizers", "triton"} <= report["versions"].keys()
    assert report["devices"][0]["name"] == "cpu"
    assert {"_ops_cpu", "_ops_cuda", "_text", "build"} <= report["native"].keys()
    assert report["models"]["target"]["cached"] is False
    assert report["models"]["target"]["path"].startswith(str(tmp_path))


def test_env_for_people(tmp_path):
    folder = tmp_path / ("long" * 30)
    result = run("env", SPECDEC_FAST_CACHE=str(folder))
    assert result.exit_code == 0
    for text in ("transformers", "_ops_cpu", "_ops_cuda", "cpu", "not there yet", str(folder)):
        assert text in result.stdout


def test_version():
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"specdec-fast {__version__}\n")


# demo ----------------------------------------------------------------------------------------------------------------

DEMO = ("demo", "--prompt", "two ships", "--max-new-tokens", 24, "--dtype", "float32")


@pytest.mark.parametrize("columns", [80, 120])
def test_demo_compares_the_two(pair, columns):
    result = run(*DEMO, *pair, columns=columns)
    assert result.exit_code == 0, result.stderr
    assert "\x1b" not in result.stdout + result.stderr
    for text in (demo.PLAIN, demo.FAST, "speed-up", "acceptance rate", "translate", "two ships"):
        assert text in result.stdout
    assert re.search(r"identical +yes, token for token", result.stdout)
    table = [line for line in result.stdout.splitlines() if line.startswith(("┏", "└"))]
    assert [cell_len(line) for line in table] == [columns, columns]
    assert "Warming up" in result.stderr


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--verification", "match"], "yes, to plain decoding with the same seed"),
        (["--verification", "token"], "the same law, other draws"),
    ],
)
def test_demo_that_samples(pair, given, says):
    result = run(*DEMO, *pair, "--temperature", 0.8, *given, columns=120)
    assert result.exit_code == 0, result.stderr
    assert says in result.stdout
    assert "temperature 0.8" in result.stdout


def test_demo_without_a_drafter(pair):
    result = run(*DEMO, *pair[:2], "--method", "prompt_lookup")
    assert result.exit_code == 0, result.stderr
    assert "prompt_lookup, rule match" in result.stdout


@pytest.mark.parametrize("position", [0, 21])
def test_demo_reports_a_difference(pair, monkeypatch, position):
    honest = demo._fast

    def broken(session, inputs, count, **extra):
        ids = honest(session, inputs, count, **extra)
        column = inputs["input_ids"].shape[1] + position
        if count > position:  # the warm-up is shorter
            ids[0, column] = (ids[0, column] + 1) % session.target.config.vocab_size
        return ids

    monkeypatch.setattr(demo, "_fast", broken)
    result = run(*DEMO, *pair, columns=120)
    assert result.exit_code == 0, result.stderr
    assert re.search(rf"identical +no, from token {position + 1} on", result.stdout)
    assert "please report it" in result.stdout


def test_the_unit_is_the_spacing_of_the_type():
    assert console.unit_of(15.9, torch.bfloat16) == console.unit_of(-8.0, torch.bfloat16) == 2**-4
    assert console.unit_of(16.0, torch.bfloat16) == 2**-3
    for dtype in (torch.float16, torch.float32):
        value = torch.tensor(5.0, dtype=dtype)
        assert console.unit_of(5.0, dtype) == float(torch.nextafter(value, torch.tensor(9.0, dtype=dtype)) - value)


def test_the_margin_is_that_of_the_two_best(pair):
    model, _ = pretrained.load(pair[1], dtype=torch.float32)
    ids = torch.arange(1, 20).unsqueeze(0)
    margin = demo.margin_at(model, ids)
    with torch.no_grad():
        values, tokens = model(ids).logits[0, -1].topk(2)
    assert margin.tokens == tuple(tokens.tolist())
    assert margin.value == pytest.approx(float(values[0] - values[1]), rel=1e-4)
    assert 0 <= margin.noise < 1e-4
    assert not margin.is_tie
    assert demo.Margin((1, 2), value=0.0625, unit=0.0625, noise=0.0).is_tie
    assert demo.Margin((1, 2), value=0.25, unit=0.0625, noise=0.125).is_tie
    assert not demo.Margin((1, 2), value=0.3125, unit=0.0625, noise=0.125).is_tie
