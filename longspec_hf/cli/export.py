"""`longspec-hf export`: a draft folder that `trust_remote_code=True` can load."""

from __future__ import annotations

import argparse

from ..remote_code import export_with_remote_code


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "export",
        help="write a draft for `trust_remote_code=True`",
        description="Copy a draft with a small Python file beside it, so that AutoModel.from_pretrained(folder, "
        "trust_remote_code=True) loads it without `import longspec_hf` before. The package must be installed where it "
        "is loaded; if it is not, the error says so.",
    )
    parser.add_argument("draft", help="Hub id or folder of the draft")
    parser.add_argument("--output", required=True, help="folder to write to")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    print(export_with_remote_code(args.draft, args.output))
