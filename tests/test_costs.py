"""What rounds cost: tables made of samples, kept with the models, and left out of seeded calls."""

import gc
import weakref

import pytest
import torch
from tiny import build_model, make_noisy

from specdec_fast import costs, fast_generate, last_speculation, warmup
from specdec_fast.costs import Costs, Meter, Observed, constant_costs


def metered(passes=((1, 2.0), (4, 5.0)), drafts=((1, 1, 3.0), (3, 1, 5.0)), rests=(0.5,)) -> Meter:
    return Meter(list(passes), list(drafts), list(rests))


def test_a_table_is_filled_between_what_was_measured():
    known = Observed()
    known.take(metered())
    table = known.outlook().costs
    assert table.score == pytest.approx((2.0, 3.0, 4.0, 5.0))
    assert (table.start, table.step, table.rest) == pytest.approx((2.0, 1.0, 0.5))
    assert table.round(0) == pytest.approx(2.5)
    assert table.round(2) == pytest.approx(0.5 + 4.0 + 2.0 + 2 * 1.0)
    assert table.scoring(6) == pytest.approx(7.0)  # beyond it the mean slope


def test_a_longer_pass_may_be_the_quicker_one_but_never_quicker_than_one_position():
    known = Observed()
    known.take(metered(passes=((1, 2.0), (3, 6.0), (4, 3.0), (5, 1.0))))
    assert known.outlook().costs.score == pytest.approx((2.0, 4.0, 6.0, 3.0, 2.0))


def test_a_busy_machine_moves_a_table_little():
    known = Observed()
    busy = [2.0] * 5 + [9.0] * 8
    known.take(metered(passes=[(1, seconds) for seconds in busy] + [(2, 3.0)]))
    assert known.outlook().costs.score[0] == 2.0


def test_old_samples_make_room():
    known = Observed()
    known.take(metered(passes=[(1, 9.0)] * 20 + [(2, 9.0)]))
    known.take(metered(passes=[(1, 4.0)] * costs.SAMPLES))
    assert known.outlook().costs.score[0] == 4.0


def test_a_long_text_to_read_is_told_apart():
    known = Observed()
    known.take(metered(drafts=((1, 1, 3.0), (3, 1, 5.0), (2, 100, 24.0))))
    table = known.outlook().costs
    assert (table.start, table.step) == pytest.approx((2.0, 1.0))
    assert table.read == pytest.approx(0.2)


def test_nothing_is_ready_before_passes_of_two_sizes_and_a_draft():
    known = Observed()
    for meter in (metered(drafts=(), passes=((1, 1.0),)), metered(passes=()), metered(passes=((2, 1.0),))):
        assert not known.ready
        known.take(meter)
    assert known.ready
    with pytest.raises(ValueError, match="run a warm-up first"):
        Observed().outlook()


def test_counts_of_earlier_calls_fade():
    known = Observed()
    for _ in range(50):
        known.count([10.0, 4.0], [5.0, 1.0], ([3.0], [2.0]))
    outlook = known.counted(Costs((1.0,)))
    assert outlook.tested[0] == costs.MEMORY
    assert outlook.accepted[0] / outlook.tested[0] == pytest.approx(0.5)
    assert outlook.accepted[1] / outlook.tested[1] == pytest.approx(0.25)


def test_a_constant_table_hangs_on_sizes_alone():
    table = constant_costs(1000, 100)
    assert table == constant_costs(1000, 100) and not table.measured
    assert table.step == pytest.approx(0.1) and table.round(0) == 1.0
    assert constant_costs(1000, 0).step == 0.0
    assert constant_costs(1000, 1).step == costs.LEAST_DRAFT_COST
    assert constant_costs(1000, 5000).step == costs.MOST_DRAFT_COST


# In calls


@pytest.fixture
def pair(monkeypatch):
    monkeypatch.setattr(warmup, "observed", costs.observed)
    monkeypatch.setattr(warmup, "WORTH_IT", 64)
    target = build_model("llama", seed=3)
    return target, make_noisy(target, 0.2)


def generate(pair, tokens=70, **more):
    target, drafter = pair
    fast_generate(
        target, torch.tensor([[1, 2, 3, 4]]), assistant_model=drafter, do_sample=True, max_new_tokens=tokens, **more
    )
    return last_speculation()


def tables_of(pair):
    return costs._kept.get(pair[0], {}).get(pair[1], {})


def test_a_call_is_measured_for_once(pair, monkeypatch):
    measured = []
    measure = warmup.measure
    monkeypatch.setattr(warmup, "measure", lambda *a, **k: measured.append(1) or measure(*a, **k))
    generate(pair)
    generate(pair)
    assert measured == [1]
    ((shape, known),) = tables_of(pair).items()
    assert shape[:3] == ("model", 1, True)
    assert known.ready and known.outlook().costs.measured


def test_short_and_seeded_calls_are_not_measured_for(pair, monkeypatch):
    monkeypatch.setattr(warmup, "measure", None)
    generate(pair, tokens=8)
    generate(pair, seed=0)
    generate(pair, num_assistant_tokens=3)


def test_a_seeded_call_repeats_whatever_was_measured_before(pair):
    first = generate(pair, seed=5)
    for _ in range(2):
        generate(pair)
    tables = tables_of(pair)
    (known,) = tables.values()
    # As if the machine were another one
    known.take(metered(passes=[(1, 1.0)] * 20 + [(2, 50.0)] * 20, drafts=[(1, 1, 9.0), (4, 1, 90.0)] * 20))
    again = generate(pair, seed=5)
    assert first.drafted_per_position == again.drafted_per_position
    assert first.accepted_per_position == again.accepted_per_position
    assert first.drafted > 0


def test_a_warm_up_leaves_the_generator_and_the_result_alone(pair):
    torch.manual_seed(0)
    inputs = torch.tensor([[1, 2, 3, 4]])
    plain = pair[0].generate(inputs, do_sample=False, max_new_tokens=70)
    before = torch.get_rng_state()
    output = fast_generate(pair[0], inputs, assistant_model=pair[1], do_sample=False, max_new_tokens=70, seed=None)
    drawn = torch.get_rng_state()
    assert torch.equal(output, plain)
    torch.set_rng_state(before)
    torch.randint(-(2**63), 2**63 - 1, ())  # the rows' seeds, and nothing else
    assert torch.equal(torch.get_rng_state(), drawn)


def test_what_was_measured_goes_with_the_models(pair):
    target, drafter = pair
    generate((target, drafter))
    gone = weakref.ref(drafter)
    del drafter, pair
    gc.collect()
    # The fixture holds the pair until the test ends, so a copy stands for it
    copy = make_noisy(target, 0.1)
    generate((target, copy), tokens=70)
    kept = weakref.ref(copy)
    del copy
    gc.collect()
    assert kept() is None and gone() is not None
    assert len(costs._kept[target]) == 1


def test_parts_that_a_call_did_not_run_keep_pace_with_the_machine():
    known = Observed()
    known.take(metered(passes=[(1, 2.0)] * 9 + [(3, 3.0)] * 9, drafts=[(1, 1, 1.0), (3, 1, 3.0), (2, 100, 12.0)]))
    before = known.outlook().costs
    known.take(metered(passes=[(1, 1.0)] * 20, drafts=()))  # twice as fast, and nothing was drafted
    after = known.outlook().costs
    assert after.score == pytest.approx([seconds / 2 for seconds in before.score])
    assert (after.step, after.start, after.read) == pytest.approx((before.step / 2, before.start / 2, before.read / 2))
    assert after.rest == before.rest  # no pass


def test_a_round_with_a_draft_costs_what_verifying_it_adds():
    known = Observed()
    known.take(Meter([(1, 2.0), (4, 5.0)], [(1, 1, 3.0), (3, 1, 5.0)], [0.5] * 5, [0.9] * 5))
    table = known.outlook().costs
    assert (table.rest, table.start) == pytest.approx((0.5, 2.4))
    known = Observed()
    known.take(Meter([(1, 2.0), (4, 5.0)], [(1, 1, 3.0), (3, 1, 5.0)], [], [0.9] * 5))
    table = known.outlook().costs
    assert (table.rest, table.start) == pytest.approx((0.9, 2.0))


def test_few_passes_say_nothing_of_the_pace():
    known = Observed()
    known.take(metered(passes=[(1, 2.0)] * 9 + [(3, 3.0)] * 9))
    known.take(metered(passes=[(1, 9.0)] * (costs.PACE - 1) + [(6, 9.0)] * 9, drafts=()))
    assert known.outlook().costs.score[:3] == pytest.approx((2.0, 2.5, 3.0))


def test_a_warm_up_compares_parts_at_one_pace(monkeypatch):
    """The clock runs at half and at double speed in turns; what passes cost beside each other stays."""
    now, pace, work = [0.0], [1.0], {1: 1.0, 2: 1.2, 3: 1.4, 4: 1.6, 6: 2.0, 8: 2.4, 10: 2.8, 16: 4.0}

    class Target:
        positions, again = 999, 0

        def feed(self, rows, tokens, count, tail):
            now[0] += pace[0] * work.get(tokens.shape[1], 1.0)
            self.fed = tokens.shape[1]

        def rollback(self, row, length):
            if self.fed != 1:  # a pass of one position and what is timed next to it share a pace
                pace[0] = 2.5 - pace[0]

    class Slow:
        translate_seconds = 0.0

        def propose(self, rows, active, limit, draws):
            now[0] += pace[0] * (0.5 + 0.25 * max(limit))
            pace[0] = 2.5 - pace[0]

    monkeypatch.setattr(warmup.time, "perf_counter", lambda: now[0])
    known = Observed()
    known.take(warmup.measure(Target, Slow(), [[1, 2, 3, 4]], torch.device("cpu"), budget=float("inf"), repetitions=4))
    table = known.outlook().costs
    assert [table.scoring(size) / table.scoring(1) for size in work] == pytest.approx(list(work.values()))
    assert table.step / table.scoring(1) == pytest.approx(0.25) and table.start / table.scoring(1) == pytest.approx(0.5)


def test_the_prompts_pass_is_no_rest(pair, monkeypatch):
    taken = []
    monkeypatch.setattr(Observed, "take", lambda self, meter: taken.append(meter))
    generate(pair)
    meter = taken[-1]
    assert len(meter.rests) + len(meter.judged) == len(meter.passes) == last_speculation().rounds - 1
