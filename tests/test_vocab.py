"""What ids stand for, and which ids of two tokenizers mean the same."""

import copy
import gc
import threading
import weakref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from toy_tokenizers import BYTE_LEVEL, KINDS, MARKERS, TEXTS, build
from transformers import ByT5Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from specdec_fast.vocab import Intersection, Vocabulary, intersection, match_specials, same_tokenizer

LOSSLESS = (*BYTE_LEVEL, "sentencepiece_first", "sentencepiece_always", "sentencepiece_never", "sentencepiece_legacy")


def pairs_of(result: Intersection) -> list[tuple[int, int]]:
    return list(zip(result.target_ids.tolist(), result.drafter_ids.tolist(), strict=True))


def everything(target: Vocabulary, drafter: Vocabulary) -> Intersection:
    return intersection(target, drafter, target_size=target.size, drafter_size=drafter.size)


@pytest.mark.parametrize("kind", BYTE_LEVEL)
def test_byte_level_pieces_are_decoded_from_the_byte_alphabet(kind):
    tokenizer = build(kind)
    vocabulary = Vocabulary.of(tokenizer)
    letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
    for piece, i in tokenizer.get_vocab().items():
        if i not in vocabulary.specials:
            assert vocabulary.token_bytes[i] == bytes(letters[letter] for letter in piece)
    assert vocabulary.id_of(b"\n") == tokenizer.convert_tokens_to_ids("Ċ")
    assert all(vocabulary.id_of(bytes([byte])) is not None for byte in range(256))


@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_a_text_are_its_bytes(kind, text):
    tokenizer = build(kind)
    vocabulary = Vocabulary.of(tokenizer)
    data = vocabulary.bytes_of(tokenizer(TEXTS[text]).input_ids)
    assert data == b" " * vocabulary.prefix_space + TEXTS[text].encode()


def test_sentencepiece_byte_tokens_newline_and_leading_space():
    tokenizer = build("sentencepiece_first")
    vocabulary = Vocabulary.of(tokenizer)
    ids = tokenizer.convert_tokens_to_ids(["<0x0A>", "<0xE2>", "▁the", "▁", "<s>"])
    assert [vocabulary.token_bytes[i] for i in ids] == [b"\n", b"\xe2", b" the", b" ", None]
    assert vocabulary.bytes_of(ids) == b"\n\xe2 the "


def test_where_ids_share_bytes_the_encoder_decides():
    tokenizer = build("sentencepiece_first")
    vocabulary = Vocabulary.of(tokenizer)
    fallback, letter = tokenizer.convert_tokens_to_ids(["<0x65>", "e"])
    assert vocabulary.token_bytes[fallback] == vocabulary.token_bytes[letter] == b"e"
    assert vocabulary.aliases[b"e"] == [fallback, letter]
    assert vocabulary.id_of(b"e") == letter  # the higher one: "e" is not written with the byte token
    assert vocabulary.id_of(b"\n") == tokenizer.convert_tokens_to_ids("<0x0A>")
    by_hand = Vocabulary([b"b", b"a", b"a", None])
    assert (by_hand.id_of(b"a"), by_hand.id_of(b"c")) == (1, None)


def test_wordpiece_pieces_stand_for_their_text_in_mid_sentence():
    tokenizer = build("wordpiece")
    vocabulary = Vocabulary.of(tokenizer)
    for piece, expected in {"the": b" the", "##s": b"s", ".": b".", "(": b" ("}.items():
        assert vocabulary.token_bytes[tokenizer.convert_tokens_to_ids(piece)] == expected
    ids = tokenizer(TEXTS["english"], add_special_tokens=False).input_ids
    assert vocabulary.bytes_of(ids).decode() == " " + tokenizer.backend_tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_specials_have_roles_and_text_but_no_bytes(kind):
    tokenizer = build(kind)
    vocabulary = Vocabulary.of(tokenizer)
    assert vocabulary.roles == {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "pad": tokenizer.pad_token_id,
        "unk": tokenizer.unk_token_id,
    }
    assert {i: tokenizer.convert_ids_to_tokens(i) for i in tokenizer.all_special_ids} == vocabulary.specials
    assert set(MARKERS) <= set(vocabulary.specials.values())
    assert all(vocabulary.token_bytes[i] is None for i in vocabulary.specials)
    assert vocabulary.bytes_of([*vocabulary.specials, -1, vocabulary.size + 7]) == b""


def test_added_plain_tokens_are_text():
    tokenizer = build("byte_a")
    tokenizer.add_tokens(["        ", AddedToken("<think>", special=False), "é→"])
    vocabulary = Vocabulary.of(tokenizer)
    for text in ("        ", "<think>", "é→"):
        assert vocabulary.token_bytes[tokenizer.convert_tokens_to_ids(text)] == text.encode()


def test_a_tokenizer_without_backend_is_read_by_its_pieces():
    tokenizer = ByT5Tokenizer()
    vocabulary = Vocabulary.of(tokenizer)
    text = TEXTS["other"]
    assert vocabulary.bytes_of(tokenizer(text).input_ids) == text.encode()
    assert [vocabulary.id_of(bytes([byte])) for byte in range(256)] == list(range(3, 259))
    target = Vocabulary.of(build("byte_a"))
    assert len(everything(target, vocabulary).target_ids) == 256 + 1  # every byte, and the end


def test_one_vocabulary_a_tokenizer_made_anew_when_tokens_are_added():
    tokenizer = build("byte_a")
    first = Vocabulary.of(tokenizer)
    assert Vocabulary.of(tokenizer) is first
    tokenizer.add_tokens(["zzzz"])
    second = Vocabulary.of(tokenizer)
    assert second is not first
    assert (first.id_of(b"zzzz"), second.id_of(b"zzzz")) == (None, first.size)
    gone = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert gone() is None


def test_vocabulary_is_made_once_by_many_threads():
    tokenizer, made = build("byte_b"), []
    threads = [threading.Thread(target=lambda: made.append(Vocabulary.of(tokenizer))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(vocabulary) for vocabulary in made}) == 1


def test_padding_and_truncation_of_the_tokenizer_are_neither_used_nor_changed():
    tokenizer = build("byte_a")
    tokenizer(["a text"], padding="max_length", truncation=True, max_length=4)
    before = tokenizer.backend_tokenizer.to_str()
    ids, starts = Vocabulary.of(tokenizer).encode("a text of more than four tokens")
    assert len(ids) == len(starts) > 4
    assert Vocabulary.of(tokenizer).bytes_of(ids) == b"a text of more than four tokens"
    assert tokenizer.backend_tokenizer.to_str() == before


@pytest.mark.parametrize("kind", KINDS)
def test_encode_inside_puts_no_space_before_the_text(kind):
    vocabulary = Vocabulary.of(build(kind))
    for text in ("ship", " ship", "\nships"):
        ids, starts = vocabulary.encode_inside(text)
        assert starts == sorted(starts)
        if kind in LOSSLESS:
            assert vocabulary.bytes_of(ids) == text.encode()


# ---- same tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_is_the_same_as_its_copy_and_as_no_other(kind):
    vocabulary = Vocabulary.of(build(kind))
    assert same_tokenizer(vocabulary, Vocabulary.of(copy.deepcopy(build(kind))))
    for other in KINDS:
        # The SentencePiece kinds differ in how they begin a text, not in what their ids mean.
        expected = kind == other or {kind[:5], other[:5]} == {"sente"}
        assert same_tokenizer(vocabulary, Vocabulary.of(build(other))) is expected


def test_padded_logits_do_not_make_tokenizers_differ():
    vocabulary = Vocabulary.of(build("byte_a"))
    other = Vocabulary.of(build("byte_a"))
    assert same_tokenizer(vocabulary, other, 448, 512)
    assert same_tokenizer(vocabulary, other, vocabulary.size, 512)
    assert not same_tokenizer(vocabulary, other, 512, vocabulary.size - 1)  # an id the other cannot read


def test_equal_sizes_do_not_make_tokenizers_the_same():
    one = [bytes([byte]) for byte in range(256)]
    assert not same_tokenizer(Vocabulary(one), Vocabulary(one[::-1]))
    assert not same_tokenizer(Vocabulary(one), Vocabulary([*one[:255], b"xx"]))
    assert not same_tokenizer(Vocabulary(one), Vocabulary([*one, b"more"]))  # trained further
    assert not same_tokenizer(Vocabulary([]), Vocabulary([]))


def test_only_added_tokens_may_be_missing_on_one_side():
    tokenizer = build("byte_a")
    more = build("byte_a")
    more.add_tokens(["<tool>"])
    more.add_tokens(["<|call|>"], special_tokens=True)
    plain, rich = Vocabulary.of(tokenizer), Vocabulary.of(more)
    assert same_tokenizer(plain, rich) and same_tokenizer(rich, plain)
    assert not same_tokenizer(rich, plain, 512, plain.size)  # the other model has no row for them


def test_specials_are_compared_by_text():
    base = [b"a", b"b", None]
    assert same_tokenizer(Vocabulary(base, specials={2: "</s>"}), Vocabulary(base, specials={2: "</s>"}))
    assert not same_tokenizer(Vocabulary(base, specials={2: "</s>"}), Vocabulary(base, specials={2: "<s>"}))
    plain = Vocabulary([b"a", b"b", b"<think>"], added=[2])
    assert same_tokenizer(Vocabulary(base, specials={2: "<think>"}), plain)  # declared special in one only


# ---- intersection


def brute_force(target: Vocabulary, drafter: Vocabulary, target_size: int, drafter_size: int) -> set[tuple[int, int]]:
    pairs = set()
    for t in range(min(target.size, target_size)):
        for d in range(min(drafter.size, drafter_size)):
            data = target.token_bytes[t]
            if data and data == drafter.token_bytes[d] and target.id_of(data) == t and drafter.id_of(data) == d:
                pairs.add((t, d))
    return pairs


@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("drafter", ["byte_b", "sentencepiece_first", "wordpiece"])
def test_intersection_is_byte_exact(target, drafter):
    t, d = Vocabulary.of(build(target)), Vocabulary.of(build(drafter))
    pairs = pairs_of(intersection(t, d, target_size=400, drafter_size=390))
    assert [a for a, _ in pairs] == sorted({a for a, _ in pairs})
    assert len({b for _, b in pairs}) == len(pairs)
    text = {(a, b) for a, b in pairs if t.token_bytes[a] is not None}
    assert text == brute_force(t, d, 400, 390)
    assert len(text) > 40
    never = {t.roles["unk"], t.roles["bos"]} - {t.roles["eos"], None}
    assert not never & {a for a, _ in pairs}


def test_intersection_by_bytes_is_larger_than_by_strings():
    one, other = build("byte_a"), build("sentencepiece_first")
    strings = len(one.get_vocab().keys() & other.get_vocab().keys())
    assert len(everything(Vocabulary.of(one), Vocabulary.of(other)).target_ids) > 1.5 * strings


@given(
    st.lists(st.one_of(st.none(), st.binary(max_size=2)), max_size=30),
    st.lists(st.one_of(st.none(), st.binary(max_size=2)), max_size=30),
    st.integers(0, 40),
    st.integers(0, 40),
)
@settings(max_examples=60, deadline=None)
def test_intersection_of_random_vocabularies(left, right, target_size, drafter_size):
    t, d = Vocabulary(left), Vocabulary(right)
    result = intersection(t, d, target_size=target_size, drafter_size=drafter_size)
    assert set(pairs_of(result)) == brute_force(t, d, target_size, drafter_size)
    assert result.target_ids.dtype == result.drafter_ids.dtype
    assert result.target_ids.shape == result.drafter_ids.shape == (len(brute_force(t, d, target_size, drafter_size)),)


def test_markers_match_by_text_else_by_role_and_unknown_never():
    t = Vocabulary(
        [b"a"],
        specials={1: "<s>", 2: "</s>", 3: "<unk>", 4: "<pad>", 5: "<|im_end|>"},
        roles={"bos": 1, "eos": 2, "unk": 3, "pad": 4},
    )
    d = Vocabulary(
        [None] * 6,
        specials={0: "<unk>", 1: "<|im_end|>", 2: "<|end|>", 3: "<s>", 4: "<pad>", 5: "<other>"},
        roles={"bos": 3, "eos": 2, "unk": 0, "pad": 4},
    )
    assert pairs_of(everything(t, d)) == [(2, 2), (5, 1)]  # the ends by role, the marker by text
    assert match_specials(t, d) == {1: 3, 2: 2, 4: 4, 5: 1}


def test_a_marker_with_the_same_text_goes_before_one_with_the_same_role():
    t = Vocabulary([b"a"], specials={1: "<|im_end|>"}, roles={"eos": 1})
    d = Vocabulary([b"a"], specials={1: "<|end|>", 2: "<|im_end|>"}, roles={"eos": 1})
    assert pairs_of(everything(t, d)) == [(0, 0), (1, 2)]


def test_eos_is_kept_where_it_is_the_unknown_and_the_padding_too():
    gpt2 = Vocabulary([b"a"], specials={1: "<|endoftext|>"}, roles={"bos": 1, "eos": 1, "unk": 1, "pad": 1})
    llama = Vocabulary([b"b", b"a"], specials={2: "</s>"}, roles={"eos": 2})
    assert pairs_of(everything(gpt2, llama)) == [(0, 1), (1, 2)]
    assert pairs_of(everything(llama, gpt2)) == [(1, 0), (2, 1)]


def test_nothing_in_common():
    result = intersection(Vocabulary([b"a"]), Vocabulary([b"b"]), target_size=1, drafter_size=1)
    assert result.target_ids.shape == result.drafter_ids.shape == (0,)
