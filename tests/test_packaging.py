"""Wheels from a copy of the tree: their contents, and builds that have to do without something."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).parent.parent
INPUTS = (
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "LICENSE",
    "README.md",
    "csrc",
    "kernels",
    "specdec_fast",
)
BUILT = ("*.so", "*.pyd", "_build_info.json", "__pycache__")


def build_wheel(folder, **environment):
    """`pip wheel` in a fresh copy of the tree; the finished process and the wheels."""
    tree = folder / "tree"
    tree.mkdir()
    for name in INPUTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns(*BUILT))
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, tree)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        ".",
    ]
    environment = os.environ | {"MAX_JOBS": "1", "SPECDEC_FAST_STRICT_BUILD": "0"} | environment
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=300)
    return done, list(folder.glob("*.whl"))


def members(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def build_record(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return json.loads(archive.read("specdec_fast/_build_info.json"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    done, wheels = build_wheel(tmp_path_factory.mktemp("wheel"))
    assert done.returncode == 0, done.stderr
    return wheels[0]


def test_wheel_holds_every_module(wheel):
    sources = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "specdec_fast").rglob("*.py")
        if "drafter" not in path.parts
    }
    names = members(wheel)
    assert sources <= names
    assert {"specdec_fast/py.typed", "specdec_fast/triton_kernels/__init__.py"} <= names


def test_wheel_holds_nothing_else(wheel):
    """`kernels` or `tests` at the top level would shadow packages of other people."""
    tops = {name.partition("/")[0] for name in members(wheel)}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"specdec_fast"}


def test_wheel_holds_the_drafter(wheel):
    drafter = ROOT / "specdec_fast" / "drafter"
    shipped = {f"specdec_fast/drafter/{file.name}" for file in drafter.iterdir() if file.is_file()}
    assert shipped <= members(wheel)


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler")
def test_wheel_holds_the_binaries(wheel):
    assert build_record(wheel)["failed"] == {}
    binaries = {Path(name).name for name in members(wheel) if name.endswith(".so")}
    assert "_ops_cpu.so" in binaries, "the ops are free of the Python ABI, and so is their name"
    assert any(name.startswith("_text.") for name in binaries)


def test_metadata(wheel):
    (name,) = (name for name in members(wheel) if name.endswith(".dist-info/METADATA"))
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(name).decode()
        entry_points = archive.read(name.replace("METADATA", "entry_points.txt")).decode()
    assert "Requires-Dist: torch>=2.10" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    assert "specdec-fast = specdec_fast.cli:main" in entry_points


def test_without_a_compiler_the_package_builds_and_says_why(tmp_path):
    done, wheels = build_wheel(tmp_path, CXX="/bin/false", CC="/bin/false")
    assert done.returncode == 0, done.stderr
    assert not [name for name in members(wheels[0]) if name.endswith(".so")]
    failed = build_record(wheels[0])["failed"]
    assert set(failed) == {"_ops_cpu", "_text"}
    assert all(failed.values())


def test_a_strict_build_without_a_compiler_fails(tmp_path):
    done, wheels = build_wheel(tmp_path, CXX="/bin/false", CC="/bin/false", SPECDEC_FAST_STRICT_BUILD="1")
    assert done.returncode != 0
    assert not wheels


def test_without_torch_the_rest_is_built(tmp_path):
    """As in an isolated build, where torch is not installed."""
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    done, wheels = build_wheel(tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    failed = build_record(wheels[0])["failed"]
    assert "no torch here" in failed.pop("_ops_cpu")
    assert "torch" not in str(failed)


def test_installed_versions_satisfy_the_floors():
    assert Version(version("torch")) >= Version("2.10")
    assert Version(version("transformers")) >= Version("5.16")


def test_kernels_folder_is_no_package():
    """Transformers probes for a package of that name; with one here no model would load."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
