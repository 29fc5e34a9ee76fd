"""The parts of ``benchmarks/gpu.sh`` that are Python: what is there, the build, checks under tools, the summary.

python benchmarks/gpu.py environment | build | check | first | summary OUT
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORK = Path(os.environ.get("SPECDEC_FAST_WORK") or ROOT / "build" / "gpu")
LIB = WORK / "lib"
DEVICE = os.environ.get("SPECDEC_FAST_DEVICE", "cuda")
NEEDED = ("torch", "transformers", "safetensors", "numpy", "typer", "rich", "tokenizers")
WANTED = {
    "triton": "the Triton backend",
    "setuptools": "the CPU kernels and the text module",
    "ninja": "a build in parallel",
    "pybind11": "the text module",
    "pytest": "the test suite",
    "hypothesis": "some tests of text",
    "matplotlib": "plots",
}
sys.path.insert(0, str(ROOT / "kernels" / "cuda"))


def present(name: str) -> str | None:
    """The version of an installed package."""
    from importlib import metadata

    if importlib.util.find_spec(name) is None:
        return None
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "present"


def environment(out: Path) -> None:
    """Writes what is there and what is missing; fails where nothing can be done."""
    import toolchain

    versions = {name: present(name) for name in (*NEEDED, *WANTED)}
    report: dict[str, Any] = {"python": platform.python_version(), "versions": versions}
    missing = [name for name in NEEDED if versions[name] is None]
    if missing:
        sys.exit(f"{', '.join(missing)} must be installed in {sys.executable}")
    report["nvcc"] = toolchain.nvcc()
    report["compute_sanitizer"] = sanitizer()
    report["skipped"] = [f"{what}: {name} is not installed" for name, what in WANTED.items() if versions[name] is None]
    if DEVICE == "cuda":
        import torch

        report["torch_cuda"] = torch.version.cuda
        if not torch.cuda.is_available():
            sys.exit("torch sees no CUDA device here")
        if report["nvcc"] is None:
            report["skipped"].append("the CUDA backend and the first measurements: there is no nvcc")
        facts = torch.cuda.get_device_properties(0)
        report["device"] = facts.name
        report["compute_capability"] = f"{facts.major}.{facts.minor}"
        report["memory_bytes"] = facts.total_memory
        report["driver"] = driver()
    else:
        report["device"] = "cpu"
    write(out / "environment.json", report)
    for line in report["skipped"]:
        print(f"without {line}")


def driver() -> str | None:
    """The driver's version, from nvidia-smi."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def sanitizer() -> str | None:
    """Where compute-sanitizer is: on PATH, or beside nvcc."""
    import toolchain

    compiler = toolchain.nvcc()
    beside = None
    if compiler:
        beside = shutil.which("compute-sanitizer", path=str(Path(compiler).resolve().parent))
    return beside or shutil.which("compute-sanitizer")


def build(out: Path) -> None:
    """The package with its native parts in a folder of its own, for the present architecture; nothing is installed."""
    lines = []
    environment_ = dict(os.environ)
    if DEVICE == "cuda":
        import torch

        major, minor = torch.cuda.get_device_capability()
        environment_["TORCH_CUDA_ARCH_LIST"] = f"{major}.{minor}"
    WORK.mkdir(parents=True, exist_ok=True)
    if DEVICE == "cuda" and importlib.util.find_spec("setuptools"):
        command = [sys.executable, "setup.py", "-q", "build", "--build-lib", str(LIB), "--build-temp"]
        done = subprocess.run(
            [*command, str(WORK / "temp")], cwd=ROOT, env=environment_, capture_output=True, text=True
        )
        lines += [done.stdout, done.stderr, f"setup.py build ended with {done.returncode}"]
        if done.returncode:
            copy_package()
    else:
        copy_package()
        if DEVICE == "cuda":
            lines.append(cuda_alone())
    tests = LIB / "tests"
    if DEVICE == "cuda" and not tests.exists():  # `bench kernels` runs those it finds beside the package
        tests.symlink_to(ROOT / "tests")
    lines.append(loaded())
    (out / "build.txt").write_text("\n".join(line[-20000:] for line in lines))
    print(lines[-1])


def copy_package() -> None:
    """The Python files, and whatever native parts the checkout holds."""
    LIB.mkdir(parents=True, exist_ok=True)
    shutil.copytree(ROOT / "specdec_fast", LIB / "specdec_fast", dirs_exist_ok=True)
    shutil.copytree(ROOT / "kernels" / "triton", LIB / "specdec_fast" / "triton_kernels", dirs_exist_ok=True)


def cuda_alone() -> str:
    """The CUDA backend without setuptools."""
    import toolchain
    import torch
    from torch.utils import cpp_extension

    compiler = toolchain.nvcc()
    if compiler is None:
        return "there is no nvcc"
    major, minor = torch.cuda.get_device_capability()
    folder = WORK / "temp"
    folder.mkdir(parents=True, exist_ok=True)
    target = LIB / "specdec_fast" / "_ops_cuda.so"
    options = toolchain.generate([f"{major}.{minor}"])
    return toolchain.build(
        compiler, cpp_extension.include_paths(), cpp_extension.library_paths(), target, folder, options
    )


def loaded() -> str:
    """What of the built package loads, asked in a process of its own."""
    script = (
        "from specdec_fast import ops\n"
        "for name, part in ops.status().items():\n"
        "    missing = '; '.join(dict.fromkeys(part['missing'].values()))\n"
        "    print(name, ', '.join(part['ops']) or 'none', f'(not the rest: {missing})' if missing else '')"
    )
    settings = os.environ | {"PYTHONPATH": str(LIB), "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=settings, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout.strip()


def check() -> None:
    """Every backend against the reference on small shapes, in graphs as well: what the tools run, without pytest."""
    import torch

    from specdec_fast.microbench import LAWS, OPS, RULES
    from specdec_fast.microbench.cases import Case, build
    from specdec_fast.microbench.clock import clock_for
    from specdec_fast.microbench.variants import check, variants

    device = torch.device(DEVICE)
    timer = clock_for(device)
    checked = 0
    for vocab in (111, 4097, 9001) if DEVICE == "cuda" else (111,):
        shape = {"dtype": "bfloat16", "batch": 3, "gamma": 3, "vocab": vocab}
        cases = [
            Case("verify", rule=rule, law=law, acceptance=0.7, filters=filters, **shape)
            for rule in RULES
            for law in LAWS
            for filters in (False, True)
        ]
        for op in OPS[1:]:
            dtype = "float32" if op in ("project", "range_sums") else "bfloat16"
            cases.append(Case(op, **(shape | {"dtype": dtype})))
        for case in cases:
            inputs = build(case, device)
            found = variants(case, [inputs], peers=(), compiled=False)
            check(case, found, inputs)
            timer.run(found[1:], 1)
            check(case, found, inputs)
            checked += len(found) - 1
    print(f"{checked} variants return what the reference does")


def first(out: Path) -> None:
    """Compiles and runs ``benchmarks/cuda/first.cu``."""
    target = out / "first.json"
    if DEVICE != "cuda":
        write(target, {"skipped": "no CUDA device"})
        return
    import toolchain
    import torch

    compiler = toolchain.nvcc()
    if compiler is None:
        write(target, {"skipped": "there is no nvcc"})
        return
    major, minor = torch.cuda.get_device_capability()
    program = WORK / "first"
    source = ROOT / "benchmarks" / "cuda" / "first.cu"
    command = [compiler, "-std=c++17", "-O3", *toolchain.generate([f"{major}.{minor}"]), str(source), "-o"]
    for step in ([*command, str(program)], [str(program)]):
        done = subprocess.run(step, capture_output=True, text=True)
        if done.returncode:
            write(target, {"failed": (done.stderr or done.stdout).strip()[-2000:]})
            sys.exit(f"first measurements: {(done.stderr or done.stdout).strip()[-500:]}")
    write(target, json.loads(done.stdout))


def summary(out: Path) -> None:
    """A few lines of what the files say."""
    lines = []

    def read(name: str) -> Any:
        file = out / name
        return json.loads(file.read_text()) if file.exists() else None

    if (about := read("environment.json")) is not None:
        versions = about["versions"]
        lines.append(f"{about['device']}, Python {about['python']}, torch {versions['torch']}, nvcc {about['nvcc']}")
        lines += [f"without {line}" for line in about["skipped"]]
    for name in ("build.txt", "tests.txt"):
        if (out / name).exists():
            text = (out / name).read_text().strip().splitlines()
            lines += [f"{name}: {line}" for line in text[-4:]]
    if (found := read("first.json")) is not None:
        lines.append("first: " + ", ".join(f"{k} {v}" for k, v in found.items() if isinstance(v, int | float | str)))
        lines += [f"  cluster of {c['size']}, B={c['batch']}: {c['us']} us" for c in found.get("clusters", ())]
    for row in read("kernels.json") or ():
        if row["state"] == "cold" and row["op"] == "verify" and (row["gamma"], row["vocab"]) == (4, 151936):
            usual = (row["dtype"], row["rule"], row["law"], row["filters"], row["acceptance"])
            if usual == ("bfloat16", "token", "dense", False, 0.8):
                share = f"{row['share_of_copy']:.0%} of copy, {row['ratio_to_reference']:.1f}x reference"
                lines.append(f"verify B={row['batch']} {row['backend']}: {row['microseconds']:.1f} us, {share}")
    for row in read("e2e.json") or ():
        words = (
            f"{row['target']} {row['pair']} T={row['temperature']:g} B={row['batch']} {row['system']} {row['method']}"
        )
        share = f", {row['share_of_limit']:.0%} of the bandwidth limit" if row["share_of_limit"] else ""
        lines.append(f"{words}: {row['tokens_per_second']:.1f} tokens/s, {row['ratio_to_plain']:.2f}x plain{share}")
    for kind in ("whisper", "t5"):
        for rows in (1, 4):
            calls = (read(f"sources_{kind}.json") or {}).get(f"calls_ms_{rows}_rows", {})
            took = ", ".join(f"{name} {ms:.0f} ms" for name, ms in calls.items() if "T=0" in name)
            lines += [f"{kind} B={rows}: {took}"] if took else []
    text = "\n".join(lines)
    (out / "summary.txt").write_text(text + "\n")
    print(text)


def write(file: Path, content: Any) -> None:
    """JSON that people can read."""
    file.write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    what = sys.argv[1] if len(sys.argv) > 1 else ""
    if what == "check":
        check()
        return
    steps = {"environment": environment, "build": build, "first": first, "summary": summary}
    if what not in steps or len(sys.argv) != 3:
        sys.exit((__doc__ or "").strip())
    out = Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    steps[what](out)


if __name__ == "__main__":
    main()
