"""Training data made by the target itself: it continues prompts cut from texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..cache import LongSpecCache
from ..hook import CACHE_ARG

INSTRUCTIONS = (
    "Explain what the following code does, step by step.\n\n```python\n{text}\n```",
    "Summarize the following text.\n\n{text}",
    "Write the documentation of the following module.\n\n{text}",
    "What are the main ideas of the following text?\n\n{text}",
    "Review this code and suggest improvements.\n\n```python\n{text}\n```",
    "How does this module work? Describe its parts and what each of them is for.\n\n{text}",
    "Give a short overview of the following.\n\n{text}",
)
"""Tasks put around a text; `{text}` is where it goes."""


def make_prompts(
    tokens: np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    length: int,
    instructed: float = 0.5,
    seed: int = 0,
    from_start: float = 0.0,
) -> torch.Tensor:
    """Prompts `[count, length]` of equal length, so that a batch needs no padding.

    Args:
        tokens: `[n]` ids the prompts are cut from at random places.
        tokenizer: of the target; without a chat template no prompt carries an instruction.
        count, length: how many prompts, and their tokens.
        instructed: share of the prompts that ask for something (`INSTRUCTIONS`); the others are to be continued.
        seed: of the random places.
        from_start: share of the prompts that begin where a text long enough for them begins, as a file given as a
            whole does; texts end with the tokenizer's end token.
    """
    if len(tokens) < length:
        raise ValueError(
            f"`tokens` has {len(tokens)} entries, fewer than one prompt of {length}. Use shorter prompts."
        )
    rng = np.random.default_rng(seed)
    frames = [_frame(tokenizer, text) for text in INSTRUCTIONS] if tokenizer.chat_template else []
    frames = [frame for frame in frames if len(frame[0]) + len(frame[1]) < length]
    starts = _starts_of_texts(tokens, length, tokenizer.eos_token_id) if from_start else np.array([], dtype=int)
    prompts = np.empty((count, length), dtype=np.int64)
    for row in prompts:
        before: list[int] = []
        after: list[int] = []
        if frames and rng.random() < instructed:
            before, after = frames[rng.integers(len(frames))]
        room = length - len(before) - len(after)
        whole = len(starts) and rng.random() < from_start
        start = starts[rng.integers(len(starts))] if whole else rng.integers(len(tokens) - room + 1)
        row[:] = np.concatenate([before, tokens[start : start + room], after])
    return torch.from_numpy(prompts)


def _starts_of_texts(tokens: np.ndarray, length: int, end: int | None) -> np.ndarray:
    """Where texts of at least `length` tokens begin in `tokens`, each text closed by `end`."""
    ends = np.flatnonzero(np.asarray(tokens) == end)
    starts = np.concatenate([[0], ends[:-1] + 1]) if len(ends) else ends
    return starts[ends - starts >= length]


def _frame(tokenizer: PreTrainedTokenizerBase, instruction: str) -> tuple[list[int], list[int]]:
    """Tokens of a chat before and after the text."""
    marker = "\u241e"
    chat = [{"role": "user", "content": instruction.format(text=marker)}]
    before, after = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True).split(marker)
    return tuple(tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after))  # type: ignore


def continue_prompts(
    target: PreTrainedModel,
    prompts: torch.Tensor,
    new_tokens: int,
    batch_size: int,
    temperatures: Sequence[float] = (0.8,),
    seed: int = 0,
) -> np.ndarray:
    """Rows `[count, length + new_tokens]`: all of [`continue_batches`]."""
    return np.concatenate(list(continue_batches(target, prompts, new_tokens, batch_size, temperatures, seed)))


@torch.no_grad()
def continue_batches(
    target: PreTrainedModel,
    prompts: torch.Tensor,
    new_tokens: int,
    batch_size: int,
    temperatures: Sequence[float] = (0.8,),
    seed: int = 0,
) -> Iterator[np.ndarray]:
    """Prompts with the target's continuation, rows `[b, length + new_tokens]` of one batch after the other.

    A finished row is filled up with the end token. Where the device's memory does not hold a batch, this and all later
    ones are made of half as many prompts.

    Args:
        target: the target.
        prompts: `[count, length]`.
        new_tokens: tokens of a continuation.
        batch_size: prompts at once.
        temperatures: taken in turn, one per batch; 0 is greedy.
        seed: of the sampling.
    """
    torch.manual_seed(seed)
    number = first = 0
    while first < len(prompts):
        batch = prompts[first : first + batch_size]
        try:
            rows = _continue(target, batch, new_tokens, temperatures[number % len(temperatures)])
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            batch_size = len(batch) // 2
            rows = None
        if rows is None:  # outside the handler, whose error holds on to the tensors
            torch.cuda.empty_cache()
            continue
        yield rows
        first += len(batch)
        number += 1


def _continue(target: PreTrainedModel, batch: torch.Tensor, new_tokens: int, temperature: float) -> np.ndarray:
    """One batch of [`continue_batches`]."""
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    config = GenerationConfig(
        max_new_tokens=new_tokens,
        pad_token_id=_end(target),
        eos_token_id=target.generation_config.eos_token_id,
        **sampling,
    )
    batch = batch.to(target.device)
    cache = LongSpecCache()  # written in place, where a growing cache would be copied at every token
    cache.reserve(batch.shape[1] + new_tokens)
    output = target.generate(
        batch, attention_mask=torch.ones_like(batch), generation_config=config, **{CACHE_ARG: cache}
    )
    missing = batch.shape[1] + new_tokens - output.shape[1]
    return torch.nn.functional.pad(output, (0, missing), value=_end(target)).cpu().numpy()


def _end(target: PreTrainedModel) -> int:
    """The token that fills up finished rows."""
    ids = target.generation_config.eos_token_id
    return (ids[0] if isinstance(ids, list) else ids) if ids is not None else 0
