"""``specdec-fast plan``: the arithmetic of speed, and the command around it."""

import json

import pytest
from tiny import taught
from typer.testing import CliRunner

from specdec_fast import console, costs, plan, warmup
from specdec_fast.cli import app
from specdec_fast.costs import Costs
from specdec_fast.plan import Acceptance, forecast, speedup

TABLE = Costs((1.0, 1.1, 1.2, 1.3), step=0.1, rest=0.5)


def test_speed_is_tokens_a_round_over_what_a_round_costs():
    assert speedup([0.5, 0.5], TABLE, 0) == pytest.approx(1.0)
    assert speedup([0.5, 0.5], TABLE, 1) == pytest.approx(1.5 * 1.5 / 1.7)
    assert speedup([0.5, 0.4], TABLE, 2) == pytest.approx(1.7 * 1.5 / 1.9)


def test_a_forecast_names_the_best_lookahead():
    found = forecast(TABLE, Acceptance((0.9, 0.9, 0.0), (30, 27, 24)), gammas=(1, 2), acceptances=(0.0, 0.8))
    assert found.table[0.0][0] < 1 < found.table[0.8][0] < found.table[0.8][1]
    assert found.best_of[0.0] == (0, 1.0)
    assert found.best == (2, pytest.approx(2.71 * 1.5 / 1.9))
    assert found.best[1] == max(found.speeds) and len(found.speeds) == 4
    assert json.loads(json.dumps(found.to_dict()))["best_at_acceptance"]["gamma"] == 2


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
    fixed = ["--target", folders / "target", "--drafter", folders / "drafter", "--dtype", "float32", "--no-chat"]
    return CliRunner().invoke(app, ["plan", *map(str, fixed), "--repetitions", "1", *map(str, options)])


@pytest.fixture
def _measured(monkeypatch):
    monkeypatch.setattr(warmup, "observed", costs.observed)


@pytest.mark.usefixtures("_measured")
@pytest.mark.parametrize("temperature", [0, 1])
def test_acceptance_is_measured_on_prompts(folders, temperature):
    file = folders / "plan.json"
    more = "--prompts", folders / "prompts.txt", "--tokens", 12, "--temperature", temperature, "--json", file
    result = run(folders, *more)
    assert result.exit_code == 0, result.output
    assert "speed beside plain decoding" in result.output and "tested)" in result.output
    found = json.loads(file.read_text())
    assert (found["method"] == "slem") is not bool(temperature) and found["costs"]["measured"]
    assert 0 <= found["acceptance"]["positions"][0] <= 1 and found["acceptance"]["tested"][0] > 0
    assert found["best_at_acceptance"]["speedup"] == max(found["speedup_at_acceptance"])
    assert len(found["speedup"]) == len(plan.ACCEPTANCES)
    lines = [line.split() for line in result.output.splitlines()]
    for row in found["speedup"]:  # whole in 80 columns, and without marks
        whole = [f"{row['acceptance']:.2f}", *(f"{speed:.2f}" for speed in row["by_gamma"])]
        assert whole in [line[: len(whole)] for line in lines]


@pytest.mark.usefixtures("_measured")
def test_an_acceptance_may_be_given_and_a_plot_drawn(folders):
    pytest.importorskip("matplotlib")
    result = run(folders, "--acceptance", 0.7, "--plot", folders / "plan.svg")
    assert result.exit_code == 0, result.output
    assert "(assumed)" in result.output
    assert "lookahead" in (folders / "plan.svg").read_text()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--acceptance", "1.5"], "--acceptance 1.5 is out of range"),
        (["--acceptance", "0.5", "--prompts", "x.txt"], "--acceptance and --prompts exclude each other"),
        (["--tokens", "0"], "--tokens 0 is out of range"),
        (["--temperature", "-1"], "--temperature -1 is out of range"),
        (["--method", "fast"], "method='fast' is not known"),
        (["--plot", "plan.doc"], "--plot plan.doc has no suffix that says what to draw"),
        (["--json", "."], "--json . cannot be written"),
    ],
)
def test_what_cannot_be_planned_is_refused(folders, options, named):
    result = run(folders, *options)
    assert result.exit_code == 2 and named in result.output
    assert "Measuring" not in result.output


def test_a_folder_for_the_figures_is_made(tmp_path):
    file = console.output_file("--json", str(tmp_path / "new" / "plan.json"))
    assert file.parent.is_dir() and not file.exists()
