"""Run every family of targets, as a tiny random model, against plain decoding and write the table of `docs/models.md`.

    python examples/make_models_table.py --page docs/models.md

The models and the comparison are those of `tests/family_matrix.py`. Takes a minute or two on a CPU.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import transformers

TESTS = Path(__file__).parent.parent / "tests"
MARK = "<!-- table: examples/make_models_table.py -->"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=Path("docs/models.md"))
    return parser


def make_table() -> str:
    """Markdown: a row a family, a column for each attention implementation and way of drafting."""
    sys.path.insert(0, str(TESTS))
    from family_matrix import LENGTHS, NAMES, NEW_TOKENS, WAYS, attentions, differing_lengths
    from models import WINDOW, tiny_target

    columns = [(attention, way) for attention in ("eager", "sdpa") for way in WAYS]
    lines = [
        f"transformers {transformers.__version__}, torch {torch.__version__}, fp32, CPU; windows of {WINDOW} tokens, "
        f"{NEW_TOKENS} new tokens behind prompts of {', '.join(map(str, LENGTHS['tree']))} tokens (chains: "
        f"{', '.join(map(str, LENGTHS['chain']))}).",
        "",
        "| family | class | " + " | ".join(f"{attention}, {way}" for attention, way in columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    for family, name in NAMES.items():
        cells = []
        for attention, way in columns:
            if attention not in attentions(family):
                cells.append("not offered")
                continue
            differing = differing_lengths(family, attention, way)
            cells.append(f"differs at {differing}" if differing else "equal")
        lines.append(f"| {name} | `{type(tiny_target(family)).__name__}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    torch.set_num_threads(1)  # the models are too small for more
    page = make_parser().parse_args(arguments).page
    text, _, _ = page.read_text().partition(MARK)
    page.write_text(f"{text}{MARK}\n\n{make_table()}\n")


if __name__ == "__main__":
    main()
