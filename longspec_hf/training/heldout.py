"""Held-out inputs for measuring tau: long prompts cut from installed packages that training never saw."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .data import read_json_lines
from .tau import TauInput

TASKS = {
    "completion": "{text}",
    "explanation": "Explain in detail what the following code does and how its parts work together.\n\n{text}",
    "summary": "Write a summary of the following documentation.\n\n{text}",
}
"""The kinds of prompts; a completion is the text itself, the others are a user's message."""


def package_sources(packages: Iterable[str]) -> list[Path]:
    """Python files of installed packages, by their import names, tests left out.

    Raises:
        ValueError: a package is not installed.
    """
    files = []
    for package in packages:
        try:
            spec = find_spec(package)
        except ModuleNotFoundError:  # of `package` in `package.part`
            spec = None
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(
                f"`packages` names {package!r}, which is not an installed package. Install it or leave it out."
            )
        root = Path(next(iter(spec.submodule_search_locations)))
        files += [file for file in sorted(root.rglob("*.py")) if "tests" not in file.parts]
    return files


def package_description(package: str) -> str:
    """The long description (usually the README) of the distribution that holds a package, empty if it has none."""
    names = metadata.packages_distributions().get(package, [])
    return metadata.metadata(names[0]).get_payload() if names else ""  # type: ignore[attr-defined]


def docstrings(source: str) -> str:
    """The triple-quoted texts of a Python source, one after the other."""
    return "\n\n".join(part.strip() for part in source.split('"""')[1::2])


def make_prompts_from_packages(
    packages: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    lengths: tuple[int, int] = (2000, 7000),
    seed: int = 0,
) -> list[TauInput]:
    """`count` prompts (without outputs), the kinds in turn, every text used once, lengths spread over the range.

    Args:
        packages: import names.
        tokenizer: of the target.
        count: number of prompts.
        lengths: smallest and largest number of prompt tokens.
        seed: of the choice of files and lengths.

    Raises:
        ValueError: the packages have too few texts of these lengths.
    """
    rng = random.Random(seed)
    files = package_sources(packages)
    rng.shuffle(files)
    sources = iter([(str(file), file.read_text(encoding="utf-8")) for file in files])
    described = iter([(package, text) for package in packages if (text := package_description(package))])
    prompts = []
    for number in range(count):
        kind = list(TASKS)[number % len(TASKS)]
        low, high = lengths
        wanted = low + (high - low) * rng.random() ** 1.5  # more short ones, as texts are
        while True:
            name, text = next(described, ("", "")) if kind == "summary" else ("", "")
            if not name:
                name, text = next(sources, ("", ""))
                if not name:
                    raise ValueError(f"`packages` hold only {number} texts of {low} to {high} tokens, wanted {count}.")
                text = docstrings(text) if kind == "summary" else text
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(ids) >= wanted:
                break
        body = tokenizer.decode(ids[: int(wanted)])
        end = body.rfind("\n") + 1
        body = body[:end] if end > len(body) // 2 else body
        name = "/".join(Path(name).parts[-3:])
        prompts.append(TauInput(_frame(kind, body, tokenizer), [], name, kind))
    return prompts


def _frame(kind: str, body: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    text = TASKS[kind].format(text=body)
    if kind != "completion" and tokenizer.chat_template:
        message = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def make_context_prompts(
    packages: Sequence[str], tokenizer: PreTrainedTokenizerBase, count: int, contexts: Sequence[int], seed: int = 0
) -> list[TauInput]:
    """Code to be completed after contexts of several lengths: of `count` files, the same place with more or less
    before.

    Args:
        packages: import names.
        tokenizer: of the target.
        count: number of files, each long enough for the longest context.
        contexts: prompt tokens.
        seed: of the choice of files.

    Raises:
        ValueError: the packages have too few files of so many tokens.
    """
    rng = random.Random(seed)
    files = package_sources(packages)
    rng.shuffle(files)
    prompts: list[TauInput] = []
    for file in files:
        ids = tokenizer(file.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
        if len(ids) < max(contexts):
            continue
        end = rng.randint(max(contexts), len(ids))
        name = "/".join(file.parts[-3:])
        prompts += [TauInput(ids[end - context : end], [], name, f"context {context}") for context in contexts]
        if len(prompts) == count * len(contexts):
            return prompts
    raise ValueError(f"`packages` hold fewer than {count} files of {max(contexts)} tokens.")


@torch.no_grad()
def generate_outputs(
    target: PreTrainedModel,
    prompts: Sequence[TauInput],
    new_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int = 1,
) -> Iterator[tuple[int, TauInput]]:
    """Places of prompts in `prompts`, each with the prompt and what plain `generate` makes of it, as they get done.

    Args:
        target: the target.
        prompts: prompts; batches are made of neighbours by length, the shortest first, and padded on the left.
        new_tokens: longest output.
        temperature: of sampling; 0 is greedy.
        seed: batch k is sampled with seed + k.
        batch_size: prompts at once.
    """
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    ends = target.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].prompt_ids))
    for number, first in enumerate(range(0, len(order), batch_size)):
        batch = order[first : first + batch_size]
        length = max(len(prompts[index].prompt_ids) for index in batch)
        ids = torch.zeros(len(batch), length, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(batch):
            ids[row, length - len(prompts[index].prompt_ids) :] = torch.tensor(prompts[index].prompt_ids)
            mask[row, length - len(prompts[index].prompt_ids) :] = 1
        torch.manual_seed(seed + number)
        output = target.generate(
            ids.to(target.device), attention_mask=mask.to(target.device), max_new_tokens=new_tokens, **sampling
        )
        decoding = f"T={temperature} seed={seed + number}" if temperature > 0 else "greedy"
        for index, row_ids in zip(batch, output[:, length:].tolist(), strict=True):
            end = next((place + 1 for place, token in enumerate(row_ids) if token in ends), len(row_ids))
            prompt = prompts[index]
            yield index, TauInput(prompt.prompt_ids, row_ids[:end], prompt.name, prompt.kind, decoding, temperature)


def save_texts(path: str | Path, texts: Iterable[TauInput]) -> None:
    """Write texts as JSON lines, each as soon as it is there."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps(asdict(text)) + "\n")
            file.flush()


def load_texts(path: str | Path) -> list[TauInput]:
    """Read texts written by `save_texts`.

    Raises:
        ValueError: a line is no such text.
    """
    texts = []
    for place, record in read_json_lines(path):
        try:
            texts.append(TauInput(**record))
        except TypeError as error:
            raise ValueError(
                f"{place} must be a held-out text with `prompt_ids` and `output_ids`, got the fields "
                f"{sorted(record)}. Make the file with examples/evaluate_tau.py."
            ) from error
    return texts
