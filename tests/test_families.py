"""Every family of targets: plain `generate`'s ids around the edges of their windows, by chains and by trees."""

from pathlib import Path

import pytest
import torch
from family_matrix import NAMES, WAYS, cells, differing_lengths
from models import FAMILIES, VOCAB, learned, prompt, scripted, tiny_target
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from longspec_hf import LongSpecDraftModel
from longspec_hf.fallback import reason_of_layers
from longspec_hf.target import bind

LOGIT_TOLERANCE = 1e-4  # fp32 logits of size 5, summed in another order


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("family", "attention"), cells())
def test_matrix(family, attention, way):  # C13, C63, C64
    assert differing_lengths(family, attention, way) == []


def test_the_page_lists_every_family():
    page = (Path(__file__).parent.parent / "docs" / "models.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in page.partition("| family |")[2].splitlines()[2:]]
    assert set(NAMES) == set(FAMILIES)
    assert [row[0] for row in rows] == list(NAMES.values())
    for family, (_, name, *results) in zip(NAMES, rows, strict=True):
        assert name == f"`{type(tiny_target(family)).__name__}`"
        assert results[:2] == ["equal", "equal"] and set(results[2:]) <= {"equal", "not offered"}


def test_soft_capped_logits_come_out_as_in_plain():  # C98
    model = tiny_target("gemma2")
    kwargs = {"max_new_tokens": 20, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    plain = model.generate(prompt(9), **kwargs)
    out = model.generate(prompt(9), **kwargs, assistant_model=learned(model))
    cap = model.config.final_logit_softcapping
    for ours, theirs in zip(out.logits, plain.logits, strict=True):
        assert ours.abs().max() <= cap
        torch.testing.assert_close(ours, theirs, atol=LOGIT_TOLERANCE, rtol=0)


def test_the_draft_caps_its_own_logits():  # C98
    model = tiny_target("gemma2")
    draft = learned(model)
    hidden = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(0)) * 100
    raw = model.lm_head(model.model.norm(hidden))
    cap = model.config.final_logit_softcapping
    torch.testing.assert_close(bind(draft, model).logits(hidden), cap * torch.tanh(raw / cap))


def test_a_nested_language_model_is_found_and_left_as_it_was():  # C100
    model = tiny_target("qwen2_5_vl")
    draft, language_model = learned(model), model.model.language_model
    bound = bind(draft, model)
    assert bound.embed_tokens is language_model.embed_tokens
    assert bound.norm is language_model.norm and bound.rotary_emb is language_model.rotary_emb
    before = {
        name: len(module._forward_hooks) + len(module._forward_pre_hooks) for name, module in model.named_modules()
    }
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    model.generate(prompt(9), max_new_tokens=8, do_sample=False, assistant_model=draft)
    assert attributes == {name: set(vars(module)) for name, module in model.named_modules()}
    assert before == {
        name: len(module._forward_hooks) + len(module._forward_pre_hooks) for name, module in model.named_modules()
    }
    assert model.config.text_config._attn_implementation == "sdpa"


def image_inputs(model):
    """A prompt around one image of four merged patches."""
    config = model.config
    image = torch.full((1, 4), config.image_token_id)
    start, end = torch.tensor([[config.vision_start_token_id]]), torch.tensor([[config.vision_end_token_id]])
    ids = torch.cat([prompt(5, vocab=50), start, image, end, prompt(6, seed=1, vocab=50)], dim=1)
    patch = 3 * config.vision_config.temporal_patch_size * config.vision_config.patch_size**2
    pixels = torch.randn(16, patch, generator=torch.Generator().manual_seed(0))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids == config.image_token_id).int(),
    }


def test_a_prompt_with_an_image_is_decoded_plainly():  # C46
    model = tiny_target("qwen2_5_vl")
    inputs = image_inputs(model)
    plain = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    out = model.generate(
        **inputs, max_new_tokens=12, do_sample=False, assistant_model=learned(model), return_dict_in_generate=True
    )
    assert torch.equal(plain, out.sequences)
    assert "with images" in out.speculation_stats.fallback_reason
    # A text prompt afterwards is not confused by what the model remembers of the image.
    plain = model.generate(prompt(9), max_new_tokens=12, do_sample=False)
    out = model.generate(
        prompt(9), max_new_tokens=12, do_sample=False, assistant_model=learned(model), return_dict_in_generate=True
    )
    assert torch.equal(plain, out.sequences) and out.speculation_stats.fallback_reason is None


def test_text_positions_rotate_drafts_as_the_target():  # C46
    model = tiny_target("qwen2_5_vl")
    like, positions = torch.zeros(1), torch.tensor([[3, 4, 9]])
    ours = bind(learned(model), model).position_embeddings(positions, like)
    theirs = model.model.language_model.rotary_emb(like, positions.expand(3, 1, -1))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other) and one.shape == (1, 3, 8)


LEARNED_POSITIONS = [
    GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=4, n_positions=128)),
    OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            ffn_dim=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=128,
            word_embed_proj_dim=32,
        )
    ),
]


@pytest.mark.parametrize("model", LEARNED_POSITIONS, ids=lambda model: type(model).__name__)
def test_learned_positions_are_refused_up_front(model, monkeypatch):  # C72
    draft = LongSpecDraftModel.from_target(model)
    monkeypatch.setattr(type(model), "forward", lambda *args, **kwargs: pytest.fail("a forward was paid"))
    with pytest.raises(ValueError, match=rf"`assistant_model`.*rotary positions.*{type(model).__name__}"):
        model.generate(prompt(120), max_new_tokens=8, assistant_model=draft)


def test_no_position_behind_the_context_limit_is_touched(monkeypatch):  # C72
    model = tiny_target("llama", max_position_embeddings=128)
    draft = scripted(model, prompt(120), 8, "oracle", tree_shape=[1] * 5)
    highest = []
    forward = model.model.rotary_emb.forward
    monkeypatch.setattr(
        model.model.rotary_emb,
        "forward",
        lambda x, position_ids: highest.append(int(position_ids.max())) or forward(x, position_ids),
    )
    out = model.generate(prompt(120), max_new_tokens=8, do_sample=False, assistant_model=draft)
    assert torch.equal(out[0], draft.script)
    assert max(highest) == 126  # plain decoding does not read the last token either


@pytest.mark.parametrize("rows", [60, 72])
def test_a_draft_of_another_vocabulary_is_refused(rows):  # C45
    model = tiny_target()
    draft = learned(tiny_target(vocab_size=rows))
    with pytest.raises(ValueError, match=rf"`vocab_size` is {rows}, the target's is {VOCAB}"):
        model.generate(prompt(9), max_new_tokens=8, assistant_model=draft)


def test_layers_that_take_no_tree_are_decoded_plainly():
    model = tiny_target("gemma3")
    text = model.config.get_text_config()
    assert reason_of_layers(text) is None
    text.layer_types = ["chunked_attention", "full_attention"]
    assert "chunked_attention" in reason_of_layers(text)
