"""The build commands behind setup.py: best effort, but strict where SPECDEC_FAST_STRICT_BUILD=1 or CUDA is named.

Environment:

    SPECDEC_FAST_STRICT_BUILD=1   a part that cannot be built is an error
    SPECDEC_FAST_CUDA=13.0        the CUDA part by the toolkit of that release, whatever torch and without a GPU; the
                                  version says so (0.1.0+cu130)
    SPECDEC_FAST_CUDA=off         no CUDA part, where torch has CUDA too
    SPECDEC_FAST_CUDA_HOME=DIR    the CUDA part by the toolkit there
    TORCH_CUDA_ARCH_LIST          the architectures, as torch writes them
"""

import hashlib
import json
import os
import platform
import re
import sys
import warnings
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths
except Exception as error:  # a broken torch fails in ways other than ImportError
    torch, BuildExtension, TORCH_ERROR = None, build_ext, f"torch is not importable: {error}"

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kernels" / "cuda"))
import toolchain

PACKAGE = "specdec_fast"
STRICT = os.environ.get("SPECDEC_FAST_STRICT_BUILD", "0") not in ("", "0")
FLAGS = ["-O3", "-g0"]


def version():
    """The package's, with the CUDA release that was asked for as the local part: `0.1.0+cu130`."""
    text = (toolchain.ROOT / PACKAGE / "__init__.py").read_text()
    public = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)[1]
    release = toolchain.wanted_release()
    return public + (f"+cu{release.replace('.', '')}" if release else "")


def fingerprint():
    """Of all sources; `specdec_fast/native.py` computes it again where the package lies beside them."""
    files = [*toolchain.ROOT.glob("csrc/*.[ch]*"), *toolchain.ROOT.glob("kernels/cuda/*.cu*")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()


def extensions(**parts):
    """Each binary by its name and the files of csrc/ it is made of, and the CUDA part where it is wanted."""
    found = [
        Extension(f"{PACKAGE}.{name}", [f"csrc/{file}.cpp" for file in files], language="c++", extra_compile_args=FLAGS)
        for name, files in parts.items()
    ]
    if toolchain.refused():
        return found
    named = toolchain.wanted_release() or os.environ.get(toolchain.HOME)
    if named or (torch and torch.version.cuda and toolchain.nvcc()):
        depends = [str(path.relative_to(toolchain.ROOT)) for path in toolchain.SOURCES]
        found.append(Extension(f"{PACKAGE}._ops_cuda", [], depends=depends))
    return found


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


CONFIGURE = {f"{PACKAGE}._ops_cpu": configure_ops, f"{PACKAGE}._text": configure_text}


class BestEffortBuild(BuildExtension):
    """Builds each extension it can, and writes down why it could not build the others."""

    def run(self):
        self.reasons, self.cuda = {}, None
        super().run()
        folder = Path(PACKAGE) if self.inplace else Path(self.build_lib) / PACKAGE
        folder.mkdir(parents=True, exist_ok=True)
        for name in self.reasons if self.inplace else ():  # a binary of older sources must not be loaded
            Path(self.get_ext_filename(name)).unlink(missing_ok=True)
        record = {
            "python": platform.python_version(),
            "torch": str(torch.__version__) if torch else None,
            "cuda": self.cuda,
            "sources": fingerprint(),
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
        """Not by torch's helper, which asks for a CUDA build of torch."""
        if torch is None:
            raise RuntimeError(TORCH_ERROR)
        compiler, folder = toolchain.nvcc(), Path(self.build_temp)
        target = Path(self.get_ext_fullpath(ext.name))
        for needed in (folder, target.parent):
            needed.mkdir(parents=True, exist_ok=True)
        architectures = toolchain.architectures(compiler)
        toolchain.build(compiler, include_paths(), library_paths(), target, folder, toolchain.generate(architectures))
        self.cuda = {"release": toolchain.release(compiler), "architectures": architectures}

    def give_up(self, ext, error):
        if STRICT or (toolchain.wanted_release() and ext.name.endswith("._ops_cuda")):
            raise error
        self.reasons.setdefault(ext.name, f"{type(error).__name__}: {error}")
        warnings.warn(f"{ext.name} is not built: {error}", stacklevel=2)

    def get_ext_filename(self, fullname):
        if fullname.rpartition(".")[2] in ("_ops_cpu", "_ops_cuda"):
            return os.path.join(*fullname.split(".")) + ".so"  # free of the Python ABI
        return super().get_ext_filename(fullname)
