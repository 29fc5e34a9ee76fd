"""Which backend an op runs on, what is said where one is missing, and what torch's compiler sees."""

import contextlib
import copy
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from op_cases import FAST, proposal
from tiny import model
from typer.testing import CliRunner

from specdec_fast import attention_ops, cli, dispatch, fast_generate, native, ops
from specdec_fast.reference_ops import compressed_rows

ROOT = Path(__file__).parent.parent
CPU = FAST[0]


def arguments(op, name="default"):
    """Positional arguments of an op's schema; Triton's on a GPU where there is one."""
    device = "cuda" if name == "triton" and torch.cuda.is_available() else "cpu"
    return tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in _arguments(op, name))


def _arguments(op, name):
    """Without filters for Triton, whose interpreter takes seconds for them."""
    generator = torch.Generator().manual_seed(0)
    key = torch.arange(4)
    law = [torch.full((4,), 0.8), torch.full((4,), 9, dtype=torch.int32), torch.full((4,), 0.9), torch.full((4,), 0.01)]
    if name == "triton":
        law[1:] = [None] * 3
    q = torch.randn(4, 20, generator=generator).double().softmax(-1)
    if op == "sample":
        return (torch.randn(4, 20, generator=generator), *law, key, key, None, 3)
    if op == "softmax":
        return (torch.randn(4, 20, generator=generator), *law)
    if op == "project":
        return (q, *compressed_rows(torch.arange(20) % 7, 8))
    if op == "decode_attention":
        keys = torch.randn(2, 4, 2, 20, 8, generator=generator)
        return (torch.randn(4, 6, 3, 8, generator=generator), *keys, key, key // 2, key, 0.3, 0.0)
    if op == "range_sums":
        return (q, torch.arange(20, dtype=torch.int32), key.view(4, 1), key.view(4, 1) + 5)
    case = proposal("compact", 4, 2, 20, torch.float32, generator)
    draft = [case["draft_logits"], *law, case["index"], case["drawn"], None, None, None]
    kind = torch.ones(4, 2, dtype=torch.int32)
    return (case["logits"], *law, case["tokens"], case["count"], kind, *draft, case["seed"], key, 0, 2, True)


def _overloads():
    """Every op by every implementation that can run here: its name and that of the overload."""
    for op in dispatch.OPS:
        for name in ("default", "reference", "triton"):
            missing = dispatch.why_not(op, name) if name == "triton" else None
            yield pytest.param(op, name, marks=pytest.mark.skipif(missing is not None, reason=f"{name}: {missing}"))


@pytest.mark.parametrize("op, name", list(_overloads()))
def test_opcheck(op, name):
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(getattr(getattr(torch.ops.specdec_fast, op), name), arguments(op, name), test_utils=tests)


@pytest.mark.parametrize("op, name", list(_overloads()))
def test_every_op_compiles_into_one_graph(op, name):
    """With what comes before and behind it, and once more for another number of rows."""
    run, given = getattr(getattr(torch.ops.specdec_fast, op), name), arguments(op, name)

    def around(first, *rest):
        found = run(first * 1, *rest)
        return [part + 0 for part in (found if isinstance(found, tuple) else (found,))]

    compiled = torch.compile(around, fullgraph=True, backend="aot_eager")
    expected = around(*given)
    assert all(torch.equal(*pair) for pair in zip(compiled(*given), expected, strict=True))
    torch.compiler.reset()


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_round_compiles_to_one_graph(backend):
    case = proposal("dense", 4, 2, 20, torch.float32, torch.Generator().manual_seed(1))
    logits = case.pop("logits")

    def one_round(logits):
        first = ops.sample(logits[:, 0], seed=case["seed"], position=case["start"], temperature=0.7, backend=backend)
        return first.token + 1, ops.verify(logits, rule="token", log_probs=True, backend=backend, **case)

    token, verdict = torch.compile(one_round, fullgraph=True, backend="aot_eager")(logits)
    expected_token, expected = one_round(logits)
    assert torch.equal(token, expected_token)
    assert all(torch.equal(*pair) for pair in zip(verdict, expected, strict=True))


def test_auto_says_what_is_missing_only_where_the_reference_is_left(monkeypatch, recwarn):
    there = {"triton", "reference"}
    monkeypatch.setattr(dispatch, "why_not", lambda op, backend: None if backend in there else f"no {backend}")
    monkeypatch.setattr(dispatch, "_told", set())
    monkeypatch.setattr(dispatch.native, "disabled", lambda: False)
    assert [dispatch._best("sample", "cuda") for _ in range(2)] == ["triton", "triton"]
    assert not recwarn
    there.remove("triton")
    assert [dispatch._best("sample", "cuda") for _ in range(2)] == ["reference", "reference"]
    (told,) = (str(warning.message) for warning in recwarn)
    assert told == "sample runs without its cuda and triton kernels, which only costs speed: no cuda; no triton"


@CPU.marks[0]
@pytest.mark.parametrize("op", [op for op in dispatch.OPS if op != "decode_attention"])
def test_auto_takes_the_kernels_that_are_there(op):
    assert dispatch._best(op, "cpu") == "cpu"
    assert dispatch.why_not(op, "cpu") is None


@pytest.mark.parametrize(
    "change, message",
    [
        ({"backend": "gpu"}, "backend must be auto, reference, cpu"),
        ({"backend": "cuda"}, "backend 'cuda'"),
        ({"rule": "typical"}, "rule must be one of match, token, block"),
        ({"logits": torch.zeros(2, 3, 9, dtype=torch.float64)}, "logits must be float32, bfloat16 or float16"),
        ({"logits": torch.zeros(2, 9)}, r"logits must be \[B, P, V\]"),
        ({"logits": torch.zeros(2, 0, 9)}, "at least one position"),
        ({"tokens": torch.zeros(2, 2, dtype=torch.int32)}, r"tokens must be \[2, 2\] torch.int64"),
        ({"count": torch.zeros(3, dtype=torch.int64)}, r"count must be \[2\]"),
        ({"temperature": torch.ones(2, dtype=torch.float64)}, r"temperature must be \[2\] torch.float32"),
        ({"draft_top_k": torch.ones(2)}, r"draft_top_k must be \[2\] torch.int32"),
        ({"draft_logits": torch.zeros(2, 3, 9)}, r"draft_logits must be \[2, 2, 9\]"),
        ({"index": torch.zeros(9, dtype=torch.int32)}, "describe draft_logits"),
        ({"sparse_ids": torch.zeros(2, 2, 1, dtype=torch.int64)}, "come together"),
    ],
)
def test_bad_arguments_are_named(change, message):
    key = torch.zeros(2, dtype=torch.int64)
    call = {"logits": torch.zeros(2, 3, 9), "tokens": torch.zeros(2, 2, dtype=torch.int64), "count": key}
    with pytest.raises(ValueError, match=message):
        ops.verify(**call | {"rule": "token", "seed": key, "start": key} | change)


def python(script, folder=ROOT, **environment):
    environment = {"PYTHONPATH": str(folder), "PYTHONWARNINGS": "default", **environment}
    # The finder of an editable install would supply a missing binary from its own tree
    own = f"import sys; sys.path.insert(0, {str(folder)!r})\n"
    own += "sys.meta_path = [finder for finder in sys.meta_path if 'ditable' not in repr(finder)]\n"
    command = [sys.executable, "-c", own + script]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


CALL = """
import torch
from specdec_fast import ops
torch.set_num_threads(1)
logits = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0)) * 3
key = torch.arange(3)
tokens, count = logits[:, :2].argmax(-1).view(3, 1), torch.ones_like(key)
for _ in range(2):
    sampled = ops.sample(logits, seed=key, position=key, temperature=0.7, top_p=0.9)
    verified = ops.verify(logits.view(3, 1, -1), tokens, count, rule="token", seed=key, start=key)
print([part.tolist() for part in sampled])
"""


def test_a_missing_binary_warns_once_and_changes_no_token(tmp_path):
    package = tmp_path / "specdec_fast"
    package.mkdir()
    (package / "__init__.py").touch()
    for name in ("native", "randomness", "reference", "reference_ops", "dispatch", "ops"):
        shutil.copy(ROOT / "specdec_fast" / f"{name}.py", package)
    (package / "_ops_cpu.so").write_text("not a shared object")
    done = python(CALL, tmp_path, SPECDEC_FAST_DISABLE_NATIVE="0")
    warnings = [line for line in done.stderr.splitlines() if "UserWarning" in line]
    assert len(warnings) == 1, done.stderr
    assert "sample runs without its cpu kernels, which only costs speed" in warnings[0]
    chosen = python(CALL, SPECDEC_FAST_DISABLE_NATIVE="1")
    assert chosen.stderr == "", "who switches kernels off needs no warning"
    assert chosen.stdout == done.stdout


@pytest.mark.parametrize(
    "variables, words",
    [
        (
            {"SPECDEC_FAST_BACKEND": "abacus"},
            "SPECDEC_FAST_BACKEND must be auto, reference, cpu, triton, cuda, not 'abacus'",
        ),
        (
            {"SPECDEC_FAST_CPU_CAPABILITY": "sse"},
            "SPECDEC_FAST_CPU_CAPABILITY must be one of plain, avx2, avx512, not 'sse'",
        ),
        (
            {"SPECDEC_FAST_BACKEND": "cpu", "SPECDEC_FAST_DISABLE_NATIVE": "1"},
            "SPECDEC_FAST_BACKEND=cpu is not there: disabled by SPECDEC_FAST_DISABLE_NATIVE",
        ),
    ],
)
def test_a_wrong_environment_is_refused_before_anything_runs(monkeypatch, variables, words):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(native, "_modules", {})
    monkeypatch.setattr(native, "_reasons", {})
    try:
        importlib.reload(dispatch)
        with pytest.raises(ValueError, match=re.escape(words)):
            dispatch.check_default("cpu")
        target = copy.deepcopy(model())
        monkeypatch.setattr(target, "forward", lambda *_, **__: pytest.fail("the model ran"))
        with pytest.raises(ValueError, match=re.escape(words)):
            fast_generate(target, torch.tensor([[1, 2, 3]]), max_new_tokens=3)
        result = CliRunner().invoke(cli.app, ["env"])
        assert result.exit_code == 0 and words in result.stdout
    finally:
        monkeypatch.undo()
        importlib.reload(dispatch)


def test_the_environment_names_the_backend(monkeypatch):
    logits, key = torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64)
    monkeypatch.setenv(dispatch.VARIABLE, "abacus")
    try:
        importlib.reload(dispatch)
        with pytest.raises(ValueError, match=r"'abacus' \(argument or SPECDEC_FAST_BACKEND"):
            ops.sample(logits, seed=key, position=key)
        ops.sample(logits, seed=key, position=key, backend="reference")
    finally:
        monkeypatch.undo()
        importlib.reload(dispatch)


@CPU.marks[0]
def test_a_library_of_older_sources_says_so_op_by_op(tmp_path):
    """A library that loads and has none of the kernels: a stand-in for one that was built before an op was written."""
    package = tmp_path / "specdec_fast"
    shutil.copytree(ROOT / "specdec_fast", package, ignore=shutil.ignore_patterns("*.so", "drafter", "__pycache__"))
    source = tmp_path / "old.c"
    source.write_text("int old(void) { return 1; }")
    subprocess.run(["gcc", "-shared", "-o", str(package / "_ops_cpu.so"), str(source)], check=True, timeout=60)
    script = CALL + "from specdec_fast import dispatch, environment, lean; import json; print(lean._native())\n"
    done = python(script + "print(json.dumps(environment.report()['backends']['cpu']))", tmp_path)
    tokens, native_pass, report = done.stdout.splitlines()
    assert tokens == python(CALL, SPECDEC_FAST_DISABLE_NATIVE="1").stdout.strip()
    assert native_pass == "False"
    missing = json.loads(report)["missing"]
    assert json.loads(report)["ops"] == []
    assert "has no kernel for sample: it was built from older sources" in missing["sample"]
    assert len([line for line in done.stderr.splitlines() if "UserWarning" in line]) == 1


@CPU.marks[0]
def test_every_instruction_set_gives_the_same_bits():
    """With fused multiply-add; without it the last bit of a logsumexp may differ, not a token."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(CALL, {})
    outputs = {dispatch.CAPABILITIES[torch.ops.specdec_fast.cpu_capability()]: out.getvalue().strip()}
    for name in set(dispatch.CAPABILITIES[: torch.ops.specdec_fast.cpu_capability()]):
        ask = CALL + "print(torch.ops.specdec_fast.cpu_capability())"
        outputs[name], used = python(ask, SPECDEC_FAST_CPU_CAPABILITY=name).stdout.splitlines()
        assert dispatch.CAPABILITIES[int(used)] == name
    assert len({values for name, values in outputs.items() if name != "plain"}) == 1
    assert len({values.partition("]")[0] for values in outputs.values()}) == 1


def test_an_op_that_a_backend_was_not_written_for_warns_of_nothing(recwarn):
    assert dispatch._best("decode_attention", "cpu") == "reference"
    assert not recwarn
    assert "sample, verify" in (dispatch.why_not("decode_attention", "cpu") or "")
    assert attention_ops.decode_attention(*arguments("decode_attention")[:4]).shape == (4, 3, 6, 8)


def test_env_says_what_is_there_and_why_not():
    result = CliRunner().invoke(cli.app, ["env"])
    assert result.exit_code == 0
    for backend, part in dispatch.status().items():
        (line,) = (line for line in result.stdout.splitlines() if line.startswith(f"backend {backend} "))
        assert all(op in line for op in part["ops"])
        assert set(part["ops"]) | set(part["missing"]) == set(dispatch.OPS)
        for op, reason in part["missing"].items():
            assert reason in line
            assert op in line or not part["ops"]
    assert "built" in result.stdout


def test_triton_without_a_gpu_says_what_would_run_it(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET=1" in (dispatch.why_not("sample", "triton") or "")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.why_not("sample", "triton") is None


def test_what_triton_raises_is_an_error_that_callers_know(monkeypatch):
    """Its own errors are no RuntimeError; what is wrong with an argument stays what it is."""
    raised = type("OutOfResources", (Exception,), {"__module__": "triton.runtime.errors"})

    def kernel(*_):
        raise raised("shared memory")

    monkeypatch.setattr(dispatch, "triton_kernel", lambda op: kernel)
    query, start = torch.zeros(1, 2, 1, 16), torch.zeros(1, dtype=torch.long)
    with pytest.raises(RuntimeError, match="decode_attention does not run on cpu: shared memory"):
        torch.ops.specdec_fast.decode_attention.triton(query, query, query, start, None, None, 1.0, 0.0)
    raised = ValueError
    with pytest.raises(ValueError, match="shared memory"):
        torch.ops.specdec_fast.decode_attention.triton(query, query, query, start, None, None, 1.0, 0.0)


def test_rule_block_of_few_rows_is_shared_out_on_a_gpu(monkeypatch):
    """By Triton where there is CUDA and Triton, nobody asked for another, and rows are too few to hide one's end."""
    monkeypatch.setattr(dispatch, "_chosen", {("verify", "cuda", "auto"): "default"})
    monkeypatch.setattr(dispatch, "_has_triton", lambda: True)
    monkeypatch.setattr(dispatch, "DEFAULT", "auto")
    monkeypatch.delenv(dispatch.TEAM_VARIABLE, raising=False)
    few = dispatch.FEW_POSITIONS
    assert dispatch.block_backend(few, "cuda") == "triton"
    assert dispatch.block_backend(few + 1, "cuda") is None
    assert dispatch.block_backend(few, "cpu") is None
    monkeypatch.setenv(dispatch.TEAM_VARIABLE, "4")
    assert dispatch.block_backend(few, "cuda") is None
    monkeypatch.delenv(dispatch.TEAM_VARIABLE)
    monkeypatch.setattr(dispatch, "_has_triton", lambda: False)
    assert dispatch.block_backend(few, "cuda") is None
    monkeypatch.setattr(dispatch, "_has_triton", lambda: True)
    monkeypatch.setattr(dispatch, "DEFAULT", "cuda")
    assert dispatch.block_backend(few, "cuda") is None


def test_rule_block_asks_who_does_it(monkeypatch):
    asked = []
    monkeypatch.setattr(ops, "block_backend", lambda *given: asked.append(given) or "reference")
    case = proposal("compact", 4, 2, 20, torch.float32, torch.Generator().manual_seed(0))
    given = {name: case[name] for name in ("logits", "tokens", "count", "seed", "draft_logits", "index", "drawn")}
    found = [
        ops.verify(**given, rule=rule, start=case["seed"], backend=backend)
        for rule, backend in (("token", None), ("block", "reference"), ("block", None))
    ]
    assert asked == [(4 * case["logits"].shape[1], "cpu")]
    for got, right in zip(found[2], found[1], strict=True):
        assert torch.equal(got, right)
