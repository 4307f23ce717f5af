"""`longspec-hf bench`: see [`longspec_hf.bench.run`]."""

from __future__ import annotations

import argparse

from ..bench.run import DESCRIPTION, add_arguments, run


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure a pair on a GPU",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.set_defaults(run=run)
