"""Models that read what an encoder made: passes and rollbacks against plain passes, rows at different columns."""

import random

import pytest
import torch
from sources import START, WRITERS, build_writer, decoder_of, noisy_writer, source, writer
from tiny import PAD, VOCABULARY

from specdec_fast import apart, encoded, fast_generate
from specdec_fast.encoded import AHEAD, EncodedRunner, why_not_encoded
from specdec_fast.encoding import CrossLayer, Encoded
from specdec_fast.trial import trial_ids


@torch.no_grad()
def read(target, kind, rows, *, padded=False):
    """What the encoder makes of ``rows`` sources."""
    inputs = source(kind, rows, padded=padded)
    return Encoded(target.get_encoder()(**inputs), inputs.get("attention_mask"))


@torch.no_grad()
def plain(target, ids, made, row, mask=None):
    """Logits of a pass over a whole text, without a cache."""
    outputs, hidden = made.of([row])
    more = {} if hidden is None else {"attention_mask": hidden}
    more |= {} if mask is None else {"decoder_attention_mask": mask}
    return target(decoder_input_ids=ids, encoder_outputs=outputs, use_cache=False, **more).logits[0]


def own_passes(target, rows, made, apart=True, twin=True):
    return EncodedRunner(target, rows, encoded=made, joint=apart, twin=twin)


def walk(kind, rows, *, padded, moves=40, seed=0, runner=own_passes, **settings):
    """Feeds and rolls back at random; the largest difference to plain passes over the same texts."""
    dice, target = random.Random(seed), writer(kind)
    made = read(target, kind, rows, padded=padded)
    runner = runner(target, rows, made, **settings)
    texts, worst = [[START] for _ in range(rows)], 0.0
    runner.feed(range(rows), torch.tensor(texts), [1] * rows, [1] * rows)
    for _ in range(moves):
        some = sorted(dice.sample(range(rows), dice.randint(1, rows)))
        for row in some:
            length = max(len(texts[row]) - dice.choice([0, 0, 1, 2, 3, 5, 30]), 1)
            del texts[row][length:]
            runner.rollback(row, length)
        count = [min(dice.choice([1, 1, 2, 3, 5, 12]), 60 - len(texts[row])) for row in some]
        if min(count) < 1:
            break
        tail = [dice.randint(1, n) for n in count]
        new = [[dice.randrange(3, VOCABULARY) for _ in range(n)] for n in count]
        tokens = torch.tensor([line + [PAD] * (max(count) - len(line)) for line in new])
        got = runner.feed(some, tokens, count, tail)
        for r, row in enumerate(some):
            texts[row] += new[r]
            assert runner.length[row] == len(texts[row])
            whole = plain(target, torch.tensor([texts[row]]), made, row)[-tail[r] :]
            worst = max(worst, float((whole - got[r, : tail[r]]).abs().max()))
    return worst


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "level"])
@pytest.mark.parametrize("kind", WRITERS)
def test_a_row_gives_what_plain_passes_over_its_text_give(kind, padded, passes):
    assert walk(kind, 3, padded=padded) < 1e-3
    assert 20 < len(passes) <= 41  # rows at different columns share them


@pytest.mark.parametrize("twin", [True, False], ids=["twin", "itself"])
@pytest.mark.parametrize("kind", WRITERS)
def test_so_it_does_where_rows_ahead_read_again(kind, twin):
    assert walk(kind, 3, padded=True, apart=False, twin=twin) < 1e-3


@pytest.mark.parametrize("kind", ["whisper", "t5gemma", "moonshine"])
def test_so_it_does_where_the_model_takes_positions(kind):
    assert walk(kind, 3, padded=True, twin=False) < 1e-3


@pytest.fixture
def passes(monkeypatch):
    """Rows of each pass, with how many lanes it has."""
    forward, found = EncodedRunner._model_forward, []

    def counted(self, rows, tokens, *arguments):
        found.append([tokens.shape[1]] * len(rows))
        return forward(self, rows, tokens, *arguments)

    monkeypatch.setattr(EncodedRunner, "_model_forward", counted)
    return found


def test_rows_ahead_read_again_what_brings_them_to_those_behind(passes):
    runner = EncodedRunner(writer("bart"), 2, encoded=read(writer("bart"), "bart", 2), joint=False)
    limit = int(AHEAD / 2**0.5)
    one = torch.full((2, 1), 7)
    runner.feed([0, 1], one, [1, 1], [1, 1])
    runner.feed([1], one[:1].repeat(1, limit), [limit], [1])
    del passes[:]
    runner.feed([0, 1], one, [1, 1], [1, 1])
    assert passes == [[limit + 1] * 2] and runner.length == [2, limit + 2]
    runner.feed([1], one[:1], [1], [1])
    del passes[:]
    runner.feed([0, 1], one, [1, 1], [1, 1])  # too far apart
    assert passes == [[1], [1]] and runner.length == [3, limit + 4]


@pytest.mark.parametrize("kind", ["t5", "bart", "whisper"])
def test_rows_may_begin_one_after_the_other(kind):
    made, ids = read(writer(kind), kind, 3), torch.arange(3, 15).view(3, 4)
    runner = EncodedRunner(writer(kind), 3, encoded=made)
    for some in ([2], [0, 1]):
        runner.feed(some, ids[some, :2], [2] * len(some), [1] * len(some))
    got = runner.feed([0, 1, 2], ids[:, 2:], [2] * 3, [2] * 3)
    for row in range(3):
        assert torch.allclose(got[row], plain(writer(kind), ids[row : row + 1], made, row)[-2:], atol=1e-3)


def test_the_source_is_read_once(monkeypatch):
    calls, update = [], CrossLayer.update
    same = {"assistant_model": noisy_writer("t5"), "max_new_tokens": 20}
    fast_generate(writer("t5"), **source("t5", 3), **same)  # both are tried
    monkeypatch.setattr(CrossLayer, "update", lambda self, *a, **k: calls.append(1) or update(self, *a, **k))
    fast_generate(writer("t5"), **source("t5", 3), **same)
    assert len(calls) == 2 * 2  # layers of the target and of the drafter


# Planted faults -----------------------------------------------------------------------------------------------------


def of_another_row(self, rows):
    """Every row reads the first row's source."""
    return CHOOSE(self, [0] * len(rows) if self._all is not None else rows)


CHOOSE = CrossLayer.choose


@pytest.mark.parametrize("kind", ["t5", "bart", "whisper"])
def test_a_source_of_another_row_is_found(kind, monkeypatch):
    monkeypatch.setattr(CrossLayer, "choose", of_another_row)
    assert walk(kind, 3, padded=False) > 0.05


@pytest.mark.parametrize("kind", [kind for kind in WRITERS if kind not in ("whisper", "t5gemma", "moonshine")])
def test_rows_where_they_do_not_stand_are_found(kind, monkeypatch):
    monkeypatch.setattr(apart, "_shifts", lambda: None)
    assert walk(kind, 3, padded=False) > 0.05
    target = build_writer(kind, seed=2)
    made = read(target, kind, 2)
    assert why_not_encoded(target, made) is None and not encoded._shares(target, made, True)


@pytest.mark.parametrize("kind", ["t5", "bart", "whisper"])
def test_what_is_not_read_again_is_found(kind, monkeypatch):
    def behind(self, rows, tokens, columns, count, unit, embeds, lanes):
        tokens = tokens.clone()
        tokens[:, : tokens.shape[1] - max(1, len(lanes))] = 3  # other tokens in the place of those read again
        return FORWARD(self, rows, tokens, columns, count, unit, embeds, lanes)

    monkeypatch.setattr(EncodedRunner, "_model_forward", behind)
    assert walk(kind, 3, padded=False, apart=False) > 0.05


FORWARD = EncodedRunner._model_forward


# Which models can ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WRITERS)
def test_models_that_can(kind):
    made = read(writer(kind), kind, 2)
    assert why_not_encoded(writer(kind), made) is None
    assert encoded.found_of(writer(kind), made) == (None, True, True, PAD if kind == "m2m" else None)
    assert encoded._shares(writer(kind), made, True)
    assert encoded._shares(writer(kind), made, False) is (kind in ("whisper", "t5gemma", "moonshine"))


def test_a_model_whose_twin_gives_other_scores_runs_itself(monkeypatch):
    monkeypatch.setattr(
        apart._Head, "forward", lambda self, hidden: self.own(hidden) + 0 * hidden.sum() + hidden[..., :1]
    )
    target = build_writer("bart", seed=2)
    made = read(target, "bart", 2)
    assert why_not_encoded(target, made) is None and not encoded.found_of(target, made).twin
    same = fast_generate(target, **source("bart", 2), max_new_tokens=12, prompt_lookup_num_tokens=3)
    assert torch.equal(same, target.generate(**source("bart", 2), max_new_tokens=12))


def test_a_twin_is_made_anew_where_the_model_has_changed():
    target = build_writer("bart", seed=2)
    made = apart.twin_apart(target)
    assert made is not target and apart.twin_apart(target) is made
    assert made.lm_head.own.weight is target.lm_head.weight
    target.model.decoder.layers = target.model.decoder.layers[:1]
    assert apart.twin_apart(target) is not made


def test_padding_behind_which_positions_are_counted_anew():
    target = writer("m2m")
    made, dice = read(target, "m2m", 2), torch.Generator().manual_seed(0)
    why_not_encoded(target, made)
    text = torch.randint(3, VOCABULARY, (2, 12), generator=dice)
    text[0, 3], text[1, 6], text[0, 9] = PAD, PAD, PAD
    steps, spans = (EncodedRunner(target, 2, encoded=made) for _ in range(2))
    first = [runner.feed([0, 1], text[:, :4], [4, 4], [1, 1]) for runner in (steps, spans)]
    assert torch.allclose(*first, atol=1e-4)
    one_by_one = [steps.feed([0, 1], text[:, i : i + 1], [1, 1], [1, 1]) for i in range(4, 12)]
    at_once = spans.feed([0, 1], text[:, 4:], [8, 8], [8, 8])
    assert torch.allclose(torch.cat(one_by_one, 1), at_once, atol=1e-4)
    assert spans.length == [12, 12] and spans._text[0] == text[0].tolist()
    spans.rollback(1, 5)
    again = spans.feed([0, 1], torch.stack([text[1, 5:8], text[1, 5:8]]), [0, 3], [0, 3])
    assert torch.allclose(again[1], at_once[1, 1:4], atol=1e-4)
    spans._stumbles = None  # as if nothing were known of it
    spans.rollback(0, 4)
    wrong = spans.feed([0], text[:1, 4:], [8], [8])
    assert not torch.allclose(wrong, at_once[:1], atol=1e-2)


def test_a_decoder_alone_reads_what_another_encoder_made():
    made = read(writer("whisper"), "whisper", 2)
    assert why_not_encoded(decoder_of(), made) is None
    runner, ids = EncodedRunner(decoder_of(), 2, encoded=made), trial_ids(decoder_of())
    got = runner.feed([0, 1], ids, [7, 7], [7, 7])
    assert torch.allclose(got[1], plain(noisy_writer("whisper"), ids[1:], made, 1), atol=1e-4)


def test_a_model_that_reads_several_tokens_wrongly_is_found(monkeypatch):
    target = build_writer("bart")
    decoder = type(target.model.decoder)
    forward = decoder.forward

    def last_token_sees_nothing(self, input_ids=None, **more):
        output = forward(self, input_ids=input_ids, **more)
        cache = more["cache" if "cache" in more else "past_key_values"]
        if input_ids.shape[1] > 1 and cache is not None and cache.get_seq_length():
            output.last_hidden_state = output.last_hidden_state.roll(1, 1)
        return output

    monkeypatch.setattr(decoder, "forward", last_token_sees_nothing)
    made = read(target, "bart", 1)
    assert "for several tokens than for one" in why_not_encoded(target, made)
    with pytest.raises(ValueError, match=r"^model: BartForConditionalGeneration cannot be rolled back"):
        fast_generate(target, **source("bart"), max_new_tokens=4)


def test_a_passing_memory_error_is_no_refusal(monkeypatch):
    target = build_writer("bart")
    made = read(target, "bart", 1)

    def none_left(*_, **__):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(EncodedRunner, "_model_forward", none_left)
        with pytest.raises(torch.OutOfMemoryError):
            why_not_encoded(target, made)
    assert why_not_encoded(target, made) is None
