"""Write a draft's model card from what its runs recorded: training facts, tau tables and speed, nothing by hand.

    python examples/make_model_card.py --draft model_cards/longspec-smollm2-135m-instruct \
        --run docs/benchmarks/training_run_{short,long,short_2,long_2,short_3,long_3,short_5,long_5}.json \
        docs/benchmarks/training_run_{layer_6,short_6,long_6}.json \
        --tau docs/benchmarks/training_tau.csv docs/benchmarks/training_tau_lookup.csv

`--run` is a JSON object with `facts`, as `LongSpecTrainer` writes to `training_facts.json`, and optionally `stage` and
`data`; give several for several stages. `--tau` are CSV files of `examples/evaluate_tau.py measure`. The command of an
installed package is `longspec-hf card`, which takes the draft without `--draft`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from longspec_hf.training.recorded_card import write_card


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Write a draft's model card from its runs.")
    parser.add_argument("--draft", required=True, help="the draft's folder; the card becomes its README.md")
    parser.add_argument("--run", nargs="+", help="JSON files of training runs, in order of stages")
    parser.add_argument("--tau", nargs="*", default=[], help="CSV files of evaluate_tau.py measure")
    parser.add_argument("--more-tau", nargs="*", default=[], help="such files on other texts, each a table of its own")
    parser.add_argument("--name", default=None, help="repository name; by default the folder's")
    return parser


def main(arguments: list[str] | None = None) -> Path:
    args = make_parser().parse_args(arguments)
    return write_card(args.draft, args.run, args.tau, args.more_tau, args.name)


if __name__ == "__main__":
    print(main())
