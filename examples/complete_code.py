"""Complete code of a repository: other files of the folder go into the prompt, then the unfinished file.

    python examples/complete_code.py path/to/repository path/to/repository/module.py --line 40

The file's first `--line` lines are what is there; the files that share most names with them come nearest to it. By
default the embedded target continues a file of this package.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from longspec_hf.cli.continuation import print_continuation
from longspec_hf.cli.options import (
    add_decoding_options,
    add_pair_options,
    load_pair_of,
)
from longspec_hf.pairs import encode_prompts

PACKAGE = Path(__file__).parent.parent / "longspec_hf"


def main(arguments: list[str] | None = None) -> None:
    args = make_parser().parse_args(arguments)
    if args.file is None:
        if args.folder != PACKAGE:
            raise ValueError(
                f"`file` must be given with a folder of yours ({args.folder}), got none: name a file in it."
            )
        args.file = PACKAGE / "stats.py"
    if not args.file.resolve().is_relative_to(args.folder.resolve()):
        raise ValueError(
            f"`file` must lie in `folder` ({args.folder}), got {args.file}. Name the folder that holds it."
        )
    lines = args.file.read_text(encoding="utf-8").splitlines(keepends=True)
    head = "".join(lines[: len(lines) // 2 if args.line is None else args.line])
    others = read_others(args.folder, args.file, args.glob)
    pair = load_pair_of(args)
    budget = min(args.prompt_tokens, pair.context - args.max_new_tokens)
    prompt = pack(pair.tokenizer, others, str(args.file.resolve().relative_to(args.folder.resolve())), head, budget)
    inputs = encode_prompts(pair, [prompt], chat=False)
    print(head, end="")
    print_continuation(args, pair, inputs)


def read_others(folder: Path, file: Path, glob: str) -> dict[str, str]:
    """Texts by relative path of the folder's files, the unfinished one left out."""
    paths = sorted(path for path in folder.rglob(glob) if path.is_file() and path.resolve() != file.resolve())
    return {str(path.relative_to(folder)): path.read_text(encoding="utf-8", errors="replace") for path in paths}


def names_of(code: str) -> set[str]:
    """Identifiers long enough to mean something."""
    return set(re.findall(r"[A-Za-z_]\w{3,}", code))


def pack(tokenizer: PreTrainedTokenizerBase, others: dict[str, str], name: str, head: str, budget: int) -> str:
    """A prompt of at most about `budget` tokens: whole files, the most related ones last, then the unfinished one.

    Raises:
        ValueError: the unfinished file alone exceeds the budget.
    """
    prompt = f"# {name}\n{head}"
    left = budget - len(tokenizer(prompt)["input_ids"])
    if left < 0:
        raise ValueError(f"`prompt_tokens` must hold at least the unfinished file, which exceeds {budget} by {-left}.")
    wanted = names_of(head)
    related = sorted(others, key=lambda other: (-len(wanted & names_of(others[other])), other))
    for other in related:
        part = f"# {other}\n{others[other]}\n\n"
        size = len(tokenizer(part)["input_ids"])
        if size <= left:
            prompt, left = part + prompt, left - size
    return prompt


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=PACKAGE, help="the repository, or a part of it")
    parser.add_argument("file", nargs="?", type=Path, help="a file in it; stats.py of this package by default")
    parser.add_argument("--line", type=int, help="lines of the file that are there; half of it by default")
    parser.add_argument("--glob", default="*.py", help="which files are packed, default %(default)s")
    parser.add_argument("--prompt-tokens", type=int, default=6000, help="default %(default)s")
    add_pair_options(parser)
    add_decoding_options(parser, max_new_tokens=160)
    return parser


if __name__ == "__main__":
    main()
