"""Token arrays named on a command line: `path`, `path*times` and `path@first_label*times`, checked before training."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset

from .data import load_token_rows

CHUNK = 2**24  # ids looked at together


class TokenFile(NamedTuple):
    """A token array of a command line.

    Attributes:
        path: the `.npy` file.
        first_label: tokens at a row's beginning that are not to be learned.
        times: how often the rows are taken.
    """

    path: str
    first_label: int = 0
    times: int = 1


def parse_token_file(name: str) -> TokenFile:
    """The parts of `path[@first_label][*times]`; what is no number at the end belongs to the path.

    Raises:
        ValueError: the rows are to be taken 0 times.
    """
    match = re.fullmatch(r"(.*?)(?:@(\d+))?(?:\*(\d+))?", name, re.DOTALL)
    assert match is not None  # every part may be missing
    path, first_label, times = match.groups()
    if times is not None and int(times) == 0:
        raise ValueError(f"`tokens` takes {path} 0 times (`{name}`), expected at least once. Leave it out.")
    return TokenFile(path, int(first_label or 0), int(times or 1))


def load_token_files(names: Sequence[str], length: int, vocab_size: int | None = None) -> list[Dataset]:
    """Rows of token arrays, in order, each as often as its name says.

    Args:
        names: see `parse_token_file`.
        length: tokens of a row.
        vocab_size: of the target; ids are checked against it.

    Raises:
        ValueError: a file is no array of rows or tokens, or holds ids that are not the target's.
    """
    files = [parse_token_file(name) for name in names]
    for path in dict.fromkeys(file.path for file in files):
        _check(path, vocab_size)
    parts: list[Dataset] = []
    for file in files:
        parts += [load_token_rows(file.path, length, file.first_label)] * file.times
    return parts


def _check(path: str, vocab_size: int | None) -> None:
    if not Path(path).is_file():
        raise ValueError(
            f"`tokens` names {path}, expected a `.npy` file, got none there. Behind a path come at most `@` with a "
            "prompt's tokens and `*` with the times it is taken, as in `own.npy@1024*8`."
        )
    remedy = "Make it with `examples/generate_data.py`, or `longspec_hf.training.save_tokens`."
    try:
        tokens = np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise ValueError(f"`tokens` names {path}, expected a `.npy` file, got another. {remedy}") from error
    if not isinstance(tokens, np.ndarray):
        tokens.close()
        raise ValueError(f"`tokens` names {path}, expected one array (`.npy`), got an archive of arrays. {remedy}")
    if tokens.ndim not in (1, 2) or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"`tokens` names {path}, expected integers `[tokens]` or `[rows, tokens]`, got {tokens.dtype} of shape "
            f"{list(tokens.shape)}. {remedy}"
        )
    if not tokens.size or tokens.shape[-1] < 2:
        raise ValueError(
            f"`tokens` names {path}, expected at least one row of 2 tokens, got the shape {list(tokens.shape)}. Leave "
            "it out."
        )
    smallest, largest = _extremes(tokens)
    if smallest < 0:
        raise ValueError(f"`tokens` names {path}, expected ids from 0 on, got {smallest}. {remedy}")
    if vocab_size is not None and largest >= vocab_size:
        raise ValueError(
            f"`tokens` names {path}, expected ids below the target's vocabulary size of {vocab_size}, got {largest} "
            "as the largest. Tokenize the texts with the target's tokenizer."
        )


def _extremes(tokens: np.ndarray) -> tuple[int, int]:
    """Smallest and largest id, without the whole file in memory."""
    rows = max(CHUNK // (tokens.shape[1] if tokens.ndim == 2 else 1), 1)
    parts = [tokens[start : start + rows] for start in range(0, len(tokens), rows)]
    return min(int(part.min()) for part in parts), max(int(part.max()) for part in parts)
