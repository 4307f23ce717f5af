"""Training rows from files, Hugging Face datasets and token arrays."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from .collator import IGNORED

TEXT_SUFFIXES = (
    ".txt",
    ".md",
    ".rst",
    ".py",
    ".pyi",
    ".c",
    ".h",
    ".cpp",
    ".js",
    ".ts",
    ".java",
    ".go",
    ".rs",
    ".ipynb",
)
SHOWN = 40  # characters of a wrong line in a message


class PackedRows(Dataset):
    """Rows of equal length cut from one long array of tokens.

    Args:
        tokens: `[n]` ids, in memory or memory-mapped.
        length: tokens of a row; what is left at the end is dropped.
    """

    def __init__(self, tokens: np.ndarray, length: int) -> None:
        if len(tokens) < length:
            raise ValueError(f"`tokens` has {len(tokens)} entries, fewer than one row of {length}. Use shorter rows.")
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = self.tokens[index * self.length : (index + 1) * self.length]
        return {"input_ids": torch.from_numpy(np.asarray(row).astype(np.int64))}


class FilledRows(Dataset):
    """Rows of an array `[rows, m]`, cut at `length`; a run of equal tokens at the end, but its first, is filling.

    Args:
        tokens: `[rows, m]` ids.
        length: tokens of a row.
        first_label: tokens at a row's beginning that are not to be learned, such as a prompt's.
    """

    def __init__(self, tokens: np.ndarray, length: int, first_label: int = 0) -> None:
        self.tokens, self.length, self.first_label = tokens, length, first_label

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = np.asarray(self.tokens[index]).astype(np.int64)
        different = np.flatnonzero(row != row[-1])
        end = (different[-1] if len(different) else -1) + 2
        labels = row.copy()
        labels[end:] = IGNORED
        labels[: self.first_label] = IGNORED
        return {"input_ids": torch.from_numpy(row[: self.length]), "labels": torch.from_numpy(labels[: self.length])}


class ListedRows(Dataset):
    """Rows of any length, as they are.

    Args:
        rows: `{"input_ids": ..., "labels": ... (optional)}`.
        max_length: longer rows are cut.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], max_length: int) -> None:
        self.rows, self.max_length = rows, max_length

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.rows[index]
        kept = {name: row[name] for name in ("input_ids", "labels") if row.get(name) is not None}
        return {name: torch.as_tensor(value, dtype=torch.long)[: self.max_length] for name, value in kept.items()}


def read_texts(paths: Iterable[str | Path], tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[str]:
    """Texts of files and folders.

    Plain-text files are one text each; every line of a `.jsonl` file is an object with `text`, or with `messages`,
    which the tokenizer's chat template turns into a text; blank lines are none. Folders are searched for plain-text
    files, and what of these is no UTF-8 is passed over, as a folder of sources may hold some.

    Raises:
        ValueError: a path does not exist, a file named by itself is no UTF-8, or a line holds neither field.
        OSError: a file named by itself cannot be read.
    """
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"`paths` names {path}, which does not exist.")
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix in TEXT_SUFFIXES and file.is_file())
            yield from (text for file in files if (text := read_found_file(file)))
        elif path.suffix in (".jsonl", ".json"):
            for place, record in read_json_lines(path):
                yield _text_of(record, tokenizer, place)
        elif text := _read(path):
            yield text


def read_found_file(path: Path) -> str | None:
    """The text of a file that a search came upon; None if it is no UTF-8 or cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError):
        return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"`paths` names {path}, expected UTF-8 text, got other bytes ({error}). Convert it or leave it out."
        ) from error


def read_json_lines(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file of JSON lines, each with its place, "line 3 of x.jsonl"; blank lines are passed over.

    Raises:
        ValueError: a line is no JSON object in UTF-8.
    """
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            place = f"line {number} of {path}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                record = json.loads(text) if text else {}
            except ValueError as error:  # of the bytes or of the JSON in them
                raise ValueError(_no_object(place, line, f" ({error})")) from error
            if not isinstance(record, dict):
                raise ValueError(_no_object(place, line))
            if text:
                yield place, record


def _no_object(place: str, line: bytes, reason: str = "") -> str:
    text = line.decode("utf-8-sig", errors="replace").strip()
    shown = text if len(text) <= SHOWN else text[:SHOWN] + "..."
    return (
        f"{place} must be a JSON object in UTF-8, got {shown!r}{reason}. Write one object a line: no array around "
        "them, and none over several lines."
    )


def _text_of(record: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None, place: str) -> str:
    if isinstance(record.get("text"), str):
        return record["text"]
    if record.get("messages") and tokenizer is not None:
        try:
            return tokenizer.apply_chat_template(record["messages"], tokenize=False)
        except (TemplateError, TypeError, ValueError) as error:
            raise ValueError(
                f"{place} has `messages`, expected some that the tokenizer's chat template takes, which says: "
                f"{_first_line(error)}"
            ) from error
    if record.get("messages"):
        raise ValueError(f"{place} has `messages`, which need a `tokenizer` with a chat template, got None.")
    raise ValueError(f"`paths`: {place} must have `text` or `messages`, got the fields {sorted(record)}.")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def pack_texts(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, batch: int = 2000, max_tokens: int | None = None
) -> np.ndarray:
    """All texts as one array `[n]` of ids, each text followed by the end token.

    Args:
        texts: the texts.
        tokenizer: a fast tokenizer works on all cores.
        batch: texts tokenized at once.
        max_tokens: stop when so many tokens have come together.
    """
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    end = np.array([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id], dtype=dtype)
    parts: list[np.ndarray] = []
    count = 0
    for group in _groups(texts, batch):
        for ids in tokenizer(group, add_special_tokens=False, return_attention_mask=False)["input_ids"]:
            parts += [np.array(ids, dtype=dtype), end]
            count += len(ids) + len(end)
        if max_tokens is not None and count >= max_tokens:
            break
    return np.concatenate(parts)[:max_tokens] if parts else np.array([], dtype=dtype)


def _groups(items: Iterable[str], size: int) -> Iterator[list[str]]:
    group: list[str] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def rows_from_dataset(dataset: Any, tokenizer: PreTrainedTokenizerBase, length: int, packed: bool = True) -> Dataset:
    """Training rows of a Hugging Face dataset with a column `input_ids` (and `labels`), `text` or `messages`.

    Args:
        dataset: a `datasets.Dataset` or any sequence of dictionaries.
        tokenizer: of the target.
        length: tokens of a row.
        packed: put texts one behind the other into rows of equal length, instead of one row per text.

    Raises:
        ValueError: the dataset has none of these columns.
    """
    first = dataset[0]
    if "input_ids" in first:
        return ListedRows(dataset, length)
    if not {"text", "messages"} & set(first):
        raise ValueError(
            f"`dataset` must have a column `input_ids`, `text` or `messages`, got {sorted(first)}. Rename it."
        )
    texts = (_text_of(record, tokenizer, f"row {number}") for number, record in enumerate(dataset))
    if packed:
        return PackedRows(pack_texts(texts, tokenizer), length)
    ids = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return ListedRows([{"input_ids": row} for row in ids if row], length)


def save_tokens(path: str | Path, tokens: np.ndarray) -> None:
    """Write an array of tokens for `load_token_rows`: `[n]` to be packed, or `[rows, length]` as rows.

    What stood at `path` stays until the new file is complete.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        np.save(file, tokens)
    partial.replace(path)


def load_token_rows(path: str | Path, length: int, first_label: int = 0) -> Dataset:
    """Rows of an array written by `save_tokens`, memory-mapped.

    An array `[n]` is cut into rows of `length`. Rows of an array `[rows, m]` stay as they are (cut at `length`); a
    run of one token at a row's end is filling, of which only the first token is learned, and nothing is learned of the
    first `first_label` tokens.

    Raises:
        ValueError: `first_label` leaves nothing to learn, or the array is one text without rows.
    """
    tokens = np.load(path, mmap_mode="r")
    if tokens.ndim == 1:
        if first_label:
            raise ValueError(
                f"`first_label` must be 0 for {path}, which has no rows, got {first_label}. Leave it out."
            )
        return PackedRows(tokens, length)
    if not 0 <= first_label < min(length, tokens.shape[1]):
        raise ValueError(
            f"`first_label` must be from 0 to below the {min(length, tokens.shape[1])} tokens of a row of {path}, got "
            f"{first_label}. Give the tokens of a prompt."
        )
    return FilledRows(tokens, length, first_label)
