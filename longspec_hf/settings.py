"""Tree settings of one call: `GenerationConfig` attributes over the draft's own over the draft's configuration."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

from transformers import GenerationConfig

from .configuration_longspec import DEFAULT_TREE_SHAPE, LongSpecDraftConfig, validate_tree_settings
from .modeling_longspec import LongSpecDraftModel

TREE_SETTINGS = (
    "tree_shape",
    "max_tree_nodes",
    "ngram_branch_length",
    "ngram_min_match",
    "recheck_near_ties",
    "fallback_to_plain",
    "capture_rounds",
)
CPU_TREE = {"tree_shape": (4, 4, 4), "max_tree_nodes": 8, "ngram_branch_length": 3}
"""The tree on a CPU where nobody has chosen one.

There a forward's time grows with its rows from about 8 on, so the nodes of the general tree cost more than the tokens
they add.
"""


@dataclass(frozen=True)
class TreeSettings:
    """See [`LongSpecDraftConfig`] for the fields."""

    tree_shape: tuple[int, ...]
    max_tree_nodes: int
    ngram_branch_length: int
    ngram_min_match: int
    recheck_near_ties: bool = False
    fallback_to_plain: bool = True
    capture_rounds: bool = True

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

    def limited_to(self, depth: int) -> TreeSettings:
        """The same settings with no node deeper than `depth`."""
        depth = max(0, depth)
        return replace(
            self,
            tree_shape=self.tree_shape[:depth],
            ngram_branch_length=min(self.ngram_branch_length, depth),
        )


def resolve_tree_settings(draft: LongSpecDraftModel, generation_config: GenerationConfig) -> TreeSettings:
    """Settings of this call. `num_assistant_tokens` limits the depth, as it limits other drafts.

    Raises:
        ValueError: a setting is out of range; the message names it.
    """
    chosen = {name: _chosen(name, draft, generation_config) for name in TREE_SETTINGS}
    defaults = {name: getattr(draft.config, name) for name in TREE_SETTINGS}
    if draft.device.type == "cpu" and all(_untouched(name, draft, chosen[name]) for name in CPU_TREE):
        defaults |= CPU_TREE
    values = {name: defaults[name] if value is None else value for name, value in chosen.items()}
    validate_tree_settings(**values)
    settings = TreeSettings(**{**values, "tree_shape": tuple(values["tree_shape"])})
    limit = generation_config.num_assistant_tokens
    return settings if limit is None else settings.limited_to(limit)


def _chosen(name: str, draft: LongSpecDraftModel, generation_config: GenerationConfig) -> Any:
    """The setting of the call, else of the draft's own generation configuration, else `None`."""
    value = getattr(generation_config, name, None)
    if value is None and draft.generation_config is not None:
        value = getattr(draft.generation_config, name, None)
    return value


def _untouched(name: str, draft: LongSpecDraftModel, value: Any) -> bool:
    """Whether neither the call nor the draft says anything else than the general default."""
    default = getattr(LongSpecDraftConfig, name)
    return value is None and getattr(draft.config, name) == (list(DEFAULT_TREE_SHAPE) if default is None else default)


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
        setattr(config, name, list(value) if name == "tree_shape" else value)
    return config
