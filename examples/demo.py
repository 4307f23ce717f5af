"""Plain decoding, prompt lookup and LongSpec side by side, on a real model and long real documents.

    python examples/demo.py
    python examples/demo.py --documents 3 --prompt-tokens 6000 --new-tokens 256
    python examples/demo.py --sample

The target is SmolLM2-135M-Instruct; the documents are source files of packages the shipped draft was not trained on.
A small model often falls into a loop, which is easy to draft. The documents were chosen because its greedy text of
them does not loop, and for nothing else; the table says how much of each text repeats itself.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from longspec_hf import LongSpecDraftModel, SpeculationStats
from longspec_hf.embedded import load_embedded_target
from longspec_hf.training.tau import LOOP_SHARE, repeated_share

SHIPPED_DRAFT = Path(__file__).parent.parent / "model_cards" / "longspec-smollm2-135m-instruct"
EXPLAIN = "Explain in detail what the following code does and how its parts work together.\n\n{code}"
DOCUMENTS = [
    ("jinja2.loaders", EXPLAIN),
    ("networkx.algorithms.connectivity.disjoint_paths", None),
    ("networkx.classes.multidigraph", EXPLAIN),
]
"""Modules, and what is asked about their source; `None`: nothing, the model goes on with it."""
WAYS = ("plain generate", "prompt lookup", "LongSpec")


class Clock(BaseStreamer):
    """A streamer that notes when the first and the last token came."""

    def __init__(self) -> None:
        self.began = self.first = self.last = time.perf_counter()
        self.puts: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.last = time.perf_counter()
        self.puts.append(value.numel())
        if len(self.puts) == 2:  # the prompt is put before the first token
            self.first = self.last

    def end(self) -> None:
        """The last `put` has noted the time already."""


@dataclass
class Run:
    """One way of decoding one prompt; `tokens` are those after the first, decoded in `seconds` by `forwards`."""

    ids: torch.Tensor
    prefill_seconds: float
    seconds: float
    tokens: int
    forwards: int

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed."""
        return self.tokens / max(self.seconds, 1e-9)


def run(
    target: PreTrainedModel,
    inputs: dict[str, torch.Tensor],
    seed: int,
    settings: dict,
    draft: LongSpecDraftModel | None = None,
) -> Run:
    """Time one `generate` call."""
    clock = Clock()
    torch.manual_seed(seed)
    output = target.generate(
        **inputs, streamer=clock, generation_config=GenerationConfig(**settings), assistant_model=draft
    )
    stats: SpeculationStats | None = getattr(output, "speculation_stats", None)
    tokens = sum(clock.puts[2:])
    # Prompt lookup streams all tokens of a forward at once.
    forwards = round(tokens / stats.tau) if stats and stats.tau else len(clock.puts) - 2
    return Run(
        output.sequences,
        clock.first - clock.began,
        clock.last - clock.first,
        tokens,
        max(1, forwards),
    )


def build_prompt(
    tokenizer: PreTrainedTokenizerBase, module: str, question: str | None, tokens: int
) -> dict[str, torch.Tensor]:
    """The first `tokens` tokens of a module's source, as they are or in a chat prompt."""
    source = inspect.getsource(importlib.import_module(module))
    ids = tokenizer(source, return_tensors="pt")["input_ids"][:, :tokens]
    if question is None:
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    message = [{"role": "user", "content": question.format(code=tokenizer.decode(ids[0]))}]
    encoded = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}


def load_draft(target: PreTrainedModel) -> tuple[LongSpecDraftModel, str]:
    """The shipped draft, or a fresh one if this checkout holds none."""
    if (SHIPPED_DRAFT / "config.json").exists():
        return LongSpecDraftModel.from_pretrained(
            SHIPPED_DRAFT, dtype=target.dtype
        ), "trained draft of this repository"
    torch.manual_seed(0)
    draft = LongSpecDraftModel.from_target(target, draft_vocab_size=8192)
    return draft, "FRESHLY INITIALISED draft: its beam knows nothing yet, only the n-gram branch helps"


def print_row(name: str, runs: list[Run], plain: list[Run]) -> None:
    """One way, over one or several prompts."""
    speed, plain_speed = (sum(r.tokens for r in rs) / sum(r.seconds for r in rs) for rs in (runs, plain))
    equal = all(torch.equal(one.ids, other.ids) for one, other in zip(runs, plain, strict=True))
    tau = sum(r.tokens for r in runs) / sum(r.forwards for r in runs)
    prefill = sum(r.prefill_seconds for r in runs)
    ratio = speed / plain_speed
    columns = f"{'yes' if equal else 'NO':>7}{tau:>7.2f}{prefill:>11.2f}{speed:>10.1f}{ratio:>7.2f}x"
    print(f"  {name:16}{columns}", flush=True)


def main() -> None:
    """Run the three ways on every document and print tables."""
    args = make_parser().parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    target, tokenizer = load_embedded_target()
    draft, description = load_draft(target)
    plain = {"max_new_tokens": args.new_tokens, "do_sample": args.sample, "return_dict_in_generate": True}
    if args.sample:
        plain["temperature"] = 0.8
    tree = {name: getattr(args, name) for name in ("tree_shape", "max_tree_nodes", "ngram_branch_length")}
    # What is measured here are the rounds; by default a call that one slow round makes doubt goes on plainly.
    ours = {"fallback_to_plain": False, **{name: value for name, value in tree.items() if value is not None}}
    print(f"SmolLM2-135M-Instruct, fp32, {target.device}, {torch.get_num_threads()} threads; {description}.")
    header = f"  {'':16}{'equal':>7}{'tau':>7}{'prefill s':>11}{'tokens/s':>10}{'speed':>8}"
    runs: dict[str, list[Run]] = {way: [] for way in WAYS}
    for module, question in DOCUMENTS[: args.documents]:
        inputs = build_prompt(tokenizer, module, question, args.prompt_tokens)
        length = inputs["input_ids"].shape[1]
        task = "continue" if question is None else "explain"
        print(f"\n{task} {module}: prompt of {length} tokens, {args.new_tokens} new ones\n{header}", flush=True)
        settings = {WAYS[0]: plain, WAYS[1]: {**plain, "prompt_lookup_num_tokens": 10}, WAYS[2]: {**plain, **ours}}
        for way in WAYS:
            runs[way].append(run(target, inputs, args.seed, settings[way], draft if way == WAYS[2] else None))
            print_row(way, runs[way][-1:], runs[WAYS[0]][-1:])
        new_ids = runs[WAYS[0]][-1].ids[0, length:]
        share = repeated_share(new_ids.tolist())
        print(f"  {share:.0%} of the text's 8-token runs repeat: {'LOOPING' if share > LOOP_SHARE else 'not looping'}")
        print("  | " + tokenizer.decode(new_ids, skip_special_tokens=True)[:300].replace("\n", "\n  | "))
    print(f"\nall documents\n{header}")
    for way in WAYS:
        print_row(way, runs[way], runs[WAYS[0]])
    if any(not torch.equal(a.ids, b.ids) for a, b in zip(runs[WAYS[2]], runs[WAYS[0]], strict=True)):
        raise SystemExit("LongSpec's tokens differ from plain generate's.")


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=2, choices=range(1, len(DOCUMENTS) + 1), help="how many")
    parser.add_argument("--prompt-tokens", type=int, default=2300, help="tokens taken of a document")
    parser.add_argument("--new-tokens", type=int, default=96, help="tokens to generate")
    parser.add_argument("--sample", action="store_true", help="sample at temperature 0.8 instead of greedy decoding")
    parser.add_argument("--seed", type=int, default=0, help="of the random stream, reset before each way")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; PyTorch's choice by default")
    parser.add_argument(
        "--tree-shape", type=int, nargs="*", default=None, help="nodes per depth; by default chosen during a call"
    )
    parser.add_argument("--max-tree-nodes", type=int, default=None, help="nodes verified a round, the root included")
    parser.add_argument(
        "--ngram-branch-length", type=int, default=None, help="tokens copied from the context; 0: none"
    )
    return parser


if __name__ == "__main__":
    main()
