"""The text being written: token ids in one growing buffer, and the drawing of one token as plain decoding draws it."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
)

INITIAL_ROOM = 1024
NEAR_TIE_ULPS = 4
"""Units in the last place within which two scores of a tree's forward count as a near-tie: twice what one rounding
more can move each."""
HARD_TIE_ULPS = 2
"""The same for a forward of one token, where only the cache may have been rounded otherwise."""


class TextBuffer:
    """Ids of one sequence, int64 `[1, length]`, appended in place so that a token costs no copy of the text.

    New tokens go to their device when somebody asks for the ids: a copy would wait for what the device is doing.
    """

    def __init__(self, input_ids: torch.Tensor) -> None:
        self.length = input_ids.shape[1]
        self._buffer = input_ids.new_empty(1, self.length + INITIAL_ROOM, dtype=torch.long)
        self._buffer[:, : self.length] = input_ids
        self._waiting: list[int] = []

    @property
    def ids(self) -> torch.Tensor:
        """View of the ids so far; tokens appended later do not change it."""
        if count := len(self._waiting):
            while self.length > self._buffer.shape[1]:
                self._buffer = torch.cat([self._buffer, torch.empty_like(self._buffer)], dim=1)
            # A number by itself is an argument of a kernel, which nobody waits for.
            new = self._waiting[0] if count == 1 else torch.tensor(self._waiting)
            self._buffer[0, self.length - count : self.length] = new
            self._waiting = []
        return self._buffer[:, : self.length]

    def append(self, *tokens: int) -> None:
        """Append tokens."""
        self._waiting.extend(tokens)
        self.length += len(tokens)


class HostCriteria:
    """Stopping criteria that need the newest token, the length and the clock alone, checked without the device.

    Args:
        criteria: of the call.

    Attributes:
        complete: whether these are all there are.
    """

    def __init__(self, criteria: StoppingCriteriaList) -> None:
        self.complete = True
        self.end_tokens: set[int] = set()
        self.max_length: float = float("inf")
        self.deadline: float = float("inf")
        for rule in criteria:
            if type(rule) is EosTokenCriteria:
                self.end_tokens.update(rule.eos_token_id.tolist())
            elif type(rule) is MaxLengthCriteria:
                self.max_length = min(self.max_length, rule.max_length)
                # Beyond that it has something to say.
                most = rule.max_position_embeddings
                self.complete &= most is None or rule.max_length <= most
            elif type(rule) is MaxTimeCriteria:
                self.deadline = min(self.deadline, rule.initial_timestamp + rule.max_time)
            else:
                self.complete = False

    def stop(self, token: int, length: int) -> bool:
        """Whether a text of `length` tokens that end in `token` is complete."""
        return token in self.end_tokens or length >= self.max_length or time.time() > self.deadline


class TokenDrawer:
    """Draws tokens from the target's logits: per token one processor call, one draw and one criteria call, in that
    order, on the tensors plain decoding would pass. So equal seeds give equal texts. Criteria that the host can check
    by itself are not called.

    Attributes:
        scores, logits: per drawn token, `[1, V]` each, where the configuration asks for them, else `None`.
    """

    def __init__(
        self,
        text: TextBuffer,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: Any = None,
    ) -> None:
        keep = generation_config.return_dict_in_generate
        self.text = text
        self.logits_processor = logits_processor
        self.stopping_criteria = stopping_criteria
        self.do_sample = generation_config.do_sample
        self.streamer = streamer
        self.scores: tuple[torch.Tensor, ...] | None = () if keep and generation_config.output_scores else None
        self.logits: tuple[torch.Tensor, ...] | None = () if keep and generation_config.output_logits else None

    @functools.cached_property
    def host_criteria(self) -> HostCriteria:
        """The criteria as far as the host can check them by itself."""
        return HostCriteria(self.stopping_criteria)

    @property
    def is_plain_argmax(self) -> bool:
        """Whether tokens are the argmax of the raw logits, and nobody wants to see those."""
        return not (self.do_sample or len(self.logits_processor) or self.scores is not None or self.logits is not None)

    def draw(self, logits: torch.Tensor) -> tuple[int, bool]:
        """Draw the next token from the target's logits `[1, V]`; returns it and whether generation ends there."""
        return self._choose(*self._process(logits))

    def draw_unless_tied(self, logits: torch.Tensor, ulps: float | None = None) -> tuple[int, bool] | None:
        """Like `draw`, but where greedy decoding meets a near-tie nothing is drawn and `None` is returned.

        The processors are called again when that position is decided.
        """
        raw, processed = self._process(logits)
        if not self.do_sample and bool(near_ties(processed, logits.dtype, NEAR_TIE_ULPS if ulps is None else ulps)):
            return None
        return self._choose(raw, processed)

    def _process(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Plain decoding processes an fp32 copy on the ids' device.
        raw = logits.to(copy=True, dtype=torch.float32, device=self.text.ids.device)
        return raw, self.logits_processor(self.text.ids, raw)

    def _choose(self, raw: torch.Tensor, processed: torch.Tensor) -> tuple[int, bool]:
        if self.scores is not None:
            self.scores += (processed,)
        if self.logits is not None:
            self.logits += (raw,)
        if self.do_sample:
            return self.commit(draw_one(torch.softmax(processed, dim=-1)))
        return self.commit(int(torch.argmax(processed, dim=-1)))

    def commit_all(self, tokens: Sequence[int]) -> tuple[list[int], bool]:
        """Append drawn tokens one by one, up to where generation ends; returns those appended and whether it does."""
        kept: list[int] = []
        if not self.host_criteria.complete:
            for token in tokens:
                _, stop = self.commit(token)
                kept.append(token)
                if stop:
                    return kept, True
            return kept, False
        stop = False
        for token in tokens:
            kept.append(token)
            stop = self.host_criteria.stop(token, self.text.length + len(kept))
            if self.streamer is not None:
                self.streamer.put(torch.tensor([token]))
            if stop:
                break
        self.text.append(*kept)
        return kept, stop

    def commit(self, token: int) -> tuple[int, bool]:
        """Append a drawn token; returns it and whether generation ends there."""
        self.text.append(token)
        if self.host_criteria.complete:
            stop = self.host_criteria.stop(token, self.text.length)
        else:
            stop = bool(self.stopping_criteria(self.text.ids, self.scores)[0])
        if self.streamer is not None:
            self.streamer.put(torch.tensor([token]))
        return token, stop


class OneByOne:
    """A streamer that hands blocks `[1, n]` on as plain decoding would: token by token.

    Args:
        streamer: gets tensors `[1]`.
    """

    def __init__(self, streamer: Any) -> None:
        self.streamer = streamer

    def put(self, tokens: torch.Tensor) -> None:
        for token in tokens.flatten().split(1):
            self.streamer.put(token)

    def end(self) -> None:
        self.streamer.end()


def draw_one(probabilities: torch.Tensor) -> int:
    """Draw an index: the one `torch.multinomial(probabilities, 1)` would, and as many random numbers.

    Both let exponential clocks of these rates race and take the first to ring. But `multinomial` waits for the device
    twice to check its argument, which here is checked by what is read anyway.

    Args:
        probabilities: `[1, V]`.

    Raises:
        RuntimeError: what `multinomial` raises where they are no probabilities.
    """
    clocks = torch.empty_like(probabilities).exponential_(1)
    rate, index = (probabilities / clocks).max(dim=-1)
    drawn = int(torch.where(rate > 0, index, -1))
    return drawn if drawn >= 0 else int(torch.multinomial(probabilities, num_samples=1))


def near_ties(scores: torch.Tensor, dtype: torch.dtype, ulps: float = NEAR_TIE_ULPS) -> torch.Tensor:
    """Where the two best fp32 scores `[..., V]` lie within `ulps` units in the last place of `dtype`."""
    best, second = scores.topk(2, dim=-1).values.unbind(-1)
    spacing = torch.exp2(torch.floor(torch.log2(best.abs().clamp(min=1e-30)))) * torch.finfo(dtype).eps
    return best - second < ulps * spacing


def pad_texts(texts: Sequence[TextBuffer], pad_token_id: torch.Tensor | None) -> torch.Tensor:
    """Ids `[B, n]` of all texts; the shorter ones are filled up with `pad_token_id`."""
    rows = [text.ids[0] for text in texts]
    if len({len(row) for row in rows}) == 1:
        return torch.stack(rows)
    filling = 0 if pad_token_id is None else int(pad_token_id)
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=filling)


def stack_scores(rows: Sequence[tuple[torch.Tensor, ...] | None]) -> tuple[torch.Tensor, ...] | None:
    """Per position the scores `[B, V]` of all texts; zeros where a text had ended."""
    kept = [row for row in rows if row is not None]
    if not kept:
        return None
    if len(kept) == 1:
        return kept[0]
    blank = torch.zeros_like(kept[0][0])
    return tuple(torch.cat(parts) for parts in zip_longest(*kept, fillvalue=blank))
