"""`longspec-hf train`: hands its arguments to [`longspec_hf.training.run.main`]."""

from __future__ import annotations

import argparse


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("train", help="train a draft; needs the extra `train`", add_help=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ..training.run import main

    main(args.rest, prog="longspec-hf train")
