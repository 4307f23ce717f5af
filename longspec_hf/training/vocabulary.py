"""The draft vocabulary: the tokens a draft may propose, chosen by their counts in training data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ..modeling_longspec import LongSpecDraftModel
from .collator import IGNORED


def count_tokens(rows: Iterable[Sequence[int] | torch.Tensor], vocab_size: int) -> torch.Tensor:
    """Occurrences `[vocab_size]` of every token in rows of ids.

    Raises:
        ValueError: an id is outside the vocabulary.
    """
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for row in rows:
        ids = torch.as_tensor(row, dtype=torch.long).flatten()
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
            raise ValueError(
                f"`rows` hold ids from {int(ids.min())} to {int(ids.max())}, expected 0 to {vocab_size - 1}. Tokenize "
                "the texts with the target's tokenizer."
            )
        counts += torch.bincount(ids, minlength=vocab_size)
    return counts


def most_frequent_tokens(counts: torch.Tensor, size: int, always: Sequence[int] = ()) -> torch.Tensor:
    """The `size` most frequent tokens `[size]`, in ascending order.

    Args:
        counts: `[vocab]` occurrences.
        size: size of the draft vocabulary.
        always: tokens that are in whatever their count, such as the end of a text.

    Raises:
        ValueError: `size` is not between the number of `always` tokens and the vocabulary's size, or one of these is
            outside the vocabulary.
    """
    always = sorted(set(always))
    if always and not 0 <= always[0] <= always[-1] < len(counts):
        raise ValueError(
            f"`always` names tokens from {always[0]} to {always[-1]}, expected 0 to {len(counts) - 1}. Leave out what "
            "is not in the vocabulary."
        )
    if not max(1, len(always)) <= size <= len(counts):
        raise ValueError(
            f"`size` must be between {max(1, len(always))} and the vocabulary's {len(counts)}, got {size}."
        )
    ranked = counts.clone()
    ranked[always] = torch.iinfo(counts.dtype).max
    # Stable: of equally frequent tokens those of lower id, which byte-pair merges made first.
    return ranked.argsort(descending=True, stable=True)[:size].sort().values


def set_draft_vocabulary(draft: LongSpecDraftModel, token_ids: torch.Tensor) -> None:
    """Let `draft` propose `token_ids` `[draft_vocab_size]`.

    Raises:
        ValueError: the draft has no draft vocabulary of that size, or an id is not the target's or named twice.
    """
    size = draft.config.draft_vocab_size
    if size != len(token_ids):
        raise ValueError(
            f"`token_ids` must have the configuration's `draft_vocab_size` of {size} entries, got {len(token_ids)}."
        )
    if len(token_ids.unique()) != size or token_ids.min() < 0 or token_ids.max() >= draft.config.vocab_size:
        raise ValueError(f"`token_ids` must be distinct and between 0 and {draft.config.vocab_size - 1}.")
    draft.draft_token_ids.copy_(token_ids)


def rows_of_tokens(token_ids: torch.Tensor | None, vocab_size: int) -> torch.Tensor | None:
    """`[vocab_size]`: each token's row in the gathered head, -100 for tokens outside; `None` for all tokens."""
    if token_ids is None:
        return None
    rows = torch.full((vocab_size,), IGNORED, dtype=torch.long, device=token_ids.device)
    rows[token_ids] = torch.arange(len(token_ids), device=token_ids.device)
    return rows
