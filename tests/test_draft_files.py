"""What is saved with a draft beside its layer, and drafts whose files are not what they should be."""

import pytest
from models import learned, prompt, tiny_target
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from longspec_hf import LongSpecDraftModel, with_tree_settings
from longspec_hf.pairs import load_pair


@pytest.fixture
def saved(tmp_path):
    draft = learned(tiny_target(), draft_vocab_size=20)
    draft.generation_config = with_tree_settings(GenerationConfig(), tree_shape=[2, 2], max_tree_nodes=7)
    draft.save_pretrained(tmp_path / "draft")
    return tmp_path / "draft"


def test_generation_settings_are_saved_with_the_draft(saved):
    model = tiny_target()
    for loaded in (LongSpecDraftModel.from_pretrained(saved), AutoModelForCausalLM.from_pretrained(saved)):
        assert (list(loaded.generation_config.tree_shape), loaded.generation_config.max_tree_nodes) == ([2, 2], 7)
        out = model.generate(
            prompt(9), assistant_model=loaded.eval(), max_new_tokens=12, do_sample=False, return_dict_in_generate=True
        )
        assert set(out.speculation_stats.rounds_by_tree) <= {"2-2, 7 nodes"}


def test_a_draft_without_settings_leaves_none_of_an_earlier_one(saved):
    learned(tiny_target()).save_pretrained(saved)
    assert not (saved / "generation_config.json").exists()
    assert LongSpecDraftModel.from_pretrained(saved).generation_config is None


def test_settings_that_are_given_come_before_those_saved(saved):
    given = with_tree_settings(GenerationConfig(), tree_shape=[3])
    assert LongSpecDraftModel.from_pretrained(saved, generation_config=given).generation_config is given


def test_settings_that_cannot_be_read_are_not_passed_over(saved):
    (saved / "generation_config.json").write_text("{")
    with pytest.raises(OSError, match="generation_config"):
        LongSpecDraftModel.from_pretrained(saved)


@pytest.mark.parametrize(
    "content",
    [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", None],
    ids=["pointer", "cut off"],
)
def test_weights_that_cannot_be_read_are_named(saved, content):
    file = saved / "model.safetensors"
    file.write_bytes(content or file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{saved}.*whole safetensors files.*git-lfs"):
        LongSpecDraftModel.from_pretrained(saved)


def test_a_targets_weights_that_cannot_be_read_are_named(saved, tmp_path):
    target = tmp_path / "target"
    tiny_target().save_pretrained(target)
    (target / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="`target` must be"):
        load_pair(target, saved)


@pytest.mark.parametrize("token", [-1, 10**6])
def test_tokens_that_do_not_exist_are_refused(saved, token):
    tensors = load_file(saved / "model.safetensors")
    tensors["draft_token_ids"][3] = token
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"`draft_token_ids` from 0 to .*{token}"):
        LongSpecDraftModel.from_pretrained(saved)


def test_a_draft_saved_on_another_process_writes_nothing(tmp_path):
    draft = learned(tiny_target())
    draft.generation_config = GenerationConfig()
    draft.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other" / "generation_config.json").exists()
