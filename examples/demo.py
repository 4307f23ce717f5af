"""Plain decoding, prompt lookup and LongSpec side by side, on a real model and a long real document.

    python examples/demo.py
    python examples/demo.py --prompt-tokens 6000 --new-tokens 256 --sample

The target is SmolLM2-135M-Instruct; the document is the source of a package the shipped draft was not trained on.
"""

from __future__ import annotations

import argparse
import inspect
import time
from dataclasses import dataclass
from pathlib import Path

import jinja2.environment
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from longspec_hf import LongSpecDraftModel, SpeculationStats
from longspec_hf.embedded import load_embedded_target

SHIPPED_DRAFT = Path(__file__).parent.parent / "model_cards" / "longspec-smollm2-135m-instruct"
# On a CPU a forward over many tokens costs far more than one over a single token, so the tree is a short chain.
CPU_TREE = {"tree_shape": [1, 1, 1], "ngram_branch_length": 3}
QUESTION = "Explain what this Python code does, function by function, in plain words.\n\n```python\n{code}\n```"


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
    """One way of decoding the prompt."""

    name: str
    ids: torch.Tensor
    prefill_seconds: float
    tokens_per_second: float
    tau: float | None


def run(
    name: str,
    target: PreTrainedModel,
    inputs: dict[str, torch.Tensor],
    seed: int,
    settings: dict,
    draft: LongSpecDraftModel | None = None,
) -> Run:
    """Time one `generate` call; decoding speed counts the tokens after the first put."""
    clock = Clock()
    torch.manual_seed(seed)
    config = GenerationConfig(**{**target.generation_config.to_diff_dict(), **settings})
    output = target.generate(**inputs, streamer=clock, generation_config=config, assistant_model=draft)
    seconds, tokens = clock.last - clock.first, sum(clock.puts[2:])
    stats: SpeculationStats | None = getattr(output, "speculation_stats", None)
    tau = stats.tau if stats else sum(clock.puts[2:]) / max(1, len(clock.puts) - 2)
    return Run(name, output.sequences, clock.first - clock.began, tokens / max(seconds, 1e-9), tau)


def build_prompt(tokenizer: PreTrainedTokenizerBase, tokens: int) -> dict[str, torch.Tensor]:
    """A chat prompt of about `tokens` tokens around the head of a long source file."""
    code = inspect.getsource(jinja2.environment)
    code_ids = tokenizer(code)["input_ids"][:tokens]
    message = [{"role": "user", "content": QUESTION.format(code=tokenizer.decode(code_ids))}]
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


def main() -> None:
    """Run the three ways and print a table."""
    args = make_parser().parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    target, tokenizer = load_embedded_target()
    draft, description = load_draft(target)
    inputs = build_prompt(tokenizer, args.prompt_tokens)
    plain = {
        "max_new_tokens": args.new_tokens,
        "do_sample": args.sample,
        "temperature": 0.8 if args.sample else None,
        "repetition_penalty": 1.1,  # this small model repeats itself under greedy decoding
        "return_dict_in_generate": True,
    }
    tree = {
        "tree_shape": args.tree_shape,
        "max_tree_nodes": args.max_tree_nodes,
        "ngram_branch_length": args.ngram_branch_length,
    }
    tree = {**CPU_TREE, **{name: value for name, value in tree.items() if value is not None}}
    print(f"SmolLM2-135M-Instruct, fp32, {target.device}, {torch.get_num_threads()} threads; {description}.")
    print(f"Prompt of {inputs['input_ids'].shape[1]} tokens, {args.new_tokens} new ones.")
    runs = [
        run("plain generate", target, inputs, args.seed, plain),
        run("prompt lookup", target, inputs, args.seed, {**plain, "prompt_lookup_num_tokens": 10}),
        run("LongSpec", target, inputs, args.seed, {**plain, **tree}, draft),
    ]
    print(f"\n{'':16}{'equal':>7}{'tau':>7}{'prefill s':>11}{'tokens/s':>10}{'speed':>8}")
    for result in runs:
        equal = "yes" if torch.equal(result.ids, runs[0].ids) else "NO"
        ratio = result.tokens_per_second / runs[0].tokens_per_second
        print(
            f"{result.name:16}{equal:>7}{result.tau:>7.2f}{result.prefill_seconds:>11.2f}"
            f"{result.tokens_per_second:>10.1f}{ratio:>7.2f}x"
        )
    print(f"\n{tokenizer.decode(runs[-1].ids[0, inputs['input_ids'].shape[1] :], skip_special_tokens=True)[:600]}")
    if not torch.equal(runs[2].ids, runs[0].ids):
        raise SystemExit("LongSpec's tokens differ from plain generate's.")


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt-tokens", type=int, default=2500, help="tokens taken of the document")
    parser.add_argument("--new-tokens", type=int, default=96, help="tokens to generate")
    parser.add_argument("--sample", action="store_true", help="sample at temperature 0.8 instead of greedy decoding")
    parser.add_argument("--seed", type=int, default=0, help="of the random stream, reset before each way")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; PyTorch's choice by default")
    parser.add_argument("--tree-shape", type=int, nargs="*", default=None, help="nodes per depth")
    parser.add_argument("--max-tree-nodes", type=int, default=None, help="nodes verified a round, the root included")
    parser.add_argument(
        "--ngram-branch-length", type=int, default=None, help="tokens copied from the context; 0: none"
    )
    return parser


if __name__ == "__main__":
    main()
