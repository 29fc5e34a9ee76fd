"""The sdist, wheels made of it, what they hold and ask for, and builds that have to do without something."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "kernels" / "cuda"))
import toolchain  # noqa: E402

INPUTS = (
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "LICENSE",
    "README.md",
    "CHANGELOG.md",
    "csrc",
    "kernels",
    "specdec_fast",
)
BUILT = ("*.so", "*.pyd", "_build_info.json", "__pycache__")
NVCC = toolchain.nvcc()
# Early patch releases of Python 3.10 and 3.11 know no filters; the archive is our own
SAFELY = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
needs_compiler = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler")


def copy_tree(folder):
    tree = folder / "tree"
    tree.mkdir()
    for name in INPUTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns(*BUILT))
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, tree)
    return tree


def wheel_of(tree, folder, **environment):
    """`pip wheel` of a folder; the finished process and the wheels."""
    folder.mkdir(exist_ok=True)
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


def build_wheel(folder, **environment):
    return wheel_of(copy_tree(folder), folder, **environment)


def members(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def build_record(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return json.loads(archive.read("specdec_fast/_build_info.json"))


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The sdist's content, unpacked, and nothing else of the tree."""
    folder = tmp_path_factory.mktemp("sdist")
    script = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    command = [sys.executable, "-c", script, str(folder)]
    done = subprocess.run(command, cwd=copy_tree(folder), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, **SAFELY)
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(unpacked):
    done, wheels = wheel_of(unpacked, unpacked.parent / "cpu")
    assert done.returncode == 0, done.stderr
    return wheels[0]


@pytest.fixture(scope="module")
def cuda_wheel(unpacked, wheel):
    """As `make wheel CUDA=...` builds it, for one architecture; the other parts are those of `wheel`."""
    if NVCC is None:
        pytest.skip("needs the CUDA toolkit: nvcc was not found")
    named = {"SPECDEC_FAST_CUDA": toolchain.release(NVCC), "TORCH_CUDA_ARCH_LIST": "9.0"}
    done, wheels = wheel_of(unpacked, unpacked.parent / "cuda", SPECDEC_FAST_STRICT_BUILD="1", **named)
    assert done.returncode == 0, done.stderr
    return wheels[0]


def test_the_sdist_holds_what_a_build_needs_and_no_more(unpacked):
    tops = {path.name for path in unpacked.iterdir()} - {"build"}
    generated = {"PKG-INFO", "setup.cfg", "specdec_fast.egg-info"}
    assert tops == {*INPUTS, *generated}
    held = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    assert {path for path in held if path.startswith("csrc/")} == {
        f"csrc/{p.name}" for p in (ROOT / "csrc").glob("*.*")
    }
    assert not [path for path in held if path.endswith((".so", ".o", "_build_info.json")) and "build/" not in path]


def contents(record):
    """What a wheel must hold beside its metadata, given the record of its build."""
    package, kernels = ROOT / "specdec_fast", ROOT / "kernels" / "triton"
    names = {f"specdec_fast/{p.relative_to(package).as_posix()}" for p in package.rglob("*.py")}
    names |= {f"specdec_fast/drafter/{p.name}" for p in (package / "drafter").iterdir() if p.is_file()}
    names |= {f"specdec_fast/triton_kernels/{p.name}" for p in kernels.glob("*.py")}
    names |= {"specdec_fast/py.typed", "specdec_fast/_build_info.json", "specdec_fast/_ops_cpu.so"}
    return names | ({"specdec_fast/_ops_cuda.so"} if record["cuda"] else set())


@needs_compiler
@pytest.mark.parametrize("which", ["wheel", "cuda_wheel"])
def test_a_wheel_holds_what_it_should_and_no_more(which, request):
    """`kernels` or `tests` at the top level would shadow packages of other people."""
    built = request.getfixturevalue(which)
    record = build_record(built)
    assert record["failed"] == {}
    held = {name for name in members(built) if ".dist-info/" not in name}
    (text,) = (name for name in held if name.startswith("specdec_fast/_text."))
    assert "cpython" in text, "the one part that is bound to a version of Python"
    assert held - {text} == contents(record)


@needs_compiler
def test_a_wheels_name_says_what_it_is_bound_to(wheel, cuda_wheel):
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert re.fullmatch(rf"specdec_fast-[\d.]+-{python}-{python}-\w+\.whl", wheel.name)
    local = "cu" + toolchain.release(NVCC).replace(".", "")
    assert re.fullmatch(rf"specdec_fast-[\d.]+\+{local}-{python}-{python}-\w+\.whl", cuda_wheel.name)
    assert build_record(cuda_wheel)["cuda"] == {"release": toolchain.release(NVCC), "architectures": ["9.0"]}
    assert build_record(wheel)["cuda"] is None


# What every system that the wheel is for has: libc, libm, libgcc, libstdc++ name a version with each symbol
SYSTEM = re.compile(r"@+(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+$")
SHIM = re.compile(r"(aoti_torch|torch)_\w+$")  # torch's stable interface is in C
MAY_BE_MISSING = {"__cxa_finalize", "__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}


def symbols(library, which):
    listed = subprocess.run(["nm", "-D", which, str(library)], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1] for line in listed.splitlines()}


@needs_compiler
@pytest.mark.parametrize("which, part", [("wheel", "_ops_cpu.so"), ("cuda_wheel", "_ops_cuda.so")])
def test_a_wheel_asks_torch_for_its_stable_interface_only(which, part, request, tmp_path):
    """One build serves every torch from 2.10 on: no C++ symbol of torch's is needed, and none comes along."""
    with zipfile.ZipFile(request.getfixturevalue(which)) as archive:
        library = archive.extract(f"specdec_fast/{part}", tmp_path)
    needed = symbols(library, "--undefined-only")
    foreign = {name for name in needed if not SYSTEM.search(name) and not SHIM.match(name)}
    assert foreign <= MAY_BE_MISSING
    assert any(SHIM.match(name) for name in needed)
    mangled = re.compile(r"_Z\w*?(2at|3c10|6caffe2|5torch)\w*")  # at::, c10::, caffe2::, torch::
    assert not [name for name in symbols(library, "--defined-only") if mangled.match(name)]


def test_a_leak_would_be_noticed():
    assert not SHIM.match("_ZN3c106detail14torchCheckFailEPKcS2_jRKSs")
    assert not SYSTEM.search("_ZN2at4_ops5empty4callEv")
    assert SYSTEM.search("memcpy@GLIBC_2.14")


@pytest.mark.skipif(NVCC is None, reason="needs the CUDA toolkit: nvcc was not found")
@pytest.mark.parametrize(
    "release, words",
    [("11.0", r"asks for CUDA 11.0, but .* is of \d+\.\d+.*set SPECDEC_FAST_CUDA_HOME"), ("x", "as 13.0")],
)
def test_a_toolkit_that_is_not_there_is_named(monkeypatch, release, words):
    monkeypatch.setenv(toolchain.RELEASE, release)
    with pytest.raises(RuntimeError, match=words):
        toolchain.nvcc()


def dependencies(requirements):
    """The distributions that installing something with these requirements brings along, as far as they are here."""
    found, waiting = {}, [Requirement(text) for text in requirements]
    while waiting:
        needed = waiting.pop()
        key = re.sub(r"[-_.]+", "-", needed.name).lower(), frozenset(needed.extras)
        if key in found or not (needed.marker is None or needed.marker.evaluate({"extra": ""})):
            continue
        try:
            found[key] = distribution(key[0])
        except PackageNotFoundError:
            continue
        for text in found[key].requires or ():
            below = Requirement(text)
            if below.marker is None or any(below.marker.evaluate({"extra": extra}) for extra in ("", *needed.extras)):
                below.marker = None
                waiting.append(below)
    return list(found.values())


def fresh_environment(folder, wheel, *extra):
    """A virtual environment with the wheel, links to what its metadata asks for, and `extra`; its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=60)
    (site,) = folder.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(name).decode()
    required = re.findall(r"^Requires-Dist: (.+)$", metadata, re.MULTILINE)
    for found in dependencies([*required, *extra]):
        for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(found.locate_file(top))
    python = folder / "bin" / "python"
    # Without --no-deps: pip refuses where what the metadata asks for is not there
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return python


CALL = """
import json
import torch
from specdec_fast import environment, fast_generate, ops
key = torch.arange(3)
logits = torch.randn(3, 2, 50, generator=torch.Generator().manual_seed(0))
tokens = logits[:, :1].argmax(-1)
for backend in ("cpu", "reference"):
    found = ops.verify(logits, tokens, key.clamp(max=1), rule="token", seed=key, start=key, backend=backend)
    print(found.accepted.tolist(), found.token.tolist())
print(json.dumps(environment.report()))
"""


def run_in(python, folder, script):
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SPECDEC", "TRITON"))}
    done = subprocess.run([python, "-c", script], cwd=folder, env=own, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_compiler
@pytest.mark.parametrize("which", ["wheel", "cuda_wheel"])
def test_a_wheel_runs_in_a_fresh_environment(which, request, tmp_path):
    """The CPU wheel beside Triton, if the tests have it, the CUDA wheel without it where torch does not ask for it."""
    built = request.getfixturevalue(which)
    python = fresh_environment(tmp_path / "fresh", built, *(["triton"] if which == "wheel" else []))
    kernels, reference, report = run_in(python, tmp_path, CALL).splitlines()
    assert kernels == reference
    report = json.loads(report)
    assert report["versions"]["specdec_fast"] == built.name.split("-")[1]
    assert Path(report["native"]["_ops_cpu"]["path"]).is_relative_to(tmp_path)
    assert report["native"]["_text"]["loaded"]
    assert {"sample", "verify"} <= set(report["backends"]["cpu"]["ops"])
    cuda = report["native"]["_ops_cuda"]
    if which == "wheel":
        assert "it was not built" in cuda["reason"]
    elif torch.version.cuda is None:
        assert "this torch is built without CUDA" in cuda["reason"]
        assert report["versions"]["triton"] is None
        assert "triton" in report["backends"]["triton"]["missing"]["sample"]
    else:
        assert cuda["loaded"], cuda["reason"]


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
