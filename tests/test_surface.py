"""The hot path asks :mod:`specdec_fast.ops`: what else of the kind there is, is listed here with its reason."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "specdec_fast"
OF_A_ROW = {"softmax", "log_softmax", "logsumexp", "multinomial", "argmax", "cumsum", "sort", "topk"}
# Not of a call's hot path: the ops and their definition, the audit, the demo, benchmarks
ELSEWHERE = {"ops", "attention_ops", "reference", "reference_ops", "demo"}
FOLDERS = {"audit", "microbench"}

PLAIN = "the rule in plain code: for other sources of numbers than Philox, for other laws, and as the truth"
ONE_BY_ONE = "a law that is asked token by token"
RANGES = "projection: a law over ranges of drafter tokens"
ARGMAX = "at T=0 one operation of torch's, and no law"
ONCE = "once a call or once a pair"
ALLOWED = {
    "block": PLAIN,
    "verification": PLAIN,
    "proposal": PLAIN,
    "fused": PLAIN,
    "thinning": ONE_BY_ONE,
    "walk": ONE_BY_ONE,
    "drafters.slrs": ONE_BY_ONE,
    "drafters.literal": ONE_BY_ONE,
    "drafters.projection": RANGES,
    "token_map": RANGES,
    "intersection_mass": ONCE,
    "device_round": ARGMAX,
    "attention": "a softmax over columns of a cache",
    "masks": "positions of a mask",
    "memory": "what the native operations are held to",
}


def row_work(source):
    """Calls that go over the vocabulary: torch's, and those of the reference."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            named = owner.id if isinstance(owner, ast.Name) else None
            of_the_reference = named == "reference"
            if of_the_reference or (node.func.attr in OF_A_ROW and named != "ops"):
                yield f"reference.{node.func.attr}" if of_the_reference else node.func.attr


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] not in FOLDERS and ".".join(parts) not in ELSEWHERE:
            yield ".".join(parts), set(row_work(path.read_text()))


def test_the_hot_path_goes_through_the_ops():
    found = {module for module, calls in modules() if calls}
    assert found <= set(ALLOWED), "route it through specdec_fast.ops, or say here why not"
    assert set(ALLOWED) <= found, "nothing of the kind is left there: take it off the list"


def test_drafting_at_a_temperature_is_one_operation():
    assert not dict(modules())["drafters.model"]
    assert dict(modules())["masks"] == {"cumsum"}
    assert "engine" not in ALLOWED and "sampling" not in ALLOWED


def test_a_softmax_on_the_hot_path_is_noticed():
    assert set(row_work("p = scores.double().softmax(-1)\nreference.draw(p, u)")) == {"softmax", "reference.draw"}
