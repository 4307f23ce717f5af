"""What rounds say of other trees."""

import pytest

from longspec_hf.acceptance import Acceptance, DraftedBeam, Outcome, outcome_of
from longspec_hf.tree_candidates import TreeSize, tree_sizes

SIZES = (TreeSize(3, 1, 1), TreeSize(5, 2, 2), TreeSize(9, 4, 3))
# Two levels: 10 and 11 below the root; 20 and 22 below 10, 21 below 11.
BEAM = DraftedBeam([10, 11, 20, 21, 22], [-1, -1, 0, 1, 0], [-0.1, -1.0, -0.3, -1.5, -2.0], [2, 3])


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([99], ()),
        ([10, 99], (0,)),
        ([11, 99], (1,)),  # second of its depth
        ([10, 20, 99], (0, 0)),
        ([11, 21, 99], (1, 1)),
        ([10, 22, 99], (0, 2)),  # third of its depth, last of all
    ],
)
def test_smallest_size_that_holds_a_path(tokens, expected):
    outcome = outcome_of(BEAM, [], tokens, SIZES, used=2)
    assert outcome == Outcome(expected, 0, False, 0)


def test_a_descendant_needs_what_its_ancestors_need():
    beam = DraftedBeam([10, 11, 21], [-1, -1, 1], [-0.1, -1.0, -1.0], [2, 1])
    assert outcome_of(beam, [], [11, 21, 99], SIZES, used=2).sizes == (1, 1)


def test_the_branch_is_held_by_its_length_and_takes_nodes_from_the_beam():
    branch = [7, 8, 9, 6]
    followed = outcome_of(BEAM, branch, [7, 8, 9, 99], SIZES, used=2)
    assert followed == Outcome((0, 1, 2), 3, False, 4)
    # 3 nodes hold root, one of the branch, and one of the beam, not two.
    assert outcome_of(BEAM, branch, [10, 20, 99], SIZES, used=2).sizes == (0, 1)
    to_the_end = outcome_of(BEAM, branch, [7, 8], SIZES, used=0)
    assert (to_the_end.copied, to_the_end.copied_to_end) == (2, True)
    whole = outcome_of(BEAM, [7, 8], [7, 8, 5], SIZES, used=2)
    assert (whole.copied, whole.copied_to_end) == (2, False)


def test_what_the_tree_in_use_held_counts_as_its_size():
    assert outcome_of(BEAM, [], [10, 22, 99], SIZES, used=1).sizes == (0, 1)


def told(outcomes, depth=2, used=2, rounds=200):
    acceptance = Acceptance(SIZES, 4)
    for number in range(rounds):
        acceptance.add([outcomes[number % len(outcomes)]], depth, used)
    return acceptance.promise()


def test_shares_are_those_of_the_rounds():
    outcomes = [
        Outcome((0, 1), 0, False, 0),
        Outcome((2,), 0, False, 0),
        Outcome((), 0, False, 0),
        Outcome((0,), 0, False, 0),
    ]
    promise = told(outcomes)
    assert promise.beam[0] == pytest.approx([0.5, 0.5, 0.75], abs=0.06)
    assert promise.beam[1] == pytest.approx([0.0, 0.25, 0.25], abs=0.06)
    assert promise.tokens(2, 2, 0) == pytest.approx(2.0, abs=0.1)
    assert promise.tokens(1, 0, 0) == pytest.approx(1.5, abs=0.06)


def test_a_smaller_or_shallower_tree_never_promises_more():
    for used, depth in ((0, 1), (1, 2), (2, 4)):
        promise = told([Outcome((0,) * depth, 0, False, 0), Outcome((), 0, False, 0)], depth, used)
        for level, row in enumerate(promise.beam):
            assert row == sorted(row) and all(0.0 <= share <= 1.0 for share in row)
            assert level == 0 or all(a >= b for a, b in zip(promise.beam[level - 1], row, strict=True))


def test_deeper_and_larger_trees_are_estimated():
    always = told([Outcome((0, 0), 0, False, 0)], depth=2, used=0)
    assert always.beam[3] == pytest.approx([1.0] * 3, abs=0.1)
    never = told([Outcome((), 0, False, 0)], depth=2, used=0)
    assert never.beam[0][0] < 0.05 < never.beam[0][1] < never.beam[0][2] < 0.45
    assert max(never.beam[3]) < 0.05


def test_what_is_not_seen_for_long_is_an_estimate_again():
    acceptance = Acceptance(SIZES, 4)
    for _ in range(100):
        acceptance.add([Outcome((), 0, False, 0)], 2, 2)
    wrong = acceptance.promise().beam[0][2]
    for _ in range(200):
        acceptance.add([Outcome((), 0, False, 0)], 0, 0)
    assert wrong < 0.1 < 0.4 < acceptance.promise().beam[0][0]


def test_the_branch_counts_below_the_beam_and_where_its_end_is_not_known():
    promise = told([Outcome((0, 1), 3, False, 3)])
    assert promise.copied == pytest.approx([1.0] * 3, abs=0.1)
    assert promise.tokens(0, 0, 3) == pytest.approx(4.0, abs=0.2)
    assert promise.tokens(2, 2, 3) == pytest.approx(4.0, abs=0.3)
    unknown = told([Outcome((0,), 1, True, 3)])
    assert unknown.copied[0] > 0.9 and 0.5 < unknown.copied[1] < 0.8


def test_sizes_of_a_call():
    assert [size.nodes for size in tree_sizes(64, 8)] == [4, 8, 16, 32, 64] == [s.nodes for s in tree_sizes(127, 0)]
    assert [size.nodes for size in tree_sizes(31, 8)] == [4, 8, 16]
    assert tree_sizes(3, 8) == (TreeSize(3, 3, 2),)
    assert {size.branch for size in tree_sizes(64, 3)} == {2, 3}
