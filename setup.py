"""Builds the native parts of specdec_fast; all metadata is in pyproject.toml.

`_ops_cpu` holds the CPU kernels: torch's stable ABI, no Python ABI, loaded by
`torch.ops.load_library`. `_text` binds what is not a tensor and needs no torch. A part that cannot
be built is left out and the reason recorded in `_build_info.json`, which `specdec_fast.native`
reads; SPECDEC_FAST_STRICT_BUILD=1 makes it an error. `_ops_cuda` holds the CUDA kernels: it is built
where torch has CUDA and there is a toolkit, and where SPECDEC_FAST_CUDA_HOME names one, whatever
torch and without a GPU.
"""

import json
import os
import platform
import sys
import warnings
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths
except Exception as error:  # a broken torch fails in ways other than ImportError
    torch, BuildExtension, TORCH_ERROR = None, build_ext, f"torch is not importable: {error}"

sys.path.insert(0, str(Path(__file__).parent / "kernels" / "cuda"))
import toolchain

PACKAGE = "specdec_fast"
STRICT = os.environ.get("SPECDEC_FAST_STRICT_BUILD", "0") not in ("", "0")
OPS = ["ops", "sample", "verify", "residual", "filter", "rows", "maps", "chunk_plain", "chunk_avx2", "chunk_avx512"]
OPS += ["llama", "pass_plain", "pass_avx2", "pass_avx512", "pass_dot"]
FLAGS = ["-O3", "-g0"]


def configure_ops(ext):
    if torch is None:
        raise RuntimeError(TORCH_ERROR)
    ext.include_dirs += include_paths()
    ext.library_dirs += library_paths()
    ext.libraries += ["torch", "torch_cpu"]
    ext.extra_compile_args += [f"-DTORCH_TARGET_VERSION={toolchain.STABLE_ABI}", "-fvisibility=hidden"]


def configure_text(ext):
    import pybind11

    ext.include_dirs.append(pybind11.get_include())
    ext.extra_compile_args += ["-std=c++17", "-fvisibility=hidden"]


def cuda_parts():
    """The CUDA extension where it is wanted; not torch's helper builds it, which asks for a CUDA build of torch."""
    if os.environ.get(toolchain.HOME) or (torch and torch.version.cuda and toolchain.nvcc()):
        depends = [str(path.relative_to(toolchain.ROOT)) for path in toolchain.SOURCES]
        return [Extension(f"{PACKAGE}._ops_cuda", [], depends=depends)]
    return []


CONFIGURE = {f"{PACKAGE}._ops_cpu": configure_ops, f"{PACKAGE}._text": configure_text}


class BestEffortBuild(BuildExtension):
    """Builds each extension it can, and writes down why it could not build the others."""

    def run(self):
        self.reasons = {}
        super().run()
        folder = Path(PACKAGE) if self.inplace else Path(self.build_lib) / PACKAGE
        folder.mkdir(parents=True, exist_ok=True)
        for name in self.reasons if self.inplace else ():  # a binary of older sources must not be loaded
            Path(self.get_ext_filename(name)).unlink(missing_ok=True)
        record = {
            "python": platform.python_version(),
            "torch": str(torch.__version__) if torch else None,
            "failed": {name.rpartition(".")[2]: reason for name, reason in self.reasons.items()},
        }
        (folder / "_build_info.json").write_text(json.dumps(record, indent=2) + "\n")

    def build_extensions(self):
        try:
            super().build_extensions()
        except Exception as error:  # torch probes the compiler before the first extension
            for ext in self.extensions:
                self.give_up(ext, error)
        # setuptools goes on to copy what is listed here
        self.extensions = [ext for ext in self.extensions if ext.name not in self.reasons]

    def build_extension(self, ext):
        try:
            if ext.name.endswith("._ops_cuda"):
                return self.build_cuda(ext)
            CONFIGURE[ext.name](ext)
            super().build_extension(ext)
        except Exception as error:
            self.give_up(ext, error)

    def build_cuda(self, ext):
        if torch is None:
            raise RuntimeError(TORCH_ERROR)
        compiler, folder = toolchain.nvcc(), Path(self.build_temp)
        target = Path(self.get_ext_fullpath(ext.name))
        for needed in (folder, target.parent):
            needed.mkdir(parents=True, exist_ok=True)
        options = toolchain.generate(toolchain.architectures(compiler))
        toolchain.build(compiler, include_paths(), library_paths(), target, folder, options)

    def give_up(self, ext, error):
        if STRICT:
            raise error
        self.reasons.setdefault(ext.name, f"{type(error).__name__}: {error}")
        warnings.warn(f"{ext.name} is not built: {error}", stacklevel=2)

    def get_ext_filename(self, fullname):
        if fullname.rpartition(".")[2] in ("_ops_cpu", "_ops_cuda"):
            return os.path.join(*fullname.split(".")) + ".so"  # free of the Python ABI
        return super().get_ext_filename(fullname)


setup(
    packages=[*find_packages(include=[f"{PACKAGE}*"]), f"{PACKAGE}.triton_kernels"],
    package_dir={f"{PACKAGE}.triton_kernels": "kernels/triton"},
    ext_modules=[
        Extension(f"{PACKAGE}.{name}", [f"csrc/{part}.cpp" for part in parts], language="c++", extra_compile_args=FLAGS)
        for name, parts in (("_ops_cpu", OPS), ("_text", ["text"]))
    ]
    + cuda_parts(),
    cmdclass={"build_ext": BestEffortBuild},
)
