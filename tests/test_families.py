"""Every family of targets: plain `generate`'s ids around the edges of their windows, by chains and by trees."""

import pytest
import torch
from models import FAMILIES, WINDOW, prompt, scripted, tiny_target

NEW_TOKENS = 3 * WINDOW
LENGTHS = (6, 7, 8, 9, 15, 16, 17)
TREE = [4, 16]  # 21 nodes


@pytest.fixture(autouse=True)
def _little_slack(monkeypatch):
    """Window layers drop rows every few tokens."""
    monkeypatch.setattr("longspec_hf.window_layer.SLACK_ROWS", 3)


def attentions(family):
    """The implementations that its class allows."""
    return ["eager", "sdpa"] if tiny_target(family)._supports_sdpa else ["eager"]


MATRIX = [(family, attention) for family in FAMILIES for attention in attentions(family)]


@pytest.mark.parametrize("way", ["chain", "tree"])
@pytest.mark.parametrize(("family", "attention"), MATRIX)
def test_matrix(family, attention, way, monkeypatch):  # C13, C63, C64
    model = tiny_target(family, attn_implementation=attention)
    if way == "chain":
        monkeypatch.setattr(type(model), "_supports_attention_backend", False)
    differing = []
    for length in LENGTHS:
        ids = prompt(length, seed=length)
        draft = scripted(model, ids, NEW_TOKENS, "noisy", tree_shape=TREE)
        out = model.generate(
            ids, max_new_tokens=NEW_TOKENS, do_sample=False, assistant_model=draft, return_dict_in_generate=True
        )
        if not torch.equal(out.sequences[0], draft.script):
            differing.append(length)
        if way == "tree":
            assert out.speculation_stats.fallback_reason is None and out.speculation_stats.tau > 1
    assert not differing
