"""The LongSpec draft: one decoder layer without embeddings and without a head (LongSpec, arXiv 2502.17421, section 3).

The layer is pre-norm with a residual around each part::

    x += self_attn(norm1(x))     window of `sliding_window` keys
    x += cross_attn(norm2(x))    keys and values are the target's cache, already rotated
    x += mlp(norm3(x))

Token embeddings, rotary table, final norm and head are the target's; they are passed in, never stored here.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.utils import ModelOutput

from .configuration_longspec import CONVERSION_HINT, LongSpecDraftConfig
from .draft_attention import (
    apply_rotary,
    blocked_window_attention,
    cross_attention_mask,
    masked_attention,
    shifted_causal_attention,
    shifted_window_attention,
    window_mask,
)
from .draft_files import expect_known_tokens, read_generation_config, readable_weights, write_generation_config
from .placement import draft_device

Attend = Callable[..., torch.Tensor]
"""Maps rotated queries (and, in self-attention, keys and values) `[B, heads, T, D]` to `[B, Hq, T, D]`."""


@dataclass
class LongSpecDraftOutput(ModelOutput):
    """Output of [`LongSpecDraftModel`].

    Args:
        last_hidden_state: `[B, T, hidden]`, the input of the target's final norm and head.
    """

    last_hidden_state: torch.Tensor | None = None


class LongSpecAttention(nn.Module):
    """Projections of one attention; `cross=True` leaves out k and v, which come from the target's cache."""

    def __init__(self, config: LongSpecDraftConfig, cross: bool) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query_size = config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        if not cross:
            kv_size = config.num_key_value_heads * config.head_dim
            self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
            self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
            if not cross:
                self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.qk_norm = config.qk_norm

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.head_dim))

    def queries(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Rotated queries `[B, Hq, T, D]` of hidden states `[B, T, hidden]`."""
        q = self._heads(self.q_proj(x))
        q = self.q_norm(q) if self.qk_norm else q
        return apply_rotary(q.transpose(1, 2), cos, sin)

    def keys_values(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotated keys and values `[B, Hkv, T, D]` of hidden states `[B, T, hidden]`."""
        k = self._heads(self.k_proj(x))
        k = self.k_norm(k) if self.qk_norm else k
        return apply_rotary(k.transpose(1, 2), cos, sin), self._heads(self.v_proj(x)).transpose(1, 2)

    def output(self, attended: torch.Tensor) -> torch.Tensor:
        """Output projection `[B, Hq, T, D]` -> `[B, T, hidden]`."""
        return self.o_proj(attended.transpose(1, 2).flatten(2))


class LongSpecMLP(nn.Module):
    """Gated MLP."""

    def __init__(self, config: LongSpecDraftConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class LongSpecDraftModel(PreTrainedModel):
    """The draft of a LongSpec pair; pass it as `target.generate(..., assistant_model=draft)`.

    Saved tensors are the layer's weights and, with a draft vocabulary, the buffer `draft_token_ids`
    `[draft_vocab_size]` that names the proposable tokens (token 0 .. draft_vocab_size - 1 when freshly initialised).
    """

    config_class = LongSpecDraftConfig
    config: LongSpecDraftConfig
    base_model_prefix = ""
    main_input_name = "inputs_embeds"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["LongSpecDraftModel"]  # noqa: RUF012 (read by transformers as a list)

    def __init__(self, config: LongSpecDraftConfig) -> None:
        super().__init__(config)
        self.self_attn = LongSpecAttention(config, cross=False)
        self.cross_attn = LongSpecAttention(config, cross=True)
        self.mlp = LongSpecMLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_self_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_cross_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.generation_config: GenerationConfig | None = None  # tree settings of this draft, over its config's
        if config.draft_vocab_size is not None:
            self.register_buffer("draft_token_ids", torch.arange(config.draft_vocab_size))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # A checkpoint names its tokens; a fresh model on the meta device has lost the ones of `__init__`.
        size = self.config.draft_vocab_size
        if module is self and size is not None and not getattr(self.draft_token_ids, "_is_hf_initialized", False):
            torch.arange(size, out=self.draft_token_ids)

    @classmethod
    def from_target(cls, target: PreTrainedModel, **overrides: Any) -> LongSpecDraftModel:
        """A freshly initialised draft for `target`, in its dtype and on the device of the layer it reads.

        Args:
            target: the model to draft for.
            **overrides: fields of [`LongSpecDraftConfig`].
        """
        config = LongSpecDraftConfig.from_target(target.config, **overrides)
        return cls(config).to(device=draft_device(config, target), dtype=target.get_decoder().dtype).eval()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a draft; takes the arguments of `PreTrainedModel.from_pretrained`.

        The settings of its `generation_config` are read with it, where it was saved with some.

        Raises:
            ValueError: the checkpoint cannot be read, lacks a tensor, has one too many or one of another shape, or
                names tokens that do not exist; the message says which.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs["ignore_mismatched_sizes"] = True  # collected and refused below, all at once
        name, given = pretrained_model_name_or_path, kwargs.get("generation_config")
        settings = given or read_generation_config(name, kwargs)
        with readable_weights(name):
            model, info = super().from_pretrained(name, *args, output_loading_info=True, **kwargs)
        faults = [f"missing tensor `{name}`" for name in sorted(info["missing_keys"])]
        faults += [f"unexpected tensor `{name}`" for name in sorted(info["unexpected_keys"])]
        faults += [
            f"tensor `{name}` has shape {tuple(found)}, expected {tuple(expected)}"
            for name, found, expected in sorted(info["mismatched_keys"])
        ]
        if faults:
            raise ValueError(
                f"`pretrained_model_name_or_path` ({name}) does not hold a complete LongSpec draft: "
                f"{'; '.join(faults)}. {CONVERSION_HINT}"
            )
        expect_known_tokens(name, getattr(model, "draft_token_ids", None), model.config.vocab_size)
        model.generation_config = settings
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in transformers, with the settings of `generation_config`, which there only models that generate have."""
        if kwargs.get("is_main_process", True) and not os.path.isfile(save_directory):
            os.makedirs(save_directory, exist_ok=True)
            write_generation_config(save_directory, self.generation_config)
        super().save_pretrained(save_directory, *args, **kwargs)

    def get_input_embeddings(self) -> None:
        """`None`: token embeddings are the target's."""

    def layer(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        attend_window: Attend,
        attend_target: Attend,
    ) -> torch.Tensor:
        """The decoder layer; how attention is computed is the caller's.

        Args:
            x: `[B, T, hidden]` target embeddings of the tokens.
            cos, sin: `[B, T, rotary_dim]` of the tokens' positions.
            attend_window: self-attention of rotated q, k, v.
            attend_target: cross-attention of rotated q.
        """
        h = self.input_layernorm(x)
        q = self.self_attn.queries(h, cos, sin)
        x = x + self.self_attn.output(attend_window(q, *self.self_attn.keys_values(h, cos, sin)))
        q = self.cross_attn.queries(self.post_self_attention_layernorm(x), cos, sin)
        x = x + self.cross_attn.output(attend_target(q))
        return x + self.mlp(self.post_cross_attention_layernorm(x))

    def window_keys_values(
        self, inputs_embeds: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Self-attention keys and values `[B, Hkv, T, D]` of tokens `[B, T, hidden]`.

        With one layer they depend on token and position alone, so any stretch of the text can be projected by itself.
        """
        return self.self_attn.keys_values(self.input_layernorm(inputs_embeds), cos, sin)

    def next_token_logits(
        self,
        hidden: torch.Tensor,
        head: Callable[[torch.Tensor], torch.Tensor],
        token_ids: torch.Tensor,
        position_ids: torch.Tensor,
    ) -> torch.Tensor:
        """Scores `[B, k, proposable tokens]` of the token after each of k nodes.

        Args:
            hidden: `[B, k, hidden]` output of `layer`.
            head: the target's norm and head, over the draft vocabulary.
            token_ids, position_ids: `[B, k]` of the nodes. A scripted draft, which knows the text beforehand,
                overrides this method and needs nothing else.
        """
        return head(hidden)

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        target_key: torch.Tensor,
        target_value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cross_attention_shift: int = 1,
        target_window: int | None = None,
    ) -> LongSpecDraftOutput:
        """Run the layer over a whole text, as in training.

        Args:
            inputs_embeds: `[B, T, hidden]` target embeddings.
            position_embeddings: `(cos, sin)`, each `[B, T, rotary_dim]`, from the target's rotary module.
            target_key, target_value: `[B, Hkv, T, D]`, the target layer's rotated keys and its values.
            attention_mask: `[B, T]`, 0 at padding. Padding on the right needs none, as nothing before it sees it;
                without a mask faster kernels are used.
            cross_attention_shift: query p sees target rows 0 .. p - shift. The first `shift` queries see none, and
                their cross-attention output is zero.
            target_window: of a target layer with a sliding window, the keys that its own queries see; here a query
                sees the newest `target_window - 1` of the rows named above, as at inference.
        """
        length, scale = inputs_embeds.shape[1], self.config.head_dim**-0.5
        window, shift = self.config.sliding_window, cross_attention_shift
        if attention_mask is not None:
            near = window_mask(length, window, inputs_embeds.device, attention_mask)
            before = cross_attention_mask(length, shift, inputs_embeds.device, attention_mask, target_window)

        def attend_window(q: torch.Tensor, k: Any, v: Any) -> torch.Tensor:
            if attention_mask is None:
                return blocked_window_attention(q, k, v, window, scale)
            return masked_attention(q, k, v, near, scale)

        def attend_target(q: torch.Tensor, *_: Any) -> torch.Tensor:
            if attention_mask is not None:
                return masked_attention(q, target_key, target_value, before, scale)
            if target_window is None:
                return shifted_causal_attention(q, target_key, target_value, shift, scale)
            return shifted_window_attention(q, target_key, target_value, shift, target_window, scale)

        cos, sin = position_embeddings
        if self.gradient_checkpointing and self.training:
            hidden = self._gradient_checkpointing_func(
                self.layer, inputs_embeds, cos, sin, attend_window, attend_target
            )
        else:
            hidden = self.layer(inputs_embeds, cos, sin, attend_window, attend_target)
        return LongSpecDraftOutput(last_hidden_state=hidden)
