"""Tree settings of a call: call over draft over configuration, and the device's own default where nobody chose."""

import pytest
import torch
from models import learned, prompt, scripted, tiny_target
from transformers import GenerationConfig

from longspec_hf import LongSpecDraftConfig, LongSpecDraftModel
from longspec_hf.configuration_longspec import DEFAULT_TREE_SHAPE
from longspec_hf.settings import CPU_TREE, resolve_tree_settings

GENERAL = {"tree_shape": DEFAULT_TREE_SHAPE, "max_tree_nodes": 64, "ngram_branch_length": 8}


def tree_of(settings):
    return {name: getattr(settings, name) for name in CPU_TREE}


def draft_with(device="cpu", **fields):
    config = LongSpecDraftConfig.from_target(tiny_target().config, **fields)
    with torch.device(device):
        return LongSpecDraftModel(config)


def test_a_cpu_has_a_tree_of_its_own():
    assert tree_of(resolve_tree_settings(draft_with(), GenerationConfig())) == CPU_TREE


def test_other_devices_have_the_general_tree():
    assert tree_of(resolve_tree_settings(draft_with("meta"), GenerationConfig())) == GENERAL


@pytest.mark.parametrize("level", ["call", "draft", "config"])
@pytest.mark.parametrize(
    ("name", "value"), [("tree_shape", (3, 5)), ("max_tree_nodes", 20), ("ngram_branch_length", 0)]
)
def test_one_choice_of_a_user_turns_the_cpus_tree_off(level, name, value):
    given = {name: list(value) if isinstance(value, tuple) else value}
    draft = draft_with(**given if level == "config" else {})
    if level == "draft":
        draft.generation_config = GenerationConfig(**given)
    settings = resolve_tree_settings(draft, GenerationConfig(**given if level == "call" else {}))
    assert tree_of(settings) == {**GENERAL, name: value}


def test_the_cpus_tree_survives_saving(tmp_path):
    draft_with().save_pretrained(tmp_path)
    draft = LongSpecDraftModel.from_pretrained(tmp_path)
    assert tree_of(resolve_tree_settings(draft, GenerationConfig())) == CPU_TREE


def test_settings_beside_the_tree_leave_the_cpus_tree():
    settings = resolve_tree_settings(draft_with(), GenerationConfig(ngram_min_match=3, recheck_near_ties=True))
    assert tree_of(settings) == CPU_TREE
    assert settings.ngram_min_match == 3 and settings.recheck_near_ties


def test_it_is_the_tree_that_is_verified(target, monkeypatch):
    ids = prompt(40)
    draft = scripted(target, ids, 40, "oracle", **{name: getattr(LongSpecDraftConfig, name) for name in CPU_TREE})
    rows = []
    original = type(target).forward
    monkeypatch.setattr(
        type(target), "forward", lambda self, *a, **k: rows.append(k["input_ids"].shape[1]) or original(self, *a, **k)
    )
    out = target.generate(ids, max_new_tokens=30, do_sample=False, assistant_model=draft)
    assert max(rows[1:]) == CPU_TREE["max_tree_nodes"]
    assert torch.equal(out, draft.script[None, : out.shape[1]])


def test_the_same_ids_with_a_real_draft(target):
    ids = prompt(40)
    draft = learned(target, tree_shape=None)
    assert tree_of(resolve_tree_settings(draft, GenerationConfig())) == CPU_TREE
    plain = target.generate(ids, max_new_tokens=30, do_sample=False)
    assert torch.equal(plain, target.generate(ids, max_new_tokens=30, do_sample=False, assistant_model=draft))
