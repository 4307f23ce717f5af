"""Configuration of a LongSpec draft: the one decoder layer that proposes tokens for a target model."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

AUTO = "auto"
DEFAULT_TREE_SHAPE = (4, 16, 16, 16, 16)
"""Where "auto" begins on devices that verify many nodes at little more than the cost of one."""
CONVERSION_HINT = (
    "A draft in the layout of the published `sail/longspec-*` checkpoints must be converted first, by "
    "`longspec-hf convert` or `longspec_hf.convert_checkpoint`."
)


class LongSpecDraftConfig(PreTrainedConfig):
    """Sizes of the draft layer and the defaults of its token tree.

    Use [`LongSpecDraftConfig.from_target`] to fill the sizes from the target's configuration.

    Args:
        vocab_size: rows of the target's embedding table and head. The draft has neither of its own.
        hidden_size, intermediate_size, num_attention_heads, num_key_value_heads, head_dim: sizes of the layer. The
            hidden size and the head sizes equal the target's, since the draft reads the target's embeddings and cache.
        hidden_act: activation of the gated MLP, a name of `transformers.activations.ACT2FN`.
        rms_norm_eps: epsilon of the RMS norms.
        attention_bias: whether the q, k and v projections have a bias (the output projection never has one).
        qk_norm: whether queries and keys are RMS-normalised per head before rotation, as in Qwen3.
        sliding_window: number of keys a self-attention query sees, its own included.
        target_layer_idx: the target layer whose keys and values the cross-attention reads; -1 is the last
            full-attention layer.
        use_target_final_norm: whether the target's final norm is applied before the target's head.
        draft_vocab_size: number of tokens the draft may propose; `None` means all. The names of the tokens are the
            model's buffer `draft_token_ids`.
        tree_shape: nodes kept at each depth of the beam, `tree_shape[0]` children of the root first. Empty means no
            beam: only the n-gram branch drafts. "auto": the tree that promises the most tokens a second, by the
            device and by what is accepted during a call.
        max_tree_nodes: nodes verified in one target forward, the root included; with "auto" the most there may be.
        ngram_branch_length: longest branch copied from the context, in tokens; 0 turns it off. On a CPU, beside
            a `tree_shape` other than "auto", it is cut to 8 unless a call asks for more.
        ngram_min_match: shortest run of tokens that must have occurred before for a branch to be copied. On a CPU, and
            where `max_tree_nodes` is at most 16, it is at least 2 unless a call asks for less.
        recheck_near_ties: whether greedy decoding decides positions whose two best scores nearly tie by a one-token
            forward, as plain decoding does; for bf16 and fp16 targets.
        fallback_to_plain: whether a call goes on with plain steps while its rounds do not pay.
        capture_rounds: whether rounds on a GPU run as captured CUDA graphs, for targets that allow it.
        target_name_or_path: the model this draft was trained for.
        initializer_range: standard deviation of freshly initialised weights.

    Raises:
        ValueError: a field is out of its range; the message names it.
    """

    model_type = "longspec"

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_attention_heads: int = 32
    num_key_value_heads: int = None  # type: ignore[assignment]  # filled below
    head_dim: int = None  # type: ignore[assignment]  # filled below
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    qk_norm: bool = False
    sliding_window: int = 512
    target_layer_idx: int = -1
    use_target_final_norm: bool = True
    draft_vocab_size: int | None = None
    tree_shape: list[int] | str = AUTO
    max_tree_nodes: int = 64
    ngram_branch_length: int = 32
    ngram_min_match: int = 1
    recheck_near_ties: bool = False
    fallback_to_plain: bool = True
    capture_rounds: bool = True
    target_name_or_path: str | None = None
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        _expect_int("hidden_size", self.hidden_size, minimum=1)
        _expect_int("num_attention_heads", self.num_attention_heads, minimum=1)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.tree_shape is None:
            self.tree_shape = AUTO
        if not isinstance(self.tree_shape, (str, bytes)) and hasattr(self.tree_shape, "__iter__"):
            self.tree_shape = list(self.tree_shape)
        super().__post_init__(**kwargs)
        self.validate_sizes()
        self.validate_numbers()
        validate_tree_settings(
            self.tree_shape,
            self.max_tree_nodes,
            self.ngram_branch_length,
            self.ngram_min_match,
            self.recheck_near_ties,
            self.fallback_to_plain,
            self.capture_rounds,
        )
        if self.tree_shape != AUTO:
            self.tree_shape = [int(width) for width in self.tree_shape]

    def validate_sizes(self) -> None:
        """Check the sizes of the layer."""
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
            _expect_int(name, getattr(self, name), minimum=1)
        _expect_int("head_dim", self.head_dim, minimum=2)
        if self.head_dim % 2:
            raise ValueError(
                f"`head_dim` must be even, as rotary positions need, got {self.head_dim}. Use the target's."
            )
        _expect_int("sliding_window", self.sliding_window, minimum=1)
        if self.num_attention_heads % self.num_key_value_heads != 0:
            raise ValueError(
                f"`num_attention_heads` must be a multiple of `num_key_value_heads` ({self.num_key_value_heads}), got "
                f"{self.num_attention_heads}. Use the head counts of the target."
            )
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"`hidden_act` must be one of {sorted(ACT2FN)}, got {self.hidden_act!r}.")
        if self.draft_vocab_size is not None:
            _expect_int("draft_vocab_size", self.draft_vocab_size, minimum=1)
            if self.draft_vocab_size > self.vocab_size:
                raise ValueError(
                    f"`draft_vocab_size` must be at most `vocab_size` ({self.vocab_size}), got "
                    f"{self.draft_vocab_size}. Use `None` to let the draft propose every token."
                )

    def validate_numbers(self) -> None:
        """Check switches, the layer read and the fractions."""
        for name in ("attention_bias", "qk_norm", "use_target_final_norm"):
            _expect_bool(name, getattr(self, name))
        layer = self.target_layer_idx
        if not isinstance(layer, int) or isinstance(layer, bool):
            raise ValueError(f"`target_layer_idx` must be an integer, got {layer!r}. Use -1 for the last.")
        for name, positive in (("rms_norm_eps", True), ("initializer_range", False)):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value < 0 or (positive and value == 0):
                kind = "positive number" if positive else "number of at least 0"
                raise ValueError(f"`{name}` must be a {kind}, got {value!r}. Use the target's.")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, and refuses the configuration of another kind of model.

        Raises:
            ValueError: `config_dict` names another `model_type`.
        """
        found = config_dict.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise ValueError(
                f"`pretrained_model_name_or_path` must hold a LongSpec draft (`model_type` {cls.model_type!r}), got a "
                f"configuration of type {found!r}. {CONVERSION_HINT}"
            )
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_target(cls, target_config: PreTrainedConfig, **overrides: Any) -> LongSpecDraftConfig:
        """Build the configuration of a draft for the target described by `target_config`.

        Args:
            target_config: configuration of a decoder-only language model, or of a model that holds one.
            **overrides: any field of this class.

        Raises:
            ValueError: no draft can read such a target, an override is no field, or it is out of range.
        """
        validate_field_names(cls, overrides)
        text = target_config.get_text_config(decoder=True)
        if reason := reason_against_drafts(target_config):
            raise ValueError(
                f"`target_config` must describe a decoder whose keys and values a draft can read, got a "
                f"{type(target_config).__name__}: {reason}. Use another target, or generate without a draft."
            )
        index = overrides.get("target_layer_idx", -1)
        layer = config_of_layer(text, index if isinstance(index, int) else -1)
        heads = layer.num_attention_heads
        fields: dict[str, Any] = {
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "intermediate_size": getattr(layer, "intermediate_size", None) or 4 * text.hidden_size,
            "num_attention_heads": heads,
            "num_key_value_heads": getattr(layer, "num_key_value_heads", None) or heads,
            "head_dim": getattr(layer, "head_dim", None) or text.hidden_size // heads,
            "hidden_act": getattr(text, "hidden_act", None) or getattr(text, "hidden_activation", None) or "silu",
            "rms_norm_eps": getattr(text, "rms_norm_eps", 1e-6),
            # Qwen2 has biases in its code, not in its configuration.
            "attention_bias": bool(getattr(text, "attention_bias", text.model_type.startswith("qwen2"))),
            "qk_norm": text.model_type.startswith(("qwen3", "gemma3", "gemma4")),
            "initializer_range": getattr(text, "initializer_range", 0.02),
            "target_name_or_path": target_config.name_or_path or None,
            "bos_token_id": text.bos_token_id,
            "eos_token_id": text.eos_token_id,
            "pad_token_id": text.pad_token_id,
        }
        return cls(**{**fields, **overrides})


def reason_against_drafts(target_config: PreTrainedConfig) -> str | None:
    """Why no draft can read the keys and values of such a target, or `None`."""
    if getattr(target_config, "is_encoder_decoder", False):
        return "it is an encoder-decoder, and LongSpec has drafts for decoder-only models"
    text = target_config.get_text_config(decoder=True)
    layer = config_of_layer(text, -1)
    if not getattr(layer, "num_attention_heads", None):
        return "its configuration names no attention heads, and a draft reads what a layer of attention has cached"
    unreadable = "keys and values of different sizes cannot be read by a draft"
    if rank := getattr(layer, "kv_lora_rank", None):
        return f"its layers have multi-head latent attention (`kv_lora_rank` is {rank}), whose {unreadable}"
    values = getattr(layer, "v_head_dim", None)
    keys = getattr(layer, "qk_head_dim", None) or getattr(layer, "head_dim", None) or values
    return (
        None
        if values in (None, keys)
        else f"its heads have {keys} numbers in keys, {values} in values, and {unreadable}"
    )


def resolve_layer(target_layer_idx: int, text_config: PreTrainedConfig) -> int:
    """Index of the target layer that is meant by `target_layer_idx`; -1 is the last full-attention layer.

    Raises:
        ValueError: the target has no such layer.
    """
    count = text_config.num_hidden_layers
    types = getattr(text_config, "layer_types", None) or ["full_attention"] * count
    if target_layer_idx == -1:
        full = [i for i, kind in enumerate(types) if kind == "full_attention"]
        return full[-1] if full else count - 1
    if not -count <= target_layer_idx < count:
        raise ValueError(
            f"`target_layer_idx` must be -1 or name one of the target's {count} layers, got {target_layer_idx}."
        )
    return target_layer_idx % count


def config_of_layer(text_config: PreTrainedConfig, target_layer_idx: int) -> PreTrainedConfig:
    """The configuration of that layer, where layers have some of their own (Gemma 4), else the one of all."""
    if not getattr(text_config, "is_heterogeneous", False):
        return text_config
    return text_config.per_layer_config[resolve_layer(target_layer_idx, text_config)]


def validate_field_names(config_class: type[PreTrainedConfig], given: Iterable[str]) -> None:
    """Check that a configuration has fields of these names; raises a ValueError that names the nearest ones."""
    known = [field.name for field in dataclasses.fields(config_class)]
    for name in given:
        if name not in known:
            nearest = difflib.get_close_matches(name, known) or sorted(config_class.__annotations__)
            raise ValueError(
                f"`{name}` must be a field of {config_class.__name__}, which has none of this name. Nearest: "
                f"{', '.join(f'`{each}`' for each in nearest)}."
            )


def validate_tree_settings(
    tree_shape: list[int] | str,
    max_tree_nodes: int,
    ngram_branch_length: int,
    ngram_min_match: int,
    recheck_near_ties: bool = False,
    fallback_to_plain: bool = True,
    capture_rounds: bool = True,
) -> None:
    """Check the settings of the token tree; raises a ValueError that names the setting."""
    if tree_shape != AUTO and (isinstance(tree_shape, (str, bytes)) or not hasattr(tree_shape, "__iter__")):
        raise ValueError(
            f'`tree_shape` must be "auto" or a list of integers, got {tree_shape!r}. Use for example [4, 16, 16].'
        )
    for width in () if tree_shape == AUTO else tree_shape:
        if not isinstance(width, int) or isinstance(width, bool) or width < 1:
            raise ValueError(
                f"`tree_shape` must hold integers of at least 1, got {list(tree_shape)!r}. An empty list turns the "
                "beam off."
            )
    _expect_int("max_tree_nodes", max_tree_nodes, minimum=1)
    _expect_int("ngram_branch_length", ngram_branch_length, minimum=0)
    _expect_int("ngram_min_match", ngram_min_match, minimum=1)
    switches = {
        "recheck_near_ties": recheck_near_ties,
        "fallback_to_plain": fallback_to_plain,
        "capture_rounds": capture_rounds,
    }
    for name, value in switches.items():
        _expect_bool(name, value)


def _expect_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be True or False, got {value!r}.")


def _expect_int(name: str, value: Any, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"`{name}` must be an integer of at least {minimum}, got {value!r}.")
