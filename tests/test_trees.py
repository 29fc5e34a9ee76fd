"""Drafts that branch: what the operations say is what passes over single texts and a plain walk say, bit by bit."""

import copy
import os
import random
import subprocess
import sys

import pytest
import torch
from laws import DRAFTER_PIECES, TARGET_PIECES, chi_square, model, pairs_p_value, tokenizer
from tiny import build_model
from tiny import model as tiny

from specdec_fast import fast_generate, last_speculation, native, reference, runner, trees, warmup
from specdec_fast.branching import Branching, nodes_for
from specdec_fast.costs import Outlook, constant_costs
from specdec_fast.lean import lean_model
from specdec_fast.lean_ops import Choices, Choosing, Index
from specdec_fast.randomness import Philox, Purpose
from specdec_fast.runner import Runner
from specdec_fast.trees import Climbing, Growing, Tree

pytestmark = pytest.mark.skipif(not native.load_ops(), reason="needs the native ops")

WIDTH, OWN = len(TARGET_PIECES), len(DRAFTER_PIECES)
PROMPT = torch.tensor([[1, 2, 5, 3, 4, 1, 2]])
CLIMB = trees.climb
GREEDY, SAMPLED = Climbing(0.0, 0, 1.0, 0.0), Climbing(0.9, 8, 0.95, 0.01)


def wide_heads(**more):
    """Of this width the native pass reads bfloat16 columns in pairs."""
    return build_model("llama", hidden_size=48, head_dim=64, num_attention_heads=6, num_key_value_heads=2, **more)


def wide_windows():
    """The same, with a window that ends within a tree's path."""
    return build_model(
        "mistral", hidden_size=48, head_dim=32, num_attention_heads=6, num_key_value_heads=2, sliding_window=3
    )


def own_token(logits, climbing, seed, position):
    """The target's own token behind ``logits [V]``, by the plain code."""
    if not climbing.temperature:
        return int(logits.argmax())
    return int(first_of(logits, climbing, seed, position, None, 1)[0])


def first_of(logits, law, seed, position, ids, most):
    """The first entries of a race: filters by the operation `softmax`, numbers one by one, times in float64."""
    one = [torch.tensor([part]) for part in (law.temperature, law.top_k, law.top_p, law.min_p)]
    masses = torch.ops.specdec_fast.softmax(logits.unsqueeze(0), one[0].float(), one[1].int(), *one[2:])[0]
    tokens = torch.arange(len(masses)) if ids is None else ids
    u = Philox().uniform(torch.tensor(seed), torch.tensor(position), tokens, Purpose.RACE)
    times = torch.where(masses > 0, -torch.log1p(-u) / masses, torch.inf)
    order = times.sort(stable=True)
    return [int(k) for k, time in zip(order.indices, order.values, strict=True) if time < torch.inf][:most]


# Races -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [3, 61, 2048, 5000])
@pytest.mark.parametrize("restricted", [False, True])
def test_a_race_is_won_as_the_reference_says(width, restricted):
    torch.manual_seed(width)
    logits = 3 * torch.randn(6, width)
    logits[1, ::2] = -torch.inf
    logits[2, 1] = torch.inf
    logits[3] = torch.nan
    logits[4] = -torch.inf
    seed, position = torch.tensor([1, -2, 3, 4, 5, 2**62]), torch.tensor([7, 2**40, 9, 1, 1, 0])
    ids = (2 * torch.arange(width)).int() if restricted else None
    entries, keys = torch.ops.specdec_fast.race(logits, None, None, None, None, seed, position, ids, 4)
    tokens = torch.arange(width) if ids is None else ids.long()
    u = Philox().uniform(seed[:, None], position[:, None], tokens, Purpose.RACE)
    weights = reference.masses(logits)
    assert torch.equal(entries[:, 0], reference.race(weights, u))
    times = torch.where(weights > 0, -torch.log1p(-u) / weights, torch.inf)
    for row in (0, 1, 2, 5):
        n = min(4, int((weights[row] > 0).sum()))
        assert torch.equal(entries[row, :n], times[row].topk(n, largest=False).indices)
        assert torch.allclose(keys[row, :n], times[row, entries[row, :n]], rtol=1e-12)
        assert entries[row, n:].eq(-1).all()
    assert entries[3:5].eq(-1).all()


def test_scores_decide_at_temperature_0():
    logits = torch.randn(2, 5000)
    logits[0, [17, 4000]] = 9.0
    cold, key = torch.zeros(2), torch.zeros(2, dtype=torch.long)
    entries, _ = torch.ops.specdec_fast.race(logits, cold, None, None, None, key, key, None, 3)
    assert entries[0, :2].tolist() == [17, 4000]
    assert torch.equal(entries[1], logits[1].topk(3).indices)


def test_the_winner_has_the_rows_law():
    weights = torch.tensor([0.05, 0.0, 0.6, 0.3, 0.05], dtype=torch.float64)
    draws = 40000
    u = Philox().uniform(torch.tensor(3), torch.arange(draws)[:, None], torch.arange(5), Purpose.RACE)
    counts = reference.race(weights.expand(draws, 5), u).bincount(minlength=5)
    assert chi_square(counts[weights > 0], weights[weights > 0]) > 1e-4
    entries, _ = torch.ops.specdec_fast.race(
        weights.log().float().expand(draws, 5), *[None] * 4, torch.full((draws,), 3), torch.arange(draws), None, 1
    )
    assert torch.equal(entries[:, 0].bincount(minlength=5), counts)


@pytest.mark.parametrize("threads", [1, 2])
def test_long_rows_are_shared_by_threads(threads):
    logits, key = 3 * torch.randn(3, 30011), torch.arange(3)
    logits[1] = logits[1].round()  # many are equal
    u = Philox().uniform(key[:, None], key[:, None], torch.arange(30011), Purpose.RACE)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        entries, _ = torch.ops.specdec_fast.race(logits, *[None] * 4, key, key, None, 7)
        cold, _ = torch.ops.specdec_fast.race(logits, torch.zeros(3), *[None] * 3, key, key, None, 7)
    finally:
        torch.set_num_threads(before)
    times = -torch.log1p(-u) / reference.masses(logits)
    assert torch.equal(entries, times.sort(stable=True).indices[:, :7])
    assert torch.equal(cold, logits.sort(descending=True, stable=True).indices[:, :7])


_RACED = """
import torch
from specdec_fast import native, trees
native.load_ops()
torch.manual_seed(0)
logits, key = 3 * torch.randn(4, 5003), torch.arange(4)
entries, keys = torch.ops.specdec_fast.race(logits, *[None] * 4, key, key, None, 5)
cold, _ = torch.ops.specdec_fast.race(logits, torch.zeros(4), *[None] * 3, key, key, None, 5)
print(entries.tolist(), [[round(k, 12) for k in line] for line in keys.tolist()], cold.tolist())
"""


def test_every_instruction_set_has_the_same_winners():
    said = {}
    for name in ("plain", "avx2", "avx512"):  # one that the machine lacks runs as plain
        environment = {**os.environ, "SPECDEC_FAST_CPU_CAPABILITY": name}
        done = subprocess.run([sys.executable, "-c", _RACED], env=environment, capture_output=True, text=True)
        said[name] = done.stdout
        assert done.returncode == 0, done.stderr
    assert len(set(said.values())) == 1 and said["plain"]


# The target's part -----------------------------------------------------------------------------------------------


def grown(rng, nodes, width, logits_of, climbing, seed, position):
    """A tree of random tokens in which the target's own way is hidden."""
    parents, tokens = [], []
    way, at = [], -1
    for place in range(nodes):
        if rng.random() < 0.4 and len(way) < 4:
            parents.append(at)
            tokens.append(own_token(logits_of([tokens[i] for i in way]), climbing, seed, position + len(way)))
            way.append(place)
            at = place
        else:
            parents.append(rng.randrange(-1, place) if place else -1)
            tokens.append(rng.randrange(width))
    return parents, tokens


def _read(one, row, text):
    """In pieces that run as the operation, so that the cache holds the same however it came about."""
    for begin in range(0, len(text), 8):
        one.read([row], [text[begin : begin + 8]], [1])


@pytest.mark.parametrize("climbing", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", ["llama", "qwen2_windows", "mistral", "wide_heads", "wide_windows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tree_is_judged_as_its_texts_are(kind, dtype, climbing):
    wide = {"wide_heads": wide_heads, "wide_windows": wide_windows}.get(kind)
    own = (wide() if wide else copy.deepcopy(tiny(kind))).to(dtype)
    lean = lean_model(own, rounded=False)
    assert lean is not None
    width, rng = own.config.vocab_size, random.Random(3)
    for columns in ([20, 3], [124, 130], [126, 250]):  # trees across the end of what is read at once, and behind it
        texts = [[rng.randrange(width) for _ in range(n)] for n in columns]
        first = [rng.randrange(width) for _ in columns]
        seed, position = [5, 6], [n + 1 for n in columns]

        def logits_of(row, path, texts=texts, first=first):
            single = Runner(own, 1, lean=lean)
            _read(single, 0, texts[row])
            return single.read([0], [[first[row], *path]], [1])[0, -1]

        made = [
            grown(rng, 7, width, lambda path, r=r: logits_of(r, path), climbing, seed[r], position[r])
            for r in range(len(columns))
        ]
        tree = Tree([t for _, t in made], [p for p, _ in made], [[0] * 7] * len(made), [1] * len(made))
        joint = Runner(own, len(columns), lean=lean)
        for row in (0, 1):
            _read(joint, row, texts[row])
        said = joint.climb([0, 1], first, tree, climbing, (seed, position))
        for row in (0, 1):
            path, node = [], -1
            while True:
                token = own_token(
                    logits_of(row, [tree.tokens[row][i] for i in path]), climbing, seed[row], position[row] + len(path)
                )
                behind = [i for i, p in enumerate(tree.parents[row]) if p == node and tree.tokens[row][i] == token]
                if not behind:
                    break
                node = behind[0]
                path.append(node)
            assert (said.passed[row], said.token[row]) == (path, token)
            assert joint.length[row] == columns[row] + 1 + len(path)
            tail = [*(tree.tokens[row][i] for i in path), token]
            after = joint.read([row], [[token]], [1])[0, 0]
            # In float32 the last bit hangs on what shares a pass
            rounding = {} if dtype == torch.float32 else {"rtol": 0, "atol": 0}
            torch.testing.assert_close(after, logits_of(row, tail), **rounding)
    assert any(said.passed)


def test_siblings_that_are_no_numbers_touch_nobody():
    own = wide_heads().bfloat16()
    own.model.embed_tokens.weight.data[5] = float("nan")
    lean = lean_model(own, rounded=False)
    said = {}
    for other in (5, 8):
        runner = Runner(own, 1, lean=lean)
        _read(runner, 0, list(range(10, 31)))
        first = int(runner.read([0], [[31]], [1])[0, -1].argmax())
        runner.rollback(0, 21)
        tree = Tree([[other, first, other, first, other]], [[-1, -1, 0, 1, 1]], [[0] * 5], [1])
        climbed = runner.climb([0], [31], tree, GREEDY, ([5], [23]))
        said[other] = (climbed.passed[0], climbed.token[0], runner.read([0], [[11]], [1])[0, 0].tolist())
    assert said[5] == said[8] and said[5][0][0] == 1


def test_a_row_without_a_tree_beside_one_with():
    own = tiny("llama")
    lean = lean_model(own, rounded=False)
    alone, joint = Runner(own, 2, lean=lean), Runner(own, 2, lean=lean)
    for one in (alone, joint):
        for row, text in enumerate(([1, 2, 3], [4, 5, 6, 7])):
            one.read([row], [text], [1])
    tree = Tree([[], [8, 9]], [[], [-1, -1]], [[], [0, 0]], [0, 1])
    said = joint.climb([0, 1], [3, 2], tree, SAMPLED, ([1, 2], [3, 4]))
    for row in (0, 1):
        single = Tree(*(part[row : row + 1] for part in tree[:4]))
        own_said = alone.climb([row], [[3, 2][row]], single, SAMPLED, ([1 + row], [3 + row]))
        assert (own_said.passed[0], own_said.token[0]) == (said.passed[row], said.token[row])
    assert alone.length == joint.length


def test_no_tree_is_plain_decoding():
    own = tiny("llama")
    lean = lean_model(own, rounded=False)
    runners = [Runner(own, 1, lean=lean) for _ in range(2)]
    for one in runners:
        one.read([0], [[1, 2, 3]], [1])
    said = runners[0].climb([0], [4], Tree.of_chains([[]]), GREEDY, ([1], [2]))
    assert said.passed == [[]]
    assert said.token == runners[1].read([0], [[4]], [1])[0, 0].argmax(-1, keepdim=True).tolist()


def test_scores_that_are_no_law_have_no_token():
    own = tiny("llama")
    form = type(lean_model(own, rounded=False))(own, rounded=False)
    form._weights = [*form._weights[:-1], torch.full_like(form._weights[-1], torch.nan)]
    for climbing in (GREEDY, SAMPLED):
        one = Runner(own, 1, lean=form)
        one.read([0], [[1, 2, 3]], [1])
        assert one.climb([0], [4], Tree.of_chains([[3]]), climbing, ([1], [2])).token == [-1]


@pytest.mark.parametrize(
    "change",
    [{"session": 10**9}, {"rows": 0}, {"count": 2}, {"column": 10**6}, {"hidden": -1}, {"parent": 0}, {"parent": -2}],
    ids=str,
)
def test_what_is_wrong_with_a_tree_is_said(change):
    own = tiny("llama")
    lean = lean_model(own, rounded=False)
    one = Runner(own, 1, lean=lean)
    one.read([0], [[1, 2]], [1])
    session = one.caches[0][1].session
    given = {
        "session": session.number, "rows": 1, "most": 1, "top_k": 0, "memory": 0,
        "scores": 0, "sums": 0, "index": 0, "laws": 0, "entries": 0,
        "first": 7, "count": 1, "row": 0, "column": 2, "hidden": 0, "seed": 5, "start": 2, "token": 3, "parent": -1,
    }  # fmt: skip
    assert len(torch.ops.specdec_fast.llama_climb(list(given.values()), [0.0, 1.0, 0.0])) == 5
    given |= change
    with pytest.raises(RuntimeError, match="llama"):
        session.told("climb", list(given.values()), [0.0, 1.0, 0.0], 5)


# The drafter's part ----------------------------------------------------------------------------------------------


def plainly_grown(logits_of, growing, least, choosing, choices, index, seed, position):
    """A tree as csrc/branch.cpp says it grows, from the logits of single texts."""
    nodes, paths = [], []  # (entry, parent, depth, level, chance)

    def add(parent):
        path = [] if parent < 0 else paths[parent]
        logits = logits_of([choices[k] for k in path])
        chance, depth = (1.0, 1) if parent < 0 else (nodes[parent][4], nodes[parent][2] + 1)
        if choosing.temperature:
            law = Climbing(choosing.temperature, choosing.top_k, choosing.top_p, choosing.min_p)
            order = first_of(logits, law, seed, position + depth - 1, index, growing.most)
            keys = torch.ops.specdec_fast.race(
                logits.unsqueeze(0),
                *(
                    torch.tensor([v], dtype=t)
                    for v, t in zip(law[:4], (torch.float32, torch.int32, *[torch.float32] * 2), strict=True)
                ),
                torch.tensor([seed]),
                torch.tensor([position + depth - 1]),
                index.int(),
                growing.most,
            )[1][0, : len(order)]
            masses = (1 / keys) / (1 / keys).sum()
        else:
            order = logits.sort(descending=True, stable=True).indices[: growing.most].tolist()
            masses = logits.double().softmax(-1)[order]
        for i, (entry, mass) in enumerate(zip(order, masses.tolist(), strict=True)):
            steps = len(growing.sure)
            level = min(int(mass**0.5 * steps), steps - 1)
            reach = chance * growing.sure[level]
            if reach >= least or (parent < 0 and i == 0):
                nodes.append((entry, parent, depth, level, reach))
                paths.append([*path, entry])

    add(-1)
    passes = 1
    for depth in range(1, growing.deepest + 1):
        best = sorted(range(len(nodes)), key=lambda i: -nodes[i][4])[: growing.most]
        kept = sorted(best)
        now = {old: new for new, old in enumerate(kept)}
        nodes[:] = [(e, now.get(p, -1), d, lv, c) for e, p, d, lv, c in (nodes[i] for i in kept)]
        paths[:] = [paths[i] for i in kept]
        if depth == growing.deepest:
            break
        lowest = min(c for *_, c in nodes) if len(nodes) == growing.most else 0.0
        going = [
            i for i, (_, _, d, _, c) in enumerate(nodes) if d == depth and c * max(growing.sure) >= max(least, lowest)
        ]
        if not sum(nodes[i][4] for i in going) > growing.worth[depth - 1]:
            break
        passes += 1
        for i in going:
            add(i)
    return [*([n[part] for n in nodes] for part in (0, 1, 3)), passes]


@pytest.mark.parametrize("choosing", [Choosing(), Choosing(1.0), Choosing(0.7, 6, 0.9, 0.02)])
@pytest.mark.parametrize("most", [1, 3, 7, 20])
def test_a_tree_grows_as_single_passes_say(choosing, most):
    own = model(WIDTH, 32, sharpness=0.8)
    choices, index = torch.arange(0, WIDTH, 2), torch.arange(len(range(0, WIDTH, 2))) * 3 + 1
    lean = lean_model(own).restricted(choices)
    texts, seed, position = [[1, 2, 3, 4], [5, 6]], [7, 8], [30, 3]
    sure = [0.9 * ((s + 0.5) / 6) ** 0.7 for s in range(6)]
    growing = [Growing(4, most, sure, [0.05, 0.1, 0.2, 0.0]), Growing(2, most, sure, [0.0, 0.0])]

    def logits_of(row, path):
        single = Runner(own, 1, lean=lean)
        return single.read([0], [texts[row] + path], [1])[0, -1]

    joint = Runner(own, 2, lean=lean)
    keys = seed, position
    written = joint.branch([0, 1], texts, choosing, Choices(choices), Index(index), growing, 0.02, keys)
    for row in (0, 1):
        expected = plainly_grown(
            lambda path, r=row: logits_of(r, path),
            growing[row],
            0.02,
            choosing,
            choices.tolist(),
            index,
            seed[row],
            position[row],
        )
        assert [part[row] for part in (written.entries, written.parents, written.levels, written.passes)] == expected
        assert joint.length[row] == len(texts[row])
        again = joint.read([row], [[9]], [1])[0, 0]
        assert torch.equal(again, logits_of(row, [9])), "nothing of the tree is left"


# Whole calls -----------------------------------------------------------------------------------------------------


def parties(kind):
    if kind == "model":
        return {"method": kind, "assistant_model": model(WIDTH, 32, sharpness=0.8)}
    names = {"tokenizer": tokenizer(TARGET_PIECES), "assistant_tokenizer": tokenizer(DRAFTER_PIECES)}
    return {"method": kind, "assistant_model": model(OWN, 33, sharpness=0.8), **names}


@pytest.fixture(autouse=True)
def _cheap_drafts(monkeypatch):
    """The toys' sizes would say that drafting does not pay."""
    monkeypatch.setattr(warmup, "constant_costs", lambda *_: constant_costs(10**9, 10**6))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", ["model", "tli"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_the_same_tokens_with_trees_chains_and_no_drafter(kind, do_sample, rows, climbed):
    target = model(WIDTH, 31, sharpness=0.8)
    prompt = torch.cat([PROMPT, PROMPT.flip(1), PROMPT])[:rows]
    mask = torch.ones_like(prompt)
    mask[-1, :2] = 0 if rows > 1 else 1
    sampling = {"do_sample": True, "top_k": 9, "temperature": 1.2} if do_sample else {"do_sample": False}
    shared = {**sampling, "seed": 5, "max_new_tokens": 40, "attention_mask": mask, "pad_token_id": 0}
    rule = {"verification": "gumbel"} if do_sample else {}
    text = fast_generate(target, prompt, draft_tree="on", **shared, **parties(kind))
    counts = last_speculation()
    assert counts.verification == ("gumbel" if do_sample else "match")
    assert climbed and any(len(set(t.parents[0])) < len(t.parents[0]) for t, _ in climbed), "some branch"
    assert any(len(set(passed) - {0}) for _, said in climbed for passed in said.passed), "and not only first ones stay"
    assert counts.nodes >= counts.drafted >= counts.accepted > 0
    for other in (
        {"draft_tree": "off", **parties(kind)},
        {"draft_tree": "on", "compile": "off", **parties(kind)},
        {"num_assistant_tokens": 3, **parties(kind)},
        {**parties("tli"), "method": "slem"},
        {"method": "prompt_lookup"},
        {"method": "autoregressive"},
    ):
        assert torch.equal(fast_generate(target, prompt, **shared, **rule, **other), text), other
    if not do_sample:
        del shared["seed"]
        assert torch.equal(target.generate(prompt, **shared), text)


@pytest.mark.parametrize("do_sample", [False, True])
def test_wide_heads_in_bfloat16_write_the_text_of_plain_decoding(do_sample, climbed):
    target = wide_heads(vocabulary=WIDTH).bfloat16()
    shared = {"do_sample": do_sample, "top_k": 0, "seed": 5, "max_new_tokens": 40, "verification": "gumbel"}
    if not do_sample:
        del shared["verification"]
    text = fast_generate(target, PROMPT, draft_tree="on", **shared, **parties("tli"))
    assert any(any(said.passed) for _, said in climbed)
    for other in ({"draft_tree": "off", **parties("tli")}, {"method": "autoregressive"}):
        assert torch.equal(fast_generate(target, PROMPT, **shared, **other), text), other


@pytest.mark.parametrize("do_sample", [False, True])
def test_the_same_tokens_behind_a_prompt_read_in_pieces(do_sample, monkeypatch):
    target = wide_heads(vocabulary=WIDTH).bfloat16()
    lean = lean_model(target, rounded=False)
    if not lean.piece(1):
        pytest.skip("needs a CPU that multiplies bfloat16 in vectors and has no tiles for it")
    monkeypatch.setattr(type(lean), "piece", lambda lean, rows: 0 if lean._rounded else 64 // rows)
    prompt = torch.randint(1, WIDTH - 1, (2, 150), generator=torch.Generator().manual_seed(7))
    shared = {"do_sample": do_sample, "top_k": 0, "seed": 5, "max_new_tokens": 30, "verification": "gumbel"}
    if not do_sample:
        del shared["verification"]
    text = fast_generate(target, prompt, **shared, **parties("tli"))
    assert last_speculation().accepted
    plain = {"method": "autoregressive"}
    assert torch.equal(fast_generate(target, prompt, **shared, **plain), text)
    with monkeypatch.context() as whole:
        whole.setattr(type(lean), "piece", lambda *_: 0)
        whole.setattr(lean, "_most", 1 << 20)
        assert torch.equal(fast_generate(target, prompt, **shared, **plain), text)
    read = Runner._feed

    def fault(one, rows, tokens, count, tail, embeds):  # a piece is read as if it were another
        return read(one, rows, tokens.flip(1) if tokens.shape[1] > 20 else tokens, count, tail, embeds)

    monkeypatch.setattr(Runner, "_feed", fault)
    assert not torch.equal(fast_generate(target, prompt, **shared, **plain), text)


@pytest.mark.parametrize("kind", ["model", "tli"])
@pytest.mark.parametrize("law", [{"temperature": 0.6}, {"top_p": 0.8}, {"min_p": 0.1, "temperature": 1.5}])
def test_the_same_tokens_by_every_law(law, kind):
    target = model(WIDTH, 31, sharpness=0.8)
    shared = {"do_sample": True, "top_k": 0, "seed": 5, "max_new_tokens": 40, **law}
    text = fast_generate(target, PROMPT, draft_tree="on", **shared, **parties(kind))
    assert last_speculation().nodes
    plain = {"method": "autoregressive", "verification": "gumbel", "compile": "off"}
    assert torch.equal(fast_generate(target, PROMPT, **shared, **plain), text)


@pytest.mark.parametrize("kind", ["model", "tli"])
def test_chains_draw_by_the_same_races(kind, plain_drafters):
    """Where they are judged by the operation and where not, by native drafters and by others."""
    target = model(WIDTH, 31, sharpness=0.8)
    shared = {"do_sample": True, "top_k": 0, "seed": 5, "max_new_tokens": 200, "num_assistant_tokens": 3}
    counted = []
    for how in ("auto", "off"):
        fast_generate(target, PROMPT, verification="gumbel", compile=how, **shared, **parties(kind))
        counts = last_speculation()
        assert not counts.nodes
        counted.append((counts.rounds, counts.drafted, counts.accepted))
    assert counted[0] == counted[1]
    fast_generate(target, PROMPT, verification="match", **shared, **parties(kind))
    assert counted[0][2] > 1.3 * last_speculation().accepted, "numbers of their own are met less often"


@pytest.mark.parametrize("change", [{"rows": 6}, {"use_cache": False}, {"repetition_penalty": 1.2}])
def test_no_tree_is_drafted_where_none_is_judged(change, climbed, monkeypatch):
    grown = []
    monkeypatch.setattr(runner.trees, "branch", lambda *given: grown.append(given))
    target, given = model(WIDTH, 31, sharpness=0.8), dict(change)
    prompt = PROMPT.repeat(given.pop("rows", 1), 1)
    fast_generate(
        target, prompt, draft_tree="on", do_sample=True, seed=5, max_new_tokens=20, **given, **parties("model")
    )
    counts = last_speculation()
    assert counts.verification == "gumbel" and counts.drafted and not counts.nodes and not grown


def test_recorded_scores_and_custom_criteria_take_chains():
    target = model(WIDTH, 31, sharpness=0.8)
    shared = {"draft_tree": "on", "seed": 5, "do_sample": True, "top_k": 0, "max_new_tokens": 20, **parties("model")}
    text = fast_generate(target, PROMPT, **shared)
    out = fast_generate(target, PROMPT, return_dict_in_generate=True, output_scores=True, **shared)
    assert torch.equal(out.sequences, text) and not out.speculation.nodes


def test_stops():
    target = model(WIDTH, 31, sharpness=0.8)
    shared = {"draft_tree": "on", "do_sample": False, "pad_token_id": 0, **parties("model")}
    text = fast_generate(target, PROMPT, max_new_tokens=40, **shared)
    eos = int(text[0, PROMPT.shape[1] + 12])
    stopped = fast_generate(target, PROMPT, max_new_tokens=40, eos_token_id=eos, **shared)
    assert torch.equal(stopped, target.generate(PROMPT, max_new_tokens=40, eos_token_id=eos, pad_token_id=0))


@pytest.mark.parametrize("sampling", [{"do_sample": False}, {"do_sample": True, "top_k": 0, "seed": 5}])
@pytest.mark.parametrize("kind", ["model", "tli"])
def test_continuation(kind, sampling):
    target = model(WIDTH, 31, sharpness=0.8)
    shared = {"draft_tree": "on", "attention_mask": torch.ones_like(PROMPT), **sampling, **parties(kind)}
    text = fast_generate(target, PROMPT, max_new_tokens=40, **shared)
    out = fast_generate(target, PROMPT, max_new_tokens=12, return_dict_in_generate=True, **shared)
    shared |= {"past_key_values": out.past_key_values, "attention_mask": torch.ones_like(out.sequences)}
    more = fast_generate(target, out.sequences, max_new_tokens=28, **shared)
    assert torch.equal(more, text) and last_speculation().nodes


def test_a_drafter_whose_positions_end():
    target = model(WIDTH, 31, sharpness=0.8)
    drafter = model(WIDTH, 32, sharpness=0.8)
    drafter.config.max_position_embeddings = 24
    shared = {"do_sample": False, "max_new_tokens": 60}
    text = fast_generate(
        target, PROMPT, method="model", assistant_model=drafter, draft_tree="on", assistant_window=16, **shared
    )
    assert torch.equal(text, target.generate(PROMPT, **shared)) and last_speculation().nodes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "slem"}, "method="),
        ({"verification": "token", "do_sample": True}, "verification='gumbel'"),
        ({"verification": "block", "do_sample": True, "assistant_temperature": 0.0}, "assistant_temperature"),
        ({"num_assistant_tokens": 4}, "num_assistant_tokens_schedule"),
        ({"assistant_confidence_threshold": 0.4}, "assistant_confidence_threshold"),
        ({"stopping_criteria": [lambda *_: torch.zeros(1, dtype=torch.bool)]}, "custom"),
        ({"draft_tree": "never"}, "'auto', 'on', 'off'"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        fast_generate(model(WIDTH, 31), PROMPT, max_new_tokens=4, **{"draft_tree": "on", **parties("tli"), **change})


def test_small_targets_draft_chains_of_themselves():
    fast_generate(model(WIDTH, 31), PROMPT, max_new_tokens=8, **parties("model"))
    assert not last_speculation().nodes


# The output's law ------------------------------------------------------------------------------------------------


def p_value(kind, monkeypatch, target=None):
    """Of the text of many rows, whose trees all run as the operation."""
    target = target or model(WIDTH, 31, sharpness=0.8)
    monkeypatch.setattr(lean_model(target, rounded=False), "_most", 1 << 20)
    text = fast_generate(
        target,
        PROMPT,
        do_sample=True,
        top_k=0,
        max_new_tokens=4,
        num_return_sequences=6000,
        draft_tree="on",
        seed=11,
        **parties(kind),
    )
    return pairs_p_value(copy.deepcopy(target).float(), PROMPT, text, WIDTH)


@pytest.mark.parametrize("kind", ["model", "tli"])
def test_the_output_has_the_targets_law(kind, monkeypatch, climbed):
    assert p_value(kind, monkeypatch) > 1e-4
    assert any(any(said.passed) for _, said in climbed)


def test_wide_heads_in_bfloat16_have_the_targets_law(monkeypatch, climbed):
    assert p_value("tli", monkeypatch, wide_heads(vocabulary=WIDTH).bfloat16()) > 1e-4
    assert any(any(said.passed) for _, said in climbed)


def fault_first_children_stay(lean, first, tree, *rest):
    """The tree is believed where it stands beside what the target says."""
    said = CLIMB(lean, first, tree, *rest)
    token = [line[0] if line and not passed else t for line, passed, t in zip(tree.tokens, *said[:2], strict=True)]
    return said._replace(token=token)


def fault_one_position_for_all(lean, first, tree, places, start, hidden, cache, climbing, seed, position):
    """Races of neighbouring rounds share numbers."""
    return CLIMB(lean, first, tree, places, start, hidden, cache, climbing, seed, [0] * len(position))


@pytest.mark.parametrize("fault", [fault_first_children_stay, fault_one_position_for_all])
def test_a_planted_fault_changes_the_law(fault, monkeypatch):
    monkeypatch.setattr(runner.trees, "climb", fault)
    assert p_value("model", monkeypatch) < 1e-6
    assert p_value("tli", monkeypatch, wide_heads(vocabulary=WIDTH).bfloat16()) < 1e-6


def test_a_planted_fault_changes_greedy_text(monkeypatch):
    monkeypatch.setattr(runner.trees, "climb", fault_first_children_stay)
    target = model(WIDTH, 31, sharpness=0.8)
    shared = {"do_sample": False, "max_new_tokens": 40}
    text = fast_generate(target, PROMPT, draft_tree="on", **shared, **parties("model"))
    assert not torch.equal(text, target.generate(PROMPT, **shared))


# How far trees grow ----------------------------------------------------------------------------------------------


def test_sizes():
    assert [nodes_for(rows) for rows in (1, 2, 3, 8)] == [7, 3, 3, 3]


def test_a_node_is_worth_what_nodes_of_its_confidence_were():
    branching = Branching(1, 15, Outlook(constant_costs(10**8, 10**6)), nodes=7)
    before = branching.growing(0, 8).sure
    assert before == sorted(before) and branching.least([0]) > 0
    for _ in range(40):
        branching.climbed(0, 3, 7, [(2, True), (11, False)])
        branching.update(0, 1, 1)
    sure = branching.growing(0, 8).sure
    assert sure[2] > 0.7 > 0.3 > sure[11]
    assert branching.sure_tested[2] == branching.sure_accepted[2] == 40


def test_what_is_never_accepted_is_no_longer_drafted():
    branching = Branching(1, 15, Outlook(constant_costs(10**8, 2 * 10**7)), nodes=7, horizon=400)
    limits = []
    for _ in range(200):
        limits.append(branching[0])
        if limits[-1]:
            branching.climbed(0, limits[-1], 7, [(5, False)])
        branching.update(0, int(limits[-1] > 0), 0)
    assert limits[0] and limits[-40:].count(0) > 30
