"""Tree settings of one call: `GenerationConfig` attributes over the draft's own over the draft's configuration."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

from transformers import GenerationConfig

from .configuration_longspec import AUTO, DEFAULT_TREE_SHAPE, validate_tree_settings
from .modeling_longspec import LongSpecDraftModel
from .tree_candidates import DEPTHS, Candidate, TreeSize, cpu_candidates, packed_candidates, tree_sizes

TREE_SETTINGS = (
    "tree_shape",
    "max_tree_nodes",
    "ngram_branch_length",
    "ngram_min_match",
    "recheck_near_ties",
    "fallback_to_plain",
    "capture_rounds",
)
LOWEST_TEMPERATURE = 0.1
CPU_SHAPE = (4, 4, 4)
CPU_TREE = {"tree_shape": CPU_SHAPE, "max_tree_nodes": 8, "ngram_branch_length": 3}
"""The tree that `tree_shape="auto"` begins with on a CPU, and keeps where nothing can be chosen during a call.

There a forward's time grows with its rows from the first few on, so the nodes of the general tree cost more than the
tokens they add.
"""
SMALL_TREE = 16
SMALL_TREE_MIN_MATCH = 2
"""Shortest match for trees of up to `SMALL_TREE` nodes, on a CPU and in large batches, where only the draft's
configuration says otherwise: copies after one token bring less there than the beam's nodes in their place."""
CPU_BRANCH = 8
"""Longest branch there beside a shape of the user's, where only the draft's configuration says otherwise."""


@dataclass(frozen=True)
class TreeChoices:
    """What `tree_shape="auto"` chooses among.

    Attributes:
        sizes: smallest first.
        candidates: the trees.
    """

    sizes: tuple[TreeSize, ...]
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class TreeSettings:
    """See [`LongSpecDraftConfig`] for the fields. With `choices` this is the tree that a call begins with.

    Attributes:
        beam_temperature: of the distributions that the draft's paths are scored by: the call's, where it samples.
    """

    tree_shape: tuple[int, ...]
    max_tree_nodes: int
    ngram_branch_length: int
    ngram_min_match: int
    recheck_near_ties: bool = False
    fallback_to_plain: bool = True
    capture_rounds: bool = True
    choices: TreeChoices | None = None
    beam_temperature: float = 1.0

    def as_options(self) -> dict[str, Any]:
        """The fields as `with_tree_settings` takes them: this tree, nothing to choose."""
        return {name: getattr(self, name) for name in TREE_SETTINGS}

    @property
    def trees(self) -> tuple[TreeSettings, ...]:
        """All trees that rounds of the call may have."""
        candidates: tuple[Candidate | None, ...] = (None,) if self.choices is None else self.choices.candidates
        return tuple(self.of_tree(candidate) for candidate in candidates)

    def of_tree(self, candidate: Candidate | None) -> TreeSettings:
        """These settings with the tree of a candidate, or with their own, and nothing left to choose."""
        if candidate is None:
            return replace(self, choices=None)
        return replace(
            self,
            tree_shape=candidate.shape,
            max_tree_nodes=candidate.nodes,
            ngram_branch_length=candidate.branch,
            choices=None,
        )

    @property
    def max_nodes(self) -> int:
        """Most nodes a tree of these settings can have, the root included."""
        return min(self.max_tree_nodes, 1 + sum(self.tree_shape) + self.ngram_branch_length)

    @property
    def depth(self) -> int:
        """Deepest node a tree of these settings can have."""
        return max(len(self.tree_shape), self.ngram_branch_length)

    @property
    def longest_path(self) -> int:
        """Most nodes a path can have, the root included."""
        return min(self.depth + 1, self.max_nodes)

    @property
    def draft_rows(self) -> int:
        """Most K/V rows that drafting and committing a tree of these settings puts behind the draft's window."""
        # Only nodes that are expanded have K/V: the root and all levels but the last. A path's may come at once.
        return max(1 + sum(self.tree_shape[:-1]), 1 + self.depth)

    @property
    def name(self) -> str:
        """The tree in words."""
        beam = "-".join(map(str, self.tree_shape)) or "no beam"
        return f"{beam}, {self.max_nodes} nodes"

    def limited_to(self, depth: int) -> TreeSettings:
        """The same settings with no node deeper than `depth`."""
        depth = max(0, depth)
        return replace(
            self,
            tree_shape=self.tree_shape[:depth],
            ngram_branch_length=min(self.ngram_branch_length, depth),
            choices=None,
        )


def resolve_tree_settings(
    draft: LongSpecDraftModel, generation_config: GenerationConfig, sequences: int = 1
) -> TreeSettings:
    """Settings of this call. `num_assistant_tokens` limits the depth, as it limits other drafts.

    Args:
        sequences: of the batch. What is chosen by "auto" begins with smaller trees for more of them.

    Raises:
        ValueError: a setting is out of range; the message names it.
    """
    values: dict[str, Any] = {}
    for name in TREE_SETTINGS:
        chosen = _chosen(name, draft, generation_config)
        values[name] = getattr(draft.config, name) if chosen is None else chosen
    validate_tree_settings(**values)
    on_cpu = draft.device.type == "cpu"
    nodes = values["max_tree_nodes"] // (sequences if values["tree_shape"] == AUTO else 1)
    small = on_cpu or nodes <= SMALL_TREE
    if small and _chosen("ngram_min_match", draft, generation_config) is None:
        values["ngram_min_match"] = max(values["ngram_min_match"], SMALL_TREE_MIN_MATCH)
    values["beam_temperature"] = _beam_temperature(generation_config)
    limit = generation_config.num_assistant_tokens
    if values["tree_shape"] == AUTO:
        return _automatic(values, draft, limit, sequences)
    if on_cpu and _chosen("ngram_branch_length", draft, generation_config) is None:
        values["ngram_branch_length"] = min(values["ngram_branch_length"], CPU_BRANCH)
    settings = TreeSettings(**{**values, "tree_shape": tuple(values["tree_shape"])})
    return settings if limit is None else settings.limited_to(limit)


def _beam_temperature(generation_config: GenerationConfig) -> float:
    """The temperature the target samples at, within what the scores' arithmetic bears; 1 without sampling."""
    temperature = generation_config.temperature if generation_config.do_sample else None
    return 1.0 if temperature is None else min(max(float(temperature), LOWEST_TEMPERATURE), 1 / LOWEST_TEMPERATURE)


def _automatic(values: dict[str, Any], draft: LongSpecDraftModel, limit: int | None, sequences: int) -> TreeSettings:
    """Settings of `tree_shape="auto"`: trees no deeper than `limit`, beginning with the usual one of the device."""
    on_cpu, config = draft.device.type == "cpu", draft.config
    first = TreeSettings(**{**values, "tree_shape": DEFAULT_TREE_SHAPE})
    if on_cpu:
        nodes, branch = (min(values[name], CPU_TREE[name]) for name in ("max_tree_nodes", "ngram_branch_length"))
        first = replace(first, tree_shape=CPU_SHAPE, max_tree_nodes=nodes, ngram_branch_length=branch)
    depth, branch = max(DEPTHS), values["ngram_branch_length"]
    if limit is not None:
        depth = max(limit, 0)
        first, branch = first.limited_to(depth), min(branch, depth)
    sizes = tree_sizes(values["max_tree_nodes"], branch)
    if on_cpu:
        candidates = cpu_candidates(sizes, depth)
    else:
        heads_per_kv_head = config.num_attention_heads // config.num_key_value_heads
        candidates = packed_candidates(sizes, depth, heads_per_kv_head, sequences)
        first = replace(first, max_tree_nodes=first.max_tree_nodes // sequences)
    if len(candidates) < 2:
        return first
    start = min(candidates, key=lambda tree: _distance(tree, first))
    return replace(first.of_tree(start), choices=TreeChoices(sizes, tuple(candidates)))


def _distance(tree: Candidate, first: TreeSettings) -> tuple[int, int]:
    return abs(tree.nodes - first.max_tree_nodes), abs(len(tree.shape) - len(first.tree_shape))


def _chosen(name: str, draft: LongSpecDraftModel, generation_config: GenerationConfig) -> Any:
    """The setting of the call, else of the draft's own generation configuration, else `None`."""
    value = getattr(generation_config, name, None)
    if value is None and draft.generation_config is not None:
        value = getattr(draft.generation_config, name, None)
    return value


def with_tree_settings(generation_config: GenerationConfig, **settings: Any) -> GenerationConfig:
    """A copy of a generation configuration with tree settings for one call.

    `GenerationConfig(**fields)` silently drops names it does not know where the fields are a model's own
    (`_from_model_config`); this does not.

    Args:
        generation_config: such as `target.generation_config`. It is not changed.
        settings: of `TREE_SETTINGS`; see [`LongSpecDraftConfig`].

    Raises:
        ValueError: a name is no tree setting. Values are checked by the call.
    """
    if unknown := sorted(set(settings) - set(TREE_SETTINGS)):
        raise ValueError(f"`{unknown[0]}` is no tree setting, expected one of {', '.join(TREE_SETTINGS)}.")
    config = copy.deepcopy(generation_config)
    for name, value in settings.items():
        is_shape = name == "tree_shape" and not isinstance(value, str)
        setattr(config, name, list(value) if is_shape else value)
    return config
