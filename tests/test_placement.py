"""Targets whose parts lie apart, as far as a machine without GPUs can tell: placement, metadata, offloaded weights."""

from types import SimpleNamespace

import pytest
import torch
from models import learned, prompt, tiny_target
from transformers import AutoModelForCausalLM

from longspec_hf.attention import TreeAttention
from longspec_hf.placement import draft_device
from longspec_hf.tree import TokenTree


@pytest.mark.parametrize(("running", "expected"), [(1, "cuda:1"), ("cuda:1", "cuda:1"), (None, "cpu")])
def test_the_draft_belongs_beside_the_layer_it_reads(running, expected):
    target = tiny_target()
    draft = learned(target)
    target.model.layers[1]._hf_hook = SimpleNamespace(execution_device=running)
    assert draft_device(draft.config, target) == torch.device(expected)
    draft.config.target_layer_idx = 0
    assert draft_device(draft.config, target) == torch.device("cpu")


def test_a_draft_elsewhere_is_refused_before_any_forward():
    """C49."""
    target = tiny_target()
    draft = learned(target)
    target.model.layers[1]._hf_hook = SimpleNamespace(execution_device=1)
    with pytest.raises(ValueError, match=r"is on device cpu, expected the target's cuda:1.*`draft.to\('cuda:1'\)`"):
        target.generate(prompt(5), assistant_model=draft, max_new_tokens=2)


def test_a_round_has_one_metadata_per_device_and_kind_of_layer():
    tree = TokenTree.root_only(torch.tensor([[3], [4]]))
    lengths, starts = torch.tensor([7, 9], dtype=torch.int32), torch.tensor([0, 2], dtype=torch.int32)
    cpu, other = torch.device("cpu"), torch.device("meta")
    dropped = [None, (1, 2), None, (1, 2), None]
    layers = TreeAttention.per_layer(
        tree, lengths, starts, dropped, [cpu, cpu, other, other, cpu], [None, 4, None, 4, None]
    )
    assert layers[0] is layers[4]
    assert len({id(layer) for layer in layers}) == 4
    assert layers[1].prefix_lens.tolist() == [6, 7]
    for layer, device in zip(layers, [cpu, cpu, other, other, cpu], strict=True):
        parts = (layer.prefix_lens, layer.ancestor_bits, layer.depths, layer.starts)
        assert {part.device for part in parts} == {device}


@pytest.mark.parametrize("vocabulary", [None, 40])
@pytest.mark.parametrize("offloaded", ["lm_head", "model.embed_tokens", "model.norm", "model.layers.1"])
def test_offloaded_parts_give_the_same_text(tmp_path, offloaded, vocabulary):
    tiny_target().save_pretrained(tmp_path / "target")
    parts = ["lm_head", "model.embed_tokens", "model.rotary_emb", "model.norm", "model.layers.0", "model.layers.1"]
    target = AutoModelForCausalLM.from_pretrained(
        tmp_path / "target",
        device_map={part: "disk" if part == offloaded else "cpu" for part in parts},
        offload_folder=tmp_path / "offloaded",
    )
    assert any(parameter.is_meta for parameter in target.parameters())
    draft = learned(target, draft_vocab_size=vocabulary)
    ids = prompt(20)
    plain = target.generate(ids, max_new_tokens=20, do_sample=False)
    out = target.generate(ids, assistant_model=draft, max_new_tokens=20, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(out.sequences, plain)
    assert out.speculation_stats.fallback_reason is None
