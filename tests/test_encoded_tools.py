"""The audit, the command line and the benchmark for models that read a source."""

import json

import pytest
import torch
from laws import TARGET_PIECES, joint_law
from sources import START, build_writer, noisy_writer, source, taught_writer, writer
from test_encoded_calls import READ, STEPS, Behind, small
from tiny import model
from transformers import LogitsProcessorList
from typer.testing import CliRunner

from specdec_fast import cli, fast_generate, pretrained
from specdec_fast.audit import audit_greedy, audit_sampling
from specdec_fast.audit.law import SHAPES, Scorer
from specdec_fast.sources import beginning
from specdec_fast.verification import Apart

WIDTH = len(TARGET_PIECES)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_the_audits_law_is_the_targets(kind):
    scorer = Scorer(small(kind, WIDTH, 3), READ["input_ids"], {"do_sample": True, "top_k": 0}, tokens=3, positions=3)
    law = joint_law(Behind(small(kind, WIDTH, 3)), torch.tensor([[START]]), 2, LogitsProcessorList())
    first = law.sum(1)
    for shape in SHAPES:
        assert torch.allclose(scorer.law([()], shape)[0], first, atol=1e-5)
        second = scorer.law([(token,) for token in range(WIDTH)], shape)
        assert torch.allclose(second * first.unsqueeze(1), law, atol=1e-5)


def audited(kind, generate=fast_generate, samples=8192):
    return audit_sampling(
        small(kind, WIDTH, 3),
        [READ["input_ids"], torch.tensor([[3, 1, 2]])],
        generate=generate,
        sampling={"top_k": 0},
        arguments={"assistant_model": small(kind, WIDTH, 4), "num_assistant_tokens": 2},
        samples=samples,
        batch=1024,
        small=8,
        positions=3,
        tokens=STEPS,
    )


def test_the_audit_passes_what_is_lossless_and_finds_what_is_not(monkeypatch):
    assert audited("bart").verdict == "pass"
    monkeypatch.setattr(Apart, "verify", lambda self, scores, proposal, draws: all_of(self, scores, proposal, draws))
    assert audited("bart").verdict == "fault"


def all_of(rule, scores, proposal, draws, verify=Apart.verify):
    """Every draft token stays."""
    verdict = verify(rule, scores, proposal, draws)
    count = torch.tensor(proposal.count)
    last = scores[torch.arange(len(count)), count].argmax(-1)
    return type(verdict)(count, torch.where(verdict.accepted == count, verdict.token, last))


def test_the_greedy_audit():
    prompts = [source("bart", seed=seed)["input_ids"] for seed in range(2)]
    arguments = {"assistant_model": noisy_writer("bart")}
    assert audit_greedy(writer("bart"), prompts, arguments=arguments, tokens=20).verdict == "pass"

    def wrong(target, input_ids, **more):
        output = target.generate(input_ids, do_sample=False, max_new_tokens=more["max_new_tokens"])
        output[:, -2] = (output[:, -2] + 1) % 60
        return output

    report = audit_greedy(writer("bart"), prompts, generate=wrong, tokens=20)
    assert report.verdict == "fault" and report.cases[0].divergence.position == 18


def test_what_a_result_begins_with():
    ids = torch.ones((2, 5), dtype=torch.long)
    assert beginning(writer("bart"), ids).tolist() == [[START], [START]]
    assert beginning(model("llama"), ids) is ids


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A target and a drafter that read texts, with tokenizers of their own."""
    made = []
    for role, kind in (("target", "bart"), ("drafter", "bart")):
        folder = tmp_path_factory.mktemp(role)
        built, tokenizer = taught_writer(role, kind)
        built.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        made.append(str(folder))
    return ["--target", made[0], "--drafter", made[1], "--dtype", "float32"]


def run(*arguments):
    result = CliRunner().invoke(cli.app, list(arguments))
    assert result.exit_code == 0, result.output
    return result


def test_the_command_line_generates(folders):
    loaded, tokenizer = pretrained.load(folders[1], dtype=torch.float32)
    ids = tokenizer("One evening in October", return_tensors="pt")["input_ids"]
    expected = tokenizer.decode(loaded.generate(ids, max_new_tokens=24, do_sample=False)[0, 1:])
    result = run(
        "generate",
        *folders,
        "--max-new-tokens",
        "24",
        "--num-assistant-tokens",
        "4",
        "--json",
        "One evening in October",
    )
    report = json.loads(result.stdout)
    assert report["text"] == expected and report["new_tokens"] == 24
    assert report["speculation"]["accepted"] > 0


def test_the_command_line_measures_and_audits(folders, tmp_path):
    prompts, to = tmp_path / "prompts.json", tmp_path / "rows.json"
    prompts.write_text(json.dumps(["One evening in October", "The old lighthouse keeper"]))
    given = [*folders, "--prompts", str(prompts)]
    run("bench", "generate", *given, "--methods", "slem", "--tokens", "8", "--repetitions", "1", "--json", str(to))
    rows = json.loads(to.read_text())
    rows = rows if isinstance(rows, list) else rows["rows"]
    assert {row["method"] for row in rows} >= {"autoregressive", "slem"}
    assert all(row["identical_to_plain"] is not False for row in rows if row["system"] == "specdec_fast")
    run("verify", *given, "--max-new-tokens", "12", "--temperature", "0")


def test_the_demo_needs_a_model_that_goes_on_with_its_prompt(folders):
    result = CliRunner().invoke(cli.app, ["demo", *folders, "--prompt", "One evening"])
    assert result.exit_code != 0 and "specdec-fast generate" in result.output


def test_nothing_of_the_callers_is_changed():
    target = build_writer("bart", seed=5)
    before = {name: part.clone() for name, part in target.state_dict().items()}
    config, keys = target.config.to_dict(), set(vars(target))
    inputs = source("bart", 2, padded=True)
    copies = {name: part.clone() for name, part in inputs.items()}
    fast_generate(target, **inputs, assistant_model=noisy_writer("bart"), max_new_tokens=8)
    assert all(torch.equal(part, before[name]) for name, part in target.state_dict().items())
    assert target.config.to_dict() == config and set(vars(target)) == keys
    assert all(torch.equal(inputs[name], part) for name, part in copies.items())
