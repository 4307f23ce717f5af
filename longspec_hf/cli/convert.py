"""`longspec-hf convert`: a published `sail/longspec-*` checkpoint as a draft of this package."""

from __future__ import annotations

import argparse


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "convert",
        help="convert a published LongSpec checkpoint",
        description="Convert a published checkpoint, such as sail/longspec-QwQ-32B-Preview, to a draft folder.",
    )
    parser.add_argument("source", help="Hub id or folder of the checkpoint")
    parser.add_argument("--target", help="Hub id or folder of the target; by default the one the checkpoint names")
    parser.add_argument("--revision", help="branch, tag or commit of the checkpoint on the Hub")
    parser.add_argument("--dtype", help="of the draft, such as bfloat16; by default the checkpoint's")
    parser.add_argument("--output", required=True, help="folder to write the draft to")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ..convert import convert_checkpoint

    convert_checkpoint(
        args.source, target=args.target, output_dir=args.output, revision=args.revision, dtype=args.dtype
    )
    print(args.output)
