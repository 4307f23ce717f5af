"""Write a draft's model card from what its runs recorded: training facts, tau tables and speed, nothing by hand.

    python examples/make_model_card.py --draft model_cards/longspec-smollm2-135m-instruct \
        --run docs/benchmarks/training_run_short.json docs/benchmarks/training_run_long.json \
        --tau docs/benchmarks/training_tau.csv

`--run` is a JSON object with `facts`, as `LongSpecTrainer` writes to `training_facts.json`, and optionally `stage` and
`data`; give several for several stages. `--tau` are CSV files of `examples/evaluate_tau.py measure`.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

from longspec_hf import LongSpecDraftConfig
from longspec_hf.model_card import make_model_card, markdown_table, save_model_card
from longspec_hf.training.tau import summarize


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Write a draft's model card from its runs.")
    parser.add_argument("--draft", required=True, help="the draft's folder; the card becomes its README.md")
    parser.add_argument("--run", nargs="+", required=True, help="JSON files of training runs, in order of stages")
    parser.add_argument("--tau", nargs="*", default=[], help="CSV files of evaluate_tau.py measure")
    parser.add_argument("--more-tau", nargs="*", default=[], help="such files on other texts, each a table of its own")
    parser.add_argument("--name", default=None, help="repository name; by default the folder's")
    return parser


def main(arguments: list[str] | None = None) -> Path:
    args = make_parser().parse_args(arguments)
    runs = [json.loads(Path(path).read_text(encoding="utf-8")) for path in args.run]
    rows = [row for path in args.tau for row in read_rows(path)]
    notes = [markdown_table(f"Data and stage `{run['stage']}`", None, run["data"]) for run in runs if run.get("data")]
    if rows:
        notes.insert(0, tau_table(rows, "Tau by kind of output"))
    for path in args.more_tau:
        more = read_rows(path)
        notes.insert(1, tau_table(more, f"All trees, {describe(more)}"))
    facts: dict[str, Any] = {}
    for run in runs:
        prefix = f"{run['stage']} " if len(runs) > 1 else ""
        facts |= {f"{prefix}{name}": value for name, value in run["facts"].items()}
    card = make_model_card(
        LongSpecDraftConfig.from_pretrained(args.draft),
        args.name or Path(args.draft).name,
        facts,
        taus={name.removeprefix("tau_"): value for name, value in summarize(rows).items()},
        evaluation=describe(rows) if rows else None,
        notes="\n\n".join(notes) or None,
    )
    return save_model_card(args.draft, card)


def read_rows(path: str) -> list[dict[str, Any]]:
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
    devices = ", ".join(sorted({f"{row['device']}, torch {row['torch']}" for row in rows}))
    head = f"Tokens per target forward, bonus token included; {devices}, transformers {rows[0]['transformers']}."
    return f"## {title}\n\n{head}\n\n" + "\n".join(lines)


if __name__ == "__main__":
    print(main())
