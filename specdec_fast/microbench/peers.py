"""Verification kernels of other projects, from folders that the user names.

Only what fits our inputs to theirs is here. A folder is a checkout or an unpacked release of the project; nothing of it
is installed, and a package's own ``__init__.py``, which would import the whole project, is not run. All of them are
given the same logits at temperature 1; kernels that want probabilities get them from logits inside the timed call,
but the drafter's where the law is *handed*: that is what their drafter hands over.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from specdec_fast.microbench.cases import Case

__all__ = ["PEERS", "VLLM", "FlashInfer", "Peer", "SGLang", "load"]

Inputs = dict[str, Any]


class Peer(Protocol):
    """One project's kernel."""

    name: str

    def takes(self, case: Case) -> bool:
        """Whether it can do a case."""

    def prepare(self, case: Case, inputs: Inputs) -> Callable[[], Any]:
        """A call that verifies these inputs; everything that is not part of a round is done here."""

    def read(self, result: Any) -> tuple[Tensor, Tensor]:
        """``accepted [B]`` and ``token [B]`` from what a call left."""


class VLLM:
    """vLLM's model runner V2: ``vllm/v1/worker/gpu/spec_decode/rejection_sampler_utils.py``.

    Written for vLLM 0.33.0. ``rejection_sample`` takes logits with temperature applied, rules *token* and *block*, and
    a drafter's logits over the whole vocabulary or none (a point mass).
    """

    name = "vllm"

    def __init__(self, folder: Path) -> None:
        with _entered("vllm", folder) as modules:
            tools = modules("vllm.triton_utils")
            triton, language = importlib.import_module("triton"), importlib.import_module("triton.language")
            device = importlib.import_module("triton.language.extra.libdevice")
            for name, value in {"triton": triton, "tl": language, "tldevice": device, "HAS_TRITON": True}.items():
                setattr(tools, name, value)
            module = importlib.import_module("vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils")
        self._sample = module.rejection_sample

    def takes(self, case: Case) -> bool:
        usual = case.op == "verify" and case.rule in ("token", "block") and not case.filters
        return usual and case.law in ("point", "dense")

    def prepare(self, case: Case, inputs: Inputs) -> Callable[[], Any]:
        tokens, logits = inputs["tokens"], inputs["logits"]
        device, batch, positions = logits.device, case.batch, case.gamma + 1
        rows = torch.arange(batch, device=device, dtype=torch.int32)
        places = torch.arange(positions, device=device, dtype=torch.int32)
        arguments = {
            "target_logits": logits.view(batch * positions, -1),
            "draft_logits": inputs.get("draft_logits"),
            # behind the token that the round starts from
            "draft_sampled": torch.cat([tokens[:, :1], tokens], 1).reshape(-1),
            "cu_num_logits": torch.arange(batch + 1, device=device, dtype=torch.int32) * positions,
            "pos": (inputs["start"].unsqueeze(1) + places).reshape(-1),
            "idx_mapping": rows,
            "expanded_idx_mapping": rows.repeat_interleave(positions),
            "expanded_local_pos": places.repeat(batch),
            "temperature": torch.ones(batch, device=device),
            "seed": inputs["seed"],
            "num_speculative_steps": case.gamma,
            "use_block_verification": case.rule == "block",
        }
        return lambda: self._sample(**arguments)

    def read(self, result: Any) -> tuple[Tensor, Tensor]:
        sampled, count = result
        kept = count.long() - 1
        return kept, sampled.gather(1, kept.unsqueeze(1)).squeeze(1)


class SGLang:
    """SGLang's chain sampler: ``sglang/kernels/ops/speculative/reject_sampling.py``.

    Written for SGLang 0.5.23. ``chain_speculative_sampling_triton`` takes float32 probabilities and coins, and does
    rules *token* and *block*.
    """

    name = "sglang"

    def __init__(self, folder: Path) -> None:
        with _entered("sglang", folder):
            module = importlib.import_module("sglang.kernels.ops.speculative.reject_sampling")
        self._sample = module.chain_speculative_sampling_triton

    def takes(self, case: Case) -> bool:
        usual = case.op == "verify" and case.rule in ("token", "block") and not case.filters
        return usual and case.law in ("dense", "handed")

    def prepare(self, case: Case, inputs: Inputs) -> Callable[[], Any]:
        tokens, logits, draft = inputs["tokens"], inputs["logits"], inputs["draft_logits"]
        device, batch, positions = logits.device, case.batch, case.gamma + 1
        generator = torch.Generator(device).manual_seed(0)
        candidates = torch.cat([tokens[:, :1], tokens], 1)
        index = torch.arange(batch * positions, device=device).view(batch, positions)
        left = {
            "predicts": torch.zeros(batch * positions, dtype=torch.int32, device=device),
            "accept_index": torch.full((batch, positions), -1, dtype=torch.int32, device=device),
            "accept_token_num": torch.empty(batch, dtype=torch.int32, device=device),
        }
        given = {
            "candidates": candidates,
            "retrive_index": index,
            "retrive_next_token": index,
            "retrive_next_sibling": index,
            "uniform_samples": torch.rand(candidates.shape, generator=generator, device=device),
            "uniform_samples_for_final_sampling": torch.rand(batch, generator=generator, device=device),
            "threshold_single": 1.0,
            "threshold_acc": 1.0,
            "deterministic": True,
            "block_verification": case.rule == "block",
        }
        handed = draft.softmax(-1, dtype=torch.float32) if case.law == "handed" else None

        def run() -> Any:
            p = logits.softmax(-1, dtype=torch.float32)
            q = draft.softmax(-1, dtype=torch.float32) if handed is None else handed
            self._sample(**left, **given, target_probs=p, draft_probs=q)
            return left

        return run

    def read(self, result: Any) -> tuple[Tensor, Tensor]:
        kept = result["accept_token_num"].long()
        predicted = result["predicts"].view(kept.shape[0], -1).long()
        return kept, predicted.gather(1, kept.unsqueeze(1)).squeeze(1)


class FlashInfer:
    """FlashInfer's chain sampler and softmax: ``include/flashinfer/sampling.cuh``, through two functions of our own.

    Written for FlashInfer 0.6.18. Both take float32; needs a GPU and nvcc. Rule *token* alone.
    """

    name = "flashinfer"

    def __init__(self, folder: Path) -> None:
        header = next((p for p in folder.glob("**/include/flashinfer/sampling.cuh")), None)
        if header is None:
            raise FileNotFoundError(f"{folder} has no include/flashinfer/sampling.cuh")
        major, minor = torch.cuda.get_device_capability()
        self._library = ctypes.CDLL(str(_compiled(header.parents[1], f"{major}{minor}")))
        self._room = torch.empty(2**20, dtype=torch.uint8, device="cuda")

    def takes(self, case: Case) -> bool:
        usual = case.op == "verify" and case.rule == "token" and not case.filters
        return usual and case.law in ("dense", "handed")

    def prepare(self, case: Case, inputs: Inputs) -> Callable[[], Any]:
        tokens, logits, draft = inputs["tokens"].int(), inputs["logits"], inputs["draft_logits"]
        batch, vocab = case.batch, case.vocab
        output = torch.empty(batch, case.gamma + 1, dtype=torch.int32, device=logits.device)
        counts = torch.zeros(2, batch, dtype=torch.int32, device=logits.device)
        handed = self._softmax(draft) if case.law == "handed" else None

        def run() -> Any:
            p = self._softmax(logits)
            q = self._softmax(draft) if handed is None else handed
            counts.zero_()  # the kernel adds to them
            pointers = [ctypes.c_void_p(t.data_ptr()) for t in (q, tokens, p, output, counts[0], counts[1])]
            self._call("specdec_peer_chain", *pointers, batch, case.gamma, vocab)
            return output, counts

        return run

    def read(self, result: Any) -> tuple[Tensor, Tensor]:
        output, counts = result
        kept = counts[1].long()
        return kept, output.long().gather(1, kept.unsqueeze(1)).squeeze(1)

    def _softmax(self, logits: Tensor) -> Tensor:
        wide = logits.float()
        out = torch.empty_like(wide)
        rows, vocab = wide.numel() // wide.shape[-1], wide.shape[-1]
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (wide, out, self._room)]
        self._call("specdec_peer_softmax", *pointers, rows, vocab, ctypes.c_size_t(self._room.numel()))
        return out

    def _call(self, name: str, *arguments: Any) -> None:
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        status = getattr(self._library, name)(*arguments, stream)
        if status:
            raise RuntimeError(f"flashinfer: CUDA error {status} in {name}")


PEERS: dict[str, Callable[[Path], Peer]] = {"vllm": VLLM, "sglang": SGLang, "flashinfer": FlashInfer}

WRAPPER = """
#include <flashinfer/sampling.cuh>
using namespace flashinfer;
extern "C" int specdec_peer_softmax(float* logits, float* out, void* room, unsigned rows, unsigned vocab,
                                    size_t bytes, void* stream) {
  return sampling::OnlineSoftmax<float>(logits, out, rows, vocab, nullptr, 1.0f, room, bytes, false,
                                        static_cast<cudaStream_t>(stream));
}
extern "C" int specdec_peer_chain(float* q, int* tokens, float* p, int* out, int* alone, int* kept, unsigned rows,
                                  unsigned gamma, unsigned vocab, void* stream) {
  return sampling::ChainSpeculativeSampling<float, int>(q, tokens, p, out, alone, kept, rows, gamma, vocab, true,
                                                        nullptr, 1, nullptr, 0, static_cast<cudaStream_t>(stream));
}
"""


def load(name: str, folder: str) -> Peer:
    """A peer from its folder.

    Raises:
        ValueError: it cannot be used from there, in words that name the option.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ValueError(f"--{name} {folder} is no folder: give a checkout or an unpacked release of the project")
    try:
        return PEERS[name](path)
    except Exception as error:  # foreign code fails in many ways
        wanted = (PEERS[name].__doc__ or "").splitlines()
        release = next((line.strip().partition(". ")[0] for line in wanted if "Written for" in line), "")
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"--{name} {folder} cannot be used ({release.lower()}): {reason}") from error


@contextlib.contextmanager
def _entered(package: str, folder: Path) -> Iterator[Callable[[str], types.ModuleType]]:
    """Lets the modules of a package be imported from a folder without running any ``__init__.py``.

    Yields a function that makes such an empty package, to put names into. Afterwards nothing of the package is left
    among the imported modules.
    """
    places = [folder / package, *folder.glob(f"*/{package}")]
    root = next((place for place in places if place.is_dir()), folder)
    if root.name != package:
        raise FileNotFoundError(f"there is no folder {package} in it")

    class Finder:
        @staticmethod
        def find_spec(name: str, path: object, target: object = None) -> Any:
            place = root.joinpath(*name.split(".")[1:])
            if name.partition(".")[0] != package or not place.is_dir():
                return None
            spec = importlib.util.spec_from_loader(name, None, is_package=True)
            assert spec is not None
            spec.submodule_search_locations = [str(place)]
            return spec

    def own(name: str) -> bool:
        return name.partition(".")[0] == package

    before = {name: sys.modules.pop(name) for name in list(sys.modules) if own(name)}
    sys.meta_path.insert(0, Finder)
    try:
        yield importlib.import_module
    finally:
        sys.meta_path.remove(Finder)
        for name in [name for name in sys.modules if own(name)]:
            del sys.modules[name]
        sys.modules.update(before)


def _compiled(include: Path, architecture: str) -> Path:
    """The wrapper as a shared library."""
    home = os.environ.get("SPECDEC_FAST_CUDA_HOME") or os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") or shutil.which("nvcc")
    if nvcc is None:
        raise FileNotFoundError("there is no nvcc to compile its headers")
    work = Path(tempfile.mkdtemp(prefix="specdec-fast-peer-"))
    source, library = work / "wrapper.cu", work / "wrapper.so"
    source.write_text(WRAPPER)
    command = [nvcc, "-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC", "--expt-relaxed-constexpr"]
    command += [f"-gencode=arch=compute_{architecture},code=sm_{architecture}", f"-I{include}"]
    for folder in _cuda_headers():  # cuRAND's are not in every toolkit
        command += ["-Xcompiler", f"-idirafter,{folder}"]
    done = subprocess.run([*command, str(source), "-o", str(library)], capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["nvcc failed"]
        raise RuntimeError(next((line for line in lines if "error" in line), lines[0]))
    return library


def _cuda_headers() -> list[Path]:
    """Headers of the CUDA libraries that torch was installed with."""
    found = importlib.util.find_spec("nvidia")
    folders = found.submodule_search_locations if found and found.submodule_search_locations else ()
    return [place for folder in folders for place in sorted(Path(folder).glob("*/include"))]
