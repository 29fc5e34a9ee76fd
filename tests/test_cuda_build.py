"""The CUDA kernels compiled by nvcc: registers, shared memory and spills, and what the library needs.

The oldest architecture, the newest, and Hopper. `python tests/test_cuda_build.py` compiles for all and writes the
table anew after a change that is meant to change it.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "kernels" / "cuda" / "resources.json"
sys.path.insert(0, str(ROOT / "kernels" / "cuda"))
import toolchain  # noqa: E402

NVCC = toolchain.nvcc()
TRIED = ("8.0", "9.0", "12.0")


def resources(printed):
    """`({architecture: {kernel: {"registers": .., "stack": .., "shared": ..}}}, functions that spill)`."""
    table, spilling, kernel, function, architecture = {}, [], None, None, None
    for line in printed.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            kernel, architecture = re.search(r"\d([a-z_]+_kernel)E", found[1])[1], found[2]
        elif found := re.search(r"Function properties for (\w+)", line):
            function = found[1]
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            if int(found[2]) or int(found[3]):
                spilling.append(f"{function} for {architecture}: {line.strip()}")
        elif found := re.search(r"Used (\d+) registers", line):
            stack, shared = (re.search(rf"(\d+) bytes {what}", line) for what in ("cumulative stack", "smem"))
            table.setdefault(architecture, {})[kernel] = {
                "registers": int(found[1]),
                "stack": int(stack[1]) if stack else 0,
                "shared": int(shared[1]) if shared else 0,
            }
    return table, spilling


def compiled(folder, architectures=TRIED):
    options = [*toolchain.generate(list(architectures)), "-Xptxas", "-v"]
    target = folder / "_ops_cuda.so"
    return toolchain.build(NVCC, include_paths(), library_paths(), target, folder, options)


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    if NVCC is None:
        pytest.skip("needs the CUDA toolkit: nvcc was not found")
    folder = tmp_path_factory.mktemp("cuda")
    return compiled(folder), folder / "_ops_cuda.so"


def test_no_kernel_spills_or_takes_more_than_the_table_says(build):
    committed = json.loads(TABLE.read_text())
    measured, spilling = resources(build[0])
    assert not spilling
    assert committed["kernels"].keys() == {f"sm_{name.replace('.', '')}" for name in toolchain.ARCHITECTURES}
    assert measured.keys() == {f"sm_{name.replace('.', '')}" for name in TRIED}
    same = toolchain.release(NVCC) == committed["nvcc"]  # another release hands out registers in another way
    for architecture, kernels in measured.items() if same else ():
        assert kernels.keys() == committed["kernels"][architecture].keys()
        for kernel, limits in committed["kernels"][architecture].items():
            for what, limit in limits.items():
                assert kernels[kernel][what] <= limit, (architecture, kernel, what)


def test_a_spill_is_noticed():
    text = (
        "ptxas info    : Compiling entry function '_ZN7specdec13verify_kernelENS0_10VerifyCallE' for 'sm_90'\n"
        "ptxas info    : Function properties for _ZN7specdec13verify_kernelENS0_10VerifyCallE\n"
        "    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads\n"
        "ptxas info    : Used 80 registers, used 1 barriers, 8 bytes cumulative stack size, 37320 bytes smem\n"
    )
    table, spilling = resources(text)
    assert table == {"sm_90": {"verify_kernel": {"registers": 80, "stack": 8, "shared": 37320}}}
    assert len(spilling) == 1


def test_the_library_asks_torch_for_its_stable_interface_only(build):
    """One build serves every torch from 2.10 on: no C++ symbol of torch's, and none that only a newer one has."""
    listed = subprocess.run(["nm", "-D", "-u", "-C", str(build[1])], capture_output=True, text=True, check=True).stdout
    needed = {line.split()[-1] for line in listed.splitlines()}
    assert not [line for line in listed.splitlines() if "at::" in line or "c10::" in line]
    assert {name for name in needed if name.startswith(("aoti_torch", "torch_"))}
    assert not {name for name in needed if name.startswith("cuda")}, "the CUDA runtime is linked in"
    dynamic = subprocess.run(["readelf", "-d", str(build[1])], capture_output=True, text=True, check=True).stdout
    named = set(re.findall(r"NEEDED.*\[(.*)\]", dynamic))
    assert {"libtorch.so", "libtorch_cpu.so"} <= named, "symbols of torch are found through the libraries named here"


WAITS = """
#include "block.cuh"
using namespace specdec::blocks;
extern "C" __global__ void waits(const uint32_t* flag, int* out) {
  while (READ(flag) == 0) {
  }
  publish();
  *out = 1;
}
"""


@pytest.mark.parametrize("read, kept", [("read_awaited", True), ("read_shared", False)])
def test_a_wait_for_another_block_is_in_the_machine_code(build, tmp_path, read, kept):
    """ptxas left out the loop of rule block's teams, whose loads were weak: they went on before there was anything."""
    folder = importlib.util.find_spec("triton")
    tool = Path(folder.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if folder else None
    if tool is None or not tool.exists():
        pytest.skip("needs a disassembler: triton, which brings one, is not installed")
    source, binary = tmp_path / "waits.cu", tmp_path / "waits.cubin"
    source.write_text(WAITS)
    command = [
        NVCC,
        "-std=c++17",
        "-O3",
        "-arch=sm_90",
        "-cubin",
        f"-DREAD={read}",
        "-I",
        str(ROOT / "kernels" / "cuda"),
    ]
    subprocess.run([*command, str(source), "-o", str(binary)], check=True, capture_output=True)
    path = f"{tool.parent}{os.pathsep}{os.environ['PATH']}"
    shown = subprocess.run(
        [tool, "-sass", binary], check=True, capture_output=True, text=True, env={"PATH": path}
    ).stdout
    assert "waits" in shown
    found = bool(re.search(r"\bLDG?\.E\.STRONG\.GPU", shown))
    same = toolchain.release(NVCC) == json.loads(TABLE.read_text())["nvcc"]  # others may keep a weak loop too
    assert found if kept else not found or not same


def test_architectures_are_those_asked_for(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    assert toolchain.generate(toolchain.architectures("nvcc")) == [
        *("-gencode", "arch=compute_80,code=sm_80"),
        *("-gencode", "arch=compute_90,code=sm_90"),
        *("-gencode", "arch=compute_90,code=compute_90"),
    ]


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        table, spilling = resources(compiled(Path(name), toolchain.ARCHITECTURES))
    print("\n".join(spilling))
    TABLE.write_text(json.dumps({"nvcc": toolchain.release(NVCC), "kernels": table}, indent=2) + "\n")
