"""What a drafter reads is what its own tokenizer would have written, and what it wrote comes back."""

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_tokenizers import BYTE_LEVEL, ENGLISH, KINDS, TEXTS, build
from transformers import ByT5Tokenizer

from specdec_fast.text import Reader, TextProposer, retokenise
from specdec_fast.vocab import Vocabulary

TOKENIZERS = {kind: build(kind) for kind in KINDS}
VOCABULARIES = {kind: Vocabulary.of(tokenizer) for kind, tokenizer in TOKENIZERS.items()}
# These write every text down so that it can be read back exactly.
SOURCES = (*BYTE_LEVEL, "sentencepiece_first", "sentencepiece_never", "sentencepiece_legacy")


def reader(source: str, destination: str, **options) -> Reader:
    return Reader(VOCABULARIES[source], TOKENIZERS[destination], VOCABULARIES[destination], **options)


def proposer(target: str, drafter: str, **options) -> TextProposer:
    return TextProposer(TOKENIZERS[target], VOCABULARIES[target], VOCABULARIES[drafter], **options)


def written(kind: str, text: str, **options) -> list[int]:
    """The tokenizer's own ids of a text, unk left out."""
    return [i for i in TOKENIZERS[kind](text, **options).input_ids if i != VOCABULARIES[kind].unknown]


def special(kind: str, text: str) -> int:
    return TOKENIZERS[kind].convert_tokens_to_ids(text)


def chunks(ids: list[int], seed: int) -> list[list[int]]:
    draw, parts = random.Random(seed), []
    while ids:
        k = draw.choice([1, 1, 2, 3, 5, 20])
        parts.append(ids[:k])
        ids = ids[k:]
    return parts


# ---- Reader


@pytest.mark.parametrize("destination", KINDS)
@pytest.mark.parametrize("source", SOURCES)
def test_reading_in_pieces_gives_what_the_tokenizer_writes(source, destination):
    for seed, text in enumerate(TEXTS.values()):
        row = reader(source, destination)
        for part in chunks(written(source, text, add_special_tokens=False), seed):
            before = list(row.ids)
            unchanged = row.append(part)
            assert row.ids[:unchanged] == before[:unchanged]
            assert unchanged >= len(before) - 64  # no cache rolls back far
        assert row.ids == written(destination, text)


@given(
    st.text(alphabet=st.sampled_from("ab AB\n\t1.,'é人😀<|_"), max_size=60),
    st.sampled_from(BYTE_LEVEL),
    st.sampled_from(KINDS),
    st.integers(0, 2**32),
    st.sampled_from([1, 3, 10]),
)
@settings(max_examples=300, deadline=None)
def test_text_without_words_is_read_as_well(text, source, destination, seed, lookbehind):
    row = reader(source, destination, lookbehind=lookbehind)
    for part in chunks(written(source, text, add_special_tokens=False), seed):
        row.append(part)
    data = VOCABULARIES[destination].bytes_of(row.ids)
    if destination in BYTE_LEVEL:
        assert data == text.encode()
        if lookbehind == 10:
            assert row.ids == written(destination, text)
    elif destination in SOURCES:
        assert data in (text.encode(), b" " + text.encode())


@pytest.mark.parametrize("destination", ["byte_b", "sentencepiece_first", "sentencepiece_legacy"])
def test_a_character_cut_in_the_middle_is_held_back(destination):
    ids = [VOCABULARIES["byte_a"].id_of(bytes([byte])) for byte in "a😀b".encode()]
    row = reader("byte_a", destination)
    row.append(ids[:2])
    held = list(row.ids)
    assert row.append(ids[2:3]) == len(held) and row.ids == held == written(destination, "a")
    row.append(ids[3:])
    assert row.ids == written(destination, "a😀b")


def test_no_space_slips_in_at_the_window():
    for destination in ("sentencepiece_first", "sentencepiece_always", "sentencepiece_legacy"):
        row = reader("byte_a", destination, lookbehind=2)
        text = "(" + "x1y_z" * 40
        for i in written("byte_a", text):
            row.append([i])
        assert VOCABULARIES[destination].bytes_of(row.ids) == b" " + text.encode()


@pytest.mark.parametrize("source", ["byte_b", "sentencepiece_first"])
@pytest.mark.parametrize("destination", ["byte_a", "byte_gaps", "sentencepiece_first", "sentencepiece_legacy"])
def test_chat_markers_are_kept_as_markers(source, destination):
    row = reader(source, destination)
    text = "<|im_start|>user\nHow many ships?<|im_end|>\n<|im_start|>assistant\n"
    for part in chunks(written(source, text, add_special_tokens=False), 3):
        row.append(part)
    assert row.ids == written(destination, text)


def test_a_text_is_opened_once_as_the_destination_does():
    text = "The ships"
    assert retokenise(
        written("sentencepiece_first", text),
        VOCABULARIES["sentencepiece_first"],
        TOKENIZERS["sentencepiece_legacy"],
        VOCABULARIES["sentencepiece_legacy"],
    ) == written("sentencepiece_legacy", text)
    row = reader("wordpiece", "sentencepiece_first")  # another bos, by role
    row.append(written("wordpiece", text))
    assert row.ids == written("sentencepiece_first", text.lower())
    row = reader("sentencepiece_first", "byte_b")  # none at all
    row.append(written("sentencepiece_first", text))
    assert row.ids == written("byte_b", text)
    row = reader("sentencepiece_first", "byte_a")  # one that its tokenizer does not write by itself
    row.append(written("sentencepiece_first", text))
    assert row.ids == [special("byte_a", "<s>"), *written("byte_a", text)]


def test_specials_go_by_text_then_by_role_then_as_plain_text():
    row = reader("byte_a", "byte_b")
    row.append([*written("byte_a", "on"), special("byte_a", "</s>"), special("byte_a", "<|im_end|>")])
    assert row.ids == [*written("byte_b", "on"), special("byte_b", "<|end|>"), special("byte_b", "<|im_end|>")]
    bare = build("byte_b", markers=False)
    row = Reader(VOCABULARIES["byte_a"], bare, Vocabulary.of(bare))
    row.append([*written("byte_a", "on"), special("byte_a", "<|im_end|>"), *written("byte_a", " off")])
    assert row.ids == bare("on<|im_end|> off").input_ids
    row = reader("sentencepiece_first", "wordpiece")
    row.append([special("sentencepiece_first", "<unk>")])
    assert VOCABULARIES["wordpiece"].roles["unk"] not in row.ids


def test_a_marker_breaks_off_a_begun_character():
    row = reader("byte_a", "byte_b")
    row.append([VOCABULARIES["byte_a"].id_of(b"\xf0"), special("byte_a", "<|im_end|>"), *written("byte_a", "x")])
    assert row.ids == [*written("byte_b", "\ufffd"), special("byte_b", "<|im_end|>"), *written("byte_b", "x")]


@pytest.mark.parametrize("destination", KINDS)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_ids_are_read_without_an_error(destination, data):
    source = data.draw(st.sampled_from(KINDS))
    vocabulary, size = VOCABULARIES[destination], VOCABULARIES[source].size
    row = reader(source, destination, lookbehind=data.draw(st.integers(0, 4)))
    for part in data.draw(st.lists(st.lists(st.integers(-2, size + 2), max_size=8), max_size=12)):
        before = list(row.ids)
        unchanged = row.append(part)
        assert row.ids[:unchanged] == before[:unchanged]
        assert all(0 <= i < vocabulary.size for i in row.ids)
        assert vocabulary.unknown is None or vocabulary.unknown not in row.ids


@pytest.mark.parametrize("text", ["人工智能", "=", " ", "x1", "Word ", "😀"])
@pytest.mark.parametrize("destination", ["byte_a", "byte_gaps", "sentencepiece_legacy", "unigram", "wordpiece"])
def test_an_append_encodes_a_window_never_the_row(destination, text, monkeypatch):
    row = reader("byte_a", destination, native=False)
    ids, lengths = written("byte_a", text), []
    row.append(ids * 2000)
    encode = row._vocabulary.encode
    monkeypatch.setattr(row._vocabulary, "encode", lambda s: (lengths.append(len(s)), encode(s))[1])
    for _ in range(20):
        row.append(ids)
    assert max(lengths) < 4000
    assert len(row._text) < 200_000


def test_a_tokenizer_without_backend_reads_and_is_read():
    tokenizer = ByT5Tokenizer()
    vocabulary = Vocabulary.of(tokenizer)
    for text in TEXTS.values():
        own = tokenizer(text, add_special_tokens=False).input_ids
        assert retokenise(written("byte_a", text), VOCABULARIES["byte_a"], tokenizer, vocabulary) == own
        row = Reader(vocabulary, TOKENIZERS["byte_b"], VOCABULARIES["byte_b"])
        for part in chunks(own, 5):
            row.append(part)
        assert row.ids == written("byte_b", text)


def test_a_vocabulary_made_by_hand_is_refused():
    by_hand = Vocabulary([b"a"])
    with pytest.raises(ValueError, match=r"Vocabulary\.of"):
        Reader(by_hand, TOKENIZERS["byte_a"], by_hand)
    with pytest.raises(ValueError, match=r"Vocabulary\.of"):
        TextProposer(TOKENIZERS["byte_a"], by_hand, by_hand)


def test_an_append_is_cheap():
    row = reader("byte_a", "byte_b")
    ids = written("byte_a", ENGLISH * 20)
    begin = time.perf_counter()
    for i in ids[:2000]:
        row.append([i])
    assert (time.perf_counter() - begin) / 2000 < 2e-3  # tens of microseconds; room for a busy machine


# ---- TextProposer


@pytest.mark.parametrize("target", [*SOURCES, "byte_gaps", "sentencepiece_always"])
@pytest.mark.parametrize("drafter", SOURCES)
def test_text_comes_back_as_the_target_goes_on(target, drafter):
    propose = proposer(target, drafter).propose
    for text in (TEXTS["english"], TEXTS["code"]):
        for cut in [k for k in range(len(text)) if text[k] == " " and text[k - 1] not in " \n"][5:120:9]:
            head, tail = text[:cut], text[cut : cut + 40].rsplit(" ", 1)[0]
            context = written(drafter, head)
            whole, begun = written(drafter, head + tail), written(target, head)
            if whole[: len(context)] != context:
                continue
            assert begun + propose(begun, context, whole[len(context) :]) == written(target, head + tail)


@pytest.mark.parametrize("target", BYTE_LEVEL)
def test_text_before_which_the_drafter_held_back_bytes(target):
    """The committed text ends inside a character, which the drafter has not read and writes whole."""
    vocabulary = VOCABULARIES[target]
    smile = "😀".encode()
    row = reader(target, "byte_gaps")
    committed = [vocabulary.id_of(bytes([byte])) for byte in b"a" + smile[:2]]
    row.append(committed)
    drafted = written("byte_gaps", "😀!")
    proposed = proposer(target, "byte_gaps").propose(committed, row.ids, drafted)
    assert vocabulary.bytes_of([*committed, *proposed]) == "a😀!".encode()
    assert proposer(target, "byte_gaps").propose(committed, row.ids, written("byte_gaps", "no")) == []


def test_a_context_taken_back_by_a_token_is_not_written_twice():
    committed, context = written("byte_a", "the ships in the bay"), written("byte_b", "the ships in")
    drafted = written("byte_b", " the bay and the")
    assert proposer("byte_a", "byte_b").propose(committed, context, drafted) == written("byte_a", " and the")
    other = written("byte_b", " a bay")
    assert proposer("byte_a", "byte_b").propose(committed, context, other) == []


def test_a_merge_across_the_boundary_leaves_the_committed_ids_alone():
    whole = written("byte_a", " there")
    assert len(whole) == 1
    committed = [*written("byte_a", "and"), VOCABULARIES["byte_a"].id_of(b" ")]
    proposed = proposer("byte_a", "byte_b").propose(committed, written("byte_b", "and "), written("byte_b", "there"))
    assert proposed == written("byte_a", "there")
    for target in ("sentencepiece_first", "sentencepiece_legacy"):  # nor does a space slip in
        committed = [*written(target, "an"), *VOCABULARIES[target].encode_inside("d")[0]]
        proposed = proposer(target, "byte_b").propose(committed, written("byte_b", "and"), written("byte_b", "ing"))
        assert VOCABULARIES[target].bytes_of(proposed) == b"ing"


def test_a_begun_character_at_the_end_is_not_proposed():
    drafted = [*written("byte_b", " ok"), VOCABULARIES["byte_b"].id_of(b"\xf0"), VOCABULARIES["byte_b"].id_of(b"\x9f")]
    proposed = proposer("byte_a", "byte_b").propose(written("byte_a", "yes"), written("byte_b", "yes"), drafted)
    assert proposed == written("byte_a", " ok")


def test_specials_of_the_drafter_go_on_or_end_the_draft():
    target, drafter = "byte_a", "byte_b"
    text, end, mark = written(drafter, " ok"), special(drafter, "<|end|>"), special(drafter, "<|im_end|>")
    committed, context = written(target, "yes"), written(drafter, "yes")
    propose = proposer(target, drafter).propose
    ok = written(target, " ok")
    assert propose(committed, context, [*text, end, *text]) == [*ok, special(target, "</s>")]
    assert propose(committed, context, [*text, mark, *text]) == [*ok, special(target, "<|im_end|>"), *ok]
    bare = build(target, markers=False)
    plain = TextProposer(bare, Vocabulary.of(bare), VOCABULARIES[drafter])
    assert plain.propose(committed, context, [*text, mark, *text]) == ok


def test_a_marker_that_the_drafter_spells_out_is_the_targets_marker():
    bare = build("byte_b", markers=False)
    drafted = bare(" ok<|im_end|>\n").input_ids
    assert len(drafted) > 10
    proposed = TextProposer(TOKENIZERS["byte_a"], VOCABULARIES["byte_a"], Vocabulary.of(bare)).propose(
        written("byte_a", "yes"), bare("yes").input_ids, drafted
    )
    assert proposed == written("byte_a", " ok<|im_end|>\n")


@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("drafter", SOURCES)
def test_a_draft_that_opens_a_row_or_a_turn(target, drafter):
    text = "The old lighthouse keeper"
    opening = written(target, "")
    drafted = [i for i in written(drafter, text) if i not in written(drafter, "")]
    assert opening + proposer(target, drafter).propose(opening, written(drafter, ""), drafted) == written(target, text)
    mark = "<|im_end|>"
    committed, context = written(target, "one" + mark), written(drafter, "one" + mark)
    drafted = written(drafter, "one" + mark + text)[len(context) :]
    assert committed + proposer(target, drafter).propose(committed, context, drafted) == written(
        target, "one" + mark + text
    )


@pytest.mark.parametrize("target", KINDS)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_draft_is_turned_without_an_error(target, data):
    drafter = data.draw(st.sampled_from(KINDS))
    vocabulary = VOCABULARIES[target]
    ids = st.lists(st.integers(-2, VOCABULARIES[drafter].size + 2), max_size=12)
    committed = data.draw(st.lists(st.integers(0, vocabulary.size - 1), max_size=12))
    proposed = proposer(target, drafter, lookbehind=data.draw(st.integers(0, 4))).propose(
        committed, data.draw(ids), data.draw(ids)
    )
    assert all(0 <= i < vocabulary.size for i in proposed)
    assert vocabulary.unknown is None or vocabulary.unknown not in proposed


@pytest.mark.parametrize("target", BYTE_LEVEL)
@given(head=st.text(max_size=20), tail=st.text(max_size=20))
@settings(max_examples=80, deadline=None)
def test_the_text_proposed_is_the_text_drafted(target, head, tail):
    drafter = "byte_a" if target == "byte_b" else "byte_b"
    proposed = proposer(target, drafter).propose(written(target, head), written(drafter, head), written(drafter, tail))
    assert VOCABULARIES[target].bytes_of(proposed) == tail.encode()
