"""Trees of draws judged by the law they were drawn from: the proof enumerated, and the operations held to it."""

import copy
import inspect
import itertools
import random

import pytest
import torch
from laws import SAMPLING, TARGET_PIECES, model, pairs_p_value, warpers
from test_trees import parties
from tiny import model as tiny

from specdec_fast import choice, fast_generate, last_speculation, methods, native, reference, runner, trees, warmup
from specdec_fast.branching import DRAWN, Branching
from specdec_fast.costs import Costs, Outlook, constant_costs
from specdec_fast.lean import lean_model
from specdec_fast.lean_ops import Choices, Choosing, Index, Judging, Room, Told
from specdec_fast.ops import RULES
from specdec_fast.randomness import Philox, Purpose
from specdec_fast.runner import Runner
from specdec_fast.trees import Climbing, Growing, Origin

TOKENS = len(TARGET_PIECES)
WIDTH = 3
LENGTH = 4  # tokens of an output whose law is looked at


# The rule, exactly ---------------------------------------------------------------------------------------------------


class Case:
    """A target's and a drafter's law behind every text of a tiny vocabulary."""

    def __init__(self, seed, zeros=False):
        generator = torch.Generator().manual_seed(seed)
        self.p, self.q = {}, {}
        for n in range(LENGTH + 1):
            for text in itertools.product(range(WIDTH), repeat=n):
                for laws in (self.p, self.q):
                    scores = 2 * torch.randn(WIDTH, generator=generator, dtype=torch.float64)
                    if zeros and torch.rand((), generator=generator) < 0.5:
                        scores[int(torch.randint(WIDTH, (), generator=generator))] = -torch.inf
                    laws[text] = scores.softmax(0)

    def mass(self, text):
        """The target's of a text."""
        return float(torch.stack([self.p[text[:i]][t] for i, t in enumerate(text)]).prod()) if text else 1.0


class Tree:
    def __init__(self, tokens=(), parents=()):
        self.tokens, self.parents = tokens, parents

    def text(self, node):
        return () if node < 0 else (*self.text(self.parents[node]), self.tokens[node])

    def children(self, node):
        return [i for i, parent in enumerate(self.parents) if parent == node]

    def undrawn(self, case, node):
        law = case.q[self.text(node)].clone()
        law[[self.tokens[i] for i in self.children(node)]] = 0
        return law

    def with_child(self, node, token):
        return Tree((*self.tokens, token), (*self.parents, node))


def grown(case, tree, policy):
    """Every tree that a policy may grow, and its probability."""
    node = policy(case, tree)
    law = None if node is None else tree.undrawn(case, node)
    if law is None or not law.sum() > 0:
        yield tree, 1.0
        return
    for token in law.nonzero().flatten().tolist():
        for more, mass in grown(case, tree.with_child(node, token), policy):
            yield more, mass * float(law[token] / law.sum())


def judged(case, tree, rule):
    """What comes of a tree, and with what probability: every way its coins may fall."""
    texts = [tree.text(node) for node in range(-1, len(tree.tokens))]
    p, q = (torch.stack([laws[text] for text in texts]) for laws in (case.p, case.q))
    ways = [[]]
    while ways:
        way, asked, mass = ways.pop(), [], 1.0

        def stays(node, weight, way=way, asked=asked):
            asked.append(weight)
            return way[len(asked) - 1] if len(asked) <= len(way) else weight > 0

        passed, law = rule(p, q, tree.tokens, tree.parents, stays)
        falls = [*way, *(weight > 0 for weight in asked[len(way) :])]
        for fell, weight in zip(falls, asked, strict=True):
            mass *= weight if fell else 1 - weight
        ways += [[*falls[:i], False] for i in range(len(way), len(falls)) if 0 < asked[i] < 1]
        yield tree.text(passed[-1] if passed else -1), law, mass


def distance(case, policy, rule=reference.traverse, change=lambda case, tree: tree):
    """Total variation between the law of an output and the target's."""
    found = dict.fromkeys(itertools.product(range(WIDTH), repeat=LENGTH), 0.0)
    for tree, chance in grown(case, Tree(), policy):
        for text, law, mass in judged(case, change(case, tree), rule):
            for token in range(WIDTH):
                begun = (*text, token)
                for rest in itertools.product(range(WIDTH), repeat=LENGTH - len(begun)):
                    whole = (*begun, *rest)
                    known = case.mass(begun)
                    onwards = case.mass(whole) / known if known else 0.0
                    found[whole] += chance * mass * float(law[token]) * onwards
    return 0.5 * sum(abs(mass - case.mass(text)) for text, mass in found.items())


def chain(case, tree):
    """Each node behind the one before."""
    return len(tree.tokens) - 1 if len(tree.tokens) < 3 else None


def broad(case, tree):
    """All children of the text, then two of the first, then one of the second."""
    return next((n for n, most in ((-1, 3), (0, 2), (1, 1)) if len(tree.children(n)) < most), None)


def mixed(case, tree):
    """Deep first, and then more children of the nodes above."""
    steps = (-1, 0, 1, -1, 0, 3)
    return steps[len(tree.tokens)] if len(tree.tokens) < len(steps) else None


def by_what_was_drawn(case, tree):
    """Where the draws so far make it look best: the next child of whatever node is reached most often by ``q``."""
    if len(tree.tokens) == 4:
        return None

    def hope(node):
        mass = 1.0
        for at in range(len(tree.text(node))):
            mass *= float(case.q[tree.text(node)[:at]][tree.text(node)[at]])
        return mass * float(tree.undrawn(case, node).max())

    nodes = [n for n in range(-1, len(tree.tokens)) if len(tree.text(n)) < LENGTH - 1]
    best = max(nodes, key=hope)
    return best if hope(best) > 0.05 else None


POLICIES = [chain, broad, mixed, by_what_was_drawn]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("seed", "zeros"), [(0, False), (1, False), (2, True), (3, True)])
def test_the_output_has_the_targets_law_exactly(policy, seed, zeros):
    assert distance(Case(seed, zeros), policy) < 1e-12


def test_a_drafter_that_is_the_target_is_always_believed():
    case = Case(4)
    case.q = case.p
    for tree, _ in grown(case, Tree(), chain):
        ways = [(text, mass) for text, _, mass in judged(case, tree, reference.traverse) if mass > 1e-12]
        assert ways == [(tree.text(2), pytest.approx(1.0))]


def test_on_a_chain_it_is_block_verification():
    case = Case(5)
    for tree, _ in grown(case, Tree(), chain):
        ratios = [
            case.p[tree.text(n)[:-1]][tree.tokens[n]] / case.q[tree.text(n)[:-1]][tree.tokens[n]] for n in range(3)
        ]
        log_p = torch.stack(ratios).log().unsqueeze(0)
        weights = reference.block_weights(log_p, torch.zeros_like(log_p))[0]
        kept = {3: float(weights[3])}
        open_ = 1 - kept[3]
        for n in (2, 1, 0):
            text = tree.text(n - 1)
            rest = (weights[n] * case.p[text] - case.q[text]).clamp(min=0).sum()
            chance = float(reference.block_chance(weights[n : n + 1], rest.unsqueeze(0))) if n else 1.0
            kept[n], open_ = open_ * chance, open_ * (1 - chance)
        found = dict.fromkeys(range(4), 0.0)
        for text, _, mass in judged(case, tree, reference.traverse):
            found[len(text)] += mass
        assert found == pytest.approx(kept, abs=1e-12)


# Planted faults: each is a mistake that a plausible implementation makes


def takes_back_what_is_unlikely(case, tree):
    """Drops the last node where the drafter finds it unlikely: after having looked at it."""
    if not tree.tokens or case.q[tree.text(len(tree.tokens) - 1)[:-1]][tree.tokens[-1]] > 0.3:
        return tree
    return Tree(tree.tokens[:-1], tree.parents[:-1])


def turns_siblings_round(case, tree):
    """Judges children in another order than they were drawn in: the likeliest first."""
    order = sorted(
        range(len(tree.tokens)), key=lambda n: (len(tree.text(n)), -case.q[tree.text(n)[:-1]][tree.tokens[n]])
    )
    place = {-1: -1, **{old: new for new, old in enumerate(order)}}
    return Tree(tuple(tree.tokens[n] for n in order), tuple(place[tree.parents[n]] for n in order))


def faulty(line, instead):
    """The reference with one line of it written otherwise."""
    source = inspect.getsource(reference.traverse)
    assert source.count(line) == 1
    made = dict(vars(reference))
    exec(source.replace(line, instead), made)
    return made["traverse"]


@pytest.mark.parametrize("change", [takes_back_what_is_unlikely, turns_siblings_round])
def test_a_tree_that_looks_at_its_draws_changes_the_law(change):
    assert distance(Case(0), broad, change=change) > 1e-3


@pytest.mark.parametrize(
    ("line", "instead"),
    [
        ("undrawn[token] = 0", "pass"),  # what was drawn before cannot be drawn again
        ("float(less.sum()) + (1 - weight)", "float(less.sum())"),  # the node may be rejected itself
    ],
)
def test_a_rule_that_forgets_something_changes_the_law(line, instead):
    assert distance(Case(0), broad, rule=faulty(line, instead)) > 1e-3


# The operations ------------------------------------------------------------------------------------------------------

needs_ops = pytest.mark.skipif(not native.load_ops(), reason="needs the native ops")
PLAIN, FILTERED = Climbing(1.0, 0, 1.0, 0.0, True), Climbing(0.8, 40, 0.95, 0.001, True)
CLIMB, BRANCH = trees.climb, trees.branch


def number(seed, position, offset, purpose):
    key = torch.tensor(seed), torch.tensor(position), torch.tensor(offset)
    return Philox().uniform(*key, purpose)


def law_of(logits, sampling):
    """``[V]`` by temperature and filters, by the operation `softmax`."""
    law = [torch.tensor([part]) for part in sampling[:4]]
    return torch.ops.specdec_fast.softmax(logits.unsqueeze(0), law[0].float(), law[1].int(), *law[2:])[0]


def drawn(rng, nodes, width):
    """A tree of draws from laws of its own: tokens, parents, the law behind each node, and the laws' scores."""
    tokens, parents, behind, scores = [], [], [-1] * nodes, [rough(rng, width)]
    while (place := len(tokens)) < nodes:
        parent = rng.randrange(-1, place) if place and rng.random() < 0.7 else -1
        if parent >= 0 and behind[parent] < 0:
            behind[parent] = len(scores)
            scores.append(rough(rng, width))
        law = reference.masses(scores[0 if parent < 0 else behind[parent]])
        law[[tokens[i] for i in range(place) if parents[i] == parent]] = 0
        if law.sum() > 1e-6:
            tokens.append(int(reference.draw(law.unsqueeze(0), torch.tensor([rng.random()], dtype=torch.float64))))
            parents.append(parent)
    return tokens, parents, behind, torch.stack(scores)


def rough(rng, width):
    """Scores some of which forbid their entry, or leave nothing for the others."""
    scores = 0.6 * torch.randn(width, generator=torch.Generator().manual_seed(rng.randrange(1 << 30)))
    scores[rng.randrange(width)] = -torch.inf
    if rng.random() < 0.1:
        scores[[rng.randrange(width) for _ in range(20)]] = torch.inf
    return scores


def laws_in(scores):
    """Scores ``[N, K]`` where the operation finds them."""
    room = Room(*scores.shape)
    room.scores.view(scores.shape).copy_(scores)
    room.sums.copy_(scores.double().logsumexp(-1))
    return room.laws((1, *scores.shape))


@needs_ops
@pytest.mark.parametrize("climbing", [PLAIN, FILTERED], ids=["plain", "filtered"])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, torch.float32) for kind in ("same", "compact", "wider", "long", "long compact")]
    + [("same", torch.bfloat16), ("compact", torch.bfloat16)],
)
def test_a_tree_of_draws_is_judged_as_the_reference_says(kind, dtype, climbing):
    """Long rows are read in several pieces; a wider drafter has entries that the target knows nothing of."""
    own = model(5003, 31) if "long" in kind else copy.deepcopy(tiny("llama")).to(dtype)
    lean, width, rng = lean_model(own, rounded=False), own.config.vocab_size, random.Random(5)
    index = Index(torch.arange(1, width, 2)) if "compact" in kind else None
    ids = torch.arange(width + 7 * (kind == "wider")) if index is None else index.ids
    lengths = set()
    for trial in range(12):
        texts, first = [[rng.randrange(width) for _ in range(n)] for n in (9, 4, 6)], [1, 2, 3]
        seed, position = [trial, -trial, 2**40 + trial], [10, 5, 7]
        made = [drawn(rng, n, len(ids)) for n in (7, 0, 12)]  # a row without a tree stands between
        laws = laws_in(torch.cat([scores for *_, scores in made]))
        roots = [0, 0, len(made[0][3]) + len(made[1][3])]
        behind = [[n + roots[r] if n >= 0 else -1 for n in made[r][2]] for r in range(3)]
        tokens = [ids[line].tolist() for line, *_ in made]
        tree = trees.Tree(tokens, [parents for _, parents, *_ in made], [[]] * 3, [1, 0, 1])
        tree = tree._replace(origin=Origin(roots, [line for line, *_ in made], behind, laws, index))
        joint = Runner(own, 3, lean=lean)
        for row in range(3):
            joint.read([row], [texts[row]], [1])
        said = joint.climb([0, 1, 2], first, tree, climbing, (seed, position))
        for row in range(3):

            def behind_of(node, row=row, tree=tree, texts=texts, first=first):
                path = []
                while node >= 0:
                    path.insert(0, tree.tokens[row][node])
                    node = tree.parents[row][node]
                single = Runner(own, 1, lean=lean)
                single.read([0], [texts[row]], [1])
                return single.read([0], [[first[row], *path]], [1])[0, -1]

            nodes = range(-1, len(tree.tokens[row]))
            p = torch.stack([law_of(behind_of(node), climbing) for node in nodes])
            p = torch.nn.functional.pad(p, (0, max(int(ids[-1]) + 1 - width, 0)))
            q = torch.zeros_like(p)
            for node in nodes:
                which = 0 if node < 0 else made[row][2][node]
                if which >= 0:
                    q[node + 1, ids] = reference.masses(made[row][3][which])

            def stays(node, weight, row=row, seed=seed, position=position):
                return bool(number(seed[row], position[row], node, Purpose.ACCEPT) < weight)

            passed, law = reference.traverse(p, q, tree.tokens[row], tree.parents[row], stays)
            u = number(seed[row], position[row], len(passed), Purpose.RESIDUAL)
            assert said.passed[row] == passed
            assert said.token[row] == int(reference.draw(law.unsqueeze(0), u.unsqueeze(0)))
            assert joint.length[row] == len(texts[row]) + 1 + len(passed)
            lengths.add(len(passed))
    assert len(lengths) > 2 or ("long" in kind and climbing is FILTERED), "of so many a filter leaves too few to meet"


@needs_ops
def test_a_chain_is_judged_as_the_operation_for_chains_does():
    own = tiny("llama")
    lean, width, rng = lean_model(own, rounded=False), own.config.vocab_size, random.Random(6)
    kept = []
    for trial in range(60):
        scores = torch.stack([rough(rng, width) for _ in range(4)])
        u = torch.tensor([rng.random() for _ in range(4)], dtype=torch.float64)
        tokens = reference.draw(reference.masses(scores), u).tolist()
        text = [rng.randrange(width) for _ in range(8)]
        keys = [trial], [9]
        laws = laws_in(scores)
        tree = trees.Tree.of_chains([tokens])._replace(origin=Origin([0], [tokens], [[1, 2, 3, -1]], laws, None))
        said = []
        for way in ("tree", "chain"):
            one = Runner(own, 1, lean=lean)
            one.read([0], [text], [1])
            if way == "tree":
                passed, token, _ = one.climb([0], [3], tree, PLAIN, keys)
                said.append((len(passed[0]), token))
            else:
                told = Told([tokens], [tokens], laws, None)
                judged = one.judge([0], [3], told, [4], Judging(1.0, 0, 1.0, 0.0, RULES["block"]), keys)
                said.append((judged.accepted[0], judged.token))
        assert said[0] == said[1]
        kept.append(said[0][0])
    assert len(set(kept)) > 2


@needs_ops
def test_a_node_whose_scores_are_no_law_has_no_children():
    own = copy.deepcopy(model(TOKENS, 31))
    own.model.embed_tokens.weight.data[5] = torch.nan
    lean = type(lean_model(model(TOKENS, 31), rounded=False))(own, rounded=False)
    law = torch.full((2, TOKENS), -9.0)
    law[0, 5], law[1, 3] = 0.0, 0.0
    tree = trees.Tree([[5, 3]], [[-1, 0]], [[0, 0]], [1])
    tree = tree._replace(origin=Origin([0], [[5, 3]], [[1, -1]], laws_in(law), None))
    said = []
    for seed in range(60):
        one = Runner(own, 1, lean=lean)
        one.read([0], [[1, 2]], [1])
        passed, token, _ = one.climb([0], [4], tree, PLAIN, ([seed], [3]))
        assert passed in ([[]], [[0]]) and (token == [-1]) == (passed == [[0]])
        said.append(token[0])
    assert 0 < said.count(-1) < 60


def plainly_drawn(logits_of, growing, least, choosing, choices, seed, position):
    """A tree as csrc/drawn.h says it grows, from the logits of single texts."""
    nodes, laws = [], []  # [entry, parent, depth, level, chance, law], [node, law, entries drawn, chance left]

    def path(node):
        return [] if node < 0 else [*path(nodes[node][1]), choices[nodes[node][0]]]

    def open_(node):
        if node >= 0:
            nodes[node][5] = len(laws)
        laws.append([node, law_of(logits_of(path(node)), choosing), [], 1.0 if node < 0 else nodes[node][4]])

    def undrawn(law):
        rest = law[1].clone()
        rest[law[2]] = 0
        return rest

    def level(law, mass):
        return 7 + min(len(law[2]), 4) if law[2] else min(int(mass**0.5 * 8), 7)

    def hope(law):
        if law[2]:
            return law[3] * growing.sure[level(law, 0.0)] if float(undrawn(law).sum()) > 1e-6 else 0.0
        most = float(law[1].max())
        return law[3] * (
            most * growing.sure[level(law, most)] + (1 - most) * growing.sure[level(law, 0.2 * (1 - most))]
        )

    def draw(bound):
        best = max(laws, key=hope)
        if len(nodes) == growing.most or not hope(best) or (nodes and hope(best) < bound):
            return None
        rest = undrawn(best)
        u = number(seed, position, len(nodes), Purpose.DRAFT)
        entry = int(reference.draw(rest.unsqueeze(0), u.unsqueeze(0)))
        at = level(best, float(rest[entry] / rest.sum()))
        depth = 1 if best[0] < 0 else nodes[best[0]][2] + 1
        nodes.append([entry, best[0], depth, at, best[3] * growing.sure[at], -1])
        best[2].append(entry)
        best[3] *= 1 - growing.sure[at]
        return len(nodes) - 1

    open_(-1)
    enough = max(0.7 / growing.most, least)
    for passes in itertools.count(1):
        frontier = []
        while (node := draw(enough)) is not None:
            if nodes[node][4] >= enough and nodes[node][2] < growing.deepest:
                frontier.append(node)
        chances = sum(nodes[node][4] for node in frontier)
        if passes == growing.deepest or len(nodes) == growing.most or not chances > growing.worth[passes - 1]:
            break
        for node in frontier:
            open_(node)
    while draw(least) is not None:
        pass
    return [*([n[part] for n in nodes] for part in (0, 1, 3, 5)), passes], [law for _, law, *_ in laws]


@needs_ops
@pytest.mark.parametrize(
    "choosing",
    [Choosing(1.0), Choosing(0.7, 6, 0.9, 0.02), Choosing(0.05)],
    ids=["plain", "filtered", "hardly anything left"],
)
@pytest.mark.parametrize(("most", "width"), [(1, TOKENS), (3, TOKENS), (7, TOKENS), (20, TOKENS), (20, 5003)])
def test_a_tree_is_drawn_as_single_passes_say(choosing, most, width):
    own = model(width, 32, sharpness=0.8)
    choices, index = torch.arange(0, width, 2), torch.arange(len(range(0, width, 2))) * 3 + 1
    lean = lean_model(own).restricted(choices)
    texts = [[1, 2, 3, 4], [5, 6]]
    growing = [Growing(4, most, list(DRAWN), [0.05, 0.1, 0.2, 0.0]), Growing(3, most, list(DRAWN), [0.0] * 3)]

    def logits_of(row, path):
        return Runner(own, 1, lean=lean).read([0], [texts[row] + path], [1])[0, -1]

    branching = set()
    for rows, seed in itertools.product(([0, 1], [0], [1]), range(5)):
        joint = Runner(own, 2, lean=lean)
        keys = [[seed + row for row in rows], [30 + row for row in rows]]
        given = [texts[row] for row in rows], choosing, Choices(choices), Index(index), [growing[row] for row in rows]
        written = joint.branch(rows, *given, 0.02, keys, drawn=True)
        for at, row in enumerate(rows):
            expected, laws = plainly_drawn(
                lambda path, r=row: logits_of(r, path),
                growing[row],
                0.02,
                choosing,
                choices.tolist(),
                keys[0][at],
                keys[1][at],
            )
            said = [part[at] for part in (written.entries, written.parents, written.levels, written.behind)]
            base = at * (most + 1)
            said[3] = [n - base if n >= 0 else -1 for n in said[3]]
            assert [*said, written.passes[at]] == expected
            branching.add(len(set(expected[1])) < len(expected[1]))
            for n, law in enumerate(laws):
                scores, sums = written.laws.scores[at, n], written.laws.logsumexp[at, n]
                assert torch.allclose((scores.double() - sums).exp(), law, atol=1e-6)
            assert joint.length[row] == len(texts[row])
            again = joint.read([row], [[9]], [1])[0, 0]
            assert torch.equal(again, logits_of(row, [9])), "nothing of the tree is left"
    assert True in branching or most == 1 or choosing.temperature < 0.1


@needs_ops
@pytest.mark.parametrize(
    "change",
    [{"entry": -1}, {"entry": 10**6}, {"token": 5}, {"behind": -1}, {"behind": 10**6}, {"root": -1}, {"root": 2}],
    ids=str,
)
def test_what_is_wrong_with_what_a_tree_was_drawn_from_is_said(change):
    own = tiny("llama")
    lean, width = lean_model(own, rounded=False), own.config.vocab_size
    one = Runner(own, 1, lean=lean)
    one.read([0], [[1, 2, 3]], [1])
    entries = [3, change.get("entry", 4)]
    origin = Origin(
        [change.get("root", 0)], [entries], [[change.get("behind", 1), -1]], laws_in(torch.zeros(2, width)), None
    )
    tree = trees.Tree([[3, change.get("token", entries[1])]], [[-1, 0]], [[0, 0]], [1])._replace(origin=origin)
    with pytest.raises(RuntimeError, match="llama_climb: a node was drawn from a law behind its parent"):
        one.climb([0], [4], tree, PLAIN, ([1], [2]))


# Whole calls ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def cheap(monkeypatch):
    """Drafts that pay whatever the toys' sizes say, and trees as large in a batch as for one row."""
    monkeypatch.setattr(warmup, "constant_costs", lambda *_: constant_costs(10**9, 10**6))
    monkeypatch.setattr(methods, "nodes_for", lambda rows: 7)


TREES = {"draft_tree": "on", "verification": "block", "do_sample": True}
PROMPT = torch.tensor([[1, 2, 5, 3, 4, 1, 2]])


def p_value(kind, monkeypatch, sampling="plain", **more):
    """Of the text of many rows, whose trees all run as the operation."""
    target = model(TOKENS, 31, sharpness=0.8)
    for one in (lean_model(target, rounded=False), lean_model(parties(kind)["assistant_model"])):
        monkeypatch.setattr(one, "_most", 1 << 20)
    many = {"num_return_sequences": 6000, "max_new_tokens": 4, "top_k": 0, "seed": 12} | SAMPLING[sampling]
    text = fast_generate(target, PROMPT, **TREES, **many, **parties(kind), **more)
    return pairs_p_value(copy.deepcopy(target).float(), PROMPT, text, TOKENS, warpers(**SAMPLING[sampling]))


@needs_ops
@pytest.mark.parametrize(("memory", "sampling"), [("off", "plain"), ("on", "plain"), ("on", "top_p"), ("off", "top_k")])
@pytest.mark.parametrize("kind", ["model", "tli"])
def test_the_output_has_the_targets_law(kind, memory, sampling, monkeypatch, cheap, climbed):
    assert p_value(kind, monkeypatch, sampling, draft_memory=memory) > 1e-4
    tree, said = climbed[0]
    assert any(len(set(parents)) < len(parents) for parents in tree.parents)
    assert {len(passed) for passed in said.passed} >= {0, 1, 2}


@needs_ops
@pytest.mark.parametrize("kind", ["model", "tli"])
@pytest.mark.parametrize("rows", [1, 2])
def test_nodes_are_drawn_from_the_laws_that_are_told(kind, rows, cheap, monkeypatch):
    """Mended ones too, whether they are kept where a pass has written them (one row) or copied."""
    grown = []

    def seen(*arguments):
        tree = BRANCH(*arguments)
        grown.append((*arguments[-4:-2], tree, tree.laws.scores, tree.laws.logsumexp))
        return tree

    monkeypatch.setattr(runner.trees, "branch", seen)
    given = {"seed": 3, "max_new_tokens": 40, "top_k": 0, "draft_memory": "on", **parties(kind)}
    fast_generate(model(TOKENS, 31, sharpness=0.8), PROMPT.repeat(rows, 1), **TREES, **given)
    assert len(grown) > 5
    for seed, position, tree, scores, sums in grown:
        scores, sums = scores.flatten(0, 1), sums.flatten()
        for row, entries in enumerate(tree.entries):
            for node, (entry, parent) in enumerate(zip(entries, tree.parents[row], strict=True)):
                law = row * tree.laws.shape[1] if parent < 0 else tree.behind[row][parent]
                assert float(scores[law].double().logsumexp(0)) == pytest.approx(float(sums[law]), abs=1e-9)
                masses = reference.masses(scores[law])
                masses[[entries[i] for i in range(node) if tree.parents[row][i] == parent]] = 0
                u = number(seed[row], position[row], node, Purpose.DRAFT)
                assert entry == int(reference.draw(masses.unsqueeze(0), u.unsqueeze(0)))


def taken_back(*arguments, **more):
    """The last draw is looked at, and some are taken out again."""
    grown = BRANCH(*arguments, **more)
    for entries, *parts in zip(grown.entries, grown.levels, grown.parents, grown.behind, strict=True):
        while entries and entries[-1] % 2:
            for part in (entries, *parts):
                del part[-1]
    return grown


def of_one_law(lean, first, tree, *rest):
    """Every node is judged as if it were drawn behind the text."""
    origin = tree.origin
    if origin is not None:
        behind = [[root] * len(line) for root, line in zip(origin.roots, origin.behind, strict=True)]
        tree = tree._replace(origin=origin._replace(behind=behind))
    return CLIMB(lean, first, tree, *rest)


def of_one_drafter(lean, first, tree, *rest):
    """What the first draw was is committed where nothing stays, as if the drafter's law were the target's."""
    said = CLIMB(lean, first, tree, *rest)
    token = [line[0] if line and not passed else t for line, passed, t in zip(tree.tokens, *said[:2], strict=True)]
    return said._replace(token=token)


@needs_ops
@pytest.mark.parametrize(("name", "fault"), [("branch", taken_back), ("climb", of_one_law), ("climb", of_one_drafter)])
def test_a_planted_fault_changes_the_law(name, fault, monkeypatch, cheap):
    monkeypatch.setattr(runner.trees, name, fault)
    assert p_value("model", monkeypatch) < 1e-6


@needs_ops
@pytest.mark.parametrize("kind", ["model", "tli"])
@pytest.mark.parametrize("law", [{}, {"temperature": 0.7, "top_k": 12}, {"top_p": 0.9, "min_p": 0.01}])
def test_a_call_branches_and_repeats_with_its_seed(kind, law, cheap, climbed):
    target = model(TOKENS, 31, sharpness=0.8)
    prompt = torch.cat([PROMPT, PROMPT.flip(1)])
    mask = torch.ones_like(prompt)
    mask[1, :3] = 0
    given = {"seed": 3, "max_new_tokens": 60, "attention_mask": mask, "pad_token_id": 0, "top_k": 0, **law}
    text = fast_generate(target, prompt, **TREES, **given, **parties(kind))
    counts = last_speculation()
    assert counts.verification == "block" and counts.nodes >= counts.drafted >= counts.accepted > 0
    assert any(len(set(parents)) < len(parents) for tree, _ in climbed for parents in tree.parents)
    assert any(max(passed, default=0) > len(passed) for _, said in climbed for passed in said.passed), "not only chains"
    assert torch.equal(fast_generate(target, prompt, **TREES, **given, **parties(kind)), text)


@needs_ops
def test_stops_and_continuation(cheap):
    target = model(TOKENS, 31, sharpness=0.8)
    given = {**TREES, "seed": 3, "top_k": 0, "pad_token_id": 0, **parties("tli")}
    text = fast_generate(target, PROMPT, max_new_tokens=40, **given)
    end = int(text[0, PROMPT.shape[1] + 9])
    stopped = fast_generate(target, PROMPT, max_new_tokens=40, eos_token_id=end, **given)
    new = text[0, PROMPT.shape[1] :].tolist()
    assert stopped[0].tolist() == text[0, : PROMPT.shape[1] + new.index(end) + 1].tolist()
    out = fast_generate(target, PROMPT, max_new_tokens=12, return_dict_in_generate=True, **given)
    more = {"past_key_values": out.past_key_values, "attention_mask": torch.ones_like(out.sequences)}
    longer = fast_generate(target, out.sequences, max_new_tokens=28, **more, **given)
    assert torch.equal(longer[:, : out.sequences.shape[1]], out.sequences) and last_speculation().nodes
    assert longer.shape == text.shape


@needs_ops
@pytest.mark.parametrize(
    ("given", "branches"),
    [
        ({}, True),
        ({"verification": "block"}, True),
        ({"verification": "token"}, False),
        ({"verification": "match"}, False),
        ({"seed": 4}, False),
        ({"seed": 4, "draft_tree": "on", "verification": "block"}, True),
        ({"assistant_temperature": 0.0}, False),
        ({"source": Philox()}, False),
        ({"draft_tree": "off"}, False),
        ({"num_assistant_tokens": 4}, False),
    ],
    ids=lambda value: repr(value).split(" object")[0],  # no addresses: xdist compares what workers collect
)
def test_where_sampling_calls_branch(given, branches, monkeypatch, cheap, climbed):
    monkeypatch.setattr(choice, "LARGE", 0)
    target = model(TOKENS, 31, sharpness=0.8)
    fast_generate(target, PROMPT, do_sample=True, max_new_tokens=40, **parties("tli"), **given)
    counts = last_speculation()
    assert (counts.nodes > 0) == branches and counts.verification == given.get("verification", "block")
    assert all(tree.origin is not None for tree, _ in climbed if any(tree.passes))


@needs_ops
def test_a_seed_gives_what_chains_give_where_nobody_asked_for_trees(monkeypatch, cheap):
    monkeypatch.setattr(choice, "LARGE", 0)
    target = model(TOKENS, 31, sharpness=0.8)
    given = {"do_sample": True, "seed": 4, "max_new_tokens": 40, **parties("model")}
    assert torch.equal(fast_generate(target, PROMPT, **given), fast_generate(target, PROMPT, draft_tree="off", **given))


@needs_ops
def test_a_drafter_whose_scores_are_no_law_drafts_nothing(cheap):
    target, drafter = model(TOKENS, 31, sharpness=0.8), copy.deepcopy(model(TOKENS, 32, sharpness=0.8))
    assert lean_model(drafter) is not None
    lean_model(drafter)._norms.fill_(torch.nan)
    given = {**TREES, "seed": 4, "max_new_tokens": 20, "method": "model"}
    fast_generate(target, PROMPT, assistant_model=drafter, **given)
    assert last_speculation().nodes == 0


@needs_ops
def test_what_a_round_teaches(monkeypatch, cheap, climbed):
    """A node that stays is counted, and each sibling that was tried before it; one behind it was not tried."""
    taught = []
    monkeypatch.setattr(Branching, "climbed", lambda self, row, levels, nodes, met: taught.append(met))
    fast_generate(model(TOKENS, 31, sharpness=0.8), PROMPT, **TREES, seed=3, max_new_tokens=40, **parties("model"))
    rounds = [(tree, said) for tree, said in climbed if tree.passes[0]]
    assert len(taught) == len(rounds)
    ignored = 0
    for met, (tree, said) in zip(taught, rounds, strict=True):
        way, stayed = [-1, *said.passed[0]], set(said.passed[0])
        tried = []
        for node, parent in enumerate(tree.parents[0]):
            before = [i for i in range(node) if tree.parents[0][i] == parent]
            if parent in way and not stayed & set(before):
                tried.append((tree.levels[0][node], node in stayed))
            ignored += parent in way and bool(stayed & set(before))
        assert met == tried
    assert ignored


def test_what_is_hoped_of_draws():
    branching = Branching(1, 15, Outlook(constant_costs(10**8, 10**6)), nodes=7, drawn=True)
    own = branching.growing(0, 4).sure
    assert own[:8] == sorted(own[:8]) and own[8:] == sorted(own[8:], reverse=True)


@pytest.mark.parametrize(
    ("score", "free"), [([1.0, 1.3, *[1.4] * 6], True), ([1.0 + 0.05 * n for n in range(8)], False)]
)
def test_a_node_costs_what_a_larger_tree_costs_more(score, free):
    """The step from a plain pass to a small tree is paid in any case."""
    outlook = Outlook(Costs(tuple(score), step=0.1, measured=True))
    for one in (Branching(1, 8, outlook, nodes=7, drawn=drawn) for drawn in (False, True)):
        assert one[0] and (one.least([0]) == pytest.approx(0.0)) == free


@pytest.mark.parametrize(("each", "nodes"), [(0.0, 7), (0.05, 5), (0.3, 2)])
def test_a_round_is_held_to_cost_what_its_tree_does(each, nodes):
    """Where a position costs something, trees are small; charged as large ones they would be given up."""
    costs = Costs(tuple(1.0 + each * n for n in range(8)), step=0.05, measured=True)
    branching = Branching(1, 8, Outlook(costs), nodes=7, drawn=True)
    assert branching._round[0] == 1.0
    assert branching._round[1] == pytest.approx(costs.tree(1, nodes))
    assert branching._round[6] == pytest.approx(costs.tree(6, max(nodes, 6)))
