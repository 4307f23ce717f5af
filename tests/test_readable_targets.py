"""Which targets a draft can read, and what is said of the others before any forward."""

import pytest
import torch
from models import SIZES, VOCAB, learned, prompt, tiny_target
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma4TextConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MiniCPM3Config,
    T5Config,
)

from longspec_hf import LongSpecDraftConfig, LongSpecDraftModel
from longspec_hf.target import bind

LATENT_SIZES = {
    **{name: value for name, value in SIZES.items() if name != "head_dim"},
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
EXPERTS = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LATENT = {
    "deepseek_v2": DeepseekV2Config(**LATENT_SIZES, **EXPERTS),
    "deepseek_v3": DeepseekV3Config(**LATENT_SIZES, **EXPERTS),
    "minicpm3": MiniCPM3Config(**LATENT_SIZES),
}
T5 = T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
MAMBA = MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4)
UNREADABLE = [
    (LATENT["deepseek_v2"], "multi-head latent attention .*cannot be read by a draft"),
    (LATENT["deepseek_v3"], "multi-head latent attention .*cannot be read by a draft"),
    (LATENT["minicpm3"], "multi-head latent attention .*cannot be read by a draft"),
    (MAMBA, "names no attention heads"),
    (T5, "encoder-decoder"),
]


@pytest.mark.parametrize(("config", "words"), UNREADABLE, ids=lambda value: getattr(value, "model_type", ""))
def test_targets_no_draft_can_read_are_refused_before_any_forward(config, words, monkeypatch):
    with pytest.raises(ValueError, match=f"`target_config` must .*{type(config).__name__}: .*{words}"):
        LongSpecDraftConfig.from_target(config)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = kind.from_config(config).eval()
    draft = learned(tiny_target())
    monkeypatch.setattr(type(model), "forward", lambda *args, **kwargs: pytest.fail("a forward was paid"))
    with pytest.raises(ValueError, match=f"`assistant_model` cannot be used with {type(model).__name__}: .*{words}"):
        model.generate(prompt(5), max_new_tokens=3, assistant_model=draft)


@pytest.mark.parametrize(("value_dim", "fits"), [(None, True), (8, True), (4, False)])
def test_values_of_another_size_than_keys_are_refused(value_dim, fits):
    config = LlamaConfig(**SIZES, v_head_dim=value_dim)
    if fits:
        assert LongSpecDraftConfig.from_target(config).head_dim == 8
        return
    with pytest.raises(ValueError, match=r"heads have 8 numbers in keys, 4 in values.*cannot be read"):
        LongSpecDraftConfig.from_target(config)


def gemma4(**fields):
    """Gemma 4 whose full-attention layers have other head sizes than those with a window."""
    layers = {"layer_types": ["sliding_attention", "full_attention"] * (fields.get("num_hidden_layers", 2) // 2)}
    sizes = {"global_head_dim": 16, "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8}
    config = Gemma4TextConfig(**{**SIZES, **layers, **sizes, "sliding_window": 8, "pad_token_id": 0, **fields})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("fields", "layer", "sizes"),
    [
        ({}, -1, (16, 2)),
        ({}, 0, (8, 2)),
        ({"attention_k_eq_v": True, "num_global_key_value_heads": 1}, 1, (16, 1)),
        ({"global_head_dim": 8}, -1, (8, 2)),
    ],
)
def test_a_draft_has_the_head_sizes_of_the_layer_it_reads(fields, layer, sizes):
    model = gemma4(**fields)
    draft = learned(model, target_layer_idx=layer)
    assert (draft.config.head_dim, draft.config.num_key_value_heads) == sizes
    assert_speculated_as_plain(model, draft, prompt(13))
    if sizes[0] == 16:
        with pytest.raises(ValueError, match=r"`head_dim` is 8, the target's is 16"):
            bind(learned(model, head_dim=8, target_layer_idx=layer), model)


def test_layers_that_read_the_cache_of_earlier_ones_are_decoded_plainly():
    model = gemma4(num_hidden_layers=4, num_kv_shared_layers=2)
    out = generate(model, learned(model))
    assert torch.equal(out.sequences, generate(model).sequences)
    assert out.speculation_stats.fallback_reason is not None


def test_the_final_norm_of_lfm2_is_found():
    sizes = {**SIZES, "pad_token_id": 0}
    hybrid = AutoModelForCausalLM.from_config(Lfm2Config(**sizes, layer_types=["conv", "full_attention"])).eval()
    assert bind(learned(hybrid), hybrid).norm is hybrid.model.embedding_norm
    assert "layers of type conv" in generate(hybrid, learned(hybrid)).speculation_stats.fallback_reason


def test_a_resized_target_says_how_the_draft_goes_on():
    for vocabulary in (None, 20):
        model = tiny_target()
        draft = learned(model, draft_vocab_size=vocabulary)
        model.resize_token_embeddings(70, mean_resizing=False)
        with pytest.raises(ValueError, match=r"`resize_token_embeddings`.*`draft.config.vocab_size = 70`"):
            generate(model, draft)
        draft.config.vocab_size = 70
        assert_speculated_as_plain(model, draft, prompt(13))
    # Of a draft that does not fit at all it is not the vocabulary that is named.
    with pytest.raises(ValueError, match=r"its `hidden_size` is 64, the target's is 32") as raised:
        generate(model, learned(tiny_target(hidden_size=64)))
    assert "resize" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "nearest"), [("tree_shap", "`tree_shape`"), ("max_nodes", "`max_tree_nodes`"), ("zzz", "`vocab_size`")]
)
def test_a_mistyped_setting_is_refused_with_the_nearest_ones(name, nearest):
    model = tiny_target()
    for make in (
        lambda **given: LongSpecDraftModel.from_target(model, **given),
        lambda **given: learned(model, **given),
    ):
        with pytest.raises(ValueError, match=f"`{name}` must be a field of LongSpecDraftConfig.*Nearest: .*{nearest}"):
            make(**{name: [1]})


def generate(model, draft=None, ids=None):
    given = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True}
    return model.generate(prompt(13) if ids is None else ids, assistant_model=draft, **given)


def assert_speculated_as_plain(model, draft, ids):
    out = generate(model, draft, ids)
    assert torch.equal(out.sequences, generate(model, ids=ids).sequences)
    assert out.speculation_stats.fallback_reason is None and out.speculation_stats.rounds > 0
