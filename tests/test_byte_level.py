"""The native re-tokeniser gives what the tokenizer gives, id by id, and keeps off where it might not."""

import inspect
import json
import random
from functools import cache
from pathlib import Path

import pytest
from test_real_vocabularies import load
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from toy_tokenizers import BYTE_LEVEL, ENGLISH, TEXTS, build
from transformers import PreTrainedTokenizerFast

import specdec_fast
from specdec_fast import byte_level, native
from specdec_fast.byte_level import native_bpe
from specdec_fast.text import Reader, TextProposer
from specdec_fast.vocab import Vocabulary, _read

SHIPPED = Path(specdec_fast.__file__).parent / "drafter"
REAL = ("smollm2", "gpt2", "qwen")
NAMES = ("shipped", *REAL)
SIGNS = [
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "'s",
    "'LL",
    "'ve",
    "'",
    "12",
    "3456",
    "½",
    "The",
    " word",
    "é",
    "人工",
    "かな",
    "_",
]
SIGNS += ["--", "(){}", "€", "👍", "\x00", "\u00a0", "\u2028", "Ⅷ", "e\u0301", "\u1100\u1161", "'ſ", "<|", "<|im_end|>"]

pytestmark = pytest.mark.skipif(native.load_text() is None, reason="needs the compiled text part")


@cache
def tokenizer(name: str) -> PreTrainedTokenizerFast:
    if name in BYTE_LEVEL:
        return build(name)
    return PreTrainedTokenizerFast.from_pretrained(SHIPPED) if name == "shipped" else load(name)[0]


@cache
def plain(name: str) -> Vocabulary:
    """A vocabulary that encodes by the tokenizer alone."""
    vocabulary = _read(tokenizer(name))
    vocabulary.__dict__["native"] = None
    return vocabulary


def quick(name: str) -> Vocabulary:
    vocabulary = Vocabulary.of(tokenizer(name))
    assert vocabulary.native is not None
    return vocabulary


@cache
def texts() -> list[str]:
    """Code, prose, mixtures, and characters of all kinds that the native step is sure of."""
    draw = random.Random(0)
    found = [*TEXTS.values(), inspect.getsource(json.decoder), *ENGLISH.split("\n")]
    found += ["".join(draw.choices(SIGNS, k=30)) for _ in range(150)]
    classes = byte_level._classes(True)
    sure = [chr(point) for point, kind in enumerate(classes) if kind != byte_level._UNSURE]
    kinds = [[c for c in sure if classes[ord(c)] == kind] for kind in range(4)]
    found += ["".join(draw.choice(draw.choice(kinds)) for _ in range(60)) for _ in range(300)]
    return found


def differences(name: str, bpe: object) -> tuple[int, int]:
    """Texts that are encoded otherwise, and texts that are encoded at all."""
    found = [(text, bpe.encode(text)) for text in texts()]
    sure = [(text, ours) for text, ours in found if ours is not None]
    return sum(ours != plain(name).encode(text) for text, ours in sure), len(sure)


@pytest.mark.parametrize("name", NAMES)
def test_a_text_is_encoded_as_by_the_tokenizer(name):
    wrong, sure = differences(name, quick(name).native.bpe)
    assert wrong == 0
    assert sure > 300


@pytest.mark.parametrize("name", ["shipped", "qwen"])
@pytest.mark.parametrize("fault", ["pattern", "rank", "letter", "line"])
def test_a_planted_fault_is_seen(name, fault):
    """By these tests and, as a tokenizer it would be wrong for, before it is ever used."""
    vocabulary, text = quick(name), native.load_text()
    made = _made_with(vocabulary, fault)
    assert differences(name, made)[0] > 0
    assert not byte_level._same(vocabulary.encoder._backend, made)
    assert text is not None


def _made_with(vocabulary: Vocabulary, fault: str) -> object:
    """The native step of a vocabulary with a fault."""
    text, state = native.load_text(), json.loads(vocabulary.encoder._backend.to_str())
    vocab, merges = state["model"]["vocab"], state["model"]["merges"]
    pattern = byte_level._pattern(state["pre_tokenizer"])
    if fault == "pattern":
        pattern = "GPT2"
    ranked = [(vocab[left], vocab[right], vocab[left + right]) for left, right in merges]
    if fault == "rank":
        ranked = ranked[400:] + ranked[:400]
    classes = bytearray(byte_level._classes(True))
    if fault == "letter":
        classes[ord("é")] = byte_level._OTHER
    if fault == "line":
        classes[ord("\n")] = byte_level._OTHER
    letters = [vocab.get(letter, -1) for letter in byte_level._alphabet()]
    marks = [token["content"] for token in state["added_tokens"]]
    return text.ByteLevelBpe(
        vocabulary.pieces, getattr(text.Pattern, pattern), bytes(classes), letters, ranked, [], marks
    )


def chunks(ids: list[int], draw: random.Random) -> list[list[int]]:
    parts = []
    while ids:
        k = draw.choice([1, 2, 3, 5, 20])
        parts.append(ids[:k])
        ids = ids[k:]
    return parts


def streams(source: str, draw: random.Random) -> list[list[int]]:
    """Texts as ids, with markers, and ids at random: bytes that are no text."""
    written = [
        tokenizer(source)(text[:1500], add_special_tokens=False)["input_ids"] for text in draw.sample(texts(), 25)
    ]
    size = plain(source).size
    few = [*plain(source).specials, *(i for i, data in enumerate(plain(source).token_bytes) if data and len(data) < 3)]
    written += [[draw.randrange(size) for _ in range(60)] for _ in range(5)]
    return written + [[draw.choice(few) for _ in range(80)] for _ in range(5)]


PAIRS = [(a, b) for a in NAMES for b in NAMES if a != b] + [("byte_a", "byte_b"), ("byte_b", "shipped")]


@pytest.mark.parametrize("source, destination", PAIRS)
def test_a_row_is_read_as_by_the_reference(source, destination):
    draw = random.Random(1)
    for ids in streams(source, draw):
        width = draw.choice([1, 3, 10])
        ours = Reader(quick(source), tokenizer(destination), quick(destination), lookbehind=width)
        theirs = Reader(plain(source), tokenizer(destination), plain(destination), lookbehind=width, native=False)
        assert ours._native is not None
        for part in chunks(ids, draw):
            assert ours.append(part) == theirs.append(part)
            assert ours.ids == theirs.ids


def test_a_long_row_without_words_is_read_as_by_the_reference():
    for unit in ("人工智能", "_x1", "=", " ", "👍🏽", "a"):
        ids = tokenizer("shipped")(unit * 3000, add_special_tokens=False)["input_ids"]
        ours = Reader(quick("shipped"), tokenizer("byte_a"), quick("byte_a"), lookbehind=2)
        theirs = Reader(plain("shipped"), tokenizer("byte_a"), plain("byte_a"), lookbehind=2, native=False)
        for first in range(0, len(ids), 40):
            assert ours.append(ids[first : first + 40]) == theirs.append(ids[first : first + 40])
        assert ours.ids == theirs.ids
        assert ours._native.kept == len(theirs._text) < 30_000


@pytest.mark.parametrize("drafter, target", PAIRS)
def test_a_draft_is_proposed_as_by_the_reference(drafter, target):
    draw = random.Random(2)
    ours = TextProposer(tokenizer(target), quick(target), quick(drafter))
    theirs = TextProposer(tokenizer(target), plain(target), plain(drafter), native=False)
    said = 0
    for ids in streams(drafter, draw):
        for _ in range(3):
            cut, most = draw.randrange(1, len(ids)), draw.choice([1, 3, 6])
            row = Reader(plain(drafter), tokenizer(target), plain(target), native=False)
            row.append(ids[:cut])
            committed = row.ids[: len(row.ids) - draw.choice([0, 0, 0, 1])]
            asked = (committed, ids[:cut], ids[cut : cut + most])
            assert ours.propose(*asked) == theirs.propose(*asked)
            said += ours._native.propose(committed[-40:], ids[:cut][-40:], asked[2]) is not None
    assert said > 10


def backend(**changes) -> Tokenizer:
    """A small byte-level tokenizer, with something changed."""
    vocab = {letter: i for i, letter in enumerate(byte_level._alphabet())} | {"th": 256, "the": 257}
    options = {"ignore_merges": changes.pop("ignore_merges", False)} | changes.pop("model", {})
    made = Tokenizer(models.BPE(vocab, changes.pop("merges", [("t", "h"), ("th", "e")]), **options))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def made_of(tokenizer: Tokenizer) -> object:
    vocabulary = Vocabulary.of(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    return native_bpe(tokenizer, vocabulary.token_bytes, vocabulary.pieces)


def split(pattern: str, **options) -> pre_tokenizers.PreTokenizer:
    options = {"behavior": "isolated", **options}
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), **options),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


@pytest.mark.parametrize(
    "known",
    [
        {},
        {"ignore_merges": True},
        {"normalizer": normalizers.NFC()},
        {"pre_tokenizer": split(byte_level.GPT2)},
        {"pre_tokenizer": split(byte_level.LATER % r"\p{N}")},
        {"pre_tokenizer": split(byte_level.LATER % r"\p{N}{1,3}")},
    ],
)
def test_what_it_knows_is_native_and_right(known):
    made = made_of(subject := backend(**known))
    assert made is not None
    for text in texts()[-450:]:
        found, own = made.bpe.encode(text), subject.encode(text)
        assert found is None or found == (own.ids, [start for start, _ in own.offsets])


@pytest.mark.parametrize(
    "unknown",
    [
        {"normalizer": normalizers.Lowercase()},
        {"normalizer": normalizers.NFKC()},
        {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
        {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)},
        {"pre_tokenizer": pre_tokenizers.Whitespace()},
        {"pre_tokenizer": split(r"\p{L}+|\s+")},
        {"pre_tokenizer": split(byte_level.GPT2, behavior="removed")},
        {"pre_tokenizer": split(byte_level.GPT2, invert=True)},
        {"model": {"dropout": 0.1}},
        {"model": {"end_of_word_suffix": "e"}},
        {"model": {"continuing_subword_prefix": "h"}},
    ],
)
def test_what_it_does_not_know_stays_with_the_tokenizer(unknown):
    assert made_of(backend(**unknown)) is None


def test_a_text_that_holds_a_marker_is_left_to_the_tokenizer():
    subject = backend()
    subject.add_special_tokens([AddedToken("<|end|>"), AddedToken("<|end|>!"), AddedToken("<s>", rstrip=True)])
    made = made_of(subject)
    assert made.bpe.encode("the <|end|> the") is None
    assert made.bpe.encode("the <|end| the") is not None
    # A longer one begins with the first, the third takes the space behind it
    assert made.plain_markers == {259: "<|end|>!"}
