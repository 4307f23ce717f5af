"""`longspec-hf bench`: decoding beside transformers' own ways, and rounds beside their floor, on one GPU."""

from __future__ import annotations

import argparse
import csv
import json
import platform
import statistics
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from ..configuration_longspec import DEFAULT_TREE_SHAPE
from ..modeling_longspec import LongSpecDraftModel
from ..pairs import load_pair
from ..settings import resolve_tree_settings
from ..version import __version__
from .counting import CYCLE, SHAPES, counting_target, guessing_draft, rate_for
from .device import copy_rate, device_name
from .plot import plot
from .rounds import time_rounds
from .ways import CAPTURED_PLAIN, COMPILED, PLAIN, WAYS, Decoded, decode

DESCRIPTION = """Measure a pair on one GPU: whole calls beside transformers' own ways to decode, and single rounds
beside the least time their bytes take.

    longspec-hf bench --target Qwen/Qwen2.5-7B-Instruct --draft org/draft --contexts 4096 32768 --csv bench.csv
    longspec-hf bench --shape qwen2.5-7b --tau 3.5      random weights, a scripted draft: for timing alone
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    models = parser.add_argument_group("models", "Either --target (with its draft), or --shape.")
    models.add_argument("--target", help="Hub id, folder or `embedded`")
    models.add_argument("--draft", help="Hub id or folder; the shipped draft for the embedded target")
    models.add_argument("--dtype", default="bfloat16", help="of both models, default %(default)s")
    models.add_argument("--shape", choices=SHAPES, help="random weights of these sizes, with a scripted draft")
    models.add_argument("--tau", type=float, default=3.5, help="tokens a round of the scripted draft, default 3.5")
    models.add_argument(
        "--tree-shape", type=int, nargs="+", default=list(DEFAULT_TREE_SHAPE), help="of the scripted draft"
    )
    models.add_argument("--max-tree-nodes", type=int, default=64, help="of the scripted draft, default %(default)s")
    models.add_argument("--contexts", type=int, nargs="+", default=[4096, 32768], help="prompt lengths in tokens")
    models.add_argument("--batch", type=int, nargs="+", default=[1], help="sequences")
    models.add_argument(
        "--texts",
        type=Path,
        help="where a real model's prompts come from: a text, or the JSONL of `evaluate_tau.py generate`",
    )
    models.add_argument("--prompts", type=int, default=1, help="prompts of each context to take the mean of")
    models.add_argument(
        "--repeats", type=int, default=3, help="calls for each prompt to take the median time of, default %(default)s"
    )
    models.add_argument("--temperature", type=float, default=0.0, help="sample at this temperature; 0: greedy")
    models.add_argument("--new-tokens", type=int, default=256, help="tokens of a call, default %(default)s")
    models.add_argument("--slow-tokens", type=int, default=64, help="the same for transformers' own ways")
    models.add_argument(
        "--ways", nargs="*", default=list(WAYS), choices=WAYS, help="ways of decoding to measure; none: rounds alone"
    )
    models.add_argument("--rounds", action="store_true", help="time single rounds and their parts")
    models.add_argument("--csv", type=Path, help="where to write the figures of the calls")
    models.add_argument("--rounds-csv", type=Path, help="where to write those of the rounds")
    models.add_argument("--plot", type=Path, help="where to draw the calls (needs matplotlib)")


def run(args: argparse.Namespace) -> None:
    """Measure, print tables, write files.

    Raises:
        ValueError: there is no GPU, or the options name no model or no text.
    """
    if not torch.cuda.is_available():
        raise ValueError("`bench` needs an NVIDIA GPU, got none. On a CPU, `make demo` compares the ways to decode.")
    if (args.target is None) == (args.shape is None):
        raise ValueError(
            f"`target` or `shape` must be given, and one of them, got {args.target!r} and {args.shape!r}."
        )
    transformers.logging.set_verbosity_error()  # it warns of the end token that no text has
    device = torch.device("cuda", torch.cuda.current_device())
    facts = {
        "device": device_name(device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "longspec_hf": __version__,
        "python": platform.python_version(),
        "model": args.target or f"{args.shape} (random weights, scripted draft)",
        "dtype": args.dtype,
    }
    target, draft = load(args, device)
    print(f"{facts['device']}, torch {torch.__version__}, {facts['model']}, {args.dtype}", flush=True)
    rounds = measure_rounds(args, target, draft) if args.rounds else []
    calls = measure_calls(args, target, draft) if args.ways else []
    for rows, path in ((rounds, args.rounds_csv), (calls, args.csv)):
        if rows:
            print_table(rows)
        if rows and path:
            write_csv([{**facts, **row} for row in rows], path)
    if args.plot and calls:
        plot(calls, facts, args.plot)


def load(args: argparse.Namespace, device: torch.device) -> tuple[PreTrainedModel, LongSpecDraftModel]:
    """The pair the options name."""
    if args.shape is None:
        pair = load_pair(args.target, args.draft, args.dtype, str(device))
        if pair.draft is None:
            raise ValueError("`draft` must name a draft, got none.")
        return pair.target, pair.draft
    target = counting_target(args.shape, device, getattr(torch, args.dtype))
    draft = guessing_draft(target, tree_shape=args.tree_shape, max_tree_nodes=args.max_tree_nodes)
    positions = max(args.contexts) + 2 * args.new_tokens + 4096
    draft.set_guesses(rate_for(args.tau, len(args.tree_shape)), max(args.batch), positions)
    return target, draft


def measure_rounds(
    args: argparse.Namespace, target: PreTrainedModel, draft: LongSpecDraftModel
) -> list[dict[str, Any]]:
    """Rows of the table of rounds: the tree a call begins with and the root alone, at every context and batch.

    The copy rate of their floors is measured beside each: it changes by some percent as a card warms up.
    """
    settings = resolve_tree_settings(draft, target.generation_config).of_tree(None)
    rows = []
    for context in args.contexts:
        for sequences in args.batch:
            for chosen in (settings, settings.limited_to(0)):
                rate = copy_rate(target.device)
                times = time_rounds(target, draft, chosen, context, rate, sequences, with_parts=bool(chosen.depth))
                rows.append(
                    {
                        "context": context,
                        "batch": sequences,
                        "nodes": times.nodes,
                        "levels": times.levels,
                        "round_ms": round(times.round_ms, 3),
                        "floor_ms": round(times.floor_ms, 3),
                        "times_floor": round(times.round_ms / times.floor_ms, 3),
                        "copy_tb_s": round(rate / 1e12, 3),
                        "tau": round(times.tau, 2),
                        **{name.replace(" ", "_") + "_ms": round(ms, 3) for name, ms in times.parts.items()},
                    }
                )
                print(rows[-1], flush=True)
                torch.cuda.empty_cache()
    return rows


def measure_calls(
    args: argparse.Namespace, target: PreTrainedModel, draft: LongSpecDraftModel
) -> list[dict[str, Any]]:
    """Rows of the table of calls: every way at every context and batch, means over the prompts."""
    rows: list[dict[str, Any]] = []
    options = {"do_sample": True, "temperature": args.temperature, "top_k": 0} if args.temperature else {}
    for context in args.contexts:
        for sequences in args.batch:
            given = prompts(args, target, context, sequences)
            references: dict[int, torch.Tensor] = {}
            for way in args.ways:
                tokens = args.slow_tokens if way.startswith("transformers") else args.new_tokens
                done = [
                    decode(way, target, draft, ids, tokens, warm_up=not index, repeats=args.repeats, **options)
                    for index, ids in enumerate(given)
                ]
                rows.append({"context": context, "batch": sequences, "temperature": args.temperature, "way": way})
                rows[-1] |= describe(done, context, sequences, references)
                print(rows[-1], flush=True)
                torch.cuda.empty_cache()
            add_ratios([row for row in rows if (row["context"], row["batch"]) == (context, sequences)])
    return rows


def describe(done: list[Decoded], context: int, sequences: int, references: dict[int, torch.Tensor]) -> dict[str, Any]:
    """Means of one way's calls, and how far its tokens are those of the first way, which `references` keeps."""
    same, shared = 0, 0
    for index, call in enumerate(done):
        new = call.sequences[:, context:]
        reference = references.setdefault(index, new)
        length = min(new.shape[1], reference.shape[1])
        same += int((new[:, :length] == reference[:, :length]).long().cumprod(1).sum())
        shared += length * len(new)
    token_ms = statistics.mean(call.token_ms for call in done)
    taus = [call.tau for call in done if call.tau is not None]
    return {
        "token_ms": round(token_ms, 3),
        "tokens_per_second": round(1e3 * sequences / token_ms, 1),
        "prefill_ms": round(statistics.mean(call.prefill_ms for call in done), 1),
        "warm_up_s": round(done[0].warm_up_s, 1),
        "tau": round(statistics.mean(taus), 2) if taus else None,
        "plain_steps": sum(call.plain_steps for call in done),
        "peak_gib": round(max(call.peak_bytes for call in done) / 2**30, 1),
        "equal_tokens": same,
        "of_tokens": shared,
    }


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Beside each way of one context, how many times faster it is than each plain one."""
    for name, plain in (("over_default", PLAIN), ("over_compiled", COMPILED), ("over_captured_plain", CAPTURED_PLAIN)):
        base = next((row["token_ms"] for row in rows if row["way"] == plain), None)
        for row in rows:
            row[name] = None if base is None else round(base / row["token_ms"], 2)


def prompts(args: argparse.Namespace, target: PreTrainedModel, context: int, sequences: int) -> list[torch.Tensor]:
    """Prompts `[B, context]`: of the texts for a real model, random ones for the others."""
    if args.shape is not None:
        generator = torch.Generator().manual_seed(context)
        tokens = min(CYCLE, target.config.vocab_size)
        ids = torch.randint(0, tokens, (sequences, context), generator=generator)
        return [ids.to(target.device)]
    if args.texts is None:
        raise ValueError("`texts` must name a file that the prompts come from, got none.")
    texts = read_texts(args.texts, target.config.name_or_path, context, args.prompts * sequences)
    return [
        torch.tensor(texts[first : first + sequences], device=target.device)
        for first in range(0, args.prompts * sequences, sequences)
    ]


def read_texts(path: Path, tokenizer: str, context: int, count: int) -> list[list[int]]:
    """The last `context` ids of `count` prompts of a JSONL file, or as many stretches of a text.

    Raises:
        ValueError: there is not enough text.
    """
    if path.suffix == ".jsonl":
        found = [json.loads(line)["prompt_ids"] for line in path.read_text(encoding="utf-8").splitlines()]
        long = [ids[-context:] for ids in found if len(ids) >= context]
        texts = long[:: max(1, len(long) // count)][:count]
    else:
        ids = transformers.AutoTokenizer.from_pretrained(tokenizer)(path.read_text(encoding="utf-8"))["input_ids"]
        shift = max(1, (len(ids) - context) // max(1, count - 1))
        texts = [ids[start : start + context] for start in range(0, len(ids) - context + 1, shift)][:count]
    if len(texts) < count:
        raise ValueError(
            f"`texts` must hold {count} prompts of {context} tokens, got {len(texts)} in {path}. Name a longer file, "
            "or ask for fewer `prompts` or shorter `contexts`."
        )
    return texts


def print_table(rows: list[dict[str, Any]]) -> None:
    """Columns of all rows, aligned."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names] + [["" if row.get(name) is None else str(row[name]) for name in names] for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    print("\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells))


def write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    """Write the rows; the columns are those of all of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
