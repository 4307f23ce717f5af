"""A model card from what the runs of a draft recorded: training facts and CSV files of tau, nothing by hand."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..configuration_longspec import LongSpecDraftConfig
from ..model_card import make_model_card, markdown_table, save_model_card
from .heldout import TASKS
from .tau import summarize

FACTS_FILE = "training_facts.json"
SUMMED_FACTS = ("steps", "tokens", "seconds")
TEXT_COLUMNS = ("kind", "decoding", "looping", "tree", "device", "torch", "transformers")
NUMBER_COLUMNS = ("rounds", "committed", "prompt_tokens", "output_tokens")
TASK_NAMES = {"completion": "code completion"}  # where a card calls a kind otherwise


def write_card(
    draft: str | Path,
    runs: Sequence[str | Path] | None = None,
    taus: Sequence[str | Path] = (),
    more_taus: Sequence[str | Path] = (),
    name: str | None = None,
) -> Path:
    """Write `draft/README.md` and return its path.

    Args:
        draft: the draft's folder.
        runs: JSON files with `facts`, as `LongSpecTrainer` writes, and optionally `stage` and `data`, in order of
            stages; by default the folder's own `training_facts.json`.
        taus: CSV files of `examples/evaluate_tau.py measure`.
        more_taus: such files on other texts, each a table of its own.
        name: repository name; by default the folder's.

    Raises:
        ValueError: the folder holds no draft, there is no record of a run, or a file holds something else.
    """
    folder = Path(draft)
    if not (folder / "config.json").exists():
        raise ValueError(f"`draft` must be the folder of a draft, got {str(draft)!r} without a config.json.")
    records = _told_apart([_read_run(path) for path in _run_files(folder, runs)])
    rows = [row for path in taus for row in read_rows(path)]
    notes = [
        markdown_table(f"Data and stage `{run['stage']}`", None, run["data"]) for run in records if run.get("data")
    ]
    if rows:
        notes.insert(0, tau_table(rows, "Tau by kind of output"))
    for path in more_taus:
        more = read_rows(path)
        notes.insert(1, tau_table(more, f"All trees, {describe(more)}"))
    facts: dict[str, Any] = {}
    for run in records:
        prefix = f"{run['stage']} " if len(records) > 1 else ""
        facts |= {f"{prefix}{fact}": value for fact, value in run["facts"].items()}
    if len(records) > 1:
        facts |= {f"all stages {fact}": sum(run["facts"].get(fact, 0) for run in records) for fact in SUMMED_FACTS}
    card = make_model_card(
        LongSpecDraftConfig.from_pretrained(folder),
        name or folder.resolve().name,
        facts,
        taus={tree.removeprefix("tau_"): value for tree, value in summarize(rows).items()},
        evaluation=describe(rows) if rows else None,
        notes="\n\n".join(notes) or None,
    )
    return save_model_card(folder, card)


def _run_files(folder: Path, runs: Sequence[str | Path] | None) -> list[Path]:
    if runs is not None:
        return [Path(run) for run in runs]
    if not (folder / FACTS_FILE).exists():
        raise ValueError(
            f"`runs` was not given and {folder} holds no {FACTS_FILE}, expected a record of training. Name the JSON "
            "files of the runs."
        )
    return [folder / FACTS_FILE]


def _read_run(path: Path) -> dict[str, Any]:
    """A record of a run; where it names no stage, its folder does."""
    try:
        record = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"`runs` must be records of training in JSON, got {path}: {error}.") from error
    if not isinstance(record, dict) or not isinstance(record.get("facts"), dict):
        raise ValueError(f"`runs` must be records of training, got {path} without `facts`.")
    return {"stage": path.resolve().parent.name, **record}


def _told_apart(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records; stages of one name are numbered in their order, "short (1)" and "short (2)"."""
    names = [record["stage"] for record in records]
    numbers = [names[: place + 1].count(name) for place, name in enumerate(names)]
    return [
        {**record, "stage": f"{name} ({number})" if names.count(name) > 1 else name}
        for record, name, number in zip(records, names, numbers, strict=True)
    ]


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Rows of `TauEvaluator.rows`, read back from CSV.

    Raises:
        ValueError: columns are missing, there are no rows, or a number is none.
    """
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        absent = [name for name in (*TEXT_COLUMNS, *NUMBER_COLUMNS) if name not in (reader.fieldnames or ())]
        if absent:
            raise ValueError(
                f"`taus` must be CSV files of examples/evaluate_tau.py measure, got {path} without the columns "
                f"{', '.join(absent)}."
            )
        rows: list[dict[str, Any]] = list(reader)
    if not rows:
        raise ValueError(f"`taus` must hold rows of measured tau, got {path} with its header only. Measure again.")
    for number, row in enumerate(rows, 1):
        row["looping"] = row["looping"] == "True"
        try:
            row |= {name: int(row[name]) for name in NUMBER_COLUMNS}
        except (TypeError, ValueError) as error:
            raise ValueError(f"`taus`: row {number} of {path} is broken: {error}. Measure again.") from error
    return rows


def texts_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per text."""
    return [row for row in rows if row["tree"] == rows[0]["tree"]]


def describe(rows: list[dict[str, Any]]) -> str:
    """What tau was measured on, a few words."""
    texts = texts_of(rows)
    lengths = [row["prompt_tokens"] for row in texts]
    looping = sum(row["looping"] for row in texts)
    tasks = ", ".join(tasks_of(rows))
    return (
        f"{len(texts)} outputs after held-out prompts of {min(lengths)}-{max(lengths)} tokens"
        f"{f' ({tasks})' if tasks else ''}, {looping} of them looping"
    )


def tasks_of(rows: list[dict[str, Any]]) -> list[str]:
    """What the prompts asked for, in a card's words; code after contexts of given lengths is completed too."""
    kinds = {"completion" if row["kind"].startswith("context ") else row["kind"] for row in rows} - {""}
    known = [kind for kind in TASKS if kind in kinds]
    return [TASK_NAMES.get(kind, kind) for kind in (*known, *sorted(kinds - set(known)))]


def sampled_as(decoding: str) -> str:
    """How a text was sampled, without its seed: "sampled at T = 0.8" of "T=0.8 seed=3"; of "greedy" just that."""
    found = re.match(r"T=(\S+)", decoding)
    return f"sampled at T = {found[1]}" if found else decoding or "sampled"


def tau_table(rows: list[dict[str, Any]], title: str) -> str:
    """Tau by decoding and looping, one column per tree."""
    trees = list(dict.fromkeys(row["tree"] for row in rows))
    lines = ["| outputs | texts | " + " | ".join(tree.replace("_", " + ") for tree in trees) + " |"]
    lines.append("|---" * (len(trees) + 2) + "|")
    greedy = [row for row in rows if row["decoding"] == "greedy"]
    sampled = sorted({sampled_as(row["decoding"]) for row in rows} - {"greedy"})
    kinds = {
        "all": rows,
        "looping": [row for row in rows if row["looping"]],
        "not looping": [row for row in rows if not row["looping"]],
        "greedy": greedy,
        "greedy, not looping": [row for row in greedy if not row["looping"]],
        **{name: [row for row in rows if sampled_as(row["decoding"]) == name] for name in sampled},
    }
    for name, chosen in kinds.items():
        if chosen:
            taus = summarize(chosen)
            measured = [taus.get(f"tau_{tree}") for tree in trees]
            cells = " | ".join("" if tau is None else f"{tau:.2f}" for tau in measured)
            lines.append(f"| {name} | {len(texts_of(chosen))} | {cells} |")
    fields = "{device}, torch {torch}, transformers {transformers}"
    places = "; ".join(sorted({fields.format_map(row) for row in rows}))
    head = f"Tokens per target forward, bonus token included; {places}."
    return f"## {title}\n\n{head}\n\n" + "\n".join(lines)
