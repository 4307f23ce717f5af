"""The text-generation pipeline with a draft, as an object and by name."""

import pytest
from models import learned, tiny_target
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, pipeline

from longspec_hf import LongSpecDraftModel


@pytest.fixture(scope="module")
def tokenizer():
    words = {f"w{number}": number for number in range(63)} | {"[UNK]": 63}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", pad_token="w0")


@pytest.mark.parametrize("by_name", [False, True], ids=["object", "name"])
def test_pipeline_takes_a_draft(tokenizer, by_name, tmp_path, monkeypatch):
    target = tiny_target()
    draft = learned(target)
    if by_name:
        draft.save_pretrained(tmp_path / "draft")
        draft = str(tmp_path / "draft")
    text = "w1 w5 w9 w9 w2"
    kwargs = {"max_new_tokens": 20, "do_sample": False, "return_tensors": True}
    plain = pipeline("text-generation", model=target, tokenizer=tokenizer)(text, **kwargs)
    assisted = pipeline("text-generation", model=target, tokenizer=tokenizer, assistant_model=draft)
    assert isinstance(assisted.assistant_model, LongSpecDraftModel)
    assert assisted.assistant_model.device == target.device and assisted.assistant_model.dtype == target.dtype
    used = []
    original = LongSpecDraftModel.next_token_logits
    monkeypatch.setattr(
        LongSpecDraftModel, "next_token_logits", lambda self, *args: used.append(1) or original(self, *args)
    )
    assert assisted(text, **kwargs) == plain
    assert used
    several = [text, "w3 w4", "w8"]
    assert assisted(several, batch_size=3, **kwargs) == pipeline("text-generation", model=target, tokenizer=tokenizer)(
        several, batch_size=3, **kwargs
    )


def test_other_assistants_reach_the_pipeline_as_before(tokenizer):
    target = tiny_target()
    plain = pipeline("text-generation", model=target, tokenizer=tokenizer)
    assisted = pipeline("text-generation", model=target, tokenizer=tokenizer, assistant_model=tiny_target(seed=4))
    assert isinstance(assisted.assistant_model, type(target))
    kwargs = {"max_new_tokens": 8, "do_sample": False, "return_tensors": True}
    assert assisted("w1 w2", **kwargs) == plain("w1 w2", **kwargs)
