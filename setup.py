"""Builds the native parts of specdec_fast; all metadata but the version is in pyproject.toml.

`_ops_cpu` holds the CPU kernels: torch's stable ABI, no Python ABI, loaded by
`torch.ops.load_library`. `_text` binds what is not a tensor and needs no torch. A part that cannot
be built is left out and the reason recorded in `_build_info.json`, which `specdec_fast.native`
reads; SPECDEC_FAST_STRICT_BUILD=1 makes it an error. `_ops_cuda` holds the CUDA kernels: it is built
where torch has CUDA and there is a toolkit, and where SPECDEC_FAST_CUDA (a release, as 13.0) or
SPECDEC_FAST_CUDA_HOME names one, whatever torch and without a GPU. `csrc/building.py` has the commands.
"""

import sys
from pathlib import Path

from setuptools import find_packages, setup

sys.path.insert(0, str(Path(__file__).parent / "csrc"))
import building

PACKAGE = "specdec_fast"
OPS = ["ops", "sample", "verify", "residual", "filter", "rows", "maps", "chunk_plain", "chunk_avx2", "chunk_avx512"]
OPS += ["llama", "draft", "score", "memory", "race", "branch", "climb", "traverse"]
OPS += ["pass_plain", "pass_avx2", "pass_avx512", "pass_dot"]

setup(
    version=building.version(),
    packages=[*find_packages(include=[f"{PACKAGE}*"]), f"{PACKAGE}.triton_kernels"],
    package_dir={f"{PACKAGE}.triton_kernels": "kernels/triton"},
    ext_modules=building.extensions(_ops_cpu=OPS, _text=["text"]),
    cmdclass={"build_ext": building.BestEffortBuild},
)
