"""The draft model: configuration, saving and loading, and that drafting computes what training trains."""

import json

import pytest
import torch
from models import VOCAB, learned, prompt, tiny_target
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from longspec_hf import LongSpecCandidateGenerator, LongSpecDraftConfig, LongSpecDraftModel
from longspec_hf.draft_attention import cross_attention_mask, masked_attention, window_mask
from longspec_hf.hook import CACHE_ARG
from longspec_hf.settings import TreeSettings
from longspec_hf.target import bind, resolve_layer_idx

TOLERANCE = 1e-4  # fp32 hidden states of size 10, attention summed in another order


def test_from_target_fills_the_sizes():
    config = LongSpecDraftConfig.from_target(tiny_target("qwen3").config, sliding_window=7, eos_token_id=3)
    assert (config.vocab_size, config.hidden_size, config.head_dim, config.num_key_value_heads) == (VOCAB, 32, 8, 2)
    assert config.qk_norm and not config.attention_bias
    assert (config.sliding_window, config.eos_token_id) == (7, 3)
    assert LongSpecDraftConfig.from_target(tiny_target("qwen2").config).attention_bias


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tree_shape", [0]),
        ("tree_shape", [4, -1]),
        ("tree_shape", "4,16"),
        ("max_tree_nodes", 0),
        ("ngram_branch_length", -1),
        ("ngram_min_match", 0),
        ("sliding_window", 0),
        ("hidden_act", "wish"),
        ("draft_vocab_size", VOCAB + 1),
        ("num_key_value_heads", 3),
        ("num_attention_heads", 0),
        ("head_dim", 7),
        ("attention_bias", "yes"),
        ("qk_norm", 1),
        ("use_target_final_norm", None),
        ("target_layer_idx", 1.5),
        ("target_layer_idx", "last"),
        ("rms_norm_eps", -1.0),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", float("nan")),
        ("initializer_range", "small"),
    ],
)
def test_bad_fields_are_named(field, value):  # C83
    with pytest.raises(ValueError, match="`num_attention_heads`" if field == "num_key_value_heads" else f"`{field}`"):
        LongSpecDraftConfig.from_target(tiny_target().config, **{field: value})


def test_a_shape_may_be_any_iterable():
    config = LongSpecDraftConfig.from_target(tiny_target().config, tree_shape=(width for width in (3, 2)))
    assert config.tree_shape == [3, 2]
    with pytest.raises(ValueError, match="`num_attention_heads`"):
        LongSpecDraftConfig(num_attention_heads=None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("draft_vocab_size", [None, 10])
def test_round_trip(tmp_path, target, dtype, draft_vocab_size):
    draft = learned(target, draft_vocab_size=draft_vocab_size).to(dtype)
    if draft_vocab_size:
        draft.draft_token_ids.copy_(torch.randperm(VOCAB)[:draft_vocab_size])
    draft.save_pretrained(tmp_path)
    for loader in (LongSpecDraftModel, AutoModel, AutoModelForCausalLM):
        loaded = loader.from_pretrained(tmp_path)
        assert isinstance(loaded, LongSpecDraftModel)
        assert loaded.config.to_diff_dict() == draft.config.to_diff_dict()
        assert loaded.state_dict().keys() == draft.state_dict().keys()
        assert all(torch.equal(loaded.state_dict()[name], value) for name, value in draft.state_dict().items())
        assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert AutoConfig.from_pretrained(tmp_path).model_type == "longspec"


def test_files_hold_the_layer_and_nothing_of_the_target(tmp_path, target):
    learned(target).save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert not [n for n in names if "embed" in n or "lm_head" in n or "cross_attn.k_proj" in n]
    assert "cross_attn.q_proj.weight" in names and "post_cross_attention_layernorm.weight" in names


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_a_misfit_tensor_is_named(tmp_path, target, change):
    learned(target).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    if change == "missing":
        del tensors["mlp.up_proj.weight"]
    elif change == "unexpected":
        tensors["cross_attn.k_proj.weight"] = torch.zeros(16, 32)
    else:
        tensors["mlp.up_proj.weight"] = torch.zeros(3, 32)
    save_file(tensors, path, metadata={"format": "pt"})
    name = "cross_attn.k_proj.weight" if change == "unexpected" else "mlp.up_proj.weight"
    with pytest.raises(ValueError, match=rf"{change}.*`{name}`|`{name}` has {change}"):
        LongSpecDraftModel.from_pretrained(tmp_path)


def test_the_hubs_cache_layout(tmp_path, target, monkeypatch):
    """`from_pretrained("org/name")` reads a cache laid out as the Hub's client lays it out."""
    snapshot = tmp_path / "models--org--draft" / "snapshots" / ("0" * 40)
    refs = tmp_path / "models--org--draft" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("0" * 40)
    draft = learned(target)
    draft.save_pretrained(snapshot)
    loaded = LongSpecDraftModel.from_pretrained("org/draft", cache_dir=tmp_path, local_files_only=True)
    assert torch.equal(loaded.mlp.up_proj.weight, draft.mlp.up_proj.weight)


@pytest.mark.parametrize(("field", "value"), [("hidden_size", 64), ("num_key_value_heads", 4), ("head_dim", 16)])
def test_a_draft_of_another_target_is_refused_before_any_forward(target, field, value, monkeypatch):
    overrides = {field: value, **({"num_attention_heads": 4} if field == "hidden_size" else {})}
    draft = learned(tiny_target(**overrides))
    monkeypatch.setattr(type(target), "forward", lambda *a, **k: pytest.fail("a forward ran"))
    with pytest.raises(ValueError, match=rf"`{field}` is {value}, the target's is"):
        target.generate(prompt(5), max_new_tokens=3, assistant_model=draft)


def test_another_device_is_refused(target, monkeypatch):  # C49
    draft = learned(target).to("meta")
    monkeypatch.setattr(type(target), "forward", lambda *a, **k: pytest.fail("a forward ran"))
    with pytest.raises(ValueError, match=r"`assistant_model` is on device meta, expected the target's cpu"):
        target.generate(prompt(5), max_new_tokens=3, assistant_model=draft)


def test_another_dtype_is_refused(target):
    with pytest.raises(ValueError, match=r"bfloat16.*float32"):
        target.generate(prompt(5), max_new_tokens=3, assistant_model=learned(target).to(torch.bfloat16))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3"])
def test_drafting_computes_what_training_trains(family):
    """The root's expansion equals the last row of `forward` over the whole text, past the window's edge too."""
    # Windows are left out: which of the target's rows a window still shows is the cache's matter.
    model = tiny_target(family, sliding_window=None) if family == "phi3" else tiny_target(family)
    draft = learned(model, sliding_window=6)
    for length in (2, 5, 6, 7, 19):
        ids = prompt(length, seed=length)
        with torch.no_grad():
            outputs = model(ids[:, :-1], use_cache=True)
            cache = outputs[CACHE_ARG]
            bound = bind(draft, model)
            generator = LongSpecCandidateGenerator(draft, bound, TreeSettings((1,), 8, 0, 2))
            generator.start([ids[0, :-1].tolist()], torch.arange(length - 1).unsqueeze(0))
            generator.append([[int(ids[0, -1])]])
            seen = []
            draft.next_token_logits = lambda hidden, head, *a, seen=seen: seen.append(hidden) or head(hidden)
            generator.propose(cache, [1])
            embeds = bound.embed_tokens(ids)
            layer = model(ids, use_cache=True)[CACHE_ARG].layers[bound.layer_idx]
            hidden = draft(
                embeds,
                bound.position_embeddings(torch.arange(length).unsqueeze(0), embeds),
                layer.keys,
                layer.values,
                cross_attention_shift=1,
            ).last_hidden_state
            del draft.next_token_logits
        torch.testing.assert_close(seen[0][0, 0], hidden[0, -1], atol=TOLERANCE, rtol=TOLERANCE)


def test_window_and_shift_masks():  # C77, C88
    window = window_mask(6, 3, torch.device("cpu"))[0, 0]
    assert window[5].tolist() == [False, False, False, True, True, True]
    cross = cross_attention_mask(6, 2, torch.device("cpu"))[0, 0]
    assert cross[1].tolist() == [False] * 6
    assert cross[5].tolist() == [True, True, True, True, False, False]


def test_a_query_that_sees_nothing_yields_zero_and_a_finite_gradient():
    q, k, v = (torch.randn(1, 2, 3, 4, requires_grad=True) for _ in range(3))
    out = masked_attention(q, k, v, cross_attention_mask(3, 1, torch.device("cpu")), 0.5)
    assert (out[:, :, 0] == 0).all() and (out[:, :, 1:] != 0).all()
    out.sum().backward()
    assert torch.isfinite(q.grad).all() and torch.isfinite(k.grad).all()


def test_layer_index():
    config = tiny_target("gemma3").config
    assert resolve_layer_idx(LongSpecDraftConfig(target_layer_idx=-1), config) == 1
    assert resolve_layer_idx(LongSpecDraftConfig(target_layer_idx=-2), config) == 0
    with pytest.raises(ValueError, match="`target_layer_idx`"):
        resolve_layer_idx(LongSpecDraftConfig(target_layer_idx=2), config)


def test_config_survives_json(tmp_path):
    config = LongSpecDraftConfig(tree_shape=[2, 3], draft_vocab_size=7)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["tree_shape"] == [2, 3]
    assert LongSpecDraftConfig.from_pretrained(tmp_path).tree_shape == [2, 3]
