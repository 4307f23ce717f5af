"""The n-gram index finds what a scan of the whole text finds."""

from hypothesis import given, settings
from hypothesis import strategies as st

from longspec_hf.ngram_index import MAX_CANDIDATES, MAX_MATCH, ONE_TOKEN_COPIES, NgramIndex


def scan(tokens, length, min_match):
    """The definition: longest earlier occurrence of the ending, the most recent of equals, copied on into itself."""
    best, best_length, last = -1, min_match - 1, len(tokens) - 1
    for end in range(last - 1, -1, -1):
        matched = 0
        while matched <= end and matched < MAX_MATCH and tokens[end - matched] == tokens[last - matched]:
            matched += 1
        if matched > best_length:
            best, best_length = end, matched
    return [] if best < 0 else [tokens[best + 1 + i % (last - best)] for i in range(length)]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=MAX_CANDIDATES), st.integers(1, 3), st.integers(0, 12))
def test_equals_a_scan(tokens, min_match, length):
    index = NgramIndex(min_match)
    for token in tokens:
        index.extend([token])
    expected = scan(tokens, length, min_match) if tokens else []
    assert index.continuation(length) == expected


def test_longest_then_most_recent():
    index = NgramIndex(min_match=2)
    index.extend([1, 2, 3, 9, 5, 2, 3, 8, 6, 2, 3, 7, 1, 2, 3])
    assert index.continuation(2) == [9, 5]  # [1, 2, 3] is longer than the later [2, 3]
    index = NgramIndex(min_match=2)
    index.extend([2, 3, 8, 2, 3, 7, 2, 3])
    assert index.continuation(1) == [7]


def test_one_token_is_copied_after_where_no_pair_has_occurred_and_not_far():
    index = NgramIndex(min_match=1)
    index.extend([7, *range(100, 140), 7, *range(200, 240), 7])
    assert index.continuation(50) == list(range(200, 200 + ONE_TOKEN_COPIES))
    index.extend([100])  # a pair, and of more use than the most recent 7
    assert index.continuation(39) == list(range(101, 140))
    assert NgramIndex(min_match=2).continuation(3) == []


def test_a_period_goes_on():
    index = NgramIndex()
    index.extend([1, 2, 3] * 4)
    assert index.continuation(7) == [1, 2, 3, 1, 2, 3, 1]


def test_work_per_token_does_not_grow(monkeypatch):
    """Neither adding nor looking up reads the whole text."""
    import longspec_hf.ngram_index as module

    compared = []
    original = module._common_ending
    monkeypatch.setattr(module, "_common_ending", lambda *a: compared.append(1) or original(*a))
    index = NgramIndex()
    index.extend([1, 2] * 20_000)
    index.continuation(8)
    index.extend([3])
    index.continuation(8)
    assert len(compared) <= 2 * MAX_CANDIDATES
