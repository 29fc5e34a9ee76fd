"""Projection's map from drafter tokens to target tokens, by bytes; and what comes out of ``fast_generate``."""

import gc
import itertools
import random
import weakref

import pytest
import tiny
import torch
from laws import (
    DRAFTER_PIECES,
    SAMPLING,
    TARGET_PIECES,
    Reading,
    Recorder,
    chi_square,
    joint_law,
    model,
    pair_counts,
    tokenizer,
    warpers,
)
from test_real_vocabularies import load
from toy_tokenizers import BYTE_LEVEL, KINDS, build
from transformers import LogitsProcessor, LogitsProcessorList

from specdec_fast import fast_generate, last_speculation
from specdec_fast.proposal import Place, ProjectedLaw
from specdec_fast.randomness import Purpose
from specdec_fast.token_map import TokenMap, token_map
from specdec_fast.vocab import Vocabulary, shared_markers

SOUND, FAULTY = 1e-4, 1e-6
WIDTH, STEPS = len(TARGET_PIECES), 5
PROMPT = torch.tensor([[1, 2, 5, 3, 4, 1, 2]])
RULES = ("match", "token", "block")


# The map


def spoken(table, k):
    """The target ids of an entry."""
    return [token for token, *_ in table.entry(k)]


def whole_map(target, drafter):
    return token_map(target, drafter, target_size=target.size, drafter_size=drafter.size)


def check_bytes(target, drafter):
    """Every entry says its text or the beginning of it; what is left out cannot be said. Returns how many say all."""
    table = whole_map(target, drafter)
    said, markers = {}, shared_markers(target, drafter)
    for k, d in enumerate(table.drafter_ids.tolist()):
        assert d not in said
        said[d] = spoken(table, k)
    whole = 0
    begin = {data for data in target.token_bytes if data}
    longest = max(map(len, begin))

    def sayable(data):
        return any(data[:n] in begin for n in range(1, longest + 1))

    for d, data in enumerate(drafter.token_bytes):
        if not data:
            assert said.get(d) == ([markers[d]] if d in markers else None)
        elif d not in said:
            assert not sayable(data)
        else:
            text = target.bytes_of(said[d])
            assert data.startswith(text) and text and all(target.token_bytes[t] for t in said[d])
            assert text == data or not sayable(data[len(text) :])
            whole += text == data
            if target.id_of(data) is not None:
                assert said[d] == [target.id_of(data)]
    return whole


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_says_its_own_bytes(kind):
    drafter = Vocabulary.of(build(kind))
    pieces = sum(bool(data) for data in drafter.token_bytes)
    assert check_bytes(Vocabulary.of(build("byte_a" if kind != "byte_a" else "byte_b")), drafter) == pieces
    check_bytes(Vocabulary.of(build("byte_gaps")), drafter)
    check_bytes(drafter, Vocabulary.of(build("byte_a")))


@pytest.mark.parametrize("kind", BYTE_LEVEL)
def test_a_word_is_said_as_the_tokenizer_writes_it(kind):
    """Not in the longest pieces: the target's probability is on its own way of writing."""
    target, drafter = Vocabulary.of(build(kind)), Vocabulary([b" lighthouse keeper", b" counted", b"_width"])
    table = whole_map(target, drafter)
    for k, d in enumerate(table.drafter_ids.tolist()):
        assert spoken(table, k) == target.encode_inside(drafter.token_bytes[d].decode())[0]


def test_bytes_without_a_token_end_the_text():
    target = Vocabulary([b"a", b"b", b"ab", b"\xc3"])
    drafter = Vocabulary([b"abx", b"xab", b"\xc3\xa9", b"abab", b"", None, b"ba"])
    table = whole_map(target, drafter)
    said = {d: spoken(table, k) for k, d in enumerate(table.drafter_ids.tolist())}
    assert said == {0: [2], 2: [3], 3: [2, 2], 6: [1, 0]}


def test_an_encoder_that_changes_the_text_is_not_believed():
    """NFKC writes the ligature as two letters; its bytes are said instead."""
    target = Vocabulary.of(build("nfkc"))
    table = whole_map(target, Vocabulary(["ﬁ".encode()]))
    assert target.bytes_of(spoken(table, 0)) == "ﬁ".encode()


def test_ids_without_logits_are_not_used():
    target, drafter = Vocabulary([b"a", b"b", b"ab"]), Vocabulary([b"ab", b"b", b"a", b"ba"])
    table = token_map(target, drafter, target_size=2, drafter_size=3)
    assert {d: spoken(table, k) for k, d in enumerate(table.drafter_ids.tolist())} == {0: [0, 1], 1: [1], 2: [0]}
    nothing = token_map(target, Vocabulary([b"x"]), target_size=3, drafter_size=1)
    assert len(nothing) == 0


def test_entries_that_begin_alike_stand_side_by_side():
    generator = random.Random(0)
    texts = [(tuple(generator.randrange(3) for _ in range(generator.randint(1, 5))), d) for d in range(200)]
    table = TokenMap.of(texts)
    entries = [tuple(spoken(table, k)) for k in range(len(table))]
    assert sorted(zip(entries, table.drafter_ids.tolist(), strict=True)) == sorted(texts)
    for k, entry in enumerate(entries):
        for j, (_, low, inner, high) in enumerate(table.entry(k)):
            alike = [i for i, other in enumerate(entries) if other[: j + 1] == entry[: j + 1]]
            assert alike == list(range(low, high))
            assert [i for i in alike if len(entries[i]) > j + 1] == list(range(inner, high))
    q = torch.rand(4, 200, dtype=torch.float64)
    heads = torch.stack([q[:, [e[0] == t for e in entries]].sum(1) for t in table.heads.tolist()], 1)
    assert torch.allclose(table.head_masses(q), heads, rtol=0, atol=1e-12)


def test_the_map_is_made_once_and_not_kept_alive():
    target, drafter = Vocabulary([b"a", b"b"]), Vocabulary([b"ab"])
    assert whole_map(target, drafter) is whole_map(target, drafter)
    gone = weakref.ref(whole_map(target, drafter))
    del drafter
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("pair", [("smollm2", "qwen"), ("mistral", "smollm2")])
def test_real_vocabularies(pair):
    target, drafter = (Vocabulary.of(load(name)[0]) for name in pair)
    table = whole_map(target, drafter)
    assert len(table) > 0.99 * drafter.size
    begun = []
    for k in range(0, len(table), 53):
        d = int(table.drafter_ids[k])
        if drafter.token_bytes[d] is not None:
            assert target.bytes_of(spoken(table, k)) == drafter.token_bytes[d]
        begun.append(spoken(table, k))
    assert begun == sorted(begun)


@pytest.mark.parametrize("seed", range(5))
def test_the_law_of_every_place_is_the_sum_over_drafter_tokens(seed):
    generator = random.Random(seed)
    texts = {d: tuple(generator.randrange(4) for _ in range(generator.randint(1, 4))) for d in range(40)}
    table = TokenMap.of((tokens, d) for d, tokens in texts.items())
    scores = torch.randn(2, 40, generator=torch.Generator().manual_seed(seed))
    scores[:, ::7] = -torch.inf
    q = scores[1].double().softmax(-1).tolist()
    mass = {texts[d]: 0.0 for d in texts}
    for k, d in enumerate(table.drafter_ids.tolist()):
        mass[texts[d]] += q[k]
    p = torch.rand(1, 6, dtype=torch.float64)
    for k in range(len(table)):
        low, high = 0, len(table)
        for level, (_, _, inner, end) in enumerate(table.entry(k)):
            told = tuple(spoken(table, k))[:level]
            alike = {text: m for text, m in mass.items() if text[:level] == told and len(text) > level}
            if sum(alike.values()) > 0:
                law = ProjectedLaw(scores, table, [[Place(1, level, low, high)]], torch.zeros(1, 1))
                psi = torch.zeros(6, dtype=torch.float64)
                for text, m in alike.items():
                    psi[text[level]] += m / sum(alike.values())
                rest = law.subtract_from(p, torch.tensor([0]))
                assert torch.allclose(p - rest, psi.unsqueeze(0), rtol=0, atol=1e-14)
            low, high = inner, end


# End to end


def target():
    return model(WIDTH, 31, sharpness=0.8)


def generate(rule, *, rows=2560, prompt=PROMPT, **arguments):
    settings = {
        "do_sample": True,
        "top_k": 0,
        "max_new_tokens": STEPS,
        "num_assistant_tokens": 2,
        "num_return_sequences": rows,
        "seed": 0,
        "method": "projection",
        "verification": rule,
        "assistant_model": model(len(DRAFTER_PIECES), 33, sharpness=0.8),
        "tokenizer": tokenizer(TARGET_PIECES),
        "assistant_tokenizer": tokenizer(DRAFTER_PIECES),
    }
    return fast_generate(target(), prompt, **{**settings, **arguments})[:, prompt.shape[1] :]


def p_values(tokens, **sampling):
    law = joint_law(target(), PROMPT[0], STEPS, warpers(**sampling))
    first, last = law.sum(tuple(range(2, STEPS))), law.sum(tuple(range(STEPS - 2)))
    return chi_square(pair_counts(tokens, 0, WIDTH), first), chi_square(pair_counts(tokens, STEPS - 2, WIDTH), last)


@pytest.mark.parametrize("sampling, rule", [("plain", "match"), ("plain", "token"), ("top_p", "block")])
def test_the_output_has_the_targets_law(sampling, rule):
    tokens = generate(rule, **SAMPLING[sampling])
    assert last_speculation().accepted > 100
    assert min(p_values(tokens, **SAMPLING[sampling])) > SOUND


@pytest.mark.parametrize(
    "arguments",
    [
        {"assistant_temperature": 1.7, "assistant_confidence_threshold": 0.3, "num_assistant_tokens": 4},
        {"num_assistant_tokens_schedule": "heuristic", "num_assistant_tokens": 1},
    ],
    ids=["confidence", "heuristic"],
)
def test_no_knob_of_the_drafter_changes_the_law(arguments):
    assert min(p_values(generate("block", **arguments))) > SOUND


@pytest.mark.parametrize("swap", [(Purpose.RESIDUAL, Purpose.DRAFT), (Purpose.ACCEPT, Purpose.DRAFT)])
def test_shared_noise_is_seen(swap):
    source = Reading(lambda purpose: swap[1] if purpose is swap[0] else purpose)
    assert min(p_values(generate("token", source=source))) < FAULTY


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("more", [{}, {"assistant_confidence_threshold": 0.3}], ids=["", "confidence"])
def test_no_key_is_drawn_twice(rule, more):
    source = Recorder()
    generate(rule, rows=6, max_new_tokens=24, num_assistant_tokens=3, source=source, **more)
    assert not source.repeated(but=Purpose.TARGET)
    own = {Purpose.TARGET} if rule == "match" else {Purpose.ACCEPT, Purpose.RESIDUAL}
    assert {key[3] for key in source.keys} == {Purpose.DRAFT, *own}


@pytest.mark.parametrize("rule", RULES)
def test_a_row_does_not_depend_on_its_batch(rule):
    texts = [[3, 1, 2], [1, 2, 5, 3, 4, 1, 2], [4, 1, 2, 4, 1, 2]]
    ids = torch.tensor([[0] * (7 - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (7 - len(text)) + [1] * len(text) for text in texts])
    same = {"rows": 1, "max_new_tokens": 24, "num_assistant_tokens": 3}
    batch = generate(rule, prompt=ids, attention_mask=mask, pad_token_id=0, seed=[11, 22, 33], **same)
    for row, seed in enumerate([11, 22, 33]):
        alone = generate(rule, prompt=torch.tensor([texts[row]]), seed=[seed], **same)
        assert torch.equal(alone[0], batch[row])


class Nothing(LogitsProcessor):
    """A processor of the caller's own that does nothing: it makes a round go position by position."""

    def __call__(self, input_ids, scores):
        return scores


@pytest.mark.parametrize("rule", ["match", "token"])
def test_one_position_at_a_time_gives_the_same_tokens(rule):
    settings = {"rows": 1, "max_new_tokens": 24, "num_assistant_tokens": 4}
    for seed in range(4):
        in_order = generate(rule, seed=seed, logits_processor=LogitsProcessorList([Nothing()]), **settings)
        assert torch.equal(in_order, generate(rule, seed=seed, **settings))


@pytest.mark.parametrize("rows, padded", [(1, False), (4, True)])
def test_greedy_output_is_the_targets(rows, padded):
    own = {**tiny.drafters()["tli"], "method": "projection", "num_assistant_tokens": 5}
    statistics = tiny.same(
        tiny.taught()[0], tiny.taught_prompts(rows, padded=padded), own, max_new_tokens=40, do_sample=False
    )
    assert statistics.verification == "match" and statistics.accepted > 10


def test_a_draft_never_exceeds_the_lookahead():
    """Whatever the length of the drafter's tokens."""
    own = {**tiny.drafters()["tli"], "method": "projection"}
    for gamma, rule in itertools.product((1, 2, 3), RULES):
        fast_generate(
            tiny.taught()[0],
            **tiny.taught_prompts(4, padded=True),
            **own,
            do_sample=True,
            top_k=0,
            seed=0,
            verification=rule,
            num_assistant_tokens=gamma,
            max_new_tokens=20,
        )
        statistics = last_speculation()
        assert len(statistics.drafted_per_position) == gamma
        assert statistics.accepted_per_position[0] > 0


def test_drafter_scores_that_are_no_law_are_rejected():
    undefined = model(len(DRAFTER_PIECES), 34)
    broken = type(undefined)(undefined.config).eval()
    broken.lm_head.weight.data.fill_(torch.nan)
    none = {"assistant_model": None, "assistant_tokenizer": None, "num_assistant_tokens": None}
    plain = generate("match", rows=8, method="autoregressive", **none)
    for rule in RULES:
        tokens = generate(rule, rows=8, assistant_model=broken)
        assert last_speculation().accepted == 0
        if rule == "match":
            assert torch.equal(tokens, plain)


def test_nothing_the_target_can_say():
    mute = tokenizer(("</s>", "x", "y"))
    tokens = generate("token", rows=4, assistant_model=model(3, 35), assistant_tokenizer=mute, eos_token_id=None)
    assert tokens.shape == (4, STEPS)


def test_refusals():
    with pytest.raises(ValueError, match="method='projection' needs a drafter: pass assistant_model"):
        fast_generate(target(), PROMPT, method="projection", max_new_tokens=2)
    with pytest.raises(ValueError, match="method='projection' needs both tokenizers: pass tokenizer and assistant_tok"):
        fast_generate(target(), PROMPT, method="projection", assistant_model=target(), max_new_tokens=2)
