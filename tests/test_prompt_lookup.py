"""What prompt lookup proposes."""

import torch

from specdec_fast.drafters.prompt_lookup import PromptLookup
from specdec_fast.randomness import Philox
from specdec_fast.state import Rows
from specdec_fast.verification import Draws


def propose(texts: list[list[int]], limit: list[int], max_ngram: int = 3) -> list[list[int]]:
    rows = Rows(torch.tensor(texts), None, torch.zeros(len(texts), dtype=torch.long), 64, 0)
    drafter = PromptLookup(len(texts), max_ngram, torch.device("cpu"))
    zeros = torch.zeros(len(texts), dtype=torch.long)
    proposal = drafter.propose(rows, list(range(len(texts))), limit, Draws(Philox(), zeros, zeros))
    return [row[:n].tolist() for row, n in zip(proposal.tokens, proposal.count, strict=True)]


def test_the_longest_match_goes_on():
    assert propose([[1, 2, 3, 9, 3, 8, 1, 2, 3]], [2]) == [[9, 3]]


def test_a_loop_is_gone_round_again():
    assert propose([[7, 7, 7, 7]], [5]) == [[7, 7, 7, 7, 7]]
    assert propose([[5, 1, 2, 1, 2]], [5]) == [[1, 2, 1, 2, 1]]


def test_nothing_matches_and_nothing_is_wanted():
    assert propose([[1, 2, 3], [4, 4, 4]], [4, 0]) == [[], []]
