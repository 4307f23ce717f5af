"""Tree settings of a call: call over draft over configuration, and the device's own default where nobody chose."""

import pytest
import torch
from models import learned, prompt, scripted, tiny_target
from transformers import GenerationConfig

from longspec_hf import LongSpecDraftConfig, LongSpecDraftModel
from longspec_hf.configuration_longspec import DEFAULT_TREE_SHAPE
from longspec_hf.settings import CPU_TREE, resolve_tree_settings, with_tree_settings

GENERAL = {"tree_shape": DEFAULT_TREE_SHAPE, "max_tree_nodes": 64, "ngram_branch_length": 8}  # on a CPU


def tree_of(settings):
    return {name: getattr(settings, name) for name in CPU_TREE}


def draft_with(device="cpu", **fields):
    config = LongSpecDraftConfig.from_target(tiny_target().config, **fields)
    with torch.device(device):
        return LongSpecDraftModel(config)


def test_a_cpu_begins_with_a_tree_of_its_own():
    assert tree_of(resolve_tree_settings(draft_with(), GenerationConfig())) == CPU_TREE


def test_other_devices_begin_with_the_general_tree():
    settings = resolve_tree_settings(draft_with("meta"), GenerationConfig())
    assert tree_of(settings) == {**GENERAL, "ngram_branch_length": 32}
    assert max(len(tree.tree_shape) for tree in settings.trees) == 8


def given_at(level, device="cpu", **given):
    """Settings of a call, where the call, the draft or its configuration says something."""
    draft = draft_with(device, **given if level == "config" else {})
    if level == "draft":
        draft.generation_config = GenerationConfig(**given)
    return resolve_tree_settings(draft, GenerationConfig(**given if level == "call" else {}))


@pytest.mark.parametrize("level", ["call", "draft", "config"])
@pytest.mark.parametrize("shape", [[3, 5], [], list(DEFAULT_TREE_SHAPE)])
def test_a_shape_of_the_user_is_left_as_it_is(level, shape):
    settings = given_at(level, tree_shape=shape)
    assert tree_of(settings) == {**GENERAL, "tree_shape": tuple(shape)}
    assert settings.choices is None and settings.trees == (settings,)


@pytest.mark.parametrize("level", ["call", "draft"])
def test_auto_may_be_asked_for_where_the_configuration_has_a_shape(level):
    draft = draft_with(tree_shape=[2, 2])
    if level == "draft":
        draft.generation_config = GenerationConfig(tree_shape="auto")
    settings = resolve_tree_settings(draft, GenerationConfig(**{"tree_shape": "auto"} if level == "call" else {}))
    assert tree_of(settings) == CPU_TREE and len(settings.trees) > 10


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("level", ["call", "draft", "config"])
def test_limits_of_the_user_hold_for_all_trees(device, level):
    for nodes in (2, 3, 5, 20, 40):
        trees = given_at(level, device, max_tree_nodes=nodes).trees
        assert max(tree.max_nodes for tree in trees) <= nodes
        assert max(tree.max_nodes for tree in trees) > nodes // 2
    assert {tree.ngram_branch_length for tree in given_at(level, device, ngram_branch_length=0).trees} == {0}
    assert max(tree.ngram_branch_length for tree in given_at(level, device, ngram_branch_length=4).trees) <= 4
    for depth in (1, 3, 5):
        trees = resolve_tree_settings(draft_with(device), GenerationConfig(num_assistant_tokens=depth)).trees
        assert {tree.depth for tree in trees} <= set(range(1, depth + 1)) and max(t.depth for t in trees) == depth
    assert resolve_tree_settings(draft_with(device), GenerationConfig(num_assistant_tokens=0)).depth == 0
    assert given_at(level, device, max_tree_nodes=1).max_nodes == 1


@pytest.mark.parametrize("value", ["Auto", "4,16", "", b"auto", 4])
@pytest.mark.parametrize("level", ["call", "draft", "config"])
def test_other_words_are_refused(level, value):
    with pytest.raises(ValueError, match='`tree_shape` must be "auto" or a list of integers'):
        given_at(level, tree_shape=value)


def test_on_a_cpu_the_configurations_branch_is_cut_and_the_users_is_not():
    draft = draft_with(tree_shape=[3, 5])
    assert draft.config.ngram_branch_length == 32
    assert resolve_tree_settings(draft, GenerationConfig()).ngram_branch_length == 8
    asked = with_tree_settings(GenerationConfig(), ngram_branch_length=20)
    assert resolve_tree_settings(draft, asked).ngram_branch_length == 20
    shorter = draft_with(tree_shape=[3, 5], ngram_branch_length=4)
    assert resolve_tree_settings(shorter, GenerationConfig()).ngram_branch_length == 4


@pytest.mark.parametrize(
    ("shape", "nodes", "sequences", "expected"),
    [("auto", 64, 3, 1), ("auto", 64, 4, 2), ("auto", 16, 1, 2), ([3, 5], 64, 8, 1), ([3, 5], 16, 8, 2)],
)
def test_one_token_is_no_match_for_small_trees(shape, nodes, sequences, expected):
    """Of "auto" a batch of four gets 16 nodes a sequence; trees of the user's are of each sequence."""
    draft = draft_with("meta", tree_shape=shape, max_tree_nodes=nodes)
    assert resolve_tree_settings(draft, GenerationConfig(), sequences).ngram_min_match == expected
    asked = with_tree_settings(GenerationConfig(), ngram_min_match=1)
    assert resolve_tree_settings(draft, asked, sequences).ngram_min_match == 1


def test_one_token_is_match_enough_but_on_a_cpu():
    for shape in ("auto", [3, 5]):
        assert resolve_tree_settings(draft_with("meta", tree_shape=shape), GenerationConfig()).ngram_min_match == 1
        assert resolve_tree_settings(draft_with(tree_shape=shape), GenerationConfig()).ngram_min_match == 2
    asked = with_tree_settings(GenerationConfig(), ngram_min_match=1)
    assert resolve_tree_settings(draft_with(), asked).ngram_min_match == 1
    assert resolve_tree_settings(draft_with(ngram_min_match=3), GenerationConfig()).ngram_min_match == 3


def test_auto_survives_saving(tmp_path):
    draft_with().save_pretrained(tmp_path)
    draft = LongSpecDraftModel.from_pretrained(tmp_path)
    assert draft.config.tree_shape == "auto" == LongSpecDraftConfig().tree_shape
    assert tree_of(resolve_tree_settings(draft, GenerationConfig())) == CPU_TREE


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 1.0),
        ({"temperature": 0.5}, 1.0),  # nothing is sampled
        ({"do_sample": True}, 1.0),
        ({"do_sample": True, "temperature": 0.8}, 0.8),
        ({"do_sample": True, "temperature": 1e-9}, 0.1),
        ({"do_sample": True, "temperature": 100.0}, 10.0),
    ],
)
def test_paths_are_scored_at_the_temperature_of_the_call(options, expected):
    settings = resolve_tree_settings(draft_with(), GenerationConfig(**options))
    assert {tree.beam_temperature for tree in settings.trees} == {expected}


def test_settings_beside_the_tree_leave_auto():
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
