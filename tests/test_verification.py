"""The walk, by hand-made trees."""

import itertools

import pytest

from longspec_hf.verification import Walk, walk

TOKENS = [9, 1, 2, 3, 4, 5]
PARENTS = [0, 0, 0, 0, 2, 4]  # root -> 1, 2, 3; node 2 -> 4 -> 5


def draws(sequence, stop_after=99):
    calls = []

    def draw(node):
        calls.append(node)
        return sequence[len(calls) - 1], len(calls) >= stop_after

    return draw, calls


@pytest.mark.parametrize(
    ("sequence", "visited"),
    [([7], [0]), ([1, 7], [0, 1]), ([2, 7], [0, 2]), ([2, 4, 7], [0, 2, 4]), ([2, 4, 5, 7], [0, 2, 4, 5])],
)
def test_accepted_length(sequence, visited):  # C23
    draw, calls = draws(sequence)
    assert walk(TOKENS, PARENTS, draw) == Walk(visited, sequence, False)
    assert calls == visited


def test_a_token_of_another_branch_is_no_child():
    draw, _ = draws([1, 4])
    assert walk(TOKENS, PARENTS, draw).visited == [0, 1]


@pytest.mark.parametrize("order", list(itertools.permutations([1, 2, 3, 4])), ids=str)
def test_order_of_siblings_does_not_matter(order):  # C06
    draw, _ = draws([3, 8])
    result = walk([9, *order], [0] * 5, draw)
    assert result.visited == [0, 1 + order.index(3)]
    assert result.tokens == [3, 8]


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_stop_ends_the_block_there(stop):
    draw, _ = draws([2, 4, 5, 7], stop_after=stop)
    result = walk(TOKENS, PARENTS, draw)
    assert result.stopped
    assert result.tokens == [2, 4, 5, 7][:stop]


def test_of_equal_siblings_the_first_is_taken():
    draw, _ = draws([1, 8])
    assert walk([9, 1, 1], [0, 0, 0], draw).visited == [0, 1]
