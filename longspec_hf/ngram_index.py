"""Index of the text so far, for the n-gram branch (prompt lookup decoding by A. Saxena,
github.com/apoorvumang/prompt-lookup-decoding).

Works as the match finder of an LZ77 compressor: every position is chained to the last one that ended in the same pair
of tokens, so that adding a token costs one dictionary access and a look-up walks a bounded number of chain links. The
index lives on the host and holds two integers a token, like the token ids themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

MAX_CANDIDATES = 32  # chain links walked per look-up: recent matches are the likely ones, and the cost stays bounded
MAX_MATCH = 32  # tokens compared per link: beyond this a longer match says nothing more
ONE_TOKEN_COPIES = 12  # tokens copied where no more than the last one has occurred before: such copies seldom go far


class NgramIndex:
    """Finds what followed the longest, most recent earlier occurrence of the current ending.

    Args:
        min_match: shortest ending, in tokens, that counts as an occurrence. With 1, where no two tokens have occurred
            before, what followed the last one most recently is copied, up to `ONE_TOKEN_COPIES` tokens.
    """

    def __init__(self, min_match: int = 2) -> None:
        self.min_match = min_match
        self._tokens: list[int] = []
        self._previous: list[int] = []  # per position, the last earlier one that ended in the same pair, -1 if none
        # By both tokens in one number: a tuple for every token would keep the garbage collector busy.
        self._latest: dict[int, int] = {}
        self._latest_of_one: dict[int, int] = {}
        self._before = -1  # last earlier position of the newest token

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Add committed tokens."""
        for token in tokens:
            position = len(self._tokens)
            key = ((self._tokens[-1] + 1) << 32 if position else 0) | token
            self._tokens.append(token)
            self._previous.append(self._latest.get(key, -1))
            self._latest[key] = position
            if self.min_match == 1:
                self._before = self._latest_of_one.get(token, -1)
                self._latest_of_one[token] = position

    def continuation(self, length: int) -> list[int]:
        """Up to `length` tokens that followed the match; empty without one.

        Where the match runs into the end of the text the copy goes on into itself, which continues a period.
        """
        if length < 1 or not self._tokens:
            return []
        best = self._longest_match()
        if best < 0 and self.min_match == 1:
            best, length = self._before, min(length, ONE_TOKEN_COPIES)
        if best < 0:
            return []
        period = len(self._tokens) - 1 - best
        return [self._tokens[best + 1 + i % period] for i in range(length)]

    def _longest_match(self) -> int:
        """Where the longest, of equals the most recent, occurrence of two or more tokens of the ending ends, or -1."""
        best, best_length = -1, max(self.min_match, 2) - 1
        candidate = self._previous[-1]
        for _ in range(MAX_CANDIDATES):
            if candidate < 0 or best_length >= MAX_MATCH:
                break
            matched = _common_ending(self._tokens, candidate)
            if matched > best_length:
                best, best_length = candidate, matched
            candidate = self._previous[candidate]
        return best


def _common_ending(tokens: Sequence[int], end: int) -> int:
    """Number of equal tokens before and at `end` and before and at the last position, at most `MAX_MATCH`."""
    last = len(tokens) - 1
    matched = 0
    while matched < MAX_MATCH and matched <= end and tokens[end - matched] == tokens[last - matched]:
        matched += 1
    return matched
