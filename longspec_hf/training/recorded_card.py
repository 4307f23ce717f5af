"""A model card from what the runs of a draft recorded: training facts and CSV files of tau, nothing by hand."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..configuration_longspec import LongSpecDraftConfig
from ..model_card import make_model_card, markdown_table, save_model_card
from .tau import summarize

FACTS_FILE = "training_facts.json"
SUMMED_FACTS = ("steps", "tokens", "seconds")


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
        ValueError: the folder holds no draft, or there is no record of a run.
    """
    folder = Path(draft)
    if not (folder / "config.json").exists():
        raise ValueError(f"`draft` must be the folder of a draft, got {str(draft)!r} without a config.json.")
    records = [_read_run(path) for path in _run_files(folder, runs)]
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
    record = json.loads(path.read_text(encoding="utf-8"))
    if "facts" not in record:
        raise ValueError(f"`runs` must be records of training, got {path} without `facts`.")
    return {"stage": path.resolve().parent.name, **record}


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Rows of `TauEvaluator.rows`, read back from CSV."""
    with open(path, encoding="utf-8", newline="") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    for row in rows:
        row["looping"] = row["looping"] == "True"
        row |= {name: int(row[name]) for name in ("rounds", "committed", "prompt_tokens", "output_tokens")}
    return rows


def texts_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per text."""
    return [row for row in rows if row["tree"] == rows[0]["tree"]]


def describe(rows: list[dict[str, Any]]) -> str:
    """What tau was measured on, a few words."""
    texts = texts_of(rows)
    lengths = [row["prompt_tokens"] for row in texts]
    looping = sum(row["looping"] for row in texts)
    return (
        f"{len(texts)} outputs after held-out prompts of {min(lengths)}-{max(lengths)} tokens (code completion, "
        f"explanation, summary), {looping} of them looping"
    )


def tau_table(rows: list[dict[str, Any]], title: str) -> str:
    """Tau by decoding and looping, one column per tree."""
    trees = list(dict.fromkeys(row["tree"] for row in rows))
    lines = ["| outputs | texts | " + " | ".join(tree.replace("_", " + ") for tree in trees) + " |"]
    lines.append("|---" * (len(trees) + 2) + "|")
    kinds = {
        "all": lambda row: True,
        "looping": lambda row: row["looping"],
        "not looping": lambda row: not row["looping"],
        "greedy": lambda row: row["decoding"] == "greedy",
        "greedy, not looping": lambda row: row["decoding"] == "greedy" and not row["looping"],
        "sampled at T = 0.8": lambda row: row["decoding"] != "greedy",
    }
    for name, wanted in kinds.items():
        chosen = [row for row in rows if wanted(row)]
        if chosen:
            taus = summarize(chosen)
            cells = " | ".join(f"{taus[f'tau_{tree}']:.2f}" for tree in trees)
            lines.append(f"| {name} | {len(texts_of(chosen))} | {cells} |")
    fields = "{device}, torch {torch}, transformers {transformers}"
    places = "; ".join(sorted({fields.format_map(row) for row in rows}))
    head = f"Tokens per target forward, bonus token included; {places}."
    return f"## {title}\n\n{head}\n\n" + "\n".join(lines)
