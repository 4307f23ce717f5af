"""What a draft borrows from its target for one call: embeddings, rotary table, final norm, head, a layer's cache."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from .configuration_longspec import LongSpecDraftConfig, reason_against_drafts
from .modeling_longspec import LongSpecDraftModel
from .placement import draft_device, resolve_layer_idx
from .target_head import TargetHead, beside
from .tensor_parallel import TensorParallel

FINAL_NORM_NAMES = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "embedding_norm")


@dataclass(frozen=True)
class BoundTarget:
    """A target as its draft sees it. Nothing here is stored on either model.

    Its parts may lie on other devices than the draft: ids and hidden states go there, rows and logits come back.

    Attributes:
        layer_idx: the target layer whose cache the cross-attention reads.
        layer_window: keys a query of that layer sees, its own included; `None` for all.
        rotary_layer_type: kind of that layer, where the rotary module has a table per kind (Gemma 3), else `None`.
        rotary_axes: axes of a position (3 in Qwen2-VL's family), all the same in text.
        head: the target's head, over the tokens that the draft may propose.
        token_ids: `[proposable tokens]` names of the head's rows, `None` when they are 0, 1, 2, ...
        parallel: the processes that share the target, `None` if it is not sharded.
    """

    embed_tokens: nn.Module
    rotary_emb: nn.Module
    norm: nn.Module | None
    head: TargetHead
    token_ids: torch.Tensor | None
    logit_softcap: float | None
    layer_idx: int
    layer_window: int | None
    rotary_layer_type: str | None
    rotary_axes: int = 1
    parallel: TensorParallel | None = None

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings `[..., hidden]` of tokens `[...]`, on their device."""
        return self.embed_tokens(beside(token_ids, self.embed_tokens)).to(token_ids.device)

    def position_embeddings(self, position_ids: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(cos, sin)` `[B, T, rotary_dim]` of positions `[B, T]`, in the dtype and on the device of `like`."""
        kind = () if self.rotary_layer_type is None else (self.rotary_layer_type,)
        if self.rotary_axes > 1:
            position_ids = position_ids.expand(self.rotary_axes, -1, -1)
        cos, sin = self.rotary_emb(like, position_ids, *kind)
        return cos.to(like.device), sin.to(like.device)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Scores `[..., proposable tokens]` of the layer's output `[..., hidden]`, in fp32 (fp64 stays fp64)."""
        device = hidden.device
        hidden = hidden if self.norm is None else self.norm(beside(hidden, self.norm))
        logits = self.head.scores(hidden).to(device)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self.logit_softcap is not None:
            logits = torch.tanh(logits / self.logit_softcap) * self.logit_softcap
        return logits


def bind(draft: LongSpecDraftModel, target: PreTrainedModel, mixed_precision: bool = False) -> BoundTarget:
    """Check that `draft` fits `target` and collect what it borrows.

    Args:
        draft, target: the pair.
        mixed_precision: let dtypes and devices differ, as in training, where the draft has fp32 master weights.

    Raises:
        ValueError: sizes, device or dtype do not fit, or the target has no part the draft needs; the message names
            both values.
    """
    if reason := reason_against_drafts(target.config):
        raise ValueError(
            f"`assistant_model` cannot be used with {type(target).__name__}: {reason}. Use another target, or "
            "generate without a draft."
        )
    text = target.config.get_text_config(decoder=True)
    expected = LongSpecDraftConfig.from_target(target.config, target_layer_idx=draft.config.target_layer_idx)
    _expect_fitting_sizes(draft.config, expected)
    decoder = target.get_decoder()
    rotary = getattr(decoder, "rotary_emb", None)
    head = target.get_output_embeddings()
    if rotary is None or head is None:
        raise ValueError(
            f"`assistant_model` cannot be used: a LongSpec draft needs a target with rotary positions and a language "
            f"model head, got {type(target).__name__} with {'no rotary module' if rotary is None else 'no head'}."
        )
    if draft.dtype != decoder.dtype and not mixed_precision:
        raise ValueError(
            f"`assistant_model` has dtype {draft.dtype}, expected the target's {decoder.dtype}. Load it with "
            f"`dtype={decoder.dtype}` or call `draft.to({decoder.dtype})`."
        )
    device = draft_device(draft.config, target)
    if draft.device != device and not mixed_precision:
        raise ValueError(
            f"`assistant_model` is on device {draft.device}, expected the target's {device}, where the layer it reads "
            f"is. Call `draft.to({str(device)!r})`."
        )
    layer_idx = resolve_layer_idx(draft.config, text)
    tables_per_kind = "layer_type" in inspect.signature(rotary.forward).parameters
    token_ids = None if draft.config.draft_vocab_size is None else draft.draft_token_ids
    return BoundTarget(
        embed_tokens=target.get_input_embeddings(),
        rotary_emb=rotary,
        norm=_final_norm(decoder) if draft.config.use_target_final_norm else None,
        head=TargetHead.of(head, expected.vocab_size, token_ids, draft.device),
        token_ids=token_ids,
        logit_softcap=getattr(text, "final_logit_softcapping", None),
        layer_idx=layer_idx,
        layer_window=_window_of_layer(text, layer_idx),
        rotary_layer_type=text.layer_types[layer_idx] if tables_per_kind else None,
        rotary_axes=3 if hasattr(rotary, "mrope_section") else 1,
        parallel=TensorParallel.of(target, draft.config),
    )


def _expect_fitting_sizes(ours: LongSpecDraftConfig, theirs: LongSpecDraftConfig) -> None:
    """Check the sizes that the draft shares with its target, the vocabulary last."""
    for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"):
        if (own := getattr(ours, name)) == (other := getattr(theirs, name)):
            continue
        message = (
            f"`assistant_model` does not fit the target: its `{name}` is {own}, the target's is {other}. Load the "
            f"draft made for this target (this one says {ours.target_name_or_path!r}) or train one."
        )
        if name == "vocab_size":  # and nothing else
            message += (
                " If the target was resized since (`resize_token_embeddings`) and its tokens have kept their ids, set "
                f"`draft.config.vocab_size = {other}`: the layer stays as it is."
            )
        raise ValueError(message)


def _window_of_layer(text_config, layer_idx: int) -> int | None:
    """Keys a query of this layer sees, as the target's own cache has it."""
    layers = DynamicCache(config=text_config).layers  # shorter where the last layers read the cache of earlier ones
    return getattr(layers[layer_idx], "sliding_window", None) if layer_idx < len(layers) else None


def is_compiled(target: PreTrainedModel) -> bool:
    """Whether `torch.compile` stands before the target's forward or its decoder's."""
    modules = (target, target.get_decoder())
    return any(
        isinstance(module, torch._dynamo.OptimizedModule)
        or module._compiled_call_impl is not None
        or hasattr(module.forward, "_torchdynamo_orig_callable")
        for module in modules
    )


def _final_norm(decoder: nn.Module) -> nn.Module:
    for name in FINAL_NORM_NAMES:
        if isinstance(norm := getattr(decoder, name, None), nn.Module):
            return norm
    raise ValueError(
        f"`use_target_final_norm` needs the target's final norm, but {type(decoder).__name__} has none of "
        f"{FINAL_NORM_NAMES}. Use a draft trained with `use_target_final_norm=False`."
    )
