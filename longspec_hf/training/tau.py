"""Tau of a draft on held-out texts, without generating them again.

Speculation is lossless: the text is the target's own whatever the draft proposes. So tau of any draft and any tree
follows from a text generated once, the target's keys and values of it (one forward), and the draft's proposals along
it; the expensive verification is replaced by a look at the next token. `replay` counts what `generate` would have
counted.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ..candidate_generator import LongSpecCandidateGenerator
from ..modeling_longspec import LongSpecDraftModel
from ..placement import draft_device
from ..settings import TreeSettings
from ..stats import SpeculationStats
from ..target import bind
from ..verification import walk
from .target_states import read_target

LOOP_NGRAM = 8
LOOP_SHARE = 0.25


@dataclass(frozen=True)
class TauInput:
    """A held-out text: a prompt and what the target made of it.

    Attributes:
        prompt_ids, output_ids: tokens.
        name: what the prompt is, for tables.
        kind: the task, for tables.
        decoding: how the output was generated, for tables.
        temperature: it was sampled at; 0 is greedy.
    """

    prompt_ids: list[int]
    output_ids: list[int]
    name: str = ""
    kind: str = ""
    decoding: str = "greedy"
    temperature: float = 0.0

    @property
    def looping(self) -> bool:
        """Whether the output repeats itself; see `repeated_share`."""
        return repeated_share(self.output_ids) > LOOP_SHARE


def repeated_share(token_ids: Sequence[int], n: int = LOOP_NGRAM) -> float:
    """Share of the n-grams of a text that occurred in it before; a small model stuck in a loop comes near 1."""
    grams = [tuple(token_ids[i : i + n]) for i in range(len(token_ids) - n + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


class _KnownLayer:
    """Rows of a whole text of which the first `length` are committed; the draft sees those, or a window of them."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, window: int | None) -> None:
        self._rows, self._window, self.length = (keys, values), window, 0

    @property
    def _seen(self) -> slice:
        return slice(0 if self._window is None else max(self.length - self._window + 1, 0), self.length)

    @property
    def keys(self) -> torch.Tensor:
        return self._rows[0][:, :, self._seen]

    @property
    def values(self) -> torch.Tensor:
        return self._rows[1][:, :, self._seen]


class _KnownCache:
    """What a candidate generator reads of a target's cache."""

    def __init__(self, layer_idx: int, layer: _KnownLayer) -> None:
        self.layers = {layer_idx: layer}


class _NextTokens:
    """The walk's `draw` where the text is known."""

    def __init__(self, token_ids: list[int]) -> None:
        self.token_ids = token_ids
        self.drawn = 0

    def __call__(self, node: int) -> tuple[int, bool]:
        self.drawn += 1
        return self.token_ids[self.drawn - 1], self.drawn == len(self.token_ids)


@torch.no_grad()
def replay(
    draft: LongSpecDraftModel, target: PreTrainedModel, text: TauInput, settings: Sequence[TreeSettings]
) -> list[SpeculationStats]:
    """Statistics of decoding `text` with each of the tree settings; times are left at zero.

    Args:
        draft, target: the pair, of one dtype and on one device.
        text: prompt and output.
        settings: trees to try; the target's forward is shared by all.
    """
    bound = bind(draft, target)
    ids = text.prompt_ids + text.output_ids
    positions = torch.arange(len(ids), device=draft.device)
    states = read_target(target, bound.layer_idx, torch.tensor([ids], device=draft.device), positions.unsqueeze(0))
    layer = _KnownLayer(states.key, states.value, bound.layer_window)
    cache: Any = _KnownCache(bound.layer_idx, layer)
    results = []
    for setting in settings:
        setting = replace(setting, beam_temperature=text.temperature or 1.0)
        stats = SpeculationStats(committed=1, committed_by_prefill=1)
        generator = LongSpecCandidateGenerator(draft, bound, setting)
        generator.start([text.prompt_ids], positions[None, : len(text.prompt_ids)])
        generator.append([text.output_ids[:1]])
        length = len(text.prompt_ids) + 1
        while length < len(ids):
            layer.length = length - 1
            tree = generator.propose(cache, [len(ids) - length - 1])
            draw = _NextTokens(ids[length:])
            result = walk(*tree.path_lists()[0], draw)
            generator.append([result.tokens])
            length += len(result.tokens)
            stats.add_round(drafted=[tree.num_nodes - 1], committed=[len(result.tokens)])
        results.append(stats)
    return results


DEFAULT_TREES = {
    "beam": TreeSettings((4, 16, 16, 16, 16), 80, 0, 2),
    "beam_ngram": TreeSettings((4, 16, 16, 16, 16), 165, 96, 1),
    "chain": TreeSettings((1, 1, 1, 1), 80, 0, 2),
    "lookup": TreeSettings((), 80, 10, 2),
}
"""Trees measured by default: the paper's alone and whole beside an n-gram branch, a chain of 4, a branch alone."""


class TauEvaluator:
    """Measures tau on held-out texts; looping and other outputs apart.

    Args:
        texts: held-out texts.
        trees: tree settings by name.
    """

    def __init__(self, texts: Sequence[TauInput], trees: dict[str, TreeSettings] | None = None) -> None:
        if not texts:
            raise ValueError("`texts` is empty, expected at least one held-out text to measure tau on.")
        self.texts = list(texts)
        self.trees = dict(DEFAULT_TREES if trees is None else trees)

    def rows(
        self, draft: LongSpecDraftModel, target: PreTrainedModel, part: slice = slice(None)
    ) -> list[dict[str, Any]]:
        """One row per text (of `part` of the texts) and tree: sizes, rounds, tokens and tau."""
        draft = _as_target(draft, target)
        rows = []
        for text in self.texts[part]:
            for tree, stats in zip(self.trees, replay(draft, target, text, list(self.trees.values())), strict=True):
                rows.append(
                    {
                        "name": text.name,
                        "kind": text.kind,
                        "decoding": text.decoding,
                        "looping": text.looping,
                        "prompt_tokens": len(text.prompt_ids),
                        "output_tokens": len(text.output_ids),
                        "tree": tree,
                        "rounds": stats.rounds,
                        "committed": stats.committed - stats.committed_by_prefill,
                        "tau": round(stats.tau, 4),
                    }
                )
        return rows

    def evaluate(self, draft: LongSpecDraftModel, target: PreTrainedModel) -> dict[str, float]:
        """`tau_<tree>`, `tau_<tree>_looping` and `tau_<tree>_not_looping`: tokens per target forward."""
        return summarize(self.rows(draft, target))


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Tau per tree over rows of `TauEvaluator.rows`: all, looping and not looping, where there are any."""
    metrics = {}
    for tree in dict.fromkeys(row["tree"] for row in rows):
        for suffix, wanted in (("", (True, False)), ("_looping", (True,)), ("_not_looping", (False,))):
            chosen = [row for row in rows if row["tree"] == tree and row["looping"] in wanted]
            if rounds := sum(row["rounds"] for row in chosen):
                metrics[f"tau_{tree}{suffix}"] = sum(row["committed"] for row in chosen) / rounds
    return metrics


def _as_target(draft: LongSpecDraftModel, target: PreTrainedModel) -> Any:
    """The draft in the target's dtype and beside the layer it reads; a copy if it is not there already."""
    dtype, device = target.get_decoder().dtype, draft_device(draft.config, target)
    if draft.dtype == dtype and draft.device == device:
        return draft
    return copy.deepcopy(draft).to(device, dtype)
