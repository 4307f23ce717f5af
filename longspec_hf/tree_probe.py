"""Whether a target's layers verify a tree: a forward over one node, once for every target and attention."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from .attention import TREE_KWARG, TreeAttention
from .attention_switch import AttentionSwitch
from .cache import LongSpecCache
from .tree import TokenTree

KNOWN_MODULES = tuple(f"transformers.models.{name}.modeling_{name}" for name in ("llama", "mistral", "qwen2", "qwen3"))
"""Where the layers of families live that need no trial."""
_VERDICTS: weakref.WeakKeyDictionary[PreTrainedModel, dict[str, str | None]] = weakref.WeakKeyDictionary()


class WatchedTrees(list):
    """A call's tree metadata, which notes the layers that ask for theirs and any mask but the one that was given."""

    def __init__(self, trees: list[TreeAttention]) -> None:
        super().__init__(trees)
        self.reached: set[int] = set()
        self.own_mask = False

    def __getitem__(self, index: Any) -> Any:
        self.reached.add(index)
        return super().__getitem__(index)

    def see(self, mask: torch.Tensor | None) -> None:
        """Note the mask that a layer brought to its attention; the one that a verification gives is a single bit."""
        self.own_mask |= mask is not None and mask.numel() != 1


def reason_of_trees(
    target: PreTrainedModel, device: torch.device, switch: AttentionSwitch, cache_argument: str
) -> str | None:
    """Why trees would not be verified as plain decoding reads its tokens, or `None`.

    Args:
        target: of the call.
        device: of its input ids.
        switch: which attention its layers use.
        cache_argument: the name of the cache among its forward's arguments.
    """
    config = target.config.get_text_config(decoder=True)
    layers = [module for module in target.modules() if hasattr(module, "layer_idx") and hasattr(module, "config")]
    if any(layer.config is not config for layer in layers):
        return "the target's layers hold another configuration object than `target.config`"
    if layers and all(type(layer).__module__ in KNOWN_MODULES for layer in layers):
        return None
    verdicts, chosen = _VERDICTS.setdefault(target, {}), switch.chosen(config)
    if chosen not in verdicts:
        verdicts[chosen] = _try(target, device, switch, cache_argument)
    return verdicts[chosen]


@torch.no_grad()
def _try(target: PreTrainedModel, device: torch.device, switch: AttentionSwitch, cache_argument: str) -> str | None:
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    cache = LongSpecCache.take_over(DynamicCache(config=target.config))
    options = {"use_cache": True, "return_dict": True, cache_argument: cache}
    config = target.config.get_text_config(decoder=True)
    try:
        with torch.compiler.set_stance("force_eager"):
            target(input_ids=token, position_ids=token, **options)
            cache.begin_rounds(1)
            with cache.tree(1, 1) as lengths, switch.pointed(config):
                layers = cache.layers
                trees = WatchedTrees(
                    TreeAttention.per_layer(
                        TokenTree.root_only(token),
                        lengths.to(token.device),
                        None,
                        [layer.dropped_rows(1) for layer in layers],
                        [layer.device for layer in layers],
                        [getattr(layer, "window", None) for layer in layers],
                    )
                )
                placeholder = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=token.device)
                target(
                    input_ids=token,
                    position_ids=token + 1,
                    attention_mask=placeholder,
                    **options,
                    **{TREE_KWARG: trees},
                )
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        return f"a trial of its layers on a tree failed ({' '.join(str(error).split())[:200]})"
    if trees.reached != set(range(len(layers))):
        return f"{len(layers) - len(trees.reached)} of its {len(layers)} layers do not pass on what a tree is"
    return "its layers make attention masks of their own, which know no tree" if trees.own_mask else None
