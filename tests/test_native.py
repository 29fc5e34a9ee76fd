"""The compiled parts: loading, doing without them, the n-gram index, and device compilation."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec_fast import native, ngram

ROOT = Path(__file__).parent.parent
NVCC = shutil.which("nvcc")

IMPLEMENTATIONS = [
    ngram.NgramIndex,
    ngram.PythonNgramIndex,
    pytest.param(
        getattr(native.load_text(), "NgramIndex", None),
        marks=pytest.mark.skipif(native.load_text() is None, reason="_text is not built"),
    ),
]


def run_python(script, **environment):
    command = [sys.executable, "-c", script]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)


def scan(ids, max_ngram, count):
    """Prompt lookup by definition."""
    for n in range(min(max_ngram, len(ids) - 1), 0, -1):
        for start in reversed(range(len(ids) - n)):
            if ids[start : start + n] == ids[-n:]:
                return ids[start + n : start + n + count]
    return []


@pytest.mark.parametrize("index", IMPLEMENTATIONS)
@settings(max_examples=150, deadline=None)
@given(
    chunks=st.lists(st.lists(st.integers(0, 3), max_size=12), max_size=6),
    max_ngram=st.integers(1, 6),
    count=st.integers(0, 8),
)
def test_lookup_is_the_definition_after_every_chunk(index, chunks, max_ngram, count):
    ids, grown = [], index(max_ngram)
    for chunk in chunks:
        grown.extend(chunk)
        ids += chunk
        assert len(grown) == len(ids)
        assert list(grown.lookup(count)) == scan(ids, max_ngram, count)


@pytest.mark.parametrize("index", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "ids, expected",
    [
        ([], []),
        ([4], []),
        ([4, 5], []),
        ([4, 4], [4]),
        ([1, 2, 3, 9, 1, 2, 8, 1, 2], [8, 1, 2]),  # the most recent of two
        ([1, 2, 3, 9, 7, 2, 8, 1, 2], [3, 9, 7]),  # the longest before the most recent
        ([2**31 - 1, 0, 2**31 - 1], [0, 2**31 - 1]),
    ],
)
def test_lookup_pinned(index, ids, expected):
    grown = index(2)
    grown.extend(ids)
    assert list(grown.lookup(3)) == expected


@pytest.mark.parametrize("index", IMPLEMENTATIONS)
def test_refused_ids_leave_the_index_as_it_was(index):
    grown = index(2)
    grown.extend([1, 2, 1])
    for bad in ([5, -1], [5, 2**31]):
        with pytest.raises(ValueError, match="ids must be in"):
            grown.extend(bad)
    assert len(grown) == 3
    assert list(grown.lookup(5)) == [2, 1]


@pytest.mark.parametrize("index", IMPLEMENTATIONS)
def test_bad_arguments(index):
    with pytest.raises(ValueError, match="max_ngram"):
        index(0)
    with pytest.raises(ValueError, match="count"):
        index(1).lookup(-1)


def test_status_agrees_with_what_loads():
    status = native.status()
    assert status["_ops_cpu"]["loaded"] == native.load_ops()
    assert status["_text"]["loaded"] == (native.load_text() is not None)
    for name in ("_ops_cpu", "_ops_cuda", "_text"):
        part = status[name]
        assert (part["reason"] is None) == part["loaded"]
        assert Path(part["path"]).is_file() if part["loaded"] else part["path"] is None
    json.dumps(status)


def test_loading_happens_once(monkeypatch):
    monkeypatch.delenv("SPECDEC_FAST_DISABLE_NATIVE", raising=False)
    monkeypatch.setattr(native, "_modules", {})
    calls = []
    monkeypatch.setattr(native, "_register_ops", lambda: calls.append(1))
    threads = [threading.Thread(target=native.load_ops) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [1]


def test_disabled_by_the_environment():
    script = (
        "import json; from specdec_fast import native, ngram;"
        "index = ngram.NgramIndex(2); index.extend([1, 2, 3, 1]);"
        "print(json.dumps([native.status(), index.lookup(2)]))"
    )
    done = run_python(script, SPECDEC_FAST_DISABLE_NATIVE="1")
    assert done.returncode == 0, done.stderr
    status, found = json.loads(done.stdout)
    assert found == [2, 3]
    for name in ("_ops_cpu", "_ops_cuda", "_text"):
        assert not status[name]["loaded"]
        assert "SPECDEC_FAST_DISABLE_NATIVE" in status[name]["reason"]


def test_a_missing_or_broken_binary_is_silent_and_explained(tmp_path):
    package = tmp_path / "specdec_fast"
    package.mkdir()
    (package / "__init__.py").touch()
    for name in ("native.py", "ngram.py", "randomness.py"):
        shutil.copy(ROOT / "specdec_fast" / name, package)
    for name in ("_ops_cpu", "_ops_cuda"):
        (package / f"{name}.so").write_text("not a shared object")
    (package / "_build_info.json").write_text(json.dumps({"failed": {"_text": "no compiler"}}))
    script = (
        f"import sys, json; sys.path.insert(0, {str(tmp_path)!r});"
        # the finder of an editable install would supply the missing binary from its own tree
        "sys.meta_path = [finder for finder in sys.meta_path if 'ditable' not in repr(finder)];"
        "from specdec_fast import native, randomness; print(json.dumps(native.status()))"
    )
    done = run_python(script, SPECDEC_FAST_DISABLE_NATIVE="0")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    status = json.loads(done.stdout)
    assert status["_text"]["reason"] == "no compiler"
    assert "OSError" in status["_ops_cpu"]["reason"]
    without = "this torch is built without CUDA"
    assert ("OSError" if torch.version.cuda else without) in status["_ops_cuda"]["reason"]


def test_binaries_of_other_sources_are_not_loaded_and_said_to_be(tmp_path):
    package = tmp_path / "specdec_fast"
    package.mkdir()
    (package / "__init__.py").touch()
    (tmp_path / "csrc").mkdir()
    for name in ("csrc/building.py", "csrc/ops.cpp", "specdec_fast/native.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    (package / "_ops_cpu.so").write_text("not a shared object")
    sources = hashlib.sha256((ROOT / "csrc" / "ops.cpp").read_bytes()).hexdigest()
    script = (
        f"import sys, json; sys.path.insert(0, {str(tmp_path)!r});"
        "sys.meta_path = [finder for finder in sys.meta_path if 'ditable' not in repr(finder)];"
        "from specdec_fast import native; print(json.dumps(native.status()))"
    )
    for built_from, stale in ((sources, False), ("others", True)):
        (package / "_build_info.json").write_text(json.dumps({"failed": {}, "sources": built_from}))
        done = run_python(script, SPECDEC_FAST_DISABLE_NATIVE="0")
        assert done.returncode == 0, done.stderr
        assert ("RuntimeWarning" in done.stderr) is stale
        assert ("other sources" in json.loads(done.stdout)["_ops_cpu"]["reason"]) is stale


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
def test_philox_compiles_for_the_device(tmp_path):
    source = tmp_path / "draw.cu"
    source.write_text(
        '#include "philox.cuh"\n'
        "__global__ void draw(const int64_t* seed, double* out) {\n"
        "  out[threadIdx.x] = specdec::philox_uniform(seed[threadIdx.x], 1, 2, 3, 4);\n"
        "}\n"
    )
    command = [NVCC, "-c", "-arch=sm_90", "-I", str(ROOT / "kernels" / "cuda"), str(source), "-o"]
    done = subprocess.run([*command, str(tmp_path / "draw.o")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
