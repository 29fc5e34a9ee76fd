"""How the CUDA kernels are compiled: by the build, by CI's check of every architecture, and by a wheel for a toolkit.

`nvcc` is called as it is: neither a GPU nor a CUDA build of torch is needed. The library names torch's own as those it
needs, which bring their CUDA part where there is one; the CUDA runtime is linked in.
"""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
KERNELS = ROOT / "csrc" / "cuda_kernels.cu"  # torch-free
OPS = ROOT / "csrc" / "cuda_ops.cpp"
SOURCES = [KERNELS, OPS]
HOME = "SPECDEC_FAST_CUDA_HOME"
RELEASE = "SPECDEC_FAST_CUDA"
STABLE_ABI = "0x020a000000000000"  # torch 2.10, the oldest supported
ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
# Fused operations are written out, so that host and device compute the same bits
FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden"]


def refused() -> bool:
    """Whether SPECDEC_FAST_CUDA says that no CUDA part is to be built, whatever torch is there."""
    return os.environ.get(RELEASE) == "off"


def wanted_release() -> str | None:
    """What SPECDEC_FAST_CUDA names, `13.0`; None where it is not set or off.

    Raises:
        RuntimeError: it is no release.
    """
    given = "" if refused() else os.environ.get(RELEASE, "")
    if given and not re.fullmatch(r"\d+\.\d+", given):
        raise RuntimeError(f"{RELEASE} is {given!r}: give a release of CUDA as 13.0")
    return given or None


def nvcc() -> str | None:
    """The compiler of the toolkit that SPECDEC_FAST_CUDA_HOME names, else CUDA_HOME, PATH, or /usr/local/cuda.

    Where SPECDEC_FAST_CUDA names a release, the first of those, or of /usr/local/cuda-<release>, that is of it.

    Raises:
        RuntimeError: SPECDEC_FAST_CUDA_HOME names a folder without one, or none is of the release wanted.
    """
    wanted, home = wanted_release(), os.environ.get(HOME)
    if home:
        found = [shutil.which("nvcc", path=str(Path(home) / "bin"))]
        if not found[0]:
            raise RuntimeError(f"{HOME} is {home}, which has no bin/nvcc")
    else:
        usual = [f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin"]
        usual += [f"/usr/local/cuda-{wanted}/bin"] if wanted else []
        found = [*(shutil.which("nvcc", path=path) for path in usual), shutil.which("nvcc")]
    there = [path for path in found if path]
    if wanted is None:
        return there[0] if there else None
    for path in there:
        if release(path) == wanted:
            return path
    others = ", ".join(f"{path} is of {release(path)}" for path in there) or "nvcc was not found"
    raise RuntimeError(f"{RELEASE} asks for CUDA {wanted}, but {others}: set {HOME} to the folder of that toolkit")


def release(compiler: str) -> str:
    """`13.0` for CUDA 13.0."""
    text = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    return text.split("release ")[1].split(",")[0]


def generate(architectures: list[str]) -> list[str]:
    """The options for architectures as TORCH_CUDA_ARCH_LIST writes them: `9.0`, or `9.0+PTX` to include its PTX."""
    options = []
    for architecture in architectures:
        number = architecture.removesuffix("+PTX").replace(".", "")
        options += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if architecture.endswith("+PTX"):
            options += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return options


def architectures(compiler: str) -> list[str]:
    """TORCH_CUDA_ARCH_LIST, or the representative ones that the compiler knows, the last of them with PTX."""
    given = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if given:
        return given
    text = subprocess.run([compiler, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = [name for name in ARCHITECTURES if f"compute_{name.replace('.', '')}" in text.split()]
    return [*known[:-1], known[-1] + "+PTX"]


def build(
    compiler: str, include: list[str], libraries: list[str], target: Path, folder: Path, options: list[str]
) -> str:
    """Compiles and links `target`; what `nvcc` printed about the kernels.

    Args:
        include: torch's include folders.
        libraries: torch's library folders.
        folder: for object files.
        options: architectures, and whatever else the kernels are compiled with.

    Raises:
        RuntimeError: with the compiler's own words.
    """
    kernels, ops = folder / "cuda_kernels.o", folder / "cuda_ops.o"
    torch_flags = [f"-I{path}" for path in include] + ["-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={STABLE_ABI}"]
    printed = _run([compiler, *FLAGS, *options, "-c", str(KERNELS), "-o", str(kernels)])
    _run([compiler, *FLAGS, *torch_flags, "-c", str(OPS), "-o", str(ops)])
    # Named even where nothing of them is open at link time: what torch has loaded is not visible to other libraries
    torch_libraries = [f"-L{path}" for path in libraries] + ["-Xlinker", "--no-as-needed", "-ltorch", "-ltorch_cpu"]
    _run([compiler, "-shared", "-cudart", "static", str(kernels), str(ops), "-o", str(target), *torch_libraries])
    return printed


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr
