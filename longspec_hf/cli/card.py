"""`longspec-hf card`: a draft's model card from what its runs recorded."""

from __future__ import annotations

import argparse


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "card",
        help="write a draft's model card",
        description="Write a draft's README.md from its configuration, its training facts and CSV files of tau.",
    )
    parser.add_argument("draft", help="the draft's folder")
    parser.add_argument(
        "--run",
        dest="runs",
        nargs="+",
        help="JSON files of training runs, in order of stages; by default the folder's",
    )
    parser.add_argument("--tau", nargs="*", default=[], help="CSV files of examples/evaluate_tau.py measure")
    parser.add_argument("--more-tau", nargs="*", default=[], help="such files on other texts, each a table of its own")
    parser.add_argument("--name", help="repository name; by default the folder's")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ..training.recorded_card import write_card

    print(write_card(args.draft, args.runs, args.tau, args.more_tau, args.name))
