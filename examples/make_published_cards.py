"""Write the cards of the drafts published with the paper, one folder each, with the results that CSV files hold.

    python examples/make_published_cards.py --folder model_cards --results docs/benchmarks

Results of a draft are the files `published_<name>*.csv`, as `examples/evaluate_tau.py measure` writes them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from longspec_hf.model_card import save_model_card
from longspec_hf.published_cards import PUBLISHED_DRAFTS, make_published_card


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("model_cards"))
    parser.add_argument("--results", type=Path, default=Path("docs/benchmarks"))
    return parser


def main(arguments: list[str] | None = None) -> list[Path]:
    args = make_parser().parse_args(arguments)
    return [
        save_model_card(
            args.folder / draft.name,
            make_published_card(draft, sorted(args.results.glob(f"published_{draft.name}*.csv"))),
        )
        for draft in PUBLISHED_DRAFTS
    ]


if __name__ == "__main__":
    print("\n".join(map(str, main())))
